"""Device audit without a GPU: the step's tensor work on fake tensors (device_audit.py), transfers counted.

Where there is a GPU the same steps also run on it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from chemistry import molecule, spec
from devices import DEVICES, needs_gpu
from networks import KINDS, PARAMS

from replicate import hamiltonian
from replicate.energy import LOCAL_ENERGY
from replicate.spec import AnsatzSpec, EvaluationSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import Training, train

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks.counting import count_transfers


def make_point(kind: str, **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "molecule": spec("LiH"),
        "ansatz": AnsatzSpec(kind=kind, params=PARAMS[kind]),
        "phase": PhaseSpec(width=8, depth=1),
        "steps": 5,
    }
    return Point(**{**fields, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_step_waits_at_most_three_times(kind: str) -> None:
    """Everything that a record needs comes in one transfer, and nothing else is waited for."""
    run = train(make_point(kind), molecule("LiH"))
    run.advance()  # the sector's batch is made once
    assert run.regime == "whole"
    seen = count_transfers(run.advance)
    assert "tolist" in seen  # the counter sees what is there
    assert len(seen) <= 3, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_growing_tree_waits_twice_a_level_and_a_few_times(kind: str, mode: str) -> None:
    """The sizes of a level are data (its open prefixes, its drawn ones); the rest is a fixed number."""
    sampling = SamplingSpec(regime="tree")
    run = train(make_point(kind, sampling=sampling, local_energy=mode), molecule("LiH"))
    run.advance()
    seen = count_transfers(run.advance)
    assert 2 * run.sector.n_orbitals < len(seen) <= 2 * run.sector.n_orbitals + 14, seen


@pytest.mark.parametrize("device", ["cuda", "mockgpu"])
def test_step_runs_on_fake_tensors(device: str) -> None:
    """In a process of its own: registering a backend cannot be undone, and a mistake there may abort."""
    script = Path(__file__).with_name("device_audit.py")
    path = [str(script.parents[1]), os.environ.get("PYTHONPATH", "")]  # also where nothing is installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, script, device],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in KINDS:
        assert f"{kind}: every tensor of the step on {device}" in done.stdout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regime", ["whole", "tree"])
def test_steps_on_every_device(device: str, kind: str, regime: str) -> None:
    """First energies agree with the CPU's from the same initial state, up to the samples' own noise."""
    point = make_point(kind, sampling=SamplingSpec(regime=regime, schedule="constant"))
    run = train(point, molecule("LiH"), device=device)
    first = run.advance()
    reference = train(point, molecule("LiH")).advance()
    assert first.energy == pytest.approx(reference.energy, abs=1e-4)
    assert all(weight.device.type == device for weight in run.weights.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_dials_are_the_numbers_that_they_show(kind: str, entropy: float) -> None:
    """What a recorded step reads as tensors changes nothing, bit for bit; other values do."""
    weights = []
    for drawn, weight in ((10**8, entropy), (number(1e8), number(entropy)), (number(1e6), number(0.1))):
        run = train(make_point(kind), molecule("LiH"))
        for _ in range(3):
            seen = run._update(drawn, weight, 1e-2)
        weights.append(torch.cat([seen, *(w.detach().double().view(-1) for w in run.weights.values())]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# -- a GPU against this CPU ------------------------------------------------------------------------------


def far_from_start(run: Training) -> None:
    """The same random step away from the initial parameters on every device."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in run.weights.values():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight += (0.1 * noise).to(weight)


