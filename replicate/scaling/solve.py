"""Fits of a posynomial law: variable-projection starts, then a batched projected Newton method with
certificates.

Parameters of one fit, in this order: c (K) amplitudes at the geometric means in units of the
median, >= 0; theta (P) exponents; q the outer power if it is free; beta (G - 1) contrasts of
the group intercepts; tau = log scale if the objective has one. A batch of R fits shares the
table and differs in weights, data or bounds.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from replicate.scaling.law import Design
from replicate.scaling.objective import SCALE_FLOOR, Objective, evaluate, observed, reported_value
from replicate.spec import UserError

#: A fit is stationary below TOLERANCE; single fits go on to POLISH while their gradient falls.
TOLERANCE, POLISH = 1e-9, 1e-12
#: Of one fit, or of a replicate that failed: lad on few points crawls from bend to bend, and does arrive.
SINGLE_ITERATIONS = 2000
EXPONENT_MAX = 10.0
POWER_RANGE = (1e-2, 10.0)
#: Points of one block of replicates: arrays of this many float64 stay in the L2 cache.
BLOCK_ELEMENTS = 1 << 15
_EXPONENT_GRIDS = {
    1: (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0),
    2: (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.5),
    3: (0.07, 0.2, 0.45, 0.9, 1.8),
    4: (0.1, 0.35, 0.8, 1.8),
}


@dataclass(frozen=True)
class Layout:
    """Where each kind of parameter sits in the vector, and the constant columns of the design."""

    design: Design
    objective: Objective
    names: tuple[str, ...]
    n_terms: int
    n_exponents: int
    power: float | None
    shapes: tuple[np.ndarray, ...]
    term_exponents: tuple[tuple[int, ...], ...]
    offsets: tuple[np.ndarray | None, ...]
    contrasts: np.ndarray

    @property
    def n_law(self) -> int:
        return self.n_terms + self.n_exponents + (self.power is None)

    @property
    def n_model(self) -> int:
        return self.n_law + self.contrasts.shape[0]

    @property
    def size(self) -> int:
        return self.n_model + self.objective.has_scale

    def power_of(self, p: np.ndarray) -> np.ndarray:
        """(R,) outer powers."""
        return p[:, self.n_law - 1] if self.power is None else np.full(len(p), self.power)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        lower[: self.n_terms + self.n_exponents] = 0.0
        upper[self.n_terms : self.n_terms + self.n_exponents] = EXPONENT_MAX
        if self.power is None:
            lower[self.n_law - 1], upper[self.n_law - 1] = POWER_RANGE
        if self.objective.has_scale:
            lower[-1] = np.log(SCALE_FLOOR)
        return lower, upper

    def model(self, p: np.ndarray) -> np.ndarray:
        """Predicted log of L / median, (R, n)."""
        f = np.zeros((len(p), self.design.n_points))
        for k in range(self.n_terms):
            f += p[:, k : k + 1] * self._term(p, k)
        m = self.power_of(p)[:, None] * np.log(np.maximum(f, 1e-300))
        return m + p[:, self.n_law : self.n_model] @ self.contrasts

    def _term(self, p: np.ndarray, k: int) -> np.ndarray:
        columns = [self.n_terms + e for e in self.term_exponents[k]]
        if not columns and self.offsets[k] is None:
            return np.ones((len(p), self.design.n_points))
        exponent = p[:, columns] @ self.shapes[k]
        offset = self.offsets[k]
        if offset is not None:
            exponent += offset
        np.negative(exponent, out=exponent)
        return np.exp(exponent, out=exponent)


def make_layout(design: Design, objective: Objective) -> Layout:
    """The parameter vector of a design under an objective."""
    law = design.law
    row = dict(zip(law.variables, design.x, strict=True))
    index = {e: i for i, e in enumerate(law.exponents)}
    shapes, members, offsets = [], [], []
    for term in law.terms:
        columns: dict[int, np.ndarray] = {}
        offset = None
        for f in term.factors:
            x = -f.sign * row[f.variable]
            if isinstance(f.exponent, str):
                columns[index[f.exponent]] = columns.get(index[f.exponent], 0.0) + x
            else:
                offset = f.exponent * x + (0.0 if offset is None else offset)
        members.append(tuple(columns))
        shapes.append(np.array(list(columns.values())).reshape(len(columns), design.n_points))
        offsets.append(offset)
    contrasts = design.contrasts()
    names = law.parameters + tuple(f"beta[{i}]" for i in range(len(contrasts)))
    return Layout(
        design=design,
        objective=objective,
        names=names + (("log_scale",) if objective.has_scale else ()),
        n_terms=len(law.terms),
        n_exponents=len(law.exponents),
        power=None if isinstance(law.power, str) else float(law.power),
        shapes=tuple(shapes),
        term_exponents=tuple(members),
        offsets=tuple(offsets),
        contrasts=contrasts,
    )


@dataclass
class Derivatives:
    """Of a batch: value (R,), gradient (R, P), Hessian (R, P, P), diagonal of a majorising curvature (R, P),
    the yardstick (R, P) that makes a gradient dimensionless, and where each term weighs most: `centre` (R,
    K, E) in the shapes of its exponents, `mass` (R, K) its curvature there."""

    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    curvature: np.ndarray
    yardstick: np.ndarray
    centre: np.ndarray
    mass: np.ndarray

    def take(self, rows: np.ndarray) -> Derivatives:
        return Derivatives(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def put(self, rows: np.ndarray, other: Derivatives, chosen: np.ndarray) -> None:
        for f in self.__dataclass_fields__:
            getattr(self, f)[rows] = getattr(other, f)[chosen]


def jacobian(layout: Layout, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """m (R, n); dm/d(law parameters) (R, n_law, n); E_k / f per term; log f."""
    k_terms, n = layout.n_terms, layout.design.n_points
    q = layout.power_of(p)[:, None]
    u = [layout._term(p, k) for k in range(k_terms)]
    f = p[:, 0:1] * u[0]
    for k in range(1, k_terms):
        f += p[:, k : k + 1] * u[k]
    np.maximum(f, 1e-300, out=f)
    log_f = np.log(f)
    np.divide(1.0, f, out=f)
    jac = np.zeros((len(p), layout.n_law, n))
    for k in range(k_terms):
        u[k] *= f
        jac[:, k] = u[k]
        if layout.term_exponents[k]:
            w = p[:, k : k + 1] * u[k]
            for e, x in zip(layout.term_exponents[k], layout.shapes[k], strict=True):
                jac[:, k_terms + e] -= w * x
    m = log_f
    if layout.power != 1.0:
        m = q * log_f
        jac[:, : k_terms + layout.n_exponents] *= q[:, :, None]
        if layout.power is None:
            jac[:, layout.n_law - 1] = log_f
    if len(layout.contrasts):
        m = m + p[:, layout.n_law : layout.n_model] @ layout.contrasts
    return m, jac, u, log_f


def derivatives(
    layout: Layout, p: np.ndarray, z: np.ndarray, weights: np.ndarray, width: float | None = None
) -> Derivatives:
    """Objective of a batch with its exact gradient and Hessian. z (n,) or (R, n); weights (R, n)."""
    r_batch, size, n_law, n_model = len(p), layout.size, layout.n_law, layout.n_model
    k_terms, k_smooth = layout.n_terms, layout.n_terms + layout.n_exponents
    m, jac, u, _ = jacobian(layout, p)
    tau = p[:, -1] if layout.objective.has_scale else np.zeros(r_batch)
    loss = evaluate(layout.objective, layout.design, z, m, tau, width)
    q = layout.power_of(p)

    value = np.einsum("rn,rn->r", weights, loss.value)
    wdm = weights * loss.dm
    wdmm = weights * loss.dmm
    curved = weights * loss.curvature
    contrasts = layout.contrasts
    gradient = np.empty((r_batch, size))
    hessian = np.zeros((r_batch, size, size))
    curvature = np.empty((r_batch, size))
    norm2 = np.ones((r_batch, size))
    gradient[:, :n_law] = np.matmul(jac, wdm[:, :, None])[:, :, 0]
    squares = jac * jac
    two = np.stack([curved, weights], axis=2)
    sums = np.matmul(squares, two)
    curvature[:, :n_law], norm2[:, :n_law] = sums[:, :, 0], sums[:, :, 1]
    if n_model > n_law:
        gradient[:, n_law:n_model] = wdm @ contrasts.T
        curvature[:, n_law:n_model] = curved @ (contrasts**2).T
        norm2[:, n_law:n_model] = weights @ (contrasts**2).T
        weighted = jac * wdmm[:, None, :]
        hessian[:, :n_law, n_law:n_model] = weighted @ contrasts.T
        hessian[:, n_law:n_model, :n_law] = hessian[:, :n_law, n_law:n_model].transpose(0, 2, 1)
        g = len(contrasts)
        pairs = (contrasts[:, None, :] * contrasts[None]).reshape(g * g, -1)
        hessian[:, n_law:n_model, n_law:n_model] = (wdmm @ pairs.T).reshape(r_batch, g, g)
    # d2m = q (-h h^T + F) with h = d log f: the outer products merge with the Gauss-Newton ones.
    if layout.power is None:
        full = np.matmul(jac * wdmm[:, None, :], jac.transpose(0, 2, 1))
        inner = jac[:, :k_smooth]
        full[:, :k_smooth, :k_smooth] -= np.matmul(
            inner * (wdm / q[:, None])[:, None, :], inner.transpose(0, 2, 1)
        )
        cross = gradient[:, :k_smooth] / q[:, None]
        full[:, :k_smooth, -1] += cross
        full[:, -1, :k_smooth] += cross
    else:
        merged = wdmm - wdm / q[:, None]
        full = np.matmul(jac * merged[:, None, :], jac.transpose(0, 2, 1))
    centre, mass = np.zeros((r_batch, k_terms, layout.n_exponents)), np.zeros((r_batch, k_terms))
    for k in range(k_terms):
        members, shapes = layout.term_exponents[k], layout.shapes[k]
        if not members:
            continue
        share = u[k] * p[:, k : k + 1]
        share *= share
        share *= curved
        mass[:, k] = share.sum(axis=1)
        centre[:, k, list(members)] = (share @ shapes.T) / np.maximum(mass[:, k], 1e-300)[:, None]
        mass[:, k] *= q * q
        a = wdm * u[k]
        first = a @ shapes.T * q[:, None]
        pairs = (shapes[:, None, :] * shapes[None]).reshape(len(members) ** 2, -1)
        second = (a @ pairs.T).reshape(r_batch, len(members), len(members)) * (q * p[:, k])[:, None, None]
        for i, e in enumerate(members):
            full[:, k, k_terms + e] -= first[:, i]
            full[:, k_terms + e, k] -= first[:, i]
            for j, e2 in enumerate(members):
                full[:, k_terms + e, k_terms + e2] += second[:, i, j]
    hessian[:, :n_law, :n_law] = full
    total = weights.sum(axis=1)
    size_dm = np.sqrt(np.einsum("rn,rn,rn->r", weights, loss.dm, loss.dm))
    unit = np.maximum(size_dm, layout.objective.gradient_unit(tau) * np.sqrt(total))
    if layout.objective.has_scale:
        assert loss.dt is not None
        assert loss.dmt is not None
        assert loss.dtt is not None
        wdmt = weights * loss.dmt
        gradient[:, -1] = np.einsum("rn,rn->r", weights, loss.dt)
        hessian[:, -1, -1] = np.einsum("rn,rn->r", weights, loss.dtt)
        hessian[:, -1, :n_law] = np.matmul(jac, wdmt[:, :, None])[:, :, 0]
        if n_model > n_law:
            hessian[:, -1, n_law:n_model] = wdmt @ contrasts.T
        hessian[:, :-1, -1] = hessian[:, -1, :-1]
        curvature[:, -1] = total
    yardstick = np.sqrt(norm2) * unit[:, None]
    if layout.objective.has_scale:
        yardstick[:, -1] = total
    return Derivatives(value, gradient, hessian, curvature, yardstick, centre, mass)


def _free(p: np.ndarray, d: Derivatives, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Parameters that may move: not held at a bound by the gradient, and with any effect at all."""
    held = ((p <= lower) & (d.gradient >= 0)) | ((p >= upper) & (d.gradient <= 0)) | (lower >= upper)
    return ~held & (d.curvature > 1e-300)


