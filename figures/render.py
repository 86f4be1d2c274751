"""Build every artefact and write it: each figure in each format with its data as CSV, each
table as CSV and Markdown.

A second run on the same input writes the same bytes: no dates, fixed hash salt, fixed order.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figures.data import StudyData
from figures.registry import Artefact, MissingData, Plot, Sheet, Table, artefacts
from figures.style import house_style

FORMATS = ("pdf", "svg", "png")
_METADATA = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


_REFERENCE = re.compile(r"(?:href=\"#|url\(#)([^\")]+)")
_HASHED = re.compile(r"[a-zA-Z][0-9a-f]{8,}")
_PLACED = re.compile(r"""( (?:d|x|y|width|height|points)=")([^"]*)\"""")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_AUTOMATIC = re.compile(r"[a-zA-Z0-9]+_\d+|[mp][0-9a-f]{8,}")  # the ids that matplotlib gives by itself


@dataclass(frozen=True)
class Product:
    """A built artefact, or the reason why it could not be built. `svg` is the drawn figure as text."""

    artefact: Artefact
    result: Plot | Sheet | None
    reason: str = ""
    svg: str = ""

    @property
    def missing(self) -> list[str]:
        """What is missing from it, in words."""
        if self.result is None:
            return [self.reason]
        return list(self.result.notes)


def build(study: StudyData, chosen: Sequence[Artefact] | None = None) -> list[Product]:
    """Build the chosen artefacts (default: all). Too little data is recorded, not raised."""
    products = []
    with house_style():
        for item in artefacts() if chosen is None else chosen:
            try:
                result = item.build(study)
            except MissingData as gap:
                products.append(Product(item, None, str(gap)))
                continue
            drawing = ""
            if isinstance(result, Plot):
                drawing = _image(result, "svg").decode("utf-8")
                result.figure.set_layout_engine("none")  # laid out once: the other formats keep the positions
            products.append(Product(item, result, svg=drawing))
    return products


def _image(plot: Plot, fmt: str) -> bytes:
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format=fmt, metadata=_METADATA[fmt], facecolor="white")
    return _tidy(buffer.getvalue().decode("utf-8")).encode("utf-8") if fmt == "svg" else buffer.getvalue()


def _tidy(svg: str) -> str:
    """Keep only ids that something refers to: others repeat from panel to panel, which SVG forbids.

    Names given to artists stay readable as `data-artist`. Ids that hash coordinates become numbers, and
    coordinates are rounded to 0.01 pt: the last bits of a logarithm differ between processors.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(_REFERENCE.findall(svg)))}

    def short(name: str) -> str:
        return f"{name[0]}{place[name]}" if _HASHED.fullmatch(name) else name

    def rename(match: re.Match[str]) -> str:
        name = match[1]
        if name in place:
            return f' id="{short(name)}"'
        return "" if _AUTOMATIC.fullmatch(name) else f' data-artist="{name}"'

    svg = re.sub(r' id="([^"]*)"', rename, svg)
    svg = _REFERENCE.sub(lambda m: m[0].replace(m[1], short(m[1])), svg)
    return _PLACED.sub(lambda m: m[1] + _LONG.sub(_rounded, m[2]) + '"', svg)


def _rounded(match: re.Match[str]) -> str:
    text = f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def write(products: Sequence[Product], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the products into `folder`; returns the files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        files.append(path)

    with house_style():
        for product in products:
            name, result = product.artefact.name, product.result
            if result is None:
                for stale in (folder / f"{name}.{ending}" for ending in (*FORMATS, "csv", "md")):
                    stale.unlink(missing_ok=True)
                continue
            if isinstance(result, Plot):
                for fmt in formats:
                    put(f"{name}.{fmt}", product.svg.encode() if fmt == "svg" else _image(result, fmt))
            else:
                put(f"{name}.md", markdown(product.artefact, result).encode())
            put(f"{name}.csv", csv_text(result.table).encode())
    return files


def csv_text(table: Table) -> str:
    """The table as CSV (RFC 4180, LF), full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.csv_header())
    writer.writerows(table.csv_rows())
    return buffer.getvalue()


def markdown(item: Artefact, sheet: Sheet) -> str:
    """A table file for readers: title, question, table, caption, what is missing."""
    parts = [f"# {item.title}", f"*{item.question}*", sheet.table.markdown(), sheet.caption]
    if sheet.notes:
        parts.append("Missing:\n" + "\n".join(f"- {note}" for note in sheet.notes))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
