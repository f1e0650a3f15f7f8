"""Samplers against the published chains, closed forms for Gaussian data, and other libraries."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_network
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import diffusion
from diffusion import NoiseSchedule, loss, sample_ddim, sample_ddpm, sample_edm
from model import StepAwareDenoiser, sampling_networks
from runtime.errors import UserError

MEAN, DEVIATION = 0.1, 0.2  # of the Gaussian data: far enough inside [−1, 1] not to be clipped
STANDARD = NoiseSchedule(1e-4, 0.02, 1000)
SHORT = NoiseSchedule(1e-3, 0.2, 100)
# Fine enough for σ rounded to it to be as good as continuous.
FINE = NoiseSchedule(1e-6, 2e-4, 100_000)


def exact(
    schedule: NoiseSchedule, mean_type: str = "epsilon", m: float = MEAN, s: float = DEVIATION
) -> Callable[[Tensor, int], Tensor]:
    """The best possible denoiser for x_0 ~ N(m, s²): E[x_0 | x_t] by Bayes' rule."""

    def denoise(x: Tensor, t: int) -> Tensor:
        abar = float(schedule.alpha_bars[t])
        x_0 = m + s**2 * abar**0.5 / (abar * s**2 + 1 - abar) * (x - abar**0.5 * m)
        if mean_type == "xstart":
            return x_0
        epsilon = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
        if mean_type == "epsilon":
            return epsilon
        if mean_type == "v":
            return abar**0.5 * epsilon - (1 - abar) ** 0.5 * x_0
        beta, before = float(schedule.betas[t]), schedule.abar(t - 1)
        mean = before**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - before) * x
        return mean / (1 - abar)

    return denoise


def fixed_noise(shape: tuple, seed: int = 1000) -> Callable[[int], Tensor]:
    def noise(t: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(seed + t).standard_normal(shape))

    return noise


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def no_noise(t: int) -> Tensor:
    raise AssertionError(f"noise was asked for at {t}")


SAMPLERS = {
    "ddpm": lambda d, x, s, **k: sample_ddpm(d, x, s, noise=fixed_noise(x.shape), **k),
    "ddim": lambda d, x, s, **k: sample_ddim(d, x, s, eta=0.5, noise=fixed_noise(x.shape), **k),
    "edm": lambda d, x, s, **k: sample_edm(d, x, s, **k),
}


# --- The noise schedule and the loss


def test_schedule_is_linear_in_float64() -> None:
    assert STANDARD.betas.dtype == np.float64
    assert STANDARD.betas[[0, -1]].tolist() == [1e-4, 0.02]
    assert np.diff(STANDARD.betas) == pytest.approx(np.full(999, (0.02 - 1e-4) / 999))
    assert STANDARD.abar(-1) == 1
    assert STANDARD.abar(0) == 1 - 1e-4
    expected = math.exp(math.fsum(math.log1p(-b) for b in STANDARD.betas))
    assert STANDARD.abar(999) == pytest.approx(expected, rel=1e-12)


def test_sigmas_are_noise_over_signal() -> None:
    assert STANDARD.sigmas.shape == (1000,)
    assert (np.diff(STANDARD.sigmas) > 0).all()
    assert pytest.approx(1 / (1 + STANDARD.sigmas**2)) == STANDARD.alpha_bars
    for t in (0, 500, 999):
        sigma = float(STANDARD.sigmas[t])
        assert STANDARD.nearest(sigma) == STANDARD.nearest(sigma * 1.001) == t
    assert STANDARD.nearest(0) == 0
    assert STANDARD.nearest(1e9) == 999


