"""Winograd's convolutions for dense networks, which do not learn: weights are transformed once."""

from __future__ import annotations

from torch import Tensor, nn

from model.cpu import winograd
from model.slimmable import Slimmable


class WinogradConv2d(Slimmable):
    """Stands for a convolution; see winograd.py."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("kernel", winograd.transformed(layer.weight.detach()))
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor, width: float = 1.0, plus: Tensor | None = None) -> Tensor:
        return winograd.convolve(x, self.kernel, self.bias, plus)


def replace_layers(network: nn.Module) -> None:
    """Replace what has a faster version."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and winograd.fits(layer, layer.weight):
                setattr(module, name, WinogradConv2d(layer))
