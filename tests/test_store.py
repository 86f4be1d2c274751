"""The store under accidents: nothing half-written, nothing destroyed, no point claimed twice."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from replicate import store as store_module
from replicate.spec import AnsatzSpec, MoleculeSpec, PhaseSpec, Point
from replicate.store import (
    HEARTBEAT_SECONDS,
    STALE_SECONDS,
    WATCHED_SECONDS,
    Store,
    StoreError,
    move_aside,
    replacing,
)
from replicate.trainer import Checkpoint

ID = "0123456789ab"
OTHER = "ba9876543210"


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> Store:
    made = Store(tmp_path / "study", warn=warnings.append)
    made.prepare()
    return made


def dataset(point_id: str = ID, value: float = 1.5) -> xr.Dataset:
    noise = np.random.default_rng(0).standard_normal(5000)
    return xr.Dataset({"energy": ((), value), "history": ("record", noise)}, attrs={"point_id": point_id})


def checkpoint(step: int = 3) -> Checkpoint:
    tensors = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(step)), "n": torch.arange(5)}
    return Checkpoint(step=step, tensors=tensors, meta={"point": "x", "t": 0.1})


# -- point files -------------------------------------------------------------------------------------


def test_point_comes_back_bit_for_bit(store: Store, warnings: list[str]) -> None:
    store.write_point(ID, dataset())
    back = store.read_point(ID)
    assert back is not None
    assert back.identical(dataset())
    assert store.check_point(ID)
    assert warnings == []


def test_numbers_of_a_point_are_those_of_the_whole(store: Store) -> None:
    """The fast reader against the one that knows NetCDF; files that xarray wrote, of old, read alike."""
    data = dataset().assign(small=((), np.int8(-3)), counts=("record", np.arange(5000, dtype=np.int32)))
    data = data.assign(large=((), np.int64(2**53 - 1)), bad=((), np.nan))
    data = data.assign_attrs(title="τ", molecule='{"a": 1}')
    store.write_point(ID, data)
    data.assign_attrs(point_id=OTHER).to_netcdf(store.point_path(OTHER), engine="netcdf4")
    for point_id in (ID, OTHER):
        whole = store.read_point(point_id)
        numbers = store.read_numbers(point_id, map(str, data.variables), ["title", "molecule", "not there"])
        assert whole is not None
        assert numbers is not None
        assert whole.identical(data.assign_attrs(point_id=point_id))
        assert numbers.attrs == whole.attrs
        assert numbers.values.keys() == set(whole.variables)
        for name, variable in whole.variables.items():
            np.testing.assert_array_equal(numbers.values[str(name)], variable.values)


def read_all(store: Store) -> object:
    return store.read_point(ID)


def read_numbers(store: Store) -> object:
    return store.read_numbers(ID, map(str, dataset().variables), [])


READERS = [read_all, read_numbers]


@pytest.mark.parametrize("read", READERS)
def test_readers_move_aside_what_they_cannot_read(
    store: Store, warnings: list[str], read: Callable[[Store], object]
) -> None:
    """Cut anywhere, of another point, or not with all that is asked for."""
    store.write_point(ID, dataset())
    path, whole = store.point_path(ID), store.point_path(ID).read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert read(store) is None
        assert not path.exists()
    store.write_point(OTHER, dataset().assign_attrs(point_id=OTHER))
    store.point_path(OTHER).rename(path)
    assert read(store) is None
    assert f"it holds point {OTHER}" in warnings[-1]
    assert len(warnings) == len(list(store.points.glob("*.corrupt*"))) == 5
    assert read(store) is None  # missing: nothing to say
    assert len(warnings) == 5


def test_point_without_what_a_cube_needs_is_moved_aside(store: Store, warnings: list[str]) -> None:
    store.write_point(ID, dataset())
    assert store.read_numbers(ID, ["energy", "no such variable"], []) is None
    assert len(warnings) == 1
    assert (store.points / f"{ID}.nc.corrupt").exists()


def test_point_is_written_once(store: Store) -> None:
    store.write_point(ID, dataset(value=1.0))
    store.write_point(ID, dataset(value=2.0))
    back = store.read_point(ID)
    assert back is not None
    assert float(back["energy"]) == 1.0


def test_equal_points_are_equal_files(store: Store) -> None:
    store.write_point(ID, dataset())
    first = store.point_path(ID).read_bytes()
    store.point_path(ID).unlink()
    store.write_point(ID, dataset())
    assert store.point_path(ID).read_bytes() == first


def test_finished_point_leaves_no_checkpoint_and_no_error(store: Store) -> None:
    store.write_checkpoint(ID, checkpoint())
    store.error_path(ID).write_text("{}", encoding="utf-8")
    store.write_point(ID, dataset())
    assert sorted(p.name for p in store.points.iterdir()) == [f"{ID}.nc"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95, -1])
def test_truncated_point_is_moved_aside(store: Store, warnings: list[str], keep: float) -> None:
    store.write_point(ID, dataset())
    path = store.point_path(ID)
    whole = path.read_bytes()
    part = whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[: int(keep)]
    path.write_bytes(part)
    assert store.check_point(ID) is False
    assert not path.exists()
    assert (store.points / f"{ID}.nc.corrupt").read_bytes() == part
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path}: unreadable (")
    assert store.status(ID).state == "missing"


@pytest.mark.parametrize("read", READERS)
def test_flipped_bits_are_found_when_the_point_is_read(
    store: Store, warnings: list[str], read: Callable[[Store], object]
) -> None:
    store.write_point(ID, dataset())
    path = store.point_path(ID)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2  # inside the compressed history
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    path.write_bytes(data)
    assert read(store) is None
    assert len(warnings) == 1


def test_foreign_point_file_is_moved_aside(store: Store, warnings: list[str]) -> None:
    store.write_point(OTHER, dataset(OTHER))
    store.point_path(OTHER).rename(store.point_path(ID))
    assert store.read_point(ID) is None
    assert f"it holds point {OTHER}" in warnings[0]


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    for content in ("a", "b", "c"):
        (tmp_path / "x.nc").write_text(content, encoding="utf-8")
        move_aside(tmp_path / "x.nc")
    kept = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    assert kept == {"x.nc.corrupt": "a", "x.nc.corrupt2": "b", "x.nc.corrupt3": "c"}


# -- checkpoints -------------------------------------------------------------------------------------


def test_checkpoint_comes_back_bit_for_bit(store: Store) -> None:
    saved = checkpoint()
    store.write_checkpoint(ID, saved)
    back = store.read_checkpoint(ID)
    assert back is not None
    assert (back.step, back.meta) == (saved.step, saved.meta)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_checkpoint_is_loadable_without_unpickling_code(store: Store) -> None:
    store.write_checkpoint(ID, checkpoint())
    raw = torch.load(store.checkpoint_path(ID), weights_only=True)
    assert json.loads(raw["json"])["point_id"] == ID


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_checkpoint_is_moved_aside(store: Store, warnings: list[str], keep: float) -> None:
    store.write_checkpoint(ID, checkpoint())
    path = store.checkpoint_path(ID)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert store.read_checkpoint(ID) is None
    assert not path.exists()
    assert (store.points / f"{ID}.ckpt.corrupt").exists()
    assert len(warnings) == 1


def test_checkpoint_of_another_point_is_not_used(store: Store, warnings: list[str]) -> None:
    store.write_checkpoint(OTHER, checkpoint())
    store.checkpoint_path(OTHER).rename(store.checkpoint_path(ID))
    assert store.read_checkpoint(ID) is None
    assert f"it belongs to point {OTHER}" in warnings[0]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from replicate.store import Store
from replicate.trainer import Checkpoint
store = Store(Path(sys.argv[1]))
store.prepare()
step = 0
while True:
    step += 1
    tensors = {"w": torch.full((200, 500), float(step))}
    store.write_checkpoint("0123456789ab", Checkpoint(step=step, tensors=tensors, meta={}))
    print(step, flush=True)
"""


