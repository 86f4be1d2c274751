"""Effect sizes: how much ln L falls per e-fold of N and of D', from the law and from paired runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures import style
from figures.data import METRICS, Points, StudyData
from figures.fits import ADDITIVE, ALL, LEVEL, Fits, LawFit, summary
from figures.registry import Cell, Column, MissingData, Plot, Quantity, Sheet, Table, artefact
from figures.scaling import drawable

_RESAMPLES = 2000


@artefact(
    "elasticities",
    title="Effect of size and of training time",
    question="How much does ln L fall with N and with D′: per e-fold, and over the runs' range (claim 1)?",
    section="effects",
    kind="figure",
    needs=("fit",),
)
def elasticities(study: StudyData) -> Plot:
    """-dlnL/dlnN and -dlnL/dlnD' at the geometric means of the fitted runs, and the fall of ln L over
    the fitted range of each; joint (large) and per molecule (small)."""
    fits = study.need_fits()
    metrics = [m for m in METRICS if any(law.metric == m and law.law == ADDITIVE for law in fits.laws)]
    kinds = list(dict.fromkeys(law.ansatz for law in fits.laws if law.law == ADDITIVE))
    if not metrics:
        raise MissingData("the fit holds no additive law")
    figure = style.new_figure(style.DOUBLE, 1.1 + 0.9 * len(kinds) + 0.5)
    axes = figure.subplots(2, len(metrics), squeeze=False, sharey=True)
    rows: list[dict[str, Cell]] = []
    for j, metric in enumerate(metrics):
        for k, kind in enumerate(kinds):
            look = style.ansatz_style(kind, kinds)
            for law in fits.laws:
                if (law.ansatz, law.metric, law.law) == (kind, metric, ADDITIVE):
                    rows += _draw_effects(axes[:, j].tolist(), study, law, k, look)
        axes[0, j].set_title(style.METRIC_NAME[metric])
        axes[0, j].set_xlabel("fall of ln L per e-fold (dimensionless)")
        axes[1, j].set_xlabel("fall of ln L over the range of the runs (dimensionless)")
        for axis in axes[:, j]:
            axis.axvline(0, color=style.SOFT, lw=0.8)
            axis.set_yticks(range(len(kinds)), [style.ansatz_style(kind, kinds).label for kind in kinds])
            axis.set_ylim(len(kinds) - 0.45, -0.55)
            axis.grid(False, axis="y")
            style.plain_axis(axis, "x")
    single = Line2D(
        [], [], color=style.SOFT, marker="o", ms=2.6, ls="none", alpha=0.5, label="single molecules"
    )
    style.legend_below(
        figure,
        [
            Line2D([], [], color=style.SOFT, marker="o", lw=1.6, label="of N"),
            Line2D(
                [],
                [],
                color=style.SOFT,
                marker="D",
                mfc=style.PAPER,
                lw=1.6,
                ls=":",
                label="of D′",
            ),
            *([single] if any(row["scope"] != "joint" for row in rows) else []),
        ],
    )
    joint = [row for row in rows if row["scope"] == "joint"]
    counts = dict.fromkeys(f"{row['ansatz']} {row['n_runs']}" for row in joint)
    caption = (
        "Top: elasticities of the fitted law at the geometric means of N and D′ of the fitted runs. Bottom: "
        "fall of ln L from the smallest to the largest fitted N (or D′), the other at its geometric mean; it "
        "depends on the ranges that the runs span (CSV). Large: joint law, 95 % bootstrap interval (runs: "
        f"{', '.join(counts) or 'no joint law'})"
        + ("; small: single molecules, intervals in the CSV" if len(joint) < len(rows) else "")
        + ". Right of zero: the metric falls."
    )
    alt = (
        f"Elasticities and range effects of {', '.join(metrics)} with respect to N and D prime for "
        f"{', '.join(kinds)}, with intervals."
    )
    notes = [] if joint else ["no joint law: single molecules only"]
    columns = (
        "ansatz",
        "metric",
        "scope",
        "variable",
        "elasticity",
        "at_n",
        "at_d_prime",
        "range_effect",
        "range_from",
        "range_to",
        "n_runs",
        "point_ids",
    )
    return Plot(figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt, tuple(notes))


def _draw_effects(
    axes: Sequence[Axes], study: StudyData, law: LawFit, k: int, look: style.AnsatzStyle
) -> list[dict[str, Cell]]:
    at = law.at
    effects = zip(law.elasticities(at["N"], at["D"]), law.range_effects(), strict=True)
    rows: list[dict[str, Cell]] = []
    for variable, offset, (local, wide) in zip(("N", "D"), (-0.16, 0.16), effects, strict=True):
        joint = law.scope == ALL
        marker, face, line = ("o", look.color, "-") if variable == "N" else ("D", style.PAPER, ":")
        y = k + offset
        value, across = summary(local), summary(wide)
        for axis, drawn, name in zip(axes, (value, across), ("elasticity", "range"), strict=True):
            if joint and math.isfinite(drawn.low):
                axis.plot(
                    [drawn.low, drawn.high],
                    [y, y],
                    color=look.color,
                    lw=1.8,
                    ls=line,
                    zorder=3,
                    gid="interval",
                )
            axis.plot(
                [drawn.value],
                [y + (0.0 if joint else 0.1)],
                marker=marker,
                ms=5 if joint else 2.6,
                mfc=face,
                mec=look.color,
                alpha=1.0 if joint else 0.5,
                ls="none",
                zorder=4,
                gid=f"{name}:{law.ansatz}:{variable}",
            )
        rows.append(
            {
                "ansatz": law.ansatz,
                "metric": law.metric,
                "scope": "joint" if joint else law.scope,
                "variable": "N" if variable == "N" else "D'",
                "elasticity": value,
                "at_n": at["N"],
                "at_d_prime": at["D"],
                "range_effect": across,
                "range_from": law.span(variable)[0],
                "range_to": law.span(variable)[1],
                "n_runs": int(law.record.get("n_runs", 0)),
                "point_ids": " ".join(study.ids_of(law)),
            }
        )
    return rows


@dataclass(frozen=True)
class Paired:
    """A variant against the main one on the same cells: geometric mean ratio and shift of the
    elasticities."""

    variant: str
    metric: str
    ratio: Quantity
    shift_n: Quantity
    shift_d: Quantity
    pairs: int
    point_ids: tuple[str, ...]


def pair_variant(study: StudyData, variant: str, metric: str, level: float = LEVEL) -> Paired:
    """Compare a variant with the main one, run by run on equal (molecule, ansatz, size, steps, seed).

    Ratio: exp(mean ln(variant/main)). Shifts: slopes of ln(variant/main) on ln N and ln D' (of the main
    run), with an
    intercept per molecule and ansatz: how much less the metric falls per e-fold in the variant. Intervals:
    percentile bootstrap over (molecule, ansatz, size) clusters at `level`, 2000 resamples, fixed seed. Raises
    MissingData below 4 clusters.
    """
    main = drawable(study.headline, metric)
    other = drawable(study.done.only(variant=variant), metric)
    keys = ("molecule", "ansatz", "size", "steps", "seed")
    index = {key: i for i, key in enumerate(zip(*(main[k].tolist() for k in keys), strict=True))}
    pairs = [
        (index[key], j)
        for j, key in enumerate(zip(*(other[k].tolist() for k in keys), strict=True))
        if key in index
    ]
    if not pairs:
        raise MissingData(f"variant {variant} shares no finished run with {study.main_variant}")
    left, right = main.where(_mask(len(main), [p[0] for p in pairs])), [p[1] for p in pairs]
    order = np.argsort([p[0] for p in pairs], kind="stable")
    change = np.log(other[metric][right][order]) - np.log(left[metric])
    clusters = _codes(left, ("molecule", "ansatz", "size"))
    if clusters.max() + 1 < 4:
        raise MissingData(
            f"variant {variant}: {clusters.max() + 1} cells shared with {study.main_variant}, 4 needed"
        )
    design = _within(
        np.column_stack([np.log(left["n_total"]), np.log(left["d_prime"])]),
        _codes(left, ("molecule", "ansatz")),
    )
    target = _within(change[:, None], _codes(left, ("molecule", "ansatz")))[:, 0]
    rng = np.random.default_rng(0)
    count = int(clusters.max()) + 1
    weights = np.vstack(
        [np.ones(count), rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)]
    )[:, clusters]
    means = (weights * change).sum(axis=1) / weights.sum(axis=1)
    slopes = _slopes(design, target, weights)
    return Paired(
        variant,
        metric,
        summary(np.exp(means), level),
        summary(-slopes[:, 0], level),
        summary(-slopes[:, 1], level),
        len(pairs),
        (*left.ids, *(str(i) for i in other["point_id"][right][order])),
    )


def _mask(count: int, rows: Sequence[int]) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[list(rows)] = True
    return mask


def _codes(rows: Points, names: Sequence[str]) -> np.ndarray:
    keys = list(zip(*(rows[n].tolist() for n in names), strict=True))
    position = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([position[key] for key in keys])


def _within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values minus their group's mean (the intercepts, removed)."""
    out = values.astype(float).copy()
    for group in np.unique(groups):
        out[groups == group] -= out[groups == group].mean(axis=0)
    return out


