"""FLOPs: closed forms against torch's counter, worked values, and executed counts of whole steps."""

from __future__ import annotations

import csv
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chemistry import molecule, spec
from networks import KINDS, PARAMS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from replicate import flops, trainer
from replicate.ansatz import Level, build_wave_function
from replicate.ansatz.transformer import BLOCK_WIDTH
from replicate.energy import Evaluated
from replicate.executed import NetworkFlops
from replicate.hamiltonian import Kernel
from replicate.sampler import sample_tree, whole_passes
from replicate.sector import Sector
from replicate.spec import AnsatzSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import train
from replicate.tree import START, build_tree

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not an installed package
from benchmarks import retention
from benchmarks.counting import count_flops


def counted(function: Any, *args: Any) -> int:
    # The counter knows no CPU flash attention (it would count zero): spell attention out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    return int(counter.get_total_flops())


def random_params(kind: str, rng: random.Random) -> dict[str, int]:
    if kind == "made":
        return {"width": rng.randint(1, 40), "depth": rng.randint(1, 3)}
    heads = rng.choice([1, 2, 4])
    d = heads * rng.choice([2, 4, 6])
    return {"d": d, "heads": heads, "ff": rng.randint(1, 40), "layers": rng.randint(1, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_closed_forms_equal_the_counter(kind: str) -> None:
    """Exactly, over 20 random shapes. MADE: N_mod counts its biases, which a product does not."""
    rng = random.Random(0)
    for _ in range(20):
        n_orbitals, params, batch = rng.randint(2, 9), random_params(kind, rng), rng.randint(1, 5)
        sector = Sector(n_orbitals, 1, 1)
        wave = build_wave_function(sector, kind, params, 4, 1, seed=0)
        keys = torch.as_tensor(sector.enumerate_keys())[:batch]
        expected = flops.forward_estimate(kind, params, sector.n_qubits)
        if kind == "made":
            biases = params["width"] * params["depth"] + 2 * sector.n_qubits
            expected -= 2 * biases
        assert counted(wave.network.flat_logits, keys) == len(keys) * expected
        phase = flops.phase_forward(4, 1, sector.n_qubits, rows=len(keys))
        assert counted(wave.phase, keys) == phase


def test_recurrent_form_differs_by_the_outer_product() -> None:
    """The counter sees q S as a product and k v^T, element-wise, as nothing: 2 L T d^2 / h."""
    rng = random.Random(1)
    for _ in range(20):
        n_orbitals, params = rng.randint(2, 9), random_params("retnet", rng)
        sector = Sector(n_orbitals, 1, 1)
        wave = build_wave_function(sector, "retnet", params, 4, 1, seed=0)
        keys = torch.as_tensor(sector.enumerate_keys())[:3]
        outer = 2 * params["layers"] * n_orbitals * params["d"] ** 2 // params["heads"]
        seen = counted(wave.modulus.flat_logits, keys, "recurrent")
        assert seen == len(keys) * (flops.recurrent_estimate(params, sector.n_qubits) - outer)


def test_recurrent_beats_parallel_when_the_sequence_is_longer_than_a_head() -> None:
    """n/2 > d/h, exactly (SCIENCE.md section 6)."""
    for tokens in range(2, 32):
        for heads, d_head in ((1, 4), (2, 8), (4, 10), (8, 2)):
            params = {"d": heads * d_head, "heads": heads, "ff": 16, "layers": 2}
            recurrent = flops.recurrent_estimate(params, 2 * tokens)
            parallel = flops.forward_estimate("retnet", params, 2 * tokens)
            assert (recurrent < parallel) == (tokens > d_head)


def test_both_forms_are_measured_and_counted() -> None:
    """The benchmark of the two forms: its FLOPs are the counter's, but for the state's outer products."""
    row = retention.measure(tokens=6, heads=4, rows=3, repeats=1, d=16)
    assert (row.tokens, row.d_head, row.rows) == (6, 4, 3)
    network = retention.RetNet(Sector(6, 3, 3), d=16, heads=4, ff=64, layers=1)
    x = torch.zeros(3, 6, 16)
    assert counted(network.sequence_logits, x) == 3 * row.pass_flops_parallel
    outer = 2 * 6 * 16 * 4
    assert counted(network.sequence_logits, x, "recurrent") == 3 * (row.pass_flops_recurrent - outer)
    assert row.gain("retention_flops") == 6 / 4
    for what in ("retention_seconds", "pass_seconds"):
        assert row.gain(what) > 0
    text = "\n".join(retention.markdown([row], "here"))
    assert f"| 6 | 4 | 1.50 | {row.gain('retention_seconds'):.2f} | {row.gain('pass_flops'):.2f} |" in text


def test_crossing_is_the_length_from_which_on_it_pays() -> None:
    row = retention.measure(tokens=3, heads=1, rows=1, repeats=1, d=4)
    times = ((4, 2.0), (6, 0.5), (8, 1.5), (10, 3.0))
    rows = [replace(row, tokens=t, pass_seconds_parallel=g, pass_seconds_recurrent=1.0) for t, g in times]
    assert retention.crossing(rows, "pass_seconds") == "8"
    assert retention.crossing(rows[:2], "pass_seconds") == "none up to 6"


def test_committed_forms_are_those_of_the_closed_forms() -> None:
    """artifacts/cost/retention.csv: FLOPs as counted now, and recurrent ahead exactly where n/2 > d/h."""
    path = Path(__file__).parents[1] / "artifacts" / "cost" / "retention.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(retention.TOKENS) * len(retention.HEADS)
    for row in rows:
        tokens, d_head = int(row["tokens"]), int(row["d_head"])
        params = {"d": retention.D, "heads": retention.D // d_head, "ff": 4 * retention.D, "layers": 1}
        parallel, recurrent = int(row["pass_flops_parallel"]), int(row["pass_flops_recurrent"])
        assert parallel == flops.forward_estimate("retnet", params, 2 * tokens)
        assert recurrent == flops.recurrent_estimate(params, 2 * tokens)
        assert (recurrent < parallel) == (tokens > d_head)
        assert float(row["pass_seconds_recurrent"]) > 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("made", ["1.65e+09", "1.06e+10", "9.51e+10"]),
        ("transformer", ["5.54e+10", "4.24e+11", "4.50e+12"]),
        ("retnet", ["5.63e+10", "4.31e+11", "4.56e+12"]),
    ],
)
def test_worked_values(kind: str, expected: list[str]) -> None:
    """FLOP per step at the default sizes: H2O, N2, Li2O with B = 441, 1024, 1024; three digits."""
    params = {"width": 64, "depth": 1} if kind == "made" else {"d": 32, "heads": 4, "ff": 512, "layers": 1}
    got = []
    for n, flips, batch in ((14, 228, 441), (20, 534, 1024), (30, 3810, 1024)):
        parts = flops.estimate_sample(kind, params, 64, 1, n_qubits=n, n_unique_flips=flips)
        assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
        got.append(f"{batch * parts['total']:.2e}")
    assert got == expected


def test_local_energy_dominates_the_estimate() -> None:
    """97-99.9 % of it: claim 4 of the study, in its own accounting."""
    for kind in KINDS:
        params = (
            {"width": 64, "depth": 1} if kind == "made" else {"d": 32, "heads": 4, "ff": 512, "layers": 1}
        )
        for n, flips in ((14, 228), (20, 534), (30, 3810)):
            parts = flops.estimate_sample(kind, params, 64, 1, n_qubits=n, n_unique_flips=flips)
            share = (parts["local_energy_modulus"] + parts["local_energy_phase"]) / parts["total"]
            assert 0.97 < share < 0.9995


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("kind", ["transformer", "retnet"])
def test_sampling_closed_forms_are_sums_over_tokens(kind: str, attention: bool) -> None:
    """Without a cache token t is a forward pass over t tokens; with one, a row against t keys."""
    params = {"d": 6, "heads": 1, "ff": 10, "layers": 2}
    weights = flops.matmul_weights(kind, params, 16)
    passes = sum(flops.forward_estimate(kind, params, 2 * t, attention=attention) for t in range(1, 9))
    with_cache = sum(2 * weights + attention * 4 * 2 * t * 6 for t in range(1, 9))
    estimate = partial(flops.sampling_estimate, kind, params, 16, attention=attention)
    assert estimate(convention="passes") == passes
    assert estimate(convention="cache") == with_cache


def test_made_samples_by_passes() -> None:
    params = {"width": 5, "depth": 2}
    assert flops.sampling_estimate("made", params, 16) == 8 * flops.forward_estimate("made", params, 16)
    with pytest.raises(ValueError, match="made samples by passes, not by cache"):
        flops.sampling_estimate("made", params, 16, convention="cache")
    with pytest.raises(ValueError, match="not by recurrent"):
        flops.sampling_estimate("transformer", PARAMS["transformer"], 16, convention="recurrent")


@pytest.mark.parametrize("kind", ["transformer", "retnet"])
def test_drawing_one_sample_executes_the_closed_form(kind: str) -> None:
    """A chain of T tokens through the sampler's own code: key-value cache, or RetNet's state.

    Of RetNet's state the counter sees the query's product, not the outer product k v^T: half of it. Of the
    transformer's attention it sees the sum per head of q k, a product with a (heads, d) matrix, not the sum
    of the values.
    """
    rng = random.Random(2)
    for _ in range(20):
        n_orbitals, params = rng.randint(2, 9), random_params(kind, rng)
        sector = Sector(n_orbitals, 1, 1)
        wave = build_wave_function(sector, kind, params, 4, 1, seed=0)

        def draw(wave: Any = wave, n_orbitals: int = n_orbitals) -> None:
            state: Any = ()
            zero = torch.zeros(1, dtype=torch.int64)
            for t in range(n_orbitals):
                symbol = zero if t else torch.full_like(zero, START)
                _, state = wave.network.advance(Level(t, zero, symbol, zero, t), state)

        convention = {"transformer": "cache", "retnet": "recurrent"}[kind]
        estimate = partial(flops.sampling_estimate, kind, params, sector.n_qubits, convention=convention)
        mixing = estimate() - estimate(attention=False)
        seen = mixing * (params["heads"] if kind == "transformer" else 1) // 2
        assert counted(draw) == estimate(attention=False) + seen


@pytest.mark.parametrize("kind", ["transformer", "retnet"])
def test_count_from_parameters_is_the_linear_layers(kind: str) -> None:
    """Kaplan's count leaves out what has no parameters: the batched products of attention or retention."""
    rng = random.Random(3)
    for _ in range(20):
        n_orbitals, params = rng.randint(2, 9), random_params(kind, rng)
        sector = Sector(n_orbitals, 1, 1)
        wave = build_wave_function(sector, kind, params, 4, 1, seed=0)
        keys = torch.as_tensor(sector.enumerate_keys())[:3]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            wave.network.flat_logits(keys)
        by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        linear = sum(n for op, n in by_operator.items() if "bmm" not in op)
        assert linear == len(keys) * flops.forward_estimate(kind, params, sector.n_qubits, attention=False)
        assert sum(by_operator.values()) > linear


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_take_arrays(kind: str) -> None:
    """Many molecules at once: arrays of n and M give what each pair gives."""
    n, flips = np.array([14, 20, 30]), np.array([228, 534, 3810])
    for attention in (True, False):
        for sampling in flops.SAMPLING[kind]:
            form = partial(
                flops.estimate_sample, kind, PARAMS[kind], 64, 1, sampling=sampling, attention=attention
            )
            many = form(n_qubits=n, n_unique_flips=flips)  # type: ignore[arg-type]
            for i in range(3):
                one = form(n_qubits=int(n[i]), n_unique_flips=int(flips[i]))
                assert {name: int(value[i]) for name, value in many.items()} == one  # type: ignore[index]


def random_sector(rng: random.Random) -> Sector:
    n_orbitals = rng.randint(3, 6)
    return Sector(n_orbitals, rng.randint(1, n_orbitals - 1), rng.randint(1, n_orbitals - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_executed_tree_passes_equal_the_counter(kind: str) -> None:
    """Forward and gradient on prefix trees, both networks, to the last operation, over 20 random shapes."""
    rng = random.Random(4)
    for _ in range(20):
        sector, params = random_sector(rng), random_params(kind, rng)
        width, depth = rng.randint(1, 12), rng.randint(0, 2)
        every = torch.as_tensor(sector.enumerate_keys())
        keys = every[: rng.randint(1, len(every))]
        tree = build_tree(keys, sector)
        wave = build_wave_function(sector, kind, params, width, depth, seed=0)
        shape = (kind, params, sector.n_qubits)
        cost = {"nodes": tree.n_nodes, "tips": tree.n_tips, "block_width": BLOCK_WIDTH}
        assert counted(wave.log_prob, tree) == flops.tree_forward(*shape, **cost)
        if tree.n_nodes:
            log_prob = wave.log_prob(tree)
            assert counted(log_prob.sum().backward) == flops.tree_forward(*shape, **cost, backward=True)
        phase = partial(flops.phase_forward, width, depth, sector.n_qubits, rows=len(keys))
        assert counted(wave.phase, keys) == phase()
        assert counted(wave.phase(keys).sum().backward) == phase(backward=True)


@pytest.mark.parametrize("kind", KINDS)
def test_executed_whole_passes_equal_the_counter(kind: str) -> None:
    """Full sequences with nothing shared, forward and gradient, over 20 random shapes."""
    rng = random.Random(5)
    for _ in range(20):
        sector, params = random_sector(rng), random_params(kind, rng)
        wave = build_wave_function(sector, kind, params, 4, 1, seed=0)
        keys = torch.as_tensor(sector.enumerate_keys())[: rng.randint(1, 5)]
        form = partial(flops.flat_forward, kind, params, sector.n_qubits, rows=len(keys))
        assert counted(wave.flat_log_prob, keys) == form()
        with sdpa_kernel(SDPBackend.MATH):
            total = wave.flat_log_prob(keys).sum()
        assert counted(total.backward) == form(backward=True)


@pytest.mark.parametrize("kind", KINDS)
def test_executed_sampling_equals_the_counter(kind: str) -> None:
    """A growing tree with carried state, and whole passes for every prefix, over 20 random shapes."""
    rng = random.Random(6)
    for _ in range(20):
        sector, params = random_sector(rng), random_params(kind, rng)
        wave = build_wave_function(sector, kind, params, 4, 1, seed=0)
        for advance in (None, whole_passes(wave)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                samples = sample_tree(wave, 10**6, 30, torch.Generator().manual_seed(0), advance)
            nodes = samples.nodes
            expected = flops.flat_forward(kind, params, sector.n_qubits, rows=sum(nodes))
            if advance is None:
                expected = flops.sampler_forward(kind, params, sector.n_qubits, nodes=nodes)
                expected -= unseen(kind, params, nodes)
            assert counter.get_total_flops() == expected


def unseen(kind: str, params: Any, nodes: Iterable[int]) -> int:
    """Products of sampling that the counter does not know, per node and layer: RetNet's k v^T, element-wise,
    2 d^2 / h; the transformer's sum over the values of its path, an embedding bag, 2 t d."""
    if kind == "retnet":
        return sum(nodes) * params["layers"] * 2 * params["d"] ** 2 // params["heads"]
    if kind == "transformer":
        return sum(t * count for t, count in enumerate(nodes, 1)) * params["layers"] * 2 * params["d"]
    return 0


WAYS = [("whole", "exact"), ("whole", "sampled"), ("tree", "exact"), ("tree", "sampled"), ("tree", "paper")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("regime", "mode"), WAYS)
@pytest.mark.parametrize("shapes", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_executed_steps_equal_the_counter(
    kind: str, regime: Any, mode: Any, shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole optimisation steps over random shapes: networks, samples, matrix elements, H psi.

    What the counter does not see: what `unseen` names (counted here), and whatever is no product of two
    matrices: additions of biases and residuals, activations, softmax, norms and masks, embeddings, the
    diagonal's linear term, contractions of local energies, Adam. Those are left out here, too.
    """
    rng, mol = random.Random(7), molecule("LiH")
    drawn: list[tuple[int, ...]] = []

    def watched(*args: Any) -> Any:
        samples = sample_tree(*args)
        drawn.append(samples.nodes)
        return samples

    monkeypatch.setattr(trainer, "sample_tree", watched)
    for _ in range(shapes):
        params = random_params(kind, rng)
        point = Point(
            molecule=spec("LiH"),
            ansatz=AnsatzSpec(kind=kind, params=params),
            phase=PhaseSpec(width=rng.randint(1, 12), depth=rng.randint(0, 2)),
            sampling=SamplingSpec(
                regime=regime, schedule="constant", n_max=10**5, batch_max=rng.randint(2, 40)
            ),
            local_energy=mode,
            train=TrainSpec(annealing_lambda=0.1),
            seed=rng.randint(0, 99),
            steps=1,
        )
        run, drawn[:] = train(point, mol), []
        if regime == "whole":
            assert run.batch  # the sector's matrix is made once and is no part of a step
        records: list[Any] = []
        seen = count_flops(lambda run=run, records=records: records.append(run.advance()))  # type: ignore[misc]
        assert records[0].flops_executed == sum(run.flops_parts.values())
        with_state = run._advance_anew is None
        left_out = sum(unseen(kind, params, nodes) for nodes in drawn) if with_state else 0
        assert records[0].flops_executed == seen + left_out


def whole_sector_point(name: str, kind: str) -> Point:
    params: dict[str, dict[str, Any]] = {
        "made": {"width": 64, "depth": 1},
        "transformer": {"d": 32, "heads": 4, "ff": 128, "layers": 2},
        "retnet": {"d": 32, "heads": 4, "ff": 128, "layers": 2},
    }
    return Point(
        molecule=spec(name),
        ansatz=AnsatzSpec(kind=kind, params=params[kind]),
        phase=PhaseSpec(width=64, depth=1),
        sampling=SamplingSpec(schedule="constant"),
        steps=1,
    )


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("H2O", {"made": 75, "transformer": 500, "retnet": 500 / 1.5}),
        ("N2", {"made": 150, "transformer": 2000, "retnet": 2000 / 1.5}),
    ],
)
def test_reuse_saves_most_of_the_estimate(name: str, least: dict[str, float]) -> None:
    """Estimated over executed FLOPs of a step at equal B (the whole sector, d = 32, L = 2, default phase)."""
    mol = molecule(name)
    for kind in KINDS:
        point = whole_sector_point(name, kind)
        record = next(iter(train(point, mol)))
        parts = flops.estimate_step(
            point,
            n_qubits=mol.hamiltonian.n_qubits,
            n_unique_flips=mol.hamiltonian.n_unique_flips,
            batch=mol.search_space,
        )
        assert parts["total"] / record.flops_executed >= least[kind]


@pytest.mark.parametrize("kind", ["made", "transformer"])
def test_a_paper_step_executes_the_estimate(kind: str) -> None:
    """A whole step of H2O at the default sizes, executed against estimated to < 2 %, every difference named.

    Biases: the estimate counts 2 for every parameter of MADE and of the phase network, a bias is an addition
    and no product. Inputs that are data need no gradient. A prefix that samples share is sampled from once,
    and not at all where its next token is forced. Softmax and the like are on neither side.
    """
    mol = molecule("H2O")
    params = {"width": 64, "depth": 1} if kind == "made" else {"d": 32, "heads": 4, "ff": 512, "layers": 1}
    point = Point(
        molecule=spec("H2O"),
        ansatz=AnsatzSpec(kind=kind, params=params),
        phase=PhaseSpec(width=64, depth=1),
        sampling=SamplingSpec(schedule="constant"),
        local_energy="paper",
        steps=1,
    )
    run = train(point, mol)
    record = next(iter(run))
    n, flips, batch, done = 14, mol.hamiltonian.n_unique_flips, record.n_unique, run.flops_parts
    assert batch > 400
    parts = flops.estimate_step(point, n_qubits=n, n_unique_flips=flips, batch=batch)

    biases = {"modulus": 0, "phase": 0}
    if kind == "made":
        biases["modulus"] = 64 + 2 * n
    biases["phase"] = 2 * 64 + 4
    per_pass = 2 * batch * (biases["modulus"] + biases["phase"])
    named = {
        "sampling": 2 * batch * n // 2 * biases["modulus"],
        "local_energy": flips * per_pass,
        "forward": per_pass,
        "backward": 2 * per_pass + 2 * batch * 64 * (n - 2 + (n if kind == "made" else 0)),
    }
    elements = run.kernel.connected(torch.as_tensor(run.sector.enumerate_keys()[:batch])).flops
    for part in ("local_energy", "forward", "backward"):
        estimated = parts[f"{part}_modulus"] + parts[f"{part}_phase"]
        extra = elements if part == "local_energy" else 0  # the Hamiltonian's own small products
        assert done[part] - extra + named[part] == estimated
    assert 0 < done["sampling"] < parts["sampling"] - named["sampling"]

    executed = sum(done.values())
    assert executed == record.flops_executed
    assert abs((executed + sum(named.values())) / parts["total"] - 1) < 0.02
    if kind == "transformer":  # few of its products are counted with biases
        assert abs(executed / parts["total"] - 1) < 0.02


@pytest.mark.parametrize(("regime", "kind"), [("whole", "made"), ("tree", "made"), ("tree", "transformer")])
def test_counting_takes_less_than_a_hundredth_of_a_step(
    regime: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small steps, of which it takes the largest share; both times from the same process and moment."""
    spent = [0.0]

    def timed(method: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = method(*args, **kwargs)
            spent[0] += time.perf_counter() - began
            return out

        return wrapped

    for name in ("tree", "flat", "sampling"):
        monkeypatch.setattr(NetworkFlops, name, timed(getattr(NetworkFlops, name)))
    for name in ("_connected_flops", "_pairs_flops"):
        monkeypatch.setattr(Kernel, name, timed(getattr(Kernel, name)))
    monkeypatch.setattr(Evaluated, "of", timed(Evaluated.of))
    point = whole_sector_point("H2O", kind)
    sampling = SamplingSpec(regime=regime, schedule="constant")
    run = train(point.model_copy(update={"steps": 60, "sampling": sampling}), molecule("H2O"))
    for _ in range(10):
        run.advance()  # caches
    shares = []
    for _ in range(50):
        spent[0], began = 0.0, time.perf_counter()
        run.advance()
        shares.append(spent[0] / (time.perf_counter() - began))
    assert float(np.median(shares)) < 0.01
