"""What a user can get wrong, each through main.py; flags, flagfiles and released files."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from conftest import ROOT, TINY, TRAIN, UPSTREAM, contents, process_main, run_main
from torchvision.io import write_png

import build
import dataset as data
import options
import score
from commands.evaluate import Evaluation
from model import SlimmableUNet, WidthSchedule, average
from runtime import files
from runtime.errors import UserError
from runtime.settings import Settings, option
from settings import GROUPS, OPTIONS, Configuration, owners
from train import Trainer

Refused = Callable[..., str]
EVAL = ["--logdir=run", "--device=cpu", "--num_images=70", "--batch_size=70"]
EVAL += ["--fid_encoder=pixels", "--fid_cache=stats.npz"]
STEPAWARE = [*EVAL, "--eval_stepaware"]


# --- flags ----------------------------------------------------------------------------------------

DEFAULTS = {
    **dict.fromkeys(["train", "eval", "eval_stepaware", "eval_ensemble", "search"], False),
    **dict.fromkeys(["profile", "parallel", "fid_use_torch", "slimmable_unet"], False),
    **dict.fromkeys(["slimmable_g16", "sandwich", "random_init"], False),
    **{"ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2, "dropout": 0.1},
    **{"beta_1": 1e-4, "beta_T": 0.02, "T": 1000, "mean_type": "epsilon"},
    **{"var_type": "fixedlarge", "lr": 2e-4, "grad_clip": 1.0, "total_steps": 800000},
    **{"img_size": 32, "warmup": 5000, "batch_size": 128, "num_workers": 4},
    **{"ema_decay": 0.9999, "logdir": "./logs/DDPM_CIFAR10_EPS", "sample_size": 64},
    **{"sample_step": 1000, "save_step": 5000, "eval_step": 0, "num_images": 50000},
    **{"fid_cache": "./stats/cifar10.train.npz", "ckpt_name": "ckpt", "min_width": 0.25},
    **{"num_sandwich_sampling": 3, "candidate_width": [0.75, 0.5], "assigned_width": 1.0},
    **{"large_logdir": "./logs/DDPM_CIFAR10_EPS", "small_logdir": "./logs/DDPM_CIFAR10_EPS"},
    **{"small_ch": 64, "start": 200, "end": 0, "num_generation": 1000, "pop_size": 10},
    **{"fid_weight": 0.5, "macs_weight": 0.001, "mutation_prob": 0.001},
}


def test_published_defaults_and_choices() -> None:
    defaults = {name: flags.FLAGS[name].default for name in DEFAULTS}
    assert {n: (v, type(v)) for n, v in defaults.items()} == {
        n: (v, type(v)) for n, v in DEFAULTS.items()
    }
    for name, choices in (("mean_type", "epsilon xprev xstart"), ("var_type", "fixedlarge "
                          "fixedsmall")):  # fmt: skip
        assert set(choices.split()) <= set(flags.FLAGS[name].parser.enum_values)


@pytest.mark.parametrize("words", ["--fid_use_torch", "--level_seeds", "--surrogate=64",
                                   "--search_ladder=512x25", "--distance_limit=1.5"])  # fmt: skip
def test_retired_options_are_read_and_said(run_folder: Path, words: str) -> None:
    """Also where a flagfile of an earlier version has them; unless they were off there."""
    name = words.partition("=")[0]
    Path("old.txt").write_text(f"{words}\n")
    Path("off.txt").write_text("--nolevel_seeds\n--surrogate=0\n--search_ladder=\n")
    common = ["--profile", "--logdir=run", "--device=cpu"]
    assert f"{name} no longer does anything" in run_main(*common, "--flagfile=old.txt").out
    result = run_main(*common, "--flagfile=off.txt")
    assert result.status == 0
    assert "no longer" not in result.out
    refused = run_main("--train", "--distill", "--logdir=new", "--device=cpu")
    assert "--distill" in refused.error


def test_an_option_has_one_owner() -> None:
    """--rho of the sampler once changed the levels that a network was told it was trained at."""

    @dataclass(frozen=True)
    class Second(Settings):
        rho: float = option(7.0, "of something else")

    with pytest.raises(ValueError, match="rho has a second owner, Second"):
        owners({**GROUPS, "More": (Second,)})
    assert len(OPTIONS) == len({f.name for c in GROUPS.values() for s in c for f in fields(s)})


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_grouped_and_lists_every_flag(here: Path, word: str) -> None:
    result = run_main(word)
    assert result.status == 0
    for name in (*OPTIONS, *options.MODES):
        assert re.search(rf"--{name}\b", result.out), name
    headings = [line for line in result.out.splitlines() if re.fullmatch(r"[A-Z]\w+:", line)]
    assert headings == ["Modes:", *(f"{name}:" for name in GROUPS)]
    assert result.out.count("python main.py --") >= 3  # examples


def test_flags_that_are_absls_own(refused: Refused) -> None:
    assert "--logdir" in refused("--log_dir", "--train", "--log_dir=run")
    released = f"--flagfile={UPSTREAM / 'flagfile_eval.txt'}"  # it has an empty --log_dir
    refused("no checkpoint", released, "--eval", "--logdir=nowhere")


# --- modes ----------------------------------------------------------------------------------------


MODES = [  # what a flagfile says, the command line, the error
    ("", "", "no mode.*" + ".*".join(f"--{mode}" for mode in options.MODES)),
    ("", "--train --eval", "2 modes at once.*train.*eval"),
    ("", "--eval_stepaware=true -search", "2 modes at once"),
    ("--train\n--eval", "", "2 modes at once"),
    # Released flagfiles carry a mode, and one from the command line wins.
    *(("--train", mode, r"no checkpoint at nowhere/ckpt\.pt")
      for mode in ("--eval_stepaware", "-eval", "--search=true", "--notrain --eval")),
    ("--train", "--notrain", "no mode"),
    ("--train", "--train=false", "no mode"),
    ("--eval", "--train=false", "no checkpoint"),
    ("--eval", "--train=0", "no checkpoint"),
    ("--eval", "--notrain", "no checkpoint"),
    # The last word on a mode counts.
    ("", "--train --notrain", "no mode"),
    ("", "--train --notrain --eval", "no checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("flagfile", "arguments", "match"), MODES)
def test_modes(refused: Refused, here: Path, flagfile: str, arguments: str, match: str) -> None:
    (here / "flags.txt").write_text(f"{flagfile}\n--logdir=nowhere\n")
    words = arguments.split()
    refused(match, "--flagfile=flags.txt", *words)
    refused(match, *words, "--flagfile=flags.txt")


@pytest.mark.parametrize(
    "after", ["--train", "-train", "--flagfile=f.txt", "--noparallel", "--norm_groups=fixed"]
)
@pytest.mark.parametrize("flag", ["--logdir", "-export_diffusers", "--batch_size", "--flagfile"])
def test_a_flag_is_no_value_of_another(refused: Refused, flag: str, after: str) -> None:
    refused(f"--{flag.strip('-')}: its value is missing", "--eval", flag, after)
    assert parsed("--logdir", "-x", "--seed", "-1")["logdir"] == "-x"


# --- flagfiles ------------------------------------------------------------------------------------


def parsed(*arguments: object) -> dict:
    with flagsaver.flagsaver():
        options.parse(["main.py", *map(str, arguments)])
        return {name: flags.FLAGS[name].value for name in OPTIONS}


@pytest.mark.parametrize("name", ["slimmable_CIFAR10.txt", "flagfile_eval.txt"])
def test_released_flagfiles_load(name: str, here: Path) -> None:
    assert run_main(f"--flagfile={UPSTREAM / name}", "--eval", "--logdir=x").status == 2  # no ckpt
    values = parsed(f"--flagfile={UPSTREAM / name}")
    given = {}
    for line in (UPSTREAM / name).read_text().split():
        flag, _, value = line.removeprefix("--").partition("=")
        if flag.removeprefix("no") in values and flag not in values:
            given[flag.removeprefix("no")] = False
        elif flag in values:
            new = flags.FLAGS[flag].parser.parse(value) if value else True
            given[flag] = [*given.get(flag, []), new] if flag in MULTI else new
    assert len(given) > 30
    assert {name: values[name] for name in given} == given
    untouched = {name for name in values if name not in given}
    assert all(values[name] == flags.FLAGS[name].default for name in untouched)


MULTI = ("ch_mult", "attn", "candidate_width")


def test_the_command_line_wins_wherever_it_stands(here: Path) -> None:
    (here / "flags.txt").write_text("--ch_mult=1\n--ch_mult=2\n--lr=0.5\n--nosandwich\n--T=9\n")
    for words in (["--flagfile=flags.txt"], ["--flagfile", "flags.txt"], ["-flagfile=flags.txt"]):
        for place in (0, 3):
            said = ["--ch_mult=3", "--lr", "0.1", "--sandwich"]
            said[place:place] = words
            values = parsed(*said)
            assert (values["ch_mult"], values["lr"], values["sandwich"]) == ([3], 0.1, True)
            assert values["T"] == 9
    with flagsaver.flagsaver():
        _, notices = options.parse(["main.py", "--flagfile=flags.txt", "--ch_mult=3", "--T=9"])
    assert len(notices) == 1
    assert "--ch_mult=3 (there 1, 2)" in notices[0]
    assert "--T" not in notices[0]


def test_flagfiles_in_flagfiles(here: Path) -> None:
    (here / "a.txt").write_text("--flagfile=b.txt\n--T=5\n")
    (here / "b.txt").write_text("--lr=0.25\n")
    values = parsed("--flagfile=a.txt")
    assert (values["T"], values["lr"]) == (5, 0.25)


def test_a_flagfile_with_a_byte_order_mark(here: Path) -> None:
    (here / "a.txt").write_text("\ufeff--T=5\r\n--lr=0.25\r\n", encoding="utf-8")
    values = parsed("--flagfile=a.txt")
    assert (values["T"], values["lr"]) == (5, 0.25)


def test_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    paths = [name for name, o in OPTIONS.items() if o.path]
    assert {"logdir", "search_dir", "fid_cache", "schedule", "large_logdir"} <= set(paths)
    config = Configuration.of(**dict.fromkeys(paths, "~/x"))
    assert {config[name] for name in paths} == {str(here / "home" / "x")}


def test_mode_of_a_released_flagfile_gives_way(refused: Refused) -> None:
    released = f"--flagfile={UPSTREAM / 'slimmable_CIFAR10.txt'}"
    for mode in ("--eval_stepaware", "--search", "--eval"):
        refused("no checkpoint at run/here", released, mode, "--logdir=run", "--ckpt_name=here")


def test_released_schedule_and_network() -> None:
    """design: 6.41 of 12.44 GFLOPs, 51.5 % of full width."""
    widths = (1.0, 0.75, 0.5, 0.25)
    schedule = WidthSchedule.load(UPSTREAM / "search.txt", 1000, widths)
    assert [schedule.widths.count(w) for w in widths] == [274, 181, 534, 11]
    with torch.device("meta"):
        net = SlimmableUNet(1000, 128, [1, 2, 2, 2], [1], 2, 0.1)
    flops = {w: score.flops(net, w, (3, 32, 32)) for w in widths}
    mean = average(schedule, range(1000), flops)
    assert mean / 1e9 == pytest.approx(6.41, abs=0.005)
    assert flops[1.0] / 1e9 == pytest.approx(12.4437, abs=5e-5)
    assert mean / flops[1.0] == pytest.approx(0.515, abs=5e-4)


def test_flagfile_of_a_run(run_folder: Path) -> None:
    lines = (run_folder / "flagfile.txt").read_text().splitlines()
    names = {line.removeprefix("--").partition("=")[0] for line in lines}
    for mode in options.MODES:
        assert not {mode, f"no{mode}"} & names
    assert "flagfile" not in names
    again = parsed("--flagfile=run/flagfile.txt")
    arguments = [a for a in TRAIN if a != "--train"]
    first = parsed(*arguments)
    assert again.pop("logdir") != first.pop("logdir")
    assert again == first


def test_flagfile_of_a_run_with_every_kind_of_value(here: Path) -> None:
    odd = ["--data_root=a b", "--eta=1e-05", "--ch_mult=3", "--nosandwich", "--schedule=", "--lr=1"]
    with flagsaver.flagsaver():
        options.parse(["main.py", "--train", *odd])
        (here / "flagfile.txt").write_text(options.flagfile_text(options.configuration()))
    again = parsed("--flagfile=flagfile.txt")
    assert again == parsed(*odd)
    assert again["data_root"] == "a b"


# --- the command line -----------------------------------------------------------------------------


def test_unknown_flag(refused: Refused) -> None:
    refused("Unknown command line flag 'trian'", "--trian")
    line = refused("Unknown command line flag 'img_siz'", "--train", "--img_siz=32")
    assert "img_size" in line  # it guesses what was meant


def test_flagfile_of_another_kind(refused: Refused, run_folder: Path) -> None:
    refused(r"--flagfile=run/ckpt\.pt", "--flagfile=run/ckpt.pt", "--train")
    Path("utf16.txt").write_text("--train", encoding="utf-16")
    refused(r"utf16\.txt.*UTF-8", "--flagfile=utf16.txt")
    refused(r"missing\.txt", "--train", "--flagfile=missing.txt")
    refused(r"missing\.txt", "--train", "--flagfile", "missing.txt")


def test_stray_argument(refused: Refused) -> None:
    refused("stray argument 'stray'", "--train", "stray")


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--lr=fast", "lr"), ("--T=ten", "T"), ("--mean_type=noise", "mean_type"),
        ("--fid_encoder=vgg", "fid_encoder"),
        ("--train=perhaps", "train"), ("--nosandwich=1", "nosandwich"),
        ("--seed=-1", "seed"), ("--amp=fp8", "amp"),
    ],
)  # fmt: skip
def test_value_of_another_kind(refused: Refused, argument: str, named: str) -> None:
    assert f"--{named}=" in refused("error: ", "--eval", argument)


BOUNDS = {  # what no run of the mode can use
    "--train": [
        "--batch_size=0", "--total_steps=0", "--save_step=0", "--sample_size=0", "--log_step=0",
        "--T=0", "--ch=0", "--num_res_blocks=0", "--num_groups=0", "--ch_mult=0", "--warmup=-1",
        "--sample_step=-1", "--eval_step=-1", "--num_workers=-1", "--lr=0", "--lr=nan",
        "--grad_clip=0", "--ema_decay=1", "--dropout=1", "--beta_1=0", "--beta_T=1",
        "--sample_steps=-1", "--eta=-1", "--num_sandwich_sampling=1", "--img_size=0",
        "--attn=2", "--sample_steps=11", "--img_size=9", "--num_groups=32",
        "--min_width=0", "--min_width=nan", "--candidate_width=-0.25", "--candidate_width=1.5",
        # Beyond any machine's memory.
        "--T=10000000", "--ch=100000000", "--ch_mult=100000000", "--num_res_blocks=1000000000000",
        "--img_size=400000000", "--batch_size=1000000000000", "--sample_size=1000000000000",
    ],
    "--eval": [
        "--num_images=0", "--num_images=1", "--batch_size=0", "--batch_size=-4",
        "--sample_steps=-1", "--sample_steps=11", "--eta=-0.5", "--sampler=magic",
        "--num_images=1000000000000000", "--assigned_width=0", "--assigned_width=nan",
        "--device=cuda:7", "--device=tpu", "--device=cuda:x", "--device=meta", "--device=",
    ],
    "--search": [
        "--pop_size=0", "--pop_size=1", "--num_generation=0", "--mutation_prob=-0.1",
        "--mutation_prob=2", "--mutation_prob=nan", "--fid_weight=-1", "--macs_weight=nan",
        "--state_memory=1000000000", "--pop_size=1000000000",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "argument"), [(mode, each) for mode, arguments in BOUNDS.items() for each in arguments]
)
def test_values_that_cannot_be_used(
    refused: Refused, run_folder: Path, mode: str, argument: str
) -> None:
    usual = [*TRAIN, "--logdir=new"] if mode == "--train" else [*EVAL, mode]
    refused(rf"{argument.partition('=')[0].removeprefix('--')}\b", *usual, argument)


def test_small_network_without_channels(refused: Refused, run_folder: Path) -> None:
    both = ["--large_logdir=run", "--small_logdir=run", "--eval_ensemble"]
    for ch in (0, -16):
        refused("--(small_)?ch", *EVAL, *both, f"--small_ch={ch}")
    refused("another network.*--(small_)?ch", *EVAL, *both, "--small_ch=32")


def test_networks_that_cannot_take_turns(refused: Refused, run_folder: Path, here: Path) -> None:
    other = ["--logdir=other", "--T=20", "--total_steps=1", "--sample_step=0"]
    assert run_main(*TRAIN, *other).status == 0
    both = ["--large_logdir=run", "--small_logdir=other", "--small_ch=16", "--eval_ensemble"]
    refused("cannot take turns .T: 20 small, 10 large", *EVAL, *both)
    refused("--dry_run: only --train, ", *EVAL, *both, "--dry_run")
    other = ["--logdir=cosine", "--beta_schedule=squaredcos_cap_v2", "--total_steps=1"]
    assert run_main(*TRAIN, *other, "--sample_step=0").status == 0
    both[1] = "--small_logdir=cosine"
    refused("take turns .beta_schedule: squaredcos_cap_v2 small, linear large", *EVAL, *both)


def test_sixteen_groups_and_their_flagfile(here: Path, refused: Refused) -> None:
    others = ("--num_groups", "--ch", "--attn", "--slimmable")
    train = [a for a in TRAIN if not a.startswith(others)]
    train += ["--ch=64", "--ch_mult=1", "--attn=0", "--total_steps=1", "--sample_step=0"]
    assert run_main(*train, "--slimmable_g16", "--logdir=run").status == 0
    found = run_main("--flagfile=run/flagfile.txt", *EVAL, "--eval", "--assigned_width=0.5")
    assert found.status == 0, found.err
    assert run_main(*EVAL, "--eval", "--assigned_width=0.25").status == 0
    again = run_main("--train", "--flagfile=run/flagfile.txt")
    assert "nothing to do" in again.out
    refused("num_groups: 16 there, 32 here", *EVAL, "--eval", "--num_groups=32")


def test_search_of_other_weights_or_by_other_statistics(
    here: Path, run_folder: Path, refused: Refused
) -> None:
    """The statistics' file may move, and be made again, but not hold others."""
    search = [*EVAL, "--search", "--num_generation=1", "--pop_size=4"]
    assert run_main(*search).status == 0
    log = Path("run/search/search.jsonl").read_bytes()
    os.rename("stats.npz", "moved.npz")
    for name in ("moved", "again"):
        assert run_main(*search, f"--fid_cache={name}.npz").status == 0
    assert Path("run/search/search.jsonl").read_bytes() == log
    others = dict(np.load("moved.npz"))
    np.savez("moved.npz", **{**others, "mu": others["mu"] + 0.01})
    refused("other settings .statistics: ", *search, "--fid_cache=moved.npz")
    state = torch.load("run/ckpt.pt", weights_only=True)
    state["ema_model"]["tail.2.bias"] += 1
    torch.save(state, "run/ckpt.pt")
    refused("other settings .weights: ", *search, "--fid_cache=again.npz")


