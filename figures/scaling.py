"""Error against model size and against training time, per molecule and collapsed over molecules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures import style
from figures.data import Points, StudyData
from figures.fits import Fits, LawFit
from figures.registry import Cell, Column, MissingData, Plot, Table, artefact

_LEVELS = 3  # how many values of the held variable are drawn, spread over its range
_MANY = 300  # runs of one ansatz in one panel, above which markers are smaller and fainter
_HELD = {"n_total": "steps", "d_prime": "size"}
_HELD_NAME = {"n_total": "T", "d_prime": "N"}
_OTHER = {"n_total": "d_prime", "d_prime": "n_total"}


def drawable(rows: Points, metric: str) -> Points:
    """Runs with positive, finite metric, N and D' (what a log axis can show)."""
    keep = np.ones(len(rows), bool)
    for name in (metric, "n_total", "d_prime"):
        keep &= np.isfinite(rows[name]) & (rows[name] > 0)
    return rows.where(keep)


def held_levels(rows: Points, x: str) -> list[object]:
    """Values of the held variable drawn for one ansatz: lowest, middle, highest T, or sizes
    ranked by mean N."""
    if x == "n_total":
        values: list[object] = list(rows.unique("steps"))
    else:
        mean = {label[0]: float(np.mean(part["n_total"])) for label, part in rows.groups("size")}
        values = sorted(mean, key=lambda size: mean[size])
    if len(values) > _LEVELS:
        values = [values[i] for i in np.linspace(0, len(values) - 1, _LEVELS).round().astype(int)]
    return values


def law_of(fits: Fits | None, ansatz: str, metric: str, molecule: str) -> LawFit | None:
    """The joint law where it covers the molecule, else the molecule's own."""
    if fits is None:
        return None
    joint = fits.get(ansatz, metric)
    if joint is not None and molecule in joint.intercepts:
        return joint
    return fits.get(ansatz, metric, molecule)


def _where(law: LawFit, molecule: str) -> str | None:
    return molecule if molecule in law.intercepts else None


def _shade(rank: int, count: int) -> float:
    return 1.0 if rank == count - 1 else 0.3 + 0.3 * rank / max(count - 1, 1)


def _markers(
    axis: Axes,
    part: Points,
    x: str,
    y: np.ndarray,
    look: style.AnsatzStyle,
    held: frozenset[str],
    alpha: float,
    gid: str,
) -> None:
    out = np.isin(part["point_id"], sorted(held))
    for mask, face in ((~out, look.color), (out, style.PAPER)):
        if mask.any():
            axis.plot(
                part[x][mask],
                y[mask],
                ls="none",
                marker=look.marker,
                ms=3.8 if alpha == 1 else (2.8 if len(part) <= _MANY else 2.0),
                mfc=face,
                mec=look.color,
                mew=0.7,
                alpha=alpha,
                zorder=4,
                gid=gid + (":held-out" if face == style.PAPER else ""),
            )


def _along(part: Points, x: str, at: np.ndarray) -> np.ndarray:
    """The other variable along the drawn one: log-interpolated geometric means of the runs (S_F
    varies with N)."""
    groups: dict[object, list[int]] = {}
    for i, key in enumerate(part["size" if x == "n_total" else "steps"].tolist()):
        groups.setdefault(key, []).append(i)
    nodes = sorted(
        (float(np.mean(np.log(part[x][rows]))), float(np.mean(np.log(part[_OTHER[x]][rows]))))
        for rows in groups.values()
    )
    return np.asarray(np.exp(np.interp(np.log(at), [n[0] for n in nodes], [n[1] for n in nodes])))


def _curve(
    axis: Axes, law: LawFit, part: Points, x: str, molecule: str, look: style.AnsatzStyle, alpha: float
) -> None:
    span = np.geomspace(part[x].min() / 1.1, part[x].max() * 1.1, 50)
    other = _along(part, x, span)
    n, d = (span, other) if x == "n_total" else (other, span)
    where = _where(law, molecule)
    axis.plot(
        span, law.value(n, d, where), color=look.color, ls=look.line, lw=1.2, alpha=alpha, zorder=3, gid="law"
    )
    if alpha == 1 and (band := law.band(n, d, where)) is not None:
        axis.fill_between(span, *band, color=look.color, alpha=0.16, lw=0, zorder=1, gid="band")


