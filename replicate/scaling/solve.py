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
from replicate.scaling.objective import SCALE_FLOOR, Loss, Objective, evaluate, observed, reported_value
from replicate.spec import UserError

#: A fit is stationary below TOLERANCE; single fits go on to POLISH while their gradient falls.
TOLERANCE, POLISH = 1e-9, 1e-12
#: Of one fit, or of a replicate that failed: lad on few points crawls from bend to bend, and does arrive.
SINGLE_ITERATIONS = 2000
EXPONENT_MAX = 10.0
POWER_RANGE = (1e-2, 10.0)
#: Points of one block of replicates. Half as many take a tenth to a sixth longer, the calls then cost more
#: than the arithmetic; twice as many gain nothing and leave small tables to one thread.
BLOCK_ELEMENTS = 1 << 15
_EXPONENT_GRIDS = {
    1: (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0),
    2: (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.5),
    3: (0.07, 0.2, 0.45, 0.9, 1.8),
    4: (0.1, 0.35, 0.8, 1.8),
}


@dataclass(frozen=True)
class Layout:
    """Where each kind of parameter sits in the vector, and the constant columns of the design.

    Term k is c_k exp(-sum_e theta_e shapes[k][e] - offsets[k]) over its exponents `term_exponents[k]`. For
    sums over the points, `moments` (n, sum of m + m m) holds the m shapes of each term and their products,
    those of term k from column `moment_columns[k]` on.
    """

    design: Design
    objective: Objective
    names: tuple[str, ...]
    n_terms: int
    n_exponents: int
    power: float | None
    shapes: tuple[np.ndarray, ...]
    term_exponents: tuple[tuple[int, ...], ...]
    offsets: tuple[np.ndarray | None, ...]
    moments: np.ndarray
    moment_columns: tuple[int, ...]
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
        members, offset = self.term_exponents[k], self.offsets[k]
        if not members and offset is None:
            return np.ones((len(p), self.design.n_points))
        if len(members) == 1:
            column = self.n_terms + members[0]
            exponent = -p[:, column : column + 1] * self.shapes[k]
        else:
            exponent = -p[:, [self.n_terms + e for e in members]] @ self.shapes[k]
        if offset is not None:
            exponent -= offset
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
    widths = [len(shape) * (1 + len(shape)) for shape in shapes]
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
        moments=np.concatenate([_moments(shape) for shape in shapes], axis=1),
        moment_columns=tuple(sum(widths[:k]) for k in range(len(widths))),
        contrasts=contrasts,
    )


def _moments(shape: np.ndarray) -> np.ndarray:
    m, n = shape.shape
    products = (shape[:, None, :] * shape[None]).reshape(m * m, n)
    return np.concatenate([shape, products]).T


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


@dataclass(frozen=True)
class Prediction:
    """Of a batch at its parameters: the terms without their amplitudes (R, K, n), q / f (R, n) with f their
    sum and q the outer power, log f and the predicted log m (R, n)."""

    terms: np.ndarray
    slope: np.ndarray
    log_f: np.ndarray
    m: np.ndarray


def predict(layout: Layout, p: np.ndarray) -> Prediction:
    """What the law says for a batch p (R, size), with what its derivatives need."""
    terms = np.empty((len(p), layout.n_terms, layout.design.n_points))
    f = np.zeros((len(p), layout.design.n_points))
    for k in range(layout.n_terms):
        terms[:, k] = u = layout._term(p, k)
        f += p[:, k : k + 1] * u
    np.maximum(f, 1e-300, out=f)
    m = log_f = np.log(f)
    q = layout.power_of(p)[:, None]
    if layout.power != 1.0:
        m = q * log_f
    if len(layout.contrasts):
        m = m + p[:, layout.n_law : layout.n_model] @ layout.contrasts
    return Prediction(terms, q / f, log_f, m)


