"""The experiment's tasks: in order, resumable, and all of them commands that main.py knows."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import build
from benchmark import experiment
from benchmark.experiment import Experiment, Task
from benchmark.recipe import configuration
from benchmark.search import Bench
from model import checkpoint
from runtime.errors import UserError


def experiment_of(recipe: Path, tmp_path: Path) -> Experiment:
    return Experiment(
        argparse.Namespace(
            folder=tmp_path, flagfile=recipe, ablations=recipe, data_root="data", workers=2,
            search_images=20, images=30, seeds=2, speed=(),
        )
    )  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Experiment:
    return experiment_of(ROOT / "config" / "digits.txt", tmp_path)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "fashion_mnist_14"])
def test_tasks_have_names_of_their_own_and_come_after_what_they_need(
    name: str, tmp_path: Path
) -> None:
    seen = set()
    for task in experiment_of(ROOT / "config" / f"{name}.txt", tmp_path).tasks():
        assert task.name not in seen
        assert set(task.needs) <= seen
        seen.add(task.name)


def test_main_knows_every_flag(job: Experiment) -> None:
    commands = [task.command for task in job.tasks() if task.command[0] == "main.py"]
    assert len(commands) > 50
    for command in commands:
        configuration(*command[1:])  # refuses what main.py would refuse


def test_every_schedule_that_is_scored_is_made_before(job: Experiment) -> None:
    named = {
        Path(flag.partition("=")[2]).stem
        for task in job.tasks()
        for flag in task.command
        if flag.startswith("--schedule=")
    }
    keys = ["0", "1", "ddim-10"]
    for key in keys:
        folder = job.folder / f"search-{key}"
        folder.mkdir()
        points = [
            {"saving": saving, "distance": 1 - saving, "schedule": [1.0]}
            for saving in (0.2, 0.55, 0.6, 0.8)
        ]
        experiment.write_json(folder / "front.json", {"points": points})
        job._take_from_front(key)
    made = {path.stem for path in (job.folder / "schedules").iterdir()}
    assert made == {f"searched-{share:g}-{key}" for share in experiment.BUDGETS for key in keys}
    others = {name for name in named if not name.startswith("searched")}
    assert named == made - {"searched-0.3-ddim-10"} | others
    assert {name.split("-")[0] for name in others} == {"switch", "random"}


def test_a_failing_task_stops_it_and_the_rest_is_not_done_again(
    job: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    log = job.folder / "log.txt"
    broken = job.folder / "broken"
    broken.touch()
    tasks = [
        Task("a", ("-c", note, str(log), "a")),
        Task(
            "deep/b", ("-c", f"import os, sys; sys.exit(os.path.exists({str(broken)!r}))"), ("a",)
        ),
        Task("c", ("-c", note, str(log), "c"), ("deep/b",)),
    ]
    monkeypatch.setattr(job, "tasks", lambda: tasks)
    with pytest.raises(UserError, match="deep/b failed"):
        job.run()
    assert log.read_text() == "a"
    broken.unlink()
    job.run()
    assert log.read_text() == "ac"
    job.run()
    assert log.read_text() == "ac"


def test_flagfile(tmp_path: Path) -> None:
    path = tmp_path / "flags.txt"
    path.write_text("# text\n--a=1\n--b\n--a=2=3\n\n")
    assert experiment.read_flagfile(path) == {"a": ["1", "2=3"], "b": ["true"]}


def test_first_rows(tmp_path: Path) -> None:
    import torch
    from torchvision.io import read_image

    from runtime.files import save_grid

    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 6, 6)
    grids = [tmp_path / "a.png", tmp_path / "b.png"]
    for grid in grids:
        save_grid(grid, images)
    experiment.first_rows(grids, tmp_path / "both.png", rows=2)
    both = read_image(str(tmp_path / "both.png"))
    part = 2 * 8 + 2
    assert both.shape == (3, 2 * part + 6, 16 * 8 + 2)
    assert torch.equal(both[:, :part], read_image(str(grids[0]))[:, :part])
    assert torch.equal(both[:, -part:], both[:, :part])


def test_sigterm_ends_what_runs(job: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    running = job.folder / "running"
    code = f"import os, time; open({str(running)!r}, 'x').write('1'); time.sleep(600)"
    monkeypatch.setattr(job, "tasks", lambda: [Task("long", ("-c", code))])

    def ask() -> None:
        while not running.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, job.stop)
    threading.Thread(target=ask).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not job.processes
    assert not job.done("long").exists()


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_sigkill_leaves_no_command_behind(tmp_path: Path) -> None:
    running = tmp_path / "running"
    command = (
        f"import os, pathlib, time; pathlib.Path({str(running)!r}).write_text(str(os.getpid()))"
    )
    code = (
        "import pathlib, sys; sys.path.insert(0, 'tests')\n"
        "from test_experiment import Task, experiment_of\n"
        f"job = experiment_of(pathlib.Path('config/digits.txt'), pathlib.Path({str(tmp_path)!r}))\n"
        f"job.tasks = lambda: [Task('long', ('-c', {command + '; time.sleep(600)'!r}))]\n"
        "job.run()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (running.exists() and running.read_text()):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    for _ in range(200):
        if not alive(int(running.read_text())):
            return
        time.sleep(0.05)
    raise AssertionError("the command runs on")


def alive(pid: int) -> bool:
    """Whether it runs; one that ended, and that nobody waits for, does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_baselines_come_from_the_benchmark_of_searches(
    job: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an untrained network: switches and random schedules within each budget."""
    config = configuration(f"--flagfile={job.flagfile}")
    weights = build.own_network(config, torch.device("cpu"), 1).state_dict()
    (job.folder / "supernet").mkdir()
    state = {"net_model": weights, "ema_model": weights, "settings": config.stored("network")}
    checkpoint.save(job.folder / "supernet" / "ckpt.pt", state)
    monkeypatch.setattr(Bench, "switches", lambda self, made=Bench.switches: made(self)[::4])
    job.only("baselines")
    names = {path.name for path in (job.folder / "schedules").iterdir()}
    assert names == {
        f"{kind}-{share:g}{end}.txt"
        for share in experiment.BUDGETS
        for kind, ends in (("switch", ("",)), ("random", ("-0", "-1")))
        for end in ends
    }
