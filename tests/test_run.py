"""Running points and sweeps: the same bits whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from replicate import run as run_module
from replicate.engine.base import Options
from replicate.engine.sweep import sweep
from replicate.flops import estimate_sample
from replicate.run import format_uncertain, record_grid, run_point
from replicate.spec import CheckpointSpec, Point, load_study
from replicate.store import Store
from replicate.trainer import Evaluation, train
from replicate.verify import NOT_COMPARED

WriteSpec = Callable[..., Path]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules, computed once per session."""
    return tmp_path_factory.mktemp("molecules")


def one_point(write_spec: WriteSpec, *changes: tuple[str, str]) -> Point:
    (point,) = load_study(write_spec(*changes)).points
    return point


def assert_same_bits(a: xr.Dataset, b: xr.Dataset) -> None:
    a, b = a.drop_vars(NOT_COMPARED), b.drop_vars(NOT_COMPARED)
    assert set(a.variables) == set(b.variables)
    for name in a.variables:
        np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=str(name))


# -- one point ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 12_345])
def test_record_grid_is_log_spaced_with_both_ends(steps: int) -> None:
    grid = record_grid(steps)
    assert grid[0] == 1
    assert grid[-1] == steps
    assert (np.diff(grid) > 0).all()
    assert (grid[1:] <= 10 ** (1 / 24) * grid[:-1] + 1.1).all()  # 24 per decade, both ends rounded
    assert len(grid) <= 24 * math.log10(steps) + 2


def test_point_holds_what_the_trainer_yielded(write_spec: WriteSpec, tmp_path: Path, cache: Path) -> None:
    point = one_point(write_spec, ("steps = [3]", "steps = [40]"))
    store = Store(tmp_path)
    store.prepare()
    data = run_point(point, store, cache=cache)
    assert data is not None
    training = train(point, run_module.get_molecule(point, cache))
    records = list(training)
    evaluation = training.evaluate()

    assert float(data["energy"]) == evaluation.energy
    assert float(data["variance"]) == evaluation.variance
    np.testing.assert_array_equal(data["n_unique"].values, [r.n_unique for r in records])
    kept = [records[i - 1] for i in record_grid(40)]
    for name in ("step", "energy", "variance", "n_unique", "n_samples", "learning_rate", "grad_norm"):
        np.testing.assert_array_equal(
            data[f"history_{name}"].values, [getattr(r, name) for r in kept], err_msg=name
        )
    assert float(data["n_unique_mean"]) == np.mean([r.n_unique for r in records])
    assert float(data["n_samples_total"]) == sum(r.n_samples for r in records)
    assert float(data["flops_executed"]) == sum(r.flops_executed for r in records)
    molecule = json.loads(data.attrs["molecule"])
    per_sample = estimate_sample(
        "made",
        point.ansatz.params,
        point.phase.width,
        point.phase.depth,
        n_qubits=4,
        n_unique_flips=molecule["n_unique_flips"],
    )
    assert float(data["flops_estimated"]) == per_sample["total"] * sum(r.n_unique for r in records)
    assert (int(data["n_modulus"]), int(data["n_phase"])) == (training.n_modulus, training.n_phase)
    assert molecule["e_fci"] - 1e-9 <= float(data["energy"]) <= molecule["e_hf"] + 2.0
    assert all({"units", "long_name"} <= set(data[name].attrs) for name in data.data_vars)


@pytest.mark.parametrize("kind", ["made", "transformer", "retnet"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "decay", "cooldown"])
def test_interrupted_point_ends_with_the_same_bits(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, kind: str, schedule: str
) -> None:
    """A stop and a restart after every single step, against one run without any."""
    point = one_point(
        write_spec,
        ('ansatze = ["made"]', f'ansatze = ["{kind}"]'),
        ("steps = [3]", f'steps = [9]\nschedule = "{schedule}"\nwarmup_fraction = 0.2'),
    )
    whole = run_point(point, Store(tmp_path / "whole"), cache=cache) if prepare(tmp_path / "whole") else None
    store = Store(tmp_path / "parts")
    store.prepare()
    parts, stops = None, 0
    while parts is None:
        parts = run_point(point, store, cache=cache, stop=lambda: True)
        stops += parts is None
    assert whole is not None
    assert stops == 9  # the last one between training and evaluation
    assert int(parts.attrs["resumed"]) == 9
    assert_same_bits(whole, parts)
    assert parts.attrs["flops_executed_parts"] == whole.attrs["flops_executed_parts"]
    assert not store.checkpoint_path(point.id).exists()