def jacobian(layout: Layout, p: np.ndarray, at: Prediction | None = None) -> np.ndarray:
    """dm/d(law parameters) (R, n_law, n); `at`: the prediction there, if known."""
    at = predict(layout, p) if at is None else at
    k_terms = layout.n_terms
    jac = np.empty((len(p), layout.n_law, layout.design.n_points))
    np.multiply(at.terms, at.slope[:, None, :], out=jac[:, :k_terms])
    written = set()
    for k in range(k_terms):
        for e, x in zip(layout.term_exponents[k], layout.shapes[k], strict=True):
            # -c_k times the column of c_k, which also holds for c_k = 0.
            own = jac[:, k] * x
            own *= -p[:, k : k + 1]
            if e in written:
                jac[:, k_terms + e] += own
            else:
                jac[:, k_terms + e] = own
                written.add(e)
    if layout.power is None:
        jac[:, layout.n_law - 1] = at.log_f
    return jac


@dataclass(frozen=True)
class Outlook:
    """A prediction, the loss of every point there and the objective (R,): all but the derivatives in p."""

    prediction: Prediction
    loss: Loss
    value: np.ndarray

    def take(self, rows: np.ndarray) -> Outlook:
        """Of some rows of the batch."""
        at, loss = self.prediction, self.loss
        scale = (None if v is None else v[rows] for v in (loss.dt, loss.dmt, loss.dtt))
        return Outlook(
            Prediction(at.terms[rows], at.slope[rows], at.log_f[rows], at.m[rows]),
            Loss(loss.value[rows], loss.dm[rows], loss.dmm[rows], loss.curvature[rows], *scale),
            self.value[rows],
        )


def look(
    layout: Layout, p: np.ndarray, z: np.ndarray, weights: np.ndarray, width: float | None = None
) -> Outlook:
    """Objective of a batch. z (n,) or (R, n); weights (R, n); `width` overrides the huber zone."""
    at = predict(layout, p)
    tau = p[:, -1] if layout.objective.has_scale else np.zeros(len(p))
    loss = evaluate(layout.objective, layout.design, z, at.m, tau, width)
    return Outlook(at, loss, np.vecdot(weights, loss.value))


def derivatives(
    layout: Layout, p: np.ndarray, z: np.ndarray, weights: np.ndarray, width: float | None = None
) -> Derivatives:
    """Objective of a batch with its exact gradient and Hessian. z (n,) or (R, n); weights (R, n)."""
    return differentiate(layout, p, weights, look(layout, p, z, weights, width))


def differentiate(layout: Layout, p: np.ndarray, weights: np.ndarray, at: Outlook) -> Derivatives:
    """`derivatives` at what `look` found for the same batch and weights."""
    r_batch, size, n_law, n_model = len(p), layout.size, layout.n_law, layout.n_model
    k_terms, k_smooth = layout.n_terms, layout.n_terms + layout.n_exponents
    loss, jac = at.loss, jacobian(layout, p, at.prediction)
    tau = p[:, -1] if layout.objective.has_scale else np.zeros(r_batch)
    q = layout.power_of(p)[:, None]

    wdm, wdmm, curved = weights * loss.dm, weights * loss.dmm, weights * loss.curvature
    contrasts = layout.contrasts
    gradient = np.empty((r_batch, size))
    hessian = np.zeros((r_batch, size, size))
    curvature = np.empty((r_batch, size))
    norm2 = np.ones((r_batch, size))
    squares = jac * jac
    gradient[:, :n_law] = np.vecdot(jac, wdm[:, None, :])
    curvature[:, :n_law] = np.vecdot(squares, curved[:, None, :])
    norm2[:, :n_law] = np.vecdot(squares, weights[:, None, :])
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
        full[:, :k_smooth, :k_smooth] -= np.matmul(inner * (wdm / q)[:, None, :], inner.transpose(0, 2, 1))
        cross = gradient[:, :k_smooth] / q
        full[:, :k_smooth, -1] += cross
        full[:, -1, :k_smooth] += cross
    else:
        wdmm -= wdm / q
        full = np.matmul(jac * wdmm[:, None, :], jac.transpose(0, 2, 1))
    # What is left, F, and the places where the terms weigh most are moments of each term's own column.
    amplitude, own = p[:, :k_terms], jac[:, :k_terms]
    n, shape = layout.design.n_points, (r_batch, k_terms, layout.moments.shape[1])
    pull = ((own * wdm[:, None, :]).reshape(-1, n) @ layout.moments).reshape(shape)
    spread = ((squares[:, :k_terms] * curved[:, None, :]).reshape(-1, n) @ layout.moments).reshape(shape)
    floor = np.maximum(curvature[:, :k_terms], 1e-300)
    centre = np.zeros((r_batch, k_terms, layout.n_exponents))
    for k, members in enumerate(layout.term_exponents):
        n_own, first = len(members), layout.moment_columns[k]
        for i, e in enumerate(members):
            centre[:, k, e] = spread[:, k, first + i] / floor[:, k]
            full[:, k, k_terms + e] -= pull[:, k, first + i]
            full[:, k_terms + e, k] -= pull[:, k, first + i]
            for j, e2 in enumerate(members):
                full[:, k_terms + e, k_terms + e2] += (
                    pull[:, k, first + n_own * (1 + i) + j] * amplitude[:, k]
                )
    hessian[:, :n_law, :n_law] = full
    total = weights.sum(axis=1)
    size_dm = np.sqrt(np.vecdot(wdm, loss.dm))
    unit = np.maximum(size_dm, layout.objective.gradient_unit(tau) * np.sqrt(total))
    yardstick = np.sqrt(norm2) * unit[:, None]
    if layout.objective.has_scale:
        assert loss.dt is not None
        assert loss.dmt is not None
        assert loss.dtt is not None
        wdmt = weights * loss.dmt
        gradient[:, -1] = np.vecdot(weights, loss.dt)
        hessian[:, -1, -1] = np.vecdot(weights, loss.dtt)
        hessian[:, -1, :n_law] = np.vecdot(jac, wdmt[:, None, :])
        if n_model > n_law:
            hessian[:, -1, n_law:n_model] = wdmt @ contrasts.T
        hessian[:, :-1, -1] = hessian[:, -1, :-1]
        curvature[:, -1] = yardstick[:, -1] = total
    return Derivatives(
        value=at.value,
        gradient=gradient,
        hessian=hessian,
        curvature=curvature,
        yardstick=yardstick,
        centre=centre,
        mass=amplitude**2 * curvature[:, :k_terms],
    )


