"""From a results cube or a CSV file to the rows of a fit: what counts, what does not, and why.

A row is one training run. Hold-outs are read from the spec that the cube carries; their results are blanked
here, before any fit can see them, and only `held_out_values` gives them back.
"""

from __future__ import annotations

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
NEEDED = ("energy", "energy_stderr", "variance", "search_fraction", "d_prime", "n_unique_mean", "status")
COUNTS = {"N": "n_total", "M": "n_modulus", "P": "n_phase"}
VARIABLES = ("N", "M", "P", "D", "T", "S")
FLOPS = ("flops_estimated", "flops_executed")
CUBE_SCHEMA = 1  # what `collect` writes (cube.py loads torch; a test compares)
NOT_PLANNED = "not planned"
#: Below so many unique samples a sampled variance says nothing: a collapsed sampler reports Var = 0.
MIN_UNIQUE = 30
FEW_UNIQUE = f"fewer than {MIN_UNIQUE} unique samples"
#: To this the FCI energies themselves are known, Hartree (SCIENCE section 8).
REFERENCE_ACCURACY = 1e-7
#: |E - E_FCI| below so many standard errors, or units of float64 resolution, is only known to be small.
CENSOR_STDERR, CENSOR_RESOLUTION = 3.0, 8.0
#: A variant may join the fit if all it changes is a variable of the law.
COVARIATE_SAMPLING = ("batch_max", "regime")


@dataclass(frozen=True)
class Rows:
    """The points of a cube as a flat table (n rows): labels, variables, values and exclusions.

    `labels`: axis -> (n,); `variables`: N, M, P, D, T, S -> (n,); `value`, `censored`, `noise`: metric ->
    (n,) `reason`: metric -> (n,) empty string where the row may be fitted; `held_out` (n,); `run` (n,): the
    training run of the row, its cluster.
    """

    labels: dict[str, np.ndarray]
    variables: dict[str, np.ndarray]
    value: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    censored: dict[str, np.ndarray]
    reason: dict[str, np.ndarray]
    held_out: np.ndarray
    status: np.ndarray
    run: np.ndarray
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
                f"{int(self.held_out[rows].sum())} of the rows are hold-outs: a fit must not read them"
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


def read_cube(
    path: Path,
    *,
    variants: tuple[str, ...] = (),
    checkpoints: bool = False,
    allow_decayed: bool = False,
) -> tuple[Rows, dict[str, np.ndarray]]:
    """Rows of a cube file, and the held-out results (metric -> (n,), else NaN) for scoring after the fit.

    `variants`: labels to use; by default the base and those that only change a variable of the law.
    `checkpoints`: the recorded steps too, as points of the same run; refused for decaying schedules unless
    allowed.
    """
    try:
        tree = xr.open_datatree(path, engine="netcdf4")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a cube: {error}") from None
    with tree:
        return rows_of(
            tree.load(), str(path), variants=variants, checkpoints=checkpoints, allow_decayed=allow_decayed
        )


def rows_of(
    tree: xr.DataTree,
    name: str = "cube",
    *,
    variants: tuple[str, ...] = (),
    checkpoints: bool = False,
    allow_decayed: bool = False,
) -> tuple[Rows, dict[str, np.ndarray]]:
    """`read_cube` for a cube in memory."""
    _check_layout(tree, name)
    final, molecule = tree["final"].to_dataset(), tree["molecule"].to_dataset()
    spec = _spec_of(tree, name)
    holdout = HoldoutSpec(**spec.get("holdout", {}))
    convention = VScoreSpec(**spec.get("v_score", {}))
    c = _runs(final)
    c["held_out"] |= _held_out(holdout, c)
    used = _variants(spec, final["variant"].values.astype(str).tolist(), variants, name)
    if checkpoints:
        c = _with_checkpoints(c, tree, spec, name, allow_decayed)

    info = {
        str(m): {
            str(k): float(molecule[k].sel(molecule=m)) for k in molecule if molecule[k].dtype.kind in "fiu"
        }
        for m in molecule["molecule"].values
    }
    base = np.full(c["status"].shape, "", dtype=object)
    for code, word in STATUS.items():
        if code != 1:
            base[c["status"] == code] = word
    base[~c["planned"] & (c["status"] == 0)] = NOT_PLANNED
    base[(base == "") & ~np.isin(c["variant"], used)] = "variant changes more than a variable of the law"
    for variable, word in (("D", "no training time recorded"), ("N", "no parameter count")):
        base[(base == "") & ~(c[variable] > 0)] = word
    base[(base == "") & (c["exact"] == 0) & ~(c["n_unique_mean"] >= MIN_UNIQUE)] = FEW_UNIQUE

    value, noise, censored, reason = _metrics(c, info, convention, base)
    held = c["held_out"]
    truth = {m: np.where(held & (reason[m] == ""), value[m], np.nan) for m in METRICS}
    rows = Rows(
        labels={axis: c[axis] for axis in AXES},
        variables={v: c[v] for v in VARIABLES},
        value={m: np.where(held, np.nan, value[m]) for m in METRICS},
        noise=noise,
        censored=censored,
        reason=reason,
        held_out=held,
        status=c["status"],
        run=c["run"],
        flops={k: c[k] for k in FLOPS if k in c},
        # Energies of hold-outs are blanked too: a V-score could be made of them.
        energies={k: np.where(held, np.nan, c[k]) for k in ("energy", "variance")},
        molecules=info,
        spec=spec,
        v_score=convention,
        attributes={str(k): v for k, v in tree.attrs.items()},
    )
    return rows, truth