def _seed_means(part: Points, x: str, metric: str) -> tuple[list[float], list[float]]:
    """Geometric means over seeds, ordered along x."""
    cells = sorted(
        (math.exp(float(np.mean(np.log(rows[x])))), math.exp(float(np.mean(np.log(rows[metric])))))
        for _, rows in part.groups("size" if x == "n_total" else "steps")
    )
    return [c[0] for c in cells], [c[1] for c in cells]


def _row(
    part: Points, i: int, panel: str, metric: str, shown: float, how: str, law: LawFit | None
) -> dict[str, Cell]:
    n, d, molecule = float(part["n_total"][i]), float(part["d_prime"][i]), str(part["molecule"][i])
    where = _where(law, molecule) if law is not None else None
    return {
        "panel": panel,
        "molecule": molecule,
        "ansatz": str(part["ansatz"][i]),
        "size": str(part["size"][i]),
        "steps": int(part["steps"][i]),
        "seed": int(part["seed"][i]),
        "n_total": int(n),
        "d_prime": d,
        metric: float(part[metric][i]),
        "drawn": shown,
        "drawn_as": how,
        "law": float(law.value(n, d, where)) if law is not None else None,
        "point_id": str(part["point_id"][i]),
    }


_COLUMNS = ("panel", "molecule", "ansatz", "size", "steps", "seed", "n_total", "d_prime")


def _table(metric: str, rows: Sequence[dict[str, Cell]]) -> Table:
    names = (*_COLUMNS, metric, "drawn", "drawn_as", "law", "point_id")
    return Table(tuple(Column(name, name) for name in names), tuple(rows))


def _molecule_panel(
    axis: Axes, study: StudyData, molecule: str, x: str, metric: str, kinds: Sequence[str]
) -> list[dict[str, Cell]]:
    drawn: list[dict[str, Cell]] = []
    rows = drawable(study.headline.only(molecule=molecule), metric)
    for kind in kinds:
        own = rows.only(ansatz=kind)
        look = style.ansatz_style(kind, kinds)
        law = law_of(study.fits, kind, metric, molecule)
        levels = held_levels(own, x)
        for rank, level in enumerate(levels):
            part = own.only(**{_HELD[x]: level})
            alpha = _shade(rank, len(levels))
            _markers(axis, part, x, part[metric], look, study.held_out, alpha, f"runs:{kind}:{level}")
            if law is not None:
                _curve(axis, law, part, x, molecule, look, alpha)
            else:
                axis.plot(
                    *_seed_means(part, x, metric),
                    color=look.color,
                    ls=look.line,
                    lw=0.9,
                    alpha=alpha,
                    zorder=2,
                    gid="mean",
                )
            for i in range(len(part)):
                held = str(part["point_id"][i]) in study.held_out
                drawn.append(
                    _row(
                        part, i, molecule, metric, float(part[metric][i]), "held out" if held else "run", law
                    )
                )
    return drawn


def collapse(
    study: StudyData, kind: str, x: str, metric: str
) -> tuple[Points, np.ndarray, LawFit | None, float]:
    """Runs of one ansatz with the molecule's level removed: (runs, y, law, held value of the other variable).

    With a joint law: y = observed/fitted times the law at (x, reference), so each run keeps its residual
    while its
    molecule's intercept and its own value of the other variable are replaced by the reference (geometric
    mean).
    Without: runs at the largest T (or size), divided by exp(mean ln of the molecule - mean ln of all) over
    the cells
    that every molecule has.
    """
    rows = drawable(study.headline.only(ansatz=kind), metric)
    law = study.fits.get(kind, metric) if study.fits is not None else None
    if law is not None:
        rows = rows.where(np.isin(rows["molecule"], list(law.intercepts)))
        if not len(rows):
            raise MissingData(f"no {kind} run belongs to a molecule of the joint fit")
        reference = float(law.at["D" if x == "n_total" else "N"])
        shift = np.array([law.intercepts[str(m)] for m in rows["molecule"]])
        fitted = law.value(rows["n_total"], rows["d_prime"]) * np.exp(shift)
        n, d = (rows[x], reference) if x == "n_total" else (reference, rows[x])
        return rows, rows[metric] / fitted * law.value(n, d), law, reference
    levels = held_levels(rows, x)
    if not levels:
        raise MissingData(f"no drawable {kind} run")
    rows = rows.only(**{_HELD[x]: levels[-1]})
    key = "size" if x == "n_total" else "steps"
    molecules = rows.unique("molecule")
    shared = set.intersection(*(set(rows.only(molecule=m)[key].tolist()) for m in molecules))
    if not shared:
        raise MissingData(f"the molecules share no {kind} cell")
    common = rows.where(np.isin(rows[key], list(shared)))
    level = {m: float(np.mean(np.log(common.only(molecule=m)[metric]))) for m in molecules}
    centre = float(np.mean(list(level.values())))
    shift = np.array([level[str(m)] - centre for m in rows["molecule"]])
    return rows, rows[metric] * np.exp(-shift), None, math.nan


