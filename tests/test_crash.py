"""kill -9 at random moments of a whole sweep and of its collection: nothing lost, nothing trained twice.

CI runs the short version; the long one, which says what its kills hit, is
`REPLICATE_KILLS=100 python -m pytest -s -m processes tests/test_crash.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from replicate.spec import load_study
from replicate.store import Store

pytestmark = pytest.mark.processes

WriteSpec = Callable[..., Path]
ROOT = Path(__file__).parent.parent
TIMINGS = ("wall_seconds", "evaluation_seconds", "peak_memory_bytes")
KILLS = int(os.environ.get("REPLICATE_KILLS", "4"))

CHANGES = [
    ('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'),
    ('ansatze = ["made"]', 'ansatze = ["made", "transformer", "retnet"]'),
    ("steps = [3]", "steps = [40, 160]"),
    ("[phase]\n", "[checkpoint]\nsteps = 5\nseconds = 0.0\n\n[phase]\n"),
]


def replicate(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "replicate", *map(str, arguments)]


def finish(path: Path, artifacts: Path) -> None:
    """Run and collect without disturbance."""
    for command in (["run", path, "--workers", 1], ["collect", path]):
        done = subprocess.run(
            replicate(*command, "--artifacts", artifacts),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every array of a cube but the timings."""
    found = {}
    with xr.open_datatree(path, engine="netcdf4") as tree:
        for group in ("final", "history", "molecule"):
            data = tree[group].to_dataset().load()
            found |= {f"{group}/{n}": v.values for n, v in data.variables.items() if n not in TIMINGS}
    return found


# What is struck, in turns: most of all what writes.
TARGETS = (".ckpt.", "work", ".nc.", ".cube.nc.", ".ckpt.", "work", ".nc.", "start")


def strike(process: subprocess.Popen[bytes], store: Store, random: np.random.Generator, what: str) -> None:
    """Return at a random moment of the life of a sweep or a collection: by what it does, not by the clock.

    `what`: start (imports, claims), work (after some checkpoints and points), or part of the name of a file
    that is being written.
    """
    changes, seen = int(random.integers(1, 60)), set[tuple[str, int]]()
    if what == "start":
        time.sleep(random.uniform(0.0, 4.0))
        return
    while process.poll() is None:
        for folder in (store.points, store.root):
            with os.scandir(folder) as scan:
                files = list(scan)
            for file in files:
                if what in file.name and file.name.endswith(".tmp"):
                    time.sleep(random.uniform(0.0, 0.01))
                    return
                with contextlib.suppress(FileNotFoundError):
                    seen.add((file.name, file.stat().st_mtime_ns))
        if what == "work" and len(seen) > changes:
            return
        time.sleep(0.0005)


def test_killed_sweep_ends_in_the_same_cube(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(*CHANGES)
    study = load_study(path)
    finish(path, tmp_path / "calm")

    artifacts = tmp_path / "stormy"
    store = Store.of(study, artifacts)
    store.points.mkdir(parents=True)
    random = np.random.default_rng(0)
    finished: dict[str, int] = {}  # point -> time of its file: a second training would change it
    counts: Counter[str] = Counter(kills=0)
    while counts["kills"] < KILLS:
        what = TARGETS[counts["kills"] % len(TARGETS)]
        command = ["collect", path] if what == ".cube.nc." else ["run", path, "--workers", 1]
        process = subprocess.Popen(
            replicate(*command, "--artifacts", artifacts),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        strike(process, store, random, what)
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts["kills"] += alive
        counts["kills of a collection"] += alive and what == ".cube.nc."
        for written, halves in {
            "a checkpoint": list(store.points.glob(".*.ckpt.*.tmp")),
            "a point": list(store.points.glob(".*.nc.*.tmp")),
            "a cube": list(store.root.glob(".*.tmp")),
        }.items():
            counts[f"in the act of writing {written}"] += bool(halves)
            for half in halves:  # so that the next one is a new one; a sweep takes them away after an hour
                half.unlink()
        for file in store.points.glob("*.nc"):
            stamp = file.stat().st_mtime_ns
            assert finished.setdefault(file.stem, stamp) == stamp, f"{file.name} was written twice"
        for point_id in finished:
            assert store.read_point(point_id) is not None, f"{point_id} is lost or unreadable"
        if len(finished) == len(study.points):  # all done early: start the storm again
            counts["whole sweeps"] += 1
            for file in store.points.iterdir():
                file.unlink()
            finished.clear()
    finish(path, artifacts)
    for point_id, stamp in finished.items():
        assert store.point_path(point_id).stat().st_mtime_ns == stamp, f"{point_id} was written twice"
    assert not list(store.points.glob("*.corrupt*"))
    calm, stormy = numbers(tmp_path / "calm/tiny/cube.nc"), numbers(artifacts / "tiny/cube.nc")
    assert calm.keys() == stormy.keys()
    for name, values in calm.items():
        np.testing.assert_array_equal(values, stormy[name], err_msg=name)
    sys.stdout.write(f"kill -9: {dict(sorted(counts.items()))}\n")  # shown by `pytest -s`
