"""The evolutionary search for a width schedule: genome, ask/tell loop, log, resume, Pareto front.

This file sees the evaluation as a callable from schedules to distances and the cost of a step as a
table. It knows nothing of networks, samplers, devices or flags.

NSGA-II (Deb et al. 2002) by pymoo. Every scored candidate is one line in the log at once. The
algorithm is deterministic in its seed, so a search that was killed makes the same candidates again
when it is started again, and takes the scores that are there from the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.pntx import SinglePointCrossover
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy.stats import spearmanr
from tqdm import tqdm

from model import WidthSchedule, average
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import append_jsonl, read_jsonl, write_jsonl
from search.front import Candidate, knee, pareto_front
from search.genome import Genome
from search.log import schedules_of
from search.settings import SearchSettings

# Schedules in; (index, {"distance": …, "passes": …, …}) out, in any order.
Score = Callable[[Sequence[WidthSchedule]], Iterator[tuple[int, Mapping[str, object]]]]


class ResetMutation(Mutation):
    """Each gene changes, with probability `rate`, to another of its values, all equally likely."""

    def __init__(self, rate: float, values: int) -> None:
        super().__init__(prob=1.0)  # pymoo's own, per individual: every one may mutate
        self.rate, self.values = rate, values

    def _do(
        self, problem: Problem, X: np.ndarray, *args: object, random_state=None, **kwargs: object
    ) -> np.ndarray:
        changes = random_state.random(X.shape) < self.rate
        steps = random_state.integers(1, self.values, X.shape)
        return np.where(changes, (X + steps) % self.values, X)


class KeepOneStep(Repair):
    """A schedule that leaves out every step gets its last step back, at full width."""

    def __init__(self, genome: Genome) -> None:
        super().__init__()
        self.widths = np.array(genome.widths)

    def _do(self, problem: Problem, X: np.ndarray, **kwargs: object) -> np.ndarray:
        X = X.copy()
        X[(self.widths[X] == 0).all(1), 0] = len(self.widths) - 1
        return X


@dataclass(frozen=True)
class Rung:
    """A cheaper way to score, on fewer images or steps; `name` is what the log calls it."""

    name: str
    score: Score


@dataclass
class Search:
    """One search in one folder.

    score: the full setting. costs: the cost per step of each width (0 for width 0).
    objective(distance, cost) -> number for the weighted search. identity: what a distance depends
    on; a log made under another one is refused. start: schedules for the first population, before
    the usual ones. ladder: cheaper rungs, the cheapest first: the search runs on that one, and the
    best `ladder_keep` of its candidates climb to the next, and so on to the full setting.
    """

    settings: SearchSettings
    genome: Genome
    score: Score
    costs: Mapping[float, float]
    objective: Callable[[float, float], float]
    folder: Path
    identity: Mapping[str, object]
    start: Sequence[WidthSchedule] = ()
    ladder: Sequence[Rung] = ()
    on_generation: Callable[[int, Sequence[Candidate]], None] | None = None
    correlations: list[dict] = field(default_factory=list, init=False)
    records: dict[tuple, dict] = field(default_factory=dict, init=False)
    worst: float = field(default=math.inf, init=False)  # the largest distance of interest

    @property
    def log(self) -> Path:
        return self.folder / "search.jsonl"

    def run(self) -> list[Candidate]:
        """Search; every candidate scored at the full setting, in the order of their making."""
        self._read_log()
        rungs = [*self.ladder, Rung("", self.score)]
        total = self.settings.num_generation * self.settings.pop_size
        with tqdm(
            total=total,
            desc="search",
            unit="cand",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
        ) as bar:
            candidates = self._evolve(rungs[0], bar)
            for rung in rungs[1:]:
                climbing = self._promoted(candidates)
                bar.total += len(climbing)
                generations = {c.schedule: c.generation for c in climbing}
                scored = list(self._scored(rung, generations, bar))
                self._compare(rung, climbing, scored)
                self._limit(scored)
                candidates = scored
        return candidates

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate to use: the least weighted sum, the best within the budget, or the knee."""
        s = self.settings
        if s.search_objective == "weighted":
            return min(candidates, key=lambda c: self.objective(c.distance, c.cost))
        front = pareto_front(candidates)
        if s.flops_budget:
            limit = s.flops_budget * self.costs[max(self.costs)] * (1 + 1e-9)
            return min(front, key=lambda c: (max(0.0, c.cost - limit), c.distance))
        return knee(front)

    # --- how ---

    def _evolve(self, rung: Rung, bar: tqdm) -> list[Candidate]:
        """NSGA-II on one rung; every candidate that it made."""
        s = self.settings
        algorithm = NSGA2(
            pop_size=s.pop_size,
            n_offsprings=s.pop_size * max(1, s.surrogate),
            sampling=self._first_population(),
            crossover=SinglePointCrossover(),
            mutation=ResetMutation(s.mutation_prob, len(self.genome.widths)),
            repair=KeepOneStep(self.genome),
            eliminate_duplicates=True,
        )
        # Only a description: candidates are scored here, not by pymoo.
        problem = Problem(
            n_var=self.genome.genes,
            n_obj=1 if s.search_objective == "weighted" else 2,
            n_ieq_constr=1,  # the distance limit
            xl=0,
            xu=len(self.genome.widths) - 1,
            vtype=int,
        )
        algorithm.setup(problem, termination=("n_gen", s.num_generation), seed=s.seed)
        seen: dict[tuple[float, ...], Candidate] = {}
        generation = 0
        while algorithm.has_next():
            population = algorithm.ask()
            if population is None or len(population) == 0:
                break  # every offspring repeats a candidate of the population
            generation += 1
            if s.surrogate and generation > 1:
                population = population[self._screened(population.get("X"), list(seen.values()))]
            schedules = [self.genome.decode(genes) for genes in population.get("X")]
            for candidate in self._scored(rung, dict.fromkeys(schedules, generation), bar):
                seen.setdefault(candidate.schedule.widths, candidate)
            if generation == 1:
                self._limit(seen.values())
            population.set("F", np.array([self._values(seen[c.widths]) for c in schedules]))
            excess = [seen[c.widths].distance - self.worst for c in schedules]
            population.set("G", np.maximum(excess, 0)[:, None])
            algorithm.tell(infills=population)
            if self.on_generation:
                self.on_generation(generation, list(seen.values()))
        return list(seen.values())

    def _limit(self, candidates: Collection[Candidate]) -> None:
        """Set the distance limit from these candidates of one rung."""
        if self.settings.distance_limit:
            self.worst = self.settings.distance_limit * min(c.distance for c in candidates)

    def _values(self, candidate: Candidate) -> list[float]:
        if self.settings.search_objective == "weighted":
            return [self.objective(candidate.distance, candidate.cost)]
        return [candidate.distance, candidate.cost]

    def _first_population(self) -> np.ndarray:
        s, genome = self.settings, self.genome
        rows = [genome.encode(schedule) for schedule in self.start]
        if not s.random_init:
            rows += genome.uniform()
            if s.level_seeds:
                rows += genome.levels()[: max(0, (s.pop_size - len(rows) + 1) // 2)]
        unique = list({tuple(genes): genes for genes in rows}.values())[: s.pop_size]
        random = np.random.default_rng([s.seed, 1])
        drawn = random.integers(0, len(genome.widths), (s.pop_size - len(unique), genome.genes))
        return KeepOneStep(genome)._do(None, np.array([*unique, *drawn]))

    def _screened(self, genes: np.ndarray, seen: Sequence[Candidate]) -> np.ndarray:
        """Indices of the pop_size rows of `genes` that a ridge regression on the candidates so far
        ranks best; of rows that are not scored yet, where there are any.

        The regression sees each gene's width one-hot; costs are exact.
        """
        from sklearn.linear_model import Ridge

        def inputs(rows: np.ndarray) -> np.ndarray:
            return np.eye(len(self.genome.widths))[rows].reshape(len(rows), -1)

        scored_inputs = inputs(np.array([self.genome.encode(c.schedule) for c in seen]))
        model = Ridge(alpha=1.0).fit(scored_inputs, np.log([c.distance + 1e-12 for c in seen]))
        schedules = [self.genome.decode(row) for row in genes]
        scored = {c.schedule.widths for c in seen}
        new = [i for i, schedule in enumerate(schedules) if schedule.widths not in scored]
        rows = np.array(new or range(len(genes)))
        predictions = [
            Candidate(schedules[i], distance, self._cost(schedules[i]), 0, {})
            for i, distance in zip(rows, np.exp(model.predict(inputs(genes[rows]))), strict=True)
        ]
        return np.sort(rows[self._ranking(predictions)[: self.settings.pop_size]])

    def _ranking(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Indices, the best first: by objective, or by fronts and then the crowding within, those
        beyond the distance limit last."""
        values = np.array([self._values(c) for c in candidates])
        if values.shape[1] == 1:
            return np.argsort(values[:, 0], kind="stable")
        within = np.flatnonzero(values[:, 0] <= self.worst)
        order = []
        for front in NonDominatedSorting().do(values[within]) if len(within) else ():
            crowding = calc_crowding_distance(values[within][front])
            order += [within[front[i]] for i in np.argsort(-crowding, kind="stable")]
        beyond = np.flatnonzero(values[:, 0] > self.worst)
        return np.array([*order, *beyond[np.argsort(values[beyond, 0], kind="stable")]])

    def _promoted(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best share, at least two; uniform widths climb too, for comparison."""
        ranking = self._ranking(candidates)
        count = max(2, math.ceil(self.settings.ladder_keep * len(candidates)))
        uniform = [i for i, c in enumerate(candidates) if len(set(c.schedule.widths)) == 1]
        return [candidates[i] for i in sorted({*ranking[:count], *uniform})]

    def _compare(self, rung: Rung, before: Sequence[Candidate], after: Sequence[Candidate]) -> None:
        """Note the rank correlation (Spearman's ρ) of a rung's distances with the rung below."""
        distances = {c.schedule.widths: c.distance for c in after}
        pairs = [(c.distance, distances[c.schedule.widths]) for c in before]
        rho = spearmanr(*zip(*pairs, strict=True)).statistic if len(pairs) > 2 else math.nan
        correlation = float(rho) if math.isfinite(rho) else None
        self.correlations.append(
            {"rung": rung.name or "full", "candidates": len(pairs), "rank_correlation": correlation}
        )

    def _scored(
        self, rung: Rung, generations: Mapping[WidthSchedule, int], bar: tqdm
    ) -> Iterator[Candidate]:
        """Candidates for the schedules, each scored at most once per log.

        generations: schedule -> the generation that it was made in.
        """
        new = [s for s in generations if (rung.name, s.widths) not in self.records]
        bar.update(len(generations) - len(new))
        for index, scores in rung.score(new) if new else ():
            schedule = new[index]
            record = {
                "generation": generations[schedule],
                "rung": rung.name,
                "schedule": list(schedule.widths),
                "cost": self._cost(schedule),
                **scores,
            }
            if distributed.is_main():
                append_jsonl(self.log, record)
            self.records[rung.name, schedule.widths] = record
            bar.update()
            bar.set_postfix(generation=record["generation"], distance=f"{record['distance']:.4g}")
        for schedule, generation in generations.items():
            record = self.records[rung.name, schedule.widths]
            cost = self._cost(schedule)
            yield Candidate(schedule, record["distance"], cost, generation, record)

    def _cost(self, schedule: WidthSchedule) -> float:
        return average(schedule, self.genome.entries_for_calls(schedule), self.costs)

    def _read_log(self) -> None:
        """Take over the candidates of an earlier run of this search, killed or finished."""
        lines = distributed.gather(read_jsonl(self.log) if distributed.is_main() else None)[0]
        if not lines:
            if distributed.is_main():
                write_jsonl(self.log, [{"evaluation": dict(self.identity)}])
            return
        stored = lines[0].get("evaluation", {}) if isinstance(lines[0], dict) else {}
        differing = [
            f"{name}: {stored.get(name)} there, {value} here"
            for name, value in self.identity.items()
            # Logs of earlier versions lack the weights.
            if stored.get(name, value if name == "weights" else None) != value
        ]
        if differing:
            raise UserError(
                f"{self.log} holds candidates that were scored otherwise ({'; '.join(differing)}); "
                "use the same settings to continue it, or another --search_dir"
            )
        if distributed.is_main():
            write_jsonl(self.log, lines)  # without the unfinished line of a killed writer
        for schedule, record in schedules_of(lines, self.log):
            self.records[record.get("rung", ""), schedule] = record
