"""Diffusion: noise schedule, training loss and samplers, as pure functions of a denoiser.

This file sees the network as a callable. It knows nothing of widths, images, devices or seeds:
noise is an argument. Step constants are computed in float64 on the host and enter the tensor
arithmetic as numbers, so that no step waits for a device.

Conventions: x is (B, C, H, W); timestep t runs from T − 1 (almost pure noise) to 0; `abar(t)` is
the share of signal variance ᾱ_t, and abar(−1) = 1 is the clean image. Every sampler takes
`denoise(x, t: int)`, the initial noise `x_T` (unit Gaussian), the noise schedule, and `noise(t)`,
the Gaussian noise of the step that leaves t. `observe(t, x)`, where given, is called with each x
just before it is denoised at t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from errors import UserError

MEAN_TYPES = ("epsilon", "xprev", "xstart")
VAR_TYPES = ("fixedlarge", "fixedsmall")
SPACINGS = ("uniform", "quadratic")

Denoiser = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Observer = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class NoiseSchedule:
    """β linear from beta_1 to beta_T over T timesteps, in float64 (Ho et al. 2020)."""

    beta_1: float
    beta_T: float
    T: int

    def __post_init__(self) -> None:
        if self.T < 1:
            raise UserError(f"--T={self.T}: must be at least 1")
        if not 0 < self.beta_1 <= self.beta_T < 1:
            raise UserError(
                f"--beta_1={self.beta_1} --beta_T={self.beta_T}: need 0 < beta_1 <= beta_T < 1"
            )

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64."""
        return np.linspace(self.beta_1, self.beta_T, self.T, dtype=np.float64)

    @cached_property
    def alpha_bars(self) -> np.ndarray:
        """(T,) float64: ᾱ_t = ∏ (1 − β_s) for s ≤ t."""
        return np.cumprod(1.0 - self.betas)

    def abar(self, t: int) -> float:
        """ᾱ_t; 1 for t = −1, the clean image."""
        return 1.0 if t < 0 else float(self.alpha_bars[t])

    def timesteps(self, steps: int, spacing: str = "uniform") -> list[int]:
        """The timesteps, rising, that a sampler of `steps` steps keeps.

        uniform: 0, T/K, 2T/K, …; quadratic: ⌊linspace(0, √(0.8·T), K)²⌋ (Song et al. 2021).
        """
        if not 1 <= steps <= self.T:
            raise UserError(f"--sample_steps={steps}: must be in 1 to T={self.T}")
        if spacing == "uniform":
            return [i * self.T // steps for i in range(steps)]
        if spacing == "quadratic":
            return [int(s) for s in np.linspace(0, np.sqrt(self.T * 0.8), steps) ** 2]
        raise UserError(f"--timestep_spacing={spacing}: one of {', '.join(SPACINGS)}")

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of the forward process: √ᾱ_t·x_0 + √(1 − ᾱ_t)·noise, for t (B,) long."""
        abar = self.gather(self.alpha_bars, t, x_0)
        return abar.sqrt().to(x_0) * x_0 + (1 - abar).sqrt().to(x_0) * noise

    @staticmethod
    def gather(values: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """values[t] as float64, shaped to multiply `like` (B, C, H, W)."""
        table = torch.from_numpy(values).to(t.device)
        return table[t].view(-1, *[1] * (like.ndim - 1))


def loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    mean_type: str = "epsilon",
) -> Tensor:
    """Mean squared error between the prediction at x_t and what it should be; a scalar.

    t (B,) long; noise like x_0. The target is the noise (epsilon), x_0 (xstart) or the mean of
    q(x_{t−1} | x_t, x_0) (xprev). Ho et al. 2020, equation 14.
    """
    x_t = schedule.q_sample(x_0, t, noise)
    if mean_type == "epsilon":
        target = noise
    elif mean_type == "xstart":
        target = x_0
    else:
        before = np.append(1.0, schedule.alpha_bars[:-1])
        c_0 = np.sqrt(before) * schedule.betas / (1 - schedule.alpha_bars)
        c_t = np.sqrt(1 - schedule.betas) * (1 - before) / (1 - schedule.alpha_bars)
        target = schedule.gather(c_0, t, x_0).to(x_0) * x_0
        target = target + schedule.gather(c_t, t, x_0).to(x_0) * x_t
    return torch.nn.functional.mse_loss(denoise(x_t, t).to(target), target)


@dataclass(frozen=True)
class _Step:
    """The step from timestep t to timestep s < t (s = −1: the clean image), in float64.

    q(x_s | x_t, x_0) has mean c_0·x_0 + c_t·x_t and variance `posterior`; β is the variance that
    the forward process adds from s to t. For s = t − 1 these are Ho et al.'s equations 6 and 7.
    """

    abar_t: float
    abar_s: float

    @property
    def beta(self) -> float:
        return 1 - self.abar_t / self.abar_s

    @property
    def c_0(self) -> float:
        return math.sqrt(self.abar_s) * self.beta / (1 - self.abar_t)

    @property
    def c_t(self) -> float:
        return math.sqrt(self.abar_t / self.abar_s) * (1 - self.abar_s) / (1 - self.abar_t)

    @property
    def posterior(self) -> float:
        return self.beta * (1 - self.abar_s) / (1 - self.abar_t)


def predict_x_0(
    output: Tensor, x_t: Tensor, t: int, schedule: NoiseSchedule, mean_type: str, clip: bool
) -> Tensor:
    """x̂_0 from what the network put out at x_t, clipped to [−1, 1] where `clip` says so."""
    abar = schedule.abar(t)
    if mean_type == "epsilon":
        x_0 = x_t / math.sqrt(abar) - output * math.sqrt(1 / abar - 1)
    elif mean_type == "xstart":
        x_0 = output
    elif mean_type == "xprev":
        step = _Step(abar, schedule.abar(t - 1))
        x_0 = (output - step.c_t * x_t) / step.c_0
    else:
        raise UserError(f"--mean_type={mean_type}: one of {', '.join(MEAN_TYPES)}")
    return x_0.clamp(-1, 1) if clip else x_0


def _kept(steps: int | Sequence[int] | None, spacing: str, schedule: NoiseSchedule) -> list[int]:
    """The timesteps to visit, falling.

    Quadratic spacing can name a timestep twice; a step from t to t changes nothing and is left out.
    """
    if steps is None:
        steps = schedule.T
    if isinstance(steps, int):
        steps = schedule.timesteps(steps, spacing)
    if not steps:
        raise UserError("a sampler needs at least one timestep")
    return sorted(set(steps), reverse=True)


def sample_ddpm(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Noise,
    var_type: str = "fixedlarge",
    mean_type: str = "epsilon",
    clip_denoised: bool = False,
    steps: int | Sequence[int] | None = None,
    spacing: str = "uniform",
    observe: Observer | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); x_0 in [−1, 1], like x_T.

    var_type: variance of a step, fixedlarge (β) or fixedsmall (the posterior's, which is 0 in the
    last step, where no noise is added). steps: how many timesteps to keep, or which; default all.
    Over a gap, the step is that of the process that visits the kept timesteps alone (Nichol and
    Dhariwal 2021). The starting x is taken to be at the largest kept timestep.
    """
    if var_type not in VAR_TYPES:
        raise UserError(f"--var_type={var_type}: one of {', '.join(VAR_TYPES)}")
    kept = _kept(steps, spacing, schedule)
    x = x_T
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        if observe:
            observe(t, x)
        step = _Step(schedule.abar(t), schedule.abar(s))
        x_0 = predict_x_0(denoise(x, t), x, t, schedule, mean_type, clip_denoised)
        x = step.c_0 * x_0 + step.c_t * x
        if s >= 0:
            variance = step.beta if var_type == "fixedlarge" else step.posterior
            x = x + math.sqrt(variance) * noise(t)
    return x.clamp(-1, 1)


def sample_ddim(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int | Sequence[int],
    eta: float = 0.0,
    noise: Noise | None = None,
    mean_type: str = "epsilon",
    clip_denoised: bool = False,
    spacing: str = "uniform",
    observe: Observer | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16); x_0 in [−1, 1], like x_T.

    steps: how many timesteps to keep, or which. eta: 0 is deterministic, 1 has the ancestral
    sampler's variance; noise is needed for eta > 0 alone.
    """
    if eta < 0:
        raise UserError(f"--eta={eta}: must not be negative")
    if eta > 0 and noise is None:
        raise ValueError("sample_ddim with eta > 0 needs `noise`")
    kept = _kept(steps, spacing, schedule)
    x = x_T
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        if observe:
            observe(t, x)
        step = _Step(schedule.abar(t), schedule.abar(s))
        output = denoise(x, t)
        x_0 = predict_x_0(output, x, t, schedule, mean_type, clip_denoised)
        if mean_type == "epsilon" and not clip_denoised:
            epsilon = output
        else:
            epsilon = (x - math.sqrt(step.abar_t) * x_0) / math.sqrt(1 - step.abar_t)
        sigma = eta * math.sqrt(step.posterior)
        direction = math.sqrt(max(0.0, 1 - step.abar_s - sigma**2))
        x = math.sqrt(step.abar_s) * x_0 + direction * epsilon
        if sigma > 0:
            x = x + sigma * noise(t)
    return x.clamp(-1, 1)
