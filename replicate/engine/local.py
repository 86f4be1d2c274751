"""The local engine: a pool of worker processes on this machine.

Workers are spawned once and reused, so that a point costs no imports; each is limited to `threads` threads. A
worker that dies (killed, out of memory) costs its point a failure, not the sweep. Workers leave signals to
the parent, and end with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.synchronize import Event

from replicate.engine.base import Handle, Options, Report
from replicate.engine.task import run_task
from replicate.provenance import THREAD_VARIABLES

# -- the worker --------------------------------------------------------------------------------------


def _work(pipe: Connection, stop: Event, options: Options) -> None:
    """Run the points that arrive, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides; a terminal signals the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)  # started
    while True:
        try:
            spec, point_id = pipe.recv()
        except EOFError:
            return
        pipe.send(run_task(spec, point_id, options, stop.is_set))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on holding claims."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# -- the parent --------------------------------------------------------------------------------------


class _Worker:
    def __init__(self, context: SpawnContext, stop: Event, options: Options) -> None:
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work, args=(theirs, stop, options), name="replicate worker"
        )
        self.process.start()
        theirs.close()
        self.handle: Handle | None = None
        self.started = False

    def give(self, spec: str, point_id: str) -> Handle:
        self.handle = Handle(point_id, started=time.monotonic())
        with contextlib.suppress(OSError):  # it has just died: `hear` will say so
            self.pipe.send((spec, point_id))
        return self.handle

    def hear(self) -> None:
        """Take in the word that it has started, the report of the point at work, or the death of the process.

        A worker that raises before it has started (its main module cannot be imported anew) is like every
        other.
        """
        assert self.handle is not None
        try:
            if not self.pipe.poll():
                raise EOFError
            report = self.pipe.recv()
            if report is None:
                self.started = True
                return
            self.handle.report = report
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            text = f"its worker process ended ({name})" + (": out of memory?" if name == "SIGKILL" else "")
            self.handle.report = Report("lost", text)
            if code > 0 and not self.started:
                self.handle.report = Report("fatal", f"worker processes cannot start ({name})")
        self.handle = None

    def close(self) -> None:
        if self.handle is not None and self.process.is_alive():
            self.process.kill()  # a checkpoint from before this moment remains
        self.pipe.close()
        self.process.join()


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Thread variables for processes started inside, which read them when their libraries load."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class LocalEngine:
    """Up to `options.workers` processes, started as they are needed."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._workers: list[_Worker] = []

    def room(self) -> int:
        return self._options.workers - sum(worker.handle is not None for worker in self._workers)

    def submit(self, spec: str, point_id: str) -> Handle:
        for worker in self._workers:
            if worker.handle is None and worker.process.is_alive():
                return worker.give(spec, point_id)
        with limited_threads(self._options.threads):
            self._workers.append(_Worker(self._context, self._stop, self._options))
        return self._workers[-1].give(spec, point_id)

    def wait(self, seconds: float) -> None:
        active = [worker for worker in self._workers if worker.handle is not None]
        ready = wait([w.pipe for w in active] + [w.process.sentinel for w in active], seconds)
        for worker in active:
            if worker.pipe in ready or worker.process.sentinel in ready:
                worker.hear()
        for worker in [w for w in self._workers if w.handle is None and not w.process.is_alive()]:
            worker.close()
            self._workers.remove(worker)

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