def test_kill_during_checkpoints_leaves_a_whole_one(store: Store, warnings: list[str]) -> None:
    """kill -9 at random moments of a process that does nothing but replace its checkpoint."""
    pause = np.random.default_rng(0)
    root = str(Path(store_module.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.root), root], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(20):  # the reader sees a whole file at every moment
            time.sleep(pause.uniform(0, 0.01))
            seen = store.read_checkpoint(ID)
            assert seen is not None
            assert torch.equal(seen.tensors["w"], torch.full((200, 500), float(seen.step)))
        process.kill()
        written = [int(line) for line in process.stdout.read().split()]
    last = store.read_checkpoint(ID)
    assert last is not None
    assert last.step >= max(written, default=1)
    assert torch.equal(last.tensors["w"], torch.full((200, 500), float(last.step)))
    assert warnings == []


# -- claims ------------------------------------------------------------------------------------------


def test_claim_is_exclusive_and_released(store: Store) -> None:
    claim = store.claim(ID)
    assert claim is not None
    with claim:
        assert store.claim(ID) is None
        assert store.status(ID).state == "running"
        other = store.claim(OTHER)
        assert other is not None
        other.release()
    again = store.claim(ID)
    assert again is not None
    again.release()
    assert not store.claim_path(ID).exists()


HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from replicate.store import Store
store = Store(Path(sys.argv[1]))
claim = store.claim("0123456789ab")
print("held" if claim else "refused", flush=True)
sys.stdin.read()
"""


def hold(store: Store) -> subprocess.Popen[str]:
    root = str(Path(store_module.__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(store.root), root], **pipes)  # type: ignore[call-overload]


def test_claim_of_a_killed_process_is_taken_over(store: Store) -> None:
    with hold(store) as process:
        assert process.stdout.readline() == "held\n"
        assert store.claim(ID) is None
        process.kill()
        process.wait()
        claim = store.claim(ID)
        assert claim is not None
        claim.release()


def test_claim_of_a_process_id_that_was_reused_is_stale(store: Store) -> None:
    claim = store.claim(ID)
    assert claim is not None
    owner = json.loads(store.claim_path(ID).read_text(encoding="utf-8"))
    store.claim_path(ID).write_text(json.dumps({**owner, "start": owner["start"] - 1}), encoding="utf-8")
    taken = store.claim(ID)
    assert taken is not None
    claim.release()  # no longer ours: it must leave the new owner's file alone
    assert store.claim_path(ID).exists()
    taken.release()


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the steady clock run on by so many seconds."""
    passed = 0.0

    def run_on(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    real = time.monotonic
    monkeypatch.setattr(store_module.time, "monotonic", lambda: real() + passed)
    return run_on


def foreign_claim(store: Store, age: float) -> Path:
    """A claim of another machine whose last heartbeat was `age` seconds ago by the clock of the folder."""
    path = store.claim_path(ID)
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "start": 1, "t": 0}), encoding="utf-8")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_stale_claim_of_another_machine_is_taken_over(
    store: Store, monotonic: Callable[[float], None]
) -> None:
    foreign_claim(store, STALE_SECONDS + 60)
    assert store.status(ID).state == "missing"
    assert not store.free(ID)  # old at the first look: watched before it is believed
    assert store.claim(ID) is None
    monotonic(WATCHED_SECONDS)
    assert store.free(ID)
    claim = store.claim(ID)
    assert claim is not None
    claim.release()


def test_claim_of_another_machine_lives_by_its_heartbeat(
    store: Store, monotonic: Callable[[float], None]
) -> None:
    path = foreign_claim(store, 0)
    for _ in range(100):  # of a point that takes hours
        assert not store.free(ID)
        monotonic(HEARTBEAT_SECONDS)
        os.utime(path)
    assert store.status(ID).state == "running"
    assert store.claim(ID) is None


def test_clock_that_jumps_forward_kills_no_claim(store: Store, monotonic: Callable[[float], None]) -> None:
    """A day passes for the folder within seconds: what was touched just now looks a day old."""
    path = foreign_claim(store, 86400)
    assert not store.free(ID)
    monotonic(HEARTBEAT_SECONDS)
    os.utime(path, (time.time() - 86385, time.time() - 86385))  # its next heartbeat, by its own clock
    monotonic(WATCHED_SECONDS - HEARTBEAT_SECONDS)
    assert not store.free(ID)
    assert path.exists()


def test_clock_that_jumps_back_keeps_no_dead_claim(store: Store, monotonic: Callable[[float], None]) -> None:
    """The last heartbeat of a dead machine lies a year ahead: it must not hold its point for a year."""
    foreign_claim(store, -365 * 86400)
    assert store.status(ID).state == "missing"
    assert not store.free(ID)
    monotonic(STALE_SECONDS)
    assert store.free(ID)


def test_own_claims_know_no_clock(store: Store, monotonic: Callable[[float], None]) -> None:
    """On one machine the process tells: neither an old nor a future stamp matters."""
    with hold(store) as process:
        assert process.stdout.readline() == "held\n"
        for jump in (-(10**6), 10**6):
            os.utime(store.claim_path(ID), (time.time() + jump, time.time() + jump))
            monotonic(10 * STALE_SECONDS)
            assert not store.free(ID)
            assert store.claim(ID) is None
        process.kill()
        process.wait()
        assert store.free(ID)


def test_torn_claim_is_watched_like_a_foreign_one(store: Store, monotonic: Callable[[float], None]) -> None:
    path = store.claim_path(ID)
    path.write_text('{"mach', encoding="utf-8")
    assert store.claim(ID) is None
    assert not store.free(ID)
    monotonic(STALE_SECONDS)
    assert store.free(ID)


def test_one_of_many_takes_over_a_stale_claim(store: Store) -> None:
    for _ in range(5):
        path = store.claim_path(ID)
        mine = {"machine": store_module._machine(), "pid": os.getpid(), "start": 1, "t": 0}  # a reused id
        path.write_text(json.dumps(mine), encoding="utf-8")
        with ThreadPoolExecutor(8) as pool:
            claims = [claim for claim in pool.map(lambda _: store.claim(ID), range(8)) if claim]
        assert len(claims) == 1
        claims[0].release()


