from __future__ import annotations

import functools
from typing import Any

import numpy as np
import openfermion
import pytest
import torch
from chemistry import integrals, molecule, sector
from hypothesis import given, settings
from hypothesis import strategies as st
from openfermion.chem.molecular_data import spinorb_from_spatial

from replicate import hamiltonian as hamiltonian_module
from replicate.hamiltonian import (
    Hamiltonian,
    Kernel,
    from_openfermion,
    jordan_wigner,
    matrix_elements_dense,
    to_openfermion,
)
from replicate.molecule import Integrals
from replicate.patterns import _symmetries
from replicate.pauli import from_strings
from replicate.sector import Sector, from_key_layout


def interaction_operator(ints: Integrals, scale: float = 1.0) -> openfermion.InteractionOperator:
    one, two = spinorb_from_spatial(
        scale * ints.h1, scale * np.ascontiguousarray(ints.eri.transpose(0, 2, 3, 1))
    )
    return openfermion.InteractionOperator(scale * ints.constant, one, 0.5 * two)


def openfermion_operator(ints: Integrals) -> openfermion.QubitOperator:
    """The oracle: OpenFermion's own road from integrals to qubits."""
    return openfermion.jordan_wigner(interaction_operator(ints))


def build(ints: Integrals, electrons: tuple[int, int], threshold: float = 1e-8) -> Hamiltonian:
    n_alpha, n_beta = electrons
    return jordan_wigner(
        ints.constant, ints.h1, ints.eri, n_alpha=n_alpha, n_beta=n_beta, threshold=threshold
    )


# -- Pauli strings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["H2", "LiH", "H2O", "CH2", "O2"])
def test_strings_are_openfermions(name: str) -> None:
    mol = molecule(name)
    ours, theirs = to_openfermion(mol.hamiltonian).terms, openfermion_operator(mol.integrals).terms
    assert set(ours) == set(theirs)  # also which of the small ones are dropped
    assert max(abs(ours[term] - theirs[term]) for term in ours) < 1e-13


@pytest.mark.parametrize(
    ("name", "strings", "patterns"),
    [
        ("H2O", 1654, 228),
        ("N2", 2951, 534),
        ("O2", 2951, 534),
        ("H2S", 10746, 1830),
        ("PH3", 26269, 4781),
        ("LiCl", 24279, 4530),
        ("Li2O", 20562, 3810),
        ("LiH", 631, 84),
    ],
)
def test_pauli_counts_of_the_study(name: str, strings: int, patterns: int) -> None:
    ints, _, electrons = integrals(name)
    hamiltonian = build(ints, electrons)
    assert (hamiltonian.n_pauli_terms, hamiltonian.n_unique_flips) == (strings, patterns)


@pytest.mark.parametrize(("name", "strings", "patterns"), [("N2", 2239, 378), ("LiCl", 16599, 2952)])
def test_aligned_degenerate_orbitals_have_fewer_strings(name: str, strings: int, patterns: int) -> None:
    ints, energy, electrons = integrals(name, "aligned")
    hamiltonian = build(ints, electrons)
    assert (hamiltonian.n_pauli_terms, hamiltonian.n_unique_flips) == (strings, patterns)
    assert energy == pytest.approx(integrals(name)[1], abs=1e-10)


def test_any_orientation_of_degenerate_pairs_gives_the_generic_counts() -> None:
    # the reason for N2's two counts: rotate the pi pairs by angles of their own, physics unchanged
    ints, _, electrons = integrals("N2", "aligned")
    turn = np.eye(10)
    for pair, angle in (((4, 5), 0.3), ((7, 8), 1.1)):
        turn[np.ix_(pair, pair)] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    turned = Integrals(
        ints.constant,
        turn.T @ ints.h1 @ turn,
        np.einsum("pqrs,pi,qj,rk,sl->ijkl", ints.eri, turn, turn, turn, turn, optimize=True),
    )
    hamiltonian = build(turned, electrons)
    assert (hamiltonian.n_pauli_terms, hamiltonian.n_unique_flips) == (2951, 534)


