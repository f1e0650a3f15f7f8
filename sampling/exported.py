"""A sampler's chain by a scheduler of diffusers alone, for folders that are exported.

This file knows which of diffusers' schedulers makes which of our chains, and refuses those that
none makes. It knows neither networks nor folders.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import diffusers

from diffusion import EDMSchedule
from runtime.errors import UserError
from sampling.protocol import Sampler
from sampling.schedulers import PREDICTION, VARIANCE, DiffusersScheduler


class DiffusersChain(NamedTuple):
    """scheduler: configured. set_timesteps, step: arguments of these methods, as JSON has them,
    beside what every pipeline gives them."""

    scheduler: object
    set_timesteps: dict[str, object]
    step: dict[str, object]


def in_diffusers(sampler: Sampler, steps: Sequence[int]) -> DiffusersChain:
    """What makes the chain of `sampler` that visits `steps`, falling.

    Raises UserError where diffusers has no scheduler that makes the same images.
    """
    chain = _chain(sampler, steps)
    chain.scheduler.set_timesteps(**chain.set_timesteps)
    last = sampler.levels.T - 1
    theirs = [min(max(round(float(time)), 0), last) for time in chain.scheduler.timesteps]
    ours = [call.t for call in sampler.calls(steps)]
    if theirs != ours:
        raise _cannot(
            f"--sampler={sampler.settings.sampler} visits timesteps {_some(ours)} and diffusers' "
            f"{type(chain.scheduler).__name__} {_some(theirs)}: use another --sample_steps or "
            "--timestep_spacing"
        )
    return chain


def _chain(sampler: Sampler, steps: Sequence[int]) -> DiffusersChain:
    """The scheduler that makes such steps, whether or not it makes them at these timesteps."""
    s, levels = sampler.settings, sampler.levels
    if isinstance(levels, EDMSchedule):
        raise _cannot(
            "a network trained with --precond=edm is told timesteps, and diffusers' EDM schedulers "
            "tell it ln(σ)/4"
        )
    if sampler.mean_type not in PREDICTION:
        raise UserError(
            f"--mean_type={sampler.mean_type}: diffusers supports {', '.join(PREDICTION)}"
        )
    settings: dict[str, object] = {
        "beta_start": levels.beta_1,
        "beta_end": levels.beta_T,
        "beta_schedule": levels.beta_schedule,
    }
    if isinstance(sampler, DiffusersScheduler):
        scheduler = sampler.scheduler()
        number = {"num_inference_steps": sampler.steps}
        visited, name = scheduler.timesteps.tolist(), scheduler.config.beta_schedule
        scheduler.register_to_config(**settings)  # for readers: its trained_betas are these
        scheduler.set_timesteps(**number)
        if scheduler.timesteps.tolist() != visited:  # some place a cosine β's steps by its name
            scheduler.register_to_config(beta_schedule=name)
        return DiffusersChain(scheduler, number, sampler.step_options(scheduler))
    settings |= {"num_train_timesteps": levels.T, "prediction_type": PREDICTION[sampler.mean_type]}
    if s.sampler == "ddim":
        return _ddim(sampler, steps, settings)
    if s.sampler == "ddpm":
        if steps[-1] != 0:
            raise _cannot("diffusers' DDPMScheduler adds no noise at timestep 0 alone, so that "
                          "step cannot have width 0")  # fmt: skip
        scheduler = diffusers.DDPMScheduler(
            variance_type=VARIANCE[s.var_type], clip_sample=s.clip_denoised, **settings
        )
    elif s.S_churn:
        raise _cannot(
            f"--S_churn={s.S_churn:g}: diffusers' schedulers add that noise after the network has "
            "answered, not before"
        )
    elif sampler.mean_type == "xstart":
        raise _cannot("diffusers' Euler and Heun schedulers have no prediction of --mean_type="
                      "xstart")  # fmt: skip
    elif s.heun:
        scheduler = diffusers.HeunDiscreteScheduler(clip_sample=s.clip_denoised, **settings)
    elif s.clip_denoised:
        raise _cannot("--clip_denoised: diffusers' EulerDiscreteScheduler does not clip")
    else:
        scheduler = diffusers.EulerDiscreteScheduler(**settings)
    return DiffusersChain(scheduler, {"timesteps": list(steps)}, {})


def _ddim(sampler: Sampler, steps: Sequence[int], settings: dict[str, object]) -> DiffusersChain:
    """DDIMScheduler where it can make such steps, which are all of one length."""
    s, T = sampler.settings, sampler.levels.T
    gap = T // len(steps)  # DDIMScheduler's, whichever timesteps it visits
    if all(t - following == gap for t, following in itertools.pairwise(steps)):
        spacing = "leading" if steps[-1] == 0 else "trailing"
        scheduler = diffusers.DDIMScheduler(
            clip_sample=s.clip_denoised, timestep_spacing=spacing, **settings
        )
        options = {"eta": s.eta, "use_clipped_model_output": s.clip_denoised}
        return DiffusersChain(scheduler, {"num_inference_steps": len(steps)}, options)
    if s.eta not in (0, 1):
        raise _cannot(
            f"--eta={s.eta:g}: diffusers has ddim's steps of unequal length for 0 and 1 alone; "
            f"or use a --sample_steps that divides --T={T}"
        )
    # DDIM is the first order of DPM-Solver++ (Lu et al. 2022, section 4).
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type="sde-dpmsolver++" if s.eta else "dpmsolver++",
        thresholding=s.clip_denoised,  # with this largest value: clips
        sample_max_value=1.0,
        **settings,
    )
    return DiffusersChain(scheduler, {"timesteps": list(steps)}, {})


def _cannot(reason: str) -> UserError:
    return UserError(f"--export_diffusers: {reason}")


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
