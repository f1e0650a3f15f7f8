"""Do images show the class that was asked for? A class-conditional supernet on digits, judged by a
classifier that was trained on the real ones.

    python -m benchmark.classes [FOLDER]

Trains in FOLDER (default ./logs/classes; a second run goes on with what is there) and writes
results/benchmark/classes.json.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

import dataset as data
import diffusion
import score
from benchmark.machine import describe
from evaluate import Evaluator
from model import SlimmableUNet, UNetSettings, checkpoint, sampling_networks
from report import table
from runtime.files import save_grid, write_json
from sampling.conditioning import Classes

ROOT = Path(__file__).resolve().parent.parent
STEPS, IMAGES = 1000, 1000
WIDTHS = (1.0, 0.5, 0.25)
GUIDANCE = (0.0, 1.0, 2.0, 3.0)


def train(folder: Path) -> None:
    """The recipe of config/digits.txt with classes."""
    arguments = ["--train", f"--flagfile={ROOT / 'config' / 'digits.txt'}", "--num_classes=10",
                 f"--logdir={folder}", f"--total_steps={STEPS}", "--guidance_scale=2",
                 "--sample_size=100", "--save_step=250"]  # fmt: skip
    code = subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments]).returncode
    if code:
        sys.exit(code)


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
    """What samples and scores, in pixels, without classes so far."""
    path = folder / "ckpt.pt"
    state = checkpoint.load(path)
    known = state["settings"]
    net = SlimmableUNet(**{name: known[name] for name in UNetSettings.__dataclass_fields__})
    checkpoint.fill(net, state["ema_model"], path)
    encoder = score.encoder("pixels", "cpu")
    digits = data.load("digits", ".", 8)
    moments = score.statistics_of(data.everything(digits, 500), encoder, len(digits), "digits")
    shares = tuple(net.class_embedding.frequencies.tolist())
    return Evaluator(
        networks=sampling_networks(net, WIDTHS),
        noise_schedule=diffusion.NoiseSchedule(known["beta_1"], known["beta_T"], known["T"]),
        sampler=diffusion.Sampler(sample_steps=25, var_type="fixedsmall"),
        encoder=encoder,
        reference=score.Gaussian(moments.mean, moments.covariance),
        image_shape=(1, 8, 8),
        device=torch.device("cpu"),
        num_images=IMAGES,
        batch_size=250,
        classes=Classes(shares),
    )


def measured(judge: SVC, scored: Evaluator, folder: Path) -> Iterator[dict[str, float]]:
    """Agreement of asked and recognised classes, and the distance, at each guidance and width."""
    for guidance in GUIDANCE:
        scored = replace(scored, classes=replace(scored.classes, guidance=guidance))
        asked = scored.classes.labels(torch.arange(IMAGES)).numpy()
        for width in WIDTHS:
            schedule = [width] * scored.noise_schedule.T
            found, images = scored.score(schedule, keep=IMAGES)
            seen = judge.predict(features(images))
            yield {
                "guidance": guidance,
                "width": width,
                "agreement": float((seen == asked).mean()),
                "distance": found.distance,
                "passes": found.passes,
            }
        rows = replace(scored, classes=replace(scored.classes, fixed=tuple(range(10))))
        grid = rows.sample([1.0] * scored.noise_schedule.T, 100)
        save_grid(folder / f"guidance_{guidance:g}.png", grid, columns=10)


def run(folder: Path) -> None:
    train(folder)
    judge, held_out = classifier()
    found = list(measured(judge, evaluator(folder), folder))
    write_json(
        ROOT / "results" / "benchmark" / "classes.json",
        {
            "data": "digits, 8×8",
            "training_steps": STEPS,
            "images": IMAGES,
            "sampler": "ddpm, 25 steps",
            "classifier": "sklearn.svm.SVC, trained on all digits",
            "classifier_accuracy_held_out": held_out,
            "distance": "Fréchet distance (pixels)",
            "results": found,
            "machine": describe(),
        },
    )
    rows = [
        [
            f"{r['guidance']:g}",
            f"{r['width']:g}",
            f"{100 * r['agreement']:.1f} %",
            f"{r['distance']:.3f}",
        ]
        for r in found
    ]
    print(table(["guidance", "width", "agreement", "distance"], rows))
    print(f"the classifier itself, on digits that it has not seen: {100 * held_out:.1f} %")


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "logs/classes"))
