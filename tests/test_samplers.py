"""Every sampler behind --sampler: diffusers' schedulers against themselves, closed forms, counts of
network passes, restarts, and the table of docs/samplers.md, cell by cell."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_main, tiny_network
from torch import Tensor

import diffusion
import score
from diffusion import EDMSchedule, NoiseSchedule, Sampler
from evaluate import Evaluator, SharedStates
from model import StepAwareDenoiser, WidthSchedule, average, entries_for_calls, sampling_networks
from runtime.errors import UserError
from sampling import noise as rng
from sampling import schedulers

STANDARD = NoiseSchedule(1e-4, 0.02, 1000)
SHORT = NoiseSchedule(1e-3, 0.3, 10)
MEAN, DEVIATION = 0.1, 0.4
STOCHASTIC = (
    "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler", "SASolverScheduler",
)  # fmt: skip


def exact(schedule: NoiseSchedule) -> Callable[[Tensor, int], Tensor]:
    """ε of the best denoiser for x_0 ~ N(MEAN, DEVIATION²)."""

    def denoise(x: Tensor, t: int) -> Tensor:
        abar = schedule.abar(t)
        variance = abar * DEVIATION**2 + 1 - abar
        return (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / variance

    return denoise


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
    options["beta_schedule"] = "linear"
    if name.startswith("DDPM"):
        options["variance_type"] = "fixed_large"
    scheduler = scheduler_class(beta_start=1e-4, beta_end=0.02, **options)
    if "clip_sample" in scheduler.config:
        scheduler = scheduler_class(beta_start=1e-4, beta_end=0.02, clip_sample=False, **options)
    scheduler.set_timesteps(steps)
    noise, denoise, at, draws = noise_of(tuple(x.shape)), exact(STANDARD), [0], {}

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
        output = denoise(scheduler.scale_model_input(x, time), at[0])
        x = scheduler.step(output, time, x, **eta).prev_sample
    return [*seen, x]


@pytest.mark.parametrize("name", schedulers.names())
def test_a_scheduler_is_diffusers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen, calls = unit(2, 1, 4, 4), [], []
    ours = Sampler(name, sample_steps=12)

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return exact(STANDARD)(x, t)

    x_0 = ours(denoise, x, STANDARD, noise_of((2, 1, 4, 4)), observe=lambda t, x: seen.append(x))
    theirs = driven(name, x, 12, monkeypatch)
    order = 2 if name.startswith(("Heun", "KDPM2")) else 1
    assert len(seen) == len(theirs[:-1:order])
    for here, there in zip(seen, theirs[:-1:order], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_0, theirs[-1].clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert [t for _, t in ours.evaluations(STANDARD)] == calls


@pytest.mark.parametrize("name", STOCHASTIC)
def test_images_do_not_depend_on_the_batch(name: str) -> None:
    sampler, shape = Sampler(name, sample_steps=5), (1, 4, 4)

    def images(indices: list[int], seed: int = 0) -> Tensor:
        noise = rng.ImageNoise(seed, rng.SAMPLING, torch.tensor(indices), shape)
        return sampler(exact(STANDARD), noise.initial(), STANDARD, noise)

    together = images([0, 1, 2])
    assert torch.equal(images([2]), together[2:])
    assert not torch.equal(images([0, 1, 2], seed=1), together)
    state = torch.get_rng_state()
    images([0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scheduler_draws_new_noise_each_time() -> None:
    """Also where two of its timesteps round to the same trained one."""
    asked_for = []

    def noise(t: int) -> Tensor:
        asked_for.append(t)
        return torch.zeros(1, 1, 2, 2)

    options = '{"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}'
    sampler = Sampler("dpm_solver", sample_steps=10, scheduler_options=options)
    sampler(exact(SHORT), unit(1, 1, 2, 2), SHORT, noise)
    assert len(sampler.timesteps(SHORT)) < len(sampler.entries(SHORT)) == 10
    assert len(set(asked_for)) == len(asked_for) == 10


def flow(x_T: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Where the probability flow of N(MEAN, DEVIATION²) takes x_T."""
    abar = schedule.abar(schedule.T - 1)
    z = (x_T - abar**0.5 * MEAN) / (abar * DEVIATION**2 + 1 - abar) ** 0.5
    return MEAN + DEVIATION * z


@pytest.mark.parametrize(
    "name",
    [
        "dpm_solver",
        "DPMSolverSinglestepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    ],
)
def test_solvers_converge_to_the_closed_form(name: str) -> None:
    """Second order: half the step, a quarter of the error. DDIM's halves."""
    x_T = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64).view(1, 1, 4, 4)

    def error(sampler: str, steps: int, options: str = "") -> float:
        chain = Sampler(sampler, sample_steps=steps, scheduler_options=options)
        x_0 = chain(exact(STANDARD), x_T, STANDARD, noise_of(()))
        return float((x_0 - flow(x_T, STANDARD)).abs().max())

    karras = '{"use_karras_sigmas": true}'
    coarse, fine = error(name, 32, karras), error(name, 64, karras)
    assert coarse / fine > 3
    assert fine < 0.01
    assert 1.7 < error("ddim", 32) / error("ddim", 64) < 2.3
    assert fine < 0.3 * error("ddim", 64)


