"""Two processes under torchrun: the same results as one, clear endings, nothing lost."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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

KEPT = 0.3 if KERNELS else 0  # torch's own dropout drops other channels in each process
LEARN = [*TRAIN, f"--dropout={KEPT}", "--sample_size=5", "--logdir=new"]
ENCODE = [
    *TRAIN, "--img_size=16", "--latent_vae=vae", "--latent_cache=latents.npy", "--total_steps=1",
    "--sample_step=0", "--logdir=latents",
]  # fmt: skip
EVAL = [*TINY, "--num_images=24", "--batch_size=6", "--fid_cache=stats.npz", "--logdir=run"]
SEARCH = [
    *EVAL, "--search", "--search_objective=pareto", "--sampler=ddim", "--sample_steps=5",
    "--num_generation=2", "--mutation_prob=0.2",
]  # fmt: skip
METHODS = {  # in the first generation processes share an odd number of schedules
    "evolution": ["--pop_size=5"],
    "sensitivity": ["--search_method=sensitivity", "--pop_size=3", "--num_segments=2"],
}
JOBS = {
    "train": [*LEARN, "--total_steps=4"],
    "resume": LEARN,
    "latents": ENCODE,
    "eval": [*EVAL, "--eval"],
    **{name: [*SEARCH, *flags, f"--search_dir={name}"] for name, flags in METHODS.items()},
    # Last: by both processes, whose group then stays.
    "refused": [*TRAIN, "--batch_size=9", "--total_steps=1", "--sample_step=0", "--logdir=none"],
}
# Run JOBS, each as a group of its own: torchrun's variables, but for a port for each.
PROCESS = """
import json, os, sys
from conftest import run_main
done = []
for port, arguments in zip(*map(json.loads, sys.argv[1:])):
    os.environ["MASTER_PORT"] = str(port)
    done.append(vars(run_main(*arguments)))
print(json.dumps(done))
"""


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


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


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


def test_two_processes_do_what_one_does(here: Path, trained: Path) -> None:
    """Training, stopped and continued; latents; statistics, images and distances; searches."""
    for name in ("one", "two"):
        shutil.copytree(trained, here / name / "run")
        write_autoencoder(here / name / "vae")
    ports = json.dumps([free_port() for _ in JOBS])
    command = [sys.executable, "-c", PROCESS, ports, json.dumps([*JOBS.values()])]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    group = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    running = [
        subprocess.Popen(
            command, cwd=here / "two", stdout=subprocess.PIPE, text=True,
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]  # fmt: skip
    os.chdir(here / "one")
    alone = {name: run_main(*flags) for name, flags in JOBS.items()}
    os.chdir(here)
    said = [json.loads(process.communicate(timeout=100)[0]) for process in running]
    both = {
        name: [Result(**each) for each in results]
        for name, results in zip(JOBS, zip(*said, strict=True), strict=True)
    }
    for name, results in both.items():
        expected = {2} if name == "refused" else {0}
        assert {r.status for r in results} == expected, results
        assert alone[name].status == 0, alone[name]
    assert sum(r.err.count("error: ") for r in both["refused"]) == 1

    def pair(path: str, read: Callable) -> tuple:
        return read(here / "one" / path), read(here / "two" / path)

    one, two = pair("new/train.jsonl", records)
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)
    one, two = pair("new/ckpt.pt", checkpoint.load)
    for name, value in one["ema_model"].items():
        # Adam's first steps divide by tiny gradients, so single weights may part by a step.
        torch.testing.assert_close(two["ema_model"][name], value, rtol=0, atol=2e-3)
    for width in ("1", "0.25"):  # drawn by both processes, three images and two
        one, two = pair(f"new/sample/6_width_{width}.png", picture)
        assert one.shape == two.shape
        assert np.abs(one - two).mean() < 2
    bars = re.split(r"[\r\n]", "".join(r.err for r in both["resume"]))
    assert len({bar for bar in bars if bar.startswith("train: 100%")}) == 1

    one, two = pair("latents.npy", np.load)
    np.testing.assert_allclose(two.astype(float), one.astype(float), atol=2e-3, rtol=2e-3)
    assert sorted(p.name for p in (here / "two").glob("latents.*")) == [
        "latents.npy", "latents.npy.json",
    ]  # fmt: skip
    assert not list((here / "two").glob(".*.npy"))

    one, two = pair("stats.npz", lambda path: dict(np.load(path)))
    for key in ("mu", "sigma", "count"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-9, atol=1e-12)
    assert not list((here / "two").glob(".stats*"))
    one, two = pair("run/eval.json", lambda path: json.loads(path.read_text()))
    assert two["distance"] == pytest.approx(one["distance"], rel=1e-9)
    assert two["passes"] == one["passes"] == 24 * 10
    one, two = pair("run/eval.png", Path.read_bytes)
    assert one == two
    said_alone, *said_both = (r.out.count("Fréchet") for r in (alone["eval"], *both["eval"]))
    assert said_both == [said_alone, 0] != [0, 0]

    for name in METHODS:
        one, two = pair(f"{name}/search.jsonl", records)
        one, two = (
            {(r["generation"], r["rung"], str(r["schedule"])): r for r in log[1:]}
            for log in (one, two)
        )
        assert one.keys() == two.keys()
        for key, record in one.items():
            assert two[key]["distance"] == pytest.approx(record["distance"], rel=1e-7)
        one, two = pair(f"{name}/search.txt", Path.read_text)
        assert one == two


def test_an_error_of_one_process_ends_both_and_is_said_once(run_folder: Path) -> None:
    flags = [*TINY, "--eval", "--logdir=run", "--fid_cache=run/ckpt.pt/none.npz"]
    result = finish(start(run_folder.parent, *flags))
    assert result.status == 1  # torchrun's own
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert "exitcode  : 2" in result.err


def test_a_process_that_dies_takes_the_job_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [*TRAIN, "--total_steps=100000", "--sample_step=0", "--logdir=run"]
    process = start(tmp_path, *train)
    wait_for(tmp_path / "run" / "ckpt.pt", process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    result = finish(process)
    assert result.status != 0
    assert "rank      : 1" in result.err
    assert "-9" in result.err
    saved = checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"]
    monkeypatch.chdir(tmp_path)
    assert run_main(*train, f"--total_steps={saved + 3}").status == 0
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