def test_heartbeat_touches_the_claim(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HEARTBEAT_SECONDS", 0.01)
    claim = store.claim(ID)
    assert claim is not None
    with claim:
        os.utime(store.claim_path(ID), (0, 0))
        deadline = time.monotonic() + 10
        while store.claim_path(ID).stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)


# -- accidents of the disk ---------------------------------------------------------------------------


def test_full_disk_is_one_line_and_destroys_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_checkpoint(ID, checkpoint(1))
    before = store.checkpoint_path(ID).read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"0123456789ab\.nc: cannot be written \(the disk is full\)"):
        store.write_point(ID, dataset())
    with pytest.raises(StoreError, match="the disk is full"):
        store.write_checkpoint(ID, checkpoint(2))
    assert [p.name for p in store.points.iterdir()] == [f"{ID}.ckpt"]
    assert store.checkpoint_path(ID).read_bytes() == before


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import numpy as np, torch, xarray as xr
from replicate.store import Store, StoreError
from replicate.trainer import Checkpoint
store = Store(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
noise = np.random.default_rng(0).standard_normal(100_000)
for write in (
    lambda: store.write_point("0123456789ab", xr.Dataset({"x": ("a", noise)})),
    lambda: store.write_checkpoint("0123456789ab", Checkpoint(1, {"x": torch.from_numpy(noise)}, {})),
):
    try:
        write()
        print("written")
    except StoreError as error:
        print(error)
"""


def test_writers_that_run_out_of_room_are_reported_in_our_words(store: Store) -> None:
    """The libraries of netCDF and torch raise RuntimeError; here the kernel refuses to let a file grow."""
    root = str(Path(store_module.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(store.root), root], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(store.point_path(ID)),
        str(store.checkpoint_path(ID)),
    ]
    assert all("cannot be written (" in line for line in lines)
    assert list(store.points.iterdir()) == []


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"points: cannot be written \(Not a directory\)"):
        Store(tmp_path / "file").prepare()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old", encoding="utf-8")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == {"x": "old"}


def test_leftovers_of_killed_writers_are_cleared_once_old(store: Store) -> None:
    old, new = store.points / ".x.nc.1.tmp", store.points / ".y.nc.2.tmp"
    for path in (old, new):
        path.write_text("half", encoding="utf-8")
    os.utime(old, (0, 0))
    store.prepare()
    assert [p.name for p in store.points.iterdir()] == [new.name]


# -- errors and status -------------------------------------------------------------------------------


def point() -> Point:
    hydrogen = MoleculeSpec(name="H", atoms=(("H", 0.0, 0.0, 0.0),), multiplicity=2)
    ansatz = AnsatzSpec(kind="made", params={"width": 4})
    return Point(molecule=hydrogen, ansatz=ansatz, phase=PhaseSpec(width=4), steps=3)


def test_error_is_recorded_with_its_trace_and_cleared(store: Store) -> None:
    p = point()
    try:
        raise FloatingPointError("step 7: energy nan\nmore")
    except FloatingPointError as error:
        store.write_error(p, error)
    record = json.loads(store.error_path(p.id).read_text(encoding="utf-8"))
    assert record["id"] == p.id
    assert "test_error_is_recorded" in record["traceback"]
    status = store.status(p.id)
    assert (status.state, status.reason) == ("failed", "FloatingPointError: step 7: energy nan")
    store.clear_error(p.id)
    assert store.status(p.id).state == "missing"


def test_status_of_every_state(store: Store) -> None:
    assert store.status(ID).state == "missing"
    store.write_checkpoint(ID, checkpoint())
    assert store.status(ID).checkpoint
    store.error_path(ID).write_text("not json", encoding="utf-8")
    assert store.status(ID).state == "failed"
    claim = store.claim(ID)
    assert claim is not None
    with claim:
        assert store.status(ID).state == "running"
        store.write_point(ID, dataset())
    assert store.status(ID).state == "done"


def test_states_of_many_points_are_those_of_each(store: Store) -> None:
    ids = [f"{number:012x}" for number in range(6)]
    store.write_point(ids[0], dataset(ids[0]))
    store.write_checkpoint(ids[1], checkpoint())
    store.error_path(ids[2]).write_text('{"error": "x"}', encoding="utf-8")
    claim = store.claim(ids[3])
    assert claim is not None
    with claim:
        assert store.statuses(ids) == [store.status(point_id) for point_id in ids]
        assert [s.state for s in store.statuses(ids)] == ["done", "missing", "failed", "running"] + 2 * [
            "missing"
        ]
    assert Store(store.root / "nowhere").statuses(ids[:1])[0].state == "missing"
