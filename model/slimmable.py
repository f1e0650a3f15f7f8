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


class SlimmableMatrix(Slimmable):
    """A layer whose narrow version is the leading block of its weight."""

    def slice(self, width: float) -> tuple[Tensor, Tensor]:
        """Weight (c_out, c_in, …) and bias (c_out,) at `width`."""
        weight = self.inputs.take(self.outputs.take(self.weight, width), width, dim=1)
        return weight, self.outputs.take(self.bias, width)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """`layer` with contiguous copies of these parameters."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class SlimmableConv2d(SlimmableMatrix, nn.Conv2d):
    """A convolution that pads its input by half of the kernel."""

    def __init__(
        self, inputs: Channels, outputs: Channels, kernel_size: int, stride: int = 1
    ) -> None:
        padding = kernel_size // 2
        nn.Conv2d.__init__(self, inputs.total, outputs.total, kernel_size, stride, padding)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor, width: float) -> Tensor:
        return self._conv_forward(x, *self.slice(width))

    def cut(self, width: float) -> SlimmableConv2d:
        """A dense layer of its own that holds a contiguous copy of what `width` uses."""
        with torch.device("meta"):  # parameters that are replaced anyway
            layer = type(self)(
                self.inputs.at(width), self.outputs.at(width), self.kernel_size[0], self.stride[0]
            )
        return _filled(layer, *self.slice(width))


class SlimmableLinear(SlimmableMatrix, nn.Linear):
    """A fully connected layer."""

    def __init__(self, inputs: Channels, outputs: Channels) -> None:
        nn.Linear.__init__(self, inputs.total, outputs.total)
        self.inputs, self.outputs = inputs, outputs

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

    def forward(self, x: Tensor, width: float) -> Tensor:
        return F.group_norm(x, self.groups(width), *self.slice(width), self.eps)

    def cut(self, width: float) -> SlimmableGroupNorm:
        """A dense layer of its own that holds a copy of what `width` uses."""
        with torch.device("meta"):
            layer = type(self)(self.groups(width), self.inputs.at(width))
        return _filled(layer, *self.slice(width))


class SlimmableSequential(Slimmable, nn.Sequential):
    """Layers in a row; those that can narrow are told the width."""

    def forward(self, x: Tensor, width: float) -> Tensor:
        for layer in self:
            x = layer(x, width) if isinstance(layer, Slimmable) else layer(x)
        return x