def test_plan_of_a_plain_network(here: Path) -> None:
    plain = [a for a in TRAIN if a not in ("--sandwich", "--slimmable_unet")]
    assert "training: 6 steps × 8 images × 1 widths" in run_main(*plain, "--dry_run").out


# --- the network ----------------------------------------------------------------------------------


def test_plain_network_has_one_width(refused: Refused, run_folder: Path) -> None:
    refused("--slimmable_unet", *EVAL, "--eval", "--noslimmable_unet", "--assigned_width=0.5")
    refused("--slimmable_unet", *EVAL, "--search", "--noslimmable_unet")
    refused("--slimmable_unet", *TRAIN, "--logdir=new", "--noslimmable_unet")


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--eval", "--train"])
def test_checkpoint_of_another_network(refused: Refused, run_folder: Path, mode: str) -> None:
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    del state["settings"]
    torch.save(state, run_folder / "ckpt.pt")
    arguments = [*TRAIN, "--logdir=run"] if mode == "--train" else [*TINY, *EVAL, mode]
    line = refused("is for another network: time_embedding", *arguments, "--ch=32")
    assert "[10, 16] there and [10, 32] here" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("T", None), ("beta_1", [1]), ("candidate_width", 0.5), ("ch_mult", "ab"), ("img_size", {})],
)
def test_settings_of_another_kind(
    refused: Refused, run_folder: Path, name: str, value: object
) -> None:
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    state["settings"][name] = value
    torch.save(state, run_folder / "ckpt.pt")
    refused(rf"run/ckpt\.pt: .*--{name}=", *EVAL, "--eval")


