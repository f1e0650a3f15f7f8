"""A sandwich training step of the CIFAR-10 network, the published way and ours, in one run.

python -m benchmark.training [--batches 16,64] [--repeats 5] [--out FILE.json]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmark import machine, naive
from benchmark.recipe import untrained
from commands.train import make_trainer
from looks import table
from model import arithmetic


def our_step(name: str, batch: int, compiled: bool = False) -> Callable[[Tensor], object]:
    """Our training step in one arithmetic."""
    flags = (f"--batch_size={batch}", f"--compile={compiled}")
    trainer = make_trainer(untrained("slimmable_CIFAR10", *flags), None)
    trainer.choose_arithmetic = lambda: name
    return partial(trainer.train_step, trainer.wrapped())


def main() -> None:
    parser = machine.arguments(__doc__, "training")
    parser.add_argument("--batches", default="16,64")
    given = parser.parse_args()
    model, measured, rows = untrained("slimmable_CIFAR10"), [], []
    shape, device = model.image_shape, model.device
    auto = arithmetic.chosen(model.net, [1.0], "auto", shape, device)[1.0]
    for batch in map(int, given.batches.split(",")):
        steps = {auto: our_step(auto, batch)}
        if device.type == "cuda":
            steps[f"{auto}, compiled"] = our_step(auto, batch, True)
        x_0 = torch.rand(batch, *shape, device=device) * 2 - 1
        old = naive.Training(model.net, model.levels)
        # The widths that our steps draw.
        widths = map(make_trainer(model, None).widths_of, itertools.count())
        works = {"published": lambda old=old, x=x_0, widths=widths: old.step(x, next(widths))}
        works |= {name: partial(step, x_0) for name, step in steps.items()}
        # One after the other: a step finds the pages of the one before it only if that was its own.
        times = {n: machine.in_turns({n: works[n]}, given.repeats)[n] for n in works}
        for name, seconds in times.items():
            measured.append({"program": name, "batch": batch, "seconds": seconds})
            faster = machine.gain(times["published"], seconds)
            rows.append([name, str(batch), machine.spread(seconds, batch), faster])
    print(table(["", "batch", "ms per image", "gain"], rows))
    machine.save(given.out, {"measured": measured})


if __name__ == "__main__":
    main()
