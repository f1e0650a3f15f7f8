"""Does it hold on real images? Train, search, score and compare, by one command that resumes.

    python -m benchmark.experiment [FOLDER] [--flagfile config/fashion_mnist_14.txt]
        [--data_root DIR] [--workers N] [--images 1000] [--train_seeds 2] [--search_seeds 3]

A list of tasks, the most telling first: each is a command of main.py, or benchmark.scores with the
flags of one, and is done once. Its output, duration, commit and versions lie in FOLDER. Kill it and
start it again at will. --report makes tables and pictures of what is done so far.

Searches score schedules on noise of their own; every number of the tables is on other noise, the
same for all rows.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib import colormaps

import build
from benchmark.machine import ROOT, commit, describe
from benchmark.recipe import configuration
from benchmark.scores import ROLES, SETS, standard_error
from benchmark.search import Bench
from looks import best_within, new_figure, read_front, save_figure
from model import check_compiler, keep_freed
from report import labelled_grid
from runtime.errors import UserError
from runtime.files import append_jsonl, read_json, read_jsonl, read_tensors, write_json, write_text
from runtime.identity import agree
from runtime.processes import end_with_parent
from runtime.schema import digest, widths_line

PAGE, README = ROOT / "docs" / "experiment.md", ROOT / "README.md"
MARKS = "<!-- tables: begin -->", "<!-- tables: end -->"
WIDTHS = (1.0, 0.75, 0.5, 0.25)
EVOLUTION = ("--search_method=evolution", "--num_segments=0", "--num_generation=6",
             "--pop_size=16", "--mutation_prob=0.04")  # fmt: skip
SEARCHES = {
    "sensitivity": (),  # the recipe's
    "evolution": EVOLUTION,
    # At full width the cost weighs 3 times the distance, as in the published CIFAR-10 search.
    "weighted": (*EVOLUTION, "--search_objective=weighted", "--flops_budget=0",
                 "--fid_weight=0.5", "--macs_weight=0.08"),
}  # fmt: skip
ROWS = {  # of the tables, in this order
    "sensitivity": "searched by sensitivity",
    "finetuned": "the same, trained on for it",
    "control": "the same, trained on as before",
    "evolution": "searched by plain evolution",
    "weighted": "searched as published, weighted",
    "switch": "best two-level switch",
    "random": "random",
    "steps": "full width, fewer steps",
    "time": "full width, fewer steps in sensitivity's time",
    "turns": "small network, then the large one",
    "width": "width",
    "plain": "plain network, trained alone",
    "small": "small network, trained alone",
}
# In the place of a sampler: a supernet of its own, sampled by the main sampler.
APART = {"classes": "with classes, guidance 2", "latents": "in latents"}
PAIR = {"plain": "large_logdir", "small": "small_logdir"}
SHOWN = [("width", 1.0), ("sensitivity", 0.3), ("finetuned", 0.3), ("control", 0.3),
         ("control", 1.0), ("switch", 0.3), ("steps", 0.3), ("plain", 1.0),
         ("small", 1.0)]  # fmt: skip
DEFAULTS = {
    "flagfile": ROOT / "config" / "fashion_mnist_14.txt", "images": 1000, "search_images": 400,
    "judge": "efficientnet_lite2", "train_seeds": 2, "search_seeds": 3, "sampler": "ddpm-25",
    "shares": (0.3, 0.5, 0.2), "training": (), "searching": (), "autoencoder_steps": 1500,
    "samplers": ("ddim-10", "dpm_solver-10", "edm-10", "dpm_solver-20", "ddim-50", "ddpm-100",
                 *APART),
}  # fmt: skip
QUICK = {
    "flagfile": ROOT / "config" / "digits.txt", "images": 10, "search_images": 20,
    "judge": "pixels", "train_seeds": 1, "search_seeds": 1, "sampler": "ddpm-5", "shares": (0.5,),
    "samplers": ("edm-3", "ddim-4", *APART), "autoencoder_steps": 2,
    "training": ("--total_steps=12", "--save_step=6", "--sample_step=0", "--batch_size=8"),
    "searching": ("--num_generation=2", "--pop_size=4", "--num_segments=3"),
}  # fmt: skip


class Experiment:
    """The tasks of one folder, by name, and what they came to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder.resolve()
        self.flagfile = f"--flagfile={options.flagfile.resolve()}"
        self.data = f"--data_root={Path(options.data_root).expanduser().resolve()}"
        self.recipe = configuration(self.flagfile, *options.training)
        self.steps = int(options.sampler.split("-")[1])
        self.running: dict[int, tuple[str, list[str], float]] = {}

    # --- what is to be done ---

    def wanted(self) -> Iterator[str]:
        """The scores of the tables, the most telling first: one seed of everything, then others."""
        o = self.options
        seeds = [(t, s) for t in range(o.train_seeds) for s in range(o.search_seeds)]
        for t, s in seeds:
            rows = [(m, share) for m in SEARCHES for share in o.shares]
            if s == 0:
                fixed = [(m, share) for m in ("steps", "time", "switch", "random", "turns")
                         for share in o.shares]  # fmt: skip
                after = [("finetuned", o.shares[0]), ("control", o.shares[0]), ("control", 1.0)]
                alone = [*(("width", w) for w in WIDTHS[1:]), ("plain", 1.0), ("small", 1.0)]
                searched = rows[: len(o.shares)], rows[len(o.shares) :]
                rows = [("width", 1.0), *searched[0], *fixed, *searched[1], *after, *alone]
            yield from (f"score/{o.sampler}/{m}/{share:g}/{t}-{s}" for m, share in rows)
            if t == s == 0:
                rows = [("width", 1.0), *(("sensitivity", share) for share in o.shares[:2])]
                half = o.shares[min(1, len(o.shares) - 1)]
                after = [("finetuned", half), ("control", half), ("control", 1.0)]
                for sampler in o.samplers:  # of DDIM the paper says that it loses nothing at half
                    more = after if sampler.startswith("ddim") else []
                    yield from (f"score/{sampler}/{m}/{share:g}/0-0" for m, share in rows + more)

    def tasks(self) -> list[str]:
        """All tasks, each after what it needs."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            if name not in found:
                for need in self.needs(name):
                    add(need)
                found[name] = None

        for name in self.wanted():
            add(name)
        return [*found]

    def needs(self, name: str) -> list[str]:
        """The tasks that come before."""
        kind, *rest = name.split("/")
        t, main = rest[-1].split("-")[0] if rest else "0", self.options.sampler
        apart = next((each for each in rest if each in APART), "supernet")
        net, search = f"train/{apart}/{t}", f"search/{main}/sensitivity/{t}-0"
        known = [net, "test_set/latents" if apart == "latents" else "test_set"]
        if kind in ("search", "switches"):
            return known
        if kind == "train":
            after = {"control": [net], "finetuned": [net, f"search/{rest[1]}/sensitivity/{t}-0"],
                     "latents": ["autoencoder"]}  # fmt: skip
            return after.get(rest[0], [])
        if kind != "score":
            return ["autoencoder"] if apart == "latents" else []
        sampler, method, share, seeds = rest
        own = {
            "turns": [f"train/plain/{t}", f"train/small/{t}"], "switch": [f"switches/{t}"],
            "time": [search], "control": [f"search/{sampler}/sensitivity/{t}-0"],
            **{each: [f"search/{sampler}/{each}/{seeds}"] for each in SEARCHES},
        }.get(method, [])  # fmt: skip
        if method in ("plain", "small", "control"):
            net = f"train/{method}/{t}"
        if method == "finetuned":
            net = f"train/{method}/{sampler}/{share}/{t}"
        return [net, *known[1:], *own]

    def command(self, name: str) -> list[str] | None:
        """What Python is to run, once that is done which the task needs; None where there is
        nothing to run, such as a schedule that was not found."""
        o, where = self.options, self.folder / name
        own = (self.data, *speed())
        match name.split("/"):
            case ["train", net, *schedule, t]:
                more = self.training(net, t, *schedule)
                flags = (f"--logdir={where}", f"--seed={t}", *o.training)
                every = ["main.py", "--train", self.flagfile, *own, *flags]
                return None if more is None else [*every, *more]
            case ["autoencoder"]:
                return ["-m", "benchmark.autoencoder", str(where), str(o.autoencoder_steps),
                        self.flagfile, *own, *self.sampling("latents")]  # fmt: skip
            case ["test_set", *latents]:
                more = self.training("latents", "0") if latents else []
                alone = f"--logdir={self.folder / 'test_set'}"  # where no run is
                return [*self.scores(name), "--test", self.flagfile, *own, alone, *more]
            case ["search", sampler, method, seeds]:
                s, net = seeds.split("-")[1], self.folder / self.needs(name)[0]
                images = o.search_images if sampler == o.sampler else -(-o.search_images // 2)
                return ["main.py", "--search", self.flagfile, *own, *SEARCHES[method],
                        *self.using(net, sampler), f"--search_dir={where}", f"--seed={s}",
                        f"--num_images={images}", f"--batch_size={min(200, images)}",
                        *o.searching]  # fmt: skip
            case ["switches", t]:
                shares = ",".join(map(str, o.shares))
                return [*HERE, "--switches", str(self.result(name)), shares, *own,
                        *self.using(self.folder / self.needs(name)[0], o.sampler),
                        f"--num_images={o.search_images}",
                        f"--batch_size={min(200, o.search_images)}"]  # fmt: skip
            case ["score", sampler, method, share, seeds]:
                more = self.row(method, float(share), sampler, seeds)
                net = self.folder / self.needs(name)[0]
                every = [*self.scores(name), *own, *self.using(net, sampler)]
                return None if more is None else [*every, *more]
        raise AssertionError(name)

    def using(self, net: Path, sampler: str) -> list[str]:
        """What scores and searches have in common; a checkpoint says the rest."""
        recipe = (f"--{n}={self.recipe[n]}" for n in ("dataset", "fid_encoder", "var_type"))
        return [f"--logdir={net}", *recipe, *self.sampling(sampler)]

    def sampling(self, sampler: str) -> list[str]:
        kind, steps = (self.options.sampler if sampler in APART else sampler).split("-")
        more = {"classes": ["--guidance_scale=2"],  # latents: as many as the recipe has pixels
                "latents": [f"--img_size={2 * self.recipe['img_size']}"]}  # fmt: skip
        return [f"--sampler={kind}", f"--sample_steps={steps}", *more.get(sampler, [])]

    def scores(self, name: str) -> list[str]:
        count = SETS * self.options.images
        return ["-m", "benchmark.scores", str(self.result(name)), self.options.judge,
                f"--num_images={count}", f"--batch_size={min(250, count)}"]  # fmt: skip

    @functools.cached_property
    def flops(self) -> dict[float, int]:
        """FLOPs of an image's pass at each width."""
        flags = self.flagfile, self.data, f"--logdir={self.folder / 'test_set'}"  # where no run is
        return build.load_model_or_untrained(configuration(*flags)).flops(WIDTHS)

    def training(self, net: str, t: str, sampler: str = "", share: str = "") -> list[str] | None:
        """Flags of a training. All but those that start from the supernet cost what it costs; one
        for a schedule names the search's sampler, and its share of full width's FLOPs."""
        steps, every = self.recipe["total_steps"], sum(self.flops[w] for w in WIDTHS)
        alone = ["--slimmable_unet=false", "--sandwich=false"]
        half = [f"--{name}={self.recipe[name] // 2}" for name in ("ch", "num_groups")]
        if net == "plain":
            return [*alone, f"--total_steps={round(steps * every / self.flops[1.0])}"]
        if net == "small":
            return [*alone, *half, f"--total_steps={round(steps * every / self.flops[0.5])}"]
        if net == "supernet":
            return []
        if net == "classes":  # as many as digits, CIFAR-10 and Fashion-MNIST have
            return ["--num_classes=10", *self.sampling(net)]
        if net == "latents":
            return [f"--latent_vae={self.folder / 'autoencoder'}", *self.sampling(net),
                    f"--latent_cache={self.folder / 'latents.npy'}"]  # fmt: skip
        start = f"--init_checkpoint={self.folder / 'train' / 'supernet' / t / 'ckpt.pt'}"
        if net == "control":
            return [start, f"--total_steps={steps // 3}"]
        schedule = self.picked(f"search/{sampler}/sensitivity/{t}-0", float(share))
        if schedule is None:
            return None
        cost = fmean(self.flops[width] for width in read_json(schedule))
        return [start, f"--total_steps={round(steps // 3 * every / cost)}",
                f"--finetune_schedule={schedule}", *self.sampling(sampler)]  # fmt: skip

    def row(self, method: str, share: float, sampler: str, seeds: str) -> list[str] | None:
        """main.py's flags for a row of the tables; None where there is no such row."""
        t, search = seeds.split("-")[0], f"search/{sampler}/{method}/{seeds}"
        known = f"search/{sampler}/sensitivity/{t}-0"
        if method in ("width", "plain", "small") or share == 1:
            return ["--eval", f"--assigned_width={share:g}"]
        if method == "turns":
            return self.turns(share, t)
        if method in ("steps", "time"):
            if method == "time":
                share = self.time(known, share)
            steps = int(share * self.steps + 1e-9)
            return ["--eval", f"--sample_steps={steps}"] if steps else None
        if method == "switch":
            widths = read_json(self.result(f"switches/{t}")).get(str(share))
            path = self.saved(f"switch-{t}-{share:g}", widths)
        elif method == "random":
            path = self.saved(f"random-{t}-{share:g}", self.random(share, int(t)))
        else:
            path = self.picked(search if method in SEARCHES else known, share)
        return path and ["--eval_stepaware", f"--schedule={path}"]

    def saved(self, name: str, widths: Sequence[float] | None) -> Path | None:
        """The schedule as a file."""
        if widths is None:
            return None
        path = self.folder / "schedules" / f"{name.replace('/', '-')}.txt"
        write_text(path, widths_line(widths))
        return path

    def picked(self, search: str, share: float) -> Path | None:
        """The best schedule of a search's front within a share of full width's FLOPs."""
        front = read_front(self.folder / search / "front.json")
        index = best_within(front, share)
        widths = None if index is None else front["points"][index]["schedule"]
        return self.saved(f"{search}-{share:g}", widths)

    def time(self, search: str, share: float) -> float:
        """The share of full width's measured time that this schedule takes; 0: there is none."""
        front = read_front(self.folder / search / "front.json")
        index = best_within(front, share)
        full = next(p for p in front["uniform"] if set(p["schedule"]) == {1.0})
        return 0 if index is None else front["points"][index]["latency_ms"] / full["latency_ms"]

    def random(self, share: float, seed: int) -> list[float] | None:
        """The first of many random schedules that costs nearly that share."""
        draws = np.random.default_rng([seed, round(100 * share)]).integers(
            len(WIDTHS), size=(100_000, self.steps)
        )
        costs = np.array([self.flops[w] for w in WIDTHS])[draws].mean(1) / self.flops[1.0]
        found = np.flatnonzero((0.9 * share < costs) & (costs <= share))[:1]
        return [WIDTHS[i] for i in draws[found[0]]] if len(found) else None

    def turns(self, share: float, t: str) -> list[str] | None:
        """Two networks: as many last steps of the large one as that share allows."""
        small = self.flops[0.5] / self.flops[1.0]
        large = math.floor(self.steps * (share - small) / (1 - small))
        nets = (f"--{flag}={self.folder / 'train' / net / t}" for net, flag in PAIR.items())
        end = large * self.recipe["T"] // self.steps - 1  # so many steps lie at or below it
        return None if large < 0 else [
            "--eval_ensemble", *nets, f"--small_ch={self.recipe['ch'] // 2}", f"--end={end}",
            f"--start={self.recipe['T']}", f"--logdir={self.folder / 'turns' / t}",
        ]  # fmt: skip

    # --- doing it ---

    def done(self, name: str) -> Path:
        """The file that says that a task is done."""
        return self.folder / "done" / f"{name}.json"

    def result(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def begin(self) -> None:
        """UserError in a folder that was begun at another commit, or with other options."""
        path, now = self.folder / "experiment.json", {"commit": commit()}
        now |= {n: getattr(self.options, n) for n in DEFAULTS if "seeds" not in n}
        now["flagfile"] = digest(self.options.flagfile.read_text())
        if not path.exists():
            write_json(path, now)
        if not self.options.mixed:
            agree(path, read_json(path), now, "go back to them, name another folder, or --mixed")

    def run(self) -> list[str]:
        """Every task that is not done, as many at a time as there are workers; those that failed.
        What needs one that failed is left."""
        waiting = [name for name in self.tasks() if not self.done(name).exists()]
        total, failed = len(waiting), []
        print(f"{total} tasks to do in {self.folder}, {self.options.workers} at a time", flush=True)
        try:
            while True:
                for name in list(waiting):
                    ready = all(self.done(need).exists() for need in self.needs(name))
                    if ready and len(self.running) < self.options.workers:
                        waiting.remove(name)
                        self.start(name)
                if not self.running:
                    return failed
                name, code, seconds = self.finished()
                failed += [name] if code else []
                said = f"failed, see the end of {self.log(name)}" if code else f"{seconds:.0f} s"
                print(f"{total - len(waiting) - len(self.running)}/{total} {name}: {said}",
                      flush=True)  # fmt: skip
        finally:
            for pid in self.running:
                os.kill(pid, signal.SIGTERM)  # main.py saves what it has
            while self.running:
                self.finished()

    def log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.txt"

    def start(self, name: str) -> None:
        self.begin()
        command, log = self.command(name), self.log(name)
        if command is None:
            write_json(self.done(name), {"command": "", "cpu_seconds": 0.0})
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // self.options.workers)
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)}, preexec_fn=end_with_parent,
            )  # fmt: skip
        process.returncode = 0  # `finished` waits for it
        self.running[process.pid] = (name, command, time.time())

    def finished(self) -> tuple[str, int, float]:
        """Wait for a task: its name, exit status, and the seconds of all its attempts."""
        pid = 0
        while pid not in self.running:
            pid, status, usage = os.wait4(-1, 0)  # subprocess does not tell what it used
        name, command, begun = self.running.pop(pid)
        attempts = self.log(name).with_suffix(".jsonl")
        cpu = usage.ru_utime + usage.ru_stime
        append_jsonl(attempts, {"seconds": time.time() - begun, "cpu_seconds": cpu})
        all_attempts = read_jsonl(attempts)
        used = {key: sum(each[key] for each in all_attempts) for key in all_attempts[0]}
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            about = {"command": shlex.join(("python", *command)), **used, **describe()}
            write_json(self.done(name), about)
        return name, code, used["seconds"]

    # --- what came out ---

    def report(self) -> None:
        """All numbers, tables and pictures of what is done so far, in --results."""
        out, names = self.options.results, self.tasks()
        done = {n: read_json(self.done(n)) for n in names if self.done(n).exists()}
        rows, images = [], defaultdict(dict)
        for name in (n for n in done if n.startswith("score/") and done[n]["command"]):
            _, sampler, method, share, seeds = name.split("/")
            row = {"sampler": sampler, "method": method, "share": float(share), "seeds": seeds}
            rows.append(read_json(self.result(name)) | row)
            if seeds == "0-0":
                made = rows[-1], self.result(name).with_suffix(".pt")
                images[sampler][method, float(share)] = made
        if not rows:
            raise UserError(f"nothing is scored yet in {self.folder}")
        if self.options.docs and not images[self.options.sampler].get(("width", 1.0)):
            raise UserError(f"--docs: full width is not scored yet in {self.folder}")
        for record in done.values():  # a command without the places of this machine
            places = {self.data: "--data_root=DATA", str(self.folder): "FOLDER", f"{ROOT}/": ""}
            for place, named in places.items():
                record["command"] = record["command"].replace(place, named)
        result = {
            "recipe": self.options.flagfile.stem, "sampler": self.options.sampler,
            "commits": sorted({record["commit"] for record in done.values() if record["command"]}),
            "core_hours": sum(record["cpu_seconds"] for record in done.values()) / 3600,
            "test_sets": {n: read_json(self.result(n)) for n in done if n.startswith("test_set")},
            "rows": rows, "not_done": [name for name in names if name not in done], "tasks": done,
        }  # fmt: skip
        write_json(out / "results.json", result)
        text = tables(result)
        write_text(out / "tables.md", text)
        plot_distances(out / "distances.png", result)
        main = images.pop(self.options.sampler, {})
        shown = [main[key] for key in SHOWN if key in main]
        plot_schedules(out / "schedules.png", [row for row, _ in shown])
        pictures(out / "samples.png", shown)
        for sampler in APART:
            pictures(out / f"{sampler}.png", [*images[sampler].values()])
        if self.options.docs:
            for page, made in ((PAGE, text), (README, short_table(result))):
                write_between_marks(page, made)
        print(f"{text}\n{len(result['not_done'])} tasks not done; saved {out}")


