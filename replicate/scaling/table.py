"""From a results cube or a CSV file to the rows of a fit: what counts, what does not, and why.

A row is one training run. Hold-outs are read from the spec that the cube carries; their results are blanked
here, before any fit can see them, and only `held_out_values` gives them back.
"""

from __future__ import annotations

import csv
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from replicate.spec import HoldoutSpec, UserError, VScoreSpec

METRICS = ("v_score", "abs_error")
AXES = ("molecule", "ansatz", "size", "steps", "variant", "seed")
STATUS = {0: "missing", 1: "done", 2: "failed", 3: "invalid"}
NOT_PLANNED = "not planned"
#: Below so many unique samples a sampled variance says nothing: a collapsed sampler reports Var = 0.
MIN_UNIQUE = 30
#: |E - E_FCI| below so many standard errors, or units of float64 resolution, is only known to be small.
CENSOR_STDERR, CENSOR_RESOLUTION = 3.0, 8.0
#: A variant may join the fit if all it changes is a variable of the law.
COVARIATE_SAMPLING = ("batch_max", "regime")


@dataclass(frozen=True)
class Rows:
    """The points of a cube as a flat table (n rows): labels, variables, values and exclusions.

    `labels`: axis -> (n,); `variables`: N, M, P, D, T, S -> (n,); `value`, `censored`, `noise`: metric -> (n,);
    `reason`: metric -> (n,) empty string where the row may be fitted; `held_out` (n,).
    """

    labels: dict[str, np.ndarray]
    variables: dict[str, np.ndarray]
    value: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    censored: dict[str, np.ndarray]
    reason: dict[str, np.ndarray]
    held_out: np.ndarray
    status: np.ndarray
    flops: dict[str, np.ndarray]
    energies: dict[str, np.ndarray]
    molecules: dict[str, dict[str, float]]
    spec: dict[str, Any]
    v_score: VScoreSpec
    attributes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.held_out.size)

    def usable(self, metric: str) -> np.ndarray:
        """(n,) rows that a fit may read."""
        return (self.reason[metric] == "") & ~self.held_out

    def require_fit_rows(self, rows: np.ndarray) -> None:
        """Refuse a selection that touches a hold-out."""
        if np.any(self.held_out[rows]):
            raise UserError(
                f"{int(self.held_out[rows].sum())} of the rows are hold-outs of the spec: a fit must not read them"
            )

    def with_v_score(self, convention: VScoreSpec) -> Rows:
        """The same rows with the V-score in another convention."""
        value = _v_score(
            convention,
            self.molecules,
            self.labels["molecule"],
            self.energies["energy"],
            self.energies["variance"],
        )
        return replace(self, value=self.value | {"v_score": value}, v_score=convention)

    def ansatze(self) -> list[str]:
        return list(dict.fromkeys(self.labels["ansatz"].tolist()))

    def exclusions(self, metric: str, ansatz: str | None = None) -> dict[str, int]:
        """Reason -> number of rows, hold-outs included."""
        mask = np.ones(len(self), bool) if ansatz is None else self.labels["ansatz"] == ansatz
        reasons = np.where(self.held_out & (self.reason[metric] == ""), "held out", self.reason[metric])[mask]
        names, counts = np.unique(reasons[(reasons != "") & (reasons != NOT_PLANNED)], return_counts=True)
        return {str(n): int(c) for n, c in zip(names, counts, strict=True)}


def read_cube(path: Path, *, variants: tuple[str, ...] = ()) -> tuple[Rows, dict[str, np.ndarray]]:
    """Rows of a cube file, and the held-out results (metric -> (n,), NaN elsewhere) for scoring after the fit.

    `variants`: labels to use; by default the base and those that only change a variable of the law.
    """
    try:
        tree = xr.open_datatree(path, engine="netcdf4")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a cube: {error}") from None
    with tree:
        return rows_of(tree.load(), str(path), variants=variants)


