"""--precond=edm: the identities of EDM's preconditioning, its noise distribution, the exact
denoiser of Gaussian data, and a training run that learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_main
from torch import Tensor

import diffusion
from diffusion import EDMSchedule, Sampler, sample_edm
from runtime.errors import UserError

LEVELS = EDMSchedule(1000)
MEAN, DEVIATION = 0.2, 0.3


def exact_network(schedule: EDMSchedule) -> Callable[[Tensor, int], Tensor]:
    """The F for which D is the best denoiser of x_0 ~ N(MEAN, DEVIATION²)."""

    def network(x: Tensor, t: int | Tensor) -> Tensor:
        sigma, c_in, c_skip, c_out = (
            torch.from_numpy(np.asarray(values[t])).view(-1, *[1] * (x.ndim - 1))
            for values in (schedule.sigmas, schedule.c_in, schedule.c_skip, schedule.c_out)
        )
        y = x / c_in
        best = (DEVIATION**2 * y + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
        return (best - c_skip * y) / c_out

    return network


def test_the_grid_is_edms() -> None:
    assert LEVELS.sigmas[0] == pytest.approx(0.002)
    assert LEVELS.sigmas[-1] == pytest.approx(80)
    assert np.ptp(np.diff(LEVELS.sigmas ** (1 / 7))) < 1e-12
    # The same ramp at fewer levels: K steps of the sampler sit where EDM has them.
    eighteen = EDMSchedule(18).sigmas
    assert np.allclose(LEVELS.sigmas[LEVELS.edm_timesteps(18)], eighteen, rtol=0.02)


@pytest.mark.parametrize("sigma_data", [0.5, 0.2, 1.0])
def test_identities_of_the_preconditioning(sigma_data: float) -> None:
    s = EDMSchedule(50, sigma_data=sigma_data)
    total = s.sigmas**2 + sigma_data**2
    assert np.allclose(s.c_in**2 * total, 1)  # the input has unit variance
    # The answer has unit variance: c_out² = (1 − c_skip)²·σ_data² + c_skip²·σ².
    assert np.allclose(s.c_out**2, (1 - s.c_skip) ** 2 * sigma_data**2 + s.c_skip**2 * s.sigmas**2)
    # c_skip is where that is least.
    for other in (s.c_skip - 0.01, s.c_skip + 0.01):
        assert ((1 - other) ** 2 * sigma_data**2 + other**2 * s.sigmas**2 > s.c_out**2).all()
    weight = total / (s.sigmas * sigma_data) ** 2
    assert np.allclose(weight * s.c_out**2, 1)  # EDM's loss weight is what `pair` leaves out


def test_the_pair_is_edms_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise, output = torch.randn(3, 6, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 100, 300, 500, 800, 999])
    shown, _ = LEVELS.pair(x_0, t, noise)
    value = diffusion.loss(lambda x, t: output, x_0, t, noise, LEVELS)
    sigma = torch.from_numpy(LEVELS.sigmas)[t].view(-1, 1, 1, 1)
    y, data = x_0 + sigma * noise, 0.5
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    denoised = c_skip * y + c_out * output
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close(value, (weight * (denoised - x_0) ** 2).mean())
    torch.testing.assert_close(shown, y / (sigma**2 + data**2).sqrt())
    for i, level in enumerate(t.tolist()):
        found = LEVELS.denoised(output[i], shown[i], level, "epsilon", False)
        torch.testing.assert_close(found, denoised[i])
        assert LEVELS.scale_in(level) == pytest.approx(float(shown[i, 0, 0, 0] / y[i, 0, 0, 0]))


def test_sigma_is_lognormal() -> None:
    t = LEVELS.draw(200_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long
    logs = np.log(LEVELS.sigmas)[t.numpy()]
    assert logs.mean() == pytest.approx(-1.2, abs=0.01)
    assert logs.std() == pytest.approx(1.2, abs=0.01)
    # How often the levels up to one are drawn: the normal distribution between neighbours.
    known = np.log(LEVELS.sigmas)
    for level in (200, 400, 600, 800):
        edge = (known[level] + known[level + 1]) / 2
        expected = 0.5 * (1 + math.erf((edge + 1.2) / 1.2 / 2**0.5))
        assert float((t <= level).double().mean()) == pytest.approx(expected, abs=0.004)
    assert EDMSchedule(10).draw(1000, torch.Generator()).max() <= 9


def test_the_exact_denoiser_has_the_expected_loss() -> None:
    """What is left is the posterior's variance over c_out²; a single image leaves nothing."""
    generator = torch.Generator().manual_seed(0)
    noise, z = torch.randn(2, 4000, 1, 8, 8, generator=generator, dtype=torch.float64)
    for level in (100, 400, 700):
        t = torch.full((4000,), level)
        found = diffusion.loss(exact_network(LEVELS), MEAN + DEVIATION * z, t, noise, LEVELS)
        sigma = LEVELS.sigmas[level]
        posterior = DEVIATION**2 * sigma**2 / (DEVIATION**2 + sigma**2)
        assert float(found) == pytest.approx(posterior / LEVELS.c_out[level] ** 2, rel=0.02)

        def single(x: Tensor, t: Tensor, level: int = level) -> Tensor:
            c_skip, c_out, c_in = (v[level] for v in (LEVELS.c_skip, LEVELS.c_out, LEVELS.c_in))
            return (0.3 - c_skip * x / c_in) / c_out

        only = torch.full((4000, 1, 8, 8), 0.3, dtype=torch.float64)
        assert float(diffusion.loss(single, only, t, noise, LEVELS)) < 1e-20


