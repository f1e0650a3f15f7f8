"""How the process's heap treats what tensors on a CPU leave behind."""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
MIB = 2**20


def keep_freed(enabled: bool = True) -> None:
    """Keep freed memory for the next tensor, where the C library is glibc.

    By default it gives large blocks back to the system, which clears every page again when the
    next step asks for the same block. Disabled: what a process comes to by default when it has
    freed large blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(MMAP_THRESHOLD, 32 * MIB)
    mallopt(MMAP_MAX, 0 if enabled else 65536)
    mallopt(TRIM_THRESHOLD, 2**31 - 1 if enabled else 64 * MIB)
