"""Latent diffusion from end to end on real images: digits at 16×16 in 8×8 latents.

    python -m benchmark.latents [FOLDER]

Trains a small AutoencoderKL, saves it as diffusers does, and then runs main.py as a user would:
train, search, evaluate. Writes results/benchmark/latents.json; a second run in the same folder
(default ./logs/latents) goes on with what is there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from tqdm import trange

import dataset as data
import score
from benchmark import machine
from benchmark.machine import main_py
from benchmark.recipe import CONFIG
from dataset.latents import Autoencoder
from looks import table
from runtime.files import read_json

SIZE, AUTOENCODER_STEPS, STEPS, IMAGES = 16, 400, 600, 500


def train_autoencoder(folder: Path) -> None:
    """An AutoencoderKL of 4×8×8 latents, trained on the digits, in diffusers' format."""
    from diffusers import AutoencoderKL

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    net = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    digits = data.load("digits", ".", SIZE)
    optim = torch.optim.Adam(net.parameters(), 2e-3)
    batches = data.batches(digits, 32, seed=0)
    for _ in trange(AUTOENCODER_STEPS, desc="autoencoder", unit="step"):
        x = next(batches)
        posterior = net.encode(x).latent_dist
        error = (net.decode(posterior.sample()).sample - x).square().mean()
        (error + 1e-4 * posterior.kl().mean() / 256).backward()
        optim.step()
        optim.zero_grad()
    with torch.no_grad():
        spread = net.encode(data.to_network(digits.tensor[:500])).latent_dist.mode().std()
    net.register_to_config(scaling_factor=1 / float(spread))  # latents of deviation 1
    net.save_pretrained(folder)


def reconstruction(folder: Path) -> float:
    """The distance of decoded latents of the digits to the digits: what no schedule can better."""
    digits, autoencoder = data.load("digits", ".", SIZE), Autoencoder(folder, "cpu")
    encoder = score.encoder("pixels", "cpu")
    ours, theirs = score.Moments(), score.Moments()
    for images in data.everything(digits, 200):
        theirs.update(encoder(images))
        ours.update(encoder(autoencoder.to_images(autoencoder.encode(images))))
    return score.frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)


def run(folder: Path) -> None:
    start = time.perf_counter()
    vae = folder / "vae"
    train_autoencoder(vae)
    logdir = f"--logdir={folder / 'run'}"
    main_py(
        "--train", f"--flagfile={CONFIG / 'digits.txt'}", f"--img_size={SIZE}", logdir,
        f"--latent_vae={vae}", f"--data_root={folder}", f"--total_steps={STEPS}",
        "--batch_size=32", f"--sample_step={STEPS}",
    )  # fmt: skip
    use = [f"--flagfile={folder / 'run' / 'flagfile.txt'}", "--batch_size=250",
           f"--fid_cache={folder / 'statistics.npz'}"]  # fmt: skip
    main_py(
        "--search", *use, "--num_images=250", "--flops_budget=0.5", "--num_generation=3",
        "--pop_size=8",
    )  # fmt: skip
    for width in (1, 0.5, 0.25):
        main_py("--eval", *use, f"--num_images={IMAGES}", f"--assigned_width={width}")
    main_py("--eval_stepaware", *use, f"--num_images={IMAGES}")
    files = {"width 1": "eval", "width 0.5": "eval_width_0.5", "width 0.25": "eval_width_0.25",
             "searched": "eval_stepaware"}  # fmt: skip
    found = {name: read_json(folder / "run" / f"{file}.json") for name, file in files.items()}
    kept = ("distance", "average_gflops", "saving", "images_per_second", "decoder")
    best = reconstruction(vae)
    about = {
        "data": f"digits, {SIZE}×{SIZE} in 4×8×8 latents",
        "training_steps": STEPS,
        "images": IMAGES,
        "distance": found["width 1"]["label"],
        "distance_of_reconstructions": best,
        "seconds": time.perf_counter() - start,
    }
    measured = {name: {k: r[k] for k in kept} for name, r in found.items()}
    machine.save(machine.RESULTS / "latents.json", about | {"measured": measured})
    rows = [
        [
            name,
            f"{r['distance']:.3f}",
            f"{r['average_gflops']:.4f}",
            f"{100 * r['saving']:.1f} %",
            f"{r['decoder']['gflops']:.4f}",
        ]
        for name, r in found.items()
    ]
    print(table(["", "distance", "GFLOPs / step", "saved", "decoder, once"], rows))
    print(f"encoded and decoded digits themselves: {best:.3f}")


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "logs/latents"))
