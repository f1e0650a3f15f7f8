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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import dataset as data
import diffusion
import score
from benchmark.machine import describe
from evaluate import Evaluator, SharedStates
from model import SlimmableUNet, WidthSchedule, average, checkpoint, sampling_networks
from report import table
from runtime.files import read_json, write_json
from sampling import noise as rng
from search import Candidate, Genome, Rung, Search, SearchSettings, hypervolume, pareto_front


@dataclass(frozen=True)
class Arm:
    """One way to search. budget: bytes for shared states. ladder: (images, steps) of rungs."""

    name: str
    settings: SearchSettings
    budget: int = 0
    ladder: tuple[tuple[int, int], ...] = ()


def arms(generations: int, population: int, images: int, steps: int) -> list[Arm]:
    """The published settings scaled down, then each saving on top of the ones before."""
    plain = SearchSettings(
        num_generation=generations, pop_size=population, mutation_prob=1 / steps,
        search_objective="pareto",
    )  # fmt: skip
    # Weights for which distance and cost weigh about the same at full width, as published.
    weighted = replace(plain, search_objective="weighted", fid_weight=1.0, macs_weight=0.02)
    states = 2**30
    segments = replace(plain, num_segments=steps // 2)
    seeds = replace(segments, level_seeds=True)
    rung = ((images // 4, steps // 2),)
    return [
        Arm("published: weighted, a gene a step", weighted),
        Arm("plain: two objectives", plain),
        Arm("+ shared states", plain, states),
        Arm("+ segments", segments, states),
        Arm("+ level seeds", seeds, states),
        Arm("+ ladder", seeds, states, rung),
        Arm("+ surrogate", replace(seeds, surrogate=64), states),
        Arm("+ surrogate + limit", replace(seeds, surrogate=64, distance_limit=1.5), states),
        Arm("+ ladder + surrogate", replace(seeds, surrogate=64), states, rung),
        Arm("sensitivity", replace(segments, search_method="sensitivity", pop_size=8), states),
    ]


class Bench:
    """A supernet with everything that scores its schedules."""

    def __init__(
        self,
        logdir: Path,
        images: int,
        sampler: diffusion.Sampler,
        encoder: str,
        root: str,
        statistics: Path | None = None,
    ) -> None:
        """statistics: the data's, in a file as --fid_cache names; computed where it is None."""
        path = logdir / "ckpt.pt"
        state = checkpoint.load(path)
        known = state["settings"]
        names = SlimmableUNet.__init__.__annotations__.keys() - {"return"}
        # Checkpoints of earlier versions do not know all of them.
        net = SlimmableUNet(**{name: known[name] for name in names if name in known})
        checkpoint.fill(net, state["ema_model"], path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net = net.to(device).eval()
        shape = (known["in_ch"], known["img_size"], known["img_size"])
        self.widths = sorted({1.0, known["min_width"], *known["candidate_width"]})
        self.costs = {0.0: 0} | {w: score.flops(net, w, shape) for w in self.widths}
        features = score.encoder(encoder, device)
        if statistics:
            dim = features.dim or int(np.prod(shape))
            mean, covariance = score.load_statistics(statistics, dim, features.name)
        else:
            dataset = data.load(known["dataset"], root, known["img_size"])
            moments = score.statistics_of(
                data.everything(dataset, 500), features, len(dataset), "statistics"
            )
            mean, covariance = moments.mean, moments.covariance
        self.T, self.step, self.dataset = known["T"], state["step"], known["dataset"]
        self.evaluator = Evaluator(
            networks=sampling_networks(net, self.widths),
            noise_schedule=diffusion.NoiseSchedule(known["beta_1"], known["beta_T"], self.T),
            sampler=sampler,
            encoder=features,
            reference=score.Gaussian(mean, covariance, device),
            image_shape=shape,
            device=device,
            num_images=images,
            batch_size=min(images, 500),
            stream=rng.SEARCH,
            progress=False,
        )
        self.timesteps = self.evaluator.timesteps()
        worst = self.score_all(self.uniform(), self.evaluator)
        self.reference = (
            1.1 * max(c.distance for c in worst),
            1.1 * self.costs[1.0],
        )

    def uniform(self) -> list[WidthSchedule]:
        return [WidthSchedule([w] * self.T) for w in self.widths]

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
        found = {}
        for index, scores in evaluator.score_all(schedules):
            cost = average(schedules[index], self.timesteps, self.costs)
            record = {"passes": scores.passes, "passes_saved": scores.passes_saved}
            found[index] = Candidate(schedules[index], scores.distance, cost, 0, record)
        return [found[i] for i in range(len(schedules))]

    def search(self, arm: Arm, seed: int, folder: Path) -> dict:
        """Run one search; its front, and its hypervolume over passes."""
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "result.json"
        if done.exists():
            return read_json(done)
        full = self._scores(self.evaluator, arm.budget)
        rungs = []
        for images, steps in arm.ladder:
            sampler = replace(self.evaluator.sampler, sample_steps=steps)
            cheaper = replace(self.evaluator, num_images=images, sampler=sampler)
            rungs.append(Rung(f"{images}x{steps}", self._scores(cheaper, arm.budget)))
        trace: list[tuple[int, float]] = []
        job = Search(
            settings=replace(arm.settings, seed=seed),
            genome=Genome(
                tuple(self.widths), tuple(self.timesteps), self.T, arm.settings.num_segments
            ),
            score=full,
            costs=self.costs,
            objective=lambda d, c: arm.settings.fid_weight * d + arm.settings.macs_weight * c / 2e6,
            folder=folder,
            identity={"images": self.evaluator.num_images, "step": self.step},
            ladder=rungs,
            on_generation=lambda n, seen: trace.append(
                (sum(r["passes"] for r in job.records.values()), self.volume(seen))
            ),
            images=self.evaluator.num_images,
        )
        found = job.run()
        records = list(job.records.values())
        passes = sum(r["passes"] for r in records)
        result = {
            "passes": passes,
            "passes_saved": sum(r["passes_saved"] for r in records),
            "seconds": sum(r["seconds"] for r in records),
            # A rung's distances are not the full setting's, so only the end counts there. What the
            # sensitivity search returns is on other noise than the other searches' candidates.
            "hypervolume": self.volume(found) if rungs else trace[-1][1],
            "trace": [(passes, self.volume(found))] if rungs else trace,
            "front": [list(c.schedule.expanded(self.T).widths) for c in pareto_front(found)],
            "chosen": list(job.best(found).schedule.expanded(self.T).widths),
            "best_at_half": self.best_at_half(found),
            "rank_correlations": job.correlations,
        }
        write_json(done, result)
        return result

    def _scores(self, evaluator: Evaluator, budget: int):
        evaluator = replace(evaluator, states=SharedStates(budget) if budget else None)

        def scores(schedules: Sequence[WidthSchedule], noise: int = 0):
            since = time.perf_counter()
            on_noise = replace(evaluator, stream=evaluator.stream + (noise << 8))
            for index, found in on_noise.score_all(schedules):
                now = time.perf_counter()
                yield (
                    index,
                    {
                        "distance": found.distance,
                        "passes": found.passes,
                        "passes_saved": found.passes_saved,
                        "seconds": now - since,
                    },
                )
                since = now

        return scores

    def volume(self, found: Sequence[Candidate]) -> float:
        return hypervolume(found, self.reference) / (self.reference[0] * self.reference[1])

    def best_at_half(self, found: Sequence[Candidate]) -> float | None:
        """The least distance at no more than half of full width's FLOPs."""
        cheap = [c.distance for c in found if c.cost <= 0.5 * self.costs[1.0]]
        return min(cheap, default=None)

    def fresh(self, front: Sequence[Sequence[float]], images: int) -> dict:
        """The front's best point at half of full width's FLOPs, on noise that no search has seen
        and on more images. A front begins with its dearest point."""
        schedules = map(WidthSchedule, front)
        cheap = (
            s for s in schedules if average(s, self.timesteps, self.costs) <= 0.5 * self.costs[1.0]
        )
        evaluator = replace(self.evaluator, num_images=images, stream=rng.SAMPLING)
        found = self.score_all([next(cheap)], evaluator)
        return {"best_at_half": found[0].distance, "cost": found[0].cost, "images": images}

    def fixed(self, schedules: Sequence[WidthSchedule]) -> dict:
        """A set of schedules that needs no search, as a result like that of a search."""
        start = time.perf_counter()
        found = self.score_all(schedules, self.evaluator)
        passes = sum(c.record["passes"] for c in found)
        return {
            "passes": passes,
            "passes_saved": 0,
            "seconds": time.perf_counter() - start,
            "hypervolume": self.volume(found),
            "trace": [(passes, self.volume(found))],
            "front": [list(c.schedule.expanded(self.T).widths) for c in pareto_front(found)],
            "best_at_half": self.best_at_half(found),
        }


def passes_to_reach(trace: Sequence[tuple[int, float]], volume: float) -> int | None:
    """The fewest passes after which a search's hypervolume is at least `volume`."""
    return next((passes for passes, reached in trace if reached >= volume), None)


def measure(bench: Bench, options: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """name -> one result a seed, each with its front scored again on fresh noise."""
    listed = arms(options.generations, options.population, options.images, options.steps)
    count = options.generations * options.population
    results: dict[str, list[dict]] = {"uniform widths": [], "two-level switches": []}
    results["random search"] = []
    for seed in range(options.seeds):
        for arm in listed:
            place = folder / f"{arm.name.strip('+ ').replace(' ', '_')}-{seed}"
            results.setdefault(arm.name, []).append(bench.search(arm, seed, place))
        place = folder / f"random-{seed}.json"
        if not place.exists():
            write_json(place, bench.fixed(bench.random(count, seed)))
        results["random search"].append(read_json(place))
    for name, schedules in (
        ("uniform widths", bench.uniform()),
        ("two-level switches", bench.switches()),
    ):
        place = folder / f"{name}.json"
        if not place.exists():
            write_json(place, bench.fixed(schedules))
        results[name] = [read_json(place)]
    for name, runs in results.items():
        for seed, run in enumerate(runs):
            place = folder / f"{name.strip('+ ').replace(' ', '_')}-{seed}.fresh.json"
            if not place.exists():
                write_json(place, bench.fresh(run["front"], options.fresh))
            run["fresh"] = read_json(place)
    return results


def show(results: dict[str, list[dict]]) -> list[list[str]]:
    """A row a method: means over seeds."""

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
        options.logdir,
        options.images,
        diffusion.Sampler(options.sampler, sample_steps=options.steps),
        options.encoder,
        options.data_root,
    )
    results = measure(bench, options, options.logdir / "search_benchmark")
    header = [
        "method", "passes", "to plain's volume", "volume", "at <= 50 %", "fresh", "s",
    ]  # fmt: skip
    rows = show(results)
    print(table(header, rows))
    write_json(
        options.out,
        {
            "dataset": bench.dataset,
            "training_steps": bench.step,
            "label": bench.evaluator.encoder.label,
            "settings": {k: str(v) for k, v in vars(options).items()},
            "reference": bench.reference,
            "table": [header, *rows],
            "results": results,
            "machine": describe(),
        },
    )


if __name__ == "__main__":
    main()
