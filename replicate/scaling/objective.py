"""Objectives by name: the loss of one point as a function of its predicted log m, and its derivatives.

Every objective is phi(m) = rho((z - a(m)) / sigma), with a link a: m (log), exp(m) (raw) or asinh(exp(m) /
noise)
(additive and multiplicative noise together, Rocke & Durbin 1995). Student-t and asinh carry the scale sigma
as a parameter of their own (maximum likelihood), so that likelihood ratios mean what they say.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from scipy import special

from replicate.scaling.law import Design
from replicate.spec import UserError

#: Log residual below which LAD is smoothed, |r| -> r^2 / 2d: small against any noise, and stationary points
#: exist.
LAD_WIDTH = 1e-4
#: The scale never falls below this: data without noise would drive the likelihood to infinity.
SCALE_FLOOR = 1e-6


@dataclass(frozen=True)
class Objective:
    """`kind`: t | huber | lad | l2-log | l2-raw | asinh; `nu` for t and asinh, `delta` for
    huber (log units)."""

    kind: str
    nu: float = 4.0
    delta: float = 1e-3

    @property
    def name(self) -> str:
        return {"t": f"t:{self.nu:g}", "asinh": f"asinh:{self.nu:g}", "huber": f"huber:{self.delta:g}"}.get(
            self.kind, self.kind
        )

    @property
    def has_scale(self) -> bool:
        return self.kind in ("t", "asinh")

    @property
    def width(self) -> float:
        """Half-width of the quadratic zone of huber and lad."""
        return LAD_WIDTH if self.kind == "lad" else self.delta

    def gradient_unit(self, tau: np.ndarray) -> np.ndarray:
        """Natural size of d phi / d m, the yardstick of the scaled gradient."""
        if self.has_scale:
            return np.exp(-tau)
        return np.full_like(tau, {"huber": self.delta, "lad": 1.0}.get(self.kind, 1e-5))


def parse_objective(text: str) -> Objective:
    """`huber:DELTA | lad | t:NU | l2-log | l2-raw | asinh:NU` (t and asinh alone: nu = 4; huber alone:
    1e-3)."""
    match = re.fullmatch(r"(t|huber|asinh)(?::(.+))?|(lad|l2-log|l2-raw)", text.strip())
    if match is None:
        raise UserError(f"--objective {text!r}: use huber:DELTA, lad, t:NU, l2-log, l2-raw or asinh:NU")
    kind, number = match[1] or match[3], match[2]
    try:
        value = float(number) if number else {"huber": 1e-3}.get(kind, 4.0)
    except ValueError:
        raise UserError(f"--objective {text!r}: {number!r} is not a number") from None
    if not (0 < value < math.inf):
        raise UserError(f"--objective {text!r}: the number must be positive and finite")
    return Objective(kind, delta=value) if kind == "huber" else Objective(kind, nu=value)


@dataclass(frozen=True)
class Loss:
    """Arrays (R, n): value, first and second derivative in m, majorising curvature; and those
    in tau = log sigma.

    The tau arrays are None where the objective has no scale.
    """

    value: np.ndarray
    dm: np.ndarray
    dmm: np.ndarray
    curvature: np.ndarray
    dt: np.ndarray | None = None
    dmt: np.ndarray | None = None
    dtt: np.ndarray | None = None


def observed(objective: Objective, design: Design) -> np.ndarray:
    """z (n,): the data in the units of the link."""
    if objective.kind == "l2-raw":
        return design.value
    if objective.kind == "asinh":
        return np.arcsinh(design.value / asinh_width(design))
    return np.log(design.value)


def asinh_width(design: Design) -> np.ndarray:
    """(n,) where the additive noise takes over: at least 1e-9 of the median, so that exact
    points stay logs."""
    return np.maximum(design.noise, 1e-9)


def link(objective: Objective, design: Design, m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a(m), a'(m), a''(m) for (R, n) predicted logs."""
    if objective.kind == "l2-raw":
        a = np.exp(m)
        return a, a, a
    if objective.kind == "asinh":
        e = np.exp(m) / asinh_width(design)
        slope = e / np.sqrt(1 + e * e)
        return np.arcsinh(e), slope, slope * (1 - slope * slope)
    one = np.ones_like(m)
    return m, one, np.zeros_like(m)


