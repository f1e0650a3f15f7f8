"""What the benchmarks compare with: the published way of sampling and training, and its network.

Weights are sliced at every call; float32, contiguous, eager; noise from the global generator; plain
Adam; one EMA update a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import build
import diffusion
from build import Model
from model import SlimmableUNet
from settings import Configuration

WIDTHS = (1.0, 0.75, 0.5, 0.25)
CIFAR10 = diffusion.NoiseSchedule(1e-4, 0.02, 1000)
SHAPE = (3, 32, 32)


def cifar10_network() -> SlimmableUNet:
    """The published CIFAR-10 supernet, 35.87 M parameters, with random weights."""
    torch.manual_seed(0)
    return SlimmableUNet(1000, 128, (1, 2, 2, 2), (1,), 2, 0.1)


DIGITS = {
    "T": 100, "beta_1": 1e-3, "beta_T": 0.2, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1,
    "dropout": 0.0, "num_groups": 8, "img_size": 8, "dataset": "digits", "fid_encoder": "pixels",
}  # fmt: skip


def untrained(in_ch: int, device: torch.device, **options: object) -> Model:
    """A supernet of these options with random weights; the defaults are CIFAR-10's."""
    config = Configuration.of(slimmable_unet=True, sandwich=True, **options)
    net = build.own_network(config, device, in_ch).to(device)
    return Model(net, config, device)


class Denoiser:
    """`denoise(x, t)` by the supernet itself at the schedule's width of t."""

    def __init__(self, net: nn.Module, schedule: Sequence[float]) -> None:
        self.net, self.schedule = net, schedule

    def __call__(self, x: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x),), t, device=x.device, dtype=torch.long)
        return self.net(x, steps, self.schedule[t])


class Training:
    """Sandwich steps."""

    def __init__(self, net: nn.Module, device: torch.device, lr: float = 2e-4) -> None:
        self.net = net.to(device).train()
        self.ema = copy.deepcopy(self.net)
        self.optim = torch.optim.Adam(self.net.parameters(), lr=lr, foreach=False, fused=False)

    def step(self, x_0: Tensor, widths: Sequence[float], decay: float = 0.9999) -> None:
        """One update on a batch (B, C, H, W)."""
        self.optim.zero_grad()
        for width in widths:
            t = torch.randint(CIFAR10.T, (len(x_0),), device=x_0.device)
            noise = torch.randn_like(x_0)
            x_t = CIFAR10.q_sample(x_0, t, noise)
            nn.functional.mse_loss(self.net(x_t, t, width), noise).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=False)
        self.optim.step()
        state, mine = self.net.state_dict(), self.ema.state_dict()
        for name in state:
            mine[name].copy_(mine[name] * decay + state[name] * (1 - decay))
