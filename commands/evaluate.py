"""--eval, --eval_stepaware, --eval_ensemble: scores of a width, of a schedule, of two networks."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import torch
from torch import nn

import build
from build import Model
from commands import plan, searched
from evaluate import Evaluator, Scores
from model import WidthSchedule, average, entries_for_calls
from runtime import processes
from runtime.errors import UserError
from runtime.files import (
    Unfinished,
    append_jsonl,
    check_place,
    remove_partial,
    save_grid,
    writable_folder,
    write_json,
)
from runtime.identity import fingerprint
from runtime.processes import say
from runtime.schema import TWO, Amount, Count, Name, Number, Width, Widths, digest, widths_line
from sampling.prefixes import StepSchedule
from sampling.protocol import timesteps
from settings import Configuration


def evaluate_width(config: Configuration) -> None:
    """Score the supernet at --assigned_width, or a plain network."""
    width = config.evaluation.assigned_width
    if "schedule" in config.typed:
        raise UserError("--schedule: --eval scores one width; --eval_stepaware scores a schedule")
    model = plan.load_model(config)
    schedule = uniform_schedule(model, width)
    name = "eval" if width == 1 else f"eval_width_{width:g}"
    _score(name, model, schedule, {"width": width, "step": model.step})


def uniform_schedule(model: Model, width: float) -> WidthSchedule:
    """--assigned_width at every step; UserError where the network does not have it."""
    if width != 1 and not model.config.widths.slimmable:
        raise UserError(f"--assigned_width={width}: add --slimmable_unet; a plain network has 1")
    model.net.check_width(width)
    return WidthSchedule([width] * model.levels.T)


def evaluate_schedule(config: Configuration) -> None:
    """Score the width schedule of LOGDIR/search.txt, or of --schedule."""
    path = searched.schedule_path(config)
    model = searched.as_searched(plan.load_model(config), path)
    schedule = model.schedule(path)
    about = {"step": model.step, "schedule": list(schedule.widths)}
    _score("eval_stepaware", model, schedule, about, path)


def _score(
    name: str, model: Model, schedule: WidthSchedule, about: Mapping, path: Path | None = None
) -> None:
    """Score a schedule of the supernet's widths. path: its file."""
    if model.config.run.dry_run:
        plan.plan_scoring(model, schedule)
        return
    used = sorted(set(schedule.widths) - {0.0})
    costs = model.flops(sorted({1.0, *used}))
    networks = build.candidates(model, used, build.kept_arithmetic(model.config))
    evaluator = build.evaluator(model, networks)
    report_scores(name, model, evaluator, schedule, costs, about, path)


def evaluate_ensemble(config: Configuration) -> None:
    """Score a large network that a small one relieves where --end < t < --start."""
    e = config.ensemble
    large, networks, schedule, costs = ensemble(config)
    about = {"step": large.step, "start": e.start, "end": e.end}
    evaluator = build.evaluator(large, networks)
    report_scores("eval_ensemble", large, evaluator, schedule, costs | {1.0: costs["large"]}, about)


def ensemble(
    config: Configuration,
) -> tuple[Model, dict[str, nn.Module], list[str], dict[str, float]]:
    """The large model; the two networks by name; which of them each timestep has; their FLOPs."""
    e = config.ensemble
    small = build.load_model(config, e.small_logdir, e.small_ch)
    large = build.load_model(config, e.large_logdir)
    theirs, ours = (_shared_settings(model) for model in (small, large))
    differing = [f"{n}: {theirs[n]} small, {ours[n]} large" for n in ours if theirs[n] != ours[n]]
    if small.class_names and large.class_names and small.class_names != large.class_names:
        differing.append("the names of their classes, or the order")
    if differing:
        raise UserError(f"the two networks cannot take turns ({'; '.join(differing)})")
    small.check_guidance()
    # Two networks are candidates like any others; the keys are but names.
    models = {"large": large, "small": small}
    paths = {name: build.kept_arithmetic(config, f"arithmetic_{name}") for name in models}
    networks = {
        name: build.candidates(model, [1.0], paths[name])[1.0] for name, model in models.items()
    }
    schedule = ["small" if e.end < t < e.start else "large" for t in range(large.levels.T)]
    if "small" not in schedule:
        raise UserError(
            f"--end={e.end}, --start={e.start}: the small network takes the timesteps between "
            "them, and there is none"
        )
    costs = {name: model.flops([1.0])[1.0] for name, model in models.items()}
    return large, networks, schedule, costs


def _shared_settings(model: Model) -> dict[str, object]:
    """What two networks that take turns must have in common."""
    shared = model.config.stored("model") | {
        name: model.config[name] for name in ("T", "num_classes", "latent_vae", "latent_scale")
    }
    return {"channels": model.net.settings.in_ch} | shared


class Evaluation(TypedDict):
    """eval.json and its like: a score, what it cost, and what it depends on."""

    mode: Name
    checkpoint: Name
    step: Count
    width: NotRequired[Width]
    schedule: NotRequired[Widths]
    start: NotRequired[int]
    end: NotRequired[int]
    label: Name
    encoder: Name
    distance: Amount
    inception_score: Annotated[list[Amount], TWO] | None
    images: Count
    passes: Count
    passes_saved: Count
    sampling_seconds: Amount
    decoding_seconds: Amount
    average_gflops: Amount
    full_width_gflops: Amount
    saving: Number
    images_per_second: Amount
    processes: Count
    sampler: dict[Name, object]
    seed: int
    device: Name
    classes: NotRequired[list[Count] | Name]
    guidance_scale: NotRequired[Amount]
    autoencoder: NotRequired[Name]
    decoder: NotRequired[dict[Name, Amount]]
    arithmetic: dict[Name, Name]


