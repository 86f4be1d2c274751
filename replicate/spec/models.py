"""The frozen models of a study: what one training run is, and its content id.

Everything that changes a result is a field here; everything else (labels, sources, known counts for planning)
is a field too but stays out of `Point.id`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from replicate.spec.elements import ATOMIC_NUMBER, sto3g_orbitals

SCHEMA = 1
"""Version of the meaning of a point: part of every id, raised when equal specs give different results."""

ANSATZ_ENTRY_POINTS = "nqs_scaling.ansatz"
"""Entry-point group under which other distributions register an ansatz."""

NO_SCALE = ("init_scale", 1.0)
"""Initial weights as drawn: left out of ids, which are older than the field."""

MAX_SPIN_ORBITALS = 62
"""A determinant is one signed 64-bit key with two bits per orbital (DESIGN section 2)."""


BOHR_IN_ANGSTROM = 0.529177210903  # CODATA 2018
CLOSEST_ATOMS = 0.1
"""Bohr: nuclei closer than this are a mistake; their basis functions are linearly dependent."""


class UserError(Exception):
    """A mistake in what the user gave us: every problem is one line that says where it is and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))

    @property
    def problems(self) -> list[str]:
        return str(self).splitlines()


class Model(BaseModel):
    """Immutable, exact types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with changes; what was derived from the fields is derived anew."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(copied.__dict__) - set(type(self).model_fields):
            del copied.__dict__[name]
        return copied


def _whole(value: Any) -> Any:
    """TOML writes 1e12 as a float; a count takes it if it is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the cube's labels are int64
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Atom = tuple[str, float, float, float]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuples), Field(min_length=1)]
Table = dict[str, Any]


class ReferenceSpec(Model):
    """Published total energies in Hartree, to check against or to stand in where FCI is out of reach."""

    hf: float | None = None
    ccsd: float | None = None
    ccsd_t: float | None = None
    fci: float | None = None


