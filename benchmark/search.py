"""What each way to find a width schedule costs, and what it finds, on trained supernets.

    python -m benchmark.search LOGDIR [LOGDIR …] [--images 256] [--steps 25] [--fresh 1000]
        [--encoder pixels] [--without plain-500]

Each LOGDIR holds a trained checkpoint; the i-th is searched with seed i. Prints a table of means,
and saves it with everything behind it as JSON. What is done is not done again: searches continue
from their logs when the benchmark is started again.

All methods have the same scoring: the same images on the same noise. Hypervolumes are shares of the
area between the axes and 1.1 times the worst distance of a uniform width (of those that are usable)
and 1.1 times full width's cost. What a method would choose at each budget is scored again on noise
that no search has seen: five sets of --fresh images, whose mean and standard error are shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

import build
from benchmark import machine
from commands.search import make_search, scores_of, search_space, shared_states
from evaluate import Evaluator
from looks import table
from model import WidthSchedule, average, latency
from runtime.files import append_jsonl, read_json, read_jsonl, write_json
from runtime.identity import agree
from sampling.noise import SAMPLING, SEARCH
from search import Candidate, Score, hypervolume, pareto_front
from search.sensitivity import HOPELESS
from settings import Configuration

BUDGETS = (0.5, 0.3, 0.2)  # shares of full width's FLOPs
SETS = 5  # of fresh noise

Arm = Mapping[str, object]  # options of a search


def arms(steps: int) -> dict[str, Arm]:
    """Options of each search by its name."""
    plain = {"num_generation": 6, "pop_size": 16, "mutation_prob": 1 / steps,
             "search_objective": "pareto"}  # fmt: skip
    return {
        # Weights for which distance and cost weigh about the same at full width, as published.
        "published: weighted": plain
        | {"search_objective": "weighted", "fid_weight": 1.0, "macs_weight": 0.02},
        "plain-96": plain,
        "plain-500": plain | {"num_generation": 25, "pop_size": 20},
        "sensitivity": {"search_method": "sensitivity", "search_objective": "pareto",
                        "num_generation": 20, "pop_size": 8},
    }  # fmt: skip


def timed(score: Score) -> Score:
    """`score`, whose records also have the seconds that each schedule took."""

    def scores(schedules: Sequence[WidthSchedule], noise: int = 0):
        since = time.perf_counter()
        for index, record in score(schedules, noise):
            now = time.perf_counter()
            yield index, {**record, "seconds": now - since}
            since = now

    return scores


class Bench:
    """A trained supernet with everything that scores its schedules."""

    def __init__(self, config: Configuration, seed: int = 0, fresh: int = 1000) -> None:
        self.model, self.seed, self.fresh_images = build.load_model(config), seed, fresh
        self.widths = self.model.config.widths.all
        networks = build.candidates(self.model, self.widths)
        self.evaluator = build.evaluator(self.model, networks, SEARCH).varied(progress=False)
        self.genome = search_space(self.model)
        self.timesteps = self.genome.timesteps
        self.costs = self.model.flops(self.widths)
        self.folder = Path(config.run.logdir) / "search_benchmark"

    def cost(self, schedule: WidthSchedule, costs: Mapping[float, float] | None = None) -> float:
        """The mean FLOPs of a call, or another cost."""
        entries = self.genome.entries_for_calls(schedule)
        return average(schedule, entries, costs or self.costs)

    @cached_property
    def times(self) -> dict[float, float]:
        """Seconds per image of each width, measured once."""

        def measure() -> dict:
            shape, batch = self.model.image_shape, self.model.config.run.batch_size
            networks = self.evaluator.generator.networks.items()
            seconds = {w: latency(n, shape, batch, self.model.device) for w, n in networks}
            return {str(width): value for width, value in seconds.items()}

        return {float(width): value for width, value in self.cached("times", measure).items()}

    def cached(self, name: str, make: Callable[[], dict]) -> dict:
        """What `make` returns, as JSON has it; made once."""
        path = self.folder / f"{name.replace(' ', '_')}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    # --- methods without a search ---

    def uniform(self) -> list[WidthSchedule]:
        return [WidthSchedule([w] * self.model.levels.T) for w in self.widths]

    def switches(self) -> list[WidthSchedule]:
        """Two widths, small first or large first, at every eighth of the chain."""
        steps = len(self.timesteps)
        return [
            WidthSchedule([a] * cut + [b] * (steps - cut), self.timesteps)
            for a in self.widths
            for b in self.widths
            for cut in (steps * eighth // 8 for eighth in range(1, 8))
            if a != b
        ]

    def random(self, count: int, seed: int) -> list[WidthSchedule]:
        size = (count, len(self.timesteps))
        draws = np.random.default_rng([seed, 7]).choice(self.widths, size)
        return [WidthSchedule(map(float, row), self.timesteps) for row in draws]

    def greedy(self, segments: int = 10) -> dict:
        """From full width down: narrow the segment that loses least log distance per cost saved."""
        genome, evaluator = replace(self.genome, segments=segments), self.sharing()
        row = np.full(genome.genes, len(self.widths) - 1)
        scored = self.score_all([genome.decode(row)], evaluator)
        now = scored[0]
        while row.any():
            moves = [row - (np.arange(genome.genes) == gene) for gene in np.flatnonzero(row)]
            options = self.score_all([genome.decode(move) for move in moves], evaluator)
            losses = [math.log(o.distance / now.distance) / (now.cost - o.cost) for o in options]
            best = int(np.argmin(losses))
            row, now = moves[best], options[best]
            scored += options
        return self.result([c.record for c in scored], scored)

    def sharing(self) -> Evaluator:
        """What scores as searches do: candidates' chains share states."""
        return self.evaluator.varied(states=shared_states(self.model.config, self.model.sampler))

    def score_all(
        self, schedules: Sequence[WidthSchedule], evaluator: Evaluator
    ) -> list[Candidate]:
        """Each schedule scored."""
        records = dict(timed(scores_of(evaluator))(schedules))
        return [
            Candidate(s, records[i]["distance"], self.cost(s), 0, records[i])
            for i, s in enumerate(schedules)
        ]

    def fixed(self, schedules: Sequence[WidthSchedule]) -> dict:
        """A set of schedules that needs no search, as a result like that of a search."""
        scored = self.score_all(schedules, self.sharing())
        return self.result([c.record for c in scored], scored)

    # --- searches ---

    def search(self, name: str, arm: Arm) -> dict:
        """Run one search, or go on with it."""
        folder = self.folder / name.replace(" ", "_").replace(":", "").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        model = replace(self.model, config=self.model.config.changed(**arm))
        job = make_search(model, self.evaluator, folder)
        job.seed = self.seed  # of the search alone: the noise is that of the checkpoint's seed
        job.score = timed(job.score)
        trace: list[tuple[int, float]] = []

        def note(number: int, scored: Sequence[Candidate]) -> None:
            trace.append((sum(r["passes"] for r in job.records.values()), self.volume(scored)))

        job.on_generation = note
        candidates = job.run()
        result = self.result([*job.records.values()], candidates)
        return result | {"trace": trace, "hypervolume": trace[-1][1]}

    def result(self, records: Sequence[Mapping], candidates: Sequence[Candidate]) -> dict:
        """What scoring took, by its records, and what would be chosen of the candidates."""
        front = pareto_front(candidates)
        chosen = {}
        for budget in BUDGETS:  # a front begins with its dearest point
            within = [c for c in front if c.cost <= budget * self.costs[1.0]]
            steps = self.timesteps
            chosen[str(budget)] = [within[0].schedule[t] for t in steps] if within else None
        passes, saved = (sum(r[n] for r in records) for n in ("passes", "passes_saved"))
        return {
            "passes": passes,
            "passes_unshared": passes + saved,
            "seconds": sum(record["seconds"] for record in records),
            "hypervolume": self.volume(front),
            "chosen": chosen,
        }

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Of hypervolumes: (distance, FLOPs)."""
        distances = self.cached("reference", lambda: {"distances": [
            c.distance for c in self.score_all(self.uniform(), self.sharing())
        ]})["distances"]  # fmt: skip
        usable = [d for d in distances if d <= HOPELESS * min(distances)]
        return 1.1 * max(usable), 1.1 * self.costs[1.0]

    def volume(self, scored: Sequence[Candidate]) -> float:
        """The hypervolume as a share of all; costs are FLOPs."""
        return hypervolume(scored, self.reference) / math.prod(self.reference)

    # --- the last word ---

    def fresh(self, widths: Sequence[float], steps: int = 0) -> dict:
        """A schedule on fresh noise: mean distance of the sets and its standard error; its shares
        of full width's FLOPs and time. widths: of each of the sampler's steps. steps: of a shorter
        sampler, for full width."""
        path, key = self.folder / "fresh.jsonl", [steps, *widths]
        for record in read_jsonl(path):
            if record["key"] == key:
                return record
        whole = self.model.sampler
        settings = replace(whole.settings, sample_steps=steps or whole.settings.sample_steps)
        sampler = replace(whole, settings=settings)
        schedule = WidthSchedule(widths, self.timesteps)
        distances = []
        for number in range(SETS):
            chosen = self.evaluator.varied(
                self.fresh_images, stream=SAMPLING + (number << 8), sampler=sampler
            )
            distances.append(chosen.score(schedule)[0].distance)
        shorter = len(sampler.calls()) / len(whole.calls())
        record = {
            "key": key,
            "distance": fmean(distances),
            "error": stdev(distances) / math.sqrt(SETS),
            "flops": shorter * self.cost(schedule) / self.costs[1.0],
            "time": shorter * self.cost(schedule, self.times) / self.times[1.0],
        }
        append_jsonl(path, record)
        return record

    def fewer_steps(self, share: float) -> dict | None:
        """Full width with as many steps as cost at most this share of the whole chain's."""
        steps = int(share * len(self.timesteps) + 1e-9)
        return self.fresh([1.0] * len(self.timesteps), steps) if steps else None

    def measure(self, without: Sequence[str]) -> dict[str, dict]:
        """Every method's result."""
        fixed: dict[str, Callable[[], dict]] = {
            "uniform widths": lambda: self.fixed(self.uniform()),
            "two-level switches": lambda: self.fixed(self.switches()),
            "random, 96": lambda: self.fixed(self.random(96, self.seed)),
            "greedy": self.greedy,
        }
        searches = {
            name: lambda name=name, arm=arm: self.search(name, arm)
            for name, arm in arms(len(self.timesteps)).items()
        }
        results = {}
        for name, make in ({**searches, **fixed}).items():
            if name in without:
                continue
            results[name] = self.cached(f"result {name}", make)
            chosen = results[name]["chosen"]
            results[name]["fresh"] = {b: w and self.fresh(w) for b, w in chosen.items()}
            print(name, "done", flush=True)
        times = {b: r and r["time"] for b, r in results["sensitivity"]["fresh"].items()}
        results["full width, fewer steps"] = {
            "fresh": {str(b): self.fewer_steps(b) for b in BUDGETS}
        }
        results["full width, fewer steps in sensitivity's time"] = {
            "fresh": {b: share and self.fewer_steps(share) for b, share in times.items()}
        }
        results["full width"] = {"fresh": {"1": self.fresh([1.0] * len(self.timesteps))}}
        return results


