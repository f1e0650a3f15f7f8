"""Checkpoint files: LOGDIR/NAME.pt, a dict with net_model, ema_model, sched, optim, step, x_T and,
where this project wrote it, settings. Files are data: nothing in them is ever executed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import replacing

FORMAT = 1
# Settings of files that lack them: released ones, and those older than the setting.
DEFAULTS = {"skip_slicing": "leading", "norm_groups": "fixed"}


def save(path: str | Path, state: Mapping[str, object]) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch's writer hides that, say, the disk is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. UserError where the file does not exist or is not one."""
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        beside = sorted(p.stem for p in path.parent.glob("[!.]*.pt"))
        others = f"; there are {', '.join(beside)}" if beside else ""
        raise UserError(
            f"no checkpoint at {path}{others}; see --logdir and --ckpt_name, or run --train first"
        ) from error
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
    if not isinstance(state.get("settings", {}), dict):
        raise UserError(f"{path}: its settings are not a table of names and values")
    try:
        int(state.get("step", 0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be continued or scored: its step is not a number"
        ) from error
    return state


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
    """Copy a state dict into `net`. Raises UserError that names the first entry that differs."""
    stored = entries(state, path)
    for name, expected in net.state_dict().items():
        if name not in stored:
            raise UserError(f"{path} is for another network: it has no entry {name}")
        if stored[name].shape != expected.shape:
            raise UserError(
                f"{path} is for another network: {name} is {list(stored[name].shape)} there and "
                f"{list(expected.shape)} here; compare --T, --ch, --ch_mult, --attn, "
                "--num_res_blocks and the data set's channels"
            )
    extra = [name for name in stored if name not in net.state_dict()]
    if extra:
        raise UserError(f"{path} is for another network: its entry {extra[0]} has no place here")
    net.load_state_dict(stored)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
