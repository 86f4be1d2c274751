"""Where results live: one immutable NetCDF per point, checkpoints, claims, errors.

    artifacts/<study>/points/<id>.nc           written once: temporary file, fsync, rename
    artifacts/<study>/points/<id>.ckpt         tensors and JSON, replaced atomically; gone when done
    artifacts/<study>/points/<id>.claim        who works on it; those of the dead are taken over
    artifacts/<study>/points/<id>.error.json   why it failed

A file that cannot be read is moved aside (`<name>.corrupt`), never deleted, and its point runs again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import json
import os
import platform
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from replicate.spec import Point, Study, UserError

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from replicate.trainer import Checkpoint

_File = TypeVar("_File", "xr.Dataset", "Stored")

HEARTBEAT_SECONDS = 15.0
FULL_BYTES = (
    2**16
)  # less than this left after a failed write: the disk is full, whatever the library calls it
LEFTOVER_SECONDS = 3600.0  # temporary files older than this belong to nobody
STALE_SECONDS = 300.0  # a claim of another machine without a heartbeat for this long is taken over...
WATCHED_SECONDS = 45.0  # ...once it has been seen without one for this long by a clock that never jumps


class StoreError(Exception):
    """The folder cannot do what is asked (full, read-only); one line with the path and the reason."""


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


@contextlib.contextmanager
def _reported(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or _is_full(path.parent)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise StoreError(f"{path}: cannot {doing} ({reason})") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, keep_equal: bool = False) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, durably and in one instant.

    `keep_equal`: leave a file of the same bytes as it is, with its time stamp.
    """
    temporary = _temporary(path)
    with _reported(path, "be written"):
        try:
            try:
                yield temporary
            except RuntimeError as error:  # how the writers of netCDF and torch report what the disk refuses
                raise OSError(errno.EIO, str(error).splitlines()[0]) from error
            if keep_equal and path.exists() and filecmp.cmp(temporary, path, shallow=False):
                return
            _fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)


def move_aside(path: Path) -> Path:
    """Rename an unreadable file so that it is kept but no longer in the way."""
    target = path.with_name(path.name + ".corrupt")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt{number}")
    with _reported(path, "be moved aside"):
        path.replace(target)
    return target


# Point files are small and a study has thousands: past xarray's reader and writer they take half the time.


