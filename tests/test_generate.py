"""Images: functions of seed and index alone, whoever makes them; chains that share states; what a
network that overflows says; --generate."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Result, contents, run_main, tiny_network
from torch import Tensor, nn

import build
import score
from commands import searched
from diffusion import NoiseSchedule
from evaluate import Evaluator
from model import WidthSchedule, checkpoint, sampling_networks
from runtime.errors import NotFiniteError, UserError
from runtime.files import read_image
from sampling.conditioning import Classes
from sampling.generate import Generator
from sampling.noise import SAMPLING, SEARCH, ImageNoise
from sampling.prefixes import SharedStates
from sampling.protocol import timesteps
from sampling.samplers import make_sampler
from settings import Configuration, SamplingSettings

Refused = Callable[..., str]
SHAPE, WIDTHS, T = (1, 8, 8), (0.25, 0.5, 1.0), 12
STATE = 4 * 64  # bytes of one image's state
LEVELS = NoiseSchedule(1e-3, 0.3, T)
MIXED = [*WIDTHS] * 4


class Cheap(nn.Module):
    """A network that costs next to nothing, for what does not depend on the network."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(width))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        told = 0 if labels is None else 0.1 * labels[:, None, None, None]
        return (x + x.roll(1, 3)) * self.width + 0.1 * t[:, None, None, None].cos() + told


CHEAP = {width: Cheap(width) for width in WIDTHS}


def sampler(name: str = "ddpm", **settings: object):
    return make_sampler(SamplingSettings(sampler=name, **settings), LEVELS, "epsilon")


def generator(networks: dict = CHEAP, **more: object) -> Generator:
    settings = {"sampler": sampler(), "batch_size": 8, "progress": False, **more}
    return Generator(networks=networks, image_shape=SHAPE, device=torch.device("cpu"), **settings)


def evaluator(images: int = 8, networks: dict = CHEAP, **more: object) -> Evaluator:
    random = np.random.default_rng(0)
    factor = random.standard_normal((64, 64)) / 8
    reference = score.Gaussian(random.random(64), factor @ factor.T)
    pixels = score.encoder("pixels", "cpu")
    return Evaluator(generator(networks, **more), pixels, reference, images)


# --- seed and index -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"name": "ddim", "eta": 0.5, "sample_steps": 5}])
def test_images_depend_on_seed_and_index_alone(settings: dict) -> None:
    networks = sampling_networks(tiny_network(T=T, in_ch=1), WIDTHS)

    def images(count: int = 8, **more: object) -> Tensor:
        return generator(networks, sampler=sampler(**settings), **more).images(MIXED, count)

    expected = images()
    assert (expected.shape, expected.dtype) == ((8, *SHAPE), torch.uint8)
    assert len({image.numpy().tobytes() for image in expected}) == 8
    for again in (images(batch_size=1), images(batch_size=3), images(5)):
        # Convolutions of other batch sizes may add up in another order.
        assert (again.int() - expected[: len(again)].int()).abs().max() <= 1
    for others in (images(seed=1), images(stream=SEARCH)):
        assert not any(torch.equal(a, b) for a, b in zip(others, expected, strict=True))
    x_T = ImageNoise(1, SAMPLING, torch.arange(9), SHAPE).initial()
    if settings:
        other_start = images(x_T=x_T, batch_size=3)
        assert not torch.equal(other_start, expected)
    else:  # x_T is all that is left of another seed's noise in a chain without any
        plain = {"sampler": sampler("ddim"), "batch_size": 3}
        given = generator(networks, x_T=x_T, **plain).images(MIXED, 8)
        assert torch.equal(given, generator(networks, seed=1, **plain).images(MIXED, 8))


def test_a_schedule_of_the_samplers_steps() -> None:
    """K entries for K steps are what T entries are that agree at those steps."""
    steps = timesteps(sampler(sample_steps=4))
    assert steps == [0, 3, 6, 9]
    per_step = WidthSchedule([1.0, 0.5, 0.25, 1.0], steps)
    long = [0.25] * T
    for t in steps:
        long[t] = per_step[t]
    short = generator(sampler=sampler(sample_steps=4))
    assert torch.equal(short.images(per_step, 8), short.images(long, 8))
    with pytest.raises(UserError):
        short.images([0.0] * T, 8)


# --- two devices ----------------------------------------------------------------------------------


