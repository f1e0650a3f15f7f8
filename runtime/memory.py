"""What this machine's memory can hold, asked before it is taken."""

import os
from pathlib import Path

from runtime.errors import UserError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total() -> int | None:
    """Bytes of memory that this process may have, None where the system does not tell."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    for path in _LIMITS:  # of a container
        try:
            size = min(size, int(Path(path).read_text()))
        except (OSError, ValueError):  # ValueError: "max"
            continue
    return size


def require(size: int, what: str, remedy: str) -> None:
    """UserError where `size` bytes, which `what` takes, are more than the machine has."""
    available = total()
    if available is not None and size > available:
        raise UserError(
            f"{what} takes {size / 2**30:,.1f} GiB of memory, and there are "
            f"{available / 2**30:,.1f} GiB; {remedy}"
        )
