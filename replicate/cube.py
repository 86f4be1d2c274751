"""Points -> cube: one DataTree per study, preallocated from the spec, so that nothing is merged by guess.

Names: DESIGN section 5. Beyond them /final has `point_id`, `planned` (1 where the spec has a cell),
`held_out` (1 where a fit must not look), `exact`, and /molecule says where its FCI energy is from. Only point
files are read: collecting twice gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from replicate.plan import count_parameters
from replicate.records import FINAL, HISTORY, record_grid
from replicate.spec import SCHEMA, MoleculeSpec, Point, Study, UserError, VScoreSpec
from replicate.store import Store, Stored, replacing

DIMS = ("molecule", "ansatz", "size", "steps", "variant", "seed")
CUBE_SCHEMA = 1
MISSING, DONE, FAILED, INVALID = 0, 1, 2, 3

AXIS_NAMES = {
    "molecule": "molecule",
    "ansatz": "ansatz",
    "size": "label of the model size, shared by the ansatze",
    "steps": "optimisation steps T",
    "variant": "what an ablation changes, base is the study itself",
    "seed": "root seed of the run",
}
# Copied from the point files; the rest of /final is derived from these and a few more.
COPIED = (
    "energy",
    "energy_stderr",
    "variance",
    "n_unique_mean",
    "n_samples_total",
    "flops_estimated",
    "flops_executed",
    "wall_seconds",
    "evaluation_seconds",
    "peak_memory_bytes",
)
DERIVED: dict[str, tuple[str, str]] = {
    "v_score": ("1", "V-score, N_dof Var(H) / (E - E_inf)^2"),
    "abs_error": ("hartree", "absolute error of the energy against FCI"),
    "search_fraction": ("1", "S_F: mean distinct determinants per step over the size of the search space"),
    "d_prime": ("1", "D' = T S_F, steps times search fraction"),
}
# Named parts of a step: variable of /parts, its extra axis, the JSON attribute of a point file it is read
# from, units.
PARTS = (
    (
        "flops_estimated_part",
        "flop_part",
        "flops_estimated_parts",
        "flop",
        "estimated training FLOPs of a part of the step",
    ),
    (
        "flops_executed_part",
        "executed_part",
        "flops_executed_parts",
        "flop",
        "executed training FLOPs of a part of the step",
    ),
    (
        "wall_part_seconds",
        "wall_part",
        "wall_parts",
        "s",
        "wall time of a part of the step, summed over training",
    ),
)
# What is read of a point file.
NUMBERS = (*COPIED, "valid", "exact", "n_modulus", "n_phase", *(f"history_{name}" for name in HISTORY))
TEXTS = ("molecule", "provenance", *(attribute for _, _, attribute, *_ in PARTS))

MOLECULE: dict[str, tuple[str, str]] = {
    "n_spin_orbitals": ("1", "spin-orbitals, qubits n"),
    "n_alpha": ("1", "alpha electrons"),
    "n_beta": ("1", "beta electrons"),
    "search_space": ("1", "|S|, determinants with this particle number and spin projection"),
    "n_pauli_terms": ("1", "Pauli strings of the Hamiltonian above the threshold"),
    "n_unique_flips": ("1", "M, distinct flip patterns of the Hamiltonian, the identity included"),
    "e_hf": ("hartree", "Hartree-Fock energy"),
    "e_ccsd": ("hartree", "CCSD energy"),
    "e_ccsd_t": ("hartree", "CCSD(T) energy"),
    "e_fci": (
        "hartree",
        "full configuration interaction energy: lowest in the sector, whatever its total spin",
    ),
    "e_inf_sector": ("hartree", "mean energy of the sector, Tr(H) / dimension"),
    "e_inf_identity": ("hartree", "coefficient of the identity string"),
}


def v_score(energy: float, variance: float, n_dof: int, e_inf: float) -> float:
    """V = N_dof Var(H) / (E - E_inf)^2 (Wu et al., Science 386, 296 (2024)); energies in Hartree."""
    return n_dof * variance / (energy - e_inf) ** 2


def v_score_in(convention: VScoreSpec, molecule: Mapping[str, Any], energy: float, variance: float) -> float:
    """The V-score of one point in the study's convention."""
    electrons = molecule["n_alpha"] + molecule["n_beta"]
    n_dof = electrons if convention.n_dof == "electrons" else molecule["n_spin_orbitals"]
    e_inf = 0.0 if convention.e_inf == "zero" else molecule[f"e_inf_{convention.e_inf}"]
    return v_score(energy, variance, n_dof, e_inf)


