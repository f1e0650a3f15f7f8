"""Does it hold on real images? Train, search, score and compare, by one command that resumes.

    python -m benchmark.experiment [FOLDER] [--flagfile config/fashion_mnist_14.txt]
        [--data_root DIR] [--workers N] [--search_images 400] [--seeds 3]

A supernet and a plain network of its size; uniform widths; two-level switches; random schedules;
searched schedules; other samplers; and, on the digits, the ablations behind the defaults. Every
training, search and score is a command of main.py, whose output, duration and commit lie in FOLDER.
What is done is not done again: kill it and start it again at will. The end is a table, and
results/experiment/NAME/ with all numbers and pictures, made of what is done so far.

Searches score schedules on noise of their own; every number of the table is on other noise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

import build
import dataset
import score
from benchmark.machine import commit, describe
from benchmark.recipe import configuration
from benchmark.search import Bench
from looks import plot_front, plot_schedule, table
from model import WidthSchedule, check_compiler, keep_freed
from runtime.errors import UserError
from runtime.files import append_jsonl, read_json, read_jsonl, write_json
from runtime.processes import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (1.0, 0.75, 0.5, 0.25)
BUDGETS = (0.5, 0.3)  # shares of full width's FLOPs
AGAIN = ("width-1", "searched-0.5-0", "switch-0.5")  # on other noise too: what differences mean
# Trainings that differ in one setting from the published ones, which the recipe need not have.
PUBLISHED = ("--norm_groups=fixed", "--skip_slicing=leading", "--num_sandwich_sampling=3")
ABLATIONS = {
    "as published": (),
    "skips sliced as segments": ("--skip_slicing=segments",),
    "sandwich of 4 widths": ("--num_sandwich_sampling=4",),
}


@dataclass(frozen=True)
class Task:
    """A command that Python runs, and the tasks that come before it."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


