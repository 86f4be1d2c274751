"""Where the FLOPs and the time go: sampling, local energy, gradient; estimated, executed, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from figures import style
from figures.data import Points, StudyData
from figures.registry import Cell, Column, MissingData, Plot, Quantity, Sheet, Table, artefact, number

GROUPS = ("sampling", "local energy", "forward pass", "gradient", "other")
_LOOKS = {
    "sampling": (style.OKABE_ITO["orange"], "////"),
    "local energy": (style.OKABE_ITO["purple"], ""),
    "forward pass": ("#d5d5da", "----"),
    "gradient": (style.OKABE_ITO["sky"], "...."),
    "other": ("#9a9aa2", "xxxx"),
}
# In this order: older cubes hold "forward_and_sampling" in one piece, and a gradient with its forward pass.
_WORDS = (
    ("sampl", "sampling"),
    ("local", "local energy"),
    ("forward", "forward pass"),
    ("grad", "gradient"),
    ("backward", "gradient"),
    ("optim", "gradient"),
)


def group_of(part: str) -> str:
    """The drawn group of a named part of a step."""
    return next((group for word, group in _WORDS if word in part.lower()), "other")


def leading_order_shares(kind: str, n: float, flips: float, rho: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of a step by the study's accounting at leading order in N (SCIENCE section 7;
    attention terms left out).

    `rho` = N_mod/N, shape (runs,). Raises KeyError for an ansatz without a closed form.
    """
    tokens = n / 2
    forward = {
        "made": np.full_like(rho, 2.0),
        "transformer": 2 * tokens * rho + 2 * (1 - rho),
        "retnet": 2 * tokens * rho + 2 * (1 - rho),
    }[kind]
    sampling = {"made": rho * n, "transformer": rho * tokens * (tokens + 1), "retnet": 2 * tokens * rho}[kind]
    parts = {"sampling": sampling, "local energy": flips * forward, "gradient": 3 * forward}
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()}


