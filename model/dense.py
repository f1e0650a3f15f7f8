"""Faster layers for dense networks that do not learn, on a CPU in float32."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from model import native, winograd
from model.slimmable import Slimmable

CHANNELS = 32  # that one thread normalises at least: two cache lines of every pixel
MOST = 512  # see norm.cpp


class WinogradConv2d(Slimmable):
    """Stands for a convolution; see winograd.py."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("kernel", winograd.transformed(layer.weight.detach()))
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor, width: float = 1.0) -> Tensor:
        return winograd.convolve(x, self.kernel, self.bias)


class NormSiLU(Slimmable):
    """Stands for a group norm and the SiLU that follows it."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__()
        self.size = layer.num_channels // layer.num_groups
        self.block = math.lcm(self.size, CHANNELS)
        self.eps = layer.eps
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())

    @staticmethod
    def fits(norm: nn.Module, after: nn.Module) -> bool:
        """Whether it can stand for `norm` and `after`."""
        return (
            isinstance(norm, nn.GroupNorm)
            and isinstance(after, nn.SiLU)
            and norm.num_channels % CHANNELS == 0
            and math.lcm(norm.num_channels // norm.num_groups, CHANNELS) <= MOST
            and norm.weight.dtype == torch.float32
            and norm.weight.device.type == "cpu"
            and native.library() is not None
        )

    @torch.compiler.disable
    def forward(self, x: Tensor, width: float = 1.0) -> Tensor:
        images = x.permute(0, 2, 3, 1).contiguous()
        out = torch.empty_like(images)
        tensors = (images, out, self.weight, self.bias)
        pixels, channels = images.shape[1:3].numel(), images.shape[3]
        native.library().norm_silu(
            *(v.data_ptr() for v in tensors), len(x), pixels, channels, self.size, self.block,
            self.eps,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)


def replace_layers(network: nn.Module) -> None:
    """Replace what has a faster version."""
    for module in list(network.modules()):
        layers = list(module.named_children())
        for name, layer in layers:
            if isinstance(layer, nn.Conv2d) and winograd.fits(layer, layer.weight):
                setattr(module, name, WinogradConv2d(layer))
        if not isinstance(module, nn.Sequential):
            continue
        for (name, layer), (after_name, after) in itertools.pairwise(layers):
            if NormSiLU.fits(layer, after):
                setattr(module, name, NormSiLU(layer))
                setattr(module, after_name, nn.Identity())