@pytest.mark.parametrize(
    ("T", "steps", "spacing", "expected"),
    [
        (1000, 5, "uniform", [0, 200, 400, 600, 800]),
        (10, 3, "uniform", [0, 3, 6]),
        (4, 4, "uniform", [0, 1, 2, 3]),
        (1000, 1, "uniform", [0]),
        # √800 = 28.28: its quarters squared are 50, 200, 450, 800.
        (1000, 5, "quadratic", [0, 50, 200, 450, 800]),
        (10, 5, "quadratic", [0, 0, 2, 4, 8]),
    ],
)
def test_timesteps(T: int, steps: int, spacing: str, expected: list) -> None:
    found = NoiseSchedule(1e-4, 0.02, T).timesteps(steps, spacing)
    # Squaring a square root may fall just short of the integer.
    assert found[:-1] == expected[:-1]
    assert found[-1] in (expected[-1], expected[-1] - (spacing == "quadratic"))


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
    middle = STANDARD.edm_timesteps(3, 1.0)[1]
    assert middle == STANDARD.nearest((sigmas[0] + sigmas[-1]) / 2)


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


def test_q_sample_keeps_the_type() -> None:
    x_0 = torch.ones(2, 3, 4, 4)
    assert SHORT.q_sample(x_0, torch.tensor([0, 1]), x_0).dtype == torch.float32


@pytest.mark.parametrize("mean_type", diffusion.MEAN_TYPES)
def test_loss_target(mean_type: str) -> None:
    x_0, noise, t = unit(4, 3, 2, 2), unit(4, 3, 2, 2, seed=1), torch.tensor([0, 1, 50, 99])

    def target(x_t: Tensor, t: Tensor) -> Tensor:
        if mean_type == "epsilon":
            return noise
        if mean_type == "xstart":
            return x_0
        if mean_type == "v":  # the turn of (x_0, noise) that x_t is, a quarter turn further
            angle = torch.from_numpy(np.arccos(SHORT.alpha_bars[t] ** 0.5)).view(-1, 1, 1, 1)
            return angle.cos() * noise - angle.sin() * x_0
        # q(x_{t−1} | x_t, x_0) as the product of two Gaussians: precisions add up.
        rows = []
        for i, step in enumerate(t.tolist()):
            beta, before = SHORT.betas[step], SHORT.abar(step - 1)
            if step == 0:  # no variance is left before it
                rows.append(x_0[i])
                continue
            a, b = (1 - beta) / beta, 1 / (1 - before)
            rows.append((a * x_t[i] / (1 - beta) ** 0.5 + b * before**0.5 * x_0[i]) / (a + b))
        return torch.stack(rows)

    assert float(loss(target, x_0, t, noise, SHORT, mean_type)) < 1e-24
    # Off by 0.5 everywhere: a mean of squares over everything.
    off = loss(lambda x, t: target(x, t) + 0.5, x_0, t, noise, SHORT, mean_type)
    assert float(off) == pytest.approx(0.25)


def test_loss_of_half_precision_output_is_float32() -> None:
    x_0, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    value = loss(lambda x, t: x.bfloat16(), x_0, t, torch.ones(2, 1, 2, 2), SHORT)
    assert value.dtype == torch.float32


# --- The published chains