def scaled_gradient(d: Derivatives, free: np.ndarray) -> np.ndarray:
    """(R,) largest free gradient component in units of its yardstick (a cosine, MINPACK's gtol)."""
    ratio = np.abs(d.gradient) / np.maximum(d.yardstick, 1e-300)
    return np.max(np.where(free, ratio, 0.0), axis=1)


def _cholesky_solve(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve a x = b for a batch (R, P, P), (R, P), vectorised over R; second result: was a positive
    definite?"""
    if len(a) <= 64:
        # LAPACK has the smaller overhead on few rows, but gives up on all if one is indefinite.
        try:
            np.linalg.cholesky(a)
            return np.linalg.solve(a, b[:, :, None])[:, :, 0], np.ones(len(a), bool)
        except np.linalg.LinAlgError:
            pass
    size = a.shape[1]
    low = np.zeros_like(a)
    ok = np.ones(len(a), bool)
    y = np.empty_like(b)
    for j in range(size):
        pivot = a[:, j, j] - np.einsum("rk,rk->r", low[:, j, :j], low[:, j, :j])
        # Entries are scaled to a unit diagonal, so this is a relative bar.
        good = pivot > 1e-13
        ok &= good
        root = np.sqrt(np.where(good, pivot, 1.0))
        low[:, j, j] = root
        if j + 1 < size:
            rest = a[:, j + 1 :, j] - np.matmul(low[:, j + 1 :, :j], low[:, j, :j, None])[:, :, 0]
            low[:, j + 1 :, j] = rest / root[:, None]
        y[:, j] = (b[:, j] - np.einsum("rk,rk->r", low[:, j, :j], y[:, :j])) / root
    x = np.empty_like(b)
    for j in reversed(range(size)):
        x[:, j] = (y[:, j] - np.einsum("rk,rk->r", low[:, j + 1 :, j], x[:, j + 1 :])) / low[:, j, j]
    return x, ok


def _newton_step(
    p: np.ndarray, d: Derivatives, free: np.ndarray, damping: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Damped Newton step that respects the bounds; returns (new parameters, damping actually used).

    A component that would cross its bound is put on it, and the others are solved again with that one fixed.
    The step is taken in amplitudes at the place where each term weighs most, c_new = (c + step) exp(step_e
    centre): a term that matters at one end of the data only has a tiny c and a steep exponent, and in (c, e)
    themselves its valley is an exponential curve that a straight step cannot follow.
    """
    k_terms, smooth = d.mass.shape[1], slice(d.mass.shape[1], d.mass.shape[1] + d.centre.shape[2])
    amplitude, pull = p[:, :k_terms], d.gradient[:, :k_terms]
    v = d.centre
    cv = amplitude[:, :, None] * v
    gradient = d.gradient.copy()
    gradient[:, smooth] += np.einsum("rk,rke->re", pull, cv)
    hessian = d.hessian.copy()
    # Chain rule for c(step, step_e): dc/de = c v, d2c/(dstep de) = v, d2c/(de de') = c v v'.
    to_amplitudes = hessian[:, :, :k_terms] @ cv
    hessian[:, :, smooth] += to_amplitudes
    hessian[:, smooth, :] += to_amplitudes.transpose(0, 2, 1)
    hessian[:, smooth, smooth] += cv.transpose(0, 2, 1) @ d.hessian[:, :k_terms, :k_terms] @ cv
    hessian[:, smooth, smooth] += np.einsum("rk,rke,rkf->ref", pull, cv, v)
    mixed = pull[:, :, None] * v
    hessian[:, :k_terms, smooth] += mixed
    hessian[:, smooth, :k_terms] += mixed.transpose(0, 2, 1)
    curvature = d.curvature.copy()
    curvature[:, smooth] = np.maximum(
        curvature[:, smooth] - np.einsum("rk,rke->re", d.mass, v * v), 1e-4 * curvature[:, smooth]
    )
    scale = np.where(free, 1.0 / np.sqrt(np.maximum(curvature, 1e-300)), 1.0)
    both = free[:, :, None] & free[:, None, :]
    h = np.where(both, hessian * scale[:, :, None] * scale[:, None, :], 0.0)
    diagonal = np.arange(p.shape[1])
    g = np.where(free, -gradient * scale, 0.0)
    step = np.zeros_like(p)
    moving = free.copy()
    fixed = np.zeros_like(p)
    rows = np.arange(len(p))
    damping = damping.copy()
    for attempt in range(3):
        mask = moving[rows]
        if attempt == 0:
            right, base = g, h.copy()
        else:
            right = g[rows] - np.matmul(h[rows], (fixed[rows] / scale[rows])[:, :, None])[:, :, 0]
            right = np.where(mask, right, 0.0)
            base = np.where(mask[:, :, None] & mask[:, None, :], h[rows], 0.0)
        base[:, diagonal, diagonal] += ~mask
        solution = np.zeros_like(right)
        todo = np.arange(len(rows))
        for _ in range(40):
            a = base[todo].copy()
            a[:, diagonal, diagonal] += damping[rows[todo], None]
            x, ok = _cholesky_solve(a, right[todo])
            solution[todo[ok]] = x[ok]
            todo = todo[~ok]
            if not len(todo):
                break
            # Indefinite: past the most negative curvature, in units of the majorising one.
            lowest = np.linalg.eigvalsh(base[todo])[:, 0]
            damping[rows[todo]] = np.maximum(2 * damping[rows[todo]], 1e-3 - 1.2 * lowest)
        step[rows] = np.where(mask, solution * scale[rows], fixed[rows])
        target = p[rows] + step[rows]
        crossing = moving[rows] & ((target < lower[rows]) | (target > upper[rows]))
        hit = crossing.any(axis=1)
        if not hit.any():
            break
        local = crossing[hit]
        rows = rows[hit]
        bound = np.where(p[rows] + step[rows] < lower[rows], lower[rows], upper[rows])
        fixed[rows] = np.where(local, bound - p[rows], fixed[rows])
        moving[rows] &= ~local
    trial = np.clip(p + step, lower, upper)
    shift = np.einsum("rke,re->rk", v, trial[:, smooth] - p[:, smooth])
    trial[:, :k_terms] *= np.exp(np.clip(shift, -50.0, 50.0))
    return np.clip(trial, lower, upper), damping


@dataclass(frozen=True)
class Batch:
    """Results of R fits: parameters (R, size), objective (R,) as the solver sums it, scaled gradient (R,),
    converged (R,), iterations (R,)."""

    p: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    converged: np.ndarray
    iterations: np.ndarray


def _newton_block(
    layout: Layout,
    p: np.ndarray,
    z: np.ndarray,
    weights: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    max_iterations: int,
    tolerance: float,
    width: float | None,
    damping: float,
) -> Batch:
    p = np.clip(p, lower, upper)
    shared = z.ndim == 1
    r_batch = len(p)
    state = derivatives(layout, p, z, weights, width)
    lam = np.full(r_batch, damping)
    iterations = np.zeros(r_batch, int)
    free = _free(p, state, lower, upper)
    small = scaled_gradient(state, free)
    active = np.flatnonzero(~(small < tolerance))
    for _ in range(max_iterations):
        if not len(active):
            break
        now = state.take(active)
        trial, used = _newton_step(p[active], now, free[active], lam[active], lower[active], upper[active])
        new = derivatives(layout, trial, z if shared else z[active], weights[active], width)
        new_free = _free(trial, new, lower[active], upper[active])
        new_small = scaled_gradient(new, new_free)
        # Near the optimum the objective only shows rounding: there a smaller gradient decides.
        noise = 1e-12 * (1 + np.abs(now.value))
        better = (new.value < now.value - noise) | (
            (new.value <= now.value + noise) & (new_small < small[active])
        )
        better &= np.isfinite(new.value) & np.isfinite(new.hessian).all(axis=(1, 2)) & np.isfinite(new_small)
        iterations[active] += 1
        rows = active[better]
        p[rows] = trial[better]
        state.put(rows, new, better)
        free[rows], small[rows] = new_free[better], new_small[better]
        lam[rows] = np.where(used[better] < 1e-8, 0.0, used[better] * 0.1)
        worse = active[~better]
        lam[worse] = np.maximum(used[~better] * 6, 1e-4)
        active = active[(small[active] >= tolerance) & (lam[active] < 1e12)]
    return Batch(p, state.value, small, small < tolerance, iterations)


def _threads() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def minimise(
    layout: Layout,
    start: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    z: np.ndarray | None = None,
    lower: np.ndarray | None = None,
    upper: np.ndarray | None = None,
    max_iterations: int = 100,
    tolerance: float = TOLERANCE,
    damping: float = 1e-3,
) -> Batch:
    """Local minima from `start` (R, size), one per row. `weights` (R, n) or (n,), `z` (R, n) or (n,),
    bounds (R, size) or (size,). Rows are independent, so the result does not depend on the batch."""
    start = np.atleast_2d(np.asarray(start, float))
    r_batch, n = len(start), layout.design.n_points
    z = observed(layout.objective, layout.design) if z is None else z
    weights = layout.design.weight if weights is None else weights
    default_lower, default_upper = layout.bounds()
    lower = np.broadcast_to(default_lower if lower is None else lower, start.shape)
    upper = np.broadcast_to(default_upper if upper is None else upper, start.shape)
    weights = np.broadcast_to(weights, (r_batch, n))

    def block(rows: slice) -> Batch:
        w, y = np.ascontiguousarray(weights[rows]), z if z.ndim == 1 else z[rows]
        p = start[rows].copy()
        steps = np.zeros(len(p), int)
        # A trial step may overflow: its value is then not finite, and the step is refused.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for width in _widths(layout, p, y, w):
                rough = _newton_block(
                    layout, p, y, w, lower[rows], upper[rows],
                    max_iterations=12, tolerance=1e-4, width=width, damping=1e-2,
                )  # fmt: skip
                p, steps = rough.p, steps + rough.iterations
            last = _newton_block(
                layout, p, y, w, lower[rows], upper[rows],
                max_iterations=max_iterations, tolerance=tolerance, width=None, damping=damping,
            )  # fmt: skip
        return replace(last, iterations=last.iterations + steps)

    step = max(1, BLOCK_ELEMENTS // max(n, 1))
    return _join(_map(block, [slice(i, min(i + step, r_batch)) for i in range(0, r_batch, step)]))


def _map(work: Callable[[slice], Batch], parts: list[slice]) -> list[Batch]:
    if len(parts) < 2 or _threads() < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(_threads()) as pool:
        return list(pool.map(work, parts))


def _join(parts: list[Batch]) -> Batch:
    return Batch(*(np.concatenate([getattr(b, f) for b in parts]) for f in Batch.__dataclass_fields__))


def _widths(layout: Layout, p: np.ndarray, z: np.ndarray, weights: np.ndarray) -> list[float]:
    """Huber zones to go through on the way to the wanted one: a narrow zone alone has many false stops."""
    if layout.objective.kind not in ("huber", "lad"):
        return []
    residual = np.abs(z - layout.model(p))
    scale = 0.5 * float(np.median(residual[weights > 0])) if np.any(weights > 0) else 1.0
    widths: list[float] = []
    while scale > 2 * layout.objective.width and len(widths) < 24:
        widths.append(scale)
        scale /= 5.0
    return widths


# ---- starts --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _exponent_grid(count: int, power: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(G, P + 1) coarse exponents and outer powers of the variable projection, and their ranks per column."""
    if count > 4:
        # Too many for a product: a fixed low-discrepancy set in log exponent.
        from scipy.stats import qmc

        unit = qmc.Sobol(count, scramble=False).random(512)[1:]
        grid = 0.05 * (2.5 / 0.05) ** unit
    else:
        cells = list(itertools.product(_EXPONENT_GRIDS.get(count, ()), repeat=count))
        grid = np.array(cells, float).reshape(len(cells), count)
    powers = (0.1, 0.2, 0.4, 0.8) if power is None else (power,)
    grid = np.concatenate([np.column_stack([grid, np.full(len(grid), q)]) for q in powers])
    ranks = np.stack([np.searchsorted(np.unique(col), col) for col in grid.T], axis=1)
    return grid, ranks


def _non_negative(gram: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """min c'Gc/2 - r'c over c >= 0 for a batch (..., K, K), (..., K), by trying every support (K <= 6)."""
    k_terms = gram.shape[-1]
    best = np.zeros(right.shape[:-1])
    solution = np.zeros_like(right)
    ridge = 1e-11 * np.einsum("...kk->...k", gram)
    for size in range(1, min(k_terms, 6) + 1):
        for support in itertools.combinations(range(k_terms), size):
            s = list(support)
            a = gram[..., s, :][..., :, s].copy()
            i = np.arange(size)
            a[..., i, i] += ridge[..., s] + 1e-300
            c = right[..., s] / a[..., 0] if size == 1 else np.linalg.solve(a, right[..., s, None])[..., 0]
            gain = np.einsum("...k,...k->...", c, right[..., s])
            better = np.all(c >= 0, axis=-1) & (gain > best)
            best = np.where(better, gain, best)
            full = np.zeros_like(right)
            full[..., s] = c
            solution = np.where(better[..., None], full, solution)
    return solution, best


def starts(layout: Layout, weights: np.ndarray | None = None, keep: int = 3) -> np.ndarray:
    """(R, keep, size) variable-projection starts for weights (R, n): a grid of exponents,
    relative residuals, non-negative amplitudes in closed form; distinct grid cells; zeros
    lifted to 1e-3 so that each term can move."""
    design = layout.design
    weights = np.atleast_2d(design.weight if weights is None else weights)
    grid, cells = _exponent_grid(layout.n_exponents, layout.power)
    value = np.maximum(np.abs(design.value), 1e-12)
    intercept = _rough_intercepts(layout, np.log(value), design.weight)
    free_value = value * np.exp(-intercept @ layout.contrasts) if len(intercept) else value
    probe = np.zeros((len(grid), layout.size))
    probe[:, layout.n_terms : layout.n_terms + layout.n_exponents] = grid[:, :-1]
    target = free_value[None, :] ** (1.0 / grid[:, -1:])
    columns = np.stack([layout._term(probe, k) / target for k in range(layout.n_terms)], axis=1)
    k_terms = layout.n_terms
    pairs = (columns[:, :, None, :] * columns[:, None, :, :]).reshape(-1, design.n_points)
    gram = (weights @ pairs.T).reshape(len(weights), len(grid), k_terms, k_terms)
    right = (weights @ columns.reshape(-1, design.n_points).T).reshape(len(weights), len(grid), k_terms)
    c, gain = _non_negative(gram, right)
    total = weights.sum(axis=1)[:, None]
    # Residuals are relative in L**(1/q): multiplied by q they are log residuals to first order.
    loss = np.maximum(total - gain, 0.0) * grid[:, -1] ** 2

    out = np.zeros((len(weights), keep, layout.size))
    for r in range(len(weights)):
        penalised = loss[r].copy()
        for i in range(keep):
            best = int(np.argmin(penalised))
            p = out[r, i]
            p[:k_terms] = np.maximum(c[r, best], 1e-3)
            p[k_terms : k_terms + layout.n_exponents] = grid[best, :-1]
            if layout.power is None:
                p[layout.n_law - 1] = grid[best, -1]
            p[layout.n_law : layout.n_model] = intercept
            near = np.max(np.abs(cells - cells[best]), axis=1) <= 1
            penalised[near] = np.inf
            if not np.isfinite(penalised).any():
                penalised = loss[r].copy()
    if layout.objective.has_scale:
        flat = out.reshape(-1, layout.size)
        residual = np.abs(np.log(value) - layout.model(flat)).reshape(len(weights), keep, -1)
        if np.all(weights > 0):
            middle = np.median(residual, axis=2)
        else:
            middle = np.nanmedian(np.where(weights[:, None, :] > 0, residual, np.nan), axis=2)
        out[..., -1] = np.log(np.maximum(1.2 * middle, 1e-3))
    return out


def _rough_intercepts(layout: Layout, log_value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Group contrasts of a weighted linear regression of log L on the logs of the variables."""
    groups = len(layout.contrasts)
    if not groups:
        return np.zeros(0)
    columns = np.vstack([np.ones(log_value.size), layout.design.x, layout.contrasts])
    root = np.sqrt(weight)
    solution = np.linalg.lstsq((columns * root).T, log_value * root, rcond=None)[0]
    return solution[-groups:]


# ---- one fit, with its certificate ---------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Why a fit may be believed: a stationary point, agreed on by several starts, with positive curvature.

    `smallest_hessian_eigenvalue`: of the free block scaled to a unit majorising diagonal. `flat`: True where
    that eigenvalue is zero to rounding, so that some parameter is not determined.
    """

    stationary: bool
    scaled_gradient: float
    active_bounds: tuple[str, ...]
    undetermined: tuple[str, ...]
    starts: int
    starts_agreeing: int
    smallest_hessian_eigenvalue: float
    iterations: int

    @property
    def flat(self) -> bool:
        return self.smallest_hessian_eigenvalue < 1e-9


@dataclass(frozen=True)
class Solution:
    """One fit: `p` (size,), the solver's objective and the reported one, Hessian (size, size),
    free mask (size,)."""

    layout: Layout
    p: np.ndarray
    value: float
    objective_value: float
    hessian: np.ndarray
    free: np.ndarray
    certificate: Certificate

    @property
    def scale(self) -> float | None:
        return float(np.exp(self.p[-1])) if self.layout.objective.has_scale else None

    def fitted(self) -> np.ndarray:
        """(n,) predicted log of L / median."""
        return self.layout.model(self.p[None])[0]

    def residuals(self) -> np.ndarray:
        """(n,) log residuals (NaN where L <= 0)."""
        value = self.layout.design.value
        return np.log(np.where(value > 0, value, np.nan)) - self.fitted()

    def raw(self) -> dict[str, float]:
        """Law parameters in the table's own units."""
        return {k: float(v[0]) for k, v in raw_parameters(self.layout, self.p[None]).items()}


def raw_parameters(layout: Layout, p: np.ndarray) -> dict[str, np.ndarray]:
    """Raw parameters of a batch (R, size): law parameters (R,); an exponent without a term left is NaN."""
    law, k_terms = layout.design.law, layout.n_terms
    c, theta = p[:, :k_terms], p[:, k_terms : k_terms + layout.n_exponents].copy()
    for e in range(layout.n_exponents):
        users = [k for k in range(k_terms) if e in layout.term_exponents[k]]
        theta[np.all(c[:, users] == 0, axis=1), e] = np.nan
    q = layout.power_of(p)
    amplitudes = layout.design.raw(c, theta, q)
    out = {name: amplitudes[:, k] for k, name in enumerate(law.amplitudes)}
    out |= {name: theta[:, i] for i, name in enumerate(law.exponents)}
    if isinstance(law.power, str):
        out[law.power] = q
    return out


def solve(design: Design, objective: Objective, *, extra_starts: np.ndarray | None = None) -> Solution:
    """The best of the local minima from the variable-projection starts. Raises UserError
    without a certificate."""
    layout = make_layout(design, objective)
    begin = starts(layout)[0]
    if extra_starts is not None:
        begin = np.concatenate([begin, np.atleast_2d(extra_starts)])
    batch = minimise(layout, begin, max_iterations=SINGLE_ITERATIONS, damping=1e-2, tolerance=POLISH)
    value = np.where(batch.gradient < TOLERANCE, batch.value, np.inf)
    if not np.isfinite(value).any():
        raise UserError(
            f"law {design.law.formula}: no start reached a stationary point "
            f"(smallest scaled gradient {batch.gradient.min():.1e}, wanted < {TOLERANCE:g})"
        )
    best = int(np.argmin(value))
    return certify(layout, batch.p[best], value, int(batch.iterations[best]))


def certify(layout: Layout, p: np.ndarray, start_values: np.ndarray, iterations: int) -> Solution:
    """Attach the certificate to a minimum `p` (size,), recomputed from scratch at that point."""
    z = observed(layout.objective, layout.design)
    d = derivatives(layout, p[None], z, layout.design.weight[None])
    lower, upper = layout.bounds()
    free = _free(p[None], d, lower, upper)[0]
    gradient = float(scaled_gradient(d, free[None])[0])
    value = float(d.value[0])
    scale = 1 / np.sqrt(np.maximum(d.curvature[0], 1e-300))
    block = (d.hessian[0] * scale[:, None] * scale)[np.ix_(free, free)]
    names = np.array(layout.names)
    dead = d.curvature[0] <= 1e-300
    agreeing = int(np.sum(np.abs(start_values - value) <= 1e-8 * max(1.0, abs(value))))
    certificate = Certificate(
        stationary=gradient < TOLERANCE,
        scaled_gradient=gradient,
        active_bounds=tuple(names[((p <= lower) | (p >= upper)) & ~dead]),
        undetermined=tuple(names[dead]),
        starts=len(start_values),
        starts_agreeing=agreeing,
        smallest_hessian_eigenvalue=float(np.linalg.eigvalsh(block)[0]) if free.any() else 0.0,
        iterations=iterations,
    )
    return Solution(
        layout,
        p,
        value,
        reported_value(layout.objective, layout.design, value),
        d.hessian[0],
        free,
        certificate,
    )
