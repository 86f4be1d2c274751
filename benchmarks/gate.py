"""The regression gate: exact counts against a committed file, times against an earlier commit.

    python -m replicate bench gate [--quick] [--base REV] [--update]

Counts (every track_ benchmark of the quick subset) must equal benchmarks/expected.json. Times are compared
on this machine, now: the base commit in a git worktree and this checkout as it is run the same benchmarks
(this checkout's) in turns, A B A B, one thread; the ratio of the best times decides, and a bad one is
measured again before it counts. Both clocks must agree that nothing is slower: a busy machine disturbs the
wall clock, CPU time does not see waiting. `asv compare` would not do: it exits 0 on regressions.

Exit status: 0 passed, 3 regression, 4 the gate itself or a benchmark is broken (2: bad arguments).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, REGRESSION, BROKEN = 0, 3, 4
ROOT = Path(__file__).resolve().parents[1]
FACTOR = 1.5  # slower than this, twice, is a regression
CLEAR, CLEAR_ROUNDS = 1.2, 3  # a ratio below this after so many rounds needs no more of them
REPLY_SECONDS = 300.0  # a benchmark that takes longer hangs
API_CHANGES = {"ImportError", "ModuleNotFoundError", "AttributeError", "TypeError", "KeyError"}


class Broken(Exception):
    """The gate cannot tell: git, a worker or a benchmark failed."""


@dataclass(frozen=True)
class Effort:
    """How long to time: rounds of A and B, and seconds of calls in each."""

    rounds: int
    seconds: float


QUICK, THOROUGH = Effort(5, 0.04), Effort(10, 0.3)


@dataclass
class Verdict:
    """Lines to print, by what they mean."""

    regressions: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        if self.broken:
            return BROKEN
        return REGRESSION if self.regressions else PASSED


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# -- git ---------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> str:
    """Output of a git command; Broken if it fails."""
    # A hook's GIT_DIR and the like would point git at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise Broken(f"git: {error}") from None
    if done.returncode:
        raise Broken(f"git {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout.strip()


def commit_of(root: Path, revision: str) -> str | None:
    """Full hash, or None if there is no such commit."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", revision + "^{commit}")
    except Broken:
        return None


def default_base(root: Path) -> str | None:
    """Where this branch left main; on main itself HEAD if the checkout differs from it, else its parent."""
    head = commit_of(root, "HEAD")
    if head is None:
        raise Broken("git: not a repository, or one without commits")
    for landed in ("origin/main", "origin/HEAD", "main"):
        if commit_of(root, landed):
            try:
                fork = git(root, "merge-base", "HEAD", landed)
            except Broken:
                continue  # unrelated, or cut off by a shallow clone
            if fork != head:
                return fork
    if git(root, "status", "--porcelain", "--", "replicate"):
        return head
    return commit_of(root, "HEAD~1")


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """The commit in a temporary folder, with this checkout's benchmarks."""
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as folder:
        path = Path(folder) / "base"
        git(root, "worktree", "add", "--quiet", "--detach", str(path), commit)
        try:
            yield path
        finally:
            git(root, "worktree", "remove", "--force", str(path))


# -- workers -----------------------------------------------------------------------------------------