def test_settings_that_are_none(refused: Refused, run_folder: Path) -> None:
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    torch.save(state | {"settings": [1]}, run_folder / "ckpt.pt")
    refused("run/ckpt.pt: its settings", *EVAL, "--eval")


def test_flags_that_contradict_the_checkpoint(refused: Refused, run_folder: Path) -> None:
    line = refused("other settings", *EVAL, "--eval", "--T=20", "--mean_type=xstart")
    assert "--T: 10 there, 20 here" in line
    assert "--mean_type: epsilon there, xstart here" in line


@pytest.mark.parametrize("mode", ["--eval", "--train", "--eval_ensemble"])
def test_checkpoint_that_carries_code(refused: Refused, run_folder: Path, mode: str) -> None:
    """The file that test_checkpoint.py springs: refused in every mode, before anything else."""
    (run_folder / "ckpt.pt").write_bytes(pickle.dumps(print))
    arguments = [*TRAIN, "--logdir=run"] if mode == "--train" else [*EVAL, mode]
    refused(r"run/ckpt\.pt", *arguments, "--large_logdir=run", "--small_logdir=run")


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no width schedule at run/search.txt.*--search"),
        ("[__import__('os').system('touch ran')]", "search.txt.*JSON"),
        ("[" * 100 + "]" * 100, "search.txt.*deep"),
        (json.dumps([1] * 9 + [0.3]), r"search.txt.*entry 9 is width 0\.3"),
    ],
)  # what else a file can hold: test_stepaware.py
def test_schedules(refused: Refused, run_folder: Path, text: str | None, match: str) -> None:
    if text is not None:
        (run_folder / "search.txt").write_text(text)
    refused(match, *STEPAWARE)