def evaluate(
    objective: Objective,
    design: Design,
    z: np.ndarray,
    m: np.ndarray,
    tau: np.ndarray,
    width: float | None = None,
) -> Loss:
    """Loss of every point. `z` (n,) or (R, n), `m` (R, n), `tau` (R,); `width` overrides the huber zone."""
    plain = objective.kind not in ("l2-raw", "asinh")
    if plain:
        r = z - m
    else:
        a, a1, a2 = link(objective, design, m)
        r = z - a
    dt = dmt = dtt = None
    if objective.has_scale:
        nu = objective.nu
        s2 = nu * np.exp(2 * tau)[:, None]
        r2 = r * r
        inverse = 1.0 / (s2 + r2)
        value = (0.5 * (nu + 1)) * np.log1p(r2 / s2) + tau[:, None]
        curvature = (nu + 1) * inverse
        dr = curvature * r
        drr = curvature * (s2 - r2) * inverse
        dt = 1 - dr * r
        twice = 2 * s2 * inverse
        dtt = dr * r * twice
        dmt = dr * twice
    elif objective.kind in ("huber", "lad"):
        d = objective.width if width is None else width
        unit = 1 / d if objective.kind == "lad" else 1.0
        size = np.abs(r)
        inside = size <= d
        value = unit * np.where(inside, 0.5 * r * r, d * (size - 0.5 * d))
        dr = unit * np.clip(r, -d, d)
        drr = unit * inside
        curvature = unit * np.where(inside, 1.0, d / np.maximum(size, d))
    else:
        value, dr = 0.5 * r * r, r
        drr = curvature = np.ones_like(r)
    if plain:
        dm, dmm = -dr, drr
    else:
        dm, dmm, curvature = -dr * a1, drr * a1 * a1 - dr * a2, curvature * a1 * a1
        dmt = None if dmt is None else dmt * a1
    loss = Loss(value, dm, dmm, curvature, dt, dmt, dtt)
    if design.censored.any():
        _censor(objective, design, loss, r, tau, 1.0 if plain else a1, 0.0 if plain else a2)
    return loss


def _censor(
    objective: Objective,
    design: Design,
    loss: Loss,
    r: np.ndarray,
    tau: np.ndarray,
    a1: np.ndarray | float,
    a2: np.ndarray | float,
) -> None:
    """Overwrite the points known only to lie below z: -log F((z - a) / sigma), or a one-sided
    loss without a scale."""
    at = np.flatnonzero(design.censored)
    if not objective.has_scale:
        below = r[:, at] > 0
        for array in (loss.value, loss.dm, loss.dmm, loss.curvature):
            array[:, at] = np.where(below, 0.0, array[:, at])
        return
    nu = objective.nu
    sigma = np.exp(tau)[:, None]
    v = r[:, at] / sigma
    slope = a1[:, at] if isinstance(a1, np.ndarray) else a1
    bend = a2[:, at] if isinstance(a2, np.ndarray) else a2
    cdf = np.maximum(special.stdtr(nu, v), 1e-300)
    pdf = np.exp(special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2)) / math.sqrt(nu * math.pi)
    pdf = pdf * (1 + v * v / nu) ** (-(nu + 1) / 2)
    h = pdf / cdf
    # d/dv of -log F = -h;  dh/dv = f'/F - h^2
    dh = -h * (nu + 1) * v / (nu + v * v) - h * h
    loss.value[:, at] = -np.log(cdf)
    # v = (z - a(m)) / sigma: dv/dm = -a'/sigma, dv/dtau = -v
    loss.dm[:, at] = h * slope / sigma
    loss.dmm[:, at] = -dh * (slope / sigma) ** 2 + h * bend / sigma
    loss.curvature[:, at] = np.maximum(-dh, 1e-12) * (slope / sigma) ** 2
    assert loss.dt is not None
    assert loss.dmt is not None
    assert loss.dtt is not None
    loss.dt[:, at] = h * v
    loss.dtt[:, at] = -dh * v * v - h * v
    loss.dmt[:, at] = -(dh * v + h) * slope / sigma


def reported_value(objective: Objective, design: Design, total: float) -> float:
    """The objective as the user knows it, from the solver's sum: full negative log-likelihood
    of L in log units (t, asinh), sum of huber(r) or |r| (huber, lad), sum of squares of log
    residuals or of raw residuals (l2-*)."""
    if objective.has_scale:
        nu = objective.nu
        constant = special.gammaln(nu / 2) - special.gammaln((nu + 1) / 2) + 0.5 * math.log(nu * math.pi)
        return total + float(constant) * float(design.weight[~design.censored].sum())
    if objective.kind == "l2-raw":
        return 2 * total * design.median**2
    return 2 * total if objective.kind == "l2-log" else total
