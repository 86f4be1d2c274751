"""Can the fit be trusted: residuals, held-out runs, sensitivity to choices, profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.data import DIMS, METRICS, StudyData
from figures.fits import LawFit
from figures.registry import Cell, Column, MissingData, Plot, Quantity, Sheet, Table, artefact, numbers
from figures.scaling import drawable

_AXES = ("n_total", "d_prime", "steps", "search_fraction", "fitted", "molecule")
_BINS = 6
_HEADLINE = "headline fit"
_PROFILE_TOP = 2.5  # of a profile axis, in units of the cut


def _headline_laws(study: StudyData, metric: str) -> list[LawFit]:
    fits = study.need_fits()
    kinds = list(dict.fromkeys(law.ansatz for law in fits.laws))
    laws = [law for kind in kinds if (law := fits.best(kind, metric)) is not None]
    if not laws:
        raise MissingData(f"the fit holds no additive law for the {style.METRIC_NAME[metric]}")
    return laws


def residual_columns(law: LawFit) -> dict[str, np.ndarray]:
    """The fitted points of a law with `residual` = ln(observed/fitted); MissingData without fit.nc."""
    needed = (*DIMS, "n_total", "d_prime", "search_fraction", "fitted", "residual")
    if any(name not in law.residuals for name in needed):
        raise MissingData("the fit's draws file (fit.nc) is absent or lacks the residuals")
    return {name: law.residuals[name] for name in needed}


def residual_figure(study: StudyData, metric: str) -> Plot:
    """ln(observed/fitted) against N, D', T, S_F, the fitted value and by molecule; running medians."""
    laws = _headline_laws(study, metric)
    kinds = [law.ansatz for law in laws]
    figure = style.new_figure(style.DOUBLE, 4.2)
    axes = list(figure.subplots(2, 3, sharey=True).flat)
    rows: list[dict[str, Cell]] = []
    columns = [residual_columns(law) for law in laws]
    molecules = list(dict.fromkeys(str(m) for c in columns for m in c["molecule"]))
    for j, (law, points) in enumerate(zip(laws, columns, strict=True)):
        look = style.ansatz_style(law.ansatz, kinds)
        for axis, name in zip(axes, _AXES, strict=True):
            x = points[name]
            if name == "molecule":
                x = np.array([molecules.index(str(m)) for m in x]) + (j - (len(laws) - 1) / 2) * 0.22
            axis.plot(
                x,
                points["residual"],
                ls="none",
                marker=look.marker,
                color=look.color,
                ms=2.4,
                alpha=0.4,
                mew=0,
                gid=f"residual:{law.ansatz}",
            )
            _running_median(axis, np.asarray(x, float), points["residual"], look, name == "molecule")
        ids = study.ids_of(law)
        rows += [
            {
                "ansatz": law.ansatz,
                **{name: _plain(points[name][i]) for name in (*DIMS[:1], *DIMS[2:], "n_total", "d_prime")},
                "search_fraction": float(points["search_fraction"][i]),
                "fitted": float(points["fitted"][i]),
                "residual": float(points["residual"][i]),
                "point_id": ids[i],
            }
            for i in range(len(points["residual"]))
        ]
    for axis, name in zip(axes, _AXES, strict=True):
        axis.axhline(0, color=style.SOFT, lw=0.8)
        if name == "molecule":
            axis.set_xticks(range(len(molecules)), [style.formula(m) for m in molecules])
            axis.tick_params(axis="x", labelrotation=35 if len(molecules) > 5 else 0)
            axis.grid(False, axis="x")
        else:
            style.log_axis(axis, "x", np.concatenate([c[name] for c in columns]), max_ticks=4)
        axis.set_xlabel(
            f"fitted {style.METRIC_LABEL[metric]}" if name == "fitted" else style.AXIS_LABEL[name]
        )
    reach = float(np.quantile(np.abs(numbers(rows, "residual")), 0.995))
    axes[0].set_ylim(-1.15 * reach, 1.15 * reach)
    style.plain_axis(axes[0], "y")
    figure.supylabel("residual, ln(observed/fitted) (dimensionless)", fontsize=8)
    style.legend_below(figure, style.ansatz_handles(kinds, line=False))
    outside = sum(abs(value) > 1.15 * reach for value in numbers(rows, "residual"))
    scatter = ", ".join(
        f"{law.ansatz} {np.std(c['residual']):.2f} ({len(c['residual'])} runs)"
        for law, c in zip(laws, columns, strict=True)
    )
    caption = (
        f"Residuals of the headline law of the {style.METRIC_NAME[metric]}; lines: running medians. "
        f"Standard deviation: "
        f"{scatter}. A trend along any axis means that the law is wrong there."
        + (f" {outside} residuals lie outside the axis (in the CSV)." if outside else "")
    )
    alt = "Six panels of residuals against N, D prime, T, S_F, fitted value and molecule."
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt)


