"""Whole commands of main.py, those of an earlier commit and today's, in turns.

    python -m benchmark.whole [--before COMMIT] [--data_root DIR] [--repeats 3] [--out FILE.json]

Wall time of --eval and --search with everything in it: start-up, encoder, statistics that are
there, distances, files. Both run the earlier commit's recipes, on networks of one training step,
which take as long as others.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmark import machine
from looks import table

BEFORE = "eaf1f48"  # the last commit whose main.py held everything
IMAGES, CANDIDATES, SCORED = 1000, 12, 250  # images of an evaluation and of a candidate
SEARCH = f"--search --num_generation=1 --pop_size={CANDIDATES} --surrogate=0"
# Each command, and what it makes in a second or in an hour.
COMMANDS = {
    f"--eval --num_images={IMAGES}": (IMAGES, "images/s"),
    f"{SEARCH} --num_images={SCORED}": (3600 * CANDIDATES, "candidates/h"),
}


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The project's files as of a commit."""
    git = partial(subprocess.run, cwd=machine.ROOT, capture_output=True, text=True)
    added = git(["git", "worktree", "add", "--detach", folder, commit])
    if added.returncode:
        sys.exit(f"error: --before={commit} cannot be checked out here: {added.stderr}")
    try:
        yield folder
    finally:
        git(["git", "worktree", "remove", "--force", folder])


def works(tree: Path, folder: Path, flags: list[str]) -> dict[str, Callable[[], object]]:
    """The commands by a checkout's main.py, in a folder of its own, where a network and the
    statistics are made first."""
    folder.mkdir(parents=True)
    flags = [*flags, "--logdir=run", "--fid_cache=statistics.npz", "--batch_size=250"]
    searches = itertools.count()

    def run(command: str) -> None:
        # A search in the folder of another would go on with it.
        more = [*command.split(), f"--search_dir=run/search_{next(searches)}"]
        done = subprocess.run(
            [sys.executable, tree / "main.py", *flags, *more],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{tree}: {command}\n{done.stderr}")

    run("--train --total_steps=1 --sample_step=0")
    run("--eval --num_images=500")
    return {command: partial(run, command) for command in COMMANDS}


def main() -> None:
    parser = machine.arguments(__doc__, "whole")
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--recipes", default="fashion_mnist_14,digits")
    parser.add_argument("--amp", default="none")
    given = parser.parse_args()
    measured, rows = [], []
    with tempfile.TemporaryDirectory() as made, checkout(given.before, Path(made) / "tree") as old:
        for recipe in given.recipes.split(","):
            flags = [f"--flagfile={old}/config/{recipe}.txt", f"--amp={given.amp}"]
            flags += [f"--data_root={given.data_root}"]
            both = {
                (program, command): work
                for program, tree in (("before", old), ("now", machine.ROOT))
                for command, work in works(tree, Path(made) / recipe / program, flags).items()
            }
            times = machine.in_turns(both, given.repeats)
            for (program, command), seconds in times.items():
                measured.append(
                    {"program": program, "recipe": recipe, "command": command, "seconds": seconds}
                )
            for command, (count, unit) in COMMANDS.items():
                before, now = (times[program, command] for program in ("before", "now"))
                rate = f"{count / statistics.median(now):.3g} {unit}"
                cells = [machine.spread(s, 1000) for s in (before, now)]  # so, seconds
                rows.append([recipe, command, *cells, machine.gain(before, now), rate])
    print(table(["", "", "before, s", "now, s", "gain", ""], rows))
    machine.save(given.out, {"before": given.before, "amp": given.amp, "measured": measured})


if __name__ == "__main__":
    main()
