"""Training: what a step does, and that runs which are stopped, killed and resumed end the same."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TRAIN, Started, contents, run_main
from torch import nn
from torchvision.io import read_image, write_png

import dataset
import diffusion
import main
import train
from model import SlimmableUNet, WidthSchedule, checkpoint
from runtime.errors import UserError
from runtime.schema import digest, widths_line
from sampling.noise import SAMPLING, ImageNoise
from settings import RunSettings, TrainSettings, WidthSettings
from train import Milestone, Trainer

SHAPE = (1, 8, 8)


def trainer(folder: Path, seed: int = 0, widths: dict | None = None, **changes: object) -> Trainer:
    """A trainer of a tiny supernet on the digits."""
    settings = dict(
        total_steps=4, save_step=4, sample_step=0, log_step=1, warmup=0, lr=1e-3, ema_decay=0.9,
        sample_size=4, sandwich=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Trainer(
        settings=TrainSettings(**{**settings, **changes}),
        run=RunSettings(logdir=str(folder), batch_size=8, seed=seed),
        widths=WidthSettings(**widths or {}),
        net=SlimmableUNet(10, 16, (1, 2), (1,), 1, 0.1, num_groups=4, in_ch=1),
        data=dataset.load("digits", "", 8),
        levels=diffusion.NoiseSchedule(1e-3, 0.3, 10),
        mean_type="epsilon",
        image_shape=SHAPE,
        device=torch.device("cpu"),
        identity={"lr": 1e-3},
    )


def batch(trained: Trainer, step: int = 0) -> torch.Tensor:
    seed = trained.run.seed
    return next(dataset.batches(trained.data, 8, seed=seed, start_step=step))[0]


def copy(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(left: object, right: object) -> bool:
    """Whether two nests of tensors and plain values are the same, bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- settings -------------------------------------------------------------------------------------


def test_sandwich_widths(tmp_path: Path) -> None:
    every = trainer(tmp_path, num_sandwich_sampling=4)
    for step in range(20):
        widths = every.widths_of(step)
        assert widths[:2] == [1.0, 0.25]
        assert sorted(widths[2:]) == [0.5, 0.75]  # two of two, without replacement
        assert every.widths_of(step) == widths
    more = trainer(tmp_path, num_sandwich_sampling=6).widths_of(0)
    assert len(more) == 6
    assert set(more[2:]) <= {0.5, 0.75}
    assert trainer(tmp_path, num_sandwich_sampling=2).widths_of(3) == [1.0, 0.25]
    assert trainer(tmp_path, sandwich=False).widths_of(3) == [1.0]


def test_sandwich_draws_every_width_equally_and_by_seed(tmp_path: Path) -> None:
    one, two = (trainer(tmp_path, seed=seed) for seed in (1, 2))
    drawn = [one.widths_of(step)[2] for step in range(2000)]
    # Of 2000 fair draws, 1000 ± 22; five deviations are never left.
    assert abs(drawn.count(0.5) - 1000) < 112
    assert set(drawn) == {0.5, 0.75}
    assert drawn != [two.widths_of(step)[2] for step in range(2000)]


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 4])
def test_warm_up(tmp_path: Path, warmup: int) -> None:
    trained = trainer(tmp_path, warmup=warmup, lr=0.01)
    rates = []
    for step in range(6):
        rates.append(trained.optim.param_groups[0]["lr"])
        trained.train_step(trained.net, batch(trained, step))
        assert trained.rate == rates[-1]  # the log's
    expected = [0.01 * min(step, 4) / 4 for step in range(6)] if warmup else [0.01] * 6
    assert rates == pytest.approx(expected)


