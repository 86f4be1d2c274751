"""Variational Monte Carlo of one point: a generator of records that knows nothing of files.

    run = train(point, molecule)
    for record in run: ...
    run.evaluate()

Two regimes, one distribution (DESIGN.md section 2). `whole`: one forward pass over the sector gives all
probabilities; samples, local energies and the gradient come from that pass. `tree`: samples grow token by
token, their connected determinants are evaluated beside them. The regime is chosen by cost and recorded.
A run is made by one process or by several (replicate/ranks.py), each with its range of the determinants.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from replicate import flops, schedules
from replicate.ansatz import build_wave_function
from replicate.capture import Dial, StepGraph, is_on
from replicate.energy import (
    LOCAL_ENERGY,
    Evaluated,
    amplitudes,
    energy_stats,
    local_energies_sampled,
    local_from_product,
)
from replicate.executed import NetworkFlops
from replicate.hamiltonian import Hamiltonian, Kernel
from replicate.memory import keep_freed_memory
from replicate.provenance import stream_seed
from replicate.ranks import ALONE, Group
from replicate.regime import choose_regime
from replicate.sampler import Advance, Samples, sample_tree, split_binary, truncate, whole_passes
from replicate.sector import Sector
from replicate.spec import Point
from replicate.tree import PrefixTree, build_tree

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Record:
    """One optimisation step. Energies in Hartree, of the step's samples before its update."""

    step: int
    energy: float
    variance: float
    n_unique: int
    n_samples: int
    learning_rate: float
    grad_norm: float
    annealing: float
    flops_executed: int


@dataclass(frozen=True)
class Evaluation:
    """The final state, independent of training. `exact`: enumerated over the sector, `energy_stderr` is 0.

    Otherwise from `n_samples` kept samples on `n_unique` determinants; the standard error is the statistical
    one, sqrt(variance / n_samples), and knows nothing of determinants that truncation left out.
    """

    energy: float
    energy_stderr: float
    variance: float
    n_unique: int
    n_samples: int
    exact: bool


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on bit for bit: tensors (weights-only loadable) and JSON."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Forward:
    """A pass with gradients over samples: log p and phi (batch,), what it cost and what its gradient will."""

    log_prob: Tensor
    phase: Tensor
    flops: int
    flops_backward: int


@dataclass(frozen=True)
class SectorBatch:
    """The whole sector as one batch: its keys, and of this rank's `rows` (those of all: `cuts`) the tree, the
    inputs of the phase network and the sparse sector matrix."""

    keys: Tensor
    cuts: tuple[int, ...]
    rows: slice
    tree: PrefixTree
    phase_inputs: tuple[Tensor, Tensor]
    matrix: Tensor


def train(
    point: Point,
    problem: Any,
    *,
    device: str | torch.device = "cpu",
    resume: Checkpoint | None = None,
    group: Group = ALONE,
    capture: bool = True,
) -> Training:
    """A run of `point` on `problem` (a Hamiltonian, or a molecule that has one), new or resumed.

    `capture`: record steps of fixed shapes as a CUDA graph, where `device` is a GPU.
    """
    hamiltonian = problem if isinstance(problem, Hamiltonian) else problem.hamiltonian
    return Training(point, hamiltonian, torch.device(device), resume, group, capture)


PARTS = ("sampling", "forward", "local_energy", "backward")
"""Named parts of a step. `forward`: the pass with gradients, which serves local energies too where it can."""


class Stopwatch:
    """Seconds by part of a step: `lap` ends a part, `stop` the step.

    On CUDA the marks are events of the stream, since kernels run after the calls that ask for them; `stop`
    expects that the step has just been waited for. Marks made while a graph is recorded are part of it, and
    `stop` reads them after every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """End `part`, which began where the one before ended."""
        self._marks.append((part, self._now()))

    def stop(self) -> None:
        """Add the step's parts to `seconds`."""
        if self.cuda:
            self._marks[-1][1].synchronize()
        for (_, before), (part, after) in pairwise(self._marks):
            took = before.elapsed_time(after) / 1e3 if self.cuda else after - before
            self.seconds[part] += took


