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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS, KERNELS, ROOT, TINY, TRAIN, Result, Started, alive, contents, run_main
from PIL import Image
from test_latents import write_autoencoder
from test_search import summary
from test_sensitivity import Landscape, make, true_distance
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import main
from model import WidthSchedule, checkpoint
from runtime import files
from runtime import processes as distributed
from runtime.errors import UserError

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(folder: Path, rank: int, port: int, *arguments: object) -> Result:
    """`main.py ARGUMENTS` as one of two processes, in a group whose port is `port`."""
    os.chdir(folder)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    return run_main(*arguments)


def run_jobs(folder: Path, rank: int, ports: list[int]) -> list[Result]:
    """All JOBS, each in a group of its own."""
    jobs = zip(ports, JOBS.values(), strict=True)
    return [run_rank(folder, rank, port, *arguments) for port, arguments in jobs]


def start(folder: Path, *arguments: object) -> Started:
    """`torchrun --nproc_per_node=2 main.py ARGUMENTS` in `folder`: its agent and two workers."""
    return Started(folder, *arguments, function=torchrun)


def torchrun() -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0,
        monitor_interval=0.1, rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0},
    )  # fmt: skip
    elastic_launch(config, worker)()


def worker() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's, whose copy this is
    Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    main.start()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


def test_alone_there_is_nothing_to_do() -> None:
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("mine") == ["mine"]
    assert distributed.first_to_speak()
    with distributed.group(torch.device("cpu")):
        assert distributed.world() == 1


def test_two_processes_do_what_one_does(here: Path, trained: Path, forks: None) -> None:
    """Training, stopped and continued; latents; statistics, images and distances; searches."""
    for name in ("one", "two"):
        shutil.copytree(trained, here / name / "run")
        write_autoencoder(here / name / "vae")
    ports = [free_port() for _ in JOBS]
    with ProcessPoolExecutor(2, FORKS) as pool:
        running = [pool.submit(run_jobs, here / "two", rank, ports) for rank in (0, 1)]
        os.chdir(here / "one")
        alone = {name: run_main(*flags) for name, flags in JOBS.items()}
        os.chdir(here)
        said = [process.result(timeout=100) for process in running]
    both = dict(zip(JOBS, zip(*said, strict=True), strict=True))
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


class Shared(Landscape):
    """Each process scores every second schedule and tells the others, as in a search."""

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, dict]]:
        for first in range(0, len(schedules), 2):
            own = first + distributed.rank()
            scores = [
                (own, {"distance": true_distance(s.widths)}) for s in schedules[own : own + 1]
            ]
            for each in distributed.gather(scores):
                yield from each


def search_together(folder: Path, rank: int, ports: list[int]) -> list[object]:
    """Searches in which the processes would score different candidates, and what they end with."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    jobs = {
        "evolution": dict(search_method="evolution", mutation_prob=0.1),
        "sensitivity": {},
        "short": dict(search_minutes=1e-6),
        "failing": {},
    }
    ended = []
    for port, (name, changes) in zip(ports, jobs.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        job = make(folder / name, Shared(), num_generation=4, seed=rank, **changes)
        if name == "failing":  # in the main process, which says it
            job.on_generation = lambda number, candidates: 1 // 0
        try:
            with distributed.group(torch.device("cpu")):
                ended.append(summary(job.run()))
        except (ArithmeticError, UserError) as error:
            ended.append(type(error))
            torch.distributed.destroy_process_group()  # as the end of the process does
    return ended


def test_one_process_decides_what_is_scored(here: Path, forks: None) -> None:
    """Processes whose numbers differ, here their seeds, once mixed up whose score a score was."""
    ports = [free_port() for _ in range(4)]
    with ProcessPoolExecutor(2, FORKS) as pool:
        running = [pool.submit(search_together, here, rank, ports) for rank in (0, 1)]
        first, second = [process.result(timeout=100) for process in running]
    assert first[:3] == second[:3]
    assert first[3:] == [ZeroDivisionError]
    assert second[3:] == [UserError]  # and does not wait for ever
    assert len(first[2]) == 1
    for name in ("evolution", "sensitivity"):
        scored = records(here / name / "search.jsonl")[1:]
        assert len(scored) > 20
        for record in scored:
            assert record["distance"] == true_distance(record["schedule"])


def test_an_error_of_one_process_ends_both_and_is_said_once(run_folder: Path) -> None:
    """By torchrun itself."""
    flags = [*TINY, "--eval", "--logdir=run", "--fid_cache=run/ckpt.pt/none.npz"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", str(ROOT / "main.py"), *flags]
    done = subprocess.run(command, cwd=run_folder.parent, capture_output=True, text=True)
    assert done.returncode == 1  # torchrun's own
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("steps", [(6, 3), (6, 0)])
def test_processes_go_on_from_the_same_checkpoint(
    here: Path, trained: Path, forks: None, steps: tuple[int, int]
) -> None:
    """Not with a folder each, as on two machines: at steps 6 and 3, or where one is empty."""
    for rank, step in enumerate(steps):
        (here / f"{rank}").mkdir()
        if step:
            shutil.copy(trained / f"ckpt_{step}.pt", here / f"{rank}" / "ckpt.pt")
    before, port = contents(here), free_port()
    flags = [*TRAIN, "--total_steps=7", "--sample_step=0"]
    with ProcessPoolExecutor(2, FORKS) as pool:
        running = [pool.submit(run_rank, here, r, port, *flags, f"--logdir={r}") for r in (0, 1)]
        results = [process.result(timeout=100) for process in running]
    assert [r.status for r in results] == [2, 2], results
    said = "".join(r.err for r in results)
    assert said.count("error: ") == 1
    assert re.search(f"process 1 .*step {steps[1]}, process 0 .*step 6: --logdir", said)
    assert contents(here) == before


ENDLESS = [*TRAIN, "--total_steps=100000", "--sample_step=0", "--logdir=run"]


def test_a_process_that_dies_takes_the_job_down(here: Path, forks: None) -> None:
    job = start(here, *ENDLESS)
    job.wait_for(here / "run" / "ckpt.pt")
    os.kill(int(Path("1.pid").read_text()), signal.SIGKILL)
    # Which process torchrun names is a race: the other one ends, too, when its connection is lost.
    assert job.wait().status != 0
    saved = checkpoint.load("run/ckpt.pt")["step"]
    assert run_main(*ENDLESS, f"--total_steps={saved + 3}").status == 0
    assert checkpoint.load("run/ckpt.pt")["step"] == saved + 3


def test_without_torchrun_the_processes_end(here: Path, forks: None) -> None:
    job = start(here, *ENDLESS)
    job.wait_for(here / "run" / "ckpt.pt")
    job.process.kill()
    job.wait()
    deadline = time.monotonic() + 60
    while any(alive(int(path.read_text())) for path in here.glob("*.pid")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with files.alone_in(here / "run", wait=False):
        assert checkpoint.load("run/ckpt.pt")["step"] > 0


def test_sigterm_saves(here: Path, forks: None) -> None:
    job = start(here, *ENDLESS, "--save_step=100000")
    job.wait_for(here / "run" / "train.jsonl")
    job.process.terminate()
    assert job.wait().out.count("stopped and saved at step") == 1
    assert checkpoint.load("run/ckpt.pt")["step"] > 0
