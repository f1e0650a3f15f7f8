"""--search --pick: the front of a finished search as a table, or another point of it in use.

Imports no torch, so that it answers at once.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from looks import best_within, front_table, pick_point, read_front
from runtime.errors import UserError
from runtime.files import parse_json, read_text, write_text
from runtime.schema import Widths, check, digest, widths_line
from settings import LOOK, Configuration

NAME = "flagfile.txt"  # in a search's folder: what it was searched with; see commands/searched.py


def places(config: Configuration) -> tuple[Path, Path]:
    """A search's folder, and where the schedule that it chooses is written."""
    if config.search.search_dir:
        folder = Path(config.search.search_dir)
        return folder, folder / "search.txt"
    logdir = Path(config.run.logdir)
    return logdir / "search", logdir / "search.txt"


def schedules_of(text: str) -> list[str]:
    """The schedules that a search's flagfile says it is of, as `fingerprint_of` has them."""
    stated = re.match(r"# schedule: ([\w ]+)\n", text)
    return stated[1].split() if stated else []


def fingerprint_of(path: Path) -> str:
    """Of the widths in a schedule's file, however they are written there; "" for any other file."""
    try:
        return digest(widths_line(check(parse_json(read_text(path), path), Widths, path)))
    except (UserError, OSError):
        return ""


def command(config: Configuration) -> str:
    """What picks a point, whose number follows it."""
    s = config.search.search_dir
    place = f"--search_dir={s}" if s else f"--logdir={config.run.logdir}"
    return shlex.join(["python", "main.py", "--search", place, "--pick"])


def pick(config: Configuration) -> None:
    """Print the front of a finished search, or write another point of it to search.txt."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process is enough
        return
    folder, search_txt = places(config)
    index, front = config.search.pick, read_front(folder / "front.json")
    if index == LOOK and "flops_budget" in config.typed:
        budget = config.search.flops_budget
        index = best_within(front, budget)
        if index is None:
            raise UserError(f"--flops_budget={budget:g}: no point of the front is as cheap")
    if index == LOOK:
        print(front_table(front))
        return
    if not 0 <= index < len(front["points"]):
        raise UserError(f"--pick={index}: the front has points 0 to {len(front['points']) - 1}")
    point, about = front["points"][index], folder / NAME
    text = read_text(about) if about.exists() else ""  # older searches have none
    line, before = widths_line(point["schedule"]), fingerprint_of(search_txt)
    if text:
        # Both schedules are this search's, so that a kill between the two files does no harm.
        known = {digest(line)} | ({before} & set(schedules_of(text)))
        write_text(about, re.sub(r"\A# schedule: .*", f"# schedule: {' '.join(known)}", text))
    write_text(search_txt, line)
    pick_point(folder, front, index, command(config))
    print(
        f"point {index}: {front['label']} {point['distance']:.6g} at "
        f"{point['average_gflops']:.4g} GFLOPs per step, now in {search_txt}"
    )