def passes_to_reach(result: Mapping, volume: float) -> int | None:
    """The fewest passes after which a search's hypervolume is at least `volume`."""
    trace = result.get("trace") or [(result["passes"], result["hypervolume"])]
    return next((passes for passes, reached in trace if reached >= volume), None)


def show(runs: Sequence[Mapping[str, dict]]) -> list[list[str]]:
    """A header and a row for each method: means over the supernets."""
    plain = [n for n in ("plain-96", "plain-500") if n in runs[0]]
    header = ["method", "passes", "unshared", *(f"to {n}'s volume" for n in plain), "volume"]
    header += [f"<= {100 * b:g} %" for b in BUDGETS] + ["seconds"]
    rows = []

    def mean(values: Sequence[float | None], form: str = ".3g") -> str:
        return "-" if None in values or not values else f"{fmean(values):{form}}"

    for name in runs[0]:
        each = [run[name] for run in runs]
        row = [name] + [mean([r.get(n) for r in each]) for n in ("passes", "passes_unshared")]
        for goal in plain:
            row.append("-" if "passes" not in each[0] else mean(
                [passes_to_reach(run[name], run[goal]["hypervolume"]) for run in runs]
            ))  # fmt: skip
        row.append(mean([r.get("hypervolume") for r in each], ".4f"))
        for budget in BUDGETS:
            fresh = [r["fresh"].get(str(budget), r["fresh"].get("1")) for r in each]
            if None in fresh:
                row.append("-")
                continue
            error = math.sqrt(fmean([f["error"] ** 2 for f in fresh]) / len(fresh))
            row.append(f"{fmean([f['distance'] for f in fresh]):.4g} ± {error:.2g}")
        rows.append([*row, mean([r.get("seconds") for r in each])])
    return [header, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdirs", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--var_type", default="fixedsmall")
    parser.add_argument("--fresh", type=int, default=1000)
    parser.add_argument("--encoder", default="pixels")
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark/search.json"))
    options = parser.parse_args()
    about = {name: str(value) for name, value in vars(options).items()}
    runs = []
    for seed, logdir in enumerate(options.logdirs):
        bench = Bench(
            Configuration.of(
                logdir=str(logdir),
                sampler=options.sampler,
                sample_steps=options.steps,
                var_type=options.var_type,
                num_images=options.images,
                batch_size=min(options.images, 500),
                fid_encoder=options.encoder,
                data_root=options.data_root,
            ),
            seed,
            options.fresh,
        )
        settings = bench.folder / "settings.json"
        if settings.exists():  # what is there is not done again
            other = ["out", "without", "logdirs"]
            agree(settings, read_json(settings), about, "delete that folder", other)
        write_json(settings, about)
        runs.append(bench.measure(options.without))
    header, *rows = show(runs)
    print(table(header, rows))
    machine.save(
        options.out,
        {
            "dataset": bench.model.config.data.dataset,
            "training_steps": bench.model.step,
            "label": bench.evaluator.encoder.label,
            "settings": about,
            "table": [header, *rows],
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