def _collapsed_panel(
    axis: Axes, study: StudyData, x: str, metric: str, kinds: Sequence[str], notes: list[str]
) -> list[dict[str, Cell]]:
    drawn: list[dict[str, Cell]] = []
    for kind in kinds:
        look = style.ansatz_style(kind, kinds)
        try:
            rows, y, law, reference = collapse(study, kind, x, metric)
        except MissingData as gap:
            notes.append(f"collapsed panel: {gap}")
            continue
        alpha = 0.55 if len(rows) <= _MANY else 0.3
        _markers(axis, rows, x, y, look, study.held_out, alpha, f"collapsed:{kind}")
        if law is not None:
            span = np.geomspace(*law.span("N" if x == "n_total" else "D"), 60)
            n, d = (span, reference) if x == "n_total" else (reference, span)
            axis.plot(span, law.value(n, d), color=look.color, ls=look.line, lw=1.4, zorder=6, gid="law")
            if (band := law.band(n, d)) is not None:
                axis.fill_between(span, *band, color=look.color, alpha=0.2, lw=0, zorder=1, gid="band")
        else:
            for _, own in rows.with_column(metric, y).groups("molecule"):
                axis.plot(
                    *_seed_means(own, x, metric),
                    color=look.color,
                    ls=look.line,
                    lw=0.8,
                    alpha=0.6,
                    zorder=6,
                    gid="mean",
                )
        for i in range(len(rows)):
            drawn.append(_row(rows, i, "collapsed", metric, float(y[i]), "collapsed", law))
    return drawn


def scaling_figure(study: StudyData, x: str, metric: str) -> Plot:
    """Panels per molecule and one collapsed panel: `metric` against `x` ("n_total" | "d_prime")."""
    headline = drawable(study.need_headline(), metric)
    if not len(headline):
        raise MissingData(f"no run has a positive, finite {style.METRIC_NAME[metric]}")
    kinds, molecules = headline.unique("ansatz"), headline.unique("molecule")
    collapsed = len(molecules) > 1
    count = len(molecules) + collapsed
    n_rows, n_columns = style.grid_of(count)
    figure = style.new_figure(
        style.DOUBLE if n_columns > 2 else style.SINGLE * n_columns,
        1.85 * n_rows + (0.6 if count == n_rows * n_columns else 0.3),
    )
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    flat = list(axes.flat)
    drawn: list[dict[str, Cell]] = []
    notes: list[str] = []
    for axis, molecule in zip(flat, molecules, strict=False):
        own = _molecule_panel(axis, study, molecule, x, metric, kinds)
        drawn += own
        axis.set_title(f"{style.formula(molecule)}  ({len(own)} runs)", fontweight="normal")
        style.log_axis(axis, "x", headline.only(molecule=molecule)[x], max_ticks=4)
    if collapsed:
        rows = _collapsed_panel(flat[len(molecules)], study, x, metric, kinds, notes)
        drawn += rows
        flat[len(molecules)].set_title(f"collapsed  ({len(rows)} runs)", fontweight="bold")
        style.log_axis(flat[len(molecules)], "x", headline[x], max_ticks=4)
    handles = _legend(study, x, metric, kinds, drawn)
    if count < len(flat):
        style.legend_in_hole(flat[count], handles)
    else:
        style.legend_below(figure, handles)
    for axis in flat[count + 1 :]:
        axis.remove()
    inside = [row[key] for row in drawn for key in ("drawn", "law") if row[key] is not None]
    style.log_axis(flat[0], "y", inside, pad=1.6)
    style.bottom_labels(flat[:count], n_columns, style.AXIS_LABEL[x])
    figure.supylabel(style.METRIC_LABEL[metric], fontsize=8)
    if metric == "abs_error":
        for axis in flat[:count]:
            axis.axhspan(
                axis.get_ylim()[0], style.CHEMICAL_ACCURACY, color=style.SOFT, alpha=0.12, lw=0, zorder=0
            )
    shown = sum(row["panel"] != "collapsed" for row in drawn)
    fixed = "T" if x == "n_total" else "N"
    levels = dict.fromkeys(str(row[_HELD[x]]) for row in drawn if row["panel"] != "collapsed")
    how = (
        "Lines: fitted additive law with its 95 % bootstrap band at the largest drawn value."
        if any(row["law"] is not None for row in drawn)
        else "Lines join geometric means over seeds (no fit)."
    )
    gather = (
        " Collapsed panel: every run keeps its residual from the joint law; its molecule's intercept is "
        "removed and "
        "the other variable is set to its geometric mean."
        if study.fits is not None and collapsed
        else (
            " Collapsed panel: each molecule's mean log level is removed; a line per molecule."
            if collapsed
            else ""
        )
    )
    caption = (
        f"{style.METRIC_NAME[metric].capitalize()} against "
        f"{'model size' if x == 'n_total' else 'training time'} at "
        f"fixed {fixed} ({fixed if x == 'n_total' else 'sizes'}: {', '.join(levels)}; the largest is drawn "
        f"strongest). "
        f"One marker per "
        f"run: {study.exclusions(shown)}. {how}{gather}"
    )
    if x == "n_total" and study.fits is not None:
        caption += " At fixed T the runs' D′ = T·S_F changes with N: the lines follow it and need not fall."
    if any(row["drawn_as"] == "held out" for row in drawn):
        caption += " Open markers: held out from the fit."
    if metric == "abs_error":
        caption += " Shaded: chemical accuracy (1.6 mHa)."
    if study.fits is None:
        notes.append("no fit: the law and its interval are not drawn")
    n_dropped = len(study.headline) - len(headline)
    if n_dropped:
        notes.append(
            f"{n_dropped} finished runs have no positive {style.METRIC_NAME[metric]} and cannot be drawn"
        )
    if len(headline.unique("seed")) == 1:
        notes.append("one seed only: the scatter between seeds is not known")
    alt = (
        f"{count} log-log panels ({', '.join(molecules)}{', collapsed' if collapsed else ''}) of "
        f"{style.METRIC_NAME[metric]} against {'N' if x == 'n_total' else 'D prime'} for {', '.join(kinds)}."
    )
    return Plot(figure, _table(metric, drawn), caption, alt, tuple(notes))


