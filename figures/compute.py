"""Compute-optimal allocation: IsoFLOP curves, N*, D'*, T* against the budget, and the exponent of D'* ~ N*^k.

The cost of a run is C = |S| D' kappa(N). kappa is the one that the fit file stores for
`allocate` (a posynomial in N); without it, a power law c N^e fitted to the recorded FLOPs over
|S| D' of the molecule's runs. The optimum of A1 N^-a1 + A2 D'^-a2 at fixed C obeys a1 A1 N^-a1
/ eps(N) = a2 A2 D'^-a2, eps = dln kappa/dln N (SCIENCE section 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.data import METRICS, Points, StudyData
from figures.effects import usable
from figures.fits import LawFit, summary, tails
from figures.registry import Cell, Column, MissingData, Plot, Table, artefact, gathered

NEAR_LINEAR = (
    0.8,
    1.25,
)  # D'* ~ N*^k with k in this band is called near-linear (the usual equivalence bounds)
LANGUAGE_MODEL_K = 1.0
_BUDGETS = 5
_NEWTON = 200  # steps at most; the bracket halves where Newton would leave it


@dataclass(frozen=True)
class Cost:
    """C = space kappa(N) D' with kappa = sum_j k_j N^p_j; `fraction` = mean S_F (T = D'/S_F)."""

    molecule: str
    space: float
    coefficients: tuple[float, ...]
    powers: tuple[float, ...]
    fraction: float
    n_span: tuple[float, float]
    budget_span: tuple[float, float]
    misfit: float  # largest |ln| between kappa and the runs
    point_ids: tuple[str, ...]

    def kappa(self, log_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ln kappa, eps and deps/dln N at ln N."""
        power = np.array(self.powers).reshape((-1,) + (1,) * np.ndim(log_n))
        terms = np.log(self.coefficients).reshape(power.shape) + power * log_n
        top = terms.max(axis=0)
        share = np.exp(terms - top)
        total = share.sum(axis=0)
        eps = (share / total * power).sum(axis=0)
        return top + np.log(total), eps, (share / total * power**2).sum(axis=0) - eps**2

    def d_prime(self, budget: np.ndarray | float, n: np.ndarray) -> np.ndarray:
        """D' that the budget (FLOP) buys at size n."""
        return np.asarray(budget / self.space * np.exp(-self.kappa(np.log(n))[0]))


def cost_of(study: StudyData, molecule: str, kind: str, column: str) -> Cost:
    """The cost law of a molecule's runs. `column`: "flops_estimated" or "flops_executed"; MissingData
    below 3 sizes."""
    rows = study.headline.only(molecule=molecule, ansatz=kind)
    good = (
        np.isfinite(rows[column]) & (rows[column] > 0) & np.isfinite(rows["d_prime"]) & (rows["d_prime"] > 0)
    )
    rows = rows.where(good)
    if len(set(rows["n_total"].tolist())) < 3:
        raise MissingData(f"{kind}, {molecule}: fewer than 3 sizes with recorded FLOPs")
    space = float(study.molecules[molecule]["search_space"])
    n = rows["n_total"].astype(float)
    kappa = rows[column] / (space * rows["d_prime"])
    stored = _stored_kappa(study, molecule, kind, column)
    if stored is None:
        e, log_c = np.polyfit(np.log(n), np.log(kappa), 1)
        stored = (math.exp(log_c),), (float(e),)
    cost = Cost(
        molecule,
        space,
        *stored,
        math.exp(float(np.mean(np.log(rows["search_fraction"])))),
        (float(n.min()), float(n.max())),
        (float(rows[column].min()), float(rows[column].max())),
        0.0,
        tuple(rows.ids),
    )
    return replace(cost, misfit=float(np.max(np.abs(np.log(kappa) - cost.kappa(np.log(n))[0]))))


