"""Compute-optimal allocation of a fitted law, with its uncertainty and its guards (FIT section 7).

A budget C (FLOP) buys C = |S| D' kappa(N): the batch drops out of T B = D' |S|. kappa (FLOP per unique
sample) is a posynomial in N, linear at leading order and with a sqrt(N) part from attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from replicate.scaling.solve import EXPONENT_MAX
from replicate.spec import UserError

#: An exponent whose interval reaches down to this is not told apart from "does not matter".
EXPONENT_GUARD = 0.02
REGRET = 0.05
Number = np.ndarray | float
#: Amplitude and exponent of each term that an optimum balances.
SIZE_AND_TIME = (("A1", "a1"), ("A2", "a2"))
MODULUS_PHASE_TIME = (("A1", "a1"), ("A3", "a3"), ("A2", "a2"))
NO_OPTIMUM = "no interior optimum identified"


@dataclass(frozen=True)
class Kappa:
    """kappa(N) = sum_j k_j N^p_j, FLOP per unique sample and step; `powers` in [0, 1]."""

    coefficients: tuple[float, ...]
    powers: tuple[float, ...]
    source: str = ""

    @property
    def linear(self) -> bool:
        return all(p == 1.0 for p, k in zip(self.powers, self.coefficients, strict=True) if k)

    def parts(self, log_n: Number) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ln kappa, eps = dln kappa/dln N and deps/dln N at ln N."""
        log_n = np.asarray(log_n, float)
        used = [(k, p) for k, p in zip(self.coefficients, self.powers, strict=True) if k > 0]
        terms = np.array([np.log(k) + p * log_n for k, p in used])
        top = terms.max(axis=0)
        share = np.exp(terms - top)
        total = share.sum(axis=0)
        share = share / total
        p = np.array([p for _, p in used]).reshape((-1,) + (1,) * log_n.ndim)
        eps = (share * p).sum(axis=0)
        return top + np.log(total), eps, (share * p * p).sum(axis=0) - eps**2

    def __call__(self, n: Number) -> np.ndarray:
        return np.exp(self.parts(np.log(n))[0])


def linear_kappa(kind: str, n_qubits: int, unique_flips: int, rho: float, *, kv_cache: bool = False) -> Kappa:
    """Leading order of SCIENCE section 7: C = |S| k N D', rho = N_mod / N."""
    tokens, m3 = n_qubits / 2, unique_flips + 3
    if kind == "made":
        k = rho * n_qubits + 2 * m3
    elif kind == "transformer":
        sampling = 2 * tokens if kv_cache else tokens * (tokens + 1)
        k = rho * (sampling + 2 * tokens * m3) + 2 * (1 - rho) * m3
    elif kind == "retnet":
        k = 2 * tokens * rho * (unique_flips + 4) + 2 * (1 - rho) * m3
    else:
        raise UserError(f"no FLOP model for an ansatz of kind {kind!r}: use one that the study has trained")
    return Kappa((float(k),), (1.0,), f"leading order, {kind}")


def fitted_kappa(n: np.ndarray, flops: np.ndarray, space: float, d_prime: np.ndarray, source: str) -> Kappa:
    """kappa from the FLOPs of the study's own points of one molecule and ansatz: k1 N + k2 sqrt(N) + k3 >= 0,
    least relative squares."""
    from scipy.optimize import nnls

    per_sample = flops / (space * d_prime)
    good = np.isfinite(per_sample) & (per_sample > 0) & (n > 0)
    if good.sum() < 2 or np.ptp(np.log(n[good])) == 0:
        raise UserError(f"{source}: {int(good.sum())} points with FLOPs and at least 2 sizes are needed")
    powers = (1.0, 0.5, 0.0)
    columns = np.stack([n[good] ** p / per_sample[good] for p in powers], axis=1)
    length = np.linalg.norm(columns, axis=0)
    coefficients = nnls(columns / length, np.ones(int(good.sum())))[0] / length
    # Less than a millionth of the cost is rounding of the fit, and would only hide that kappa is linear.
    share = coefficients * np.array([np.median(n[good]) ** p for p in powers])
    coefficients = np.where(share < 1e-6 * share.sum(), 0.0, coefficients)
    return Kappa(tuple(float(k) for k in coefficients), powers, source)


