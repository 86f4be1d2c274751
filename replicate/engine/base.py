"""The protocol of engines: `submit(spec, point id) -> handle`, two strings in, a point file out.

Points, specs and results meet in one folder that the sweep and its workers share; nothing but the two strings
and one line of report travels. Whoever trains a point holds its claim, so it does not matter who else is at
work.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

STOP_SECONDS = 0.5  # how often a worker elsewhere looks whether it should stop


@dataclass(frozen=True)
class Options:
    """How to run: points at a time, threads of each, its device, and where results go."""

    workers: int
    threads: int = 1
    device: str = "auto"
    artifacts: Path = Path("artifacts")
    retry_failed: bool = False


@dataclass(frozen=True)
class Report:
    """What became of a point, in the words of whoever tried it.

    `kind`: done; skipped (it was done already); busy (another sweep holds it); stopped (asked to, with a
    checkpoint); failed (`text` says why, the error file holds the trace unless the folder was at fault); lost
    (its process died); fatal (every other point would fail alike). `seconds`: the whole training of a done
    point.
    """

    kind: str
    text: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class Handle:
    """A submitted point. `started`: time.monotonic() of its beginning where the engine knows it."""

    point_id: str
    started: float | None = None
    report: Report | None = None


class Engine(Protocol):
    """Runs points somewhere."""

    def room(self) -> int:
        """How many more points it takes now; an engine with a queue of its own takes all."""

    def submit(self, spec: str, point_id: str) -> Handle:
        """Have a point of the spec file run; returns at once."""

    def wait(self, seconds: float) -> None:
        """Fill in the reports of handles; returns when one arrived, after `seconds` at the latest."""

    def stop(self) -> None:
        """Ask every point for a checkpoint and its end; reports go on arriving."""

    def close(self) -> None:
        """End what still runs at once and let go of everything."""


class StopFile:
    """A request to stop that reaches workers on other machines: a file in the folder that all share."""

    def __init__(self, points: Path) -> None:
        self.path = points / f".stop.{uuid.uuid4().hex}.tmp"  # a forgotten one is cleared as any leftover

    def request(self) -> None:
        with contextlib.suppress(OSError):  # a full or vanished disk ends the points anyway
            self.path.touch()

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def requested(path: str) -> Callable[[], bool]:
    """Whether the stop file `path` is there, looked up every STOP_SECONDS: a step may be shorter."""
    looked, found = -STOP_SECONDS, False

    def check() -> bool:
        nonlocal looked, found
        now = time.monotonic()
        if not found and now - looked >= STOP_SECONDS:
            looked, found = now, os.path.exists(path)  # noqa: PTH110 (a third of the time of Path.exists)
        return found

    return check
