"""Memory of the C library under torch's CPU tensors."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system (no-op elsewhere).

    A step frees and allocates the same few megabytes hundreds of times; a page fault for each page of them
    costs up to a third of a step.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)  # blocks beyond 32 MiB would be mapped anew each time, whatever the threshold
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 << 20)
