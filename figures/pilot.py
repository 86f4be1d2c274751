"""Tuning: which learning rate each ansatz and size should have, and which runs stay on a plateau."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.lines import Line2D

from figures import style
from figures.data import FAILED, INVALID, Points, StudyData
from figures.effects import changes
from figures.registry import Cell, Column, MissingData, Plot, Sheet, Table, artefact

# A run is at the Hartree-Fock plateau if it recovered less than this share of the correlation energy.
PLATEAU_SHARE = 0.05
_SHADES = np.linspace(0.35, 1.0, 6)  # of a line, small sizes to large


@dataclass(frozen=True)
class Choice:
    """The learning rate of one ansatz and size.

    `scores`: rate -> mean over cells (molecule, T) of the mean over seeds of ln |E - E_FCI|, for
    rates whose runs all are valid; `smooth`: the same with the neighbouring sizes mixed in; `error`: the
    standard error of the best of these.
    """

    ansatz: str
    size: str
    rate: float
    scores: Mapping[float, float]
    smooth: Mapping[float, float]
    error: float
    ids: tuple[str, ...]


def rate_variants(study: StudyData) -> dict[str, float]:
    """Variants that change the learning rate and nothing else, with their rates; the main one included.

    Raises MissingData where the spec has no such variants.
    """
    train = study.spec.get("train") or {}
    base = train.get("learning_rate")
    rates = {} if base is None else {study.main_variant: float(base)}
    for name in study.variants:
        found = changes(study, name)
        if set(found) == {"train.learning_rate"}:
            rates[name] = float(found["train.learning_rate"])
    if len(rates) < 3:
        raise MissingData("the study has no grid of learning rates (variants of train.learning_rate alone)")
    return rates


def rate_runs(study: StudyData) -> Points:
    """Runs of any state on the grid of learning rates, with a column `rate`; cells that have every rate that
    their ansatz has anywhere."""
    rates = rate_variants(study)
    rows = study.points.where(np.isin(study.points["variant"], list(rates)))
    rows = rows.with_column("rate", np.array([rates[v] for v in rows["variant"]], float))
    cells = _cells(rows)
    tried: dict[tuple[str, ...], set[float]] = {}
    grid: dict[str, set[float]] = {}
    for cell, ansatz, rate in zip(cells, rows["ansatz"], rows["rate"], strict=True):
        tried.setdefault(cell, set()).add(float(rate))
        grid.setdefault(str(ansatz), set()).add(float(rate))
    full = [tried[cell] == grid[str(ansatz)] for cell, ansatz in zip(cells, rows["ansatz"], strict=True)]
    return rows.where(np.array(full, bool))


def _cells(rows: Points) -> list[tuple[str, ...]]:
    names = ("molecule", "ansatz", "size", "steps")
    return [tuple(map(str, cell)) for cell in zip(*(rows[n].tolist() for n in names), strict=True)]


def choose_rates(study: StudyData) -> list[Choice]:
    """The rule: per ansatz and size, the lowest rate whose mean ln |E - E_FCI| is within one standard error
    of the best one's.

    The mean is over seeds, then over cells of molecule and T, each with one weight. A rate with a failed or
    invalid run is out. Single runs are bimodal (a plateau or not), so that a size counts twice and each of
    its neighbours in N once. The error comes from the spread of seeds, pooled over the ansatz's cells. Of
    rates that cannot be told apart the lowest is the safest: too high a rate collapses single runs.
    """
    rows = rate_runs(study)
    chosen = []
    for (ansatz,), own in rows.groups("ansatz"):
        sizes = own.unique("size")
        scores = [_scores(own.only(size=size)) for size in sizes]
        spread = _seed_variance(own)
        for i, size in enumerate(sizes):
            near = [(j, 2.0 if j == i else 1.0) for j in (i - 1, i, i + 1) if 0 <= j < len(sizes)]
            common = [rate for rate in scores[i] if all(rate in scores[j] for j, _ in near)]
            if not common:
                raise MissingData(f"{ansatz}/{size}: no learning rate without a failed or invalid run")
            total = sum(weight for _, weight in near)
            smooth = {rate: sum(w * scores[j][rate] for j, w in near) / total for rate in common}
            best = min(smooth, key=lambda rate: (smooth[rate], rate))
            noise = [(w / total) ** 2 * _mean_variance(own.only(size=sizes[j], rate=best)) for j, w in near]
            error = math.sqrt(spread * sum(noise))
            rate = min(rate for rate in smooth if smooth[rate] <= smooth[best] + error)
            ids = tuple(own.only(size=size).ids)
            chosen.append(Choice(str(ansatz), str(size), rate, scores[i], smooth, error, ids))
    if not chosen:
        raise MissingData("no cell has runs at every learning rate")
    return chosen


def _seed_variance(rows: Points) -> float:
    """Variance of ln |E - E_FCI| between seeds, pooled over cells and rates; 0 where each has one seed."""
    squares, freedom = 0.0, 0
    for _, runs in rows.where(rows["abs_error"] > 0).groups("molecule", "steps", "size", "rate"):
        squares += float(((np.log(runs["abs_error"]) - np.log(runs["abs_error"]).mean()) ** 2).sum())
        freedom += len(runs) - 1
    return squares / freedom if freedom else 0.0


def _mean_variance(rows: Points) -> float:
    """Variance of the mean over cells of the mean over seeds, for runs of variance one."""
    seeds = [len(runs) for _, runs in rows.groups("molecule", "steps")]
    return sum(1 / n for n in seeds) / len(seeds) ** 2


def _scores(rows: Points) -> dict[float, float]:
    scores = {}
    for (rate,), runs in rows.groups("rate"):
        bad = np.isin(runs["status"], (FAILED, INVALID)) | ~(runs["abs_error"] > 0)
        if not bad.any():
            cells = [np.log(part["abs_error"]).mean() for _, part in runs.groups("molecule", "steps")]
            scores[float(rate)] = float(np.mean(cells))
    return dict(sorted(scores.items()))


@artefact(
    "learning_rates",
    title="Learning rates",
    question="Which learning rate does each ansatz need, and does it move with size?",
    section="training",
    kind="figure",
    needs=("final",),
)
def learning_rates(study: StudyData) -> Plot:
    """Error against learning rate, a line per size (geometric mean of its runs), a panel per ansatz, molecule
    and T; the chosen rate is filled."""
    rows = rate_runs(study)
    chosen = {(c.ansatz, c.size): c.rate for c in choose_rates(study)}
    kinds = rows.unique("ansatz")
    columns = [cell for cell, _ in rows.groups("molecule", "steps")]
    figure = style.new_figure(max(style.DOUBLE * len(columns) / 3, style.SINGLE), 1.7 * len(kinds) + 0.7)
    axes = figure.subplots(len(kinds), len(columns), squeeze=False, sharex=True, sharey="col")
    table: list[dict[str, Cell]] = []
    sizes = rows.unique("size")
    for i, kind in enumerate(kinds):
        look = style.ansatz_style(kind, kinds)
        for j, (molecule, steps) in enumerate(columns):
            axis = axes[i, j]
            part = rows.only(ansatz=kind, molecule=molecule, steps=steps)
            for size, line in _lines(part):
                shade = float(_SHADES[sizes.index(size) % len(_SHADES)])
                axis.plot(
                    [r["rate"] for r in line],
                    [r["error"] for r in line],
                    color=look.color, ls=look.line, alpha=shade, lw=0.6 + shade, gid=f"rates:{kind}:{size}",
                )  # fmt: skip
                for row in line:
                    picked = row["rate"] == chosen.get((kind, size))
                    axis.plot(
                        row["rate"], row["error"], look.marker, color=look.color, alpha=shade,
                        mfc=look.color if picked else "none", ms=5.5 if picked else 3, mew=0.7,
                    )  # fmt: skip
                    table.append(
                        {"molecule": molecule, "ansatz": kind, "size": size, "steps": int(steps)}
                        | row
                        | {"chosen": picked}
                    )
            axis.axhspan(0, style.CHEMICAL_ACCURACY, color=style.SOFT, alpha=0.15, lw=0, zorder=0)
            axis.set_title(f"{look.label}, {style.formula(molecule)}, T = {steps}", fontweight="normal")
    for j in range(len(columns)):
        column = [r["error"] for r in table if (r["molecule"], r["steps"]) == columns[j]]
        for i in range(len(kinds)):
            style.log_axis(axes[i, j], "y", column)
            style.log_axis(axes[i, j], "x", rows["rate"], pad=1.4)
        axes[-1, j].set_xlabel("learning rate (per step)")
    for i in range(len(kinds)):
        axes[i, 0].set_ylabel(style.METRIC_LABEL["abs_error"])
    handles = [
        Line2D([], [], color=style.INK, alpha=float(_SHADES[k % len(_SHADES)]), label=size)
        for k, size in enumerate(sizes)
    ]
    handles.append(Line2D([], [], color=style.INK, marker="o", ls="none", label="chosen"))
    style.legend_below(figure, handles)
    caption = (
        "Absolute error after T steps against the peak learning rate, one line per model size (faint to "
        "strong: small to large), geometric mean over seeds. Filled: the rate chosen for this ansatz and "
        "size over all panels by the rule of the table of choices. Shaded: chemical accuracy. "
        f"{len(rows)} runs on the grid."
    )
    alt = f"Error against learning rate for {', '.join(kinds)}; chosen rates are marked."
    columns_ = (
        Column("molecule", "molecule"),
        Column("ansatz", "ansatz"),
        Column("size", "size"),
        Column("steps", "T"),
        Column("rate", "learning rate"),
        Column("error", "geometric mean error (Ha)"),
        Column("runs", "runs"),
        Column("not_valid", "failed or invalid"),
        Column("chosen", "chosen"),
        Column("point_ids", "point ids", csv_only=True),
    )
    return Plot(figure, Table(columns_, tuple(table)), caption, alt)


def _lines(part: Points) -> Iterator[tuple[str, list[dict[str, Cell]]]]:
    for (size,), runs in part.groups("size"):
        line: list[dict[str, Cell]] = []
        for rate in runs.unique("rate"):
            here = runs.only(rate=rate)
            fine = here.where(
                (here["status"] != FAILED) & (here["status"] != INVALID) & (here["abs_error"] > 0)
            )
            error = float(np.exp(np.log(fine["abs_error"]).mean())) if len(fine) else math.nan
            line.append(
                {
                    "rate": float(rate),
                    "error": error,
                    "runs": len(fine),
                    "not_valid": len(here) - len(fine),
                    "point_ids": " ".join(here.ids),
                }
            )
        yield str(size), line


@artefact(
    "learning_rate_choice",
    title="Chosen learning rates",
    question="Which learning rates are frozen into the studies, and what does a wrong one cost?",
    section="training",
    kind="table",
    needs=("final",),
)
def learning_rate_choice(study: StudyData) -> Sheet:
    """Per ansatz and size the rate of `choose_rates`, and the error at half a grid away."""
    rows: list[dict[str, Cell]] = []
    for choice in choose_rates(study):
        rates = sorted(choice.scores)
        at = rates.index(choice.rate)
        row: dict[str, Cell] = {
            "ansatz": choice.ansatz,
            "size": choice.size,
            "rate": choice.rate,
            "error": math.exp(choice.scores[choice.rate]),
            "at_end": at in (0, len(rates) - 1),
            "runs": len(choice.ids),
            "point_ids": " ".join(choice.ids),
        }
        for name, k in (("lower", at - 1), ("higher", at + 1)):
            there = 0 <= k < len(rates)
            row[name] = math.exp(choice.scores[rates[k]] - choice.scores[choice.rate]) if there else None
        rows.append(row)
    columns = (
        Column("ansatz", "ansatz"),
        Column("size", "size"),
        Column("rate", "learning rate"),
        Column("error", "error there (Ha)"),
        Column("lower", "× at the next lower rate"),
        Column("higher", "× at the next higher rate"),
        Column("at_end", "at the end of the grid"),
        Column("runs", "runs"),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        "Rule: per ansatz and size the lowest rate whose mean of ln |E − E_FCI|, over seeds and over cells "
        "of molecule and T, the neighbouring sizes counted at half weight, is within one standard error of "
        "the best rate's (from the spread of seeds, pooled over the ansatz); a rate with a failed or invalid "
        "run is out. Errors are geometric means of the size's own runs."
    )
    return Sheet(Table(columns, tuple(rows)), caption)


@artefact(
    "plateaus",
    title="Runs on a plateau",
    question="How many runs end at the Hartree-Fock energy or elsewhere far from FCI?",
    section="training",
    kind="table",
    needs=("final", "molecule"),
)
def plateaus(study: StudyData) -> Sheet:
    """By variant and ansatz: runs without any correlation energy, with some, and chemically accurate ones."""
    study.need_headline()
    rows: list[dict[str, Cell]] = []
    left_out = []
    for molecule, facts in study.molecules.items():
        gap = facts["e_hf"] - facts["e_fci"]
        if not gap > 0:
            left_out.append(molecule)
            continue
        for (variant, ansatz), runs in study.done.only(molecule=molecule).groups("variant", "ansatz"):
            recovered = (facts["e_hf"] - runs["energy"]) / gap
            stuck = recovered < PLATEAU_SHARE
            accurate = runs["abs_error"] <= style.CHEMICAL_ACCURACY
            row: dict[str, Cell] = {
                "variant": variant,
                "molecule": molecule,
                "ansatz": ansatz,
                "runs": len(runs),
                "stuck": int(stuck.sum()),
                "between": int((~stuck & ~accurate).sum()),
                "accurate": int(accurate.sum()),
                "median": float(np.median(runs["abs_error"])),
                "stuck_ids": " ".join(runs.where(stuck).ids),
                "point_ids": " ".join(runs.ids),
            }
            rows.append(row)
    columns = (
        Column("variant", "variant"),
        Column("molecule", "molecule"),
        Column("ansatz", "ansatz"),
        Column("runs", "runs"),
        Column("stuck", "at or above Hartree-Fock"),
        Column("between", "between"),
        Column("accurate", "chemically accurate"),
        Column("median", "median error (Ha)"),
        Column("stuck_ids", "ids at or above Hartree-Fock", csv_only=True),
        Column("point_ids", "point ids", csv_only=True),
    )
    caption = (
        "Finished runs by what became of them. At or above Hartree-Fock: less than "
        f"{PLATEAU_SHARE:.0%} of the correlation energy recovered. Chemically accurate: within "
        f"{1e3 * style.CHEMICAL_ACCURACY:g} mHa of FCI."
    )
    notes = tuple(f"{name}: Hartree-Fock or FCI energy unknown, left out" for name in left_out)
    return Sheet(Table(columns, tuple(rows)), caption, notes)
