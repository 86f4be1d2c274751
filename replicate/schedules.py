"""What changes along a run: learning rate, number of samples, entropy weight. Step t of T, t = 0..T-1."""

from __future__ import annotations

from math import cos, pi

from replicate.spec import SamplingSpec, TrainSpec


def learning_rate(train: TrainSpec, step: int, steps: int) -> float:
    """Adam's learning rate at `step` of `steps`.

    A linear warm-up over `warmup_fraction` of the run, then: constant; cosine or linear ("decay") down to
    `final_fraction` of the peak at the last step; "cooldown": constant, then linear over `cooldown_fraction`.
    """
    peak, floor = train.learning_rate, train.learning_rate * train.final_fraction
    warmup = round(train.warmup_fraction * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    start = warmup
    if train.schedule == "cooldown":
        start = max(warmup, steps - round(train.cooldown_fraction * steps))
    if train.schedule == "constant" or step < start:
        return peak
    done = (step - start + 1) / max(steps - start, 1)
    if train.schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + cos(pi * done))
    return peak + (floor - peak) * done


def n_samples(sampling: SamplingSpec, step: int, steps: int) -> int:
    """n_s(t) = min(n_max, n_min (n_max/n_min)^(t / (g T))): the study's 10^(4 + 8 t / (0.9 T)) by default."""
    if sampling.schedule == "constant":
        return int(sampling.n_max)
    exponent = step / (sampling.growth_fraction * steps)
    return int(min(sampling.n_max, sampling.n_min * (sampling.n_max / sampling.n_min) ** exponent))


def annealing(train: TrainSpec, step: int, steps: int) -> float:
    """Entropy weight lambda(t) in Hartree: linear from `annealing_lambda` to 0 at that fraction of T."""
    return train.annealing_lambda * max(0.0, 1.0 - step / (train.annealing_fraction * steps))
