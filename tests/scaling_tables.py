"""Tables with a known law, for the tests of `replicate.scaling`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from replicate.scaling.law import Design, Law, make_design, parse_law

ADDITIVE = parse_law("A0 + A1*N^-a1 + A2*D^-a2", ("N", "D"), "additive")
#: Laws of three, four and five terms with their columns.
LAWS = {
    3: ADDITIVE,
    4: parse_law("A0 + A1*M^-a1 + A3*P^-a3 + A2*D^-a2", ("M", "P", "D"), "four"),
    5: parse_law("A0 + A1*M^-a1 + A3*P^-a3 + A2*T^-a2 + A4*S^-a4", ("M", "P", "T", "S"), "five"),
}
_RANGES = {"N": (7, 12), "M": (7, 12), "P": (6, 11), "D": (2, 9), "T": (5, 10), "S": (-4, 0)}


@dataclass(frozen=True)
class Table:
    """Columns, values and the parameters that made them."""

    law: Law
    variables: dict[str, np.ndarray]
    value: np.ndarray
    truth: dict[str, float]

    def design(self, **more: object) -> Design:
        return make_design(self.law, self.variables, self.value, **more)  # type: ignore[arg-type]


def random_table(law: Law, seed: int, n: int = 240, sigma: float = 0.0) -> Table:
    """Random points; terms of comparable size at the geometric means; log-normal noise."""
    rng = np.random.default_rng(seed)
    variables = {v: np.exp(rng.uniform(*_RANGES[v], n)) for v in law.variables}
    truth: dict[str, float] = {}
    for term in law.terms:
        amplitude = rng.uniform(0.1, 1.0)
        for f in term.factors:
            exponent = rng.uniform(0.2, 0.9)
            truth[str(f.exponent)] = exponent
            amplitude *= np.exp(-f.sign * exponent * np.log(variables[f.variable]).mean())
        truth[term.amplitude] = amplitude
    value = law(truth, variables) * np.exp(sigma * rng.standard_normal(n))
    return Table(law, variables, value, truth)


def grid_table(
    seed: int, *, c: tuple[float, float, float] = (0.2, 0.5, 0.5), e: tuple[float, float] = (0.4, 0.5),
    sigma: float = 0.3, sizes: int = 10, times: int = 6, repeats: int = 4, nu: float | None = None,
) -> Table:  # fmt: skip
    """A crossed grid of N (2.5 decades) and D (3 decades); c = terms at the geometric means; 240 points."""
    rng = np.random.default_rng(seed)
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e3, 3e5, sizes), np.geomspace(10, 1e4, times)))
    n, d = np.tile(n, repeats), np.tile(d, repeats)
    truth = {
        "A0": c[0], "a1": e[0], "a2": e[1],
        "A1": c[1] * float(np.exp(e[0] * np.log(n).mean())),
        "A2": c[2] * float(np.exp(e[1] * np.log(d).mean())),
    }  # fmt: skip
    noise = rng.standard_normal(n.size) if nu is None else rng.standard_t(nu, n.size)
    value = ADDITIVE(truth, {"N": n, "D": d}) * np.exp(sigma * noise)
    return Table(ADDITIVE, {"N": n, "D": d}, value, truth)


def published_table(seed: int, sigma: float = 0.01, outliers: int = 5) -> Table:
    """Like the tables of published language-model fits: E + A N^-alpha + B D^-beta over N of 6e7 to 1.6e10
    parameters and D of 3e9 to 3e11 tokens, 240 runs, log-normal noise and a few outliers of 10 %."""
    rng = np.random.default_rng(seed)
    variables = {
        "N": np.exp(rng.uniform(np.log(6e7), np.log(1.6e10), 240)),
        "D": np.exp(rng.uniform(np.log(3e9), np.log(3e11), 240)),
    }
    truth = {"A0": 1.8, "A1": 482.0, "A2": 2085.0, "a1": 0.35, "a2": 0.37}
    value = ADDITIVE(truth, variables) * np.exp(sigma * rng.standard_normal(240))
    value[rng.choice(240, outliers, replace=False)] *= np.exp(rng.normal(0, 0.1, outliers))
    return Table(ADDITIVE, variables, value, truth)
