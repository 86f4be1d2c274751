"""Local energies in three modes, their statistics and the gradient, against matrices and differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chemistry import molecule, spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import KINDS, PARAMS, wave_function

from replicate.cube import v_score
from replicate.energy import (
    LOCAL_ENERGY,
    amplitudes,
    energy_stats,
    local_energies_dense,
    local_from_product,
)
from replicate.hamiltonian import Kernel, matrix_elements_dense
from replicate.sampler import sample_tree
from replicate.sector import Sector
from replicate.spec import AnsatzSpec, PhaseSpec, Point, SamplingSpec, TrainSpec
from replicate.trainer import Training, train
from replicate.tree import build_tree

MOLECULES = ["LiH", "H2O", "CH2"]  # CH2: triplet


def setting(name: str, kind: str, seed: int = 0, order: str = "reversed") -> tuple[Any, ...]:
    mol = molecule(name)
    sector = Sector(mol.n_orbitals, mol.n_alpha, mol.n_beta, order)
    wave = wave_function(sector, kind, seed, spread=3.0)
    keys = torch.as_tensor(sector.enumerate_keys())
    dense = torch.as_tensor(matrix_elements_dense(mol.hamiltonian, keys.numpy(), order))
    return mol, wave, keys, dense


def make_point(name: str, kind: str, **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "molecule": spec(name),
        "ansatz": AnsatzSpec(kind=kind, params=PARAMS[kind]),
        "phase": PhaseSpec(width=11, depth=1),
        "steps": 20,
        "precision": "float64",
    }
    return Point(**{**fields, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOLECULES)
@pytest.mark.parametrize("order", ["reversed", "energy"])
def test_all_modes_equal_the_dense_matrix(name: str, kind: str, order: str) -> None:
    """`paper` = `exact` = (H psi) / psi to 1e-10 Ha; `sampled` on the whole sector is the same number."""
    mol, wave, keys, dense = setting(name, kind, order=order)
    kernel = Kernel(mol.hamiltonian, order)
    with torch.no_grad():
        reference = local_energies_dense(dense, wave.flat_log_psi(keys))
    modes = {mode: find(wave, kernel, keys, 10**4).values for mode, find in LOCAL_ENERGY.items()}
    for values in modes.values():
        # Where psi is tiny E_loc is huge and its rounding with it: compare H psi, which enters every average.
        psi = wave.flat_log_psi(keys).exp().abs().detach()
        assert ((values - reference).abs() * psi).max() < 1e-10
    large = psi > 1e-3
    assert (modes["paper"] - modes["exact"]).abs()[large].max() < 1e-10


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(MOLECULES),
    st.integers(0, 1000),
    st.integers(1, 60),
    st.sampled_from((3, 7, 50, 10**6)),
)
@example("transformer", "LiH", 0, 5, 1)
@example("retnet", "CH2", 1, 5, 1)
@example("made", "LiH", 2, 5, 1)
def test_modes_on_partial_batches(kind: str, name: str, seed: int, count: int, chunk: int) -> None:
    """Rows of the dense matrix for `exact` and `paper`; for `sampled` its columns are cut to the batch."""
    mol, wave, keys, dense = setting(name, kind, seed)
    kernel = Kernel(mol.hamiltonian)
    rows = torch.as_tensor(np.sort(np.random.default_rng(seed).permutation(len(keys))[:count]))
    with torch.no_grad():
        psi = wave.flat_log_psi(keys).exp()
    complete = (dense.to(psi.dtype) @ psi)[rows]
    cut = dense[rows][:, rows].to(psi.dtype) @ psi[rows]
    exact = LOCAL_ENERGY["exact"](wave, kernel, keys[rows], chunk).values
    sampled = LOCAL_ENERGY["sampled"](wave, kernel, keys[rows], chunk).values
    assert (exact * psi[rows] - complete).abs().max() < 1e-10
    assert (sampled * psi[rows] - cut).abs().max() < 1e-10


def test_exact_evaluates_each_determinant_once() -> None:
    mol, wave, keys, dense = setting("H2O", "made")
    batch = keys[::9]
    found = LOCAL_ENERGY["exact"](wave, Kernel(mol.hamiltonian), batch, 10**6)
    reached = (dense[::9].abs() > 1e-12).any(0)
    assert found.cost.determinants == int(reached.sum())
    paper = LOCAL_ENERGY["paper"](wave, Kernel(mol.hamiltonian), batch, 10**4)
    assert paper.cost.determinants == len(batch) * mol.hamiltonian.n_unique_flips


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["LiH", "CH2"])
def test_energy_and_variance_equal_full_enumeration(name: str, kind: str) -> None:
    mol, wave, keys, dense = setting(name, kind, 4)
    with torch.no_grad():
        psi = wave.flat_log_psi(keys).exp().numpy()
    h_psi = dense.numpy() @ psi
    energy = np.vdot(psi, h_psi).real
    variance = np.vdot(h_psi, h_psi).real - energy**2
    run = train(make_point(name, kind), mol)
    run.wave.load_state_dict(wave.state_dict())
    result = run.evaluate()
    assert result.exact
    assert result.energy_stderr == 0
    assert abs(result.energy - energy) < 1e-10
    assert abs(result.variance - variance) < 1e-9


def test_sampled_evaluation_agrees_with_the_exact_one() -> None:
    """Beyond `exact_limit`: its own samples, within its own standard errors."""
    point = make_point("LiH", "transformer", evaluation={"exact_limit": 0, "n_samples": 10**6})
    run = train(point, molecule("LiH"))
    for _ in zip(range(5), run, strict=False):
        pass
    sampled = run.evaluate()
    exact = train(make_point("LiH", "transformer"), molecule("LiH"))
    exact.wave.load_state_dict(run.wave.state_dict())
    truth = exact.evaluate()
    assert not sampled.exact
    assert 0 < sampled.energy_stderr < 0.01
    assert abs(sampled.energy - truth.energy) < 5 * sampled.energy_stderr
    assert abs(sampled.variance / truth.variance - 1) < 0.05


def test_evaluation_is_exact_in_the_local_energy_and_independent_of_training() -> None:
    """Whatever mode a point trains on; and not the samples of the first step again."""
    few = {"exact_limit": 0, "n_samples": 10**12, "batch_max": 20}
    energies = {}
    for mode in ("exact", "sampled"):
        run = train(make_point("LiH", "made", local_energy=mode, evaluation=few), molecule("LiH"))
        run.wave.load_state_dict(wave_function(run.sector, "made", 2, spread=2.0).state_dict())
        energies[mode] = run.evaluate().energy
        own = run.wave, run.kernel
    assert abs(energies["exact"] - energies["sampled"]) < 1e-4  # two draws of 1e12
    with torch.no_grad():
        largest = sample_tree(own[0], 10**12, 20, torch.Generator().manual_seed(0))
    cut = LOCAL_ENERGY["sampled"](*own, largest.keys, 10**4).values
    assert abs((cut.real * largest.weights).sum().item() - energies["sampled"]) > 1e-2  # it can fail

    sampling = SamplingSpec(schedule="constant", n_max=1000, n_min=1, regime="tree")
    point = make_point("LiH", "made", sampling=sampling, evaluation={"exact_limit": 0, "n_samples": 1000})
    before = train(point, molecule("LiH")).evaluate().energy
    assert train(point, molecule("LiH")).advance().energy != before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["LiH", "CH2"])
def test_gradient_equals_finite_differences_of_the_exact_energy(name: str, kind: str) -> None:
    """Every parameter tensor of modulus and phase, 1e-5 relative in float64."""
    mol = molecule(name)
    run = train(make_point(name, kind, sampling=SamplingSpec(schedule="constant")), mol)
    run.wave.load_state_dict(wave_function(run.sector, kind, 1, spread=3.0).state_dict())
    batch = run.batch
    log_prob = run.wave.log_prob(batch.tree)
    phase = run.wave.phase.evaluate(*batch.phase_inputs)
    with torch.no_grad():
        psi = amplitudes(log_prob, phase)
        weights = log_prob.exp()
        local = local_from_product(psi, batch.matrix @ psi)
        outcome = run._outcome(local, weights, weights)
    run._backward(log_prob, phase, local, weights, outcome, 0.0, 0.0)

    generator = torch.Generator().manual_seed(0)
    for weight_name, weight in run.weights.items():
        assert weight.grad is not None, weight_name
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        energies = []
        step = 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                energies.append(run.evaluate().energy)
                weight -= sign * step * direction
        difference = (energies[0] - energies[1]) / (2 * step)
        analytic = (weight.grad * direction).sum().item()
        scale = max(abs(difference), 1e-3 * weight.grad.norm().item() * direction.norm().item(), 1e-4)
        assert abs(analytic - difference) / scale < 1e-5, weight_name


@pytest.mark.parametrize("entropy", [0.3])
def test_annealed_gradient_equals_finite_differences(entropy: float) -> None:
    """d/dtheta of E - lambda S, S = -sum p log p."""
    mol = molecule("LiH")
    run = train(make_point("LiH", "made"), mol)
    run.wave.load_state_dict(wave_function(run.sector, "made", 1, spread=3.0).state_dict())
    batch = run.batch

    def objective() -> float:
        with torch.no_grad():
            log_prob = run.wave.log_prob(batch.tree)
            return run.evaluate().energy + entropy * (log_prob.exp() * log_prob).sum().item()

    log_prob = run.wave.log_prob(batch.tree)
    phase = run.wave.phase.evaluate(*batch.phase_inputs)
    with torch.no_grad():
        psi, weights = amplitudes(log_prob, phase), log_prob.exp()
        local = local_from_product(psi, batch.matrix @ psi)
        outcome = run._outcome(local, weights, weights)
    run._backward(log_prob, phase, local, weights, outcome, entropy, (weights * log_prob).sum().detach())
    weight = run.weights["modulus.layers.0.weight"]
    assert weight.grad is not None
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-5 * direction
            values.append(objective())
            weight -= sign * 1e-5 * direction
    difference = (values[0] - values[1]) / 2e-5
    assert abs((weight.grad * direction).sum().item() / difference - 1) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_regimes_have_the_same_expectation(kind: str, mode: str) -> None:
    """Given the same samples, one-pass and growing-tree steps give the same energy and gradient."""
    runs: dict[str, Training] = {}
    for regime in ("whole", "tree"):
        sampling = SamplingSpec(schedule="constant", n_max=10**12, regime=regime)
        point = make_point("LiH", kind, sampling=sampling, local_energy=mode, train=TrainSpec(clip=0.0))
        runs[regime] = train(point, molecule("LiH"))
        runs[regime].wave.load_state_dict(
            wave_function(runs[regime].sector, kind, 2, spread=2.0).state_dict()
        )
    records, grads = {}, {}
    for regime, run in runs.items():
        take = run._whole_step if regime == "whole" else run._tree_step
        outcome, _ = take(10**12, 0.0)
        records[regime] = outcome
        grads[regime] = torch.cat([w.grad.reshape(-1) for w in run.weights.values() if w.grad is not None])
    # 1e12 samples: the two draws differ by 1e-6 relative
    assert abs(records["whole"][0] - records["tree"][0]) < 1e-4
    assert abs(records["whole"][1] / records["tree"][1] - 1) < 1e-3
    assert (grads["whole"] - grads["tree"]).norm() / grads["tree"].norm() < 1e-3


def test_regimes_neglect_the_same_determinants() -> None:
    """`sampled` where few of many are kept: what is not in the sample counts in neither regime."""
    outcomes = {}
    for regime in ("whole", "tree"):
        sampling = SamplingSpec(schedule="constant", n_max=10**12, regime=regime, batch_max=9)
        run = train(make_point("LiH", "made", sampling=sampling, local_energy="sampled"), molecule("LiH"))
        run.wave.load_state_dict(wave_function(run.sector, "made", 2, spread=2.0).state_dict())
        outcomes[regime], _ = (run._whole_step if regime == "whole" else run._tree_step)(10**12, 0.0)
    assert outcomes["whole"][2] == outcomes["tree"][2] == 9
    assert abs(outcomes["whole"][0] - outcomes["tree"][0]) < 1e-4
    assert abs(outcomes["whole"][1] / outcomes["tree"][1] - 1) < 1e-3


def test_energy_stats_by_hand() -> None:
    local = torch.tensor([1.0 + 0.5j, 3.0 - 0.5j], dtype=torch.complex128)
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    stats = energy_stats(local, weight)
    assert stats.energy.item() == pytest.approx(2.5)
    assert stats.variance.item() == pytest.approx(0.25 * (1.5**2 + 0.25) + 0.75 * (0.5**2 + 0.25))


def test_weight_of_another_shape_is_refused() -> None:
    """A (batch, 1) weight broadcasts to (batch, batch) and inflates the variance: a bug in published code."""
    local = torch.zeros(4, dtype=torch.complex128)
    for weight in (torch.full((4, 1), 0.25), torch.full((1, 4), 0.25), torch.full((3,), 1 / 3)):
        with pytest.raises(ValueError, match="must both be"):
            energy_stats(local, weight.double())


@pytest.mark.parametrize(("name", "expected"), [("H2O", 5.34e-3), ("N2", 1.11e-2)])
def test_v_score_of_the_hartree_fock_determinant(name: str, expected: float) -> None:
    """SCIENCE.md section 8, sector E_inf, N_dof = electrons; to the digits given there."""
    mol = molecule(name)
    sector = Sector(mol.n_orbitals, mol.n_alpha, mol.n_beta)
    key = torch.tensor([sector.hf_key()])
    row = Kernel(mol.hamiltonian).connected(key)
    diagonal = row.value[row.key == key].item()
    variance = (row.value**2).sum().item() - diagonal**2
    assert abs(diagonal - mol.e_hf) < 1e-7
    value = v_score(diagonal, variance, mol.n_alpha + mol.n_beta, mol.e_inf_sector)
    assert f"{value:.2e}" == f"{expected:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_and_order_of_keys_do_not_matter(kind: str) -> None:
    """The flat path takes any batch; its unique sorted keys give the tree path's values back."""
    _, wave, keys, _ = setting("LiH", kind)
    shuffled = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))][:50].repeat(2)
    unique, where = torch.unique(shuffled, return_inverse=True)
    with torch.no_grad():
        tree = wave.log_prob(build_tree(unique, wave.sector))[where]
        torch.testing.assert_close(tree, wave.flat_log_prob(shuffled), rtol=0, atol=1e-10)