class Experiment:
    """The tasks of one folder, and the table of what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder.resolve()
        self.flagfile: Path = options.flagfile.resolve()
        self.flags = read_flagfile(self.flagfile)
        self.name = self.flagfile.stem
        self.root = str(Path(options.data_root).expanduser().resolve())
        self.T = int(self.flag("T"))
        self.main_sampler = f"{self.flag('sampler')}-{self.flag('sample_steps')}"
        self.statistics = self.folder / "statistics.npz"
        self.results = ROOT / "results" / "experiment" / self.name
        self.processes: set[subprocess.Popen] = set()

    def flag(self, name: str) -> str:
        """What the recipe says; an experiment must not depend on main.py's defaults."""
        if name not in self.flags:
            raise UserError(f"{self.flagfile} has no --{name}, which the experiment needs")
        return self.flags[name][-1]

    # --- what is to be done, the most telling first ---

    def tasks(self) -> list[Task]:
        """One seed of everything comes before the others."""
        main, seeds = self.main_sampler, range(self.options.seeds)
        first, *more = ([*self._seed(seed)] for seed in seeds)
        ablations, *more_ablations = ([*self._ablations(seed)] for seed in seeds)
        near, *far = (
            [self._score(name, sampler) for name in ("width-1", "searched-0.5-0", "width-0.5")]
            for sampler in self.samplers()
        )
        other = self.samplers()[0]  # the shortest chain: does it want a schedule of its own?
        near += [self._search(other, other), self._score(f"searched-0.5-{other}", other)]
        return [
            self._train("supernet"),
            self._train("plain", "--slimmable_unet=false", "--sandwich=false"),
            self._here("statistics"),
            self._here("baselines", "supernet", "statistics"),
            *first,
            *(self._score(f"width-{width:g}", main) for width in WIDTHS),
            *(self._score(f"switch-{share:g}", main) for share in BUDGETS),
            self._score("plain", main),
            *(self._score(f"again-{name}", main) for name in AGAIN),
            *near,
            *ablations,
            *itertools.chain(*more, *far, *more_ablations),
        ]

    def _seed(self, seed: int) -> Iterator[Task]:
        """A search, and the scores of what it found and of random schedules."""
        yield self._search(str(seed), self.main_sampler, seed)
        for share in BUDGETS:
            yield self._score(f"searched-{share:g}-{seed}", self.main_sampler)
            yield self._score(f"random-{share:g}-{seed}", self.main_sampler)

    def samplers(self) -> list[str]:
        """The other samplers as SAMPLER-STEPS, the more telling ones first."""
        steps = [k for k in (10, 50, 100) if k <= self.T]
        every = [f"ddim-{steps[0]}", f"ddpm-{self.T}", *(f"ddim-{k}" for k in steps[1:])]
        return [sampler for sampler in every if sampler != self.main_sampler]

    def _main(self, flagfile: Path, *flags: str) -> tuple[str, ...]:
        common = (f"--flagfile={flagfile}", f"--data_root={self.root}", *self.options.speed)
        return ("main.py", *common, *flags)

    def _here(self, name: str, *needs: str) -> Task:
        command = ("-m", "benchmark.experiment", *sys.argv[1:], "--only", name)
        return Task(name, command, needs)

    def _train(self, name: str, *flags: str) -> Task:
        logdir = f"--logdir={self.folder / name}"
        return Task(name, self._main(self.flagfile, "--train", logdir, *flags))

    def _scoring(self, net: str, logdir: Path, *flags: str) -> tuple[str, ...]:
        """A command that scores the network `net`, with its files in `logdir`."""
        return self._main(
            self.flagfile,
            f"--logdir={logdir}",
            f"--ckpt_name={self.folder / net / 'ckpt'}",  # an absolute name is not in logdir
            f"--fid_cache={self.statistics}",
            "--batch_size=250",
            *flags,
        )

    def _search(self, key: str, sampler: str, seed: int = 0) -> Task:
        folder = self.folder / f"search-{key}"
        kind, steps = sampler.split("-")
        images = self.options.search_images
        command = self._scoring(
            "supernet", folder, "--search", f"--search_dir={folder}", f"--seed={seed + 1}",
            f"--num_images={images}",
            f"--sampler={kind}", f"--sample_steps={steps}",
        )  # fmt: skip
        return Task(f"search-{key}", command, ("supernet", "statistics"))

    def _score(self, name: str, sampler: str) -> Task:
        """The final score of a schedule (or of the plain network) with a sampler."""
        task, logdir = f"{sampler}/{name}", self.folder / "runs" / sampler / name
        kind, steps = sampler.split("-")
        flags = [
            f"--sampler={kind}",
            f"--sample_steps={steps}",
            f"--num_images={self.options.images}",
            f"--seed={int(name.startswith('again-'))}",
        ]
        name = name.removeprefix("again-")
        needs = ["statistics"]
        if name == "plain":
            flags += ["--eval", "--slimmable_unet=false", "--sandwich=false"]
            needs.append("plain")
        elif name.startswith("width-"):
            flags += ["--eval", f"--assigned_width={name.removeprefix('width-')}"]
            needs.append("supernet")
        else:
            flags += ["--eval_stepaware", f"--schedule={self.schedule(name)}"]
            key = name.split("-", 2)[-1]  # searched-SHARE-KEY
            needs.append(f"search-{key}" if name.startswith("searched") else "baselines")
        net = "plain" if name == "plain" else "supernet"
        return Task(task, self._scoring(net, logdir, *flags), tuple(needs))

    def _ablations(self, seed: int) -> Iterator[Task]:
        """Trainings that differ in one setting, each scored at all widths."""
        for variant, flags in ABLATIONS.items():
            name = ablation_name(variant, seed)
            common = self._main(
                self.options.ablations.resolve(),
                *PUBLISHED,
                *flags,
                f"--logdir={self.folder / name}",
                f"--seed={seed}",
            )
            yield Task(name, (*common, "--train", "--sample_step=0"))
            cache = f"--fid_cache={self.folder / 'ablation' / f'statistics-{name[9:]}.npz'}"
            for width in WIDTHS:
                command = (
                    *common, "--eval", f"--assigned_width={width:g}", "--num_images=2000",
                    "--batch_size=250", cache,
                )  # fmt: skip
                yield Task(f"{name}/{width:g}", command, (name,))

    def schedule(self, name: str) -> Path:
        return self.folder / "schedules" / f"{name}.txt"

    # --- doing it ---

    def done(self, name: str) -> Path:
        """The file that says that a task is done."""
        return self.folder / "done" / f"{name}.json"

    def run(self) -> None:
        """Every task that is not done, as many at a time as there are workers."""
        waiting = [task for task in self.tasks() if not self.done(task.name).exists()]
        total, running = len(waiting), {}
        print(f"{total} tasks to do in {self.folder}, {self.options.workers} at a time", flush=True)
        with ThreadPoolExecutor(self.options.workers) as pool:
            while waiting or running:
                for task in list(waiting):
                    ready = all(self.done(name).exists() for name in task.needs)
                    if ready and len(running) < self.options.workers:
                        waiting.remove(task)
                        running[pool.submit(self._execute, task)] = task
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = running.pop(future)
                    seconds = future.result()
                    count = total - len(waiting) - len(running)
                    print(f"{count}/{total} {task.name}: {seconds:.0f} s", flush=True)

    def stop(self, *signal_and_frame: object) -> None:
        """End the commands that run, which save themselves, and then this program."""
        for process in self.processes:
            process.terminate()
        raise KeyboardInterrupt

    def _execute(self, task: Task) -> float:
        """Run a task; UserError where it fails. Seconds that it took."""
        log = self.folder / "log" / f"{task.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // self.options.workers)
        start = time.time()
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *task.command],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
            )
            self.processes.add(process)
            _, status, usage = os.wait4(process.pid, 0)  # subprocess does not tell what it used
        code = process.returncode = os.waitstatus_to_exitcode(status)
        self.processes.discard(process)
        used = usage.ru_utime + usage.ru_stime
        attempts = log.with_suffix(".jsonl")
        append_jsonl(attempts, {"seconds": time.time() - start, "cpu_seconds": used})
        if code:
            raise UserError(
                f"{task.name} failed, see the end of {log}; the same command goes on from here"
            )
        if task.name.startswith("search-"):
            self._take_from_front(task.name.removeprefix("search-"))
        done = self.done(task.name)
        done.parent.mkdir(parents=True, exist_ok=True)
        total = {
            key: sum(attempt[key] for attempt in read_jsonl(attempts))
            for key in ("seconds", "cpu_seconds")
        }
        about = {"command": " ".join(("python", *task.command)), "commit": commit()}
        write_json(done, about | total)
        return total["seconds"]

    def _take_from_front(self, key: str) -> None:
        """The best schedules of a front within each budget."""
        front = read_json(self.folder / f"search-{key}" / "front.json")
        for share in BUDGETS:
            cheap = [p for p in front["points"] if p["saving"] >= 1 - share]
            best = min(cheap, key=lambda p: p["distance"])
            self._save(f"searched-{share:g}-{key}", WidthSchedule(best["schedule"]))

    def _save(self, name: str, schedule: WidthSchedule) -> None:
        self.schedule(name).parent.mkdir(parents=True, exist_ok=True)
        schedule.save(self.schedule(name))

    # --- tasks that are no command of main.py ---

    def only(self, name: str) -> None:
        keep_freed()
        {"statistics": self._statistics, "baselines": self._baselines}[name]()

    def _statistics(self) -> None:
        """The training set's statistics, and the test set's distance from them."""
        config = configuration(*self._scoring("supernet", self.folder / "statistics")[1:])
        model = build.load_model_or_untrained(config)
        encoder, d = build.encoder(config, model.device), config.data
        ours, train = build.reference(model, encoder), build.load_images(config)
        floor = {"distance": None, "label": encoder.label, "train": len(train)}
        try:
            test = dataset.load(
                d.dataset, d.data_root, d.img_size, False, build.image_options(config)
            )
        except UserError:  # the set has no test split
            test = None
        if test is not None:
            batches = dataset.everything(test, config.run.batch_size, d.num_workers)
            theirs = score.statistics_of(batches, encoder, len(test), f"test set of {d.dataset}")
            distance = ours.distance(theirs.mean, theirs.covariance)
            floor |= {"distance": distance, "test": len(test)}
        write_json(self.folder / "floor.json", floor)

    def _baselines(self) -> None:
        """Random schedules, and the best two-level switch at each budget by the searches' score."""
        flags = self._scoring(
            "supernet", self.folder / "baselines", f"--num_images={self.options.search_images}"
        )
        bench, tried = Bench(configuration(*flags[1:])), {}

        def share_of(schedule: WidthSchedule) -> float:
            return bench.cost(schedule) / bench.costs[1.0]

        for share in BUDGETS:
            # Much cheaper ones belong to the next budget.
            switches = [s for s in bench.switches() if 0.6 * share < share_of(s) <= share]
            scored = bench.score_all(switches, bench.evaluator)
            best = min(scored, key=lambda c: c.distance)
            self._save(f"switch-{share:g}", bench.genome.stored(best.schedule))
            tried[f"{share:g}"] = len(switches)
            random = (
                s for s in bench.random(100_000, seed=int(100 * share))
                if 0.9 * share < share_of(s) <= share
            )  # fmt: skip
            for i, schedule in zip(range(self.options.seeds), random, strict=False):
                self._save(f"random-{share:g}-{i}", bench.genome.stored(schedule))
        write_json(self.folder / "baselines.json", {"switches_tried": tried})

    # --- what came out ---

    def report(self) -> None:
        """The tables, and all numbers and pictures in results/, of what is done so far."""
        rows = {
            name: read_json(file)
            for task in self.tasks()
            if (name := task.name).split("/")[0] in (self.main_sampler, *self.samplers())
            and self.done(name).exists()
            for file in (self.folder / "runs" / name).glob("eval*.json")
        }
        if not rows:
            print("nothing is scored yet")
            return
        floor = read_json(self.folder / "floor.json")
        done = {
            task.name: read_json(self.done(task.name))
            for task in self.tasks()
            if self.done(task.name).exists()
        }
        for record in done.values():
            record["command"] = self._repeatable(record["command"])
        ablations = self._ablation_results()
        result = {
            "label": floor["label"],
            "floor": floor,
            "flags": self.flags,
            "search_images": self.options.search_images,
            "scores": {
                name: {
                    "distance": row["distance"],
                    "images": row["images"],
                    "average_gflops": row["average_gflops"],
                    "saving": row["saving"],
                }
                for name, row in rows.items()
            },
            "searches": {
                path.parent.name: search_summary(read_json(path))
                for path in sorted(self.folder.glob("search-*/front.json"))
            },
            "ablations": ablations,
            "tasks": done,
            "core_minutes": sum(d["cpu_seconds"] for d in done.values()) / 60,
            "not_done": [t.name for t in self.tasks() if t.name not in done],
            "machine": describe(),
        }
        write_json(self.results / "results.json", result)
        if (self.folder / "schedules").exists():
            here = self.results / "schedules"
            shutil.copytree(self.folder / "schedules", here, dirs_exist_ok=True)
        self._pictures(result)
        print(self._table(result))
        if ablations:
            print("\n" + ablation_table(ablations))
        print(
            f"\nthe test set's own distance: {floor['distance']}; "
            f"{result['core_minutes']:.0f} core minutes; {len(result['not_done'])} tasks not done\n"
            f"saved {self.results}"
        )

    def _repeatable(self, command: str) -> str:
        """A command without the places of this machine."""
        for place, name in ((self.root, "DATA"), (self.folder, "experiment"), (f"{ROOT}/", "")):
            command = command.replace(str(place), name)
        return command

    def _ablation_results(self) -> dict[str, list[dict]]:
        """variant -> for each seed the distance at every width and the CPU seconds of training."""
        found = defaultdict(list)
        for seed in range(self.options.seeds):
            for variant in ABLATIONS:
                name = ablation_name(variant, seed)
                if not all(self.done(f"{name}/{width:g}").exists() for width in WIDTHS):
                    continue
                files = ["eval.json", *(f"eval_width_{width:g}.json" for width in WIDTHS[1:])]
                distances = [read_json(self.folder / name / file)["distance"] for file in files]
                found[variant].append(
                    {
                        "seed": seed,
                        "distances": dict(zip(map(str, WIDTHS), distances, strict=True)),
                        "training_seconds": read_json(self.done(name))["cpu_seconds"],
                    }
                )
        return dict(found)

    def _table(self, result: Mapping) -> str:
        """All scores in groups, as Markdown."""
        scores, lines = result["scores"], []
        for sampler in (self.main_sampler, *self.samplers()):
            mine = {
                name.split("/")[1]: row
                for name, row in scores.items()
                if name.startswith(f"{sampler}/")
            }
            if not mine:
                continue
            lines += [
                f"\n{sampler}, {next(iter(mine.values()))['images']} images a row\n",
                "| schedule | distance | GFLOPs a step | saved |",
                "| --- | ---: | ---: | ---: |",
            ]
            groups = defaultdict(list)
            for name, row in mine.items():
                several = name.startswith(("searched", "random"))
                groups[name.rsplit("-", 1)[0] if several else name].append(row)
            means = {
                name: {
                    key: statistics.mean(row[key] for row in group)
                    for key in ("distance", "average_gflops", "saving")
                }
                for name, group in groups.items()
            }
            for name, mean in sorted(means.items(), key=lambda item: item[1]["saving"]):
                group = groups[name]
                spread = ""
                if len(group) > 1:
                    each = sorted(row["distance"] for row in group)
                    spread = f" ({each[0]:.3f} to {each[-1]:.3f})"
                title = self._described(name, len(group), sampler)
                lines.append(
                    f"| {title} | {mean['distance']:.3f}{spread} | "
                    f"{mean['average_gflops']:.4f} | {100 * mean['saving']:.1f} % |"
                )
        return "\n".join(lines)

    def _described(self, name: str, count: int, sampler: str) -> str:
        """A row's name in words."""
        kind, *rest = name.split("-")
        if kind == "width":
            return "full width" if rest == ["1"] else f"width {rest[0]}"
        if kind == "plain":
            return "plain network, trained alone"
        if kind == "again":
            return self._described(name.removeprefix("again-"), 1, sampler) + ", other noise"
        of = "draws" if kind == "random" else "seeds"
        several = f", {count} {of}" if count > 1 else ""
        budget = f"≤ {100 * float(rest[0]):.0f} % of the FLOPs"
        names = {"searched": "searched", "switch": "best two-level switch", "random": "random"}
        elsewhere = kind == "searched" and sampler != self.main_sampler and len(rest) == 1
        other = f" with {self.main_sampler}" if elsewhere else ""
        return f"{names[kind]}{other}, {budget}{several}"

    def _pictures(self, result: Mapping) -> None:
        """The scores over FLOPs, the searched schedule, and images on the same noise."""
        groups = defaultdict(list)
        for name, row in result["scores"].items():
            sampler, schedule = name.split("/")
            if sampler == self.main_sampler:
                groups[schedule.split("-")[0]].append((row["average_gflops"], row["distance"]))
        unit = "average GFLOPs a step"
        plot_front(self.results / "front.png", groups, result["label"], unit=unit)
        chosen = result["scores"].get(f"{self.main_sampler}/searched-0.5-0")
        if chosen:
            plot_schedule(
                self.results / "schedule.png",
                range(self.T),
                read_json(self.schedule("searched-0.5-0")),
                f"searched, {100 * chosen['saving']:.0f} % of the FLOPs saved",
            )
        # Rows of pictures that the scores left: the same noise in all of them.
        rows = ["width-1", "searched-0.5-0", "width-0.75", "width-0.5"]
        files = [self.folder / "runs" / self.main_sampler / name for name in rows]
        grids = [next(iter(folder.glob("eval*.png")), None) for folder in files]
        if all(grids):
            first_rows(grids, self.results / "samples.png")


