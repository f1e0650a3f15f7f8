"""Checkpoint files: LOGDIR/NAME.pt, a dict with net_model, ema_model, sched, optim, step, x_T and,
where this project wrote it, settings. Files are data: nothing in them is ever executed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from runtime.errors import UserError
from runtime.files import read_tensors, replacing, write_tensors
from runtime.schema import Amount, Count, Name, check

FORMAT = 1
REMEDY = "the file is damaged or of another program: take an earlier one with --ckpt_name"
# Settings of files that lack them: released ones, and those older than the setting.
DEFAULTS = {"skip_slicing": "leading", "norm_groups": "fixed", "finetune_schedule": None}


# What a checkpoint's settings have beside options, which have types and bounds of their own.
Settings = TypedDict(
    "Settings",
    {
        "kind": Literal["diffusers"],  # and class, config, null_class: the network is of diffusers
        "class": Name,
        "config": dict[Name, object],
        "null_class": bool,
        "class_names": list[Name],
        "content": Name,  # the images' fingerprint
        "autoencoder": Name,  # its fingerprint
    },
    total=False,
)


def save(path: str | Path, state: Mapping[str, object]) -> None:
    """Write a checkpoint, whole or not at all."""
    write_tensors(path, {"format": FORMAT, **state})


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. UserError where the file does not exist or is not one."""
    path = Path(path)
    try:
        state = read_tensors(path, "take another checkpoint with --logdir and --ckpt_name")
    except FileNotFoundError as error:
        beside = sorted(p.stem for p in path.parent.glob("[!.]*.pt"))
        others = f"; there are {', '.join(beside)}" if beside else ""
        raise UserError(
            f"no checkpoint at {path}{others}; see --logdir and --ckpt_name, or run --train first"
        ) from error
    if not isinstance(state, dict) or not {"net_model", "ema_model"} <= state.keys():
        names = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state)
        raise UserError(f"{path} has no net_model and ema_model entries (it has: {names})")
    check(state.get("settings", {}), Settings, f"{path}: its settings")
    try:
        check(int(state.get("step", 0)), Count, f"{path}: its step")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be continued or scored: its step is not a number"
        ) from error
    return state


def own_path(path: Path, state: Mapping[str, object]) -> Path:
    """Where a run that goes on from this checkpoint writes its own: NAME.pt after NAME_STEP.pt,
    which is one of several that are kept; else the same file."""
    match = re.fullmatch(r"(.+)_(\d+)", path.stem)
    if match and ("format" not in state or int(match[2]) == state.get("step")):
        return path.with_name(f"{match[1]}.pt")
    return path


def keep(path: Path, name: Path) -> None:
    """Keep a checkpoint under another name too, unless there is a file of that name: the next save
    replaces the one at `path`, not this one."""
    try:
        os.link(path, name)
    except OSError:
        if not name.exists():  # on a file system without links
            with replacing(name) as temporary:
                shutil.copyfile(path, temporary)


def later(path: Path, step: int) -> list[Path]:
    """Kept checkpoints NAME_STEP.pt beside NAME.pt of steps after `step`."""
    kept = [(re.fullmatch(r".*_(\d+)", p.stem), p) for p in path.parent.glob(f"{path.stem}_*.pt")]
    return sorted(p for match, p in kept if match and int(match[1]) > step)


def keep_foreign(path: Path, state: Mapping[str, object]) -> None:
    """Keep a checkpoint that this project did not write as NAME_original.pt, too."""
    kept = path.with_name(f"{path.stem}_original.pt")
    if "format" in state or (kept.exists() and kept.samefile(path)):
        return
    if kept.exists():
        raise UserError(f"{path} would be written over, and {kept.name} is there: move one of them")
    keep(path, kept)


def settings(state: Mapping[str, object]) -> dict[str, object]:
    """The settings of a checkpoint's network and training."""
    return {**DEFAULTS, **state.get("settings", {})}


def entries(state: object, path: str | Path) -> dict[str, Tensor]:
    """A network's state dict, without what DataParallel and torch.compile put before every name."""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: the network's entry is not a state dict of tensors")
    result = dict(state)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either one may be around the other
        if all(str(name).startswith(prefix) for name in result):
            result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def fill(net: nn.Module, state: object, path: str | Path) -> None:
    """Copy a state dict into `net`. UserError that names the first entry that does not fit."""
    stored, wanted = entries(state, path), net.state_dict()
    for name, expected in wanted.items():
        if name not in stored:
            raise UserError(f"{path} is for another network: it has no entry {name}")
        if stored[name].shape != expected.shape:
            raise UserError(
                f"{path} is for another network: {name} is {list(stored[name].shape)} there and "
                f"{list(expected.shape)} here; compare --T, --ch, --ch_mult, --attn, "
                "--num_res_blocks and the data set's channels"
            )
        check_tensor(stored[name], expected, f"{path}: {name}")
    extra = [name for name in stored if name not in wanted]
    if extra:
        raise UserError(f"{path} is for another network: its entry {extra[0]} has no place here")
    net.load_state_dict(stored)