@pytest.mark.parametrize("var_type", diffusion.VAR_TYPES)
@torch.no_grad()
def test_golden_chain(var_type: str) -> None:
    with np.load(GOLDEN / "slimmable_g16_ch64.npz", allow_pickle=False) as file:
        golden = dict(file)
    widths = golden["strategy"].tolist()
    networks = sampling_networks(golden_network(), set(widths))
    x = torch.from_numpy(golden["x"])
    noise = fixed_noise(x.shape)
    out = sample_ddpm(
        StepAwareDenoiser(networks, widths, 50, "cpu"),
        x,
        NoiseSchedule(1e-4, 0.02, 50),
        noise=lambda t: noise(t).float(),
        var_type=var_type,
    )
    expected = torch.from_numpy(golden[f"ddpm_{var_type}"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * float(expected.std()))


# --- Gaussian data, whose best denoiser is known


def affine_moments(run: Callable, steps: int) -> tuple[float, float]:
    """Mean and variance of what a sampler makes of Gaussian noise, without drawing any.

    With an affine denoiser the result is affine in x_T and in each step's noise. Image 0 gets no
    noise: it is the mean. Image 1 gets x_T = h; image 2 + t gets h at step t alone.
    """
    h = 1e-3
    x_T = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x_T[1] = h

    def noise(t: int) -> Tensor:
        out = torch.zeros_like(x_T)
        out[2 + t] = h
        return out

    out = run(x_T, noise).flatten()
    return float(out[0]), float((((out[1:] - out[0]) / h) ** 2).sum())


@pytest.mark.parametrize("mean_type", diffusion.MEAN_TYPES)
@pytest.mark.parametrize("var_type", diffusion.VAR_TYPES)
@pytest.mark.parametrize("T", [250, 1000, 4000])
def test_ddpm_moments(T: int, var_type: str, mean_type: str) -> None:
    # The same forward process in more and more steps: what is amiss falls as 1/T.
    schedule = NoiseSchedule(0.1 / T, 20 / T, T)
    mean, variance = affine_moments(
        lambda x, noise: sample_ddpm(
            exact(schedule, mean_type),
            x,
            schedule,
            noise=noise,
            var_type=var_type,
            mean_type=mean_type,
        ),
        T,
    )
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=50 / T)


def test_fixedlarge_is_exact_for_unit_gaussian_data() -> None:
    # x_t has variance 1 at every t; only the last step, without noise, takes β_0 of it.
    mean, variance = affine_moments(
        lambda x, noise: sample_ddpm(exact(SHORT, m=0, s=1), x, SHORT, noise=noise), 100
    )
    assert mean == 0
    assert variance == pytest.approx(1 - SHORT.beta_1, rel=1e-9)


def test_fixedsmall_is_exact_for_a_single_image() -> None:
    # q(x_s | x_t, x_0) is then the whole truth, so x_t has mean √ᾱ·m and variance 1 − ᾱ.
    h, seen = 1e-3, {}
    abar = SHORT.alpha_bars
    x_T = torch.zeros(102, 1, 1, 1, dtype=torch.float64)
    x_T += math.sqrt(abar[99]) * MEAN
    x_T[1] += h * math.sqrt(1 - abar[99])

    def noise(t: int) -> Tensor:
        out = torch.zeros_like(x_T)
        out[2 + t] = h
        return out

    def observe(t: int, x: Tensor) -> None:
        x = x.flatten()
        seen[t] = float(x[0]), float((((x[1:] - x[0]) / h) ** 2).sum())

    out = sample_ddpm(
        exact(SHORT, m=MEAN, s=0),
        x_T,
        SHORT,
        noise=noise,
        var_type="fixedsmall",
        steps=range(0, 100, 3),
        observe=observe,
    )
    assert list(seen) == list(range(99, -1, -3))
    for t, (mean, variance) in seen.items():
        assert mean == pytest.approx(math.sqrt(abar[t]) * MEAN)
        assert variance == pytest.approx(1 - abar[t])
    torch.testing.assert_close(out, torch.full_like(out, MEAN))


def flow(schedule: NoiseSchedule, x: Tensor, high: int, low: int) -> Tensor:
    """Where the probability flow takes x = x_0 + σ·noise from σ(high) to σ(low): by the closed
    form, x − m grows with √(s² + σ²)."""
    a, b = (schedule.sigmas[t] ** 2 + DEVIATION**2 for t in (high, low))
    return MEAN + (x - MEAN) * math.sqrt(b / a)