def test_gradients_of_all_widths_add_up_and_are_clipped(tmp_path: Path) -> None:
    """The clipped gradient against one made here, with the same timesteps and noise."""
    trained = trainer(tmp_path, grad_clip=0.01, num_sandwich_sampling=2)
    trained.net.eval()  # dropout off: its draws are the step's own affair
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor, width: float) -> torch.Tensor:
        calls.append((x.detach(), t, width))
        return trained.net(x, t, width)

    before, x_0 = copy(trained.net), batch(trained)
    seen = {}
    trained.optim.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in trained.net.named_parameters()
                                if p.grad is not None})
    )  # fmt: skip
    trained.train_step(network, x_0)
    norm = trained.grad_norm
    assert [width for *_, width in calls] == [1.0, 0.25]
    assert not torch.equal(calls[0][1], calls[1][1])  # each pass has its own timesteps
    trained.net.load_state_dict(before)
    abars = torch.from_numpy(trained.levels.alpha_bars).float()
    for x_t, t, width in calls:
        abar = abars[t][:, None, None, None]
        noise = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        (trained.net(x_t, t, width) - noise).square().mean().backward()
    total = torch.cat([p.grad.flatten() for p in trained.net.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(float(total.norm()), rel=1e-4)
    assert float(norm) > 0.01
    for name, parameter in trained.net.named_parameters():
        if parameter.grad is not None:
            expected = parameter.grad * 0.01 / total.norm()
            torch.testing.assert_close(seen[name], expected, rtol=1e-3, atol=1e-8)


def test_ema_follows_the_network(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    expected = copy(trained.net)
    for step in range(3):
        trained.train_step(trained.net, batch(trained, step))
        for name, value in trained.net.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    for name, value in trained.ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not trained.ema.model.training


def test_a_schedule_is_trained_at_each_timestep_s_own_width(tmp_path: Path) -> None:
    schedule, seen = [0.25] * 3 + [0.0] * 2 + [1.0] * 5, []
    trained = trainer(tmp_path)
    trained.schedule = schedule

    def network(x: torch.Tensor, t: torch.Tensor, width: float) -> torch.Tensor:
        seen.extend((int(each), width) for each in t)
        return trained.net(x, t, width)

    for step in range(40):
        trained.train_step(network, batch(trained, step))
    assert all(schedule[t] == width for t, width in seen)
    assert {t for t, _ in seen} == {0, 1, 2, 5, 6, 7, 8, 9}  # not those that are left out
    assert len(seen) == 40 * 8  # one width per step
    assert sum(width == 0.25 for _, width in seen) / len(seen) == pytest.approx(3 / 8, abs=0.2)


def test_bf16_trains(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    trained.choose_arithmetic = lambda: "bfloat16"
    network, dtypes = trained.wrapped(), []
    trained.net.head.register_forward_hook(lambda *arguments: dtypes.append(arguments[2].dtype))
    trained.train_step(network, batch(trained))
    inputs = batch(trained), torch.zeros(8, dtype=torch.long), 1.0
    thread = threading.Thread(target=network, args=inputs)  # one of DataParallel's
    thread.start()
    thread.join()
    assert set(dtypes) == {torch.bfloat16}
    assert {v.dtype for v in trained.ema.model.state_dict().values()} == {torch.float32}


def test_training_learns_the_digits(tmp_path: Path) -> None:
    trained, records = trainer(tmp_path, total_steps=60, lr=2e-3), []
    trained.log = records.append
    trained.train(0, [])
    assert [record["step"] for record in records] == list(range(1, 61))
    for width in ("1", "0.25"):
        losses = [record["loss"][width] for record in records]
        assert losses[0] == pytest.approx(1, abs=0.1)  # the tail starts at nought
        assert sum(losses[-5:]) / 5 < 0.5


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    trained = trainer(tmp_path, total_steps=8, save_step=2, log_step=3)
    steps = trained.train_step

    def poisoned(network: nn.Module, x_0: torch.Tensor, labels: None) -> None:
        steps(network, x_0 * (float("nan") if trained.step == 3 else 1), labels)

    trained.train_step = poisoned
    with pytest.raises(UserError, match=r"not finite at step 4.*--allow_changes.*--lr"):
        trained.train(0, [trained.checkpoints()])
    # What was saved is from before.
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["ema_model"].values())


# --- files ----------------------------------------------------------------------------------------


def test_what_a_run_leaves(trained: Path) -> None:
    names = set(contents(trained))
    assert {"ckpt.pt", "ckpt_3.pt", "ckpt_6.pt", "flagfile.txt", "train.jsonl"} <= names
    assert any("events.out.tfevents" in name for name in names)
    assert not any(".tmp" in name for name in names)
    state = checkpoint.load(trained / "ckpt.pt")
    expected = {"net_model", "ema_model", "sched", "optim", "step", "x_T", "settings"}
    assert expected <= state.keys()
    assert (state["step"], state["x_T"].shape) == (6, (4, *SHAPE))
    assert checkpoint.load(trained / "ckpt_3.pt")["step"] == 3
    # The numbered file is its own: it survives another save.
    assert (trained / "ckpt_6.pt").read_bytes() == (trained / "ckpt.pt").read_bytes()


def test_a_loss_for_every_width(trained: Path) -> None:
    records = read_lines(trained / "train.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert {"1", "0.25"} < record["loss"].keys() <= {"1", "0.25", "0.5", "0.75"}
        assert record["grad_norm"] > 0
        assert record["images_per_second"] > 0
    assert [record["lr"] for record in records] == pytest.approx([0, 0.0005] + [0.001] * 4)


def test_tensorboard_has_the_same(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained)).Reload()
    tags = events.Tags()
    assert {"loss/width_1", "loss/width_0.25", "lr", "grad_norm"} <= set(tags["scalars"])
    assert {"sample/width_1", "sample/width_0.25"} == set(tags["images"])
    logged = [event.value for event in events.Scalars("loss/width_1")]
    records = read_lines(trained / "train.jsonl")
    assert logged == pytest.approx([record["loss"]["1"] for record in records])


def test_grids_are_the_ema_network_at_each_width(trained: Path) -> None:
    state = checkpoint.load(trained / "ckpt.pt")
    net = SlimmableUNet(10, 16, (1, 2), (1,), 1, 0.1, num_groups=4, in_ch=1).eval()
    checkpoint.fill(net, state["ema_model"], "")
    grids = {}
    for width in (1.0, 0.25):
        grids[width] = read_image(str(trained / "sample" / f"6_width_{width:g}.png"))

        def denoise(x: torch.Tensor, t: int, width: float = width) -> torch.Tensor:
            return net(x, torch.full((len(x),), t), width)

        with torch.no_grad():
            images = dataset.to_uint8(
                diffusion.sample_ddpm(
                    denoise,
                    state["x_T"],
                    diffusion.NoiseSchedule(1e-3, 0.3, 10),
                    noise=ImageNoise(0, SAMPLING, torch.arange(4), SHAPE),
                )
            )
        # make_grid: two by two, two pixels between.
        shown = [grids[width][:1, y : y + 8, x : x + 8] for y in (2, 12) for x in (2, 12)]
        assert (torch.stack(shown).int() - images.int()).abs().max() <= 1
    assert not torch.equal(grids[1.0], grids[0.25])


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    trained.save()
    # A child dies between writing and renaming, at whatever byte it has come to.
    child = os.fork()
    if child == 0:
        trained.step = 99
        torch.save = lambda state, file: (file.write(b"PK"), file.flush(), os._exit(1))
        try:
            trained.save()
        finally:
            os._exit(2)  # whatever happens: the child must not go on as a second test run
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 0
    with pytest.raises(UserError, match="no checkpoint") as caught:
        checkpoint.load(tmp_path / "other.pt")
    assert ".tmp" not in str(caught.value)


# --- resume ---------------------------------------------------------------------------------------

# Dropout, mirrored images, an epoch that ends within the run: all that a resume could forget.
LONG = "--total_steps=8 --save_step=100 --sample_step=4 --dropout=0.3 --dataset=image_folder"
LONG = [*TRAIN, *LONG.split(), "--data_root=photos", "--logdir=run"]


def make_photos(folder: Path) -> None:
    (folder / "photos").mkdir()
    for i in range(20):
        image = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(i))
        write_png(image.byte(), str(folder / "photos" / f"{i:02}.png"))


@pytest.fixture
def photos(here: Path) -> Path:
    make_photos(here)
    return here


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The end of LONG, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    make_photos(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_main(*LONG)
    assert result.status == 0, result.err
    return checkpoint.load(folder / "run" / "ckpt.pt")


def ends_the_same(folder: Path, expected: dict) -> None:
    state = checkpoint.load(folder / "run" / "ckpt.pt")
    for name in ("step", "ema_model", "net_model", "optim", "sched", "x_T"):
        assert same(state[name], expected[name]), name
    steps = [record["step"] for record in read_lines(folder / "run" / "train.jsonl")]
    assert steps == list(range(1, 9))


def signalled(monkeypatch: pytest.MonkeyPatch, when: int, signum: int, sampling: bool) -> None:
    """Send this process a signal in step `when`, or in the midst of the samples drawn after it."""
    name = "give_way" if sampling else "train_step"
    original = getattr(Trainer, name)

    def patched(self: Trainer, *arguments: object) -> object:
        if self.step == when:
            os.kill(os.getpid(), signum)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, name, patched)


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(
    photos: Path,
    straight: dict,
    monkeypatch: pytest.MonkeyPatch,
    signum: int,
    status: int,
    sampling: bool,
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signalled(patch, 4, signum, sampling)
        stopped = run_main(*LONG)
    assert stopped.status == status
    at = 4 if sampling else 5
    assert f"stopped and saved at step {at} of 8 in run/ckpt.pt" in stopped.out
    assert checkpoint.load("run/ckpt.pt")["step"] == at
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert run_main(*LONG).status == 0
    ends_the_same(photos, straight)


def test_other_images_than_before_are_said(photos: Path) -> None:
    warning = "warning: the images are not those that the run was trained on"
    more = [*LONG, "--sample_step=0", "--total_steps=2"]
    assert run_main(*more).status == 0
    assert warning not in run_main(*more, "--total_steps=3").out
    (photos / "photos" / "07.png").unlink()
    assert warning in run_main(*more, "--total_steps=4").out


def die_in_step_5() -> None:
    record = Trainer._record

    def dies(self: Trainer, *arguments: object) -> dict:
        losses = record(self, *arguments)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    Trainer._record = dies
    main.start()


def test_killed_and_resumed(photos: Path, straight: dict, forks: None) -> None:
    often = [*LONG, "--save_step=2"]
    killed = Started(photos, *often, function=die_in_step_5).wait()
    assert killed.status == -signal.SIGKILL, killed
    assert checkpoint.load("run/ckpt.pt")["step"] == 4
    assert len(read_lines(Path("run/train.jsonl"))) == 5  # step 5 will happen again
    with open("run/train.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # and a line that was never finished
    assert run_main(*often).status == 0
    ends_the_same(photos, straight)
    assert {"ckpt_2.pt", "ckpt_4.pt", "ckpt_6.pt", "ckpt_8.pt"} <= set(os.listdir("run"))


def test_terminated_with_its_workers(photos: Path, forks: None) -> None:
    """As a terminal or a queue ends a job: the whole group gets the signal."""
    process = Started(photos, *LONG, "--total_steps=100000", "--num_workers=1")
    process.wait_for(Path("run/train.jsonl"))
    os.killpg(process.pid, signal.SIGTERM)
    result = process.wait()
    assert result.status == 143
    assert "Traceback" not in result.err
    step = int(re.search(r"stopped and saved at step (\d+) of 100000", result.out)[1])
    assert checkpoint.load("run/ckpt.pt")["step"] == step


def test_what_the_last_step_owes_is_made_up_for(here: Path) -> None:
    command = [*TRAIN, "--logdir=run", "--eval_step=3", "--num_images=70", "--fid_cache=s.npz"]
    assert run_main(*command).status == 0
    names = [f"sample/6_width_{width}.png" for width in ("1", "0.25")] + ["ckpt_6.pt"]
    before = {name: (here / "run" / name).read_bytes() for name in names}
    for name in names:
        (here / "run" / name).unlink()
    scores = Path("run/train_eval.jsonl")
    records = read_lines(scores)
    assert [(r["step"], r["width"]) for r in records] == [(3, 1.0), (3, 0.25), (6, 1.0), (6, 0.25)]
    assert all(record["scores"]["fd_pixels"] > 0 for record in records)
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:-1]))
    assert run_main(*command).status == 0
    assert {name: (here / "run" / name).read_bytes() for name in names[:2]} == {
        name: before[name] for name in names[:2]
    }
    assert checkpoint.load("run/ckpt_6.pt")["step"] == 6
    assert scores.read_text() == "".join(lines)
    assert "nothing to do" in run_main(*command).out


def test_milestones_give_way_to_a_signal(tmp_path: Path) -> None:
    trained = trainer(tmp_path)

    def make() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        trained.give_way()
        raise AssertionError("not left")

    with pytest.raises(train.Interrupted, match="saved at step 2 of 4"):
        trained.train(0, [Milestone(2, False, make, lambda step: False)])


def test_the_end_of_plain_training_says_what_comes_next(here: Path) -> None:
    plain = [a for a in TRAIN if a not in ("--sandwich", "--slimmable_unet")]
    said = run_main(*plain, "--logdir=plain", "--total_steps=1", "--sample_step=0").out
    assert "--eval --flagfile" in said


def test_another_run_in_the_folder_is_left_alone(run_folder: Path, refused: Callable) -> None:
    refused("run has no other.pt but ckpt: ", *TRAIN, "--logdir=run", "--ckpt_name=other")


def test_going_on_with_more_steps(here: Path) -> None:
    said = run_main(*TRAIN, "--logdir=run").out
    assert "run/ckpt.pt, step 6 of 6" in said
    assert "--search --flagfile run/flagfile.txt" in said
    before = contents(here)
    again = run_main(*TRAIN, "--logdir=run")
    assert again.status == 0
    assert "already at step 6 of 6; nothing to do" in again.out
    assert {k: v for k, v in contents(here).items() if k in before} == before
    more = run_main(*TRAIN, "--logdir=run", "--total_steps=9")
    assert more.status == 0
    assert checkpoint.load("run/ckpt.pt")["step"] == 9
    assert "ckpt_6.pt" in os.listdir("run")
    # The flagfile says what the run is now.
    assert "--total_steps=9" in Path("run/flagfile.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--lr=0.01"], ["lr: 0.001 there, 0.01 here"]),
        (["--batch_size=4", "--nosandwich"], ["batch_size: 8 there, 4 here", "sandwich: True"]),
        (["--T=20"], ["T: 10 there, 20 here"]),
        (["--seed=1"], ["seed: 0 there, 1 here"]),
        (["--candidate_width=0.5"], ["candidate_width: [0.75, 0.5] there, [0.5] here"]),
        (["--ch=32"], ["ch: 16 there, 32 here"]),
        (["--skip_slicing=segments"], ["skip_slicing: leading there, segments here"]),
    ],
)
def test_other_settings_are_refused(
    run_folder: Path, refused: Callable, changes: list, named: list
) -> None:
    line = refused("other settings", *TRAIN, "--logdir=run", "--total_steps=9", *changes)
    assert all(name in line for name in named)
    assert "--logdir" in line


