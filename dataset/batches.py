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

# A set in memory up to this size is kept on the training device, where indexing costs nothing.
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
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Endless training batches: images, float32 in [-1, 1], (batch_size / world, C, H, W) on
    `device`; and their labels, int64 (batch_size / world,) on the CPU, where the set has some.

    The batch of a step depends only on `seed` and the step: it holds positions
    [step · batch_size, (step + 1) · batch_size) of an endless sequence of shuffled epochs, so
    starting at `start_step` continues a run exactly, and no image is dropped at an epoch's end.
    `part` = (rank, world) takes the rank's contiguous share of every step's batch.
    Where the set allows it, each image is mirrored with probability ½.
    """
    world = part[1]
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"--batch_size={batch_size} cannot be shared by {world} processes: "
            f"use a positive multiple of {world}"
        )
    local_slice = _local_slice(batch_size, part)
    steps = _step_indices(len(dataset), batch_size, seed, start_step, local_slice)
    steps, again = itertools.tee(steps)  # images are decoded ahead of their labels
    if dataset.tensor is not None:
        pixels = _indexed(dataset.tensor, steps, device)
    else:
        pixels = _decoded(dataset, steps, num_workers, torch.device(device).type == "cuda")

    def network_inputs() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for step, (images, indices) in enumerate(zip(pixels, again, strict=True), start_step):
            images = to_network(images.to(device, non_blocking=True))
            if dataset.flip:
                mirror = torch.rand(batch_size, generator=_generator(seed, "flip", step)) < 0.5
                mirror = mirror[local_slice].to(device, non_blocking=True)
                images = torch.where(mirror[:, None, None, None], images.flip(3), images)
            yield images, None if dataset.labels is None else dataset.labels[indices]

    return network_inputs()


def everything(
    dataset: AnySet, batch_size: int, num_workers: int = 0, start: int = 0, stop: int | None = None
) -> Iterator[torch.Tensor]:
    """Every image from `start` up to `stop` (default: the end) once, in order, never mirrored:
    uint8 (≤ batch_size, C, H, W) on the CPU."""
    stop = len(dataset) if stop is None else stop
    if start >= stop:
        return iter(())
    if dataset.tensor is not None:
        return iter(dataset.tensor[start:stop].split(batch_size))
    return _decoded(dataset, torch.arange(start, stop).split(batch_size), num_workers, False)


def _local_slice(batch_size: int, part: tuple[int, int]) -> slice:
    """Which positions of a step's batch belong to process `part` = (rank, world)."""
    rank, world = part
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)


def _generator(seed: int, stream: str, counter: int) -> torch.Generator:
    """The CPU generator of this (seed, stream, counter), independent of all others."""
    entropy = [seed % 2**64, zlib.crc32(stream.encode()), counter]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def _step_indices(
    count: int, batch_size: int, seed: int, start_step: int, local_slice: slice
) -> Iterator[torch.Tensor]:
    """For each step from `start_step` on, the image indices at `local_slice` of its batch."""

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> torch.Tensor:
        return torch.randperm(count, generator=_generator(seed, "epoch", epoch))

    for step in itertools.count(start_step):
        position = step * batch_size + local_slice.start
        end = step * batch_size + local_slice.stop
        pieces = []
        while position < end:
            epoch, offset = divmod(position, count)
            pieces.append(epoch_order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        yield torch.cat(pieces)


def _indexed(
    tensor: torch.Tensor, steps: Iterable[torch.Tensor], device: str | torch.device
) -> Iterator[torch.Tensor]:
    """The images of each step's indices, from a set in memory."""
    if tensor.nbytes <= RESIDENT_BYTES:
        tensor = tensor.to(device)
    for indices in steps:
        yield tensor[indices.to(tensor.device, non_blocking=True)]


class _BatchOrError(Dataset):
    """What a loading process runs: a list of indices → one uint8 batch, or the UserError.

    An error raised there would arrive wrapped in that process's traceback; one that is returned
    arrives unchanged.
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


def _no_collation(batch: object) -> object:
    return batch


def _ignore_signals_to_the_group(worker: int) -> None:
    """End a loading process only by a signal from its parent. A signal to the whole process group,
    such as Ctrl-C, is for the main process, which saves and then ends the others."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def end_with_parent() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _decoded(
    dataset: Dataset, index_lists: Iterable[torch.Tensor], num_workers: int, pin: bool
) -> Iterator[torch.Tensor]:
    """The images of each list of indices, decoded by `num_workers` processes (0: by this one)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    loader = DataLoader(
        _BatchOrError(dataset),
        batch_sampler=(indices.tolist() for indices in index_lists),
        collate_fn=_no_collation,
        num_workers=min(num_workers, cores),  # more would wait for each other
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise it draws from the run's own generator
        worker_init_fn=_ignore_signals_to_the_group,
    )
    for images in loader:
        if isinstance(images, UserError):
            raise images
        yield images