def recorded_shares(
    study: StudyData, rows: Points, family: str
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """Shares by group from the parts that the cube stores for the rows: ({group: (rows,)}, rows
    kept), or None."""
    parts = study.parts(family)
    if not parts:
        return None
    where = tuple(rows.index.T)
    grouped: dict[str, np.ndarray] = {}
    for name, values in parts.items():
        column = np.nan_to_num(values[where], nan=0.0)
        grouped[group_of(name)] = grouped.get(group_of(name), 0.0) + column
    total = np.sum(list(grouped.values()), axis=0)
    keep = np.flatnonzero(total > 0)
    if not len(keep):
        return None
    return {name: value[keep] / total[keep] for name, value in grouped.items()}, keep


def shares(
    study: StudyData, rows: Points, kind: str, molecule: str, how: str
) -> tuple[dict[str, np.ndarray], Points] | None:
    """Shares per run for "estimated", "executed" or "measured"; None where the cube cannot say."""
    family = {
        "estimated": "flops_estimated_part",
        "executed": "flops_executed_part",
        "measured": "wall_part_seconds",
    }[how]
    recorded = recorded_shares(study, rows, family)
    if recorded is not None:
        mask = np.zeros(len(rows), bool)
        mask[recorded[1]] = True
        return recorded[0], rows.where(mask)
    if how != "estimated":
        return None
    facts = study.molecules[molecule]
    try:
        estimate = leading_order_shares(
            kind, facts["n_spin_orbitals"], facts["n_unique_flips"], rows["n_modulus"] / rows["n_total"]
        )
    except KeyError:
        return None
    return estimate, rows


@artefact(
    "cost_shares",
    title="Shares of a training step",
    question="Where do the FLOPs and the time go: sampling, local energy or gradient?",
    section="cost",
    kind="figure",
    needs=("final", "molecule"),
)
def cost_shares(study: StudyData) -> Plot:
    """Stacked shares per molecule and ansatz for every accounting that the cube holds."""
    points = study.need_headline()
    kinds = points.unique("ansatz")
    cells = [key for key, _ in points.groups("molecule", "ansatz")]
    found: dict[str, dict[tuple[str, str], tuple[dict[str, np.ndarray], Points]]] = {}
    notes = []
    for how in ("estimated", "executed", "measured"):
        for molecule, kind in cells:
            result = shares(study, points.only(molecule=molecule, ansatz=kind), kind, molecule, how)
            if result is not None:
                found.setdefault(how, {})[molecule, kind] = result
        if how not in found:
            notes.append(f"{how} shares: the cube stores no parts of a step")
    if not found:
        raise MissingData("neither parts of a step nor a closed form for any ansatz")
    figure = style.new_figure(style.DOUBLE, 0.16 * len(cells) + 1.1)
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    rows: list[dict[str, Cell]] = []
    for axis, (how, per_cell) in zip(axes, found.items(), strict=True):
        for y, key in enumerate(cells):
            if key not in per_cell:
                continue
            parts, used = per_cell[key]
            left = 0.0
            for group in GROUPS:
                if group not in parts:
                    continue
                values = parts[group]
                mean = float(np.mean(values))
                _segment(axis, group, place=y, left=left, share=mean, height=0.72, gid=f"{how}:{group}")
                left += mean
                rows.append(
                    {
                        "molecule": key[0],
                        "ansatz": key[1],
                        "accounting": how,
                        "part": group,
                        "share": Quantity(mean, float(np.min(values)), float(np.max(values))),
                        "runs": len(used),
                        "point_ids": " ".join(used.ids),
                    }
                )
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of a step (fraction)")
        axis.set_title({"measured": "measured time"}.get(how, f"{how} FLOP"))
        axis.grid(False, axis="y")
        style.plain_axis(axis, "x")
    axes[0].set_yticks(
        range(len(cells)), [f"{style.formula(m)}, {style.ansatz_style(k, kinds).label}" for m, k in cells]
    )
    axes[0].set_ylim(len(cells) - 0.4, -0.6)
    present = {row["part"] for row in rows}
    style.legend_below(
        figure,
        [
            Patch(facecolor=colour, hatch=hatch, edgecolor=style.PAPER, lw=0.3, label=group)
            for group, (colour, hatch) in _LOOKS.items()
            if group in present
        ],
    )
    source = "as recorded with the runs" if study.parts("flops_estimated_part") else "at leading order in N"
    caption = (
        f"Mean share of each part of a training step over the runs of a molecule and ansatz "
        f"({study.exclusions()}). "
        f"Estimated: the study's accounting, {source}, nothing reused: M forward passes per sample for "
        f"the local energy. "
        "The CSV holds the lowest and highest share over the runs."
    )
    if any(
        "forward_and_sampling" in name
        for family in ("flops_executed_part", "wall_part_seconds")
        for name in study.parts(family)
    ):
        caption += (
            " Executed and measured: the forward pass of the samples, which the gradient and, in the "
            "whole-sector "
            "regime, the local energy share, is counted with the sampling."
        )
    alt = "Stacked bars of the shares of sampling, local energy and gradient per molecule and ansatz."
    columns = ("molecule", "ansatz", "accounting", "part", "share", "runs", "point_ids")
    return Plot(figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt, tuple(notes))


@artefact(
    "cost_per_step",
    title="Cost of a step: reuse, time and speed",
    question="How far does the no-reuse estimate overcount what ran, and what does a step take on this "
    "machine?",
    section="cost",
    kind="figure",
)
def cost_per_step(study: StudyData) -> Plot:
    """Estimated over executed FLOPs by molecule; seconds per step and achieved FLOP/s against N."""
    points = study.need_headline()
    kinds, molecules = points.unique("ansatz"), points.unique("molecule")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = points["flops_estimated"] / points["flops_executed"]
        seconds = study.step_seconds(points)
        rate = points["flops_executed"] / points["steps"] / seconds
    figure = style.new_figure(style.DOUBLE, 2.6)
    axes = figure.subplots(1, 3)
    place = {name: i for i, name in enumerate(molecules)}
    for j, kind in enumerate(kinds):
        look = style.ansatz_style(kind, kinds)
        own = points["ansatz"] == kind
        x = np.array([place[m] for m in points["molecule"][own]]) + (j - (len(kinds) - 1) / 2) * 0.22
        marks = {"ls": "none", "marker": look.marker, "color": look.color, "ms": 3, "alpha": 0.6, "mew": 0}
        axes[0].plot(x, ratio[own], gid=f"ratio:{kind}", **marks)
        axes[1].plot(points["n_total"][own], seconds[own], gid=f"seconds:{kind}", **marks)
        axes[2].plot(points["n_total"][own], rate[own], gid=f"rate:{kind}", **marks)
    axes[0].axhline(1, color=style.SOFT, lw=0.8, ls=(0, (3, 2)))
    axes[0].set_xticks(
        range(len(molecules)), [style.formula(m) for m in molecules], rotation=35 if len(molecules) > 5 else 0
    )
    axes[0].set_xlabel("molecule")
    axes[0].grid(False, axis="x")
    axes[0].set_ylabel("estimated / executed (ratio)")
    axes[1].set_ylabel("time per step (s)")
    axes[2].set_ylabel("achieved rate (FLOP/s)")
    notes = []
    for axis, values, name in zip(
        axes, (ratio, seconds, rate), ("FLOP ratio", "time", "FLOP/s"), strict=True
    ):
        good = values[np.isfinite(values) & (values > 0)]
        if len(good):
            style.log_axis(axis, "y", good, pad=1.5)
        else:
            notes.append(f"no run has a positive {name}")
    for axis in axes[1:]:
        axis.set_xlabel(style.AXIS_LABEL["n_total"])
        style.log_axis(axis, "x", points["n_total"], max_ticks=4)
    style.legend_below(figure, style.ansatz_handles(kinds, line=False))
    rows: list[dict[str, Cell]] = [
        {
            "molecule": str(points["molecule"][i]),
            "ansatz": str(points["ansatz"][i]),
            "size": str(points["size"][i]),
            "steps": int(points["steps"][i]),
            "seed": int(points["seed"][i]),
            "n_total": int(points["n_total"][i]),
            "flops_estimated": float(points["flops_estimated"][i]),
            "flops_executed": float(points["flops_executed"][i]),
            "ratio": float(ratio[i]),
            "seconds_per_step": float(seconds[i]),
            "flop_per_second": float(rate[i]),
            "point_id": points.ids[i],
        }
        for i in range(len(points))
    ]
    caption = (
        f"One marker per run ({study.exclusions()}). Left: FLOPs of the study's no-reuse accounting over "
        f"FLOPs counted on "
        "what ran (dashed: equal). Middle and right: wall time per step and achieved rate, on the "
        "machines in the provenance."
    )
    alt = (
        "Three panels: estimated over executed FLOPs by molecule, seconds per step and FLOP per second "
        "against N."
    )
    return Plot(figure, Table(tuple(Column(c, c) for c in rows[0]), tuple(rows)), caption, alt, tuple(notes))


# -- the modes of the local energy beside each other ------------------------------------------------------

MODES = ("paper", "exact", "sampled")  # from nothing reused to least work
ACCOUNTINGS = ("estimated", "executed", "measured")
THIRDS = ("local energy", "sampling", "gradient")  # of the estimate, whose gradient has its forward pass


@dataclass(frozen=True)
class ModeCell:
    """Runs of one molecule and ansatz in one mode. `shares`: by accounting and group, means over the runs;
    `per_step`: estimated and executed FLOP and seconds, geometric means."""

    molecule: str
    ansatz: str
    mode: str
    rows: Points
    shares: Mapping[str, Mapping[str, float]]
    per_step: Mapping[str, float]

    def third(self, how: str, name: str) -> float:
        """Share of a third by an accounting; the forward pass of the samples is part of the gradient."""
        found = self.shares[how]
        extra = found.get("forward pass", 0.0) if name == "gradient" else 0.0
        return found.get(name, 0.0) + extra


def mode_cells(study: StudyData) -> list[ModeCell]:
    """Every cell of the molecules that ran in more than one mode, in cube order and that of `MODES`.

    Of the main variant's mode its own runs count, of another mode those of all variants in it. Raises
    MissingData where no molecule has two modes, or the cube stores no parts of a step.
    """
    main = study.local_energy(study.main_variant)
    runs = study.done.where(
        np.array(
            [
                variant == study.main_variant or study.local_energy(variant) != main
                for variant in study.done["variant"]
            ],
            bool,
        )
    )
    modes = np.array([study.local_energy(variant) for variant in runs["variant"]], dtype=str)
    cells = []
    for (molecule, ansatz), own in runs.groups("molecule", "ansatz"):
        here = modes[(runs["molecule"] == molecule) & (runs["ansatz"] == ansatz)]
        if len(set(modes[runs["molecule"] == molecule].tolist())) < 2:
            continue
        for mode in MODES:
            rows = own.where(here == mode)
            if len(rows):
                cells.append(ModeCell(molecule, ansatz, mode, rows, *_costs(study, rows)))
    if not cells:
        raise MissingData("no molecule ran in two modes of the local energy (specs/questions/cost.toml)")
    return cells


def _costs(study: StudyData, rows: Points) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    found = {}
    for how in ACCOUNTINGS:
        result = shares(study, rows, rows["ansatz"][0], rows["molecule"][0], how)
        if result is None:
            raise MissingData(f"{how} shares: the cube stores no parts of a step")
        found[how] = {name: float(np.mean(values)) for name, values in result[0].items()}
    totals = {
        "estimated": rows["flops_estimated"] / rows["steps"],
        "executed": rows["flops_executed"] / rows["steps"],
        "measured": study.step_seconds(rows),
        "unique": rows["n_unique_mean"],
    }
    return found, {name: float(np.exp(np.mean(np.log(values)))) for name, values in totals.items()}


def short_seconds(seconds: float) -> str:
    """A time of a step in few characters: 1.9 ms, 0.24 s, 12 s."""
    if seconds < 0.1:
        return f"{number(1e3 * seconds, 2)} ms"
    return f"{number(seconds, 2)} s"


def _bars(cells: Mapping[str, ModeCell]) -> Iterator[tuple[str, ModeCell, str, str, float]]:
    """(tick label, cell, accounting, total beside the bar, position): one estimate, two bars per mode.

    The estimate is that of the mode with the largest batch: its shares do not depend on it.
    """
    largest = max(cells.values(), key=lambda cell: cell.per_step["estimated"])
    yield "estimate", largest, "estimated", number(largest.per_step["estimated"], 2), 0.0
    place = 1.4
    for mode, cell in cells.items():
        yield f"{mode}, FLOP", cell, "executed", number(cell.per_step["executed"], 2), place
        yield f"{mode}, time", cell, "measured", short_seconds(cell.per_step["measured"]), place + 0.9
        place += 2.2


def _segment(
    axis: Axes, group: str, *, place: float, left: float, share: float, height: float, gid: str
) -> None:
    """A part's piece of a stacked bar."""
    colour, hatch = _LOOKS[group]
    axis.barh(
        place,
        share,
        left=left,
        height=height,
        color=colour,
        hatch=hatch,
        edgecolor=style.PAPER,
        lw=0.3,
        gid=gid,
    )


def _stack(axis: Axes, cell: ModeCell, how: str, place: float) -> None:
    """One bar of a cell's shares by one accounting."""
    left = 0.0
    for group in GROUPS:
        share = cell.shares[how].get(group, 0.0)
        if share > 0:
            gid = f"{how}:{cell.mode}:{group}"
            _segment(axis, group, place=place, left=left, share=share, height=0.8, gid=gid)
            left += share


@artefact(
    "mode_shares",
    title="A step in the three modes of the local energy",
    question="What share of a step is local energy, sampling and gradient: as estimated, as executed and on "
    "the clock?",
    section="cost",
    kind="figure",
)
def mode_shares(study: StudyData) -> Plot:
    """Per molecule and ansatz: the estimate's shares, then executed FLOPs and seconds in each mode."""
    cells = mode_cells(study)
    molecules = list(dict.fromkeys(cell.molecule for cell in cells))
    kinds = list(dict.fromkeys(cell.ansatz for cell in cells))
    figure = style.new_figure(style.DOUBLE, 1.55 * len(molecules) + 0.7)
    grid = figure.subplots(len(molecules), len(kinds), squeeze=False, sharex=True)
    rows: list[dict[str, Cell]] = []
    for (i, molecule), (j, kind) in ((m, k) for m in enumerate(molecules) for k in enumerate(kinds)):
        axis = grid[i, j]
        own = {cell.mode: cell for cell in cells if (cell.molecule, cell.ansatz) == (molecule, kind)}
        axis.set_title(f"{style.formula(molecule)}, {style.ansatz_style(kind, kinds).label}")
        if not own:
            style.note_panel(axis, "not run")
            continue
        bars = list(_bars(own))
        for _, cell, how, total, place in bars:
            _stack(axis, cell, how, place)
            axis.text(1.03, place, total, va="center", fontsize=7)
        axis.set_yticks([place for *_, place in bars], [label for label, *_ in bars])
        axis.tick_params(axis="y", length=0, labelleft=j == 0)
        axis.set_ylim(bars[-1][-1] + 0.6, -0.6)
        axis.set_xlim(0, 1)
        axis.grid(False, axis="y")
        style.plain_axis(axis, "x")
        if i == len(molecules) - 1:
            axis.set_xlabel("share of a step (fraction)")
    for cell in cells:
        for how in ACCOUNTINGS:
            rows += [
                {
                    "molecule": cell.molecule,
                    "ansatz": cell.ansatz,
                    "mode": cell.mode,
                    "accounting": how,
                    "part": group,
                    "share": share,
                    "total": cell.per_step[how],
                    "unit": "s" if how == "measured" else "flop",
                    "point_ids": " ".join(cell.rows.ids),
                }
                for group, share in cell.shares[how].items()
            ]
    present = {row["part"] for row in rows}
    style.legend_below(
        figure,
        [
            Patch(facecolor=colour, hatch=hatch, edgecolor=style.PAPER, lw=0.3, label=group)
            for group, (colour, hatch) in _LOOKS.items()
            if group in present
        ],
    )
    caption = (
        "Shares of a training step; beside each bar the step's FLOP or wall time. Estimate: the study's "
        "accounting, M forward passes per sample for the local energy and nothing reused, at the largest "
        "batch. Then, per mode of the local energy, the FLOPs counted on what ran and the wall time of the "
        "same steps. Where sampling has no FLOPs, one forward pass over the whole sector serves samples, "
        "local energies and gradient. Batches differ between modes where the CSV says so: `paper` is "
        "proportional to its batch and took a part of it."
    )
    alt = (
        "Stacked bars per molecule and ansatz: shares of local energy, sampling, forward pass and gradient, "
        "estimated, executed and measured in each mode."
    )
    columns = ("molecule", "ansatz", "mode", "accounting", "part", "share", "total", "unit", "point_ids")
    return Plot(figure, Table(tuple(Column(c, c) for c in columns), tuple(rows)), caption, alt)


@artefact(
    "modes",
    title="Cost of a step by mode of the local energy",
    question="What does a step cost in each mode: estimated, executed, on the clock, and in which parts?",
    section="cost",
    kind="table",
)
def modes(study: StudyData) -> Sheet:
    """Per molecule, ansatz and mode: FLOPs, seconds, and the shares of the three parts of the estimate."""
    cells = mode_cells(study)
    kinds = list(dict.fromkeys(cell.ansatz for cell in cells))
    rows: list[dict[str, Cell]] = []
    for cell in cells:
        estimated, executed, seconds = (cell.per_step[how] for how in ACCOUNTINGS)
        row: dict[str, Cell] = {
            "molecule": cell.molecule,
            "ansatz": style.ansatz_style(cell.ansatz, kinds).label,
            "mode": cell.mode,
            "unique": cell.per_step["unique"],
            "estimated": estimated,
            "executed": executed,
            "ratio": estimated / executed,
            "seconds": seconds,
            "rate": executed / seconds,
            "runs": len(cell.rows),
            "point_ids": " ".join(cell.rows.ids),
        }
        for name in THIRDS:
            values = {how: cell.third(how, name) for how in ACCOUNTINGS}
            row[name] = " / ".join(number(100 * value) for value in values.values())
            row |= {f"{name.replace(' ', '_')}_{how}": value for how, value in values.items()}
        rows.append(row)
    columns = (
        Column("molecule", "molecule"),
        Column("ansatz", "ansatz"),
        Column("mode", "mode"),
        Column("unique", "unique samples/step"),
        Column("estimated", "estimated FLOP/step"),
        Column("executed", "executed FLOP/step"),
        Column("ratio", "estimated/executed"),
        Column("seconds", "s/step"),
        Column("rate", "FLOP/s achieved"),
        *(Column(name, f"{name} (%)") for name in THIRDS),
        *(
            Column(f"{name.replace(' ', '_')}_{how}", f"{name}, {how}", csv_only=True)
            for name in THIRDS
            for how in ACCOUNTINGS
        ),
        Column("runs", "runs", csv_only=True),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        "Shares in %: of the estimated FLOPs / of the executed FLOPs / of the wall time of the steps. "
        "Gradient: with its forward pass, as in the estimate. Where sampling executes nothing, one forward "
        "pass over the whole sector serves samples, local energies and gradient. Seconds are wall time per "
        "step on the machine in the provenance."
    )
    return Sheet(Table(columns, tuple(rows)), caption)
