"""What a diffusers model was trained for, as the config of its scheduler says.

This file knows where people put scheduler_config.json and what its entries mean in flags of this
project. It reads no weights and does not know the flags' present values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.diffusers.loading import find_model, read_json
from runtime.errors import UserError

NAME = "scheduler_config.json"
MEAN_TYPES = {"epsilon": "epsilon", "sample": "xstart", "v_prediction": "v"}  # theirs -> ours
# What must be given where there is no scheduler; the two β have no meaning in squaredcos_cap_v2.
NEEDED = ("T", "beta_1", "beta_T", "beta_schedule", "mean_type")


@dataclass(frozen=True)
class Trained:
    """What a scheduler's config says. path: of the config. flags: flag -> value."""

    path: Path
    flags: dict[str, object]


def trained_diffusion(directory: str | Path) -> Trained | None:
    """T, beta_1, beta_T, beta_schedule and mean_type of the model that `directory` stands for.

    None where there is no scheduler. Raises UserError where it has settings that this project
    does not support.
    """
    path = find_scheduler(directory)
    if path is None:
        return None
    config = read_json(path)
    missing = [n for n in ("num_train_timesteps", "beta_start", "beta_end") if n not in config]
    if missing:
        raise UserError(f"{path} has no {missing[0]}: only models trained with β can be used")
    beta_schedule = config.get("beta_schedule", "linear")
    prediction = config.get("prediction_type", "epsilon")
    for name, value, supported in (
        ("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        ("prediction_type", prediction, tuple(MEAN_TYPES)),
        ("trained_betas", config.get("trained_betas"), (None,)),
        ("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr", False), (False,)),
    ):
        if value not in supported:
            names = " or ".join(map(str, supported))
            raise UserError(f"{path}: {name} is {str(value)[:40]}; only {names} can be used")
    flags = {
        "T": config["num_train_timesteps"],
        "beta_1": config["beta_start"],
        "beta_T": config["beta_end"],
        "beta_schedule": beta_schedule,
        "mean_type": MEAN_TYPES[prediction],
    }
    return Trained(path, flags)


def find_scheduler(directory: str | Path) -> Path | None:
    """The config of the scheduler that belongs to the model that `directory` stands for.

    It is looked for beside the model, in scheduler/, in the folder above, and in the one above a
    checkpoint's; links are followed where the path as it is named leads to none. Raises UserError
    where there are two that differ.
    """
    paths = [path for path in _places(find_model(directory)[0]) if path.is_file()]
    configs = [
        {key: value for key, value in read_json(path).items() if not key.startswith("_")}
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
