"""Training curves, schedules, sampling along training, and final energies against reference methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from figures import style
from figures.data import Points, StudyData
from figures.registry import Cell, Column, MissingData, Plot, Table, artefact, numbers

_REFERENCES = (("e_hf", "HF", (0, (1, 1))), ("e_ccsd", "CCSD", (0, (3, 1.5))), ("e_ccsd_t", "CCSD(T)", "-."))


def showcase(study: StudyData) -> Points:
    """The runs whose training is shown: per molecule and ansatz the largest T, then the largest
    size, all seeds."""
    keep = np.zeros(len(study.headline), bool)
    points = study.headline
    for molecule in points.unique("molecule"):
        for kind in points.unique("ansatz"):
            own = (points["molecule"] == molecule) & (points["ansatz"] == kind)
            if not own.any():
                continue
            longest = own & (points["steps"] == points["steps"][own].max())
            keep |= longest & (points["n_total"] == points["n_total"][longest].max())
    return points.where(keep)


def _need_history(study: StudyData) -> Points:
    study.need_headline()
    return showcase(study)


def _references(axis: Axes, facts: dict[str, float]) -> list[str]:
    """Distances of reference methods to FCI as lines; returns the names drawn."""
    drawn = []
    for key, label, line in _REFERENCES:
        gap = abs(facts.get(key, math.nan) - facts["e_fci"])
        if math.isfinite(gap) and gap > 1e-9:
            axis.axhline(gap, color=style.SOFT, lw=0.9, ls=line, zorder=1, gid=f"reference:{key}")
            drawn.append(label)
    return drawn


def _reference_handles(names: Sequence[str]) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=style.SOFT, lw=0.9, ls=line, label=f"|{label} − FCI|")
        for _, label, line in _REFERENCES
        if label in names
    ]
    handles.append(Patch(color=style.SOFT, alpha=0.2, lw=0, label="chemical accuracy"))
    return handles


@artefact(
    "training_curves",
    title="Training curves",
    question="How does the energy approach FCI during training, and which plateaus does it meet?",
    section="training",
    kind="figure",
    needs=("history", "molecule"),
)
def training_curves(study: StudyData) -> Plot:
    """E - E_FCI along training for the longest run of the largest size, per molecule and ansatz, every
    seed a line."""
    points = _need_history(study)
    kinds = points.unique("ansatz")
    with_fci = [
        m for m in points.unique("molecule") if math.isfinite(study.molecules[m].get("e_fci", math.nan))
    ]
    notes = [f"{m}: no FCI energy, not drawn" for m in points.unique("molecule") if m not in with_fci]
    if not with_fci:
        raise MissingData("no molecule has an FCI energy")
    n_rows, n_columns = style.grid_of(len(with_fci))
    figure = style.new_figure(max(style.DOUBLE * n_columns / 4, style.SINGLE), 1.75 * n_rows + 0.8)
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flat)
    rows: list[dict[str, Cell]] = []
    names: set[str] = set()
    below = 0
    for axis, molecule in zip(axes, with_fci, strict=False):
        facts = dict(study.molecules[molecule])
        names |= set(_references(axis, facts))
        part = points.only(molecule=molecule)
        for i in range(len(part)):
            history = _history(study, part, i)
            gap = history["energy"] - facts["e_fci"]
            below += int(np.sum(gap <= 0))
            kind = str(part["ansatz"][i])
            look = style.ansatz_style(kind, kinds)
            shown = gap > 0
            axis.plot(
                history["step"][shown],
                gap[shown],
                color=look.color,
                ls=look.line,
                lw=1.0,
                alpha=0.85 if int(part["seed"][i]) == int(part["seed"].min()) else 0.45,
                gid=f"training:{part.ids[i]}",
            )
            rows += [
                {
                    "molecule": molecule,
                    "ansatz": kind,
                    "size": str(part["size"][i]),
                    "steps": int(part["steps"][i]),
                    "seed": int(part["seed"][i]),
                    "step": int(step),
                    "energy": float(energy),
                    "energy_minus_fci": float(delta),
                    "point_id": part.ids[i],
                }
                for step, energy, delta in zip(history["step"], history["energy"], gap, strict=True)
            ]
        axis.set_title(f"{style.formula(molecule)}  ({len(part)} runs)", fontweight="normal")
        steps = numbers([r for r in rows if r["molecule"] == molecule], "step")
        style.log_axis(axis, "x", steps, max_ticks=4)
    positive = [gap for gap in numbers(rows, "energy_minus_fci") if gap > 0]
    style.log_axis(axes[0], "y", [*positive, style.CHEMICAL_ACCURACY], pad=1.5)
    for axis in axes[: len(with_fci)]:
        axis.axhspan(
            axes[0].get_ylim()[0], style.CHEMICAL_ACCURACY, color=style.SOFT, alpha=0.12, lw=0, zorder=0
        )
    for axis in axes[len(with_fci) + 1 :]:
        axis.remove()
    style.bottom_labels(axes[: len(with_fci)], n_columns, "step (count)")
    figure.supylabel("E − E$_{FCI}$ in training (Ha)", fontsize=8)
    handles = style.ansatz_handles(kinds)
    for handle in handles:
        handle.set_marker("")
    everything = [*handles, *_reference_handles(sorted(names))]
    if len(axes) > len(with_fci):
        style.legend_in_hole(axes[len(with_fci)], everything)
    else:
        style.legend_below(figure, everything)
    if below:
        notes.append(
            f"{below} recorded energies lie at or below FCI (sampling noise): not on a log axis, in the CSV"
        )
    columns = (
        "molecule",
        "ansatz",
        "size",
        "steps",
        "seed",
        "step",
        "energy",
        "energy_minus_fci",
        "point_id",
    )
    caption = (
        "Energy above FCI during training (Monte-Carlo estimates of each recorded step) for the longest "
        "run of the "
        f"largest size of each ansatz; every seed is a line ({len(points)} runs; first seed strongest). "
        f"Horizontal lines: "
        "distance of reference methods from FCI. Shaded: chemical accuracy (1.6 mHa)."
    )
    alt = f"Log-log training curves per molecule ({', '.join(with_fci)}) for {', '.join(kinds)}."
    return Plot(figure, _table(columns, rows), caption, alt, tuple(notes))


def _table(columns: Sequence[str], rows: Sequence[dict[str, Cell]]) -> Table:
    return Table(tuple(Column(name, name) for name in columns), tuple(rows))


def _history(study: StudyData, part: Points, i: int) -> dict[str, np.ndarray]:
    """History of row i of a selection, looked up through its position along the cube's axes."""
    return study.history_at(tuple(int(k) for k in part.index[i]))