def _legend(
    study: StudyData, x: str, metric: str, kinds: Sequence[str], drawn: Sequence[dict[str, Cell]]
) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = list(style.ansatz_handles(kinds))
    name = _HELD_NAME[x]
    handles.append(Line2D([], [], color=style.SOFT, marker="o", ls="none", ms=3.8, label=f"largest {name}"))
    handles.append(
        Line2D([], [], color=style.SOFT, marker="o", ls="none", ms=2.8, alpha=0.45, label=f"smaller {name}")
    )
    if any(row["drawn_as"] == "held out" for row in drawn):
        handles.append(
            Line2D([], [], color=style.SOFT, marker="o", ls="none", ms=3.8, mfc=style.PAPER, label="held out")
        )
    if study.fits is not None:
        handles.append(Patch(color=style.SOFT, alpha=0.3, lw=0, label="95 % band"))
    return handles


@artefact(
    "v_score_vs_n",
    title="V-score against model size",
    question="How does the V-score fall with the number of parameters at fixed training time?",
    section="scaling",
    kind="figure",
    needs=("final", "fit"),
)
def v_score_vs_n(study: StudyData) -> Plot:
    """V-score against N at fixed T."""
    return scaling_figure(study, "n_total", "v_score")


@artefact(
    "v_score_vs_d_prime",
    title="V-score against training time",
    question="How does the V-score fall with the sample-aware training time D′ at fixed size?",
    section="scaling",
    kind="figure",
    needs=("final", "fit"),
)
def v_score_vs_d_prime(study: StudyData) -> Plot:
    """V-score against D' at fixed N."""
    return scaling_figure(study, "d_prime", "v_score")


@artefact(
    "abs_error_vs_n",
    title="Energy error against model size",
    question="How does the distance to FCI fall with the number of parameters at fixed training time?",
    section="scaling",
    kind="figure",
    needs=("final", "fit"),
)
def abs_error_vs_n(study: StudyData) -> Plot:
    """|E - E_FCI| against N at fixed T."""
    return scaling_figure(study, "n_total", "abs_error")


@artefact(
    "abs_error_vs_d_prime",
    title="Energy error against training time",
    question="How does the distance to FCI fall with the sample-aware training time D′ at fixed size?",
    section="scaling",
    kind="figure",
    needs=("final", "fit"),
)
def abs_error_vs_d_prime(study: StudyData) -> Plot:
    """|E - E_FCI| against D' at fixed N."""
    return scaling_figure(study, "d_prime", "abs_error")
