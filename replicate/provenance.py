"""Where a number comes from: versions, commit, hardware, threads and the seed of every random stream."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

# Distributions whose version can change a bit of a result.
TRACKED = ("nqs-scaling", "torch", "numpy", "scipy", "pyscf", "openfermion", "xarray", "netCDF4", "pydantic")

# Environment variables that decide how many threads numerical libraries use.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def stream_seed(root: int, point_id: str, stream: str) -> int:
    """Seed of one named random stream of one point: a non-negative 63-bit integer for a torch.Generator.

    SeedSequence(root, point id, stream): streams of one point and equal streams of different points are
    independent, and adding a stream leaves all others as they were.
    """
    # str.__hash__ differs from process to process; a digest does not.
    words = np.frombuffer(hashlib.sha256(f"{point_id}/{stream}".encode()).digest(), dtype="<u4")
    sequence = np.random.SeedSequence([root, *(int(word) for word in words)])
    return int(sequence.generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of every tracked distribution that is installed."""
    found = {"python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    package = Path(__file__).resolve().parent
    try:
        # The parent of the package is the checkout when there is one; a wheel has none.
        done = subprocess.run(
            ["git", "-C", str(package.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def commit() -> dict[str, Any]:
    """Commit of the code and whether the package differs from it; both None outside a checkout.

    Only the code counts (`replicate/`, pyproject.toml): specs and results are recorded by content.
    """
    tracked = _git("ls-files", "--error-unmatch", "replicate/__init__.py")
    if (
        tracked is None
    ):  # installed inside somebody else's repository: its commit says nothing about this code
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", "replicate", "pyproject.toml")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores this process may use (its affinity mask, not the number in the box)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in bytes, system; no host name (results are published)."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return {
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": available_cores(),
        "memory_bytes": memory,
    }


def threads() -> dict[str, Any]:
    """Threads in force: torch's own number where it is loaded, and the variables that set defaults."""
    found: dict[str, Any] = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    torch = sys.modules.get("torch")  # never imported for the sake of a record
    if torch is not None:
        found["torch"] = torch.get_num_threads()
    return found


def accelerator() -> str | None:
    """Name of the CUDA device in use by this process, if torch is loaded and has initialised one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_name())


def collect() -> dict[str, Any]:
    """Everything above as one JSON-able record."""
    return {
        "versions": versions(),
        "code": commit(),
        "hardware": hardware(),
        "accelerator": accelerator(),
        "threads": threads(),
    }
