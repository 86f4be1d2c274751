"""The regression gate: planted regressions and broken benchmarks, each with its own exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chemistry import molecule

from replicate.trainer import train

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import gate  # noqa: E402
from benchmarks.cases import point  # noqa: E402
from benchmarks.counting import count_flops, watch  # noqa: E402
from benchmarks.worker import quick_benchmarks  # noqa: E402

pytestmark = pytest.mark.processes

PASSED, REGRESSION, BROKEN = 0, 3, 4
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
STEP = r"Step.*\(H2O, transformer, small, whole\)"


def git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *IDENTITY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.fixture(scope="session")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("molecules")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of the package, the benchmarks and the molecule table."""
    folder = tmp_path / "checkout"
    for name in ("replicate", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "specs").mkdir()
    shutil.copy(ROOT / "specs" / "molecules.toml", folder / "specs")
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(folder))
    commit(folder)
    return folder


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "a commit")
    return git(folder, "rev-parse", "HEAD")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: {old!r} has to be planted somewhere else"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def bench_gate(checkout: Path, molecules: Path) -> Callable[..., tuple[int, str]]:
    """Runs `python -m replicate bench gate ...` in the checkout: exit status and output."""

    def run(*arguments: str) -> tuple[int, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "PYTHONDONTWRITEBYTECODE": "1",  # else a file changed within a second might not be read again
            "NQS_BENCH_MOLECULES": str(molecules),
        }
        done = subprocess.run(
            [sys.executable, "-m", "replicate", "bench", "gate", "--quick", *arguments],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    return run


# -- the whole gate, on copies of the repository ------------------------------------------------------


def test_unchanged_code_passes_and_an_extra_evaluation_does_not(
    checkout: Path, bench_gate: Callable[..., tuple[int, str]]
) -> None:
    """A clean first commit has nothing to be compared with; every prefix evaluated twice changes counts."""
    status, output = bench_gate("--only", STEP)
    assert status == PASSED, output
    assert "counts: 11 of 11 as expected" in output
    assert "there is no earlier commit" in output

    call = "self.network.tree_logits(tree)"
    change(checkout / "replicate" / "ansatz" / "base.py", call, f"({call}, {call})[1]")
    status, output = bench_gate("--only", STEP, "--no-times")
    assert status == REGRESSION, output
    prefixes = "step.Step.track_prefixes_evaluated(H2O, transformer, small, whole)"
    assert f"regression: count {prefixes}: expected 280, found 560\n" in output
    assert "track_flops_counted" in output
    assert "track_operators" in output
    assert "track_flops_executed" not in output  # the trainer's own accounting does not know of it
    assert "bench gate: regression (exit 3)" in output.splitlines()[-1]


def test_a_kernel_of_half_the_speed_fails_and_an_innocent_edit_passes(
    checkout: Path, bench_gate: Callable[..., tuple[int, str]]
) -> None:
    """Times against the commit before: the same kernel passes, one that does everything twice does not."""
    only = ("--only", r"Connected\.time_connected\(N2\)", "--no-counts")
    kernel = checkout / "replicate" / "hamiltonian.py"
    kernel.write_text(kernel.read_text(encoding="utf-8") + "\n# an innocent edit\n", encoding="utf-8")
    status, output = bench_gate(*only)
    assert status == PASSED, output
    assert "times: 1 of 1 compared" in output

    twice = """
_once = Kernel.connected
def _twice(self, keys, max_bytes=None):
    _once(self, keys, max_bytes)
    return _once(self, keys, max_bytes)
Kernel.connected = _twice
"""
    kernel.write_text(kernel.read_text(encoding="utf-8") + twice, encoding="utf-8")
    status, output = bench_gate(*only)
    assert status == REGRESSION, output
    assert "regression: time hamiltonian.Connected.time_connected(N2): " in output
    assert "(measured twice)" in output
    assert git(checkout, "worktree", "list").count("\n") == 0  # the base's worktree is gone


def test_a_broken_benchmark_has_another_status(
    checkout: Path, bench_gate: Callable[..., tuple[int, str]]
) -> None:
    """One that raises and one that ends its process; regressions beside them do not hide them."""
    tree = checkout / "benchmarks" / "bench_network.py"
    change(tree, "return self.tree.n_tips", 'raise RuntimeError("planted")')
    status, output = bench_gate("--only", r"network\.Tree.*\(H2O\)", "--no-times")
    assert status == BROKEN, output
    assert "broken: network.Tree.track_tips(H2O): RuntimeError: planted\n" in output
    assert "counts: 2 of 3 as expected" in output

    change(tree, 'raise RuntimeError("planted")', '__import__("os")._exit(7)')
    status, output = bench_gate("--only", r"network\.Tree.*\(H2O\)", "--no-times")
    assert status == BROKEN, output
    assert "broken: network.Tree.track_tips(H2O): process ended (7)" in output


def test_what_is_broken_before_anything_runs(
    checkout: Path, bench_gate: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, output = bench_gate("--base", "no-such-revision")
    assert (status, "no-such-revision: no such commit" in output) == (BROKEN, True)

    (tmp_path / "bad.json").write_text('{"counts": {', encoding="utf-8")
    status, output = bench_gate("--expected", str(tmp_path / "bad.json"))
    assert (status, "bad.json" in output) == (BROKEN, True)

    shutil.rmtree(checkout / ".git")
    status, output = bench_gate()
    assert (status, "broken: git" in output) == (BROKEN, True)


def test_a_base_without_benchmarks_is_said_and_passes(
    checkout: Path, bench_gate: Callable[..., tuple[int, str]]
) -> None:
    first = git(checkout, "commit-tree", "-m", "before the benchmarks", git(checkout, "mktree"))
    status, output = bench_gate("--only", "ClosedForm.*H2O, made, small, total", "--base", first)
    assert status == PASSED, output
    assert f"commit {first[:12]} has no benchmarks" in output


# -- its parts --------------------------------------------------------------------------------------


def test_default_base(tmp_path: Path) -> None:
    """The fork from main on a branch; on main HEAD if the package differs from it, else its parent."""
    folder = tmp_path / "repository"
    (folder / "replicate").mkdir(parents=True)
    (folder / "replicate" / "module.py").write_text("", encoding="utf-8")
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(folder))
    first = commit(folder)
    assert gate.default_base(folder) is None
    second = commit(folder)
    assert gate.default_base(folder) == first
    (folder / "replicate" / "module.py").write_text("changed\n", encoding="utf-8")
    assert gate.default_base(folder) == second
    git(folder, "checkout", "--quiet", "-b", "branch")
    commit(folder)
    commit(folder)
    assert gate.default_base(folder) == second
    with pytest.raises(gate.Broken, match="git"):
        gate.default_base(tmp_path)


def test_counts_compare_exactly_with_old_and_new_value() -> None:
    expected = {"same": 1, "changed": 10**15, "gone": 3}
    found = {"same": 1, "changed": 10**15 + 1, "new": 4}
    assert gate.compare_counts(expected, found) == [
        "count changed: expected 1000000000000000, found 1000000000000001",
        "count gone: expected 3, found nothing",
        "count new: expected nothing, found 4",
    ]


class Stopwatch:
    """A worker whose benchmark takes the given times, one per request, on one clock or the other."""

    def __init__(self, clock: str, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, list(seconds)

    def ask(self, **request: object) -> dict[str, float]:
        return {"wall": 1.0, "cpu": 1.0, self.clock: self.seconds.pop(0)}


@pytest.mark.parametrize("clock", ["wall", "cpu"])
@pytest.mark.parametrize(
    ("base", "head", "regressions"),
    [
        ([1.0] * 3, [1.1] * 3, 0),  # clear after three rounds
        ([1.0] * 4, [2.0, 2.0, 2.0, 1.0], 0),  # the best of the rounds counts
        ([1.0] * 16, [2.0] * 4 + [1.0] * 12, 0),  # a disturbance that is gone the second time
        ([1.0] * 16, [1.6] * 16, 1),
        ([1.0] * 16, [1.4] * 16, 0),
    ],
)
def test_a_time_is_a_regression_when_it_is_measured_twice(
    base: list[float], head: list[float], regressions: int, clock: str
) -> None:
    verdict = gate.Verdict()
    workers = Stopwatch(clock, base), Stopwatch(clock, head)
    gate.gate_times(*workers, ["a"], gate.Effort(rounds=4, seconds=0.0), verdict)  # type: ignore[arg-type]
    assert len(verdict.regressions) == regressions
    assert not verdict.broken


def test_expected_counts_are_those_of_the_suite() -> None:
    """Every quick count has an expectation and no other; what theory knows of them holds."""
    known = {name for name, entry in quick_benchmarks().items() if entry[0] == "track"}
    counts = json.loads((ROOT / "benchmarks" / "expected.json").read_text(encoding="utf-8"))["counts"]
    assert counts.keys() == known
    for name, prefixes in (("H2O", 280), ("N2", 9401)):
        for ansatz in ("made", "transformer", "retnet"):
            case = f"({name}, {ansatz}, small, whole)"
            assert counts["step.Step.track_prefixes_evaluated" + case] == prefixes
            # in the one-pass regime the trainer's accounting is complete to the last operation
            executed = counts["step.Step.track_flops_executed" + case]
            assert counts["step.Step.track_flops_counted" + case] == executed
            estimate = f"flops.ClosedForm.track_value({name}, {ansatz}, small, total)"
            unique = counts["step.Step.track_unique" + case]
            assert counts["step.Step.track_flops_estimated" + case] == unique * counts[estimate]
    steps = {name.partition("(")[2] for name in counts if name.startswith("step.Step.")}
    assert {case.rpartition(", ")[2] for case in steps} == {"whole)", "exact)", "sampled)", "paper)"}
    for case in steps:
        parts = ("sampling", "forward", "local_energy", "backward")
        split = [counts[f"step.Step.track_flops_{part}({case}"] for part in parts]
        assert sum(split) == counts[f"step.Step.track_flops_executed({case}"]


def test_watching_counts_calls_from_outside_only() -> None:
    """MADE's tree evaluation calls its flat one: a prefix counts once. Afterwards nothing is watched."""
    mol = molecule("H2O")
    run = train(point("H2O", "made", "small"), mol)
    tree = run.batch.tree
    with watch(run.wave) as seen:
        run.wave.log_prob(tree)
    assert (seen.prefixes, seen.determinants) == (tree.n_nodes, 0)
    run.wave.log_prob(tree)
    assert seen.prefixes == tree.n_nodes
    assert not {"tree_logits", "flat_logits", "advance"} & run.wave.modulus.__dict__.keys()


def test_sparse_products_count_their_elements() -> None:
    matrix = torch.eye(50, dtype=torch.float64)
    with warnings.catch_warnings():  # torch says once per process that CSR support is in beta
        warnings.simplefilter("ignore")
        sparse = matrix.to_sparse_csr()
    vectors = torch.ones(50, 2, dtype=torch.float64)
    assert count_flops(lambda: sparse @ vectors) == 2 * 50 * 2
    assert count_flops(lambda: matrix @ vectors) == 2 * 50 * 50 * 2
