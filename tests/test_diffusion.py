"""Noise levels and sampling loops against closed forms for Gaussian data, the published chains, the
papers' algorithms and diffusers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_network
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffusion import EDMSchedule, NoiseLevels, NoiseSchedule, sample_ddim, sample_ddpm, sample_edm
from model import StepAwareDenoiser, sampling_networks
from runtime.errors import UserError
from settings import MEAN_TYPES, VAR_TYPES

MEAN, DEVIATION = 0.1, 0.2  # of the Gaussian data: far enough inside [−1, 1] not to be clipped
STANDARD, EDM = NoiseSchedule(1e-4, 0.02, 1000), EDMSchedule(1000)
SHORT = NoiseSchedule(1e-3, 0.2, 100)
# Fine enough for σ rounded to it to be as good as continuous.
FINE, FINE_EDM = NoiseSchedule(1e-6, 2e-4, 100_000), EDMSchedule(100_001)
DIFFUSERS = {"epsilon": "epsilon", "xstart": "sample", "v": "v_prediction"}


def exact(
    levels: NoiseLevels, mean_type: str = "epsilon", m: float = MEAN, s: float = DEVIATION
) -> Callable[[Tensor, int], Tensor]:
    """The best possible denoiser for x_0 ~ N(m, s²): E[x_0 | y] by Bayes' rule."""

    def denoise(x: Tensor, t: int) -> Tensor:
        sigma, y = float(levels.sigmas[t]), x / levels.scale_in(t)
        x_0 = (s**2 * y + sigma**2 * m) / (s**2 + sigma**2)
        if isinstance(levels, EDMSchedule):
            return (x_0 - levels.c_skip[t] * y) / levels.c_out[t]
        epsilon, abar, before = (y - x_0) / sigma, levels.abar(t), levels.abar(t - 1)
        if mean_type == "xprev":
            beta = float(levels.betas[t])
            mean = before**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - before) * x
            return mean / (1 - abar)
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x_0
        return {"epsilon": epsilon, "xstart": x_0, "v": v}[mean_type]

    return denoise


def fixed_noise(shape: tuple, seed: int = 1000) -> Callable[[int], Tensor]:
    def noise(t: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(seed + t).standard_normal(shape))

    return noise


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def no_noise(t: int) -> Tensor:
    raise AssertionError(f"noise was asked for at {t}")


LOOPS = {
    "ddpm": lambda d, x, s, **k: sample_ddpm(d, x, s, noise=fixed_noise(x.shape), **k),
    "ddim": lambda d, x, s, **k: sample_ddim(d, x, s, eta=0.5, noise=fixed_noise(x.shape), **k),
    "edm": lambda d, x, s, **k: sample_edm(d, x, s, **k),
}


# --- noise levels ---------------------------------------------------------------------------------


def test_schedule_is_linear_in_float64() -> None:
    assert STANDARD.betas.dtype == np.float64
    assert STANDARD.betas[[0, -1]].tolist() == [1e-4, 0.02]
    assert np.diff(STANDARD.betas) == pytest.approx(np.full(999, (0.02 - 1e-4) / 999))
    assert (STANDARD.abar(-1), STANDARD.abar(0)) == (1, 1 - 1e-4)
    expected = math.exp(math.fsum(math.log1p(-b) for b in STANDARD.betas))
    assert STANDARD.abar(999) == pytest.approx(expected, rel=1e-12)


def test_sigmas_are_noise_over_signal() -> None:
    assert (np.diff(STANDARD.sigmas) > 0).all()
    assert pytest.approx(1 / (1 + STANDARD.sigmas**2)) == STANDARD.alpha_bars
    for t in (0, 500, 999):
        sigma = float(STANDARD.sigmas[t])
        assert STANDARD.nearest(sigma) == STANDARD.nearest(sigma * 1.001) == t
    assert (STANDARD.nearest(0), STANDARD.nearest(1e9)) == (0, 999)


def test_levels_of_edm() -> None:
    assert EDM.sigmas[[0, -1]] == pytest.approx([0.002, 80])
    assert np.ptp(np.diff(EDM.sigmas ** (1 / 7))) < 1e-12
    # The same ramp at fewer levels: K steps of the sampler sit where EDM has them.
    assert np.allclose(EDM.sigmas[EDM.edm_timesteps(18)], EDMSchedule(18).sigmas, rtol=0.02)


