"""Export: a folder that diffusers' pipelines load and run, the width schedule in its config.

This file knows the folder's layout. The networks are dense ones, as `subnet` makes them.
step_aware_unet.py, which runs them in diffusers, and pipeline.py, which samples with them, are
copied into the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
from diffusers.models.attention_processor import Attention
from torch import nn

from model.diffusers import pipeline, step_aware_unet
from model.diffusers.loading import config_of
from model.diffusers.step_aware_unet import StepAwareUNet, key
from model.diffusers.supernet import DenseDiffusersUNet
from model.schedule import WidthSchedule
from model.unet import SlimmableUNet
from runtime.errors import UserError


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in network.state_dict().items()}


def _groups(network: nn.Module) -> dict[str, int]:
    """The number of groups of each group norm, by its name."""
    norms = [(n, m) for n, m in network.named_modules() if hasattr(m, "num_groups")]
    return {name: norm.num_groups for name, norm in norms}


def _spec(network: nn.Module) -> tuple[dict, nn.Module]:
    """The argument of step_aware_unet.build, and the module whose state dict fills its result."""
    is_dense = not hasattr(getattr(network, "time_embedding", None), "timembedding")
    if isinstance(network, SlimmableUNet) and is_dense:
        return {"kind": "ddsm", "shapes": _shapes(network), "num_groups": _groups(network)}, network
    if isinstance(network, DenseDiffusersUNet):
        model = network.model
        spec = {
            "kind": "diffusers",
            "class": type(model).__name__,
            "config": config_of(model),
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
    sampling: Mapping[str, object] | None = None,
) -> StepAwareUNet:
    """One diffusers model that holds copies of the networks that `schedule` names.

    networks: width -> what `subnet(width)` returned. image_shape: (C, H, W). sampling: see
    StepAwareUNet. A step of width 0 is left out: its timestep has its neighbour's width. Raises
    UserError where the schedule names a width that has no network.
    """
    every = schedule.timesteps or range(len(schedule))
    steps = sorted({t for t in every if schedule[t]})
    widths = [float(schedule[t]) for t in steps]
    specs, states = {}, {}
    for width in sorted(set(widths)):
        if width not in networks:
            raise UserError(f"the schedule names width {width:g}, for which there is no network")
        specs[key(width)], network = _spec(networks[width])
        states.update({f"candidates.{key(width)}.{n}": v for n, v in network.state_dict().items()})
    embeddings = getattr(networks[widths[0]], "embeddings", None)
    if embeddings is not None:
        states["embeddings"] = embeddings
    channels, *sides = image_shape
    unet = StepAwareUNet(
        sample_size=sides[0] if sides[0] == sides[1] else sides,
        in_channels=channels,
        out_channels=channels,
        networks=specs,
        schedule=widths,
        timesteps=None if steps == list(range(len(schedule))) else steps,
        sampling=None if sampling is None else dict(sampling),
        embeddings_shape=None if embeddings is None else list(embeddings.shape),
    )
    unet.load_state_dict(states)
    return unet.eval()


def export_diffusers(
    directory: str | Path, unet: StepAwareUNet, scheduler: object, vae: nn.Module | None = None
) -> None:
    """Write a folder that diffusers loads with `trust_remote_code`.

    unet: of `step_aware`. scheduler: configured. vae: of a network in latents. The folder holds
    model_index.json, scheduler/, unet/ with config.json, safetensors and step_aware_unet.py, vae/,
    and pipeline.py, which samples as `unet.config.sampling` says. DDPMPipeline or DDIMPipeline runs
    it, too, where that has all that the model needs.

    Raises UserError where the directory is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"--export_diffusers={directory} exists and is not empty; name a new directory"
        )
    kind = type(scheduler).__name__
    usual = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}.get(kind)
    needs_more = vae is not None or "classes" in (unet.config.sampling or {})
    module = Path(step_aware_unet.__file__)
    index: dict[str, object] = {
        "_class_name": [Path(pipeline.__file__).stem, pipeline.StepAwarePipeline.__name__]
        if needs_more or not usual
        else usual,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", kind],
        "unet": [module.stem, "StepAwareUNet"],
    }
    if vae is not None:
        index["vae"] = ["diffusers", type(vae).__name__]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export.") as temporary:
            # Under another name first, so that a stopped export leaves no incomplete folder.
            folder = Path(temporary, "folder")
            unet.save_pretrained(folder / "unet", safe_serialization=True)
            shutil.copyfile(module, folder / "unet" / module.name)
            shutil.copyfile(pipeline.__file__, folder / Path(pipeline.__file__).name)
            scheduler.save_pretrained(folder / "scheduler")
            if vae is not None:
                vae.save_pretrained(folder / "vae", safe_serialization=True)
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model_index.json").write_text(text, encoding="utf-8")
            folder.replace(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