def prepare(root: Path) -> bool:
    Store(root).prepare()
    return True


def test_checkpoints_are_written_at_their_interval(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = one_point(write_spec, ("steps = [3]", "steps = [10]"))
    store = Store(tmp_path)
    store.prepare()
    steps: list[int] = []
    monkeypatch.setattr(store, "write_checkpoint", lambda point_id, saved: steps.append(saved.step))
    run_point(point, store, cache=cache, checkpoint=CheckpointSpec(seconds=0.0, steps=4))
    assert steps == [4, 8]  # of 10


def test_failing_trainer_leaves_no_point(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = one_point(write_spec)

    def broken(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("step 1: energy nan")

    monkeypatch.setattr(run_module, "train", broken)
    store = Store(tmp_path)
    store.prepare()
    with pytest.raises(FloatingPointError):
        run_point(point, store, cache=cache)
    assert list(store.points.iterdir()) == []


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        (Evaluation(-1.0, 0.0, 0.1, 4, 0, exact=True), ""),
        (Evaluation(-1.0, 0.1, 0.1, 30, 100, exact=False), ""),
        (Evaluation(-1.0, 0.0, 0.0, 1, 10**12, exact=False), "only 1 unique samples"),
        (Evaluation(math.nan, 0.0, 0.1, 400, 0, exact=True), "not finite"),
        (Evaluation(-1.0, 0.0, math.inf, 400, 0, exact=True), "not finite"),
    ],
)
def test_collapsed_and_diverged_evaluations_are_invalid(evaluation: Evaluation, reason: str) -> None:
    found = run_module.why_invalid(evaluation)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-7.784412, 3e-5, "-7.78441(3)"),
        (-7.784412, 9.6e-5, "-7.7844(1)"),
        (-7.78441234, 0.0, "-7.78441234"),
        (-75.01, 0.2, "-75.0(2)"),
        (-75.01, 3.0, "-75(3)"),
        (math.nan, 0.1, "nan"),
    ],
)
def test_a_value_travels_with_its_uncertainty(value: float, error: float, text: str) -> None:
    assert format_uncertain(value, error) == text


# -- sweeps ------------------------------------------------------------------------------------------

AXES = [('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'), ('sizes = ["xs"]', 'sizes = ["xs", "s"]')]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "replicate", *map(str, arguments)]


