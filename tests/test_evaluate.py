"""Scores: the distance against one computed here, and work that goes on after a stop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_main, tiny_network
from scipy.linalg import sqrtm
from test_generate import LEVELS, SHAPE, T, evaluator
from torch import Tensor

import score
from diffusion import sample_ddpm
from evaluate import _Partial
from model import latency, sampling_networks
from runtime import processes
from runtime.files import Unfinished, write_json
from sampling.noise import SAMPLING, ImageNoise


def test_distance_by_hand() -> None:
    """Sample, round to 8 bits, take numpy's covariance and scipy's matrix root."""
    networks = sampling_networks(tiny_network(T=T, in_ch=1), (0.25, 1.0))
    scoring, schedule = evaluator(70, networks, batch_size=32), [1.0] * 6 + [0.25] * 6

    def denoise(x: Tensor, t: int) -> Tensor:
        return networks[schedule[t]](x, torch.full((len(x),), t))

    noise = ImageNoise(0, SAMPLING, torch.arange(70), SHAPE)
    with torch.no_grad():
        x_0 = sample_ddpm(denoise, noise.initial(), LEVELS, noise=noise)
    pixels = ((x_0.clamp(-1, 1) + 1) * 127.5).round().flatten(1).double().numpy() / 255
    mu, sigma = pixels.mean(0), np.cov(pixels, rowvar=False)
    data = scoring.reference.mu.numpy(), scoring.reference.sigma.numpy()
    root = sqrtm(sigma @ data[1]).real
    expected = ((mu - data[0]) ** 2).sum() + np.trace(sigma + data[1] - 2 * root)

    scores, images = scoring.score(schedule, keep=70)
    assert np.array_equal(images.flatten(1).numpy() / 255, pixels)
    assert scores.distance == pytest.approx(expected, rel=1e-5)
    assert (scores.label, scores.encoder) == ("Fréchet distance (pixels)", "pixels")
    assert scores.inception_score is None
    assert (scores.images, scores.passes, scores.passes_saved) == (70, 70 * T, 0)
    assert scores.sampling_seconds > 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("keep", [0, 1, 4, 100])
def test_kept_images_are_the_first_in_order(batch_size: int, keep: int) -> None:
    scoring = evaluator(batch_size=batch_size)
    scores, images = scoring.score([0.5] * T, keep=keep)
    assert images.shape == (min(keep, 8), *SHAPE)
    assert torch.equal(images, scoring.generator.images([0.5] * T, 8)[: len(images)])
    assert scores.images == 8


def test_inception_score_where_there_is_a_classifier() -> None:
    fixed = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 3
    scoring = evaluator(30, batch_size=7)
    scoring.encoder = score.Encoder(
        "toy", "cpu", 64, lambda x: x.flatten(1) / 255, lambda features: features @ fixed
    )
    scores, images = scoring.score([1.0] * T, keep=30)
    p = (images.flatten(1) / 255 @ fixed).double().softmax(1).view(10, 3, 5)
    by_split = (p * (p / p.mean(1, keepdim=True)).log()).sum(2).mean(1).exp()
    expected = float(by_split.mean()), float(by_split.std(correction=0))
    assert scores.inception_score == pytest.approx(expected, rel=1e-5)


def test_inception_scores_go_on() -> None:
    probabilities = torch.rand(7, 4).softmax(1)
    whole, half = score.InceptionScore(7, 2), score.InceptionScore(7, 2)
    whole.update(probabilities)
    half.update(probabilities[:3])
    half = score.InceptionScore.from_state(half.state())
    half.update(probabilities[3:])
    assert half.result() == pytest.approx(whole.result(), rel=1e-12)


def test_processes_exchange_sums_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    partial = _Partial(score.Moments(), score.InceptionScore(4))
    partial.moments.update(torch.rand(4, 2, device="meta"))
    partial.inception.update(torch.rand(4, 3, device="meta"))
    monkeypatch.setattr(Tensor, "cpu", lambda x: torch.zeros(x.shape) if x.is_meta else x)
    whole = partial.merged()
    devices = {x.device.type for x in (whole.moments.mean, whole.inception._sums)}
    assert devices == {"cpu"}


def test_shares_are_kept_until_the_score_is_saved(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others' are made again where the first process is killed before that."""
    events = []

    def noting(name: str, function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            events.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr("commands.evaluate.write_json", noting("write", write_json))
    monkeypatch.setattr(processes, "gather", noting("gather", processes.gather))
    monkeypatch.setattr(Unfinished, "remove", noting("remove", Unfinished.remove))
    arguments = ["--logdir=run", "--device=cpu", "--num_images=8", "--fid_encoder=pixels"]
    result = run_main("--eval", *arguments)
    assert result.status == 0, result.err
    saved = events[events.index("write") :]
    assert "gather" in saved[: saved.index("remove")]


@pytest.mark.parametrize("damage", [None, "identity", "file", "bit"])
def test_a_stopped_score_goes_on(tmp_path: Path, damage: str | None) -> None:
    schedule, steps, limit = [0.5] * T, [], [2 * T + 3]
    expected, images = evaluator(batch_size=2).score(schedule, keep=5)

    def each_step() -> None:
        steps.append(1)
        if len(steps) > limit[0]:
            raise KeyboardInterrupt

    scoring = evaluator(batch_size=2, each_step=each_step)
    place = Unfinished(tmp_path / ".eval.pt", "one", every=0)
    with pytest.raises(KeyboardInterrupt):
        scoring.score(schedule, 5, place)
    if damage == "identity":
        place = Unfinished(tmp_path / ".eval.pt", "other", every=0)
    elif damage == "file":
        next(tmp_path.iterdir()).write_bytes(b"PK half a file")
    elif damage == "bit":  # of a sum, which is then another finite number
        content = bytearray(place.path.read_bytes())
        number = place.read()["moments"]["mean"].numpy().tobytes()[:8]
        content[content.index(number)] ^= 1
        place.path.write_bytes(content)
    steps.clear()
    limit[0] = 1000
    scores, again = scoring.score(schedule, 5, place)
    assert len(steps) == (4 if damage else 2) * T
    assert scores.distance == pytest.approx(expected.distance, rel=1e-12)
    assert torch.equal(again, images)
    place.remove()
    assert not list(tmp_path.iterdir())


def test_latency_is_a_time_per_image() -> None:
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x.shape)
        return x

    assert 0 < latency(network, SHAPE, 4, torch.device("cpu"), seconds=0.001) < 0.01
    assert set(calls) == {(4, *SHAPE)}
