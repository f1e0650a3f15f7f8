"""What a command would cost, before it runs: passes, GFLOPs, and time from a measured burst."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.networks import latency
from runtime.errors import UserError
from train import Trainer


@dataclass(frozen=True)
class Scoring:
    """So many candidates, each scored on so many images of so many steps, or network passes where
    a step has two."""

    name: str
    candidates: int
    images: int
    steps: int

    @property
    def passes(self) -> int:
        """Network passes, one an image and a step, before shared states save any."""
        return self.candidates * self.images * self.steps


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def measure(networks: Mapping, shape: tuple[int, int, int], batch: int, device) -> dict:
    """Seconds an image of a pass of each network, from about half a second of each."""
    return {name: latency(net, shape, batch, device, 0.5) for name, net in networks.items()}


def encoder_seconds(build, shape: tuple[int, int, int], batch: int) -> float | UserError:
    """Seconds an image that the encoder `build()` takes; the error where it cannot be built."""
    try:
        encoder = build()
    except UserError as error:
        return error
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8)
    encoder(images)
    start = time.perf_counter()
    encoder(images).sum().item()
    return (time.perf_counter() - start) / batch


def scoring_plan(
    scorings: Sequence[Scoring],
    flops: float,
    seconds: float,
    encoder: float | UserError,
    note: str,
) -> str:
    """The cost of `scorings` where a pass takes `flops` and `seconds`; one line for each."""
    lines = [
        f"{s.name}: {s.candidates} candidates × {s.images} images × {s.steps} steps = "
        f"{s.passes:.3g} network passes"
        for s in scorings
    ]
    passes = sum(s.passes for s in scorings)
    images = sum(s.candidates * s.images for s in scorings)
    total = passes * seconds
    if isinstance(encoder, UserError):
        lines.append(f"without the encoder's time: {encoder}")
    else:
        total += images * encoder
    lines.append(
        f"all: {passes:.3g} passes, {passes * flops / 1e9:.3g} GFLOPs, about {duration(total)} "
        f"({note})"
    )
    return "\n".join(lines)


def training_plan(trainer: Trainer, flops: Mapping[float, float]) -> str:
    """The cost of the steps that `trainer` has left, from three of them; saves nothing."""
    s = trainer.settings
    trainer.resume()
    network = trainer.wrapped()
    left = max(0, s.total_steps - trainer.step)
    batches = trainer.batches()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        trainer.train_step(network, *next(batches))
        float(trainer.norm)  # waits for the device
        times.append(time.perf_counter() - start)
    # A backward pass costs about twice the forward pass; drawn widths count by their mean.
    forward = flops[1.0]
    if s.sandwich:
        mean = sum(flops[w] for w in s.candidate_width) / max(1, len(s.candidate_width))
        forward += flops[s.min_width] + (s.num_sandwich_sampling - 2) * mean
    gflops = 3 * forward * s.batch_size * left / 1e9
    return (
        f"training: {left} steps × {s.batch_size} images × {len(s.widths(0))} widths, "
        f"{gflops:.3g} GFLOPs, about {duration(min(times[1:]) * left)} "
        f"({min(times[1:]):.3g} s a step, measured; without grids and evaluations)"
    )