def between_marks(page: Path) -> str:
    """The part of a page that `--docs` writes."""
    return re.search("{}\n(.*){}".format(*MARKS), page.read_text(), re.DOTALL)[1]


def write_between_marks(page: Path, text: str) -> None:
    begin, end = MARKS
    before, _, rest = page.read_text().partition(f"{begin}\n")
    write_text(page, f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}")


def label(row: Mapping) -> str:
    """A row in words."""
    name, share = ROWS[row["method"]], row["share"]
    if row["method"] == "width":
        return "full width" if share == 1 else f"width {share:g}"
    if (row["method"], share) == ("control", 1):
        return "full width, trained on as before"
    return name if share == 1 else f"{name}, ≤ {100 * share:g} %"


def cells(rows: Sequence[Mapping], full: Mapping[str, Mapping]) -> list[str]:
    """Of rows that differ in their seeds: FLOPs; by each encoder the distance, and how much it is
    above full width's on the same noise. full: by training seed."""
    bases = [full[row["seeds"][0]] for row in rows if row["seeds"][0] in full]
    gflops, cost = (fmean(r["gflops_per_image"] for r in some) for some in (rows, bases or rows))
    made = [str(len(rows)), f"{gflops:.3g}", f"{100 * gflops / cost:.0f} %"]
    for role in ROLES:
        values = [row[role]["distance"] for row in rows]
        error = fmean(standard_error(row[role]["without"]) for row in rows)
        several = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        ratios = [[d / b for d, b in zip([row[role]["distance"], *row[role]["without"]],
                                         [base[role]["distance"], *base[role]["without"]],
                                         strict=True)]
                  for row, base in zip(rows, bases, strict=False)]  # fmt: skip
        above = 100 * fmean(r[0] - 1 for r in ratios) if ratios else math.nan
        noise = 100 * fmean(standard_error(r[1:]) for r in ratios) if ratios else math.nan
        change = "" if label(rows[0]) == "full width" else f"{above:+z.1f} ± {noise:.1f} %"
        made += [f"{fmean(values):.4g} ± {error:.2g}{several}", change]
    return made


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return ["", *(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))]


