"""Posynomial scaling laws and the design matrices they act on.

One family serves every law of the project (FIT section 1):

    log L_i = s_group(i) + q log sum_k c_k exp(-sum_j e_kj x_ij),   c_k >= 0,

with x the centred logs of the variables and L divided by its median, so that a c_k is the value of term k at
the geometric means in units of the median. q = 1 except in the rivals (Kaplan's form, one break).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from replicate.spec import UserError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|(?P<name>[^\W\d]\w*)|(?P<op>\*\*|[-+*/^()]))"
)


@dataclass(frozen=True)
class Factor:
    """`variable ** (sign * exponent)`; the exponent is a parameter's name or a number."""

    variable: str
    exponent: str | float
    sign: int


@dataclass(frozen=True)
class Term:
    """`amplitude * prod(factors)`; no factors: the floor."""

    amplitude: str
    factors: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Law:
    """A sum of terms, raised to `power` (a number, or the name of a parameter in (0, 10])."""

    name: str
    terms: tuple[Term, ...]
    power: str | float = 1.0

    @property
    def amplitudes(self) -> tuple[str, ...]:
        return tuple(t.amplitude for t in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponent parameters in order of first appearance (without the outer power)."""
        names = [f.exponent for t in self.terms for f in t.factors if isinstance(f.exponent, str)]
        return tuple(dict.fromkeys(names))

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f.variable for t in self.terms for f in t.factors))

    @property
    def parameters(self) -> tuple[str, ...]:
        tail = (self.power,) if isinstance(self.power, str) else ()
        return self.amplitudes + self.exponents + tail

    @property
    def floor(self) -> str | None:
        """Name of the amplitude of the constant term, if there is one and the law is a plain sum."""
        if self.power != 1.0:
            return None
        return next((t.amplitude for t in self.terms if not t.factors), None)

    @property
    def formula(self) -> str:
        def power(f: Factor) -> str:
            return f"{f.variable}^{'-' if f.sign < 0 else ''}{f.exponent}"

        body = " + ".join("*".join([t.amplitude, *map(power, t.factors)]) for t in self.terms)
        return body if self.power == 1.0 else f"({body})^{self.power}"

    def __call__(
        self, parameters: Mapping[str, float | np.ndarray], variables: Mapping[str, float | np.ndarray]
    ) -> np.ndarray:
        """L from raw parameters; both broadcast, so draws (R, 1) against points (n,) give (R, n)."""
        total = np.zeros(())
        for term in self.terms:
            log_term = np.zeros(())
            for f in term.factors:
                e = parameters[f.exponent] if isinstance(f.exponent, str) else f.exponent
                log_term = log_term + f.sign * np.asarray(e) * np.log(variables[f.variable])
            amplitude = np.asarray(parameters[term.amplitude])
            # A draw without this term has no exponent (NaN), and contributes nothing.
            total = total + np.where(amplitude == 0, 0.0, amplitude * np.exp(log_term))
        q = parameters[self.power] if isinstance(self.power, str) else self.power
        return total ** np.asarray(q)


def parse_law(text: str, variables: Sequence[str], name: str = "csv") -> Law:
    """A law from text such as `A0 + A1*N^-a1 + A2*D^-a2`, `E + A/N^alpha` or `(A1*N^-b + A2*D^-1)^g`.

    Names in `variables` are columns, every other name is a parameter. Raises UserError naming the place.
    """
    tokens: list[tuple[str, str]] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise UserError(f"--law: cannot read {text[at:].strip()[:12]!r} in {text!r}")
        kind = match.lastgroup or "op"
        tokens.append((kind, match[kind].replace("**", "^")))
        at = match.end()
    return _Parser(text, tokens, frozenset(variables), name).law()


class _Parser:
    """Recursive descent over sums of products of powers; nothing is ever evaluated."""

    def __init__(
        self, text: str, tokens: list[tuple[str, str]], variables: frozenset[str], name: str
    ) -> None:
        self.text, self.tokens, self.variables, self.name, self.at = text, tokens, variables, name, 0

    def fail(self, why: str) -> UserError:
        return UserError(f"--law {self.text!r}: {why}")

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, value: str) -> bool:
        if self.peek() != value:
            return False
        self.at += 1
        return True

    def law(self) -> Law:
        power: str | float = 1.0
        if self.take("("):
            terms = self.sum()
            if not self.take(")"):
                raise self.fail("missing ')'")
            if self.take("^"):
                sign, power = self.exponent()
                if sign < 0:
                    if isinstance(power, str):
                        raise self.fail("an outer power is a positive parameter or a number")
                    power = -power
        else:
            terms = self.sum()
        if self.at != len(self.tokens):
            raise self.fail(f"unexpected {self.peek()!r} (a law is a sum of terms such as A1*N^-a1)")
        law = Law(self.name, tuple(terms), power)
        if len(set(law.amplitudes)) != len(terms):
            raise self.fail("every term needs an amplitude of its own")
        used = law.amplitudes + law.exponents + ((power,) if isinstance(power, str) else ())
        if len(set(used)) != len(used):
            raise self.fail("a name is used both as an amplitude and as an exponent")
        shapes = [frozenset((f.variable, f.exponent, f.sign) for f in t.factors) for t in terms]
        if len(set(shapes)) != len(shapes):
            raise self.fail("two terms have the same variables and exponents, so they cannot be told apart")
        return law

    def sum(self) -> list[Term]:
        terms = [self.term()]
        while self.take("+"):
            terms.append(self.term())
        if self.peek() == "-":
            raise self.fail(
                "terms are added: amplitudes are non-negative, so there is no minus between terms"
            )
        return terms

    def term(self) -> Term:
        amplitude, factors, sign = "", [], 1
        while True:
            kind, value = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end")
            if kind != "name":
                raise self.fail(f"expected a name, found {value!r}")
            self.at += 1
            if value in self.variables:
                s, e = self.exponent() if self.take("^") else (1, 1.0)
                factors.append(Factor(value, e, s * sign))
            elif sign < 0 or self.peek() == "^":
                raise self.fail(f"{value!r} is no column of --x")
            elif amplitude:
                raise self.fail(
                    f"{value!r}: a term has one amplitude ({amplitude!r}) and otherwise only columns"
                )
            else:
                amplitude = value
            if self.take("*"):
                sign = 1
            elif self.take("/"):
                sign = -1
            else:
                break
        if not amplitude:
            raise self.fail(f"the term with {factors[0].variable!r} has no amplitude")
        return Term(amplitude, tuple(factors))

    def exponent(self) -> tuple[int, str | float]:
        bracket = self.take("(")
        sign = -1 if self.take("-") else 1
        kind, value = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end")
        if kind not in ("name", "number") or value in self.variables:
            raise self.fail(f"expected an exponent (a parameter or a number), found {value!r}")
        self.at += 1
        if bracket and not self.take(")"):
            raise self.fail("missing ')'")
        return sign, value if kind == "name" else float(value)


_LAW_TEXTS = {
    "additive": "A0 + A1*N^-a1 + A2*D^-a2",
    "additive_no_floor": "A1*N^-a1 + A2*D^-a2",
    "time_only": "A0 + A2*D^-a2",
    "size_only": "A0 + A1*N^-a1",
    "modulus_phase": "A0 + A1*M^-a1 + A3*P^-a3 + A2*D^-a2",
    "steps_fraction": "A0 + A1*N^-a1 + A2*T^-a2*S^-a4",
    "interaction": "A0 + A1*N^-a1 + A2*D^-a2 + A3*N^-a5*D^-a6",
    "kaplan": "(A1*N^-b + A2*D^-1)^g",
    "break": "(A1*N^a1*D^a2 + A3*N^a1*D^a3)^-1",
}
#: The columns a law may use: N parameters in all, M modulus, P phase, D = D', T steps, S = S_F.
VARIABLES = ("N", "M", "P", "D", "T", "S")
#: The additive law and its rivals (FIT section 5). `break`: a power law in D' that steepens, times N^-a1.
LAWS: dict[str, Law] = {key: parse_law(text, VARIABLES, key) for key, text in _LAW_TEXTS.items()}


@dataclass(frozen=True)
class Design:
    """A law on a table. n points, V variables, G groups (molecules).

    `x` (V, n) centred logs, `centre` (V,) log geometric means; `value` (n,) = L / median; `group`, `cluster`
    (n,) integer labels; `weight` (n,); `censored` (n,) True where L is only known to lie below `value`;
    `noise` (n,) additive standard error / median (asinh objective only).
    """

    law: Law
    x: np.ndarray
    centre: np.ndarray
    value: np.ndarray
    median: float
    group: np.ndarray
    group_names: tuple[str, ...]
    cluster: np.ndarray
    weight: np.ndarray
    censored: np.ndarray
    noise: np.ndarray

    @property
    def n_points(self) -> int:
        return int(self.value.size)

    @property
    def n_clusters(self) -> int:
        return int(np.unique(self.cluster).size)

    @property
    def n_parameters(self) -> int:
        return (
            len(self.law.parameters) + len(self.group_names) - 1
            if self.group_names
            else len(self.law.parameters)
        )

    def contrasts(self) -> np.ndarray:
        """(G - 1, n) sum-to-zero columns of the group intercepts; (0, n) for a single group."""
        g = len(self.group_names)
        if g < 2:
            return np.zeros((0, self.n_points))
        z = (self.group == np.arange(g - 1)[:, None]).astype(float)
        return z - (self.group == g - 1)

    def intercepts(self, beta: np.ndarray) -> np.ndarray:
        """(..., G - 1) contrasts to (..., G) intercepts that sum to zero."""
        return np.concatenate([beta, -beta.sum(axis=-1, keepdims=True)], axis=-1)

    def raw(self, c: np.ndarray, theta: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Raw amplitudes (..., K) of centred ones; theta (..., P) exponents, q (...) outer power."""
        columns = {v: float(m) for v, m in zip(self.law.variables, self.centre, strict=True)}
        index = {e: i for i, e in enumerate(self.law.exponents)}
        out = np.empty(np.broadcast_shapes(c.shape))
        for k, term in enumerate(self.law.terms):
            shift = np.zeros(c.shape[:-1])
            for f in term.factors:
                e = theta[..., index[f.exponent]] if isinstance(f.exponent, str) else f.exponent
                shift = shift - f.sign * np.where(np.isnan(e), 0.0, e) * columns[f.variable]
            out[..., k] = c[..., k] * np.exp(shift) * self.median ** (1.0 / q)
        return out


def make_design(
    law: Law,
    variables: Mapping[str, np.ndarray],
    value: np.ndarray,
    *,
    group: Sequence[str] | np.ndarray | None = None,
    cluster: Sequence[str] | np.ndarray | None = None,
    weight: np.ndarray | None = None,
    censored: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    signed: bool = False,
    runs_per_parameter: float = 1.0,
) -> Design:
    """Centre and check a table (n rows, raw units). Raises UserError for what cannot be fitted,
    with the numbers."""
    value = np.asarray(value, float)
    n = value.size
    problems = []
    logs = []
    for v in law.variables:
        column = np.asarray(variables[v], float)
        if not np.all(np.isfinite(column)) or np.any(column <= 0):
            problems.append(f"{v}: {int((~(column > 0)).sum())} of {n} values are not positive numbers")
        elif np.ptp(np.log(column)) < 1e-9:
            problems.append(f"{v}: constant ({column[0]:g}), its exponent cannot be determined")
        logs.append(np.log(np.where(column > 0, column, 1.0)))
    if not np.all(np.isfinite(value)) or (not signed and np.any(value <= 0)):
        problems.append(f"L: {int((~(value > 0)).sum())} of {n} values are not positive numbers")
    elif n > 1 and np.all(value == value[0]):
        problems.append(f"L: constant ({value[0]:g}), there is nothing to fit")
    if problems:
        raise UserError("; ".join(problems))
    names: list[str] = []
    group_index = np.zeros(n, np.int64)
    if group is not None:
        found, group_index = np.unique(np.asarray(group, str), return_inverse=True)
        names = [str(g) for g in found]
    cluster_index = (
        np.unique(np.asarray(cluster), return_inverse=True)[1] if cluster is not None else np.arange(n)
    )
    n_parameters = len(law.parameters) + max(0, len(names) - 1)
    clusters = int(np.unique(cluster_index).size)
    needed_runs = max(n_parameters + 2, math.ceil(runs_per_parameter * n_parameters))
    if clusters < needed_runs:
        raise UserError(
            f"law {law.formula}: too few points, {clusters} runs for {n_parameters} parameters, "
            f"at least {needed_runs} are needed"
        )
    for v, log in zip(law.variables, logs, strict=True):
        levels = np.unique(np.round(log, 9)).size
        needed = 1 + sum(
            1 for t in law.terms for f in t.factors if f.variable == v and isinstance(f.exponent, str)
        )
        if levels < min(needed, 4):
            raise UserError(
                f"law {law.formula}: {levels} distinct values of {v}, at least {min(needed, 4)} are needed"
            )
    stack = np.array(logs) if logs else np.zeros((0, n))
    centre = stack.mean(axis=1)
    median = float(np.median(np.abs(value) if signed else value))
    return Design(
        law=law,
        x=stack - centre[:, None],
        centre=centre,
        value=value / median,
        median=median,
        group=group_index.astype(np.int64),
        group_names=tuple(names),
        cluster=cluster_index.astype(np.int64),
        weight=np.ones(n) if weight is None else np.asarray(weight, float),
        censored=np.zeros(n, bool) if censored is None else np.asarray(censored, bool),
        noise=np.zeros(n) if noise is None else np.asarray(noise, float) / median,
    )
