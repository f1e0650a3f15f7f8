"""Diffusion: noise levels, what a network learns to answer, sampling loops: pure functions.

This file sees the network as a callable. It knows nothing of widths, images, devices or seeds:
noise is an argument. Step constants are computed in float64 on the host and enter the tensor
arithmetic as numbers, so that no step waits for a device.

Conventions: x is (B, C, H, W); timestep t runs from T − 1 (almost pure noise) to 0; `abar(t)` is
the share of signal variance ᾱ_t, and abar(−1) = 1 is the clean image. Every sampler takes
`denoise(x, t: int)`, the initial noise `x_T` (unit Gaussian), the noise levels, and `noise(t)`, the
Gaussian noise of the step that leaves t. A denoiser with a third argument is also told the timestep
of the step that calls it, which differs from t where a step makes more calls than one. `observe(t,
x)`, where given, is called with each step's x just before it is denoised at t. x_0 is clipped to
[−limit, limit]. What an argument may be is what the option of its name may be: settings that are
made of the arguments refuse the rest.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from settings import MEAN_TYPES, DiffusionSettings, SamplingSettings

Denoiser = Callable[[Tensor, int], Tensor] | Callable[[Tensor, int, int], Tensor]
Noise = Callable[[int], Tensor]
Observer = Callable[[int, Tensor], None]


class _Levels:
    """Noise levels by timestep, as sample_edm sees them: T, and `sigmas` that rise with t."""

    T: int
    sigmas: np.ndarray

    def nearest(self, sigma: float) -> int:
        """The timestep whose σ_t is nearest to `sigma`; the smaller of two that are as near."""
        return int(np.abs(self.sigmas - sigma).argmin())

    def edm_timesteps(self, steps: int, rho: float = 7.0) -> list[int]:
        """The timesteps, rising, that sample_edm's `steps` steps sit at.

        σ^(1/ρ) falls evenly from the largest σ_t to the smallest (Karras et al. 2022, equation 5),
        and each σ is rounded to the nearest σ_t. Two can meet there, as in quadratic spacing; the
        sampler then visits that timestep once.
        """
        self._check_steps(steps)
        SamplingSettings(rho=rho)
        if steps == 1:
            return [self.T - 1]
        ends = self.sigmas[[0, -1]] ** (1 / rho)
        return [self.nearest(sigma) for sigma in np.linspace(*ends, steps) ** rho]

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= self.T:
            raise UserError(f"--sample_steps={steps}: must be in 1 to T={self.T}")

    @staticmethod
    def gather(values: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """values[t] as float64, shaped to multiply `like` (B, C, H, W)."""
        table = torch.from_numpy(values).to(t.device, non_blocking=True)
        return table[t].view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class NoiseSchedule(_Levels):
    """β from beta_1 to beta_T over T timesteps, in float64; variance is preserved.

    beta_schedule: linear (Ho et al. 2020), scaled_linear (√β is linear; Rombach et al. 2022) or
    squaredcos_cap_v2 (Nichol and Dhariwal 2021, which has no beta_1 and beta_T): diffusers' names.
    """

    beta_1: float
    beta_T: float
    T: int
    beta_schedule: str = "linear"

    def __post_init__(self) -> None:
        DiffusionSettings(**vars(self))  # which refuses what cannot be

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64."""
        if self.beta_schedule == "squaredcos_cap_v2":
            time = np.arange(self.T + 1, dtype=np.float64) / self.T
            remaining = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        ends = self.beta_1**power, self.beta_T**power
        return np.linspace(*ends, self.T, dtype=np.float64) ** (1 / power)

    @cached_property
    def alpha_bars(self) -> np.ndarray:
        """(T,) float64: ᾱ_t = ∏ (1 − β_s) for s ≤ t."""
        return np.cumprod(1.0 - self.betas)

    def abar(self, t: int) -> float:
        """ᾱ_t; 1 for t = −1, the clean image."""
        return 1.0 if t < 0 else float(self.alpha_bars[t])

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64, rising: σ_t = √((1 − ᾱ_t)/ᾱ_t), noise over signal. x_t/√ᾱ_t is the clean
        image plus noise of this deviation (Karras et al. 2022)."""
        return np.sqrt((1 - self.alpha_bars) / self.alpha_bars)

    def timesteps(self, steps: int, spacing: str = "uniform") -> list[int]:
        """The timesteps, rising, that a sampler of `steps` steps keeps.

        uniform: 0, T/K, 2T/K, …; quadratic: ⌊linspace(0, √(0.8·T), K)²⌋ (Song et al. 2021);
        leading, trailing and linspace: as diffusers' schedulers have them (Lin et al. 2024, table
        2). A single step is at T − 1, whatever the spacing: anywhere else the network would be
        shown pure noise as a noisy image.
        """
        self._check_steps(steps)
        T = self.T
        SamplingSettings(timestep_spacing=spacing)
        if steps == 1:
            return [T - 1]
        if spacing == "uniform":
            return [i * T // steps for i in range(steps)]
        if spacing == "quadratic":
            return [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), steps) ** 2]
        if spacing == "leading":
            return [i * (T // steps) for i in range(steps)]
        if spacing == "linspace":
            return [int(t) for t in np.linspace(0, T - 1, steps).round()]
        return [round(T - i * (T / steps)) - 1 for i in reversed(range(steps))]

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of the forward process: √ᾱ_t·x_0 + √(1 − ᾱ_t)·noise, for t (B,) long."""
        abar = self.gather(self.alpha_bars, t, x_0)
        return abar.sqrt().to(x_0) * x_0 + (1 - abar).sqrt().to(x_0) * noise

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,) long: all are equally likely."""
        return torch.randint(self.T, (count,), generator=generator)

    def training_pair(
        self, x_0: Tensor, t: Tensor, noise: Tensor, mean_type: str = "epsilon"
    ) -> tuple[Tensor, Tensor]:
        """What the network is shown at t (B,) long, x_t, and what it should answer; like x_0.

        The answer is the noise (epsilon), x_0 (xstart), the mean of q(x_{t−1} | x_t, x_0) (xprev)
        or √ᾱ_t·noise − √(1 − ᾱ_t)·x_0 (v; Salimans and Ho 2022).
        """
        x_t = self.q_sample(x_0, t, noise)
        if mean_type == "epsilon":
            return x_t, noise
        if mean_type == "xstart":
            return x_t, x_0
        if mean_type == "xprev":
            before = np.append(1.0, self.alpha_bars[:-1])
            c_0 = np.sqrt(before) * self.betas / (1 - self.alpha_bars)
            c_t = np.sqrt(1 - self.betas) * (1 - before) / (1 - self.alpha_bars)
            mean = self.gather(c_0, t, x_0).to(x_0) * x_0
            return x_t, mean + self.gather(c_t, t, x_0).to(x_0) * x_t
        if mean_type == "v":
            abar = self.gather(self.alpha_bars, t, x_0)
            return x_t, abar.sqrt().to(x_0) * noise - (1 - abar).sqrt().to(x_0) * x_0
        raise UserError(f"--mean_type={mean_type}: one of {', '.join(MEAN_TYPES)}")

    def scale_in(self, t: int) -> float:
        """√ᾱ_t: what clean image + σ_t·noise is multiplied by to be the network's input."""
        return math.sqrt(self.abar(t))

    def denoised(self, output: Tensor, x: Tensor, t: int, mean_type: str, clip: bool) -> Tensor:
        """x̂_0 from the network's output at its input x, clipped to [−1, 1] where `clip` says so."""
        abar = self.abar(t)
        if mean_type == "epsilon":
            x_0 = x / math.sqrt(abar) - output * math.sqrt(1 / abar - 1)
        elif mean_type == "xstart":
            x_0 = output
        elif mean_type == "xprev":
            step = _Step(abar, self.abar(t - 1))
            x_0 = (output - step.c_t * x) / step.c_0
        elif mean_type == "v":
            x_0 = math.sqrt(abar) * x - math.sqrt(1 - abar) * output
        else:
            raise UserError(f"--mean_type={mean_type}: one of {', '.join(MEAN_TYPES)}")
        return x_0.clamp(-1, 1) if clip else x_0


