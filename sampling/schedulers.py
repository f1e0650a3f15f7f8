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
import math
from collections.abc import Callable, Iterator, Sequence

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion import Denoiser, Noise, Observer, told_the_step
from model.diffusers.trained import ALLOWED, MEAN_TYPES
from runtime.errors import UserError, one_line
from runtime.files import parse_json
from sampling.protocol import CHURN, OURS, Call, Sampler

SHORT = {"dpm_solver": "DPMSolverMultistepScheduler"}
PREDICTION = {ours: theirs for theirs, ours in MEAN_TYPES.items()}
VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
DEVIATION = 0.5  # of the pixels for which a solver is tried
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


def check_name(name: str) -> None:
    """Raise UserError, with names near to it, where there is no such scheduler that can run."""
    name = SHORT.get(name, name)
    if name in names():
        return
    known = (*OURS, *SHORT, *names())
    lower = {n.lower(): n for n in known}
    near = [lower[n] for n in lower if name.lower() in n]
    near += [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 3, 0.4)]
    near = list(dict.fromkeys(near))[:3]
    if name.endswith("Scheduler") and hasattr(diffusers, name):
        what = "cannot run here: it is not for β and one network, or lacks a package"
    else:
        what = "there is no such sampler"
    raise UserError(f"--sampler={name}: {what}; near names: {', '.join(near or known[:4])}")


