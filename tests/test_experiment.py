"""The experiment: tasks in order, resumable, of one commit; scores by two encoders; its tables."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, alive

import build
import dataset
from benchmark import autoencoder, errors, experiment, scores
from benchmark.experiment import Experiment, parsed
from benchmark.recipe import configuration
from dataset.latents import Autoencoder
from model import checkpoint
from runtime.errors import UserError
from runtime.files import read_json, write_json


@pytest.fixture
def job(tmp_path: Path) -> Experiment:
    return Experiment(parsed([str(tmp_path), "--quick", "--workers=2"]))


def finish(job: Experiment, name: str, **record: object) -> None:
    write_json(job.done(name), {"command": "python", "commit": "abc", "cpu_seconds": 36, **record})


@pytest.mark.parametrize("arguments", [["--quick"], []])
def test_every_task_comes_after_what_it_needs_and_has_flags_that_main_knows(
    arguments: list[str], tmp_path: Path
) -> None:
    job, seen = Experiment(parsed([str(tmp_path), *arguments])), set()
    share = job.options.shares[0]
    point = {"average_gflops": 0.0, "saving": 1, "distance": 1.0, "latency_ms": 1.0}
    front = {
        "label": "d", "full_width_gflops": 1.0, "timesteps": [0, 1],
        "points": [{**point, "schedule": [0.5, 1]}],
        "uniform": [{**point, "schedule": [1.0, 1.0], "latency_ms": 2.0}],
    }  # fmt: skip

    def before(name: str) -> set[str]:
        return {each for need in job.needs(name) for each in (need, *before(need))}

    for name in job.tasks():
        assert name not in seen
        assert {*job.needs(name)} <= seen
        seen.add(name)
        shutil.rmtree(job.folder, ignore_errors=True)
        for need in before(name):  # what no need has written is not there
            if need.startswith("search/"):
                write_json(job.folder / need / "front.json", front)
            if need.startswith("switches/"):
                write_json(job.result(need), {str(share): [0.5, 1]})
        command = job.command(name)
        if command and command[0] == "main.py":
            configuration(*command[1:])  # refuses what main.py would refuse
        elif command and command[1] == "benchmark.autoencoder":
            configuration(*command[4:])
        elif command and command[1] == "benchmark.scores":
            config = configuration(*(f for f in command[4:] if f != "--test"))
            if "--eval_stepaware" in command:
                assert Path(config.evaluation.schedule).exists()
    methods = {name.split("/")[2] for name in seen if name.startswith("score/")}
    assert methods == {*experiment.ROWS}
    search = f"search/{job.options.sampler}/sensitivity/0-0"
    write_json(job.folder / search / "front.json", front)
    steps = int(share * job.steps)
    assert f"--sample_steps={steps}" in job.row("steps", share, job.options.sampler, "0-0")
    in_time = job.row("time", share, job.options.sampler, "0-0")
    assert f"--sample_steps={job.steps // 2}" in in_time


def test_two_networks_take_turns_within_the_share(job: Experiment) -> None:
    flags = configuration(*job.turns(0.5, "0"))
    timesteps = range(0, 100, 100 // job.steps)
    small = [flags.ensemble.end < t < flags.ensemble.start for t in timesteps]
    costs = [job.flops[0.5 if each else 1.0] for each in small]
    assert sum(costs) <= 0.5 * job.steps * job.flops[1.0] < sum(costs) + job.flops[1.0]
    assert small == sorted(small)  # the last steps are the large network's
    assert job.turns(0.2, "0") is None


def test_a_failing_task_stops_what_needs_it_alone_and_the_rest_is_not_done_again(
    job: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, broken = job.folder / "log.txt", job.folder / "broken"
    broken.touch()
    note = f"import sys; open({str(log)!r}, 'a').write(sys.argv[1])"
    commands = {
        "a": ["-c", note, "a"],
        "deep/b": ["-c", f"import os, sys; sys.exit(os.path.exists({str(broken)!r}))"],
        "c": ["-c", note, "c"],
        "d": None,
    }
    monkeypatch.setattr(job, "tasks", lambda: [*commands])
    monkeypatch.setattr(job, "needs", lambda name: {"deep/b": ["a"], "c": ["deep/b"]}.get(name, []))
    monkeypatch.setattr(job, "command", commands.get)
    assert job.run() == ["deep/b"]
    assert log.read_text() == "a"
    broken.unlink()
    assert job.run() == []
    assert job.run() == []
    assert log.read_text() == "ac"


def test_rows_of_another_commit_or_of_other_options_are_refused(
    job: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.begin()
    job.begin()
    monkeypatch.setattr(experiment, "commit", lambda: "another")
    with pytest.raises(UserError, match=r"commit: .* there, another here"):
        job.begin()
    job.options.mixed = True
    job.begin()
    monkeypatch.undo()
    job.options.mixed, job.options.images = False, 11
    with pytest.raises(UserError, match="images: 10 there, 11 here"):
        job.begin()


def test_sigterm_ends_what_runs(job: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    running = job.folder / "running"
    code = f"import time; open({str(running)!r}, 'x').write('1'); time.sleep(600)"
    monkeypatch.setattr(job, "tasks", lambda: ["long"])
    monkeypatch.setattr(job, "command", lambda name: ["-c", code])

    def ask() -> None:
        while not running.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, experiment.stop)
    threading.Thread(target=ask).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not job.running
    assert not job.done("long").exists()


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_sigkill_leaves_no_command_behind(tmp_path: Path) -> None:
    running = tmp_path / "running"
    write = f"import os; open({str(running)!r}, 'w').write(str(os.getpid()))"
    command = ["-c", f"{write}; import time; time.sleep(600)"]
    code = (
        "from benchmark.experiment import Experiment, parsed\n"
        f"job = Experiment(parsed([{str(tmp_path)!r}, '--quick']))\n"
        f"job.tasks, job.command = (lambda: ['long']), (lambda name: {command!r})\n"
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


@pytest.fixture
def trained(tmp_path: Path) -> list[str]:
    """Flags for a small supernet with random weights that lies in a folder."""
    flags = [*TINY, f"--logdir={tmp_path}", "--num_images=40", "--batch_size=12"]
    config = configuration(*flags)
    weights = build.own_network(config, torch.device("cpu"), 1).state_dict()
    state = {"net_model": weights, "ema_model": weights, "settings": config.stored("network")}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    return flags


def test_scores_are_those_of_main_py_and_of_each_set_left_out(trained: list[str]) -> None:
    config = configuration(*trained, "--eval", "--assigned_width=0.5", "--sample_steps=5")
    found, images = scores.of_images(config, "pixels")
    assert found["judge"] == found["chosen_with"]
    model, networks, schedule, flops = scores.chain(config)
    evaluator = build.evaluator(model, networks)
    theirs, pictures = evaluator.score(schedule, 40)
    assert found["chosen_with"]["distance"] == pytest.approx(theirs.distance, rel=1e-9)
    assert torch.equal(images, pictures[: scores.SHOWN])
    rest = evaluator.encoder(torch.cat([pictures[:8], pictures[16:]])).double()
    without = evaluator.reference.distance(rest.mean(0), rest.T.cov())
    assert found["chosen_with"]["without"][1] == pytest.approx(without, rel=1e-6)
    assert found["gflops_per_image"] == 5 * flops[0.5] / 1e9
    assert found["widths"] == [0.5] * 5


def test_the_standard_error_of_a_mean_is_the_usual_one() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0])
    without = [(values.sum() - each).item() / 4 for each in values]
    usual = values.std().item() / 5**0.5
    assert scores.standard_error(without) == pytest.approx(usual)


def test_the_autoencoder_is_one_that_main_py_takes(tmp_path: Path) -> None:
    images = dataset.load("digits", ".", 8)
    autoencoder.train(images, 2).save_pretrained(tmp_path)
    made = Autoencoder(tmp_path, "cpu")
    assert made.shape(8) == (autoencoder.LATENT_CHANNELS, 4, 4)
    assert float(made.encode(images.tensor[:500]).std()) == pytest.approx(1, rel=1e-3)


def test_switches_are_within_the_shares(trained: list[str], tmp_path: Path) -> None:
    experiment.switches(tmp_path / "found.json", (0.5, 0.3), [*trained, "--num_images=10"])
    costs = scores.chain(configuration(*trained))[0].flops([1, 0.75, 0.5, 0.25])
    for share, widths in read_json(tmp_path / "found.json").items():
        cost = sum(costs[width] for width in widths) / len(widths)
        assert 0.6 * float(share) < cost / costs[1.0] <= float(share)
        assert len(set(widths)) == 2


def test_errors_of_a_narrow_step(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image of a chain whose one step is narrow parts from the usual one by what is said."""
    flags = [*trained, "--num_images=6", "--sample_steps=4", "--var_type=fixedsmall"]
    monkeypatch.setattr("sys.argv", ["errors", str(tmp_path / "errors.json"), *flags])
    errors.main()
    found = read_json(tmp_path / "errors.json")["measured"]["ddim"]["0.5"]
    assert [record["timestep"] for record in found] == [7, 5, 2, 0]
    assert found[-1]["made"] == found[-1]["left"] > 0
    model = build.load_model(configuration(*flags, "--sampler=ddim"))
    making = build.generator(model, build.candidates(model, [0.5, 1.0]))
    making.to_images, making.sampler = (lambda x: x), replace(model.sampler, limit=float("inf"))
    usual, narrow = (
        making.images([w if t == 5 else 1.0 for t in range(10)], 6) for w in (1.0, 0.5)
    )
    assert errors.rms(usual - narrow) == pytest.approx(found[1]["left"], rel=1e-3) != 0