def test_schedule_for_other_steps(refused: Refused, run_folder: Path, here: Path) -> None:
    (here / "five.txt").write_text(json.dumps([1] * 5))
    refused("five.txt has 5 entries; expected 10", *STEPAWARE, "--schedule=five.txt")
    line = refused("has 5 entries", *STEPAWARE, "--schedule=five.txt", "--sample_steps=4")
    assert "10 (every timestep) or 4" in line
    arguments = [*STEPAWARE, "--schedule=five.txt", "--sample_steps=5"]
    assert run_main(*arguments).status == 0


# --- data and statistics --------------------------------------------------------------------------


def test_data_set_of_other_channels(refused: Refused, run_folder: Path, here: Path) -> None:
    from PIL import Image

    (here / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(here / "photos" / "a.png")
    where = ["--dataset=image_folder", "--data_root=photos"]
    refused("3 channels and the network 1", *EVAL, "--eval", *where)


def test_wrong_statistics(refused: Refused, run_folder: Path, here: Path) -> None:
    """What else they can be: test_score.py."""
    np.savez(here / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    line = refused(r"stats\.npz.*shape \(5,\).*\(64,\)", *EVAL, "--eval")
    assert "--fid_cache" in line


def test_statistics_of_two_folders(run_folder: Path) -> None:
    evaluate = [a for a in EVAL if not a.startswith("--fid_cache")]
    evaluate += ["--eval", "--dataset=image_folder", "--img_size=8"]
    found = []
    for value in (0, 255, 0):
        folder = Path(f"images{value}")
        folder.mkdir(exist_ok=True)
        for i in range(3):
            write_png(torch.full((1, 8, 8), value, dtype=torch.uint8), str(folder / f"{i}.png"))
        result = run_main(*evaluate, f"--data_root={folder}")
        assert result.status == 0, result.err
        found.append(json.loads(Path("run/eval.json").read_text())["distance"])
    assert found[0] == found[2] != found[1]
    assert len(list(Path("stats").glob("image_folder8-*.train.pixels.npz"))) == 2
    evaluate.append("--fid_cache=mine.npz")
    assert run_main(*evaluate, "--data_root=images0").status == 0
    error = run_main(*evaluate, "--data_root=images255").error
    assert re.search(r"mine\.npz .*content: .*--fid_cache", error)
    moved = run_main(*evaluate, "--data_root=moved")  # believed where the images are not there
    assert "mine.npz are believed" in moved.out
    assert moved.status == 0


def test_stopped_statistics_go_on(
    run_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = [*EVAL, "--eval", "--batch_size=500"]
    assert run_main(*evaluate).status == 0
    whole = dict(np.load("stats.npz"))
    Path("stats.npz").unlink()
    starts, everything = [], data.everything

    def stopping(*args: object) -> Iterator[torch.Tensor]:
        starts.append(args[3])
        for i, images in enumerate(everything(*args)):
            if len(starts) == 1 and i == 2:
                raise KeyboardInterrupt
            yield images

    monkeypatch.setattr(data, "everything", stopping)
    monkeypatch.setattr(files.Unfinished, "due", lambda self: True)
    assert run_main(*evaluate).status != 0
    assert not Path("stats.npz").exists()
    assert run_main(*evaluate).status == 0
    assert starts == [0, 1000]
    again = dict(np.load("stats.npz"))
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[key], whole[key]) for key in whole)
    assert not list(Path().glob(".stats*"))


def test_few_images_warn_and_go_on(run_folder: Path) -> None:
    result = run_main(*EVAL, "--eval", "--num_images=20")
    assert result.status == 0, result.err
    warning = re.search("warning: 20 images .*64 features.*", result.out + result.err)
    assert "biased" in warning[0]
    assert files.read_json(run_folder / "eval.json", Evaluation)["images"] == 20
    assert "warning" not in run_main(*EVAL, "--eval").out


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--train", "--eval", "--search"])
def test_folder_that_cannot_be_written(
    refused: Refused, run_folder: Path, here: Path, mode: str
) -> None:
    (here / "file").write_text("in the way")
    if mode == "--train":
        refused("cannot write in file", *TRAIN, "--logdir=file")
        refused("cannot write in file/deep", *TRAIN, "--logdir=file/deep")
    elif mode == "--search":
        (run_folder / "search").write_text("in the way")
        refused(
            "cannot use run/search.*irectory", *EVAL, mode, "--pop_size=2", "--num_generation=1"
        )
    else:
        both = [*TINY, *EVAL, "--large_logdir=run", "--small_logdir=run", "--small_ch=16"]
        refused("cannot write in file", *both, "--eval_ensemble", "--logdir=file")


def test_a_full_disk_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", full)  # tensorboard's, in its own thread
    result = run_main(*TRAIN, "--logdir=run")
    assert "No space left on device" in result.error


def test_statistics_that_cannot_be_saved(refused: Refused, run_folder: Path, here: Path) -> None:
    (here / "file").write_text("in the way")
    refused("--fid_cache", *EVAL, "--eval", "--fid_cache=file/stats.npz")


def test_parallel_without_gpus_says_so_once(run_folder: Path) -> None:
    both = ["--eval_ensemble", "--large_logdir=run", "--small_logdir=run", "--small_ch=16"]
    for mode in (["--eval"], [*TINY, *both]):
        result = run_main(*EVAL, *mode, "-parallel")
        assert result.status == 0, result.err
        if torch.cuda.device_count() < 2:
            assert result.out.count("--parallel: ") == 1


def test_compiled_networks_are_not_for_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first = torch.device("cuda", 0)
    assert build.use_parallel(Configuration.of(parallel=True), first)
    with pytest.raises(UserError, match="--compile with --parallel"):
        build.use_parallel(Configuration.of(parallel=True, compile=True), first)


# --- processes of their own -----------------------------------------------------------------------


def test_real_processes_end_without_traceback(run_folder: Path, here: Path) -> None:
    (run_folder / "search.txt").write_text("__import__('os').system('touch ran')")
    before = contents(here)
    for arguments, match in (
        (["stray", "--train"], "stray argument"),
        (STEPAWARE, "search.txt is not JSON"),
    ):
        result = process_main(here, *arguments)
        assert result.status == 2
        assert re.search(match, result.error)
        assert result.err == result.error + "\n"
    assert contents(here) == before


def test_what_nobody_foresaw_is_one_line_too(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("of a\nlibrary")

    monkeypatch.setattr("build.load_model", broken)
    result = run_main(*EVAL, "--eval")
    assert result.status == 1
    assert result.error.endswith("of a library; the traceback is in run/error.log")
    assert "in broken" in (run_folder / "error.log").read_text()
    elsewhere = run_main(*EVAL, "--eval", "--logdir=missing")
    assert "error.log" in elsewhere.error
    assert not Path("missing").exists()


def test_a_reader_that_leaves(here: Path) -> None:
    command = f"{sys.executable} {ROOT / 'main.py'} --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("python main.py --MODE [flags]\n", "")


def test_a_reader_that_leaves_is_no_failure(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a mode, too: no traceback is kept, and no line says so."""

    def pick(config: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("commands.pick.pick", pick)
    with pytest.raises(BrokenPipeError):  # which main.start ends at
        run_main("--search", "--pick", "--logdir=.")
    assert not contents(here)


def test_a_run_is_alone_in_its_folder(
    refused: Refused, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, said = Trainer.train_step, []

    def train_step(*arguments: object) -> None:
        if not said:
            said.append(run_main(*TRAIN, "--logdir=first").error)
        step(*arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert run_main(*TRAIN, "--logdir=first").status == 0
    assert "another process is at work in first" in said[0]
    with files.alone_in("run/search"):
        refused("another process is at work in run/search", *EVAL, "--search")
    refused("no checkpoint", *EVAL, "--search", "--logdir=nothing")
    assert not Path("nothing").exists()


def test_recipes_hold_neither_modes_nor_machines() -> None:
    for path in (ROOT / "config").glob("*.txt"):
        lines = path.read_text().splitlines()
        assert not {f"--{mode}" for mode in options.MODES} & set(lines), path
        assert not any(re.search(r"=(/|~)", line) for line in lines), path
        assert parsed(f"--flagfile={path}")
