"""Gaussian noise as a pure function of (seed, stream, image, step): no generator, no state.

The noise of image i at step t is the same at any batch size, in any order, on any number of
devices and after any resume. It comes from the counter-based generator Philox4x32-10 (Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the Box–Muller transform, written
in tensor operations so that it runs where the images are.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Streams keep the uses of one seed apart.
SAMPLING, SEARCH, TRAINING = 0, 1, 2

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: Sequence[int] | Sequence[Tensor]) -> list[Tensor]:
    """Four 32-bit words for each counter.

    counter: four int64 tensors with values in [0, 2³²) that broadcast together. key: two 32-bit
    words, or int64 tensors of such. Returns four int64 tensors with values in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64, but its 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def gaussians(counter: Sequence[Tensor], key: Sequence[int] | Sequence[Tensor]) -> Tensor:
    """Four standard normal numbers for each counter, (…, 4) float32; arguments as of `philox`."""
    # 24 bits fill a float32; half a unit more keeps the logarithm finite.
    uniform = [((word >> 8).float() + 0.5) * 2**-24 for word in philox(counter, key)]
    parts = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        parts += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(parts, -1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(gaussians)


def normal(
    seed: int,
    stream: int,
    images: Tensor,
    step: int,
    shape: Sequence[int],
    compiled: bool = False,
) -> Tensor:
    """Standard normal noise (len(images), *shape) float32 on the device of `images`.

    images: int64 indices in [0, 2³²). step: the timestep it belongs to, in [0, 2³²). compiled: by
    torch.compile, which makes one kernel of some sixty; the last digit may differ.
    """
    size = math.prod(shape)
    block = torch.arange((size + 3) // 4, device=images.device)[None]
    # Filled on the device: a copy from the host would wait for it.
    words = [torch.full_like(block[:, :1], word) for word in (step, stream)]
    key: list = [seed & _LOW, (seed >> 32) & _LOW]
    if compiled:
        # What a compiled function gets as a number it takes for an index, of 32 bits.
        key = [torch.full_like(block[:, :1], word) for word in key]
    draw = _compiled() if compiled else gaussians
    numbers = draw((block, images[:, None], *words), key)
    return numbers.flatten(1)[:, :size].unflatten(1, tuple(shape))


class ImageNoise:
    """The noise of a batch of images, as samplers ask for it: `noise(t)` leaves timestep t.

    images: int64 indices (B,) on the device where the noise is wanted. shape: (C, H, W). compiled:
    see `normal`.
    """

    def __init__(
        self, seed: int, stream: int, images: Tensor, shape: Sequence[int], compiled: bool = False
    ) -> None:
        self.seed, self.stream, self.images, self.shape = seed, stream, images, shape
        self.compiled = compiled

    def __call__(self, t: int) -> Tensor:
        """Noise (B, C, H, W) of the step that leaves timestep t."""
        return normal(self.seed, self.stream, self.images, t, self.shape, self.compiled)

    def initial(self) -> Tensor:
        """x_T (B, C, H, W), unit Gaussian whatever T is."""
        return self(_LOW)