class Worker:
    """A process that runs benchmarks on the package of `tree`."""

    def __init__(self, tree: Path) -> None:
        # Molecules are the same for base and head: both keep them in this checkout.
        molecules = os.environ.get("NQS_BENCH_MOLECULES", str(ROOT / ".asv" / "molecules"))
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "PYTHONPATH": str(tree),
            "NQS_BENCH_MOLECULES": molecules,
        }
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.about = self.ask(do="list")
        package = Path(self.about["package"]).resolve()
        if not package.is_relative_to(tree.resolve()):
            raise Broken(f"the worker for {tree} runs another package: {package}")

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request; Broken if the process ends or hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watchdog = threading.Timer(REPLY_SECONDS, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            watchdog.cancel()
        if not reply:
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise Broken(
                f"{request.get('id', 'the worker')}: process ended ({self.process.returncode}): {last}"
            )
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


# -- counts ------------------------------------------------------------------------------------------


def count(worker: Worker, names: Sequence[str], verdict: Verdict) -> dict[str, int]:
    """Values of the track_ benchmarks; those that raise go to `verdict`."""
    found = {}
    for name in names:
        reply = worker.ask(do="track", id=name)
        if "error" in reply:
            verdict.broken.append(f"{name}: {reply['error']}")
        else:
            found[name] = reply["value"]
    return found


def compare_counts(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """One line per value that is not the expected one."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        old, new = expected.get(name, "nothing"), found.get(name, "nothing")
        if old != new:
            lines.append(f"count {name}: expected {old}, found {new}")
    return lines


def read_expected(path: Path) -> dict[str, Any]:
    """The expectation file: {"versions": ..., "counts": {id: value}}."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"versions": dict(stored["versions"]), "counts": dict(stored["counts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Broken(f"{path}: {type(error).__name__}: {error}") from None


def gate_counts(worker: Worker, only: re.Pattern[str], stored: dict[str, Any], verdict: Verdict) -> None:
    """Compare with what `read_expected` gave."""
    names = [n for n, kind in worker.about["benchmarks"].items() if kind == "track" and only.search(n)]
    found = count(worker, names, verdict)
    raised = set(names) - found.keys()
    expected = {n: v for n, v in stored["counts"].items() if only.search(n) and n not in raised}
    lines = compare_counts(expected, found)
    verdict.regressions += lines
    if lines and stored["versions"] != worker.about["versions"]:
        verdict.notes.append(f"expected with {stored['versions']}, found with {worker.about['versions']}")
    say(f"counts: {len(found) - len(lines)} of {len(names)} as expected")


def update_counts(worker: Worker, only: re.Pattern[str], expected_path: Path, verdict: Verdict) -> None:
    """Write the expectation file, saying what changes."""
    names = [n for n, kind in worker.about["benchmarks"].items() if kind == "track"]
    old = read_expected(expected_path)["counts"] if expected_path.exists() else {}
    fresh = count(worker, [n for n in names if only.search(n)], verdict)
    if verdict.broken:
        return
    counts = {n: old[n] for n in names if n in old and not only.search(n)} | fresh
    for line in compare_counts(old, counts) if old else ():
        say(line)
    text = json.dumps({"versions": worker.about["versions"], "counts": counts}, indent=1, sort_keys=True)
    expected_path.write_text(text + "\n", encoding="utf-8")
    say(f"{expected_path}: {len(counts)} counts")


# -- times -------------------------------------------------------------------------------------------


@dataclass
class Ratio:
    """Best times so far, seconds, by whose they are and which clock."""

    best: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, whose: str, reply: Mapping[str, float]) -> None:
        for clock in ("wall", "cpu"):
            self.best[whose, clock] = min(reply[clock], self.best.get((whose, clock), reply[clock]))

    def of(self, clock: str) -> float:
        return self.best["head", clock] / max(self.best["base", clock], 1e-9)

    @property
    def worse(self) -> str:
        """The clock with the larger ratio."""
        return max(("wall", "cpu"), key=self.of)

    @property
    def value(self) -> float:
        return self.of(self.worse)

    def __str__(self) -> str:
        base, head = (1e3 * self.best[whose, self.worse] for whose in ("base", "head"))
        return f"{base:.3g} ms -> {head:.3g} ms ({self.worse} time), factor {self.value:.2f}"


def measure(base: Worker, head: Worker, name: str, effort: Effort) -> Ratio | tuple[str, dict[str, Any]]:
    """Base and head in turns; stops early once the ratio is clear. An error comes as (whose, reply)."""
    ratio = Ratio()
    for turn in range(effort.rounds):
        for whose, worker in (("base", base), ("head", head)):
            reply = worker.ask(do="time", id=name, seconds=effort.seconds)
            if "error" in reply:
                return whose, reply
            ratio.add(whose, reply)
        if turn + 1 >= CLEAR_ROUNDS and ratio.value < CLEAR:
            break
    return ratio


def gate_times(base: Worker, head: Worker, names: Sequence[str], effort: Effort, verdict: Verdict) -> None:
    """Compare times of base and head."""
    again: list[str] = []
    skipped: list[tuple[str, dict[str, Any]]] = []
    ratios: dict[str, Ratio] = {}
    for name in names:
        result = measure(base, head, name, effort)
        if isinstance(result, Ratio):
            ratios[name] = result
            if result.value > FACTOR:
                again.append(name)
        elif result[0] == "base":
            skipped.append((name, result[1]))
        else:
            verdict.broken.append(f"{name}: {result[1]['error']}")
    for name in again:
        result = measure(base, head, name, Effort(3 * effort.rounds, effort.seconds))
        if not isinstance(result, Ratio):
            verdict.broken.append(f"{name}: {result[1]['error']}")
            continue
        ratios[name] = result
        if result.value > FACTOR:
            verdict.regressions.append(f"time {name}: {result} (measured twice)")
    for name, reply in skipped:
        verdict.notes.append(f"not comparable, raises on the base commit: {name}: {reply['error']}")
        if reply["type"] not in API_CHANGES:
            verdict.broken.append(f"{name} on the base commit: {reply['error']}")
    worst = max(ratios.items(), key=lambda item: item[1].value, default=None)
    say(
        f"times: {len(ratios)} of {len(names)} compared"
        + (f"; largest {worst[0]}: {worst[1]}" if worst else "")
    )


def base_commit(root: Path, revision: str | None) -> str | None:
    """The commit to compare times with; None, said aloud, if there is none."""
    commit = default_base(root) if revision is None else commit_of(root, revision)
    if revision is not None and commit is None:
        raise Broken(f"--base {revision}: no such commit")
    if commit is None:
        say("times: not compared, there is no earlier commit")
    return commit


def compare_commits(
    head: Worker, commit: str, only: re.Pattern[str], effort: Effort, verdict: Verdict
) -> None:
    """Times of this checkout against those of `commit`."""
    with worktree(ROOT, commit) as tree:
        if not (tree / "benchmarks" / "gate.py").exists():
            say(f"times: not compared, commit {commit[:12]} has no benchmarks")
            return
        # The workload is this checkout's on both sides: only the package differs.
        shutil.rmtree(tree / "benchmarks")
        shutil.copytree(
            ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("__pycache__")
        )
        names = [n for n, kind in head.about["benchmarks"].items() if kind == "time" and only.search(n)]
        say(f"times: base {commit[:12]} against this checkout, {len(names)} benchmarks")
        with Worker(tree) as worker:
            gate_times(worker, head, names, effort, verdict)


# -- command -----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Arguments of the gate."""
    made = argparse.ArgumentParser(
        prog="python -m replicate bench gate",
        description="Exact counts against benchmarks/expected.json, times against an earlier commit.",
        epilog="Exit status: 0 passed, 2 bad arguments, 3 regression, 4 a benchmark or the gate is broken.",
    )
    made.add_argument("--quick", action="store_true", help="short timings (what CI runs)")
    made.add_argument("--base", metavar="REV", help="commit to compare times with (default: where main was)")
    made.add_argument("--update", action="store_true", help="write the counts found to the expectation file")
    made.add_argument("--only", metavar="REGEX", default="", help="only benchmarks whose id matches")
    made.add_argument("--no-times", action="store_true", help="counts only")
    made.add_argument("--no-counts", action="store_true", help="times only")
    made.add_argument("--expected", type=Path, default=ROOT / "benchmarks" / "expected.json", metavar="FILE")
    return made


def run(arguments: argparse.Namespace) -> Verdict:
    """Everything that was asked for."""
    verdict = Verdict()
    only = re.compile(arguments.only)
    with ExitStack() as stack:
        try:
            # What can fail cheaply comes first.
            counts = not (arguments.no_counts or arguments.update)
            stored = read_expected(arguments.expected) if counts else {}
            times = not (arguments.no_times or arguments.update)
            commit = base_commit(ROOT, arguments.base) if times else None
            head = stack.enter_context(Worker(ROOT))
            if not any(only.search(name) for name in head.about["benchmarks"]):
                raise Broken(f"--only {arguments.only}: no benchmark matches")
            if arguments.update:
                update_counts(head, only, arguments.expected, verdict)
            if counts:
                gate_counts(head, only, stored, verdict)
            if commit is not None:
                compare_commits(head, commit, only, QUICK if arguments.quick else THOROUGH, verdict)
        except Broken as error:
            verdict.broken.append(str(error))
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    made = parser()
    arguments = made.parse_args(argv)
    try:
        re.compile(arguments.only)
    except re.error as error:
        made.error(f"--only: {error}")
    verdict = run(arguments)
    for kind, lines in (
        ("note", verdict.notes),
        ("regression", verdict.regressions),
        ("broken", verdict.broken),
    ):
        for line in lines:
            say(f"{kind}: {line}")
    words = {PASSED: "passed", REGRESSION: "regression", BROKEN: "broken"}
    say(
        f"bench gate: {words[verdict.status]} (exit {verdict.status}): "
        f"{len(verdict.regressions)} regressions, {len(verdict.broken)} failures"
    )
    return verdict.status


if __name__ == "__main__":
    sys.exit(main())
