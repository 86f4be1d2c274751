"""CSV tables for `fit --csv`, checked cell by cell."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np

from replicate.spec import UserError


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


#: What may separate cells: the first one that splits a wanted name out of the header.
SEPARATORS = ",;\t"


def read_csv(path: Path, numeric: list[str], labels: list[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file by header name: `numeric` as float64, `labels` as text.

    Cells are separated by commas, semicolons or tabs, numbers have a decimal point. Blank lines are skipped,
    and so are lines that begin with # and do not have the cells of a row. Raises UserError in one line:
    missing columns, cells that are no finite number, lines of another length.
    """
    wanted = list(dict.fromkeys([*numeric, *labels]))
    try:
        header, rows = _split(path.read_text(encoding="utf-8-sig"), wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None
    if not header:
        raise UserError(f"{path}: empty file, expected a header line")
    missing = [repr(name) for name in wanted if name not in header]
    twice = [repr(name) for name in wanted if header.count(name) > 1]
    if missing or twice:
        what = [f"no column {', '.join(missing)}"] if missing else []
        what += [f"more than one column {', '.join(twice)}"] if twice else []
        raise UserError(f"{path}: {', '.join(what)}; columns are {', '.join(header)}")
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    other = [i for i, row in rows if len(row) != len(header)]
    if other:
        raise UserError(
            f"{path}: line {other[0]} has another number of cells than the header ({len(other)} such lines)"
        )
    out: dict[str, np.ndarray] = {}
    problems = []
    for name in dict.fromkeys(numeric):
        j = header.index(name)
        out[name] = np.array([_number(row[j]) for _, row in rows])
        bad = np.flatnonzero(~np.isfinite(out[name]))
        if bad.size:
            i, row = rows[bad[0]]
            more = f" (and {bad.size - 1} more)" if bad.size > 1 else ""
            problems.append(f"line {i}, column {name!r}: {row[j].strip()!r} is not a finite number{more}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    for name in labels:
        out[name] = np.array([row[header.index(name)].strip() for _, row in rows])
    return out


def _number(cell: str) -> float:
    """The number of a cell, NaN for anything else (Python would read 1_000 as a number, a table does not)."""
    try:
        return float("nan") if "_" in cell else float(cell)
    except ValueError:
        return float("nan")


def _split(text: str, wanted: list[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header cells, and (line number, cells) of every row below it."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for k, (_, line) in enumerate(lines):
        cells = {s: [c.strip() for c in next(csv.reader([line], delimiter=s), [])] for s in SEPARATORS}
        found = next((s for s in SEPARATORS if not set(wanted).isdisjoint(cells[s])), None)
        if found is None and line.lstrip().startswith("#"):
            continue
        separator = found or SEPARATORS[0]
        header, below = cells[separator], lines[k + 1 :]
        reader = csv.reader((f"{line}\n" for _, line in below), delimiter=separator)
        rows = [(below[reader.line_num - 1][0], row) for row in reader]
        comment = [len(row) != len(header) and row[0].lstrip().startswith("#") for _, row in rows]
        empty = [not any(cell.strip() for cell in row) for _, row in rows]
        return header, [row for row, c, e in zip(rows, comment, empty, strict=True) if not c and not e]
    return [], []