def test_what_may_differ(run_folder: Path) -> None:
    free = ["--save_step=4", "--sample_step=0", "--log_step=2", "--num_images=9"]
    assert run_main(*TRAIN, "--logdir=run", "--total_steps=7", *free).status == 0
    assert checkpoint.load(run_folder / "ckpt.pt")["step"] == 7


def test_released_checkpoint_goes_on(run_folder: Path) -> None:
    """A file without entries of ours; names as DataParallel gives them; another x_T."""
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    released = {name: state[name] for name in ("ema_model", "sched", "optim", "step")}
    released["net_model"] = {f"module.{k}": v for k, v in state["net_model"].items()}
    released["x_T"] = torch.randn(64, 3, 32, 32)
    torch.save(released, run_folder / "ckpt.pt")
    assert run_main(*TRAIN, "--logdir=run", "--total_steps=8").status == 0
    went_on = checkpoint.load(run_folder / "ckpt.pt")
    assert went_on["step"] == 8
    assert went_on["x_T"].shape == (4, *SHAPE)

    torch.save(state, run_folder / "ckpt.pt")
    assert run_main(*TRAIN, "--logdir=run", "--total_steps=8").status == 0
    assert same(checkpoint.load(run_folder / "ckpt.pt")["ema_model"], went_on["ema_model"])


