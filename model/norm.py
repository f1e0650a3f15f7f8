"""Group norm followed by SiLU in one pass, forward and backward, on a CPU; loops in norm.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model import native

CHANNELS = 32  # that one thread normalises at least: two cache lines of every pixel
MOST = 512  # see norm.cpp


def fits(weight: Tensor, groups: int) -> bool:
    """Whether a group norm with this scale (C,) can be `norm_silu` here."""
    return (
        len(weight) % CHANNELS == 0
        and _block(len(weight), groups) <= MOST
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and native.library() is not None
    )


def _block(channels: int, groups: int) -> int:
    """Channels that a thread takes: whole groups, whole cache lines."""
    return math.lcm(channels // groups, CHANNELS)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        images, weight, bias = native.nhwc(x), weight.contiguous(), bias.contiguous()
        n, h, w, c = images.shape
        out = torch.empty_like(images)
        moments = images.new_empty(2, n, c)  # mean and 1 / deviation of each channel's group
        ctx.sizes = n, h * w, c, c // groups, _block(c, groups)
        native.library().norm_silu(
            *(v.data_ptr() for v in (images, weight, bias, moments, out)), *ctx.sizes, eps
        )
        ctx.save_for_backward(images, weight, bias, moments)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, bias, moments = ctx.saved_tensors
        after = native.nhwc(gradient)
        before, sums = torch.empty_like(images), torch.empty_like(moments)
        tensors = (images, weight, bias, moments, after, before, sums)
        native.library().norm_silu_backward(*(v.data_ptr() for v in tensors), *ctx.sizes)
        return before.permute(0, 3, 1, 2), *sums.sum(1), None, None


@torch.compiler.disable  # its loops are opaque to torch.compile
def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x (B, C, H, W), scale and shift (C,) -> (B, C, H, W), channels last, differentiable once."""
    return _NormSiLU.apply(x, weight, bias, groups, eps)