def tables(result: Mapping) -> str:
    """results.json as Markdown."""
    rows, found = result["rows"], defaultdict(list)
    full = {(r["sampler"], r["seeds"][0]): r for r in rows if label(r) == "full width"}
    for row in rows:
        found[row["sampler"], row["method"], row["share"]].append(row)
    shares = [*dict.fromkeys(row["share"] for row in rows)]  # the most telling first

    def place(key: tuple[str, str, float]) -> tuple:
        _, method, share = key
        first = label(found[key][0]) == "full width"
        alone = method in ("width", "plain", "small") and not first
        order = 0 if alone else shares.index(share)
        return alone, order, not first, [*ROWS].index(method), -share

    def lines(sampler: str, name: str = "") -> list[list[str]]:
        mine = {t: row for (of, t), row in full.items() if of == sampler}
        keys = sorted((key for key in found if key[0] == sampler), key=place)
        return [[name + label(found[key][0]), *cells(found[key], mine)] for key in keys]

    of_encoders = [part for role in ROLES for part in (rows[0][role]["encoder"], "above full")]
    header = ["seeds", "GFLOPs per image", "of full width", *of_encoders]
    text = [f"{rows[0]['images']} images per row; commit {', '.join(result['commits'])}; "
            f"{result['core_hours']:.1f} core-hours."]  # fmt: skip
    for name, test in result["test_sets"].items():
        if "none" not in test:
            decoded = ", encoded and decoded" if name.endswith("latents") else ""
            text[0] += f" {test['images']} images of the test set{decoded}: " + ", ".join(
                f"{test[r]['distance']:.4g} ± {standard_error(test[r]['without']):.2g}"
                for r in ROLES
            ) + "."  # fmt: skip
    text += markdown([[result["sampler"], *header], *lines(result["sampler"])])
    names = dict.fromkeys(r["sampler"] for r in rows if r["sampler"] != result["sampler"])
    if names:
        body = [line for name in names for line in lines(name, f"{APART.get(name, name)}: ")]
        text += markdown([["each with a search of its own", *header], *body])
    return "\n".join(text) + "\n"