@pytest.mark.parametrize("flag", ["--norm_groups=proportional", "--skip_slicing=segments"])
@pytest.mark.parametrize("settings", ["none", "older"])
def test_checkpoint_that_does_not_say_is_as_published(
    run_folder: Path, refused: Callable, flag: str, settings: str
) -> None:
    """Released files have no settings; older ones of ours do not know all of them."""
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    known = state.pop("settings")
    if settings == "older":
        name = flag.removeprefix("--").split("=")[0]
        state["settings"] = {n: v for n, v in known.items() if n != name}
    torch.save(state, run_folder / "ckpt.pt")
    refused(flag[2:13], *TRAIN, "--notrain", "--profile", "--logdir=run", flag)
    if "skip" in flag:  # so narrow a network as this one has no proportional groups
        refused(flag[2:13], *TRAIN, "--logdir=run", "--total_steps=8", flag)


@pytest.mark.parametrize(
    ("place", "value", "about"),
    [
        *((entry, value, entry) for entry in ("optim", "sched", "step")
          for value in (None, {"param_groups": 3})),
        # Fused Adam would end in SIGSEGV.
        ("optim.state.3.exp_avg", torch.zeros(3), "3 exp_avg"),
        ("ema_model.head.weight", torch.full((16, 1, 3, 3), torch.nan), "head.weight .*finite"),
        ("x_T", torch.full((4, *SHAPE), torch.inf), "x_T .*finite"),
    ],
)  # fmt: skip
def test_checkpoint_that_cannot_go_on(
    run_folder: Path, refused: Callable, place: str, value: object, about: str
) -> None:
    """What else an optimizer's state must not be: test_checkpoint.py."""
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    if place.startswith("optim."):
        state["optim"]["state"][3]["exp_avg"] = value
    elif place.startswith("ema_model."):
        state["ema_model"]["head.weight"] = value
    else:
        state[place] = value
    torch.save(state, run_folder / "ckpt.pt")
    refused(rf"run/ckpt\.pt.*{about}", *TRAIN, "--logdir=run", "--total_steps=8")


