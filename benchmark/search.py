"""What each saving of the search buys, on a supernet trained on real images.

    python -m benchmark.search LOGDIR [--images 256] [--steps 20] [--fresh 2000] [--seeds 3]

LOGDIR holds a trained checkpoint (for digits: python main.py --train --flagfile
config/digits.txt --logdir LOGDIR). Prints a table, and saves it with everything behind it as JSON.
Every search continues from its log when the benchmark is started again.

Hypervolumes are shares of the area between the axes and one common point, 1.1 times the worst
uniform width's distance and 1.1 times full width's cost. The point that each method would choose at
half of full width's FLOPs is scored again on fresh noise and more images, so a search that merely
fitted its noise is seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

import build
from benchmark import machine
from commands.search import make_search, search_space
from evaluate import Evaluator
from model import WidthSchedule, average
from report import table
from runtime.files import read_json, write_json
from runtime.identity import agree
from sampling.noise import SAMPLING, SEARCH
from search import Candidate, Rung, Score, hypervolume, pareto_front
from settings import Configuration

Arm = Mapping[str, object]  # options of a search


def arms(generations: int, population: int, images: int, steps: int) -> dict[str, Arm]:
    """The published settings scaled down, then each saving on top of the ones before."""
    plain = {
        "num_generation": generations, "pop_size": population, "mutation_prob": 1 / steps,
        "search_objective": "pareto", "state_memory": 0.0,
    }  # fmt: skip
    # Weights for which distance and cost weigh about the same at full width, as published.
    weighted = plain | {"search_objective": "weighted", "fid_weight": 1.0, "macs_weight": 0.02}
    states = plain | {"state_memory": 1.0}
    segments = states | {"num_segments": steps // 2}
    seeds = segments | {"level_seeds": True}
    ladder = {"search_ladder": f"{images // 4}x{steps // 2}"}
    surrogate = {"surrogate": 64}
    return {
        "published: weighted, one gene per step": weighted,
        "plain: two objectives": plain,
        "+ shared states": states,
        "+ segments": segments,
        "+ level seeds": seeds,
        "+ ladder": seeds | ladder,
        "+ surrogate": seeds | surrogate,
        "+ surrogate + limit": seeds | surrogate | {"distance_limit": 1.5},
        "+ ladder + surrogate": seeds | ladder | surrogate,
        "sensitivity": segments | {"search_method": "sensitivity", "pop_size": 8},
    }


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
    """A trained supernet with everything that scores its schedules, on the search's noise."""

    def __init__(self, config: Configuration) -> None:
        self.model = build.load_model(config)
        widths = self.model.config.widths.all
        networks = build.candidates(self.model, widths, build.kept_arithmetic(config))
        evaluator = build.evaluator(self.model, networks, SEARCH)
        self.evaluator = evaluator.varied(progress=False)
        self.genome = search_space(self.model)
        self.widths, self.timesteps = widths, self.genome.timesteps
        self.costs = self.model.flops(widths)

    def cost(self, schedule: WidthSchedule) -> float:
        """Mean FLOPs of a network call."""
        return average(schedule, self.genome.entries_for_calls(schedule), self.costs)

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Of hypervolumes: (distance, cost)."""
        uniform = self.score_all(self.uniform(), self.evaluator)
        return 1.1 * max(c.distance for c in uniform), 1.1 * self.costs[1.0]

    def uniform(self) -> list[WidthSchedule]:
        return [WidthSchedule([w] * self.model.levels.T) for w in self.widths]

    def switches(self) -> list[WidthSchedule]:
        """Two widths, small first or large first, at every eighth of the chain."""
        steps, found = len(self.timesteps), []
        for a in self.widths:
            for b in self.widths:
                for eighth in range(1, 8):
                    cut = steps * eighth // 8
                    if a != b:
                        found.append(WidthSchedule([a] * cut + [b] * (steps - cut), self.timesteps))
        return found

    def random(self, count: int, seed: int) -> list[WidthSchedule]:
        draws = np.random.default_rng([seed, 7]).choice(self.widths, (count, len(self.timesteps)))
        return [WidthSchedule(map(float, row), self.timesteps) for row in draws]

    def score_all(
        self, schedules: Sequence[WidthSchedule], evaluator: Evaluator
    ) -> list[Candidate]:
        """Each schedule scored; its record holds the passes that it took."""
        scored = {}
        for index, scores in evaluator.score_all(schedules):
            schedule, record = schedules[index], {"passes": scores.passes}
            scored[index] = Candidate(schedule, scores.distance, self.cost(schedule), 0, record)
        return [scored[i] for i in range(len(schedules))]

    def search(self, arm: Arm, seed: int, folder: Path) -> dict:
        """Run one search; its front, and its hypervolume over passes."""
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "result.json"
        if done.exists():
            return read_json(done)
        model = replace(self.model, config=self.model.config.changed(**arm))
        job = make_search(model, self.evaluator, folder)
        job.seed = seed  # of the search alone: the noise is the same for all
        job.score = timed(job.score)
        job.ladder = [Rung(rung.name, timed(rung.score)) for rung in job.ladder]
        trace: list[tuple[int, float]] = []

        def total(name: str) -> float:
            return sum(record[name] for record in job.records.values())

        job.on_generation = lambda number, scored: trace.append(
            (total("passes"), self.volume(scored))
        )
        candidates = job.run()
        result = {
            "passes": total("passes"),
            "passes_saved": total("passes_saved"),
            "seconds": total("seconds"),
            # A rung's distances are not the full setting's, so only the end counts there.
            "trace": [(total("passes"), self.volume(candidates))] if job.ladder else trace,
            "chosen": self._stored(job.best(candidates)),
            "rank_correlations": job.correlations,
            **self._front(candidates),
        }
        write_json(done, result)
        return result

    def _front(self, candidates: Sequence[Candidate]) -> dict:
        return {
            "hypervolume": self.volume(candidates),
            "front": [self._stored(candidate) for candidate in pareto_front(candidates)],
            "best_at_half": self.best_at_half(candidates),
        }

    def _stored(self, candidate: Candidate) -> list[float]:
        return list(self.genome.stored(candidate.schedule).widths)

    def volume(self, scored: Sequence[Candidate]) -> float:
        """The hypervolume as a share of all."""
        return hypervolume(scored, self.reference) / (self.reference[0] * self.reference[1])

    def best_at_half(self, scored: Sequence[Candidate]) -> float | None:
        """The least distance at no more than half of full width's FLOPs."""
        cheap = [c.distance for c in scored if c.cost <= 0.5 * self.costs[1.0]]
        return min(cheap, default=None)

    def fresh(self, front: Sequence[Sequence[float]], images: int) -> dict:
        """The front's best point at half of full width's FLOPs, on noise that no search has seen
        and on more images. A front begins with its dearest point."""
        T = self.model.levels.T
        schedules = (WidthSchedule(w, None if len(w) == T else self.timesteps) for w in front)
        cheap = next(s for s in schedules if self.cost(s) <= 0.5 * self.costs[1.0])
        (scored,) = self.score_all([cheap], self.evaluator.varied(images, stream=SAMPLING))
        return {"best_at_half": scored.distance, "cost": scored.cost, "images": images}

    def fixed(self, schedules: Sequence[WidthSchedule]) -> dict:
        """A set of schedules that needs no search, as a result like that of a search."""
        start = time.perf_counter()
        scored = self.score_all(schedules, self.evaluator)
        passes = sum(c.record["passes"] for c in scored)
        return {
            "passes": passes,
            "passes_saved": 0,
            "seconds": time.perf_counter() - start,
            "trace": [(passes, self.volume(scored))],
            **self._front(scored),
        }


