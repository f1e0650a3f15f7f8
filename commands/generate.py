"""--generate: from a checkpoint to images, with neither statistics nor an encoder."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

import build
from build import Model
from commands import plan, searched
from commands.evaluate import conditions, uniform_schedule
from model import WidthSchedule, average, entries_for_calls
from report import labelled_grid
from runtime import processes
from runtime.errors import UserError
from runtime.files import alone_in, read_image, read_json, save_image, writable_folder, write_json
from runtime.identity import agree, fingerprint
from runtime.processes import say
from runtime.schema import Amount, Count, Name, Widths, check
from settings import Configuration

SHOWN = 64  # images in the grid, at most


def generate(config: Configuration) -> None:
    """Write --num_images images to --out; those that are there already are kept."""
    if config.run.dry_run:
        plan.plan_scoring(*chosen(config), encode=False)
        return
    out = Path(config.evaluation.out or Path(config.run.logdir) / "generated")
    with alone_in(out, wait=False) if processes.is_main() else contextlib.nullcontext():
        run(*chosen(config), writable_folder(out, "--out"))


def chosen(config: Configuration) -> tuple[Model, WidthSchedule]:
    """The network and --schedule, with the sampler that it was searched with; or --assigned_width
    at every step."""
    model, e = plan.load_model(config), config.evaluation
    if not e.schedule:
        return model, uniform_schedule(model, e.assigned_width)
    if "assigned_width" in config.given and e.assigned_width != 1:
        raise UserError("--schedule and --assigned_width: give one of them")
    model = searched.as_searched(model, Path(e.schedule))
    return model, model.schedule(e.schedule)


def run(model: Model, schedule: WidthSchedule, out: Path) -> None:
    """Make the images that are missing in `out`, which is refused where it has others."""
    config, count = model.config, model.config.evaluation.num_images
    used = sorted(set(schedule.widths) - {0.0})
    networks = build.candidates(model, used, build.kept_arithmetic(config))
    identity = {
        **config.stored("network", "model"),
        "weights": fingerprint(model.net),
        "schedule": list(schedule.widths),
        "timesteps": schedule.timesteps,
        "sampler": model.sampler.as_json(),
        "seed": config.run.seed,
        "arithmetic": {str(width): network.arithmetic for width, network in networks.items()},
        "autoencoder": None,  # but where there is one
        **conditions(model),
    }
    about = out / "images.json"
    claim(about, identity, out)
    generator = build.generator(model, networks)

    def path(index: int) -> Path:
        return out / f"{index:06d}.png"

    shares = generator.shares(count)
    # An earlier run may have left some batches whole.
    left = [share for share in shares if not all(path(i).exists() for i in range(*share))]
    for indices, images in generator.batches(schedule, left, len(shares) - len(left)):
        for index, image in zip(indices.tolist(), images, strict=True):
            save_image(path(index), image)
    processes.gather(None)  # all images are there
    if not processes.is_main():
        return
    first = torch.stack([read_image(path(i)) for i in range(min(count, SHOWN))])
    costs, calls = model.flops(sorted({1.0, *used})), model.sampler.calls()
    mean = average(schedule, entries_for_calls(schedule, calls), costs)
    write_json(
        about,
        identity
        | {
            "images": max(count, len(list(out.glob("[0-9]*.png")))),
            "checkpoint": model.source,
            "step": model.step,
            "average_gflops": mean / 1e9,
            "full_width_gflops": costs[1.0] / 1e9,
        },
    )
    classes = model.classes
    labels = [*map(str, range(len(first)))]
    if classes:
        numbers, names = classes.labels(torch.arange(len(first))).tolist(), model.class_names
        labels = [names[n] if names else str(n) for n in numbers]
    title = (
        f"{model.about}, {config.sampling.sampler}, {len(calls)} network calls, "
        f"{100 * mean / costs[1.0]:.0f} % of full width's FLOPs"
    )
    columns = math.ceil(math.sqrt(len(first)))
    labelled_grid(out / "grid.png", first, labels, title, columns)
    say(f"{count} images in {out}: {path(0).name} to {path(count - 1).name}, grid.png, images.json")


class Generated(TypedDict):
    """images.json: what the images depend on; these, and the settings of the network."""

    weights: Name
    schedule: NotRequired[Widths]
    timesteps: NotRequired[list[Count] | None]
    sampler: NotRequired[dict[Name, object]]
    seed: NotRequired[int]
    arithmetic: NotRequired[dict[Name, Name]]
    images: NotRequired[Count]
    checkpoint: NotRequired[str]
    step: NotRequired[Count]
    average_gflops: NotRequired[Amount]
    full_width_gflops: NotRequired[Amount]


def claim(about: Path, identity: dict[str, object], out: Path) -> None:
    """Say in `about` how the images of `out` are made. Raises UserError where it has others."""
    if processes.is_main():
        stored = read_json(about) if about.exists() else None
        if stored is not None:
            check(stored, Generated, about, "name another --out")
        images = sorted(out.glob("*.png"))
        if images and stored is None:
            raise UserError(
                f"{out} has images that were made otherwise ({images[0].name}); name another --out"
            )
        if images:
            # Earlier versions said neither what shapes the network nor a guidance_scale of 1.
            late = Configuration().stored("network")
            defaults = dict.fromkeys(identity.keys() - late.keys()) | {"guidance_scale": 1.0}
            agree(about, stored, identity, "name another --out", defaults=defaults)
        else:  # what a run says that came to no image binds nobody
            write_json(about, identity)
    processes.gather(None)