class MoleculeSpec(Model):
    """A molecule: coordinates (`atoms`; an `xyz` file fills them) or an FCIDUMP, and what is known of it.

    `electrons`, `spin_orbitals` and `unique_flips` (M) are for planning; coordinates imply the first.
    """

    name: str
    atoms: Annotated[tuple[Atom, ...] | None, BeforeValidator(_tuples)] = None
    xyz: str | None = None
    fcidump: str | None = None
    content_sha256: str | None = None
    unit: Literal["angstrom", "bohr"] = "angstrom"
    basis: Annotated[str, Field(min_length=1)] = "sto-3g"
    charge: int = 0
    multiplicity: Annotated[int, Field(ge=1)] = 1
    degenerate: Literal["generic", "aligned"] = "generic"  # frame of degenerate orbitals: see replicate.scf
    source: str = ""
    sets: Annotated[tuple[str, ...], BeforeValidator(_tuples)] = ()
    reference: ReferenceSpec = ReferenceSpec()
    electrons: Annotated[int, Field(ge=1)] | None = None
    spin_orbitals: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    unique_flips: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("atoms", "xyz", "fcidump") if getattr(self, name) is not None]
        if not given:
            raise ValueError("no geometry; give one of atoms, xyz, fcidump")
        if len(given) > 1 and not (given == ["atoms", "xyz"] and self.content_sha256):  # a read xyz has both
            raise ValueError(f"{' and '.join(given)} are both given; allowed is one of atoms, xyz, fcidump")
        if given != ["atoms"] and self.content_sha256 is None:
            raise ValueError(f"{given[-1]}: files are read by load_study and molecule_from_file")
        self._check_atoms()
        basis_orbitals = self.minimal_basis
        if basis_orbitals and self.spin_orbitals and self.spin_orbitals != 2 * basis_orbitals:
            raise ValueError(
                f"spin_orbitals: {self.spin_orbitals} given, but {self.basis} has {2 * basis_orbitals} here"
            )
        self._check_spin()
        n = self.n_spin_orbitals
        if n is not None and n > MAX_SPIN_ORBITALS:
            raise ValueError(f"spin_orbitals: {n} spin-orbitals; supported are at most {MAX_SPIN_ORBITALS}")
        return self

    def _check_atoms(self) -> None:
        if self.atoms == ():
            raise ValueError("atoms: empty; give at least one [symbol, x, y, z]")
        for i, (symbol, *position) in enumerate(self.atoms or ()):
            if symbol not in ATOMIC_NUMBER:
                raise ValueError(f"atoms: unknown element {symbol!r}; allowed H to Kr by symbol")
            for j, (_, *other) in enumerate((self.atoms or ())[:i]):
                distance = math.dist(position, other) / (1.0 if self.unit == "bohr" else BOHR_IN_ANGSTROM)
                if distance < CLOSEST_ATOMS:
                    raise ValueError(
                        f"atoms: atoms {j + 1} and {i + 1} are {distance:.2g} bohr apart, at least "
                        f"{CLOSEST_ATOMS} is needed; is `unit` right?"
                    )

    def _check_spin(self) -> None:
        electrons, n = self.n_electrons, self.n_spin_orbitals
        if electrons is None:
            return
        if electrons < 1:
            raise ValueError(f"charge: {self.charge} leaves {electrons} electrons; at least 1 is needed")
        orbitals = n // 2 if n is not None else electrons
        if electrons > 2 * orbitals:
            raise ValueError(f"charge: {electrons} electrons do not fit into {2 * orbitals} spin-orbitals")
        highest = min(electrons, 2 * orbitals - electrons)  # unpaired electrons
        allowed = [m for m in range(1, highest + 2) if (electrons - (m - 1)) % 2 == 0]
        if self.multiplicity not in allowed:
            raise ValueError(
                f"multiplicity: {self.multiplicity} is impossible with {electrons} electrons in "
                f"{orbitals} orbitals; allowed {', '.join(map(str, allowed))}"
            )

    @property
    def minimal_basis(self) -> int | None:
        """Orbitals of the STO-3G basis, the one whose size is known without a chemistry program."""
        if self.atoms is None or self.basis.lower().replace("-", "") != "sto3g":
            return None
        counts = [sto3g_orbitals(ATOMIC_NUMBER[atom[0]]) for atom in self.atoms]
        return None if None in counts else sum(count for count in counts if count)

    @cached_property
    def n_spin_orbitals(self) -> int | None:
        """n, or None where only a chemistry program can tell."""
        minimal = self.minimal_basis
        return 2 * minimal if minimal else self.spin_orbitals

    @property
    def n_electrons(self) -> int | None:
        if self.atoms is None:
            return self.electrons
        return sum(ATOMIC_NUMBER[atom[0]] for atom in self.atoms) - self.charge

    @property
    def n_alpha(self) -> int | None:
        electrons = self.n_electrons
        return None if electrons is None else (electrons + self.multiplicity - 1) // 2

    @property
    def n_beta(self) -> int | None:
        electrons = self.n_electrons
        return None if electrons is None else (electrons - self.multiplicity + 1) // 2

    @cached_property
    def search_space(self) -> int | None:
        """|S| = C(n/2, n_alpha) C(n/2, n_beta) (SCIENCE section 5)."""
        n, alpha, beta = self.n_spin_orbitals, self.n_alpha, self.n_beta
        if n is None or alpha is None or beta is None:
            return None
        return math.comb(n // 2, alpha) * math.comb(n // 2, beta)

    def identity(self) -> dict[str, Any]:
        """What decides the Hamiltonian: coordinates or the content of a file, never a name or a path."""
        if self.fcidump is not None:
            return {"fcidump_sha256": self.content_sha256, "multiplicity": self.multiplicity}
        return {
            "atoms": [[s, x + 0.0, y + 0.0, z + 0.0] for s, x, y, z in self.atoms or ()],  # -0.0 is 0.0
            "unit": self.unit,
            "basis": self.basis,
            "charge": self.charge,
            "multiplicity": self.multiplicity,
            "degenerate": self.degenerate,
        }


class MadeParams(Model):
    """Masked MLP (SCIENCE 1.1): `depth` hidden layers of `width` units."""

    width: Width
    depth: Width = 1
    degrees: Literal["even", "random"] = "even"
    init_scale: Positive = 1.0  # of the initial weights, uniform within 1 / sqrt(inputs)


class TransformerParams(Model):
    """Decoder-only transformer (SCIENCE 1.2)."""

    d: Width
    heads: Width
    ff: Width
    layers: Width
    norm: Literal["post", "pre"] = "post"
    activation: Literal["relu", "gelu"] = "relu"
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide d = {self.d}")
        return self


class RetNetParams(Model):
    """Retentive network (SCIENCE 1.3). `chunk` chooses a form of evaluation, not a result: not in the id."""

    d: Width
    heads: Width
    ff: Width
    layers: Width
    init_std: Positive = 0.02
    chunk: Width = 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d % (2 * self.heads):
            raise ValueError(
                f"heads: d / heads must be an even whole number (rotary pairs), got {self.d} / {self.heads}"
            )
        return self


PARAMETERS: dict[str, type[Model]] = {
    "made": MadeParams,
    "transformer": TransformerParams,
    "retnet": RetNetParams,
}


def registered_kinds() -> list[str]:
    """Kinds of ansatz that exist here: the built-in ones and those registered by other distributions."""
    return [*PARAMETERS, *sorted(e.name for e in importlib.metadata.entry_points(group=ANSATZ_ENTRY_POINTS))]


class AnsatzSpec(Model):
    """`kind` and its hyper-parameters, defaults filled in. `name`: label on the axis, not in the id."""

    kind: str
    params: dict[str, int | float | str]
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") in PARAMETERS and isinstance(data.get("params"), dict):
            params = PARAMETERS[data["kind"]](**data["params"]).model_dump()
            return {**data, "params": params, "name": data.get("name") or data["kind"]}
        return data

    def identity(self) -> dict[str, Any]:
        params = {k: v for k, v in self.params.items() if k != "chunk" and (k, v) != NO_SCALE}
        return {"kind": self.kind, "params": params}


class PhaseSpec(Model):
    """Phase network (SCIENCE 1.4): `depth` + 1 hidden layers of `width` units."""

    width: Width
    depth: Annotated[int, Field(ge=0)] = 1
    init_scale: Positive = 1.0  # of the initial weights, uniform within 1 / sqrt(inputs)

    def identity(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_dump().items() if (k, v) != NO_SCALE}


class SamplingSpec(Model):
    """How many samples a step draws and keeps (SCIENCE section 2)."""

    schedule: Literal["exponential", "constant"] = "exponential"
    n_min: Count = 10**4
    n_max: Count = 10**12
    growth_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    batch_max: Count = 20_000
    regime: Literal["auto", "whole", "tree"] = "auto"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.n_min > self.n_max:
            raise ValueError(f"n_min: {self.n_min} exceeds n_max = {self.n_max}")
        if self.n_max > 10**15:
            raise ValueError(
                f"n_max: {self.n_max} exceeds 1e15, beyond which a count is no longer exact in float64"
            )
        return self


class TrainSpec(Model):
    """Adam and its schedule (SCIENCE section 3)."""

    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine", "decay", "cooldown"] = "constant"
    warmup_fraction: Fraction = 0.0
    cooldown_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: Positive = 1e-8
    clip: NonNegative = 1.0
    annealing_lambda: NonNegative = 0.0
    annealing_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.schedule == "cooldown" and self.warmup_fraction + self.cooldown_fraction > 1.0:
            raise ValueError("warmup_fraction: warm-up and cool-down together exceed the run")
        return self


class EvaluationSpec(Model):
    """The final evaluation, independent of training: exact up to `exact_limit` determinants."""

    n_samples: Count = 10**12
    exact_limit: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = 20_000
    batch_max: Count = 20_000


class VScoreSpec(Model):
    """Convention of the V-score (SCIENCE section 5). It only rescales: part of the study, not of a point."""

    n_dof: Literal["electrons", "qubits"] = "electrons"
    e_inf: Literal["sector", "identity", "zero"] = "sector"


class CheckpointSpec(Model):
    """A checkpoint is written when either interval has passed; 0 switches one off."""

    seconds: NonNegative = 60.0
    steps: Annotated[int, Field(ge=0)] = 0


class Selector(Model):
    """A set of cells: those whose label is listed on every axis that is given."""

    molecules: tuple[str, ...] | None = None
    ansatze: tuple[str, ...] | None = None
    sizes: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    variants: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def matches(self, point: Point) -> bool:
        labels = point.labels()
        return all(values is None or labels[axis] in values for axis, values in self)


class HoldoutSpec(Model):
    """What `fit` must not read: whole labels of an axis, or cells."""

    molecules: Annotated[tuple[str, ...], BeforeValidator(_tuples)] = ()
    sizes: Annotated[tuple[str, ...], BeforeValidator(_tuples)] = ()
    steps: Annotated[tuple[int, ...], BeforeValidator(_tuples)] = ()
    cells: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_tuples)] = ()
    reason: str = ""


