"""Device audit without a GPU: the step's tensor work on fake tensors (device_audit.py), transfers counted.

Where there is a GPU the same steps also run on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chemistry import molecule, spec
from networks import KINDS, PARAMS

from replicate.spec import AnsatzSpec, PhaseSpec, Point, SamplingSpec
from replicate.trainer import train

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from benchmarks.counting import count_transfers

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def make_point(kind: str, **changes: Any) -> Point:
    fields: dict[str, Any] = {
        "molecule": spec("LiH"),
        "ansatz": AnsatzSpec(kind=kind, params=PARAMS[kind]),
        "phase": PhaseSpec(width=8, depth=1),
        "steps": 5,
    }
    return Point(**{**fields, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_step_waits_at_most_three_times(kind: str) -> None:
    """Everything that a record needs comes in one transfer, and nothing else is waited for."""
    run = train(make_point(kind), molecule("LiH"))
    run.advance()  # the sector's batch is made once
    assert run.regime == "whole"
    seen = count_transfers(run.advance)
    assert "tolist" in seen  # the counter sees what is there
    assert len(seen) <= 3, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_growing_tree_waits_twice_a_level_and_a_few_times(kind: str, mode: str) -> None:
    """The sizes of a level are data (its open prefixes, its drawn ones); the rest is a fixed number."""
    sampling = SamplingSpec(regime="tree")
    run = train(make_point(kind, sampling=sampling, local_energy=mode), molecule("LiH"))
    run.advance()
    seen = count_transfers(run.advance)
    assert 2 * run.sector.n_orbitals < len(seen) <= 2 * run.sector.n_orbitals + 14, seen


@pytest.mark.parametrize("device", ["cuda", "mockgpu"])
def test_step_runs_on_fake_tensors(device: str) -> None:
    """In a process of its own: registering a backend cannot be undone, and a mistake there may abort."""
    script = Path(__file__).with_name("device_audit.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}  # also where nothing is installed
    done = subprocess.run(
        [sys.executable, script, device],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in KINDS:
        assert f"{kind}: every tensor of the step on {device}" in done.stdout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regime", ["whole", "tree"])
def test_steps_on_every_device(device: str, kind: str, regime: str) -> None:
    """First energies agree with the CPU's from the same initial state, up to the samples' own noise."""
    point = make_point(kind, sampling=SamplingSpec(regime=regime, schedule="constant"))
    run = train(point, molecule("LiH"), device=device)
    first = run.advance()
    reference = train(point, molecule("LiH")).advance()
    assert first.energy == pytest.approx(reference.energy, abs=1e-4)
    assert all(weight.device.type == device for weight in run.weights.values())
