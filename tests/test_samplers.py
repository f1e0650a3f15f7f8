"""Every sampler behind --sampler: diffusers' schedulers against themselves, closed forms, counts of
network calls, restarts, and the table of docs/samplers.md, cell by cell."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_main, tiny_network
from test_diffusion import exact
from torch import Tensor

import build
from diffusion import EDMSchedule, NoiseLevels, NoiseSchedule
from model import StepAwareDenoiser, WidthSchedule, average, entries_for_calls, sampling_networks
from runtime.errors import UserError
from sampling import schedulers
from sampling.noise import SAMPLING, ImageNoise
from sampling.protocol import OURS, Sampler, timesteps
from sampling.samplers import make_sampler
from sampling.schedulers import DiffusersScheduler
from settings import Configuration, SamplingSettings

STANDARD = NoiseSchedule(1e-4, 0.02, 1000)
SHORT = NoiseSchedule(1e-3, 0.3, 10)
COSINE = NoiseSchedule(1e-4, 0.02, 1000, "squaredcos_cap_v2")
MEAN, DEVIATION = 0.1, 0.4
STOCHASTIC = (
    "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler", "SASolverScheduler",
)  # fmt: skip
EXACT = exact(STANDARD, m=MEAN, s=DEVIATION)


def sampler(
    name: str = "ddpm", levels: NoiseLevels = STANDARD, mean_type: str = "epsilon", **more: object
) -> Sampler:
    return make_sampler(SamplingSettings(sampler=name, **more), levels, mean_type)


def noise_of(shape: tuple) -> Callable[[int], Tensor]:
    """A noise for every number, as a table would hold it."""
    return lambda t: torch.from_numpy(
        np.random.default_rng(t).standard_normal(shape, dtype=np.float32)
    )


def unit(*shape: int) -> Tensor:
    return noise_of(shape)(10**6)


# --- diffusers' schedulers ------------------------------------------------------------------------


def driven(name: str, x: Tensor, steps: int, patch: pytest.MonkeyPatch, **options) -> list[Tensor]:
    """The x of every step of a scheduler that is driven as its own pipelines do, and the result."""
    import diffusers

    scheduler_class = getattr(diffusers, name)
    options |= {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    if name.startswith("DDPM"):
        options["variance_type"] = "fixed_large"
    scheduler = scheduler_class(**options)
    if "clip_sample" in scheduler.config:
        scheduler = scheduler_class(clip_sample=False, **options)
    scheduler.set_timesteps(steps)
    noise, at, draws = noise_of(tuple(x.shape)), [0], {}

    def drawn(*arguments, **kwargs) -> Tensor:
        draws[at[0]] = draws.get(at[0], -1) + 1
        return noise(at[0] + 1000 * draws[at[0]])

    module = sys.modules[scheduler_class.__module__]
    if hasattr(module, "randn_tensor"):
        patch.setattr(module, "randn_tensor", drawn)
    eta = {"eta": 0.0} if name == "TCDScheduler" else {}  # its default is another
    x, seen = x * scheduler.init_noise_sigma, []
    for time in scheduler.timesteps:
        at[0] = min(round(time.item()), 999)
        seen.append(x)
        output = EXACT(scheduler.scale_model_input(x, time), at[0])
        x = scheduler.step(output, time, x, **eta).prev_sample
    return [*seen, x]


@pytest.mark.parametrize("name", schedulers.names())
def test_a_scheduler_is_diffusers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen, calls = unit(2, 1, 4, 4), [], []
    ours = sampler(name, sample_steps=12)

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return EXACT(x, t)

    noise = noise_of((2, 1, 4, 4))
    x_0 = ours.sample(denoise, x, noise, observe=lambda t, x: seen.append(x))
    theirs = driven(name, x, 12, monkeypatch)
    order = 2 if name.startswith(("Heun", "KDPM2")) else 1
    for here, there in zip([*seen, x_0], [*theirs[:-1:order], theirs[-1]], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    assert [call.t for call in ours.calls()] == calls


@pytest.mark.parametrize("name", STOCHASTIC)
def test_images_do_not_depend_on_the_batch(name: str) -> None:
    ours, shape = sampler(name, sample_steps=5), (1, 4, 4)

    def images(indices: list[int], seed: int = 0) -> Tensor:
        noise = ImageNoise(seed, SAMPLING, torch.tensor(indices), shape)
        return ours.sample(EXACT, noise.initial(), noise)

    together = images([0, 1, 2])
    assert torch.equal(images([2]), together[2:])
    assert not torch.equal(images([0, 1, 2], seed=1), together)
    state = torch.get_rng_state()
    images([0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scheduler_draws_new_noise_each_time() -> None:
    """Also where two of its timesteps round to the same trained one."""
    drawn = []

    def noise(t: int) -> Tensor:
        drawn.append(t)
        return torch.zeros(1, 1, 2, 2)

    options = '{"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}'
    ours = sampler("dpm_solver", SHORT, sample_steps=10, scheduler_options=options)
    drawn.clear()  # of the run on one pixel
    ours.sample(exact(SHORT), unit(1, 1, 2, 2), noise)
    assert len(timesteps(ours)) < len(ours.entries()) == 10
    assert len(set(drawn)) == len(drawn) == 10


@pytest.mark.parametrize(
    "name",
    ["dpm_solver", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
     "KDPM2DiscreteScheduler"],
)  # fmt: skip
def test_solvers_converge_to_the_closed_form(name: str) -> None:
    """Second order: half the step, a quarter of the error. DDIM's halves."""
    x_T = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64).view(1, 1, 4, 4)
    abar = STANDARD.abar(999)
    z = (x_T - abar**0.5 * MEAN) / (abar * DEVIATION**2 + 1 - abar) ** 0.5

    def error(name: str, steps: int, options: str = "") -> float:
        ours = sampler(name, sample_steps=steps, scheduler_options=options)
        x_0 = ours.sample(EXACT, x_T, noise_of(()))
        return float((x_0 - (MEAN + DEVIATION * z)).abs().max())

    karras = '{"use_karras_sigmas": true}'
    coarse, fine = error(name, 32, karras), error(name, 64, karras)
    assert coarse / fine > 3
    assert fine < 0.01
    assert 1.7 < error("ddim", 32) / error("ddim", 64) < 2.3
    assert fine < 0.3 * error("ddim", 64)