def _save(data: xr.Dataset, path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w", format="NETCDF4") as file:
        file.setncatts(data.attrs)
        for name, size in data.sizes.items():
            file.createDimension(str(name), size)
        for name, variable in data.variables.items():
            # fletcher32: a flipped bit is found when the chunk is read, not believed
            packed = variable.ndim > 0
            made: Any = file.createVariable(
                str(name),
                variable.dtype,
                tuple(map(str, variable.dims)),
                fill_value=False,
                zlib=packed,
                complevel=4,
                fletcher32=packed,
            )
            made.setncatts(variable.attrs)
            made[...] = variable.values


def _load(path: Path) -> xr.Dataset:
    import netCDF4
    import xarray as xr

    with netCDF4.Dataset(path) as file:
        file.set_auto_maskandscale(False)
        variables = {}
        for name, variable in file.variables.items():
            attributes = {key: variable.getncattr(key) for key in variable.ncattrs() if key != "_FillValue"}
            variables[name] = (variable.dimensions, variable[...], attributes)
        return xr.Dataset(variables, attrs={key: file.getncattr(key) for key in file.ncattrs()})


@dataclass(frozen=True)
class Stored:
    """Some of what a point file holds, by name: variables as float64 (integers to 2^53 are exact), texts."""

    values: dict[str, np.ndarray]
    attrs: dict[str, str]


def _load_numbers(path: Path, variables: Iterable[str], attributes: Iterable[str]) -> Stored:
    """Past netCDF too, whose own bookkeeping takes most of the time: a NetCDF-4 file is an HDF5 file.

    Attributes that the file lacks are left out.
    """
    import h5py
    import numpy as np

    everything, double = h5py.h5s.ALL, h5py.h5t.NATIVE_DOUBLE
    with h5py.File(path, locking=False) as file:  # some file systems have no locks, and nobody writes here
        attrs = {}
        for name in {"point_id", *attributes}:
            if name in file.attrs:
                value = np.asarray(file.attrs[name]).item()  # a text that is not ASCII is an array of one
                attrs[name] = value.decode() if isinstance(value, bytes) else str(value)
        values = {}
        for name in variables:
            dataset = h5py.h5d.open(file.id, name.encode())
            values[name] = array = np.empty(dataset.shape)
            dataset.read(everything, everything, array, double)
        return Stored(values, attrs)


# -- claims ------------------------------------------------------------------------------------------


@cache
def _machine() -> str:
    """This machine since its last boot, and the container: process ids mean something only within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        boot += " " + Path("/proc/self/ns/pid").readlink().name
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}".strip()


def _process_start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (tells a reused process id), None if it is not alive."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc on this system: alive is all that can be known
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


class Claim:
    """An exclusive right to work on a point, kept alive by a heartbeat thread; a context manager."""

    def __init__(self, path: Path, content: str) -> None:
        self._path, self._content = path, content
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {path.stem}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(
                OSError
            ):  # a full or vanished disk is reported by whoever writes results
                os.utime(self._path)

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._path.read_text(encoding="utf-8") == self._content:  # still ours
                self._path.unlink()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# -- the store ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointStatus:
    """State of a point on disk: done, running, failed or missing, with a reason in words."""

    state: str
    reason: str = ""
    checkpoint: bool = False


class Store:
    """The files of one study. `warn` receives one line for everything found wrong and put right."""

    def __init__(self, root: Path, warn: Callable[[str], None] | None = None) -> None:
        self.root = root
        self.points = root / "points"
        self.warn = warn or (lambda line: None)
        self._watched: dict[Path, tuple[int, float]] = {}  # foreign claims: time stamp, since when unchanged

    @classmethod
    def of(cls, study: Study, artifacts: Path, warn: Callable[[str], None] | None = None) -> Store:
        """The store of a study: artifacts/<study>."""
        return cls(artifacts / study.name, warn)

    def prepare(self) -> None:
        """Make the folders and see that they can be written; raises StoreError."""
        with _reported(self.points, "be written"):
            self.points.mkdir(parents=True, exist_ok=True)
            probe = _temporary(self.points / "probe")
            probe.write_text("", encoding="utf-8")
            now = probe.stat().st_mtime
            probe.unlink()
            for left in self.points.glob(".*.tmp"):  # of writers that were killed in the act
                with contextlib.suppress(OSError):
                    if now - left.stat().st_mtime > LEFTOVER_SECONDS:
                        left.unlink()

    def point_path(self, point_id: str) -> Path:
        return self.points / f"{point_id}.nc"

    def checkpoint_path(self, point_id: str) -> Path:
        return self.points / f"{point_id}.ckpt"

    def error_path(self, point_id: str) -> Path:
        return self.points / f"{point_id}.error.json"

    def claim_path(self, point_id: str) -> Path:
        return self.points / f"{point_id}.claim"

    # -- point files

    def write_point(self, point_id: str, data: xr.Dataset) -> None:
        """Write a finished point once (a file already there is kept) and remove its checkpoint and error."""
        path = self.point_path(point_id)
        if not path.exists():
            with replacing(path) as temporary:
                _save(data, temporary)
        with contextlib.suppress(OSError):
            self.error_path(point_id).unlink(missing_ok=True)
            self.checkpoint_path(point_id).unlink(missing_ok=True)

    def read_point(self, point_id: str) -> xr.Dataset | None:
        """The stored point in memory; None if it is missing, or unreadable and therefore moved aside."""
        return self._read(point_id, _load)

    def read_numbers(
        self, point_id: str, variables: Iterable[str], attributes: Iterable[str]
    ) -> Stored | None:
        """`read_point` for those who read thousands and know what they want."""
        return self._read(point_id, lambda path: _load_numbers(path, variables, attributes))

    def _read(self, point_id: str, load: Callable[[Path], _File]) -> _File | None:
        path = self.point_path(point_id)
        if not path.exists():
            return None
        try:
            data = load(path)
            if data.attrs["point_id"] != point_id:
                raise ValueError(f"it holds point {data.attrs['point_id']}")
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            if isinstance(error, PermissionError):
                raise StoreError(f"{path}: cannot be read (permission denied)") from error
            self._reject(path, error)
            return None
        return data

    def check_point(self, point_id: str) -> bool:
        """Whether a point is done and its file opens whole (cheap: HDF5 knows its own length)."""
        return self.read_numbers(point_id, (), ()) is not None

    def _reject(self, path: Path, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kept = move_aside(path)
        self.warn(f"{path}: unreadable ({reason}); kept as {kept.name}, its point runs again")

    # -- checkpoints

    def write_checkpoint(self, point_id: str, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint of a point in one instant. Tensors and one JSON string, no other objects."""
        import torch

        meta = {"point_id": point_id, "step": checkpoint.step, "meta": checkpoint.meta}
        with replacing(self.checkpoint_path(point_id)) as temporary:
            torch.save({"tensors": checkpoint.tensors, "json": json.dumps(meta)}, temporary)

    def read_checkpoint(self, point_id: str) -> Checkpoint | None:
        """The checkpoint of this very point, or None; an unreadable or foreign one is moved aside."""
        import torch

        from replicate.trainer import Checkpoint

        path = self.checkpoint_path(point_id)
        if not path.exists():
            return None
        try:
            raw = torch.load(path, map_location="cpu", weights_only=True)
            meta = json.loads(raw["json"])
            if meta["point_id"] != point_id:
                raise ValueError(f"it belongs to point {meta['point_id']}")
            return Checkpoint(step=meta["step"], tensors=raw["tensors"], meta=meta["meta"])
        except PermissionError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        # A damaged archive surfaces as almost any exception of zipfile, the unpickler or torch.
        except Exception as error:
            self._reject(path, error)
            return None

    # -- claims

    def claim(self, point_id: str) -> Claim | None:
        """The exclusive right to run a point, or None if somebody has it who may be alive (see `free`)."""
        path = self.claim_path(point_id)
        content = json.dumps(
            {
                "machine": _machine(),
                "pid": os.getpid(),
                "start": _process_start(os.getpid()),
                "t": time.time_ns(),
            }
        )
        with _reported(path, "be written"):
            self.points.mkdir(parents=True, exist_ok=True)
            with (self.points / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two sweeps must not both take over one stale claim
                if path.exists() and self._owner_lives(path) is not False:
                    return None
                temporary = _temporary(path)
                try:
                    temporary.write_text(content, encoding="utf-8")
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        return Claim(path, content)

    def free(self, point_id: str) -> bool:
        """Whether nobody holds a point, after taking the claim of the dead away. To be asked again and again.

        The claim of another machine has to be watched: a clock that jumped forward makes a living one look
        old, one that jumped back makes a dead one look new for ever.
        """
        path = self.claim_path(point_id)
        with _reported(path, "be removed"):
            if not path.exists():
                return True
            with (self.points / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._owner_lives(path) is None and self._watched_to_death(path):
                    path.unlink(missing_ok=True)
                return not (path.exists() and self._owner_lives(path) is not False)

    def _watched_to_death(self, path: Path) -> bool:
        """Whether an unchanged claim was seen here for long: less is enough if it is old already."""
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        known, since = self._watched.get(path, (None, 0.0))
        if known != touched:
            since = time.monotonic()
            self._watched[path] = (touched, since)
        old = self._filesystem_time() - touched / 1e9 >= STALE_SECONDS
        return time.monotonic() - since >= (WATCHED_SECONDS if old else STALE_SECONDS)

    @staticmethod
    def _owner_lives(path: Path) -> bool | None:
        """Whether the owner of a claim is alive, None if nobody here can know (another machine; torn)."""
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            if owner["machine"] == _machine():
                return _process_start(owner["pid"]) == owner["start"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            return None
        return None

    def _looks_alive(self, path: Path) -> bool:
        """At one look: the owner is alive, or its heartbeat is recent."""
        lives = self._owner_lives(path)
        try:
            return (
                abs(self._filesystem_time() - path.stat().st_mtime) < STALE_SECONDS
                if lives is None
                else lives
            )
        except FileNotFoundError:
            return False

    def _filesystem_time(self) -> float:
        """Now, by the clock that stamps the claims: clocks of two machines differ, and clocks jump."""
        probe = _temporary(self.points / "clock")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    # -- errors and status

    def write_error(self, point: Point, error: BaseException | str) -> None:
        """Record why a point failed; best effort on a disk that may be the reason."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        trace = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
        record = {"id": point.id, "point": str(point), "error": text, "traceback": trace}
        with contextlib.suppress(StoreError), replacing(self.error_path(point.id)) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def read_error(self, point_id: str) -> str | None:
        """The reason a point failed, in one line, or None."""
        try:
            record = json.loads(self.error_path(point_id).read_text(encoding="utf-8"))
            return str(record["error"]).splitlines()[0]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, IndexError, OSError):
            return "unknown (the error file is unreadable)"

    def clear_error(self, point_id: str) -> None:
        with _reported(self.error_path(point_id), "be removed"):
            self.error_path(point_id).unlink(missing_ok=True)

    def statuses(self, point_ids: Iterable[str]) -> list[PointStatus]:
        """`status` of many points, with one look at the folder."""
        try:
            names = {path.name for path in self.points.iterdir()}
        except FileNotFoundError:
            names = set()
        done, missing = PointStatus("done"), PointStatus("missing")
        return [
            done
            if f"{point_id}.nc" in names
            else self.status(point_id)
            if not names.isdisjoint(f"{point_id}.{kind}" for kind in ("ckpt", "claim", "error.json"))
            else missing
            for point_id in point_ids
        ]

    def status(self, point_id: str) -> PointStatus:
        """What the files say; reads no result."""
        if self.point_path(point_id).exists():
            return PointStatus("done")
        checkpoint = self.checkpoint_path(point_id).exists()
        claim = self.claim_path(point_id)
        if claim.exists() and self._looks_alive(claim):
            return PointStatus("running", checkpoint=checkpoint)
        error = self.read_error(point_id)
        if error is not None:
            return PointStatus("failed", error, checkpoint)
        return PointStatus(
            "missing", "interrupted, goes on from its checkpoint" if checkpoint else "", checkpoint
        )


def require_folder(path: Path, what: str) -> None:
    """A UserError if a folder that a command reads is not there."""
    if not path.is_dir():
        raise UserError(f"{path}: no {what} here; run the study first (`python -m replicate run SPEC`)")
