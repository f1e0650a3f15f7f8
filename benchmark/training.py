"""One sandwich training step of the CIFAR-10 network, the published way and ours, in one run.

python -m benchmark.training [FILE.json] [--quick] [--batch 64]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping

import torch

from benchmark import naive
from benchmark.machine import describe
from benchmark.sampling import NOT_MEASURED, seconds
from commands.train import make_trainer
from looks import table
from model import arithmetic, keep_freed
from runtime.files import write_json


def our_step(
    chosen: str, batch: int, device: torch.device, compiled: bool
) -> Callable[[torch.Tensor], None]:
    """Our training step in one arithmetic, as a function of a batch."""
    model = naive.untrained(3, device, batch_size=batch, compile=compiled, amp="auto")
    trainer = make_trainer(model, None)
    trainer.choose_arithmetic = lambda: chosen
    network = trainer.wrapped()
    return lambda x_0: trainer.train_step(network, x_0)


def measure(batch: int, repeats: int, device: torch.device) -> dict:
    """Median seconds of a step over the same widths; every arithmetic that is worth a try."""
    net = naive.cifar10_network()
    chosen = arithmetic.chosen_for_training(net, "auto", naive.SHAPE, device)
    old = naive.Training(copy.deepcopy(net), device)
    ours = make_trainer(naive.untrained(3, device), None)
    widths = iter([ours.widths_of(step) for step in range(repeats + 1)])
    on_gpu = device.type == "cuda"
    works = {"naive": lambda x: old.step(x, next(widths))}
    if chosen != "float32":
        works["ours, float32"] = our_step("float32", batch, device, False)
    works[f"ours, {chosen}"] = our_step(chosen, batch, device, False)
    if on_gpu:
        works[f"ours, {chosen}, compiled"] = our_step(chosen, batch, device, True)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        x_0 = torch.rand(batch, *naive.SHAPE, device=device) * 2 - 1
        for name, work in works.items():
            keep_freed(name != "naive")  # the published code has the C library's usual heap
            times[name].append(seconds(lambda work=work, x_0=x_0: work(x_0), device))
    # The first step of each also allocates (and compiles).
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "batch": batch,
        "steps": repeats,
        "arithmetic": chosen,
        "seconds": medians,
        "images_per_second": {name: batch / s for name, s in medians.items()},
    }


def show(result: Mapping) -> None:
    """A table for each device."""
    for device in ("cpu", "gpu"):
        r = result[device]
        if isinstance(r, str):
            print(f"\n{device}: {r}")
            continue
        naively = r["images_per_second"]["naive"]
        rows = [
            [name, f"{1000 / rate:.4g}", f"{rate:.4g}", f"{rate / naively:.2f}×"]
            for name, rate in r["images_per_second"].items()
        ]
        print(f"\n{device}: a sandwich step of three widths, batch {r['batch']}")
        print(table(["", "ms / image", "images/s", "of naive"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="results/benchmark/training.json")
    parser.add_argument("--quick", action="store_true", help="one step of each")
    parser.add_argument("--batch", type=int, default=64, help="images a step on a CPU")
    given = parser.parse_args()
    batch, repeats = (2, 1) if given.quick else (given.batch, 3)
    result: dict[str, object] = {"machine": describe(), "quick": given.quick}
    result["cpu"] = measure(batch, repeats, torch.device("cpu"))
    on_gpu = torch.cuda.is_available()
    result["gpu"] = measure(128, 20, torch.device("cuda")) if on_gpu else NOT_MEASURED
    show(result)
    write_json(given.file, result)
    print(f"saved {given.file}")


if __name__ == "__main__":
    main()