class DiffusersScheduler(Sampler):
    """A scheduler of diffusers as a sampler; it runs from its start to its end.

    It takes those of eta, var_type, clip_denoised and the S_ that it knows, and scheduler_options,
    a JSON object of entries for its config.
    """

    heeds = ("scheduler_options", *CHURN)

    def __post_init__(self) -> None:
        if self.mean_type not in PREDICTION:
            raise UserError(
                f"--mean_type={self.mean_type}: diffusers has {', '.join(PREDICTION)} alone, so "
                "sample with ddpm, ddim or edm"
            )
        if self.settings.clip_denoised and not self.clips:
            raise UserError(f"--clip_denoised: {self._class.__name__} does not clip")
        self._options()

    @property
    def clips(self) -> bool:
        return super().clips and "clip_sample" in _parameters(self._class.__init__)

    @property
    def _class(self) -> type:
        return getattr(diffusers, SHORT.get(self.settings.sampler, self.settings.sampler))

    def _options(self) -> dict[str, object]:
        """--scheduler_options, parsed and checked."""
        text = self.settings.scheduler_options
        options = parse_json(text or "{}", "--scheduler_options")
        taken = _parameters(self._class.__init__)
        allowed = sorted(ALLOWED & taken.keys())
        if not isinstance(options, dict):
            raise UserError(f"--scheduler_options={text}: must be a JSON object")
        for name, value in options.items():
            if name not in allowed:
                raise UserError(
                    f"--scheduler_options: {name} is not among the entries that "
                    f"{self._class.__name__} takes here: {', '.join(allowed)}"
                )
            kind = type(taken[name].default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                raise UserError(f"--scheduler_options: {name} is {value!r}, not a {kind.__name__}")
        if options.get("thresholding") and self.limit != 1:
            raise UserError(
                "--scheduler_options: thresholding is for pixels; latents have no such bounds"
            )
        return options

    def entries(self) -> list[int]:
        shown, order = self._shown()
        return sorted(shown[::order])

    def calls(self, timesteps: Sequence[int] | None = None) -> list[Call]:
        shown, order = self._shown()
        return [Call(shown[i - i % order], t) for i, t in enumerate(shown)]

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        noise: Noise,
        timesteps: Sequence[int] | None = None,
        observe: Observer | None = None,
        start: int = 0,
    ) -> Tensor:
        """As the protocol says, from the start and at all timesteps.

        The scheduler's timesteps may be fractions; `denoise` and `noise` get the nearest trained
        one. Where it draws again at the same timestep t, it gets noise(t + T), then noise(t + 2·T),
        …. `observe` gets the t and x of each step, which is one or (order 2) two calls of the
        network.
        """
        if start or set(timesteps or ()) - set(self.entries()):
            raise ValueError(f"{self.settings.sampler} runs from its start to its end")
        return self._run(self.scheduler(), told_the_step(denoise), x, noise, observe)

    def scheduler(self) -> object:
        """The scheduler, its timesteps set; UserError where it refuses a setting."""
        settings = {
            "num_train_timesteps": self.levels.T,
            "trained_betas": self.levels.betas.tolist(),
            "prediction_type": PREDICTION[self.mean_type],
            "clip_sample": self.settings.clip_denoised,
            "variance_type": VARIANCE[self.settings.var_type],
            **self._options(),
        }
        taken = _parameters(self._class.__init__)
        variance = taken["variance_type"].default if "variance_type" in taken else None
        if not isinstance(variance, str):
            settings.pop("variance_type")  # elsewhere it asks for a network that learned a variance
        if "original_inference_steps" in taken:  # LCM's and TCD's 50 may be more than T, or too few
            usual, T = taken["original_inference_steps"].default, self.levels.T
            # Of N, multiples of ⌊T / N⌋ are taken, which may end far from T.
            settings.setdefault(
                "original_inference_steps", usual if self.steps <= usual and T % usual == 0 else T
            )
        if self.steps == self.levels.T:  # of every timestep; linspace would have one of them twice
            settings.setdefault("timestep_spacing", "trailing")
        settings = {key: value for key, value in settings.items() if key in taken}
        if self.steps > self.levels.T:
            raise UserError(f"--sample_steps={self.steps}: must be in 1 to T={self.levels.T}")
        if self._class is diffusers.PNDMScheduler and self.steps < 4:
            raise UserError(f"--sample_steps={self.steps}: PNDMScheduler makes at least 4 steps")
        with self._one_line():
            scheduler = self._class(**settings)
            scheduler.set_timesteps(self.steps)  # on the CPU: looking a step up waits for nothing
        first, *others = scheduler.timesteps.tolist()
        # PNDM's first step and those of order 2 visit a timestep again by design.
        twice = scheduler.order == 1 and self._class is not diffusers.PNDMScheduler
        if not math.isfinite(math.fsum(others)) or (twice and others[:1] == [first]):
            raise UserError(
                f"--sampler={self.settings.sampler} cannot place {self.steps} steps so at the "
                f"noise levels of the network: its first one is at timesteps {first:g} and "
                f"{others[0]:g}; take another number of steps, or another spacing or σ"
            )
        if not all(0 <= t < self.levels.T for t in (first, *others)):
            raise UserError(
                f"--scheduler_options={self.settings.scheduler_options}: {self.steps} steps then "
                f"leave the timesteps 0 to {self.levels.T - 1}; see timestep_spacing, steps_offset"
            )
        last = scheduler.timesteps[-1]
        if last > 0 and str(scheduler.config.get("variance_type")).startswith("fixed_large"):
            raise UserError(
                f"--sampler={self.settings.sampler} adds noise at all timesteps but 0, its last "
                f"step is at {last:g}, and --var_type=fixedlarge leaves it in the image: use "
                "--var_type=fixedsmall, or --sampler=ddpm"
            )
        return scheduler

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """What diffusers says of a setting that does not work, as a UserError."""
        try:
            yield
        except (
            ArithmeticError, AssertionError, AttributeError, IndexError, KeyError,
            NotImplementedError, RuntimeError, TypeError, ValueError, UnboundLocalError,
        ) as error:  # fmt: skip
            text = one_line(error)
            options = f" and {o}" if (o := self.settings.scheduler_options) else ""
            raise UserError(
                f"--sampler={self.settings.sampler} cannot run {self.steps} steps with these "
                f"settings{options}: {text}"
            ) from error

    @functools.lru_cache(maxsize=16)  # noqa: B019 - it is frozen
    def _shown(self) -> tuple[tuple[int, ...], int]:
        """The timestep of each call of the network, rounded to trained ones, and how many calls
        make one step. Found by running the chain on pixels that are Gaussian, for which the right
        answer is known, so that a solver which goes astray even with that is refused."""
        scheduler, shown = self.scheduler(), []

        def denoise(x: Tensor, t: int, step: int) -> Tensor:
            shown.append(t)
            abar = self.levels.abar(t)
            x_0 = x * abar**0.5 * DEVIATION**2 / (abar * DEVIATION**2 + 1 - abar)
            noise = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
            v = abar**0.5 * noise - (1 - abar) ** 0.5 * x_0
            return {"epsilon": noise, "xstart": x_0, "v": v}[self.mean_type]

        def noise(t: int) -> Tensor:
            return torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(t))

        with self._one_line():
            order = scheduler.order
            x_0 = self._run(scheduler, denoise, noise(2**31), noise, None)
            deviation = float(x_0.std())
        if not deviation < 3 * DEVIATION:
            raise UserError(
                f"--sampler={self.settings.sampler} goes astray with {self.steps} steps and these "
                f"options: of a network that is always right it makes pixels that deviate by "
                f"{deviation:.3g} instead of {DEVIATION}; take another number of steps or sampler"
            )
        return tuple(shown), order

    def step_options(self, scheduler: object) -> dict[str, float]:
        """The settings that are arguments of the scheduler's step."""
        s, taken = self.settings, _parameters(scheduler.step)
        given = {
            "eta": s.eta,
            "s_churn": s.S_churn,
            "s_tmin": s.S_tmin,
            "s_tmax": s.S_tmax,
            "s_noise": s.S_noise,
        }
        # s_tmax is infinite by default, which JSON does not know.
        return {k: v for k, v in given.items() if k in taken and math.isfinite(v)}

    def _run(
        self,
        scheduler: object,
        denoise: Callable[[Tensor, int, int], Tensor],
        x_T: Tensor,
        noise: Noise,
        observe: Observer | None,
    ) -> Tensor:
        T, given = self.levels.T, self.step_options(scheduler)
        drawn: dict[int, int] = {}
        x, step = x_T * scheduler.init_noise_sigma, 0
        for i, time in enumerate(scheduler.timesteps):
            t = min(max(round(float(time)), 0), T - 1)

            def draw(t: int = t) -> Tensor:
                drawn[t] = drawn.get(t, -1) + 1
                return noise(t + T * drawn[t])

            if i % scheduler.order == 0:
                step = t
                if observe:
                    observe(t, x)
            output = denoise(scheduler.scale_model_input(x, time), t, step)
            with _Drawing(draw):
                x = scheduler.step(output, time, x, **given).prev_sample
        return x


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