def check_tensor(stored: object, expected: Tensor, name: str) -> None:
    """UserError, which begins with `name`, unless `stored` can take the place of `expected`: a
    dense tensor of its shape and kind of number, with finite values only."""
    if not isinstance(stored, Tensor):
        raise UserError(f"{name} is not a tensor; {REMEDY}")
    if stored.is_nested or stored.layout != torch.strided or stored.is_quantized or stored.is_meta:
        raise UserError(f"{name} is not a plain, dense tensor; {REMEDY}")
    if stored.shape != expected.shape:
        shapes = f"{list(stored.shape)} there and {list(expected.shape)} here"
        raise UserError(f"{name} is {shapes}; {REMEDY}")
    # A float type is converted to another one, as load_state_dict does.
    both_float = stored.is_floating_point() and expected.is_floating_point()
    if stored.dtype != expected.dtype and not both_float:
        raise UserError(f"{name} is {stored.dtype} there and {expected.dtype} here; {REMEDY}")
    if not bool(stored.isfinite().all()):
        raise UserError(f"{name} holds values that are not finite; {REMEDY}")


# --- the state of a training run ------------------------------------------------------------------


class Moments(TypedDict):
    """Adam's state of one parameter. step: a tensor, or a number as torch 1.11 wrote it."""

    step: object
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(TypedDict):
    """A group of Adam's parameters, by number. Its rate is the scheduler's matter; the rest, such
    as `fused`, is how torch computes."""

    params: list[int]
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    amsgrad: NotRequired[bool]


class AdamState(TypedDict):
    """The entry `optim` of a checkpoint."""

    state: dict[int, Moments]
    param_groups: Annotated[list[Group], Meta(min_length=1, max_length=1)]


class SchedulerState(TypedDict):
    """The entry `sched` of a checkpoint."""

    last_epoch: Count
    base_lrs: Annotated[list[Amount], Meta(min_length=1, max_length=1)]


@torch.no_grad()
def load_optimizer(optimizer: Adam, state: object, path: str | Path) -> None:
    """Let `optimizer`, which has one group, go on from the moments in a checkpoint's `optim`.

    Raises UserError unless they fit: Adam's kernels trust shapes and types, and a wrong one ends
    the process. Moments get the memory order of their parameters: fused Adam goes through both as
    they lie in memory, and would take the moments of other weights.
    """
    where = f"{path}: optim"
    stored = check(state, AdamState, where, REMEDY)
    (theirs,), (group,) = stored["param_groups"], optimizer.param_groups
    for name in theirs.keys() - {"params"}:
        if theirs[name] != group[name]:
            raise UserError(f"{where} has {name} = {theirs[name]}, not {group[name]}; {REMEDY}")
    if len(theirs["params"]) != len(group["params"]):
        raise UserError(f"{where} is for another number of parameters; {REMEDY}")
    parameters = dict(zip(theirs["params"], group["params"], strict=True))
    if len(parameters) != len(group["params"]):
        raise UserError(f"{where} names a parameter twice; {REMEDY}")
    for number, moments in stored["state"].items():
        name = f"{where} state {number}"
        if number not in parameters:
            raise UserError(f"{name} is of no parameter; {REMEDY}")
        parameter, step = parameters[number], moments["step"]
        if isinstance(step, Tensor):
            check_tensor(step, torch.zeros((), dtype=step.dtype), f"{name} step")
            step = step.item()
        step = torch.tensor(check(step, Amount, f"{name} step", REMEDY))
        optimizer.state[parameter] = {"step": step.to(parameter.device)}
        for entry in ("exp_avg", "exp_avg_sq"):
            check_tensor(moments[entry], parameter, f"{name} {entry}")
            own = torch.empty_like(parameter).copy_(moments[entry])
            optimizer.state[parameter][entry] = own
        if bool((own < 0).any()):
            raise UserError(f"{name} exp_avg_sq is negative; {REMEDY}")


def load_scheduler(scheduler: LambdaLR, state: object, path: str | Path) -> float:
    """Let `scheduler` go on from the step of a checkpoint's `sched`, at its own rates. Returns the
    rate that was in use there, without warm-up. UserError where `state` does not say them."""
    stored = check(state, SchedulerState, f"{path}: sched", REMEDY)
    step, (base,), (factor,) = stored["last_epoch"], scheduler.base_lrs, scheduler.lr_lambdas
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = [base * factor(step)]
    scheduler.optimizer.param_groups[0]["lr"] = scheduler._last_lr[0]
    return stored["base_lrs"][0]
