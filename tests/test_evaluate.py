"""Scores: images that depend on seed and index alone, shared states that change nothing, and the
distance against one computed here."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_network
from scipy.linalg import sqrtm
from torch import Tensor, nn

import diffusion
import main
import score
from evaluate import Evaluator, SharedStates
from model import WidthSchedule, sampling_networks
from model.networks import latency
from runtime.errors import UserError
from runtime.files import Unfinished
from sampling import noise as rng

SHAPE = (1, 8, 8)
WIDTHS = (0.25, 0.5, 1.0)
T = 12
STATE = 4 * 64  # bytes of one image's state


@pytest.fixture(scope="module")
def networks() -> dict[float, nn.Module]:
    return sampling_networks(tiny_network(T=T, in_ch=1), WIDTHS)


@pytest.fixture
def evaluator(networks: dict) -> Evaluator:
    random = np.random.default_rng(0)
    factor = random.standard_normal((64, 64)) / 8
    return Evaluator(
        networks=networks,
        noise_schedule=diffusion.NoiseSchedule(1e-3, 0.3, T),
        sampler=diffusion.Sampler(),
        encoder=score.encoder("pixels", "cpu"),
        reference=score.Gaussian(random.random(64), factor @ factor.T),
        image_shape=SHAPE,
        device=torch.device("cpu"),
        num_images=8,
        batch_size=8,
        progress=False,
    )


def schedules_of(count: int, parents: int = 3, seed: int = 0, skip: bool = False) -> list:
    """Single-point crossovers of a few parents, as a generation of the search has them."""
    random = np.random.default_rng(seed)
    values = (0.0, *WIDTHS) if skip else WIDTHS
    old = random.choice(values, (parents, T))
    old[:, 0] = 1.0  # no schedule leaves out everything
    found = []
    for _ in range(count):
        a, b = random.choice(parents, 2, replace=False)
        cut = random.integers(1, T)
        found.append([*old[a][:cut], *old[b][cut:]])
    return found


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [{}, {"sampler": "ddim", "eta": 0.5, "sample_steps": 5}])
def test_images_depend_on_seed_and_index_alone(evaluator: Evaluator, sampler: dict) -> None:
    evaluator.sampler = diffusion.Sampler(**sampler)
    schedule = list(itertools.islice(itertools.cycle(WIDTHS), T))
    _, images = evaluator.score(schedule, keep=8)
    assert images.shape == (8, *SHAPE)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 8
    for batch_size in (1, 3):
        evaluator.batch_size = batch_size
        _, again = evaluator.score(schedule, keep=8)
        # Convolutions of other batch sizes may add up in another order.
        assert (again.int() - images.int()).abs().max() <= 1
    evaluator.num_images, evaluator.batch_size = 5, 8
    _, fewer = evaluator.score(schedule, keep=8)
    assert (fewer.int() - images[:5].int()).abs().max() <= 1
    evaluator.num_images, evaluator.seed = 8, 1
    _, others = evaluator.score(schedule, keep=8)
    assert not any(torch.equal(a, b) for a, b in zip(others, images, strict=True))


def test_streams_do_not_share_noise(evaluator: Evaluator) -> None:
    _, images = evaluator.score([1.0] * T, keep=8)
    evaluator.stream = rng.SEARCH
    _, others = evaluator.score([1.0] * T, keep=8)
    assert not any(torch.equal(a, b) for a, b in zip(others, images, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("keep", [0, 1, 4, 100])
def test_kept_images_are_the_first_in_order(
    evaluator: Evaluator, batch_size: int, keep: int
) -> None:
    evaluator.batch_size = batch_size
    found, images = evaluator.score([0.5] * T, keep=keep)
    assert images.shape == (min(keep, 8), *SHAPE)
    every = evaluator.sample([0.5] * T, 8)
    assert torch.equal(images, every[: len(images)])
    assert found.images == 8


def test_schedule_of_sampler_steps(evaluator: Evaluator) -> None:
    """K entries for K steps are what T entries are that agree at those steps."""
    evaluator.sampler = diffusion.Sampler(sample_steps=4)
    steps = evaluator.timesteps()
    assert steps == [0, 3, 6, 9]
    short = WidthSchedule([1.0, 0.5, 0.25, 1.0], steps)
    long = [0.25] * T
    for t in steps:
        long[t] = short[t]
    found, images = evaluator.score(short, keep=8)
    again, same = evaluator.score(long, keep=8)
    assert torch.equal(images, same)
    assert found.distance == again.distance
    assert found.passes == 8 * 4


# --- scores ---------------------------------------------------------------------------------------


def test_distance_by_hand(evaluator: Evaluator, networks: dict) -> None:
    """Sample, round to 8 bits, take numpy's covariance and scipy's matrix root."""
    evaluator.num_images, evaluator.batch_size = 70, 32
    schedule = [1.0] * 6 + [0.25] * 6

    def denoise(x: Tensor, t: int) -> Tensor:
        return networks[schedule[t]](x, torch.full((len(x),), t))

    noise = rng.ImageNoise(0, rng.SAMPLING, torch.arange(70), SHAPE)
    with torch.no_grad():
        x_0 = diffusion.sample_ddpm(denoise, noise.initial(), evaluator.noise_schedule, noise=noise)
    pixels = ((x_0.clamp(-1, 1) + 1) * 127.5).round().flatten(1).double().numpy() / 255
    mu, sigma = pixels.mean(0), np.cov(pixels, rowvar=False)
    their_mu, their_sigma = evaluator.reference.mu.numpy(), evaluator.reference.sigma.numpy()
    root = sqrtm(sigma @ their_sigma).real
    expected = ((mu - their_mu) ** 2).sum() + np.trace(sigma + their_sigma - 2 * root)

    found, images = evaluator.score(schedule, keep=70)
    assert np.array_equal(images.flatten(1).numpy() / 255, pixels)
    assert found.distance == pytest.approx(expected, rel=1e-5)
    assert (found.label, found.encoder) == ("Fréchet distance (pixels)", "pixels")
    assert found.inception_score is None
    assert (found.images, found.passes, found.passes_saved) == (70, 70 * T, 0)
    assert found.sampling_seconds > 0


def test_inception_score_where_there_is_a_classifier(evaluator: Evaluator) -> None:
    fixed = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 3
    evaluator.encoder = score.Encoder(
        "toy", "cpu", 64, lambda x: x.flatten(1) / 255, lambda features: features @ fixed
    )
    evaluator.num_images, evaluator.batch_size = 30, 7
    found, images = evaluator.score([1.0] * T, keep=30)
    p = (images.flatten(1) / 255 @ fixed).double().softmax(1).view(10, 3, 5)
    scores = (p * (p / p.mean(1, keepdim=True)).log()).sum(2).mean(1).exp()
    expected = float(scores.mean()), float(scores.std(correction=0))
    assert found.inception_score == pytest.approx(expected, rel=1e-5)


def test_a_schedule_that_leaves_out_everything(evaluator: Evaluator) -> None:
    with pytest.raises(UserError):
        evaluator.score([0.0] * T)


def test_latency_is_a_time_an_image(networks: dict) -> None:
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.shape)
        return x

    assert 0 < latency(network, SHAPE, 4, torch.device("cpu"), seconds=0.001) < 0.01
    assert set(calls) == {(4, *SHAPE)}


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [None, "identity", "file"])
def test_a_stopped_score_goes_on(evaluator: Evaluator, tmp_path: Path, damage: str | None) -> None:
    evaluator.batch_size, schedule = 2, [0.5] * T
    expected, images = evaluator.score(schedule, keep=5)
    steps = []

    def each_step(limit: int) -> None:
        steps.append(1)
        if len(steps) > limit:
            raise KeyboardInterrupt

    place = Unfinished(tmp_path / ".eval.pt", "one", every=0)
    evaluator.each_step = lambda: each_step(2 * T + 3)
    with pytest.raises(KeyboardInterrupt):
        evaluator.score(schedule, 5, place)
    if damage == "identity":
        place = Unfinished(tmp_path / ".eval.pt", "other", every=0)
    elif damage:
        next(tmp_path.iterdir()).write_bytes(b"PK half a file")
    steps.clear()
    evaluator.each_step = lambda: each_step(1000)
    found, again = evaluator.score(schedule, 5, place)
    assert len(steps) == (4 if damage else 2) * T
    assert found.distance == pytest.approx(expected.distance, rel=1e-12)
    assert torch.equal(again, images)
    place.remove()
    assert not list(tmp_path.iterdir())


def test_inception_scores_go_on() -> None:
    probabilities = torch.rand(7, 4).softmax(1)
    whole, half = score.InceptionScore(7, 2), score.InceptionScore(7, 2)
    whole.update(probabilities)
    half.update(probabilities[:3])
    half = score.InceptionScore.from_state(half.state())
    half.update(probabilities[3:])
    assert half.result() == pytest.approx(whole.result(), rel=1e-12)


def test_a_rung_without_any_of_a_schedules_steps(evaluator: Evaluator) -> None:
    evaluator.sampler = diffusion.Sampler("ddim", 3)
    kept = evaluator.timesteps()
    schedule = WidthSchedule([0.0 if t in kept else 0.5 for t in range(T)])
    ((_, found),) = main.scores_of(evaluator)([schedule])
    last = WidthSchedule([0.5 if t == kept[0] else 0.0 for t in range(T)])
    ((_, expected),) = main.scores_of(evaluator)([last])
    assert found["distance"] == expected["distance"]
    assert found["passes"] == evaluator.num_images


# --- shared states --------------------------------------------------------------------------------


class Cheap(nn.Module):
    """A network that costs next to nothing: what is shared does not depend on how it is made."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x + x.roll(1, 3)) * self.width + 0.1 * t[:, None, None, None].cos()


