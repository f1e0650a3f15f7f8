"""DDSM: train a slimmable diffusion model, search the width of each step, evaluate the result.

    python main.py --train|--search|--eval|--eval_stepaware|--eval_ensemble|--profile [flags]
    python main.py --generate [flags]
    python main.py --export_diffusers DIR [flags]

Reads the flags, chooses the mode, and turns errors into lines; commands/ has a file for each mode.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app

import options
from runtime.errors import UserError
from runtime.files import write_text

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
PLANNED = ("train", "search", "eval", "eval_stepaware", "generate")  # that --dry_run can plan
_notices: list[str] = []


def command(mode: str):
    """What runs a mode but pick: a function of the configuration."""
    from commands import evaluate, export, generate, plan, search, train

    return {
        "train": train.train,
        "search": search.search,
        "eval": evaluate.evaluate_width,
        "eval_stepaware": evaluate.evaluate_schedule,
        "eval_ensemble": evaluate.evaluate_ensemble,
        "generate": generate.generate,
        "profile": plan.profile,
        "export_diffusers": export.export,
    }[mode]


def parse(argv: Sequence[str]) -> list[str]:
    """Read the flags; one line for a mistake."""
    try:
        rest, _notices[:] = options.parse(argv)
    except UserError as error:
        complain(error)
    return rest


def complain(error: UserError, status: int = 2) -> NoReturn:
    """One line, once for all processes, and the exit."""
    processes = sys.modules.get("runtime.processes")  # it imports torch: not for a refused flag
    if processes.first_to_speak() if processes else os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def thread_failed(args: threading.ExceptHookArgs) -> None:
    """Tensorboard's thread tells the main one of a full disk, which then says so in one line."""
    if getattr(args.exc_value, "errno", None) not in DISK_FULL:
        threading.__excepthook__(args)


def run(argv: Sequence[str]) -> None:
    """Run the mode that the flags, read before, name."""
    try:
        if len(argv) > 1:
            raise UserError(f"stray argument {argv[1]!r}: flags start with --")
        mode, config = options.mode(), options.configuration()
        if config.run.dry_run and mode not in PLANNED:
            raise UserError(f"--dry_run: only {', '.join('--' + m for m in PLANNED)} have plans")
        if mode == "pick":
            from commands.pick import pick  # without torch

            print(*_notices, sep="\n", end="\n" * bool(_notices))
            pick(config)
        else:
            dispatch(mode, config)
    except UserError as error:
        complain(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is on the disk", flush=True)
        sys.exit(130)
    except BrokenPipeError:  # see start
        raise
    except Exception as error:  # nobody foresaw it: a line for the user, and the whole in a file
        unforeseen(error, mode, Path(config.run.logdir))


def unforeseen(error: Exception, mode: str, logdir: Path) -> NoReturn:
    """One line that says where the traceback is; exit status 1."""
    folder = logdir if os.access(logdir, os.W_OK) else Path(tempfile.gettempdir())
    path, text = folder / "error.log", " ".join(str(error).split())[:200]
    with contextlib.suppress(UserError):
        write_text(path, "".join(traceback.format_exception(error)))
    what = f"--{mode} failed: {type(error).__name__}: {text}; the traceback is in {path}"
    complain(UserError(what), 1)


def dispatch(mode: str, config: options.Configuration) -> None:
    """Run `mode`, in all processes that torchrun started. torch is imported here."""
    import build
    from model import keep_freed
    from runtime import processes
    from sampling.samplers import check_name
    from train import Interrupted

    log = logging.getLogger("ddsm")
    log.handlers, log.propagate = [processes.Printed()], False
    log.setLevel(logging.INFO)
    build.open_autoencoder.cache_clear()
    build.log_once.cache_clear()
    keep_freed()
    threading.excepthook = thread_failed
    try:
        check_name(config.sampling.sampler)  # an unknown name should not wait for a checkpoint
        with processes.group(build.choose_device(config.run.device)):
            for notice in _notices:
                log.info(notice)
            command(mode)(config)
    except OSError as error:  # a library's, such as tensorboard's; our own files say more
        if error.errno not in DISK_FULL + UNUSABLE:
            raise
        raise UserError(f"cannot use {error.filename or 'a file'}: {error.strerror}") from error
    except Interrupted as stopped:
        processes.say(str(stopped))
        sys.exit(128 + stopped.signum)


def start() -> None:
    try:
        app.run(run, flags_parser=parse)
    except BrokenPipeError:  # whoever read our output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    start()