def _stored_kappa(
    study: StudyData, molecule: str, kind: str, column: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Coefficients and powers that the fit file stores for `allocate`; terms with coefficient 0 left out."""
    entry = study.fits.section("allocation", kind, "v_score") if study.fits is not None else None
    model = (((entry or {}).get("flop_models") or {}).get(molecule) or {}).get(column)
    if not model:
        return None
    terms = [
        (float(k), float(p)) for k, p in zip(model["coefficients"], model["powers"], strict=True) if k > 0
    ]
    return tuple(k for k, _ in terms), tuple(p for _, p in terms)


def reference_molecule(study: StudyData, points: Points) -> str:
    """The molecule whose costs are drawn: the one of median sector size (the lower of two)."""
    names = sorted(points.unique("molecule"), key=lambda name: study.molecules[name]["search_space"])
    return str(names[(len(names) - 1) // 2])


def optimum(law: LawFit, cost: Cost, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N*, D'*) for each budget: arrays (1 + B, budgets), estimate first; NaN where a term is
    absent in a draw.

    Newton's method in ln N on the first-order condition, which is monotone, kept inside a bracket.
    """
    p = {name: values[:, None] for name, values in law.stacked().items()}
    good = (p["A1"] > 0) & (p["A2"] > 0) & (p["a1"] > 0) & (p["a2"] > 0)
    p = {name: np.where(good, value, 1.0) for name, value in p.items()}
    log_x = np.log(budget / cost.space)[None, :]
    left = np.log(p["a1"] * p["A1"]) - np.log(p["a2"] * p["A2"])
    low = np.full(np.broadcast_shapes(left.shape, log_x.shape), -50.0)
    high, log_n = -low * 4, np.zeros_like(low) + 10.0
    for _ in range(_NEWTON):
        log_k, eps, slope = cost.kappa(log_n)
        excess = left - p["a1"] * log_n - np.log(eps) + p["a2"] * (log_x - log_k)
        low, high = np.where(excess > 0, log_n, low), np.where(excess > 0, high, log_n)
        step = log_n + excess / (p["a1"] + p["a2"] * eps + slope / eps)
        step = np.where((step > low) & (step < high), step, (low + high) / 2)
        done = bool(np.all(np.abs(step - log_n) <= 1e-13 * np.maximum(1, np.abs(log_n))))
        log_n = step
        if done:
            break
    log_d = log_x - cost.kappa(log_n)[0]
    return np.where(good, np.exp(log_n), np.nan), np.where(good, np.exp(log_d), np.nan)


def interior(study: StudyData, kind: str, metric: str) -> LawFit:
    """The law, if the fit identified an interior optimum for it; MissingData otherwise, with
    the fit's reason."""
    law = usable(study.fits, kind, metric)
    entry = study.fits.section("allocation", kind, metric) if study.fits is not None else None
    if entry is not None and entry.get("status") != "ok":
        reason = f" ({entry.get('reason')})" if entry.get("reason") else ""
        raise MissingData(f"{kind}, {style.METRIC_NAME[metric]}: {entry.get('status')}{reason}")
    if not (law.estimates.get("A1", 0) > 0 and law.estimates.get("A2", 0) > 0):
        raise MissingData(
            f"{kind}, {style.METRIC_NAME[metric]}: a term of the law is absent, no interior optimum"
        )
    return law


def _power(value: float) -> str:
    """A budget in a title: 2×10^11 with one digit."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"${mantissa}{{\\times}}10^{{{int(exponent)}}}$"


def _within(cases: Sequence[tuple[str, str, LawFit, Cost]]) -> str:
    return f"{100 * math.expm1(max(cost.misfit for *_, cost in cases)):.0f} %"


def _cases(study: StudyData, notes: list[str]) -> list[tuple[str, str, LawFit, Cost]]:
    points = study.need_headline()
    study.need_fits()
    molecule = reference_molecule(study, points)
    found = []
    for metric in METRICS:
        for kind in points.unique("ansatz"):
            try:
                found.append(
                    (
                        metric,
                        kind,
                        interior(study, kind, metric),
                        cost_of(study, molecule, kind, "flops_estimated"),
                    )
                )
            except MissingData as gap:
                notes.append(str(gap))
    if not found:
        raise MissingData("no interior optimum: " + "; ".join(gathered(notes)))
    return found


@artefact(
    "isoflop",
    title="IsoFLOP curves",
    question="At a fixed budget, which model size gives the lowest error?",
    section="compute",
    kind="figure",
    needs=("final", "fit", "molecule"),
)
def isoflop(study: StudyData) -> Plot:
    """L along curves of equal estimated FLOPs against N, with the optimum and its interval, per
    ansatz and metric."""
    notes: list[str] = []
    cases = _cases(study, notes)
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in cases))
    metrics = list(dict.fromkeys(metric for metric, *_ in cases))
    figure = style.new_figure(style.DOUBLE if len(kinds) > 1 else style.SINGLE, 2.0 * len(metrics) + 0.6)
    axes = figure.subplots(len(metrics), len(kinds), squeeze=False, sharey="row")
    rows: list[dict[str, Cell]] = []
    drawn = set()
    shown: dict[str, list[np.ndarray]] = {}
    for metric, kind, law, cost in cases:
        axis = axes[metrics.index(metric), kinds.index(kind)]
        drawn.add((metric, kind))
        look = style.ansatz_style(kind, kinds)
        where = cost.molecule if cost.molecule in law.intercepts else None
        budgets = np.geomspace(*cost.budget_span, _BUDGETS + 2)[1:-1]
        sizes = np.geomspace(cost.n_span[0] / 30, cost.n_span[1] * 30, 160)
        best, _ = optimum(law, cost, budgets)
        for b, budget in enumerate(budgets):
            error = law.value(sizes, cost.d_prime(budget, sizes), where)
            inside = (sizes >= cost.n_span[0]) & (sizes <= cost.n_span[1])
            shown.setdefault(metric, []).append(error[inside])
            alpha = 0.35 + 0.65 * b / (_BUDGETS - 1)
            beyond = np.where(inside, np.nan, error)
            axis.plot(sizes, beyond, color=look.color, lw=0.8, ls=":", alpha=alpha, gid=f"outside:{b}")
            axis.plot(sizes[inside], error[inside], color=look.color, lw=1.3, alpha=alpha, gid=f"isoflop:{b}")
            star = summary(best[:, b])
            at = float(law.value(star.value, cost.d_prime(budget, np.array(star.value)), where))
            if math.isfinite(star.low):
                axis.plot(
                    [star.low, star.high],
                    [at, at],
                    color=look.color,
                    lw=1.6,
                    alpha=alpha,
                    zorder=4,
                    gid="interval",
                )
            axis.plot(
                [star.value],
                [at],
                marker=look.marker,
                color=look.color,
                mec=style.PAPER,
                mew=0.5,
                ms=5,
                zorder=5,
                gid="optimum",
            )
            rows.append(
                {
                    "metric": metric,
                    "ansatz": kind,
                    "molecule": cost.molecule,
                    "budget_flop": float(budget),
                    "n_star": star,
                    "value_at_n_star": at,
                    "inside_data": bool(cost.n_span[0] <= star.value <= cost.n_span[1]),
                    "point_ids": " ".join(cost.point_ids),
                }
            )
        axis.axvspan(*cost.n_span, color=style.SOFT, alpha=0.1, lw=0, zorder=0)
        style.log_axis(axis, "x", [cost.n_span[0] / 12, cost.n_span[1] * 12], pad=1.0)
        if (metric, kind) == next(case[:2] for case in cases if case[1] == kind):
            axes[0, kinds.index(kind)].set_title(
                f"{look.label}, {_power(budgets[0])} to {_power(budgets[-1])} FLOP"
            )
    for i, metric in enumerate(metrics):
        style.log_axis(axes[i, 0], "y", np.concatenate(shown[metric]), pad=1.6)
        axes[i, 0].set_ylabel(style.METRIC_LABEL[metric])
        for j, kind in enumerate(kinds):
            if (metric, kind) not in drawn:
                style.note_panel(axes[i, j], "no interior optimum\nidentified")
    for axis in axes[-1]:
        axis.set_xlabel(style.AXIS_LABEL["n_total"])
    spans = [row["budget_flop"] for row in rows if isinstance(row["budget_flop"], float)]
    style.legend_below(
        figure,
        [
            Line2D([], [], color=style.SOFT, lw=1.3, label="equal FLOP"),
            Line2D([], [], color=style.SOFT, lw=0.8, ls=":", label="outside the data"),
            Line2D([], [], color=style.SOFT, marker="o", lw=1.6, label="optimum, 95 %"),
            Patch(color=style.SOFT, alpha=0.2, lw=0, label="N of the runs"),
        ],
    )
    caption = (
        f"Fitted error along curves of equal estimated compute, {_BUDGETS} budgets per panel between "
        f"{min(spans):.1e} and {max(spans):.1e} FLOP, with the costs of {cases[0][3].molecule} (median "
        f"sector of the "
        f"study; the cost law is within {_within(cases)} of the runs). Shaded: sizes of the runs; dotted: "
        f"extrapolation. Stronger lines: more compute."
    )
    alt = "IsoFLOP curves of error against parameters with the optimum of each budget marked."
    columns = (
        "metric",
        "ansatz",
        "molecule",
        "budget_flop",
        "n_star",
        "value_at_n_star",
        "inside_data",
        "point_ids",
    )
    return Plot(
        figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt, tuple(gathered(notes))
    )


@artefact(
    "front",
    title="The compute-optimal front",
    question="How should a budget be split: N*, D′* and T* against C?",
    section="compute",
    kind="figure",
    needs=("final", "fit", "molecule"),
)
def front(study: StudyData) -> Plot:
    """N*, D'* and T* against the budget with 95 % bands; thick inside the range of the data."""
    notes: list[str] = []
    cases = _cases(study, notes)
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in cases))
    metrics = list(dict.fromkeys(metric for metric, *_ in cases))
    figure = style.new_figure(style.DOUBLE, 2.0 * len(metrics) + 0.55)
    axes = figure.subplots(len(metrics), 3, squeeze=False, sharex=True, sharey="col")
    low = min(cost.budget_span[0] for *_, cost in cases)
    high = max(cost.budget_span[1] for *_, cost in cases)
    budgets = np.geomspace(low / 10, high * 100, 25)
    rows: list[dict[str, Cell]] = []
    seen: list[list[float]] = [[], [], []]
    for metric, kind, law, cost in cases:
        look = style.ansatz_style(kind, kinds)
        n, d = optimum(law, cost, budgets)
        inside = (n[0] >= cost.n_span[0]) & (n[0] <= cost.n_span[1])
        inside &= (budgets >= cost.budget_span[0]) & (budgets <= cost.budget_span[1])
        for j, values in enumerate((n, d, d / cost.fraction)):
            axis = axes[metrics.index(metric), j]
            seen[j] += values[0].tolist()
            # The last inside budget belongs to both, so that the thin line meets the thick one.
            outside = ~inside | np.append(~inside[1:], False) | np.append(False, ~inside[:-1])
            axis.plot(
                budgets,
                np.where(outside, values[0], np.nan),
                color=look.color,
                ls=look.line,
                lw=0.8,
                alpha=0.8,
                gid=f"front:{kind}",
            )
            axis.plot(
                budgets,
                np.where(inside, values[0], np.nan),
                color=look.color,
                ls=look.line,
                lw=2.0,
                gid=f"inside:{kind}",
            )
            if len(values) > 100:
                band = np.nanpercentile(values[1:], tails(), axis=0)
                axis.fill_between(budgets, *band, color=look.color, alpha=0.16, lw=0, gid=f"band:{kind}")
        for b in range(0, len(budgets), 3):
            rows.append(
                {
                    "metric": metric,
                    "ansatz": kind,
                    "molecule": cost.molecule,
                    "budget_flop": float(budgets[b]),
                    "n_star": summary(n[:, b]),
                    "d_prime_star": summary(d[:, b]),
                    "t_star": summary(d[:, b] / cost.fraction),
                    "inside_data": bool(inside[b]),
                    "point_ids": " ".join(cost.point_ids),
                }
            )
    labels = ("N* (count)", "D′* (steps)", "T* (steps)")
    for i, metric in enumerate(metrics):
        for j, label in enumerate(labels):
            axes[i, j].axvspan(low, high, color=style.SOFT, alpha=0.1, lw=0, zorder=0)
            axes[i, j].set_ylabel(label)
            style.log_axis(axes[i, j], "x", budgets, pad=1.0, max_ticks=4)
        for j in range(3):
            axes[i, j].set_title(style.METRIC_NAME[metric])
    for j in range(3):
        style.log_axis(axes[0, j], "y", seen[j], pad=2)
    for axis in axes[-1]:
        axis.set_xlabel(style.AXIS_LABEL["flops_estimated"])
    handles: list[Line2D | Patch] = list(style.ansatz_handles(kinds))
    for entry in handles:
        if isinstance(entry, Line2D):
            entry.set_marker("")
    handles += [
        Line2D([], [], color=style.SOFT, lw=2.0, label="inside the data"),
        Patch(color=style.ansatz_style(kinds[0], kinds).color, alpha=0.25, lw=0, label="95 % band"),
        Patch(color=style.SOFT, alpha=0.2, lw=0, label="budgets of the runs"),
    ]
    style.legend_below(figure, handles)
    caption = (
        f"Compute-optimal size, D′ and steps against the budget for {cases[0][3].molecule} (the study's "
        f"median sector), by "
        "the study's FLOP accounting. Bands: 95 % of the bootstrap draws. Thick: inside the sizes and "
        "budgets of the runs; "
        "thin: extrapolation. T* = D′*/S_F at the runs' mean S_F; S_F may not exceed 1."
    )
    alt = "Optimal N, D prime and T against compute for every ansatz with an interior optimum."
    columns = (
        "metric",
        "ansatz",
        "molecule",
        "budget_flop",
        "n_star",
        "d_prime_star",
        "t_star",
        "inside_data",
        "point_ids",
    )
    return Plot(
        figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt, tuple(gathered(notes))
    )