def report_scores(
    name: str,
    model: Model,
    evaluator: Evaluator,
    schedule: StepSchedule,
    costs: Mapping,
    about: Mapping,
    path: Path | None = None,
) -> None:
    """Score, save LOGDIR/NAME.json and LOGDIR/NAME.png, add a line to LOGDIR/evaluations.jsonl, and
    print. path: the schedule's file."""
    config, sampler = model.config, model.sampler
    logdir = writable_folder(config.run.logdir)
    check_place(logdir / f"{name}.json")  # not after hours
    partial = logdir / f".{name}.unfinished-{processes.rank()}.pt"
    unfinished = Unfinished(partial, score_identity(model, evaluator, schedule))
    scores, images = evaluator.score(schedule, min(256, evaluator.num_images), unfinished)
    calls, steps = sampler.calls(), len(timesteps(sampler))
    flops, full = average(schedule, entries_for_calls(schedule, calls), costs), costs[1.0]
    rate = scores.images * processes.world() / scores.sampling_seconds
    result: Evaluation = {
        "mode": name,
        "checkpoint": config.run.ckpt_name,
        **about,
        **asdict(scores),
        "average_gflops": flops / 1e9,
        "full_width_gflops": full / 1e9,
        "saving": 1 - flops / full,
        "images_per_second": rate,
        "processes": processes.world(),
        "sampler": sampler.as_json(),
        "seed": config.run.seed,
        "device": str(model.device),
        **conditions(model),
        **_decoder(model, scores),
        "arithmetic": {
            str(key): network.arithmetic for key, network in evaluator.generator.networks.items()
        },
    }
    if processes.is_main():
        write_json(logdir / f"{name}.json", result)
        append_jsonl(logdir / "evaluations.jsonl", evaluation(model, evaluator, result, path))
        save_grid(logdir / f"{name}.png", images)
    say(f"{scores.label}: {scores.distance:.6g}")
    if scores.inception_score:
        mean, deviation = scores.inception_score
        say(f"Inception Score ({scores.encoder}): {mean:.3f} ± {deviation:.3f}")
    unit = "step" if len(calls) == steps else "pass"
    say(
        f"average {flops / 1e9:.4f} GFLOPs per {unit}, full width {full / 1e9:.4f} "
        f"({100 * (1 - flops / full):.1f} % saved)"
    )
    passes = "" if len(calls) == steps else f" of {len(calls)} network passes"
    say(f"{rate:.3g} images/s sampled over {steps} steps{passes}")
    if "decoder" in result:
        say("the decoder, once per image and apart from all that: {gflops:.4g} GFLOPs, "
            "{ms_per_image:.4g} ms".format(**result["decoder"]))  # fmt: skip
    say(f"saved {logdir / name}.json and {name}.png")
    processes.gather(None)  # the others keep their shares until the score is saved
    unfinished.remove()
    if processes.is_main():
        remove_partial(logdir / name, ".unfinished-*.pt")


def evaluation(
    model: Model, evaluator: Evaluator, result: Mapping, path: Path | None
) -> dict[str, object]:
    """A line of evaluations.jsonl: a score, and all that it depends on, in short."""
    config = model.config
    record = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **result}
    widths = record.pop("schedule", None)
    if path:  # which may have another schedule by now
        record |= {"schedule": str(path), "schedule_digest": digest(widths_line(widths))}
    return record | {
        **config.stored("network", "model"),
        "weights": fingerprint(model.net),
        **evaluator.encoder.identity,
        "dataset": config.data.dataset,
        "statistics": evaluator.reference.source,
        "statistics_digest": evaluator.reference.digest,
        "batch_size": config.run.batch_size,
        "amp": config.run.amp,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def score_identity(model: Model, evaluator: Evaluator, schedule: StepSchedule) -> str:
    """What the features of a schedule's images depend on, and how processes share them."""
    generator = evaluator.generator
    networks = {
        str(key): (network.arithmetic, fingerprint(network))
        for key, network in generator.networks.items()
    }
    about = {
        **model.config.stored("network", "model"),
        "networks": networks,
        "schedule": [str(schedule[t]) for t in range(model.levels.T)],
        "entries": getattr(schedule, "timesteps", None),
        "sampler": generator.sampler.as_json(),
        **evaluator.encoder.identity,
        "images": (evaluator.num_images, generator.batch_size, generator.seed, generator.stream),
        "processes": processes.world(),
        **conditions(model),
    }
    return json.dumps(about, sort_keys=True)


def conditions(model: Model) -> dict[str, object]:
    """What images depend on where there are classes, or latents to decode."""
    about: dict[str, object] = {}
    if model.classes:
        about["classes"] = list(model.classes.fixed) or "as in the training set"
        if (
            about["classes"] == list(range(model.classes.count))
            and not model.config.sampling.classes
        ):
            about["classes"] = "the rows of --conditioning in turn"
        about["guidance_scale"] = model.classes.guidance
    elif getattr(model.net.settings, "embeddings", ()):  # one row, shown to all images
        about["guidance_scale"] = 1.0
    if model.autoencoder:
        about["autoencoder"] = model.autoencoder.fingerprint
    return about


def _decoder(model: Model, scores: Scores) -> dict[str, object]:
    """What making images of latents costs."""
    if not model.autoencoder:
        return {}
    gflops = model.autoencoder.decoder_flops(model.config.data.img_size) / 1e9
    milliseconds = 1000 * scores.decoding_seconds / scores.images
    return {"decoder": {"gflops": gflops, "ms_per_image": milliseconds}}
