"""Any variance-preserving scheduler of diffusers as a sampler: one small adapter, no solver.

This file knows diffusers' scheduler interface: `set_timesteps`, `scale_model_input`, `step`. It
does not know the network, nor widths. It is imported when such a scheduler is asked for, because
diffusers takes seconds to import.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.errors import UserError

if TYPE_CHECKING:
    from diffusion import Denoiser, Noise, NoiseSchedule, Observer, Sampler

SHORT = {"dpm_solver": "DPMSolverMultistepScheduler"}
PREDICTION = {"epsilon": "epsilon", "xstart": "sample", "v": "v_prediction"}
VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
# Entries of a config that say what the network was trained for, so no option may change them.
TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
           "prediction_type", "rescale_betas_zero_snr", "clip_sample")  # fmt: skip
# They have the interface, but run from the image to the noise or with another parameterisation.
_OTHERS = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "CogVideoXDDIMScheduler")


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(function).parameters.items())[1:])  # without self


def _usable(scheduler: type) -> bool:
    """Whether a scheduler takes our β and its step needs output, timestep and x alone."""
    if scheduler.__name__ in _OTHERS or not hasattr(scheduler, "set_timesteps"):
        return False
    required = [
        name
        for name, parameter in _parameters(scheduler.step).items()
        if parameter.default is inspect.Parameter.empty
    ]
    return (
        len(required) == 3
        and {"trained_betas", "prediction_type"} <= _parameters(scheduler.__init__).keys()
    )


@functools.cache
def names() -> tuple[str, ...]:
    """The schedulers of diffusers that can be used here and have what they import."""
    found = []
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            with contextlib.suppress(Exception):  # stand-ins for what is not installed raise
                if _usable(getattr(diffusers, name)):
                    found.append(name)
    return tuple(found)


def check(sampler: Sampler) -> None:
    """Raise UserError where diffusers has no such scheduler or it cannot express a setting."""
    name = SHORT.get(sampler.sampler, sampler.sampler)
    if name not in names():
        known = ("ddpm", "ddim", "edm", *SHORT, *names())
        lower = {n.lower(): n for n in known}
        near = [lower[n] for n in lower if name.lower() in n]
        near += [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 3, 0.4)]
        near = list(dict.fromkeys(near))[:3]
        if name.endswith("Scheduler") and hasattr(diffusers, name):
            what = "cannot run here: it is not for β and one network, or lacks a package"
        else:
            what = "there is no such sampler"
        raise UserError(
            f"--sampler={sampler.sampler}: {what}; near names: {', '.join(near or known[:4])}"
        )
    if sampler.mean_type not in PREDICTION:
        raise UserError(
            f"--mean_type={sampler.mean_type}: diffusers has {', '.join(PREDICTION)} alone, so "
            "sample with ddpm, ddim or edm"
        )
    taken = _parameters(getattr(diffusers, name).__init__).keys()
    if sampler.clip_denoised and "clip_sample" not in taken:
        raise UserError(f"--clip_denoised: {name} does not clip")
    _options(sampler, name)


def _options(sampler: Sampler, name: str) -> dict[str, object]:
    """--scheduler_options, parsed and checked."""
    try:
        options = json.loads(sampler.scheduler_options or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--scheduler_options is not JSON ({error})") from error
    allowed = [n for n in _parameters(getattr(diffusers, name).__init__) if n not in TRAINED]
    if not isinstance(options, dict) or not options.keys() <= set(allowed):
        raise UserError(
            f"--scheduler_options={sampler.scheduler_options}: a JSON object with entries among "
            f"{', '.join(sorted(allowed))}"
        )
    return options


def build(sampler: Sampler, schedule: NoiseSchedule):
    """The scheduler, its timesteps set; UserError where it refuses a setting."""
    name = SHORT.get(sampler.sampler, sampler.sampler)
    settings = {
        "num_train_timesteps": schedule.T,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": PREDICTION[sampler.mean_type],
        "clip_sample": sampler.clip_denoised,
        "variance_type": VARIANCE[sampler.var_type],
        **_options(sampler, name),
    }
    scheduler_class = getattr(diffusers, name)
    taken = _parameters(scheduler_class.__init__)
    if not isinstance(taken["variance_type"].default if "variance_type" in taken else None, str):
        settings.pop("variance_type")  # elsewhere it asks for a network that learned a variance
    if "original_inference_steps" in taken:  # LCM's and TCD's 50 may be more than T
        usual = taken["original_inference_steps"].default
        settings.setdefault("original_inference_steps", min(usual, schedule.T))
    settings = {key: value for key, value in settings.items() if key in taken}
    steps = sampler.sample_steps or schedule.T
    if steps > schedule.T:
        raise UserError(f"--sample_steps={steps}: must be in 1 to T={schedule.T}")
    with _one_line(sampler, steps):
        scheduler = scheduler_class(**settings)
        scheduler.set_timesteps(steps)  # on the CPU: where a step is looked up, nothing waits
    return scheduler


@contextlib.contextmanager
def _one_line(sampler: Sampler, steps: int) -> Iterator[None]:
    """What diffusers says of a setting that does not work, as a UserError."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError,
        TypeError, ValueError, UnboundLocalError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"--sampler={sampler.sampler} cannot run {steps} steps with these settings: {text}"
        ) from error


