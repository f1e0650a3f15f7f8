"""Class-conditional networks: the embedding, guidance in every sampler, which classes are asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, fill_by_recipe, run_main
from PIL import Image
from torch import Tensor

import dataset
from diffusion import NoiseSchedule
from model import Condition, SlimmableUNet, StepAwareDenoiser, checkpoint, sampling_networks
from runtime.errors import UserError
from sampling.conditioning import Classes, parse
from sampling.noise import SAMPLING, ImageNoise
from sampling.samplers import make_sampler
from settings import SamplingSettings

Refused = Callable[..., str]
SETTINGS = dict(
    T=10, ch=16, ch_mult=(1, 2), attn=(1,), num_res_blocks=1, dropout=0.1, num_groups=4, in_ch=1
)
CPU = torch.device("cpu")


def network(num_classes: int = 3) -> SlimmableUNet:
    torch.manual_seed(0)
    return SlimmableUNet(**SETTINGS, num_classes=num_classes)


# --- the network ----------------------------------------------------------------------------------


def test_without_classes_nothing_is_new() -> None:
    plain, with_classes = network(0).state_dict(), network(3).state_dict()
    assert not [name for name in plain if "class" in name]
    extra = {"class_embedding.weight", "class_embedding.frequencies"}
    assert with_classes.keys() - plain.keys() == extra
    assert all(torch.equal(plain[name], with_classes[name]) for name in plain)
    assert with_classes["class_embedding.weight"].shape == (4, 64)


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
def test_subnet_is_the_slice(width: float) -> None:
    net = fill_by_recipe(network())
    subnet = net.subnet(width)
    x, t = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    labels = torch.arange(8) % 4
    expected = net(x, t, width, labels)
    torch.testing.assert_close(subnet(x, t, labels=labels), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(subnet(x, t), net(x, t, width), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected[0], net(x, t, width, (labels + 1) % 4)[0], atol=1e-3)
    nothing = torch.full((8,), 3)
    torch.testing.assert_close(net(x, t, width, nothing), net(x, t, width))


def test_a_narrow_width_uses_the_leading_columns_alone() -> None:
    net = fill_by_recipe(network())
    x, t, labels = torch.randn(2, 1, 8, 8), torch.zeros(2).long(), torch.tensor([0, 1])
    before = net(x, t, 0.5, labels)
    with torch.no_grad():
        net.class_embedding.weight[:, 32:] = 99
    assert torch.equal(net(x, t, 0.5, labels), before)
    assert not torch.equal(net(x, t, 1.0, labels), before)
    table = net.class_embedding.weight
    assert net.parameter_count(1.0) - network(0).parameter_count(1.0) == table.numel()
    assert net.parameter_count(0.5) - network(0).parameter_count(0.5) == table.numel() // 2


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_candidates_take_labels(arithmetic: str) -> None:
    net = fill_by_recipe(network())
    candidate = sampling_networks(net, [0.5], arithmetic)[0.5]
    x, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 4), torch.tensor([2, 0, 1])
    expected = net(x, t, 0.5, labels).detach()
    tolerance = 0.1 * float(expected.abs().max()) if arithmetic == "bfloat16" else 1e-4
    torch.testing.assert_close(candidate(x, t, labels), expected, atol=tolerance, rtol=0)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "calls"), [(0.0, [2]), (1.0, [2]), (2.5, [4])])
def test_guidance_by_hand(guidance: float, calls: list[int]) -> None:
    net = fill_by_recipe(network()).subnet(1.0)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 2])
    batches = []

    def counted(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        batches.append(len(x))
        return net(x, t, labels=labels)

    found = Condition(labels, 3, guidance).ask(counted, x, t)
    with_class, without = net(x, t, labels=labels), net(x, t)
    expected = without + guidance * (with_class - without)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert batches == calls
    assert Classes((0.5, 0.5), guidance).passes == calls[0] // 2


SAMPLERS = ("ddpm", "ddim", "edm", "dpm_solver", "HeunDiscreteScheduler", "DDPMScheduler")


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_at_what_guidance_asks_for(name: str, guidance: float) -> None:
    """Where each class is one point m and no class is 0, x̂_0 is guidance·m at every step."""
    levels, points = NoiseSchedule(1e-3, 0.2, 50), torch.tensor([0.3, -0.2, 0.0])

    def ideal(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        abar = torch.from_numpy(levels.alpha_bars)[t].view(-1, 1, 1, 1).to(x)
        return (x - abar.sqrt() * points[labels].view(-1, 1, 1, 1)) / (1 - abar).sqrt()

    labels = torch.tensor([0, 1, 1])
    denoise = StepAwareDenoiser({1.0: ideal}, [1.0] * 50, 50, CPU, Condition(labels, 2, guidance))
    noise = ImageNoise(0, SAMPLING, torch.arange(3), (1, 4, 4))
    settings = SamplingSettings(sampler=name, sample_steps=8, var_type="fixedsmall")
    x_0 = make_sampler(settings, levels, "epsilon").sample(denoise, noise.initial(), noise)
    expected = guidance * points[labels].view(-1, 1, 1, 1).expand_as(x_0)
    torch.testing.assert_close(x_0, expected, atol=2e-3, rtol=0)


# --- which classes --------------------------------------------------------------------------------


def test_labels_are_a_function_of_seed_and_index() -> None:
    classes = Classes((0.5, 0.3, 0.2), seed=7)
    everyone = classes.labels(torch.arange(20000))
    assert torch.equal(classes.labels(torch.arange(100, 120)), everyone[100:120])
    shares = torch.bincount(everyone).double() / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.015, rtol=0)
    assert not torch.equal(Classes((0.5, 0.3, 0.2), seed=8).labels(torch.arange(99)), everyone[:99])
    assert set(Classes((0.0, 1.0, 0.0)).labels(torch.arange(1000)).tolist()) == {1}


def test_classes_that_are_asked_for() -> None:
    assert parse("3,5") == (3, 5)
    assert parse("") == ()
    with pytest.raises(UserError, match="--classes=3,x"):
        parse("3,x")
    classes = Classes((0.1,) * 10, fixed=(3, 5))
    assert classes.labels(torch.arange(4, 9)).tolist() == [3, 5, 3, 5, 3]
    with pytest.raises(UserError, match="no class 10; the network has 0 to 9"):
        Classes((0.1,) * 10, fixed=(3, 10))


@pytest.mark.parametrize(
    ("count", "images", "columns", "first"),
    [(10, 64, 6, [0] * 6 + [1]), (3, 9, 3, [0, 0, 0, 1]), (1000, 16, 4, [0, 0, 0, 0, 1])],
)
def test_grids_have_a_class_in_each_row(
    count: int, images: int, columns: int, first: list[int]
) -> None:
    classes, across = Classes((1 / count,) * count).in_rows(images)
    assert across == columns
    assert classes.labels(torch.arange(images)).tolist()[: len(first)] == first


# --- the program ----------------------------------------------------------------------------------

CONDITIONAL = [*TRAIN, "--num_classes=10", "--logdir=run", "--sample_size=20"]
EVAL = ["--logdir=run", "--device=cpu", "--num_images=20", "--batch_size=20", "--T=10"]
EVAL += ["--fid_encoder=pixels", "--fid_cache=stats.npz"]


def table(path: Path) -> Tensor:
    return checkpoint.load(path)["net_model"]["class_embedding.weight"]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional supernet, trained in two parts."""
    folder = tmp_path_factory.mktemp("conditional")
    for steps in (3, 6):
        result = run_main(*CONDITIONAL, f"--logdir={folder}", f"--total_steps={steps}",
                          "--guidance_scale=2")  # fmt: skip
        assert result.status == 0, result.err
    return folder


