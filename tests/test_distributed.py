"""Two processes under torchrun: the same results as one, clear endings, nothing lost."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KERNELS, ROOT, TINY, TRAIN, Result, run_main
from PIL import Image
from test_latents import write_autoencoder

from model import checkpoint
from runtime import files
from runtime import processes as distributed

EVAL = [*TINY, "--num_images=24", "--batch_size=6", "--fid_cache=stats.npz"]
SEARCH = [
    *EVAL, "--search", "--search_objective=pareto", "--sampler=ddim", "--sample_steps=5",
    "--num_generation=2", "--mutation_prob=0.2",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    """`torchrun --nproc_per_node=2 main.py ARGUMENTS` in `folder`."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            f"--master_port={free_port()}", str(ROOT / "main.py"), *map(str, arguments),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> Result:
    out, err = process.communicate(timeout=100)
    return Result(process.returncode, out, err)


def two(folder: Path, *arguments: object) -> Result:
    result = finish(start(folder, *arguments))
    assert result.status == 0, result.err
    return result


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id of torchrun's two workers."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                rank = next(v for v in variables if v.startswith(b"RANK="))
                found[int(rank.removeprefix(b"RANK="))] = int(status.parent.name)
        except (OSError, StopIteration):
            continue
    return found


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(600):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    if not path.exists():
        process.kill()
        pytest.fail(f"{path.name} did not appear: {finish(process).err}")


def test_alone_there_is_nothing_to_do() -> None:
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("mine") == ["mine"]
    assert distributed.first_to_speak()
    with distributed.group(torch.device("cpu")):
        assert distributed.world() == 1


