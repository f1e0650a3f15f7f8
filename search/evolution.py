"""The evolutionary search: NSGA-II (Deb et al. 2002) by pymoo, on one rung or up a ladder of them.

The algorithm is deterministic in its seed, so a search that was killed makes the same candidates
again when it is started again, and takes the scores that are there from the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.pntx import SinglePointCrossover
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from model import WidthSchedule
from search.front import Candidate, usable
from search.genome import Genome
from search.scoring import Rung, Scorer
from settings import SearchSettings


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


@dataclass
class Evolution:
    """NSGA-II on the first rung; of its candidates the best `ladder_keep` climb to the next rung,
    and so on to the last, the full setting.

    objective(distance, cost) -> number for the weighted search. start: schedules for the first
    population, before the usual ones. correlations: how well each rung ranked those that climbed.
    """

    settings: SearchSettings
    seed: int
    genome: Genome
    scorer: Scorer
    rungs: Sequence[Rung]
    objective: Callable[[float, float], float]
    start: Sequence[WidthSchedule] = ()
    on_generation: Callable[[int, Sequence[Candidate]], None] | None = None
    correlations: list[dict] = field(default_factory=list, init=False)
    worst: float = field(default=math.inf, init=False)  # the largest distance of interest

    def run(self) -> list[Candidate]:
        """Every candidate scored at the full setting, in the order of their making."""
        self.scorer.bar.total = self.settings.num_generation * self.settings.pop_size
        candidates = self._evolve(self.rungs[0])
        for rung in self.rungs[1:]:
            climbing = self._promoted(candidates)
            self.scorer.bar.total += len(climbing)
            generations = {c.schedule: c.generation for c in climbing}
            candidates = self.scorer.candidates(rung, generations)
            self._compare(rung, climbing, candidates)
            self._limit(candidates)
        return candidates

    def _evolve(self, rung: Rung) -> list[Candidate]:
        """NSGA-II on one rung; every candidate that it made."""
        s = self.settings
        n = s.pop_size * max(1, s.surrogate)
        algorithm = NSGA2(
            pop_size=s.pop_size,
            n_offsprings=n,
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
        algorithm.setup(problem, termination=("n_gen", s.num_generation), seed=self.seed)
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
            for candidate in self.scorer.candidates(rung, dict.fromkeys(schedules, generation)):
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
        random = np.random.default_rng([self.seed, 1])
        drawn = random.integers(0, len(genome.widths), (s.pop_size - len(unique), genome.genes))
        return KeepOneStep(genome)._do(None, np.array([*unique, *drawn]))

    def _screened(self, genes: np.ndarray, seen: Sequence[Candidate]) -> np.ndarray:
        """Indices of the pop_size rows of `genes` that a ridge regression on the candidates so far
        ranks best; of rows that are not scored yet, where there are any.

        The regression sees each gene's width one-hot; costs are exact.
        """
        from sklearn.linear_model import Ridge

        seen = usable(seen)
        if not seen:
            return np.arange(min(self.settings.pop_size, len(genes)))

        def inputs(rows: np.ndarray) -> np.ndarray:
            return np.eye(len(self.genome.widths))[rows].reshape(len(rows), -1)

        scored_inputs = inputs(np.array([self.genome.encode(c.schedule) for c in seen]))
        model = Ridge(alpha=1.0).fit(scored_inputs, np.log([c.distance + 1e-12 for c in seen]))
        schedules = [self.genome.decode(row) for row in genes]
        scored = {c.schedule.widths for c in seen}
        new = [i for i, schedule in enumerate(schedules) if schedule.widths not in scored]
        rows = np.array(new or range(len(genes)))
        predictions = [
            Candidate(schedules[i], distance, self.scorer.cost(schedules[i]), 0, {})
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
        from scipy.stats import spearmanr  # a second to import

        distances = {c.schedule.widths: c.distance for c in after}
        pairs = [(c.distance, distances[c.schedule.widths]) for c in before]
        rho = spearmanr(*zip(*pairs, strict=True)).statistic if len(pairs) > 2 else math.nan
        correlation = float(rho) if math.isfinite(rho) else None
        self.correlations.append(
            {"rung": rung.name or "full", "candidates": len(pairs), "rank_correlation": correlation}
        )
