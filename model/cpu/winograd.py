"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), on a CPU; 1x1
convolutions by the same products.

A tile of 4x4 outputs takes 36 products a pair of channels where the direct sum takes 144. Tiles
and weights are transformed, multiplied as 36 matrices, and transformed back (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2016). Results are those of the direct sum up to
float32 rounding. The loops are in winograd.cpp; this file knows tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.cpu import native

PANEL, ROWS = 16, 6  # output channels and tiles that are multiplied together; see winograd.cpp
TILES = 256  # at a time, so that what lies between the transforms stays in the cache
SUMMED_TILES = 512  # the same for the weight's gradient, whose sum is read and written each time
APART = 16  # floats between the matrices: at a power of two they would share cache lines

_G = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # over 24
_G = torch.tensor(_G, dtype=torch.float64) / 24
KERNEL = torch.kron(_G, _G).float()  # (36, 9): a 3x3 kernel, row by row, -> its 36 entries


def fits(conv: nn.Conv2d, weight: Tensor) -> bool:
    """Whether `conv` with this weight (c_out, c_in, k, k) can be one of these convolutions here."""
    size = conv.kernel_size[0]
    return (
        conv.kernel_size in ((1, 1), (3, 3))
        and conv.padding == (size // 2, size // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.bias is not None
        and weight.shape[0] % PANEL == weight.shape[1] % PANEL == 0
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and native.library() is not None
    )


def transformed(weight: Tensor) -> Tensor:
    """Weight (K, C, k, k) -> what the products read, (36 or 1, K / 16, C, 16)."""
    k, c = weight.shape[:2]
    rows = weight.reshape(k // PANEL, PANEL, c, -1).permute(3, 0, 2, 1).reshape(-1, k * c)
    entries = KERNEL @ rows if len(rows) == 9 else rows
    return entries.view(-1, k // PANEL, c, PANEL)


def _tiles(images: Tensor) -> int:
    """Tiles of one of the images (B, H, W, C)."""
    return -(-images.shape[1] // 4) * -(-images.shape[2] // 4)


def _matrices(count: int, channels: int) -> Tensor:
    """Room for 36 matrices (count, channels)."""
    stride = count * channels + APART
    return torch.empty(36 * stride).as_strided((36, count, channels), (stride, channels, 1))


@functools.cache
def _zeros(channels: int) -> Tensor:
    """What lies outside an image."""
    return torch.zeros(channels)


def _scatter(function: object, images: Tensor, matrices: Tensor) -> None:
    """Transform the tiles of images (B, H, W, C) into the matrices."""
    zeros = _zeros(images.shape[3])
    args = images.data_ptr(), matrices.data_ptr(), zeros.data_ptr()
    function(*args, *images.shape, matrices.stride(0))


def _batches(images: Tensor, tiles: int) -> Iterator[slice]:
    """Parts of a batch that are worked on at a time, of at most so many tiles or one image."""
    step = max(1, tiles // _tiles(images))
    return (slice(i, i + step) for i in range(0, len(images), step))


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, plus: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), kernel from `transformed`, bias (K,) -> (B, K, H, W), channels last.

    plus: (B, K, H, W) or (B, K, 1, 1), added to that."""
    library, images = native.library(), native.nhwc(x)
    # No view, so that sums can go into it.
    out = torch.empty(len(x), len(bias), *x.shape[2:], memory_format=torch.channels_last)
    (n, h, w, c), k = images.shape, len(bias)
    if len(kernel) == 1:
        library.pointwise(*(t.data_ptr() for t in (images, kernel, bias, out)), n * h * w, c, k)
        return out if plus is None else out.add_(plus)
    zeros = _zeros(max(c, k))
    plus = zeros.expand(n, 1, 1, -1) if plus is None else native.nhwc(plus)
    apart = plus.stride(0), k if plus.shape[1:3] == images.shape[1:3] else 0
    step = max(1, min(TILES // _tiles(images), n))
    rows = -(-step * _tiles(images) // ROWS) * ROWS
    v, m = _matrices(rows, c), _matrices(rows, k)
    tensors = [t.data_ptr() for t in (images, kernel, bias, plus, out, zeros, v, m)]
    library.winograd(*tensors, n, h, w, c, k, *apart, step, v.stride(0), m.stride(0))
    return out


def _kernel_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """x (B, C, H, W), gradient (B, K, H, W) of the convolution's output -> (K, C, size, size)."""
    library, images, after = native.library(), native.nhwc(x), native.nhwc(gradient)
    c, k = x.shape[1], gradient.shape[1]
    if size == 1:
        return (after.reshape(-1, k).T @ images.reshape(-1, c)).view(k, c, 1, 1)
    total = torch.empty(36, c, k)
    for part in _batches(images, SUMMED_TILES):
        tiles = len(images[part]) * _tiles(images)
        v, m = _matrices(tiles, c), _matrices(tiles, k)
        _scatter(library.inputs, images[part], v)
        _scatter(library.gradients, after[part], m)
        total.baddbmm_(v.transpose(1, 2), m, beta=int(part.start > 0))
    return (KERNEL.T @ total.view(36, -1)).view(3, 3, c, k).permute(3, 2, 0, 1)


class _Convolution(torch.autograd.Function):
    """`convolve` of x, weight (K, C, k, k), bias and plus, with gradients of the same kind."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, weight: Tensor, bias: Tensor, plus: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.everywhere = plus is not None and plus.shape[2:] != x.shape[2:]
        return convolve(x, transformed(weight), bias.contiguous(), plus)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        before = None
        if ctx.needs_input_grad[0]:
            turned = transformed(weight.transpose(0, 1).flip(2, 3))
            before = convolve(gradient, turned, _zeros(x.shape[1]))
        kernel, each = _kernel_gradient(x, gradient, weight.shape[2]), gradient.sum((2, 3))
        plus = None
        if ctx.needs_input_grad[3]:
            plus = each[:, :, None, None] if ctx.everywhere else gradient
        return before, kernel, each.sum(0), plus


def convolution(x: Tensor, weight: Tensor, bias: Tensor, plus: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), weight (K, C, k, k), bias (K,), plus as in `convolve` -> (B, K, H, W),
    differentiable once."""
    return _Convolution.apply(x, weight, bias, plus)
