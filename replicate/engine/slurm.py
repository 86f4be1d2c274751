"""The Slurm engine: points in job arrays, through submitit.

A job runs several points one after the other. Before its time is over, or when it is preempted, Slurm signals
it: the point at work writes its checkpoint and the job is put back into the queue, where it goes on from
there. Files tell what is done; `squeue` tells which jobs are still there. Logs are in
artifacts/<study>/slurm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicate.engine.base import Handle, Options, Report, StopFile, requested
from replicate.engine.local import limited_threads
from replicate.engine.task import run_task, seconds_of
from replicate.spec import UserError
from replicate.store import Store

QUEUE_SECONDS = 15.0  # how often `squeue` is asked
MISSED = 2  # so often in a row without a job, and it has ended: its last file may take a moment to be seen
GRACE_SECONDS = 300.0  # after SIGTERM: Slurm ends (scancel) or requeues (preemption) the job within this
MAX_TIMEOUTS = 1000  # requeues of one job
ARRAY_SIZE = 1000  # Slurm's default limit; more points are shared out among so many jobs
# Parameters that submitit has under one name for every kind of cluster; the others are Slurm's own.
SHARED = {
    "cpus_per_task": int,
    "gpus_per_node": int,
    "mem_gb": float,
    "name": str,
    "nodes": int,
    "timeout_min": int,
}


@dataclass
class Batch:
    """Points of one job: what submitit stores, and stores anew when the job is requeued."""

    spec: str
    point_ids: Sequence[str]
    options: Options
    stop_file: str

    def __call__(self) -> dict[str, Report]:
        """Run the points in turn and report on each that was tried."""
        reports: dict[str, Report] = {}
        stop = requested(self.stop_file)
        with _caught() as (received, previous):
            for point_id in self.point_ids:
                report = run_task(self.spec, point_id, self.options, lambda: bool(received) or stop())
                reports[point_id] = report
                if received or report.kind in ("stopped", "fatal"):
                    break
            if signal.SIGTERM in received:  # what it means, Slurm will show
                deadline = time.monotonic() + GRACE_SECONDS
                while _requeue_signal() not in received and time.monotonic() < deadline:
                    time.sleep(0.1)
        if _requeue_signal() in received and not stop():
            previous[_requeue_signal()](_requeue_signal(), None)  # submitit: store this batch, requeue, exit
        if signal.SIGTERM in received:
            sys.exit(128 + signal.SIGTERM)
        return reports

    def checkpoint(self) -> Any:
        """What submitit runs in the requeued job: the same points; those that are done are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _requeue_signal() -> int:
    from submitit.core.job_environment import JobEnvironment

    return JobEnvironment._usr_sig()


@contextmanager
def _caught() -> Any:
    """(signals received so far, handlers before): a step is never interrupted, the trainer asks later."""
    received: list[int] = []
    numbers = (signal.SIGTERM, _requeue_signal())
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda caught, frame: received.append(caught))
    try:
        yield received, previous
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Job:
    """A submitted job and its points that have no report yet."""

    job: Any
    handles: dict[str, Handle]
    missed: int = 0  # how often in a row `squeue` did not know it

    @property
    def result(self) -> Path:
        """The file that submitit leaves when a job has returned or raised."""
        return self.job.paths.result_pickle