@functools.lru_cache(maxsize=16)
def calls(sampler: Sampler, schedule: NoiseSchedule) -> tuple[tuple[int, ...], int]:
    """The timestep of each call of the network, rounded to trained ones, and how many calls make
    one step. Found by running the chain on one pixel, so that a setting that breaks fails first."""
    scheduler, shown = build(sampler, schedule), []

    def denoise(x: Tensor, t: int) -> Tensor:
        shown.append(t)
        return torch.zeros_like(x)

    with _one_line(sampler, sampler.sample_steps or schedule.T):
        order = scheduler.order
        x = torch.ones(1, 1, 1, 1)
        x_0 = _run(sampler, scheduler, denoise, x, schedule.T, lambda t: torch.ones_like(x), None)
        if not bool(x_0.isfinite().all()):
            raise ValueError("the result is not finite")
    return tuple(shown), order


class _Drawing(TorchFunctionMode):
    """Within the block, torch.randn gives `draw()`: schedulers draw from generators alone, and
    images should be a function of the seed and their index. Other threads are not touched."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn:
            return self.draw()
        return function(*args, **(kwargs or {}))


def sample(
    sampler: Sampler,
    denoise: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    observe: Observer | None = None,
) -> Tensor:
    """Run a scheduler of diffusers from x_T, unit Gaussian; x_0 in [−1, 1], like x_T.

    Its timesteps may be fractions; `denoise` and `noise` get the nearest trained one. Where a
    scheduler draws again at the same timestep t, it gets noise(t + T), then noise(t + 2·T), ….
    `observe` gets the t and x of each step, which is one or (order 2) two calls of the network.
    """
    x_0 = _run(sampler, build(sampler, schedule), denoise, x_T, schedule.T, noise, observe)
    return x_0.clamp(-sampler.limit, sampler.limit)


def _run(
    sampler: Sampler,
    scheduler: object,
    denoise: Denoiser,
    x_T: Tensor,
    T: int,
    noise: Noise,
    observe: Observer | None,
) -> Tensor:
    taken = _parameters(scheduler.step)
    limit = sampler.S_tmax if math.isfinite(sampler.S_tmax) else float("inf")
    given = {
        "eta": sampler.eta,
        "s_churn": sampler.S_churn,
        "s_tmin": sampler.S_tmin,
        "s_tmax": limit,
        "s_noise": sampler.S_noise,
    }
    given = {key: value for key, value in given.items() if key in taken}
    drawn: dict[int, int] = {}
    x = x_T * scheduler.init_noise_sigma
    for i, time in enumerate(scheduler.timesteps):
        t = min(max(round(float(time)), 0), T - 1)

        def draw(t: int = t) -> Tensor:
            drawn[t] = drawn.get(t, -1) + 1
            return noise(t + T * drawn[t])

        if observe and i % scheduler.order == 0:
            observe(t, x)
        output = denoise(scheduler.scale_model_input(x, time), t)
        with _Drawing(draw):
            x = scheduler.step(output, time, x, **given).prev_sample
    return x