def orders(errors: list[float]) -> np.ndarray:
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    x_T, denoise = unit(1, 1, 8, 8).clamp(-2, 2), exact(FINE)
    # The last step, to σ = 0, is one Euler step: x̂_0. All before it is the integrator's.
    x = flow(FINE, x_T * FINE.sigmas[-1], FINE.T - 1, 0)
    truth = exact(FINE, "xstart")(x * math.sqrt(FINE.abar(0)), 0)
    assert float(truth.abs().max()) < 0.6
    errors = []
    for steps in (20, 40, 80, 160):
        if sampler == "ddim":
            # DDIM is Euler's method in σ, too; its x_T is √ᾱ times the other's.
            start = x_T * FINE.sigmas[-1] * math.sqrt(FINE.abar(FINE.T - 1))
            kept = FINE.edm_timesteps(steps)
            out = sample_ddim(denoise, start, FINE, steps=kept)
        else:
            out = sample_edm(denoise, x_T, FINE, steps=steps, heun=sampler == "heun")
        errors.append(float((out - truth).abs().max()))
    assert orders(errors) == pytest.approx(order, abs=0.2)
    assert errors[-1] < (0.01, 1e-3)[order - 1]


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
def test_ddim_moments(spacing: str) -> None:
    mean, variance = affine_moments(
        lambda x, _: sample_ddim(exact(STANDARD), x, STANDARD, steps=500, spacing=spacing), 1000
    )
    # Quadratic spacing starts at 0.8·T, where x_T is not quite pure noise.
    assert mean == pytest.approx(MEAN, rel=0.05)
    assert variance == pytest.approx(DEVIATION**2, rel=0.05)


@pytest.mark.parametrize("churn", [0.0, 20.0, 1000.0])
def test_edm_moments(churn: float) -> None:
    mean, variance = affine_moments(
        lambda x, noise: sample_edm(
            exact(STANDARD), x, STANDARD, steps=200, S_churn=churn, noise=noise
        ),
        1000,
    )
    # Churned or not, an exact denoiser keeps the moments.
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=0.02)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, noise: sample_ddpm(exact(SHORT), x, SHORT, noise=noise),
        lambda x, noise: sample_ddim(exact(SHORT), x, SHORT, steps=50, eta=1.0, noise=noise),
        lambda x, noise: sample_edm(exact(SHORT), x, SHORT, steps=50, S_churn=10.0, noise=noise),
    ],
)
def test_moments_of_drawn_samples(run: Callable) -> None:
    shape = (20_000, 1, 1, 1)
    out = run(unit(*shape), fixed_noise(shape))
    mean, variance = affine_moments(run, SHORT.T)
    # Four standard errors.
    assert float(out.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 20_000))
    assert float(out.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 20_000))


# --- Samplers against each other, and against other libraries


def chain(sampler: Callable, *args: object, **settings: object) -> dict[int, Tensor]:
    """Every x of a run by its timestep; the result under −1."""
    seen: dict[int, Tensor] = {}
    seen[-1] = sampler(*args, **settings, observe=lambda t, x: seen.__setitem__(t, x.clone()))
    return seen