@pytest.fixture
def cheap(evaluator: Evaluator) -> Evaluator:
    evaluator.networks = {width: Cheap(width) for width in WIDTHS}
    return evaluator


class Watched(SharedStates):
    """Notes the most bytes ever held."""

    peak = 0

    def put(self, key: tuple, batch: int, x: Tensor) -> None:
        super().put(key, batch, x)
        held = sum(x.nbytes for parts in self._states.values() for x in parts.values())
        self.peak = max(self.peak, held)


def scores_of(evaluator: Evaluator, schedules: Sequence) -> dict[int, object]:
    found = dict(evaluator.score_all(schedules))
    assert sorted(found) == list(range(len(schedules)))
    return found


@pytest.mark.parametrize("sampler", [{}, {"sampler": "ddim"}, {"sample_steps": 6, "eta": 1.0}])
@pytest.mark.parametrize("states", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("skip", [False, True])
def test_shared_states_change_nothing(
    cheap: Evaluator, sampler: dict, states: int, skip: bool
) -> None:
    cheap.sampler = diffusion.Sampler(**sampler)
    cheap.batch_size = 3
    schedules = [*schedules_of(8, skip=skip), schedules_of(8, skip=skip)[3]]
    expected = [cheap.score(schedule)[0] for schedule in schedules]
    cheap.states = Watched(budget=states * 8 * STATE + 17)
    for repeat in range(2):  # the second generation finds states of the first
        found = scores_of(cheap, schedules)
        for i, plain in enumerate(expected):
            assert found[i].distance == plain.distance
            assert found[i].passes + found[i].passes_saved == plain.passes
        saved = sum(scores.passes_saved for scores in found.values())
        assert (saved > 0) == (states > 0)
        assert cheap.states.peak <= cheap.states.budget
        if repeat == 0 and states == 0:
            assert cheap.states.peak == 0


def test_a_smaller_budget_than_one_state(cheap: Evaluator) -> None:
    cheap.states = Watched(budget=8 * STATE - 1)
    found = scores_of(cheap, schedules_of(5))
    assert cheap.states.peak == 0
    assert not any(scores.passes_saved for scores in found.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_generation_saves_a_quarter(cheap: Evaluator, seed: int) -> None:
    cheap.num_images = 2
    cheap.states = Watched(budget=100 * 2 * STATE)
    found = scores_of(cheap, schedules_of(30, parents=4, seed=seed)).values()
    saved = sum(scores.passes_saved for scores in found)
    assert saved / (saved + sum(scores.passes for scores in found)) >= 0.25
    assert cheap.states.peak <= cheap.states.budget


def test_generations_share_within_the_budget(cheap: Evaluator) -> None:
    cheap.num_images = 2
    for states in (3, 10):
        cheap.states = Watched(budget=states * 2 * STATE)
        for seed in range(4):
            schedules = schedules_of(6, seed=seed, skip=seed % 2 == 1)
            found = scores_of(cheap, schedules)
            for i, schedule in enumerate(schedules[:2]):
                memory, cheap.states = cheap.states, None
                assert found[i].distance == cheap.score(schedule)[0].distance
                cheap.states = memory
        assert 0 < cheap.states.peak <= cheap.states.budget


def test_chains_of_one_prefix_share_all_of_it(cheap: Evaluator) -> None:
    """Two chains that differ at t = 2 alone: the later one runs t = 2, 1, 0 only."""
    cheap.states = Watched(budget=10**6)
    first = [1.0] * T
    second = [1.0, 1.0, 0.5, *[1.0] * (T - 3)]
    found = scores_of(cheap, [first, second])
    assert sorted(scores.passes for scores in found.values()) == [8 * 3, 8 * T]


def test_states_on_another_device_are_copies(evaluator: Evaluator) -> None:
    evaluator.states = Watched(budget=10**6, device=torch.device("cpu"))
    schedules = schedules_of(6)
    found = scores_of(evaluator, schedules)
    evaluator.states = None
    for i, schedule in enumerate(schedules):
        assert found[i].distance == evaluator.score(schedule)[0].distance
