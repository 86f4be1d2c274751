"""What users and machines do to a sweep: full and read-only disks, damaged files, impatient Ctrl-C, edits.

Every time: a clear message, nothing destroyed, the sweep goes on where it can, and ends with the bits of a
run that was left in peace. Kills are in test_crash.py, clocks and claims in test_store.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engines import replicate, run, wait_for
from test_run import LONG, assert_same_bits

from replicate import cube as cube_module
from replicate import run as run_module
from replicate.cli import main
from replicate.run import run_point
from replicate.scaling import table
from replicate.spec import CheckpointSpec, Study, load_study
from replicate.store import Store, StoreError

pytestmark = pytest.mark.processes

WriteSpec = Callable[..., Path]


def whole(study: Study, folder: Path, cache: Path) -> list[Any]:
    """Every point of a study, trained without disturbance."""
    store = Store(folder / "whole")
    store.prepare()
    return [run_point(point, store, cache=cache) for point in study.points]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("molecules")


# -- disks -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB. Permission bits do not bind root, so that read-only is a mount too."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk without the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(filler: Path) -> None:
    """Take every block that is left."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_sweep_on_a_full_disk_says_so_and_goes_on_once_there_is_room(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, small_disk: Path
) -> None:
    """The disk fills up after the first of two points; the next sweep needs no flag to train the second."""
    path = write_spec(("seeds = [0]", "seeds = [0, 1]"))
    study = load_study(path)
    store = Store.of(study, small_disk)
    first = study.points[0]
    assert run(path, small_disk, "--workers", 1, "--only", first.id).returncode == 0
    before = store.point_path(first.id).read_bytes()
    filler = small_disk / "filler"
    fill(filler)
    full = run(path, small_disk, "--workers", 1)
    assert full.returncode == 1
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    assert store.point_path(first.id).read_bytes() == before
    assert {p.name for p in store.points.iterdir()} == {".lock", f"{first.id}.nc"}

    filler.unlink()
    done = run(path, small_disk, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "tiny: 1 trained, 1 were done, 0 failed" in done.stdout
    for point, expected in zip(study.points, whole(study, tmp_path, cache), strict=True):
        found = store.read_point(point.id)
        assert found is not None
        assert_same_bits(found, expected)


def test_disk_that_is_full_for_a_while_costs_checkpoints_not_the_point(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, small_disk: Path
) -> None:
    """Full from step 10 to 50 of 60: one warning, the earlier checkpoint stays, the point is written."""
    (point,) = load_study(write_spec(("steps = [3]", "steps = [60]"))).points
    warnings: list[str] = []
    store, filler = Store(small_disk, warn=warnings.append), small_disk / "filler"
    store.prepare()

    def on_step(step: int) -> None:
        if step == 10:
            kept.append(store.checkpoint_path(point.id).read_bytes())
            fill(filler)
        if step == 50:
            assert store.checkpoint_path(point.id).read_bytes() == kept[0]
            filler.unlink()

    kept: list[bytes] = []
    every = CheckpointSpec(seconds=0.0, steps=9)
    data = run_point(point, store, cache=cache, checkpoint=every, on_step=on_step)
    assert data is not None
    assert store.point_path(point.id).exists()
    (warning,) = warnings
    assert "the disk is full" in warning
    assert warning.endswith("goes on without this checkpoint")


def test_read_only_results_folder_is_one_line_and_1(
    write_spec: WriteSpec, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_spec()
    assert run(path, small_disk, "--workers", 1).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    where = small_disk / "tiny"
    for command in ("run", "collect"):
        assert main([command, str(path), "--artifacts", str(small_disk)]) == 1
        line = capsys.readouterr().err
        assert line.startswith(str(where))
        assert line.endswith("(Read-only file system)\n")
        assert line.count("\n") == 1
    for command in ("plan", "status"):  # reading needs no more than to read
        assert main([command, str(path), "--artifacts", str(small_disk), "--json"]) == 0
    assert '"done": 1' in capsys.readouterr().out


# -- damaged files -----------------------------------------------------------------------------------


def test_sweep_trains_again_what_a_truncated_file_held(
    write_spec: WriteSpec, tmp_path: Path, cache: Path
) -> None:
    """A truncated point file and checkpoint: both kept aside, both points end with the same bits."""
    path = write_spec(("steps = [3]", "steps = [20]"), ("seeds = [0]", "seeds = [0, 1]"))
    study = load_study(path)
    expected = whole(study, tmp_path, cache)
    store = Store.of(study, tmp_path / "artifacts")
    store.prepare()
    done, begun = study.points
    run_point(done, store, cache=cache)
    run_point(begun, store, cache=cache, stop=lambda: True)
    parts = {}
    for file in (store.point_path(done.id), store.checkpoint_path(begun.id)):
        parts[file] = file.read_bytes()[: file.stat().st_size * 2 // 3]
        file.write_bytes(parts[file])
    ended = run(path, tmp_path / "artifacts", "--workers", 1)
    assert ended.returncode == 0, ended.stderr
    assert "tiny: 2 trained, 0 were done, 0 failed" in ended.stdout
    for file, part in parts.items():
        assert f"{file.name}.corrupt, its point runs again" in ended.stderr
        assert file.with_name(f"{file.name}.corrupt").read_bytes() == part
    for point, data in zip(study.points, expected, strict=True):
        found = store.read_point(point.id)
        assert found is not None
        assert_same_bits(found, data)


def test_checkpoint_of_another_spec_is_kept_aside_and_not_gone_on_from(
    write_spec: WriteSpec, tmp_path: Path, cache: Path
) -> None:
    """Somebody copies the checkpoint of a run with another learning rate under this point's name."""
    (other,) = load_study(write_spec(("learning_rate = 1e-2", "learning_rate = 1e-3"))).points
    path = write_spec()
    study = load_study(path)
    (point,) = study.points
    (expected,) = whole(study, tmp_path, cache)
    store = Store.of(study, tmp_path / "artifacts")
    store.prepare()
    run_point(other, store, cache=cache, stop=lambda: True)
    store.checkpoint_path(other.id).rename(store.checkpoint_path(point.id))
    ended = run(path, tmp_path / "artifacts", "--workers", 1)
    assert ended.returncode == 0, ended.stderr
    assert f"it belongs to point {other.id}" in ended.stderr
    assert store.checkpoint_path(point.id).with_name(f"{point.id}.ckpt.corrupt").exists()
    found = store.read_point(point.id)
    assert found is not None
    assert_same_bits(found, expected)


def test_cube_of_another_schema_is_refused_and_left_alone(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import netCDF4

    path = write_spec()
    store = Store.of(load_study(path), tmp_path / "artifacts")
    store.prepare()
    run_point(load_study(path).points[0], store, cache=cache)
    assert main(["collect", str(path), "--artifacts", str(tmp_path / "artifacts")]) == 0
    cube = store.root / "cube.nc"
    with netCDF4.Dataset(cube, "a") as file:
        file.setncattr("schema", 99)
    before = cube.read_bytes()
    assert table.CUBE_SCHEMA == cube_module.CUBE_SCHEMA
    capsys.readouterr()
    assert main(["fit", str(cube)]) == 2
    assert "cube of schema 99; this version reads 1: collect it again" in capsys.readouterr().err
    assert cube.read_bytes() == before
    assert main(["collect", str(path), "--artifacts", str(tmp_path / "artifacts")]) == 0  # as it says
    with netCDF4.Dataset(cube) as file:
        assert file.getncattr("schema") == 1


# -- Ctrl-C, twice -----------------------------------------------------------------------------------


def test_second_interrupt_stops_at_once(write_spec: WriteSpec, tmp_path: Path) -> None:
    """A worker that hangs in a step (here: suspended) does not keep a user who asks twice."""
    path = write_spec(*LONG)
    study = load_study(path)
    (point,) = study.points
    store = Store.of(study, tmp_path / "artifacts")
    command = replicate("run", path, "--artifacts", tmp_path / "artifacts", "--workers", 1)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        wait_for(store.checkpoint_path(point.id).exists)
        worker = json.loads(store.claim_path(point.id).read_text(encoding="utf-8"))["pid"]
        os.kill(worker, signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGINT)
        line = process.stderr.readline()
        while "stopping" not in line:
            assert line, "ended without a word"
            line = process.stderr.readline()
        time.sleep(0.5)
        assert process.poll() is None  # once: it waits for the step to end
        asked = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        messages = process.stderr.read()
        process.wait(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 1
    assert "the same command goes on from the checkpoints" in messages
    assert store.checkpoint_path(point.id).exists()
    assert store.status(point.id).state == "missing"
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# -- edits -------------------------------------------------------------------------------------------


def test_changed_comment_runs_nothing_and_changed_number_only_what_it_touches(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (('ansatze = ["made"]', 'ansatze = ["made", "transformer"]'),)
    path = write_spec(*changes)
    assert "tiny: 2 trained" in run(path, tmp_path / "artifacts", "--workers", 1).stdout
    study = load_study(path)
    stamps = {
        p.name: p.stat().st_mtime_ns for p in Store.of(study, tmp_path / "artifacts").points.glob("*.nc")
    }
    assert len(stamps) == 2

    text = path.read_text(encoding="utf-8")
    path.write_text("# another comment\n" + text.replace("steps = [3]", "steps = [3]  # T"), encoding="utf-8")
    again = run(path, tmp_path / "artifacts", "--workers", 1)
    assert "tiny: 0 trained, 2 were done, 0 failed" in again.stdout

    path.write_text(
        text.replace("xs = { d = 4, heads = 2, ff = 8", "xs = { d = 4, heads = 2, ff = 9", 1),
        encoding="utf-8",
    )
    changed = run(path, tmp_path / "artifacts", "--workers", 1)
    assert "tiny: 1 trained, 1 were done, 0 failed" in changed.stdout
    files = {
        p.name: p.stat().st_mtime_ns for p in Store.of(study, tmp_path / "artifacts").points.glob("*.nc")
    }
    assert len(files) == 3
    assert {name: files[name] for name in stamps} == stamps  # nothing lost, nothing written again


def test_checkpoint_that_cannot_be_written_on_the_way_out_is_said(
    write_spec: WriteSpec, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop, and no room for the checkpoint: that is an error, not a clean stop."""
    (point,) = load_study(write_spec()).points
    store = Store(tmp_path)
    store.prepare()

    def full(*_: Any) -> None:
        raise StoreError("x.ckpt: cannot be written (the disk is full)")

    monkeypatch.setattr(store, "write_checkpoint", full)
    with pytest.raises(StoreError, match="the disk is full"):
        run_module.run_point(point, store, cache=cache, stop=lambda: True)