@pytest.mark.parametrize("mean_type", ["epsilon", "xstart", "v"])
def test_every_prediction_gives_the_same_chain(mean_type: str) -> None:
    x_T, epsilon = unit(1, 1, 4, 4), exact(STANDARD)

    def denoise(x: Tensor, t: int) -> Tensor:
        abar, e = STANDARD.abar(t), epsilon(x, t)
        x_0 = (x - (1 - abar) ** 0.5 * e) / abar**0.5
        return {"epsilon": e, "xstart": x_0, "v": abar**0.5 * e - (1 - abar) ** 0.5 * x_0}[
            mean_type
        ]

    for name in ("dpm_solver", "UniPCMultistepScheduler", "edm", "ddim"):
        found = Sampler(name, sample_steps=8, mean_type=mean_type)(
            denoise, x_T, STANDARD, noise_of(x_T.shape)
        )
        same = Sampler(name, sample_steps=8)(epsilon, x_T, STANDARD, noise_of(x_T.shape))
        torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-3)


# --- network passes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"sampler": "ddpm"}, 10),
        ({"sampler": "ddim", "sample_steps": 4}, 4),
        ({"sampler": "edm", "sample_steps": 4}, 7),
        ({"sampler": "edm", "sample_steps": 4, "heun": False}, 4),
        ({"sampler": "edm", "sample_steps": 4, "S_churn": 4.0}, 7),
        ({"sampler": "edm", "sample_steps": 4, "S_churn": 4.0, "S_tmin": 0.1, "S_tmax": 1.0}, 7),
        ({"sampler": "dpm_solver", "sample_steps": 4}, 4),
        ({"sampler": "HeunDiscreteScheduler", "sample_steps": 4}, 7),
        ({"sampler": "KDPM2DiscreteScheduler", "sample_steps": 4}, 7),
    ],
)
def test_evaluations_are_what_happens(settings: dict, passes: int) -> None:
    sampler, happened, step = Sampler(**settings), [], []

    class Denoiser:
        def begin(self, t: int) -> None:
            step[:] = [t]

        def __call__(self, x: Tensor, t: int) -> Tensor:
            happened.append((step[0], t))
            return exact(SHORT)(x, t)

    x = unit(1, 1, 2, 2)
    sampler(Denoiser(), x, SHORT, noise_of((1, 1, 2, 2)))
    assert sampler.evaluations(SHORT) == happened
    assert len(happened) == passes
    assert sorted({step for step, _ in happened}) == sampler.timesteps(SHORT)


@pytest.mark.parametrize("name", ["edm", "HeunDiscreteScheduler"])
def test_an_entry_a_step_counts_for_both_passes(name: str) -> None:
    sampler, ran = Sampler(name, sample_steps=4), []
    steps = sampler.timesteps(SHORT)
    widths = [0.25, 0.5, 0.75, 1.0]
    networks = {w: lambda x, t, w=w: ran.append(w) or torch.zeros_like(x) for w in widths}
    costs = {w: 100 * w for w in widths}

    def run(schedule: WidthSchedule) -> list[float]:
        ran.clear()
        denoiser = StepAwareDenoiser(networks, schedule, SHORT.T, "cpu")
        sampler(denoiser, unit(1, 1, 2, 2), SHORT, noise_of((1, 1, 2, 2)))
        cost = average(schedule, entries_for_calls(schedule, sampler.evaluations(SHORT)), costs)
        assert cost == pytest.approx(100 * sum(ran) / len(ran))
        return list(ran)

    a_step = WidthSchedule(widths, steps)
    assert run(a_step) == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25]
    # The second pass of a step is at the next step's timestep, and T entries say what that has.
    assert run(a_step.expanded(SHORT.T)) == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


# --- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SHORT, EDMSchedule(10)])
@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_edm_goes_on_from_a_step_bit_for_bit(schedule: diffusion.Schedule, churn: float) -> None:
    sampler = Sampler("edm", sample_steps=6, S_churn=churn)
    net = sampling_networks(tiny_network(in_ch=1), [0.5])[0.5]

    @torch.no_grad()
    def denoise(x: Tensor, t: int) -> Tensor:
        return net(x, torch.full((len(x),), t))

    x, seen, noise = unit(2, 1, 8, 8), [], noise_of((2, 1, 8, 8))
    whole = sampler(denoise, x, schedule, noise, observe=lambda t, x: seen.append(x))
    assert len(seen) == len(sampler.timesteps(schedule))
    for start in range(1, len(seen)):
        assert torch.equal(sampler(denoise, seen[start], schedule, noise, start=start), whole)


