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

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64, rising: σ_t = √((1 − ᾱ_t)/ᾱ_t), noise over signal. x_t/√ᾱ_t is the clean
        image plus noise of this deviation (Karras et al. 2022)."""
        return np.sqrt((1 - self.alpha_bars) / self.alpha_bars)

    def nearest(self, sigma: float) -> int:
        """The timestep whose σ_t is nearest to `sigma`; the smaller of two that are as near."""
        return int(np.abs(self.sigmas - sigma).argmin())

    def timesteps(self, steps: int, spacing: str = "uniform") -> list[int]:
        """The timesteps, rising, that a sampler of `steps` steps keeps.

        uniform: 0, T/K, 2T/K, …; quadratic: ⌊linspace(0, √(0.8·T), K)²⌋ (Song et al. 2021).
        """
        self._check_steps(steps)
        if spacing == "uniform":
            return [i * self.T // steps for i in range(steps)]
        if spacing == "quadratic":
            return [int(s) for s in np.linspace(0, np.sqrt(self.T * 0.8), steps) ** 2]
        raise UserError(f"--timestep_spacing={spacing}: one of {', '.join(SPACINGS)}")

    def edm_timesteps(self, steps: int, rho: float = 7.0) -> list[int]:
        """The timesteps, rising, that sample_edm's `steps` steps sit at.

        σ^(1/ρ) falls evenly from the largest σ_t to the smallest (Karras et al. 2022, equation 5),
        and each σ is rounded to the nearest σ_t. Two can meet there, as in quadratic spacing; the
        sampler then visits that timestep once.
        """
        self._check_steps(steps)
        if not rho > 0:
            raise UserError(f"--rho={rho}: must be positive")
        if steps == 1:
            return [self.T - 1]
        ends = self.sigmas[[0, -1]] ** (1 / rho)
        return [self.nearest(sigma) for sigma in np.linspace(*ends, steps) ** rho]

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= self.T:
            raise UserError(f"--sample_steps={steps}: must be in 1 to T={self.T}")

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
    elif mean_type == "xprev":
        before = np.append(1.0, schedule.alpha_bars[:-1])
        c_0 = np.sqrt(before) * schedule.betas / (1 - schedule.alpha_bars)
        c_t = np.sqrt(1 - schedule.betas) * (1 - before) / (1 - schedule.alpha_bars)
        target = schedule.gather(c_0, t, x_0).to(x_0) * x_0
        target = target + schedule.gather(c_t, t, x_0).to(x_0) * x_t
    else:
        raise UserError(f"--mean_type={mean_type}: one of {', '.join(MEAN_TYPES)}")
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


SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class Sampler:
    """Everything about a chain but its network and its noise.

    sampler: one of SAMPLERS. sample_steps: how many timesteps to keep, 0 for all of them.
    timestep_spacing: which ones. eta: of DDIM. var_type: of DDPM. mean_type: what the network
    predicts. clip_denoised: clip x̂_0 to [−1, 1] within each step.
    """

    sampler: str = "ddpm"
    sample_steps: int = 0
    timestep_spacing: str = "uniform"
    eta: float = 0.0
    var_type: str = "fixedlarge"
    mean_type: str = "epsilon"
    clip_denoised: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("sampler", SAMPLERS),
            ("timestep_spacing", SPACINGS),
            ("var_type", VAR_TYPES),
            ("mean_type", MEAN_TYPES),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"--{name}={getattr(self, name)}: one of {', '.join(known)}")
        if self.sample_steps < 0:
            raise UserError(f"--sample_steps={self.sample_steps}: must be 0 (all) or positive")
        if self.eta < 0:
            raise UserError(f"--eta={self.eta}: must not be negative")

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The timesteps that the chain visits, rising."""
        steps = self.sample_steps or schedule.T
        return sorted(set(schedule.timesteps(steps, self.timestep_spacing)))

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: NoiseSchedule,
        noise: Noise,
        timesteps: Sequence[int] | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run the chain from x, taken to be at the largest of `timesteps`; x_0 in [−1, 1].

        timesteps: the ones to visit, by default all that the sampler keeps.
        """
        common = {
            "noise": noise,
            "mean_type": self.mean_type,
            "clip_denoised": self.clip_denoised,
            "steps": self.timesteps(schedule) if timesteps is None else timesteps,
            "observe": observe,
        }
        if self.sampler == "ddpm":
            return sample_ddpm(denoise, x, schedule, var_type=self.var_type, **common)
        return sample_ddim(denoise, x, schedule, eta=self.eta, **common)


def sample_edm(
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
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
) -> Tensor:
    """EDM's sampler (Karras et al. 2022, algorithms 1 and 2); x_0 in [−1, 1], like x_T.

    Here x is the clean image plus noise of deviation σ; the network sees √ᾱ_t·x, which is
    x/√(1 + σ_t²). steps: how many σ, spaced by rho as `edm_timesteps` says, or which timesteps.
    x_T is unit Gaussian and becomes x at the largest σ. S_churn > 0 adds noise before each of the
    N steps with S_min ≤ σ ≤ S_max, up to (1 + min(S_churn/N, √2 − 1))·σ rounded to a trained σ,
    and needs `noise`; the network is then called at timesteps between the steps' own, too.
    heun=False leaves out the second-order correction (Euler). `observe` gets each step's t and x.
    """
    if S_churn < 0 or S_noise < 0:
        raise UserError(f"--S_churn={S_churn} --S_noise={S_noise}: must not be negative")
    if S_churn > 0 and noise is None:
        raise ValueError("sample_edm with S_churn > 0 needs `noise`")
    if isinstance(steps, int):
        steps = schedule.edm_timesteps(steps, rho)
    kept = _kept(steps, "uniform", schedule)

    def slope(x: Tensor, t: int) -> Tensor:
        """dx/dσ at timestep t: (x − x̂_0)/σ."""
        x_t = x * math.sqrt(schedule.abar(t))
        x_0 = predict_x_0(denoise(x_t, t), x_t, t, schedule, mean_type, clip_denoised)
        return (x - x_0) / sigmas[t]

    # The last entry is what index −1 finds: the clean image.
    sigmas = [*schedule.sigmas.tolist(), 0.0]
    gamma = min(S_churn / len(kept), math.sqrt(2) - 1)
    x = x_T * sigmas[kept[0]]
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        if observe:
            observe(t, x)
        churned = t
        if S_min <= sigmas[t] <= S_max:
            churned = schedule.nearest((1 + gamma) * sigmas[t])
        if churned != t:
            x = x + S_noise * math.sqrt(sigmas[churned] ** 2 - sigmas[t] ** 2) * noise(t)
        step = sigmas[s] - sigmas[churned]
        first = slope(x, churned)
        following = x + step * first
        if heun and s >= 0:
            following = x + step * (first + slope(following, s)) / 2
        x = following
    return x.clamp(-1, 1)
