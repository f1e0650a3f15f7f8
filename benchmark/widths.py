"""Published and better training: the distance at every width, for several seeds.

    python -m benchmark.widths [FOLDER] [--flagfile config/digits.txt] [--seeds 3] [--equal_compute]
        [--steps 550] [--judge efficientnet_lite2]

Fixed and proportional groups × published and better training, and a plain network of the same size,
all for the recipe's number of steps. With --equal_compute the cells with cheaper steps then go on,
each from its own checkpoint, until they have had as many FLOPs as better training. --judge names an
encoder that no choice was made with: every score is taken in its features, too.

With --finetune it is better training alone, a search for its network, and the network trained on
for the schedule that was found, beside its control: as many FLOPs spent on more sandwich training.

Runs main.py as a user would; each command and its duration is kept in FOLDER/commands.jsonl. What
is done is not done again: stop it (Ctrl-C) and start it again at will. After each command
results/widths/RECIPE.json is written anew, made of what is done so far.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmark.machine import ROOT, describe
from runtime.files import append_jsonl, read_json, read_jsonl, write_json

WIDTHS = ("1", "0.75", "0.5", "0.25")
PUBLISHED = ("--skip_slicing=leading", "--num_sandwich_sampling=3")
BETTER = ("--skip_slicing=segments", "--num_sandwich_sampling=4")
PLAIN = "plain network"
CELLS = {  # the most telling first
    "proportional groups, better": ("--norm_groups=proportional", *BETTER),
    PLAIN: ("--slimmable_unet=false", "--sandwich=false"),
    "proportional groups, published": ("--norm_groups=proportional", *PUBLISHED),
    "fixed groups, better": ("--norm_groups=fixed", *BETTER),
    "fixed groups, published": ("--norm_groups=fixed", *PUBLISHED),
}
TABLES = ("equal steps", "equal compute")
BEST = "proportional groups, better"
SEARCH = ("--search_method=sensitivity", "--num_generation=12", "--pop_size=8", "--num_images=256",
          "--batch_size=256", "--flops_budget=0.3")  # fmt: skip


class Widths:
    """The trainings and scores of one folder, as commands that are run once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = options.folder / "commands.jsonl"
        self.schedules: dict[str, dict[str, dict]] = {}  # by what was done and seed

    def logdir(self, table: str, cell: str, seed: int) -> Path:
        names = (name.replace(",", "").replace(" ", "_") for name in (table, cell))
        return self.options.folder.joinpath(*names, str(seed))

    def done(self, *flags: str) -> dict | None:
        """The record of main.py's success with these flags."""
        command = ["main.py", *flags]
        records = (r for r in read_jsonl(self.log) if r["command"] == command and not r["status"])
        return next(records, None)

    def run(self, *flags: str, result: Path | None = None) -> None:
        """Run main.py unless it has succeeded before with these flags; stop where it fails.

        result: a JSON file that it writes, kept in its record."""
        if self.done(*flags):
            return
        command = ["main.py", *flags]
        print("\n$ python", *command, flush=True)
        start, cpu = time.perf_counter(), sum(os.times()[2:4])  # of children that have ended
        process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *flags])
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()  # it was interrupted too, and saves what it has
        record = {"command": command, "status": status, "seconds": time.perf_counter() - start}
        record["cpu_seconds"] = sum(os.times()[2:4]) - cpu
        if result and not status:
            record["result"] = read_json(result)
        append_jsonl(self.log, record)
        self.save()
        if status:
            sys.exit(status)

    def train_and_score(self, table: str, cell: str, seed: int) -> None:
        """One training, and its scores at every width on fresh noise."""
        o, logdir = self.options, self.logdir(table, cell, seed)
        flags = [f"--flagfile={o.flagfile}", *CELLS[cell], f"--seed={seed}", f"--logdir={logdir}"]
        flags += [f"--data_root={o.data_root}"] if o.data_root else []
        flags += [f"--total_steps={o.steps}"] if o.steps else []
        if table == "equal compute":
            flags.append(f"--total_steps={self.equal_compute(cell, seed)}")
            if not logdir.exists():
                start = self.logdir("equal steps", cell, seed)
                shutil.copytree(start, logdir, ignore=shutil.ignore_patterns("eval*"))
        self.run("--train", *flags)
        for score, width in self.scores(logdir, cell):
            name = "eval" if width == "1" else f"eval_width_{width}"
            self.run(*score, result=logdir / f"{name}.json")

    def scores(self, logdir: Path, cell: str) -> Iterator[tuple[list[str], str]]:
        """The flags of a training's scores, and the width of each; those of the judge last."""
        o = self.options
        for judge in ("", o.judge)[: 2 if o.judge else 1]:
            statistics_file = o.folder / f"statistics{judge and '_'}{judge}.npz"
            flags = ["--eval", f"--flagfile={logdir / 'flagfile.txt'}", "--batch_size=250"]
            flags += [f"--fid_encoder={judge}"] if judge else []
            flags += [f"--fid_cache={statistics_file}", f"--num_images={o.images}"]
            for width in WIDTHS if cell != PLAIN else WIDTHS[:1]:
                yield [*flags, f"--assigned_width={width}"], width

    def finetune(self, seed: int) -> None:
        """The distance of a schedule for better training's network before and after training for
        it, and after its control."""
        base = self.logdir("equal steps", BEST, seed)
        flagfile, schedule = f"--flagfile={base / 'flagfile.txt'}", base / "search.txt"
        own = f"--fid_cache={self.options.folder / 'statistics.npz'}"
        self.run("--search", flagfile, *SEARCH, own)
        gflops = self.stepaware("before", base, seed)["average_gflops"]
        better = self.result("equal steps", BEST, seed)
        steps = round(better["steps"] * sum(better["gflops"].values()) / gflops)
        start = ("--train", flagfile, f"--init_checkpoint={base / 'ckpt.pt'}", "--sample_step=0")
        for name, flags in (
            ("finetuned", (f"--total_steps={steps}", f"--finetune_schedule={schedule}")),
            ("control", (f"--total_steps={better['steps']}",)),
        ):
            logdir = self.logdir(name, BEST, seed)
            self.run(*start, *flags, f"--logdir={logdir}")
            self.stepaware(name, logdir, seed)

    def stepaware(self, name: str, logdir: Path, seed: int) -> dict:
        """The score of better training's schedule with the network in `logdir`."""
        schedule = self.logdir("equal steps", BEST, seed) / "search.txt"
        flags = ["--eval_stepaware", f"--flagfile={logdir / 'flagfile.txt'}", "--batch_size=250"]
        flags += [f"--schedule={schedule}", f"--num_images={self.options.images}"]
        flags += [f"--fid_cache={self.options.folder / 'statistics.npz'}"]
        self.run(*flags, result=logdir / "eval_stepaware.json")
        result = self.done(*flags)["result"]
        self.schedules.setdefault(name, {})[str(seed)] = {
            name: result[name] for name in ("distance", "label", "step", "average_gflops")
        }
        return result

    def equal_compute(self, cell: str, seed: int) -> int:
        """The steps of `cell` that cost as many FLOPs as the recipe's steps of all widths."""
        better = self.result("equal steps", BEST, seed)
        full, *others, least = better["gflops"].values()
        step = full if cell == PLAIN else full + statistics.mean(others) + least
        return round(better["steps"] * sum(better["gflops"].values()) / step)

    def result(self, table: str, cell: str, seed: int) -> dict | None:
        """What a training has come to; None until all its scores are there."""
        logdir = self.logdir(table, cell, seed)
        done = [(self.done(*flags), width) for flags, width in self.scores(logdir, cell)]
        if not all(record for record, _ in done):
            return None
        scored: dict[str, dict[str, dict]] = {}
        for record, width in done:
            scored.setdefault(record["result"]["label"], {})[width] = record["result"]
        (label, scores), *judged = scored.items()
        parts = {f"--logdir={self.logdir(t, cell, seed)}" for t in {table, "equal steps"}}
        trained = [r for r in read_jsonl(self.log) if parts & set(r["command"])]
        return {
            "steps": scores["1"]["step"],
            "cpu_seconds": sum(record["cpu_seconds"] for record in trained),
            "label": label,
            "distance": {width: score["distance"] for width, score in scores.items()},
            "gflops": {width: score["average_gflops"] for width, score in scores.items()},
            "judged": {name: {w: s["distance"] for w, s in each.items()} for name, each in judged},
        }

    def save(self) -> dict:
        """Write what is done so far as JSON; returns its tables."""
        o, tables = self.options, {table: {} for table in TABLES}
        for table, seed, cell in itertools.product(TABLES, range(o.seeds), CELLS):
            if result := self.result(table, cell, seed):
                tables[table].setdefault(cell, {})[str(seed)] = result
        record = {"recipe": str(o.flagfile), "images": o.images, "tables": tables,
                  "machine": describe(), "commands": read_jsonl(self.log)}  # fmt: skip
        name = o.flagfile.stem
        if o.finetune:
            record, name = record | {"for a schedule": self.schedules}, f"{name}_finetune"
        write_json(ROOT / "results" / "widths" / f"{name}.json", record)
        return tables


