"""What every sampler offers: the steps of a chain, its calls of the network, and running it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffusion import Denoiser, Noise, NoiseLevels, Observer
from settings import SamplingSettings

OURS = ("ddpm", "ddim", "edm")  # any other name is that of a scheduler of diffusers
CHURN = ("S_churn", "S_tmin", "S_tmax", "S_noise")


class Call(NamedTuple):
    """A call of the network at timestep t, by the step that begins at timestep `step`."""

    step: int
    t: int


@dataclass(frozen=True)
class Sampler(ABC):
    """What makes images of noise.

    settings: of which it heeds some. levels: noise levels of the network. mean_type: what that
    predicts. limit: what x_0 is clipped to, [−limit, limit], by whoever runs the chain; infinite
    for latents.
    """

    settings: SamplingSettings
    levels: NoiseLevels
    mean_type: str
    limit: float = 1.0
    # Whether a chain can go on from its x at any step, bit for bit, and may leave steps out (width
    # 0); names of further settings that as_json holds.
    resumes: ClassVar[bool] = False
    skips: ClassVar[bool] = False
    heeds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise UserError where a setting is not for this sampler."""

    @property
    def steps(self) -> int:
        """How many steps were asked for."""
        return self.settings.sample_steps or self.levels.T

    @property
    def clips(self) -> bool:
        """Whether it can clip the predicted x_0 within each step."""
        return self.limit == 1

    @abstractmethod
    def entries(self) -> list[int]:
        """The timestep of each step that was asked for, rising; some may meet after rounding."""

    @abstractmethod
    def calls(self, timesteps: Sequence[int] | None = None) -> list[Call]:
        """The calls of the network, in order; timesteps: as for `sample`."""

    @abstractmethod
    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        noise: Noise,
        timesteps: Sequence[int] | None = None,
        observe: Observer | None = None,
        start: int = 0,
    ) -> Tensor:
        """Run the chain; x_0 like x, not clipped.

        x: the initial noise, unit Gaussian; or, with start > 0, what `observe` saw at the start-th
        of `timesteps`, counted from the largest. timesteps: the ones to visit, by default all.
        """

    def as_json(self) -> dict[str, object]:
        """What search logs and scores say of a sampler. JSON has no infinity."""
        names = ("sampler", "sample_steps", "timestep_spacing", "eta", "var_type", "clip_denoised")
        values = {name: getattr(self.settings, name) for name in (*names, *self.heeds)}
        values["mean_type"] = self.mean_type
        return {name: None if value == math.inf else value for name, value in values.items()}


def timesteps(sampler: Sampler) -> list[int]:
    """The timesteps that the sampler's steps begin at, rising, each once."""
    return sorted(set(sampler.entries()))
