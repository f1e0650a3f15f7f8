"""What work on a device takes, without making the host wait for it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor


class Clock:
    """Time by what is done, and a second queue of device work that runs beside the first."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self.cuda else None
        self._spans: dict[str, list[tuple]] = defaultdict(list)

    @contextlib.contextmanager
    def running(self, what: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[what].append((start, self._now()))

    def _now(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def beside(self, images: Tensor) -> Iterator[None]:
        """On a GPU, do the block's work while the next batch is sampled."""
        if not self.cuda:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(images.device))
        images.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        if self.cuda:
            self._side.synchronize()

    def seconds(self, what: str) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self._spans[what])
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) / 1000 for start, end in self._spans[what])
