"""What becomes of a narrow step's error: of each step in turn, how far it moves x, and how far the
image that the full network makes of that.

    python -m benchmark.errors FILE.json --FLAG=…

The flags are those of main.py's --eval, for a trained supernet. Image and noise are the same with
and without the narrow step, so the difference is that step's alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from statistics import geometric_mean

import torch
from torch import Tensor, nn

import build
from benchmark import machine
from benchmark.recipe import configuration
from build import Model
from looks import table
from model import StepAwareDenoiser
from sampling.noise import SAMPLING, ImageNoise

SAMPLERS = ("ddpm", "ddim")
GROUPS = 5  # of neighbouring steps, in the table


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


@torch.inference_mode()
def errors(model: Model, networks: Mapping[float, nn.Module], width: float) -> list[dict]:
    """Of each step, the noisiest first: its timestep, and the root mean square that its error
    moves x, and the image, by."""
    sampler, count = model.sampler, model.config.evaluation.num_images
    steps = [call.step for call in sampler.calls()]
    noise = ImageNoise(model.config.run.seed, SAMPLING, torch.arange(count), model.image_shape)

    def states(narrow: int | None, x: Tensor, start: int = 0) -> list[Tensor]:
        """x before each step from `start` on, and the image."""
        seen: list[Tensor] = []
        schedule = [width if t == narrow else 1.0 for t in range(model.levels.T)]
        denoise = StepAwareDenoiser(networks, schedule, model.levels.T, model.device)
        made = sampler.sample(denoise, x, noise, steps, lambda t, x: seen.append(x.clone()), start)
        return [*seen, made]

    full, found = states(None, noise.initial()), []
    for i, t in enumerate(steps):
        own = states(t, full[i], i)
        found.append(
            {"timestep": t, "made": rms(own[1] - full[i + 1]), "left": rms(own[-1] - full[-1])}
        )
    return found


def main() -> None:
    path, *flags = sys.argv[1:]
    measured = {}
    for name in SAMPLERS:
        model = build.load_model(configuration(*flags, f"--sampler={name}"))
        widths = model.config.widths.all
        networks = build.candidates(model, widths, build.kept_arithmetic(model.config))
        measured[name] = {str(w): errors(model, networks, w) for w in widths if w < 1}
    rows = []
    for width, records in measured[SAMPLERS[0]].items():
        size = -(-len(records) // GROUPS)
        for first in range(0, len(records), size):
            group = slice(first, first + size)
            row = [width, f"{first + 1}–{min(first + size, len(records))}"]
            for name in SAMPLERS:
                own = measured[name][width][group]
                made, left = (geometric_mean(r[key] for r in own) for key in ("made", "left"))
                row += [f"{made:.4f}", f"{left:.4f}", f"{left / made:.2f}"]
            rows.append(row)
    header = ["width", "steps", *(f"{name}: {what}" for name in SAMPLERS
                                  for what in ("made", "left", "left / made"))]  # fmt: skip
    print(table(header, rows))
    machine.save(path, {"images": model.config.evaluation.num_images, "table": [header, *rows],
                        "measured": measured})  # fmt: skip


if __name__ == "__main__":
    main()
