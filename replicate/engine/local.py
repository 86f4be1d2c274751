"""The local engine: a pool of worker processes on this machine.

Workers are spawned once and reused, so that a point costs no imports; each is limited to `threads` threads. A
worker that dies (killed, out of memory) costs its point a failure, not the sweep. The parent alone handles
signals: the first asks every worker to write a checkpoint and stop, the second ends them at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from replicate.provenance import THREAD_VARIABLES
from replicate.spec import Point, Study, UserError, load_study
from replicate.store import Store, StoreError

POLL_SECONDS = 1.0  # how often points that another sweep holds are looked at again


@dataclass(frozen=True)
class Options:
    """How to run: processes, threads in each, device of each, and where results go."""

    workers: int
    threads: int = 1
    device: str = "auto"
    artifacts: Path = Path("artifacts")
    retry_failed: bool = False


@dataclass
class Outcome:
    """What a sweep did, point by point."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    fatal: str = ""


# -- the worker --------------------------------------------------------------------------------------


def _work(pipe: Connection, stop: Event, spec: str, options: Options) -> None:
    """Run the points whose ids arrive, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides; a terminal signals the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()

    try:
        import torch

        from replicate.run import run_point, summarise

        torch.set_num_threads(options.threads)
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; allowed auto, cpu")
        study = load_study(spec)
    except Exception as error:  # every worker would fail alike: end the sweep, not each point
        pipe.send(
            ("fatal", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        )
        return
    cache = options.artifacts / ".molecules"
    store = Store.of(study, options.artifacts, warn=lambda line: pipe.send(("warn", line)))
    while True:
        try:
            point_id = pipe.recv()
        except EOFError:
            return
        point = study.by_id.get(point_id)
        if point is None:
            pipe.send(("failed", f"{spec}: has no point {point_id} any more (edited while it ran?)"))
            continue
        try:
            claim = store.claim(point_id)
            if claim is None:
                pipe.send(("busy", ""))
                continue
            with claim:
                if store.point_path(point_id).exists():  # finished by another sweep a moment ago
                    pipe.send(("skipped", ""))
                    continue
                data = run_point(
                    point, store, device=device, checkpoint=study.checkpoint, cache=cache, stop=stop.is_set
                )
            pipe.send(("stopped", "") if data is None else ("done", summarise(point, data)))
        except StoreError as error:  # the disk's failure, not the point's: the next sweep tries it again
            pipe.send(("failed", str(error)))
        # Whatever a point raises is its result; the sweep goes on with the next one.
        except Exception as error:
            store.write_error(point, error)
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on holding claims."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# -- the parent --------------------------------------------------------------------------------------


class _Worker:
    def __init__(self, context: SpawnContext, stop: Event, spec: str, options: Options) -> None:
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work, args=(theirs, stop, spec, options), name="replicate worker"
        )
        self.process.start()
        theirs.close()
        self.point: Point | None = None

    def give(self, point: Point) -> None:
        self.point = point
        self.pipe.send(point.id)

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


@contextmanager
def _limited_threads(threads: int) -> Iterator[None]:
    """Thread variables for the workers, which read them when their libraries load."""
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


@contextmanager
def _signals(stop: Event, say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """First SIGINT or SIGTERM: finish the step and checkpoint. Second: stop at once."""
    received = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal received
        received += 1
        if received == 1:
            stop.set()
            say("stopping: every worker finishes its step and writes a checkpoint (once more: stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received > 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Progress for people: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._count = total, 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="point", dynamic_ncols=True)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def advance(self, line: str, failures: int) -> None:
        self._count += 1
        self.say(f"[{self._count}/{self._total}] {line}")
        if self._bar is not None:
            self._bar.set_postfix(failed=failures, refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def sweep(study: Study, points: Sequence[Point], options: Options) -> Outcome:
    """Run `points`, in the caller's order (longest first wastes least), and return what became of each.

    Points that are already done are left alone, points that failed too unless `retry_failed`. Points that
    another sweep on the same folder is working on are waited for, and taken over if that sweep dies.
    """
    log = Log(len(points))
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
    log = Log(len(queue))
    if queue:
        _run_pool(study, queue, options, outcome, log)
    log.close()
    return outcome


def _run_pool(study: Study, queue: deque[Point], options: Options, outcome: Outcome, log: Log) -> None:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    store = Store.of(study, options.artifacts, warn=log.say)
    busy: list[Point] = []  # held by another sweep
    workers: list[_Worker] = []
    with _limited_threads(options.threads), _signals(stop, log.say) as at_once:
        try:
            workers = [
                _Worker(context, stop, study.path, options) for _ in range(min(options.workers, len(queue)))
            ]
            while True:
                for worker in workers:
                    if worker.point is None and queue and not stop.is_set():
                        worker.give(queue.popleft())
                active = [worker for worker in workers if worker.point is not None]
                if not active:
                    if stop.is_set() or not busy:
                        break
                    time.sleep(POLL_SECONDS)
                    queue.extend(busy)
                    busy.clear()
                    continue
                if at_once() or outcome.fatal:
                    break
                ready = wait([w.pipe for w in active] + [w.process.sentinel for w in active], POLL_SECONDS)
                for worker in active:
                    if worker.pipe in ready or worker.process.sentinel in ready:
                        _hear(worker, outcome, busy, store, log)
                workers = [
                    w
                    if w.process.is_alive() or stop.is_set()
                    else _Worker(context, stop, study.path, options)
                    for w in workers
                ]
        finally:
            outcome.interrupted = stop.is_set()
            for worker in workers:
                if worker.point is not None and worker.process.is_alive():
                    worker.process.kill()  # a checkpoint from before this moment remains
                worker.close()


def _hear(worker: _Worker, outcome: Outcome, busy: list[Point], store: Store, log: Log) -> None:
    """Take in one message of a worker, or its death."""
    point = worker.point
    assert point is not None
    try:
        if not worker.pipe.poll():
            raise EOFError
        kind, text = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        text = f"its worker process ended ({name})" + (": out of memory?" if name == "SIGKILL" else "")
        store.write_error(point, text)
        kind = "failed"
    if kind == "warn":
        log.say(text)
        return
    worker.point = None
    if kind == "fatal":
        outcome.fatal = text
    elif kind == "done":
        outcome.done.append(point.id)
        log.advance(text, len(outcome.failed))
    elif kind == "skipped":
        outcome.skipped.append(point.id)
        log.advance(f"{point}: finished by another sweep", len(outcome.failed))
    elif kind == "failed":
        outcome.failed[point.id] = text.splitlines()[0] if text else "unknown"
        log.advance(f"{point}: FAILED: {outcome.failed[point.id]}", len(outcome.failed))
    elif kind == "busy":
        if not busy:
            log.say(f"{point}: another sweep is working on it; waiting for it at the end")
        busy.append(point)