def parameters_of(pairs: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters from KEY=VALUE of the command line; Slurm's own get its prefix."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not (key and equals and text):
            raise UserError(f"--slurm {pair}: expected KEY=VALUE, for example partition=gpu timeout_min=240")
        try:
            value = SHARED.get(key, int if text.isdigit() else str)(text)
        except ValueError:
            raise UserError(f"--slurm {pair}: expected a number") from None
        parameters[key if key in (*SHARED, "cluster") else f"slurm_{key}"] = value
    return parameters


class SlurmEngine:
    """Submits every point at once, in arrays of jobs of `per_job` points, `options.workers` jobs at a time.

    `parameters`: submitit's; `cluster` = "local" runs the jobs here as processes, without Slurm.
    """

    def __init__(
        self,
        options: Options,
        store: Store,
        say: Callable[[str], None],
        *,
        parameters: Mapping[str, Any] | None = None,
        per_job: int = 1,
    ) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError(
                "--engine slurm: needs the package `submitit`; pip install 'nqs-scaling[slurm]'"
            ) from None
        given = dict(parameters or {})
        cluster = given.pop("cluster", "slurm")
        self._local, self._stopping = cluster == "local", False
        self._options = dataclasses.replace(options, artifacts=options.artifacts.resolve())
        self._store, self._say, self._per_job = store, say, per_job
        self._stop = StopFile(store.points.resolve())
        self._waiting: list[tuple[str, Handle]] = []  # submitted here, not yet to Slurm
        self._jobs: list[_Job] = []
        self._asked = 0.0
        self._folder = store.root.resolve() / "slurm"
        defaults = {
            "name": f"nqs-{store.root.name}",
            "cpus_per_task": options.threads,
            "timeout_min": 60,
            "slurm_array_parallelism": options.workers,
        }
        try:
            self._executor = submitit.AutoExecutor(
                self._folder, cluster=cluster, slurm_max_num_timeout=MAX_TIMEOUTS
            )
            self._executor.update_parameters(**{**defaults, **given})
        except (RuntimeError, ValueError, NameError, AssertionError) as error:
            raise UserError(f"--engine slurm: {str(error).splitlines()[0]}") from None

    def room(self) -> int:
        return 2**31  # Slurm has a queue

    def submit(self, spec: str, point_id: str) -> Handle:
        handle = Handle(point_id)
        self._waiting.append((str(Path(spec).resolve()), handle))
        return handle

    def wait(self, seconds: float) -> None:
        """Submits what came since the last time as one array, then looks around."""
        if self._waiting:
            self._submit_array()
        if not self._look():
            time.sleep(seconds)

    def _submit_array(self) -> None:
        """Points come longest first: dealt out in turns, jobs take about the same time."""
        from submitit.core.utils import FailedSubmissionError

        n_jobs = min(-(-len(self._waiting) // self._per_job), ARRAY_SIZE)
        hands = [self._waiting[first::n_jobs] for first in range(n_jobs)]
        self._waiting = []
        batches = [
            Batch(hand[0][0], [handle.point_id for _, handle in hand], self._options, str(self._stop.path))
            for hand in hands
        ]
        with limited_threads(self._options.threads):  # jobs inherit the environment
            try:
                jobs = self._executor.submit_array(batches)
            except (FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
                raise UserError(
                    f"--engine slurm: sbatch refused ({str(error).strip().splitlines()[-1]})"
                ) from None
        for job, hand in zip(jobs, hands, strict=True):
            self._jobs.append(_Job(job, {handle.point_id: handle for _, handle in hand}))
        self._say(
            f"{len(jobs)} jobs submitted ({self._executor.cluster} {jobs[0].job_id}); logs: {self._folder}"
        )

    def _look(self) -> bool:
        """Report on what has ended; whether anything has."""
        there, news = self._queued(), False
        for job in self._jobs:
            ended = job.result.exists() or self._gone(job, there)
            reports = self._returned(job) if ended else {}
            for point_id, handle in list(job.handles.items()):
                handle.report = self._stored(point_id) or reports.get(point_id)
                if handle.report is None and ended:
                    handle.report = self._unreported(job, point_id)
                if handle.report is not None:
                    del job.handles[point_id]
                    news = True
        self._jobs = [job for job in self._jobs if job.handles]
        return news

    def _stored(self, point_id: str) -> Report | None:
        """What the files say of a point."""
        from replicate.run import summarise

        if self._store.point_path(point_id).exists():
            data = self._store.read_point(point_id)
            if data is not None:
                return Report("done", summarise(data.attrs["title"], data), seconds_of(data))
        error = self._store.read_error(point_id)
        return None if error is None else Report("failed", error)

    def _queued(self) -> set[str] | None:
        """Ids of this user's jobs that have not ended, asked for now and then; None where not known."""
        now = time.monotonic()
        if self._local or now - self._asked < QUEUE_SECONDS:
            return None
        self._asked = now
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):  # a controller that is busy or being restarted
            return None
        return set(asked.stdout.split())

    def _gone(self, job: _Job, there: set[str] | None) -> bool:
        """Whether a job has ended without leaving a result (killed, cancelled, its node lost)."""
        if self._local:
            return bool(job.job.done())
        if there is not None:
            job.missed = 0 if job.job.job_id in there else job.missed + 1
        return job.missed >= MISSED

    def _returned(self, job: _Job) -> dict[str, Report]:
        """The job's own reports; if it failed outside its points, that for each of them."""
        if not job.result.exists():
            return {}
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return dict(job.job.result())
        except (FailedJobError, UncompletedJobError) as error:
            reason = str(error).strip().splitlines()[-1]
            return {
                point_id: Report(
                    "failed", f"its job {job.job.job_id} failed ({reason}); logs: {self._folder}"
                )
                for point_id in job.handles
            }

    def _unreported(self, job: _Job, point_id: str) -> Report:
        if self._stopping:
            return Report("stopped")
        name = f"its job {job.job.job_id}"
        if self._store.claim_path(point_id).exists():
            return Report("lost", f"{name} ended while it was at work (killed?); log: {job.job.paths.stderr}")
        return Report("failed", f"{name} ended before its turn (cancelled?); log: {job.job.paths.stderr}")

    def stop(self) -> None:
        self._stopping = True
        self._stop.request()
        self._cancel("--state=PENDING")

    def close(self) -> None:
        """Jobs that still run are cancelled: Slurm's SIGTERM leaves them time for a checkpoint."""
        if self._jobs:
            self._stop.request()
            self._cancel()
        else:
            self._stop.clear()

    def _cancel(self, *which: str) -> None:
        if self._local:
            for job in () if which else self._jobs:
                job.job.cancel(check=False)
        elif self._jobs:
            ids = [job.job.job_id for job in self._jobs]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", *which, *ids], capture_output=True, timeout=60, check=False)
