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
from torch.utils._python_dispatch import TorchDispatchMode

from replicate.spec import AnsatzSpec, PhaseSpec, Point, SamplingSpec
from replicate.trainer import train

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


class Transfers(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "bincount")
        if any(part in name for part in waits):
            self.seen.append(name)
        if "_to_copy" in name and str((kwargs or {}).get("device")) == "cpu":
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_step_waits_at_most_three_times(kind: str) -> None:
    """On a CPU tensor `tolist` moves no data, so it is added by hand: one per step, for the record."""
    run = train(make_point(kind), molecule("LiH"))
    run.advance()  # the sector's batch is made once
    assert run.regime == "whole"
    with Transfers() as transfers:
        run.advance()
    assert len(transfers.seen) + 1 <= 3, transfers.seen


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
