"""`python -m replicate ...`: every command, its arguments, its exit status (0 done, 1 failed, 2 bad input).

Only the standard library, spec and store are imported here; what is heavy is imported inside the commands.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import replicate.scaling.commands as scaling
from replicate import __version__
from replicate.engine.base import Options
from replicate.engine.log import duration
from replicate.provenance import available_cores
from replicate.spec import MoleculeSpec, Point, Study, UserError, load_study, molecule_from_file
from replicate.store import Store, StoreError

if TYPE_CHECKING:
    from replicate.engine.sweep import Start

DONE, FAILED, BAD_INPUT = 0, 1, 2
ENGINES = ("local", "dask", "slurm")


def _say(line: str = "") -> None:
    print(line)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _json(record: Any) -> None:
    print(json.dumps(record, indent=1, allow_nan=False))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns aligned for reading; numbers are right-aligned by the caller's formatting."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        _say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _number(value: float | None, form: str = ".2e") -> str:
    return "-" if value is None else format(value, form)


def _open(arguments: argparse.Namespace) -> tuple[Study, Store]:
    study = load_study(arguments.spec)
    return study, Store.of(study, arguments.artifacts, warn=_warn)


def _only(study: Study, ids: Sequence[str] | None) -> list[Point]:
    """The chosen points; a UserError names ids that the study does not have."""
    if not ids:
        return list(study.points)
    unknown = [i for i in ids if i not in study.by_id]
    if unknown:
        raise UserError(*(f"{study.path}: no point {i}; `plan` lists the ids" for i in unknown))
    return [study.by_id[i] for i in dict.fromkeys(ids)]


# -- commands ----------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace) -> int:
    """List every point."""
    from replicate.plan import plan_record

    study, store = _open(arguments)
    record = plan_record(study, store)
    if arguments.json:
        _json(record)
        return DONE
    rows = [
        (
            row["id"],
            row["molecule"],
            row["ansatz"],
            row["size"],
            str(row["steps"]),
            row["variant"],
            str(row["seed"]),
            _number(row["n_modulus"], "d"),
            _number(row["n_phase"], "d"),
            _number(row["n_total"], "d"),
            _number(row["flops_estimated"]),
            duration(row["seconds_estimated"]),
            row["state"] + (" (held out)" if row["held_out"] else ""),
        )
        for row in record["points"]
    ]
    header = "id molecule ansatz size steps variant seed N_mod N_ph N FLOP time state".split()
    _table(header, rows)
    _say()
    unknown = sum(row["flops_estimated"] is None for row in record["points"])
    total = f"{'' if not unknown else 'at least '}{_number(record['flops_estimated'])} FLOP in all (no reuse)"
    if unknown == record["n_points"]:
        total = "FLOP unknown until M is (`unique_flips` of a molecule)"
    _say(
        f"{study.name}: {record['n_points']} points, {record['n_left']} to run; estimated {total}, about "
        f"{duration(record['seconds_estimated_left'])} of one core left"
    )
    return DONE


def run(arguments: argparse.Namespace) -> int:
    """Train what is not done."""
    study, store = _open(arguments)
    points = _only(study, arguments.only)
    from replicate.engine.ranks import launched, sweep_on_ranks
    from replicate.engine.sweep import Outcome, sweep
    from replicate.plan import estimates, longest_first

    options = _options(arguments)
    _check_molecules(points)
    known = estimates(study, store)
    expected = {estimate.point.id: estimate.seconds for estimate in known}
    ordered = longest_first(points, known)
    outcome: Outcome | None
    if launched():
        if arguments.workers or arguments.engine != "local":
            raise UserError("--workers, --engine: not under torchrun, whose ranks share one point at a time")
        outcome = sweep_on_ranks(study, ordered, options, expected)
        if outcome is None:  # the first rank tells
            return DONE
    else:
        outcome = sweep(study, ordered, options, _engine(arguments, options, store), expected)
    if outcome.fatal:
        _warn(outcome.fatal)
        return FAILED
    _say(
        f"{study.name}: {len(outcome.done)} trained, {len(outcome.skipped)} were done, "
        f"{len(outcome.failed)} failed"
    )
    for point_id, reason in outcome.failed.items():
        _warn(f"failed: {point_id} {study.by_id[point_id]}: {reason}")
    if any(store.error_path(point_id).exists() for point_id in outcome.failed):
        _warn(f"traces: {store.points}/<id>.error.json; run again with --retry-failed to try them anew")
    if outcome.interrupted:
        _warn("stopped before the end; the same command goes on from the checkpoints")
    return FAILED if outcome.failed or outcome.interrupted else DONE


def _options(arguments: argparse.Namespace) -> Options:
    """How many points at a time and how; a UserError where this machine would be asked for too much."""
    given = (
        (arguments.address, "--address", "dask"),
        (arguments.resources, "--resources", "dask"),
        (arguments.slurm, "--slurm", "slurm"),
        (arguments.points_per_job, "--points-per-job", "slurm"),
    )
    wrong = [
        f"{name}: only with --engine {engine}"
        for value, name, engine in given
        if value and arguments.engine != engine
    ]
    if wrong:
        raise UserError(*wrong)
    here = arguments.engine != "slurm" and not arguments.address
    cores, threads = available_cores(), arguments.threads
    gpu = arguments.device == "cuda" or (arguments.device == "auto" and Path("/dev/nvidiactl").exists())
    workers = (
        arguments.workers or (1 if gpu else max(1, cores // threads)) if here else arguments.workers or 256
    )
    if here and workers * threads > cores:
        raise UserError(
            f"--workers {workers} --threads {threads}: more than this machine's {cores} cores; "
            "lower one of them"
        )
    return Options(
        workers=workers,
        threads=threads,
        device=arguments.device,
        artifacts=arguments.artifacts,
        retry_failed=arguments.retry_failed,
    )


def _engine(arguments: argparse.Namespace, options: Options, store: Store) -> Start:
    """What starts the chosen engine once there is something to run."""
    if arguments.engine == "dask":
        from replicate.engine.dask import DaskEngine, resources_of

        resources = resources_of(arguments.resources or [])
        return lambda say: DaskEngine(options, store, say, address=arguments.address, resources=resources)
    if arguments.engine == "slurm":
        from replicate.engine.slurm import SlurmEngine, parameters_of

        parameters, per_job = parameters_of(arguments.slurm or []), arguments.points_per_job or 1
        return lambda say: SlurmEngine(options, store, say, parameters=parameters, per_job=per_job)
    from replicate.engine.local import LocalEngine

    return lambda say: LocalEngine(options)


def _check_molecules(points: Sequence[Point]) -> None:
    """What a spec alone cannot know of a molecule: every problem at once, before anything is written."""
    from replicate.scf import check_basis

    problems: list[str] = []
    for molecule in {point.molecule.name: point.molecule for point in points}.values():
        try:
            check_basis(molecule)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def status(arguments: argparse.Namespace) -> int:
    """Say what the files say."""
    study, store = _open(arguments)
    rows = []
    for point, state in zip(study.points, store.statuses(p.id for p in study.points), strict=True):
        rows.append({"id": point.id, "point": str(point), "state": state.state, "reason": state.reason})
    counts = {
        state: sum(r["state"] == state for r in rows) for state in ("done", "running", "failed", "missing")
    }
    if arguments.json:
        _json({"study": study.name, "spec": study.path, "counts": counts, "points": rows})
        return DONE
    shown = [r for r in rows if r["state"] != "done"] if not arguments.all else rows
    if shown:
        _table(
            ("id", "point", "state", "reason"),
            [(r["id"], r["point"], r["state"], r["reason"]) for r in shown],
        )
        _say()
    _say(f"{study.name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return DONE


def collect(arguments: argparse.Namespace) -> int:
    """Make the cube."""
    study, store = _open(arguments)
    if not store.points.is_dir():
        raise UserError(f"{store.points}: no such folder; run the study first: `run {study.path}`")
    from replicate import cube

    tree = cube.collect(study, store)
    path = store.root / "cube.nc"
    cube.write_cube(tree, path)
    final = tree["final"].to_dataset()
    codes = final["status"].values[final["planned"].values == 1]
    names = ("missing", "done", "failed", "invalid")
    counts = ", ".join(f"{int((codes == code).sum())} {name}" for code, name in enumerate(names))
    _say(f"{path}: {len(study.points)} points: {counts}")
    return DONE


def molecule(arguments: argparse.Namespace) -> int:
    """Describe a molecule."""
    spec = _molecule_spec(arguments)
    from replicate.molecule import load_molecule
    from replicate.run import molecule_record

    record = {
        "name": spec.name,
        **molecule_record(load_molecule(spec, cache=arguments.artifacts / ".molecules")),
    }
    if arguments.json:
        _json(record)
        return DONE
    for name, value in record.items():
        _say(f"{name:20s} {'-' if value is None else f'{value:.10f}' if isinstance(value, float) else value}")
    return DONE


def _molecule_spec(arguments: argparse.Namespace) -> MoleculeSpec:
    name = arguments.name
    charge, multiplicity, basis = arguments.charge, arguments.multiplicity, arguments.basis
    if Path(name).suffix.lower() in (".xyz", ".fcidump") or Path(name).is_file():
        return molecule_from_file(name, charge=charge, multiplicity=multiplicity, basis=basis)
    from replicate.spec import molecule_by_name, shared_table

    table = arguments.molecules or shared_table(Path("specs"))
    changes = {"charge": charge, "multiplicity": multiplicity, "basis": basis}
    return molecule_by_name(name, table, {k: v for k, v in changes.items() if v is not None})


def flops(arguments: argparse.Namespace) -> int:
    """Estimated FLOPs in parts beside what ran."""
    study, store = _open(arguments)
    points = _only(study, arguments.only)
    from replicate.plan import flops_record, flops_table

    record = flops_record(points, store)
    if arguments.json:
        _json(record)
        return DONE
    if not record:
        _say("no point has a closed-form estimate")
        return DONE
    header, rows = flops_table(record, brief=arguments.format == "text")
    if arguments.format == "csv":  # for machines: every digit
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return DONE
    cells = [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in rows]
    if arguments.format == "markdown":
        words = header.index("samples")  # labels; numbers follow
        for line in (header, [*["---"] * words, *["---:"] * (len(header) - words)], *cells):
            _say("| " + " | ".join(line) + " |")
        return DONE
    _table(header, cells)
    _say()
    _say(
        f"{study.name}: unique samples, FLOP and seconds of whole runs (samples at the largest batch where a "
        "point has not run); estimated, and its shares: nothing reused, M passes per sample"
    )
    return DONE


def verify(arguments: argparse.Namespace) -> int:
    """Re-run stored points and compare."""
    study, store = _open(arguments)
    points = _only(study, arguments.only)
    from replicate import verify as module

    chosen = module.choose(points, store, arguments.sample, arguments.seed)
    if not chosen:
        raise UserError(f"{store.points}: no stored point to verify; run the study first")
    device = "cpu" if arguments.device == "auto" else arguments.device
    verdicts = module.verify(chosen, store, arguments.artifacts / ".molecules", device)
    if arguments.json:
        _json([verdict.record() for verdict in verdicts])
    else:
        for v in verdicts:
            place = "same machine and versions" if v.same_place else "another machine or versions"
            detail = f"; differs: {', '.join(v.differs)}" if v.differs else ""
            energies = f"E {v.energy_stored:.10f} -> {v.energy_now:.10f}"
            _say(f"{v.id} {v.point}: {v.outcome} ({place}), {energies}{detail}")
        agree = sum(v.outcome != "different" for v in verdicts)
        _say(f"{study.name}: {agree} of {len(verdicts)} points verified")
    return DONE if all(v.outcome != "different" for v in verdicts) else FAILED


def bench(arguments: argparse.Namespace) -> int:
    """The regression gate of the benchmarks, which live beside the package in a checkout."""
    try:
        from benchmarks import gate
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise UserError("bench gate: there are no benchmarks here; run it in a checkout") from None
    return gate.main(arguments.rest)


# -- arguments ---------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(
        prog="python -m replicate",
        description="Scaling laws of neural quantum states: from a spec to points, a cube, a fit.",
        epilog="Exit status: 0 done, 1 failed, 2 bad input. Figures: python -m figures CUBE.",
    )
    top.add_argument("--version", action="version", version=f"nqs-scaling {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        return made

    def spec_command(
        name: str, function: Callable[[argparse.Namespace], int], text: str, *, as_json: bool
    ) -> argparse.ArgumentParser:
        made = command(name, function, text)
        made.add_argument("spec", metavar="SPEC", help="study file, for example specs/laptop.toml")
        _artifacts(made)
        if as_json:
            made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return made

    spec_command(
        "plan", plan, "list every point with sizes, estimated FLOPs and time, and what is done", as_json=True
    )

    made = spec_command("run", run, "train every point that is not done; resumable", as_json=False)
    made.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="where points run: processes here, a Dask cluster, Slurm jobs (default: local)",
    )
    made.add_argument(
        "--workers",
        type=_positive,
        help="points at a time (default: cores / threads, 1 on a GPU); slurm: jobs at a time (default: 256)",
    )
    made.add_argument(
        "--threads", type=_positive, default=1, help="threads per point (default: 1; can change bits)"
    )
    made.add_argument(
        "--address",
        metavar="tcp://HOST:PORT",
        help="dask: scheduler of an existing cluster (default: a cluster of --workers processes here)",
    )
    made.add_argument(
        "--resources",
        nargs="+",
        metavar="NAME=AMOUNT",
        help="dask: what a point takes of a worker's declared resources, for example GPU=1",
    )
    made.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="slurm: sbatch options, for example partition=gpu timeout_min=240 gpus_per_node=1",
    )
    made.add_argument(
        "--points-per-job",
        type=_positive,
        metavar="K",
        help="slurm: points that a job runs in turn (default: 1)",
    )
    _device(made)
    _only_argument(made)
    made.add_argument("--retry-failed", action="store_true", help="run failed points again")

    made = spec_command(
        "status", status, "done, running, failed and missing points, with reasons", as_json=True
    )
    made.add_argument("--all", action="store_true", help="also list the points that are done")

    spec_command("collect", collect, "gather the points into artifacts/<study>/cube.nc", as_json=False)

    made = command("fit", scaling.run_fit, "fit scaling laws to a cube, or to any table (--csv)")
    scaling.add_fit_arguments(made)
    made = command("allocate", scaling.run_allocate, "compute-optimal size and steps for a FLOP budget")
    scaling.add_allocate_arguments(made)

    made = command("molecule", molecule, "size, Hamiltonian and reference energies of a molecule")
    made.add_argument("name", metavar="NAME|FILE", help="name in the molecule table, .xyz file or FCIDUMP")
    made.add_argument("--charge", type=int, help="total charge (default: 0, or the table's)")
    made.add_argument("--multiplicity", type=_positive, help="2 S + 1 (default: 1, or the table's)")
    made.add_argument("--basis", help="basis set (default: sto-3g, or the table's)")
    made.add_argument(
        "--molecules",
        type=Path,
        metavar="FILE",
        help="molecule table (default: specs/molecules.toml, else the one that comes with the package)",
    )
    made.add_argument("--json", action="store_true", help="print JSON; keys are the cube's /molecule names")
    _artifacts(made)

    made = spec_command(
        "flops", flops, "estimated FLOPs in parts beside executed counts and times", as_json=True
    )
    made.add_argument(
        "--format",
        choices=("text", "markdown", "csv"),
        default="text",
        help="markdown and csv have FLOPs and seconds by part of a step (default: text)",
    )
    _only_argument(made)

    made = command("bench", bench, "regression gates on counts and times (exit 3: regression, 4: broken)")
    made.add_argument("gate", choices=["gate"], help="`bench gate --help` lists its arguments")
    made.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    made = spec_command("verify", verify, "re-run stored points and compare them", as_json=True)
    made.add_argument("--sample", type=_positive, default=3, metavar="K", help="how many points (default: 3)")
    made.add_argument("--seed", type=int, default=0, help="which points (default: 0)")
    _device(made)
    _only_argument(made)
    return top


def _artifacts(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--artifacts",
        type=Path,
        default=Path("artifacts"),
        metavar="DIR",
        help="results folder (default: artifacts)",
    )


def _device(made: argparse.ArgumentParser) -> None:
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _only_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument("--only", nargs="+", metavar="ID", help="only these points")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        function: Callable[[argparse.Namespace], int] = arguments.function
        return function(arguments)
    except UserError as error:
        for problem in error.problems:
            _warn(problem)
        return BAD_INPUT
    except StoreError as error:
        _warn(str(error))
        return FAILED
    except BrokenPipeError:  # the reader of a table has seen enough
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        _warn("interrupted")
        return FAILED
