"""What the benchmarks compare with: the published way of sampling and training.

Weights are sliced at every call; float32, contiguous, eager; noise from the global generator; plain
Adam; one EMA update a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import diffusion


@torch.inference_mode()
def step(net: nn.Module, width: float, levels: diffusion.NoiseSchedule, x: Tensor) -> Tensor:
    """An ancestral step from noise like x (B, C, H, W), by the supernet itself."""

    def denoise(x: Tensor, t: int) -> Tensor:
        return net(x, torch.full((len(x),), t, device=x.device), width)

    noise = torch.randn_like(x)
    return diffusion.sample_ddpm(denoise, noise, levels, noise=torch.randn_like, steps=[0])


class Training:
    """Sandwich steps."""

    def __init__(self, net: nn.Module, levels: diffusion.NoiseSchedule, lr: float = 2e-4) -> None:
        self.net, self.levels = copy.deepcopy(net).train(), levels
        self.ema = copy.deepcopy(self.net)
        self.optim = torch.optim.Adam(self.net.parameters(), lr=lr, foreach=False, fused=False)

    def step(self, x_0: Tensor, widths: Sequence[float], decay: float = 0.9999) -> None:
        """One update on a batch (B, C, H, W)."""
        self.optim.zero_grad()
        for width in widths:
            t = torch.randint(self.levels.T, (len(x_0),), device=x_0.device)
            noise = torch.randn_like(x_0)
            x_t = self.levels.q_sample(x_0, t, noise)
            nn.functional.mse_loss(self.net(x_t, t, width), noise).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=False)
        self.optim.step()
        state, mine = self.net.state_dict(), self.ema.state_dict()
        for name in state:
            mine[name].copy_(mine[name] * decay + state[name] * (1 - decay))
