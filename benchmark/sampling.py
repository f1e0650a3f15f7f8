"""Does the clock follow the FLOPs? Sampling, the published way and ours, in one run.

    python -m benchmark.sampling [FILE.json] [--quick] [--batch 16]

The CIFAR-10 network with the released kind of schedule; bfloat16 against float32 on a network
trained on the digits; the noise's cost; the memory of evaluating. Random weights take as long as
trained ones.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import build
import diffusion
import score
from benchmark import naive
from benchmark.machine import describe
from build import Model
from commands.train import make_trainer
from evaluate import Evaluator
from looks import table
from model import StepAwareDenoiser, arithmetic, average, keep_freed, sampling_networks
from model.networks import latency
from runtime.files import write_json
from sampling import noise as rng

# Of the released schedule's 1000 entries 534 are 0.5, 274 are 1, 181 are 0.75 and 11 are 0.25.
STEPS = (0.5,) * 8 + (1.0,) * 4 + (0.75,) * 3
NOT_MEASURED = "not measured: no GPU here"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, in turn, so that a busy moment of the machine meets all alike.

    The naive ones have the C library's usual heap, ours the one of main.py.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            keep_freed(not name.startswith("naive"))
            times[name].append(seconds(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def speed(batch: int, repeats: int, steps: tuple[float, ...], device: torch.device) -> dict:
    """Images/s of chains of len(steps) ancestral steps: naive and ours, full and scheduled."""
    net = naive.cifar10_network().eval().to(device)
    on_gpu = device.type == "cuda"
    chosen = arithmetic.chosen(net, naive.WIDTHS, "auto", naive.SHAPE, device)
    ours = sampling_networks(net, naive.WIDTHS, chosen, compiled=on_gpu)
    schedule = naive.CIFAR10
    kept = schedule.timesteps(len(steps))
    full = dict.fromkeys(kept, 1.0)
    mixed = dict(zip(kept, steps, strict=True))
    indices = torch.arange(batch, device=device)
    noise = rng.ImageNoise(0, rng.SAMPLING, indices, naive.SHAPE, on_gpu)

    def chain(denoise: Callable, draw: Callable) -> None:
        with torch.inference_mode():
            diffusion.sample_ddpm(denoise, draw(0), schedule, noise=draw, steps=kept)

    def old(widths: Mapping) -> Callable[[], None]:
        return lambda: chain(
            naive.Denoiser(net, widths),
            lambda t: torch.randn(batch, *naive.SHAPE, device=device),
        )

    def new(widths: Mapping) -> Callable[[], None]:
        return lambda: chain(StepAwareDenoiser(ours, widths, schedule.T, device), noise)

    for network in ours.values():  # allocates and, on a GPU, compiles
        latency(network, naive.SHAPE, batch, device, 0.0)
    works = {
        "naive, full width": old(full),
        "naive, schedule": old(mixed),
        "ours, full width": new(full),
        "ours, schedule": new(mixed),
    }
    times = interleaved(works, repeats, device)
    costs = {w: score.flops(net, w, naive.SHAPE) for w in naive.WIDTHS}
    share = average(mixed, kept, costs) / costs[1.0]
    taken = times["ours, schedule"] / times["ours, full width"]
    with torch.inference_mode():
        drawing = statistics.median(seconds(lambda: noise(1), device) for _ in range(9))
    return {
        "batch": batch,
        "steps": list(steps),
        "arithmetic": {str(w): name for w, name in chosen.items()},
        "images_per_second": {name: batch / s for name, s in times.items()},
        "speed_up_with_schedule": times["naive, schedule"] / times["ours, schedule"],
        "flops_share": share,
        "time_share": taken,
        "time_over_flops": taken / share,
        "realised_share_of_saving": (1 - taken) / (1 - share),
        "noise_share_of_full_width_step": drawing / (times["ours, full width"] / len(steps)),
    }


def trained_digits(folder: Path, steps: int) -> Model:
    """A supernet after a short training on the digits."""
    model = naive.untrained(
        1, torch.device("cpu"), **naive.DIGITS, logdir=str(folder), batch_size=64, sampler="ddim",
        sample_steps=20, total_steps=steps, save_step=steps, log_step=steps, lr=1e-3, warmup=10,
        ema_decay=0.98,
    )  # fmt: skip
    trainer = make_trainer(model, build.load_images(model.config))
    trainer.train(0, [])
    return replace(model, net=trainer.ema.model)


def evaluator(model: Model, name: str, images: int, seed: int = 0) -> Evaluator:
    """Scores of the digits' full width in one arithmetic, by pixels."""
    networks = sampling_networks(model.net, [1.0], name)
    generator = replace(build.generator(model, networks), seed=seed, batch_size=250, progress=False)
    encoder, moments = build.encoder(model.config, model.device), score.Moments()
    for batch in build.load_images(model.config).tensor.split(500):
        moments.update(encoder(batch))
    reference = score.Gaussian(moments.mean, moments.covariance, model.device)
    return Evaluator(generator, encoder, reference, images)