def _plain(value: Any) -> Cell:
    item = value.item() if hasattr(value, "item") else value
    return int(item) if isinstance(item, float) and item.is_integer() and abs(item) > 1 else item


def _running_median(
    axis: Axes, x: np.ndarray, y: np.ndarray, look: style.AnsatzStyle, by_label: bool
) -> None:
    order = np.argsort(x, kind="stable")
    few = by_label or len(np.unique(x)) <= _BINS + 2
    groups = (
        [order[x[order] == value] for value in np.unique(x)]
        if few
        else np.array_split(order, min(_BINS, len(order)))
    )
    centres = [float(np.median(x[g])) for g in groups if len(g)]
    medians = [float(np.median(y[g])) for g in groups if len(g)]
    axis.plot(
        centres,
        medians,
        color=look.color,
        lw=0 if by_label else 1.4,
        ls=look.line,
        gid="median",
        marker="_" if by_label else "",
        ms=9,
        mew=1.6,
    )


@artefact(
    "residuals_v_score",
    title="Residuals of the V-score law",
    question="Is the law right along every axis (V-score)?",
    section="diagnostics",
    kind="figure",
    needs=("fit",),
)
def residuals_v_score(study: StudyData) -> Plot:
    """Residuals of the V-score's headline laws."""
    return residual_figure(study, "v_score")


@artefact(
    "residuals_abs_error",
    title="Residuals of the energy-error law",
    question="Is the law right along every axis (absolute error)?",
    section="diagnostics",
    kind="figure",
    needs=("fit",),
)
def residuals_abs_error(study: StudyData) -> Plot:
    """Residuals of the absolute error's headline laws."""
    return residual_figure(study, "abs_error")


