"""Which law? Candidates scored by prediction of what was left out, information criteria,
residual tests (FIT section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from replicate.scaling import infer
from replicate.scaling.law import LAWS, Law, make_design
from replicate.scaling.objective import Objective
from replicate.scaling.solve import Solution, jacobian, solve
from replicate.scaling.table import Rows
from replicate.spec import UserError

#: Replicates of the predictive distribution of one fold: enough for a CRPS, cheap enough for every candidate.
FOLD_REPLICATES = 100
CANDIDATES = tuple(LAWS)


@dataclass(frozen=True)
class Scores:
    """Of log predictions: median |ln error|, CRPS, coverage and mean width (ln units) of the 90 %
    interval."""

    n: int
    median_abs_log_error: float
    crps: float
    coverage_90: float
    width_90: float


def predict(
    solution: Solution,
    p: np.ndarray,
    variables: Mapping[str, np.ndarray],
    group: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Predicted ln L, (R, m), at new points for parameter vectors p (R, size).

    A molecule the fit has not seen gets the intercept of one of the seen ones, drawn per replicate, widened
    to the spread that a new molecule has.
    """
    layout, design = solution.layout, solution.layout.design
    law = design.law
    index = {e: i for i, e in enumerate(law.exponents)}
    x = {v: np.log(np.asarray(variables[v], float)) - design.centre[i] for i, v in enumerate(law.variables)}
    m = len(next(iter(x.values()))) if x else len(np.atleast_1d(group if group is not None else [0]))
    f = np.zeros((len(p), m))
    for k, term in enumerate(law.terms):
        log_term = np.zeros((len(p), m))
        for factor in term.factors:
            if isinstance(factor.exponent, str):
                j = layout.n_terms + index[factor.exponent]
                log_term += factor.sign * p[:, j : j + 1] * x[factor.variable]
            else:
                log_term += factor.sign * factor.exponent * x[factor.variable]
        f += p[:, k : k + 1] * np.exp(log_term)
    out = layout.power_of(p)[:, None] * np.log(np.maximum(f, 1e-300)) + np.log(design.median)
    if len(layout.contrasts) and group is not None:
        intercepts = design.intercepts(p[:, layout.n_law : layout.n_model])
        g = intercepts.shape[1]
        names = {name: i for i, name in enumerate(design.group_names)}
        for name in np.unique(group):
            here = np.asarray(group) == name
            if name in names:
                out[:, here] += intercepts[:, names[name]][:, None]
            else:
                drawn = intercepts[np.arange(len(p)), rng.integers(g, size=len(p))]
                out[:, here] += np.sqrt((g + 1) / (g - 1)) * drawn[:, None]
    return out


