"""Training: resume bit for bit, regimes, schedules, records, memory budget, and learning itself."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from chemistry import molecule, spec
from networks import KINDS, PARAMS

from replicate import flops, schedules
from replicate.ansatz import BUILT_IN
from replicate.regime import choose_regime, connectivity
from replicate.sector import Sector
from replicate.spec import AnsatzSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import Checkpoint, Training, train

SCHEDULES = ("constant", "cosine", "decay", "cooldown")


def make_point(name: str = "LiH", kind: str = "made", **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "molecule": spec(name),
        "ansatz": AnsatzSpec(kind=kind, params=PARAMS[kind]),
        "phase": PhaseSpec(width=8, depth=1),
        "steps": 12,
    }
    return Point(**{**fields, **changes})


def weights(run: Training) -> torch.Tensor:
    return torch.cat([w.detach().reshape(-1) for w in run.weights.values()])


def through_disk(saved: Checkpoint) -> Checkpoint:
    """What storing does to a checkpoint: tensors survive, JSON loses types."""
    tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    return Checkpoint(saved.step, tensors, json.loads(json.dumps(saved.meta)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampling", "annealing"),
    [("exponential", 0.5), ("exponential", 1.0), ("constant", None)],  # to the restart, beyond it, never
)
@pytest.mark.parametrize("regime", ["whole", "tree"])
def test_half_a_run_and_the_rest_is_a_run(
    kind: str, schedule: str, sampling: str, annealing: float | None, regime: str
) -> None:
    """k steps + restart + k steps = 2k steps, bit for bit: records, weights and the final evaluation."""
    anneal = {"annealing_lambda": 0.1, "annealing_fraction": annealing} if annealing else {}
    point = make_point(
        kind=kind,
        train=TrainSpec(schedule=schedule, warmup_fraction=0.2, **anneal),
        sampling=SamplingSpec(regime=regime, schedule=sampling, batch_max=40),
    )
    mol = molecule("LiH")
    straight = train(point, mol)
    records = list(straight)
    first = train(point, mol)
    half = [record for _, record in zip(range(6), first, strict=False)]
    second = train(point, mol, resume=through_disk(first.checkpoint()))
    rest = list(second)
    assert half + rest == records
    assert torch.equal(weights(second), weights(straight))
    assert second.evaluate() == straight.evaluate()


def test_checkpoint_of_another_point_is_refused() -> None:
    mol = molecule("LiH")
    saved = train(make_point(seed=1), mol).checkpoint()
    with pytest.raises(ValueError, match="checkpoint"):
        train(make_point(seed=2), mol, resume=saved)


@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_from_run_to_run(kind: str) -> None:
    runs = [train(make_point(kind=kind), molecule("LiH")) for _ in range(2)]
    records = [list(run) for run in runs]
    assert records[0] == records[1]
    other = list(train(make_point(kind=kind, seed=1), molecule("LiH")))
    assert other != records[0]


@pytest.mark.parametrize("mode", ["whole", "tree", "paper"])
def test_an_ansatz_from_outside_trains(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no closed form: its positions count 2 N_mod each, the phase network what it costs."""
    monkeypatch.setitem(BUILT_IN, "outside", BUILT_IN["made"])
    changes: dict[str, Any] = {"sampling": SamplingSpec(regime="whole" if mode == "whole" else "tree")}
    if mode == "paper":
        changes["local_energy"] = "paper"
    ours = AnsatzSpec(kind="outside", params=PARAMS["made"])
    mol = molecule("LiH")
    run = train(make_point(ansatz=ours, steps=1, **changes), mol)
    record = next(iter(run))
    assert record.flops_executed == sum(run.flops_parts.values())
    if mode == "whole":
        tree, phase = run.batch.tree, flops.phase_forward(8, 1, 12, rows=mol.search_space)
        expected = phase + 2 * run.n_modulus * tree.n_nodes
        assert run.flops_parts["forward"] == expected
        assert expected < run.flops_parts["backward"] <= 2 * expected
    if mode == "paper":
        passes = record.n_unique * mol.hamiltonian.n_unique_flips
        expected = flops.phase_forward(8, 1, 12, rows=passes) + 2 * run.n_modulus * 6 * passes
        keys = torch.as_tensor(run.sector.enumerate_keys())[: record.n_unique]
        expected += run.kernel.connected(keys).flops
        assert run.flops_parts["local_energy"] == expected


