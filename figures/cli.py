"""`python -m figures CUBE [--fit FIT] [--only NAME] [-o DIR] [--format pdf,svg,png]`.

Exit status: 0 done (also when parts are missing: they are listed), 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import figures.catalogue  # noqa: F401  (registers every figure and table)
from figures.data import DataError, load_study
from figures.readme import check, rewrite
from figures.registry import artefacts
from figures.render import FORMATS, build, write
from figures.report import report_html


def parser() -> argparse.ArgumentParser:
    """The command line, with the list of figures in its help."""
    names = "\n".join(f"  {item.name:<24}{item.question}" for item in artefacts())
    arguments = argparse.ArgumentParser(
        prog="python -m figures",
        description="Figures, tables, verdicts and a single-file HTML report from a cube and its fit.",
        epilog=f"figures and tables:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("cube", type=Path, metavar="CUBE", help="cube.nc of a study")
    arguments.add_argument(
        "--fit", type=Path, help="fit.json (default: the one beside the cube, if there is one)"
    )
    arguments.add_argument("--no-fit", action="store_true", help="ignore a fit beside the cube")
    arguments.add_argument("--only", metavar="NAME[,NAME]", help="build only these; no report is written")
    arguments.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder (default: figures/ beside the cube)"
    )
    arguments.add_argument(
        "--format", default="pdf,svg", metavar="LIST", help="of pdf, svg, png (default: pdf,svg)"
    )
    arguments.add_argument(
        "--readme", type=Path, metavar="FILE", help="also rewrite the marked sections of this file"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parser().parse_args(argv)
    problems = []
    formats = list(dict.fromkeys(part.strip() for part in arguments.format.split(",") if part.strip()))
    unknown = [part for part in formats if part not in FORMATS]
    if unknown or not formats:
        problems.append(f"--format: {', '.join(unknown) or 'empty'}: choose from {', '.join(FORMATS)}")
    known = {item.name: item for item in artefacts()}
    wanted = (
        [part.strip() for part in arguments.only.split(",")] if arguments.only is not None else list(known)
    )
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f', did you mean "{close[0]}"?' if close else f"; one of {', '.join(known)}"
            problems.append(f"--only: {name}: no such figure or table{hint}")
    fit = arguments.fit
    beside = arguments.cube.with_name("fit.json")
    if fit is None and not arguments.no_fit and beside.is_file():
        fit = beside
    if not problems:
        try:
            study = load_study(arguments.cube, fit)
            if arguments.readme is not None:
                check(arguments.readme)
        except DataError as error:
            problems.append(str(error))
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 2

    products = build(study, [known[name] for name in dict.fromkeys(wanted)])
    folder = arguments.output or arguments.cube.resolve().parent / "figures"
    try:
        files = write(products, folder, formats)
        if arguments.only is None:
            report = folder / "report.html"
            report.write_text(report_html(study, products), encoding="utf-8", newline="\n")
            files.append(report)
        if arguments.readme is not None:
            rewrite(arguments.readme, study, products, folder)
            files.append(arguments.readme)
    except OSError as error:
        sys.stderr.write(f"{folder}: cannot write: {error.strerror or error}\n")
        return 1
    built = sum(product.result is not None for product in products)
    lines = [f"{built} of {len(products)} figures and tables, {len(files)} files in {folder}"]
    gaps: dict[str, list[str]] = {}
    for product in products:
        for reason in product.missing:
            gaps.setdefault(reason, []).append(product.artefact.name)
    lines += [f"missing: {', '.join(names)}: {reason}" for reason, names in gaps.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