@pytest.mark.parametrize(
    ("T", "steps", "spacing", "expected"),
    [
        (1000, 5, "uniform", [0, 200, 400, 600, 800]),
        (10, 3, "uniform", [0, 3, 6]),
        (4, 4, "uniform", [0, 1, 2, 3]),
        (1000, 1, "uniform", [999]),  # a chain starts from noise, and the last timestep is noise
        (1000, 1, "quadratic", [999]),
        # √800 = 28.28: its quarters squared are 50, 200, 450, 800.
        (1000, 5, "quadratic", [0, 50, 200, 450, 800]),
        (10, 5, "quadratic", [0, 0, 2, 4, 8]),
    ],
)
def test_timesteps(T: int, steps: int, spacing: str, expected: list) -> None:
    kept = NoiseSchedule(1e-4, 0.02, T).timesteps(steps, spacing)
    # Squaring a square root may fall just short of the integer.
    assert kept[:-1] == expected[:-1]
    assert kept[-1] in (expected[-1], expected[-1] - (spacing == "quadratic"))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_of_diffusers(spacing: str) -> None:
    for T, steps in ((1000, 1000), (1000, 50), (1000, 30), (100, 60), (10, 7), (7, 2)):
        theirs = DDIMScheduler(T, timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        ours = NoiseSchedule(1e-4, 0.02, T).timesteps(steps, spacing)
        assert ours == sorted(theirs.timesteps.tolist())
    assert NoiseSchedule(1e-4, 0.02, 1000).timesteps(1, spacing) == [999]


def test_edm_timesteps_round_the_ramp() -> None:
    sigmas, steps, rho = STANDARD.sigmas, 10, 7
    kept = STANDARD.edm_timesteps(steps, rho)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, steps)
    low, high = sigmas[0] ** (1 / rho), sigmas[-1] ** (1 / rho)
    for i, t in enumerate(kept):
        ideal = (low + i / (steps - 1) * (high - low)) ** rho
        assert np.abs(sigmas - ideal).min() == abs(sigmas[t] - ideal)
    assert STANDARD.edm_timesteps(1) == [999]
    assert STANDARD.edm_timesteps(2) == [0, 999]
    # ρ = 1 is even in σ itself.
    assert STANDARD.edm_timesteps(3, 1.0)[1] == STANDARD.nearest((sigmas[0] + sigmas[-1]) / 2)


def test_q_sample_moments() -> None:
    t = torch.tensor([0, 10, 99])
    x_0, zero = torch.full((3, 1, 2, 2), 0.7, dtype=torch.float64), torch.zeros(3, 1, 2, 2)
    mean = SHORT.q_sample(x_0, t, zero)
    abar = torch.from_numpy(SHORT.alpha_bars)[t]
    torch.testing.assert_close(mean[:, 0, 0, 0], 0.7 * abar.sqrt())
    # Linear in the noise, so the response to 1 is the deviation.
    deviation = SHORT.q_sample(x_0, t, zero + 1) - mean
    torch.testing.assert_close(deviation[:, 0, 0, 0], (1 - abar).sqrt())
    # The same in one go and in t steps of x ← √(1 − β)·x + √β·noise.
    variance = 0.0
    for beta in SHORT.betas[:11]:
        variance = (1 - beta) * variance + beta
    assert float(deviation[1, 0, 0, 0]) ** 2 == pytest.approx(variance)


# --- what a network learns ------------------------------------------------------------------------


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_training_pair(mean_type: str) -> None:
    x_0, noise, t = unit(4, 3, 2, 2), unit(4, 3, 2, 2, seed=1), torch.tensor([0, 1, 50, 99])
    x_t, target = SHORT.training_pair(x_0, t, noise, mean_type)
    assert torch.equal(x_t, SHORT.q_sample(x_0, t, noise))
    rows = []  # of xprev: q(x_{t−1} | x_t, x_0) as the product of two Gaussians, precisions add up
    for i, step in enumerate(t.tolist()):
        beta, before = SHORT.betas[step], SHORT.abar(step - 1)
        a, b = (1 - beta) / beta, 1 / (1 - before) if step else 0.0
        mean = (a * x_t[i] / (1 - beta) ** 0.5 + b * before**0.5 * x_0[i]) / (a + b)
        rows.append(mean if step else x_0[i])  # no variance is left before step 0
    # v: the turn of (x_0, noise) that x_t is, a quarter turn further.
    angle = torch.from_numpy(np.arccos(SHORT.alpha_bars[t] ** 0.5)).view(-1, 1, 1, 1)
    expected = {
        "epsilon": noise,
        "xstart": x_0,
        "xprev": torch.stack(rows),
        "v": angle.cos() * noise - angle.sin() * x_0,
    }
    torch.testing.assert_close(target, expected[mean_type], rtol=1e-12, atol=1e-12)
    single = SHORT.training_pair(x_0.float(), t, noise.float(), mean_type)
    assert {part.dtype for part in single} == {torch.float32}