class StudyFile(Model):
    """The top level of a spec file."""

    study: str
    title: str = ""
    molecules_file: str | None = None  # default: molecules.toml beside the spec, else the package's own
    molecules: Names
    ansatze: Names
    sizes: Names
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_tuples), Field(min_length=1)] = (0,)
    molecule: dict[str, Table] = {}
    ansatz: dict[str, Table]
    phase: Table = {}
    sampling: Table = {}
    train: Table
    evaluation: Table = {}
    local_energy: Any = "exact"
    order: Any = "reversed"
    precision: Any = "float32"
    hamiltonian_threshold: Any = 1e-8
    memory_budget_mb: Any = 1024
    variants: dict[str, Table] = {}
    holdout: HoldoutSpec = HoldoutSpec()
    v_score: VScoreSpec = VScoreSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()


# The one pass over the sector gives every amplitude: no passes are left that `paper` could make per sample.
PAPER_WHOLE = ("paper", "whole")
PAPER_WHOLE_PROBLEM = (
    "'paper' makes its passes sample by sample, sampling.regime = 'whole' one over the sector; "
    'give regime = "tree" or leave it out'
)

_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Point(Model):
    """One training run, fully resolved. `id` covers all that changes its result, and nothing else."""

    study: str = ""
    molecule: MoleculeSpec
    ansatz: AnsatzSpec
    phase: PhaseSpec
    sampling: SamplingSpec = SamplingSpec()
    local_energy: Literal["exact", "paper", "sampled"] = "exact"
    train: TrainSpec = TrainSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    hamiltonian_threshold: Annotated[float, Field(ge=0.0, le=0.01)] = 1e-8
    order: Literal["reversed", "energy"] = "reversed"
    precision: Literal["float32", "float64"] = "float32"
    memory_budget_mb: Count = 1024
    size: str = ""
    variant: str = "base"
    seed: Seed = 0
    steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _whole_passes_are_for_samples(self) -> Self:
        if (self.local_energy, self.sampling.regime) == PAPER_WHOLE:
            raise ValueError(f"local_energy: {PAPER_WHOLE_PROBLEM}")
        return self

    def labels(self) -> dict[str, Any]:
        """Position on every axis of the study, by name."""
        return {
            "molecules": self.molecule.name,
            "ansatze": self.ansatz.name,
            "sizes": self.size,
            "steps": self.steps,
            "variants": self.variant,
            "seeds": self.seed,
        }

    def identity(self) -> dict[str, Any]:
        """Everything that changes the result, resolved: the content of the id."""
        plain = ("sampling", "train", "evaluation")
        return {
            "schema": SCHEMA,
            "molecule": self.molecule.identity(),
            "ansatz": self.ansatz.identity(),
            "phase": self.phase.identity(),
            **{name: getattr(self, name).model_dump() for name in plain},
            "local_energy": self.local_energy,
            "hamiltonian_threshold": self.hamiltonian_threshold,
            "order": self.order,
            "precision": self.precision,
            "memory_budget_mb": self.memory_budget_mb,
            "seed": self.seed,
            "steps": self.steps,
        }

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of `identity`."""
        return hashlib.sha256(_canonical_json(self.identity()).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        variant = "" if self.variant == "base" else f" {self.variant}"
        return f"{self.molecule.name} {self.ansatz.name}/{self.size} T={self.steps}{variant} seed {self.seed}"


Selector.model_rebuild()
