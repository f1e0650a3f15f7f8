"""What a diffusers model was trained for and is sampled with, as its scheduler's config says.

This file knows where people put scheduler_config.json and what its entries mean in flags of this
project. It reads no weights and does not know the flags' values.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import diffusers

from model.diffusers.loading import find_model
from runtime.errors import UserError
from runtime.files import read_json
from runtime.schema import Name, Number, Size, check
from settings import BETA_SCHEDULES

NAME = "scheduler_config.json"
MEAN_TYPES = {"epsilon": "epsilon", "sample": "xstart", "v_prediction": "v"}  # theirs -> ours
# fixed_small_log is the same variance by way of its logarithm.
VAR_TYPES = {
    "fixed_small": "fixedsmall",
    "fixed_small_log": "fixedsmall",
    "fixed_large": "fixedlarge",
}
# What must be given where there is no scheduler; the two β have no meaning in squaredcos_cap_v2.
NEEDED = ("T", "beta_1", "beta_T", "beta_schedule", "mean_type")
_TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
# Flags of which one says what happens instead of a setting that no flag has.
_CLIPPING = ("clip_denoised", "scheduler_options")
_SPACING = ("timestep_spacing", "scheduler_options")
# Entries of a config that --scheduler_options may have: how the steps are made, and at which of the
# trained noise levels. All others say what the network is shown or was trained for, or are flags.
ALLOWED = {
    "algorithm_type", "clip_sample_range", "corrector_order", "disable_corrector",
    "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "lambda_min_clipped",
    "lower_order_final", "original_inference_steps", "predict_x0",
    "predictor_order", "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "solver_order",
    "solver_type", "steps_offset", "thresholding", "timestep_scaling", "timestep_spacing",
    "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
_NOT_CLIPPED = ("clip_sample", "clip_sample_range", "thresholding")
_THRESHOLD = ("dynamic_thresholding_ratio", "sample_max_value")  # details of thresholding


@dataclass(frozen=True)
class Setting:
    """An entry of the config. flag: what it sets here, to the value `ours`. decided_by: where no
    flag can do the same, the flags of which one must be given to say what happens instead. note:
    for the reader."""

    name: str
    value: object
    flag: str = ""
    ours: object = None
    decided_by: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Trained:
    """What a scheduler's config says.

    path: of the config. scheduler: its class. own: flags that make its pipeline's own chain, where
    ddpm is not that. flags: what the network was trained for, flag ->
    value; a flag that says otherwise is a mistake. sampling: how its pipeline samples, flag ->
    value; a flag may say otherwise.
    """

    path: Path
    scheduler: str
    own: str
    flags: Mapping[str, object]
    sampling: Mapping[str, object]
    settings: tuple[Setting, ...]

    def check(self, values: Mapping[str, object], given: Collection[str]) -> None:
        """Raise UserError where a setting is of no effect here and none of the `given` flags says
        that this is known. values: flag -> value in use."""
        for setting in self.settings:
            if setting.decided_by and not _decider(setting, values, given):
                raise UserError(
                    f"{self.path}: {setting.name} is {setting.value}, which is not taken over "
                    f"by itself: give --{setting.decided_by[0]} to say what to do, or use it with "
                    f"{self.own}"
                )

    def table(self, values: Mapping[str, object], given: Collection[str]) -> str:
        """What becomes of each setting, a line each. values: flag -> value in use."""
        here = f"--sampler={values['sampler']}"
        if self.own and "sampler" not in given:
            here += f"; as its own pipeline: {self.own}"
        rows = [("scheduler", self.scheduler, here)]
        for setting in self.settings:
            decider = _decider(setting, values, given)
            here = [f"--{decider} decides"] if decider else []
            if flag := setting.flag:
                here.append(f"--{flag}={values[flag]}{' (given)' if flag in given else ''}")
            here += [setting.note] if setting.note else []
            rows.append((setting.name, str(setting.value), "; ".join(here)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"  {n.ljust(widths[0])}  {v.ljust(widths[1])}  {here}" for n, v, here in rows]
        return "\n".join([f"{self.path}:", *lines])


def _decider(setting: Setting, values: Mapping[str, object], given: Collection[str]) -> str:
    """The flag that says what happens instead of a setting, "" where none does;
    --scheduler_options does where it names the setting."""
    for flag in setting.decided_by:
        named = flag != "scheduler_options" or f'"{setting.name}"' in str(values[flag])
        if flag in given and named:
            return flag
    return ""


def trained_diffusion(directory: str | Path) -> Trained | None:
    """What the scheduler of the model that `directory` stands for says; None where there is none.

    Raises UserError where the model was trained in a way that this project does not know.
    """
    path = find_scheduler(directory)
    if path is None:
        return None
    config = _Config(path)
    training, sampling = _training(config), [*_clipping(config), *_variance(config)]
    sampling += _spacing(config)
    return Trained(
        path,
        config.name,
        _own_sampler(config),
        {setting.flag: setting.ours for setting in training},
        {setting.flag: setting.ours for setting in sampling if setting.flag},
        (*training, *sampling, *_others(config, {s.name for s in training + sampling})),
    )


class Config(TypedDict):
    """scheduler_config.json; its other entries are diffusers' matter."""

    _class_name: NotRequired[Name]
    num_train_timesteps: NotRequired[Size]
    beta_start: NotRequired[Number]
    beta_end: NotRequired[Number]
    beta_schedule: NotRequired[Name]
    prediction_type: NotRequired[Name | None]
    variance_type: NotRequired[Name | None]
    clip_sample: NotRequired[bool | None]
    clip_sample_range: NotRequired[Number | None]
    thresholding: NotRequired[bool | None]
    timestep_spacing: NotRequired[Name]
    steps_offset: NotRequired[int]
    rescale_betas_zero_snr: NotRequired[bool | None]


