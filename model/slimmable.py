"""Layers that also work when only their leading channels are used.

This file knows how many channels a width keeps and which block of a weight they are. It does not
know how layers are wired into a network. A width is an argument of every call, never an attribute:
one set of parameters can serve several widths, threads and replicas at once.

After Yu et al., "Slimmable Neural Networks" (ICLR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import native, norm, winograd
from runtime import processes as distributed
from runtime.errors import UserError


def round_channels(channels: float, divisor: int) -> int:
    """Round to a multiple of `divisor`, at least 1, and never below 0.9 of what was asked."""
    rounded = max(1, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class Channels:
    """One side of a layer: the blocks of channels it is made of, and how they narrow.

    `blocks` has more than one entry where tensors are concatenated, as [h, skip] is. `divisor` is
    what a narrowed block is rounded to; None means that it is never narrowed. `apart` takes the
    leading channels of each block; otherwise those of the whole side are taken, as the published
    network does, so that a narrow skip meets columns that serve h at full width.
    """

    blocks: tuple[int, ...]
    divisor: int | None = 8
    apart: bool = False

    @property
    def total(self) -> int:
        return sum(self.blocks)

    def kept(self, width: float) -> list[int]:
        """How many channels of each block `width` keeps."""
        if self.divisor is None or width == 1:
            return list(self.blocks)
        return [min(n, round_channels(n * width, self.divisor)) for n in self.blocks]

    def count(self, width: float) -> int:
        return sum(self.kept(width))

    def take(self, tensor: Tensor, width: float, dim: int = 0) -> Tensor:
        """The entries of `tensor` along `dim` that `width` keeps; a view unless blocks part."""
        kept = self.kept(width)
        if sum(kept) == self.total:
            return tensor
        if not self.apart or len(kept) == 1:
            return tensor.narrow(dim, 0, sum(kept))
        starts = [sum(self.blocks[:i]) for i in range(len(self.blocks))]
        parts = [tensor.narrow(dim, s, n) for s, n in zip(starts, kept, strict=True)]
        return torch.cat(parts, dim)

    def at(self, width: float) -> Channels:
        """This side cut to `width` for good."""
        return Channels((self.count(width),), divisor=None)


class Slimmable(nn.Module):
    """A layer called as `layer(x, width)`."""

    def forward(self, x: Tensor, width: float) -> Tensor:
        raise NotImplementedError


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """`layer` with contiguous copies of these parameters."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class SlimmableConv2d(Slimmable, nn.Conv2d):
    """A convolution whose narrow version is the leading block of its weight."""

    def __init__(
        self, inputs: Channels, outputs: Channels, kernel_size: int, stride: int = 1
    ) -> None:
        nn.Conv2d.__init__(
            self,
            inputs.total,
            outputs.total,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
        )
        self.inputs, self.outputs = inputs, outputs

    def slice(self, width: float) -> tuple[Tensor, Tensor]:
        """Weight (c_out, c_in, k, k) and bias (c_out,) at `width`."""
        weight = self.inputs.take(self.outputs.take(self.weight, width), width, dim=1)
        return weight, self.outputs.take(self.bias, width)

    def forward(self, x: Tensor, width: float, plus: Tensor | None = None) -> Tensor:
        """plus: what is added to the output, (B, C, H, W) or (B, C, 1, 1)."""
        weight, bias = self.slice(width)
        if native.wanted() and winograd.fits(self, weight):
            return winograd.convolution(x, weight, bias, plus)
        out = self._conv_forward(x, weight, bias)
        # Into what has just been made: one tensor less to write and to keep.
        return out if plus is None else out.add_(plus)

    def cut(self, width: float) -> SlimmableConv2d:
        """A dense layer of its own that holds a contiguous copy of what `width` uses."""
        with torch.device("meta"):  # parameters that are replaced anyway
            layer = SlimmableConv2d(
                self.inputs.at(width), self.outputs.at(width), self.kernel_size[0], self.stride[0]
            )
        return _filled(layer, *self.slice(width))