# --- starts from a checkpoint ---------------------------------------------------------------------

SHORT = (*TRAIN, "--logdir=new", "--total_steps=1", "--sample_step=0")


@pytest.mark.parametrize("released", [False, True])
def test_a_run_starts_from_a_checkpoint_s_averaged_weights(
    run_folder: Path, released: bool
) -> None:
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    if released:
        state = {name: state[name] for name in ("net_model", "ema_model")}
    torch.save(state, "other.pt")
    start = (*SHORT, "--init_checkpoint=other.pt", "--skip_slicing=segments")
    assert run_main(*start, "--lr=1e-12", "--ema_decay=0.5", "--batch_size=4").status == 0
    new = checkpoint.load(Path("new/ckpt.pt"))
    assert new["step"] == 1
    assert new["settings"]["batch_size"] == 4
    assert new["settings"]["skip_slicing"] == "segments"  # full width is the same
    for name, value in state["ema_model"].items():
        torch.testing.assert_close(new["ema_model"][name], value)
    again = (*start, "--lr=1e-12", "--ema_decay=0.5", "--batch_size=4", "--total_steps=2")
    assert run_main(*again).status == 0
    assert checkpoint.load(Path("new/ckpt.pt"))["step"] == 2


def test_what_shapes_the_network_comes_from_the_checkpoint(
    run_folder: Path, refused: Callable
) -> None:
    for flag in ("--ch=32", "--T=20", "--beta_T=0.4", "--num_groups=8"):
        refused(
            rf"run/ckpt\.pt.*{flag.split('=')[0]}", *SHORT, "--init_checkpoint=run/ckpt.pt", flag
        )
    refused("nowhere.pt", *SHORT, "--init_checkpoint=nowhere.pt")
    refused("init_checkpoint", *SHORT, "--finetune_schedule=run/search.txt")