def test_report_of_what_is_done(job: Experiment, trained: list[str]) -> None:
    """Paired differences to full width, means over seeds; pictures."""
    with pytest.raises(UserError, match="nothing is scored"):
        job.report()
    write_json(job.result("test_set"), {"none": "no test split"})
    base = [1.0, 1.2, 0.8, 1.1, 0.9]
    for name, times, gflops in [("width/1/0-0", 1, 2), ("sensitivity/0.5/0-0", 1.1, 1)]:
        name, ds = f"score/{job.options.sampler}/{name}", [times * d for d in base]
        score = {"encoder": "pixels", "distance": times, "without": ds}
        write_json(job.result(name), {
            "images": 50, "chosen_with": score, "judge": score, "gflops_per_image": gflops,
            "ms_per_image": 3.0, "widths": [1.0, 0.5],
        })  # fmt: skip
        scores.write_tensors(job.result(name).with_suffix(".pt"), torch.zeros(15, 1, 8, 8).byte())
        finish(job, name)
    job.report()
    out = job.options.results
    result = read_json(out / "results.json")
    assert result["commits"] == ["abc"]
    assert len(result["not_done"]) == len(job.tasks()) - 2
    row = re.search(r"^\| searched .*$", (out / "tables.md").read_text(), re.M)[0]
    assert re.split(r" *\| *", row)[2:7] == ["1", "1", "50 %", "1.1 ± 0.31", "+10.0 ± 0.0 %"]
    assert {path.name for path in out.iterdir()} >= {"distances.png", "schedules.png",
                                                     "samples.png"}  # fmt: skip