@artefact(
    "schedules",
    title="Schedules and samples along training",
    question="Which learning rate and how many samples did the runs use, and how many of them were distinct?",
    section="training",
    kind="figure",
    needs=("history", "molecule"),
)
def schedules(study: StudyData) -> Plot:
    """Learning rate and sample count, then S_F and unique samples per molecule, against the fraction of
    training done."""
    points = _need_history(study)
    kinds = points.unique("ansatz")
    molecules = points.unique("molecule")
    first = points.where(
        np.array([int(s) == _first_seed(points, i) for i, s in enumerate(points["seed"])], bool)
    )
    n_columns = 2 if len(molecules) in (2, 4) else min(len(molecules), 3)
    n_rows = math.ceil(len(molecules) / n_columns)
    figure = style.new_figure(style.DOUBLE, 2.4 + 1.45 * n_rows + 0.5)
    outer = figure.add_gridspec(2, 1, height_ratios=(1.15, n_rows))
    upper, lower = outer[0].subgridspec(1, 2), outer[1].subgridspec(n_rows, n_columns)
    top = {
        "learning_rate": figure.add_subplot(upper[0, 0]),
        "n_samples": figure.add_subplot(upper[0, 1]),
    }
    panels: dict[str, Axes] = {}
    for m, molecule in enumerate(molecules):
        row, column = divmod(m, n_columns)
        panels[molecule] = figure.add_subplot(lower[row, column], sharey=panels.get(molecules[0]))
    rows: list[dict[str, Cell]] = []
    for i in range(len(first)):
        molecule, kind = str(first["molecule"][i]), str(first["ansatz"][i])
        look = style.ansatz_style(kind, kinds)
        history = dict(_history(study, first, i))
        history["search_fraction"] = history["n_unique"] / study.molecules[molecule]["search_space"]
        done = history["step"] / float(first["steps"][i])
        for name, axis in {**top, "search_fraction": panels[molecule]}.items():
            axis.plot(
                done,
                history[name],
                color=look.color,
                ls=look.line,
                lw=1.0,
                alpha=0.8,
                gid=f"{name}:{first.ids[i]}",
            )
        rows += [
            {
                "molecule": molecule,
                "ansatz": kind,
                "steps": int(first["steps"][i]),
                "step": int(history["step"][k]),
                "fraction_done": float(done[k]),
                **{name: float(history[name][k]) for name in _SCHEDULED},
                "point_id": first.ids[i],
            }
            for k in range(len(done))
        ]
    for name, label in (
        ("learning_rate", "learning rate (dimensionless)"),
        ("n_samples", "samples per step (count)"),
    ):
        top[name].set_ylabel(label)
        values = [value for value in numbers(rows, name) if value > 0]
        if values:
            style.log_axis(top[name], "y", values, max_ticks=5)
    fractions = [value for value in numbers(rows, "search_fraction") if value > 0]
    for m, (molecule, axis) in enumerate(panels.items()):
        if fractions:
            style.log_axis(axis, "y", fractions, max_ticks=5)
        axis.set_title(
            f"{style.formula(molecule)}  (|S| = {study.molecules[molecule]['search_space']:.0f})",
            fontweight="normal",
        )
        if m % n_columns:
            axis.tick_params(axis="y", labelleft=False)
        last = m % n_columns == n_columns - 1 or m == len(panels) - 1
        _count_axis(
            axis, study.molecules[molecule]["search_space"], "distinct samples (count)" if last else ""
        )
    for axis in (*top.values(), *panels.values()):
        axis.set_xlim(0, 1.02)
        style.plain_axis(axis, "x")
    style.bottom_labels(list(panels.values()), n_columns, "t/T (dimensionless)")
    for axis in top.values():
        axis.set_xlabel("fraction of training done, t/T (dimensionless)")
    for axis in list(panels.values())[::n_columns]:
        axis.set_ylabel("S$_F$ (fraction)")
    handles = style.ansatz_handles(kinds)
    for handle in handles:
        handle.set_marker("")
    style.legend_below(figure, handles)
    columns = ("molecule", "ansatz", "steps", "step", "fraction_done", *_SCHEDULED, "point_id")
    caption = (
        "Top: learning rate and sample count along training. Below, per molecule: S_F (distinct samples over "
        "the sector size |S|, left) and distinct samples (right, count), for the longest run of the largest "
        f"size, first seed ({len(first)} runs: one line per molecule and ansatz; lines may coincide)."
    )
    alt = (
        "Learning rate and samples per step along training, then the fraction of the sector sampled and the "
        f"count of distinct samples for {', '.join(molecules)}."
    )
    return Plot(figure, _table(columns, rows), caption, alt)


