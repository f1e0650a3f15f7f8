"""Several processes, as torchrun starts them: who am I, and sums over all of us.

Without torchrun there is one process and every function here does next to nothing.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def launched() -> bool:
    """Whether torchrun started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other processes for the length of a block, where torchrun started us."""
    if not launched():
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(value: object) -> list[object]:
    """Everybody's `value`, in the order of ranks; for small things."""
    if world() == 1:
        return [value]
    values: list[object] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_true(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return any(gather(flag))