def passes_to_reach(trace: Sequence[tuple[int, float]], volume: float) -> int | None:
    """The fewest passes after which a search's hypervolume is at least `volume`."""
    return next((passes for passes, reached in trace if reached >= volume), None)


def measure(bench: Bench, options: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """name -> one result per seed, each with its front scored again on fresh noise."""
    count = options.generations * options.population

    def cached(name: str, make: Callable[[], dict]) -> dict:
        place = folder / f"{name.strip('+ ').replace(' ', '_')}.json"
        if not place.exists():
            write_json(place, make())
        return read_json(place)

    results = {
        name: [cached(name, lambda schedules=schedules: bench.fixed(schedules))]
        for name, schedules in (
            ("uniform widths", bench.uniform()),
            ("two-level switches", bench.switches()),
        )
    }
    listed = arms(options.generations, options.population, options.images, options.steps)
    for seed in range(options.seeds):
        random = bench.random(count, seed)
        one = cached(f"random-{seed}", lambda random=random: bench.fixed(random))
        results.setdefault("random search", []).append(one)
        for name, arm in listed.items():
            place = folder / f"{name.strip('+ ').replace(' ', '_')}-{seed}"
            results.setdefault(name, []).append(bench.search(arm, seed, place))
    for name, runs in results.items():
        for seed, run in enumerate(runs):
            run["fresh"] = cached(
                f"{name}-{seed}.fresh", lambda run=run: bench.fresh(run["front"], options.fresh)
            )
    return results


def show(results: dict[str, list[dict]]) -> list[list[str]]:
    """A row for each method: means over seeds."""

    def mean(runs: Sequence[dict], *path: str) -> str:
        values = runs
        for key in path:
            values = [v[key] for v in values]
        known = [v for v in values if v is not None]
        return f"{np.mean(known):.4g}" if known else "-"

    plain = [run["hypervolume"] for run in results["plain: two objectives"]]
    rows = []
    for name, runs in results.items():
        reached = [
            passes_to_reach(run["trace"], volume) for run, volume in zip(runs, plain, strict=False)
        ]
        text = "-"
        if all(r is not None for r in reached):
            text = f"{np.mean(reached):.3g}"
        rows.append(
            [
                name,
                mean(runs, "passes"),
                text,
                mean(runs, "hypervolume"),
                mean(runs, "best_at_half"),
                mean(runs, "fresh", "best_at_half"),
                mean(runs, "seconds"),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--fresh", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encoder", default="pixels")
    parser.add_argument("--data_root", default="./data")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark/search.json"))
    options = parser.parse_args()
    bench = Bench(
        Configuration.of(
            logdir=str(options.logdir),
            sampler=options.sampler,
            sample_steps=options.steps,
            num_images=options.images,
            batch_size=min(options.images, 500),
            fid_encoder=options.encoder,
            data_root=options.data_root,
        )
    )
    folder = options.logdir / "search_benchmark"
    about = {name: str(value) for name, value in vars(options).items()}
    settings = folder / "settings.json"
    if settings.exists():  # what is there is not done again
        agree(settings, read_json(settings), about, "delete that folder", ["out", "seeds"])
    write_json(settings, about)
    results = measure(bench, options, folder)
    header = [
        "method", "passes", "to plain's volume", "volume", "at <= 50 %", "fresh", "s",
    ]  # fmt: skip
    rows = show(results)
    print(table(header, rows))
    machine.save(
        options.out,
        {
            "dataset": bench.model.config.data.dataset,
            "training_steps": bench.model.step,
            "label": bench.evaluator.encoder.label,
            "settings": about,
            "reference": bench.reference,
            "table": [header, *rows],
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
