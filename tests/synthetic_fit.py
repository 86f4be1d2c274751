"""A synthetic fit file (schema of `python -m replicate fit`) with chosen parameters and spreads, for the
figures' tests.

Nothing here is fitted: parameters are given, draws are log-normal around them, residuals are those of the
cube's runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

LABELS = ("molecule", "ansatz", "size", "steps", "variant", "seed")
Parameters = Mapping[str, float]


def write_fit(
    folder: Path,
    cube: xr.DataTree,
    laws: Mapping[tuple[str, str], Parameters],
    *,
    spread: float = 0.02,
    replicates: int = 400,
    per_molecule: Mapping[tuple[str, str, str], Parameters] | None = None,
    extra_laws: Mapping[tuple[str, str, str], Parameters] | None = None,
    stationary: bool = True,
    allocation: Mapping[tuple[str, str], str] | None = None,
    record: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write fit.json and fit.nc into `folder`; returns the JSON's path.

    `laws`: (ansatz, metric) -> A0, A1, a1, A2, a2 of the joint additive law; `per_molecule` and
    `extra_laws` add
    (ansatz, metric, molecule) and (ansatz, metric, law name) entries. `spread`: relative sd of every draw.
    """
    rng = np.random.default_rng(seed)
    final = cube["final"].to_dataset()
    molecules = [str(m) for m in final["molecule"].values]
    entries: list[tuple[str, str, str, str, Parameters]] = [
        (ansatz, metric, "all", "additive", p) for (ansatz, metric), p in laws.items()
    ]
    entries += [(a, m, scope, "additive", p) for (a, m, scope), p in (per_molecule or {}).items()]
    entries += [(a, m, "all", law, p) for (a, m, law), p in (extra_laws or {}).items()]
    groups: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs={"schema": 1})}
    fits = []
    for ansatz, metric, scope, law, parameters in entries:
        joint = scope == "all"
        rows = _runs(final, ansatz, metric, None if joint else scope)
        intercepts = (
            {m: 0.1 * (i - (len(molecules) - 1) / 2) for i, m in enumerate(molecules)} if joint else {}
        )
        names = list(parameters)
        value = np.array([parameters[n] for n in names])
        draws = value * np.exp(spread * rng.standard_normal((replicates, len(names))))
        for name in names:
            # The exponent of an absent term is undefined, as in a real fit.
            if name.startswith("a") and parameters.get(f"A{name[1:]}", 1.0) == 0:
                draws[:, names.index(name)] = math.nan
        low, high = np.nanpercentile(np.where(np.isnan(draws), 0, draws), [2.5, 97.5], axis=0)
        shift = np.array([intercepts.get(str(m), 0.0) for m in rows["molecule"]])
        fitted = _law(parameters, rows["n_total"], rows["d_prime"]) * np.exp(shift)
        observed = rows[metric]
        everything = names + [f"intercept[{m}]" for m in intercepts]
        offsets = np.array(list(intercepts.values())) + spread * rng.standard_normal(
            (replicates, len(intercepts))
        )
        full = np.concatenate([draws, offsets], axis=1) if intercepts else draws
        groups[f"/{ansatz}/{metric}/{scope}/{law}"] = xr.Dataset(
            {
                "draws": (("replicate", "parameter"), full),
                "estimate": ("parameter", np.concatenate([value, list(intercepts.values())])),
                "residual": ("point", np.log(observed / fitted)),
                "fitted": ("point", fitted),
                "observed": ("point", observed),
            },
            coords={"parameter": everything}
            | {
                name: ("point", rows[name])
                for name in (*LABELS, "n_total", "n_modulus", "n_phase", "d_prime")
            }
            | {"search_fraction": ("point", rows["search_fraction"])},
        )
        fits.append(
            {
                "id": f"{ansatz}/{metric}/{scope}/{law}",
                "ansatz": ansatz,
                "metric": metric,
                "scope": scope,
                "law": law,
                "headline": joint and law == "additive",
                "formula": "A0 + A1*N^-a1 + A2*D^-a2",
                "variables": {
                    "N": _described("n_total", rows["n_total"]),
                    "D": _described("d_prime", rows["d_prime"]),
                },
                "parameters": {
                    n: (None if math.isnan(v) else float(v)) for n, v in zip(names, value, strict=True)
                },
                "intervals": {n: [float(a), float(b)] for n, a, b in zip(names, low, high, strict=True)},
                "intervals_by_kind": {
                    kind: {n: [float(a), float(b)] for n, a, b in zip(names, low, high, strict=True)}
                    for kind in ("bootstrap", "sandwich", "profile")
                },
                "intercepts": intercepts,
                "certificate": {
                    "stationary": stationary,
                    "scaled_gradient": 1e-12 if stationary else 1e-2,
                    "active_bounds": [n for n in names if n.startswith("A") and parameters[n] == 0],
                },
                "n_points": len(observed),
                "n_runs": len(observed),
                "n_molecules": len(molecules) if joint else 1,
                "molecules": molecules if joint else [scope],
                "warnings": [],
            }
        )
    text: dict[str, Any] = {
        "schema": 1,
        "kind": "cube",
        "study": "synthetic",
        "cube": "cube.nc",
        "provenance": {},
        "settings": {"objective": "t:4", "bootstrap": replicates, "seed": seed, "hold_outs": []},
        "table": {"points": 0, "excluded": {"failed": 1}},
        "fits": fits,
        "refused": [],
        "selection": [],
        "sensitivity": [],
        "hold_out": [],
        "allocation": [
            {"ansatz": a, "metric": m, "status": (allocation or {}).get((a, m), "ok"), "reason": "synthetic"}
            for a, m in laws
        ],
    }
    text |= dict(record or {})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fit.json"
    path.write_text(json.dumps(text), encoding="utf-8")
    xr.DataTree.from_dict(groups).to_netcdf(folder / "fit.nc", engine="netcdf4")
    return path


def _law(p: Parameters, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    total = np.full(len(n), float(p.get("A0", 0.0)))
    for amplitude, exponent, variable in (("A1", "a1", n), ("A2", "a2", d)):
        if p.get(amplitude, 0.0) > 0:
            total = total + p[amplitude] * variable ** -p[exponent]
    return total


def _described(column: str, values: np.ndarray) -> dict[str, Any]:
    return {
        "column": column,
        "geometric_mean": float(np.exp(np.mean(np.log(values)))),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _runs(final: xr.Dataset, ansatz: str, metric: str, molecule: str | None) -> dict[str, np.ndarray]:
    """Finished runs of one ansatz, base variant, as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in (*LABELS, "n_total", "n_modulus", "n_phase")}
    columns |= {"d_prime": [], "search_fraction": [], metric: []}
    status = final["status"].transpose(*LABELS)
    for index in np.argwhere(status.values == 1):
        cell = final.isel(dict(zip(LABELS, (int(i) for i in index), strict=True)))
        if str(cell["ansatz"].item()) != ansatz or str(cell["variant"].item()) != "base":
            continue
        if molecule is not None and str(cell["molecule"].item()) != molecule:
            continue
        for name in columns:
            columns[name].append(cell[name].item())
    return {name: np.array(values) for name, values in columns.items()}
