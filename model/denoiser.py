"""The denoiser that a sampler calls: a set of candidate networks and a schedule that names one of
them per timestep.

Slices of one supernet are the usual candidates; separately trained networks are the same thing with
other candidates. No sampler is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.schedule import WidthSchedule, entry_for_call


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
    """`denoise(x, t, step)` for a sampler, by the network that the schedule names; x (B, C, H, W).

    networks: candidates by width, or by any other name, each called as network(x, t). schedule: the
    name for each timestep. T: timesteps of the diffusion. condition: the classes of the batch that
    is denoised, where there are classes.
    """

    def __init__(
        self,
        networks: Mapping[Hashable, Callable[[Tensor, Tensor], Tensor]],
        schedule: WidthSchedule | Sequence[Hashable],
        T: int,
        device: torch.device | str,
        condition: Condition | None = None,
    ) -> None:
        self.networks, self.schedule, self.condition = networks, schedule, condition
        # Every timestep lies on the device already, so a step copies nothing from the host.
        self._timesteps = torch.arange(T, device=device)

    def __call__(self, x: Tensor, t: int, step: int | None = None) -> Tensor:
        """step: the timestep of the sampler's step that calls, where that is not t."""
        entry = entry_for_call(self.schedule, t if step is None else step, t)
        network, time = self.networks[self.schedule[entry]], self._timesteps[t].expand(len(x))
        return self.condition.ask(network, x, time) if self.condition else network(x, time)
