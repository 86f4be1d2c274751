"""The single-file report: every figure inlined as SVG, every table, what is missing, provenance. No
script, no request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from figures import style
from figures.data import StudyData
from figures.registry import SECTIONS, Artefact, Cell, Quantity, Sheet, plain
from figures.render import Product

_THEME = {
    "fill: #ffffff": "fill: none",  # the ground of a figure file
    style.INK: "currentColor",
    style.SOFT: "var(--soft)",
    style.GRID: "var(--line)",
    style.PAPER: "var(--card)",
    **{
        style.OKABE_ITO[name]: f"var(--{name})" for name in ("blue", "vermillion", "green")
    },  # lighter in the dark
}

_PX_PER_PT = 1.8  # figures keep one scale on the page: 7 pt text is 12.6 px high
_LEAST_PX_PER_PT = 1.3  # on a narrow screen they scroll rather than shrink below this


def report_html(study: StudyData, products: Sequence[Product]) -> str:
    """The report as HTML text (UTF-8, offline, light and dark)."""
    environment = Environment(
        loader=PackageLoader("figures"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = []
    for key, title in SECTIONS:
        entries = [_entry(product) for product in products if product.artefact.section == key]
        if entries:
            sections.append({"key": key, "title": title, "entries": entries})
    missing: dict[str, list[Artefact]] = {}
    for product in products:
        for reason in product.missing:
            missing.setdefault(reason, []).append(product.artefact)
    return environment.get_template("report.html.j2").render(
        study=study,
        sources=sorted(study.sources) or ["the cube"],
        sections=sections,
        missing=missing,
        tiles=_tiles(study),
        commands=_commands(study),
        commit=_commits(study),
        provenance=_provenance(study),
    )


def _entry(product: Product) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "item": product.artefact,
        "svg": "",
        "table": None,
        "caption": product.result.caption if product.result is not None else "",
        "missing": product.missing,
    }
    if isinstance(product.result, Sheet):
        shown = product.result.table.shown()
        main = [column for column in shown if not column.under]
        entry["table"] = {
            "columns": [" / ".join([c.label, *(u.label for u in shown if u.under == c.key)]) for c in main],
            "rows": [
                {
                    "cells": [
                        _cell(row.get(c.key), c.key, c.digits)
                        | {"small": [plain(row.get(u.key), u.digits) for u in shown if u.under == c.key]}
                        for c in main
                    ],
                    "ids": _ids(row.get("point_ids") or row.get("point_id")),
                }
                for row in product.result.table.rows
            ],
        }
    elif product.result is not None:
        entry["svg"] = Markup(
            inline_svg(product.svg, product.artefact.name, product.artefact.title, product.result.alt)
        )
    return entry


def _ids(ids: Cell) -> str:
    """Point ids for a data attribute; a long list stays in the CSV (the page would weigh more
    than the cube)."""
    return str(ids) if ids and len(str(ids).split()) <= 32 else ""


def _cell(cell: Cell, key: str, digits: int) -> dict[str, Any]:
    text = plain(cell, digits)
    if key == "verdict":
        return {"text": text, "css": f"verdict v-{text.replace(' ', '-')}"}
    return {
        "text": text,
        "css": "n"
        if isinstance(cell, (int, float, Quantity, type(None))) and not isinstance(cell, bool)
        else "",
    }


def inline_svg(svg: str, name: str, title: str, alt: str) -> str:
    """A figure file made fit for the page: no prolog, unique ids, theme colours, a name and a description.

    `name` prefixes every id, because two figures share glyph and clip ids and an HTML page may
    hold each only once.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = re.sub(r"<svg([^>]*)>", lambda m: _root(m.group(1), name, title, alt), body, count=1)
    for colour, themed in _THEME.items():
        body = body.replace(colour, themed)
    return body


def _root(attributes: str, name: str, title: str, alt: str) -> str:
    width, height = (float(value) for value in re.findall(r'\b(?:width|height)="([\d.]+)pt"', attributes))
    wide = f"max-width: {_PX_PER_PT * width:.0f}px; min-width: {_LEAST_PX_PER_PT * width:.0f}px"
    names = f"{name}-alt-title {name}-alt"
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="{wide}" role="img" aria-labelledby="{names}">'
        f'<title id="{name}-alt-title">{escape(title)}</title><desc id="{name}-alt">{escape(alt)}</desc>'
    )


def _tiles(study: StudyData) -> list[tuple[str, str]]:
    counts = study.counts()
    points = study.done
    tiles = [("runs finished", str(counts["done"]))]
    tiles += [(state, str(counts[state])) for state in ("failed", "invalid", "missing") if counts[state]]
    tiles += [
        ("molecules", str(len(points.unique("molecule")))),
        ("ansatze", str(len(points.unique("ansatz")))),
    ]
    if len(points):
        low, high = int(points["n_total"].min()), int(points["n_total"].max())
        tiles.append(("parameters N", f"{low:,} – {high:,}".replace(",", " ")))
    return tiles


def _commands(study: StudyData) -> str:
    name = study.name or "STUDY"
    return "\n".join(
        (
            "make setup",
            f".venv/bin/python -m replicate run specs/{name}.toml    # resumable",
            f".venv/bin/python -m replicate collect specs/{name}.toml",
            f".venv/bin/python -m replicate fit artifacts/{name}/cube.nc",
            f".venv/bin/python -m figures artifacts/{name}/cube.nc",
        )
    )


def _commits(study: StudyData) -> str:
    """Commits that the runs were made at, with a warning where the tree had uncommitted changes."""
    flat = _flatten(study.provenance)
    commits = dict.fromkeys(str(value) for key, value in flat if key.endswith("commit") and value)
    dirty = any(value is True for key, value in flat if key.endswith("dirty"))
    return ", ".join(commits) + (" (with uncommitted changes)" if commits and dirty else "")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value, 1):
                flat += _flatten(item, f"{prefix}{key} {i}." if len(value) > 1 else f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _provenance(study: StudyData) -> list[tuple[str, str]]:
    rows = [(f"sha256 of {name}", digest) for name, digest in sorted(study.sources.items())]
    rows += [
        (key.replace(".", " "), str(value)) for key, value in _flatten(study.provenance) if value is not None
    ]
    if study.fits is not None:
        rows += [
            (f"fit: {key}", str(value)) for key, value in _flatten(study.fits.record.get("settings") or {})
        ]
    return rows