def precision(steps: int, images: int) -> dict:
    """What bfloat16 changes, beside what another seed changes."""
    full = [1.0] * 100
    with tempfile.TemporaryDirectory() as folder:
        model = trained_digits(Path(folder), steps)
    runs = {
        "float32": ("float32", 0),
        "bfloat16": ("bfloat16", 0),
        "another seed": ("float32", 1),
    }
    found = {
        key: evaluator(model, name, images, seed).score(full, keep=images)
        for key, (name, seed) in runs.items()
    }
    scores, pictures = found["float32"]
    result = {"images": images, "training_steps": steps, "distance": scores.distance}
    for key, (other, theirs) in found.items():
        if key != "float32":
            gap = (theirs.float() - pictures.float()).abs().mean() / 127.5
            result[key] = {
                "mean_pixel_difference": float(gap),
                "distance_difference": abs(other.distance - scores.distance),
            }
    # The cost of noise on a network so small that it could matter.
    with torch.inference_mode():
        noise = rng.ImageNoise(0, 0, torch.arange(250), model.image_shape)
        noise(0)
        drawing = statistics.median(seconds(lambda: noise(1), model.device) for _ in range(9))
    step = 250 * latency(
        sampling_networks(model.net, [1.0])[1.0], model.image_shape, 250, model.device
    )
    return result | {"noise_share_of_step": drawing / (step + drawing)}


def evaluate_and_weigh(images: int) -> None:
    """Print the peak memory of a process that evaluates so many images, on Linux."""
    keep_freed()
    model = naive.untrained(
        1, torch.device("cpu"), **naive.DIGITS, sampler="ddim", sample_steps=2, batch_size=100
    )
    networks = sampling_networks(model.net, [0.25])
    generator = replace(build.generator(model, networks), progress=False)
    encoder, reference = build.encoder(model.config, model.device), np.zeros(64)
    Evaluator(generator, encoder, score.Gaussian(reference, np.eye(64)), images).score(
        [0.25] * 100, keep=64
    )
    # Not getrusage: its peak is never below that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def memory(counts: tuple[int, ...] = (1000, 5000)) -> dict[str, float]:
    """Peak MiB of evaluating each number of images."""
    found = {}
    for images in counts:
        command = [sys.executable, "-m", "benchmark.sampling", "--weigh", str(images)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[str(images)] = float(out.splitlines()[-1])
    return found


def show(result: Mapping) -> None:
    """The tables."""
    for device in ("cpu", "gpu"):
        r = result[device]
        if isinstance(r, str):
            print(f"\n{device}: {r}")
            continue
        base = r["images_per_second"]["naive, schedule"]
        rows = [
            [name, f"{rate:.4g}", f"{rate / base:.2f}×"]
            for name, rate in r["images_per_second"].items()
        ]
        print(f"\n{device}: chains of {len(r['steps'])} steps, batch {r['batch']}")
        print(table(["", "images/s", "of naive, schedule"], rows))
        print(
            f"arithmetic by width: {r['arithmetic']}\n"
            f"ours: {100 * r['time_share']:.1f} % of full width's time for "
            f"{100 * r['flops_share']:.1f} % of its FLOPs ({r['time_over_flops']:.3f}×); realised "
            f"share of the saving {r['realised_share_of_saving']:.3f}; noise "
            f"{100 * r['noise_share_of_full_width_step']:.2f} % of a full-width step"
        )
    p = result["precision"]
    rows = [
        [key, f"{v['mean_pixel_difference']:.2e}", f"{v['distance_difference']:.2e}"]
        for key, v in p.items()
        if isinstance(v, dict)
    ]
    print(f"\ndigits, {p['images']} images, distance {p['distance']:.4f}; against float32:")
    print(table(["", "mean pixel difference", "distance difference"], rows))
    print(f"noise: {100 * p['noise_share_of_step']:.2f} % of a step of the digits' full width")
    weights = ", ".join(f"{n} images: {mib:.0f} MiB" for n, mib in result["peak_memory"].items())
    print(f"peak memory of evaluating {weights}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="results/benchmark/sampling.json")
    parser.add_argument("--quick", action="store_true", help="one short round of everything")
    parser.add_argument("--batch", type=int, default=16, help="images at once on a CPU")
    parser.add_argument("--weigh", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.weigh:
        evaluate_and_weigh(given.weigh)
        return
    quick = given.quick
    result: dict[str, object] = {"machine": describe(), "quick": quick}
    steps = STEPS[::5] if quick else STEPS
    batch = 2 if quick else given.batch
    result["cpu"] = speed(batch, 1 if quick else 3, steps, torch.device("cpu"))
    on_gpu = torch.cuda.is_available()
    gpu = torch.device("cuda")
    result["gpu"] = speed(256, 3, STEPS * 4, gpu) if on_gpu else NOT_MEASURED
    result["precision"] = precision(20, 100) if quick else precision(300, 1000)
    result["peak_memory"] = memory()
    show(result)
    write_json(given.file, result)
    print(f"saved {given.file}")


if __name__ == "__main__":
    main()
