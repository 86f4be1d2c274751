"""Rewrites the marked sections of a README from the data, so that no number in it is typed.

A section is `<!-- figures:NAME -->` ... `<!-- /figures:NAME -->`; NAME is one of `SECTIONS`. Text outside
the markers is left alone; a marker whose name is unknown or that is not closed is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from figures import style
from figures.data import DataError, StudyData
from figures.registry import Plot, Sheet, Table
from figures.render import Product
from figures.verdicts import NOT_MEASURED

_MARK = re.compile(r"<!-- figures:(?P<name>[\w-]+) -->\n?(?P<body>.*?)<!-- /figures:(?P=name) -->", re.DOTALL)
_FIRST = ("v_score_vs_n", "abs_error_vs_n", "training_curves")  # the first that could be drawn
_TABLES: Mapping[str, tuple[str, ...]] = {  # table -> its columns shown, () for all
    "verdicts": ("statement", "verdict", "value", "statistic"),
    "coefficients": (),
    "flops": (),
    "modes": (),
    "learning_rate_choice": (),
    "plateaus": (),
    "accuracy": (),
    "variant_effects": (),
}
SECTIONS = ("numbers", "first-figure", *_TABLES)
_OPEN = re.compile(r"<!-- figures:([\w-]+) -->")


def check(path: Path) -> None:
    """Raise DataError unless `path` exists and every marker in it is known and closed."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    unknown = [name for name in _OPEN.findall(text) if name not in SECTIONS]
    if unknown:
        raise DataError(f"{path}: unknown section figures:{unknown[0]}; one of {', '.join(SECTIONS)}")
    if len(_OPEN.findall(text)) != len(_MARK.findall(text)):
        raise DataError(f"{path}: a figures: marker is not closed")


def rewrite(path: Path, study: StudyData, products: Sequence[Product], folder: Path) -> None:
    """Fill every marked section of `path` (UTF-8, checked before) that was built; figures are linked relative
    to it. What `--only` left out keeps its text."""
    text = path.read_text(encoding="utf-8")
    link = Path(os.path.relpath(folder.resolve(), path.resolve().parent)).as_posix()
    content = sections(study, products, link)
    filled = _MARK.sub(
        lambda m: (
            f"<!-- figures:{m['name']} -->\n{content[m['name']].rstrip()}\n<!-- /figures:{m['name']} -->"
            if m["name"] in content
            else m[0]
        ),
        text,
    )
    if filled != text:
        path.write_text(filled, encoding="utf-8", newline="\n")


def sections(study: StudyData, products: Sequence[Product], link: str) -> dict[str, str]:
    """Markdown of every section whose figure or table was built, by name."""
    built = {product.artefact.name: product for product in products}
    text = {"numbers": _numbers(study)}
    if any(name in built for name in _FIRST):
        text["first-figure"] = _figure(built, link, _FIRST)
    for name, keys in _TABLES.items():
        if name in built:
            text[name] = _table(built[name], keys)
    return text


def _numbers(study: StudyData) -> str:
    counts = study.counts()
    done = study.done
    phrase = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "done")
    lines = [f"Study `{study.name}`: {phrase} runs."]
    if len(done):
        molecules, kinds = done.unique("molecule"), done.unique("ansatz")
        labels = ", ".join(style.ansatz_style(kind, kinds).label for kind in kinds)
        seeds = len(done.unique("seed"))
        lines.append(
            f"{len(molecules)} molecules ({', '.join(molecules)}), {len(kinds)} ansatze ({labels}), "
            f"N from {done['n_total'].min()} to {done['n_total'].max()}, "
            f"T from {done['steps'].min()} to {done['steps'].max()}, {seeds} seed{'s' * (seeds > 1)}; "
            f"{done['wall_seconds'].sum() / 60:.0f} minutes of training in all."
        )
    return "\n".join(lines)


def _figure(built: Mapping[str, Product], link: str, names: Sequence[str]) -> str:
    for name in names:
        product = built.get(name)
        if product is not None and isinstance(product.result, Plot):
            file = f"{link}/{name}.svg"
            return f"![{product.result.alt}]({file})\n\n*{product.artefact.title}.* {product.result.caption}"
    return "*(no figure could be drawn from this study)*"


def _table(product: Product, keys: Sequence[str]) -> str:
    if not isinstance(product.result, Sheet):
        return f"*(missing: {product.reason})*"
    table = product.result.table
    if keys:
        table = Table(tuple(c for key in keys for c in table.columns if c.key == key), table.rows)
    measured = [row for row in table.rows if row.get("verdict") != NOT_MEASURED]
    parts = [Table(table.columns, tuple(measured)).markdown() + "\n" + product.result.caption]
    # What these data say nothing on is listed, but not in the reader's way.
    silent = [f"- {row['statement']}" for row in table.rows if row.get("verdict") == NOT_MEASURED]
    if silent:
        parts.append(f"<details><summary>{len(silent)} {NOT_MEASURED} by this study</summary>\n")
        parts.append("\n".join(silent) + "\n\n</details>")
    return "\n\n".join(parts)
