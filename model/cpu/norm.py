"""Group norm, with the SiLU after it in the same pass, forward and backward, on a CPU, of float32
or bfloat16; loops in norm.cpp.

Torch's own, of images with channels last, costs by the groups and not by the channels where groups
are small, so a narrow width would save nothing there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.cpu import native

CHANNELS = 32  # that one thread normalises at least: two cache lines of every pixel
MOST = 2048  # see norm.cpp


def fits(x: Tensor) -> bool:
    """Whether a group norm of images (B, C, H, W) can be `norm` here."""
    return (
        x.dim() == 4
        and x.shape[1] % CHANNELS == 0
        and x.shape[1] <= MOST
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
        and native.library() is not None
    )


def _block(images: int, channels: int, groups: int) -> int:
    """Channels of an image that a thread takes: all, one after the other in memory, where there
    are images for all threads; otherwise whole groups, whole cache lines."""
    if images >= torch.get_num_threads():
        return channels
    return math.lcm(channels // groups, CHANNELS)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        images, weight, bias = native.nhwc(x), *(v.float().contiguous() for v in (weight, bias))
        n, h, w, c = images.shape
        out = torch.empty_like(images)
        moments = weight.new_empty(2, n, c)  # mean and 1 / deviation of each channel's group
        ctx.how = n, h * w, c, c // groups, _block(n, c, groups), silu
        half, tensors = x.dtype == torch.bfloat16, (images, weight, bias, moments, out)
        native.library().norm(half, *(v.data_ptr() for v in tensors), *ctx.how, eps)
        ctx.save_for_backward(images, weight, bias, moments)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, bias, moments = ctx.saved_tensors
        after = native.nhwc(gradient)
        before, sums = torch.empty_like(images), torch.empty_like(moments)
        tensors = (images, weight, bias, moments, after, before, sums)
        half = images.dtype == torch.bfloat16
        native.library().norm_backward(half, *(v.data_ptr() for v in tensors), *ctx.how)
        return before.permute(0, 3, 1, 2), *sums.sum(1), None, None, None


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = False
) -> Tensor:
    """x (B, C, H, W), scale and shift (C,) -> (B, C, H, W), channels last, differentiable once."""
    return _Norm.apply(x, weight, bias, groups, eps, silu)
