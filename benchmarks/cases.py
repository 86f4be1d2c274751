"""What the suite runs on: molecules, ansatze and sizes by name, and how a benchmark gets them.

Every benchmark class derives from `Suite`: asv calls `setup_cache` once and hands its result to `setup` and
to every benchmark; the gate (benchmarks/worker.py) does the same, for the parameters in `quick`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from replicate.hamiltonian import Hamiltonian, Kernel
from replicate.memory import keep_freed_memory
from replicate.molecule import Molecule, load_molecule
from replicate.sector import Sector
from replicate.spec import (
    AnsatzSpec,
    MoleculeSpec,
    PhaseSpec,
    Point,
    SamplingSpec,
    TrainSpec,
    molecule_by_name,
)

torch.set_num_threads(1)
keep_freed_memory()

ROOT = Path(__file__).resolve().parents[1]
MOLECULES = ["H2O", "N2", "H2S", "PH3", "Li2O"]
ANSATZE = ["made", "transformer", "retnet"]
SIZES = ["small", "large"]
Cases = dict[str, Molecule]


@dataclass(frozen=True)
class Size:
    """Hyper-parameters by ansatz, and the phase network beside them."""

    ansatz: dict[str, dict[str, int | float | str]]
    phase: tuple[int, int]


SHAPES = {
    "small": Size(
        {
            "made": {"width": 64, "depth": 1},
            "transformer": {"d": 32, "heads": 4, "ff": 128, "layers": 2},
            "retnet": {"d": 32, "heads": 4, "ff": 128, "layers": 2},
        },
        (64, 1),
    ),
    "large": Size(
        {
            "made": {"width": 512, "depth": 2},
            "transformer": {"d": 128, "heads": 8, "ff": 512, "layers": 2},
            "retnet": {"d": 128, "heads": 8, "ff": 512, "layers": 2},
        },
        (256, 1),
    ),
}
# Determinants of a fixed batch: those that H^2 reaches from Hartree-Fock, evenly thinned out.
BATCH = 1000
# Samples per step from a whole sector: so many that every determinant is drawn, whatever the rounding.
DRAWN = 10**9
WHOLE_LIMIT = 50_000  # largest sector that is enumerated


class Suite:
    """Common ground of all benchmark classes. `quick`: parameters of the gate's quick subset."""

    params: Any = ([],)
    param_names: Any = ()
    timeout = 900.0
    quick: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def setup_cache(self) -> Cases:
        """Every molecule, computed once per asv run."""
        return {name: load(name) for name in MOLECULES}

    setup_cache.timeout = 900.0  # type: ignore[attr-defined]

    @classmethod
    def timed(cls, parameters: tuple[str, ...]) -> bool:
        """Whether the gate times this entry of `quick` too, not only counts it."""
        return True


def molecule_folder() -> Path:
    """Where molecules are kept between runs; the gate points base and head at the same folder."""
    return Path(os.environ.get("NQS_BENCH_MOLECULES", ROOT / ".asv" / "molecules"))


@cache
def load(name: str) -> Molecule:
    """A molecule of specs/molecules.toml, from the cache if it has been computed before."""
    return load_molecule(spec(name), cache=molecule_folder())


@cache
def spec(name: str) -> MoleculeSpec:
    return molecule_by_name(name, ROOT / "specs" / "molecules.toml", {})


def point(name: str, ansatz: str, size: str, **changes: Any) -> Point:
    """A point whose step does the same work for ever: the learning rate moves nothing in float32."""
    width, depth = SHAPES[size].phase
    fields: dict[str, Any] = {
        "molecule": spec(name),
        "ansatz": AnsatzSpec(kind=ansatz, params=SHAPES[size].ansatz[ansatz]),
        "phase": PhaseSpec(width=width, depth=depth),
        "sampling": SamplingSpec(schedule="constant", n_max=DRAWN),
        "train": TrainSpec(learning_rate=1e-15),
        "memory_budget_mb": 2048,
        "steps": 10**6,
    }
    return Point(**{**fields, **changes})


def sector(hamiltonian: Hamiltonian) -> Sector:
    return Sector(hamiltonian.n_qubits // 2, hamiltonian.n_alpha, hamiltonian.n_beta)


def whole_keys(hamiltonian: Hamiltonian) -> torch.Tensor:
    """The sector, ascending; asv skips a case that raises NotImplementedError in `setup`."""
    space = sector(hamiltonian)
    if space.size > WHOLE_LIMIT:
        raise NotImplementedError(f"{space.size} determinants are not enumerated")
    return torch.as_tensor(space.enumerate_keys())


def batch_keys(kernel: Kernel, size: int = BATCH) -> torch.Tensor:
    """`size` determinants (all, if there are fewer) within two applications of H to Hartree-Fock, ascending.

    Fixed by the Hamiltonian alone, so that counts made on them are the same on every machine.
    """
    keys = torch.tensor([sector(kernel.hamiltonian).hf_key()])
    for _ in range(2):
        keys = torch.unique(kernel.connected(keys).key)
    return keys[torch.linspace(0, len(keys) - 1, min(size, len(keys)), dtype=torch.float64).long()]
