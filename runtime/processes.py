"""Several processes, as torchrun starts them: which one is this, and values of all of them.

Without torchrun there is one process and every function here does next to nothing. A process is
known by its rank, never by its place on a machine, so several machines need no special care.
"""

import contextlib
import ctypes
import datetime
import logging
import os
import signal
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from runtime.errors import UserError

# How long a process waits for the others: for rank 0 while it writes, or for a candidate of full
# width that another one scores. The end of a process is noticed at once, by torchrun and, on CPUs,
# by the closed connection.
PATIENCE = datetime.timedelta(days=1)

_store: dist.Store | None = None
_libc = ctypes.CDLL(None) if os.name == "posix" else None


def launched() -> bool:
    """Whether torchrun started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def say(text: str) -> None:
    """Print, once for all processes."""
    if is_main():
        print(text, flush=True)


class Printed(logging.Handler):
    """Prints what the program's parts log, once for all processes."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def first_to_speak() -> bool:
    """Whether this process is the first of all to call this: the one that reports an error."""
    if _store is None:
        return is_main()  # an error before the processes met is an error of all of them
    try:
        return _store.add("spoken", 1) == 1
    except RuntimeError:  # the store went down with another process
        return True


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other processes for the length of a block, where torchrun started us.

    Raises UserError where another process is lost; torchrun names it.
    """
    global _store
    if not launched():
        yield
        return
    end_with_parent()
    _store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise UserError(
            f"process {number} of {count} lost the connection to another one, which torchrun names "
            "below; the same command goes on from what is on the disk"
        ) from error
    # Not after an error: taking the group down would wait for processes that are no longer there.
    dist.destroy_process_group()


def end_with_parent() -> None:
    """Have the system send SIGTERM when the process that started this one ends, even by SIGKILL;
    else this one would run on. It waits for neither locks nor imports, so it suits preexec_fn."""
    with contextlib.suppress(AttributeError, OSError):
        _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, on Linux


def _is_loss(error: RuntimeError) -> bool:
    """Whether `error` says that another process ended."""
    text = str(error).lower()
    signs = ("gloo", "connection closed by peer", "connection reset", "broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def gather(value: object) -> list[object]:
    """The `value` of every process, in the order of ranks; for small things."""
    if world() == 1:
        return [value]
    values: list[object] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def raise_first(failure: Exception | None) -> None:
    """Raise the first failure of any process in every process; to be called in all of them."""
    if first := next(filter(None, gather(failure)), None):
        raise first


def on_cpu(state: Mapping[str, object]) -> dict[str, object]:
    """`state` with its tensors on the CPU; to `gather` GPUs' would have every process open all."""
    return {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in state.items()}


def share(count: int) -> slice:
    """Which of `count` things are this process's share: neighbours, as many as the others have."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())