def predictive(
    solution: Solution, p: np.ndarray, variables: Mapping[str, np.ndarray], group: np.ndarray | None, rng:
    np.random.Generator, size: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Draws (R, m) of ln L of a new run: bootstrap parameters plus resampled residuals, inflated for the
    parameters that the fit has spent on them."""
    if size is not None and size > len(p):
        p = p[rng.integers(len(p), size=size)]
    mean = predict(solution, p, variables, group, rng)
    residual = solution.residuals()[~solution.layout.design.censored]
    n, k = residual.size, int(solution.free.sum())
    residual = residual * np.sqrt(n / max(n - k, 1))
    return mean + residual[rng.integers(n, size=mean.shape)]


def score(draws: np.ndarray, centre: np.ndarray, truth: np.ndarray) -> Scores:
    """Scores of predictive draws (R, m) and point predictions (m,) against ln L (m,)."""
    lo, hi = np.percentile(draws, [5, 95], axis=0)
    ordered = np.sort(draws, axis=0)
    r = len(draws)
    # CRPS = E|X - y| - E|X - X'| / 2, the second term from the order statistics.
    spread = (2 * np.arange(1, r + 1) - r - 1) @ ordered / (r * r)
    crps = np.abs(draws - truth).mean(axis=0) - spread
    return Scores(
        int(truth.size),
        float(np.median(np.abs(centre - truth))),
        float(crps.mean()),
        float(np.mean((truth >= lo) & (truth <= hi))),
        float(np.mean(hi - lo)),
    )


def folds(rows: Rows, mask: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, left-out rows): each molecule, the largest N and the largest D' of every molecule."""
    molecules = np.unique(rows.labels["molecule"][mask])
    if molecules.size > 2:
        for m in molecules:
            yield f"molecule {m}", mask & (rows.labels["molecule"] == m)
    for name, variable in (("largest N", "N"), ("largest D'", "D")):
        out = np.zeros_like(mask)
        for m in molecules:
            here = mask & (rows.labels["molecule"] == m)
            # D' differs from run to run: the top group is that of the largest T, not the single largest
            # value.
            level = rows.labels["steps"] if variable == "D" else rows.variables["N"]
            if np.unique(level[here]).size > 2:
                out |= here & (level == level[here].max())
        if out.any():
            yield name, out


def selection(
    rows: Rows, mask: np.ndarray, metric: str, objective: Objective, seed: int
) -> list[dict[str, object]]:
    """One row per candidate, best predictive CRPS first (mean over the three kinds of fold),
    AICc and BIC beside it."""
    out: list[dict[str, object]] = []
    for name in CANDIDATES:
        law = LAWS[name]
        row: dict[str, object] = {"law": name, "formula": law.formula}
        try:
            whole = _solve(rows, mask, metric, law, objective)
        except UserError as error:
            out.append(row | {"refused": str(error)})
            continue
        n, k = whole.layout.design.n_clusters, int(whole.free.sum())
        deviance = 2 * whole.objective_value
        row |= {"parameters": k, "objective": whole.objective_value, "n_runs": n}
        if objective.has_scale:
            row |= {
                "aicc": deviance + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1),
                "bic": deviance + k * np.log(n),
            }
        row["residual_tests"] = residual_tests(whole, rows, mask)
        results: dict[str, list[Scores]] = {}
        for fold, left_out in folds(rows, mask):
            try:
                part = _fold(rows, mask, left_out, metric, law, objective, seed)
            except UserError:
                continue
            results.setdefault(fold.split(" ")[0] if fold.startswith("molecule") else fold, []).append(part)
        row["scores"] = {
            fold: {
                f: float(np.average([getattr(s, f) for s in parts], weights=[s.n for s in parts]))
                for f in ("median_abs_log_error", "crps", "coverage_90", "width_90")
            }
            for fold, parts in results.items()
        }
        scores = [v["crps"] for v in row["scores"].values()]  # type: ignore[attr-defined]
        row["mean_crps"] = float(np.mean(scores)) if scores else None
        out.append(row)
    # A law that some fold could not be fitted with has a mean over other folds: it stands behind the others.
    out.sort(key=lambda r: (-len(r.get("scores", ())), r.get("mean_crps") or 0.0))  # type: ignore[arg-type]
    for rank, row in enumerate(out, start=1):
        row["rank"] = rank
    return out


def _solve(rows: Rows, mask: np.ndarray, metric: str, law: Law, objective: Objective) -> Solution:
    group = rows.labels["molecule"][mask]
    design = make_design(
        law,
        {v: rows.variables[v][mask] for v in law.variables},
        rows.value[metric][mask],
        group=group if np.unique(group).size > 1 else None,
        cluster=rows.run[mask],
        censored=rows.censored[metric][mask],
        noise=rows.noise[metric][mask],
    )
    infer.check_separable(design)
    return solve(design, objective)


def _fold(
    rows: Rows, mask: np.ndarray, left_out: np.ndarray, metric: str, law: Law, objective: Objective, seed: int
) -> Scores:
    solution = _solve(rows, mask & ~left_out, metric, law, objective)
    draws = infer.sketch(solution, FOLD_REPLICATES, seed)
    test = left_out & ~rows.censored[metric]
    if not test.any():
        raise UserError("every left-out point is censored")
    variables = {v: rows.variables[v][test] for v in law.variables}
    group, rng = rows.labels["molecule"][test], np.random.default_rng(seed)
    cloud = predictive(solution, draws, variables, group, rng, size=1000)
    return score(cloud, np.median(cloud, axis=0), np.log(rows.value[metric][test]))