def test_threshold_only_drops_what_is_small() -> None:
    mol = molecule("H2O")
    exact = build(mol.integrals, (5, 5), threshold=0.0)
    keys = sector(mol).enumerate_keys()
    difference = matrix_elements_dense(exact, keys) - matrix_elements_dense(mol.hamiltonian, keys)
    assert 0 < np.abs(difference).max() < 1e-6
    ground = np.linalg.eigvalsh(matrix_elements_dense(exact, keys))[0]
    assert ground == pytest.approx(mol.e_fci, abs=1e-10)
    kept = {
        (int(f), int(z)): w for f, z, w in zip(exact.string_flips, exact.z_masks, exact.weights, strict=True)
    }
    ham = mol.hamiltonian
    strings = zip(ham.string_flips, ham.z_masks, ham.weights, strict=True)
    # A string whose integrals cancel is not among the exact ones; dropping one of them leaves the other.
    assert max(abs(w - kept.get((int(f), int(z)), 0.0)) for f, z, w in strings) < 3e-8


def test_hamiltonian_is_grouped_immutable_and_hashed_by_content() -> None:
    ham = molecule("LiH").hamiltonian
    assert ham.flips[0] == 0
    assert np.all(np.diff(ham.flips) > 0)
    assert ham.offsets[0] == 0
    assert ham.offsets[-1] == ham.n_pauli_terms
    assert np.all(np.bitwise_count(ham.string_flips & ham.z_masks) % 2 == 0)  # an even number of Y: real
    with pytest.raises(ValueError, match="read-only"):
        ham.weights[0] = 0.0
    again = from_openfermion(to_openfermion(ham), n_alpha=2, n_beta=2)
    assert again.sha256 == ham.sha256
    shuffled = np.random.default_rng(0).permutation(ham.n_pauli_terms)
    mixed = from_strings(
        ham.string_flips[shuffled], ham.z_masks[shuffled], ham.weights[shuffled],
        n_qubits=12, n_alpha=2, n_beta=2,
    )  # fmt: skip
    assert mixed.sha256 == ham.sha256
    changed = from_strings(
        ham.string_flips, ham.z_masks, ham.weights * (1 + 1e-15), n_qubits=12, n_alpha=2, n_beta=2
    )
    assert changed.sha256 != ham.sha256


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (openfermion.QubitOperator("X0 X2", 0.5j), "X0 X2: coefficient .* complex"),
        (openfermion.QubitOperator("Y0 Z1 X2", 0.5), "Y0 Z1 X2: .* complex"),
        (openfermion.QubitOperator("Z0 Z70", 0.5), "qubit 70 does not fit"),
    ],
)
def test_complex_operators_are_refused(operator: openfermion.QubitOperator, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_openfermion(operator, n_alpha=1, n_beta=1)


# -- matrix elements ----------------------------------------------------------------------------------


ORDERS = pytest.mark.parametrize("order", ["reversed", "energy"])


@ORDERS
@pytest.mark.parametrize("name", ["H2", "LiH", pytest.param("H2O", marks=pytest.mark.slow)])
def test_sector_matrix_is_openfermions_qubit_matrix(name: str, order: str) -> None:
    mol = molecule(name)
    keys = sector(mol, order).enumerate_keys()
    ours = Kernel(mol.hamiltonian, order).sector_matrix(torch.from_numpy(keys)).to_dense().numpy()
    states, n = from_key_layout(keys, mol.n_orbitals, order), mol.n_spin_orbitals
    index = sum(((states >> q) & 1) << (n - 1 - q) for q in range(n))  # their qubit 0 is the leading bit
    theirs = qubit_matrix(name)[np.ix_(index, index)].toarray()
    np.testing.assert_allclose(ours, theirs, atol=1e-10, rtol=0)


@functools.cache
def qubit_matrix(name: str) -> Any:
    return openfermion.get_sparse_operator(openfermion_operator(molecule(name).integrals)).tocsr()


@ORDERS
@pytest.mark.parametrize("name", ["H2O", "CH2"])
def test_sector_matrix_is_openfermions_fermion_matrix(name: str, order: str) -> None:
    # no Jordan-Wigner transformation on their side, and every integral on both
    mol = molecule(name)
    exact = build(mol.integrals, (mol.n_alpha, mol.n_beta), threshold=0.0)
    keys = sector(mol, order).enumerate_keys()
    ours = Kernel(exact, order).sector_matrix(torch.from_numpy(keys)).to_dense().numpy()
    theirs, their_states = fermion_matrix(name)
    position = {state: i for i, state in enumerate(their_states)}
    index = np.array([position[state] for state in from_key_layout(keys, mol.n_orbitals, order).tolist()])
    theirs = theirs[np.ix_(index, index)]
    np.testing.assert_allclose(ours, theirs, atol=1e-10, rtol=0)
    np.testing.assert_allclose(np.linalg.eigvalsh(ours), np.linalg.eigvalsh(theirs), atol=1e-10, rtol=0)


@functools.cache
def fermion_matrix(name: str) -> tuple[np.ndarray, list[int]]:
    mol, scale = molecule(name), 2.0**20  # OpenFermion drops what is below 1e-8: 1e-14 of this
    filled = [p < electrons for p in range(mol.n_orbitals) for electrons in (mol.n_alpha, mol.n_beta)]

    def matrix(operator: openfermion.FermionOperator) -> np.ndarray:
        return openfermion.get_number_preserving_sparse_operator(
            operator, mol.n_spin_orbitals, mol.n_electrons, spin_preserving=True, reference_determinant=filled
        ).toarray()

    hamiltonian = interaction_operator(mol.integrals, scale)
    labels = openfermion.FermionOperator()
    for q in range(mol.n_spin_orbitals):  # sum_q 2^q n_q names every state of their basis
        labels += openfermion.FermionOperator(f"{q}^ {q}", 2.0**q)
    states = np.diag(matrix(labels)).round().astype(int).tolist()
    return matrix(openfermion.get_fermion_operator(hamiltonian)) / scale, states


def random_integrals(n_orbitals: int, seed: int) -> Integrals:
    rng = np.random.default_rng(seed)
    h1, eri = rng.normal(size=(n_orbitals,) * 2), rng.normal(size=(n_orbitals,) * 4)
    eri = eri + eri.transpose(1, 0, 2, 3)
    eri = eri + eri.transpose(0, 1, 3, 2)
    return Integrals(rng.normal(), h1 + h1.T, eri + eri.transpose(2, 3, 0, 1))


def spectrum_of(
    operator: openfermion.FermionOperator, n_orbitals: int, electrons: tuple[int, int]
) -> np.ndarray:
    filled = [p < count for p in range(n_orbitals) for count in electrons]
    matrix = openfermion.get_number_preserving_sparse_operator(
        operator, 2 * n_orbitals, sum(electrons), spin_preserving=True, reference_determinant=filled
    )
    return np.linalg.eigvalsh(matrix.toarray())


def spectrum(hamiltonian: Hamiltonian, order: str = "reversed") -> np.ndarray:
    n_alpha, n_beta = hamiltonian.n_alpha, hamiltonian.n_beta
    keys = Sector(hamiltonian.n_qubits // 2, n_alpha, n_beta, order).enumerate_keys()
    matrix = Kernel(hamiltonian, order).sector_matrix(torch.from_numpy(keys))
    return torch.linalg.eigvalsh(matrix.to_dense()).numpy()


@ORDERS
@pytest.mark.parametrize("electrons", [(1, 0), (2, 1), (0, 3), (2, 2), (4, 1), (4, 4)])
def test_spectrum_of_random_integrals(electrons: tuple[int, int], order: str) -> None:
    ints = random_integrals(4, seed=sum(electrons))
    operator = openfermion.get_fermion_operator(interaction_operator(ints))
    ours = spectrum(build(ints, electrons), order)
    np.testing.assert_allclose(ours, spectrum_of(operator, 4, electrons), atol=1e-9, rtol=0)


def test_operators_of_other_tools_are_taken() -> None:
    lattice = openfermion.fermi_hubbard(2, 2, tunneling=1.0, coulomb=4.0)
    ours = from_openfermion(openfermion.jordan_wigner(lattice), n_alpha=2, n_beta=2)
    np.testing.assert_allclose(spectrum(ours), spectrum_of(lattice, 4, (2, 2)), atol=1e-9, rtol=0)


def test_spectrum_of_water_is_that_of_pyscf() -> None:
    from pyscf import fci

    mol = molecule("H2O")
    keys = torch.from_numpy(sector(mol).enumerate_keys())
    matrix = Kernel(mol.hamiltonian).sector_matrix(keys).to_dense()
    ours = torch.linalg.eigvalsh(matrix)[:6].numpy()
    solver = fci.direct_spin1.FCI()
    solver.nroots, solver.conv_tol = 6, 1e-12
    theirs, _ = solver.kernel(mol.integrals.h1, mol.integrals.eri, 7, (5, 5), ecore=mol.integrals.constant)
    np.testing.assert_allclose(ours, theirs, atol=1e-8, rtol=0)


@functools.cache
def dense(name: str, order: str) -> tuple[Hamiltonian, np.ndarray, np.ndarray]:
    mol = molecule(name)
    keys = sector(mol, order).enumerate_keys()
    return mol.hamiltonian, keys, matrix_elements_dense(mol.hamiltonian, keys, order)


@functools.cache
def kernel(name: str, order: str) -> Kernel:
    return Kernel(molecule(name).hamiltonian, order)


@functools.cache
def odd_hamiltonian() -> Hamiltonian:
    """Random strings on 8 qubits, none of a molecule's forms: 0 to 8 flips, any Z, also out of the sector."""
    rng = np.random.default_rng(7)
    flips = rng.integers(0, 2**8, 400)
    flips[::3] = rng.permutation([0b1010, 0b0101, 0b110011, 0b11110000, 0b11111111, 0, 0b100010])[
        rng.integers(0, 7, 134)
    ]
    z_masks = rng.integers(0, 2**8, 400)
    even = np.bitwise_count(flips & z_masks) % 2 == 0
    weights = rng.normal(size=400)
    return from_strings(flips[even], z_masks[even], weights[even], n_qubits=8, n_alpha=2, n_beta=2)


def check_connected(
    fast: Kernel, keys: np.ndarray, matrix: np.ndarray, batch: np.ndarray, max_bytes: int | None
) -> None:
    found = fast.connected(torch.from_numpy(keys[batch]), max_bytes=max_bytes)
    assert len(found.row) <= fast.count(torch.from_numpy(keys[batch]), max_bytes=max_bytes)
    row, column = found.row.numpy(), np.searchsorted(keys, found.key.numpy())
    assert np.all(np.diff(row) >= 0)
    assert np.all(keys[column] == found.key.numpy())  # inside the sector
    assert len(np.unique(row * len(keys) + column)) == len(row)  # each once
    rebuilt = np.zeros((len(batch), len(keys)))
    rebuilt[row, column] = found.value.numpy()
    np.testing.assert_allclose(rebuilt, matrix[batch], atol=2e-12, rtol=0)
    assert np.all(np.isin(np.arange(len(batch)), row[found.key.numpy() == keys[batch][row]]))  # x itself
    np.testing.assert_allclose(
        fast.diagonal(torch.from_numpy(keys[batch])).numpy(), matrix[batch, batch], atol=1e-12, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_connected_is_the_dense_twin_on_any_batch(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["H2", "LiH", "H2O", "CH2"]))
    order = data.draw(st.sampled_from(["reversed", "energy"]))
    _, keys, matrix = dense(name, order)
    batch = data.draw(st.lists(st.integers(0, len(keys) - 1), max_size=40))  # unsorted, duplicates, empty
    max_bytes = data.draw(st.sampled_from([None, 1, 20_000]))  # 1: row by row
    check_connected(kernel(name, order), keys, matrix, np.array(batch, dtype=int), max_bytes)


@ORDERS
def test_kernel_takes_any_real_operator(order: str) -> None:
    hamiltonian = odd_hamiltonian()
    keys = Sector(4, 2, 2, order).enumerate_keys()
    matrix = matrix_elements_dense(hamiltonian, keys, order)
    assert np.abs(matrix - np.diag(np.diag(matrix))).max() > 0.1
    fast = Kernel(hamiltonian, order)
    assert fast._n_general > 10
    check_connected(fast, keys, matrix, np.arange(len(keys)), None)
    check_connected(fast, keys, matrix, np.array([3, 3, 1]), 1)
    for pairs_below in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hamiltonian_module, "_PAIRS_BELOW", pairs_below)
            ours = fast.sector_matrix(torch.from_numpy(keys)).to_dense().numpy()
        np.testing.assert_allclose(ours, matrix, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sector_matrix_of_a_part_is_that_part_and_symmetric(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["LiH", "H2O", "CH2"]))
    _, keys, matrix = dense(name, "reversed")
    part = np.array(sorted(data.draw(st.sets(st.integers(0, len(keys) - 1), min_size=1, max_size=60))))
    max_bytes = data.draw(st.sampled_from([None, 1, 50_000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hamiltonian_module, "_PAIRS_BELOW", data.draw(st.sampled_from([0, 10**9]))
        )  # both roads
        patch.setattr(hamiltonian_module, "_CPU_CLASSES_FROM", data.draw(st.sampled_from([0, 10**9])))
        check_part(name, keys[part], matrix[np.ix_(part, part)], max_bytes)


def check_part(name: str, keys: np.ndarray, matrix: np.ndarray, max_bytes: int | None) -> None:
    fast, batch = kernel(name, "reversed"), torch.from_numpy(keys)
    ours = fast.sector_matrix(batch, max_bytes=max_bytes)
    ours_dense = ours.to_dense().numpy()
    np.testing.assert_allclose(ours_dense, matrix, atol=2e-12, rtol=0)
    np.testing.assert_array_equal(ours_dense, ours_dense.T)
    listed = fast.within(batch, max_bytes=max_bytes)
    rebuilt = torch.zeros_like(ours.to_dense()).index_put_(
        (listed.row, listed.column), listed.value, accumulate=True
    )
    torch.testing.assert_close(rebuilt, ours.to_dense(), atol=0, rtol=0)
    assert len(listed.row) == len(ours.values())
    vectors = torch.from_numpy(np.random.default_rng(len(keys)).normal(size=(len(keys), 2)))
    streamed = fast.apply(batch, vectors, max_bytes=max_bytes)
    torch.testing.assert_close(streamed, ours @ vectors, atol=1e-11, rtol=0)
    torch.sparse_csr_tensor(
        ours.crow_indices(), ours.col_indices(), ours.values(), ours.shape, check_invariants=True
    )


@pytest.mark.parametrize(("name", "n_symmetries"), [("LiH", 2), ("H2O", 1), ("CH2", 1), ("N2", 2)])
def test_symmetries_keep_classes_of_determinants_apart(name: str, n_symmetries: int) -> None:
    """No matrix element between two classes, every determinant in one, and the classes are of like size."""
    fast = kernel(name, "energy")
    keys = torch.from_numpy(sector(molecule(name), "energy").enumerate_keys())
    assert len(fast._symmetries) == n_symmetries
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamiltonian_module, "_CPU_CLASSES_FROM", 0)
        classes = fast._classes(keys)
    assert torch.cat(classes).sort().values.tolist() == list(range(len(keys)))
    assert len(classes) == 2**n_symmetries
    assert max(map(len, classes)) < 2 * len(keys) / len(classes)
    label = torch.empty(len(keys), dtype=torch.int64)
    for number, members in enumerate(classes):
        label[members] = number
    found = fast.connected(keys)
    assert len(found.row) > len(keys)
    assert torch.equal(label[found.row], label[torch.searchsorted(keys, found.key)])


@given(flips=st.lists(st.integers(0, 255), max_size=16))
def test_symmetries_are_all_that_commute(flips: list[int]) -> None:
    """Against every mask of eight qubits: those orthogonal to all flips are the span of what is found and
    of the two spin parities, which all flips keep, as those of a sector do."""
    spins = (0b01010101, 0b10101010)
    flips = [flip for flip in flips if not any((flip & spin).bit_count() % 2 for spin in spins)]
    commuting = {m for m in range(256) if not any((m & flip).bit_count() % 2 for flip in flips)}
    found = _symmetries(np.array(flips, dtype=np.int64), 8).tolist()
    assert len(found) <= 3
    span = {0}
    for mask in (*spins, *found):
        assert mask not in span  # independent
        span |= {mask ^ other for other in span}
    assert span <= commuting
    assert len(found) == 3 or span == commuting


def test_no_determinants_have_no_elements() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    fast = kernel("LiH", "reversed")
    assert len(fast.within(none).row) == len(fast.connected(none).row) == 0
    assert fast.sector_matrix(none).shape == (0, 0)


def test_sector_matrix_wants_sorted_keys() -> None:
    keys = torch.from_numpy(sector(molecule("LiH")).enumerate_keys())
    with pytest.raises(ValueError, match="ascending"):
        Kernel(molecule("LiH").hamiltonian).sector_matrix(keys.flip(0))


@pytest.mark.parametrize(
    ("name", "expected"), [("H2O", "5.34e-03"), ("N2", "1.11e-02"), ("Li2O", "1.94e-03")]
)
def test_v_score_of_the_hartree_fock_determinant(name: str, expected: str) -> None:
    mol = molecule(name)
    hf = sector(mol).hf_key()
    found = Kernel(mol.hamiltonian).connected(torch.tensor([hf]))
    own = found.key == hf
    assert found.value[own].item() == pytest.approx(mol.e_hf, abs=1e-8)
    variance = (found.value[~own] ** 2).sum().item()
    v_score = mol.n_electrons * variance / (mol.e_hf - mol.e_inf_sector) ** 2
    assert f"{v_score:.2e}" == expected


def test_brillouin_singles_of_hartree_fock_vanish() -> None:
    mol = molecule("H2O")
    hf = sector(mol).hf_key()
    found = Kernel(mol.hamiltonian).connected(torch.tensor([hf]))
    single = np.bitwise_count((found.key ^ hf).numpy()) == 2
    assert np.abs(found.value.numpy()[single]).max(initial=0.0) < 1e-7
