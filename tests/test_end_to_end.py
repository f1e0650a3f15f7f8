"""One small run through every command, as a user would make it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, run_main
from PIL import Image

import score
from model import SlimmableUNet


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a supernet and a small plain network, search, and evaluate in all ways."""
    folder = tmp_path_factory.mktemp("work")
    use = ["--flagfile=large/flagfile.txt", "--notrain", "--num_images=70", "--batch_size=35"]
    use += ["--fid_cache=stats.npz"]
    few = ["--num_generation=3", "--pop_size=6", "--mutation_prob=0.2", "--macs_weight=0.1"]
    pair = ["--large_logdir=large", "--small_logdir=small", "--small_ch=8", "--start=6", "--end=1"]
    small = ["--noslimmable_unet", "--nosandwich", "--ch=8"]
    commands = [
        [*TRAIN, "--logdir=large", "--total_steps=20", "--save_step=10"],
        [*TRAIN, "--logdir=small", *small],
        [*use, "--search", *few],
        [*use, "--eval"],
        [*use, "--eval", "--assigned_width=0.5"],
        [*use, "--eval_stepaware", "-parallel"],
        [*use, "--eval_ensemble", *pair],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in commands:
            result = run_main(*arguments)
            assert result.status == 0, (arguments, result.out, result.err)
    return folder


def read(work: Path, name: str) -> dict:
    return json.loads((work / "large" / f"{name}.json").read_text())


def flops(width: float, ch: int = 16) -> float:
    with torch.device("meta"):
        net = SlimmableUNet(10, ch, (1, 2), (1,), 1, 0.1, num_groups=4, in_ch=1)
    return score.flops(net, width, (1, 8, 8)) / 1e9


NAMES = ("eval", "eval_width_0.5", "eval_stepaware", "eval_ensemble")


@pytest.mark.parametrize("name", NAMES)
def test_results(work: Path, name: str) -> None:
    found = read(work, name)
    assert found["mode"] == name
    assert found["distance"] > 0
    assert found["label"] == "Fréchet distance (pixels)"
    assert found["inception_score"] is None
    assert found["images"] == 70
    assert found["step"] == 20
    assert found["images_per_second"] > 0
    assert found["full_width_gflops"] == pytest.approx(flops(1.0))
    assert found["saving"] == pytest.approx(
        1 - found["average_gflops"] / found["full_width_gflops"]
    )
    with Image.open(work / "large" / f"{name}.png") as grid:
        assert grid.size == (9 * 10 + 2, 8 * 10 + 2)  # 70 images in rows of nine
        assert len(set(grid.convert("L").tobytes())) > 10


def test_flops_are_those_of_what_ran(work: Path) -> None:
    assert read(work, "eval")["saving"] == 0
    assert read(work, "eval_width_0.5")["average_gflops"] == pytest.approx(flops(0.5))
    stepaware = read(work, "eval_stepaware")
    schedule = json.loads((work / "large" / "search.txt").read_text())
    assert stepaware["schedule"] == schedule
    assert len(schedule) == 10
    assert stepaware["average_gflops"] == pytest.approx(sum(map(flops, schedule)) / 10)
    # Timesteps 2 to 5 of ten are the small network's.
    expected = 0.6 * flops(1.0) + 0.4 * flops(1.0, ch=8)
    assert read(work, "eval_ensemble")["average_gflops"] == pytest.approx(expected)


def test_the_same_schedule_is_the_same_score(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    Path("ones.txt").write_text(json.dumps([1] * 10))
    use = ["--flagfile=large/flagfile.txt", "--num_images=70", "--batch_size=35"]
    use += ["--fid_cache=stats.npz", "--schedule=ones.txt"]
    before = read(work, "eval_stepaware")
    path = work / "large" / "eval_stepaware.json"
    text = path.read_bytes()
    result = run_main(*use, "--eval_stepaware")
    assert result.status == 0, result.err
    again = read(work, "eval_stepaware")
    path.write_bytes(text)
    assert again["distance"] == read(work, "eval")["distance"]
    assert again["saving"] == 0
    assert before["schedule"] != again["schedule"]


def test_nothing_is_left_over(work: Path) -> None:
    assert not [path for path in work.rglob("*") if ".tmp" in path.name]
    assert {path.name for path in work.iterdir()} <= {"large", "small", "stats.npz", "ones.txt"}
