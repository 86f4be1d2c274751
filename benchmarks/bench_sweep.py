"""What a sweep costs beyond its training: planning, each point, collecting.

python -m benchmarks.bench_sweep        every number beside the limit that it must keep
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from replicate.engine.base import Handle, Options
from replicate.engine.local import LocalEngine
from replicate.engine.sweep import sweep
from replicate.engine.task import seconds_of
from replicate.run import run_point
from replicate.spec import Study, load_study
from replicate.store import Store

ROOT = Path(__file__).resolve().parents[1]
PLANNED, COLLECTED, SWEPT = 5040, 1008, 192  # points, multiples of the spec's 24 per seed and T
LIMITS = {"plan": 2.0, "collect": 10.0, "overhead": 0.050}  # s, s, s per point

SPEC = """\
study = "bench"
molecules_file = "{molecules}"
molecules = ["H2", "LiH"]
ansatze = ["made", "transformer", "retnet"]
sizes = ["a", "b", "c", "d"]
seeds = {seeds}

[train]
steps = {steps}
learning_rate = 1e-3

[phase]
width = 8

[ansatz.made]
sizes = {{ a = {{ width = 4 }}, b = {{ width = 8 }}, c = {{ width = 16 }}, d = {{ width = 32 }} }}

[ansatz.transformer]
heads = 2
layers = 1
ff = 8
sizes = {{ a = {{ d = 4 }}, b = {{ d = 8 }}, c = {{ d = 16 }}, d = {{ d = 32 }} }}

[ansatz.retnet]
heads = 2
layers = 1
ff = 8
sizes = {{ a = {{ d = 4 }}, b = {{ d = 8 }}, c = {{ d = 16 }}, d = {{ d = 32 }} }}
"""


def make_study(folder: Path, points: int, steps: list[int]) -> Study:
    """A study of so many points, 24 for each T and seed."""
    seeds = list(range(points // (24 * len(steps))))
    text = SPEC.format(molecules=ROOT / "specs" / "molecules.toml", seeds=seeds, steps=steps)
    path = folder / "bench.toml"
    path.write_text(text, encoding="utf-8")
    study = load_study(path)
    assert len(study.points) == points
    return study


# The peak is asked of the process itself: what `wait` says of a child includes its parent before `exec`.
COMMAND = """
import sys
from replicate.cli import main
from replicate.memory import peak_bytes
main(sys.argv[1:])
sys.stderr.write(str(peak_bytes() // 1024))
"""


def command(*arguments: object) -> tuple[float, float]:
    """(seconds, peak MB) of a command of the package in a process of its own, imports included."""
    before = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    return time.perf_counter() - before, int(done.stderr) / 1024


@contextlib.contextmanager
def filled(points: int) -> Iterator[tuple[Study, Path]]:
    """A study whose points are all stored: one of each molecule and T is trained, the others are copies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = make_study(folder, points, [200, 800])
        store = Store.of(study, folder)
        store.prepare()
        trained = {}
        for point in study.points:
            key = (point.molecule.name, point.steps)
            if key not in trained:
                trained[key] = run_point(point, store, cache=folder / ".molecules")
            data = trained[key]
            assert data is not None
            store.write_point(point.id, data.assign_attrs(point_id=point.id))
        yield study, folder


@cache
def plan_seconds() -> float:
    """`plan` of a study of which nothing has run."""
    with tempfile.TemporaryDirectory() as name:
        study = make_study(Path(name), PLANNED, [100, 200, 400, 800, 1600, 3200])
        return min(command("plan", study.path, "--artifacts", name)[0] for _ in range(3))


@cache
def collect_cost(points: int) -> tuple[float, float]:
    """(seconds, peak MB) of `collect`."""
    with filled(points) as (study, folder):
        return command("collect", study.path, "--artifacts", folder)


@cache
def sweep_cost() -> tuple[float, float, float]:
    """(seconds per point beyond training and evaluation, peak MB of the second point, and of the last).

    On the local engine with one worker, after its imports. A point is submitted when the one before has
    ended. From the second to the last: claims, wave function, sector, provenance, file, report.
    """
    with tempfile.TemporaryDirectory() as name:
        study = make_study(Path(name), SWEPT, [2])
        submitted: list[float] = []

        class Watched(LocalEngine):
            def submit(self, spec: str, point_id: str) -> Handle:
                submitted.append(time.perf_counter())
                return super().submit(spec, point_id)

        options = Options(workers=1, device="cpu", artifacts=Path(name))
        warm = [point for point in study.points if point.molecule.name == "H2"]
        warm.append(warm.pop(2))  # so that the second and the last are of one network
        outcome = sweep(study, warm, options, lambda say: Watched(options))
        assert len(outcome.done) == len(warm)
        store = Store.of(study, Path(name))
        stored = [store.read_point(point.id) for point in warm]
        training = sum(seconds_of(data) for data in stored[1:-1] if data is not None)
        second, last = (float(data["peak_memory_bytes"]) / 2**20 for data in (stored[1], stored[-1]) if data)
        return (submitted[-1] - submitted[1] - training) / (len(warm) - 2), second, last


class Sweep:
    """The three numbers for asv."""

    timeout = 600.0
    unit = "s"

    def track_plan_seconds(self) -> float:
        return plan_seconds()

    def track_collect_seconds(self) -> float:
        return collect_cost(COLLECTED)[0]

    def track_overhead_seconds(self) -> float:
        return sweep_cost()[0]


def main() -> int:
    """Print every number; 1 if one is beyond its limit."""
    few, (seconds, peak) = collect_cost(48)[1], collect_cost(COLLECTED)
    overhead, second, last = sweep_cost()
    found = {"plan": plan_seconds(), "collect": seconds, "overhead": overhead}
    texts = {
        "plan": f"plan of {PLANNED} points",
        "collect": f"collect of {COLLECTED} points (peak {peak:.0f} MB; of 48 points: {few:.0f} MB)",
        "overhead": "a point beyond its training, local engine, after imports (peak at the second: "
        f"{second:.0f} MB; at number {SWEPT // 2}: {last:.0f} MB)",
    }
    for name, text in texts.items():
        sys.stdout.write(f"{text}: {found[name]:.3f} s (limit {LIMITS[name]} s)\n")
    return int(any(found[name] > LIMITS[name] for name in LIMITS))


if __name__ == "__main__":
    sys.exit(main())
