"""Do images show the class that was asked for? A class-conditional supernet on digits, judged by a
classifier that was trained on the real ones.

    python -m benchmark.classes [FOLDER]

Trains in FOLDER (default ./logs/classes; a second run goes on with what is there) and writes
results/benchmark/classes.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

import build
import dataset as data
from benchmark import machine
from benchmark.recipe import CONFIG
from evaluate import Evaluator
from looks import table
from runtime.files import save_grid
from settings import Configuration

STEPS, IMAGES = 1000, 1000
WIDTHS = (1.0, 0.5, 0.25)
COLUMNS = ("guidance", "width", "agreement", "distance")
GUIDANCE = (0.0, 1.0, 2.0, 3.0)


def train(folder: Path) -> None:
    """The recipe of config/digits.txt with classes."""
    machine.main_py(
        "--train", f"--flagfile={CONFIG / 'digits.txt'}", "--num_classes=10", f"--logdir={folder}",
        f"--total_steps={STEPS}", "--guidance_scale=2", "--sample_size=100", "--save_step=250",
    )  # fmt: skip


def features(images: torch.Tensor) -> np.ndarray:
    """uint8 (N, 1, 8, 8) → (N, 64) in [0, 1]."""
    return images.flatten(1).numpy() / 255


def classifier() -> tuple[SVC, float]:
    """One that knows all digits, and the accuracy on one half of one that knows the other."""
    digits = data.load("digits", ".", 8)
    x, y = features(digits.tensor), digits.labels.numpy()
    held_out = SVC().fit(x[::2], y[::2]).score(x[1::2], y[1::2])
    return SVC().fit(x, y), float(held_out)


def evaluator(folder: Path) -> Evaluator:
    """What samples and scores, in pixels."""
    config = Configuration.of(
        logdir=str(folder), device="cpu", sample_steps=25, var_type="fixedsmall", batch_size=250,
        num_images=IMAGES, fid_encoder="pixels", fid_cache=str(folder / "statistics.npz"),
    )  # fmt: skip
    model = build.load_model(config)
    return build.evaluator(model, build.candidates(model, WIDTHS))


def measured(judge: SVC, scored: Evaluator, folder: Path) -> Iterator[dict[str, float]]:
    """Agreement of asked and recognised classes, and the distance, at each guidance and width."""
    for guidance in GUIDANCE:
        classes = replace(scored.generator.classes, guidance=guidance)
        scored = scored.varied(classes=classes)
        asked = classes.labels(torch.arange(IMAGES)).numpy()
        for width in WIDTHS:
            schedule = [width] * scored.generator.sampler.levels.T
            found, images = scored.score(schedule, keep=IMAGES)
            seen = judge.predict(features(images))
            yield {
                "guidance": guidance,
                "width": width,
                "agreement": float((seen == asked).mean()),
                "distance": found.distance,
                "passes": found.passes,
            }
        rows = scored.varied(classes=replace(classes, fixed=tuple(range(10)))).generator
        grid = rows.images([1.0] * rows.sampler.levels.T, 100)
        save_grid(folder / f"guidance_{guidance:g}.png", grid, columns=10)


def run(folder: Path) -> None:
    train(folder)
    judge, held_out = classifier()
    found = list(measured(judge, evaluator(folder), folder))
    about = {
        "data": "digits, 8×8",
        "training_steps": STEPS,
        "images": IMAGES,
        "sampler": "ddpm, 25 steps",
        "classifier": "sklearn.svm.SVC, trained on all digits",
        "classifier_accuracy_held_out": held_out,
        "distance": "Fréchet distance (pixels)",
    }
    machine.save(machine.RESULTS / "classes.json", about | {"measured": found})
    rows = [
        [f"{r[k]:{form}}" for k, form in zip(COLUMNS, ("g", "g", ".1%", ".3f"), strict=True)]
        for r in found
    ]
    print(table(COLUMNS, rows))
    print(f"the classifier itself, on digits that it has not seen: {100 * held_out:.1f} %")


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "logs/classes"))