class Training:
    """Iterates over one `Record` per optimisation step; can be checkpointed between any two."""

    def __init__(
        self,
        point: Point,
        hamiltonian: Hamiltonian,
        device: torch.device,
        resume: Checkpoint | None,
        group: Group = ALONE,
        capture: bool = True,
    ) -> None:
        keep_freed_memory()
        self.point, self.device, self.hamiltonian, self.group = point, device, hamiltonian, group
        self.sector = Sector(hamiltonian.n_qubits // 2, hamiltonian.n_alpha, hamiltonian.n_beta, point.order)
        self.kernel = Kernel(hamiltonian, point.order, device)
        self.wave = build_wave_function(
            self.sector,
            point.ansatz.kind,
            point.ansatz.params,
            point.phase.width,
            point.phase.depth,
            seed=stream_seed(point.seed, point.id, "initialisation"),
            phase_scale=point.phase.init_scale,
            dtype=DTYPES[point.precision],
            device=device,
        )
        self.generator = torch.Generator(device)
        self.generator.manual_seed(stream_seed(point.seed, point.id, "samples"))
        self.weights = dict(self.wave.named_weights())
        self.optimiser = torch.optim.Adam(
            self.weights.values(),
            lr=point.train.learning_rate,
            betas=(point.train.beta1, point.train.beta2),
            eps=point.train.eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.regime = choose_regime(point, self.sector, hamiltonian.n_unique_flips)
        self._batch: SectorBatch | None = None
        self.step = 0
        self.watch = Stopwatch(device)
        self.network_flops = NetworkFlops(point, self.sector.n_qubits, self.wave.n_modulus)
        self.flops_parts = dict.fromkeys(PARTS, 0)  # executed, of the steps made here
        if resume is not None:
            self._restore(resume)
        fixed = self.regime == "whole" and point.sampling.batch_max >= self.sector.size and group.size == 1
        self._parts: dict[str, int] = {}  # executed FLOPs of the last step made as it is
        self._step: Callable[..., Tensor] = self._update
        if capture and fixed and device.type == "cuda":
            self._step = StepGraph(self._update, device, self.generator)

    @property
    def n_modulus(self) -> int:
        """N_mod."""
        return self.wave.n_modulus

    @property
    def n_phase(self) -> int:
        """N_ph."""
        return self.wave.n_phase

    @property
    def wall_parts(self) -> dict[str, float]:
        """Seconds by part of the steps made here; `backward` with clipping and update."""
        return self.watch.seconds

    def __iter__(self) -> Iterator[Record]:
        while self.step < self.point.steps:
            yield self.advance()

    def advance(self) -> Record:
        """Make one optimisation step."""
        step, steps, spec = self.step, self.point.steps, self.point
        drawn = schedules.n_samples(spec.sampling, step, steps)
        rate = schedules.learning_rate(spec.train, step, steps)
        entropy = schedules.annealing(spec.train, step, steps)
        # The only transfer from the device: everything a record needs, at once.
        energy, variance, n_unique, grad_norm = self._step(drawn, entropy, rate).tolist()
        self.watch.stop()
        parts = self.group.total(self._parts)
        for name, executed in parts.items():
            self.flops_parts[name] += executed
        if not math.isfinite(energy) or not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step + 1}: energy {energy}, gradient norm {grad_norm}")
        self.step += 1
        total = sum(parts.values())
        return Record(self.step, energy, variance, int(n_unique), drawn, rate, grad_norm, entropy, total)

    def _update(self, drawn: Dial, entropy: Dial, rate: Dial) -> Tensor:
        """Energy, variance, unique samples, gradient norm before the update: float64 (4,), on the device."""
        take = self._whole_step if self.regime == "whole" else self._tree_step
        outcome, self._parts = take(drawn, entropy)
        weights = self.weights.values()
        self.group.sum_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, self.point.train.clip or math.inf, foreach=True)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        numbers = torch.cat([outcome, norm.to(torch.float64).view(1)])
        self.watch.lap("backward")
        return numbers

    # -- the whole sector in one pass -----------------------------------------------------------------------

    @property
    def batch(self) -> SectorBatch:
        """The sector's determinants with everything about them that does not change, made on first use."""
        if self._batch is None:
            keys = torch.as_tensor(self.sector.enumerate_keys(), device=self.device)
            tree = build_tree(keys, self.sector, self.wave.feasible(self.device))
            nodes = torch.bincount(tree.first_row, minlength=len(keys))
            cuts = self.group.balanced(nodes * self.n_modulus + self.n_phase)
            rows = self.group.own(cuts)
            if self.group.size > 1:
                tree = build_tree(keys[rows], self.sector, self.wave.feasible(self.device))
            matrix = self.kernel.sector_matrix(keys, rows=rows)
            self._batch = SectorBatch(keys, cuts, rows, tree, self.wave.phase.inputs(keys[rows]), matrix)
        return self._batch

    def _whole_step(self, n_samples: Dial, entropy: Dial) -> tuple[Tensor, dict[str, int]]:
        batch, group = self.batch, self.group
        self.watch.start()
        log_prob = self.wave.log_prob(batch.tree)
        phase = self.wave.phase.evaluate(*batch.phase_inputs)
        self.watch.lap("forward")
        with torch.no_grad():
            every_log_prob = group.gather(log_prob.detach(), batch.cuts)
            every_phase = group.gather(phase.detach(), batch.cuts)
            counts = self._draw(n_samples, every_log_prob)
            weights = counts / counts.sum()
            self.watch.lap("sampling")
            psi = amplitudes(every_log_prob, every_phase)
            if self.point.local_energy == "sampled":
                psi = psi * (counts > 0).unsqueeze(1)
            own = local_from_product(psi[batch.rows], batch.matrix @ psi)
            outcome = self._outcome(group.gather(own, batch.cuts), weights, counts)
            mean_log_prob = (weights * every_log_prob).sum() if is_on(entropy) else 0.0
        self.watch.lap("local_energy")
        self._backward(log_prob, phase, own, weights[batch.rows], outcome, entropy, mean_log_prob)
        return outcome, self._whole_flops

    @cached_property
    def _whole_flops(self) -> dict[str, int]:
        """Executed FLOPs by part: every step makes the same passes. Samples and probabilities are products of
        no matrices."""
        cost = Evaluated.of(self.batch.tree)
        return {
            "sampling": 0,
            "forward": self.network_flops.tree(cost),
            "local_energy": 4 * self.batch.matrix.values().shape[0],  # real and imaginary part of psi
            "backward": self.network_flops.tree(cost, backward=True),
        }

    def _draw(self, n_samples: Dial, log_prob: Tensor) -> Tensor:
        """Counts of the sector's determinants: float64 (size,)."""
        if not self.group.first:
            return self.group.broadcast(torch.empty_like(log_prob))
        counts = split_binary(n_samples, log_prob.exp(), self.generator)
        if self.point.sampling.batch_max < self.sector.size:
            counts = self._truncate(counts)
        return self.group.broadcast(counts)

    def _truncate(self, counts: Tensor) -> Tensor:
        keys = self.batch.keys
        kept = truncate(keys, counts, self.sector.n_orbitals, self.point.sampling.batch_max)
        out = torch.zeros_like(counts)
        out[torch.searchsorted(keys, kept.keys)] = kept.counts
        return out

    # -- a growing tree of samples --------------------------------------------------------------------------

    def _tree_step(self, n_samples: Dial, entropy: Dial) -> tuple[Tensor, dict[str, int]]:
        spec, count, executed = self.point, self.network_flops, dict.fromkeys(PARTS, 0)
        self.watch.start()
        anew = self._advance_anew
        samples = self._sample(n_samples, spec.sampling.batch_max, self.generator, anew)
        executed["sampling"] = count.sampling(samples.nodes, reuse=anew is None)
        keys, weights = samples.keys, samples.weights
        self.watch.lap("sampling")
        own = self.group.own(self.group.even(keys.shape[0]))
        # One forward pass serves the local energies and the gradient where all of its activations fit.
        forward = self._forward(keys[own]) if own.stop - own.start <= self.gradient_chunk else None
        self.watch.lap("forward")
        with torch.no_grad():
            place = (self.wave, self.kernel, keys, self.chunk, self.group)
            if forward and spec.local_energy == "sampled":
                amplitude = (forward.log_prob.detach(), forward.phase.detach().to(torch.float64))
                found = local_energies_sampled(*place, amplitude)
            else:
                found = LOCAL_ENERGY[spec.local_energy](*place)
            outcome = self._outcome(found.values, weights, samples.counts)
            mean_log_prob = (weights * found.log_prob).sum() if is_on(entropy) else 0.0
        cost = found.cost
        passes = count.flat(cost.determinants) if self.no_reuse else count.tree(cost)
        executed["local_energy"] = found.element_flops + passes
        self.watch.lap("local_energy")
        for start in range(own.start, own.stop, self.gradient_chunk):
            rows = slice(start, min(start + self.gradient_chunk, own.stop))
            part = forward or self._forward(keys[rows])
            self.watch.lap("forward")
            local, weight = found.values[rows], weights[rows]
            self._backward(part.log_prob, part.phase, local, weight, outcome, entropy, mean_log_prob)
            self.watch.lap("backward")
            executed["forward"] += part.flops
            executed["backward"] += part.flops_backward
        return outcome, executed

    @property
    def no_reuse(self) -> bool:
        """Whether the step does what the study's FLOP estimate counts: whole passes, nothing shared or kept.

        What is still less than the estimate: a prefix that several samples share is sampled from once, and
        one whose next token is forced is not sampled from.
        """
        return self.point.local_energy == "paper"

    @property
    def _advance_anew(self) -> Advance | None:
        """Sampling without a cache in `paper` mode, unless the study samples with a state (RetNet)."""
        passes = flops.SAMPLING.get(self.point.ansatz.kind, ("passes",))[0] == "passes"
        return whole_passes(self.wave) if self.no_reuse and passes else None

    def _sample(
        self,
        n_samples: Dial,
        batch_max: int,
        generator: torch.Generator,
        advance: Advance | None = None,
    ) -> Samples:
        """`sample_tree` on the first rank, which has its cost (`nodes`), for all."""
        if self.group.first:
            samples = sample_tree(self.wave, n_samples, batch_max, generator, advance)
            self.group.agree(samples.keys.shape[0])
        else:
            keys = torch.empty(self.group.agree(0), dtype=torch.int64, device=self.device)
            samples = Samples(keys, torch.empty_like(keys, dtype=torch.float64))
        self.group.broadcast(samples.keys)
        self.group.broadcast(samples.counts)
        return samples

    def _forward(self, keys: Tensor) -> Forward:
        """log p and phi of sorted distinct keys, with gradients."""
        phase, count = self.wave.phase(keys), self.network_flops
        if self.no_reuse:
            rows = keys.shape[0]
            log_prob = self.wave.flat_log_prob(keys)
            return Forward(log_prob, phase, count.flat(rows), count.flat(rows, backward=True))
        tree = build_tree(keys, self.sector, self.wave.feasible(self.device))
        log_prob = self.wave.log_prob(tree)
        cost = Evaluated.of(tree)
        return Forward(log_prob, phase, count.tree(cost), count.tree(cost, backward=True))

    @property
    def chunk(self) -> int:
        """Determinants per forward pass without gradient, from the memory budget."""
        widest = max(parameter.shape[0] for parameter in self.weights.values() if parameter.dim() == 2)
        per_row = 8 * (12 * self.sector.n_orbitals + 4 * widest)  # tree arrays, activations of one layer
        if self.no_reuse:
            per_row = 8 * 6 * widest * self.sector.n_orbitals  # T positions each, nothing shared
        return max(64, self.point.memory_budget_mb * 2**20 // 2 // per_row)

    @property
    def gradient_chunk(self) -> int:
        """Determinants per forward and backward pass: all activations are kept."""
        kept = sum(parameter.shape[0] for parameter in self.weights.values() if parameter.dim() == 2)
        if self.no_reuse:
            kept *= self.sector.n_orbitals  # T positions each, nothing shared
        per_row = 8 * (12 * self.sector.n_orbitals + 8 * kept)
        return max(64, self.point.memory_budget_mb * 2**20 // 2 // per_row)

    # -- shared ---------------------------------------------------------------------------------------------

    def _outcome(self, local: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Energy, variance and number of unique samples: float64 (3,), still on the device."""
        stats = energy_stats(local, weights)
        unique = (counts > 0).sum().to(torch.float64)
        return torch.stack([stats.energy, stats.variance, unique])

    def _backward(
        self,
        log_prob: Tensor,
        phase: Tensor,
        local: Tensor,
        weights: Tensor,
        outcome: Tensor,
        entropy: Dial,
        mean_log_prob: Tensor | float,
    ) -> None:
        """Accumulate 2 Re E[(E_loc - E)^* d log psi], log psi = 1/2 log p + i phi (SCIENCE.md section 3).

        With an entropy weight the objective is E - lambda S, S = -E[log p] (variational neural annealing).
        `outcome` and `mean_log_prob` are of all samples, the rest of any part of them.
        """
        signal = local.real - outcome[0]
        if is_on(entropy):
            signal = signal + entropy * (log_prob.detach() - mean_log_prob)
        to_log_prob = weights * signal
        to_phase = (2 * weights * local.imag).to(phase.dtype)
        live = [(log_prob, to_log_prob), (phase, to_phase)]
        live = [(output, grad) for output, grad in live if output.requires_grad]
        torch.autograd.backward([output for output, _ in live], [grad for _, grad in live])

    # -- the final state ------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Energy and variance of the current state, independent of the training samples.

        Exact over the sector up to `evaluation.exact_limit` determinants; beyond, from samples of their own
        random stream, with the exact local energy whatever mode the point trains on.
        """
        spec = self.point.evaluation
        if self.sector.size <= spec.exact_limit:
            batch, group = self.batch, self.group
            log_prob = group.gather(self.wave.log_prob(batch.tree), batch.cuts)
            phase = group.gather(self.wave.phase.evaluate(*batch.phase_inputs), batch.cuts)
            psi = amplitudes(log_prob, phase)
            product = group.gather(batch.matrix @ psi, batch.cuts)
            norm = (psi**2).sum()
            mean = (psi * product).sum() / norm
            # |H psi - E psi|^2, not a mean of E_loc: it also counts where psi has underflowed.
            spread = ((product - mean * psi) ** 2).sum() / norm
            energy, variance = mean.item(), spread.item()
            return Evaluation(energy, 0.0, variance, self.sector.size, 0, exact=True)
        generator = torch.Generator(self.device)
        generator.manual_seed(stream_seed(self.point.seed, self.point.id, "evaluation"))
        samples = self._sample(spec.n_samples, spec.batch_max, generator)
        local = LOCAL_ENERGY["exact"](self.wave, self.kernel, samples.keys, self.chunk, self.group).values
        stats = energy_stats(local, samples.weights)
        kept = samples.counts.sum().item()
        energy, variance = stats.energy.item(), stats.variance.item()
        return Evaluation(
            energy, math.sqrt(variance / kept), variance, samples.keys.shape[0], int(kept), exact=False
        )

    # -- checkpoints ----------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """The state after the last step: parameters, Adam's moments and the random stream."""
        tensors = {f"weight/{name}": weight.detach().cpu().clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in self.optimiser.state.get(weight, {}).items():
                tensors[f"adam/{name}/{key}"] = value.detach().cpu().clone()
        tensors["generator"] = self.generator.get_state().clone()
        return Checkpoint(self.step, tensors, {"point_id": self.point.id})

    def _restore(self, saved: Checkpoint) -> None:
        if saved.meta.get("point_id") != self.point.id:
            raise ValueError(f"the checkpoint is of point {saved.meta.get('point_id')}, not {self.point.id}")
        self.step = saved.step
        for name, weight in self.weights.items():
            weight.data.copy_(saved.tensors[f"weight/{name}"])
            prefix = f"adam/{name}/"
            keys = [key for key in saved.tensors if key.startswith(prefix)]
            if keys:
                state = {key.removeprefix(prefix): saved.tensors[key] for key in keys}
                self.optimiser.state[weight] = {key: value.to(self.device) for key, value in state.items()}
        self.generator.set_state(saved.tensors["generator"])
