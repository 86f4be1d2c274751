"""Fitted laws as the figures see them: L(N, D') = e^{s_mol} (A0 + A1 N^-a1 + A2 D'^-a2) with bootstrap draws.

The files are those of `python -m replicate fit`: fit.json (estimates, intervals, certificates) and, beside
it, fit.nc
(draws and residuals; without it curves have no bands).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from figures.registry import Quantity

LEVEL = 0.95  # of every interval drawn or tabulated
ALL = "all"  # scope of a joint fit
ADDITIVE = "additive"
PARAMETERS = ("A0", "A1", "a1", "A2", "a2")
_TERMS = (("A1", "a1"), ("A2", "a2"))


@dataclass(frozen=True)
class LawFit:
    """One fitted law. `draws[name]` is float64 (B,), raw units, NaN exponents where the amplitude is 0.

    `record` is its object in fit.json; `residuals` maps column names to arrays (points,): the point
    labels, N, D',
    `observed`, `fitted` and `residual` = ln(observed/fitted).
    """

    record: Mapping[str, Any]
    draws: Mapping[str, np.ndarray] = field(default_factory=dict)
    residuals: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def ansatz(self) -> str:
        return str(self.record["ansatz"])

    @property
    def metric(self) -> str:
        return str(self.record["metric"])

    @property
    def scope(self) -> str:
        return str(self.record["scope"])

    @property
    def law(self) -> str:
        return str(self.record["law"])

    @property
    def estimates(self) -> dict[str, float]:
        return {name: _number(value) for name, value in self.record["parameters"].items()}

    @property
    def intercepts(self) -> dict[str, float]:
        return {name: float(value) for name, value in (self.record.get("intercepts") or {}).items()}

    @property
    def stationary(self) -> bool:
        return bool((self.record.get("certificate") or {}).get("stationary", False))

    @property
    def at(self) -> dict[str, float]:
        """Geometric means of the variables over the fitted points: where local statements are made."""
        return {name: float(v["geometric_mean"]) for name, v in self.record["variables"].items()}

    def span(self, variable: str) -> tuple[float, float]:
        """Range of a variable ("N", "D") in the fitted points."""
        described = self.record["variables"][variable]
        return float(described["min"]), float(described["max"])

    def quantity(self, name: str) -> Quantity:
        """A parameter with its headline interval (NaN bounds: not identified)."""
        interval = (self.record.get("intervals") or {}).get(name)
        low, high = (_number(v) for v in interval) if interval else (math.nan, math.nan)
        return Quantity(self.estimates.get(name, math.nan), low, high)

    def value(self, n: Any, d: Any, molecule: str | None = None) -> np.ndarray:
        """L at N = `n`, D' = `d`; without `molecule` the intercept is left out (the collapsed law)."""
        shift = self.intercepts.get(molecule, 0.0) if molecule else 0.0
        floor, size, time = _terms(self.estimates, np.asarray(n, float), np.asarray(d, float))
        return np.asarray((floor + size + time) * math.exp(shift))

    def draw_values(self, n: Any, d: Any) -> np.ndarray:
        """The collapsed law of every draw at the points (n, d): (B, points)."""
        columns = {name: self.draws[name][:, None] for name in PARAMETERS if name in self.draws}
        floor, size, time = _terms(
            columns, np.atleast_1d(np.asarray(n, float)), np.atleast_1d(np.asarray(d, float))
        )
        return np.asarray(floor + size + time)

    def band(self, n: Any, d: Any, molecule: str | None = None) -> tuple[np.ndarray, np.ndarray] | None:
        """Pointwise 95 % percentile interval of `value` from the draws, or None without draws."""
        if not self.draws:
            return None
        columns = {name: self.draws[name][:, None] for name in PARAMETERS if name in self.draws}
        curves = sum(
            _terms(columns, np.atleast_1d(np.asarray(n, float)), np.atleast_1d(np.asarray(d, float)))
        )
        if molecule and f"intercept[{molecule}]" in self.draws:
            curves = curves * np.exp(self.draws[f"intercept[{molecule}]"])[:, None]
        low, high = np.nanpercentile(curves, tails(), axis=0)
        return low, high

    def stacked(self) -> dict[str, np.ndarray]:
        """Parameters as (1 + B,) arrays: the estimate first, then the draws."""
        return {
            name: np.concatenate([[value], self.draws.get(name, np.empty(0))])
            for name, value in self.estimates.items()
        }

    def elasticities(self, n: float, d: float) -> tuple[np.ndarray, np.ndarray]:
        """(-dlnL/dlnN, -dlnL/dlnD') at (n, d), each (1 + B,): the estimate first. A term with
        amplitude 0 gives 0."""
        columns = self.stacked()
        floor, size, time = _terms(columns, n, d)
        total = floor + size + time
        return _exponent(columns, "a1") * size / total, _exponent(columns, "a2") * time / total

    def range_effects(self) -> tuple[np.ndarray, np.ndarray]:
        """Fall of ln L from the smallest to the largest fitted N at the geometric mean of D', and from the
        smallest to the largest D' at that of N: each (1 + B,), the estimate first."""
        at, columns = self.at, self.stacked()

        def log_law(n: float, d: float) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(np.log(sum(_terms(columns, n, d))))

        sizes = [log_law(n, at["D"]) for n in self.span("N")]
        times = [log_law(at["N"], d) for d in self.span("D")]
        return sizes[0] - sizes[1], times[0] - times[1]

    def ratio(self) -> np.ndarray:
        """a1/a2, the exponent k of D'* ~ N*^k (SCIENCE section 7): (1 + B,), NaN where a term is absent."""
        columns = self.stacked()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(columns["a1"] / columns["a2"])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _exponent(columns: Mapping[str, Any], name: str) -> Any:
    return np.nan_to_num(columns[name], nan=0.0) if name in columns else 0.0


