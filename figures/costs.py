"""Where the FLOPs and the time go: sampling, local energy, gradient; estimated, executed, measured."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Patch

from figures import style
from figures.data import Points, StudyData
from figures.registry import Cell, Column, MissingData, Plot, Quantity, Table, artefact

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
                colour, hatch = _LOOKS[group]
                axis.barh(
                    y,
                    mean,
                    left=left,
                    height=0.72,
                    color=colour,
                    hatch=hatch,
                    edgecolor=style.PAPER,
                    lw=0.3,
                    gid=f"{how}:{group}",
                )
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
        seconds = points["wall_seconds"] / points["steps"]
        rate = points["flops_executed"] / points["wall_seconds"]
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