_SCHEDULED = ("learning_rate", "n_samples", "n_unique", "search_fraction")


def _count_axis(axis: Axes, space: float, label: str) -> None:
    """A right axis that reads S_F as a count of determinants."""
    right = axis.secondary_yaxis(
        "right", functions=(lambda s: np.multiply(s, space), lambda count: np.divide(count, space))
    )
    low, high = (value * space for value in axis.get_ylim())
    ticks = [tick for tick in style.log_ticks(low, high, 4) if max(low, 1.0) <= tick <= high]
    right.set_yticks(ticks, style.tick_labels(ticks))
    right.yaxis.set_minor_locator(NullLocator())
    right.set_ylabel(label)


def _first_seed(points: Points, i: int) -> int:
    same = (points["molecule"] == points["molecule"][i]) & (points["ansatz"] == points["ansatz"][i])
    return int(points["seed"][same].min())


@artefact(
    "energy_levels",
    title="Final energies against reference methods",
    question="Where do the final energies stand against HF, CCSD, CCSD(T), FCI and chemical accuracy?",
    section="training",
    kind="figure",
    needs=("final", "molecule"),
)
def energy_levels(study: StudyData) -> Plot:
    """|E - E_FCI| of every finished headline run, by molecule and ansatz, beside the distances
    of HF, CCSD, CCSD(T)."""
    points = study.need_headline()
    kinds = points.unique("ansatz")
    molecules = [
        m for m in points.unique("molecule") if math.isfinite(study.molecules[m].get("e_fci", math.nan))
    ]
    if not molecules:
        raise MissingData("no molecule has an FCI energy")
    figure = style.new_figure(style.DOUBLE if len(molecules) > 2 else style.SINGLE, 3.0)
    axis = figure.subplots()
    rows: list[dict[str, Cell]] = []
    names: set[str] = set()
    width = 0.8 / len(kinds)
    longest = points["steps"].max()
    for k, molecule in enumerate(molecules):
        facts = study.molecules[molecule]
        for key, label, line in _REFERENCES:
            gap = abs(facts.get(key, math.nan) - facts["e_fci"])
            if math.isfinite(gap) and gap > 1e-9:
                axis.plot(
                    [k - 0.45, k + 0.45],
                    [gap, gap],
                    color=style.SOFT,
                    ls=line,
                    lw=1.1,
                    zorder=2,
                    gid=f"reference:{key}",
                )
                names.add(label)
        for j, kind in enumerate(kinds):
            look = style.ansatz_style(kind, kinds)
            part = points.only(molecule=molecule, ansatz=kind)
            part = part.where(np.isfinite(part["abs_error"]) & (part["abs_error"] > 0))
            if not len(part):
                continue
            rank = np.argsort(np.argsort(part["n_total"], kind="stable"), kind="stable")
            x = k - 0.4 + width * (j + 0.15 + 0.7 * rank / max(len(part) - 1, 1))
            top = part["steps"] == longest
            for mask, alpha in ((~top, 0.35), (top, 1.0)):
                axis.plot(
                    x[mask],
                    part["abs_error"][mask],
                    ls="none",
                    marker=look.marker,
                    ms=3,
                    color=look.color,
                    alpha=alpha,
                    mew=0,
                    zorder=3,
                    gid=f"final:{molecule}:{kind}",
                )
            rows += [
                {
                    "molecule": molecule,
                    "ansatz": kind,
                    "size": str(part["size"][i]),
                    "steps": int(part["steps"][i]),
                    "seed": int(part["seed"][i]),
                    "energy": float(part["energy"][i]),
                    "energy_stderr": float(part["energy_stderr"][i]),
                    "abs_error": float(part["abs_error"][i]),
                    "chemically_accurate": bool(part["abs_error"][i] <= style.CHEMICAL_ACCURACY),
                    "point_id": part.ids[i],
                }
                for i in range(len(part))
            ]
    axis.set_xlim(-0.6, len(molecules) - 0.4)
    axis.set_xticks(range(len(molecules)), [style.formula(m) for m in molecules])
    axis.set_xlabel("molecule (ansatze side by side, runs by rising N)")
    axis.grid(False, axis="x")
    axis.set_ylabel(style.METRIC_LABEL["abs_error"])
    gaps = [abs(study.molecules[m]["e_hf"] - study.molecules[m]["e_fci"]) for m in molecules]
    style.log_axis(axis, "y", [*numbers(rows, "abs_error"), *gaps], pad=1.6)
    axis.axhspan(axis.get_ylim()[0], style.CHEMICAL_ACCURACY, color=style.SOFT, alpha=0.12, lw=0, zorder=0)
    style.legend_below(figure, [*style.ansatz_handles(kinds, line=False), *_reference_handles(sorted(names))])
    accurate = sum(bool(row["chemically_accurate"]) for row in rows)
    columns = tuple(rows[0]) if rows else ("point_id",)
    caption = (
        f"Distance of the final energy from FCI, one marker per run ({study.exclusions()}); strong "
        f"markers: T = {longest}. "
        f"Lines: distance of HF, CCSD and CCSD(T) from FCI. {accurate} of {len(rows)} runs are chemically "
        f"accurate (shaded, "
        "1.6 mHa)."
    )
    alt = (
        f"Final energy errors per molecule ({', '.join(molecules)}) and ansatz on a log axis with "
        f"reference methods."
    )
    return Plot(figure, _table(columns, rows), caption, alt)
