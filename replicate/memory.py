"""Memory of the C library under torch's CPU tensors, and the peak that a process has reached."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path
from typing import Any


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system (no-op elsewhere).

    A step frees and allocates the same blocks hundreds of times; a page fault for each page of them costs up
    to a third of a step. The peak of a step grew by 8 % at most (steps.csv of artifacts/speed, 48da58c
    against 3157cfb), but a process keeps what it reached: `return_freed_memory` gives back what a run has
    left.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)  # blocks beyond 32 MiB would be mapped anew each time, whatever the threshold
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 << 20)


def return_freed_memory() -> None:
    """Give freed blocks back to the system (glibc; no-op elsewhere)."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def reset_peak() -> None:
    """Start `peak_bytes` anew from what is in use (Linux; elsewhere it stays the process's own)."""
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Largest resident size since `reset_peak` or the start of this process (getrusage may also count that of
    the process that started it)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _glibc(name: str) -> Any:
    """A function of the C library; None where it has no such."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
