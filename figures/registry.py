"""What a figure or a table is, and the list of all of them.

A builder is a pure function `build(study: StudyData) -> Plot | Sheet`: no file access, no global state.
The decorator
`@artefact` files it under the question that it answers; `render` writes it, `report` puts it on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from figures.data import StudyData

SECTIONS: tuple[tuple[str, str], ...] = (
    ("verdicts", "The study's claims and open questions"),
    ("scaling", "How error falls with model size and training time"),
    ("law", "The fitted law"),
    ("effects", "What moves the error more: size or training time"),
    ("compute", "Compute-optimal allocation"),
    ("cost", "Where the FLOPs and the time go"),
    ("training", "Training"),
    ("diagnostics", "Can the fit be trusted?"),
    ("data", "The data"),
)


class MissingData(Exception):
    """The data hold too little for this figure or table; the message says what is missing, in one
    sentence."""


@dataclass(frozen=True)
class Quantity:
    """A number with its interval; `low`/`high` may be NaN (no interval) or infinite (one-sided)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.value) and math.isnan(self.low) and math.isnan(self.high):
            return "–"
        if math.isnan(self.low) and math.isnan(self.high):
            return number(self.value)
        digits = 3
        if all(map(math.isfinite, (self.low, self.high))) and not math.isclose(self.low, self.high):
            # Enough digits to tell the ends apart, within reason.
            while digits < 5 and number(self.low, digits) == number(self.high, digits):
                digits += 1
        return f"{number(self.value, digits)} [{number(self.low, digits)}, {number(self.high, digits)}]"


Cell = str | int | float | bool | Quantity | None


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, plain between 1e-3 and 1e5, else scientific;
    true minus sign."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if -3 <= magnitude < 5:
        text = f"{rounded:.{max(digits - 1 - magnitude, 0)}f}"
    else:
        mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def plain(cell: Cell, digits: int = 3) -> str:
    """A cell as a reader sees it (Markdown, HTML)."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return str(cell).replace("-", "−")
    if isinstance(cell, float):
        return number(cell, digits)
    return str(cell)


@dataclass(frozen=True)
class Column:
    """One column: `key` names it in the CSV file, `label` heads it for readers; `digits`
    significant digits shown."""

    key: str
    label: str
    digits: int = 3
    csv_only: bool = False
    under: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells by column key. In CSV a `Quantity` spreads over `key`, `key_low`,
    `key_high` at full precision."""

    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]

    def shown(self) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if not column.csv_only)

    def values(self, key: str) -> list[Cell]:
        return [row.get(key) for row in self.rows]

    def csv_header(self) -> list[str]:
        header: list[str] = []
        for column in self.columns:
            header.append(column.key)
            if self._is_quantity(column):
                header += [f"{column.key}_low", f"{column.key}_high"]
        return header

    def csv_rows(self) -> list[list[str]]:
        spread = {column.key for column in self.columns if self._is_quantity(column)}
        lines = []
        for row in self.rows:
            line: list[str] = []
            for column in self.columns:
                cell = row.get(column.key)
                if column.key in spread:
                    cell = cell if isinstance(cell, Quantity) else Quantity(_as_float(cell))
                    line += [_raw(cell.value), _raw(cell.low), _raw(cell.high)]
                else:
                    line.append(_raw(cell))
            lines.append(line)
        return lines

    def markdown(self) -> str:
        shown = self.shown()
        head = "| " + " | ".join(_escape(c.label) for c in shown) + " |"
        rule = "|" + "---|" * len(shown)
        body = [
            "| " + " | ".join(_escape(plain(row.get(c.key), c.digits)) for c in shown) + " |"
            for row in self.rows
        ]
        return "\n".join([head, rule, *body]) + "\n"

    def _is_quantity(self, column: Column) -> bool:
        return any(isinstance(row.get(column.key), Quantity) for row in self.rows)


def _as_float(cell: Cell) -> float:
    return float(cell) if isinstance(cell, (int, float)) else math.nan


def _raw(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float):
        return "" if math.isnan(cell) else repr(float(cell))
    return str(cell)


def numbers(rows: Sequence[Mapping[str, Cell]], key: str) -> list[float]:
    """The finite numbers of one column, as floats."""
    cells = [row.get(key) for row in rows]
    return [float(c) for c in cells if isinstance(c, (int, float)) and math.isfinite(c)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class Plot:
    """A drawn figure. `table` holds every drawn mark with its point ids; `caption` describes it; `alt` is
    for readers
    who do not see it; `notes` say what could not be drawn and why."""

    figure: Figure
    table: Table
    caption: str
    alt: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A table for readers, with its caption and what is missing from it."""

    table: Table
    caption: str
    notes: tuple[str, ...] = ()


def gathered(gaps: Sequence[str]) -> list[str]:
    """Notes "case: reason" with the cases of one reason in one note: "case; case: reason"."""
    cases: dict[str, list[str]] = {}
    for gap in dict.fromkeys(gaps):
        case, _, reason = gap.partition(": ")
        cases.setdefault(reason, []).append(case)
    return ["; ".join(names) + (f": {reason}" if reason else "") for reason, names in cases.items()]


Builder = Callable[["StudyData"], "Plot | Sheet"]


@dataclass(frozen=True)
class Artefact:
    """A registered figure or table. `needs`: the parts of the data it reads ("final",
    "history", "molecule", "fit")."""

    name: str
    title: str
    question: str
    section: str
    kind: str
    needs: tuple[str, ...]
    build: Builder = field(compare=False)


_REGISTRY: dict[str, Artefact] = {}


def artefact(
    name: str, *, title: str, question: str, section: str, kind: str, needs: Sequence[str] = ("final",)
) -> Callable[[Builder], Builder]:
    """Register a builder under `name` (also its file name). `kind`: "figure" or "table"."""
    if section not in dict(SECTIONS) or kind not in ("figure", "table"):
        raise ValueError(f"{name}: unknown section {section!r} or kind {kind!r}")

    def register(build: Builder) -> Builder:
        if name in _REGISTRY:
            raise ValueError(f"{name} is registered twice")
        _REGISTRY[name] = Artefact(name, title, question, section, kind, tuple(needs), build)
        return build

    return register


def artefacts() -> tuple[Artefact, ...]:
    """All figures and tables in reading order (section, then order of registration)."""
    order = [key for key, _ in SECTIONS]
    return tuple(sorted(_REGISTRY.values(), key=lambda item: order.index(item.section)))