def pair(point: Point, name: str) -> tuple[Training, Training]:
    """The same run on the CPU and on the GPU."""
    runs = train(point, molecule(name)), train(point, molecule(name), device="cuda")
    for run in runs:
        far_from_start(run)
    return runs


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|; NaN stays NaN."""
    value, reference = value.detach().cpu(), reference.detach()
    return float((value - reference).norm() / reference.norm())


@needs_gpu
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("name", ["LiH", "CH2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gives_the_numbers_of_the_cpu(
    kind: str, name: str, precision: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log p, phi and their gradients over the sector, local energies in three modes, the final state."""
    for least in ("_CPU_CLASSES_FROM", "_DEVICE_CLASSES_FROM"):
        monkeypatch.setattr(hamiltonian, least, 0)  # symmetries, too, on these few determinants
    runs = pair(make_point(kind, molecule=spec(name), precision=precision), name)
    seen: list[dict[str, torch.Tensor]] = []
    for run in runs:
        log_prob = run.wave.log_prob(run.batch.tree)
        phase = run.wave.phase.evaluate(*run.batch.phase_inputs)
        (log_prob.sum() + (phase * torch.arange(len(phase), device=run.device)).sum()).backward()
        numbers = {"log p": log_prob, "phi": phase}
        numbers |= {f"d {n}": w.grad for n, w in run.weights.items() if w.grad is not None}
        keys = run.batch.keys[::2].contiguous()
        for mode, local in LOCAL_ENERGY.items():
            numbers[mode] = local(run.wave, run.kernel, keys, 1000).values
        final = run.evaluate()
        numbers["energy"] = torch.tensor([final.energy, final.variance], dtype=torch.float64)
        seen.append(numbers)
    assert len(seen[0]) > 8
    for what, reference in seen[0].items():
        if reference.norm() > 0:
            assert relative(seen[1][what], reference) < bound, what


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regime", ["whole", "tree"])
def test_gpu_waits_for_nothing_but_its_record(kind: str, regime: str) -> None:
    """What CUDA itself counts as a wait: one in the one-pass regime; two a level and a few in the other."""
    run = train(make_point(kind, sampling=SamplingSpec(regime=regime)), molecule("LiH"), device="cuda")
    for _ in range(3):
        run.advance()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.advance()
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    most = 3 if regime == "whole" else 2 * run.sector.n_orbitals + 14
    assert 1 <= len(waits) <= most, len(waits)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_run_ends_where_the_cpu_run_ends(kind: str) -> None:
    """Three hundred steps of the same point: different samples, the same physics."""
    point = make_point(kind, steps=300, evaluation=EvaluationSpec(exact_limit=1000))
    energies = []
    for device in ("cpu", "cuda"):
        run = train(point, molecule("LiH"), device=device)
        for record in run:
            assert math.isfinite(record.energy)
        energies.append(run.evaluate().energy)
    reference = molecule("LiH")
    assert reference.e_fci is not None
    assert min(energies) >= reference.e_fci - 1e-9
    assert abs(energies[0] - energies[1]) < 0.25 * (reference.e_hf - reference.e_fci)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_run_goes_on_from_its_checkpoint(kind: str) -> None:
    point = make_point(kind, steps=8)
    whole = train(point, molecule("LiH"), device="cuda")
    saved = None
    for record in whole:
        if record.step == 4:
            saved = whole.checkpoint()
    assert saved is not None
    resumed = train(point, molecule("LiH"), device="cuda", resume=saved)
    assert [record.step for record in resumed] == [5, 6, 7, 8]
    for name, weight in whole.weights.items():
        assert relative(resumed.weights[name], weight.cpu()) < 1e-4


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_steps(kind: str) -> None:
    """A recorded step goes on as the step itself would: dials, random numbers, moments and weights."""
    changes: dict[str, Any] = {
        "precision": "float64",
        "steps": 12,
        "train": TrainSpec(annealing_lambda=0.5, annealing_fraction=0.6),
        "sampling": SamplingSpec(n_min=10**8, n_max=10**12),
    }
    point = make_point(kind, **changes)
    runs = [train(point, molecule("LiH"), device="cuda", capture=capture) for capture in (True, False)]
    replayed, called = ([*run] for run in runs)
    assert len({record.n_samples for record in called}) > 8
    assert {record.annealing > 0 for record in called} == {True, False}
    for one, other in zip(replayed, called, strict=True):
        assert one.energy == pytest.approx(other.energy, abs=1e-5)  # 10^8 samples
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    for name, weight in runs[1].weights.items():
        assert relative(runs[0].weights[name], weight.detach().cpu()) < 1e-4, name
    assert all(seconds > 0 for seconds in runs[0].wall_parts.values())
