"""The Dask engine: points as tasks of a cluster, an existing one (`--address`) or workers on this machine.

The scheduler keeps the queue, in order; a point whose worker is lost goes to another worker, which takes over
its checkpoint. Workers see the same folder under the same path and have this package installed. One point
takes one thread of a worker: start workers with `--nthreads 1`, since points in one process share its memory
record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from replicate.engine.base import Handle, Options, Report, StopFile, requested
from replicate.engine.local import limited_threads
from replicate.engine.task import run_task
from replicate.spec import UserError
from replicate.store import Store

CONNECT_SECONDS = 10.0
# A terminal signals the whole process group: workers leave that to the sweep, as those of the local engine
# do.
IGNORE_SIGNALS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def _run(spec: str, point_id: str, options: Options, stop_file: str) -> Report:
    """The task, on a worker."""
    return run_task(spec, point_id, options, requested(stop_file))


class DaskEngine:
    """Submits every point at once. `resources` of a task, for example {"GPU": 1}: workers declare theirs."""

    def __init__(
        self,
        options: Options,
        store: Store,
        say: Callable[[str], None],
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        try:
            from distributed import Client, LocalCluster
        except ModuleNotFoundError:
            raise UserError(
                "--engine dask: needs the package `distributed`; pip install 'nqs-scaling[dask]'"
            ) from None

        self._options = dataclasses.replace(options, artifacts=options.artifacts.resolve())
        self._resources = dict(resources or {})
        self._stop = StopFile(store.points.resolve())
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()  # futures, from the client's thread
        self._handles: dict[Any, tuple[Any, Handle]] = {}  # by key
        self._sweep, self._cluster = uuid.uuid4().hex[:8], None
        if address is None:
            with limited_threads(options.threads):
                self._cluster = LocalCluster(
                    n_workers=options.workers,
                    threads_per_worker=1,
                    dashboard_address=None,
                    resources=self._resources or None,
                    memory_limit=0,  # a point's memory is its spec's business; Dask would restart the worker
                    preload=[IGNORE_SIGNALS],
                )
        try:
            self._client = Client(self._cluster or address, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise UserError(f"--address {address}: no Dask scheduler answers there ({error})") from None
        if address is not None and not self._client.nthreads():
            say(f"{address}: no workers yet; points wait in its queue")

    def room(self) -> int:
        return 2**31  # the scheduler has a queue

    def submit(self, spec: str, point_id: str) -> Handle:
        handle = Handle(point_id)
        number = len(self._handles)
        future = self._client.submit(
            _run,
            str(Path(spec).resolve()),
            point_id,
            self._options,
            str(self._stop.path),
            key=(
                f"{point_id}-{self._sweep}",
                number,
            ),  # never an old result: the file says whether it is done
            priority=-number,
            pure=False,
            resources=self._resources or None,
        )
        self._handles[future.key] = (future, handle)
        future.add_done_callback(self._ended.put)
        return handle

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._take(self._ended.get(timeout=seconds))
            while True:
                self._take(self._ended.get_nowait())

    def _take(self, future: Any) -> None:
        _, handle = self._handles[future.key]
        if handle.report is None:
            handle.report = _report(future)
        future.release()

    def stop(self) -> None:
        self._stop.request()
        at_work = {key for keys in self._client.processing().values() for key in keys}
        for key, (future, handle) in self._handles.items():
            if handle.report is None and key not in at_work:  # it might wait for a worker for ever
                handle.report = Report("stopped")
                future.cancel()

    def close(self) -> None:
        """Tasks at work on somebody else's cluster go on to their next look at the stop file."""
        left = [future for future, handle in self._handles.values() if handle.report is None]
        if left:
            self._stop.request()
            self._client.cancel(left, force=True)
        else:
            self._stop.clear()
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()
            self._stop.clear()


def resources_of(pairs: Sequence[str]) -> dict[str, float]:
    """Resources of a task from NAME=AMOUNT of the command line."""
    resources = {}
    for pair in pairs:
        name, _, amount = pair.partition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            raise UserError(f"--resources {pair}: expected NAME=AMOUNT, for example GPU=1") from None
    return resources


def _report(future: Any) -> Report:
    """The task's own report, or what kept it from making one."""
    from distributed.scheduler import KilledWorker

    if future.status == "finished":
        return future.result()
    if future.cancelled():
        return Report(
            "failed", "given up by the Dask scheduler (cancelled, or the connection to it was lost)"
        )
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Report("lost", f"its Dask worker died, as did those that tried after it: {error}")
    # The task itself catches what a point can raise, so this is about the place: no such package, another
    # version.
    return Report("fatal", f"the Dask workers cannot run points ({type(error).__name__}: {error})")
