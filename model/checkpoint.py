"""Checkpoint files: LOGDIR/NAME.pt, a dict with net_model, ema_model, sched, optim, step, x_T and,
where this project wrote it, settings. Files are data: nothing in them is ever executed.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from runtime.errors import UserError
from runtime.files import read_tensors, replacing, write_tensors
from runtime.schema import Count, Name, check

FORMAT = 1
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter
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
        state = read_tensors(path)
    except FileNotFoundError as error:
        beside = sorted(p.stem for p in path.parent.glob("[!.]*.pt"))
        others = f"; there are {', '.join(beside)}" if beside else ""
        raise UserError(
            f"no checkpoint at {path}{others}; see --logdir and --ckpt_name, or run --train first"
        ) from error
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            start = file.read(1)
        if start not in (b"P", b"\x80"):  # neither a zip archive nor a pickle
            raise UserError(f"{path} is not a checkpoint; see --logdir and --ckpt_name") from error
        raise UserError(
            f"{path} holds more than tensors and plain values, which could carry code, so it was "
            "not loaded; save it again as a dict of state dicts"
        ) from error
    except Exception as error:  # whatever torch's reader makes of damaged bytes
        raise UserError(
            f"{path} is truncated or not a checkpoint ({_first_line(error)}); "
            "take an earlier one with --ckpt_name"
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


def fingerprint(net: nn.Module) -> str:
    """16 hexadecimal digits that other weights would change."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def entries(state: object, path: str | Path) -> dict[str, Tensor]:
    """A network's state dict, without the "module." that DataParallel puts before every name."""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: the network's entry is not a state dict of tensors")
    if state and all(str(name).startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


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


def load_optimizer(optimizer: Optimizer, state: Mapping[str, object]) -> None:
    """`optimizer.load_state_dict(state)`, and moments in the memory order of their parameters.

    Fused Adam goes through both as they lie in memory: where one is channels_last and the other is
    not, it would take the moments of other weights. `check_optimizer` comes before.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if name != "step" and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def check_optimizer(state: object, optimizer: Optimizer, path: str | Path) -> None:
    """UserError unless `state` is a state dict that this Adam can go on from.

    Its kernels trust shapes and types, and a wrong one ends the process. lr, foreach and fused may
    differ from the optimizer's; whatever else its groups say may not.
    """
    where = f"{path}: optim"
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise UserError(f"{where} is not an optimizer's state; {REMEDY}")
    own, groups = optimizer.state_dict()["param_groups"], state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own):
        raise UserError(f"{where} does not have {len(own)} group(s) of parameters; {REMEDY}")
    parameters = {}
    for stored, expected, group in zip(groups, own, optimizer.param_groups, strict=True):
        _check_group(stored, expected, where)
        parameters |= dict(zip(stored["params"], group["params"], strict=True))
    if len(parameters) != sum(len(group["params"]) for group in own):
        raise UserError(f"{where} names a parameter twice; {REMEDY}")
    tensor_steps = set()
    for number, values in state["state"].items():
        if number not in parameters:
            raise UserError(f"{where} has a state {_short(number)} of no parameter; {REMEDY}")
        if not isinstance(values, dict) or values.keys() != ADAM_STATE:
            raise UserError(f"{where} state {number} is not {', '.join(ADAM_STATE)}; {REMEDY}")
        for name in ("exp_avg", "exp_avg_sq"):
            check_tensor(values[name], parameters[number], f"{where} state {number} {name}")
        if bool((values["exp_avg_sq"] < 0).any()):
            raise UserError(f"{where} state {number} exp_avg_sq is negative; {REMEDY}")
        step = values["step"]
        tensor_steps.add(isinstance(step, Tensor))
        if isinstance(step, Tensor):
            check_tensor(step, torch.zeros((), dtype=step.dtype), f"{where} state {number} step")
            step = step.item()
        if not _is_number(step) or step < 0:
            raise UserError(f"{where} state {number} step is not a number of steps; {REMEDY}")
    if len(tensor_steps) > 1:  # torch looks at the first only
        raise UserError(f"{where} mixes steps that are tensors with others; {REMEDY}")


def _check_group(stored: object, expected: Mapping[str, object], where: str) -> None:
    """One of the optimizer's groups of settings, against the one that it is for."""
    if not isinstance(stored, dict):
        raise UserError(f"{where} has a group that is not a table of names and values; {REMEDY}")
    params = stored.get("params")
    if not isinstance(params, list) or len(params) != len(expected["params"]):
        raise UserError(f"{where} is for another number of parameters; {REMEDY}")
    if not all(type(number) is int for number in params):
        raise UserError(f"{where} has parameters that are not numbered; {REMEDY}")
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in stored:
            raise UserError(f"{where} has no {name}; {REMEDY}")
    for name, value in stored.items():
        if name == "params":
            continue
        if name in ("lr", "initial_lr"):
            fits = _is_number(value) and value >= 0
        elif name in ("foreach", "fused"):
            fits = value is None or isinstance(value, bool)
        elif name in expected:
            fits = _same(value, expected[name])
        else:  # of another version of torch
            fits = value is None or isinstance(value, bool | int | float | str)
        if not fits:
            raise UserError(
                f"{where} has {_short(name)} = {_short(value)}, which does not fit; {REMEDY}"
            )


def check_scheduler(state: object, scheduler: LRScheduler, path: str | Path) -> None:
    """UserError unless `state` is a state dict that this LambdaLR can go on from.

    torch writes whatever stands there over the scheduler's attributes.
    """
    where, own = f"{path}: sched", scheduler.state_dict()
    if not isinstance(state, dict):
        raise UserError(f"{where} is not a table of names and values; {REMEDY}")
    missing = {"base_lrs", "last_epoch", "_step_count", "lr_lambdas"} - state.keys()
    if missing:
        raise UserError(f"{where} has no {sorted(missing)[0]}; {REMEDY}")
    for name, value in state.items():
        if isinstance(own.get(name), list):
            fits = isinstance(value, list) and len(value) == len(own[name])
            none = name == "lr_lambdas"
            fits = fits and all(v is None if none else _is_number(v) and v >= 0 for v in value)
        elif name in ("last_epoch", "_step_count"):
            fits = type(value) is int and 0 <= value < 2**53
        else:  # of another version of torch, if not a flag
            fits = (name in own or not hasattr(scheduler, str(name))) and (
                value is None or isinstance(value, bool | int)
            )
        if not fits:
            raise UserError(
                f"{where} has {_short(name)} = {_short(value)}, which does not fit; {REMEDY}"
            )


def _is_number(value: object) -> bool:
    """Whether this is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _same(value: object, other: object) -> bool:
    """Whether two plain values are equal; a tuple equals a list."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return isinstance(value, bool | int | float | None) and value == other


def _short(value: object) -> str:
    """`value` in a few words, on one line."""
    return " ".join(str(value)[:80].split())[:40]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
