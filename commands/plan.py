"""--profile and --dry_run: what a network costs, and what a command would, before it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

import build
import score
from build import Model
from commands import searched
from looks import table
from model import WidthSchedule, average, entries_for_calls, latency
from runtime.errors import UserError
from runtime.processes import say
from search import Genome, Stage, stages
from settings import Configuration
from train import Trainer


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def load_model(config: Configuration) -> Model:
    """The trained network; for a plan, which weights do not matter to, an untrained one will do."""
    return (build.load_model_or_untrained if config.run.dry_run else build.load_model)(config)


def measured_batch(model: Model) -> int:
    """Images to measure with: a large batch on a CPU takes long and tells nothing more."""
    size = model.config.run.batch_size
    return size if model.device.type == "cuda" else min(size, 16)


# --- plans ----------------------------------------------------------------------------------------


def plan_scoring(model: Model, schedule: WidthSchedule, encode: bool = True) -> None:
    """Say what making, and scoring where `encode`, a schedule's images would cost."""
    calls, images = model.sampler.calls(), model.config.evaluation.num_images
    widths = [schedule[t] for t in entries_for_calls(schedule, calls)]
    _say_costs(model, [Stage("images", 1, images, len(calls), widths)], "no other load", encode)


def plan_search(model: Model, genome: Genome) -> None:
    """Say what a search would cost, stage by stage, and how far --search_minutes will get."""
    settings, images = model.config.search, model.config.evaluation.num_images
    shared = settings.state_memory > 0 and model.sampler.resumes
    parts = stages(settings, genome, images, shared)
    if settings.search_method == "sensitivity":
        note = "at most; rounds end early where they gain nothing"
    else:
        note = "at the widths' mean cost, before shared states save any"
    seconds = _say_costs(model, parts, note)
    if settings.search_minutes:
        reached = _reached(parts, seconds, 60 * settings.search_minutes)
        say(f"--search_minutes={settings.search_minutes:g}: {reached}")


def _reached(parts: Sequence[Stage], seconds: Sequence[float], left: float) -> str:
    """How much of `parts`, which take so many seconds each, is done in `left` seconds."""
    reached = []
    for stage, needed in zip(parts, seconds, strict=True):
        if needed > left:
            part = "a part"
            if stage.rounds > 1:
                part = f"{int(stage.rounds * left / needed)} of {stage.rounds} generations"
            reached.append(f"{part} of {stage.name}")
            return f"{', '.join(reached)}; the same command continues the search"
        reached.append(stage.name)
        left -= needed
    return "enough for all"


def _say_costs(model: Model, parts: Sequence[Stage], note: str, encode: bool = True) -> list[float]:
    """Say what each of `parts` costs, and all; seconds of each."""
    used, passes = sorted({w for s in parts for w in s.widths} - {0.0}), model.passes_per_call
    flops, times = model.flops(used), {0.0: 0.0} | _seconds(model, used)
    encoding = 0.0
    try:
        encoding = _encoder_seconds(model) if encode else 0.0
    except UserError as error:
        note += f"; without the encoder's time: {error}"
    if model.autoencoder:
        note += f"; without the decoder's {1000 * decoder_seconds(model):.3g} ms per image"
    total, seconds = 0.0, []
    for s in parts:
        cost, calling = (
            s.passes * sum(t[w] for w in s.widths) / len(s.widths) for t in (flops, times)
        )
        total += cost
        seconds.append(calling + s.candidates * s.images * encoding)
        say(
            f"{s.name}: {s.candidates} candidates × {s.images} images × {s.calls} network calls = "
            f"{passes * s.passes:.3g} network passes, about {duration(seconds[-1])}"
        )
    say(
        f"all: {passes * sum(s.passes for s in parts):.3g} passes, {total / 1e9:.3g} GFLOPs, "
        f"about {duration(sum(seconds))} ({note})"
    )
    return seconds


def _seconds(model: Model, widths: Sequence[float]) -> dict[float, float]:
    """Seconds per image of a call at each width."""
    batch, passes = measured_batch(model), model.passes_per_call
    return {
        width: passes * latency(network, model.image_shape, batch, model.device)
        for width, network in build.candidates(model, widths).items()
    }