def test_what_is_between_the_marks_alone_is_written(tmp_path: Path) -> None:
    begin, end = experiment.MARKS
    page = tmp_path / "page.md"
    page.write_text(f"# a\n{begin}\n{end}\nb\n")  # nothing there yet
    for text in ("| 1 |\n", "| 2 |\n"):
        experiment.write_between_marks(page, text)
        assert page.read_text() == f"# a\n{begin}\n{text}{end}\nb\n"
        assert experiment.between_marks(page) == text


def test_the_pages_have_the_tables_and_the_numbers_of_the_recorded_run() -> None:
    result = read_json(parsed([]).results / "results.json")
    text, short = experiment.tables(result), experiment.short_table(result)
    assert experiment.between_marks(experiment.PAGE) == text
    assert experiment.between_marks(experiment.README) == short
    kept = parsed([]).results
    errors = read_json(kept / "errors.json")
    earlier = experiment.short_table(read_json(kept / "earlier.json"))
    assert earlier in experiment.PAGE.read_text()
    known = {*re.findall(r"\d+\.\d+", f"{text} {errors['table']} {earlier}")}
    page = re.sub(r"`.*?`|\]\(.*?\)|^    .*", "", experiment.PAGE.read_text(), flags=re.M)
    assert {*re.findall(r"\d+\.\d+", page)} <= known
