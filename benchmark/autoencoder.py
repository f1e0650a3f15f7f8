"""A small autoencoder for latent diffusion: trained on a data set, and saved as diffusers does.

    python -m benchmark.autoencoder FOLDER STEPS --FLAG=…

The flags are main.py's, for the data. A latent stands for 2×2 pixels. FOLDER is what --latent_vae
takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import trange

import build
import dataset
from benchmark.recipe import configuration
from model import keep_freed
from runtime.errors import UserError

LATENT_CHANNELS, BATCH, KL_WEIGHT = 2, 64, 1e-4


def train(images: dataset.AnySet, steps: int) -> torch.nn.Module:
    """An AutoencoderKL of the images, whose latents have deviation 1."""
    from diffusers import AutoencoderKL  # takes seconds

    torch.manual_seed(0)
    net = AutoencoderKL(
        in_channels=images.channels, out_channels=images.channels, latent_channels=LATENT_CHANNELS,
        block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    optim = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    batches = dataset.batches(images, BATCH, seed=0)
    for _ in trange(steps, desc="autoencoder", unit="step"):
        x, _ = next(batches)
        posterior = net.encode(x).latent_dist
        error = (net.decode(posterior.sample()).sample - x).square().mean()
        (error + KL_WEIGHT * posterior.kl().mean() / x[0].numel()).backward()
        optim.step()
        optim.zero_grad()
        schedule.step()
    some = next(dataset.everything(images, 500))
    with torch.no_grad():
        spread = net.encode(dataset.to_network(some)).latent_dist.mode().std()
    net.register_to_config(scaling_factor=1 / float(spread))
    return net


def main() -> None:
    keep_freed()
    folder, steps, *flags = sys.argv[1:]
    try:
        images = build.load_images(configuration(*flags))
    except UserError as error:
        sys.exit(f"error: {error}")
    train(images, int(steps)).save_pretrained(Path(folder))


if __name__ == "__main__":
    main()
