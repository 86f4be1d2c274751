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


def read_csv(path: Path, numeric: list[str], labels: list[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file by header name: `numeric` as float64, `labels` as text.

    Raises UserError with one line per problem: missing columns, cells that are no finite number, short rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not lines or not any(lines[0]):
        raise UserError(f"{path}: empty file, expected a header line")
    header = [h.strip() for h in lines[0]]
    problems = []
    for name in dict.fromkeys([*numeric, *labels]):
        if header.count(name) != 1:
            what = "no column" if name not in header else "more than one column"
            problems.append(f"{path}: {what} {name!r}; columns are {', '.join(header)}")
    if problems:
        raise UserError(*problems)
    rows = [(i, row) for i, row in enumerate(lines[1:], start=2) if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    short = [i for i, row in rows if len(row) != len(header)]
    if short:
        raise UserError(
            f"{path}: line {short[0]} has another number of cells than the header ({len(short)} such lines)"
        )
    out: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(numeric):
        j = header.index(name)
        values, bad = [], []
        for i, row in rows:
            try:
                number = float(row[j])
            except ValueError:
                number = float("nan")
            if not np.isfinite(number):
                bad.append((i, row[j].strip()))
            values.append(number)
        if bad:
            i, cell = bad[0]
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            problems.append(f"{path}: line {i}, column {name!r}: {cell!r} is not a finite number{more}")
        out[name] = np.array(values)
    if problems:
        raise UserError(*problems)
    for name in labels:
        out[name] = np.array([row[header.index(name)].strip() for _, row in rows])
    return out
