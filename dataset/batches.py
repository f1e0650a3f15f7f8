"""Endless training batches of a data set, and one pass over all of it.

This file knows in which order a run sees the images, and the processes that decode them. It does
not know where the images come from.
"""

import functools
import itertools
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.images import AnySet, to_network
from runtime.errors import UserError

# An in-memory set up to this size lives on the training device, where picking a batch is free.
RESIDENT_BYTES = 2 * 2**30


def batches(
    dataset: AnySet,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    device: str | torch.device = "cpu",
    num_workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """Endless training batches, float32 in [-1, 1], (batch_size / world, C, H, W) on `device`.

    The batch of a step depends on `seed` and the step alone: it takes positions
    [step · batch_size, (step + 1) · batch_size) of an endless row of shuffled epochs, so
    starting at `start_step` continues a run exactly, and no image is dropped at an epoch's end.
    `part` = (rank, world) takes the rank's contiguous share of every step's batch.
    Where the set allows flips, each image is mirrored with probability ½.
    """
    rank, world = part
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {world} processes: "
            f"take a positive multiple of {world}"
        )
    share = batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    steps = _step_indices(len(dataset), batch_size, seed, start_step, mine)
    if dataset.tensor is not None:
        picked = _pick(dataset.tensor, steps, device)
    else:
        picked = _decode(dataset, steps, num_workers, torch.device(device).type == "cuda")

    def finished() -> Iterator[torch.Tensor]:
        for step, images in enumerate(picked, start_step):
            images = to_network(images.to(device, non_blocking=True))
            if dataset.flip:
                mirror = torch.rand(batch_size, generator=_generator(seed, "flip", step)) < 0.5
                mirror = mirror[mine].to(device, non_blocking=True)
                images = torch.where(mirror[:, None, None, None], images.flip(3), images)
            yield images

    return finished()


def batch_labels(
    dataset: AnySet,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """The labels, int64 (batch_size / world,) on the CPU, of the images that `batches` yields."""
    rank, world = part
    share = batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    for indices in _step_indices(len(dataset), batch_size, seed, start_step, mine):
        yield dataset.labels[indices]


def everything(
    dataset: AnySet, batch_size: int, num_workers: int = 0, start: int = 0, stop: int | None = None
) -> Iterator[torch.Tensor]:
    """Every image from `start` up to `stop` (all) once, in order, never flipped: uint8
    (≤ batch_size, C, H, W) on the CPU."""
    stop = len(dataset) if stop is None else stop
    if start >= stop:
        return iter(())
    if dataset.tensor is not None:
        return iter(dataset.tensor[start:stop].split(batch_size))
    return _decode(dataset, torch.arange(start, stop).split(batch_size), num_workers, False)


def _generator(seed: int, stream: str, counter: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, stream, counter)."""
    entropy = [seed % 2**64, zlib.crc32(stream.encode()), counter]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def _step_indices(
    count: int, batch_size: int, seed: int, start_step: int, mine: slice
) -> Iterator[torch.Tensor]:
    """For each step from `start_step` on, the indices of its batch's share `mine`."""

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> torch.Tensor:
        return torch.randperm(count, generator=_generator(seed, "epoch", epoch))

    for step in itertools.count(start_step):
        position, end = step * batch_size + mine.start, step * batch_size + mine.stop
        pieces = []
        while position < end:
            epoch, offset = divmod(position, count)
            pieces.append(epoch_order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        yield torch.cat(pieces)


def _pick(
    tensor: torch.Tensor, steps: Iterable[torch.Tensor], device: str | torch.device
) -> Iterator[torch.Tensor]:
    """The images of each step's indices, out of a set that lies in memory."""
    if tensor.nbytes <= RESIDENT_BYTES:
        tensor = tensor.to(device)
    for indices in steps:
        yield tensor[indices.to(tensor.device, non_blocking=True)]


class _Fetched(Dataset):
    """What a loading process runs: a list of indices → one uint8 batch, or the UserError.

    Raised there, the error would arrive wrapped in that process's traceback; returned, it
    arrives as the one line that it is.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        try:
            return torch.stack([self.dataset[index] for index in indices])
        except UserError as error:
            return error


def _unchanged(batch: object) -> object:
    return batch


def _leave_signals(worker: int) -> None:
    """A signal to the whole group of processes is for the main one, which saves and ends us."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def heed_parent() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()


def _decode(
    dataset: Dataset, index_lists: Iterable[torch.Tensor], num_workers: int, pin: bool
) -> Iterator[torch.Tensor]:
    """The images of each list of indices, decoded by `num_workers` processes (0: right here)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    loader = DataLoader(
        _Fetched(dataset),
        batch_sampler=(indices.tolist() for indices in index_lists),
        collate_fn=_unchanged,
        num_workers=min(num_workers, cores),  # more would only wait for each other
        pin_memory=pin,
        generator=torch.Generator(),  # else it draws from the run's own random numbers
        worker_init_fn=_leave_signals,
    )
    for images in loader:
        if isinstance(images, UserError):
            raise images
        yield images
