"""A score of main.py by two encoders, with what its standard error is made of, as JSON.

    python -m benchmark.scores FILE.json JUDGE [--test] --FLAG=…

The flags are those of main.py's --eval, --eval_stepaware or --eval_ensemble. The images are those
that it makes with the same flags, and so is the distance by --fid_encoder, up to rounding. JUDGE
names another encoder, with which nothing was chosen. The images are also taken as SETS sets, and
each distance is taken without each set in turn (jackknife). --test: of the test set's first
images, encoded and decoded where there is an autoencoder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import build
import dataset
from benchmark.recipe import configuration
from build import Model
from commands.evaluate import ensemble
from model import WidthSchedule, average, entries_for_calls, keep_freed
from runtime.clock import Clock
from runtime.errors import UserError
from runtime.files import write_json, write_tensors
from score import Encoder, Gaussian, Moments
from settings import Configuration

SETS = 5
SHOWN = 15  # images that are kept
ROLES = ("chosen_with", "judge")


def chain(config: Configuration) -> tuple[Model, dict, WidthSchedule | list[str], Mapping]:
    """The model, networks by name, which of them each timestep has, and the FLOPs of each."""
    if {"large_logdir", "small_logdir"} & config.given:
        return ensemble(config)
    model, width = build.load_model(config), config.evaluation.assigned_width
    path = config.evaluation.schedule
    schedule = model.schedule(path) if path else WidthSchedule([width] * model.levels.T)
    widths = sorted({*schedule.widths})
    networks = build.candidates(model, widths, build.kept_arithmetic(model.config))
    return model, networks, schedule, model.flops(widths)


def references(model: Model, judge: str) -> list[tuple[Encoder, Gaussian]]:
    """Both encoders, each with the training set's features in short."""
    judging = replace(model, config=model.config.changed(fid_encoder=judge))
    encoders = [(m, build.encoder(m.config, m.device)) for m in (model, judging)]
    return [(encoder, build.reference(m, encoder)) for m, encoder in encoders]


def distances(
    batches: Iterable[tuple[Tensor, Tensor]], count: int, known: Sequence[tuple[Encoder, Gaussian]]
) -> dict[str, dict]:
    """The distance of all images by each encoder, and without each set.

    batches: (indices (B,), images uint8 (B, C, H, W)) of images 0 … count − 1.
    """
    sets = [[Moments() for _ in range(SETS)] for _ in known]
    for indices, images in batches:
        place = indices.cpu() * SETS // count
        for (encoder, _), moments in zip(known, sets, strict=True):
            features = encoder(images)
            for number in place.unique().tolist():
                moments[number].update(features[(place == number).to(features.device)])
    found = {}
    for role, (encoder, reference), moments in zip(ROLES, known, sets, strict=True):
        values = []
        for left_out in (None, *range(SETS)):
            merged = Moments()
            for number, each in enumerate(moments):
                if number != left_out:
                    merged.merge(each)
            values.append(reference.distance(merged.mean, merged.covariance))
        found[role] = {"encoder": encoder.name, "distance": values[0], "without": values[1:]}
    return found


def of_test_set(config: Configuration, judge: str) -> dict:
    """The distance of as many images of the test set; of all where there are fewer."""
    model, d = build.load_model_or_untrained(config), config.data
    try:
        images = dataset.load(d.dataset, d.data_root, d.img_size, False, d)
    except UserError as error:
        return {"none": str(error)}
    count, size = min(len(images), config.evaluation.num_images), config.run.batch_size
    parts = dataset.everything(images, size, d.num_workers, 0, count)
    if model.autoencoder:  # what no schedule can better
        parts = (model.autoencoder.to_images(model.autoencoder.encode(x)) for x in parts)
    batches = zip(torch.arange(count).split(size), parts, strict=True)
    return {"images": count, **distances(batches, count, references(model, judge))}


def of_images(config: Configuration, judge: str) -> tuple[dict, Tensor]:
    """The score, and the first images, uint8 (SHOWN, C, H, W)."""
    model, networks, schedule, flops = chain(config)
    making, count = build.generator(model, networks), model.config.evaluation.num_images
    calls, clock, kept = model.sampler.calls(), Clock(model.device), []

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for indices, images in making.batches(schedule, making.shares(count), clock=clock):
            kept.extend(images[: SHOWN - len(kept)].cpu())
            yield indices, images

    found = distances(batches(), count, references(model, judge))
    per_call = average(schedule, entries_for_calls(schedule, calls), flops)
    steps = [*dict.fromkeys(step for step, _ in calls)]
    return {
        "images": count,
        **found,
        "gflops_per_image": per_call * len(calls) / 1e9,
        "ms_per_image": 1000 * clock.seconds("sampling") / count,
        "widths": [schedule[t] for t in steps],  # of each step, the noisiest first
        "sampler_settings": model.sampler.as_json(),
        "seed": model.config.run.seed,
        "step": model.step,
        "arithmetic": {str(name): network.arithmetic for name, network in networks.items()},
    }, torch.stack(kept)


def standard_error(without: Sequence[float]) -> float:
    """Of a number that is `without` set by set: the jackknife's."""
    mean = math.fsum(without) / len(without)
    share = (len(without) - 1) / len(without)
    return math.sqrt(share * math.fsum((value - mean) ** 2 for value in without))


def main() -> None:
    keep_freed()
    path, judge, *flags = sys.argv[1:]
    config = configuration(*(flag for flag in flags if flag != "--test"))
    try:
        if "--test" in flags:
            write_json(path, of_test_set(config, judge))
            return
        found, images = of_images(config, judge)
        write_tensors(Path(path).with_suffix(".pt"), images)
        write_json(path, found)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
