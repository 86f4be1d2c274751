"""A sweep: the queue of points, what became of each, and Ctrl-C. The same for every engine.

The parent alone handles signals: the first asks every worker to write a checkpoint and stop, the second ends
them at once.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from replicate.engine.base import Engine, Handle, Options, Report
from replicate.engine.eta import Eta
from replicate.engine.log import Log
from replicate.spec import Point, Study
from replicate.store import Store

POLL_SECONDS = 1.0  # how often points that another sweep holds are looked at again

Start = Callable[[Callable[[str], None]], Engine]
"""Starts an engine; the argument takes lines for people."""


@dataclass
class Outcome:
    """What a sweep did, point by point."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    fatal: str = ""


class _Signals:
    """First SIGINT or SIGTERM: finish the step and checkpoint. Second: stop at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self.received, self.told = say, 0, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            self.received += 1

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stop(self) -> bool:
        return self.received > 0

    @property
    def at_once(self) -> bool:
        return self.received > 1

    def pass_on(self, engine: Engine) -> None:
        """Tell people and the engine, once."""
        if self.stop and not self.told:
            self.told = True
            self._say(
                "stopping: every worker finishes its step and writes a checkpoint (once more: stop at once)"
            )
            engine.stop()


def sweep(
    study: Study,
    points: Sequence[Point],
    options: Options,
    start: Start,
    expected: Mapping[str, float | None] | None = None,
) -> Outcome:
    """Run `points`, in the caller's order (longest first wastes least), and return what became of each.

    Points that are already done are left alone, points that failed too unless `retry_failed`. Points that
    another sweep on the same folder is working on are waited for, and taken over if that sweep dies. `start`
    starts the engine, if there is anything to run. `expected`: planned seconds by point id, for the time
    left.
    """
    log = Log(0)
    store = Store.of(study, options.artifacts, warn=log.say)
    store.prepare()
    outcome = Outcome()
    queue: deque[Point] = deque()
    for point in points:
        error = store.read_error(point.id)
        if store.check_point(point.id):
            outcome.skipped.append(point.id)
        elif error is not None and not options.retry_failed:
            outcome.failed[point.id] = error
        else:
            store.clear_error(point.id)
            queue.append(point)
    log.close()
    if queue:
        _Sweep(study, queue, options, outcome, expected).run(start)
    return outcome


class _Sweep:
    """The state while it runs."""

    def __init__(
        self,
        study: Study,
        queue: deque[Point],
        options: Options,
        outcome: Outcome,
        expected: Mapping[str, float | None] | None,
    ) -> None:
        self.spec, self.queue, self.outcome = study.path, queue, outcome
        self.log = Log(len(queue))
        self.store = Store.of(study, options.artifacts, warn=self.log.say)
        self.eta = Eta(queue, expected)
        self.busy: list[Point] = []  # held by another sweep
        self.running: dict[Handle, Point] = {}

    def run(self, start: Start) -> None:
        signals = _Signals(self.log.say)
        with signals.handled():
            engine = start(self.log.say)
            try:
                while not (signals.at_once or self.outcome.fatal):
                    signals.pass_on(engine)
                    while self.queue and not signals.stop and engine.room() > 0:
                        point = self.queue.popleft()
                        self.running[engine.submit(self.spec, point.id)] = point
                    if self.running:
                        engine.wait(POLL_SECONDS)
                        self._collect()
                    elif signals.stop or not self.busy:
                        break
                    else:
                        time.sleep(POLL_SECONDS)
                    self._look_again()
            finally:
                self.outcome.interrupted = signals.stop
                engine.close()
                self.log.close()

    def _collect(self) -> None:
        for handle in [handle for handle in self.running if handle.report is not None]:
            point = self.running.pop(handle)
            assert handle.report is not None
            self._take(point, handle, handle.report)

    def _take(self, point: Point, handle: Handle, report: Report) -> None:
        for line in report.warnings:
            self.log.say(line)
        if report.kind == "done":
            self.outcome.done.append(point.id)
            spent = report.seconds if handle.started is None else time.monotonic() - handle.started
            self.eta.finished(point, report.seconds, spent)
            self._advance(report.text)
        elif report.kind == "skipped":
            self._skip(point)
        elif report.kind == "busy":
            if not self.busy:
                self.log.say(f"{point}: another sweep is working on it; waiting for it")
            self.busy.append(point)
        elif report.kind == "fatal":
            self.outcome.fatal = report.text
        elif report.kind != "stopped":
            if report.kind == "lost":
                self.store.write_error(point, report.text)
            self._fail(point, report.text)

    def _advance(self, line: str) -> None:
        now = time.monotonic()
        started = {point.id: now - h.started for h, point in self.running.items() if h.started is not None}
        self.log.advance(line, len(self.outcome.failed), self.eta.left(started))

    def _skip(self, point: Point) -> None:
        self.outcome.skipped.append(point.id)
        self.eta.gone(point)
        self._advance(f"{point}: finished by another sweep")

    def _fail(self, point: Point, text: str) -> None:
        self.outcome.failed[point.id] = text.splitlines()[0] if text else "unknown"
        self.eta.gone(point)
        self._advance(f"{point}: FAILED: {self.outcome.failed[point.id]}")

    def _look_again(self) -> None:
        """Points that another sweep held: done by now, failed, or free because it let go or died."""
        for point in [*self.busy]:
            if self.store.point_path(point.id).exists():
                self.busy.remove(point)
                self._skip(point)
            elif self.store.free(point.id):
                self.busy.remove(point)
                error = self.store.read_error(point.id)
                if error is not None:
                    self._fail(point, error)
                else:
                    self.queue.append(point)
