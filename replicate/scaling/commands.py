"""`fit` and `allocate`: arguments, files, messages. Nothing heavy is imported before a command runs.

fit CUBE writes fit.json, fit.nc and report.md beside the cube (or in --out), each atomically. In fit.json:

    schema, kind "cube", study, cube, cube_sha256, settings, table, provenance, spec
    fits        one object per (ansatz, metric, scope, law), see `study.describe`; scope "all": joint fit
    refused     what could not be fitted, with the reason
    selection, sensitivity, allocation, hold_out    one object per (ansatz, metric)

Parameters are in raw units, L = exp(intercept of the molecule) * law(parameters); null: does not exist.
fit.nc has one group /ansatz/metric/scope/law per fit with draws (replicate, parameter), estimate, residual,
fitted, observed and the labels and variables of the points.

fit --csv writes one JSON object: parameters, objective, certificate, standard_errors, intervals and more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fit`."""
    parser.add_argument("cube", nargs="?", type=Path, help="cube.nc of a study")
    parser.add_argument("--metric", action="append", choices=["v_score", "abs_error"], help="default: both")
    parser.add_argument(
        "--law", help="cube: a named law (default: additive and its refinements); csv: its text"
    )
    parser.add_argument(
        "--objective", default="t:4", help="t:NU | huber:DELTA | lad | l2-log | l2-raw | asinh:NU"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=4000, metavar="B", help="refits per fit (default 4000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", action="append", default=[], help="cube: variants to use")
    parser.add_argument("--checkpoints", action="store_true", help="cube: recorded steps as points too")
    parser.add_argument("--decayed-checkpoints", action="store_true", help="cube: also of decaying schedules")
    parser.add_argument("--no-selection", action="store_true", help="cube: leave the rival laws out")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="cube: folder of the results (default: the cube's)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="any scaling-law table instead of a cube")
    parser.add_argument(
        "--x", action="append", default=[], metavar="NAME=COLUMN", help="csv: a variable of the law"
    )
    parser.add_argument("--y", metavar="NAME=COLUMN", help="csv: the quantity that the law describes")
    parser.add_argument("--cluster", metavar="COLUMN", help="csv: rows with one label are resampled together")
    parser.add_argument("--group", metavar="COLUMN", help="csv: one multiplicative intercept per label")
    parser.add_argument("--noise", metavar="COLUMN", help="csv: additive standard error of y (asinh)")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="csv: file of the result (default: standard output)"
    )


def run_fit(args: argparse.Namespace) -> int:
    """`fit CUBE` or `fit --csv FILE`."""
    from replicate.spec import UserError

    if (args.cube is None) == (args.csv is None):
        raise UserError("fit: give either a cube or --csv FILE")
    if args.bootstrap < 0 or 0 < args.bootstrap < 40:
        raise UserError(f"--bootstrap {args.bootstrap}: 0 (none) or at least 40 replicates")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    return _fit_csv(args) if args.csv is not None else _fit_cube(args)


def _fit_cube(args: argparse.Namespace) -> int:
    from replicate.scaling.law import LAWS
    from replicate.scaling.objective import parse_objective
    from replicate.scaling.report import render, summary
    from replicate.scaling.study import FULL, Options, fit_cube
    from replicate.spec import UserError

    if args.x or args.y or args.cluster or args.group or args.noise or args.json:
        raise UserError("fit CUBE: --x, --y, --cluster, --group, --noise and --json belong to --csv")
    if args.law is not None and args.law not in LAWS:
        raise UserError(f"--law {args.law}: known laws are {', '.join(LAWS)} (free text needs --csv)")
    options = Options(
        objective=parse_objective(args.objective),
        metrics=tuple(dict.fromkeys(args.metric or ("v_score", "abs_error"))),
        laws=FULL if args.law is None else (args.law,),
        bootstrap=args.bootstrap,
        selection=not args.no_selection,
        seed=args.seed,
        variants=tuple(args.variant),
        checkpoints=args.checkpoints or args.decayed_checkpoints,
        allow_decayed=args.decayed_checkpoints,
        progress=lambda text: print(f"fit: {text}", file=sys.stderr, flush=True),
    )
    result, tree = fit_cube(args.cube, options)
    folder = args.out if args.out is not None else args.cube.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "fit.json", to_json(result))
    write_tree(folder / "fit.nc", tree)
    write_text(folder / "report.md", render(result))
    print(summary(result))
    print(f"{folder / 'fit.json'}\n{folder / 'fit.nc'}\n{folder / 'report.md'}")
    return 0


def _columns(pairs: list[str], option: str) -> dict[str, str]:
    from replicate.spec import UserError

    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not name.isidentifier() or not column:
            raise UserError(f"{option} {pair!r}: expected NAME=COLUMN")
        if name in out:
            raise UserError(f"{option} {name}: given twice")
        out[name] = column
    return out