class _Config:
    """A scheduler's config, with the defaults of its class for what is left out."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, read_json(path)
        check(self.entries, Config, path)
        self.name = self.entries.get("_class_name", "DDPMScheduler")
        scheduler = getattr(diffusers, str(self.name), None)
        if not str(self.name).endswith("Scheduler") or scheduler is None:
            raise UserError(f"{path} is for a {str(self.name)[:60]}, which diffusers does not have")
        parameters = inspect.signature(scheduler.__init__).parameters
        self.defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        if "beta_start" not in self.defaults:
            raise UserError(
                f"{path}: a {self.name} has no β: only models trained with β can be used"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.defaults

    def __getitem__(self, name: str) -> object:
        """The value that the scheduler has; None where it has no such setting."""
        return self.entries.get(name, self.defaults.get(name)) if name in self else None

    def own(self, known: Collection[str]) -> dict[str, object]:
        """Entries that are no default of the class, without those that are `known`."""
        return {
            name: value
            for name, value in self.entries.items()
            if name in self and name not in known and value != self.defaults[name]
        }

    def one_of(self, name: str, supported: Collection[object]) -> object:
        """The value, if it is one of these."""
        if self[name] not in supported:
            names = " or ".join(map(str, supported))
            raise UserError(f"{self.path}: {name} is {str(self[name])[:40]}; only {names} can be "
                            "used")  # fmt: skip
        return self[name]


def _own_sampler(config: _Config) -> str:
    """Flags that make the chain of the model's own pipeline; "" where --sampler=ddpm is that."""
    options = config.own({*_TRAINING, "clip_sample", "variance_type"})
    if config.name == "DDPMScheduler" and not options:
        return ""
    given = f" --scheduler_options='{json.dumps(options)}'" if options else ""
    return f"--sampler={config.name}{given}"


