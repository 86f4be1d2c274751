"""One point at a time on several processes that torchrun, or another launcher, has started.

    torchrun --nproc-per-node K -m replicate run SPEC --only ID

The first rank is the sweep: it alone takes claims, hears signals, writes files and talks; its points run in a
thread, so that neither a signal nor another rank's last words wait for a step. The other ranks train along.
An error on any rank ends the run: after it the ranks are no longer at the same place.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from replicate.engine.base import Handle, Options, Report
from replicate.engine.sweep import Outcome, sweep
from replicate.engine.task import prepare, run_task
from replicate.provenance import available_cores
from replicate.spec import Point, Study, UserError
from replicate.store import Store

if TYPE_CHECKING:
    import xarray as xr

    from replicate.ranks import Group

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_SECONDS = 3.0  # for the first rank's own step to notice that another rank has failed


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER)


def sweep_on_ranks(
    study: Study, points: Sequence[Point], options: Options, expected: Mapping[str, float | None]
) -> Outcome | None:
    """`sweep` on the first rank; the others help and return None, or exit with 1 if a rank is lost."""
    from replicate import ranks

    cores, here = available_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if here * options.threads > cores:
        raise UserError(
            f"{here} ranks here with --threads {options.threads}: more than this machine's {cores} cores; "
            "lower one of them"
        )
    device = prepare(options)
    if device == "cuda":
        import torch

        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"--device cuda: local rank {local}, but this machine has {gpus} GPUs; lower K")
    if os.environ["RANK"] != "0":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the first rank decides; a launcher signals all
    group = ranks.join(device)
    if group.first:
        engine = RanksEngine(options, group)
        try:
            return sweep(study, points, options, lambda say: engine, expected)
        finally:
            engine.close()
    _serve(group, device, Store.of(study, options.artifacts))
    return None


def _serve(group: Group, device: str, store: Store) -> None:
    """Train along with the first rank until it has no more points."""
    from replicate.ranks import RankLostError, leave
    from replicate.run import run_point

    try:
        while True:
            point: Point | None = group.share(lambda: None)
            if point is None:
                break
            run_point(point, store, device=device, group=group)
    except RankLostError:  # the first rank tells
        os._exit(1)
    except Exception as error:
        group.fail(error)
        os._exit(1)  # at once: only then do the others, who wait for this rank, notice
    leave()


class RanksEngine:
    """The first rank's: one point at a time, in a thread."""

    def __init__(self, options: Options, group: Group) -> None:
        self._options, self._group = options, group
        self._stop = threading.Event()
        self._handle: Handle | None = None
        self._thread: threading.Thread | None = None
        self._parted = self._closed = False

    def room(self) -> int:
        return int(self._handle is None)

    def submit(self, spec: str, point_id: str) -> Handle:
        self._handle = handle = Handle(point_id, started=time.monotonic())
        if self._parted:
            handle.report = Report("fatal", "the ranks have parted after that error; start them again")
            return handle

        def work() -> None:
            report = run_task(spec, point_id, self._options, self._stop.is_set, self._train)
            handle.report = handle.report or report

        self._thread = threading.Thread(target=work, name=f"point {point_id}", daemon=True)
        self._thread.start()
        return handle

    def _train(self, point: Point, store: Store, **how: Any) -> xr.Dataset | None:
        from replicate.run import run_point

        self._group.share(lambda: point)  # claimed: now the others may begin
        return run_point(point, store, group=self._group, **how)

    def wait(self, seconds: float) -> None:
        handle, thread = self._handle, self._thread
        if handle is None:
            return
        if handle.report is None and thread is not None:
            thread.join(seconds)
            failure = "" if handle.report else self._group.failure()
            if failure:
                thread.join(PATIENCE_SECONDS)
                handle.report = handle.report or Report("lost", failure)
        if handle.report is not None:
            self._parted |= handle.report.kind in ("failed", "lost", "fatal")
            self._handle = None

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """Dismiss the other ranks; after an error or in the middle of a point they notice this one's end."""
        if self._closed:
            return
        self._closed = True
        if not self._parted and self._handle is None:
            from replicate.ranks import leave

            self._group.share(lambda: None)
            leave()