@dataclass(frozen=True)
class EDMSchedule(_Levels):
    """EDM's noise levels and preconditioning (Karras et al. 2022, table 1, last column).

    The denoiser is D(y; σ) = c_skip·y + c_out·F(c_in·y), with y a clean image plus noise of
    deviation σ and F the network. Timestep t of T names a σ: σ_t^(1/ρ) rises evenly from sigma_min
    at t = 0 to sigma_max at t = T − 1. The network is told t, which rises with σ as EDM's c_noise =
    ln(σ)/4 does; so its time table, width schedules and files are as for any other schedule.
    Training draws ln σ ~ N(P_mean, P_std²) and takes the nearest ln σ_t, so that the network is
    trained at the very levels that it is sampled at. sigma_data: deviation of the data.
    """

    T: int
    P_mean: float = DiffusionSettings.P_mean
    P_std: float = DiffusionSettings.P_std
    sigma_data: float = DiffusionSettings.sigma_data
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        DiffusionSettings(
            T=self.T, P_mean=self.P_mean, P_std=self.P_std, sigma_data=self.sigma_data
        )
        if self.T < 2:
            raise UserError(f"--T={self.T}: --precond=edm needs at least 2 noise levels")

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64, rising."""
        ends = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return np.linspace(*ends, self.T) ** self.rho

    @cached_property
    def c_skip(self) -> np.ndarray:
        """(T,) float64, as the other coefficients are."""
        return self.sigma_data**2 / (self.sigmas**2 + self.sigma_data**2)

    @cached_property
    def c_out(self) -> np.ndarray:
        return self.sigmas * self.sigma_data / np.sqrt(self.sigmas**2 + self.sigma_data**2)

    @cached_property
    def c_in(self) -> np.ndarray:
        return 1 / np.sqrt(self.sigmas**2 + self.sigma_data**2)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,) long."""
        logs = self.P_mean + self.P_std * torch.randn(
            count, generator=generator, dtype=torch.float64
        )
        known = np.log(self.sigmas)
        return torch.bucketize(logs, torch.from_numpy((known[1:] + known[:-1]) / 2))

    def training_pair(
        self, x_0: Tensor, t: Tensor, noise: Tensor, mean_type: str = "epsilon"
    ) -> tuple[Tensor, Tensor]:
        """What the network is shown at t (B,) long, c_in·y, and what it should answer; like x_0.

        The answer is (x_0 − c_skip·y)/c_out. EDM weighs the denoiser's squared error by 1/c_out²,
        which makes it the plain squared error of this answer.
        """
        y = x_0 + self.gather(self.sigmas, t, x_0).to(x_0) * noise
        rest = x_0 - self.gather(self.c_skip, t, x_0).to(x_0) * y
        answer = rest / self.gather(self.c_out, t, x_0).to(x_0)
        return self.gather(self.c_in, t, x_0).to(x_0) * y, answer

    def scale_in(self, t: int) -> float:
        """c_in: what clean image + σ_t·noise is multiplied by to be the network's input."""
        return float(self.c_in[t])

    def denoised(self, output: Tensor, x: Tensor, t: int, mean_type: str, clip: bool) -> Tensor:
        """x̂_0 from the network's output at its input x = c_in·y."""
        x_0 = float(self.c_skip[t] / self.c_in[t]) * x + float(self.c_out[t]) * output
        return x_0.clamp(-1, 1) if clip else x_0