@dataclass
class _Cube:
    """The arrays while they fill."""

    study: Study
    final: dict[str, np.ndarray]
    history: dict[str, np.ndarray]
    molecules: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: Counter[str] = field(default_factory=Counter)
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def allocate(cls, study: Study) -> _Cube:
        shape = tuple(len(labels) for labels in study.axes.values())
        records = max(len(record_grid(steps)) for steps in study.axes["steps"])
        final = {name: np.full(shape, np.nan) for name in (*COPIED, *DERIVED)}
        final["status"] = np.full(shape, MISSING, np.int8)
        final["planned"] = np.zeros(shape, np.int8)
        final["held_out"] = np.zeros(shape, np.int8)
        final["exact"] = np.zeros(shape, np.int8)
        final["point_id"] = np.full(shape, "", dtype="<U12")
        history = {name: np.full((*shape, records), np.nan) for name in HISTORY}
        by_size = tuple(shape[DIMS.index(name)] for name in ("molecule", "ansatz", "size", "variant"))
        for name in ("n_modulus", "n_phase"):
            final[name] = np.full(by_size, -1, np.int64)
        return cls(study, final, history)

    def add(self, point: Point, stored: Stored) -> None:
        """Take in one stored point."""
        data = stored.values
        at = self.study.index(point)
        molecule = json.loads(stored.attrs["molecule"])
        known = self.molecules.setdefault(point.molecule.name, molecule)
        if known["hamiltonian_sha256"] != molecule["hamiltonian_sha256"]:
            raise UserError(
                f"{point.id}: its Hamiltonian of {point.molecule.name} is not that of the points before "
                "(from another machine or version?); run this study in one place, or remove its point files"
            )
        for name in COPIED:
            self.final[name][at] = float(data[name])
        e_fci, _ = _fci(molecule, point.molecule)
        energy, variance = float(data["energy"]), float(data["variance"])
        fraction = float(data["n_unique_mean"]) / molecule["search_space"]
        self.final["v_score"][at] = v_score_in(self.study.v_score, molecule, energy, variance)
        self.final["abs_error"][at] = np.nan if e_fci is None else abs(energy - e_fci)
        self.final["search_fraction"][at] = fraction
        self.final["d_prime"][at] = point.steps * fraction
        self.final["exact"][at] = int(data["exact"])
        self.final["status"][at] = DONE if int(data["valid"]) else INVALID
        where = (at[0], at[1], at[2], at[4])
        self.final["n_modulus"][where] = int(data["n_modulus"])
        self.final["n_phase"][where] = int(data["n_phase"])
        for name in HISTORY:
            values = data[f"history_{name}"]
            self.history[name][at][: len(values)] = values
        self.origins[stored.attrs["provenance"]] += 1
        for variable, _, attribute, *_ in PARTS:
            found = self.parts.setdefault(variable, {})
            for name, value in json.loads(stored.attrs.get(attribute, "{}")).items():
                if name != "total":
                    found.setdefault(name, np.full(self.final["status"].shape, np.nan))[at] = value


def collect(study: Study, store: Store) -> xr.DataTree:
    """The cube of what is stored now. Failed and missing points are cells with a status and no numbers."""
    cube = _Cube.allocate(study)
    for point in study.points:
        at = study.index(point)
        cube.final["planned"][at] = 1
        cube.final["held_out"][at] = study.is_holdout(point)
        cube.final["point_id"][at] = point.id
        data = store.read_numbers(point.id, NUMBERS, TEXTS)
        if data is not None:
            cube.add(point, data)
        elif store.read_error(point.id) is not None:
            cube.final["status"][at] = FAILED
    _count_parameters(cube)
    return _tree(cube)