def short_table(result: Mapping) -> str:
    """The rows that the README has, as Markdown."""
    found = defaultdict(list)
    for row in result["rows"]:
        if row["sampler"] == result["sampler"]:
            found[row["method"], row["share"]].append(row)
    full = {row["seeds"][0]: row for row in found["width", 1.0]}
    first = result["rows"][0]
    names = [
        f"{part} {first[role]['encoder']}"
        for role in ROLES
        for part in ("distance,", "above full,")
    ]
    lines = [["", "FLOPs", *names]]
    for key in SHOWN:
        if key in found:
            _, _, share, *rest = cells(found[key], full)
            lines.append([label(found[key][0]), share, *rest])
    return "\n".join(markdown(lines)[1:]) + "\n"


def plot_distances(path: Path, result: Mapping) -> None:
    """Distance over FLOPs of the main sampler's rows, by each encoder, with standard errors."""
    figure, empty = new_figure((12, 4.5))
    empty.remove()
    for axes, role in zip(figure.subplots(1, 2), ROLES, strict=True):
        for number, (method, mark) in enumerate(zip(ROWS, "oPXs^*vD<>dph", strict=True)):
            points = sorted(
                (r["gflops_per_image"], r[role]["distance"], standard_error(r[role]["without"]))
                for r in result["rows"]
                if (r["sampler"], r["method"]) == (result["sampler"], method)
            )
            if points:
                x, y, error = zip(*points, strict=True)
                colour = colormaps["tab20"](2 * number % 20 + number // 10)  # dark ones first
                axes.errorbar(x, y, error, fmt=mark, color=colour, label=ROWS[method], capsize=2)
        axes.set(xlabel="GFLOPs per image", yscale="log",
                 ylabel=f"Fréchet distance ({result['rows'][0][role]['encoder']})")  # fmt: skip
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    save_figure(figure, path)


def plot_schedules(path: Path, rows: Sequence[Mapping]) -> None:
    """The width of each step, a line for each schedule."""
    rows = [row for row in rows if len(set(row["widths"])) > 1]
    if rows:
        figure, axes = new_figure((8, 0.4 * len(rows) + 1.2))
        lines = axes.imshow([row["widths"] for row in rows], aspect="auto", vmin=0, vmax=1)
        axes.set_yticks(range(len(rows)), map(label, rows), fontsize="small")
        axes.set(xlabel="step: from noise, on the left, to the image")
        axes.grid(False)
        figure.colorbar(lines, label="width")
        save_figure(figure, path)


def pictures(path: Path, rows: Sequence[tuple[Mapping, Path]]) -> None:
    """A line of images of each row, on the same noise, behind its name."""
    images, labels = [], []
    for row, file in rows:
        made = read_tensors(file)
        images += [torch.full_like(made[:2], 255), made]  # the label has the room of two images
        said = textwrap.fill(label(row).replace(" %", "\N{NO-BREAK SPACE}%"), 18)
        labels += [said, *[""] * (1 + len(made))]
    if rows:
        labelled_grid(path, torch.cat(images), labels, "the same noise", 2 + len(made))


# --- tasks that are no command of main.py ---

HERE = ("-m", "benchmark.experiment")


def switches(path: Path, shares: Sequence[float], flags: Sequence[str]) -> None:
    """The best two-level switch within each share of the FLOPs: the best five on a search's images
    are scored again on three times as many."""
    bench, found = Bench(configuration(*flags)), {}
    costs = {s: bench.cost(s) / bench.costs[1.0] for s in bench.switches()}
    for share in shares:
        near = [s for s, cost in costs.items() if 0.6 * share < cost <= share]
        for images in (bench.evaluator.num_images, 3 * bench.evaluator.num_images):
            scored = bench.score_all(near, bench.sharing().varied(images))
            near = [c.schedule for c in sorted(scored, key=lambda c: c.distance)[:5]]
        if near:
            found[str(share)] = list(bench.genome.stored(near[0]).widths)
    write_json(path, found)


@functools.cache
def speed() -> tuple[str, ...]:
    """Flags for what is fast on this machine."""
    if not torch.cuda.is_available():
        return ("--amp=auto",)
    try:
        check_compiler(torch.device("cuda"))
    except UserError:
        return ()
    return ("--compile",)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("experiment"))
    add("--flagfile", type=Path, help="the recipe")
    add("--data_root", default="./data")
    workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    add("--workers", type=int, default=workers, help="tasks at a time")
    add("--images", type=int, help=f"of each of {SETS} sets of a final score")
    add("--search_images", type=int, help="of a search's score")
    add("--judge", help="an encoder that nothing is chosen with")
    add("--train_seeds", type=int)
    add("--search_seeds", type=int)
    add("--samplers", nargs="*", help="the others, as NAME-STEPS")
    add("--results", type=Path, help="folder of the report")
    add("--mixed", action="store_true", help="go on at another commit, or with other options")
    add("--report", action="store_true", help="only the tables and pictures of what is done")
    add("--docs", action="store_true", help="and write the tables into docs/experiment.md")
    add("--quick", action="store_true", help="every kind of task at tiny sizes, on the digits")
    quick = parser.parse_args(arguments).quick
    parser.set_defaults(**(QUICK if quick else DEFAULTS))
    o = parser.parse_args(arguments)
    kept = ROOT / "results" / "experiment" / "second_edition" / o.flagfile.stem
    o.results = o.results or (o.folder / "report" if quick else kept)
    return o


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    keep_freed()
    try:
        match sys.argv[1:]:
            case ["--switches", path, shares, *flags]:
                return switches(Path(path), [*map(float, shares.split(","))], flags)
        experiment, failed = Experiment(parsed()), []
        if not experiment.options.report:
            signal.signal(signal.SIGTERM, stop)
            failed = experiment.run()
        experiment.report()
        if failed:
            raise UserError(f"failed: {', '.join(failed)}; the same command tries them again")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is done")


if __name__ == "__main__":
    main()