def ablation_name(variant: str, seed: int) -> str:
    """The task that trains it, and its folder."""
    return f"ablation/{variant.replace(' ', '_')}-{seed}"


def search_summary(front: Mapping) -> dict[str, object]:
    """What a search tried, and its front by its own scores."""
    keep = ("distance", "average_gflops", "saving")
    return {
        **{key: front[key] for key in ("candidates", "images", "passes", "passes_saved")},
        "front": [{key: point[key] for key in keep} for point in front["points"]],
    }


def ablation_table(ablations: Mapping[str, Sequence[Mapping]]) -> str:
    """Mean and range over seeds at every width, and the mean CPU seconds of training."""
    rows = []
    for variant, runs in ablations.items():
        cells = [variant]
        for width in WIDTHS:
            values = sorted(run["distances"][str(width)] for run in runs)
            cells.append(f"{statistics.mean(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})")
        cells.append(f"{statistics.mean(run['training_seconds'] for run in runs):.0f}")
        rows.append(cells)
    return table(["", *(f"width {w:g}" for w in WIDTHS), "training, CPU s"], rows)


def first_rows(grids: Sequence[Path], path: Path, rows: int = 2) -> None:
    """The first `rows` rows of images of each grid, one grid below the other."""
    from torchvision.io import encode_png, read_image

    pictures = [read_image(str(grid)) for grid in grids]
    # A grid of n × n images with 2 pixels between them and around it.
    side = round(256**0.5)
    step = (pictures[0].shape[1] - 2) // side
    gap = torch.full((3, 6, pictures[0].shape[2]), 255, dtype=torch.uint8)
    parts = []
    for picture in pictures:
        parts += [picture[:3, : rows * step + 2].expand(3, -1, -1), gap]
    path.write_bytes(encode_png(torch.cat(parts[:-1], 1)).numpy().tobytes())