def test_a_schedule_without_a_width_trains_nothing(run_folder: Path, refused: Callable) -> None:
    Path("zeros.txt").write_text(json.dumps([0] * 10))
    start = (*SHORT, "--init_checkpoint=run/ckpt.pt", "--allow_skip")
    refused(r"zeros\.txt", *start, "--finetune_schedule=zeros.txt")


def test_a_run_for_a_schedule_is_continued_scored_and_searched(
    run_folder: Path, refused: Callable
) -> None:
    Path("search.txt").write_text(json.dumps([0.25] * 6 + [1] * 4))
    Path("other.txt").write_text(json.dumps([0.25] * 10))
    start = (*SHORT, "--init_checkpoint=run/ckpt.pt", "--finetune_schedule")
    whole = (*start, "search.txt", "--total_steps=4", "--sample_step=2", "--eval_step=2")
    whole += ("--num_images=20", "--fid_cache=statistics.npz")
    assert run_main(*whole, "--logdir=whole").status == 0
    assert Path("whole/sample/4_stepaware.png").exists()
    scores = read_lines(Path("whole/train_eval.jsonl"))
    assert [(score["step"], score["width"]) for score in scores] == [(2, 0.55), (4, 0.55)]
    assert run_main(*whole, "--total_steps=2").status == 0
    (Path("new") / "search.txt").write_bytes(Path("search.txt").read_bytes())
    refused("finetune_schedule", *start, "other.txt", "--total_steps=4")
    assert run_main(*whole).status == 0
    first, second = (checkpoint.load(Path(name, "ckpt.pt")) for name in ("whole", "new"))
    assert same(first["ema_model"], second["ema_model"])
    score = ("--flagfile=new/flagfile.txt", "--notrain", "--device=cpu")
    assert run_main(*score, "--eval_stepaware").status == 0
    assert run_main(*score, "--search", "--num_generation=1", "--pop_size=3").status == 0


