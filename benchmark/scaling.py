"""How search and training cost grow with images, steps, candidates and processes.

    python -m benchmark.scaling [FILE.json] [--quick]

Throughput of one and two processes with a thread each (torchrun; gloo on CPUs), and a model of the
cost set against measured times. The digits' network with random weights.

The model: a candidate costs images × Σ over steps of that width's seconds an image, plus encoding;
a search is the sum over candidates, a training run the steps times the sum over a step's passes;
both are divided by the number of processes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import build
import score
from benchmark import naive
from benchmark.machine import describe
from build import Model
from commands.train import make_trainer
from evaluate import Evaluator
from looks import table
from model import WidthSchedule, sampling_networks
from model.networks import latency
from runtime import processes as distributed
from runtime.files import read_json, write_json
from sampling.protocol import timesteps

BATCH = 50
SHAPE = (1, 8, 8)
CPU = torch.device("cpu")
NOT_MEASURED = "not measured"
# candidates, images, steps of a search; the first is the one that others vary.
SEARCHES = ((4, 200, 10), (8, 200, 10), (4, 400, 10), (4, 200, 20))
BATCHES = (32, 64)  # of a training step
ROUNDS = 3


def digits(**options: object) -> Model:
    """The digits' network, untrained."""
    return naive.untrained(1, CPU, **naive.DIGITS, **options)


def search_seconds(networks: Mapping, count: int, images: int, steps: int) -> float:
    """Wall time of scoring `count` schedules that have every width at as many steps."""
    model = digits(sampler="ddim", sample_steps=steps, batch_size=BATCH)
    generator = replace(build.generator(model, networks), progress=False)
    reference = score.Gaussian(np.zeros(64), np.eye(64))
    evaluator = Evaluator(generator, build.encoder(model.config, CPU), reference, images)
    kept = timesteps(model.sampler)
    schedules = [
        WidthSchedule([naive.WIDTHS[(i + j) % 4] for i in range(steps)], kept) for j in range(count)
    ]
    distributed.gather(None)
    start = time.perf_counter()
    list(evaluator.score_all(schedules))
    return time.perf_counter() - start


def step_seconds(batch: int, repeats: int) -> float:
    """Median wall time of a training step with `batch` images over all processes."""
    model = digits(batch_size=batch)
    job = make_trainer(model, build.load_images(model.config))
    network, images, times = job.wrapped(), job.batches(0), []
    for _ in range(repeats + 1):
        x_0, _ = next(images)
        distributed.gather(None)
        start = time.perf_counter()
        job.train_step(network, x_0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def turn(networks: Mapping, shapes: Sequence[tuple[int, int, int]], quick: bool) -> dict:
    """Seconds of each width's pass an image, of each search and of a training step by batch."""
    return {
        "passes": [latency(net, SHAPE, BATCH, CPU, 0.2) for net in networks.values()],
        "searches": [search_seconds(networks, *shape) for shape in shapes],
        "training": [step_seconds(batch, 3 if quick else 10) for batch in BATCHES],
    }


def work(path: Path, quick: bool) -> None:
    """What each process does; rank 0 writes the times to `path`."""
    with distributed.group(CPU):
        networks = sampling_networks(digits().net, naive.WIDTHS)
        shapes = SEARCHES[:1] if quick else SEARCHES
        turns = [turn(networks, shapes, quick) for _ in range(1 if quick else ROUNDS)]
        if distributed.is_main():
            # The least of all turns: other programs slow some down and others not.
            write_json(
                path, {kind: np.min([t[kind] for t in turns], 0).tolist() for kind in turns[0]}
            )


def launch(processes: int, quick: bool) -> dict:
    """Times of so many processes with one thread each."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
            f"--master_port={port}", "-m", "benchmark.scaling", "--work", str(path),
            *(["--quick"] if quick else []),
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return read_json(path)


def compare(found: Mapping[int, Mapping]) -> dict:
    """The model, fed by one process's passes and steps, beside what was measured."""
    mean = statistics.fmean(found[1]["passes"])
    # Two batch sizes give what an image costs and what a step costs whatever its batch.
    small, large = found[1]["training"]
    image = (large - small) / (BATCHES[1] - BATCHES[0])
    fixed = max(0.0, small - BATCHES[0] * image)
    searches, training = [], []
    for processes, times in found.items():
        shapes = zip(SEARCHES, times["searches"], strict=False)
        for (count, images, steps), measured in shapes:
            model = count * images * steps * mean / processes
            searches.append(
                {"processes": processes, "candidates": count, "images": images, "steps": steps,
                 "model_seconds": model, "measured_seconds": measured}
            )  # fmt: skip
        for batch, measured in zip(BATCHES, times["training"], strict=True):
            model = fixed + batch * image / processes
            training.append(
                {"processes": processes, "batch": batch, "model_seconds": model,
                 "measured_seconds": measured}
            )  # fmt: skip
    return {"search": searches, "training": training}


def show(result: Mapping) -> None:
    """A table for each job."""
    for job, columns in (
        ("search", ("processes", "candidates", "images", "steps")),
        ("training", ("processes", "batch")),
    ):
        rows = [
            [*(str(r[c]) for c in columns), f"{r['model_seconds']:.3g}",
             f"{r['measured_seconds']:.3g}", f"{r['measured_seconds'] / r['model_seconds']:.2f}"]
            for r in result[job]
        ]  # fmt: skip
        print(f"\n{job}")
        print(table([*columns, "model, s", "measured, s", "measured / model"], rows))
    for job, gain in result["speed_up_of_two_processes"].items():
        print(f"two processes over one, {job}: {gain:.2f}×")
    print(f"DataParallel against torchrun: {result['data_parallel']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="results/benchmark/scaling.json")
    parser.add_argument("--quick", action="store_true", help="one search and few steps")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(Path(given.work), given.quick)
        return
    found = {processes: launch(processes, given.quick) for processes in (1, 2)}
    gain = {
        "search": found[1]["searches"][0] / found[2]["searches"][0],
        "training": found[1]["training"][-1] / found[2]["training"][-1],
    }
    result = {"machine": describe(), "quick": given.quick, **compare(found)}
    result |= {"speed_up_of_two_processes": gain, "data_parallel": NOT_MEASURED}
    show(result)
    write_json(given.file, result)
    print(f"saved {given.file}")


if __name__ == "__main__":
    main()
