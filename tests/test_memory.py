"""Freed memory is kept within a run, given back after it, and peaks are a run's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SCRIPT = """
import resource, torch
from replicate.memory import keep_freed_memory, peak_bytes, reset_peak

keep_freed_memory()
reset_peak()
start = peak_bytes()
tensor = torch.ones(100 << 18)  # 100 MiB
first = peak_bytes()
del tensor
reset_peak()
second = peak_bytes()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(100 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(first - start, second - start, faults(), min(faults() for _ in range(20)))
"""


@linux
def test_peak_is_a_runs_own_and_freed_blocks_are_kept() -> None:
    """In a process of its own: 100 MiB count for the run that took them, not for the next one; taken again
    they come to cost no page fault (not at once: an aligned block does not fit where one of its size was)."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second, faults, faults_again = map(int, done.stdout.split())
    assert 95 << 20 < first < 130 << 20
    assert second < 20 << 20
    assert faults > 10  # fewer than pages where the system hands out large ones
    assert faults_again < faults / 10


@linux
def test_peak_leaves_out_the_process_that_started_this_one() -> None:
    """getrusage hands a parent's size on; a benchmark that starts processes to measure them must not."""
    script = (
        "import subprocess, sys, torch; x = torch.ones(300 << 18); "
        "print(subprocess.run([sys.executable, '-c', "
        "'from replicate.memory import peak_bytes; print(peak_bytes())'], "
        "capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 20