def _count_parameters(cube: _Cube) -> None:
    """Parameter counts of cells without a stored point, from the closed forms."""
    for point in cube.study.points:
        at = cube.study.index(point)
        where = (at[0], at[1], at[2], at[4])
        n = point.molecule.n_spin_orbitals
        counts = None if n is None or cube.final["n_modulus"][where] >= 0 else count_parameters(point, n)
        if counts is not None:
            cube.final["n_modulus"][where], cube.final["n_phase"][where] = counts


def _coordinates(study: Study) -> dict[str, Any]:
    coordinates: dict[str, Any] = {}
    for dim, labels in zip(DIMS, study.axes.values(), strict=True):
        values = np.array(labels) if isinstance(labels[0], str) else np.array(labels, dtype=np.int64)
        coordinates[dim] = (dim, values, {"units": "1", "long_name": AXIS_NAMES[dim]})
    return coordinates


def _tree(cube: _Cube) -> xr.DataTree:
    study, final = cube.study, cube.final
    coordinates = _coordinates(study)
    by_size = ("molecule", "ansatz", "size", "variant")
    total = np.where(final["n_modulus"] < 0, -1, final["n_modulus"] + final["n_phase"])
    counts = {
        "n_modulus": (by_size, final["n_modulus"], _named("1", "N_mod, parameters of the modulus network")),
        "n_phase": (by_size, final["n_phase"], _named("1", "N_ph, parameters of the phase network")),
        "n_total": (by_size, total, _named("1", "N = N_mod + N_ph, all parameters")),
    }
    variables: dict[str, Any] = {name: (DIMS, final[name], _named(*FINAL[name])) for name in COPIED}
    variables |= {name: (DIMS, final[name], _named(*text)) for name, text in DERIVED.items()}
    variables["exact"] = (DIMS, final["exact"], _named(*FINAL["exact"]))
    variables["status"] = (
        DIMS,
        final["status"],
        {
            **_named("1", "state of the point"),
            "flag_values": np.array([MISSING, DONE, FAILED, INVALID], np.int8),
            "flag_meanings": "missing done failed invalid",
        },
    )
    variables["planned"] = (DIMS, final["planned"], _named("1", "1 where the spec asks for this cell"))
    variables["held_out"] = (DIMS, final["held_out"], _named("1", "1 where a fit must not look"))
    variables["point_id"] = (DIMS, final["point_id"], _named("1", "content id of the point, its file name"))
    past = {
        name: ((*DIMS, "record"), cube.history[name], _named(units, text))
        for name, (units, text) in HISTORY.items()
    }
    records = next(iter(cube.history.values())).shape[-1]
    record = ("record", np.arange(records), _named("1", "position on the log-spaced grid of recorded steps"))
    attributes = {
        "Conventions": "CF-1.11",
        "title": study.title or study.name,
        "references": "arXiv:2509.12679",
        "study": study.name,
        "spec": study.text,
        "v_score_convention": json.dumps(study.v_score.model_dump(), sort_keys=True),
        "provenance": json.dumps(_provenance(cube), sort_keys=True),
        "schema": CUBE_SCHEMA,
        "point_schema": SCHEMA,
    }
    return xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=attributes),
            "/final": xr.Dataset(variables, coords={**coordinates, **counts}),
            "/parts": _parts(cube, coordinates),
            "/history": xr.Dataset(past, coords={**coordinates, "record": record}),
            "/molecule": _molecules(cube, coordinates["molecule"]),
        }
    )


