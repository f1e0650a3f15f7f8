"""Philox against its published answers, and the noise as noise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sampling.noise import SAMPLING, SEARCH, TRAINING, ImageNoise, normal, philox

SHAPE = (3, 8, 8)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        # From the known-answer tests of Random123, the authors' own code (philox4x32, 10 rounds).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    words = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(word) for word in words) == answer


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


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 49])
def test_odd_sizes_are_the_start_of_larger_ones(size: int) -> None:
    images = torch.arange(4)
    whole = normal(0, SAMPLING, images, 0, (64,))
    assert torch.equal(normal(0, SAMPLING, images, 0, (size,)), whole[:, :size])


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


def test_image_noise() -> None:
    images = torch.tensor([2, 5])
    noise = ImageNoise(4, SAMPLING, images, SHAPE)
    assert torch.equal(noise(9), normal(4, SAMPLING, images, 9, SHAPE))
    assert torch.equal(noise(9), noise(9))
    # x_T belongs to no timestep, so it is the same whatever T is.
    assert torch.equal(noise.initial(), normal(4, SAMPLING, images, 2**32 - 1, SHAPE))


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    normal(0, SAMPLING, torch.arange(2), 0, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)