def split_cost(
    modulus: np.ndarray, phase: np.ndarray, flops: np.ndarray, space: float, d_prime: np.ndarray, source: str
) -> tuple[float, float]:
    """(k_modulus, k_phase): FLOP per unique sample = k_modulus N_mod + k_phase N_ph, least relative squares.

    The leading order of SCIENCE section 7; attention and constants are spread over the two.
    """
    from scipy.optimize import nnls

    per_sample = flops / (space * d_prime)
    good = np.isfinite(per_sample) & (per_sample > 0)
    columns = np.stack([modulus[good], phase[good]], axis=1) / per_sample[good, None]
    if good.sum() < 2 or np.linalg.cond(columns / np.linalg.norm(columns, axis=0)) > 1e6:
        raise UserError(f"{source}: the costs of modulus and phase cannot be told apart")
    k_modulus, k_phase = nnls(columns, np.ones(int(good.sum())))[0]
    if min(k_modulus, k_phase) <= 0:
        raise UserError(f"{source}: the costs of modulus and phase cannot be told apart")
    return float(k_modulus), float(k_phase)


@dataclass(frozen=True)
class Optimum:
    """Minimum of A1 N^-a1 + A2 D^-a2 on C = |S| D kappa(N); arrays broadcast over draws and budgets.

    `stiffness`: S = a1 + a2 eps + eps'/eps. `exponent`: dlnN*/dlnC = a2 / S.
    """

    log_n: np.ndarray
    log_d: np.ndarray
    stiffness: np.ndarray
    exponent: np.ndarray


def closed_form(
    A1: Number, a1: Number, A2: Number, a2: Number, budget: Number, space: float, k: float
) -> Optimum:
    """kappa = k N (SCIENCE 7): N* = G X^(a2/(a1+a2)), X = C / (k |S|), G = (a1 A1 / a2 A2)^(1/(a1+a2))."""
    total = np.asarray(a1) + a2
    log_x = np.log(budget) - np.log(k * space)
    log_g = (np.log(np.multiply(a1, A1)) - np.log(np.multiply(a2, A2))) / total
    log_n = log_g + log_x * a2 / total
    return Optimum(log_n, log_x - log_n, total + 0 * log_n, a2 / total + 0 * log_n)


