"""Host memory of the CPU backend."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Lets the process keep freed memory for its next step, where the C library is glibc; call before threads start.

    A compiled step's scratch buffers are allocated and freed at every step. By default glibc returns such large
    blocks to the kernel, which maps and clears every page again: up to a third of a small model's step.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)
