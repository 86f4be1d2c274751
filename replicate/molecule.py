"""A molecule: integrals, reference energies and Hamiltonian, computed once and stored by content hash.
 PySCF works in `replicate.scf`, a process of its own with one thread, so that the same input gives the same
bits whatever the thread count of the caller. Only the integrals and energies are stored; Pauli strings are
quick to build.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replicate.pauli import DEFAULT_THRESHOLD, Hamiltonian, jordan_wigner, sector_mean_energy
from replicate.scf import FCI_LIMIT, checksum
from replicate.spec import MoleculeSpec, UserError
from replicate.spec.files import read_text

LOGGER = logging.getLogger(__name__)

_RECIPE = 2
"""Version of what `replicate.scf` computes from the same input: part of the cache key."""

_ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    ),
    "1",
)
_ENERGIES = {"hf": "e_hf", "ccsd": "e_ccsd", "ccsd_t": "e_ccsd_t", "fci": "e_fci"}


@dataclass(frozen=True)
class Integrals:
    """Real integrals over orthonormal orbitals, Hartree: h1 (T, T), eri (T, T, T, T) in
    chemists' order (pq|rs)."""

    constant: float
    h1: NDArray[np.float64]
    eri: NDArray[np.float64]


@dataclass(frozen=True)
class Molecule:
    """Everything the replication knows of a molecule. Energies: total, Hartree; None where
    neither computed nor given.

    `energy_sources`: for each of hf, ccsd, ccsd_t, fci "computed", "reference" (the molecule
    table's published value: out of reach here) or "none". `geometry`: (symbol, x, y, z) in
    `unit`; empty for an FCIDUMP.
    """

    name: str
    geometry: tuple[tuple[str, float, float, float], ...]
    unit: str
    basis: str
    charge: int
    multiplicity: int
    n_alpha: int
    n_beta: int
    n_orbitals: int
    integrals: Integrals
    e_hf: float
    e_ccsd: float | None
    e_ccsd_t: float | None
    e_fci: float | None
    energy_sources: Mapping[str, str]
    versions: Mapping[str, str]
    hamiltonian: Hamiltonian
    e_inf_sector: float
    e_inf_identity: float

    @property
    def n_spin_orbitals(self) -> int:
        """n = qubits."""
        return 2 * self.n_orbitals

    @property
    def n_electrons(self) -> int:
        return self.n_alpha + self.n_beta

    @property
    def search_space(self) -> int:
        """|S| = C(n/2, n_alpha) C(n/2, n_beta)."""
        return comb(self.n_orbitals, self.n_alpha) * comb(self.n_orbitals, self.n_beta)


def load_molecule(
    spec: MoleculeSpec, *, threshold: float = DEFAULT_THRESHOLD, cache: Path | str | None = None
) -> Molecule:
    """Compute a molecule, or read it from the folder `cache` where an identical one has been stored.

    `threshold`: Hartree, of the Pauli strings (`replicate.pauli.from_strings`); not part of the cache key.
    Raises UserError for input that is unreadable or impossible.
    """
    problem = _problem(spec)
    stored = _stored(spec, problem, Path(cache) if cache is not None else None)
    integrals = Integrals(float(stored["constant"]), stored["h1"], stored["eri"])
    n_alpha, n_beta = int(stored["n_alpha"]), int(stored["n_beta"])
    n = 2 * len(integrals.h1)
    if spec.spin_orbitals not in (None, n):
        raise UserError(
            f"{spec.name}: spin_orbitals: {spec.spin_orbitals} given, but {spec.basis} has {n} here"
        )
    arguments = (integrals.constant, integrals.h1, integrals.eri)
    hamiltonian = jordan_wigner(*arguments, n_alpha=n_alpha, n_beta=n_beta, threshold=threshold)
    energies: dict[str, float | None] = {}
    sources: dict[str, str] = {}
    for key, name in _ENERGIES.items():
        published, computed = getattr(spec.reference, key), float(stored[name])
        if np.isnan(computed):
            energies[name], sources[key] = published, "none" if published is None else "reference"
        else:
            energies[name], sources[key] = computed, "computed"
    if np.isnan(float(stored["e_fci"])) and comb(n // 2, n_alpha) * comb(n // 2, n_beta) <= FCI_LIMIT:
        LOGGER.warning("%s: FCI did not converge; its energy is %s", spec.name, sources["fci"])
    e_hf = energies.pop("e_hf")
    assert e_hf is not None
    return Molecule(
        name=spec.name,
        geometry=spec.atoms or (),
        unit=spec.unit,
        basis=spec.basis,
        charge=spec.charge,
        multiplicity=n_alpha - n_beta + 1,
        n_alpha=n_alpha,
        n_beta=n_beta,
        n_orbitals=len(integrals.h1),
        integrals=integrals,
        e_hf=e_hf,
        **energies,
        energy_sources=sources,
        versions=json.loads(str(stored["versions"])),
        hamiltonian=hamiltonian,
        e_inf_sector=sector_mean_energy(*arguments, n_alpha, n_beta),
        e_inf_identity=hamiltonian.identity_coefficient,
    )


def _problem(spec: MoleculeSpec) -> dict[str, Any]:
    """What decides the result, with files read: the input of `replicate.scf` and of the cache key."""
    if spec.fcidump is not None:
        digest = hashlib.sha256(read_text(Path(spec.fcidump), spec.fcidump).encode()).hexdigest()
        if spec.content_sha256 not in (None, digest):
            raise UserError(f"{spec.fcidump}: has changed since the spec was read")
        return {"fcidump_sha256": digest, "multiplicity": spec.multiplicity}
    return spec.identity()


def _stored(spec: MoleculeSpec, problem: dict[str, Any], cache: Path | None) -> dict[str, NDArray[Any]]:
    """The arrays of `replicate.scf.solve`, from the cache if they are there and whole."""
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return _read(_compute(spec, problem, Path(folder)))
    versions = {"recipe": _RECIPE, "pyscf": importlib.metadata.version("pyscf")}
    key = hashlib.sha256(json.dumps({**problem, **versions}, sort_keys=True).encode()).hexdigest()
    path = cache / f"{key[:24]}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            LOGGER.warning("%s: stored molecule %s is damaged (%s): computed again", path, spec.name, error)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as folder:
        fresh = _compute(spec, problem, Path(folder))
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        fresh.replace(path)  # whole or not at all; two processes that compute the same write the same
    directory = os.open(cache, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return _read(path)


def _compute(spec: MoleculeSpec, problem: dict[str, Any], folder: Path) -> Path:
    """Run `replicate.scf` with one thread; its result is the file that is returned, closed by a checksum."""
    LOGGER.info("%s: computing integrals and reference energies", spec.name)
    output = folder / "molecule.npz"
    request = {**problem, "name": spec.name, "fcidump": spec.fcidump, "output": str(output)}
    request["caller"] = os.getpid()
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "replicate.scf"],  # -P: nothing in the current folder is imported
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
        process_group=0,  # a signal to the caller's group asks for a checkpoint, not for half a molecule
    )
    if done.returncode == 2:
        raise UserError(*json.loads(done.stdout.splitlines()[-1])["problems"])
    if done.returncode != 0:
        raise RuntimeError(
            f"{spec.name}: the PySCF process ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return output


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a stored molecule; ValueError if their checksum is not the stored one."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not a whole .npz archive")
    # opened here: numpy leaks the handle of an archive that it cannot read
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if str(arrays.pop("sha256")) != checksum(arrays):
        raise ValueError("checksum differs")
    return arrays