def optimum(
    A1: Number, a1: Number, A2: Number, a2: Number, budget: Number, space: float, kappa: Kappa
) -> Optimum:  # fmt: skip
    """The one root of a1 A1 N^-a1 / eps(N) = a2 A2 D'^-a2 in ln N: bracketed Newton on a monotone function.

    Raises UserError for non-positive parameters: there is no optimum then.
    """
    A1, a1, A2, a2, budget = np.broadcast_arrays(*(np.asarray(v, float) for v in (A1, a1, A2, a2, budget)))
    if not all(np.all(v > 0) for v in (A1, a1, A2, a2, budget)):
        raise UserError(f"{NO_OPTIMUM}: amplitudes, exponents and budget must be positive")
    if kappa.linear:
        return closed_form(A1, a1, A2, a2, budget, space, float(kappa(1.0)))
    log_x = np.log(budget / space)
    left, right = np.log(a1 * A1), np.log(a2 * A2)

    def excess(log_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_k, eps, slope = kappa.parts(log_n)
        value = left - a1 * log_n - np.log(eps) - right + a2 * (log_x - log_k)
        return value, a1 + a2 * eps + slope / eps

    lo, hi = np.full(A1.shape, -100.0), np.full(A1.shape, 300.0)
    # Start at the closed form of the linear part's neighbourhood: any point in the bracket will do.
    x = np.clip((left - right + a2 * log_x) / (a1 + a2), -50, 150)
    for _ in range(200):
        value, slope = excess(x)
        lo, hi = np.where(value > 0, x, lo), np.where(value > 0, hi, x)
        step = x + value / slope
        step = np.where((step > lo) & (step < hi), step, 0.5 * (lo + hi))
        done = np.abs(step - x) <= 1e-15 * np.maximum(1.0, np.abs(x))
        x = step
        if np.all(done):
            break
    log_k, eps, slope = kappa.parts(x)
    stiffness = a1 + a2 * eps + slope / eps
    return Optimum(x, log_x - log_k, stiffness, a2 / stiffness)


def gradient(best: Optimum, a1: Number, a2: Number) -> np.ndarray:
    """dlnN*/d(lnA1, a1, lnA2, a2), (..., 4): [1, 1/a1 - lnN*, -1, -1/a2 + lnD'*] / S."""
    one = np.ones_like(best.log_n)
    rows = [one, 1 / np.asarray(a1) - best.log_n, -one, -1 / np.asarray(a2) + best.log_d]
    return np.stack(rows, axis=-1) / best.stiffness[..., None]


def modulus_phase_optimum(
    A1: float, a1: float, A3: float, a3: float, A2: float, a2: float, budget: float, space: float,
    k_modulus: float, k_phase: float,
) -> tuple[float, float, float]:  # fmt: skip
    """ln N_mod*, ln N_ph*, ln D'* for A1 M^-a1 + A3 P^-a3 + A2 D^-a2 on C = |S| D (k_modulus M + k_phase P).

    A geometric program: with D eliminated the objective is convex in (ln M, ln P), so Newton
    finds the minimum.
    """
    if min(A1, a1, A3, a3, A2, a2) <= 0:
        raise UserError(f"{NO_OPTIMUM}: every amplitude and exponent of the law must be positive")
    log_x = np.log(budget / space)

    def value(v: np.ndarray) -> float:
        return float(
            A1 * np.exp(-a1 * v[0]) + A3 * np.exp(-a3 * v[1])
            + A2 * np.exp(-a2 * (log_x - np.logaddexp(np.log(k_modulus) + v[0], np.log(k_phase) + v[1])))
        )  # fmt: skip

    start = closed_form(A1, a1, A2, a2, budget, space, k_modulus + k_phase)
    v = np.array([float(start.log_n), float(start.log_n)])
    for _ in range(500):
        log_k = np.logaddexp(np.log(k_modulus) + v[0], np.log(k_phase) + v[1])
        share = np.exp(np.array([np.log(k_modulus) + v[0], np.log(k_phase) + v[1]]) - log_k)
        gain = np.array([a1 * A1 * np.exp(-a1 * v[0]), a3 * A3 * np.exp(-a3 * v[1])])
        loss = a2 * A2 * np.exp(-a2 * (log_x - log_k))
        slope = loss * share - gain
        hessian = np.diag(np.array([a1, a3]) * gain + loss * share) + loss * (a2 - 1) * np.outer(share, share)
        step = -np.linalg.solve(hessian, slope)
        step *= min(1.0, 3.0 / max(float(np.abs(step).max()), 1e-300))
        now, t = value(v), 1.0
        while value(v + t * step) > now * (1 + 1e-15) and t > 1e-8:
            t *= 0.5
        v = v + t * step
        if np.abs(step).max() < 1e-13:
            break
    log_k = np.logaddexp(np.log(k_modulus) + v[0], np.log(k_phase) + v[1])
    return float(v[0]), float(v[1]), float(log_x - log_k)


def regret_band(
    A0: float, A1: float, a1: float, A2: float, a2: float, budget: float, space: float, kappa: Kappa,
    share: float = REGRET,
) -> tuple[float, float]:  # fmt: skip
    """The N between which the law stays within `share` of its minimum at this budget (bisection in ln N)."""
    best = optimum(A1, a1, A2, a2, budget, space, kappa)

    def law(log_n: Number) -> np.ndarray:
        log_d = np.log(budget / space) - kappa.parts(log_n)[0]
        return A0 + A1 * np.exp(-a1 * log_n) + A2 * np.exp(-a2 * log_d)

    limit = (1 + share) * law(best.log_n)
    ends = []
    for side in (-1.0, 1.0):
        inner, outer = float(best.log_n), float(best.log_n) + side * 60.0
        for _ in range(80):
            middle = 0.5 * (inner + outer)
            inner, outer = (middle, outer) if law(np.float64(middle)) <= limit else (inner, middle)
        ends.append(float(np.exp(inner)))
    return ends[0], ends[1]


def guard(
    parameters: Mapping[str, float], intervals: Mapping[str, tuple[float, float] | None],
    draws: Mapping[str, np.ndarray] | None = None, size_p_value: float | None = None,
    pairs: tuple[tuple[str, str], ...] = SIZE_AND_TIME,
) -> str | None:  # fmt: skip
    """Why there is no interior optimum, or None. Never extrapolate from a term that is not there."""
    for amplitude, exponent in pairs:
        if not parameters.get(amplitude, 0.0) > 0:
            return f"{amplitude} is at its bound"
        if draws is not None and np.mean(draws[amplitude] <= 0) > 0.025:
            share = 100 * np.mean(draws[amplitude] <= 0)
            return f"{amplitude} is at its bound in {share:.0f} % of the bootstrap draws"
        interval = intervals.get(exponent)
        if interval is None:
            return f"the interval of {exponent} is not determined"
        if interval[0] <= EXPONENT_GUARD:
            ends = f"[{interval[0]:.3g}, {interval[1]:.3g}]"
            return f"the interval of {exponent}, {ends}, contains {EXPONENT_GUARD}"
        if interval[1] >= EXPONENT_MAX:
            return f"the interval of {exponent} reaches the bound {EXPONENT_MAX:g}"
    if size_p_value is not None and size_p_value > 0.05:
        return f"N does not matter significantly (p = {size_p_value:.2g})"
    return None


@dataclass(frozen=True)
class Spread:
    """An optimum with its uncertainty: percentile interval of N* over the draws, the delta method's interval
    beside it, standard deviations of ln N* both ways, and the interval of dlnN*/dlnC."""

    interval: tuple[float, float]
    delta_interval: tuple[float, float]
    sd_draws: float
    sd_delta: float
    exponent_interval: tuple[float, float]
    d_interval: tuple[float, float]
    draws_used: int


def spread(
    parameters: Mapping[str, float], draws: Mapping[str, np.ndarray], covariance: np.ndarray, budget: float,
    space: float, kappa: Kappa, level: float = 0.95,
) -> Spread:  # fmt: skip
    """Push every draw through; `covariance` (4, 4) of (ln A1, a1, ln A2, a2)."""
    columns = [np.asarray(draws[k]) for k in ("A1", "a1", "A2", "a2")]
    good = np.all([np.isfinite(c) & (c > 0) for c in columns], axis=0)
    A1, a1, A2, a2 = (c[good] for c in columns)
    cloud = optimum(A1, a1, A2, a2, budget, space, kappa)
    p = parameters
    best = optimum(p["A1"], p["a1"], p["A2"], p["a2"], budget, space, kappa)
    g = gradient(best, parameters["a1"], parameters["a2"])
    sd = float(np.sqrt(max(g @ covariance @ g, 0.0)))
    z = float(special.ndtri(0.5 + level / 2))
    tail = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    n_ends, d_ends, e_ends = (np.percentile(v, tail) for v in (cloud.log_n, cloud.log_d, cloud.exponent))
    centre = float(best.log_n)
    return Spread(
        (float(np.exp(n_ends[0])), float(np.exp(n_ends[1]))),
        (float(np.exp(centre - z * sd)), float(np.exp(centre + z * sd))),
        float(cloud.log_n.std(ddof=1)),
        sd,
        (float(e_ends[0]), float(e_ends[1])),
        (float(np.exp(d_ends[0])), float(np.exp(d_ends[1]))),
        int(good.sum()),
    )


@dataclass(frozen=True)
class Clamped:
    """An optimum moved to where the study has data: N and D' in the fitted range, on the budget if
    possible."""

    n: float
    d_prime: float
    flags: tuple[str, ...]


def clamp(
    log_n: float, log_d: float, n_range: tuple[float, float], d_range: tuple[float, float], budget: float,
    space: float, kappa: Kappa,
) -> Clamped:  # fmt: skip
    """Clamp N to the fitted range, give the rest of the budget to D', then clamp and flag D' itself."""
    flags = []
    n = float(np.exp(log_n))
    if not n_range[0] <= n <= n_range[1]:
        word = "below" if n < n_range[0] else "above"
        flags.append(f"N* = {n:.3g} is {word} the fitted range {n_range[0]:.3g} to {n_range[1]:.3g}: clamped")
        n = float(np.clip(n, *n_range))
        log_d = float(np.log(budget / space) - kappa.parts(np.float64(np.log(n)))[0])
    d = float(np.exp(log_d))
    if not d_range[0] <= d <= d_range[1]:
        word = "below" if d < d_range[0] else "above"
        flags.append(
            f"D'* = {d:.3g} is {word} the fitted range {d_range[0]:.3g} to {d_range[1]:.3g}: "
            "clamped, off the budget"
        )
        d = float(np.clip(d, *d_range))
    return Clamped(n, d, tuple(flags))
