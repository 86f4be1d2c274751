"""Engines beyond this machine's processes: the same bits, whoever trains, and no point lost with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from replicate.engine import slurm
from replicate.engine.base import Options, requested
from replicate.engine.eta import Eta
from replicate.engine.log import Log
from replicate.engine.task import run_task
from replicate.spec import Study, UserError, load_study
from replicate.store import Store
from replicate.verify import NOT_COMPARED

pytestmark = pytest.mark.processes

WriteSpec = Callable[..., Path]
ROOT = Path(__file__).parent.parent
SEVERAL = [
    ('molecules = ["H2"]', 'molecules = ["H2", "LiH"]'),
    ('ansatze = ["made"]', 'ansatze = ["made", "transformer", "retnet"]'),
    ("steps = [3]", "steps = [3, 10]"),
]
LONG = [
    ('molecules = ["H2"]', 'molecules = ["LiH"]'),
    ("steps = [3]", "steps = [1500]"),
    ("[phase]\n", "[checkpoint]\nsteps = 40\nseconds = 0.0\n\n[phase]\n"),
]


def replicate(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "replicate", *map(str, arguments)]


def run(path: Path, artifacts: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = replicate("run", path, "--artifacts", artifacts, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def assert_same_points(study: Study, artifacts: Path, reference: Path) -> None:
    """Every number of every point but the timings, bit for bit."""
    for point in study.points:
        found, expected = (Store.of(study, folder).read_point(point.id) for folder in (artifacts, reference))
        assert found is not None, point
        assert expected is not None, point
        for name in set(expected.variables) - set(NOT_COMPARED):
            np.testing.assert_array_equal(
                found[name].values, expected[name].values, err_msg=f"{point} {name}"
            )


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def nothing_but_points(study: Study, artifacts: Path) -> bool:
    names = {path.name for path in Store.of(study, artifacts).points.iterdir()}
    return names - {".lock"} == {f"{point.id}.nc" for point in study.points}


# -- Dask --------------------------------------------------------------------------------------------


@contextmanager
def dask_cluster(folder: Path, *, workers: int, resources: str | None = None) -> Iterator[str]:
    """A scheduler and worker processes of their own, over TCP on the loopback interface; its address."""
    file = folder / "scheduler.json"
    here = [sys.executable, "-m", "dask"]
    calm = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    scheduler = [*here, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    processes = [subprocess.Popen([*scheduler, "--scheduler-file", str(file)], **calm)]  # type: ignore[call-overload]
    try:
        wait_for(lambda: file.exists() and file.read_text(encoding="utf-8").rstrip().endswith("}"))
        address = str(json.loads(file.read_text(encoding="utf-8"))["address"])
        worker = [*here, "worker", address, "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
        worker += ["--local-directory", str(folder), *(["--resources", resources] if resources else [])]
        processes += [subprocess.Popen(worker, **calm) for _ in range(workers)]  # type: ignore[call-overload]
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            process.wait(timeout=60)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of the local engine by study, to compare with."""
    return {}


def by_local(name: str, local: dict[str, Path], path: Path, folder: pytest.TempPathFactory) -> Path:
    if name not in local:
        local[name] = folder.mktemp("local")
        done = run(path, local[name], "--workers", 1)
        assert done.returncode == 0, done.stderr
    return local[name]


