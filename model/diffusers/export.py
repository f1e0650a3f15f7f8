"""Export: a folder that diffusers' pipelines load and run, the width schedule in its config.

This file knows the folder's layout. The networks are dense ones, as `subnet` makes them.
step_aware_unet.py, which runs them in diffusers, is copied into the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention
from torch import nn

from model.diffusers import step_aware_unet
from model.diffusers.step_aware_unet import StepAwareUNet, key
from model.diffusers.supernet import DenseDiffusersUNet
from model.schedule import WidthSchedule
from model.unet import SlimmableUNet
from runtime.errors import UserError

# Our names -> those of diffusers
PREDICTION = {"epsilon": "epsilon", "xstart": "sample", "v": "v_prediction"}
VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def _groups(network: nn.Module) -> dict[str, int]:
    """The number of groups of each group norm, by its name."""
    norms = [(n, m) for n, m in network.named_modules() if hasattr(m, "num_groups")]
    return {name: norm.num_groups for name, norm in norms}


def _spec(network: nn.Module) -> tuple[dict, nn.Module]:
    """The argument of step_aware_unet.build, and the module whose state dict fills its result."""
    if isinstance(network, SlimmableUNet) and not hasattr(network.time_embedding, "timembedding"):
        return {"kind": "ddsm", "shapes": _shapes(network), "num_groups": _groups(network)}, network
    if isinstance(network, DenseDiffusersUNet):
        model = network.model
        config = json.loads(model.to_json_string())
        spec = {
            "kind": "diffusers",
            "class": config["_class_name"],
            "config": {k: v for k, v in config.items() if not k.startswith("_")},
            "shapes": _shapes(model),
            "heads": {n: m.heads for n, m in model.named_modules() if isinstance(m, Attention)},
            "num_groups": _groups(model),
        }
        return spec, model
    raise UserError(f"cannot export a {type(network).__name__}; only what `subnet` returns")


def step_aware(
    networks: Mapping[float, nn.Module],
    schedule: WidthSchedule,
    image_shape: tuple[int, int, int],
    timesteps: Sequence[int] | None = None,
) -> StepAwareUNet:
    """One diffusers model that holds copies of the networks that `schedule` names.

    networks: width -> what `subnet(width)` returned. image_shape: (C, H, W). timesteps: what the
    schedule's entries are for, where it is shorter than T. Raises UserError where the
    schedule names a width that has no network.
    """
    steps = sorted(timesteps) if timesteps is not None else range(len(schedule))
    widths = [float(schedule[t]) for t in steps]
    specs, states = {}, {}
    for width in sorted(set(widths)):
        if width not in networks:
            raise UserError(f"the schedule names width {width:g}, for which there is no network")
        specs[key(width)], network = _spec(networks[width])
        states.update({f"candidates.{key(width)}.{n}": v for n, v in network.state_dict().items()})
    channels, *sides = image_shape
    outputs = {n: v for n, v in states.items() if n.endswith(("tail.2.weight", "conv_out.weight"))}
    unet = StepAwareUNet(
        sample_size=sides[0] if sides[0] == sides[1] else sides,
        in_channels=channels,
        out_channels=len(next(iter(outputs.values()))),
        networks=specs,
        schedule=widths,
        timesteps=None if timesteps is None else list(steps),
    )
    unet.load_state_dict(states)
    return unet.eval()


def _scheduler(
    betas: tuple[float, float, int],
    beta_schedule: str,
    mean_type: str,
    var_type: str,
    clip_denoised: bool,
) -> DDPMScheduler:
    """diffusers' scheduler for β from betas[0] to betas[1] over betas[2] timesteps."""
    if mean_type not in PREDICTION:
        raise UserError(f"--mean_type={mean_type}: diffusers supports {', '.join(PREDICTION)}")
    if var_type not in VARIANCE:
        raise UserError(f"--var_type={var_type}: one of {', '.join(VARIANCE)}")
    return DDPMScheduler(
        num_train_timesteps=betas[2],
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule=beta_schedule,
        prediction_type=PREDICTION[mean_type],
        variance_type=VARIANCE[var_type],
        clip_sample=clip_denoised,
    )


def export_diffusers(
    directory: str | Path,
    networks: Mapping[float, nn.Module],
    schedule: WidthSchedule,
    image_shape: tuple[int, int, int],
    betas: tuple[float, float, int],
    *,
    beta_schedule: str = "linear",
    timesteps: Sequence[int] | None = None,
    mean_type: str = "epsilon",
    var_type: str = "fixedlarge",
    clip_denoised: bool = False,
) -> None:
    """Write a pipeline folder that DDPMPipeline and DDIMPipeline load with `trust_remote_code`.

    networks: width -> what `subnet(width)` returned. schedule: the width of each timestep, or of
    each of `timesteps`. image_shape: (C, H, W). betas: (beta_1, beta_T, T) of the noise schedule,
    beta_schedule its kind as diffusers names it. The rest are as the samplers take them. The folder
    holds model_index.json, scheduler/, and unet/ with config.json, safetensors and
    step_aware_unet.py.

    Raises UserError where the directory is not empty or diffusers cannot express a setting.
    """
    directory = Path(directory)
    scheduler = _scheduler(betas, beta_schedule, mean_type, var_type, clip_denoised)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"--export_diffusers={directory} exists and is not empty; name a new directory"
        )
    with torch.no_grad():
        unet = step_aware(networks, schedule, image_shape, timesteps)
    module = Path(step_aware_unet.__file__)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": [module.stem, "StepAwareUNet"],
    }
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export.") as temporary:
            # Under another name first, so that a stopped export leaves no incomplete folder.
            folder = Path(temporary, "folder")
            unet.save_pretrained(folder / "unet", safe_serialization=True)
            shutil.copyfile(module, folder / "unet" / module.name)
            scheduler.save_pretrained(folder / "scheduler")
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model_index.json").write_text(text, encoding="utf-8")
            folder.replace(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