def _parts(cube: _Cube, coordinates: dict[str, Any]) -> xr.Dataset:
    """Where FLOPs and time go, by named part of a step; NaN where a point does not say."""
    variables, coords = {}, dict(coordinates)
    for variable, axis, _, units, text in PARTS:
        found = cube.parts.get(variable, {})
        if found:
            coords[axis] = (axis, np.array(sorted(found)), _named("1", f"name of the part in {variable}"))
            stacked = np.stack([found[name] for name in sorted(found)], axis=-1)
            variables[variable] = ((*DIMS, axis), stacked, _named(units, text))
    return xr.Dataset(variables, coords=coords)


def _named(units: str, long_name: str) -> dict[str, Any]:
    return {"units": units, "long_name": long_name}


def _provenance(cube: _Cube) -> dict[str, Any]:
    """Every distinct origin of the points with how many came from it."""
    return {"origins": [{"points": n, **json.loads(text)} for text, n in sorted(cube.origins.items())]}


def _molecules(cube: _Cube, coordinate: Any) -> xr.Dataset:
    rows = []
    for name, spec in cube.study.molecules.items():
        row = dict(cube.molecules.get(name) or _planned(spec))
        row["e_fci"], row["fci_source"] = _fci(row, spec)
        rows.append(row)
    variables: dict[str, Any] = {}
    for name, text in MOLECULE.items():
        values = [row.get(name) for row in rows]
        if text[0] == "hartree":
            column = np.array([np.nan if value is None else value for value in values], float)
        else:
            column = np.array([-1 if value is None else value for value in values], np.int64)
        variables[name] = ("molecule", column, _named(*text))
    for name, long_name in (
        ("hamiltonian_sha256", "content hash of the Hamiltonian, empty if no point has run"),
        ("fci_source", "where e_fci is from: computed, reference (stated) or none"),
    ):
        column = np.array([str(row.get(name) or "") for row in rows])
        variables[name] = ("molecule", column, _named("1", long_name))
    return xr.Dataset(variables, coords={"molecule": coordinate})


def _fci(row: Mapping[str, Any], spec: MoleculeSpec) -> tuple[float | None, str]:
    """FCI energy and its source. A stated reference is that of the spec now, not of the day of the run."""
    if row.get("e_fci") is not None and row.get("fci_source") == "computed":
        return row["e_fci"], "computed"
    return spec.reference.fci, "none" if spec.reference.fci is None else "reference"


def _planned(spec: MoleculeSpec) -> dict[str, Any]:
    """What the spec alone says of a molecule of which no point has run."""
    return {
        "n_spin_orbitals": spec.n_spin_orbitals,
        "n_alpha": spec.n_alpha,
        "n_beta": spec.n_beta,
        "search_space": spec.search_space,
        "n_unique_flips": spec.unique_flips,
        "e_hf": spec.reference.hf,
        "e_ccsd": spec.reference.ccsd,
        "e_ccsd_t": spec.reference.ccsd_t,
    }


def write_cube(tree: xr.DataTree, path: Path) -> None:
    """Write a cube in one instant, unless just these bytes are there already; raises StoreError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = {
        f"/{group}": {
            name: {"zlib": True, "complevel": 4, "fletcher32": True}
            for name, variable in tree[group].to_dataset().variables.items()
            if variable.ndim and variable.dtype.kind in "fiu"
        }
        for group in ("final", "parts", "history", "molecule")
    }
    with replacing(path, keep_equal=True) as temporary:
        tree.to_netcdf(temporary, engine="netcdf4", encoding=encoding)


def read_cube(path: Path) -> xr.DataTree:
    """A cube in memory; a UserError where it is missing, unreadable or of another schema."""
    if not path.is_file():
        raise UserError(f"{path}: no such cube; make it with `python -m replicate collect SPEC`")
    try:
        with xr.open_datatree(path, engine="netcdf4") as opened:
            tree = opened.load()
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable cube ({type(error).__name__}); collect it again") from None
    schema = tree.attrs.get("schema")
    if schema != CUBE_SCHEMA:
        raise UserError(
            f"{path}: cube of schema {schema}; this version reads {CUBE_SCHEMA}: collect it again"
        )
    return tree