@pytest.mark.parametrize("typed", [(), ("--sampler=ddpm",)])
def test_a_schedule_s_entries_are_for_the_steps_it_was_searched_with(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, typed: tuple[str, ...]
) -> None:
    """Whatever sampler the flagfile names; the command line wins."""
    path, widths = run_folder / "search.txt", [0.25, 1, 1, 0.25]
    path.write_text(json.dumps(widths))
    (run_folder / "search").mkdir()
    (run_folder / "search" / "flagfile.txt").write_text(
        f"# schedule: {digest(widths_line(widths))}\n--sampler=edm\n--sample_steps=4\n"
    )
    Path("ddpm.txt").write_text("--sampler=ddpm\n--sample_steps=4\n")
    run = Mock()
    monkeypatch.setattr("commands.train.run", run)
    start = (*SHORT, "--init_checkpoint=run/ckpt.pt", f"--finetune_schedule={path}")
    assert run_main(*start, "--flagfile=ddpm.txt", *typed).status == 0
    trained, model, shown = run.call_args[0][:3]
    levels = trained.levels
    placed = levels.timesteps(4) if typed else levels.edm_timesteps(4)
    assert trained.schedule == WidthSchedule(widths, placed).expanded(10).widths
    assert shown.sampler.entries() == placed
    assert model.sampler.entries() == levels.timesteps(4)  # what the run's flagfile has


# --- what may change, and what is kept ------------------------------------------------------------


def test_what_may_change_on_the_way(run_folder: Path, refused: Callable) -> None:
    on = (*TRAIN, "--logdir=run", "--total_steps=8", "--lr=0.0001", "--batch_size=4", "--warmup=1")
    refused("--allow_changes", *on)
    refused("seed", *on, "--allow_changes", "--seed=1")
    result = run_main(*on, "--allow_changes", "--ema_decay=0.8", "--amp=bf16", "--grad_clip=2")
    assert result.status == 0, result.err
    for name in train.CHANGEABLE:
        assert f"from step 6 on, --{name} is" in result.out
    lines = read_lines(run_folder / "train.jsonl")
    assert [line["lr"] for line in lines[-2:]] == pytest.approx([0.0001] * 2)
    assert lines[-3]["changed"]["lr"] == [0.001, 0.0001]
    state = checkpoint.load(run_folder / "ckpt.pt")
    assert state["settings"]["lr"] == 0.0001
    assert state["arithmetic"] == "bfloat16"
    flagfile = (run_folder / "flagfile.txt").read_text()
    assert "--noallow_changes" in flagfile  # the next change is said, too
    assert run_main("--train", "--flagfile=run/flagfile.txt", "--total_steps=9").status == 0


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(here: Path) -> None:
    command = [*TRAIN, "--logdir=run", "--lr=1e30", "--sample_step=0"]
    assert run_main(*command, "--total_steps=1").status == 0
    line = run_main(*command).error
    assert "not finite" in line
    followed = [flag for flag in command if not flag.startswith("--lr=")] + ["--lr=0.001"]
    advised = re.findall(r"--allow_changes|--lr", line)
    assert advised == ["--allow_changes", "--lr"]
    assert run_main(*followed, advised[0]).status == 0
    state = checkpoint.load(here / "run" / "ckpt.pt")
    assert (state["step"], state["settings"]["lr"]) == (6, 0.001)


def released(path: Path) -> dict:
    """Make a checkpoint one without entries of ours."""
    state = torch.load(path, weights_only=True)
    del state["settings"], state["format"]
    torch.save(state, path)
    return state


