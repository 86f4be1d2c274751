"""Uncertainty of a fit: bootstrap by runs, sandwich, profile likelihood, tests at the boundary (FIT section
4).

A cluster is one training run with all its points. Every random choice comes from an explicit seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from replicate.scaling.law import Design, Law
from replicate.scaling.objective import Objective, observed
from replicate.scaling.solve import (
    SINGLE_ITERATIONS,
    Batch,
    Layout,
    Solution,
    escapes,
    jacobian,
    look,
    make_layout,
    minimise,
    raw_parameters,
    solve,
    starts,
)
from replicate.spec import UserError

LEVEL = 0.95
#: Condition number of the design above which separate exponents are refused, or reported with a warning.
REFUSE_CONDITION, WARN_CONDITION = 1000.0, 100.0
#: Share of converged replicates that is redone from scratch, to see whether warm starts find the optimum.
RECHECK = 0.02


@dataclass(frozen=True)
class Draws:
    """Bootstrap refits. `p` (B, size); `raw`: law parameter -> (B,), NaN where a draw does not define it.

    `converged_first`: share that converged before any fallback; `improved`: rechecked replicates whose
    optimum was lowered by a start from scratch.
    """

    p: np.ndarray
    raw: dict[str, np.ndarray]
    converged_first: float
    converged: float
    rechecked: int
    improved: int

    @property
    def size(self) -> int:
        return len(self.p)


def cluster_weights(
    cluster: np.ndarray, stratum: np.ndarray, replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """(B, n) multinomial counts of whole clusters, drawn within each stratum (molecule), so
    none is ever lost.

    Clusters that reach over several strata are drawn among those that reach over the same ones.
    """
    names, index = np.unique(cluster, return_inverse=True)
    touches = np.zeros((names.size, stratum.max() + 1), bool)
    touches[index, stratum] = True
    kind = np.unique(touches, axis=0, return_inverse=True)[1].ravel()
    counts = np.empty((replicates, names.size))
    for k in np.unique(kind):
        members = np.flatnonzero(kind == k)
        counts[:, members] = rng.multinomial(
            members.size, np.full(members.size, 1 / members.size), size=replicates
        )
    return counts[:, index]


def sketch(solution: Solution, replicates: int, seed: int) -> np.ndarray:
    """(R, size) refits to 1e-5 only, without those that take long: for scores, never for intervals."""
    design = solution.layout.design
    weights = cluster_weights(design.cluster, design.group, replicates, np.random.default_rng(seed))
    begin = np.repeat(solution.p[None], replicates, axis=0)
    weights *= design.weight
    batch = minimise(solution.layout, begin, weights=weights, damping=1e-4, tolerance=1e-5, max_iterations=40)
    if batch.converged.sum() < replicates / 2:
        raise UserError(f"law {design.law.formula}: more than half of the refits did not converge")
    return batch.p[batch.converged]


def bootstrap(solution: Solution, replicates: int, seed: int, *, cluster: np.ndarray | None = None) -> Draws:
    """Refits under resampled clusters, warm-started; those that fail, sit at a bound that
    another exponent would leave, or fall in a random 2 % are redone from variable-projection
    starts, and the better optimum is kept."""
    layout, design = solution.layout, solution.layout.design
    rng = np.random.default_rng(seed)
    weights = cluster_weights(design.cluster if cluster is None else cluster, design.group, replicates, rng)
    weights *= design.weight
    batch = minimise(layout, np.repeat(solution.p[None], replicates, axis=0), weights=weights, damping=1e-4)
    first = float(batch.converged.mean())
    sample = rng.random(replicates) < RECHECK
    idle, _ = escapes(layout, batch.p, weights)
    redo = np.flatnonzero(~batch.converged | sample | idle)
    p, converged = batch.p.copy(), batch.converged.copy()
    improved = 0
    if redo.size:
        anew = best_of_starts(layout, starts(layout, weights[redo]), weights=weights[redo])
        before = np.where(batch.converged[redo], batch.value[redo], np.inf)
        lower = anew.converged & (anew.value < before - 1e-9 * (1 + np.abs(anew.value)))
        p[redo[lower]] = anew.p[lower]
        converged[redo[lower]] = True
        improved = int((lower & batch.converged[redo] & sample[redo]).sum())
    return Draws(
        p[converged],
        raw_parameters(layout, p[converged]),
        first,
        float(converged.mean()),
        int(sample.sum()),
        improved,
    )


def best_of_starts(
    layout: Layout, begin: np.ndarray, *, weights: np.ndarray | None = None, z: np.ndarray | None = None
) -> Batch:
    """The best minimum of each replicate from several starts (R, S, size); weights, z (R, n) or shared
    (n,)."""
    r_batch, count, size = begin.shape
    batch = minimise(
        layout,
        begin.reshape(-1, size),
        weights=None
        if weights is None
        else np.repeat(np.broadcast_to(weights, (r_batch, layout.design.n_points)), count, axis=0),
        z=z if z is None or z.ndim == 1 else np.repeat(z, count, axis=0),
        max_iterations=SINGLE_ITERATIONS,
        damping=1e-2,
        gradual=True,
    )
    value = np.where(batch.converged, batch.value, np.inf).reshape(r_batch, count)
    rows = np.arange(r_batch) * count + np.argmin(value, axis=1)
    best = Batch(*(getattr(batch, f)[rows] for f in Batch.__dataclass_fields__))
    # As in `solve`: a term that was given up is let in again where it would help.
    shared = layout.design.weight if weights is None else weights
    weights = np.broadcast_to(shared, (r_batch, layout.design.n_points))
    found, again = escapes(layout, best.p, weights, z)
    idle = np.flatnonzero(found)
    if idle.size:
        more = minimise(
            layout, again[idle], weights=weights[idle], z=z if z is None or z.ndim == 1 else z[idle],
            max_iterations=SINGLE_ITERATIONS, damping=1e-2, gradual=True,
        )  # fmt: skip
        lower = more.converged & (more.value < np.where(best.converged, best.value, np.inf)[idle])
        for f in Batch.__dataclass_fields__:
            getattr(best, f)[idle[lower]] = getattr(more, f)[lower]
    return best


# ---- covariance ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Covariance:
    """Of all solver parameters (size, size); zero rows where a parameter sits at its bound. `hessian`: the
    model-based inverse Hessian; `sandwich`: clustered; `degrees`: clusters minus free parameters."""

    hessian: np.ndarray
    sandwich: np.ndarray
    degrees: int


def covariance(solution: Solution, cluster: np.ndarray | None = None) -> Covariance:
    """Clustered sandwich H^-1 (sum_c s_c s_c') H^-1 with the factor G/(G-1) (n-1)/(n-p), and H^-1 itself.

    A floor that the fit has put to zero still counts as free here: to take A0 = 0 for known makes the
    interval of a1 far too narrow in just the data sets whose noise has pushed A0 to its bound.
    """
    layout, design = solution.layout, solution.layout.design
    free = np.flatnonzero(_with_floor(solution))
    block = solution.hessian[np.ix_(free, free)]
    inverse = np.linalg.pinv(block, rcond=1e-12, hermitian=True)
    cluster = design.cluster if cluster is None else cluster
    index = np.unique(cluster, return_inverse=True)[1]
    scores = point_scores(solution)[:, free]
    sums = np.zeros((index.max() + 1, free.size))
    np.add.at(sums, index, scores * design.weight[:, None])
    g, n, k = sums.shape[0], design.n_points, free.size
    factor = g / max(g - 1, 1) * (n - 1) / max(n - k, 1)
    size = layout.size
    model, robust = np.zeros((size, size)), np.zeros((size, size))
    model[np.ix_(free, free)] = inverse
    robust[np.ix_(free, free)] = factor * inverse @ (sums.T @ sums) @ inverse
    return Covariance(model, robust, max(g - k, 1))


def _with_floor(solution: Solution) -> np.ndarray:
    """(size,) the free parameters, and the floor at its bound where the Hessian stays positive with it."""
    free, floor = solution.free, solution.layout.design.law.floor
    if floor is None or free[solution.layout.names.index(floor)]:
        return free
    wider = free.copy()
    wider[solution.layout.names.index(floor)] = True
    block = solution.hessian[np.ix_(wider, wider)]
    scale = np.sqrt(np.abs(np.diagonal(block)))
    if np.any(scale == 0) or np.linalg.eigvalsh(block / scale / scale[:, None])[0] < 1e-6:
        return free
    return wider


def point_scores(solution: Solution) -> np.ndarray:
    """(n, size) gradient of each point's loss, unweighted."""
    layout, design = solution.layout, solution.layout.design
    p = solution.p[None]
    at = look(layout, p, observed(layout.objective, design), design.weight[None])
    loss, jac = at.loss, jacobian(layout, p, at.prediction)
    columns = [jac[0].T * loss.dm[0][:, None], layout.contrasts.T * loss.dm[0][:, None]]
    if loss.dt is not None:
        columns.append(loss.dt[0][:, None])
    return np.concatenate(columns, axis=1)


def raw_jacobian(solution: Solution) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the law parameters and d raw / d solver parameters, (L, size)."""
    layout, design = solution.layout, solution.layout.design
    law, p = design.law, solution.p
    k_terms, k_smooth = layout.n_terms, layout.n_terms + layout.n_exponents
    theta = p[k_terms:k_smooth]
    q = float(layout.power_of(p[None])[0])
    unit = design.raw(np.ones((1, k_terms)), theta[None], np.array([q]))[0]
    rows = np.zeros((len(law.parameters), layout.size))
    centre = dict(zip(law.variables, design.centre, strict=True))
    index = {e: i for i, e in enumerate(law.exponents)}
    for k, term in enumerate(law.terms):
        rows[k, k] = unit[k]
        for f in term.factors:
            if isinstance(f.exponent, str):
                rows[k, k_terms + index[f.exponent]] -= p[k] * unit[k] * f.sign * centre[f.variable]
        if layout.power is None:
            rows[k, layout.n_law - 1] = -p[k] * unit[k] * np.log(design.median) / q**2
    for i in range(k_terms, len(law.parameters)):
        rows[i, i] = 1.0
    return law.parameters, rows


def sandwich_intervals(
    solution: Solution, cov: Covariance, level: float = LEVEL
) -> tuple[dict[str, float], dict[str, tuple[float, float] | None]]:
    """Standard errors and intervals of the raw parameters; amplitudes in log, and None at a bound."""
    names, rows = raw_jacobian(solution)
    raw = solution.raw()
    error = np.sqrt(np.maximum(np.einsum("ip,pq,iq->i", rows, cov.sandwich, rows), 0.0))
    t = float(special.stdtrit(cov.degrees, 0.5 + level / 2))
    out: dict[str, tuple[float, float] | None] = {}
    amplitudes = set(solution.layout.design.law.amplitudes)
    for i, name in enumerate(names):
        value = raw[name]
        if error[i] == 0 or not np.isfinite(value) or (name in amplitudes and value == 0):
            out[name] = None
        elif name in amplitudes:
            # exp(700) is the largest double: a wider interval is no interval.
            half = t * error[i] / value
            out[name] = (value * np.exp(-half), value * np.exp(half)) if half < 700 else None
        else:
            out[name] = (value - t * error[i], value + t * error[i])
    return {n: float(e) for n, e in zip(names, error, strict=True)}, out


def percentile_intervals(draws: Draws, level: float = LEVEL) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of the raw parameters; None where more than a tail of the draws does
    not define it."""
    tail = 100 * (1 - level) / 2
    out: dict[str, tuple[float, float] | None] = {}
    for name, values in draws.raw.items():
        known = values[np.isfinite(values)]
        if known.size < (0.5 + level / 2) * values.size:
            out[name] = None
            continue
        lo, hi = np.percentile(known, [tail, 100 - tail])
        out[name] = (float(lo), float(hi))
    return out


# ---- profile likelihood --------------------------------------------------------------------------


def profile_intervals(
    solution: Solution,
    cov: Covariance,
    names: Sequence[str],
    level: float = LEVEL,
    curves: dict[str, dict[str, Any]] | None = None,
) -> dict[str, tuple[float, float] | None]:
    """Intervals where twice the drop of the objective, rescaled by model over sandwich variance (so that
    clusters and a wrong noise model count; Rotnitzky & Jewell 1990), reaches the square of a t quantile.

    `names`: law parameters; an amplitude is profiled at the geometric means (centred). All constrained fits
    of all parameters are one batch. A side on which the bound is never reached is the parameter's bound.
    `curves` receives {name: {"x", "deviance", "cut"}}: the rescaled profile and the height that bounds the
    interval.
    """
    layout = solution.layout
    columns = [layout.names.index(n) for n in names]
    lower, upper = layout.bounds()
    spread = np.linspace(0.4, 5.0, 12)
    jobs: list[tuple[int, float]] = []
    keep = []
    for name, j in zip(names, columns, strict=True):
        sd = np.sqrt(max(cov.sandwich[j, j], 0.0))
        if not solution.free[j] or sd == 0:
            continue
        keep.append((name, j))
        for side in (-1.0, 1.0):
            stop = upper[j] if side > 0 else lower[j]
            room = abs(stop - solution.p[j])
            # Downward in equal ratios once zero is in sight: amplitudes are skewed.
            reach = np.minimum(spread * sd, room)
            jobs += [(j, solution.p[j] + side * r) for r in reach]
    if not jobs:
        return dict.fromkeys(names)
    drop = _constrained_drop(solution, cov, jobs).reshape(len(keep), 2, spread.size)
    cut = float(special.stdtrit(cov.degrees, 0.5 + level / 2)) ** 2
    values = np.array([v for _, v in jobs]).reshape(drop.shape)
    out: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    for i, (name, j) in enumerate(keep):
        ratio = cov.hessian[j, j] / cov.sandwich[j, j]
        ends = []
        for side in (0, 1):
            root = np.sqrt(np.maximum(2 * drop[i, side] * ratio, 0.0))
            ends.append(_crossing(solution.p[j], values[i, side], root, np.sqrt(cut), (-1.0, 1.0)[side]))
        out[name] = (max(ends[0], lower[j]), min(ends[1], upper[j]))
        if curves is not None:
            deviance = np.maximum(2 * drop[i] * ratio, 0.0)
            curves[name] = {
                "x": [*values[i, 0][::-1].tolist(), float(solution.p[j]), *values[i, 1].tolist()],
                "deviance": [*deviance[0][::-1].tolist(), 0.0, *deviance[1].tolist()],
                "cut": cut,
            }
    return out


def _crossing(centre: float, values: np.ndarray, root: np.ndarray, cut: float, side: float) -> float:
    """Where the signed root of the profile, interpolated linearly from the optimum outwards,
    reaches the cut."""
    xs, ys = np.concatenate([[centre], values]), np.concatenate([[0.0], root])
    above = np.flatnonzero(ys >= cut)
    if not above.size:
        return side * float("inf")
    i = int(above[0])
    return float(xs[i - 1] + (xs[i] - xs[i - 1]) * (cut - ys[i - 1]) / (ys[i] - ys[i - 1]))


def _constrained_drop(solution: Solution, cov: Covariance, jobs: list[tuple[int, float]]) -> np.ndarray:
    """Rise of the objective with one parameter held at a value, for each job (column, value)."""
    layout = solution.layout
    lower, upper = (np.repeat(b[None], len(jobs), axis=0) for b in layout.bounds())
    begin = np.repeat(solution.p[None], len(jobs), axis=0)
    for i, (j, value) in enumerate(jobs):
        variance = cov.hessian[j, j]
        if variance > 0:
            begin[i] += cov.hessian[j] / variance * (value - solution.p[j])
        begin[i, j] = lower[i, j] = upper[i, j] = value
    # A vanished amplitude takes its exponent's gradient with it: restart such terms from a little above zero.
    k = layout.n_terms
    begin[:, :k] = np.where(
        begin[:, :k] <= 0, np.where(solution.p[:k] > 0, 0.05 * solution.p[:k], 0.0), begin[:, :k]
    )
    for i, (j, value) in enumerate(jobs):
        begin[i, j] = value
    batch = minimise(layout, begin, lower=lower, upper=upper, max_iterations=200, damping=1e-2)
    return np.where(batch.converged, batch.value - solution.value, np.nan)


# ---- tests at the boundary -----------------------------------------------------------------------


@dataclass(frozen=True)
class FloorTest:
    """A0 = 0 against A0 > 0: `statistic` ~ 1/2 chi2_0 + 1/2 chi2_1 (5 % cut 2.706). `upper`: one-sided 95 %
    bound on the raw A0, the largest value whose profile is not rejected."""

    statistic: float
    p_value: float
    upper: float | None


def floor_test(solution: Solution) -> FloorTest | None:
    """None if the law has no floor. The likelihood ratio is rescaled by the score variance of the
    clusters."""
    layout = solution.layout
    floor = layout.design.law.floor
    if floor is None:
        return None
    null = without_floor(solution)
    statistic = max(2 * (null.value - solution.value) * _score_ratio(null), 0.0)
    p_value = 1.0 if statistic <= 0 else 0.5 * float(special.chdtrc(1, statistic))
    return FloorTest(float(statistic), p_value, floor_upper_bound(solution))


def without_floor(solution: Solution) -> Solution:
    """The fit with the floor held at zero, from the same starts and from the fit itself."""
    layout, design = solution.layout, solution.layout.design
    floor = design.law.floor
    law = Law(design.law.name + "_no_floor", tuple(t for t in design.law.terms if t.amplitude != floor))
    begin = np.delete(solution.p, layout.names.index(str(floor)))
    begin[: len(law.terms)] = np.maximum(begin[: len(law.terms)], 1e-3)
    return solve(replace(design, law=law), layout.objective, extra_starts=begin)


def _score_ratio(null: Solution) -> float:
    """What a likelihood ratio is worth: mean curvature over mean squared slope of the loss (1 for the right
    noise
    model), over the design effect of the clusters on the score along the floor (1 for independent points).

    Not the information at the null itself: along the floor it is far from constant, and falls
    where the ratio rises.
    """
    layout, design = null.layout, null.layout.design
    at = look(layout, null.p[None], observed(layout.objective, design), design.weight[None])
    loss, log_f = at.loss, at.prediction.log_f
    free, w = np.flatnonzero(null.free), design.weight
    noise = float((w * loss.dmm[0]).sum() / max((w * loss.dm[0] ** 2).sum(), 1e-300))
    noise *= max(design.n_points - free.size, 1) / design.n_points
    # The score along the floor, less what the fitted parameters take up (their scores span what they can
    # fit).
    scores = point_scores(null)[:, free] * w[:, None]
    own = loss.dm[0] * np.exp(-log_f[0]) * w
    rest = own - scores @ np.linalg.lstsq(scores, own, rcond=None)[0]
    sums = np.bincount(np.unique(design.cluster, return_inverse=True)[1], weights=rest)
    effect = float((sums**2).sum() / max((rest**2).sum(), 1e-300))
    if not noise > 0:
        return 1.0
    return noise / max(effect, 1e-3)


def floor_upper_bound(solution: Solution, level: float = 0.95) -> float | None:
    """One-sided upper bound of the raw floor from its profile (cut 2.706), or None if none is found."""
    layout = solution.layout
    floor = layout.design.law.floor
    if floor is None:
        return None
    j = layout.names.index(floor)
    cov = covariance(solution)
    sd = np.sqrt(cov.sandwich[j, j])
    ratio = cov.hessian[j, j] / cov.sandwich[j, j] if cov.sandwich[j, j] > 0 else 1.0
    intercept = solution.p[layout.n_law : layout.n_model] @ layout.contrasts
    lowest = float(np.exp(np.min(solution.fitted() - intercept)))
    # The floor cannot be far above the smallest prediction: search on a log grid around it.
    base = solution.p[j]
    span = np.geomspace(1e-4, 5.0, 28) * max(lowest, 4 * sd)
    drop = _constrained_drop(solution, cov, [(j, base + s) for s in span])
    root = np.sqrt(np.maximum(2 * drop * ratio, 0.0))
    cut = float(special.ndtri(level))
    known = np.isfinite(root)
    end = _crossing(base, base + span[known], root[known], cut, 1.0)
    return end * layout.design.median if np.isfinite(end) else None


@dataclass(frozen=True)
class RatioTest:
    """Does a variable matter? Likelihood ratio of the law against the law without its terms.

    `p_value` by simulation under the null (residual bootstrap); `p_chi2` from chi2 with `degrees` as a check.
    """

    variable: str
    statistic: float
    degrees: int
    p_value: float
    p_chi2: float
    replicates: int
    critical: float


def droppable(law: Law, variable: str) -> bool:
    """Whether some terms contain the variable and others do not."""
    return 0 < sum(any(f.variable == variable for f in t.factors) for t in law.terms) < len(law.terms)


def drop_variable(law: Law, variable: str) -> Law:
    """The law without the terms that contain the variable."""
    terms = tuple(t for t in law.terms if all(f.variable != variable for f in t.factors))
    if not droppable(law, variable):
        raise UserError(f"law {law.formula}: {variable} cannot be dropped from it")
    return Law(f"{law.name}_without_{variable}", terms, law.power)


def variable_test(solution: Solution, variable: str, replicates: int, seed: int) -> RatioTest:
    """Parametric bootstrap of the likelihood ratio for the terms of one variable (FIT section 4)."""
    layout, design = solution.layout, solution.layout.design
    objective = layout.objective
    law = drop_variable(design.law, variable)
    kept = [i for i, v in enumerate(design.law.variables) if v in law.variables]
    null_design = replace(design, law=law, x=design.x[kept], centre=design.centre[kept])
    null = solve(null_design, objective)
    statistic = max(2 * (null.value - solution.value), 0.0)
    degrees = len(design.law.parameters) - len(law.parameters)
    z = observed(objective, design)
    simulated = _null_data(solution, null, z, replicates, np.random.default_rng(seed))
    null_fits = best_of_starts(null.layout, np.repeat(null.p[None, None], replicates, axis=0), z=simulated)
    full_fits = best_of_starts(layout, _lifted_starts(layout, null.layout, null_fits.p), z=simulated)
    usable = null_fits.converged & full_fits.converged
    ratio = np.maximum(2 * (null_fits.value - full_fits.value)[usable], 0.0)
    return RatioTest(
        variable=variable,
        statistic=float(statistic),
        degrees=degrees,
        p_value=float((1 + (ratio >= statistic).sum()) / (1 + ratio.size)),
        p_chi2=float(special.chdtrc(degrees, statistic)),
        replicates=int(ratio.size),
        critical=float(np.percentile(ratio, 95)) if ratio.size else float("nan"),
    )


def _null_data(
    full: Solution, null: Solution, z: np.ndarray, replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """(B, n) data of the null law with the full fit's residuals, resampled by run (or by point if runs differ
    in length), centred, inflated for the parameters spent."""
    design = full.layout.design
    residual = z - full.fitted() if full.layout.objective.kind != "l2-raw" else z - np.exp(full.fitted())
    n, k = design.n_points, int(full.free.sum())
    residual = (residual - np.median(residual)) * np.sqrt(n / max(n - k, 1))
    index = np.unique(design.cluster, return_inverse=True)[1]
    sizes = np.bincount(index)
    base = null.fitted() if null.layout.objective.kind != "l2-raw" else np.exp(null.fitted())
    if sizes.max() > 1 and sizes.min() == sizes.max():
        order = np.argsort(index, kind="stable")
        rows = residual[order].reshape(sizes.size, -1)
        drawn = rows[rng.integers(sizes.size, size=(replicates, sizes.size))].reshape(replicates, -1)
        noise = np.empty((replicates, n))
        noise[:, order] = drawn
        return base + noise
    return base + residual[rng.integers(n, size=(replicates, n))]


def _lifted_starts(layout: Layout, null: Layout, p: np.ndarray) -> np.ndarray:
    """Starts (R, 3, size) of the full law from null fits (R, size0): absent terms at 5 % with three
    exponents."""
    out = np.zeros((len(p), 3, layout.size))
    for i, exponent in enumerate((0.1, 0.4, 1.2)):
        for j, name in enumerate(layout.names):
            if name in null.names:
                out[:, i, j] = p[:, null.names.index(name)]
            elif j < layout.n_terms:
                out[:, i, j] = 0.05
            else:
                out[:, i, j] = exponent
    return out


# ---- between molecules ---------------------------------------------------------------------------


def leave_one_group_out(
    solution: Solution,
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[float, float]]]:
    """Refits without each molecule, and jackknife intervals with t_(G-1) for statements between molecules."""
    layout, design = solution.layout, solution.layout.design
    names, g = design.group_names, len(design.group_names)
    if g < 3:
        return {}, {}
    weights = (design.group != np.arange(g)[:, None]) * design.weight
    begin = np.repeat(solution.p[None], g, axis=0)
    lower, upper = (np.repeat(b[None], g, axis=0) for b in layout.bounds())
    batch = minimise(layout, begin, weights=weights, lower=lower, upper=upper, max_iterations=200)
    raw = raw_parameters(layout, batch.p)
    t = float(special.stdtrit(g - 1, 0.5 + LEVEL / 2))
    refits, intervals = {}, {}
    for i, name in enumerate(names):
        if batch.converged[i]:
            refits[name] = {k: float(v[i]) for k, v in raw.items()}
    if len(refits) == g:
        full = solution.raw()
        for k, v in raw.items():
            if k not in design.law.amplitudes and np.all(np.isfinite(v)):
                error = np.sqrt((g - 1) / g * np.sum((v - v.mean()) ** 2))
                intervals[k] = (full[k] - t * float(error), full[k] + t * float(error))
    return refits, intervals


def condition_number(solution: Solution) -> float:
    """Of the log exponents' information: the Jacobian of the predicted logs with respect to the exponents and
    amplitudes, columns scaled to unit length; huge where two terms cannot be told apart."""
    layout = solution.layout
    jac = jacobian(layout, solution.p[None])
    columns = np.concatenate([jac[0], layout.contrasts])[solution.free[: layout.n_model]]
    length = np.linalg.norm(columns, axis=1, keepdims=True)
    singular = np.linalg.svd(columns / np.maximum(length, 1e-300), compute_uv=False)
    return float(singular[0] / max(singular[-1], 1e-300))


def design_condition(design: Design) -> float:
    """`condition_number` of the design alone, at equal amplitudes and spread-out exponents: a fit that has
    already given one of two collinear terms up would look well conditioned."""
    layout = make_layout(design, Objective("l2-log"))
    p = np.zeros((1, layout.size))
    p[0, : layout.n_terms] = 1 / layout.n_terms
    p[0, layout.n_terms : layout.n_terms + layout.n_exponents] = _reference_exponents(design.law)
    if layout.power is None:
        p[0, layout.n_law - 1] = 0.5
    jac = jacobian(layout, p)
    columns = np.concatenate([jac[0], layout.contrasts])
    singular = np.linalg.svd(columns / np.linalg.norm(columns, axis=1, keepdims=True), compute_uv=False)
    return float(singular[0] / max(singular[-1], 1e-300))


def check_separable(design: Design) -> float:
    """Condition number of the design; refuses above 1000 (FIT section 1)."""
    condition = design_condition(design)
    if condition > REFUSE_CONDITION:
        raise UserError(
            f"law {design.law.formula}: the variables cannot be told apart "
            f"(condition number {condition:.0f}, at most {REFUSE_CONDITION:.0f}); "
            f"vary {' and '.join(design.law.variables)} in crossed ratios"
        )
    return condition


def condition_warning(condition: float) -> list[str]:
    """What to say of a design that is only just good enough."""
    if condition <= WARN_CONDITION:
        return []
    return [f"condition number {condition:.0f}: separate exponents are poorly determined"]


def _reference_exponents(law: Law) -> np.ndarray:
    """0.3, 0.4, ... and 0.5 more for every earlier exponent of the same variable, which is
    meant to differ."""
    uses: dict[str, list[str]] = {}
    out = []
    for i, name in enumerate(law.exponents):
        variables = {f.variable for t in law.terms for f in t.factors if f.exponent == name}
        earlier = {e for v in variables for e in uses.get(v, [])}
        out.append(0.3 + 0.1 * i + 0.5 * len(earlier))
        for v in variables:
            uses.setdefault(v, []).append(name)
    return np.array(out)


def equality_test(solution: Solution, draws: Draws, one: str, other: str) -> dict[str, float]:
    """Are two exponents equal? Wald test of the difference with the standard deviation of the bootstrap."""
    raw = solution.raw()
    cloud = draws.raw[one] - draws.raw[other]
    cloud = cloud[np.isfinite(cloud)]
    difference, error = raw[one] - raw[other], float(cloud.std(ddof=1)) if cloud.size > 1 else float("nan")
    lo, hi = np.percentile(cloud, [2.5, 97.5]) if cloud.size else (np.nan, np.nan)
    p_value = float(2 * special.ndtr(-abs(difference) / error)) if error > 0 else float("nan")
    return {
        "difference": difference,
        "standard_error": error,
        "low": float(lo),
        "high": float(hi),
        "p_value": p_value,
    }