@artefact(
    "exponent",
    title="The exponent of D′* against N*",
    question="Is the optimal relation D′* ~ N*^k near-linear, as for language models (k = 1)?",
    section="compute",
    kind="figure",
    needs=("fit",),
)
def exponent(study: StudyData) -> Plot:
    """k = a1/a2 per ansatz and metric with its interval, beside the near-linear band."""
    fits = study.need_fits()
    notes: list[str] = []
    cases = []
    kinds = list(dict.fromkeys(law.ansatz for law in fits.laws))
    for metric in METRICS:
        for kind in kinds:
            try:
                law = interior(study, kind, metric)
            except MissingData as gap:
                notes.append(str(gap))
                continue
            cases.append((metric, kind, law, summary(law.ratio())))
    if not cases:
        raise MissingData("no interior optimum: " + "; ".join(gathered(notes)))
    figure = style.new_figure(style.SINGLE + 0.6, 1.1 + 0.3 * len(cases))
    axis = figure.subplots()
    axis.axvspan(*NEAR_LINEAR, color=style.SOFT, alpha=0.15, lw=0, zorder=0)
    axis.axvline(LANGUAGE_MODEL_K, color=style.SOFT, lw=1.0, ls=(0, (3, 2)), gid="language models")
    rows: list[dict[str, Cell]] = []
    for y, (metric, kind, law, k) in enumerate(cases):
        look = style.ansatz_style(kind, kinds)
        if math.isfinite(k.low):
            axis.plot([k.low, k.high], [y, y], color=look.color, lw=1.8, gid="interval")
        axis.plot([k.value], [y], marker=look.marker, color=look.color, ms=5, gid=f"k:{kind}:{metric}")
        rows.append(
            {
                "metric": metric,
                "ansatz": kind,
                "k": k,
                "n_runs": int(law.record.get("n_runs", 0)),
                "point_ids": " ".join(study.ids_of(law)),
            }
        )
    axis.set_yticks(
        range(len(cases)),
        [f"{style.ansatz_style(k, kinds).label}, {style.METRIC_NAME[m]}" for m, k, *_ in cases],
    )
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_xlabel("k = α$_1$/α$_2$ in D′* ~ N*$^k$ (dimensionless)")
    ends = [v for *_, k in cases for v in (k.low, k.high, k.value) if math.isfinite(v) and v > 0]
    style.log_axis(axis, "x", [*ends, *NEAR_LINEAR])
    axis.grid(False, axis="y")
    style.legend_below(
        figure,
        [
            Line2D([], [], color=style.SOFT, lw=1.0, ls=(0, (3, 2)), label="language models (k = 1)"),
            Patch(color=style.SOFT, alpha=0.25, lw=0, label="near-linear"),
        ],
    )
    caption = (
        "Exponent of the optimal relation with 95 % bootstrap interval. Dashed: language models (k = 1); "
        "shaded: "
        f"near-linear, k in [{NEAR_LINEAR[0]:g}, {NEAR_LINEAR[1]:g}]."
    )
    alt = (
        "Exponent k of D prime star against N star per ansatz and metric with intervals; reference line "
        "at one."
    )
    columns = ("metric", "ansatz", "k", "n_runs", "point_ids")
    return Plot(
        figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt, tuple(gathered(notes))
    )
