"""Reading a model folder that diffusers wrote: its config, its weights, its scheduler's config.

This file knows the layout of such folders. It does not know how a model is narrowed.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
from diffusers import ModelMixin

from runtime.errors import UserError

CLASSES = ("UNet2DModel", "UNet2DConditionModel")
WEIGHTS = "diffusion_pytorch_model"
MEAN_TYPES = {
    "epsilon": "epsilon",
    "sample": "xstart",
    "v_prediction": "v",
}  # names of diffusers -> ours


def trained_diffusion(directory: str | Path) -> dict[str, object]:
    """The flags T, beta_1, beta_T, beta_schedule and mean_type, as the scheduler beside a model
    has them; nothing where there is no scheduler.

    Raises UserError where the scheduler has settings that this project does not support.
    """
    root = Path(directory)
    root = root.parent if root.name == "unet" else root
    path = root / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {}
    config = _read_json(path)
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
    return {
        "T": config["num_train_timesteps"],
        "beta_1": config["beta_start"],
        "beta_T": config["beta_end"],
        "beta_schedule": beta_schedule,
        "mean_type": MEAN_TYPES[prediction],
    }


def trained_timesteps(directory: str | Path) -> int:
    """The T of the scheduler beside a model, 1000 where there is none."""
    scheduler = _folders(directory)[1] / "scheduler" / "scheduler_config.json"
    return _read_json(scheduler).get("num_train_timesteps", 1000) if scheduler.exists() else 1000


def read_model(directory: str | Path) -> ModelMixin:
    """The UNet in a model folder, or in unet/ of a pipeline folder, in float32.

    Raises UserError where the folder has no such model in safetensors.
    """
    folder = _folders(directory)[0]
    name = _class_name(folder)
    _check_weights(folder, name)
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        text = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the diffusers model in {folder}: {text}") from error
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights have no entry {sorted(info['missing_keys'])[0]}")
    return model.float()


def _folders(directory: str | Path) -> tuple[Path, Path]:
    """The model's folder, and that of the pipeline it is a part of, or the same."""
    folder = Path(directory)
    if (folder / "unet").is_dir():
        return folder / "unet", folder
    return folder, folder.parent if folder.name == "unet" else folder


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not contain a JSON object")
    return value


def _class_name(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{folder} is not a diffusers model: it has no config.json; name a folder that "
            "save_pretrained wrote"
        )
    name = _read_json(config).get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{config} is for a {name}; only {' and '.join(CLASSES)} can be used")
    return name


def _check_weights(folder: Path, name: str) -> None:
    """Raise UserError unless the folder has safetensors, which cannot contain code."""
    if any((folder / f"{WEIGHTS}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights as a pickle (.bin), which could contain code, so it "
            f"was not read; if you trust it, convert it: diffusers.{name}.from_pretrained(DIR, "
            "use_safetensors=False).save_pretrained(DIR)"
        )
    raise UserError(
        f"{folder} has no {WEIGHTS}.safetensors; name a folder that save_pretrained wrote"
    )