@pytest.fixture
def run_conditional(conditional: Path, here: Path) -> Path:
    (here / "run").mkdir()
    (here / "run" / "ckpt.pt").write_bytes((conditional / "ckpt.pt").read_bytes())
    return here / "run"


def test_training(conditional: Path, here: Path) -> None:
    """Resumed, it makes the same steps; the rows that no image is told by do not move."""
    assert run_main(*CONDITIONAL, "--sample_step=0").status == 0
    ours, theirs = (checkpoint.load(f / "ckpt.pt") for f in (here / "run", conditional))
    for name, value in ours["ema_model"].items():
        assert torch.equal(value, theirs["ema_model"][name]), name
    frequencies = ours["net_model"]["class_embedding.frequencies"]
    expected = torch.bincount(dataset.load("digits", ".", 8).labels) / 1797
    torch.testing.assert_close(frequencies, expected)
    assert ours["settings"]["num_classes"] == 10
    for share, silent in ((0.0, [10]), (1.0, [*range(10)])):
        logdir = here / f"dropped_{share:g}"
        more = [f"--label_dropout={share}", "--sample_step=0", "--save_step=1", "--total_steps=3"]
        assert run_main(*CONDITIONAL, *more, f"--logdir={logdir}").status == 0
        moved = (table(logdir / "ckpt_1.pt") != table(logdir / "ckpt_3.pt")).any(1)
        assert not moved[silent].any()
        assert moved.any()