def _slopes(design: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares for every row of weights: (B, 2); NaN for a variable that does not vary."""
    slopes = np.full((len(weights), design.shape[1]), math.nan)
    varies = np.ptp(design, axis=0) > 1e-9
    if varies.any():
        part = design[:, varies]
        gram = np.einsum("bi,ij,ik->bjk", weights, part, part)
        moment = np.einsum("bi,ij,i->bj", weights, part, target)
        good = np.linalg.cond(gram) < 1e10
        solved = np.full((len(weights), int(varies.sum())), math.nan)
        solved[good] = np.linalg.solve(gram[good], moment[good][..., None])[..., 0]
        slopes[:, varies] = solved
    return slopes


def changes(study: StudyData, variant: str) -> dict[str, Any]:
    """What a variant changes, from the spec: flattened keys and values ({} when the spec does not say)."""
    table = (study.spec.get("variants") or {}).get(variant, {})
    flat: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if not prefix and key == "only":  # where it applies, not what it changes
                continue
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(table, "")
    return flat


@artefact(
    "variant_effects",
    title="What the variants change",
    question="Do the ablations (local energy, sampling, phase network, ...) change the error, or how it "
    "scales?",
    section="effects",
    kind="table",
)
def variant_effects(study: StudyData) -> Sheet:
    """Every variant against the main one: ratio of the metric on the same cells and shift of both
    elasticities."""
    others = [name for name in study.variants if name != study.main_variant]
    if not others:
        raise MissingData("the study has one variant: nothing to compare")
    rows: list[dict[str, Cell]] = []
    notes = []
    for name in others:
        for metric in METRICS:
            try:
                paired = pair_variant(study, name, metric)
            except MissingData as gap:
                notes.append(f"{style.METRIC_NAME[metric]}: {gap}")
                continue
            what = ", ".join(f"{key} = {value}" for key, value in changes(study, name).items())
            rows.append(
                {
                    "variant": name,
                    "changes": what or "not stated in the spec",
                    "metric": style.METRIC_NAME[metric],
                    "ratio": paired.ratio,
                    "shift_n": paired.shift_n,
                    "shift_d": paired.shift_d,
                    "pairs": paired.pairs,
                    "point_ids": " ".join(paired.point_ids),
                }
            )
    if not rows:
        raise MissingData("; ".join(dict.fromkeys(notes)))
    columns = (
        Column("variant", "variant"),
        Column("changes", "changes"),
        Column("metric", "metric"),
        Column("ratio", f"ratio to {study.main_variant}"),
        Column("shift_n", "shift of elasticity in N"),
        Column("shift_d", "shift of elasticity in D′"),
        Column("pairs", "pairs of runs"),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        f"Each variant against {study.main_variant} on the same molecule, ansatz, size, T and seed. "
        f"Ratio: geometric mean of "
        "variant over main (above 1: worse). Shift: how much faster (positive) or slower (negative) the "
        "metric falls per "
        "e-fold of N or D′. Brackets: 95 % bootstrap over (molecule, ansatz, size) cells."
    )
    return Sheet(Table(columns, tuple(rows)), caption, tuple(dict.fromkeys(notes)))


def usable(fits: Fits | None, ansatz: str, metric: str) -> LawFit:
    """The headline law of an ansatz, certified and with draws; MissingData says why there is none."""
    if fits is None:
        raise MissingData("no fit")
    law = fits.best(ansatz, metric)
    if law is None:
        raise MissingData(f"{ansatz}: {fits.refusal(ansatz, metric)}")
    if not law.stationary:
        raise MissingData(f"{ansatz}: the fit has no stationary certificate")
    return law