@pytest.mark.parametrize("name", ["dpm_solver", "UniPCMultistepScheduler"])
def test_every_prediction_gives_the_same_chain(name: str) -> None:
    x_T = unit(1, 1, 4, 4)
    epsilon, xstart, v = (
        sampler(name, mean_type=mean_type, sample_steps=8).sample(
            exact(STANDARD, mean_type, MEAN, DEVIATION), x_T, noise_of(x_T.shape)
        )
        for mean_type in ("epsilon", "xstart", "v")
    )
    torch.testing.assert_close(xstart, epsilon, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(v, epsilon, rtol=1e-3, atol=1e-3)


# --- calls of the network -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("ddpm", {}, 10),
        ("ddim", {"sample_steps": 4}, 4),
        ("edm", {"sample_steps": 4}, 7),
        ("edm", {"sample_steps": 4, "heun": False}, 4),
        ("edm", {"sample_steps": 4, "S_churn": 4.0}, 7),
        ("edm", {"sample_steps": 4, "S_churn": 4.0, "S_tmin": 0.1, "S_tmax": 1.0}, 7),
        ("dpm_solver", {"sample_steps": 4}, 4),
        ("HeunDiscreteScheduler", {"sample_steps": 4}, 7),
        ("KDPM2DiscreteScheduler", {"sample_steps": 4}, 7),
    ],
)
def test_calls_are_what_happens(name: str, settings: dict, count: int) -> None:
    ours, happened = sampler(name, SHORT, **settings), []

    def denoise(x: Tensor, t: int, step: int | None = None) -> Tensor:
        happened.append((t if step is None else step, t))
        return exact(SHORT)(x, t)

    x, noise = unit(1, 1, 2, 2), noise_of((1, 1, 2, 2))
    x_0 = ours.sample(denoise, x, noise)
    assert ours.calls() == happened
    assert len(happened) == count
    assert sorted({step for step, _ in happened}) == timesteps(ours)
    # A denoiser of two arguments is called alike, and is not told the step.
    two = []
    again = ours.sample(lambda x, t: two.append(t) or exact(SHORT)(x, t), x, noise)
    assert torch.equal(again, x_0)
    assert two == [t for _, t in happened]