def test_small_memory_budget_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked evaluation and gradient give the same step."""
    changes: dict[str, Any] = {
        "precision": "float64",
        "sampling": SamplingSpec(regime="tree"),
        "kind": "transformer",
        "train": TrainSpec(annealing_lambda=0.3),
    }
    outcomes = []
    for chunk in (None, 7):
        if chunk:
            monkeypatch.setattr(Training, "chunk", chunk)
            monkeypatch.setattr(Training, "gradient_chunk", chunk)
        run = train(make_point("LiH", **changes), molecule("LiH"))
        outcomes.append((list(run)[-1], weights(run)))
    (one, one_weights), (two, two_weights) = outcomes
    assert one.energy == pytest.approx(two.energy, abs=1e-9)
    torch.testing.assert_close(one_weights, two_weights, rtol=0, atol=1e-7)


def test_records_say_what_happened() -> None:
    changing = TrainSpec(
        learning_rate=2e-3, schedule="cosine", warmup_fraction=0.3, annealing_lambda=0.1, clip=0.5
    )
    point = make_point(steps=10, train=changing)
    records = list(train(point, molecule("LiH")))
    assert [r.step for r in records] == list(range(1, 11))
    for step, record in enumerate(records):
        assert record.n_samples == schedules.n_samples(point.sampling, step, 10)
        assert record.learning_rate == schedules.learning_rate(point.train, step, 10)
        assert record.annealing == schedules.annealing(point.train, step, 10)
        assert 0 < record.n_unique <= 225
        assert record.variance > 0
        assert record.grad_norm > 0
        assert record.flops_executed > 0


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_first_step_is_adams_with_the_clipped_gradient(clip: float) -> None:
    """Moments (1 - beta) g and (1 - beta) g^2, and a move of -rate g / (|g| + eps), by hand."""
    settings = TrainSpec(learning_rate=3e-3, warmup_fraction=0.5, beta1=0.8, beta2=0.95, eps=1e-5, clip=clip)
    run = train(make_point(precision="float64", train=settings), molecule("LiH"))
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    record = run.advance()
    assert 0 < record.learning_rate < 3e-3
    gradient = {n: run.optimiser.state[w]["exp_avg"] / (1 - 0.8) for n, w in run.weights.items()}
    norm = torch.cat([g.reshape(-1) for g in gradient.values()]).norm().item()
    assert norm == pytest.approx(min(clip, record.grad_norm) if clip else record.grad_norm, rel=1e-4)
    for name, weight in run.weights.items():
        g = gradient[name]
        second = run.optimiser.state[weight]["exp_avg_sq"]
        torch.testing.assert_close(second, (1 - 0.95) * g**2, rtol=1e-9, atol=0)
        moved = before[name] - record.learning_rate * g / (g.abs() + 1e-5)
        torch.testing.assert_close(weight.detach(), moved, rtol=0, atol=1e-10)


def test_collapsed_run_is_not_hidden() -> None:
    """A step whose energy or gradient is not finite stops the run with a message."""
    run = train(make_point(), molecule("LiH"))
    with torch.no_grad():
        next(iter(run.weights.values())).fill_(math.nan)
    with pytest.raises((FloatingPointError, RuntimeError)):
        run.advance()


def test_study_schedule_of_samples() -> None:
    """10^(4 + 8 t / (0.9 T)) capped at 10^12."""
    sampling = SamplingSpec()
    assert schedules.n_samples(sampling, 0, 1000) == 10**4
    assert schedules.n_samples(sampling, 450, 1000) == pytest.approx(10 ** (4 + 8 * 0.5), rel=1e-9)
    assert schedules.n_samples(sampling, 900, 1000) == 10**12
    assert schedules.n_samples(sampling, 999, 1000) == 10**12
    assert schedules.n_samples(SamplingSpec(schedule="constant", n_max=500, n_min=5), 3, 10) == 500


def test_learning_rate_schedules() -> None:
    rate = schedules.learning_rate
    constant = TrainSpec(learning_rate=1.0, warmup_fraction=0.1)
    assert [rate(constant, t, 40) for t in (0, 3, 4, 39)] == pytest.approx([0.2, 0.8, 1.0, 1.0])
    for name in ("cosine", "decay"):
        train_spec = TrainSpec(learning_rate=1.0, schedule=name, final_fraction=0.1)
        values = [rate(train_spec, t, 100) for t in range(100)]
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(0.1)
        assert values[49] == pytest.approx(0.55)
    cooldown = TrainSpec(learning_rate=1.0, schedule="cooldown", cooldown_fraction=0.25)
    assert rate(cooldown, 74, 100) == 1.0
    assert rate(cooldown, 75, 100) == pytest.approx(0.96)
    assert rate(cooldown, 99, 100) == pytest.approx(0.0, abs=1e-12)


def test_entropy_weight_ends() -> None:
    train_spec = TrainSpec(annealing_lambda=0.2, annealing_fraction=0.5)
    assert [schedules.annealing(train_spec, t, 100) for t in (0, 25, 50, 99)] == pytest.approx(
        [0.2, 0.1, 0, 0]
    )


def test_regime_follows_cost_and_spec() -> None:
    water, big = Sector(7, 5, 5), Sector(15, 7, 7)
    assert choose_regime(make_point("H2O"), water, 228) == "whole"
    assert choose_regime(make_point("Li2O"), big, 3810) == "tree"
    forced = make_point("H2O", sampling=SamplingSpec(regime="tree"))
    assert choose_regime(forced, water, 228) == "tree"
    assert choose_regime(make_point("H2O", local_energy="paper"), water, 228) == "tree"


def test_connectivity_bounds_the_rows_of_the_matrix() -> None:
    mol = molecule("H2O")
    run = train(make_point("H2O"), mol)
    row_lengths = run.batch.matrix.crow_indices().diff()
    assert int(row_lengths.max()) <= connectivity(run.sector, mol.hamiltonian.n_unique_flips)
    assert connectivity(Sector(2, 1, 1), 100) == 1 + 2 + 1


def test_few_samples_keep_the_rule_in_one_pass() -> None:
    """B_max below |S| in the one-pass regime: never more unique samples than B_max."""
    point = make_point("LiH", sampling=SamplingSpec(regime="whole", batch_max=9))
    assert max(record.n_unique for record in train(point, molecule("LiH"))) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_energy_falls_and_never_below_fci(kind: str) -> None:
    mol = molecule("LiH")
    point = make_point("LiH", kind, steps=150, train=TrainSpec(learning_rate=3e-3, beta2=0.99))
    records = list(train(point, mol))
    run = train(point, mol)
    for _ in run:
        pass
    final = run.evaluate()
    assert final.energy < records[0].energy - 0.5
    assert final.energy > mol.e_fci - 1e-9
