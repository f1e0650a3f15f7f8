"""Does the clock follow the FLOPs? A step of sampling, the published way and ours, in one run.

    python -m benchmark.sampling [--batches 1,16,64] [--compile] [--repeats 5] [--out FILE.json]

The CIFAR-10 network. A step is noise, a pass and the update; the released schedule's is the mean
over its widths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import build
import score
from benchmark import machine, naive
from benchmark.recipe import untrained
from looks import table
from model import arithmetic, sampling_networks
from model.networks import available

SHARES = {1.0: 0.274, 0.75: 0.181, 0.5: 0.534, 0.25: 0.011}  # of the released schedule's steps


def steps(
    model: build.Model, networks: Mapping[float, nn.Module], batch: int
) -> dict[float, Callable[[], object]]:
    """A step of a batch of images by each width's network."""
    made = replace(build.generator(model, networks), batch_size=batch, progress=False)
    chains = {w: partial(made.batches, [w] * model.levels.T, [(0, batch)]) for w in networks}
    return {w: lambda chain=chain: list(chain()) for w, chain in chains.items()}


def measure(
    model: build.Model, batches: Sequence[int], repeats: int, compiled: bool
) -> list[dict[str, object]]:
    """A record for each program, batch and width."""
    names, measured = ["float32", "bfloat16"], []
    if model.device.type == "cpu" and available():
        names.append("winograd")
    ours = {name: sampling_networks(model.net, SHARES, name) for name in names}
    for batch in batches:
        if compiled:  # anew for each size of a batch
            nets = sampling_networks(model.net, SHARES, "bfloat16", compiled=True)
            ours["bfloat16, compiled"] = nets
        x = torch.empty(batch, *model.image_shape, device=model.device)
        works: dict[tuple[str, float], Callable] = {
            ("published", w): partial(naive.step, model.net, w, model.levels, x) for w in SHARES
        }
        for name, networks in ours.items():
            works |= {(name, w): step for w, step in steps(model, networks, batch).items()}
        measured += [
            {"program": name, "batch": batch, "width": width, "seconds": seconds}
            for (name, width), seconds in machine.in_turns(works, repeats).items()
        ]
    return measured


def show(measured: Sequence[Mapping], flops: Mapping[float, int]) -> None:
    """A table for each batch size."""
    share = sum(SHARES[w] * flops[w] for w in SHARES) / flops[1.0]
    for batch in dict.fromkeys(m["batch"] for m in measured):
        here, rows, before = [m for m in measured if m["batch"] == batch], [], None
        for name in dict.fromkeys(m["program"] for m in here):
            times = {m["width"]: m["seconds"] for m in here if m["program"] == name}
            turns = zip(*times.values(), strict=True)
            times["schedule"] = [sum(map(float.__mul__, SHARES.values(), turn)) for turn in turns]
            before = before or times["schedule"]
            part = statistics.median(times["schedule"]) / statistics.median(times[1.0])
            cells = [machine.spread(seconds, batch) for seconds in times.values()]
            cells.append(machine.gain(before, times["schedule"]))
            rows.append([name, *cells, f"{part:.3f}", f"{part / share:.2f}"])
        print(f"\nbatch {batch}, ms per image and step; the schedule has {share:.3f} of the FLOPs")
        widths = [f"{w:g}" for w in SHARES]
        print(table(["", *widths, "schedule", "gain", "share of time", "of FLOPs'"], rows))


def main() -> None:
    parser = machine.arguments(__doc__, "sampling")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--compile", action="store_true", help="bfloat16 compiled, too: minutes")
    given = parser.parse_args()
    model = untrained("slimmable_CIFAR10", "--sample_steps=1")
    shape, widths = model.image_shape, list(SHARES)
    batches = [int(batch) for batch in given.batches.split(",")]
    measured = measure(model, batches, given.repeats, given.compile)
    show(measured, {w: score.flops(model.net, w, shape) for w in widths})
    auto = arithmetic.chosen(model.net, widths, "auto", shape, model.device)
    print(f"--amp=auto: {arithmetic.describe(auto)}")
    machine.save(given.out, {"measured": measured, "auto": {str(w): auto[w] for w in auto}})


if __name__ == "__main__":
    main()