def rows_of(
    tree: xr.DataTree, name: str = "cube", *, variants: tuple[str, ...] = ()
) -> tuple[Rows, dict[str, np.ndarray]]:
    """`read_cube` for a cube in memory."""
    missing = [g for g in ("final", "molecule") if g not in tree.children]
    if missing:
        raise UserError(f"{name}: no group /{', /'.join(missing)}: not a cube")
    final, molecule = tree["final"].to_dataset(), tree["molecule"].to_dataset()
    needed = ("energy", "energy_stderr", "variance", "search_fraction", "d_prime", "n_unique_mean", "status")
    absent = [v for v in (*needed, "n_total", "n_modulus", "n_phase") if v not in final.variables]
    absent += [f"dimension {d}" for d in AXES if d not in final.dims]
    if absent:
        raise UserError(f"{name}: /final lacks {', '.join(absent)}")
    spec = _spec_of(tree, name)
    holdout = HoldoutSpec(**spec.get("holdout", {}))
    v_score = VScoreSpec(**spec.get("v_score", {}))

    full = final.broadcast_like(final["status"]).transpose(*AXES)
    grids = np.meshgrid(*[final[a].values for a in AXES], indexing="ij")
    labels = {a: g.ravel() for a, g in zip(AXES, grids, strict=True)}
    labels = {a: v.astype(str) if v.dtype.kind in "OU" else v.astype(np.int64) for a, v in labels.items()}

    def column(v: str) -> np.ndarray:
        return np.asarray(full[v].transpose(*AXES).values, float).ravel()

    counts = {
        v: np.asarray(final[v].broadcast_like(final["status"]).transpose(*AXES).values, float).ravel()
        for v in ("n_total", "n_modulus", "n_phase")
    }
    variables = {
        "N": counts["n_total"],
        "M": counts["n_modulus"],
        "P": counts["n_phase"],
        "T": labels["steps"].astype(float),
        "S": column("search_fraction"),
        "D": column("d_prime"),
    }
    info = {
        str(m): {k: float(molecule[k].sel(molecule=m)) for k in molecule if molecule[k].dtype.kind in "fiu"}
        for m in molecule["molecule"].values
    }
    at = {
        k: np.array([info[m].get(k, np.nan) for m in labels["molecule"]]) for k in next(iter(info.values()))
    }
    energy, stderr, variance = column("energy"), column("energy_stderr"), column("variance")
    status = np.asarray(final["status"].transpose(*AXES).values).ravel().astype(int)
    # Cells of the grid that the spec never asked for are no missing points.
    planned = column("planned") > 0 if "planned" in final else np.ones(status.shape, bool)
    n_unique = column("n_unique_mean")
    used_variants = _variants(spec, final["variant"].values.astype(str).tolist(), variants, name)

    base = np.full(status.shape, "", dtype=object)
    for code, word in STATUS.items():
        if code != 1:
            base[status == code] = word
    base[~planned & (status == 0)] = NOT_PLANNED
    base[(base == "") & ~np.isin(labels["variant"], used_variants)] = (
        "variant changes more than a variable of the law"
    )
    sampled = column("exact") == 0 if "exact" in final else stderr > 0
    value, noise, censored, reason = {}, {}, {}, {}

    def mark(target: np.ndarray, condition: np.ndarray, word: str) -> None:
        target[(target == "") & condition] = word

    value["v_score"] = _v_score(v_score, info, labels["molecule"], energy, variance)
    why = base.copy()
    mark(why, ~np.isfinite(value["v_score"]), "not finite")
    mark(why, sampled & ~(n_unique >= MIN_UNIQUE), f"fewer than {MIN_UNIQUE} unique samples")
    mark(why, ~(value["v_score"] > 0), "zero variance")
    reason["v_score"], noise["v_score"] = why, np.zeros(energy.shape)
    censored["v_score"] = np.zeros(energy.shape, bool)

    e_fci = at.get("e_fci", np.full(energy.shape, np.nan))
    error = energy - e_fci
    limit = np.maximum(
        CENSOR_STDERR * np.nan_to_num(stderr), CENSOR_RESOLUTION * np.spacing(np.abs(np.nan_to_num(energy)))
    )
    why = base.copy()
    mark(why, ~np.isfinite(e_fci), "no reference energy")
    mark(why, ~np.isfinite(energy), "not finite")
    mark(why, sampled & ~(n_unique >= MIN_UNIQUE), f"fewer than {MIN_UNIQUE} unique samples")
    # 1e-7 Ha: to what the references themselves are known (SCIENCE section 8).
    mark(why, error < -np.maximum(limit, 1e-7), "energy below the reference")
    low = np.abs(error) < limit
    reason["abs_error"], noise["abs_error"], censored["abs_error"] = why, np.nan_to_num(stderr), low
    value["abs_error"] = np.where(low, limit, np.abs(error))

    for metric in METRICS:
        for variable, word in (("D", "no training time recorded"), ("N", "no parameter count")):
            mark(reason[metric], ~(variables[variable] > 0), word)
        reason[metric] = reason[metric].astype(str)
    held = _held_out(holdout, labels) | (column("held_out") > 0 if "held_out" in final else False)
    truth = {m: np.where(held & (reason[m] == ""), value[m], np.nan) for m in METRICS}
    for metric in METRICS:
        value[metric] = np.where(held, np.nan, value[metric])
    flops = {k: column(k) for k in ("flops_estimated", "flops_executed") if k in final}
    # Energies of hold-outs are blanked too: a V-score could be made of them.
    energies = {"energy": np.where(held, np.nan, energy), "variance": np.where(held, np.nan, variance)}
    rows = Rows(
        labels,
        variables,
        value,
        noise,
        censored,
        reason,
        held,
        status,
        flops,
        energies,
        info,
        spec,
        v_score,
        dict(tree.attrs),
    )
    return rows, truth