def assert_same_chain(a: dict, b: dict, **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for t, x in a.items():
        torch.testing.assert_close(x, b[t], msg=lambda m, t=t: f"at {t}: {m}", **tolerance)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parameterisations_give_the_same_chain(sampler: str) -> None:
    x_T, run = unit(2, 3, 4, 4), SAMPLERS[sampler]
    settings = {"steps": [0, 5, 6, 40, 80, 99]}
    expected = chain(run, exact(SHORT), x_T, SHORT, **settings)
    for mean_type in ("xstart", "xprev"):
        found = chain(run, exact(SHORT, mean_type), x_T, SHORT, mean_type=mean_type, **settings)
        assert_same_chain(found, expected, rtol=1e-9, atol=1e-9)


def test_ddim_with_eta_one_is_ancestral_fixedsmall() -> None:
    shape = (2, 3, 4, 4)
    common = {"noise": fixed_noise(shape), "steps": SHORT.T}
    ddim = chain(sample_ddim, exact(SHORT), unit(*shape), SHORT, eta=1.0, **common)
    ddpm = chain(sample_ddpm, exact(SHORT), unit(*shape), SHORT, var_type="fixedsmall", **common)
    assert_same_chain(ddim, ddpm, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mean_type", ["epsilon", "xstart", "v"])
def test_ddim_agrees_with_diffusers(mean_type: str, eta: float) -> None:
    x = unit(2, 3, 4, 4).float()
    noise, denoise = fixed_noise(x.shape), exact(STANDARD, mean_type)
    ours = chain(
        sample_ddim, denoise, x, STANDARD, steps=20, eta=eta, noise=noise, mean_type=mean_type
    )
    theirs = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type={"epsilon": "epsilon", "xstart": "sample", "v": "v_prediction"}[mean_type],
    )
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == STANDARD.timesteps(20)[::-1]
    for t in theirs.timesteps.tolist():
        torch.testing.assert_close(ours[t].float(), x, rtol=1e-3, atol=1e-4)
        x = theirs.step(denoise(x, t), t, x, eta, variance_noise=noise(t).float()).prev_sample
    torch.testing.assert_close(ours[-1].float(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("var_type", diffusion.VAR_TYPES)
@pytest.mark.parametrize("kept", [None, [0, 7, 8, 30, 55, 99]])
def test_ddpm_agrees_with_diffusers(kept: list | None, var_type: str, clip: bool) -> None:
    x = unit(2, 3, 4, 4).float()
    # Data so wide that clipping x̂_0 acts.
    denoise = exact(SHORT, s=1)
    generator = torch.Generator().manual_seed(3)
    ours = chain(
        sample_ddpm,
        denoise,
        x,
        SHORT,
        noise=lambda t: torch.randn(x.shape, generator=generator),
        var_type=var_type,
        clip_denoised=clip,
        steps=kept,
    )
    theirs = DDPMScheduler(
        num_train_timesteps=100,
        beta_start=1e-3,
        beta_end=0.2,
        clip_sample=clip,
        variance_type=var_type.replace("fixed", "fixed_"),
    )
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
    [
        {},
        {"S_churn": 5.0},
        {"S_churn": 1e3, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.007},
        {"S_churn": 3.0, "S_min": 1.0},
    ],
)
def test_edm_is_its_algorithm(churn: dict, heun: bool) -> None:
    x_T, denoise, sigmas = unit(2, 3, 4, 4), exact(STANDARD), STANDARD.sigmas
    # x̂_0 of x = x_0 + σ·noise, for any σ: no timestep, no scaling.
    s2 = DEVIATION**2

    def D(x: Tensor, sigma: float) -> Tensor:
        return (s2 * x + sigma**2 * MEAN) / (s2 + sigma**2)

    def round_sigma(sigma: float) -> float:
        return min(sigmas.tolist(), key=lambda trained: abs(trained - sigma))

    rho, N = 5.0, 12
    a, b = sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho)
    ramp = [round_sigma((a + i / (N - 1) * (b - a)) ** rho) for i in range(N)]
    noise = fixed_noise(x_T.shape)
    settings = {"S_churn": 0.0, "S_min": 0.0, "S_max": math.inf, "S_noise": 1.0, **churn}
    expected = transcribed(
        x_T,
        D,
        ramp,
        round_sigma,
        noise=[noise(STANDARD.nearest(sigma)) for sigma in ramp],
        heun=heun,
        **settings,
    )
    out = sample_edm(denoise, x_T, STANDARD, steps=N, rho=rho, heun=heun, noise=noise, **churn)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_edm_calls_and_observations() -> None:
    calls, exact_one = [], exact(STANDARD)

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return exact_one(x, t)

    x_T = unit(2, 3, 4, 4)
    kept = STANDARD.edm_timesteps(4)
    d, c, b, a = kept
    seen = chain(sample_edm, denoise, x_T, STANDARD, steps=4, noise=no_noise)
    assert calls == [a, b, b, c, c, d, d]
    assert list(seen) == [a, b, c, d, -1]
    assert torch.equal(seen[a], x_T * STANDARD.sigmas[a])
    calls.clear()
    sample_edm(denoise, x_T, STANDARD, steps=4, heun=False)
    assert calls == [a, b, c, d]
    # The network's input at σ is x/√(1 + σ²).
    inputs = {}

    def watch(x: Tensor, t: int) -> Tensor:
        inputs[t] = x
        return exact_one(x, t)

    seen = chain(sample_edm, watch, x_T, STANDARD, steps=4, heun=False)
    for t in kept:
        expected = seen[t] / math.sqrt(1 + STANDARD.sigmas[t] ** 2)
        torch.testing.assert_close(inputs[t], expected)


def test_edm_euler_is_ddim() -> None:
    x_T, kept = unit(2, 3, 4, 4), [0, 10, 50, 400, 999]
    edm = chain(sample_edm, exact(STANDARD), x_T, STANDARD, steps=kept, heun=False)
    scale = {t: math.sqrt(STANDARD.abar(t)) for t in [*kept, -1]}
    ddim = chain(sample_ddim, exact(STANDARD), edm[999] * scale[999], STANDARD, steps=kept)
    assert_same_chain({t: x * scale[t] for t, x in edm.items()}, ddim, rtol=1e-10, atol=1e-10)


def test_edm_leaves_out_steps_that_meet_after_rounding() -> None:
    schedule = NoiseSchedule(1e-3, 0.2, 10)
    kept = schedule.edm_timesteps(10)
    assert len(kept) == 10
    assert len(set(kept)) < 10
    x_T = unit(2, 3, 4, 4)
    seen = chain(sample_edm, exact(schedule), x_T, schedule, steps=10)
    assert list(seen) == [*sorted(set(kept), reverse=True), -1]
    again = sample_edm(exact(schedule), x_T, schedule, steps=sorted(set(kept)))
    assert torch.equal(again, seen[-1])


# --- Which timesteps are visited, and what comes out


def test_steps_given_as_timesteps() -> None:
    x_T = unit(2, 3, 4, 4)
    for name, run in SAMPLERS.items():
        seen = chain(run, exact(SHORT), x_T, SHORT, steps=[40, 0, 7, 40])
        assert list(seen) == [40, 7, 0, -1], name
        if name != "edm":
            by_number = run(exact(SHORT), x_T, SHORT, steps=10)
            by_name = run(exact(SHORT), x_T, SHORT, steps=range(0, 100, 10))
            assert torch.equal(by_number, by_name)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_run_split_in_two_is_the_same_run(sampler: str) -> None:
    x_T, run = unit(2, 3, 4, 4).float(), SAMPLERS[sampler]
    kept = SHORT.timesteps(25)
    seen = chain(run, exact(SHORT), x_T, SHORT, steps=kept)
    for t in (kept[20], kept[3], kept[0]):
        rest = run(exact(SHORT), seen[t], SHORT, steps=[s for s in kept if s <= t])
        assert torch.equal(rest, seen[-1])


def test_noise_is_asked_for_where_it_is_used() -> None:
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return torch.zeros(1, 1, 1, 1)

    x_T = torch.zeros(1, 1, 1, 1)
    sample_ddpm(exact(SHORT), x_T, SHORT, noise=noise, steps=[0, 5, 9])
    assert asked == [9, 5]
    asked.clear()
    sample_ddim(exact(SHORT), x_T, SHORT, noise=noise, steps=[0, 5, 9], eta=0.5)
    assert asked == [9, 5]
    sample_ddim(exact(SHORT), x_T, SHORT, noise=no_noise, steps=[0, 5, 9])
    asked.clear()
    # Nothing is noisier than the largest trained σ, so the first step cannot be churned.
    sample_edm(exact(SHORT), x_T, SHORT, noise=noise, steps=[50, 90, 99], S_churn=3.0)
    assert asked == [90, 50]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_result_is_clipped_and_of_the_same_kind(sampler: str) -> None:
    x_T = unit(4, 3, 4, 4)
    out = SAMPLERS[sampler](exact(SHORT, m=0, s=3), x_T, SHORT, steps=20)
    assert out.shape == x_T.shape
    assert out.dtype == x_T.dtype
    assert (float(out.min()), float(out.max())) == (-1, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_denoised(sampler: str) -> None:
    # A denoiser that puts x̂_0 at 3 everywhere is held to 1.
    x_T = unit(2, 3, 4, 4)
    settings = {"mean_type": "xstart", "steps": [0, 50]}
    wild = chain(SAMPLERS[sampler], lambda x, t: x * 0 + 3, x_T, SHORT, **settings)
    held = chain(
        SAMPLERS[sampler], lambda x, t: x * 0 + 3, x_T, SHORT, clip_denoised=True, **settings
    )
    one = chain(SAMPLERS[sampler], lambda x, t: x * 0 + 1, x_T, SHORT, **settings)
    assert_same_chain(held, one, rtol=0, atol=0)
    assert float((wild[0] - held[0]).min()) > 0.1


# --- Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((1e-4, 0.02, 0), "--T=0"),
        ((0, 0.02, 10), "--beta_1=0"),
        ((0.02, 1e-4, 10), "--beta_1"),
        ((1e-4, 1.0, 10), "--beta_T=1"),
        ((float("nan"), 0.02, 10), "--beta_1=nan"),
    ],
)
def test_schedule_errors(settings: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseSchedule(*settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SHORT.timesteps(0), "--sample_steps=0"),
        (lambda: SHORT.timesteps(101), "--sample_steps=101.*T=100"),
        (lambda: SHORT.timesteps(5, "cubic"), "--timestep_spacing=cubic"),
        (lambda: SHORT.edm_timesteps(0), "--sample_steps=0"),
        (lambda: SHORT.edm_timesteps(101), "--sample_steps=101"),
        (lambda: SHORT.edm_timesteps(5, 0.0), "--rho=0"),
        (lambda: SHORT.edm_timesteps(5, float("nan")), "--rho=nan"),
        (lambda: sample_ddpm(exact(SHORT), X, SHORT, noise=Z, var_type="fixed"), "--var_type"),
        (lambda: sample_ddpm(exact(SHORT), X, SHORT, noise=Z, mean_type="x"), "--mean_type=x"),
        (lambda: sample_ddpm(exact(SHORT), X, SHORT, noise=Z, steps=[]), "at least one"),
        (lambda: sample_ddim(exact(SHORT), X, SHORT, steps=5, eta=-1.0), "--eta=-1"),
        (lambda: sample_ddim(exact(SHORT), X, SHORT, steps=[]), "at least one"),
        (lambda: sample_edm(exact(SHORT), X, SHORT, steps=5, S_churn=-1.0), "--S_churn=-1"),
        (lambda: sample_edm(exact(SHORT), X, SHORT, steps=5, S_noise=-1.0), "--S_noise=-1"),
        (lambda: sample_edm(exact(SHORT), X, SHORT, steps=5, mean_type="x"), "--mean_type=x"),
        (lambda: loss(lambda x, t: x, X, torch.tensor([1]), X, SHORT, "x"), "--mean_type=x"),
    ],
)
def test_user_errors(call: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_missing_noise() -> None:
    with pytest.raises(ValueError, match="needs `noise`"):
        sample_ddim(exact(SHORT), X, SHORT, steps=5, eta=0.1)
    with pytest.raises(ValueError, match="needs `noise`"):
        sample_edm(exact(SHORT), X, SHORT, steps=5, S_churn=0.1)


X = torch.zeros(1, 1, 1, 1)


def Z(t: int) -> Tensor:
    return X
