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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from errors import UserError
from files import write_text
from model import native
from model.compiling import compile_network
from model.dense import replace_layers


class WidthSchedule:
    """The width of each timestep: `schedule[t]`.

    `widths` has one entry a timestep, entry 0 for t = 0 (the last, least noisy step). With
    `timesteps`, it has one entry for each of those instead, entry 0 for the smallest; any other
    t, also a fractional one, has the width of the nearest. Such an entry is for a sampler's step:
    where the step calls the network twice, as Heun's does, it is for both calls (see `asked`).
    """

    def __init__(self, widths: Iterable[float], timesteps: Sequence[int] | None = None) -> None:
        self.widths = tuple(widths)
        self.timesteps = None if timesteps is None else tuple(sorted(timesteps))
        keys = range(len(self.widths)) if timesteps is None else self.timesteps
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
        # Steps that a sampler was asked for can meet: the file may name them all, or each once.
        lengths = {T} if timesteps is None else {T, len(timesteps), len(set(timesteps))}
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
        if len(widths) == T:
            return cls(map(float, widths))
        keys = timesteps if len(widths) == len(timesteps) else set(timesteps)
        return cls(map(float, widths), keys)

    def save(self, path: str | Path) -> None:
        """Write the schedule as one JSON line, whole or not at all."""
        write_text(path, json.dumps([int(w) if w == int(w) else w for w in self.widths]) + "\n")


class Supernet(Protocol):
    """What can be cut to a width."""

    def subnet(self, width: float) -> nn.Module: ...


# What a candidate computes in. Winograd is float32 with fewer multiplications, on a CPU.
ARITHMETIC = {
    "float32": torch.float32,
    "winograd": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Candidate(nn.Module):
    """A dense network ready for sampling: channels last, float32 in and out.

    arithmetic: a key of ARITHMETIC; weights are cast once, here. compiled: by torch.compile, with
    CUDA graphs on a GPU; not with Winograd's loops, at each of which a compiled graph would end.
    """

    def __init__(
        self, network: nn.Module, arithmetic: str = "float32", compiled: bool = False
    ) -> None:
        super().__init__()
        self.arithmetic, self.dtype = arithmetic, ARITHMETIC[arithmetic]
        network = network.to(dtype=self.dtype, memory_format=torch.channels_last)
        if arithmetic == "winograd":
            replace_layers(network)
        self.compiled, self._batch = compiled and arithmetic != "winograd", 0
        self.network = compile_network(network, graphs=True) if self.compiled else network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) float32, t and labels (B,) long -> like x."""
        count, inputs = len(x), [x, t] if labels is None else [x, t, labels]
        if self.compiled:
            # Another size would be compiled anew, so a run's last, smaller batch is filled up.
            self._batch = max(self._batch, count)
            more = self._batch - count
            inputs = [torch.cat([v, v[:1].expand(more, *v.shape[1:])]) for v in inputs]
        x, t, *labels = inputs
        x = x.to(self.dtype, memory_format=torch.channels_last)
        with native.active(self.arithmetic == "winograd"):
            out = self.network(x, t, **({"labels": labels[0]} if labels else {}))[:count]
        # A CUDA graph writes its next result over this one, hence a copy.
        return out.to(torch.float32, memory_format=torch.contiguous_format, copy=self.compiled)


def candidates(
    net: Supernet,
    widths: Iterable[float],
    arithmetic: str | Mapping[float, str] = "float32",
    compiled: bool = False,
) -> dict[float, Candidate]:
    """A dense candidate network for each width; `arithmetic` is for all or by width."""
    named = {w: arithmetic if isinstance(arithmetic, str) else arithmetic[w] for w in widths}
    return {w: Candidate(net.subnet(w), named[w], compiled) for w in named}


@dataclass(frozen=True)
class Condition:
    """The class of each image of a batch, labels (B,) long, and how strongly it is asked for.

    The answer is without + guidance·(with − without), of the network with the class and with the
    `null` class (Ho and Salimans 2022, with guidance = 1 + w): 1 is the network with the class, 0
    the one without; any other number takes both, in one batch of 2·B.
    """

    labels: Tensor
    null: int
    guidance: float = 1.0

    def ask(self, network: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) -> like x."""
        if self.guidance == 1:
            return network(x, t, self.labels)
        nothing = torch.full_like(self.labels, self.null)
        if self.guidance == 0:
            return network(x, t, nothing)
        labels = torch.cat([self.labels, nothing])
        with_class, without = network(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return without + self.guidance * (with_class - without)


class StepAwareDenoiser:
    """`denoise(x, t)`: the network that the schedule names for t, at x (B, C, H, W).

    A sampler that calls it more than once a step says so by `begin`, for schedules that have one
    entry a step. `condition`: the classes of the batch that is denoised, where there are classes.
    """

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
        self._step: int | None = None
        self.condition: Condition | None = None

    def begin(self, step: int) -> None:
        """A sampler's step begins at timestep `step`."""
        self._step = step

    def __call__(self, x: Tensor, t: int) -> Tensor:
        asked = t if self._step is None else asked_at(self.schedule, self._step, t)
        network, time = self.networks[self.schedule[asked]], self._timesteps[t].expand(len(x))
        return self.condition.ask(network, x, time) if self.condition else network(x, time)


def asked_at(schedule: WidthSchedule | Sequence[Hashable], step: int, t: int) -> int:
    """The timestep whose entry is for a call at t in the step that begins at `step`."""
    return step if getattr(schedule, "timesteps", None) is not None else t


def asked(
    schedule: WidthSchedule | Sequence[Hashable], evaluations: Iterable[tuple[int, int]]
) -> list[int]:
    """The same for each of a sampler's `evaluations`, pairs of (step, t)."""
    return [asked_at(schedule, step, t) for step, t in evaluations]


def average(
    schedule: WidthSchedule, timesteps: Iterable[int], cost: Mapping[float, float]
) -> float:
    """The mean over `timesteps` of what each one's width costs."""
    return math.fsum(costs := [cost[schedule[t]] for t in timesteps]) / len(costs)
