"""kill -9 at random moments of a whole sweep and of its collection: nothing lost, nothing trained twice.

The short version runs with the suite; `REPLICATE_KILLS=100 make test-slow` is the long one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from replicate.spec import load_study
from replicate.store import Store

WriteSpec = Callable[..., Path]
ROOT = Path(__file__).parent.parent
TIMINGS = ("wall_seconds", "evaluation_seconds", "peak_memory_bytes")
KILLS = int(os.environ.get("REPLICATE_KILLS", "8"))

CHANGES = [
    ('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'),
    ('ansatze = ["made"]', 'ansatze = ["made", "transformer", "retnet"]'),
    ("steps = [3]", "steps = [150, 600]"),
    ("[phase]\n", "[checkpoint]\nsteps = 20\nseconds = 0.0\n\n[phase]\n"),
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


@pytest.mark.slow
def test_killed_sweep_ends_in_the_same_cube(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(*CHANGES)
    study = load_study(path)
    finish(path, tmp_path / "calm")

    artifacts = tmp_path / "stormy"
    store = Store.of(study, artifacts)
    random = np.random.default_rng(0)
    finished: dict[str, int] = {}  # point -> inode and time of its file: a second training would change it
    kills = 0
    while kills < KILLS:
        command = ["collect", path] if kills % 8 == 7 else ["run", path, "--workers", 1]
        process = subprocess.Popen(
            replicate(*command, "--artifacts", artifacts),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        time.sleep(random.uniform(1.0, 7.0))  # some of it in start-up, most of it in training and writing
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        for file in store.points.glob("*.nc"):
            stamp = file.stat().st_mtime_ns
            assert finished.setdefault(file.stem, stamp) == stamp, f"{file.name} was written twice"
        for point_id in [*finished]:
            assert store.read_point(point_id) is not None, f"{point_id} is unreadable"
        if len(finished) == len(study.points):  # all done early: start the storm again
            for file in store.points.iterdir():
                file.unlink()
            finished.clear()
    finish(path, artifacts)
    assert not list(store.points.glob("*.corrupt*"))
    calm, stormy = numbers(tmp_path / "calm/tiny/cube.nc"), numbers(artifacts / "tiny/cube.nc")
    assert calm.keys() == stormy.keys()
    for name, values in calm.items():
        np.testing.assert_array_equal(values, stormy[name], err_msg=name)