def predict_held_out(
    study: StudyData, law: LawFit, metric: str
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Held-out runs of a law's ansatz with prediction and 90 % interval: (runs, predicted, low, high).

    The interval joins parameter draws with resampled residuals (fixed seed). Runs of a molecule without an
    intercept
    are predicted at the mean level.
    """
    rows = drawable(study.done.only(ansatz=law.ansatz, variant=study.main_variant), metric)
    rows = rows.where(np.isin(rows["point_id"], sorted(study.held_out)))
    shift = np.exp([law.intercepts.get(str(m), 0.0) for m in rows["molecule"]])
    predicted = law.value(rows["n_total"], rows["d_prime"]) * shift
    if not law.draws or "residual" not in law.residuals or not len(rows):
        nothing = np.full(len(rows), math.nan)
        return rows, predicted, nothing, nothing
    rng = np.random.default_rng(0)
    curves = np.stack(
        [
            draw * rng.choice(np.exp(law.residuals["residual"]), size=len(rows)) * shift
            for draw in law.draw_values(rows["n_total"], rows["d_prime"])
        ]
    )
    low, high = np.nanpercentile(curves, [5, 95], axis=0)
    return rows, predicted, low, high


@artefact(
    "held_out",
    title="Predicted against held-out",
    question="Does the law predict runs that it was not fitted to?",
    section="diagnostics",
    kind="figure",
    needs=("final", "fit"),
)
def held_out(study: StudyData) -> Plot:
    """Observed against predicted for every held-out run, with 90 % prediction intervals, per metric."""
    study.need_fits()
    if not study.held_out:
        raise MissingData("the study holds no run out")
    rows: list[dict[str, Cell]] = []
    notes: list[str] = []
    metrics: dict[str, list[LawFit]] = {}
    for metric in METRICS:
        try:
            metrics[metric] = _headline_laws(study, metric)
        except MissingData as gap:
            notes.append(str(gap))
    if not metrics:
        raise MissingData("; ".join(notes))
    figure = style.new_figure(style.DOUBLE if len(metrics) > 1 else style.SINGLE, 3.2)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    kinds = [law.ansatz for laws in metrics.values() for law in laws]
    kinds = list(dict.fromkeys(kinds))
    covered: dict[str, list[int]] = {}
    for axis, (metric, laws) in zip(axes, metrics.items(), strict=True):
        limits: list[float] = []
        for law in laws:
            look = style.ansatz_style(law.ansatz, kinds)
            runs, predicted, low, high = predict_held_out(study, law, metric)
            observed = runs[metric]
            limits += [*predicted, *observed, *low, *high]
            if np.isfinite(low).any():
                axis.vlines(observed, low, high, color=look.color, lw=0.7, alpha=0.4, gid="interval")
            axis.plot(
                observed,
                predicted,
                ls="none",
                marker=look.marker,
                mfc=style.PAPER,
                mec=look.color,
                mew=0.8,
                ms=3.6,
                gid=f"held-out:{law.ansatz}",
            )
            for i in range(len(runs)):
                inside = bool(low[i] <= observed[i] <= high[i]) if math.isfinite(low[i]) else None
                if inside is not None:
                    tally = covered.setdefault(metric, [0, 0])
                    tally[0] += inside
                    tally[1] += 1
                rows.append(
                    {
                        "metric": metric,
                        "ansatz": law.ansatz,
                        "molecule": str(runs["molecule"][i]),
                        "size": str(runs["size"][i]),
                        "steps": int(runs["steps"][i]),
                        "seed": int(runs["seed"][i]),
                        "observed": float(observed[i]),
                        "predicted": Quantity(float(predicted[i]), float(low[i]), float(high[i])),
                        "covered": inside,
                        "level_known": str(runs["molecule"][i]) in law.intercepts or not law.intercepts,
                        "point_id": runs.ids[i],
                    }
                )
        axis.set_title(style.METRIC_NAME[metric])
        if limits:
            for which in ("x", "y"):
                style.log_axis(axis, which, limits, pad=1.5, max_ticks=5)
            ends = axis.get_xlim()
            axis.plot(ends, ends, color=style.SOFT, lw=0.8, ls=(0, (3, 2)), zorder=1, gid="equality")
        axis.set_xlabel(f"observed {style.METRIC_LABEL[metric]}")
        axis.set_ylabel("predicted (same unit)")
    if not rows:
        raise MissingData("no held-out run has finished")
    style.legend_below(figure, style.ansatz_handles(kinds, line=False))
    unknown = sum(row["level_known"] is False for row in rows)
    share = "; ".join(
        f"{style.METRIC_NAME[m]}: {inside} of {total}" for m, (inside, total) in covered.items()
    )
    caption = (
        f"{len(rows)} held-out observations against the law's prediction with 90 % prediction intervals "
        f"(parameter draws "
        f"and resampled residuals). Inside the interval: {share or 'no intervals'}."
        + (
            f" {unknown} belong to a molecule that the fit never saw and are predicted at the mean level."
            if unknown
            else ""
        )
    )
    alt = "Predicted against observed values of held-out runs on log axes with the line of equality."
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt, tuple(notes))


@artefact(
    "hold_out_scores",
    title="Hold-out scores",
    question="How well does the law predict, by kind of hold-out?",
    section="diagnostics",
    kind="table",
    needs=("fit",),
)
def hold_out_scores(study: StudyData) -> Sheet:
    """Median |ln error|, CRPS, coverage and width of the 90 % interval, as the fit computed them."""
    return _from_fit(
        study,
        "hold_out",
        (
            ("name", "hold-out"),
            ("n", "n"),
            ("median_abs_log_error", "median |ln error|"),
            ("crps", "CRPS"),
            ("coverage_90", "coverage of 90 %"),
            ("width_90", "width (ln)"),
        ),
        "Scores of predictions for runs that the fit refused to read, from the fit file.",
    )


@artefact(
    "selection",
    title="Rival laws",
    question="Does another law describe or predict the runs better?",
    section="diagnostics",
    kind="table",
    needs=("fit",),
)
def selection(study: StudyData) -> Sheet:
    """Every candidate law with its information criteria and predictive scores, as the fit computed them."""
    return _from_fit(
        study,
        "selection",
        (
            ("rank", "rank"),
            ("law", "law"),
            ("formula", "formula"),
            ("parameters", "parameters"),
            ("aicc", "AICc"),
            ("mean_crps", "mean CRPS"),
            ("scores.molecule.crps", "left-out molecule"),
            ("scores.largest N.crps", "left-out largest N"),
            ("scores.largest D'.crps", "left-out largest D′"),
        ),
        "Candidate laws, from the fit file, by rank: mean CRPS (in ln L, smaller is better) of "
        "predictions for left-out "
        "molecules, largest sizes and longest runs decides, AICc breaks ties. Coverage, widths and "
        "residual tests: CSV.",
    )


def _from_fit(study: StudyData, section: str, wanted: Sequence[tuple[str, str]], caption: str) -> Sheet:
    fits = study.need_fits()
    rows: list[dict[str, Cell]] = []
    for entry in fits.record.get(section) or []:
        law = fits.best(str(entry.get("ansatz")), str(entry.get("metric")))
        for row in entry.get("rows") or []:
            flat: dict[str, Cell] = {
                "metric": style.METRIC_NAME.get(str(entry.get("metric")), str(entry.get("metric"))),
                "ansatz": style.ansatz_style(str(entry.get("ansatz"))).label,
            }
            flat |= _flat(row)
            flat["point_ids"] = " ".join(study.ids_of(law)) if law is not None else ""
            rows.append(flat)
    if not rows:
        raise MissingData(f"the fit file holds no {section.replace('_', ' ')}")
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "point_ids"))
    labels = dict(wanted)
    shown = {"metric", "ansatz", *labels} if wanted else set(keys)
    keys.sort(
        key=lambda key: list(labels).index(key) if key in labels else (-1 if key in shown else len(labels))
    )
    columns = [Column(key, labels.get(key, key.replace("_", " ")), csv_only=key not in shown) for key in keys]
    return Sheet(Table((*columns, Column("point_ids", "point ids", csv_only=True)), tuple(rows)), caption)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    flat: dict[str, Cell] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = " ".join(str(item) for item in value)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@artefact(
    "sensitivity",
    title="Sensitivity of the exponents",
    question="Do the exponents depend on the objective and other choices of the fit?",
    section="diagnostics",
    kind="figure",
    needs=("fit",),
)
def sensitivity(study: StudyData) -> Plot:
    """alpha_1 and alpha_2 under every choice that the fit tried, per ansatz and metric."""
    fits = study.need_fits()
    entries = [e for e in fits.record.get("sensitivity") or [] if e.get("rows")]
    if not entries:
        raise MissingData("the fit file holds no sensitivity rows")
    metrics = [m for m in METRICS if any(e["metric"] == m for e in entries)]
    kinds = list(dict.fromkeys(str(e["ansatz"]) for e in entries))
    whats = {
        m: [
            _HEADLINE,
            *dict.fromkeys(str(row["what"]) for e in entries if e["metric"] == m for row in e["rows"]),
        ]
        for m in metrics
    }
    heights = [len(whats[m]) for m in metrics]
    figure = style.new_figure(style.DOUBLE, 0.75 + 0.35 * len(metrics) + 0.22 * sum(heights))
    axes = figure.subplots(len(metrics), 2, squeeze=False, sharey="row", height_ratios=heights)
    rows: list[dict[str, Cell]] = []
    for entry in entries:
        kind, metric = str(entry["ansatz"]), str(entry["metric"])
        look = style.ansatz_style(kind, kinds)
        offset = (kinds.index(kind) - (len(kinds) - 1) / 2) * 0.26
        law = fits.best(kind, metric)
        choices = [dict(row) for row in entry["rows"]]
        if law is not None:
            own = {"what": _HEADLINE, "parameters": law.estimates, "intervals": law.record.get("intervals")}
            choices.insert(0, own)
        for row in choices:
            y = whats[metric].index(str(row["what"])) + offset
            for j, name in enumerate(("a1", "a2")):
                value = (row.get("parameters") or {}).get(name)
                if value is None or not math.isfinite(value):
                    continue
                axis = axes[metrics.index(metric), j]
                interval = (row.get("intervals") or {}).get(name)
                low, high = interval if interval and None not in interval else (math.nan, math.nan)
                if math.isfinite(low):
                    axis.plot([low, high], [y, y], color=look.color, lw=1.2, gid="interval")
                axis.plot(
                    [value],
                    [y],
                    marker=look.marker,
                    color=look.color,
                    ms=3.6,
                    ls="none",
                    gid=f"{name}:{kind}",
                )
                rows.append(
                    {
                        "metric": metric,
                        "ansatz": kind,
                        "choice": str(row["what"]),
                        "parameter": name,
                        "value": Quantity(float(value), float(low), float(high)),
                        "point_ids": " ".join(study.ids_of(law)) if law is not None else "",
                    }
                )
    if not rows:
        raise MissingData("no sensitivity row has an exponent")
    for i, metric in enumerate(metrics):
        axes[i, 0].set_yticks(range(heights[i]), whats[metric])
        axes[i, 0].set_ylim(heights[i] - 0.4, -0.6)
        for j, label in enumerate(
            ("α$_1$, exponent of N (dimensionless)", "α$_2$, exponent of D′ (dimensionless)")
        ):
            axes[i, j].set_title(style.METRIC_NAME[metric], fontweight="normal")
            axes[i, j].grid(False, axis="y")
            style.exponent_axis(axes[i, j])
            style.plain_axis(axes[i, j], "x")
            if i == len(metrics) - 1:
                axes[i, j].set_xlabel(label)
    style.legend_below(figure, style.ansatz_handles(kinds, line=False))
    caption = (
        "The exponents refitted under every listed choice; a row far from the first is a conclusion that "
        "depends on it. "
        "Lines: 95 % intervals where the fit computed them (bootstrap for the headline). Arrow heads: "
        "beyond the axis."
    )
    alt = "Forest plot of the two exponents under the choices of the fit."
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt)


@artefact(
    "interval_kinds",
    title="Three kinds of interval",
    question="Do bootstrap, sandwich and profile likelihood agree on the exponents?",
    section="diagnostics",
    kind="figure",
    needs=("fit",),
)
def interval_kinds(study: StudyData) -> Plot:
    """alpha_1 and alpha_2 with each kind of 95 % interval, per ansatz and metric."""
    study.need_fits()
    laws = [law for metric in METRICS for law in _quiet(study, metric) if law.record.get("intervals_by_kind")]
    if not laws:
        raise MissingData("the fit file holds no intervals by kind")
    kinds = list(dict.fromkeys(law.ansatz for law in laws))
    figure = style.new_figure(style.DOUBLE, 0.9 + 0.42 * len(laws))
    axes = figure.subplots(1, 2, sharey=True)
    lines = {"bootstrap": "-", "sandwich": (0, (4, 1.5)), "profile": (0, (1, 1))}
    rows: list[dict[str, Cell]] = []
    for y, law in enumerate(laws):
        look = style.ansatz_style(law.ansatz, kinds)
        for j, name in enumerate(("a1", "a2")):
            axes[j].plot(
                [law.estimates.get(name, math.nan)],
                [y],
                marker=look.marker,
                color=look.color,
                ms=4,
                ls="none",
            )
            for k, (how, line) in enumerate(lines.items()):
                interval = (law.record["intervals_by_kind"].get(how) or {}).get(name)
                if not interval or None in interval:
                    continue
                at = y + (k - 1) * 0.2
                axes[j].plot(interval, [at, at], color=look.color, ls=line, lw=1.4, gid=f"{how}:{name}")
                rows.append(
                    {
                        "metric": law.metric,
                        "ansatz": law.ansatz,
                        "parameter": name,
                        "interval": how,
                        "value": Quantity(
                            law.estimates.get(name, math.nan), float(interval[0]), float(interval[1])
                        ),
                        "point_ids": " ".join(study.ids_of(law)),
                    }
                )
    if not rows:
        raise MissingData("no kind of interval is identified for any exponent")
    axes[0].set_yticks(
        range(len(laws)),
        [f"{style.ansatz_style(w.ansatz, kinds).label}, {style.METRIC_NAME[w.metric]}" for w in laws],
    )
    axes[0].set_ylim(len(laws) - 0.4, -0.6)
    for axis, label in zip(axes, ("α$_1$ (dimensionless)", "α$_2$ (dimensionless)"), strict=True):
        axis.set_xlabel(label)
        axis.grid(False, axis="y")
        style.exponent_axis(axis)
        style.plain_axis(axis, "x")
    handles = [Line2D([], [], color=style.SOFT, ls=line, lw=1.4, label=how) for how, line in lines.items()]
    style.legend_below(figure, handles)
    wide = [
        f"{law.ansatz}, {style.METRIC_NAME[law.metric]}" for law in laws if law.record.get("conservative")
    ]
    caption = "Run-clustered bootstrap, run-clustered sandwich and profile likelihood, 95 % each." + (
        f" They differ by more than 25 % for {'; '.join(wide)}: use the widest." if wide else ""
    )
    alt = "Intervals of both exponents by bootstrap, sandwich and profile likelihood."
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt)


def _quiet(study: StudyData, metric: str) -> list[LawFit]:
    try:
        return _headline_laws(study, metric)
    except MissingData:
        return []


@artefact(
    "profiles",
    title="Profile likelihoods of the exponents",
    question="How sharply do the runs determine each exponent?",
    section="diagnostics",
    kind="figure",
    needs=("fit",),
)
def profiles(study: StudyData) -> Plot:
    """The fit's profile curves: rise of the objective against each exponent; where none is stored,
    missing."""
    study.need_fits()
    laws = [
        law
        for metric in METRICS
        for law in _quiet(study, metric)
        if any((law.record.get("profiles") or {}).values())
    ]
    if not laws:
        raise MissingData("the fit file holds no profile curves")
    kinds = list(dict.fromkeys(law.ansatz for law in laws))
    metrics = list(dict.fromkeys(law.metric for law in laws))
    figure = style.new_figure(style.DOUBLE, 0.6 + 1.9 * len(metrics))
    axes = figure.subplots(len(metrics), 2, squeeze=False)
    rows: list[dict[str, Cell]] = []
    tops: dict[Axes, float] = {}
    for law in laws:
        look = style.ansatz_style(law.ansatz, kinds)
        for j, name in enumerate(("a1", "a2")):
            curve = law.record["profiles"].get(name)
            if not curve:
                continue
            axis = axes[metrics.index(law.metric), j]
            x, deviance = np.asarray(curve["x"], float), np.asarray(curve["deviance"], float)
            axis.plot(x, deviance, color=look.color, ls=look.line, gid=f"profile:{law.ansatz}:{name}")
            tops[axis] = max(tops.get(axis, 0.0), _PROFILE_TOP * float(curve["cut"]))
            axis.axhline(float(curve["cut"]), color=style.SOFT, lw=0.7, ls=(0, (1, 1)), gid="cut")
            rows += [
                {
                    "metric": law.metric,
                    "ansatz": law.ansatz,
                    "parameter": name,
                    "x": float(a),
                    "deviance": float(b),
                    "cut": float(curve["cut"]),
                    "point_ids": " ".join(study.ids_of(law)),
                }
                for a, b in zip(x, deviance, strict=True)
            ]
    if not rows:
        raise MissingData("no exponent has a profile: every term is at its bound")
    for i, metric in enumerate(metrics):
        for j, label in enumerate(("α$_1$", "α$_2$")):
            axes[i, j].set_title(style.METRIC_NAME[metric], fontweight="normal")
            axes[i, j].set_xlabel(f"{label} (dimensionless)")
            style.plain_axis(axes[i, j], "x")
            axes[i, j].set_ylabel("deviance (dimensionless)")
            axes[i, j].set_ylim(0, tops.get(axes[i, j], 1.0))
            style.exponent_axis(axes[i, j])
    handles: list[Line2D | Patch] = list(style.ansatz_handles(kinds))
    for handle in handles:
        if isinstance(handle, Line2D):
            handle.set_marker("")
    handles.append(Line2D([], [], color=style.SOFT, lw=0.7, ls=(0, (1, 1)), label="95 % height"))
    style.legend_below(figure, handles)
    caption = (
        "Profile likelihood: deviance above the minimum, rescaled to the sandwich variance, when one "
        "exponent is held and "
        "the rest refitted. Dotted: the height that bounds the 95 % interval. A flat side means that the "
        "runs do not "
        "bound the exponent there."
    )
    alt = "Profile curves of both exponents per ansatz and metric."
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt)