def _terms(p: Mapping[str, Any], n: Any, d: Any) -> tuple[Any, Any, Any]:
    """Floor, size term, time term; absent terms are 0."""
    out = [p.get("A0", 0.0)]
    for variable, (amplitude, exponent) in zip((n, d), _TERMS, strict=True):
        scale = np.nan_to_num(p.get(amplitude, 0.0), nan=0.0)
        out.append(scale * variable ** -_exponent(p, exponent))
    return out[0], out[1], out[2]


def tails(level: float = LEVEL) -> list[float]:
    """Percentiles of the central interval."""
    return [50 * (1 - level), 50 * (1 + level)]


def summary(values: np.ndarray, level: float = LEVEL) -> Quantity:
    """A `Quantity` from (1 + B,) values, the estimate first.

    No interval with fewer than 100 finite draws, with less than one draw per tail, or where the draws in
    which the quantity is undefined (a term of the law is absent) would fill a tail: leaving them out would
    make the interval too short.
    """
    estimate, draws = float(values[0]), values[1:][np.isfinite(values[1:])]
    undefined, tail = len(values) - 1 - len(draws), (1 - level) / 2
    if len(draws) < 100 or len(draws) * tail < 1 or undefined > tail * (len(values) - 1):
        return Quantity(estimate)
    low, high = np.percentile(draws, tails(level))
    return Quantity(estimate, float(low), float(high))


@dataclass(frozen=True)
class Fits:
    """Every law in a fit file; `record` is the whole of fit.json."""

    laws: tuple[LawFit, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def get(self, ansatz: str, metric: str, scope: str = ALL, law: str = ADDITIVE) -> LawFit | None:
        for fit in self.laws:
            if (fit.ansatz, fit.metric, fit.scope, fit.law) == (ansatz, metric, scope, law):
                return fit
        return None

    def best(self, ansatz: str, metric: str) -> LawFit | None:
        """The joint additive law; where the study has one molecule, that molecule's own."""
        found = self.get(ansatz, metric)
        if found is None:
            own = [f for f in self.laws if (f.ansatz, f.metric, f.law) == (ansatz, metric, ADDITIVE)]
            found = own[0] if len(own) == 1 else None
        return found

    def refusal(self, ansatz: str, metric: str, scope: str = ALL, law: str = ADDITIVE) -> str:
        """Why a law is absent, in the fit's own words."""
        for item in self.record.get("refused", []):
            if (item.get("ansatz"), item.get("metric"), item.get("scope"), item.get("law")) == (
                ansatz,
                metric,
                scope,
                law,
            ):
                return str(item.get("reason"))
        return "not fitted"

    def section(self, name: str, ansatz: str, metric: str) -> Mapping[str, Any] | None:
        """The entry of `selection`, `sensitivity`, `allocation` or `hold_out` for one ansatz and metric."""
        for item in self.record.get(name) or []:
            if item.get("ansatz") == ansatz and item.get("metric") == metric:
                return dict(item)
        return None

    @property
    def held_out(self) -> Sequence[Any]:
        return list((self.record.get("settings") or {}).get("hold_outs") or [])


def load_fits(path: Path, error: type[Exception]) -> Fits:
    """Read fit.json (or fit.nc: its neighbour is taken) and the draws beside it. Raises `error`
    with one line."""
    path = path.with_suffix(".json") if path.suffix == ".nc" else path
    if not path.is_file():
        raise error(f"{path}: no such file (make it with: python -m replicate fit CUBE)")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        laws = list(record["fits"])
        for entry in laws:
            (
                entry["ansatz"],
                entry["metric"],
                entry["scope"],
                entry["law"],
                entry["parameters"],
                entry["variables"],
            )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not a fit of a cube ({type(problem).__name__}: {problem})") from problem
    beside = path.with_suffix(".nc")
    draws = _draws(beside, error) if beside.is_file() else {}
    fits = []
    for entry in laws:
        key = "/".join(str(entry[part]) for part in ("ansatz", "metric", "scope", "law"))
        parameters, residuals = draws.get(key, ({}, {}))
        fits.append(LawFit(entry, parameters, residuals))
    return Fits(tuple(fits), record, (path, beside) if beside.is_file() else (path,))


def _draws(
    path: Path, error: type[Exception]
) -> dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    try:
        with xr.open_datatree(path, engine="netcdf4") as opened:
            tree = opened.load()
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        raise error(f"{path}: not a readable fit file ({type(problem).__name__})") from problem
    found = {}
    for node in tree.subtree:
        if "draws" not in node.data_vars:
            continue
        group = node.to_dataset()
        names = [str(name) for name in group["parameter"].values]
        values = group["draws"].transpose("replicate", "parameter").values
        columns = {name: values[:, i] for i, name in enumerate(names)}
        points = {
            str(name): variable.values
            for name, variable in group.variables.items()
            if variable.dims == ("point",) and name != "point"
        }
        found[node.path.strip("/")] = (columns, points)
    return found
