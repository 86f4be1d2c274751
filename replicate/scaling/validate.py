"""Predictions of what the fit has not read: hold-outs, records made before a test, and the power of one."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from replicate.scaling.select import predictive, score
from replicate.scaling.table import Rows

if TYPE_CHECKING:
    from replicate.scaling.study import Fit, Options

PREDICTIVE_DRAWS = 4000


def register(content: dict[str, Any]) -> dict[str, Any]:
    """A prediction with the sha256 of its canonical JSON: made before the truth is read, checkable after."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return content | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a registered prediction still is what was registered."""
    content = {k: v for k, v in record.items() if k != "sha256"}
    return register(content)["sha256"] == record.get("sha256")


def score_hold_outs(rows: Rows, truth: dict[str, np.ndarray], head: Fit, options: Options) -> dict[str, Any]:
    """Register the predictions for every held-out run of this ansatz and metric, then score them by kind."""
    mask = rows.held_out & (rows.labels["ansatz"] == head.ansatz) & (rows.reason[head.metric] == "")
    if not mask.any() or head.draws is None:
        return {"rows": [], "registered": None}
    law = head.solution.layout.design.law
    rng = np.random.default_rng(options.seed)
    group = rows.labels["molecule"][mask]
    cloud = predictive(
        head.solution,
        head.draws.p,
        {v: rows.variables[v][mask] for v in law.variables},
        group,
        rng,
        PREDICTIVE_DRAWS,
    )
    centre = np.median(cloud, axis=0)
    ends = np.percentile(cloud, [5, 95], axis=0)
    record = register(
        {
            "fit": head.id,
            "parameters": head.entry["parameters"],
            "points": [
                {axis: str(rows.labels[axis][i]) for axis in rows.labels}
                | {
                    "prediction": float(np.exp(centre[j])),
                    "interval_90": [float(v) for v in np.exp(ends[:, j])],
                }
                for j, i in enumerate(np.flatnonzero(mask))
            ],
        }
    )
    known = np.log(truth[head.metric][mask])
    kinds = {"all hold-outs": np.ones(int(mask.sum()), bool)}
    held = rows.spec.get("holdout", {})
    for key, axis in (("molecules", "molecule"), ("sizes", "size"), ("steps", "steps")):
        for label in held.get(key, []):
            kinds[f"{axis} {label}"] = rows.labels[axis][mask] == label
    out = []
    for name, chosen in kinds.items():
        chosen = chosen & ~rows.censored[head.metric][mask]
        if chosen.any():
            s = score(cloud[:, chosen], centre[chosen], known[chosen])
            out.append({"name": name} | s.__dict__)
    return {"rows": out, "registered": record}


def arm_effect(a1: float, a2: float, factor: float, floor_share: float = 0.0) -> tuple[float, float]:
    """ln L(N* f) - ln L(N*) and ln L(N*/f) - ln L(N*) on one IsoFLOP curve with linear kappa.

    There a1 A1 N^-a1 = a2 A2 D^-a2, so the size term holds a2/(a1+a2) of L* - A0. `floor_share` = A0 / L*.
    """
    w1, w2 = a2 / (a1 + a2), a1 / (a1 + a2)
    up = floor_share + (1 - floor_share) * (w1 * factor**-a1 + w2 * factor**a2)
    down = floor_share + (1 - floor_share) * (w1 * factor**a1 + w2 * factor**-a2)
    return math.log(up), math.log(down)


def seeds_needed(
    sigma: float,
    a1: float,
    a2: float,
    factor: float,
    *,
    floor_share: float = 0.0,
    level: float = 0.05,
    power: float = 0.8,
) -> int:
    """Seeds per arm that show the nearer of both neighbours to be worse (one-sided z test of mean ln L)."""
    effect = min(arm_effect(a1, a2, factor, floor_share))
    z = special.ndtri(1 - level) + special.ndtri(power)
    return math.ceil(2 * (z * sigma / effect) ** 2)
