"""Blocks of a network that run in fewer, faster passes over memory; `fuse` puts them in.

A fused convolution (winograd.py) adds the timestep's projection and the shortcut as it writes; a
fused group norm (norm.py) applies SiLU, of bfloat16, too, in which convolutions stay torch's. A
layer whose channels at a width do not fit those loops computes there as it did before.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import norm, winograd
from model.cpu.native import available
from model.slimmable import SlimmableConv2d, SlimmableGroupNorm, SlimmableSequential
from model.unet import Attention, ResBlock, SlimmableUNet


class FusedConv2d(SlimmableConv2d):
    """A convolution that adds `plus`, (B, C, H, W) or (B, C, 1, 1), to its output."""

    def forward(self, x: Tensor, width: float, plus: Tensor | None = None) -> Tensor:
        weight, bias = self.slice(width)
        if winograd.fits(self, weight):
            return winograd.convolution(x, weight, bias, plus)
        out = self._conv_forward(x, weight, bias)
        return out if plus is None else out + plus


class FusedGroupNorm(SlimmableGroupNorm):
    """A group norm, followed by SiLU where `silu` says so."""

    def forward(self, x: Tensor, width: float, silu: bool = False) -> Tensor:
        (weight, bias), groups = self.slice(width), self.groups(width)
        if norm.fits(x):
            return norm.norm(x, weight, bias, groups, self.eps, silu)
        out = F.group_norm(x, groups, weight, bias, self.eps)
        return F.silu(out) if silu else out


class FusedResBlock(ResBlock):
    """The residual block: norms with their SiLU, convolutions with what is added to them."""

    def forward(self, x: Tensor, temb: Tensor, width: float) -> Tensor:
        norm1, _, conv1 = self.block1
        norm2, _, dropout, conv2 = self.block2
        h = norm1(x, width, silu=True)
        h = conv1(h, width, plus=self.temb_proj(temb, width)[:, :, None, None])
        h = dropout(norm2(h, width, silu=True))
        h = conv2(h, width, plus=self.shortcut(x, width))
        return self.attn(h, width)


class FusedAttention(Attention):
    """Attention whose last convolution adds the residual."""

    def forward(self, x: Tensor, width: float) -> Tensor:
        return self.proj(self.attend(x, width), width, plus=x)


class FusedTail(SlimmableSequential):
    """The network's last layers: a norm with its SiLU, a convolution."""

    def forward(self, x: Tensor, width: float) -> Tensor:
        norm1, _, conv = self
        return conv(norm1(x, width, silu=True), width)


class DenseGroupNorm(nn.GroupNorm):
    """Of any dense network."""

    def forward(self, x: Tensor) -> Tensor:
        if self.affine and norm.fits(x):
            return norm.norm(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class _TransformedOnce:
    """A convolution that neither learns nor narrows: `kernel` is what the loops read of its weight.

    A weight that changes afterwards is not seen.
    """

    def forward(self, x: Tensor, width: float = 1.0, plus: Tensor | None = None) -> Tensor:
        return winograd.convolve(x, self.kernel, self.bias, plus)


class DenseConv2d(_TransformedOnce, nn.Conv2d):
    """Of any dense network."""


class DenseFusedConv2d(_TransformedOnce, FusedConv2d):
    """Of a dense copy of the slimmable network."""


FUSED = {
    SlimmableConv2d: FusedConv2d,
    SlimmableGroupNorm: FusedGroupNorm,
    ResBlock: FusedResBlock,
    Attention: FusedAttention,
}


def fuse(network: nn.Module) -> None:
    """Make what has a faster version that version, in place; every parameter stays what it is.

    network: a SlimmableUNet, to train or cut to a width; or any other dense network, of which only
    convolutions and group norms become faster. Without a C++ compiler nothing changes.
    """
    if not available():
        return
    for module in network.modules():
        module.__class__ = FUSED.get(type(module), type(module))
        if isinstance(module, SlimmableUNet):
            module.tail.__class__ = FusedTail
    # The layers of any other supernet are cut at each call, whatever their class.
    dense = not hasattr(network, "subnet")
    for layer in network.modules():
        if type(layer) is FusedConv2d and not _narrows(layer):
            _transform_once(layer, DenseFusedConv2d)
        elif type(layer) is nn.Conv2d and dense:
            _transform_once(layer, DenseConv2d)
        elif type(layer) is nn.GroupNorm and dense:
            layer.__class__ = DenseGroupNorm


def _narrows(layer: SlimmableConv2d) -> bool:
    return any(side.divisor is not None for side in (layer.inputs, layer.outputs))


def _transform_once(layer: nn.Conv2d, version: type[nn.Conv2d]) -> None:
    """Make `layer` a `version` where it fits and does not learn."""
    if winograd.fits(layer, layer.weight) and not layer.weight.requires_grad:
        kernel = winograd.transformed(layer.weight.detach())
        layer.register_buffer("kernel", kernel, persistent=False)
        layer.__class__ = version
