"""Which network runs at which timestep: width schedules, candidate networks, and the denoiser
that a sampler calls.

A step-aware denoiser is a set of candidate networks and a schedule that names one of them per
timestep. Slices of one supernet are the usual candidates; separately trained networks are the same
thing with other candidates. No sampler is known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from errors import UserError
from files import write_text


class WidthSchedule:
    """The width of each timestep: `schedule[t]`.

    `widths` has one entry a timestep, entry 0 for t = 0 (the last, least noisy step). With
    `timesteps`, it has one entry for each of those instead, entry 0 for the smallest; any other
    t, also a fractional one, has the width of the nearest.
    """

    def __init__(self, widths: Iterable[float], timesteps: Sequence[int] | None = None) -> None:
        self.widths = tuple(widths)
        keys = range(len(self.widths)) if timesteps is None else sorted(timesteps)
        self._at = dict(zip(keys, self.widths, strict=True))

    def __getitem__(self, t: float) -> float:
        if t in self._at:
            return self._at[t]
        return self._at[min(self._at, key=lambda known: abs(known - t))]

    def expanded(self, T: int) -> WidthSchedule:
        """The same schedule with an entry for each of T timesteps."""
        return WidthSchedule([self[t] for t in range(T)])

    def __len__(self) -> int:
        return len(self.widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WidthSchedule) and self._at == other._at

    def __hash__(self) -> int:
        return hash(tuple(self._at.items()))

    @classmethod
    def load(
        cls,
        path: str | Path,
        T: int,
        candidates: Sequence[float],
        timesteps: Sequence[int] | None = None,
    ) -> WidthSchedule:
        """Read a JSON list of T widths, or of one width for each of a sampler's `timesteps`.

        Raises UserError for a file that is no JSON list of numbers, another length, or a width
        that is not among `candidates`. Nothing in the file is executed.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UserError(
                f"no width schedule at {path}; run --search first, or name one with --schedule"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the width schedule {path}: {error}") from error
        try:
            widths = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not JSON ({error}); a width schedule is one list, [1, 0.75, …]"
            ) from error
        if not isinstance(widths, list) or not all(
            isinstance(w, (int, float)) and not isinstance(w, bool) for w in widths
        ):
            raise UserError(f"{path} is not a list of numbers; a width schedule is [1, 0.75, …]")
        lengths = {T} if timesteps is None else {T, len(timesteps)}
        if len(widths) not in lengths:
            raise UserError(
                f"{path} has {len(widths)} entries; expected "
                + " (every timestep) or ".join(str(n) for n in sorted(lengths, reverse=True))
                + (" (one for each sampler step)" if len(lengths) > 1 else " (every timestep)")
            )
        for i, width in enumerate(widths):
            if width not in candidates:
                names = ", ".join(f"{c:g}" for c in candidates)
                raise UserError(
                    f"{path}: entry {i} is width {width}, which is no candidate ({names}); "
                    "see --candidate_width and --min_width"
                )
        return cls(map(float, widths), None if len(widths) == T else timesteps)

    def save(self, path: str | Path) -> None:
        """Write the schedule as one JSON line, whole or not at all."""
        write_text(path, json.dumps([int(w) if w == int(w) else w for w in self.widths]) + "\n")


class Supernet(Protocol):
    """What can be cut to a width."""

    def subnet(self, width: float) -> nn.Module: ...


class Candidate(nn.Module):
    """A dense network ready for sampling: channels last, in `dtype`, float32 in and out."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = network.to(dtype=dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W) float32, t (B,) long -> like x."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.network(x, t).to(torch.float32, memory_format=torch.contiguous_format)


def candidates(
    net: Supernet, widths: Iterable[float], dtype: torch.dtype = torch.float32
) -> dict[float, Candidate]:
    """A dense candidate network for each width."""
    return {width: Candidate(net.subnet(width), dtype) for width in widths}


class StepAwareDenoiser:
    """`denoise(x, t)`: the network that the schedule names for t, at x (B, C, H, W)."""

    def __init__(
        self,
        networks: Mapping[Hashable, Callable[[Tensor, Tensor], Tensor]],
        schedule: WidthSchedule | Sequence[Hashable],
        T: int,
        device: torch.device | str,
    ) -> None:
        self.networks, self.schedule = networks, schedule
        # Every timestep lies on the device already, so a step copies nothing from the host.
        self._timesteps = torch.arange(T, device=device)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        return self.networks[self.schedule[t]](x, self._timesteps[t].expand(len(x)))


def average(
    schedule: WidthSchedule, timesteps: Iterable[int], cost: Mapping[float, float]
) -> float:
    """The mean over `timesteps` of what each one's width costs."""
    return math.fsum(costs := [cost[schedule[t]] for t in timesteps]) / len(costs)