@pytest.mark.parametrize("churn", [0.0, 5.0])
@pytest.mark.parametrize("per_step", [True, False])
def test_shared_states_of_edm_change_nothing(churn: float, per_step: bool) -> None:
    factor = np.random.default_rng(0).standard_normal((64, 64)) / 8
    evaluator = Evaluator(
        networks=sampling_networks(tiny_network(in_ch=1), [0.25, 0.5, 1.0]),
        noise_schedule=SHORT,
        sampler=Sampler("edm", sample_steps=5, S_churn=churn),
        encoder=score.encoder("pixels", "cpu"),
        reference=score.Gaussian(np.zeros(64), factor @ factor.T),
        image_shape=(1, 8, 8),
        device=torch.device("cpu"),
        num_images=4,
        batch_size=4,
        progress=False,
    )
    steps = evaluator.timesteps()
    schedules = [
        WidthSchedule(widths, steps)
        for widths in itertools.islice(itertools.product((0.25, 1.0), repeat=len(steps)), 0, 32, 6)
    ]
    if not per_step:
        schedules = [schedule.expanded(SHORT.T) for schedule in schedules]
    alone = [evaluator.score(schedule)[0] for schedule in schedules]
    evaluator.states = SharedStates(2**20)
    saved = 0
    for index, found in evaluator.score_all(schedules):
        assert found.distance == alone[index].distance
        assert found.passes + found.passes_saved == alone[index].passes
        saved += found.passes_saved
    assert saved > 0


def test_a_multistep_solver_has_no_restart() -> None:
    sampler = Sampler("dpm_solver", sample_steps=4)
    assert not sampler.restartable
    with pytest.raises(ValueError, match="from its start to its end"):
        sampler(exact(SHORT), unit(1, 1, 2, 2), SHORT, noise_of(()), start=1)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "unipc"}, "no such sampler; near names: UniPCMultistepScheduler"),
        ({"sampler": "DPMSolverMultistepInverseScheduler"}, "cannot run here.*DPMSolverMultistep"),
        ({"sampler": "FlowMatchEulerDiscreteScheduler"}, "cannot run here"),
        ({"sampler": "dpm_solver", "mean_type": "xprev"}, "--mean_type=xprev"),
        ({"sampler": "dpm_solver", "clip_denoised": True}, "--clip_denoised"),
        ({"sampler": "dpm_solver", "scheduler_options": "{"}, "not JSON"),
        ({"sampler": "dpm_solver", "scheduler_options": '{"order": 3}'}, "entries among"),
        ({"sampler": "dpm_solver", "scheduler_options": '{"beta_end": 3}'}, "entries among"),
        ({"sampler": "ddim", "scheduler_options": "{}"}, "for schedulers of diffusers"),
        ({"sampler": "edm", "timestep_spacing": "quadratic"}, "--timestep_spacing=quadratic"),
        ({"sampler": "edm", "S_churn": -1.0}, "--S_churn=-1.0"),
        ({"sampler": "edm", "rho": 0.0}, "--rho=0.0"),
        ({"sampler": "dpm_solver", "sample_steps": 11}, "--sample_steps=11"),
        ({"sampler": "HeunDiscreteScheduler", "scheduler_options": '{"timestep_spacing": "x"}'},
         "cannot run 10 steps"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Sampler(**settings).timesteps(SHORT)
    assert "\n" not in str(error.value)


def test_the_program_suggests_names(refused: Callable) -> None:
    line = refused(
        "--sampler=EulerScheduler: there is no such sampler", "--eval", "--sampler=EulerScheduler"
    )
    assert "EulerDiscreteScheduler" in line


def test_a_schedule_for_another_sampler(run_folder: Path, refused: Callable) -> None:
    (run_folder / "search.txt").write_text("[1, 1, 1, 0.5]")
    flags = [*TINY, "--eval_stepaware", "--logdir=run", "--sampler=edm"]
    refused(
        r"4 entries; expected 10 .* or 3 \(one for each sampler step\)", *flags, "--sample_steps=3"
    )


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
        *TINY, "--train", "--sandwich", "--precond=edm", "--batch_size=4", "--total_steps=1",
        "--save_step=1", "--sample_step=0", f"--logdir={folder}",
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
    # Neither times nor exact FLOPs nor pictures matter here, and they take long.
    monkeypatch.setattr("main.latency", lambda *arguments: 0.001)
    monkeypatch.setattr("score.flops", lambda net, width, shape: int(1e6 * width**2))
    monkeypatch.setattr("report.draw_front", lambda folder, front: None)
    monkeypatch.setattr("report.plot_fronts", lambda *arguments: None)
    cell_is(
        says["train"], *TINY, *flags, "--train", "--sandwich", "--batch_size=4", "--total_steps=1",
        "--sample_step=1", "--sample_size=2", "--logdir=new",
    )  # fmt: skip
    cell_is(says["eval"], *SCORE, *flags, "--eval", "--assigned_width=0.5")
    cell_is(says["eval_stepaware"], *SCORE, *flags, "--eval_stepaware")
    cell_is(says["export_diffusers"], *SCORE, *flags, "--export_diffusers=exported")
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
    assert {*diffusion.SAMPLERS, *schedulers.SHORT} <= {row[0] for row in TABLE[1:]}
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert all(f"{name}," in text or f"{name}." in text for name in schedulers.names())