def markdown(cells: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """The lines of a table: per cell the mean and the range of each width's distance."""
    header = ["training", "seeds", "steps", *(f"width {w}" for w in WIDTHS), "CPU seconds"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for cell, seeds in cells.items():
        results = list(seeds.values())
        line = [cell, str(len(results)), f"{statistics.mean(r['steps'] for r in results):.0f}"]
        for width in WIDTHS:
            d = [r["distance"][width] for r in results if width in r["distance"]]
            line.append(f"{statistics.mean(d):.3f} ({min(d):.3f} to {max(d):.3f})" if d else "")
        lines.append([*line, f"{statistics.mean(r['cpu_seconds'] for r in results):.0f}"])
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("logs/widths"))
    parser.add_argument("--flagfile", type=Path, default=Path("config/digits.txt"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a training; else the recipe's")
    parser.add_argument("--judge", default="", help="a second encoder")
    parser.add_argument("--images", type=int, default=2000, help="of each score")
    parser.add_argument("--data_root", help="main.py's; else the recipe's")
    parser.add_argument("--equal_compute", action="store_true", help="the second table too")
    parser.add_argument("--finetune", action="store_true", help="--finetune_schedule alone")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    work = Widths(options)
    cells = (BEST,) if options.finetune else CELLS
    for table, seed, cell in itertools.product(TABLES, range(options.seeds), cells):
        if table == "equal steps" or (options.equal_compute and "better" not in cell):
            work.train_and_score(table, cell, seed)
    for seed in range(options.seeds) if options.finetune else ():
        work.finetune(seed)
    for name, seeds in work.schedules.items():
        print(f"{name}: {statistics.mean(r['distance'] for r in seeds.values()):.4f}", seeds)
    for table, cells in work.save().items():
        print(f"\n{table}\n", *markdown(cells), sep="\n")


if __name__ == "__main__":
    main()
