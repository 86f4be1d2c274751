"""How every figure looks: sizes, colours, markers, ticks. Text is never below 7 pt at journal width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

SINGLE, DOUBLE = 3.4, 7.0  # inches: journal column and page widths
INK, SOFT, GRID, PAPER = (
    "#1b1b1f",
    "#6a6a72",
    "#d8d8de",
    "#fdfdfd",
)  # the report swaps these for theme colours
CHEMICAL_ACCURACY = 1.6e-3  # hartree, 1 kcal/mol
_EXPONENT_END = 3.0  # of drawn axes; the CSV has all values

# Okabe & Ito (2008); the three main ones keep a contrast of 3:1 on white and on the report's dark ground.
OKABE_ITO = {
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "green": "#009e73",
    "yellow": "#f0e442",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "purple": "#cc79a7",
}


@dataclass(frozen=True)
class AnsatzStyle:
    """Colour, marker and line differ together, so that no reader depends on colour alone."""

    label: str
    color: str
    marker: str
    line: Any


_KNOWN = {
    "made": AnsatzStyle("MADE", OKABE_ITO["vermillion"], "^", (0, (4, 1.6))),
    "transformer": AnsatzStyle("Transformer", OKABE_ITO["blue"], "o", "-"),
    "retnet": AnsatzStyle("RetNet", OKABE_ITO["green"], "s", (0, (5, 1.5, 1, 1.5))),
}
_OTHERS = (
    ("purple", "D", (0, (1, 1.2))),
    ("sky", "v", (0, (8, 2))),
    ("orange", "P", (0, (3, 1, 1, 1, 1, 1))),
)

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlepad": 4,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.handletextpad": 0.6,
    "legend.columnspacing": 1.2,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.6,
    "ytick.minor.size": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.4,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "butt",  # an interval ends where it ends
    "lines.markersize": 4,
    "axes.unicode_minus": True,
    "mathtext.default": "regular",
    "svg.fonttype": "path",
    "svg.hashsalt": "replicate-figures",
    "pdf.fonttype": 42,
    "pdf.compression": 6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "path.simplify": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """The project's rcParams on top of matplotlib's own defaults (a user's matplotlibrc changes nothing)."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)  # type: ignore[arg-type]
        yield


def ansatz_style(kind: str, kinds: Sequence[str] = ()) -> AnsatzStyle:
    """Style of an ansatz; `kinds` (all ansatze of the study) gives unknown ones distinct styles."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    others = [name for name in kinds if name not in _KNOWN] or [kind]
    colour, marker, line = _OTHERS[others.index(kind) % len(_OTHERS)]
    return AnsatzStyle(kind, OKABE_ITO[colour], marker, line)


METRIC_LABEL = {"v_score": "V-score (dimensionless)", "abs_error": "|E − E$_{FCI}$| (Ha)"}
METRIC_NAME = {"v_score": "V-score", "abs_error": "absolute error"}
AXIS_LABEL = {
    "n_total": "parameters N (count)",
    "n_modulus": "modulus parameters (count)",
    "n_phase": "phase parameters (count)",
    "d_prime": "D′ = T · S$_F$ (steps)",
    "steps": "steps T (count)",
    "molecule": "molecule",
    "fitted": "fitted value",
    "search_fraction": "S$_F$ (fraction of the sector)",
    "flops_estimated": "estimated compute (FLOP)",
    "flops_executed": "executed compute (FLOP)",
}
_FORMULA = {
    "h2o": "H$_2$O",
    "n2": "N$_2$",
    "o2": "O$_2$",
    "h2s": "H$_2$S",
    "ph3": "PH$_3$",
    "li2o": "Li$_2$O",
    "beh2": "BeH$_2$",
    "ch2": "CH$_2$",
    "nh3": "NH$_3$",
    "ch4": "CH$_4$",
    "f2": "F$_2$",
    "h2": "H$_2$",
}


def formula(molecule: str) -> str:
    """A molecule's name with subscripts where it is a known formula."""
    return _FORMULA.get(molecule.lower(), molecule)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All plain (300, 0.02) when every tick lies in [0.001, 10000), else all as powers of ten."""
    if all(1e-3 <= tick < 1e4 for tick in ticks):
        return [f"{tick:g}" for tick in ticks]
    return [_power(tick) for tick in ticks]


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    if abs(mantissa - 1) < 1e-6:
        return f"$10^{{{exponent}}}$".replace("-", "\u2212")
    return f"${mantissa:g}{{\\times}}10^{{{exponent}}}$".replace("-", "\u2212")


def log_axis(axis: Axes, which: str, values: Any = None, *, pad: float = 1.25, max_ticks: int = 6) -> None:
    """A log axis with ticks that can be read at any span: decades, or 1-2-5 within two decades.

    `values`: the positive data that must be inside; limits are set from them with a factor `pad`.
    """
    side = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    if values is not None:
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite) & (finite > 0)]
        if finite.size:
            low, high = float(finite.min()) / pad, float(finite.max()) * pad
            if high / low < 3:
                low, high = low / 1.5, high * 1.5
            (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    ticks = log_ticks(low, high, max_ticks)
    side.set_major_locator(FixedLocator(ticks))
    side.set_major_formatter(FixedFormatter(tick_labels(ticks)))
    if high / low < 1e5:
        side.set_minor_locator(LogLocator(subs=tuple(range(2, 10)), numticks=100))
    else:
        side.set_minor_locator(NullLocator())
    side.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Readable ticks of a log axis: decades, or 1-2-5 and the like where it spans fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = last - first + 1
    if decades >= 2:
        every = math.ceil(decades / max_ticks)
        return [10.0**k for k in range(first, last + 1) if (k - last) % every == 0]
    for steps in ((1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = [
            m * 10.0**k
            for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in steps
        ]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            while len(ticks) > max_ticks:
                ticks = ticks[::2]
            return ticks
    return ticks if len(ticks) == 2 else [math.sqrt(low * high)]


def plain_axis(axis: Axes, which: str) -> None:
    """A linear axis with short numbers and a true minus sign."""
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def exponent_axis(axis: Axes) -> None:
    """Limits of an axis of exponents: a runaway value (the fits allow up to 10) must not squeeze the rest.

    Marks beyond the end are shown as arrow heads at it; interval lines run off the axis.
    """
    low, high = axis.get_xlim()
    if low >= -_EXPONENT_END / 3 and high <= _EXPONENT_END:
        return
    low, high = max(low, -_EXPONENT_END / 3), min(high, _EXPONENT_END)
    axis.set_xlim(low, high)
    for line in list(axis.get_lines()):
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        drawn = len(x) == 1 and np.isfinite(x[0]) and line.get_marker() not in ("", "None", None)
        if drawn and not low <= x[0] <= high:
            side = x[0] > high
            axis.plot(
                [high if side else low],
                y,
                marker=">" if side else "<",
                color=line.get_color(),
                ms=5,
                clip_on=False,
                gid="off-scale",
            )


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's global state, laid out without overlaps."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.05)
    return figure


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns for `count` panels: up to four abreast, three where that leaves fewer holes."""
    columns = count if count <= 4 else (3 if count in (5, 6, 9) else 4)
    return math.ceil(count / columns), columns


def ansatz_handles(kinds: Sequence[str], *, line: bool = True) -> list[Line2D]:
    """Legend entries, one per ansatz, showing marker, colour and line."""
    handles = []
    for kind in kinds:
        look = ansatz_style(kind, kinds)
        handles.append(
            Line2D(
                [],
                [],
                color=look.color,
                marker=look.marker,
                ls=look.line if line else "none",
                label=look.label,
            )
        )
    return handles


def legend_below(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """One legend under all panels, row by row, as many columns as fit: it cannot hide data."""
    if handles:
        widths = [0.48 + 0.06 * len(str(handle.get_label())) for handle in handles]  # inches, 7.5 pt text
        for columns in range(len(widths), 0, -1):
            order = row_by_row(len(widths), columns)
            parts = np.array_split([widths[i] for i in order], columns)
            if sum(part.max() for part in parts) <= figure.get_figwidth():
                break
        figure.legend(handles=[handles[i] for i in order], loc="outside lower center", ncols=columns)


def row_by_row(count: int, columns: int) -> list[int]:
    """The order in which matplotlib, which fills columns first, shows `count` entries row by row."""
    return [i for column in range(columns) for i in range(column, count, columns)]


def legend_in_hole(hole: Axes, handles: Sequence[Line2D | Patch]) -> None:
    """One legend in the place of a panel that the grid has too many: it cannot hide data."""
    hole.set_axis_off()
    hole.legend(handles=list(handles), loc="center left", borderaxespad=0.0)


def bottom_labels(axes: Sequence[Axes], columns: int, label: str) -> None:
    """The x label on every panel that has none below it."""
    for i, axis in enumerate(axes):
        if i + columns >= len(axes):
            axis.set_xlabel(label)


def note_panel(axis: Axes, text: str) -> None:
    """A panel that has nothing to draw says so."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    axis.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        transform=axis.transAxes,
        fontsize=7.5,
        color=SOFT,
        wrap=True,
    )