def run_study(path: Path, artifacts: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", path, "--artifacts", artifacts, "--workers", 1, *arguments),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.processes
def test_sweep_trains_each_point_once_and_survives_a_failing_one(
    write_spec: WriteSpec, tmp_path: Path
) -> None:
    """Two of four points overflow: the others are trained, the status is 1, retries are explicit."""
    (tmp_path / "broken").write_text(
        "&FCI NORB=2,NELEC=2,MS2=0 &END\n 1e308 1 1 1 1\n 1e308 2 2 1 1\n 1e308 1 1 0 0\n", encoding="utf-8"
    )
    path = write_spec(
        ('molecules = ["H2"]', 'molecules = ["bad", "H2"]'),
        ('sizes = ["xs"]', 'sizes = ["xs", "s"]'),
        add='\n[molecule.bad]\nfcidump = "broken"\n',
    )
    study = load_study(path)
    store = Store.of(study, tmp_path / "artifacts")
    done = run_study(path, tmp_path / "artifacts")
    assert done.returncode == 1, done.stderr
    assert "tiny: 2 trained, 0 were done, 2 failed" in done.stdout
    states = {(p.molecule.name, store.status(p.id).state) for p in study.points}
    assert states == {("H2", "done"), ("bad", "failed")}
    (bad, *_) = [p for p in study.points if p.molecule.name == "bad"]
    record = json.loads(store.error_path(bad.id).read_text(encoding="utf-8"))
    assert "Traceback" in record["traceback"]
    stamps = {p.name: p.stat().st_mtime_ns for p in store.points.glob("*.nc")}

    again = run_study(path, tmp_path / "artifacts")
    assert "tiny: 0 trained, 2 were done, 2 failed" in again.stdout
    retried = run_study(path, tmp_path / "artifacts", "--retry-failed")
    assert retried.returncode == 1
    assert "FAILED" in retried.stderr
    assert {p.name: p.stat().st_mtime_ns for p in store.points.glob("*.nc")} == stamps


def start(path: Path, artifacts: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", path, "--artifacts", artifacts, "--workers", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


LONG = [
    ("steps = [3]", "steps = [1500]"),
    ("[phase]\n", "[checkpoint]\nsteps = 40\nseconds = 0.0\n\n[phase]\n"),
]


@pytest.mark.processes
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_stopped_sweep_goes_on_where_it_was(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    path = write_spec(*LONG)
    study = load_study(path)
    (point,) = study.points
    store = Store.of(study, tmp_path / "artifacts")
    with start(path, tmp_path / "artifacts") as process:
        wait_for(store.checkpoint_path(point.id).exists)
        os.killpg(process.pid, number)  # as a terminal does
        _, messages = process.communicate(timeout=120)
    assert store.checkpoint_path(point.id).exists()
    assert not store.point_path(point.id).exists()
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert "the same command goes on from the checkpoints" in messages
        assert store.status(point.id).state == "missing"
        assert not store.claim_path(point.id).exists()

    done = run_study(path, tmp_path / "artifacts")
    assert done.returncode == 0, done.stderr
    resumed = store.read_point(point.id)
    whole = run_point(point, Store(tmp_path / "whole"), cache=cache) if prepare(tmp_path / "whole") else None
    assert resumed is not None
    assert whole is not None
    assert int(resumed.attrs["resumed"]) == 1
    assert_same_bits(resumed, whole)


@pytest.mark.slow
def test_killed_worker_costs_one_point(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(*LONG, ("seeds = [0]", "seeds = [0, 1]"))
    study = load_study(path)
    store = Store.of(study, tmp_path / "artifacts")
    with start(path, tmp_path / "artifacts") as process:
        wait_for(lambda: any(store.points.glob("*.ckpt")))
        (claim,) = store.points.glob("*.claim")
        os.kill(json.loads(claim.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "1 trained, 0 were done, 1 failed" in output
    assert "SIGKILL" in (store.read_error(claim.stem) or "")
    assert (
        "1 trained, 1 were done, 0 failed" in run_study(path, tmp_path / "artifacts", "--retry-failed").stdout
    )


@pytest.mark.processes
def test_two_sweeps_share_the_work(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(("steps = [3]", "steps = [100]"), ("seeds = [0]", "seeds = [0, 1, 2, 3, 4, 5]"))
    with start(path, tmp_path / "artifacts") as first, start(path, tmp_path / "artifacts") as second:
        outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    trained = [int(text.split("tiny: ")[1].split(" trained")[0]) for text in outputs]
    assert sum(trained) == 6
    assert all(
        store_file.suffix == ".nc" for store_file in (tmp_path / "artifacts/tiny/points").glob("[!.]*")
    )


def test_sweep_of_finished_points_starts_no_worker(
    write_spec: WriteSpec, tmp_path: Path, cache: Path
) -> None:
    study = load_study(write_spec())
    store = Store.of(study, tmp_path / "artifacts")
    store.prepare()
    run_point(study.points[0], store, cache=cache)
    options = Options(workers=1, artifacts=tmp_path / "artifacts")
    outcome = sweep(study, study.points, options, lambda say: pytest.fail("an engine was started"))
    assert outcome.skipped == [study.points[0].id]
    assert (outcome.done, outcome.failed, outcome.interrupted) == ([], {}, False)


def test_summary_names_point_energy_and_cost(write_spec: WriteSpec) -> None:
    data = {
        "energy": -1.25,
        "energy_stderr": 0.003,
        "variance": 1e-4,
        "flops_executed": 1.2e12,
        "wall_seconds": 3.21,
    }
    line = run_module.summarise(one_point(write_spec), data)
    assert line == "H2 made/xs T=3 seed 0: -1.250(3) Ha, variance 1.00e-04 Ha^2, 1.2e+12 FLOP, 3.2 s"