NoiseLevels = NoiseSchedule | EDMSchedule


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


def _kept(steps: int | Sequence[int] | None, spacing: str, schedule: NoiseLevels) -> list[int]:
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
    limit: float = 1.0,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); x_0 in [−1, 1], like x_T.

    var_type: variance of a step, fixedlarge (β) or fixedsmall (the posterior's, which is 0 in the
    last step, where no noise is added). steps: how many timesteps to keep, or which; default all.
    Over a gap, the step is that of the process that visits the kept timesteps alone (Nichol and
    Dhariwal 2021). The starting x is taken to be at the largest kept timestep.
    """
    SamplingSettings(var_type=var_type)
    kept = _kept(steps, spacing, schedule)
    x = x_T
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        if observe:
            observe(t, x)
        step = _Step(schedule.abar(t), schedule.abar(s))
        x_0 = schedule.denoised(denoise(x, t), x, t, mean_type, clip_denoised)
        x = step.c_0 * x_0 + step.c_t * x
        if s >= 0:
            variance = step.beta if var_type == "fixedlarge" else step.posterior
            x = x + math.sqrt(variance) * noise(t)
    return x.clamp(-limit, limit)


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
    limit: float = 1.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16); x_0 in [−1, 1], like x_T.

    steps: how many timesteps to keep, or which. eta: 0 is deterministic, 1 has the ancestral
    sampler's variance; noise is needed for eta > 0 alone.
    """
    SamplingSettings(eta=eta)
    if eta > 0 and noise is None:
        raise ValueError("sample_ddim with eta > 0 needs `noise`")
    kept = _kept(steps, spacing, schedule)
    x = x_T
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        if observe:
            observe(t, x)
        step = _Step(schedule.abar(t), schedule.abar(s))
        output = denoise(x, t)
        x_0 = schedule.denoised(output, x, t, mean_type, clip_denoised)
        if mean_type == "epsilon" and not clip_denoised:
            epsilon = output
        else:
            epsilon = (x - math.sqrt(step.abar_t) * x_0) / math.sqrt(1 - step.abar_t)
        sigma = eta * math.sqrt(step.posterior)
        rest = 1 - step.abar_s - sigma**2
        if rest < -1e-9:  # further below 0 than by rounding
            raise UserError(f"--eta={eta}: too much noise for the step from {t} to {s}; lower it")
        direction = math.sqrt(max(0.0, rest))
        x = math.sqrt(step.abar_s) * x_0 + direction * epsilon
        if sigma > 0:
            x = x + sigma * noise(t)
    return x.clamp(-limit, limit)