def test_training_has_the_same_loss_curve(here: Path) -> None:
    dropout = 0.3 if KERNELS else 0  # torch's own drops other channels in each process
    tmp_path, train = here, [*TRAIN, f"--dropout={dropout}", "--sample_size=5"]
    assert run_main(*train, "--logdir=one").status == 0
    result = two(tmp_path, *train, "--logdir=two")
    one, both = (records(tmp_path / name / "train.jsonl") for name in ("one", "two"))
    assert [r["step"] for r in both] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(one, both, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
    one, both = (checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    for name, value in one["ema_model"].items():
        # Adam's first steps divide by tiny gradients, so single weights may part by a step.
        torch.testing.assert_close(both["ema_model"][name], value, rtol=0, atol=2e-3)
    for width in ("1", "0.25"):  # drawn by both processes, three images and two
        left, right = (
            np.asarray(Image.open(tmp_path / name / "sample" / f"6_width_{width}.png"), float)
            for name in ("one", "two")
        )
        assert left.shape == right.shape
        assert np.abs(left - right).mean() < 2
    bars = {
        line.split("|")[0] for line in result.err.replace("\r", "\n").split("\n") if "|" in line
    }
    assert len({bar for bar in bars if bar.startswith("train: 100%")}) == 1


def test_evaluation_has_the_same_images_and_distance(run_folder: Path) -> None:
    here = run_folder.parent
    found, pictures, said, statistics = [], [], [], []
    (here / "stats.npz").unlink(missing_ok=True)
    for run in (run_main, functools.partial(two, here)):
        said.append(run(*EVAL, "--eval", "--logdir=run").out)
        found.append(json.loads((run_folder / "eval.json").read_text()))
        pictures.append((run_folder / "eval.png").read_bytes())
        statistics.append(dict(np.load(here / "stats.npz")))
        (here / "stats.npz").unlink()
    for key in ("mu", "sigma", "count"):
        np.testing.assert_allclose(statistics[1][key], statistics[0][key], rtol=1e-9, atol=1e-12)
    assert not list(here.glob(".stats*"))
    assert found[1]["distance"] == pytest.approx(found[0]["distance"], rel=1e-9)
    assert pictures[0] == pictures[1]
    assert found[1]["passes"] == found[0]["passes"] == 24 * 10
    assert said[1].count("Fréchet") == said[0].count("Fréchet") > 0


def test_latents_are_the_same(here: Path) -> None:
    write_autoencoder(here / "vae")
    train = [*TRAIN, "--img_size=16", "--latent_vae=vae", "--total_steps=1", "--sample_step=0"]
    assert run_main(*train, "--latent_cache=one.npy", "--logdir=one").status == 0
    two(here, *train, "--latent_cache=two.npy", "--logdir=two")
    one, both = (np.load(here / f"{name}.npy").astype(float) for name in ("one", "two"))
    np.testing.assert_allclose(both, one, atol=2e-3, rtol=2e-3)
    assert sorted(p.name for p in here.glob("*two.*")) == ["two.npy", "two.npy.json"]
    assert not list(here.glob(".*.npy"))


@pytest.mark.parametrize(
    "method",
    [["--pop_size=5"], ["--search_method=sensitivity", "--pop_size=3", "--num_segments=2"]],
    ids=["evolution", "sensitivity"],
)
def test_search_finds_the_same(run_folder: Path, method: list[str]) -> None:
    """Processes share an odd number of schedules in the first generation."""
    here = run_folder.parent
    for name, run in (("one", run_main), ("both", functools.partial(two, here))):
        result = run(*SEARCH, *method, "--logdir=run", f"--search_dir={name}")
        assert result.status == 0, result.err
    one, both = (
        {
            (r["generation"], r["rung"], str(r["schedule"])): r
            for r in records(here / name / "search.jsonl")[1:]
        }
        for name in ("one", "both")
    )
    assert one.keys() == both.keys()
    for key, record in one.items():
        assert both[key]["distance"] == pytest.approx(record["distance"], rel=1e-7)
    assert (here / "one" / "search.txt").read_text() == (here / "both" / "search.txt").read_text()


def test_an_error_is_said_once(run_folder: Path) -> None:
    """Both processes find it, or one does while the other waits."""
    for flags in (
        ["--train", "--batch_size=9", "--logdir=new"],
        ["--eval", "--logdir=run", "--fid_cache=run/ckpt.pt/none.npz"],
    ):
        begun = time.monotonic()
        result = finish(start(run_folder.parent, *TINY, *flags))
        assert result.status == 1  # torchrun's own
        lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.err
        assert "exitcode  : 2" in result.err
        assert time.monotonic() - begun < 60


def test_a_process_that_dies_takes_the_job_down(tmp_path: Path) -> None:
    train = [*TRAIN, "--total_steps=100000", "--sample_step=0", "--logdir=run"]
    process = start(tmp_path, *train)
    wait_for(tmp_path / "run" / "ckpt.pt", process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    begun = time.monotonic()
    result = finish(process)
    assert time.monotonic() - begun < 60
    assert result.status != 0
    assert "rank      : 1" in result.err
    assert "-9" in result.err
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"]
    more = [f"--total_steps={saved + 3}"]
    two(tmp_path, *train, *more)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"] == saved + 3


def test_without_torchrun_the_processes_end(tmp_path: Path) -> None:
    train = [*TRAIN, "--total_steps=100000", "--sample_step=0", "--logdir=run"]
    process = start(tmp_path, *train)
    wait_for(tmp_path / "run" / "ckpt.pt", process)
    workers = ranks(process).values()
    process.kill()
    process.communicate(timeout=60)  # they hold its pipes until they end
    stats = [path for worker in workers if (path := Path(f"/proc/{worker}/stat")).exists()]
    assert all(path.read_text().rpartition(")")[2].split()[0] == "Z" for path in stats)
    with files.alone_in(tmp_path / "run", wait=False):
        assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"] > 0


def test_sigterm_saves(tmp_path: Path) -> None:
    train = [*TRAIN, "--total_steps=100000", "--save_step=100000", "--sample_step=0"]
    process = start(tmp_path, *train, "--logdir=run")
    wait_for(tmp_path / "run" / "train.jsonl", process)
    for _ in range(600):
        if (tmp_path / "run" / "train.jsonl").read_text():
            break
        time.sleep(0.1)
    process.terminate()
    result = finish(process)
    assert result.out.count("stopped and saved at step") == 1, result.err
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"] > 0
