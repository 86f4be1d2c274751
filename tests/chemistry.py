"""Molecules of specs/molecules.toml for the tests: computed once per run of the tests (conftest.py)."""

from __future__ import annotations

import functools
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from replicate import scf
from replicate.molecule import Integrals, Molecule, load_molecule
from replicate.sector import Sector
from replicate.spec import MoleculeSpec

TABLE: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parents[1] / "specs" / "molecules.toml").read_text(encoding="utf-8")
)
_ALONE = tempfile.TemporaryDirectory()  # for scripts that no test run has started


def spec(name: str, /, **changes: Any) -> MoleculeSpec:
    return MoleculeSpec(**{**TABLE[name], "name": name, **changes})


@functools.cache
def molecule(name: str) -> Molecule:
    return load_molecule(spec(name), cache=os.environ.get("NQS_TEST_MOLECULES", _ALONE.name))


def sector(mol: Molecule, order: str = "reversed") -> Sector:
    return Sector(mol.n_orbitals, mol.n_alpha, mol.n_beta, order)


@functools.cache
def integrals(name: str, degenerate: str = "generic") -> tuple[Integrals, float, tuple[int, int]]:
    """Integrals, Hartree-Fock energy and electrons without coupled cluster and FCI (LiCl's takes 20 s)."""
    from pyscf import ao2mo
    from pyscf import scf as pyscf_scf

    mol = scf._build({**TABLE[name], "name": name})
    mf = pyscf_scf.ROHF(mol) if mol.spin else pyscf_scf.RHF(mol)
    scf._converge(mf, None, name)
    c, _ = scf.canonical_orbitals(mf, degenerate)
    h1 = c.T @ mf.get_hcore() @ c
    eri = ao2mo.restore(1, ao2mo.kernel(mol, c), len(h1))
    return Integrals(float(mol.energy_nuc()), (h1 + h1.T) / 2, np.asarray(eri)), float(mf.e_tot), mol.nelec