def test_guided_runs(run_conditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs count both passes; images do not depend on the batch; a search and what it is used
    with have the same guidance."""
    monkeypatch.setattr("report.draw_front", lambda folder, front: None)
    monkeypatch.setattr("report.SearchProgress.pictures", lambda self: None)
    monkeypatch.setattr("report.plot_fronts", lambda *arguments: None)
    results = {}
    for name, more in {
        "plain": [], "guided": ["--guidance_scale=2"], "some": ["--classes=3,5"],
        "edm": ["--guidance_scale=2", "--sampler=edm", "--sample_steps=4"],
        "batch": ["--guidance_scale=2", "--batch_size=7"],
    }.items():  # fmt: skip
        result = run_main(*EVAL, "--eval", *more)
        assert result.status == 0, result.err
        results[name] = json.loads((run_conditional / "eval.json").read_text())
    plain, guided = results["plain"], results["guided"]
    assert guided["average_gflops"] == pytest.approx(2 * plain["average_gflops"])
    assert (guided["passes"], plain["passes"]) == (400, 200)
    assert results["edm"]["passes"] == 2 * 20 * 7
    assert guided["distance"] != plain["distance"]
    assert guided["distance"] == pytest.approx(results["batch"]["distance"], rel=1e-3)
    assert (plain["classes"], plain["guidance_scale"]) == ("as in the training set", 1)
    assert results["some"]["classes"] == [3, 5]
    search = [*EVAL, "--search", "--num_generation=2", "--pop_size=4"]
    for arguments in ([*search, "--guidance_scale=2"],
                      [*EVAL, "--eval_stepaware", "--guidance_scale=2"]):  # fmt: skip
        result = run_main(*arguments)
        assert result.status == 0, result.err
    assert "guidance_scale" in run_main(*search).error
    line = run_main(*EVAL, "--eval", "--dry_run", "--guidance_scale=2").out
    assert "400 network passes" in line
    assert "two passes" in run_main(*EVAL, "--profile", "--guidance_scale=2").out


# --- what is refused ------------------------------------------------------------------------------


def test_network_without_classes(refused: Refused, run_folder: Path) -> None:
    for argument in ("--guidance_scale=2.0", "--classes=3"):
        refused(f"{argument}: the network has no classes", *EVAL, "--eval", argument)
    refused("--num_classes: 0 there, 10 here", *EVAL, "--eval", "--num_classes=10")


def test_network_with_classes(refused: Refused, run_conditional: Path) -> None:
    for argument, match in {
        "--classes=3,10": "there is no class 10; the network has 0 to 9",
        "--classes=cat": "--classes=cat",
        "--guidance_scale=-1": "--guidance_scale=-1.0",
        "--guidance_scale=nan": "--guidance_scale=nan",
        "--num_classes=3": "--num_classes: 10 there, 3 here",
    }.items():
        refused(match, *EVAL, "--eval", argument)


def test_guidance_needs_a_null_class(refused: Refused, run_conditional: Path, here: Path) -> None:
    """The checkpoint says whether its network ever saw images without a class."""
    state = checkpoint.load(run_conditional / "ckpt.pt")
    state["settings"]["label_dropout"] = 0.0
    checkpoint.save(here / "never" / "ckpt.pt", state)
    del state["settings"]["label_dropout"]
    checkpoint.save(here / "unknown" / "ckpt.pt", state)
    guided = ["--guidance_scale=2", "--label_dropout=0.1"]
    refused("--guidance_scale=2.0.*never/ckpt.pt", *EVAL, "--eval", *guided, "--logdir=never")
    both = [*EVAL, "--eval_ensemble", "--large_logdir=run", "--small_ch=16", "--start=7"]
    turned = [*both, "--small_logdir=run", "--start=1", "--end=7"]
    refused("--end=7, --start=1", *turned)  # the small network would have no turn
    refused("--guidance_scale=2.0.*never/ckpt.pt", *both, *guided, "--small_logdir=never")
    for source in ("run", "unknown"):  # --dry_run asks for the classes, too
        result = run_main(*EVAL, "--eval", *guided, f"--logdir={source}", "--dry_run")
        assert result.status == 0, result.err


def test_an_ensemble_has_the_same_classes(
    refused: Refused, run_conditional: Path, here: Path
) -> None:
    state = checkpoint.load(run_conditional / "ckpt.pt")
    for folder, names in (("run", "abcdefghij"), ("other", "jihgfedcba")):
        state["settings"]["class_names"] = [*names]
        checkpoint.save(here / folder / "ckpt.pt", state)
    both = [*EVAL, "--eval_ensemble", "--large_logdir=run", "--small_ch=16"]
    refused("cannot take turns.*classes", *both, "--small_logdir=other")


def test_mistakes_in_training(refused: Refused, here: Path) -> None:
    for arguments, match in (
        (["--num_classes=3"], "--num_classes=3: --dataset=digits has 10 classes"),
        (["--num_classes=-1"], "--num_classes=-1"),
        (["--num_classes=10", "--label_dropout=2"], "--label_dropout=2.0"),
        (["--guidance_scale=2"], "no classes"),
        (["--num_classes=10", "--label_dropout=0", "--guidance_scale=2"], "--guidance_scale=2"),
    ):
        refused(match, *TRAIN, "--logdir=run", *arguments)
    (here / "photos").mkdir()
    Image.new("L", (8, 8)).save(here / "photos" / "a.png")
    where = ["--dataset=image_folder", "--data_root=photos", "--num_classes=2"]
    refused("--dataset=image_folder has no classes", *TRAIN, "--logdir=run", *where)
