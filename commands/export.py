"""--export_diffusers: the EMA network and its width schedule as a folder for diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import build
from build import Model
from commands import searched
from model import WidthSchedule, entries_for_calls
from runtime.errors import UserError
from runtime.processes import say
from sampling.prefixes import Chain
from settings import Configuration


def export(config: Configuration) -> None:
    """Write the folder that --export_diffusers names."""
    path = searched.schedule_path(config)
    model = searched.as_searched(build.load_model(config), path)
    write(model, model.schedule(path), config.evaluation.export_diffusers)


def write(model: Model, schedule: WidthSchedule, folder: str | Path) -> None:
    """Write the networks of a schedule, and how the model's sampler runs them, to `folder`."""
    # diffusers takes seconds to import.
    from model.diffusers.export import export_diffusers, step_aware
    from sampling.exported import in_diffusers

    steps = Chain.of(schedule, model.sampler).steps
    chain = in_diffusers(model.sampler, steps)
    networks = {w: model.net.subnet(w) for w in sorted(set(schedule.widths) - {0.0})}
    sampling = {
        "set_timesteps": chain.set_timesteps,
        "step": chain.step,
        "calls": calls(model, schedule, steps),
        **conditions(model),
    }
    unet = step_aware(networks, schedule, model.image_shape, sampling)
    vae = model.autoencoder.network if model.autoencoder else None
    export_diffusers(folder, unet, chain.scheduler, vae)
    passes, name = len(sampling["calls"]), type(chain.scheduler).__name__
    say(f"saved {folder}: {model.about}, for {passes} network passes of {name}")


def calls(model: Model, schedule: WidthSchedule, steps: list[int]) -> list[tuple[int, float]]:
    """(timestep, width) of each call of the network."""
    made = model.sampler.calls(steps)
    entries = entries_for_calls(schedule, made)
    return [(call.t, schedule[entry]) for call, entry in zip(made, entries, strict=True)]


def _can_guide(model: Model) -> bool:
    """Whether the network has learned what to show without a class."""
    try:
        return replace(model, config=model.config.changed(guidance_scale=2.0)).classes is not None
    except UserError:
        return False


def conditions(model: Model) -> dict[str, object]:
    """How the pipeline asks for classes and decodes latents, where there are any."""
    about: dict[str, object] = {}
    if classes := model.classes:
        shown = list(classes.fixed or range(classes.count))
        null = classes.count if _can_guide(model) else None
        about["classes"] = {"null": null, "guidance": classes.guidance, "shown": shown}
    if vae := model.autoencoder:
        numbers = {"scale": vae.scale, "shift": vae.shift}
        about["latents"] = {
            name: value if isinstance(value, float) else value.flatten().tolist()
            for name, value in numbers.items()
        }
    return about