def read_flagfile(path: Path) -> dict[str, list[str]]:
    """name -> values of a flagfile; a flag without a value has the value true."""
    found = defaultdict(list)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; see --flagfile") from error
    for line in lines:
        if line.startswith("--"):
            name, _, value = line.removeprefix("--").partition("=")
            found[name].append(value or "true")
    return dict(found)


def speed() -> tuple[str, ...]:
    """Flags for what is fast on this machine."""
    if not torch.cuda.is_available():
        return ("--amp=auto",)
    try:
        check_compiler(torch.device("cuda"))
    except UserError:
        return ()
    return ("--compile",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("experiment"))
    recipe, quick = (ROOT / "config" / f"{n}.txt" for n in ("fashion_mnist_14", "digits"))
    parser.add_argument("--flagfile", type=Path, default=recipe)
    parser.add_argument("--ablations", type=Path, default=quick, help="flagfile of the ablations")
    parser.add_argument("--data_root", default="./data")
    workers = 1 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=workers, help="tasks at a time")
    parser.add_argument("--search_images", type=int, default=400)
    parser.add_argument("--images", type=int, default=10_000, help="of a final score")
    parser.add_argument("--seeds", type=int, default=3)
    parser.set_defaults(speed=speed())
    parser.add_argument("--report", action="store_true", help="only the table of what is done")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        experiment = Experiment(options)
        if options.only:
            experiment.only(options.only)
            return
        if not options.report:
            signal.signal(signal.SIGTERM, experiment.stop)
            experiment.run()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is done")
    experiment.report()


if __name__ == "__main__":
    main()
