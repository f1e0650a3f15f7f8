"""Dropout from 16 random bits per element, several times faster on a CPU than torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime import processes


class FastDropout(nn.Dropout):
    """Dropout whose rate is rounded to 1/65536; where a CPU does not run it eagerly, torch's own.

    Each of several processes draws the masks of the whole batch and keeps those of its own images,
    so that, with the same seed, they are those of one process.
    """

    def forward(self, x: Tensor) -> Tensor:
        acts = self.training and self.p > 0
        if not acts or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        count = x.numel()
        draws = torch.empty(-(-processes.world() * count // 4), dtype=torch.int64)
        draws = draws.random_(-(2**63), None).view(torch.int16)
        local = draws[processes.rank() * count :][:count]
        kept = local >= round(self.p * 2**16) - 2**15
        strides = torch.empty_like(x).stride()  # x's own where it has no gaps
        return x * (kept / (1 - self.p)).to(x).as_strided(x.shape, strides)


def fast_dropout(network: nn.Module) -> None:
    """Make every nn.Dropout of `network` a FastDropout, in place."""
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