def _v_score(
    convention: VScoreSpec,
    info: Mapping[str, Mapping[str, float]],
    molecule: np.ndarray,
    energy: np.ndarray,
    variance: np.ndarray,
) -> np.ndarray:
    """V = N_dof Var / (E - E_inf)^2 in a convention (SCIENCE section 5), (n,)."""

    def at(key: str) -> np.ndarray:
        return np.array([info[m].get(key, np.nan) for m in molecule])

    dof = at("n_alpha") + at("n_beta") if convention.n_dof == "electrons" else at("n_spin_orbitals")
    e_inf = np.zeros(energy.shape) if convention.e_inf == "zero" else at(f"e_inf_{convention.e_inf}")
    with np.errstate(invalid="ignore", divide="ignore"):
        return dof * variance / (energy - e_inf) ** 2


def _spec_of(tree: xr.DataTree, name: str) -> dict[str, Any]:
    text = str(tree.attrs.get("spec", ""))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name}: attribute spec is not TOML: {error}") from None


def _variants(spec: Mapping[str, Any], labels: list[str], wanted: tuple[str, ...], name: str) -> list[str]:
    """Variants that may join one fit."""
    unknown = [v for v in wanted if v not in labels]
    if unknown:
        raise UserError(f"{name}: no variant {', '.join(unknown)}; there are {', '.join(labels)}")
    if wanted:
        return list(wanted)
    tables = spec.get("variants", {})
    return [v for v in labels if _only_covariates(tables.get(v, {}))]


def _only_covariates(table: Mapping[str, Any]) -> bool:
    """Whether an overlay touches only the phase network or the batch, which N and S_F describe."""
    for key, value in table.items():
        section, _, leaf = key.partition(".")
        if section == "only" or section == "phase":
            continue
        if section != "sampling":
            return False
        leaves = [leaf] if leaf else list(value) if isinstance(value, dict) else [""]
        if any(x not in COVARIATE_SAMPLING for x in leaves):
            return False
    return True


def _held_out(holdout: HoldoutSpec, labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) True for rows that the spec keeps from the fit (spec.Study.is_holdout, by label)."""
    axis_of = {
        "molecules": "molecule",
        "ansatze": "ansatz",
        "sizes": "size",
        "steps": "steps",
        "variants": "variant",
        "seeds": "seed",
    }
    held = np.zeros(labels["seed"].shape, bool)
    for axis in ("molecules", "sizes", "steps"):
        held |= np.isin(labels[axis_of[axis]], list(getattr(holdout, axis)))
    for cell in holdout.cells:
        inside = np.ones(held.shape, bool)
        for axis, values in cell.items():
            inside &= np.isin(labels[axis_of[axis]], list(values))
        held |= inside
    return held


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- CSV ---------------------------------------------------------------------------------------------------------


def read_csv(path: Path, numeric: list[str], labels: list[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file by header name: `numeric` as float64, `labels` as text.

    Raises UserError with one line per problem: missing columns, cells that are no finite number, short rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not lines or not any(lines[0]):
        raise UserError(f"{path}: empty file, expected a header line")
    header = [h.strip() for h in lines[0]]
    problems = []
    for name in dict.fromkeys([*numeric, *labels]):
        if header.count(name) != 1:
            what = "no column" if name not in header else "more than one column"
            problems.append(f"{path}: {what} {name!r}; columns are {', '.join(header)}")
    if problems:
        raise UserError(*problems)
    rows = [(i, row) for i, row in enumerate(lines[1:], start=2) if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    short = [i for i, row in rows if len(row) != len(header)]
    if short:
        raise UserError(
            f"{path}: line {short[0]} has another number of cells than the header ({len(short)} such lines)"
        )
    out: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(numeric):
        j = header.index(name)
        values, bad = [], []
        for i, row in rows:
            try:
                number = float(row[j])
            except ValueError:
                number = float("nan")
            if not np.isfinite(number):
                bad.append((i, row[j].strip()))
            values.append(number)
        if bad:
            i, cell = bad[0]
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            problems.append(f"{path}: line {i}, column {name!r}: {cell!r} is not a finite number{more}")
        out[name] = np.array(values)
    if problems:
        raise UserError(*problems)
    for name in labels:
        out[name] = np.array([row[header.index(name)].strip() for _, row in rows])
    return out
