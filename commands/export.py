"""--export_diffusers: the EMA network and its width schedule as a folder for diffusers."""

from __future__ import annotations

import build
from commands import searched
from commands.evaluate import schedule_path
from runtime.errors import UserError
from runtime.processes import say
from settings import Configuration


def export(config: Configuration) -> None:
    """Write the folder that --export_diffusers names."""
    from model.diffusers.export import export_diffusers  # diffusers takes seconds to import

    folder = config.evaluation.export_diffusers
    path = schedule_path(config)
    model = searched.as_searched(build.load_model(config), path)
    config, d = model.config, model.config.diffusion
    if model.autoencoder or model.classes:
        raise UserError("--export_diffusers: only for networks of images without classes")
    if d.precond != "none":
        raise UserError("--export_diffusers: diffusers' DDPM and DDIM have no --precond=edm")
    schedule = model.schedule(path)
    export_diffusers(
        folder,
        {width: model.net.subnet(width) for width in sorted(set(schedule.widths) - {0.0})},
        schedule,
        model.image_shape,
        (d.beta_1, d.beta_T, d.T),
        beta_schedule=d.beta_schedule,
        timesteps=schedule.timesteps,
        mean_type=d.mean_type,
        var_type=config.sampling.var_type,
        clip_denoised=config.sampling.clip_denoised,
    )
    say(f"saved {folder}: the EMA network of step {model.step}, for diffusers' pipelines")