class SlimmableLinear(Slimmable, nn.Linear):
    """A fully connected layer whose narrow version is the leading block of its weight."""

    def __init__(self, inputs: Channels, outputs: Channels) -> None:
        nn.Linear.__init__(self, inputs.total, outputs.total)
        self.inputs, self.outputs = inputs, outputs

    def slice(self, width: float) -> tuple[Tensor, Tensor]:
        """Weight (c_out, c_in) and bias (c_out,) at `width`."""
        weight = self.inputs.take(self.outputs.take(self.weight, width), width, dim=1)
        return weight, self.outputs.take(self.bias, width)

    def forward(self, x: Tensor, width: float) -> Tensor:
        return F.linear(x, *self.slice(width))


class SlimmableGroupNorm(Slimmable, nn.GroupNorm):
    """A group norm of the leading channels.

    It keeps its number of groups at every width, as published, or, where `proportional`, the number
    of channels in a group: a width then has the leading width·groups groups. A narrow width that
    keeps the number has few channels in each; a group of one channel erases that channel's mean.
    Groups are consecutive channels of the input, so where it is [h, skip] and a group's size does
    not divide h, one group has channels of both.
    """

    def __init__(self, num_groups: int, inputs: Channels, proportional: bool = False) -> None:
        nn.GroupNorm.__init__(self, num_groups, inputs.total)
        self.inputs, self.proportional = inputs, proportional

    def groups(self, width: float) -> int:
        """How many groups there are at `width`; UserError where they do not divide its channels."""
        channels, groups = self.inputs.count(width), self.num_groups
        if self.proportional:
            size = self.inputs.total // self.num_groups
            if channels % size:
                raise UserError(f"{channels} channels, which groups of {size} do not divide")
            groups = channels // size
        if channels % groups:
            raise UserError(f"{channels} channels, which {groups} groups do not divide")
        return groups

    def slice(self, width: float) -> tuple[Tensor, Tensor]:
        """Scale and shift (c,) at `width`."""
        return self.inputs.take(self.weight, width), self.inputs.take(self.bias, width)

    def forward(self, x: Tensor, width: float, silu: bool = False) -> Tensor:
        """silu: whether that follows."""
        (weight, bias), groups = self.slice(width), self.groups(width)
        if native.wanted() and norm.fits(weight, groups):
            return norm.norm(x, weight, bias, groups, self.eps, silu)
        out = F.group_norm(x, groups, weight, bias, self.eps)
        return F.silu(out) if silu else out

    def cut(self, width: float) -> SlimmableGroupNorm:
        """A dense layer of its own that holds a copy of what `width` uses."""
        with torch.device("meta"):
            layer = SlimmableGroupNorm(self.groups(width), self.inputs.at(width))
        return _filled(layer, *self.slice(width))


class Dropout(nn.Dropout):
    """Dropout; on a CPU from 16 random bits an element, which is several times faster than torch's
    way and rounds the rate to 1/65536.

    There each of several processes draws the masks of the whole batch and keeps those of its own
    images, so that, with the same seed, they are those of one process.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            not (self.training and self.p)
            or x.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        count = x.numel()
        draws = torch.empty(-(-distributed.world() * count // 4), dtype=torch.int64)
        draws = draws.random_(-(2**63), None).view(torch.int16)
        mine = draws[distributed.rank() * count :][:count]
        kept = mine >= round(self.p * 2**16) - 2**15
        strides = torch.empty_like(x).stride()  # x's own where it has no gaps
        return x * (kept / (1 - self.p)).to(x).as_strided(x.shape, strides)


def replace_dropout(net: nn.Module) -> None:
    """Torch's dropout in `net` becomes that of this file."""
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Dropout:
                setattr(module, name, Dropout(layer.p).train(layer.training))


class SlimmableSequential(Slimmable, nn.Sequential):
    """Layers in a row; those that can narrow are told the width."""

    def forward(self, x: Tensor, width: float, plus: Tensor | None = None) -> Tensor:
        """plus: what the last layer, a convolution, adds to its output."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            more = {} if layers or plus is None else {"plus": plus}
            if isinstance(layer, SlimmableGroupNorm) and layers and isinstance(layers[0], nn.SiLU):
                layers.pop(0)
                more = {"silu": True}
            x = layer(x, width, **more) if isinstance(layer, Slimmable) else layer(x)
        return x
