"""The cube as the figures see it: one row per run, histories by row, molecules by name. Only
this module opens files.

`load_study(cube, fit)` returns a `StudyData`; everything drawn or tabulated is computed from it alone.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from figures.fits import Fits, LawFit, load_fits
from figures.registry import MissingData

DIMS = ("molecule", "ansatz", "size", "steps", "variant", "seed")
SCHEMA = 1  # of the cubes that can be read
DONE, FAILED, INVALID = 1, 2, 3
METRICS = ("v_score", "abs_error")
_REQUIRED = (
    "energy",
    "energy_stderr",
    "variance",
    "v_score",
    "abs_error",
    "search_fraction",
    "d_prime",
    "n_unique_mean",
    "n_samples_total",
    "flops_estimated",
    "flops_executed",
    "wall_seconds",
    "status",
)
_MOLECULE = ("n_spin_orbitals", "n_alpha", "n_beta", "search_space", "n_unique_flips", "e_hf", "e_fci")
_HISTORY = ("step", "energy", "variance", "n_unique", "n_samples", "learning_rate")


_PARTS = {
    "flops_estimated_part": "flop_part",
    "flops_executed_part": "executed_part",
    "wall_part_seconds": "wall_part",
}
_AXES = {
    "molecules": "molecule",
    "ansatze": "ansatz",
    "sizes": "size",
    "steps": "steps",
    "variants": "variant",
    "seeds": "seed",
}


class DataError(Exception):
    """A cube or fit that cannot be read; one line: file, what is wrong, what to do."""


@dataclass(frozen=True)
class Points:
    """Runs in a fixed order (cube order), column by column: every array has shape (n,).

    Columns: the six axes, `point_id`, `status`, `n_modulus`, `n_phase`, `n_total`, and every variable of
    /final.
    Failed and invalid runs are kept (their metrics may be NaN); cells never run are not rows.
    """

    columns: Mapping[str, np.ndarray]
    index: np.ndarray  # (n, 6) position of each run along the cube's dims

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def where(self, mask: np.ndarray) -> Points:
        keep = np.flatnonzero(mask)
        return Points({name: column[keep] for name, column in self.columns.items()}, self.index[keep])

    def with_column(self, name: str, values: np.ndarray) -> Points:
        """The same rows with one column replaced."""
        return Points({**self.columns, name: values}, self.index)

    def only(self, **labels: Any) -> Points:
        """Rows whose columns equal the given labels."""
        mask = np.ones(len(self), bool)
        for name, label in labels.items():
            mask &= self[name] == label
        return self.where(mask)

    def unique(self, name: str) -> list[Any]:
        """Distinct labels in order of first appearance (numbers: ascending)."""
        values = list(dict.fromkeys(self[name].tolist()))
        return sorted(values) if values and not isinstance(values[0], str) else values

    def groups(self, *names: str) -> Iterator[tuple[tuple[Any, ...], Points]]:
        """(labels, rows) for every combination that occurs, in cube order."""
        keys = list(zip(*(self[name].tolist() for name in names), strict=True))
        for key in dict.fromkeys(keys):
            yield key, self.where(np.array([other == key for other in keys], bool))

    @property
    def ids(self) -> list[str]:
        return [str(i) for i in self["point_id"]]


@dataclass(frozen=True)
class StudyData:
    """A cube and, when there is one, its fit."""

    name: str
    title: str
    points: Points
    missing: Mapping[str, int]  # planned cells without a run, by variant
    molecules: Mapping[str, Mapping[str, float]]
    history: Mapping[str, np.ndarray]  # (n molecules, ..., records) arrays; see `history_at`
    spec: Mapping[str, Any]
    spec_text: str
    provenance: Mapping[str, Any]
    fits: Fits | None = None
    part_values: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256

    @cached_property
    def done(self) -> Points:
        """Valid finished runs."""
        return self.points.where(self.points["status"] == DONE)

    @cached_property
    def main_variant(self) -> str:
        """The variant of the headline runs: "base", or the first of the axis that has finished runs."""
        names = self.variants
        for name in ("base", *names):
            if len(self.done.only(variant=name)):
                return name
        return names[0] if names else ""

    @cached_property
    def variants(self) -> list[str]:
        """Variant labels with runs, in the order of the cube's axis."""
        order = np.argsort(self.points.index[:, DIMS.index("variant")], kind="stable")
        return list(dict.fromkeys(self.points["variant"][order].tolist()))

    @cached_property
    def headline(self) -> Points:
        """Finished runs of the main variant: what the scaling figures show."""
        return self.done.only(variant=self.main_variant)

    @cached_property
    def held_out(self) -> frozenset[str]:
        """Point ids that the spec keeps from the fit (marked in the cube, else read from the spec's
        [holdout])."""
        if "held_out" in self.points:
            return frozenset(np.asarray(self.points["point_id"])[self.points["held_out"] == 1].tolist())
        rules = self.spec.get("holdout")
        if not isinstance(rules, dict):
            return frozenset()
        mask = np.zeros(len(self.points), bool)
        for axis in ("molecules", "sizes", "steps"):
            mask |= np.isin(self.points[_AXES[axis]], _listed(rules.get(axis)))
        for cell in rules.get("cells", []):
            inside = np.ones(len(self.points), bool)
            for axis, labels in cell.items():
                if axis in _AXES:
                    inside &= np.isin(self.points[_AXES[axis]], _listed(labels))
            mask |= inside
        return frozenset(np.asarray(self.points["point_id"])[mask].tolist())

    def parts(self, family: str) -> Mapping[str, np.ndarray]:
        """Named parts of a step that the cube stores ("flops_estimated_part", "flops_executed_part",
        "wall_part_seconds"): arrays over the cube's six axes, {} where it stores none."""
        return self.part_values.get(family, {})

    def step_seconds(self, rows: Points) -> np.ndarray:
        """Seconds per optimisation step of each row: the recorded parts of its steps, else its whole training
        (which includes what is made once, such as the matrix of a sector)."""
        whole = rows["wall_seconds"]
        parts = [values[tuple(rows.index.T)] for values in self.parts("wall_part_seconds").values()]
        recorded = np.sum(parts, axis=0) if parts else np.full(len(rows), np.nan)
        return np.where(np.isfinite(recorded), recorded, whole) / rows["steps"]

    def local_energy(self, variant: str) -> str:
        """The mode of the local energy that the spec gives a variant: "exact", "sampled" or "paper"."""
        own = self.spec.get("variants", {}).get(variant, {})
        return str(own.get("local_energy", self.spec.get("local_energy", "exact")))

    @property
    def stale_fit(self) -> str:
        """A warning where the fit was made from another cube than this one, else ""."""
        made_from = self.fits.record.get("cube_sha256") if self.fits is not None else None
        if not made_from or made_from in self.sources.values():
            return ""
        return "the fit was made from another cube (its sha256 differs): run `python -m replicate fit` again"

    def need_headline(self) -> Points:
        """The headline runs, or MissingData when there is none."""
        if not len(self.headline):
            raise MissingData("the cube holds no finished, valid run")
        return self.headline

    def need_fits(self) -> Fits:
        if self.fits is None:
            raise MissingData("no fit was given (make one: python -m replicate fit CUBE)")
        return self.fits

    def history_at(self, where: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Recorded steps of the run at cube position `where` (one row of `Points.index`): arrays
        (records,)."""
        step = self.history["step"][where]
        keep = np.isfinite(step) & (step >= 0)
        return {name: values[where][keep] for name, values in self.history.items()}

    @cached_property
    def _by_label(self) -> dict[tuple[str, ...], str]:
        labels = zip(*(self.points[dim].tolist() for dim in DIMS), strict=True)
        return {tuple(map(str, key)): point for key, point in zip(labels, self.points.ids, strict=True)}

    def ids_of(self, law: LawFit) -> list[str]:
        """Point ids of the runs that a law was fitted to ([] when fit.nc is absent or from another cube)."""
        if any(dim not in law.residuals for dim in DIMS):
            return []
        labels = zip(*(law.residuals[dim].tolist() for dim in DIMS), strict=True)
        return [self._by_label.get(tuple(map(str, key)), "") for key in labels]

    def counts(self, variant: str | None = None) -> dict[str, int]:
        """Runs by state (done, failed, invalid, missing), of one variant or of all."""
        rows = self.points if variant is None else self.points.only(variant=variant)
        status = rows["status"]
        return {
            "done": int(np.sum(status == DONE)),
            "failed": int(np.sum(status == FAILED)),
            "invalid": int(np.sum(status == INVALID)),
            "missing": sum(self.missing.values()) if variant is None else self.missing.get(variant, 0),
        }

    def exclusions(self, drawn: int | None = None) -> str:
        """One phrase for captions: runs drawn (default: all headline runs) and what is not, of
        the main variant."""
        states = self.counts(self.main_variant)
        total = len(self.headline)
        shown = f"{total} runs" if drawn is None or drawn == total else f"{drawn} of {total} runs"
        gone = [f"{states[key]} {key}" for key in ("invalid", "failed", "missing") if states[key]]
        others = len(self.done) - total
        if others:
            gone.append(f"{others} of other variants")
        return f"{shown} drawn" + (f"; not drawn: {', '.join(gone)}" if gone else "")


def load_study(cube: Path, fit: Path | None = None) -> StudyData:
    """Read a cube (NetCDF DataTree of DESIGN section 5) and optionally a fit (fit.json beside fit.nc).

    Raises DataError with one line for a missing, unreadable or foreign file.
    """
    if not cube.is_file():
        raise DataError(f"{cube}: no such file (make it with: python -m replicate collect SPEC)")
    try:
        with xr.open_datatree(cube, engine="netcdf4") as opened:
            tree = opened.load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{cube}: not a readable NetCDF cube ({type(error).__name__})") from error
    study = study_from_tree(tree, str(cube))
    fits = load_fits(fit, DataError) if fit is not None else None
    sources = {cube.name: _sha256(cube)}
    if fits is not None:
        sources |= {path.name: _sha256(path) for path in fits.files}
    name = study.name or cube.resolve().parent.name
    return StudyData(**{**_fields(study), "name": name, "fits": fits, "sources": sources})


def _fields(study: StudyData) -> dict[str, Any]:
    return {name: getattr(study, name) for name in study.__dataclass_fields__}


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def study_from_tree(tree: xr.DataTree, source: str = "cube") -> StudyData:
    """A `StudyData` from an open DataTree; `source` names it in errors."""
    schema = tree.attrs.get("schema")
    if schema is not None and int(schema) != SCHEMA:
        raise DataError(f"{source}: cube of schema {schema}, this version reads {SCHEMA}: collect it again")
    missing = [group for group in ("final", "history", "molecule") if group not in tree.children]
    if missing:
        raise DataError(f"{source}: not a replicate cube: no group /{', /'.join(missing)}")
    final = tree["final"].to_dataset()
    history = tree["history"].to_dataset()
    molecule = tree["molecule"].to_dataset()
    for group, dataset, names in (
        ("final", final, (*DIMS, *_REQUIRED)),
        ("history", history, _HISTORY),
        ("molecule", molecule, ("molecule", *_MOLECULE)),
    ):
        absent = [name for name in names if name not in dataset.variables]
        if absent:
            raise DataError(
                f"{source}: /{group} lacks {', '.join(absent)}: collect it again with this version"
            )
    spec_text = str(tree.attrs.get("spec", ""))
    try:
        spec = tomllib.loads(spec_text)
    except tomllib.TOMLDecodeError:
        spec = {}
    try:
        provenance = json.loads(str(tree.attrs.get("provenance", "{}")))
    except json.JSONDecodeError:
        provenance = {}
    points, missing_cells = _points(final)
    parts: dict[str, dict[str, np.ndarray]] = {}
    stored = tree["parts"].to_dataset() if "parts" in tree.children else xr.Dataset()
    for family, axis in _PARTS.items():
        if family in stored:
            values = stored[family].transpose(*DIMS, axis).values
            parts[family] = {str(name): values[..., i] for i, name in enumerate(stored[axis].values)}
    return StudyData(
        name=str(tree.attrs.get("study", spec.get("study", ""))),
        title=str(tree.attrs.get("title", "Scaling study")),
        points=points,
        missing=missing_cells,
        molecules=_molecules(molecule),
        history={str(v): _ordered(history, str(v)) for v in history.data_vars},
        part_values=parts,
        spec=spec,
        spec_text=spec_text,
        provenance=provenance if isinstance(provenance, dict) else {},
    )


def _ordered(history: xr.Dataset, name: str) -> np.ndarray:
    variable = history[name]
    full = [dim for dim in (*DIMS, "record") if dim in history.sizes]
    sizes = {dim: history.sizes[dim] for dim in full}
    return (
        variable.broadcast_like(xr.DataArray(np.empty(tuple(sizes.values())), dims=full))
        .transpose(*full)
        .values
    )


def _points(final: xr.Dataset) -> tuple[Points, dict[str, int]]:
    status = final["status"].transpose(*DIMS).values
    planned = final["planned"].transpose(*DIMS).values if "planned" in final else np.ones_like(status)
    index = np.argwhere(status != 0)
    template = final["status"].transpose(*DIMS)
    columns: dict[str, np.ndarray] = {}
    for axis, dim in enumerate(DIMS):
        labels = final[dim].values
        labels = labels.astype(str) if labels.dtype.kind in "OSU" else labels
        columns[dim] = labels[index[:, axis]]
    for name, variable in final.variables.items():
        if name in DIMS or not set(variable.dims) <= set(DIMS):
            continue
        values = final[name].broadcast_like(template).transpose(*DIMS).values[tuple(index.T)]
        columns[str(name)] = values.astype(str) if values.dtype.kind in "OSU" else values
    if "n_total" not in columns and {"n_modulus", "n_phase"} <= set(columns):
        columns["n_total"] = columns["n_modulus"] + columns["n_phase"]
    if "point_id" not in columns:
        # A cube without ids still has to lead back to its runs: the six labels name a run uniquely.
        columns["point_id"] = np.array(
            ["/".join(str(columns[dim][row]) for dim in DIMS) for row in range(len(index))], dtype=str
        )
    gaps = ((status == 0) & (planned == 1)).sum(axis=(0, 1, 2, 3, 5))
    return Points(columns, index), {
        str(name): int(n) for name, n in zip(final["variant"].values, gaps, strict=True)
    }


def _listed(labels: Any) -> list[Any]:
    if labels is None:
        return []
    return list(labels) if isinstance(labels, (list, tuple)) else [labels]


def _molecules(molecule: xr.Dataset) -> dict[str, dict[str, float]]:
    names = [str(name) for name in molecule["molecule"].values]
    numeric = [
        str(v) for v in molecule.data_vars if molecule[v].dtype.kind in "iuf" and molecule[v].ndim == 1
    ]
    return {name: {v: float(molecule[v].values[i]) for v in numeric} for i, name in enumerate(names)}
