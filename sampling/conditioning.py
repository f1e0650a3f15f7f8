"""Which class each generated image is asked to show.

The class of image i is a pure function of the seed and i, as its noise is. This file knows neither
flags nor networks, but for how a network is asked (model.Condition).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model import Condition
from runtime.errors import UserError
from sampling import noise as rng

_STREAM = 2**31  # of the classes: far from the streams of noise


@dataclass(frozen=True)
class Classes:
    """The classes of generated images, and how strongly they are asked for.

    frequencies: share of each class in the training set. Images have its classes at these odds, as
    is usual for FID; with `fixed`, image i has the class fixed[i mod len(fixed)] instead. guidance:
    see model.Condition.
    """

    frequencies: tuple[float, ...]
    guidance: float = 1.0
    fixed: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        outside = [c for c in self.fixed if not 0 <= c < self.count]
        if outside:
            raise UserError(
                f"--classes: there is no class {outside[0]}; the network has 0 to {self.count - 1}"
            )

    @property
    def count(self) -> int:
        return len(self.frequencies)

    @property
    def passes(self) -> int:
        """Network passes that one call of the denoiser makes for an image."""
        return 1 if self.guidance in (0, 1) else 2

    def labels(self, images: Tensor) -> Tensor:
        """The class of each image; images and labels (B,) int64, on one device."""
        if self.fixed:
            return torch.tensor(self.fixed, device=images.device)[images % len(self.fixed)]
        zero = torch.zeros_like(images)
        key = self.seed % 2**32, self.seed >> 32
        word = rng.philox((zero, images, zero, zero + _STREAM), key)[0]
        ends = torch.tensor(self.frequencies, dtype=torch.float64).cumsum(0)
        ends = (ends / ends[-1]).to(images.device)
        drawn = torch.searchsorted(ends, (word.double() + 0.5) / 2**32, right=True)
        return drawn.clamp(max=self.count - 1)

    def condition(self, images: Tensor) -> Condition:
        """How the network is asked for these images."""
        return Condition(self.labels(images), self.count, self.guidance)

    def in_rows(self, count: int) -> tuple[Classes, int]:
        """The same for a grid of `count` images that has a class in each row, and its columns."""
        shown = self.fixed or range(self.count)
        columns = max(1, count // len(shown))
        if columns == 1:  # more classes than images: the first ones, in a square
            columns = max(1, round(count**0.5))
        fixed = tuple(shown[i // columns % len(shown)] for i in range(count))
        return replace(self, fixed=fixed), columns


def parse(text: str, names: Sequence[str] = ()) -> tuple[int, ...]:
    """The numbers of the classes in "3,cat", where `names` are the classes' names in order. What is
    a name and a number is taken for the name. UserError for what is neither."""
    numbers = {name: number for number, name in enumerate(names)}
    try:
        parts = [part.strip() for part in text.split(",")] if text else []
        return tuple(numbers[part] if part in numbers else int(part) for part in parts)
    except ValueError as error:
        some = f" or names ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"
        raise UserError(
            f"--classes={text}: numbers{some if names else ''} of classes, as in 3,5"
        ) from error


def shares(labels: Tensor, count: int) -> Tensor:
    """Share of each of `count` classes among labels (N,); float32 (count,)."""
    return torch.bincount(labels, minlength=count).float() / max(1, len(labels))


def check(num_classes: int, name: str, labels: Tensor | None, names: Sequence[str]) -> None:
    """Raise UserError where the data set `name` has not the network's classes."""
    if num_classes and labels is None:
        raise UserError(f"--num_classes={num_classes}: --dataset={name} has no classes here")
    if num_classes and num_classes != len(names):
        raise UserError(
            f"--num_classes={num_classes}: --dataset={name} has {len(names)} classes "
            f"({', '.join(names[:3])}, …)"
        )
