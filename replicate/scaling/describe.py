"""One fit in words and numbers: what fit.json holds for each law, shared by `fit CUBE` and `fit --csv`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from replicate.scaling import infer
from replicate.scaling.infer import Draws
from replicate.scaling.law import Design
from replicate.scaling.objective import Objective, parse_objective
from replicate.scaling.solve import Solution, solve
from replicate.spec import UserError

#: Where kinds of interval differ by more than this in width, the widest is printed as conservative.
CONSERVATIVE_RATIO = 1.25
#: Objectives of the sensitivity rows.
OBJECTIVES = ("t:4", "huber:0.1", "huber:1e-3", "l2-log", "l2-raw")


def describe(solution: Solution, replicates: int, seed: int) -> tuple[dict[str, Any], Draws | None]:
    """Parameters, intervals of every kind, certificate and tests of one fit (shared with `fit --csv`)."""
    layout, design = solution.layout, solution.layout.design
    law, raw = design.law, solution.raw()
    cov = infer.covariance(solution)
    errors, sandwich = infer.sandwich_intervals(solution, cov)
    draws = infer.bootstrap(solution, replicates, seed) if replicates else None
    by_kind: dict[str, dict[str, Any]] = {"sandwich": sandwich}
    if draws is not None:
        by_kind["bootstrap"] = infer.percentile_intervals(draws)
    profiled = [n for n in law.parameters if n not in law.amplitudes]
    profiles: dict[str, dict[str, Any]] = {}
    by_kind["profile"] = infer.profile_intervals(solution, cov, profiled, curves=profiles)
    intervals: dict[str, Any] = dict(by_kind["bootstrap"] if draws is not None else sandwich)
    tests: dict[str, Any] = {}
    floor = infer.floor_test(solution)
    if floor is not None:
        tests["floor"] = asdict(floor)
    for name in law.amplitudes:
        if raw[name] == 0.0:
            upper = floor.upper if floor is not None and name == law.floor else None
            intervals[name] = None if upper is None else (0.0, upper)
    conservative = {}
    for name in profiled:
        kinds = [
            k[name] for k in by_kind.values() if k.get(name) is not None and np.all(np.isfinite(k[name]))
        ]
        widths = [k[1] - k[0] for k in kinds]
        if widths and min(widths) > 0 and max(widths) > CONSERVATIVE_RATIO * min(widths):
            conservative[name] = kinds[int(np.argmax(widths))]
    names, rows = infer.raw_jacobian(solution)
    k, q = layout.n_terms, float(layout.power_of(solution.p[None])[0])
    beta = solution.p[layout.n_law : layout.n_model]
    shares = solution.p[:k] / solution.p[:k].sum()
    entry: dict[str, Any] = {
        "formula": law.formula,
        "parameters": raw,
        "centred": {n: float(solution.p[i] * design.median ** (1 / q)) for i, n in enumerate(law.amplitudes)},
        "median": design.median,
        "intercepts": dict(zip(design.group_names, design.intercepts(beta).tolist(), strict=True))
        if beta.size
        else {},
        "scale": solution.scale,
        "objective": solution.objective_value,
        "objective_name": layout.objective.name,
        "standard_errors": errors,
        "intervals": intervals,
        "intervals_by_kind": by_kind,
        "conservative": conservative,
        "profiles": profiles,
        "covariance": {"names": list(names), "matrix": (rows @ cov.sandwich @ rows.T).tolist()},
        "certificate": asdict(solution.certificate),
        "n_points": design.n_points,
        "n_runs": design.n_clusters,
        "n_censored": int(design.censored.sum()),
        "term_shares": dict(zip(law.amplitudes, shares.tolist(), strict=True)),
        "tests": tests,
        "warnings": [],
    }
    if draws is not None:
        entry["bootstrap"] = {
            "replicates": replicates,
            "converged_first": draws.converged_first,
            "converged": draws.converged,
            "rechecked": draws.rechecked,
            "improved": draws.improved,
        }
    if solution.certificate.flat:
        entry["warnings"].append("the Hessian is singular at the optimum: some parameter is not determined")
    return entry, draws


def sensitivity_row(what: str, make: Callable[[], Solution]) -> dict[str, Any]:
    """Parameters under another choice, with sandwich intervals; or the reason why there are none."""
    try:
        solution = make()
    except UserError as error:
        return {"what": what, "parameters": None, "reason": str(error)}
    intervals = infer.sandwich_intervals(solution, infer.covariance(solution))[1]
    return {
        "what": what,
        "parameters": solution.raw(),
        "objective": solution.objective_value,
        "intervals": intervals,
        "n_points": solution.layout.design.n_points,
    }


def objective_rows(design: Design, objective: Objective) -> list[dict[str, Any]]:
    """The same table under the other objectives."""
    if objective.kind == "asinh":
        return []
    others = [parse_objective(name) for name in OBJECTIVES]
    if np.any(design.value <= 0):
        others = [other for other in others if other.kind == "l2-raw"]  # the only one without logs
    return [
        sensitivity_row(f"objective {other.name}", partial(solve, design, other))
        for other in others
        if other != objective
    ]


def clean(value: Any) -> Any:
    """JSON-able: numpy scalars and arrays to Python, NaN and infinities to null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [clean(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, np.str_) else value
