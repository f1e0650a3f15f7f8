"""The evolutionary search: NSGA-II (Deb et al. 2002) by pymoo.

The algorithm is deterministic in its seed, so a search that was killed makes the same candidates
again when it is started again, and takes the scores that are there from the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.pntx import SinglePointCrossover

from model import WidthSchedule
from search.front import Candidate
from search.genome import Genome
from search.scoring import Scorer
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
    """See Genome.keep_one_step."""

    def __init__(self, genome: Genome) -> None:
        super().__init__()
        self.genome = genome

    def _do(self, problem: Problem, X: np.ndarray, **kwargs: object) -> np.ndarray:
        return self.genome.keep_one_step(X)


@dataclass
class Evolution:
    """NSGA-II on one weighted sum, or on distance and cost.

    objective(distance, cost) -> number for the weighted search. start: schedules for the first
    population, before the usual ones.
    """

    settings: SearchSettings
    seed: int
    genome: Genome
    scorer: Scorer
    objective: Callable[[float, float], float]
    start: Sequence[WidthSchedule]
    on_generation: Callable[[int, Sequence[Candidate]], None]

    def run(self) -> list[Candidate]:
        """Every candidate, in the order of their making."""
        s = self.settings
        self.scorer.bar.total = s.num_generation * s.pop_size
        algorithm = NSGA2(
            pop_size=s.pop_size,
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
            schedules = [self.genome.decode(genes) for genes in population.get("X")]
            for candidate in self.scorer.candidates(dict.fromkeys(schedules, generation)):
                seen.setdefault(candidate.schedule.widths, candidate)
            population.set("F", np.array([self._values(seen[c.widths]) for c in schedules]))
            algorithm.tell(infills=population)
            self.on_generation(generation, list(seen.values()))
        return list(seen.values())

    def _values(self, candidate: Candidate) -> list[float]:
        if self.settings.search_objective == "weighted":
            return [self.objective(candidate.distance, candidate.cost)]
        return [candidate.distance, candidate.cost]

    def _first_population(self) -> np.ndarray:
        s, genome = self.settings, self.genome
        rows = [genome.encode(schedule) for schedule in self.start]
        if not s.random_init:
            rows += genome.uniform()
        unique = list({tuple(genes): genes for genes in rows}.values())[: s.pop_size]
        random = np.random.default_rng([self.seed, 1])
        drawn = random.integers(0, len(genome.widths), (s.pop_size - len(unique), genome.genes))
        return genome.keep_one_step(np.array([*unique, *drawn]))