@pytest.mark.parametrize(("heun", "order"), [(True, 2), (False, 1)])
def test_the_sampler_converges_to_the_flow(heun: bool, order: int) -> None:
    fine = EDMSchedule(100_001)
    x_T = torch.linspace(-1, 1, 5, dtype=torch.float64).view(1, 1, 1, 5)
    top, bottom = (float(fine.sigmas[t]) for t in (-1, 0))
    z = (top * x_T - MEAN) / (DEVIATION**2 + top**2) ** 0.5
    expected = MEAN + DEVIATION**2 / (DEVIATION**2 + bottom**2) ** 0.5 * z
    errors = []
    for steps in (26, 51, 101):
        x_0 = sample_edm(exact_network(fine), x_T, fine, steps=steps, heun=heun)
        errors.append(float((x_0 - expected).abs().max()))
    measured = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert measured == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_samples_have_the_datas_moments(churn: float) -> None:
    noise_generator = torch.Generator().manual_seed(1)

    def noise(t: int) -> Tensor:
        return torch.randn(1, 1, 100, 200, generator=noise_generator, dtype=torch.float64)

    sampler = Sampler("edm", sample_steps=40, S_churn=churn)
    x_0 = sampler(exact_network(LEVELS), noise(0), LEVELS, noise)
    assert float(x_0.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x_0.std()) == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"T": 1}, "--T=1"),
        ({"T": 10, "P_std": 0.0}, "--P_std=0.0"),
        ({"T": 10, "P_mean": math.nan}, "--P_mean=nan"),
        ({"T": 10, "sigma_data": -1.0}, "--sigma_data=-1.0"),
    ],
)
def test_settings_errors(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EDMSchedule(**settings)


# --- the program ----------------------------------------------------------------------------------

TRAIN = [
    *TINY, "--train", "--sandwich", "--precond=edm", "--T=100", "--batch_size=32",
    "--total_steps=40", "--save_step=40", "--log_step=10", "--warmup=5", "--lr=0.002",
    "--sample_step=40", "--sample_size=4", "--sample_steps=6", "--dropout=0", "--logdir=run",
]  # fmt: skip
SCORE = ["--flagfile=run/flagfile.txt", "--num_images=8", "--batch_size=8"]


def test_training_learns_and_is_sampled(here: Path, refused: Callable) -> None:
    assert run_main(*TRAIN).status == 0
    lines = [json.loads(line) for line in Path("run/train.jsonl").read_text().splitlines()]
    for width in ("0.25", "1"):
        assert lines[-1]["loss"][width] < 0.8 * lines[0]["loss"][width]
    assert Path("run/sample/40_width_0.25.png").exists()
    settings = torch.load("run/ckpt.pt", weights_only=True)["settings"]
    assert (settings["precond"], settings["sigma_data"]) == ("edm", 0.5)
    # The checkpoint says how it was trained, and that it is sampled with edm.
    Path("run/search.txt").write_text("[0.5, 0.25, 0.5, 1, 1, 1]")
    alone = [*TINY, "--num_images=8", "--batch_size=8", "--T=100", "--logdir=run"]
    assert run_main(*alone, "--eval_stepaware", "--sample_steps=6").status == 0
    found = json.loads(Path("run/eval_stepaware.json").read_text())
    assert found["sampler"]["sampler"] == "edm"
    assert found["passes"] == 8 * 11
    refused("--sampler=ddim: a network trained with --precond=edm", *alone, "--eval",
            "--sampler=ddim")  # fmt: skip
    refused("--precond: edm there, none here", *alone, "--eval", "--precond=none")
    refused("DDPM and DDIM have no --precond=edm", *SCORE, "--export_diffusers=out")
    refused("--allow_skip", *SCORE, "--search", "--allow_skip")


def test_mistakes(here: Path, refused: Callable) -> None:
    Path("run").mkdir()
    refused("--mean_type=xstart", *TRAIN, "--mean_type=xstart")
    refused("--sampler=ddpm", *TRAIN, "--sampler=ddpm")
    refused("--distill teaches narrower widths", *TRAIN, "--distill", "--nosandwich")