@pytest.mark.parametrize("data", [0.5, 0.2])
def test_the_training_pair_of_edm_is_its_loss(data: float) -> None:
    levels = EDMSchedule(1000, sigma_data=data)
    x_0, noise, output = (unit(6, 2, 4, 4, seed=seed) for seed in range(3))
    t = torch.tensor([0, 100, 300, 500, 800, 999])
    shown, target = levels.training_pair(x_0, t, noise)
    sigma = torch.from_numpy(levels.sigmas)[t].view(-1, 1, 1, 1)
    y = x_0 + sigma * noise
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    denoised = c_skip * y + c_out * output
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close((output - target) ** 2, weight * (denoised - x_0) ** 2)
    torch.testing.assert_close(shown, y / (sigma**2 + data**2).sqrt())
    for i, level in enumerate(t.tolist()):
        found = levels.denoised(output[i], shown[i], level, "epsilon", False)
        torch.testing.assert_close(found, denoised[i])
        assert levels.scale_in(level) == pytest.approx(float(shown[i, 0, 0, 0] / y[i, 0, 0, 0]))


def test_timesteps_to_train_at() -> None:
    t = SHORT.sample_timesteps(200_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long
    assert torch.bincount(t, minlength=100).double().numpy() == pytest.approx(2000, rel=0.12)
    t = EDM.sample_timesteps(200_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long
    known = np.log(EDM.sigmas)
    assert known[t.numpy()].mean() == pytest.approx(-1.2, abs=0.01)
    assert known[t.numpy()].std() == pytest.approx(1.2, abs=0.01)
    # How often the levels up to one are drawn: the normal distribution between neighbours.
    for level in (200, 400, 600, 800):
        edge = (known[level] + known[level + 1]) / 2
        expected = 0.5 * (1 + math.erf((edge + 1.2) / 1.2 / 2**0.5))
        assert float((t <= level).double().mean()) == pytest.approx(expected, abs=0.004)
    assert EDMSchedule(10).sample_timesteps(1000, torch.Generator()).max() <= 9


# --- the published chains -------------------------------------------------------------------------


@pytest.mark.parametrize("var_type", VAR_TYPES)
@torch.no_grad()
def test_golden_chain(var_type: str) -> None:
    with np.load(GOLDEN / "slimmable_g16_ch64.npz", allow_pickle=False) as file:
        golden = dict(file)
    widths, x = golden["strategy"].tolist(), torch.from_numpy(golden["x"])
    denoise = StepAwareDenoiser(sampling_networks(golden_network(), set(widths)), widths, 50, "cpu")
    noise = fixed_noise(x.shape)
    out = sample_ddpm(
        denoise, x, NoiseSchedule(1e-4, 0.02, 50), noise=lambda t: noise(t).float(),
        var_type=var_type,
    )  # fmt: skip
    expected = torch.from_numpy(golden[f"ddpm_{var_type}"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * float(expected.std()))


# --- Gaussian data, whose best denoiser is known --------------------------------------------------


def impulses(steps: int, h: float = 1e-3) -> tuple[Tensor, Callable[[int], Tensor]]:
    """x_T and noise by which an affine chain tells its mean and variance without drawing any.

    Image 0 gets no noise: it is the mean. Image 1 gets x_T = h; image 2 + t gets h at step t alone.
    """
    x_T = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x_T[1] = h

    def noise(t: int) -> Tensor:
        out = torch.zeros_like(x_T)
        out[2 + t] = h
        return out

    return x_T, noise


def moments(x: Tensor, h: float = 1e-3) -> tuple[float, float]:
    """Mean and variance of what a chain made of `impulses`."""
    x = x.flatten()
    return float(x[0]), float((((x[1:] - x[0]) / h) ** 2).sum())


@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("T", [250, 1000, 4000])
def test_ddpm_moments(T: int, var_type: str) -> None:
    # The same forward process in more and more steps: what is amiss falls as 1/T.
    levels, (x_T, noise) = NoiseSchedule(0.1 / T, 20 / T, T), impulses(T)
    out = sample_ddpm(exact(levels), x_T, levels, noise=noise, var_type=var_type)
    mean, variance = moments(out)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=50 / T)


def test_fixedlarge_is_exact_for_unit_gaussian_data() -> None:
    # x_t has variance 1 at every t; only the last step, without noise, takes β_0 of it.
    x_T, noise = impulses(100)
    mean, variance = moments(sample_ddpm(exact(SHORT, m=0, s=1), x_T, SHORT, noise=noise))
    assert mean == 0
    assert variance == pytest.approx(1 - SHORT.beta_1, rel=1e-9)


def test_fixedsmall_is_exact_for_a_single_image() -> None:
    # q(x_s | x_t, x_0) is then the whole truth, so x_t has mean √ᾱ·m and variance 1 − ᾱ.
    abar, (x_T, noise), seen = SHORT.alpha_bars, impulses(100), {}
    out = sample_ddpm(
        exact(SHORT, s=0), math.sqrt(abar[99]) * MEAN + math.sqrt(1 - abar[99]) * x_T, SHORT,
        noise=noise, var_type="fixedsmall", steps=range(0, 100, 3),
        observe=lambda t, x: seen.update({t: moments(x)}),
    )  # fmt: skip
    assert list(seen) == list(range(99, -1, -3))
    for t, found in seen.items():
        assert found == pytest.approx((math.sqrt(abar[t]) * MEAN, 1 - abar[t]))
    torch.testing.assert_close(out, torch.full_like(out, MEAN))


@pytest.mark.parametrize("levels", [STANDARD, EDM])
@pytest.mark.parametrize("churn", [0.0, 20.0, 1000.0])
def test_edm_moments(levels: NoiseLevels, churn: float) -> None:
    x_T, noise = impulses(1000)
    out = sample_edm(exact(levels), x_T, levels, steps=200, S_churn=churn, noise=noise)
    mean, variance = moments(out)
    # Churned or not, an exact denoiser keeps the moments.
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=0.02)


@pytest.mark.parametrize(
    ("levels", "sampler", "order"),
    [(FINE, "ddim", 1), (FINE, "euler", 1), (FINE, "heun", 2), (FINE_EDM, "euler", 1),
     (FINE_EDM, "heun", 2)],
)  # fmt: skip
def test_order_of_convergence(levels: NoiseLevels, sampler: str, order: int) -> None:
    """To the probability flow, along which (x − m)/√(s² + σ²) does not change. The last step, to
    σ = 0, is one Euler step: x̂_0. All before it is the integrator's."""
    x_T, (bottom, top) = unit(1, 1, 8, 8).clamp(-2, 2), levels.sigmas[[0, -1]]
    z = (top * x_T - MEAN) / math.hypot(top, DEVIATION)
    truth, errors = MEAN + DEVIATION**2 / math.hypot(bottom, DEVIATION) * z, []
    assert float(truth.abs().max()) < 0.6
    for steps in (20, 40, 80, 160):
        if sampler == "ddim":
            # DDIM is Euler's method in σ, too; its x_T is √ᾱ times the other's.
            start, kept = x_T * top * levels.scale_in(levels.T - 1), levels.edm_timesteps(steps)
            out = sample_ddim(exact(levels), start, levels, steps=kept)
        else:
            out = sample_edm(exact(levels), x_T, levels, steps=steps, heun=sampler == "heun")
        errors.append(float((out - truth).abs().max()))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert orders == pytest.approx(order, abs=0.2 if levels is FINE else 0.35)
    assert errors[-1] < (0.01, 1e-3)[order - 1]


# --- loops against each other, and against other libraries ----------------------------------------


def chain(loop: Callable, *args: object, **settings: object) -> dict[int, Tensor]:
    """Every x of a run by its timestep; the result under −1."""
    seen: dict[int, Tensor] = {}
    seen[-1] = loop(*args, **settings, observe=lambda t, x: seen.update({t: x.clone()}))
    return seen


def assert_same_chain(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for t, x in a.items():
        torch.testing.assert_close(
            x, b[t], rtol=tolerance, atol=tolerance, msg=lambda m, t=t: f"at {t}: {m}"
        )


@pytest.mark.parametrize("loop", LOOPS)
def test_parameterisations_give_the_same_chain(loop: str) -> None:
    x_T, run, settings = unit(2, 3, 4, 4), LOOPS[loop], {"steps": [0, 5, 6, 40, 80, 99]}
    expected = chain(run, exact(SHORT), x_T, SHORT, **settings)
    for mean_type in MEAN_TYPES[1:]:
        found = chain(run, exact(SHORT, mean_type), x_T, SHORT, mean_type=mean_type, **settings)
        assert_same_chain(found, expected, 1e-9)


def test_ddim_with_eta_one_is_ancestral_fixedsmall() -> None:
    x_T = unit(2, 3, 4, 4)
    common = {"noise": fixed_noise(x_T.shape), "steps": SHORT.T}
    ddim = chain(sample_ddim, exact(SHORT), x_T, SHORT, eta=1.0, **common)
    ddpm = chain(sample_ddpm, exact(SHORT), x_T, SHORT, var_type="fixedsmall", **common)
    assert_same_chain(ddim, ddpm, 1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mean_type", DIFFUSERS)
def test_ddim_agrees_with_diffusers(mean_type: str, eta: float) -> None:
    x = unit(2, 3, 4, 4).float()
    noise, denoise = fixed_noise(x.shape), exact(STANDARD, mean_type)
    ours = chain(
        sample_ddim, denoise, x, STANDARD, steps=20, eta=eta, noise=noise, mean_type=mean_type
    )
    theirs = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=DIFFUSERS[mean_type]
    )
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == STANDARD.timesteps(20)[::-1]
    for t in theirs.timesteps.tolist():
        torch.testing.assert_close(ours[t].float(), x, rtol=1e-3, atol=1e-4)
        x = theirs.step(denoise(x, t), t, x, eta, variance_noise=noise(t).float()).prev_sample
    torch.testing.assert_close(ours[-1].float(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("kept", [None, [0, 7, 8, 30, 55, 99]])
def test_ddpm_agrees_with_diffusers(kept: list | None, var_type: str, clip: bool) -> None:
    x, denoise = unit(2, 3, 4, 4).float(), exact(SHORT, s=1)  # so wide that clipping x̂_0 acts
    generator = torch.Generator().manual_seed(3)
    ours = chain(
        sample_ddpm, denoise, x, SHORT, noise=lambda t: torch.randn(x.shape, generator=generator),
        var_type=var_type, clip_denoised=clip, steps=kept,
    )  # fmt: skip
    theirs = DDPMScheduler(
        num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=clip,
        variance_type=var_type.replace("fixed", "fixed_"),
    )  # fmt: skip
    timesteps = sorted(kept or range(100), reverse=True)
    theirs.set_timesteps(timesteps=timesteps)
    generator.manual_seed(3)
    for t in timesteps:
        torch.testing.assert_close(ours[t], x, rtol=1e-3, atol=1e-4)
        x = theirs.step(denoise(x, t), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours[-1], x.clamp(-1, 1), rtol=1e-3, atol=1e-4)


def transcribed(x: Tensor, D: Callable, ramp: list[float], round_sigma: Callable, **k: float):
    """Algorithm 2 of Karras et al. 2022 line by line; with S_churn = 0, algorithm 1."""
    N, noise = len(ramp), k["noise"]
    t = [*ramp, 0.0]
    x = x * t[0]
    for i in range(N):
        gamma = min(k["S_churn"] / N, 2**0.5 - 1) if k["S_min"] <= t[i] <= k["S_max"] else 0
        t_hat = round_sigma(t[i] + gamma * t[i])
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * k["S_noise"] * noise[i]
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if k["heun"] and t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x.clamp(-1, 1)


@pytest.mark.parametrize("heun", [True, False])
@pytest.mark.parametrize(
    "churn",
    [{}, {"S_churn": 5.0}, {"S_churn": 1e3, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.007}],
)
def test_edm_is_its_algorithm(churn: dict, heun: bool) -> None:
    x_T, sigmas, s2 = unit(2, 3, 4, 4), STANDARD.sigmas, DEVIATION**2

    def D(x: Tensor, sigma: float) -> Tensor:
        """x̂_0 of x = x_0 + σ·noise, for any σ: no timestep, no scaling."""
        return (s2 * x + sigma**2 * MEAN) / (s2 + sigma**2)

    def round_sigma(sigma: float) -> float:
        return min(sigmas.tolist(), key=lambda trained: abs(trained - sigma))

    rho, N, noise = 5.0, 12, fixed_noise(x_T.shape)
    a, b = sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho)
    ramp = [round_sigma((a + i / (N - 1) * (b - a)) ** rho) for i in range(N)]
    settings = {"S_churn": 0.0, "S_min": 0.0, "S_max": math.inf, "S_noise": 1.0, **churn}
    noises = [noise(STANDARD.nearest(sigma)) for sigma in ramp]
    expected = transcribed(x_T, D, ramp, round_sigma, noise=noises, heun=heun, **settings)
    out = sample_edm(
        exact(STANDARD), x_T, STANDARD, steps=N, rho=rho, heun=heun, noise=noise, **churn
    )
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_edm_calls_and_observations() -> None:
    x_T, inputs = unit(2, 3, 4, 4), []

    def denoise(x: Tensor, t: int) -> Tensor:
        inputs.append((t, x))
        return exact(STANDARD)(x, t)

    d, c, b, a = STANDARD.edm_timesteps(4)
    seen = chain(sample_edm, denoise, x_T, STANDARD, steps=4, noise=no_noise)
    assert [t for t, _ in inputs] == [a, b, b, c, c, d, d]
    assert list(seen) == [a, b, c, d, -1]
    assert torch.equal(seen[a], x_T * STANDARD.sigmas[a])
    inputs.clear()
    seen = chain(sample_edm, denoise, x_T, STANDARD, steps=4, heun=False)
    assert [t for t, _ in inputs] == [a, b, c, d]
    for t, x in inputs:  # the network's input at σ is x/√(1 + σ²)
        torch.testing.assert_close(x, seen[t] / math.sqrt(1 + STANDARD.sigmas[t] ** 2))


def test_edm_leaves_out_steps_that_meet_after_rounding() -> None:
    levels, x_T = NoiseSchedule(1e-3, 0.2, 10), unit(2, 3, 4, 4)
    kept = levels.edm_timesteps(10)
    assert len(set(kept)) < len(kept) == 10
    seen = chain(sample_edm, exact(levels), x_T, levels, steps=10)
    assert list(seen) == [*sorted(set(kept), reverse=True), -1]
    again = sample_edm(exact(levels), x_T, levels, steps=sorted(set(kept)))
    assert torch.equal(again, seen[-1])


# --- which timesteps are visited, and what comes out ----------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_steps_given_as_timesteps(loop: str) -> None:
    x_T, run = unit(2, 3, 4, 4), LOOPS[loop]
    seen = chain(run, exact(SHORT), x_T, SHORT, steps=[40, 0, 7, 40])
    assert list(seen) == [40, 7, 0, -1]
    if loop == "edm":
        return
    by_number = chain(run, exact(SHORT), x_T, SHORT, steps=10)
    by_name = run(exact(SHORT), x_T, SHORT, steps=range(0, 100, 10))
    assert torch.equal(by_number[-1], by_name)
    for t in (80, 30, 0):  # a chain goes on from any x, bit for bit
        rest = run(exact(SHORT), by_number[t], SHORT, steps=range(0, t + 1, 10))
        assert torch.equal(rest, by_number[-1])


def test_noise_is_asked_for_where_it_is_used() -> None:
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return X

    sample_ddpm(exact(SHORT), X, SHORT, noise=noise, steps=[0, 5, 9])
    sample_ddim(exact(SHORT), X, SHORT, noise=noise, steps=[0, 5, 9], eta=0.5)
    assert asked == [9, 5, 9, 5]
    sample_ddim(exact(SHORT), X, SHORT, noise=no_noise, steps=[0, 5, 9])
    asked.clear()
    # Nothing is noisier than the largest trained σ, so the first step cannot be churned.
    sample_edm(exact(SHORT), X, SHORT, noise=noise, steps=[50, 90, 99], S_churn=3.0)
    assert asked == [90, 50]


@pytest.mark.parametrize("loop", LOOPS)
def test_clipping(loop: str) -> None:
    x_T, run = unit(4, 3, 4, 4), LOOPS[loop]
    wide = exact(SHORT, m=0, s=3)
    out = run(wide, x_T, SHORT, steps=20)
    assert (out.shape, out.dtype) == (x_T.shape, x_T.dtype)
    assert (float(out.min()), float(out.max())) == (-1, 1)
    free = run(wide, x_T, SHORT, steps=20, limit=math.inf)
    assert float(free.abs().max()) > 1
    assert torch.equal(free.clamp(-1, 1), out)
    # A denoiser that puts x̂_0 at 3 everywhere is held to 1.
    settings = {"mean_type": "xstart", "steps": [0, 50]}
    wild = chain(run, lambda x, t: x * 0 + 3, x_T, SHORT, **settings)
    held = chain(run, lambda x, t: x * 0 + 3, x_T, SHORT, clip_denoised=True, **settings)
    assert_same_chain(held, chain(run, lambda x, t: x * 0 + 1, x_T, SHORT, **settings), 0)
    assert float((wild[0] - held[0]).min()) > 0.1


# --- mistakes -------------------------------------------------------------------------------------

X = torch.zeros(1, 1, 1, 1)
D, Z = exact(SHORT), lambda t: X


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule(1e-4, 0.02, 0), "--T=0"),
        (lambda: NoiseSchedule(0, 0.02, 10), "--beta_1=0"),
        (lambda: NoiseSchedule(0.02, 1e-4, 10), "--beta_1"),
        (lambda: NoiseSchedule(1e-4, 1.0, 10), "--beta_T=1"),
        (lambda: NoiseSchedule(float("nan"), 0.02, 10), "--beta_1=nan"),
        (lambda: NoiseSchedule(1e-4, 0.02, 10, "cubic"), "--beta_schedule=cubic"),
        (lambda: EDMSchedule(1), "--T=1"),
        (lambda: EDMSchedule(10, P_std=0.0), "--P_std=0.0"),
        (lambda: EDMSchedule(10, P_mean=math.nan), "--P_mean=nan"),
        (lambda: EDMSchedule(10, sigma_data=-1.0), "--sigma_data=-1.0"),
        (lambda: SHORT.timesteps(0), "--sample_steps=0"),
        (lambda: SHORT.timesteps(101), "--sample_steps=101.*T=100"),
        (lambda: SHORT.timesteps(5, "cubic"), "--timestep_spacing=cubic"),
        (lambda: SHORT.edm_timesteps(0), "--sample_steps=0"),
        (lambda: SHORT.edm_timesteps(101), "--sample_steps=101"),
        (lambda: SHORT.edm_timesteps(5, 0.0), "--rho=0"),
        (lambda: SHORT.edm_timesteps(5, float("nan")), "--rho=nan"),
        (lambda: sample_ddpm(D, X, SHORT, noise=Z, var_type="fixed"), "--var_type"),
        (lambda: sample_ddpm(D, X, SHORT, noise=Z, mean_type="x"), "--mean_type=x"),
        (lambda: sample_ddpm(D, X, SHORT, noise=Z, steps=[]), "at least one"),
        (lambda: sample_ddim(D, X, SHORT, steps=5, eta=-1.0), "--eta=-1"),
        (lambda: sample_ddim(D, X, SHORT, steps=5, eta=5.0, noise=Z), "--eta=5"),
        (lambda: sample_ddim(D, X, SHORT, steps=[]), "at least one"),
        (lambda: sample_edm(D, X, SHORT, steps=5, S_churn=-1.0), "--S_churn=-1"),
        (lambda: sample_edm(D, X, SHORT, steps=5, S_noise=-1.0), "--S_noise=-1"),
        (lambda: sample_edm(D, X, SHORT, steps=5, mean_type="x"), "--mean_type=x"),
        (lambda: SHORT.training_pair(X, torch.tensor([1]), X, "x"), "--mean_type=x"),
    ],
)
def test_user_errors(call: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_missing_noise() -> None:
    with pytest.raises(ValueError, match="needs `noise`"):
        sample_ddim(D, X, SHORT, steps=5, eta=0.1)
    with pytest.raises(ValueError, match="needs `noise`"):
        sample_edm(D, X, SHORT, steps=5, S_churn=0.1)
