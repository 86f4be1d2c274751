"""All fits of a cube: every ansatz and metric, jointly over molecules and molecule by molecule.

The result is a plain dictionary (fit.json, keys listed in `commands`) and a DataTree with all draws (fit.nc).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from replicate.scaling import allocate, infer, select, validate
from replicate.scaling.columns import file_sha256
from replicate.scaling.describe import clean, describe, objective_rows, sensitivity_row
from replicate.scaling.infer import Draws
from replicate.scaling.law import LAWS, Design, Law, make_design
from replicate.scaling.objective import Objective
from replicate.scaling.solve import Solution, raw_parameters, solve
from replicate.scaling.table import METRICS, NOT_PLANNED, STATUS, Rows, read_cube
from replicate.spec import UserError, VScoreSpec

SCHEMA = 1
HEADLINE = "additive"
#: Fitted with full inference when the data allow; the other laws of `LAWS` take part in the selection only.
FULL = ("additive", "modulus_phase", "steps_fraction")
COLUMNS = {
    "N": "n_total",
    "M": "n_modulus",
    "P": "n_phase",
    "D": "d_prime",
    "T": "steps",
    "S": "search_fraction",
}
#: With fewer runs than this per parameter a five-parameter law fits anything, and its bootstrap says nothing.
RUNS_PER_PARAMETER = 3.0


@dataclass(frozen=True)
class Options:
    """What a user may choose about `fit CUBE`."""

    objective: Objective = field(default_factory=lambda: Objective("t"))
    metrics: tuple[str, ...] = METRICS
    laws: tuple[str, ...] = FULL
    bootstrap: int = 4000
    test_replicates: int = 500
    selection: bool = True
    seed: int = 0
    variants: tuple[str, ...] = ()
    checkpoints: bool = False
    allow_decayed: bool = False
    progress: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Fit:
    """One fitted law with its draws, and the rows it was fitted to."""

    id: str
    ansatz: str
    metric: str
    scope: str
    solution: Solution
    draws: Draws | None
    rows: np.ndarray
    entry: dict[str, Any]


def seed_of(root: int, label: str) -> int:
    """A stream of its own for every fit, the same from run to run."""
    return int(np.random.SeedSequence([root, zlib.crc32(label.encode())]).generate_state(1)[0])


def design_of(rows: Rows, mask: np.ndarray, metric: str, law: Law, *, intercepts: bool = True) -> Design:
    """The design of the masked rows; a cluster is one run, a group one molecule."""
    rows.require_fit_rows(mask)
    group = rows.labels["molecule"][mask]
    return make_design(
        law,
        {v: rows.variables[v][mask] for v in law.variables},
        rows.value[metric][mask],
        group=group if intercepts and np.unique(group).size > 1 else None,
        cluster=rows.run[mask],
        censored=rows.censored[metric][mask],
        noise=rows.noise[metric][mask],
        runs_per_parameter=RUNS_PER_PARAMETER,
    )


def fit_cube(path: Path, options: Options) -> tuple[dict[str, Any], xr.DataTree]:
    """Fit everything a cube allows. Raises UserError if nothing can be fitted at all, with the reasons."""
    rows, truth = read_cube(
        path,
        variants=options.variants,
        checkpoints=options.checkpoints,
        allow_decayed=options.allow_decayed,
    )
    result, tree = fit_rows(rows, truth, options)
    result["cube"], result["cube_sha256"] = path.name, file_sha256(path)
    return result, tree


def fit_rows(
    rows: Rows, truth: dict[str, np.ndarray], options: Options
) -> tuple[dict[str, Any], xr.DataTree]:
    """`fit_cube` for rows in memory."""
    fits: list[Fit] = []
    refused: list[dict[str, str]] = []
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "cube",
        "study": str(rows.spec.get("study", "")),
        "settings": {
            "objective": options.objective.name,
            "bootstrap": options.bootstrap,
            "seed": options.seed,
            "v_score": rows.v_score.model_dump(),
            "checkpoints": options.checkpoints,
            "decayed_checkpoints": options.allow_decayed,
            "hold_outs": rows.spec.get("holdout", {}),
        },
        "table": _table(rows, options.metrics),
        "provenance": rows.attributes.get("provenance"),
        "spec": rows.attributes.get("spec", ""),
    }
    blocks: dict[str, list[dict[str, Any]]] = {
        k: [] for k in ("selection", "sensitivity", "allocation", "hold_out")
    }
    for ansatz in rows.ansatze():
        for metric in options.metrics:
            mine = _fit_block(rows, ansatz, metric, options, refused)
            fits += mine
            head = next((f for f in mine if f.entry["headline"]), None)
            if head is None:
                continue
            options.progress(f"{ansatz} {metric}: selection, sensitivity, allocation")
            key = {"ansatz": ansatz, "metric": metric}
            blocks["sensitivity"].append(key | {"rows": _sensitivity(rows, head, options)})
            networks = next((f for f in mine if f.scope == "all" and f.entry["law"] == "modulus_phase"), None)
            split = {} if networks is None else {"modulus_phase": _network_allocation(rows, networks)}
            blocks["allocation"].append(key | _allocation(rows, head) | split)
            if options.selection:
                chosen = select.selection(
                    rows, head.rows, metric, options.objective, seed_of(options.seed, head.id)
                )
                blocks["selection"].append(key | {"rows": chosen})
            blocks["hold_out"].append(key | validate.score_hold_outs(rows, truth, head, options))
    if not fits:
        reasons = list(dict.fromkeys(f"{r['ansatz']} {r['metric']}: {r['reason']}" for r in refused))
        raise UserError(*(reasons or ["the cube has no point that a fit may use"]))
    result["fits"] = [f.entry for f in fits]
    result["refused"] = refused
    return result | blocks, _tree(rows, fits)


def _table(rows: Rows, metrics: tuple[str, ...]) -> dict[str, Any]:
    status = {}
    for ansatz in rows.ansatze():
        mine = (rows.labels["ansatz"] == ansatz) & (rows.reason[METRICS[0]] != NOT_PLANNED)
        status[ansatz] = {word: int((rows.status[mine] == code).sum()) for code, word in STATUS.items()}
    return {
        "points": int((rows.reason[METRICS[0]] != NOT_PLANNED).sum()),
        "used": {m: int(rows.usable(m).sum()) for m in metrics},
        "excluded": {m: rows.exclusions(m) for m in metrics},
        "censored": {m: int((rows.censored[m] & rows.usable(m)).sum()) for m in metrics},
        "by_ansatz": status,
    }


def _fit_block(
    rows: Rows, ansatz: str, metric: str, options: Options, refused: list[dict[str, str]]
) -> list[Fit]:
    """Joint fits of every full law, and the headline law molecule by molecule."""
    base = rows.usable(metric) & (rows.labels["ansatz"] == ansatz)
    molecules = [
        m
        for m in dict.fromkeys(rows.labels["molecule"].tolist())
        if np.any(base & (rows.labels["molecule"] == m))
    ]
    jobs = [("all", law, base) for law in options.laws]
    if len(molecules) > 1:
        jobs += [(m, options.laws[0], base & (rows.labels["molecule"] == m)) for m in molecules]
    fits = []
    for scope, law, mask in jobs:
        options.progress(f"{ansatz} {metric} {scope}: {law}")
        try:
            fits.append(fit_one(rows, mask, ansatz, metric, scope, LAWS[law], options))
        except UserError as error:
            refused.append(
                {"ansatz": ansatz, "metric": metric, "scope": scope, "law": law, "reason": str(error)}
            )
    return fits


def fit_one(
    rows: Rows, mask: np.ndarray, ansatz: str, metric: str, scope: str, law: Law, options: Options
) -> Fit:
    """One law on one set of rows with all its intervals and tests."""
    if not mask.any():
        raise UserError("no usable point")
    design = design_of(rows, mask, metric, law)
    condition = infer.check_separable(design)
    solution = solve(design, options.objective)
    label = f"{ansatz}/{metric}/{scope}/{law.name}"
    head = law.name == options.laws[0]
    body, draws = describe(solution, options.bootstrap, seed_of(options.seed, label))
    entry: dict[str, Any] = {
        "id": label, "ansatz": ansatz, "metric": metric, "scope": scope, "law": law.name,
        "headline": head and scope == "all", "metric_column": metric,
        "molecules": list(dict.fromkeys(rows.labels["molecule"][mask].tolist())),
    }  # fmt: skip
    entry |= body
    entry["n_molecules"], entry["condition_number"] = len(entry["molecules"]), condition
    entry["variables"] = {
        v: {
            "column": COLUMNS[v],
            "geometric_mean": math.exp(design.centre[i]),
            "min": float(rows.variables[v][mask].min()),
            "max": float(rows.variables[v][mask].max()),
        }
        for i, v in enumerate(law.variables)
    }
    entry["warnings"] += infer.condition_warning(condition)
    if options.checkpoints:
        label = "DECAYED CHECKPOINTS" if options.allow_decayed else "checkpoints of a constant rate"
        entry["warnings"].append(f"{label} are among the points; the cluster of an interval is the run")
    if len(entry["molecules"]) == 1:
        entry["warnings"].append("one molecule: no intercepts, nothing is said about other molecules")
    if head and infer.droppable(law, "N") and options.test_replicates:
        test = infer.variable_test(
            solution, "N", options.test_replicates, seed_of(options.seed, label + "/N")
        )
        entry["tests"]["size_matters"] = asdict(test)
    if head and "D" in law.variables and not options.checkpoints:
        iso = select.iso_d_prime(solution, rows, mask)
        if iso is not None:
            entry["tests"]["iso_d_prime"] = iso
    if scope == "all":
        refits, jackknife = infer.leave_one_group_out(solution)
        entry["leave_one_molecule_out"] = {"refits": refits, "intervals": jackknife}
    if law.name == "steps_fraction" and draws is not None:
        entry["tests"]["steps_equal_fraction"] = infer.equality_test(solution, draws, "a2", "a4")
    return Fit(label, ansatz, metric, scope, solution, draws, mask, clean(entry))


def _sensitivity(rows: Rows, head: Fit, options: Options) -> list[dict[str, Any]]:
    """How far the parameters move with each choice (FIT section 9)."""
    design, objective, mask = head.solution.layout.design, options.objective, head.rows
    law = design.law
    out = objective_rows(design, objective)

    def row(what: str, on: Rows, metric: str = head.metric, intercepts: bool = True) -> None:
        out.append(
            sensitivity_row(
                what, lambda: solve(design_of(on, mask, metric, law, intercepts=intercepts), objective)
            )
        )

    if law.floor is not None:
        out.append(sensitivity_row("without floor", lambda: infer.without_floor(head.solution)))
    if len(design.group_names) > 1:
        row("without intercepts", rows, intercepts=False)
    if "N" in law.variables:
        swapped = replace(rows, variables=rows.variables | {"N": rows.variables["M"]})
        row("N = modulus parameters only", swapped)
    if head.metric == "v_score":
        for n_dof in ("electrons", "qubits"):
            for e_inf in ("sector", "identity", "zero"):
                convention = VScoreSpec(n_dof=n_dof, e_inf=e_inf)
                if convention != rows.v_score:
                    row(f"V-score with {n_dof}, E_inf {e_inf}", rows.with_v_score(convention))
    return clean(out)


def _allocation(rows: Rows, head: Fit) -> dict[str, Any]:
    """Exponent of the optimum, or why there is none, and the FLOP models per molecule."""
    entry = head.entry
    models: dict[str, dict[str, Any]] = {}
    mine = (rows.labels["ansatz"] == head.ansatz) & (rows.reason[head.metric] == "")
    for molecule in entry["molecules"]:
        here = mine & (rows.labels["molecule"] == molecule)
        space = rows.molecules[molecule]["search_space"]
        models[molecule] = {
            "search_space": space,
            "n_spin_orbitals": rows.molecules[molecule].get("n_spin_orbitals"),
            "n_unique_flips": rows.molecules[molecule].get("n_unique_flips"),
            "unique_per_step": float(np.median(rows.variables["S"][here]) * space),
        }
        for key, flops in rows.flops.items():
            try:
                kappa = allocate.fitted_kappa(
                    rows.variables["N"][here],
                    flops[here],
                    space,
                    rows.variables["D"][here],
                    f"{key} of {molecule}",
                )
                models[molecule][key] = asdict(kappa)
            except UserError as error:
                models[molecule][key] = {"reason": str(error)}
        if len(rows.flops) == 2:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = rows.flops["flops_executed"][here] / rows.flops["flops_estimated"][here]
            ratio = ratio[np.isfinite(ratio)]
            models[molecule]["executed_over_estimated"] = float(np.median(ratio)) if ratio.size else None
    out: dict[str, Any] = {"fit": head.id, "flop_models": models}
    p = entry["parameters"]
    test = entry["tests"].get("size_matters")
    if head.solution.layout.design.law.name in ("additive", "additive_no_floor"):
        draws = head.draws.raw if head.draws else None
        why = allocate.guard(p, entry["intervals"], draws, test["p_value"] if test else None)
    else:
        why = "the law is not one term in N and one in D'"
    if why is not None:
        return clean(
            out
            | {
                "status": allocate.NO_OPTIMUM,
                "reason": why,
                "exponent_N": None,
                "exponent_D": None,
                "interval_N": None,
            }
        )
    share = p["a2"] / (p["a1"] + p["a2"])
    ends = None
    if head.draws is not None:
        cloud = head.draws.raw["a2"] / (head.draws.raw["a1"] + head.draws.raw["a2"])
        ends = np.nanpercentile(cloud, [2.5, 97.5]).tolist()
    return clean(
        out | {"status": "ok", "reason": "", "exponent_N": share, "exponent_D": 1 - share, "interval_N": ends}
    )


def _network_allocation(rows: Rows, fit: Fit) -> dict[str, Any]:
    """Whether modulus and phase networks can be traded against each other, and what each costs."""
    entry = fit.entry
    draws = fit.draws.raw if fit.draws else None
    why = allocate.guard(entry["parameters"], entry["intervals"], draws, pairs=allocate.MODULUS_PHASE_TIME)
    mine = (rows.labels["ansatz"] == fit.ansatz) & (rows.reason[fit.metric] == "")
    costs: dict[str, Any] = {}
    for molecule in entry["molecules"]:
        here = mine & (rows.labels["molecule"] == molecule)
        costs[molecule] = {}
        for key, flops in rows.flops.items():
            m, p, d = (rows.variables[v][here] for v in ("M", "P", "D"))
            space = rows.molecules[molecule]["search_space"]
            try:
                k = allocate.split_cost(m, p, flops[here], space, d, f"{key} of {molecule}")
                costs[molecule][key] = {"k_modulus": k[0], "k_phase": k[1]}
            except UserError as error:
                costs[molecule][key] = {"reason": str(error)}
    status = "ok" if why is None else allocate.NO_OPTIMUM
    return clean({"fit": fit.id, "status": status, "reason": why or "", "costs": costs})


def _tree(rows: Rows, fits: list[Fit]) -> xr.DataTree:
    """All draws, residuals and fitted values, one group per fit."""
    groups: dict[str, xr.Dataset] = {
        "/": xr.Dataset(attrs={"title": "fits and bootstrap draws", "schema": SCHEMA})
    }
    for fit in fits:
        layout, design = fit.solution.layout, fit.solution.layout.design
        law = design.law
        names = [*law.parameters, *(f"intercept[{g}]" for g in design.group_names if len(layout.contrasts))]
        if layout.objective.has_scale:
            names.append("scale")
        p = fit.draws.p if fit.draws is not None else np.zeros((0, layout.size))
        unit = "hartree" if fit.metric == "abs_error" else "1"
        data = {
            "draws": (
                ("replicate", "parameter"),
                full_table(fit.solution, p),
                {"units": "1", "long_name": "bootstrap refits, raw parameters"},
            ),
            "estimate": (
                "parameter",
                full_table(fit.solution, fit.solution.p[None])[0],
                {"units": "1", "long_name": "fitted raw parameters"},
            ),
            "residual": ("point", fit.solution.residuals(), {"units": "1", "long_name": "log residual"}),
            "fitted": (
                "point",
                np.exp(fit.solution.fitted()) * design.median,
                {"units": unit, "long_name": "fitted value"},
            ),
            "observed": (
                "point",
                design.value * design.median,
                {"units": unit, "long_name": "observed value"},
            ),
            "censored": (
                "point",
                design.censored,
                {"units": "1", "long_name": "known only to lie below the observed value"},
            ),
        }
        coords: dict[str, Any] = {"parameter": names}
        for axis, labels in rows.labels.items():
            coords[axis] = ("point", labels[fit.rows], {"units": "1", "long_name": axis})
        for v, column in COLUMNS.items():
            if column != "steps":
                coords[column] = ("point", rows.variables[v][fit.rows], {"units": "1", "long_name": column})
        groups["/" + fit.id] = xr.Dataset(
            data, coords, {"formula": law.formula, "objective": layout.objective.name}
        )
    return xr.DataTree.from_dict(groups)


def full_table(solution: Solution, p: np.ndarray) -> np.ndarray:
    """(R, size): law parameters raw, intercepts of every molecule, scale."""
    layout = solution.layout
    raw = raw_parameters(layout, p)
    columns = [raw[n] for n in layout.design.law.parameters]
    if len(layout.contrasts):
        columns += list(layout.design.intercepts(p[:, layout.n_law : layout.n_model]).T)
    if layout.objective.has_scale:
        columns.append(np.exp(p[:, -1]))
    return np.stack(columns, axis=1)
