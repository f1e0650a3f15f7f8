"""Samplers: which steps a chain makes, which calls of the network, and the loop that runs them.

Each is a few settings around a loop of diffusion.py, or around a scheduler of diffusers. Networks
and widths are not known here: a sampler calls `denoise(x, t, step)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import diffusion
from diffusion import Denoiser, EDMSchedule, Noise, NoiseLevels, Observer
from runtime.errors import UserError
from sampling.protocol import CHURN, OURS, Call, Sampler
from settings import SamplingSettings


def make_sampler(
    settings: SamplingSettings, levels: NoiseLevels, mean_type: str, limit: float = 1.0
) -> Sampler:
    """The sampler that `settings` name. Raises UserError where it does not suit the network.

    mean_type: what the network predicts. limit: see Sampler.
    """
    s = settings
    check_name(s.sampler)
    if isinstance(levels, EDMSchedule) and s.sampler != "edm":
        raise UserError(
            f"--sampler={s.sampler}: a network trained with --precond=edm is sampled with "
            "--sampler=edm"
        )
    if s.clip_denoised and limit != 1:
        raise UserError("--clip_denoised is for pixels; latents have no such bounds")
    if s.timestep_spacing != "uniform" and s.sampler not in ("ddpm", "ddim"):
        raise UserError(
            f"--timestep_spacing={s.timestep_spacing} is for ddpm and ddim; "
            f"--sampler={s.sampler} has its own"
        )
    if s.scheduler_options and s.sampler in OURS:
        raise UserError("--scheduler_options is for schedulers of diffusers; see --sampler")
    if s.sampler in ("ddpm", "ddim"):
        sampler: Sampler = Ancestral(s, levels, mean_type, limit)
    elif s.sampler == "edm":
        sampler = EDM(s, levels, mean_type, limit)
    else:
        from sampling.schedulers import DiffusersScheduler  # diffusers takes seconds to import

        sampler = DiffusersScheduler(s, levels, mean_type, limit)
    check_signal(sampler)
    top = max(sampler.entries())  # a number of steps that cannot be is refused here
    if signal_at_start(sampler) > 0.5:
        raise UserError(
            f"--sampler={s.sampler} --sample_steps={s.sample_steps}: its first step is at timestep "
            f"{top} of {levels.T}, where an image is hardly noisy, but a chain starts from noise: "
            "take more steps, or a timestep_spacing of trailing"
        )
    return sampler


def check_signal(sampler: Sampler) -> None:
    """Raise UserError where one of our samplers divides by a share of signal so small that the
    result is beyond float32. diffusers' schedulers are tried as a whole."""
    levels, name, mean_type = sampler.levels, sampler.settings.sampler, sampler.mean_type
    divides = name == "edm" or mean_type in ("epsilon", "xprev")
    if isinstance(levels, EDMSchedule) or name not in OURS or not divides:
        return
    # Where nothing is left of the signal, edm cannot say which timesteps it keeps.
    top = levels.T - 1 if name == "edm" else max(sampler.entries())
    share = math.sqrt(levels.abar(top)) * (levels.betas[top] if mean_type == "xprev" else 1)
    if share < 10 / torch.finfo(torch.float32).max:  # noise is within 10 deviations
        raise UserError(
            f"--T={levels.T}, --beta_T={levels.beta_T}: no signal is left at timestep {top}, where "
            f"--sampler={name} of --mean_type={mean_type} divides by it; lower --beta_T or --T"
        )


def signal_at_start(sampler: Sampler) -> float:
    """The share of signal variance that a noised image has at a chain's first timestep, beyond that
    at T − 1; the chain starts from noise alone."""
    levels = sampler.levels
    if isinstance(levels, EDMSchedule):  # its chains start at the largest σ
        return 0.0
    return levels.abar(max(sampler.entries())) - levels.abar(levels.T - 1)


def check_name(name: str) -> None:
    """Raise UserError where there is no sampler of this name."""
    if name not in OURS:
        from sampling import schedulers

        schedulers.check_name(name)


class _OwnLoop(Sampler):
    """A loop of diffusion.py: x is all that a step hands to the next."""

    resumes = True

    def _falling(self, timesteps: Sequence[int] | None) -> list[int]:
        return sorted(set(self.entries() if timesteps is None else timesteps), reverse=True)


class Ancestral(_OwnLoop):
    """DDPM and DDIM."""

    skips = True

    def entries(self) -> list[int]:
        return self.levels.timesteps(self.steps, self.settings.timestep_spacing)

    def calls(self, timesteps: Sequence[int] | None = None) -> list[Call]:
        return [Call(t, t) for t in self._falling(timesteps)]

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        noise: Noise,
        timesteps: Sequence[int] | None = None,
        observe: Observer | None = None,
        start: int = 0,
    ) -> Tensor:
        s = self.settings
        common = {
            "steps": self._falling(timesteps)[start:],
            "noise": noise,
            "mean_type": self.mean_type,
            "clip_denoised": s.clip_denoised,
            "observe": observe,
            "limit": math.inf,
        }
        if s.sampler == "ddpm":
            return diffusion.sample_ddpm(denoise, x, self.levels, var_type=s.var_type, **common)
        return diffusion.sample_ddim(denoise, x, self.levels, eta=s.eta, **common)


class EDM(_OwnLoop):
    """EDM's Euler or Heun steps, stochastic where S_churn says so."""

    heeds = ("rho", "heun", *CHURN)

    def entries(self) -> list[int]:
        return self.levels.edm_timesteps(self.steps, self.settings.rho)

    def calls(self, timesteps: Sequence[int] | None = None) -> list[Call]:
        s, falling = self.settings, self._falling(timesteps)
        churned = diffusion.churned_timestep(
            self.levels, len(falling), s.S_churn, s.S_tmin, s.S_tmax
        )
        calls = []
        for t, following in zip(falling, [*falling[1:], -1], strict=True):
            calls.append(Call(t, churned(t)))
            if s.heun and following >= 0:
                calls.append(Call(t, following))
        return calls

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        noise: Noise,
        timesteps: Sequence[int] | None = None,
        observe: Observer | None = None,
        start: int = 0,
    ) -> Tensor:
        s = self.settings
        return diffusion.sample_edm(
            denoise, x, self.levels, steps=self._falling(timesteps), start=start, heun=s.heun,
            S_churn=s.S_churn, S_min=s.S_tmin, S_max=s.S_tmax, S_noise=s.S_noise, noise=noise,
            mean_type=self.mean_type, clip_denoised=s.clip_denoised, observe=observe,
            limit=math.inf,
        )  # fmt: skip