@pytest.mark.parametrize("name", ["edm", "HeunDiscreteScheduler"])
def test_an_entry_per_step_counts_for_both_calls(name: str) -> None:
    ours, ran = sampler(name, SHORT, sample_steps=4), []
    widths = [0.25, 0.5, 0.75, 1.0]
    networks = {w: lambda x, t, w=w: ran.append(w) or torch.zeros_like(x) for w in widths}

    def run(schedule: WidthSchedule, told: bool = True) -> list[float]:
        ran.clear()
        denoise = StepAwareDenoiser(networks, schedule, SHORT.T, "cpu")
        x, noise = unit(1, 1, 2, 2), noise_of((1, 1, 2, 2))
        ours.sample(denoise if told else lambda x, t: denoise(x, t), x, noise)
        if told:
            entries = entries_for_calls(schedule, ours.calls())
            cost = average(schedule, entries, {w: 100 * w for w in widths})
            assert cost == pytest.approx(100 * sum(ran) / len(ran))
        return list(ran)

    per_step = WidthSchedule(widths, timesteps(ours))
    assert run(per_step) == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25]
    # The second call of a step is at the next step's timestep, and T entries say what that has. So
    # it goes for whoever is not told the step, too.
    by_timestep = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert run(per_step.expanded(SHORT.T)) == by_timestep
    assert run(per_step, told=False) == by_timestep


# --- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [SHORT, EDMSchedule(10)])
@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_edm_goes_on_from_a_step_bit_for_bit(levels: NoiseLevels, churn: float) -> None:
    ours = sampler("edm", levels, sample_steps=6, S_churn=churn)
    net = sampling_networks(tiny_network(in_ch=1), [0.5])[0.5]

    @torch.no_grad()
    def denoise(x: Tensor, t: int) -> Tensor:
        return net(x, torch.full((len(x),), t))

    x, seen, noise = unit(2, 1, 8, 8), [], noise_of((2, 1, 8, 8))
    whole = ours.sample(denoise, x, noise, observe=lambda t, x: seen.append(x))
    assert len(seen) == len(timesteps(ours))
    for start in range(1, len(seen)):
        assert torch.equal(ours.sample(denoise, seen[start], noise, start=start), whole)


def test_a_multistep_solver_has_no_restart() -> None:
    ours = sampler("dpm_solver", SHORT, sample_steps=4)
    assert not ours.resumes
    with pytest.raises(ValueError, match="from its start to its end"):
        ours.sample(exact(SHORT), unit(1, 1, 2, 2), noise_of(()), start=1)


# --- settings -------------------------------------------------------------------------------------


def test_rho_spaces_the_sampler_and_not_the_networks_levels() -> None:
    """What an EDM network is told that it was trained at is no matter of a sampling flag."""

    def model(**options: object) -> build.Model:
        config = Configuration.of(precond="edm", T=10, sample_steps=4, **options)
        return build.Model(tiny_network(), build.settled(config), torch.device("cpu"))

    usual, other = model(), model(rho=3.0)
    assert other.levels == usual.levels
    assert other.levels.sigmas[1] == pytest.approx(0.0205, abs=1e-4)  # ρ = 3 would make it 0.206
    assert other.sampler.entries() == usual.levels.edm_timesteps(4, 3.0) != usual.sampler.entries()
    assert other.sampler.as_json() == {**usual.sampler.as_json(), "rho": 3.0}


