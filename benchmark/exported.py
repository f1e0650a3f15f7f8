"""An exported step-aware model with what else makes sampling cheaper, and against it.

    python -m benchmark.exported LOGDIR [--images 500] [--batch 250] [--repeats 3]

LOGDIR: a run on the digits with its search, such as that of `make demo`. Every row is a folder that
main.py exports and that diffusers opens, changed as a user would. Distances are of four sets of
--images, each on its own noise, in the features of --fid_encoder=pixels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from diffusers import DiffusionPipeline

import build
import score
from benchmark import machine
from benchmark.recipe import configuration
from looks import table
from model import WidthSchedule
from runtime.files import read_json

SETS = 4


def compiled(pipe: DiffusionPipeline) -> None:
    for network in pipe.unet.candidates.values():
        network.compile()


CHANGES: dict[str, Callable[[DiffusionPipeline], object]] = {
    "as it is": lambda pipe: None,
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "compiled": compiled,
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
}


def rows(logdir: Path, folder: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Name -> (flags of the export, name of the change)."""
    front = read_json(logdir / "search" / "front.json")
    steps, share = len(front["timesteps"]), 1 - front["chosen"]["saving"]
    full, fewer = folder / "full.txt", max(1, round(share * steps))
    WidthSchedule([1.0] * len(front["chosen"]["schedule"])).save(full)
    found = {f"searched schedule, {name}": ((), name) for name in CHANGES}
    found |= {f"full width, {n}": ((f"--schedule={full}",), n) for n in ("as it is", "bfloat16")}
    for name in ("ddpm", "dpm_solver", "UniPCMultistepScheduler"):
        flags = (f"--schedule={full}", f"--sampler={name}", f"--sample_steps={fewer}")
        found[f"full width, {name} with {fewer} steps"] = (flags, "as it is")
    return found


def exported(logdir: Path, out: Path, flags: Sequence[str]) -> str:
    """The folder of the export with these flags."""
    machine.main_py(f"--flagfile={logdir / 'flagfile.txt'}", f"--logdir={logdir}", *flags,
                    f"--export_diffusers={out}")  # fmt: skip
    return str(out)


def opened(folder: str, change: str) -> DiffusionPipeline:
    """Its pipeline, changed."""
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    CHANGES[change](pipe)
    return pipe


def images(pipe: DiffusionPipeline, count: int, seed: int) -> np.ndarray:
    """(count, H, W, C) float in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=count, generator=generator, output_type="np").images


def main() -> None:
    parser = machine.arguments(__doc__, "exported")
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--images", type=int, default=500, help="of each set")
    parser.add_argument("--batch", type=int, default=250, help="images at once, when timed")
    o = parser.parse_args()
    flags = (f"--flagfile={o.logdir / 'flagfile.txt'}", "--fid_encoder=pixels", "--fid_cache=")
    model = build.load_model(configuration(*flags, f"--logdir={o.logdir}"))
    encoder = build.encoder(model.config, model.device)
    moments = score.Moments()
    moments.update(encoder(build.load_images(model.config).tensor))
    reference = score.Gaussian(moments.mean, moments.covariance)

    def distance(pipe: DiffusionPipeline, seed: int) -> float:
        pixels = torch.from_numpy(images(pipe, o.images, seed)).permute(0, 3, 1, 2)
        own = score.Moments()
        own.update(encoder((255 * pixels).round().to(torch.uint8)))
        return reference.distance(own.mean, own.covariance)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        wanted = rows(o.logdir, Path(folder))
        folders = {
            flags: exported(o.logdir, Path(folder, str(i)), flags)
            for i, flags in enumerate(dict.fromkeys(flags for flags, _ in wanted.values()))
        }
        pipes = {name: opened(folders[flags], change) for name, (flags, change) in wanted.items()}
        works = {n: lambda pipe=p: images(pipe, o.batch, 0) for n, p in pipes.items()}
        seconds = machine.in_turns(works, o.repeats)
        measured = {
            name: {"distances": [distance(pipe, seed) for seed in range(SETS)],
                   "seconds": seconds[name]}
            for name, pipe in pipes.items()
        }  # fmt: skip
    base, shown = seconds["full width, as it is"], []
    for name, r in measured.items():
        error = stdev(r["distances"]) / math.sqrt(SETS)
        scored, times = f"{fmean(r['distances']):.3f} ± {error:.3f}", r["seconds"]
        shown.append([name, scored, machine.spread(times, o.batch), machine.gain(base, times)])
    header = ["export", "distance", "ms / image", "of full width"]
    print(table(header, shown))
    machine.save(o.out, {"images": o.images, "sets": SETS, "batch": o.batch, "measured": measured,
                         "table": [header, *shown]})  # fmt: skip


if __name__ == "__main__":
    main()
