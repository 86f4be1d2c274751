"""What a study will cost, before anything heavy is loaded: sizes, FLOPs, a rough time, what is done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from replicate import flops
from replicate.spec import Point, Study
from replicate.store import Store

# Rough speed of one thread, for planning only; measured speeds replace it as soon as points are done.
STEP_SECONDS = {"made": 2e-3, "transformer": 3e-3, "retnet": 4e-3}  # overhead of a step
ROW_SECONDS = 2e-6  # and of each determinant that is evaluated
FLOP_PER_SECOND = 4e10  # of the matrix products of a prefix tree
PREFIXES_PER_DETERMINANT = 0.65  # N2: 9 401 evaluated prefixes for 14 400 determinants
CONNECTED_SHARE = 0.1  # distinct connected determinants over batch * M: most elements vanish or coincide
LABELS = ("molecule", "ansatz", "size", "steps", "variant", "seed")  # of a point, in the order of the axes
MEASURED_POINTS = 100  # done points that are opened to learn the speed of this machine


@dataclass(frozen=True)
class Estimate:
    """Expected size and cost of one point; None where only a run can tell."""

    point: Point
    n_modulus: int | None
    n_phase: int | None
    flops: float | None
    seconds: float | None


def count_parameters(point: Point, n_qubits: int) -> tuple[int, int] | None:
    """(N_mod, N_ph) in closed form (SCIENCE section 1); None for an ansatz from outside."""
    try:
        n_modulus = flops.modulus_parameters(point.ansatz.kind, point.ansatz.params, n_qubits)
    except KeyError:
        return None
    return n_modulus, flops.phase_parameters(point.phase.width, point.phase.depth, n_qubits)


def estimated_parts(
    point: Point, n_qubits: int, n_unique_flips: int, samples: int, *, attention: bool = True
) -> dict[str, float]:
    """The study's FLOP estimate for `samples` unique samples (summed over steps), in named parts and "total".

    `attention=False`: from parameters alone. Raises KeyError for an ansatz from outside, which
    has no closed form.
    """
    per_sample = flops.estimate_sample(
        point.ansatz.kind,
        point.ansatz.params,
        point.phase.width,
        point.phase.depth,
        n_qubits=n_qubits,
        n_unique_flips=n_unique_flips,
        attention=attention,
    )
    return {name: float(samples * value) for name, value in per_sample.items()}


def estimate(point: Point, seconds_per_step: float | None = None) -> Estimate:
    """Closed forms at the largest batch that the point can reach, min(B_max, |S|)."""
    n, space, flips = point.molecule.n_spin_orbitals, point.molecule.search_space, point.molecule.unique_flips
    counts = None if n is None else count_parameters(point, n)
    if n is None or space is None or counts is None:
        seconds = None if seconds_per_step is None else point.steps * seconds_per_step
        return Estimate(point, None, None, None, seconds)
    batch = min(point.sampling.batch_max, space)
    total = None
    if flips is not None:
        total = estimated_parts(point, n, flips, point.steps * batch)["total"]
    if seconds_per_step is None:
        reached = space if flips is None else round(CONNECTED_SHARE * batch * flips)
        connected = space if batch == space else min(space, reached)
        weights = PREFIXES_PER_DETERMINANT * counts[0] + counts[1]
        local_energy = 2.0 * weights * (connected if batch < space else 0)
        # Forward and backward; one pass serves the local energies too where batch = space.
        work = local_energy + 6.0 * weights * batch
        if point.local_energy == "paper" and total is not None:
            work = total / point.steps  # nothing is reused: what the estimate counts is what runs
        overhead = STEP_SECONDS.get(point.ansatz.kind, 5e-3) + ROW_SECONDS * connected
        seconds_per_step = overhead + work / FLOP_PER_SECOND
    return Estimate(point, *counts, total, point.steps * seconds_per_step)


def cell(point: Point) -> tuple[str, str, str, str]:
    """Points of one cell take the same time per step."""
    return point.molecule.name, point.ansatz.name, point.size, point.variant


def measured_speeds(points: Iterable[Point], store: Store) -> dict[tuple[str, str, str, str], float]:
    """Seconds per step of (molecule, ansatz, size, variant) from stored points, longest run first."""
    import netCDF4

    speeds: dict[tuple[str, str, str, str], float] = {}
    opened = 0
    for point in sorted(points, key=lambda p: -p.steps):
        path = store.point_path(point.id)
        if cell(point) in speeds or opened >= MEASURED_POINTS or not path.exists():
            continue
        opened += 1
        try:
            with netCDF4.Dataset(path) as data:
                speeds[cell(point)] = float(data["wall_seconds"][...]) / point.steps
        except (OSError, IndexError, RuntimeError):  # `run` and `collect` deal with unreadable files
            continue
    return speeds


def estimates(study: Study, store: Store) -> list[Estimate]:
    """One estimate per point, in the order of the study."""
    speeds = measured_speeds(study.points, store) if store.points.is_dir() else {}
    return [estimate(point, speeds.get(cell(point))) for point in study.points]


def longest_first(points: Iterable[Point], known: Iterable[Estimate]) -> list[Point]:
    """Points by expected time, longest first: the last worker to end then ends early."""
    seconds = {e.point.id: e.seconds or 0.0 for e in known}
    return sorted(points, key=lambda point: -seconds[point.id])


def plan_record(study: Study, store: Store) -> dict[str, Any]:
    """The JSON of `plan --json`."""
    rows: list[dict[str, Any]] = []
    states = store.statuses(point.id for point in study.points)
    for item, status in zip(estimates(study, store), states, strict=True):
        point = item.point
        total = None if item.n_modulus is None or item.n_phase is None else item.n_modulus + item.n_phase
        rows.append(
            {
                "id": point.id,
                "molecule": point.molecule.name,
                "ansatz": point.ansatz.name,
                "size": point.size,
                "steps": point.steps,
                "variant": point.variant,
                "seed": point.seed,
                "n_modulus": item.n_modulus,
                "n_phase": item.n_phase,
                "n_total": total,
                "flops_estimated": item.flops,
                "seconds_estimated": item.seconds,
                "state": status.state,
                "held_out": study.is_holdout(point),
            }
        )
    left = [row for row in rows if row["state"] != "done"]
    return {
        "study": study.name,
        "spec": study.path,
        "n_points": len(rows),
        "n_left": len(left),
        "flops_estimated": sum(row["flops_estimated"] or 0.0 for row in rows),
        "seconds_estimated_left": sum(row["seconds_estimated"] or 0.0 for row in left),
        "points": rows,
    }


def flops_record(points: Iterable[Point], store: Store) -> list[dict[str, Any]]:
    """The JSON of `flops --json`: per point the estimate in parts, executed FLOPs, their ratio and speed.

    All of the whole run. `samples`: unique ones, summed over steps; the estimate is from their recorded
    counts once a point has run, else at the largest batch; what only a run can tell is None until then.
    `step_seconds`: wall time of the steps, without what is made once before them. `attention`: what attention
    or retention takes of the estimate. Points of which nothing is known (an ansatz without closed form, an
    unknown M) are left out until they have run.
    """
    rows: list[dict[str, Any]] = []
    for point in points:
        data = store.read_point(point.id)
        if data is not None:
            molecule = json.loads(data.attrs["molecule"])
            n, flips = molecule["n_spin_orbitals"], molecule["n_unique_flips"]
            samples = int(data["n_unique"].sum())
        elif point.molecule.search_space is not None:
            n, flips = point.molecule.n_spin_orbitals, point.molecule.unique_flips
            samples = point.steps * min(point.sampling.batch_max, point.molecule.search_space)
        else:
            continue
        labels = dict(zip(LABELS, point.labels().values(), strict=True))
        row: dict[str, Any] = {"id": point.id, **labels, "samples": samples, "parts": None, "attention": None}
        if n is not None and flips is not None and count_parameters(point, n) is not None:
            row["parts"] = estimated_parts(point, n, flips, samples)
            rest = estimated_parts(point, n, flips, samples, attention=False)
            row["attention"] = row["parts"]["total"] - rest["total"]
        elif data is None:
            continue
        executed = seconds = None
        if data is not None:
            row["executed_parts"] = json.loads(data.attrs.get("flops_executed_parts", "{}"))
            row["wall_parts"] = json.loads(data.attrs.get("wall_parts", "{}"))
            executed = float(data["flops_executed"])
            seconds = sum(row["wall_parts"].values()) or float(data["wall_seconds"])
        row["flops_executed"], row["step_seconds"] = executed, seconds
        row["ratio"] = row["parts"]["total"] / executed if executed and row["parts"] else None
        row["flop_per_second"] = executed / seconds if executed and seconds else None
        rows.append(row)
    return rows


def flops_table(
    record: Iterable[dict[str, Any]], *, brief: bool = False
) -> tuple[list[str], list[list[str | float | None]]]:
    """`flops_record` as a table: FLOPs estimated and executed, seconds measured; in total, then by part.

    `brief`: instead of the parts the three shares of the estimate in percent, for a screen's width.
    """
    rows = list(record)

    def names(family: str) -> list[str]:
        found = dict.fromkeys(name for row in rows for name in row.get(family) or {})
        return [name for name in found if name != "total"]

    families = {"estimated": "parts", "executed": "executed_parts", "seconds": "wall_parts"}
    columns = [(label, family, name) for label, family in families.items() for name in names(family)]
    totals = ("estimated", "attention", "executed", "estimated/executed", "seconds", "FLOP/s")
    shares = {"sampling": ("sampling",), "local energy": ("local",), "gradient": ("forward", "backward")}
    table: list[list[str | float | None]] = []
    for row in rows:
        estimated = row["parts"]["total"] if row["parts"] else None
        kept = ("flops_executed", "ratio", "step_seconds", "flop_per_second")
        line: list[str | float | None] = [str(row[name]) for name in ("id", *LABELS, "samples")]
        line += [estimated, row["attention"], *(row[name] for name in kept)]
        if not brief:
            line += [(row.get(family) or {}).get(name) for _, family, name in columns]
        for beginnings in shares.values() if brief else ():
            part = sum(value for name, value in (row["parts"] or {}).items() if name.startswith(beginnings))
            line.append(None if estimated is None else f"{100 * part / estimated:.2f}")
        table.append(line)
    last = [f"{name} %" for name in shares] if brief else [f"{label} {name}" for label, _, name in columns]
    return ["id", *LABELS, "samples", *totals, *last], table
