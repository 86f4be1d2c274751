"""Self-consistent field, orbitals and reference energies with PySCF: a worker that runs in its own process.
 `python -m replicate.scf` reads one JSON problem on stdin and writes one .npz. It has a process of its own
because threaded BLAS and OpenMP sums depend on the thread count, and with them the last bits of orbitals,
which near-degenerate pairs amplify: `replicate.molecule` starts it with one thread in every library, whatever
the caller uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import warnings
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replicate.fcidump import read_fcidump
from replicate.sector import MAX_QUBITS
from replicate.spec import MoleculeSpec, UserError

Floats = NDArray[np.float64]

FCI_LIMIT = 1_100_000
"""Determinants up to which FCI is computed (LiCl, 1 002 001, is the largest of the study that is
feasible)."""

CALLER_SECONDS = 0.5
"""How often it is looked whether the caller is still there."""

DEGENERATE = 1e-8
"""Hartree: orbitals closer than this are one degenerate block. Rounding splits a block by
1e-14; the four-decimal coordinates of PH3 or CH4 split theirs by 1e-7 to 1e-5, which is
physical: those orbitals are determined."""

# PySCF's handler of a singular extrapolation (a broken bond) names numpy.linalg.linalg, which numpy 2.4 has
# not
_SINGULAR_DIIS = (np.linalg.LinAlgError, AttributeError)
_TIE = 1e-6  # relative: components this close count as equal when the largest is sought


def solve(problem: dict[str, Any]) -> dict[str, Any]:
    """Everything of a molecule that needs PySCF.

    `problem`: atoms, unit, basis, charge, multiplicity, degenerate; or fcidump (a path) and multiplicity.
    Returns constant, h1 (T, T), eri (T, T, T, T) (Hartree, chemists' order, real), n_alpha, n_beta, mo_energy
    (T,), e_hf, e_ccsd, e_ccsd_t, e_fci (Hartree, NaN where not computed) and versions (JSON text).
    """
    import pyscf
    from pyscf import ao2mo, scf

    if problem.get("fcidump") is not None:
        mf, constant, h1, eri = _from_fcidump(problem)
        energies = mf.mo_energy
    else:
        mol = _build(problem)
        mf = scf.ROHF(mol) if mol.spin else scf.RHF(mol)
        _converge(mf, None, problem["name"])
        coefficients, energies = canonical_orbitals(mf, problem.get("degenerate", "generic"))
        constant = float(mol.energy_nuc())
        h1 = coefficients.T @ mf.get_hcore() @ coefficients
        eri = ao2mo.restore(1, ao2mo.kernel(mol, coefficients), len(h1))
    n_alpha, n_beta = mf.mol.nelec
    e_ccsd, e_ccsd_t = _coupled_cluster(mf)
    return {
        "constant": constant,
        "h1": (h1 + h1.T) / 2,
        "eri": eri,
        "n_alpha": n_alpha,
        "n_beta": n_beta,
        "mo_energy": energies,
        "e_hf": float(mf.e_tot),
        "e_ccsd": e_ccsd,
        "e_ccsd_t": e_ccsd_t,
        "e_fci": _full_ci(constant, h1, eri, (n_alpha, n_beta)),
        "versions": json.dumps({"pyscf": pyscf.__version__, "numpy": np.__version__}),
    }


def check_basis(spec: MoleculeSpec) -> None:
    """Whether PySCF has the basis for these atoms, and whether it fits 62 spin-orbitals; raises UserError.

    A spec checks what STO-3G needs by itself; for any other basis a run asks here, before its first point.
    """
    if spec.atoms is None or spec.minimal_basis is not None:
        return
    with warnings.catch_warnings():  # PySCF advertises another package where it lacks a basis
        warnings.simplefilter("ignore")
        n = 2 * _build({**spec.identity(), "name": spec.name}).nao
    if spec.spin_orbitals not in (None, n):
        raise UserError(
            f"{spec.name}: spin_orbitals: {spec.spin_orbitals} given, but {spec.basis} has {n} here"
        )


def _build(problem: dict[str, Any]) -> Any:
    """The PySCF molecule, or UserError for what PySCF cannot build."""
    from pyscf import gto
    from pyscf.lib.exceptions import BasisNotFoundError

    name = problem["name"]
    try:
        # The spin is set before building: PySCF's own message for a wrong one names neither charge nor
        # multiplicity
        electrons = sum(gto.charge(atom[0]) for atom in problem["atoms"]) - problem["charge"]
        unpaired = problem["multiplicity"] - 1
        if electrons < 1 or unpaired > electrons or (electrons - unpaired) % 2:
            raise UserError(f"{name}: multiplicity: {unpaired + 1} is impossible with {electrons} electrons")
        mol = gto.M(
            atom=[(atom[0], tuple(atom[1:])) for atom in problem["atoms"]],
            unit=problem["unit"],
            basis=problem["basis"],
            charge=problem["charge"],
            spin=unpaired,
            verbose=0,
        )
    except (BasisNotFoundError, KeyError, RuntimeError) as error:
        raise UserError(f"{name}: basis: {problem['basis']!r} on these atoms: {_one_line(error)}") from None
    if 2 * mol.nao > MAX_QUBITS:
        raise UserError(f"{name}: basis: {2 * mol.nao} spin-orbitals; supported are at most {MAX_QUBITS}")
    if max(mol.nelec) > mol.nao:
        raise UserError(f"{name}: charge: {mol.nelec} alpha and beta electrons do not fit {mol.nao} orbitals")
    return mol


def _from_fcidump(problem: dict[str, Any]) -> tuple[Any, float, Floats, Floats]:
    """Mean field on integrals that are kept as they are: the file's orbitals stay the orbitals
    of the Hamiltonian."""
    from pyscf import ao2mo, gto, scf

    dump = read_fcidump(problem["fcidump"])
    if problem["multiplicity"] != dump.ms2 + 1:
        raise UserError(
            f"{problem['fcidump']}: MS2: the file has {dump.ms2}, multiplicity {problem['multiplicity']} "
            f"was asked for; give {dump.ms2 + 1}"
        )
    t = len(dump.h1)
    mol = gto.M(verbose=0)
    mol.nelectron, mol.spin, mol.nao = dump.n_electrons, dump.ms2, t
    mol.incore_anyway = True
    mf = scf.ROHF(mol) if dump.ms2 else scf.RHF(mol)
    mf.get_hcore = lambda *_: dump.h1
    mf.get_ovlp = lambda *_: np.eye(t)
    mf.energy_nuc = lambda *_: dump.constant
    mf._eri = ao2mo.restore(8, dump.eri, t)
    alpha, beta = (np.diag((np.arange(t) < n).astype(float)) for n in mol.nelec)
    _converge(mf, np.array([alpha, beta]) if dump.ms2 else alpha + beta, problem["fcidump"])
    return mf, dump.constant, dump.h1, dump.eri


def _converge(mf: Any, start: Floats | None, name: str) -> None:
    """Converge to a gradient of 1e-9, second order if DIIS does not get there.

    Symmetry zeros of the integrals are then clean to about 1e-10, well below the threshold of
    the Pauli strings.
    """
    mf.conv_tol, mf.conv_tol_grad, mf.max_cycle = 1e-12, 1e-9, 200
    with contextlib.suppress(*_SINGULAR_DIIS):
        mf.kernel(start)
    if not mf.converged:
        second = mf.newton()
        second.conv_tol, second.conv_tol_grad, second.max_cycle = 1e-12, 1e-9, 200
        second.kernel(mf.mo_coeff, mf.mo_occ)
        if not second.converged:
            raise UserError(
                f"{name}: Hartree-Fock does not converge; check coordinates, charge and multiplicity"
            )
        mf.mo_coeff, mf.mo_occ, mf.mo_energy = second.mo_coeff, second.mo_occ, second.mo_energy
        mf.e_tot, mf.converged = second.e_tot, True


def canonical_orbitals(mf: Any, degenerate: str) -> tuple[Floats, Floats]:
    """Orbitals that diagonalise the Fock matrix within the doubly, singly and un-occupied
    spaces, made unique.

    Returns coefficients (AO, MO) and orbital energies (MO,), Hartree. ROHF: Roothaan's effective Fock matrix.
    Non-degenerate orbitals: the largest component in the symmetrically orthogonalised AO basis is positive.
    Blocks degenerate to `DEGENERATE` are turned to the frame of `_orient`.
    """
    overlap_values, overlap_vectors = np.linalg.eigh(mf.get_ovlp())
    root = (overlap_vectors * np.sqrt(overlap_values)) @ overlap_vectors.T
    inverse_root = (overlap_vectors / np.sqrt(overlap_values)) @ overlap_vectors.T
    fock = np.asarray(mf.get_fock())
    coefficients, energies = [], []
    for occupation in (2, 1, 0):
        space = mf.mo_coeff[:, mf.mo_occ == occupation]
        values, vectors = np.linalg.eigh(space.T @ fock @ space)
        orbitals = root @ (space @ vectors)
        edges = np.flatnonzero(np.diff(values) > DEGENERATE) + 1
        for block in np.split(np.arange(len(values)), edges) if len(values) else []:
            coefficients.append(inverse_root @ _orient(orbitals[:, block], degenerate))
            energies.append(values[block])
    return np.concatenate(coefficients, axis=1), np.concatenate(energies)


def _orient(block: Floats, degenerate: str) -> Floats:
    """A basis of the span of `block` (orthonormal columns, AO x k) that does not depend on the
    basis it came in.

    The orbitals are the projections of fixed directions onto the span, one after the other.
    "aligned": of the AOs the one with the largest projection, so that all pi pairs of a linear
    molecule share their axes (the fewest Pauli strings). "generic": fixed irrational
    directions, so that each block has an orientation of its own: what a diagonaliser without
    symmetry returns, as in the study's code lineage, but the same every time.
    """
    span, size = block @ block.T, block.shape[1]
    index = np.arange(1.0, len(span) + 1.0)
    out: list[Floats] = []
    frequency = 0
    while len(out) < size:
        if degenerate == "generic" and size > 1:
            frequency += 1
            column = span @ np.cos(frequency * index)
            if np.linalg.norm(column) < 0.1:  # nearly orthogonal to the span: rounding would decide
                continue
        else:
            weight = np.diagonal(span)
            column = span[:, int(np.flatnonzero(weight > weight.max() * (1 - _TIE))[0])]
        column = column / np.linalg.norm(column)
        out.append(column)
        span = span - np.outer(column, column)
    return np.stack(out, axis=1)


def _coupled_cluster(mf: Any) -> tuple[float, float]:
    """CCSD and CCSD(T) total energies, NaN where not computed.

    Restricted for closed shells. Open shells: PySCF's spin-orbital CCSD on ROHF orbitals, which keeps the
    occupied-virtual Fock block (exact for two electrons: a test); its (T) does not, so there is none.
    """
    from pyscf import cc

    n_alpha, n_beta = mf.mol.nelec
    if max(n_alpha, n_beta) >= mf.mo_coeff.shape[1] or n_beta == 0:
        return float("nan"), float("nan")
    solver = cc.CCSD(mf) if n_alpha == n_beta else cc.UCCSD(mf.to_uhf())
    solver.verbose, solver.conv_tol, solver.conv_tol_normt, solver.max_cycle = 0, 1e-10, 1e-7, 300
    with contextlib.suppress(*_SINGULAR_DIIS):
        solver.kernel()
    if not solver.converged:
        return float("nan"), float("nan")
    triples = solver.ccsd_t() if n_alpha == n_beta else float("nan")
    return float(solver.e_tot), float(solver.e_tot + triples)


def _full_ci(constant: float, h1: Floats, eri: Floats, electrons: tuple[int, int]) -> float:
    """Lowest energy of the (n_alpha, n_beta) sector, NaN above `FCI_LIMIT` determinants or unconverged.

    Davidson's method keeps the symmetry of its start vectors, and the lowest determinants need not have that
    of the ground state (B2: 43 mHa above it). So it starts from random vectors, weighted towards low
    determinants, which have every symmetry. More roots are followed only where one does not converge
    (near-degenerate states).
    """
    from pyscf import fci

    t = len(h1)
    size = comb(t, electrons[0]) * comb(t, electrons[1])
    if size > FCI_LIMIT:
        return float("nan")
    for roots in sorted({1, min(3, size)}):
        solver = fci.direct_spin1.FCI()
        solver.verbose, solver.conv_tol, solver.max_cycle, solver.max_space = 0, 1e-12, 200, 24
        solver.nroots = roots
        diagonal = solver.make_hdiag(h1, eri, t, electrons)
        rng = np.random.default_rng(0)
        start = rng.normal(size=(min(roots + 1, size), size)) / (diagonal - diagonal.min() + 0.5) ** 2
        start /= np.linalg.norm(start, axis=1, keepdims=True)
        _, vectors = solver.kernel(h1, eri, t, electrons, ecore=constant, ci0=list(start))
        if np.atleast_1d(solver.converged)[0]:
            # a fresh subspace takes the energy from 3e-10 to rounding (HCl)
            solver.nroots, solver.conv_tol, solver.max_cycle = 1, 1e-14, 10
            lowest = vectors if roots == 1 else vectors[0]
            energy, _ = solver.kernel(h1, eri, t, electrons, ecore=constant, ci0=lowest)
            return float(energy)
    return float("nan")


def checksum(arrays: dict[str, NDArray[Any]]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _end_with(caller: int) -> None:
    """End once the caller has: a second Ctrl-C or kill -9 does not reach this process."""
    while os.getppid() == caller:
        time.sleep(CALLER_SECONDS)
    os._exit(1)


def main() -> int:
    """Read a problem from stdin, write its result to the file that it names; 2 and the problems
    on bad input."""
    problem = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(problem["caller"],), daemon=True).start()
    import pyscf

    pyscf.lib.num_threads(1)
    try:
        result = solve(problem)
    except UserError as error:
        sys.stdout.write(json.dumps({"problems": error.problems}))
        return 2
    with Path(problem["output"]).open("wb") as file:
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in result.items()}
        np.savez(file, sha256=np.array(checksum(arrays)), **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