def test_a_sampler_says_what_it_heeds() -> None:
    common = {"sampler", "sample_steps", "timestep_spacing", "eta", "var_type", "clip_denoised"}
    common |= {"mean_type"}
    churn = {"S_churn", "S_tmin", "S_tmax", "S_noise"}
    for name, more in {
        "ddpm": set(), "ddim": set(), "edm": churn | {"rho", "heun"},
        "dpm_solver": churn | {"scheduler_options"},
    }.items():  # fmt: skip
        said = sampler(name, SHORT, "v", sample_steps=3).as_json()
        assert said.keys() == common | more
        assert (said["sampler"], said["sample_steps"], said["mean_type"]) == (name, 3, "v")
        assert json.loads(json.dumps(said, allow_nan=False)) == said


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unipc", {}, "no such sampler; near names: UniPCMultistepScheduler"),
        ("DPMSolverMultistepInverseScheduler", {}, "cannot run here.*DPMSolverMultistep"),
        ("FlowMatchEulerDiscreteScheduler", {}, "cannot run here"),
        ("dpm_solver", {"mean_type": "xprev"}, "--mean_type=xprev"),
        ("dpm_solver", {"clip_denoised": True}, "--clip_denoised"),
        ("dpm_solver", {"scheduler_options": "{"}, "not JSON"),
        ("dpm_solver", {"scheduler_options": "[]"}, "JSON object"),
        *(("dpm_solver", {"scheduler_options": json.dumps({"solver_order": 2, name: True})},
           rf"--scheduler_options: {name} .*DPMSolverMulti\w+ takes.* use_karras_sigmas")
          for name in ("order", "beta_end", "use_flow_sigmas")),
        *(("EulerDiscreteScheduler", {"scheduler_options": json.dumps({name: value})}, name)
          for name, value in (("timestep_type", "continuous"), ("interpolation_type", "linear"),
                              ("use_karras_sigmas", "false"), ("steps_offset", 1.5))),
        *((name, {"scheduler_options": json.dumps(options), "sample_steps": 5},
           "leave the timesteps 0 to 9; .*steps_offset")
          for name in ("DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
          for options in ({"timestep_spacing": "leading", "steps_offset": 5},
                          {"timestep_spacing": "leading", "steps_offset": -2})),
        ("dpm_solver", {"scheduler_options": '{"algorithm_type": "deis"}'},
         "algorithm_type.*final_sigmas_type"),
        ("PNDMScheduler", {"sample_steps": 3}, "--sample_steps=3"),
        ("DDIMScheduler", {"sample_steps": 1, "levels": STANDARD}, "--sample_steps=1.*trailing"),
        ("HeunDiscreteScheduler", {"sample_steps": 2, "levels": STANDARD}, "astray with 2 steps"),
        ("UniPCMultistepScheduler", {"sample_steps": 10, "levels": COSINE,
         "scheduler_options": '{"use_karras_sigmas": true}'}, "timesteps 999 and 999"),
        *((name, {"sample_steps": 5, "scheduler_options": '{"timestep_spacing": "trailing"}'},
           "--var_type=fixedlarge.*--sampler=ddpm")
          for name in ("DDPMScheduler", "DDPMParallelScheduler")),
        ("ddim", {"scheduler_options": "{}"}, "--scheduler_options"),
        ("edm", {"timestep_spacing": "quadratic"}, "--timestep_spacing=quadratic"),
        ("edm", {"S_churn": -1.0}, "--S_churn=-1.0"),
        ("dpm_solver", {"sample_steps": 11}, "--sample_steps=11"),
        ("ddim", {"levels": EDMSchedule(10)}, "--precond=edm"),
        ("HeunDiscreteScheduler", {"scheduler_options": '{"timestep_spacing": "x"}'},
         "cannot run 10 steps"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(name: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        sampler(name, **{"levels": SHORT, **settings})
    assert "\n" not in str(error.value)


VALUES = {
    "timestep_spacing": ("leading", "trailing", "linspace"), "steps_offset": (1,),
    "final_sigmas_type": ("zero", "sigma_min"), "algorithm_type": ("dpmsolver++", "deis"),
    "interpolation_type": ("log_linear",), "lambda_min_clipped": (-5.1,),
    "solver_type": ("midpoint", "bh1", "logrho"),
}  # fmt: skip


@pytest.mark.parametrize("name", schedulers.names())
def test_the_network_is_shown_the_noise_level_that_it_is_told(name: str) -> None:
    """Whatever an option that is allowed does, x has the noise of its timestep, within one."""
    trained, tried = np.log(STANDARD.sigmas), 0
    taken = schedulers._parameters(getattr(schedulers.diffusers, name).__init__)
    for option in sorted(schedulers.ALLOWED & taken.keys()):
        default = taken[option].default
        for value in VALUES.get(option, (default if default != -np.inf else 0, not default)):
            text = json.dumps({option: value})
            try:
                settings = SamplingSettings(sampler=name, sample_steps=8, scheduler_options=text)
                scheduler = DiffusersScheduler(settings, STANDARD, "epsilon").scheduler()
            except UserError:
                continue
            x = torch.zeros(1, 1, 1, 1)
            for i, time in enumerate(scheduler.timesteps):
                scale = float(scheduler.scale_model_input(torch.ones(1), time))
                if scale < 1:  # images to which σ·noise is added, scaled to unit variance
                    sigma = (1 / scale**2 - 1) ** 0.5
                elif hasattr(scheduler, "sigmas"):
                    sigma = float(scheduler.sigmas[i])
                else:  # ᾱ is looked up by the timestep
                    break
                told = np.interp(np.log(max(sigma, 1e-9)), trained, np.arange(1000))
                assert abs(told - float(time)) < 1.01, (text, i)
                x = scheduler.step(x, time, x).prev_sample
            tried += 1
    assert tried >= 3


def test_thresholds_are_for_pixels() -> None:
    settings = SamplingSettings(
        sampler="dpm_solver", sample_steps=8, scheduler_options='{"thresholding": true}'
    )
    make_sampler(settings, STANDARD, "epsilon")
    with pytest.raises(UserError, match="thresholding is for pixels"):
        make_sampler(settings, STANDARD, "epsilon", float("inf"))


@pytest.mark.parametrize(
    "name", ["dpm_solver", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_solvers_that_visit_every_timestep(name: str) -> None:
    """By diffusers' linspace they would visit one twice, and divide by 0."""
    levels = NoiseSchedule(1e-3, 0.2, 100)
    every = sampler(name, levels)
    assert timesteps(every) == list(range(100))
    noise = noise_of((64, 1, 4, 4))
    x = every.sample(exact(levels, "epsilon", MEAN, DEVIATION), noise(1000), noise)
    assert x.mean() == pytest.approx(MEAN, abs=0.1)
    assert x.std() == pytest.approx(DEVIATION, rel=0.1)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_consistency_model_s_usual_ones(name: str) -> None:
    for levels, steps in ((STANDARD, 60), (NoiseSchedule(1e-3, 0.2, 90), 10)):
        kept = timesteps(sampler(name, levels, sample_steps=steps))
        assert len(kept) == steps
        assert kept[-1] == levels.T - 1  # and not at 959 of 1000, or 49 of 90


def said_of(patch: pytest.MonkeyPatch, **options: object) -> str:
    """What is said of a sampler before it runs."""
    lines: list[str] = []
    patch.setattr(build, "log_once", lines.append)
    config = Configuration.of(T=10, beta_1=0.001, beta_T=0.3, **options)
    assert build.Model(tiny_network(), config, torch.device("cpu")).sampler
    return "\n".join(lines)


def test_chains_that_begin_where_images_are_not_all_noise_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = functools.partial(said_of, monkeypatch)
    early, only = "warning: the chain starts at timestep 5 of 10", "only step is at timestep 9"
    trailing = {"scheduler_options": '{"timestep_spacing": "trailing"}'}
    assert re.search(f"{early}.*--timestep_spacing=tr", said(sampler="ddim", sample_steps=2))
    assert re.search(f"{early}.*scheduler_options", said(sampler="DDIMScheduler", sample_steps=2))
    assert said(sampler="DDIMScheduler", sample_steps=2, **trailing) == ""
    assert said(sampler="ddim", sample_steps=2, timestep_spacing="trailing") == ""
    assert said(sampler="ddim") == ""
    for spacing in ("uniform", "quadratic", "leading", "linspace"):
        assert only in said(sampler="ddpm", sample_steps=1, timestep_spacing=spacing)
    assert said(sampler="ddpm", sample_steps=1, timestep_spacing="trailing") == ""


def test_cosine_betas_with_predicted_noise_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = functools.partial(said_of, monkeypatch, beta_schedule="squaredcos_cap_v2")
    warning = "warning: near t = T a cosine"
    assert re.search(f"{warning}.*sample with --clip_denoised", said())
    # Advice that can be followed: this one does not clip.
    assert re.search(f"{warning}.*--sampler=ddim --clip_denoised", said(sampler="dpm_solver"))
    assert warning not in said(clip_denoised=True)
    assert warning not in said(mean_type="v")


# --- what works with what -------------------------------------------------------------------------

TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith("|--")
]
SCORE = [*TINY, "--num_images=4", "--batch_size=4", "--logdir=run"]


@pytest.fixture(scope="module")
def precond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny supernet trained with --precond=edm."""
    folder = tmp_path_factory.mktemp("precond")
    result = run_main(
        *TINY, "--train", "--sandwich", "--precond=edm", "--batch_size=32", "--total_steps=40",
        "--log_step=10", "--warmup=5", "--lr=0.002", "--sample_step=40", "--sample_size=4",
        "--sample_steps=6", "--dropout=0", f"--logdir={folder}",
    )  # fmt: skip
    assert result.status == 0, result.err
    return folder


def cell_is(expected: str, *arguments: str) -> str:
    """Run the program; it must do what the cell says. Returns what it printed."""
    result = run_main(*arguments)
    if expected == "no":
        assert result.error
    else:
        assert result.status == 0, result.err
    return result.out


@pytest.mark.parametrize("row", TABLE[1:], ids=lambda row: re.sub(r"\W+", "-", row[0]))
def test_the_table_of_what_works_with_what(
    row: list[str], run_folder: Path, precond: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = dict(zip(TABLE[0], row, strict=True))
    name = says["sampler"].split()[0]
    flags = [f"--sampler={name}", "--sample_steps=4"]
    if "precond" in says["sampler"]:
        flags.append("--precond=edm")
        (run_folder / "ckpt.pt").write_bytes((precond / "ckpt.pt").read_bytes())
    (run_folder / "search.txt").write_text(str([0.5] * 5 + [1] * 5))
    # Neither exact FLOPs nor pictures matter here, and they take long.
    monkeypatch.setattr("score.flops", lambda net, width, shape: int(1e6 * width**2))
    monkeypatch.setattr("report.draw_front", lambda folder, front: None)
    monkeypatch.setattr("report.SearchProgress.pictures", lambda self: None)
    monkeypatch.setattr("report.plot_fronts", lambda *arguments: None)
    cell_is(
        says["train"], *TINY, *flags, "--train", "--sandwich", "--batch_size=4", "--total_steps=1",
        "--sample_step=1", "--sample_size=2", "--logdir=new",
    )  # fmt: skip
    cell_is(says["eval"], *SCORE, *flags, "--eval", "--assigned_width=0.5")
    cell_is(says["eval_stepaware"], *SCORE, *flags, "--eval_stepaware")
    cell_is(
        says["export_diffusers"], *SCORE, *flags, "--sample_steps=5", "--export_diffusers=exported"
    )
    assert Path("exported/unet/config.json").exists() == (says["export_diffusers"] == "yes")
    search = [*SCORE, *flags, "--search", "--num_generation=2", "--pop_size=4"]
    said = cell_is(says["search"], *search, "--search_dir=s1")
    if says["search"] == "yes":
        front = json.loads(Path("s1/front.json").read_text())
        assert (front["passes_saved"] > 0) == (says["shared states"] == "yes")
        assert ("no states are shared" in said) == (says["shared states"] == "no")
        # What the search wrote is what eval reads.
        cell_is("yes", *SCORE, *flags, "--eval_stepaware", "--schedule=s1/search.txt")
        found = json.loads(Path("run/eval_stepaware.json").read_text())
        assert found["average_gflops"] == pytest.approx(front["chosen"]["average_gflops"])
    cell_is(says["width 0"], *search, "--allow_skip", "--search_dir=s2")


def test_the_table_has_every_sampler() -> None:
    assert {*OURS, *schedulers.SHORT} <= {row[0] for row in TABLE[1:]}
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert all(f"{name}," in text or f"{name}." in text for name in schedulers.names())


def test_a_network_of_edm(precond: Path, here: Path, refused: Callable) -> None:
    """It learns; its checkpoint says how it was trained, and that it is sampled with edm."""
    lines = [json.loads(line) for line in (precond / "train.jsonl").read_text().splitlines()]
    for width in ("0.25", "1"):
        assert lines[-1]["loss"][width] < 0.8 * lines[0]["loss"][width]
    assert (precond / "sample" / "40_width_0.25.png").exists()
    (here / "run").mkdir()
    (here / "run" / "ckpt.pt").write_bytes((precond / "ckpt.pt").read_bytes())
    (here / "run" / "search.txt").write_text("[0.5, 0.25, 0.5, 1]")
    result = run_main(*SCORE, "--eval_stepaware", "--sample_steps=4")
    assert result.status == 0, result.err
    found = json.loads(Path("run/eval_stepaware.json").read_text())
    assert (found["sampler"]["sampler"], found["passes"]) == ("edm", 4 * 7)
    refused(
        r"4 entries; expected 10 .* or 3 \(one for each sampler step\)", *SCORE,
        "--eval_stepaware", "--sample_steps=3",
    )  # fmt: skip
    refused("--sampler=ddim", *SCORE, "--eval", "--sampler=ddim")
    refused("--precond: edm there, none here", *SCORE, "--eval", "--precond=none")
    refused("--export_diffusers.*--precond=edm", *SCORE, "--export_diffusers=out",
            "--sample_steps=4")  # fmt: skip
    refused("--allow_skip", *SCORE, "--search", "--allow_skip")
    refused("--sampler=EulerScheduler.*EulerDiscreteScheduler", *SCORE, "--eval",
            "--sampler=EulerScheduler")  # fmt: skip
    train = [*TINY, "--train", "--precond=edm", "--logdir=new"]
    refused("--mean_type=xstart", *train, "--mean_type=xstart")
    refused("--sampler=ddpm", *train, "--sampler=ddpm")


# --- signal that is left --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean_type", "beta_T", "T"),
    [
        ("ddpm", "epsilon", 0.02, 20000), ("ddim", "xprev", 0.02, 20000),
        ("ddpm", "epsilon", 0.5, 1000), ("edm", "v", 0.5, 1000), ("edm", "epsilon", 0.99, 10000),
    ],
)  # fmt: skip
def test_no_signal_is_left(name: str, mean_type: str, beta_T: float, T: int) -> None:
    with pytest.raises(UserError, match=f"--T={T}, --beta_T={beta_T}.* timestep {T - 1}"):
        sampler(name, NoiseSchedule(1e-4, beta_T, T), mean_type)


@pytest.mark.parametrize(
    ("name", "mean_type", "T"),
    [
        ("ddpm", "epsilon", 10000), ("edm", "epsilon", 10000), ("ddpm", "v", 20000),
        ("ddim", "xstart", 20000),
    ],
)  # fmt: skip
def test_little_signal_is_enough(name: str, mean_type: str, T: int) -> None:
    """In float32, also where a network answers nonsense, as an untrained one does."""
    kept = sampler(name, NoiseSchedule(1e-4, 0.02, T), mean_type)
    steps = timesteps(kept)[:: -T // 50]  # the last one among them
    x_0 = kept.sample(lambda x, t, step=0: -x, unit(4, 1, 8, 8), noise_of((4, 1, 8, 8)), steps)
    assert kept.entries()[-1] == steps[0] == T - 1
    assert x_0.isfinite().all()
