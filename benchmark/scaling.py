"""What a second process is worth to a search and to training: the digits' network, one thread each.

python -m benchmark.scaling [--repeats 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import build
import score
from benchmark import machine
from benchmark.recipe import untrained
from commands.train import make_trainer
from evaluate import Evaluator
from looks import table
from runtime import processes
from runtime.files import read_json, write_json

WIDTHS = (1.0, 0.75, 0.5, 0.25)
CANDIDATES, IMAGES, BATCH = 8, 200, 64  # of a search; of a training step


def work(file: Path, repeats: int) -> None:
    """What each process does; the first writes the seconds to `file`."""
    model = untrained("digits", "--device=cpu", "--sample_steps=10", f"--batch_size={BATCH}")
    with processes.group(model.device):
        generator = build.generator(model, build.candidates(model, WIDTHS))
        generator = replace(generator, batch_size=IMAGES // 4, progress=False)
        reference = score.Gaussian(np.zeros(64), np.eye(64))
        encoder = build.encoder(model.config, model.device)
        evaluator = Evaluator(generator, encoder, reference, IMAGES)
        schedules = [
            [WIDTHS[(t // 10 + shift) % 4] for t in range(100)] for shift in range(CANDIDATES)
        ]
        trainer = make_trainer(model, build.load_images(model.config))
        network, (x_0, _) = trainer.wrapped(), next(trainer.batches(0))
        search = {"search": lambda: list(evaluator.score_all(schedules))}
        training = {"training": lambda: trainer.train_step(network, x_0)}
        seconds = machine.in_turns(search, repeats) | machine.in_turns(training, 4 * repeats)
        if processes.is_main():
            write_json(file, seconds)


def launch(count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each job in so many processes with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={count}", "-m", "benchmark.scaling"]
        command += [f"--work={file}", f"--repeats={repeats}"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return read_json(file)


def main() -> None:
    parser = machine.arguments(__doc__, "scaling")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.repeats)
        return
    found, measured, rows = {n: launch(n, given.repeats) for n in (1, 2)}, [], []
    for job, images in (("search", CANDIDATES * IMAGES), ("training", BATCH)):
        for count, times in found.items():
            measured.append({"job": job, "processes": count, "seconds": times[job]})
            faster = machine.gain(found[1][job], times[job])
            rows.append([job, str(count), machine.spread(times[job], images), faster])
    print(table(["", "processes", "ms per image", "gain"], rows))
    machine.save(given.out, {"measured": measured})


if __name__ == "__main__":
    main()