def _check_layout(tree: xr.DataTree, name: str) -> None:
    missing = [g for g in ("final", "molecule") if g not in tree.children]
    if missing:
        raise UserError(f"{name}: no group /{', /'.join(missing)}: not a cube")
    schema = tree.attrs.get("schema", CUBE_SCHEMA)
    if schema != CUBE_SCHEMA:
        raise UserError(
            f"{name}: cube of schema {schema}; this version reads {CUBE_SCHEMA}: collect it again"
        )
    final = tree["final"].to_dataset()
    absent = [v for v in (*NEEDED, *COUNTS.values()) if v not in final.variables]
    absent += [f"dimension {d}" for d in AXES if d not in final.dims]
    if absent:
        raise UserError(f"{name}: /final lacks {', '.join(absent)}")


def _runs(final: xr.Dataset) -> dict[str, np.ndarray]:
    """Flat columns of /final, one row per cell of the grid."""
    shape = final["status"].transpose(*AXES)

    def column(v: str) -> np.ndarray:
        return np.asarray(final[v].broadcast_like(shape).transpose(*AXES).values, float).ravel()

    grids = np.meshgrid(*[final[a].values for a in AXES], indexing="ij")
    c = {a: g.ravel() for a, g in zip(AXES, grids, strict=True)}
    c = {a: v.astype(str) if v.dtype.kind in "OU" else v.astype(np.int64) for a, v in c.items()}
    c |= {v: column(v) for v in NEEDED} | {k: column(v) for k, v in COUNTS.items()}
    c |= {k: column(k) for k in FLOPS if k in final}
    c |= {"T": c["steps"].astype(float), "S": c["search_fraction"], "D": c["d_prime"]}
    c["status"] = c["status"].astype(int)
    c["run"] = np.arange(c["status"].size)
    # Cells of the grid that the spec never asked for are no missing points.
    c["planned"] = column("planned") > 0 if "planned" in final else np.ones(c["status"].shape, bool)
    c["held_out"] = column("held_out") > 0 if "held_out" in final else np.zeros(c["status"].shape, bool)
    c["exact"] = column("exact") if "exact" in final else (c["energy_stderr"] == 0).astype(float)
    return c


def _with_checkpoints(
    c: dict[str, np.ndarray], tree: xr.DataTree, spec: Mapping[str, Any], name: str, allow_decayed: bool
) -> dict[str, np.ndarray]:
    """Append the records of finished runs as points of their own; the cluster stays the run.

    A checkpoint of a decaying learning rate is not the end of a schedule of its length: it moves a2 from .40
    to .51 with no sign in the residuals (FIT section 5), so it takes an explicit flag.
    """
    schedule = str(spec.get("train", {}).get("schedule", "constant"))
    if schedule != "constant" and not allow_decayed:
        raise UserError(
            f"{name}: its runs decay the learning rate (schedule {schedule}), so their checkpoints are no "
            "ends of schedules; --decayed-checkpoints uses them all the same, and labels the fits"
        )
    if "history" not in tree.children:
        raise UserError(f"{name}: no group /history: no checkpoints")
    history = tree["history"].to_dataset().transpose(*AXES, "record")
    past = {
        v: history[v].values.reshape(c["run"].size, -1) for v in ("step", "energy", "variance", "n_unique")
    }
    good = (c["status"] == 1)[:, None] & np.isfinite(past["step"]) & (past["step"] < c["T"][:, None])
    good &= past["step"] > 0
    rows, _ = np.nonzero(good)
    extra = {k: v[rows] for k, v in c.items()}
    extra |= {"energy": past["energy"][good], "variance": past["variance"][good], "T": past["step"][good]}
    extra |= {"n_unique_mean": past["n_unique"][good], "exact": np.zeros(rows.size)}
    extra["D"] = extra["T"] * extra["S"]
    return {k: np.concatenate([c[k], extra[k]]) for k in c}


def _metrics(
    c: Mapping[str, np.ndarray],
    info: Mapping[str, Mapping[str, float]],
    convention: VScoreSpec,
    base: np.ndarray,
) -> tuple[dict[str, np.ndarray], ...]:
    """Value, additive noise, censoring and reason for exclusion of each metric."""

    def mark(target: np.ndarray, condition: np.ndarray, word: str) -> None:
        target[(target == "") & condition] = word

    energy, stderr = c["energy"], np.nan_to_num(c["energy_stderr"])
    v = _v_score(convention, info, c["molecule"], energy, c["variance"])
    why_v = base.copy()
    mark(why_v, ~np.isfinite(v), "not finite")
    mark(why_v, ~(v > 0), "zero variance")

    e_fci = np.array([info[m].get("e_fci", np.nan) for m in c["molecule"]])
    error = energy - e_fci
    resolution = CENSOR_RESOLUTION * np.spacing(np.abs(np.nan_to_num(energy)))
    limit = np.maximum(CENSOR_STDERR * stderr, resolution)
    why_e = base.copy()
    mark(why_e, ~np.isfinite(e_fci), "no reference energy")
    mark(why_e, ~np.isfinite(energy), "not finite")
    mark(why_e, error < -np.maximum(limit, REFERENCE_ACCURACY), "energy below the reference")
    low = np.abs(error) < limit
    none = np.zeros(energy.shape)
    return (
        {"v_score": v, "abs_error": np.where(low, limit, np.abs(error))},
        {"v_score": none, "abs_error": stderr},
        {"v_score": none > 0, "abs_error": low},
        {"v_score": why_v.astype(str), "abs_error": why_e.astype(str)},
    )


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
