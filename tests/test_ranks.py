"""One point on several processes: the same numbers as on one, whatever their number, and no hang."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chemistry import molecule
from networks import KINDS
from ranks_cases import CASES, STEPS, result, start

from replicate.hamiltonian import Kernel
from replicate.ranks import Group
from replicate.sector import Sector
from replicate.spec import load_study
from replicate.store import Store
from replicate.trainer import Checkpoint

pytestmark = pytest.mark.processes

WriteSpec = Callable[..., Path]
TESTS = Path(__file__).parent


def torchrun(ranks: int, *command: str | Path) -> subprocess.Popen[str]:
    """A script (or `-m module`) on several processes of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*launcher, *where, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, errors = process.communicate()
        pytest.fail(f"hung; {errors[-2000:]}")
    return process.returncode, out, errors


def run_cases(ranks: int, folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    code, _, errors = finish(torchrun(ranks, TESTS / "ranks_cases.py", folder, *kinds))
    assert code == 0, errors[-3000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Energies of every step, parameters and the final evaluation; counts exactly."""
    names = ("energy", "variance", "n_unique", "n_samples")
    for one, other in zip(found["records"], expected["records"], strict=True):
        assert [one[name] for name in names] == pytest.approx(
            [other[name] for name in names], rel=tolerance, abs=1e-9
        )
    assert relative(found["weights"], expected["weights"]) < tolerance
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=tolerance, abs=1e-9)


# -- equal numbers -------------------------------------------------------------------------------------


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """20 steps of every ansatz, whole and partial sectors: 1e-5 in float32, far closer in float64.

    One test, because starting processes is most of it; what it asserts is in the functions below.
    """
    alone, two = {case: result(start(case)) for case in CASES}, run_cases(2, tmp_path, KINDS)
    assert set(two) == set(CASES)
    for case, found in two.items():
        assert len(found["records"]) == STEPS
        assert_same_run(found, alone[case], tolerance(case))
        if not case.endswith(("of one", "of two")):
            assert_same_flops(case, found, alone[case])
    for case in ("made, whole", "transformer, tree", "retnet, tree, sampled"):
        assert_goes_on_alone(case, tmp_path / f"{case}.pt", alone[case])


@pytest.mark.slow
def test_three_ranks_equal_one_process(tmp_path: Path) -> None:
    """With shares that are empty: one sample, or two determinants, for three ranks."""
    for case, found in run_cases(3, tmp_path, KINDS).items():
        assert_same_run(found, result(start(case)), tolerance(case))


def tolerance(case: str) -> float:
    return 1e-5 if "float32" in case else 1e-8


def assert_same_flops(case: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every determinant counts once. What more there is: paths to the ranks' first determinants, and a block
    that is not full per rank; a tenth of these few hundred prefixes, nothing of many thousands. What less:
    products of pairs of samples that are mirror images, of which shares leave out more."""
    for one, both in zip(expected["records"], found["records"], strict=True):
        mirrored = saved_by_two_shares(case, one["n_unique"]) if case.endswith("tree, sampled") else 0
        assert one["flops_executed"] - mirrored <= both["flops_executed"] < 1.25 * one["flops_executed"]


@functools.cache
def saved_by_two_shares(case: str, size: int) -> int:
    """FLOPs of the elements within `size` determinants, less those of its two shares."""
    run = start(case)
    keys = torch.as_tensor(run.sector.enumerate_keys()[:size])
    shares = [run.kernel.within(keys, share=(rank, 2)).flops for rank in (0, 1)]
    return run.kernel.within(keys).flops - sum(shares)


def assert_goes_on_alone(case: str, checkpoint: Path, expected: dict[str, Any]) -> None:
    """One process goes on from two ranks' checkpoint at half way and ends where one process alone does."""
    tensors = torch.load(checkpoint, weights_only=True)
    saved = Checkpoint(STEPS // 2, tensors, {"point_id": start(case).point.id})
    rest = result(start(case, resume=saved))
    assert_same_run(rest, {**expected, "records": expected["records"][STEPS // 2 :]}, 1e-8)


# -- shares of work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 1000])
def test_cuts_cover_all_rows_evenly(size: int, total: int) -> None:
    cuts = Group(0, size).even(total)
    shares = [b - a for a, b in itertools.pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(shares)) == (0, total, size)
    assert max(shares) - min(shares) <= 1
    cost = torch.rand(total, generator=torch.Generator().manual_seed(0)) ** 8
    if total == 1000:
        cuts = Group(0, size).balanced(cost)
        parts = [cost[a:b].sum().item() for a, b in itertools.pairwise(cuts)]
        assert (cuts[0], cuts[-1]) == (0, total)
        assert max(parts) - min(parts) <= 2 * cost.max().item() + 1e-6


@pytest.mark.parametrize("count", [0, 3, 40, 225])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("pairs_below", [0, 6])
def test_shares_of_the_matrix_are_the_matrix(
    count: int, size: int, pairs_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of finding elements: shares and ranges of rows put together are what one call finds."""
    monkeypatch.setattr("replicate.hamiltonian._PAIRS_BELOW", pairs_below)
    mol = molecule("LiH")
    every = torch.as_tensor(Sector(mol.n_orbitals, mol.n_alpha, mol.n_beta).enumerate_keys())
    keys = every[torch.randperm(225, generator=torch.Generator().manual_seed(1))[:count]].sort().values
    kernel = Kernel(mol.hamiltonian)

    def dense(shares: list[tuple[int, int]]) -> torch.Tensor:
        out = torch.zeros(count, count, dtype=torch.float64)
        for share in shares:
            found = kernel.within(keys, share=share)
            out.index_put_((found.row, found.column), found.value, accumulate=True)
        return out

    whole = dense([(0, 1)])
    torch.testing.assert_close(dense([(r, size) for r in range(size)]), whole, rtol=0, atol=1e-13)
    if count:
        cuts = Group(0, size).even(count)
        rows = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        parts = [kernel.sector_matrix(keys, rows=part) for part in rows]
        together = torch.cat([part.to_dense() for part in parts])
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-13)


# -- the command ---------------------------------------------------------------------------------------

LONG = (('molecules = ["H2"]', 'molecules = ["LiH"]'), ("steps = [3]", "steps = [40]"))


def test_a_rank_that_raises_ends_the_run(write_spec: WriteSpec, tmp_path: Path) -> None:
    """Exit 1 with that rank's error, in the error file, too."""
    spec = write_spec(*LONG)
    (point,) = load_study(spec).points
    command = (TESTS / "ranks_accident.py", "raise", "run", spec, "--artifacts", tmp_path / "art")
    code, _, errors = finish(torchrun(2, *command), 120)
    assert code == 1
    assert "rank 1: ValueError: an accident" in errors
    store = Store.of(load_study(spec), tmp_path / "art")
    assert "rank 1: ValueError: an accident" in (store.read_error(point.id) or "")
    assert store.status(point.id).state == "failed"


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run(write_spec: WriteSpec, tmp_path: Path) -> None:
    spec = write_spec(*LONG)
    command = (TESTS / "ranks_accident.py", "kill", "run", spec, "--artifacts", tmp_path / "art")
    code, _, errors = finish(torchrun(2, *command), 120)
    assert code == 1
    assert "a rank has ended without a word" in errors


@pytest.mark.slow
def test_command_stops_and_goes_on_with_another_number_of_ranks(
    write_spec: WriteSpec, tmp_path: Path
) -> None:
    """SIGTERM to the launcher: checkpoint; one process ends the run as one process alone would have."""
    spec = write_spec(LONG[0], ("steps = [3]", "steps = [3000]"))
    study = load_study(spec)
    (point,) = study.points
    store = Store.of(study, tmp_path / "art")
    process = torchrun(2, "-m", "replicate", "run", spec, "--artifacts", tmp_path / "art", "--only", point.id)
    deadline = time.monotonic() + 120
    while not store.claim_path(point.id).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process, 120)
    assert code == 1
    assert store.checkpoint_path(point.id).exists(), errors[-2000:]
    assert not store.point_path(point.id).exists()
    for artifacts, ranks in ((tmp_path / "art", 1), (tmp_path / "straight", 2)):
        command = ("-m", "replicate", "run", spec, "--artifacts", artifacts)
        code, out, errors = finish(torchrun(ranks, *command))
        assert (code, "1 trained" in out) == (0, True), errors[-2000:]
    one, other = (Store.of(study, tmp_path / name).read_point(point.id) for name in ("art", "straight"))
    assert one is not None
    assert other is not None
    assert json.loads(one.attrs["provenance"])["ranks"] == 1
    assert json.loads(other.attrs["provenance"])["ranks"] == 2
    assert float(one["energy"]) == pytest.approx(float(other["energy"]), abs=1e-3)