def _training(config: _Config) -> list[Setting]:
    """What the network was trained for."""
    config.one_of("trained_betas", (None,))
    config.one_of("rescale_betas_zero_snr", (None, False))
    schedule = config.one_of("beta_schedule", BETA_SCHEDULES)
    prediction = config.one_of("prediction_type", (*MEAN_TYPES, None))
    steps, first, last = (config[n] for n in ("num_train_timesteps", "beta_start", "beta_end"))
    return [
        Setting("num_train_timesteps", steps, "T", steps),
        Setting("beta_start", first, "beta_1", first),
        Setting("beta_end", last, "beta_T", last),
        Setting("beta_schedule", schedule, "beta_schedule", schedule),
        Setting("prediction_type", prediction, "mean_type", MEAN_TYPES[prediction or "epsilon"]),
    ]


def _clipping(config: _Config) -> list[Setting]:
    """What is done to x̂_0 within a step."""
    if config["thresholding"]:
        return [
            Setting("thresholding", True, decided_by=_CLIPPING),
            *(Setting(name, config[name], note="of thresholding") for name in _THRESHOLD),
        ]
    if "clip_sample" not in config:
        return []
    bound = config["clip_sample_range"]
    if config["clip_sample"] and bound not in (None, 1, 1.0):
        return [
            Setting("clip_sample_range", bound, decided_by=_CLIPPING),
            Setting("clip_sample", True, "clip_denoised", True),
        ]
    clip = bool(config["clip_sample"])
    note = "ddim: as with use_clipped_model_output" if clip else ""
    return [Setting("clip_sample", clip, "clip_denoised", clip, note=note)]


def _variance(config: _Config) -> list[Setting]:
    """The noise that an ancestral step adds."""
    if config["variance_type"] is None:  # other schedulers have none, or only a learned one
        return []
    variance = config.one_of("variance_type", tuple(VAR_TYPES))
    return [Setting("variance_type", variance, "var_type", VAR_TYPES[variance])]


def _spacing(config: _Config) -> list[Setting]:
    """Which timesteps a sampler with fewer steps than T visits."""
    settings = []
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    if spacing == "leading":
        note = "the same as uniform where --sample_steps divides --T"
        settings.append(Setting("timestep_spacing", spacing, note=note))
    elif spacing != config.defaults.get("timestep_spacing"):  # otherwise --sampler has it, too
        settings.append(Setting("timestep_spacing", spacing, decided_by=_SPACING))
    if offset:
        settings.append(Setting("steps_offset", offset, decided_by=_SPACING))
    return settings


def _others(config: _Config, known: Collection[str]) -> list[Setting]:
    """Entries that only the class itself knows."""
    usual = {*known, *_NOT_CLIPPED, *_THRESHOLD, "trained_betas", "rescale_betas_zero_snr",
             "timestep_spacing", "steps_offset"}  # fmt: skip
    note = f"only of --sampler={config.name}, with --scheduler_options"
    others = {name: value for name, value in config.own(usual).items() if value is not None}
    for name in others:
        if name not in ALLOWED:  # it may change what the network is shown, and is told
            config.one_of(name, (config.defaults[name],))
    return [Setting(name, value, note=note) for name, value in others.items()]


def find_scheduler(directory: str | Path) -> Path | None:
    """The config of the scheduler that belongs to the model that `directory` stands for.

    It is looked for beside the model, in scheduler/, in the folder above, and in the one above a
    checkpoint's; links are followed where the path as it is named leads to none. Raises UserError
    where there are two that differ.
    """
    paths = [path for path in _places(find_model(directory)[0]) if path.exists()]
    configs = [
        {key: value for key, value in read_json(path, dict[str, object]).items() if key[:1] != "_"}
        for path in paths
    ]
    for path, config in zip(paths, configs, strict=True):
        if config != configs[0]:
            raise UserError(
                f"{paths[0]} and {path} differ, and both may be the model's: remove the wrong one"
            )
    return paths[0] if paths else None


def _places(folder: Path) -> Iterator[Path]:
    """Where the scheduler's config of the model in `folder` may be, the likely places first."""
    for model in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        around = [model, model.parent]
        if model.parent.name.startswith("checkpoint"):
            around.append(model.parent.parent)
        for place in around:
            yield place / NAME
            yield place / "scheduler" / NAME