def _encoder_seconds(model: Model) -> float:
    """Seconds per image that the encoder takes."""
    encoder, batch = build.encoder(model.config, model.device), measured_batch(model)
    images = torch.randint(0, 256, (batch, *model.picture_shape), dtype=torch.uint8)
    encoder(images).sum().item()  # waits for the device
    start = time.perf_counter()
    encoder(images).sum().item()
    return (time.perf_counter() - start) / batch


def decoder_seconds(model: Model) -> float:
    """Seconds per image of decoding latents."""
    decode, shape = model.autoencoder.to_images, model.image_shape
    return latency(lambda latents, t: decode(latents), shape, measured_batch(model), model.device)


def training_plan(trainer: Trainer, model: Model) -> str:
    """The cost of the steps that `trainer` has left, from three of them; saves nothing."""
    s, widths, size = trainer.settings, trainer.widths, trainer.run.batch_size
    flops: Mapping[float, float] = {
        width: score.flops(model.net, width, model.image_shape) for width in widths.all
    }
    network, batches = trainer.wrapped(), trainer.batches(model.config.data.num_workers)
    left, times = max(0, s.total_steps - trainer.step), []
    for _ in range(3):
        start = time.perf_counter()
        trainer.train_step(network, *next(batches))
        float(trainer.grad_norm)  # waits for the device
        times.append(time.perf_counter() - start)
    # A backward pass costs about twice the forward pass; drawn widths count by their mean.
    forward = flops[1.0]
    if trainer.schedule is not None:
        trained = [flops[width] for width in trainer.schedule if width]
        forward = sum(trained) / len(trained)
    elif s.sandwich:
        mean = sum(flops[w] for w in widths.candidate_width) / max(1, len(widths.candidate_width))
        forward += flops[widths.min_width] + (s.num_sandwich_sampling - 2) * mean
    gflops = 3 * forward * size * left / 1e9
    return (
        f"training: {left} steps × {size} images × {len(trainer.widths_of(0))} widths, "
        f"{gflops:.3g} GFLOPs, about {duration(min(times[1:]) * left)} "
        f"({min(times[1:]):.3g} s per step, measured; without grids and evaluations)"
    )


# --- profile --------------------------------------------------------------------------------------


def profile(config: Configuration) -> None:
    """Print parameters, GFLOPs and measured latency of every width, and of a schedule."""
    path = searched.schedule_path(config)
    model = searched.as_searched(build.load_model_or_untrained(config), path)
    config, widths = model.config, model.config.widths.all[::-1]
    flops, times = model.flops(widths), {0.0: 0.0} | _seconds(model, widths)
    rows = [
        [
            f"{width:g}",
            f"{model.net.parameter_count(width) / 1e6:.2f} M",
            f"{flops[width] / 1e9:.4f}",
            f"{100 * flops[width] / flops[1.0]:.1f} %",
            f"{1000 * times[width]:.3f}",
            f"{100 * times[width] / times[1.0]:.1f} %",
        ]
        for width in widths
    ]
    say(table(["width", "parameters", "GFLOPs", "of full", "ms / image", "of full"], rows))
    passes = "one pass" if model.passes_per_call == 1 else "two passes (--guidance_scale)"
    say(
        f"{passes}, images {model.image_shape}, batch {measured_batch(model)}, {model.device}, "
        f"--amp={config.run.amp}"
    )
    if vae := model.autoencoder:
        say(
            f"the decoder, once per image: {vae.decoder_parameters() / 1e6:.2f} M parameters, "
            f"{vae.decoder_flops(config.data.img_size) / 1e9:.4f} GFLOPs, "
            f"{1000 * decoder_seconds(model):.3f} ms"
        )
    if config.evaluation.schedule or path.exists():
        schedule = model.schedule(path)
        entries = entries_for_calls(schedule, model.sampler.calls())
        mean, seconds = average(schedule, entries, flops), average(schedule, entries, times)
        say(
            f"the schedule averages {mean / 1e9:.4f} GFLOPs per step of {flops[1.0] / 1e9:.4f} "
            f"({100 * mean / flops[1.0]:.1f} %) and {1000 * seconds:.3f} ms of "
            f"{1000 * times[1.0]:.3f} ({100 * seconds / times[1.0]:.1f} %)"
        )