def residual_tests(solution: Solution, rows: Rows, mask: np.ndarray) -> dict[str, dict[str, float]]:
    """Slope and cluster-robust p-value of the residuals against what the law leaves out: quadratic terms of
    its variables and ln S_F within molecules (all with the fitted directions projected out), and of the
    intercepts against the molecules' mean ln S_F."""
    layout, design = solution.layout, solution.layout.design
    jac = jacobian(layout, solution.p[None])
    base = np.concatenate(
        [jac[0][solution.free[: layout.n_law]], layout.contrasts, np.ones((1, design.n_points))]
    ).T
    residual = np.clip(solution.residuals(), -4 * (solution.scale or 1), 4 * (solution.scale or 1))
    extra = {}
    for i, v in enumerate(design.law.variables):
        extra[f"{v}^2"] = design.x[i] ** 2
        for j in range(i):
            extra[f"{design.law.variables[j]}*{v}"] = design.x[i] * design.x[j]
    log_s = np.log(rows.variables["S"][mask])
    means = np.array([log_s[design.group == g].mean() for g in range(max(1, len(design.group_names)))])
    extra["S_F within molecules"] = log_s - means[design.group]
    out: dict[str, dict[str, float]] = {}
    for name, column in extra.items():
        rest = column - base @ np.linalg.lstsq(base, column, rcond=None)[0]
        if rest @ rest < 1e-10 * max(column @ column, 1e-300):
            continue
        slope = float(rest @ residual / (rest @ rest))
        index = np.unique(design.cluster, return_inverse=True)[1]
        sums = np.bincount(index, weights=rest * (residual - slope * rest))
        error = float(np.sqrt((sums**2).sum()) / (rest @ rest))
        degrees = max(sums.size - base.shape[1] - 1, 1)
        out[name] = {
            "slope": slope,
            "standard_error": error,
            "p_value": float(2 * stats.t.sf(abs(slope) / error, degrees)) if error > 0 else 1.0,
        }
    g = len(design.group_names)
    if g > 3 and np.ptp(means) > 0:
        fit = stats.linregress(means, design.intercepts(solution.p[layout.n_law : layout.n_model]))
        out["S_F between molecules"] = {
            "slope": float(fit.slope),
            "standard_error": float(fit.stderr),
            "p_value": float(fit.pvalue),
        }
    return out


#: D' of one iso-D' group differ by less than this (ln), their T by at least the second.
ISO_WIDTH, ISO_SPREAD = 0.2, 0.5


def iso_d_prime(solution: Solution, rows: Rows, mask: np.ndarray) -> dict[str, float] | None:
    """Runs of one molecule and N with equal D' = T S_F by different T: does ln L depend on ln T?

    The law says that it does not (FIT section 5). Slope of the fit's residuals on ln T within the groups, so
    that what is left of differences in D' is taken out, with a run-clustered error; None without groups.
    """
    design = solution.layout.design
    log_d, log_t = np.log(rows.variables["D"][mask]), np.log(rows.variables["T"][mask])
    residual = np.clip(solution.residuals(), -4 * (solution.scale or 1), 4 * (solution.scale or 1))
    cells = np.unique(
        [rows.labels["molecule"][mask], rows.variables["N"][mask].astype(str)], axis=1, return_inverse=True
    )[1].ravel()
    x, y, kept, groups = np.zeros(log_d.size), np.zeros(log_d.size), np.zeros(log_d.size, bool), 0
    for cell in np.unique(cells):
        members = np.flatnonzero(cells == cell)
        members = members[np.argsort(log_d[members])]
        while members.size:
            near = log_d[members] - log_d[members[0]] < ISO_WIDTH
            group, members = members[near], members[~near]
            if np.ptp(log_t[group]) >= ISO_SPREAD:
                x[group], y[group] = (v[group] - v[group].mean() for v in (log_t, residual))
                kept[group], groups = True, groups + 1
    clusters = np.unique(design.cluster[kept]).size
    if clusters - groups < 3:
        return None
    slope = float(x @ y / (x @ x))
    sums = np.bincount(np.unique(design.cluster, return_inverse=True)[1], weights=x * (y - slope * x))
    degrees = clusters - groups - 1
    error = float(np.sqrt((sums**2).sum() * clusters / degrees) / (x @ x))
    half = float(stats.t.ppf(0.975, degrees)) * error
    return {
        "groups": groups,
        "runs": clusters,
        "slope": slope,
        "standard_error": error,
        "low": slope - half,
        "high": slope + half,
        "p_value": float(2 * stats.t.sf(abs(slope) / error, degrees)) if error > 0 else 1.0,
    }