def told_the_step(denoise: Denoiser) -> Callable[[Tensor, int, int], Tensor]:
    """`denoise` as a function of (x, t, step), also where it takes x and t alone."""
    try:
        inspect.signature(getattr(denoise, "forward", denoise)).bind(None, None, None)
    except TypeError:
        return lambda x, t, step: denoise(x, t)
    return denoise


def churned_timestep(
    schedule: NoiseLevels, steps: int, S_churn: float, S_min: float, S_max: float
) -> Callable[[int], int]:
    """The timestep up to which sample_edm's step from t adds noise, in a chain of `steps` steps."""
    gamma = min(S_churn / steps, math.sqrt(2) - 1)

    def churned(t: int) -> int:
        sigma = float(schedule.sigmas[t])
        return schedule.nearest((1 + gamma) * sigma) if S_min <= sigma <= S_max else t

    return churned


def sample_edm(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseLevels,
    *,
    steps: int | Sequence[int],
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Noise | None = None,
    mean_type: str = "epsilon",
    clip_denoised: bool = False,
    heun: bool = True,
    observe: Observer | None = None,
    start: int = 0,
    limit: float = 1.0,
) -> Tensor:
    """EDM's sampler (Karras et al. 2022, algorithms 1 and 2); x_0 in [−1, 1], like x_T.

    Here x is the clean image plus noise of deviation σ; the network of a NoiseSchedule sees √ᾱ_t·x,
    which is x/√(1 + σ_t²), that of an EDMSchedule c_in·x. steps: how many σ, spaced by rho as
    `edm_timesteps` says, or which timesteps. x_T is unit Gaussian and becomes x at the largest σ.
    S_churn > 0 adds noise before each of the N steps with S_min ≤ σ ≤ S_max, up to
    (1 + min(S_churn/N, √2 − 1))·σ rounded to a trained σ, and needs `noise`; the network is then
    called at timesteps between the steps' own, too. heun=False leaves out the second-order
    correction (Euler). With start > 0, x_T is what `observe` got of the start-th step.
    """
    SamplingSettings(S_churn=S_churn, S_noise=S_noise)
    if S_churn > 0 and noise is None:
        raise ValueError("sample_edm with S_churn > 0 needs `noise`")
    if isinstance(steps, int):
        steps = schedule.edm_timesteps(steps, rho)
    kept = _kept(steps, "uniform", schedule)

    denoise = told_the_step(denoise)

    def slope(x: Tensor, t: int, step: int) -> Tensor:
        """dx/dσ at timestep t: (x − x̂_0)/σ."""
        x_t = x * schedule.scale_in(t)
        x_0 = schedule.denoised(denoise(x_t, t, step), x_t, t, mean_type, clip_denoised)
        return (x - x_0) / sigmas[t]

    # The last entry is what index −1 finds: the clean image.
    sigmas = [*schedule.sigmas.tolist(), 0.0]
    top = churned_timestep(schedule, len(kept), S_churn, S_min, S_max)
    x = x_T if start else x_T * sigmas[kept[0]]
    for t, s in list(zip(kept, [*kept[1:], -1], strict=True))[start:]:
        if observe:
            observe(t, x)
        churned = top(t)
        if churned != t:
            x = x + S_noise * math.sqrt(sigmas[churned] ** 2 - sigmas[t] ** 2) * noise(t)
        change = sigmas[s] - sigmas[churned]
        first = slope(x, churned, t)
        following = x + change * first
        if heun and s >= 0:
            following = x + change * (first + slope(following, s, t)) / 2
        x = following
    return x.clamp(-limit, limit)
