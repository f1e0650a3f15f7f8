"""Philox against its published answers, and the noise as noise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from model import check_compiler
from runtime.errors import UserError
from sampling.noise import SAMPLING, SEARCH, TRAINING, ImageNoise, _compiled, normal, philox

SHAPE = (3, 8, 8)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        # From the known-answer tests of Random123, the authors' own code (philox4x32, 10 rounds).
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    words = philox(
        [torch.tensor([int(c, 16)]) for c in counter.split()], [int(k, 16) for k in key.split()]
    )
    assert " ".join(f"{int(word):08x}" for word in words) == answer


def test_philox_broadcasts_counters() -> None:
    a, b = torch.arange(5)[:, None], torch.arange(3)[None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    together = philox((a, b, zero, zero), (1, 2))
    alone = philox([torch.tensor([v]) for v in (4, 2, 0, 0)], (1, 2))
    assert [int(word[4, 2]) for word in together] == [int(word) for word in alone]


def test_normal_is_box_muller_of_philox() -> None:
    image, step, seed = 7, 11, (5 << 32) + 9
    words = philox([torch.tensor([v]) for v in (1, image, step, SEARCH)], (9, 5))
    u = [((int(word) >> 8) + 0.5) / 2**24 for word in words]
    expected = []
    for a, b in (u[:2], u[2:]):
        radius = math.sqrt(-2 * math.log(a))
        expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    noise = normal(seed, SEARCH, torch.tensor([image]), step, (8,))
    assert noise[0, 4:].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_image_depends_on_nothing_but_its_index() -> None:
    whole = normal(3, SAMPLING, torch.arange(10), 5, SHAPE)
    assert whole.shape == (10, *SHAPE)
    assert whole.dtype == torch.float32
    for order in ([4], [9, 0, 4], [4, 4], list(range(9, -1, -1))):
        assert torch.equal(normal(3, SAMPLING, torch.tensor(order), 5, SHAPE), whole[order])
    parts = [normal(3, SAMPLING, part, 5, SHAPE) for part in torch.arange(10).split(3)]
    assert torch.equal(torch.cat(parts), whole)
    for size in (1, 2, 3, 5, 7, 49):  # odd sizes are the start of larger ones
        small = normal(3, SAMPLING, torch.arange(10), 5, (size,))
        assert torch.equal(small, whole.flatten(1)[:, :size])


def test_moments_and_distribution() -> None:
    noise = normal(1, SAMPLING, torch.arange(1000), 17, (3, 10, 10)).double().numpy().ravel()
    n = noise.size
    # Five standard errors of each moment.
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert np.abs(noise).max() > 4


def test_neighbours_are_uncorrelated() -> None:
    noise = normal(1, SAMPLING, torch.arange(500), 17, (200,)).double().numpy()
    bound = 5 / math.sqrt(noise.size)
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < bound  # pixels
    assert abs((noise[1:] * noise[:-1]).mean()) < bound  # images
    # Box–Muller pairs share a radius; their squares must be independent all the same.
    squares = noise**2 - 1
    assert abs((squares[:, ::2] * squares[:, 1::2]).mean()) < 5 * 2 / math.sqrt(noise.size / 2)


def test_streams_steps_and_seeds_differ() -> None:
    images = torch.arange(200)

    def flat(seed: int, stream: int, step: int) -> np.ndarray:
        return normal(seed, stream, images, step, (100,)).double().numpy().ravel()

    # The last three seeds share one or both of their halves with others.
    noises = [
        flat(seed, stream, step)
        for seed, stream, step in [
            (0, SAMPLING, 0), (0, SEARCH, 0), (0, TRAINING, 0),
            (0, SAMPLING, 1), (0, SAMPLING, 2**32 - 1),
            (1, SAMPLING, 0), (1 << 32, SAMPLING, 0), ((1 << 32) + 1, SAMPLING, 0),
            (2**64 - 1, SAMPLING, 0),
        ]
    ]  # fmt: skip
    correlation = np.corrcoef(noises) - np.eye(len(noises))
    assert np.abs(correlation).max() < 5 / math.sqrt(noises[0].size)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_noise() -> None:
    """One compilation serves all seeds, streams and steps of a process."""
    try:
        check_compiler(torch.device("cpu"))
    except UserError:
        pytest.skip("no C++ compiler")
    from torch._dynamo.utils import counters

    _compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    for seed, step in ((5, 2**32 - 1), (5, 0), (2**63 + 6, 999)):
        for count in (8, 3):
            images = torch.arange(count)
            noise = normal(seed, SEARCH, images, step, SHAPE, compiled=True)
            torch.testing.assert_close(noise, normal(seed, SEARCH, images, step, SHAPE))
    assert counters["stats"]["unique_graphs"] <= 2  # one for each count


def test_image_noise() -> None:
    before = torch.random.get_rng_state()
    images = torch.tensor([2, 5])
    noise = ImageNoise(4, SAMPLING, images, SHAPE)
    assert torch.equal(noise(9), normal(4, SAMPLING, images, 9, SHAPE))
    assert torch.equal(noise(9), noise(9))
    # x_T belongs to no timestep, so it is the same whatever T is.
    assert torch.equal(noise.initial(), normal(4, SAMPLING, images, 2**32 - 1, SHAPE))
    assert torch.equal(torch.random.get_rng_state(), before)