def _free(p: np.ndarray, d: Derivatives, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Parameters that may move: not held at a bound by the gradient, and with any effect at all."""
    held = ((p <= lower) & (d.gradient >= 0)) | ((p >= upper) & (d.gradient <= 0)) | (lower >= upper)
    return ~held & (d.curvature > 1e-300)


def scaled_gradient(d: Derivatives, free: np.ndarray) -> np.ndarray:
    """(R,) largest free gradient component in units of its yardstick (a cosine, MINPACK's gtol)."""
    ratio = np.abs(d.gradient) / np.maximum(d.yardstick, 1e-300)
    return np.max(np.where(free, ratio, 0.0), axis=1)


def _damped_solve(a: np.ndarray, b: np.ndarray, damping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a + damping) x = b for a batch (R, P, P), (R, P), with the damping (R,) raised past the most negative
    eigenvalue where a is indefinite; returns x and the damping used."""
    shifted, diagonal = a.copy(), np.arange(a.shape[1])
    shifted[:, diagonal, diagonal] += damping[:, None]
    try:
        np.linalg.cholesky(shifted)
        return np.linalg.solve(shifted, b[:, :, None])[:, :, 0], damping
    except np.linalg.LinAlgError:
        pass  # some row is indefinite
    values, vectors = np.linalg.eigh(a)
    lowest = values[:, 0]
    # a has a unit majorising diagonal, so these are relative bars. Barely past the eigenvalue the step is
    # long, and leads up more often than not.
    damping = np.where(lowest + damping > 1e-13, damping, np.maximum(2 * damping, 1e-3 - 2 * lowest))
    x = np.matmul(b[:, None, :], vectors)[:, 0] / (values + damping[:, None])
    return np.matmul(vectors, x[:, :, None])[:, :, 0], damping


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
    diagonal = np.arange(p.shape[1])
    v, pull = d.centre, d.gradient[:, :k_terms]
    # Chain rule for c(step, step_e): dc/de = c v, d2c/(dstep de) = v, d2c/(de de') = c v v'.
    change = p[:, :k_terms, None] * v
    back, mixed = change.transpose(0, 2, 1), pull[:, :, None] * v
    gradient, hessian = d.gradient.copy(), d.hessian.copy()
    gradient[:, smooth] += np.vecdot(back, pull[:, None, :])
    hessian[:, :, smooth] += np.matmul(hessian[:, :, :k_terms], change)
    hessian[:, smooth] += np.matmul(back, hessian[:, :k_terms])
    hessian[:, smooth, smooth] += np.matmul(back, mixed)
    hessian[:, :k_terms, smooth] += mixed
    hessian[:, smooth, :k_terms] += mixed.transpose(0, 2, 1)
    curvature = d.curvature.copy()
    curvature[:, smooth] = np.maximum(
        curvature[:, smooth] - (d.mass[:, :, None] * v * v).sum(axis=1), 1e-4 * curvature[:, smooth]
    )
    unit = np.sqrt(np.maximum(curvature, 1e-300))
    scale = np.where(free, 1.0 / unit, 0.0)
    h = hessian * (scale[:, :, None] * scale[:, None, :])
    h[:, diagonal, diagonal] += ~free
    g = -gradient * scale
    solution, damping = _damped_solve(h, g, damping)
    damping, fixed, moving = damping.copy(), np.zeros_like(p), free.copy()
    target = p + solution * scale
    rows = np.arange(len(p))
    for _ in range(2):
        crossing = moving[rows] & ((target[rows] < lower[rows]) | (target[rows] > upper[rows]))
        hit = crossing.any(axis=1)
        if not hit.any():
            break
        local, rows = crossing[hit], rows[hit]
        bound = np.where(target[rows] < lower[rows], lower[rows], upper[rows])
        fixed[rows] = np.where(local, bound - p[rows], fixed[rows])
        moving[rows] &= ~local
        mask, block = moving[rows], h[rows]
        known = np.matmul(block, (fixed * unit)[rows, :, None])[:, :, 0]
        block = np.where(mask[:, :, None] & mask[:, None, :], block, 0.0)
        block[:, diagonal, diagonal] += ~mask
        right = np.where(mask, g[rows] - known, 0.0)
        solution, damping[rows] = _damped_solve(block, right, damping[rows])
        target[rows] = p[rows] + np.where(mask, solution * scale[rows], fixed[rows])
    trial = np.minimum(np.maximum(target, lower), upper)
    shift = np.vecdot(v, (trial - p)[:, None, smooth])
    trial[:, :k_terms] *= np.exp(np.minimum(np.maximum(shift, -50.0), 50.0))
    return np.minimum(np.maximum(trial, lower), upper), damping


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
    known = np.isfinite(state.value) & np.isfinite(state.hessian).all(axis=(1, 2))
    active = np.flatnonzero(known & ~(small < tolerance))
    for _ in range(max_iterations):
        if not len(active):
            break
        # Views instead of copies while every row is at work: of few rows, copying is most of the cost.
        rows = slice(None) if len(active) == r_batch else active
        now = state if len(active) == r_batch else state.take(active)
        trial, used = _newton_step(p[rows], now, free[rows], lam[rows], lower[rows], upper[rows])
        iterations[rows] += 1
        ahead = look(layout, trial, z if shared else z[rows], weights[rows], width)
        # Near the optimum the objective only shows rounding: there a smaller gradient decides. A likelihood
        # may be near 0 by cancellation, a sum of losses only where every loss is.
        noise = 1e-12 * (np.abs(now.value) + layout.objective.has_scale)
        # Derivatives are most of the work, and not for steps that lead up.
        viable = np.flatnonzero(np.isfinite(ahead.value) & (ahead.value <= now.value + noise))
        better = np.zeros(len(active), bool)
        if viable.size:
            if viable.size < len(active):
                ahead, trial = ahead.take(viable), trial[viable]
            places = active[viable]
            new = differentiate(layout, trial, weights[places], ahead)
            new_free = _free(trial, new, lower[places], upper[places])
            new_small = scaled_gradient(new, new_free)
            good = (new.value < (now.value - noise)[viable]) | (new_small < small[places])
            good &= np.isfinite(new.hessian).all(axis=(1, 2)) & np.isfinite(new_small)
            better[viable] = good
            if good.all() and viable.size == r_batch:
                p, state, free, small = trial, new, new_free, new_small
            else:
                done = places[good]
                p[done] = trial[good]
                state.put(done, new, good)
                free[done], small[done] = new_free[good], new_small[good]
        lam[rows] = np.where(better, np.where(used < 1e-8, 0.0, used * 0.1), np.maximum(used * 6, 1e-4))
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
    gradual: bool = False,
) -> Batch:
    """Local minima from `start` (R, size), one per row. `weights` (R, n) or (n,), `z` (R, n) or (n,),
    bounds (R, size) or (size,). Rows are independent; of the batch, they share only the huber zones that
    they go through on the way. `gradual`: narrower steps from zone to zone, for what is hard to reach."""
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
            for width in _widths(layout, p, y, w, gradual):
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


def _widths(layout: Layout, p: np.ndarray, z: np.ndarray, weights: np.ndarray, gradual: bool) -> list[float]:
    """Huber zones to go through on the way to the wanted one: a narrow zone alone has many false stops."""
    if layout.objective.kind not in ("huber", "lad"):
        return []
    residual = np.abs(z - layout.model(p))
    scale = 0.5 * float(np.median(residual[weights > 0])) if np.any(weights > 0) else 1.0
    factor, nearest = (2.0, 1.4) if gradual else (5.0, 4.0)
    widths: list[float] = []
    while scale > nearest * layout.objective.width and len(widths) < 40:
        widths.append(scale)
        scale /= factor
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
    """min c'Gc/2 - r'c over c >= 0 for a batch (B, K, K), (B, K), by trying every support (of up to 6);
    c (B, K) and the gain r'c (B,)."""
    k_terms = gram.shape[-1]
    diagonal = np.arange(k_terms)
    # A ridge against collinear terms.
    gram = gram.copy()
    gram[:, diagonal, diagonal] = gram[:, diagonal, diagonal] * (1 + 1e-11) + 1e-300
    # Where all terms together are positive, nothing is better.
    solution = np.linalg.solve(gram, right[:, :, None])[:, :, 0]
    rest = np.flatnonzero(~(solution > 0).all(axis=1))
    supports = [s for size in range(1, min(k_terms, 7)) for s in itertools.combinations(range(k_terms), size)]
    if rest.size and supports:
        inside = np.zeros((len(supports), k_terms))
        for i, support in enumerate(supports):
            inside[i, list(support)] = 1.0
        both = inside[:, :, None] * inside[:, None, :]
        step = max(1, (1 << 20) // (both.size + 1))
        for rows in (rest[i : i + step] for i in range(0, rest.size, step)):
            r = right[rows, None, :] * inside
            a = gram[rows, None] * both
            a[..., diagonal, diagonal] += 1 - inside
            c = np.linalg.solve(a, r[..., None])[..., 0]
            gain = np.where((c >= 0).all(axis=-1), np.vecdot(c, r), 0.0)
            chosen = np.argmax(gain, axis=1)
            solution[rows] = np.where(gain.max(axis=1) > 0, c[np.arange(rows.size), chosen].T, 0.0).T
    return solution, np.vecdot(solution, right)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row of (C, m) stands first, and which of these every row equals (C,)."""
    if rows.shape[1] == 0:
        return np.zeros(1, int), np.zeros(len(rows), int)
    keys, axis = (rows[:, 0], None) if rows.shape[1] == 1 else (rows, 0)
    _, first, inverse = np.unique(keys, axis=axis, return_index=True, return_inverse=True)
    return first, inverse.ravel()


def _project(
    layout: Layout, grid: np.ndarray, value: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes (R, C, K) >= 0 and losses (R, C) of the best relative fit to `value` (n,) for each row of
    exponents and outer power in `grid` (C, P + 1), under weights (R, n)."""
    k_terms, count = layout.n_terms, len(grid)
    tables, cells = [], []
    for k, members in enumerate(layout.term_exponents):
        # A term sees few of the exponents: many rows of the grid share its column.
        seen = grid[:, [*members, -1] if layout.power is None else list(members)]
        first, cell = _distinct(seen)
        probe = np.zeros((len(first), layout.size))
        probe[:, k_terms : k_terms + layout.n_exponents] = grid[first, :-1]
        target = value if layout.power == 1.0 else value ** (1.0 / grid[first, -1:])
        tables.append(layout._term(probe, k) / target)
        cells.append(cell)
    gram = np.empty((len(weights), count, k_terms, k_terms))
    right = np.empty((len(weights), count, k_terms))
    for k, (one, at) in enumerate(zip(tables, cells, strict=True)):
        right[:, :, k] = (weights @ one.T)[:, at]
        for j in range(k + 1):
            other, there = tables[j], cells[j]
            if len(one) * len(other) <= count:
                products = np.matmul(one * weights[:, None, :], other.T)[:, at, there]
            else:
                products = weights @ (one[at] * other[there]).T
            gram[:, :, k, j] = gram[:, :, j, k] = products
    c, gain = _non_negative(gram.reshape(-1, k_terms, k_terms), right.reshape(-1, k_terms))
    c, gain = c.reshape(len(weights), len(grid), k_terms), gain.reshape(len(weights), len(grid))
    # Residuals are relative in L**(1/q): multiplied by q they are log residuals to first order.
    return c, np.maximum(weights.sum(axis=1)[:, None] - gain, 0.0) * grid[:, -1] ** 2


def starts(layout: Layout, weights: np.ndarray | None = None, keep: int = 3) -> np.ndarray:
    """(R, keep, size) variable-projection starts for weights (R, n): a grid of exponents,
    relative residuals, non-negative amplitudes in closed form; distinct grid cells, those of a single fit
    refined to half a cell; zeros lifted to 1e-3 so that each term can move."""
    design, k_terms, n_exponents = layout.design, layout.n_terms, layout.n_exponents
    weights = np.atleast_2d(design.weight if weights is None else weights)
    grid, cells = _exponent_grid(n_exponents, layout.power)
    value = np.maximum(np.abs(design.value), 1e-12)
    intercept = _rough_intercepts(layout, np.log(value), design.weight)
    free_value = value * np.exp(-intercept @ layout.contrasts) if len(intercept) else value
    c, loss = _project(layout, grid, free_value, weights)

    picked = np.empty((len(weights), keep), int)
    for r in range(len(weights)):
        penalised = loss[r].copy()
        for i in range(keep):
            picked[r, i] = best = int(np.argmin(penalised))
            penalised[np.max(np.abs(cells - cells[best]), axis=1) <= 1] = np.inf
            if not np.isfinite(penalised).any():
                penalised = loss[r].copy()
    place, amplitudes = grid[picked], np.take_along_axis(c, picked[:, :, None], axis=1)
    if len(weights) == 1 and 0 < n_exponents <= 4:
        place[0], amplitudes[0] = _refined(layout, place[0], free_value, weights)
    out = np.zeros((len(weights), keep, layout.size))
    out[..., :k_terms] = np.maximum(amplitudes, 1e-3)
    out[..., k_terms : k_terms + n_exponents] = place[..., :-1]
    if layout.power is None:
        out[..., layout.n_law - 1] = place[..., -1]
    out[..., layout.n_law : layout.n_model] = intercept
    if layout.objective.has_scale:
        flat = out.reshape(-1, layout.size)
        residual = np.abs(np.log(value) - layout.model(flat)).reshape(len(weights), keep, -1)
        if np.all(weights > 0):
            middle = np.median(residual, axis=2)
        else:
            middle = np.nanmedian(np.where(weights[:, None, :] > 0, residual, np.nan), axis=2)
        out[..., -1] = np.log(np.maximum(1.2 * middle, 1e-3))
    return out


#: Factors of the exponents around a grid cell: about one cell and half a cell wide.
_REFINEMENTS = (1.6, 1.27)


def _refined(
    layout: Layout, places: np.ndarray, value: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best neighbours of grid cells (S, P + 1) and their amplitudes (S, K), in two finer grids around
    each of them."""
    rows = np.arange(len(places))
    for factor in _REFINEMENTS:
        steps = np.array(list(itertools.product((1 / factor, 1.0, factor), repeat=layout.n_exponents)))
        around = np.repeat(places[:, None], len(steps), axis=1)
        around[..., :-1] *= steps
        c, loss = _project(layout, around.reshape(-1, places.shape[1]), value, weights)
        best = np.argmin(loss.reshape(len(places), -1), axis=1)
        places, amplitudes = around[rows, best], c.reshape(len(places), len(steps), -1)[rows, best]
    return places, amplitudes


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


#: Exponents tried for a term that a fit has given up.
_ESCAPE_GRID = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def escapes(
    layout: Layout, p: np.ndarray, weights: np.ndarray, z: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Would a term that does nothing at p (R, size), weights (R, n), be of use with other exponents?

    z (n,) or (R, n). Such a term has amplitude 0, or exponents 0 beside another constant term. It is
    stationary whatever its exponents could do, so the gradient alone does not show it. Returns the rows
    where one would (R,), and starts (R, size) that let the most promising one in.
    """
    k_terms = layout.n_terms
    z = observed(layout.objective, layout.design) if z is None else z
    begin, most = p.copy(), np.zeros(len(p))
    theta = p[:, k_terms : k_terms + layout.n_exponents]
    constant = np.stack(
        [
            np.all(theta[:, list(members)] == 0, axis=1) & (layout.offsets[k] is None) & (p[:, k] > 0)
            for k, members in enumerate(layout.term_exponents)
        ],
        axis=1,
    )
    for k, members in enumerate(layout.term_exponents):
        spare = constant[:, k] & (constant.sum(axis=1) > 1)
        rows = np.flatnonzero((p[:, k] == 0) | spare)
        if not members or not rows.size:
            continue
        at = look(layout, p[rows], z if z.ndim == 1 else z[rows], weights[rows])
        loss, log_f = at.loss, at.prediction.log_f
        axes = np.meshgrid(*[np.array(_ESCAPE_GRID)] * len(members))
        grid = np.stack([a.ravel() for a in axes], axis=1)
        shape = -grid @ layout.shapes[k]
        top = shape.max(axis=1)
        columns = np.exp(shape - top[:, None]).T
        # One Newton step in the amplitude: its length, and what the objective falls by.
        slope = np.minimum((weights[rows] * loss.dm * np.exp(-log_f)) @ columns, 0.0)
        bend = (weights[rows] * loss.curvature * np.exp(-2 * log_f)) @ columns**2
        length = -slope / np.maximum(bend, 1e-300)
        gain = -0.5 * slope * length
        best = np.argmax(gain, axis=1)
        for i, row in enumerate(rows):
            if gain[i, best[i]] <= max(most[row], 1e-8 * (1 + abs(at.value[i]))):
                continue
            most[row] = gain[i, best[i]]
            begin[row] = p[row]
            if spare[row]:
                heir = next(j for j in range(k_terms) if constant[row, j] and j != k)
                begin[row, heir] += p[row, k]
            begin[row, k] = length[i, best[i]] * np.exp(-top[best[i]])
            begin[row, [k_terms + e for e in members]] = grid[best[i]]
    return most > 0, begin


def solve(design: Design, objective: Objective, *, extra_starts: np.ndarray | None = None) -> Solution:
    """The best of the local minima from the variable-projection starts, and from those that let a term in
    that the best one has given up. Raises UserError without a certificate."""
    layout = make_layout(design, objective)
    begin = starts(layout)[0]
    if extra_starts is not None:
        begin = np.concatenate([begin, np.atleast_2d(extra_starts)])
    local = functools.partial(
        minimise, layout, max_iterations=SINGLE_ITERATIONS, damping=1e-2, tolerance=POLISH
    )
    batch = local(begin)
    value, best = _stationary_values(batch)
    if not np.isfinite(value[best]):
        batch = local(begin, gradual=True)
        value, best = _stationary_values(batch)
    for _ in range(layout.n_terms):
        found, begin = escapes(layout, batch.p[best : best + 1], design.weight[None])
        if not found[0]:
            break
        before, batch = value[best], _join([batch, local(begin)])
        value, best = _stationary_values(batch)
        if not value[best] < before:
            break
    if not np.isfinite(value[best]):
        raise UserError(
            f"law {design.law.formula}: no start reached a stationary point "
            f"(smallest scaled gradient {batch.gradient.min():.1e}, wanted < {TOLERANCE:g})"
        )
    return certify(layout, batch.p[best], value, int(batch.iterations[best]))


def _stationary_values(batch: Batch) -> tuple[np.ndarray, int]:
    """Objectives of the stationary points, infinite elsewhere, and the index of the lowest."""
    value = np.where(batch.gradient < TOLERANCE, batch.value, np.inf)
    return value, int(np.argmin(value))


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