def test_dask_cluster_trains_what_local_trains(
    write_spec: WriteSpec, tmp_path: Path, local: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_spec(*SEVERAL)
    study = load_study(path)
    reference = by_local("several", local, path, tmp_path_factory)
    with dask_cluster(tmp_path, workers=2, resources="GPU=1") as address:
        arguments = ("--engine", "dask", "--address", address, "--resources", "GPU=1")
        done = run(path, tmp_path / "artifacts", *arguments)
    assert done.returncode == 0, done.stderr
    assert "tiny: 12 trained, 0 were done, 0 failed" in done.stdout
    assert "[12/12] " in done.stderr
    assert_same_points(study, tmp_path / "artifacts", reference)
    assert nothing_but_points(study, tmp_path / "artifacts")


def test_killed_dask_worker_loses_nothing(write_spec: WriteSpec, tmp_path: Path) -> None:
    """kill -9 in the middle of a point: another worker goes on from the checkpoint, in the same sweep."""
    path = write_spec(*LONG)
    study = load_study(path)
    (point,) = study.points
    store = Store.of(study, tmp_path / "artifacts")
    with dask_cluster(tmp_path, workers=2) as address:
        command = (
            "run",
            path,
            "--artifacts",
            tmp_path / "artifacts",
            "--engine",
            "dask",
            "--address",
            address,
        )
        with subprocess.Popen(replicate(*command), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            wait_for(store.checkpoint_path(point.id).exists)
            os.kill(json.loads(store.claim_path(point.id).read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
            output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "tiny: 1 trained, 0 were done, 0 failed" in output
    data = store.read_point(point.id)
    assert data is not None
    assert int(data.attrs["resumed"]) == 1


@pytest.mark.slow
def test_interrupted_dask_sweep_leaves_checkpoints(write_spec: WriteSpec, tmp_path: Path) -> None:
    """Ctrl-C with a cluster of its own: as `local`, and its processes are gone."""
    path = write_spec(*LONG, ("seeds = [0]", "seeds = [0, 1, 2]"))
    study = load_study(path)
    store = Store.of(study, tmp_path / "artifacts")
    command = replicate(
        "run", path, "--artifacts", tmp_path / "artifacts", "--engine", "dask", "--workers", 1
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        wait_for(lambda: any(store.points.glob("*.ckpt")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, messages = process.communicate(timeout=120)
    assert process.returncode == 1, messages
    assert "the same command goes on from the checkpoints" in messages
    assert not list(store.points.glob("*.claim"))
    assert not list(store.points.glob("*.error.json"))
    wait_for(lambda: not group_lives(process.pid))


def test_dask_scheduler_that_is_not_there_is_one_line_and_2(write_spec: WriteSpec, tmp_path: Path) -> None:
    done = run(write_spec(), tmp_path, "--engine", "dask", "--address", "tcp://127.0.0.1:9")
    assert done.returncode == 2
    assert "--address tcp://127.0.0.1:9: no Dask scheduler answers there" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- Slurm, by submitit's executor on this machine ---------------------------------------------------


def test_slurm_jobs_train_what_local_trains(
    write_spec: WriteSpec, tmp_path: Path, local: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_spec(*SEVERAL)
    study = load_study(path)
    reference = by_local("several", local, path, tmp_path_factory)
    arguments = ("--engine", "slurm", "--slurm", "cluster=local", "--points-per-job", 6)
    done = run(path, tmp_path / "artifacts", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 jobs submitted (local " in done.stderr
    assert "tiny: 12 trained, 0 were done, 0 failed" in done.stdout
    assert_same_points(study, tmp_path / "artifacts", reference)
    assert nothing_but_points(study, tmp_path / "artifacts")


def test_slurm_job_at_the_end_of_its_time_is_requeued(write_spec: WriteSpec, tmp_path: Path) -> None:
    """The signal that Slurm sends before a time-out: checkpoint, requeue, and on to the last point."""
    path = write_spec(*LONG, ("seeds = [0]", "seeds = [0, 1]"))
    study = load_study(path)
    store = Store.of(study, tmp_path / "artifacts")
    arguments = ("--engine", "slurm", "--slurm", "cluster=local", "--points-per-job", 2)
    command = replicate("run", path, "--artifacts", tmp_path / "artifacts", *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for(lambda: any(store.points.glob("*.ckpt")))
        (claim,) = store.points.glob("*.claim")
        os.kill(json.loads(claim.read_text(encoding="utf-8"))["pid"], signal.SIGUSR2)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "tiny: 2 trained, 0 were done, 0 failed" in output
    resumed = [store.read_point(point.id) for point in study.points]
    assert [int(data.attrs["resumed"]) for data in resumed if data is not None] in ([0, 1], [1, 0])
    logs = "".join(p.read_text(encoding="utf-8") for p in (store.root / "slurm").glob("*_log.*"))
    assert "Calling checkpoint method" in logs
    assert "Requeued job" in logs


@pytest.mark.slow
def test_killed_slurm_job_fails_the_point_at_work_only(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(*LONG, ("seeds = [0]", "seeds = [0, 1]"))
    study = load_study(path)
    store = Store.of(study, tmp_path / "artifacts")
    arguments = ("--engine", "slurm", "--slurm", "cluster=local", "--points-per-job", 2)
    command = replicate("run", path, "--artifacts", tmp_path / "artifacts", *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for(lambda: any(store.points.glob("*.ckpt")))
        (claim,) = store.points.glob("*.claim")
        os.kill(json.loads(claim.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "tiny: 0 trained, 0 were done, 2 failed" in output
    assert "ended while it was at work" in (store.read_error(claim.stem) or "")
    assert len(list(store.points.glob("*.error.json"))) == 1  # the other never began: the next sweep runs it


def test_slurm_parameters_from_the_command_line() -> None:
    found = slurm.parameters_of(
        ["partition=gpu", "timeout_min=90", "mem_gb=1.5", "--mail-user=a@b", "time=30"]
    )
    assert found == {
        "slurm_partition": "gpu",
        "timeout_min": 90,
        "mem_gb": 1.5,
        "slurm_mail_user": "a@b",
        "slurm_time": 30,
    }
    for wrong in ("partition", "=x", "timeout_min=soon"):
        with pytest.raises(UserError, match="--slurm"):
            slurm.parameters_of([wrong])


# -- this machine's processes ------------------------------------------------------------------------


def test_workers_that_cannot_start_end_the_sweep_not_each_point(
    write_spec: WriteSpec, tmp_path: Path
) -> None:
    """A main module that a spawned process cannot import again, as of a script on standard input."""
    path = write_spec(("seeds = [0]", "seeds = [0, 1, 2]"))
    script = f"from replicate.cli import main; main(['run', {str(path)!r}, '--artifacts', {str(tmp_path)!r}])"
    done = subprocess.run(
        [sys.executable, "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=100,
    )
    assert "worker processes cannot start (exit status 1)" in done.stderr
    assert not list(tmp_path.rglob("*.error.json"))


# -- what they share ---------------------------------------------------------------------------------


def test_stop_file_reaches_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicate.engine.base.STOP_SECONDS", 0.0)
    check = requested(str(tmp_path / "stop"))
    assert not check()
    (tmp_path / "stop").touch()
    assert check()
    (tmp_path / "stop").unlink()
    assert check()  # once asked, asked


def test_worker_goes_on_while_its_spec_is_edited(write_spec: WriteSpec, tmp_path: Path) -> None:
    """An id is a hash of content: a worker that knows it needs no spec any more."""
    path = write_spec(("seeds = [0]", "seeds = [0, 1]"))
    first, second = load_study(path).points
    options = Options(workers=1, device="cpu", artifacts=tmp_path / "artifacts")
    assert run_task(str(path), first.id, options, lambda: False).kind == "done"
    path.write_text("broken [", encoding="utf-8")
    assert run_task(str(path), second.id, options, lambda: False).kind == "done"
    report = run_task(str(path), "0123456789ab", options, lambda: False)
    assert (report.kind, "tiny.toml" in report.text) == ("fatal", True)


def test_time_left_comes_from_measured_speeds(write_spec: WriteSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, points of 1 s per step where the plan said 0.1: the estimate is exact once one is done."""
    now = 100.0
    monkeypatch.setattr("replicate.engine.eta.time.monotonic", lambda: now)
    study = load_study(write_spec(("steps = [3]", "steps = [10, 20, 30]"), ("seeds = [0]", "seeds = [0, 1]")))
    points = {(point.steps, point.seed): point for point in study.points}
    eta = Eta(study.points, {point.id: 0.1 * point.steps for point in study.points})
    assert eta.left({}) is None
    now += 30
    eta.finished(points[30, 0], seconds=30.0, spent=30.0)
    assert eta.left({points[30, 1].id: 30.0}) == pytest.approx((10 + 10 + 20 + 20) / 2)
    eta.gone(points[20, 1])
    assert eta.left({points[30, 1].id: 30.0}) == pytest.approx((10 + 10 + 20) / 2)


def test_time_left_of_another_size_scales_the_plan(
    write_spec: WriteSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("replicate.engine.eta.time.monotonic", lambda: now)
    small, large = load_study(write_spec(('sizes = ["xs"]', 'sizes = ["xs", "s"]'))).points
    eta = Eta([small, large], {small.id: 2.0, large.id: 8.0})
    now = 10.0
    eta.finished(small, seconds=10.0, spent=10.0)
    assert eta.left({}) == pytest.approx(40.0)


def test_log_lines_say_failures_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(3)
    log.advance("one", 0, None)
    log.advance("two", 1, 100.0)
    log.advance("three", 1, 0.0)
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] one",
        "[2/3] two; 1 failed; about 100.0 s left",
        "[3/3] three; 1 failed",
    ]


def test_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = Log(2)
    log.advance("one", 1, 150.0)
    log.say("a word")
    log.close()
    shown = capsys.readouterr().err
    assert "[1/2] one\n" in shown
    assert "a word\n" in shown
    assert "1/2 points in 00:00, 1 failed, about 2.5 min left" in shown