def test_the_rate_of_a_released_checkpoint(run_folder: Path, refused: Callable) -> None:
    """Its optimizer's state alone says it, and would win over --lr."""
    released(run_folder / "ckpt.pt")
    on = (*TRAIN, "--logdir=run", "--total_steps=7", "--sample_step=0", "--lr=0.0001")
    refused("lr: 0.001 there, 0.0001 here.*--allow_changes", *on)
    assert "--lr is 0.0001 instead of 0.001" in run_main(*on, "--allow_changes").out
    state = checkpoint.load(run_folder / "ckpt.pt")
    assert state["optim"]["param_groups"][0]["lr"] == state["settings"]["lr"] == 0.0001


@pytest.mark.parametrize("links", [True, False])
def test_kept_checkpoints_of_a_run_trained_otherwise(
    run_folder: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    other = run_folder / "ckpt_9.pt"
    other.write_bytes(b"another run's")
    on = (*TRAIN, "--logdir=run", "--sample_step=0", "--total_steps=9")
    refused(r"ckpt_9\.pt", *on, "--allow_changes", "--lr=0.0001")
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    assert run_main(*on).status == 0  # as it was: the run would make that file again
    assert other.read_bytes() == b"another run's"
    other.unlink()
    checkpoint.keep(run_folder / "ckpt.pt", other)
    assert checkpoint.load(other)["step"] == 9


def test_nothing_changes_where_nothing_differs(run_folder: Path, here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "ckpt.pt").write_bytes((run_folder / "ckpt.pt").read_bytes())
    for logdir, flags in (("run", ()), ("other", ("--allow_changes",))):
        assert run_main(*TRAIN, f"--logdir={logdir}", "--total_steps=8", *flags).status == 0
    first, second = (checkpoint.load(Path(name, "ckpt.pt")) for name in ("run", "other"))
    assert same(first["optim"], second["optim"])
    assert same(first["ema_model"], second["ema_model"])


@pytest.mark.parametrize("foreign", [False, True])
def test_a_numbered_checkpoint_is_not_written_over(
    run_folder: Path, refused: Callable, foreign: bool
) -> None:
    numbered, own = run_folder / "ckpt_6.pt", run_folder / "ckpt.pt"
    own.rename(numbered)
    if foreign:
        released(numbered)
        numbered = numbered.rename(run_folder / "ckpt_7.pt")  # its name and its step may differ
    before = numbered.read_bytes()
    on = (*TRAIN, "--logdir=run", f"--ckpt_name={numbered.stem}", "--save_step=1")
    assert run_main(*on, "--total_steps=8").status == 0
    assert numbered.read_bytes() == before
    assert checkpoint.load(own)["step"] == 8
    assert "--ckpt_name=ckpt\n" in (run_folder / "flagfile.txt").read_text()
    refused(rf"{numbered.stem}.*--ckpt_name=ckpt", *on, "--total_steps=9")


def test_a_foreign_checkpoint_is_kept(run_folder: Path) -> None:
    path = run_folder / "ckpt.pt"
    released(path)
    before = path.read_bytes()
    for steps in (7, 8):
        assert run_main(*TRAIN, "--logdir=run", f"--total_steps={steps}").status == 0
        assert (run_folder / "ckpt_original.pt").read_bytes() == before
    assert checkpoint.load(path)["step"] == 8


def test_warm_up_or_mean_longer_than_the_run_is_said(here: Path) -> None:
    plan = (*TRAIN, "--logdir=new", "--dry_run", "--total_steps=20")
    said = run_main(*plan, "--warmup=20", "--ema_decay=0.9999").out
    assert "warning: --warmup=20" in said
    assert "warning: --ema_decay=0.9999" in said
    assert "warning" not in run_main(*plan, "--warmup=19", "--ema_decay=0.7").out


def test_training_that_the_averaged_weights_hardly_see_is_said(run_folder: Path) -> None:
    start = ("--logdir=new", "--init_checkpoint=run/ckpt.pt")
    plan = (*TRAIN, *start, "--dry_run", "--total_steps=20")
    assert "are still 98 % those of the start" in run_main(*plan, "--ema_decay=0.999").out
    assert "warning" not in run_main(*plan, "--ema_decay=0.96").out