def _fit_csv(args: argparse.Namespace) -> int:
    from replicate.scaling.columns import file_sha256, read_csv
    from replicate.scaling.describe import clean, describe, objective_rows
    from replicate.scaling.infer import check_separable, condition_number, condition_warning
    from replicate.scaling.law import make_design, parse_law
    from replicate.scaling.objective import parse_objective
    from replicate.scaling.report import summary_of_fit
    from replicate.scaling.solve import solve
    from replicate.spec import UserError

    if not args.x or not args.y or not args.law:
        raise UserError("fit --csv: needs --x NAME=COLUMN, --y NAME=COLUMN and --law TEXT")
    x, y = _columns(args.x, "--x"), _columns([args.y], "--y")
    law = parse_law(args.law, tuple(x))
    objective = parse_objective(args.objective)
    if (objective.kind == "asinh") != (args.noise is not None):
        raise UserError("--objective asinh and --noise COLUMN go together")
    used = {name: column for name, column in x.items() if name in law.variables}
    numeric = [*used.values(), *y.values(), *([args.noise] if args.noise else [])]
    table = read_csv(args.csv, numeric, [c for c in (args.cluster, args.group) if c])
    label, column = next(iter(y.items()))
    problems = []
    for name, source in {
        **used,
        **({label: column} if objective.kind not in ("asinh", "l2-raw") else {}),
    }.items():
        bad = table[source] <= 0
        if bad.any():
            problems.append(
                f"{args.csv}: column {source!r} ({name}): {int(bad.sum())} values are not positive"
            )
    if problems:
        raise UserError(*problems)
    try:
        design = make_design(
            law,
            {name: table[source] for name, source in used.items()},
            table[column],
            group=table[args.group] if args.group else None,
            cluster=table[args.cluster] if args.cluster else None,
            noise=table[args.noise] if args.noise else None,
            signed=objective.kind in ("asinh", "l2-raw"),
        )
        condition = check_separable(design)
    except UserError as error:
        raise UserError(f"{args.csv}: {error}") from None
    solution = solve(design, objective)
    entry, _ = describe(solution, args.bootstrap, args.seed)
    first = ("parameters", "objective", "certificate", "standard_errors", "intervals", "n_points")
    result: dict[str, Any] = {k: entry[k] for k in first} | entry
    result |= {
        "kind": "csv",
        "csv_sha256": file_sha256(args.csv),
        "columns": {**x, **y},
        "condition_number": condition_number(solution),
        "design_condition_number": condition,
        "warnings": entry["warnings"] + condition_warning(condition),
        "sensitivity": objective_rows(design, objective),
        "settings": {"bootstrap": args.bootstrap, "seed": args.seed},
    }
    text = to_json(clean(result))
    if args.json is None:
        print(text, end="")
        return 0
    write_text(args.json, text)
    print(summary_of_fit(clean(result)))
    print(args.json)
    return 0


def add_allocate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allocate`."""
    parser.add_argument("fit", type=Path, help="fit.json of a study (fit.nc beside it)")
    parser.add_argument("--molecule", required=True)
    parser.add_argument("--ansatz", required=True)
    parser.add_argument("--budget", required=True, type=float, metavar="FLOP")
    parser.add_argument("--metric", default="v_score", choices=["v_score", "abs_error"])
    parser.add_argument(
        "--flops",
        default="estimated",
        choices=["estimated", "executed"],
        help="which FLOPs the budget counts",
    )
    parser.add_argument("--n", type=int, help="spin-orbitals of a molecule outside the study")
    parser.add_argument(
        "--M", type=int, dest="unique_flips", help="distinct flip patterns of its Hamiltonian"
    )
    parser.add_argument("--S", type=int, dest="search_space", help="determinants of its sector")
    parser.add_argument(
        "--molecules", type=Path, default=Path("specs/molecules.toml"), help="table of molecules"
    )
    parser.add_argument("--batch", type=int, help="unique samples per step (default: as in the study)")
    parser.add_argument("--networks", action="store_true", help="modulus and phase networks apart")
    parser.add_argument(
        "--arms", type=float, metavar="F", help="register the test N*/F, N*, N* F before training it"
    )
    parser.add_argument("--json", action="store_true")


def run_allocate(args: argparse.Namespace) -> int:
    """Print the optimum of a budget, or why there is none."""
    from replicate.scaling.advise import advise, render_advice

    advice = advise(args)
    print(to_json(advice) if args.json else render_advice(advice), end="" if args.json else "\n")
    return 0


# ---- files ---------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """Full-precision JSON; NaN is refused."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write atomically: temporary file in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


#: Seven digits of a bootstrap draw are more than its percentiles have; the rest would not compress.
_PACKED = {"zlib": True, "complevel": 4, "significant_digits": 7, "quantize_mode": "BitGroom"}


def write_tree(path: Path, tree: Any) -> None:
    """A DataTree to NetCDF, atomically."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        encoding = {
            g: {v: _PACKED for v in ("draws",) if v in node.data_vars}
            for g, node in zip(tree.groups, tree.subtree, strict=True)
        }
        tree.to_netcdf(name, engine="netcdf4", encoding={g: e for g, e in encoding.items() if e})
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