class TwoCPUs(nn.DataParallel):
    """DataParallel's own forward and replicas, on two devices that both are the CPU."""

    made = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module, self.device_ids, self.output_device = module, [0, 1], 0
        self.dim, self.src_device_obj = 0, torch.device("cpu")

    def scatter(self, inputs: tuple, kwargs: dict, devices: list) -> tuple:
        parts = [(part,) for part in inputs[0].chunk(len(devices))]
        return tuple(parts), tuple({} for _ in parts)

    def replicate(self, module: nn.Module, devices: Sequence[int]) -> list[nn.Module]:
        type(self).made += 1
        return super().replicate(module, devices)

    def parallel_apply(self, replicas: list, inputs: tuple, kwargs: tuple) -> list[Tensor]:
        outputs: dict[int, Tensor] = {}
        weights = [(p, p.detach().clone()) for p in self.module.parameters()]
        for parameter, _ in weights:  # a replica that used them would show
            parameter.data.fill_(torch.nan)

        def run(i: int) -> None:
            with torch.no_grad():
                outputs[i] = replicas[i](*inputs[i], **kwargs[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for parameter, value in weights:
            parameter.data.copy_(value)
        return [outputs[i] for i in range(len(replicas))]

    def gather(self, outputs: list[Tensor], device: int) -> Tensor:
        return torch.cat(outputs)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> type[TwoCPUs]:
    def copies(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        return [[tensor.detach().clone() for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]  # a function has that name, too
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(nn, "DataParallel", TwoCPUs)
    monkeypatch.setattr(TwoCPUs, "made", 0)
    return TwoCPUs


@pytest.mark.parametrize("name", ["ddpm", "edm"])
@pytest.mark.parametrize("conditional", [False, True])
def test_two_devices_make_the_images_of_one(
    two_cpus: type[TwoCPUs], name: str, conditional: bool
) -> None:
    net = tiny_network(T=T, in_ch=1, **({"num_classes": 3} if conditional else {}))
    networks = sampling_networks(net, WIDTHS)
    classes = Classes((0.5, 0.3, 0.2), guidance=2.0) if conditional else None
    common = {"sampler": sampler(name), "batch_size": 4, "classes": classes}
    steps, seen = timesteps(common["sampler"]), []
    one = generator(networks, **common).images(MIXED, 11)
    assert two_cpus.made == 0
    both = generator(networks, parallel=True, each_step=lambda: seen.append(1), **common)
    images = both.images(MIXED, 11)
    assert (images.int() - one.int()).abs().max() <= 1
    # Weights go to the devices once per batch, and not once per step.
    assert (two_cpus.made, len(seen)) == (3, 2 * 3 * len(steps))


@pytest.mark.parametrize("conditional", [False, True])
def test_two_devices_share_states(two_cpus: type[TwoCPUs], conditional: bool) -> None:
    classes = Classes((0.5, 0.5), guidance=2.0) if conditional else None
    common = {"classes": classes, "batch_size": 3}
    schedules, alone = schedules_of(6), evaluator(7, **common)
    together = evaluator(7, parallel=True, states=SharedStates(10**6), **common)
    found = scores_of(together, schedules)
    assert two_cpus.made == 3 * len(schedules)
    for i, schedule in enumerate(schedules):
        assert found[i].distance == alone.score(schedule)[0].distance
    assert sum(scores.passes_saved for scores in found.values()) > 0


# --- shared states --------------------------------------------------------------------------------


def schedules_of(count: int, parents: int = 3, seed: int = 0, skip: bool = False) -> list:
    """Single-point crossovers of a few parents, as a generation of the search has them."""
    random = np.random.default_rng(seed)
    values = (0.0, *WIDTHS) if skip else WIDTHS
    old = random.choice(values, (parents, T))
    old[:, 0] = 1.0  # no schedule leaves out everything
    made = []
    for _ in range(count):
        a, b = random.choice(parents, 2, replace=False)
        cut = random.integers(1, T)
        made.append([*old[a][:cut], *old[b][cut:]])
    return made


def scores_of(evaluator: Evaluator, schedules: Sequence) -> dict:
    scores = dict(evaluator.score_all(schedules))
    assert sorted(scores) == list(range(len(schedules)))
    return scores


class Watched(SharedStates):
    """Notes the most bytes ever held."""

    peak = 0

    def put(self, key: tuple, batch: int, x: Tensor) -> None:
        super().put(key, batch, x)
        held = sum(x.nbytes for parts in self._states.values() for x in parts.values())
        self.peak = max(self.peak, held)


DDPM, DDIM = {}, {"name": "ddim", "sample_steps": 6, "eta": 1.0}
HEUN = {"name": "edm", "sample_steps": 6, "S_churn": 5.0}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [*((each, kind) for each in (DDPM, DDIM, HEUN) for kind in ("all", "per step")),
     (DDPM, "skip"), (DDIM, "skip")],
)  # fmt: skip
def test_shared_states_change_nothing(settings: dict, kind: str) -> None:
    plain = evaluator(sampler=sampler(**settings), batch_size=3)
    assert kind != "skip" or plain.generator.sampler.skips
    schedules = schedules_of(8, skip=kind == "skip")
    schedules.append(schedules[3])
    if kind == "per step":
        steps = timesteps(plain.generator.sampler)
        schedules = [WidthSchedule([s[t] for t in steps], steps) for s in schedules]
    expected = [plain.score(schedule)[0] for schedule in schedules]
    for states in (0, 1, 3, 1000):
        memory = Watched(states * 8 * STATE + 17, torch.device("cpu") if states > 5 else None)
        sharing = plain.varied(states=memory)
        for _ in range(2):  # the second generation finds states of the first
            scores = scores_of(sharing, schedules)
            for i, alone in enumerate(expected):
                assert scores[i].distance == alone.distance
                assert scores[i].passes + scores[i].passes_saved == alone.passes
            assert (sum(s.passes_saved for s in scores.values()) > 0) == (states > 0)
            assert memory.peak <= memory.budget
        assert (memory.peak > 0) == (states > 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_generation_saves_a_quarter(seed: int) -> None:
    memory = Watched(100 * 2 * STATE)
    scores = scores_of(evaluator(2, states=memory), schedules_of(30, 4, seed)).values()
    saved = sum(s.passes_saved for s in scores)
    assert saved / (saved + sum(s.passes for s in scores)) >= 0.25
    assert memory.peak <= memory.budget


@pytest.mark.parametrize("states", [3, 10])
def test_generations_share_within_the_budget(states: int) -> None:
    memory, plain = Watched(states * 2 * STATE), evaluator(2)
    for seed in range(4):
        schedules = schedules_of(6, seed=seed, skip=seed % 2 == 1)
        scores = scores_of(plain.varied(states=memory), schedules)
        for i, schedule in enumerate(schedules[:2]):
            assert scores[i].distance == plain.score(schedule)[0].distance
    assert 0 < memory.peak <= memory.budget


def test_chains_of_one_prefix_share_all_of_it() -> None:
    """Two chains that differ at t = 2 alone: the later one runs t = 2, 1, 0 only."""
    second = [1.0, 1.0, 0.5, *[1.0] * (T - 3)]
    scores = scores_of(evaluator(states=SharedStates(10**6)), [[1.0] * T, second])
    assert sorted(s.passes for s in scores.values()) == [8 * 3, 8 * T]


def test_states_are_of_their_images_alone() -> None:
    """Another seed or sampler finds nothing of what was kept."""
    memory, schedule = SharedStates(10**6), [1.0] * T
    for more in ({"seed": 0}, {"seed": 1}, {"sampler": sampler("ddim")}):
        ((_, scores),) = evaluator(states=memory, **more).score_all([schedule])
        assert scores.passes_saved == 0
        assert scores.distance == evaluator(**more).score(schedule)[0].distance


# --- numbers that are not finite ------------------------------------------------------------------


class Overflowing(Cheap):
    """Overflows at timestep 5."""

    arithmetic = "float16"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1e38 if int(t[0]) == 5 else 1)


@pytest.mark.parametrize("name", ["ddpm", "edm", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("parallel", [False, True])
def test_numbers_that_are_not_finite(two_cpus: type[TwoCPUs], name: str, parallel: bool) -> None:
    """Whichever call made them: Heun's step from 6 calls the network at 5, too."""
    networks = {1.0: Cheap(1.0), 0.5: Overflowing(1e30)}
    overflowing = generator(networks, sampler=sampler(name), parallel=parallel)
    with pytest.raises(NotFiniteError, match=r"width 0\.5 .*timestep 5 in float16"):
        overflowing.images([0.5 if t == 5 else 1.0 for t in range(T)], 8)
    assert overflowing.images([1.0] * T, 8).shape == (8, *SHAPE)


def test_a_candidate_that_overflows_is_left_out() -> None:
    networks = {1.0: Cheap(1.0), 0.5: Overflowing(1e30)}
    scored = dict(evaluator(networks=networks).score_all([[1.0] * T, [0.5] * T, [1.0] * T]))
    assert isinstance(scored[1], NotFiniteError)
    assert scored[0].distance == scored[2].distance < 1e6


@pytest.mark.parametrize("calls", [1, 2])
def test_half_of_a_shared_state_is_forgotten(calls: int) -> None:
    """Where a chain ends by an overflow in its first batch, the next one has the same start."""
    networks = CHEAP | {0.5: Overflowing(1e30)}
    a, b = ([width if t == 5 else 1.0 for t in range(T)] for width in (0.5, 0.25))
    shared = evaluator(networks=networks, states=SharedStates(10**6), batch_size=4)
    if calls == 1:
        scored = dict(shared.score_all([a, b]))
    else:
        scored = {i: dict(shared.score_all([s]))[0] for i, s in enumerate((a, b))}
    assert isinstance(scored[0], NotFiniteError)
    assert scored[1].distance == evaluator(networks=networks, batch_size=4).score(b)[0].distance


def test_a_chain_that_ends_by_an_error_keeps_nothing_for_others() -> None:
    states = SharedStates(10**6)
    broken = evaluator(states=states, batch_size=4)
    broken.encoder = Mock(side_effect=OSError)
    with pytest.raises(OSError):  # noqa: PT011 - its own
        list(broken.score_all([[1.0] * T]))
    ((_, scores),) = evaluator(states=states, batch_size=4).score_all([[1.0] * T])
    assert scores.distance == evaluator(batch_size=4).score([1.0] * T)[0].distance


def test_a_sampler_that_overflows() -> None:
    """x̂_0 is more than float32 holds, of an answer that it holds."""
    huge = Cheap(0.0)
    huge.forward = lambda x, t: torch.full_like(x, 3e38)
    with pytest.raises(NotFiniteError, match="--sampler=ddpm"):
        generator({1.0: huge}).images([1.0] * T, 8)


# --- the program ----------------------------------------------------------------------------------

SAMPLE = [*TINY, "--logdir=run", "--num_images=10", "--batch_size=4"]
GENERATE = [*SAMPLE, "--generate", "--out=out"]


@pytest.fixture
def lively(run_folder: Path) -> Callable[..., None]:
    """Give the checkpoint in ./run weights that make images differ by width and class."""

    def write(factor: float = 1.0, **changes: object) -> None:
        state = checkpoint.load(run_folder / "ckpt.pt")
        state["settings"] |= changes
        state["ema_model"] = tiny_network(in_ch=1, **changes).state_dict()
        state["ema_model"]["head.weight"] *= factor
        checkpoint.save(run_folder / "ckpt.pt", state)

    write()
    return write


def made(*arguments: str) -> list[Path]:
    """The images that --generate makes with these arguments."""
    result = run_main(*GENERATE, *arguments)
    assert result.status == 0, result.err
    return sorted(Path("out").glob("0*.png"))


def grid_of(name: str, columns: int = 4) -> list[Tensor]:
    """The images in the grid that an evaluation saved."""
    picture = read_image(name)[:1]
    tiles = [picture[:, 2 + 10 * (i // columns) :, 2 + 10 * (i % columns) :] for i in range(10)]
    return [tile[:, :8, :8] for tile in tiles]


@pytest.mark.parametrize("kind", ["width", "schedule", "per step"])
def test_generated_images_are_those_of_evaluation(
    lively: Callable, run_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need neither statistics nor an encoder."""
    entries = {"schedule": [0.5] * 5 + [1] * 5, "per step": [1, 0.5, 0.25]}.get(kind)
    (run_folder / "search.txt").write_text(json.dumps(entries))
    flags = ["--sampler=edm", "--sample_steps=3"] if kind == "per step" else []
    if kind == "width":
        flags += ["--assigned_width=0.5"]
    else:
        flags += ["--schedule=run/search.txt"]
    mode, name = ("eval", "eval_width_0.5") if kind == "width" else ("eval_stepaware",) * 2
    result = run_main(*SAMPLE, f"--{mode}", *flags)
    assert result.status == 0, result.err
    shutil.rmtree("stats")

    def unwanted(*arguments: object) -> None:
        raise AssertionError("an encoder or statistics were asked for")

    monkeypatch.setattr("score.encoder", unwanted)
    monkeypatch.setattr("score.load_or_compute", unwanted)
    pictures = made(*flags)
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(10)]
    for path, expected in zip(pictures, grid_of(f"run/{name}.png"), strict=True):
        assert torch.equal(read_image(path), expected)
    assert not Path("stats").exists()
    about = json.loads(Path("out/images.json").read_text())
    scores = json.loads((run_folder / f"{name}.json").read_text())
    for key in ("sampler", "seed", "average_gflops", "full_width_gflops", "step"):
        assert about[key] == scores[key]
    assert about["schedule"] == (entries or [0.5] * 10)
    assert about["images"] == 10
    assert Path("out/grid.png").exists()


def test_generation_goes_on_and_refuses_other_images(
    lively: Callable, run_folder: Path, refused: Refused
) -> None:
    pictures = made()
    whole, times = contents(Path("out")), {path: path.stat().st_mtime_ns for path in pictures}
    for index in (1, 9):  # of the first batch of four, and of the last one of two
        pictures[index].unlink()
    assert made() == pictures
    assert contents(Path("out")) == whole
    again = [i for i, path in enumerate(pictures) if path.stat().st_mtime_ns != times[path]]
    assert again == [0, 1, 2, 3, 8, 9]
    (run_folder / "search.txt").write_text("[1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]")
    for key, flag in {
        "seed": "--seed=1", "schedule": "--schedule=run/search.txt", "sampler": "--sampler=ddim",
        "arithmetic": "--amp=fp16",
    }.items():  # fmt: skip
        refused(f"out/images.json.*{key}: .* --out", *GENERATE, flag)
    refused("--assigned_width", *GENERATE, "--schedule=run/search.txt", "--assigned_width=0.5")
    # Latents of as many channels as images have, which were decoded, but are not now.
    about = Path("out/images.json")
    about.write_text(json.dumps(json.loads(whole["images.json"]) | {"autoencoder": "abc"}))
    refused("out/images.json.*autoencoder: abc there, None here", *GENERATE)
    about.write_bytes(whole["images.json"])
    # More images are the same ones and others.
    assert len(made("--num_images=13")) == 13
    after = contents(Path("out"))
    assert all(after[path.name] == whole[path.name] for path in pictures[:8])
    assert json.loads(after["images.json"])["images"] == 13
    # Weights that are other ones, and images of which nothing is known.
    lively(1.1)
    refused("out/images.json.*weights", *GENERATE)
    Path("out/images.json").unlink()
    refused(r"000000\.png.*--out", *GENERATE)
    line = run_main(*GENERATE, "--logdir=none", "--out=none/images").error
    assert "none/ckpt.pt" in line
    assert not Path("none").exists()


def test_other_networks_of_the_same_weights(
    lively: Callable, run_folder: Path, refused: Refused
) -> None:
    """Nothing but flags says what a checkpoint without settings is."""
    path = run_folder / "search.txt"
    path.write_text(json.dumps([1.0] * 10))
    model = build.load_model(Configuration.of(logdir="run", device="cpu"))
    searched.write(run_folder, model, WidthSchedule([1.0] * 10))
    state = checkpoint.load(run_folder / "ckpt.pt")
    del state["settings"]
    checkpoint.save(run_folder / "ckpt.pt", state)
    first, about, flag = ["--num_images=1"], Path("out/images.json"), "--num_groups=8"
    made(*first)
    refused(r"out/images.json.*\(num_groups: 4 there, 8 here\)", *GENERATE, flag)
    said = json.loads(about.read_text())
    said.pop("num_groups")
    about.write_text(json.dumps(said))
    made(*first)  # an earlier version did not say it
    # A schedule that was searched for another of them is used, with a warning.
    result = run_main(*GENERATE, "--schedule=run/search.txt", flag, "--out=other")
    assert result.status == 0, result.err
    assert f"warning: run/search.txt was searched for another network: {flag} (there " in result.out


def test_generated_classes(lively: Callable) -> None:
    """Images have the classes that were asked for; the file says which."""
    lively(num_classes=10)
    made("--classes=3,5", "--guidance_scale=2")
    about = json.loads(Path("out/images.json").read_text())
    assert (about["classes"], about["guidance_scale"]) == ([3, 5], 2)
    line = run_main(*GENERATE, "--classes=3", "--guidance_scale=2").error
    assert "classes: [3, 5] there, [3] here" in line
    first = read_image("out/000000.png"), read_image("out/000001.png")
    shutil.rmtree("out")
    made("--classes=3", "--guidance_scale=2")
    assert torch.equal(read_image("out/000000.png"), first[0])
    assert not torch.equal(read_image("out/000001.png"), first[1])


def test_a_network_that_overflows_is_one_line(lively: Callable) -> None:
    """In half precision, for numbers that single precision holds; then the same folder serves."""
    lively(1e6)
    for mode in ("--eval", "--generate"):
        line = run_main(*SAMPLE, mode, "--out=out", "--amp=fp16", "--assigned_width=0.5").error
        assert "width 0.5" in line
        assert "timestep 9 in float16" in line
        assert "--amp" in line
    assert not list(Path("out").glob("*.png"))
    assert not Path("run/eval_width_0.5.json").exists()
    search = ["--search", "--amp=fp16", "--num_generation=1", "--pop_size=4", "--fid_cache=s.npz"]
    assert "no candidate has a distance" in run_main(*SAMPLE, *search).error
    assert len(made("--assigned_width=0.5")) == 10


def test_the_page_for_python(run_folder: Path) -> None:
    """docs/python.md, from top to bottom."""
    Path("logs").mkdir()
    run_folder.rename("logs/digits")
    result = run_main(
        *TINY, "--search", "--logdir=logs/digits", "--sampler=ddim", "--sample_steps=10",
        "--num_images=4", "--num_generation=1", "--pop_size=3",
    )  # fmt: skip
    assert result.status == 0, result.err
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert names["x_0"].shape == (4, 1, 8, 8)
    assert names["images"].dtype == torch.uint8
    assert names["scores"].images == 64


def test_options_that_do_nothing_are_said(run_folder: Path) -> None:
    generate = [*TINY, "--logdir=run", "--generate", "--num_images=1"]
    for sampler, heeded, idle in (
        ("ddpm", "--var_type=fixedsmall", "--eta=1"),
        ("ddim", "--eta=1", "--var_type=fixedsmall"),
        ("edm", "--rho=5", "--eta=1"),
        ("dpm_solver", "--eta=1", "--rho=5"),
    ):
        said = run_main(*generate, f"--sampler={sampler}", heeded, idle, f"--out={sampler}").out
        assert f"{idle.partition('=')[0]}: no effect with --sampler={sampler}\n" in said
    Path("flags.txt").write_text("--eta=1\n")  # a flagfile serves several samplers
    quiet = run_main(*generate, "--flagfile=flags.txt", "--sampler=ddpm", "--out=quiet")
    assert "no effect" not in quiet.out
    said = run_main(*generate, "--sampler=ddpm", "--sigma_data=0.7", "--out=levels")
    assert "--sigma_data" in said.out + said.err


def test_what_a_checkpoint_says_of_its_training_is_held_against_the_flags(run_folder: Path) -> None:
    generate = [*TINY, "--logdir=run", "--generate", "--num_images=2"]

    def said(out: str, *flags: str) -> Result:
        return run_main(*generate, f"--out={out}", *flags)

    assert "warning" not in said("trained", "--assigned_width=0.75").out
    state = torch.load("run/ckpt.pt", weights_only=True)
    state["settings"]["candidate_width"] = [0.5]
    torch.save(state, "run/ckpt.pt")
    warning = "warning: the training of run/ckpt.pt was at 0.25, 0.5, 1, not at width 0.75"
    assert warning in said("untrained", "--assigned_width=0.75").out
    # Of a file without settings the flags are believed, but for what its x_T shows.
    del state["settings"]
    torch.save(state, "run/ckpt.pt")
    believed = said("believed", "--assigned_width=0.75")
    assert "are believed" in believed.out
    assert "warning" not in believed.out
    assert "--img_size" in said("larger", "--img_size=16").err
