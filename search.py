"""The evolutionary search for a width schedule: genome, ask/tell loop, log, resume, Pareto front.

This file sees the evaluation as a callable from schedules to distances and the cost of a step as a
table. It knows nothing of networks, samplers, devices or flags.

NSGA-II (Deb et al. 2002) by pymoo. Every scored candidate is one line in the log at once. The
algorithm is deterministic in its seed, so a search that was killed asks the same questions again
when it is started again, and takes the answers that it has from the log.
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
from pymoo.indicators.hv import HV
from pymoo.operators.crossover.pntx import SinglePointCrossover
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy.stats import spearmanr
from tqdm import tqdm

from model import WidthSchedule, average, entries_for_calls
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import append_jsonl, read_jsonl, write_jsonl

OBJECTIVES = ("weighted", "pareto")

# Schedules in; (index, {"distance": …, "passes": …, …}) out, in any order.
Score = Callable[[Sequence[WidthSchedule]], Iterator[tuple[int, Mapping[str, object]]]]


@dataclass(frozen=True)
class SearchSettings:
    """How candidates are made and compared; flags of the same names explain the fields."""

    num_generation: int = 1000
    pop_size: int = 10
    fid_weight: float = 0.5
    macs_weight: float = 0.001
    mutation_prob: float = 0.001
    random_init: bool = False
    level_seeds: bool = False
    search_objective: str = "weighted"
    flops_budget: float = 0.0
    distance_limit: float = 0.0
    num_segments: int = 0
    ladder_keep: float = 0.25
    surrogate: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_generation", 1),
            ("pop_size", 2),
            ("num_segments", 0),
            ("surrogate", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        for name in ("mutation_prob", "flops_budget", "ladder_keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be in [0, 1]")
        for name in ("fid_weight", "macs_weight"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        if self.distance_limit and not 1 <= self.distance_limit < math.inf:
            raise UserError(f"--distance_limit={self.distance_limit}: must be 0 or at least 1")
        if self.search_objective not in OBJECTIVES:
            raise UserError(
                f"--search_objective={self.search_objective}: one of {', '.join(OBJECTIVES)}"
            )
        if self.distance_limit and self.search_objective == "weighted":
            raise UserError("--distance_limit needs --search_objective=pareto")


@dataclass(frozen=True)
class Genome:
    """What a candidate is to the algorithm: one index into `widths` a gene.

    widths: rising; 0 stands for leaving the step out. timesteps: the sampler's, rising. segments:
    number of genes, each for a run of neighbouring timesteps; 0 for a gene per timestep. T: for
    schedules that cover every timestep of the diffusion rather than the sampler's alone.
    evaluations: (step, timestep shown) of each call of the network, by default one a step.
    """

    widths: tuple[float, ...]
    timesteps: tuple[int, ...]
    T: int
    segments: int = 0
    evaluations: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.segments > len(self.timesteps):
            raise UserError(
                f"--num_segments={self.segments}: the sampler has {len(self.timesteps)} steps"
            )
        if len([w for w in self.widths if w > 0]) < 2:
            raise UserError("a search needs at least two widths; see --candidate_width")

    @property
    def genes(self) -> int:
        return self.segments or len(self.timesteps)

    def decode(self, genes: np.ndarray) -> WidthSchedule:
        """(genes,) indices -> the schedule, one entry a sampler step."""
        steps, total = len(self.timesteps), self.genes
        widths = [self.widths[genes[i * total // steps]] for i in range(steps)]
        return WidthSchedule(widths, None if steps == self.T else self.timesteps)

    def entries_for_calls(self, schedule: WidthSchedule) -> list[int]:
        """The timestep whose entry counts for each call of the network."""
        return entries_for_calls(schedule, self.evaluations or [(t, t) for t in self.timesteps])

    def stored(self, schedule: WidthSchedule) -> WidthSchedule:
        """What a file should hold: an entry a timestep, unless a step's entry also counts for calls
        at other timesteps, which those would get wrong."""
        if all(step == t for step, t in self.evaluations):
            return schedule.expanded(self.T)
        return schedule

    def encode(self, schedule: WidthSchedule) -> np.ndarray:
        """The genes whose schedule is nearest to `schedule`: a segment takes its first entry."""
        steps, total = len(self.timesteps), self.genes
        first = [-(-gene * steps // total) for gene in range(total)]
        widths = [schedule[self.timesteps[i]] for i in first]
        distance = np.abs(np.array(widths)[:, None] - np.array(self.widths)[None])
        return distance.argmin(1)

    def uniform(self) -> list[np.ndarray]:
        """Each width at every step, the largest first; leaving out every step is no schedule."""
        return [
            np.full(self.genes, i) for i in reversed(range(len(self.widths))) if self.widths[i] > 0
        ]

    def levels(self) -> list[np.ndarray]:
        """Monotone schedules of two and three widths, falling and rising over time.

        Two-level switches at 1/8, 1/4, … of the chain and three-level ones at its thirds, for
        neighbouring and for extreme widths, in a mixed order so that any first part is varied.
        """
        used = [i for i, w in enumerate(self.widths) if w > 0]
        n = self.genes
        found = []
        for share in (1 / 2, 1 / 4, 3 / 4, 1 / 8, 7 / 8, 3 / 8, 5 / 8):
            for a in used:
                for b in used:
                    if a != b:
                        cut = round(n * share)
                        found.append(np.repeat([a, b], [cut, n - cut]))
        for i in range(len(used) - 2):
            three = used[i : i + 3]
            for order in (three, three[::-1]):
                sizes = [n // 3, n // 3, n - 2 * (n // 3)]
                found.insert(2 * i, np.repeat(order, sizes))
        return [genes for genes in found if len(np.unique(genes)) > 1]


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


class SomeStep(Repair):
    """A schedule that leaves out every step gets its last step back, at full width."""

    def __init__(self, genome: Genome) -> None:
        super().__init__()
        self.widths = np.array(genome.widths)

    def _do(self, problem: Problem, X: np.ndarray, **kwargs: object) -> np.ndarray:
        X = X.copy()
        X[(self.widths[X] == 0).all(1), 0] = len(self.widths) - 1
        return X


@dataclass(frozen=True)
class Candidate:
    """A scored schedule. cost: mean FLOPs a step, or whatever the search's cost table holds."""

    schedule: WidthSchedule
    distance: float
    cost: float
    generation: int
    record: Mapping[str, object]


@dataclass(frozen=True)
class Rung:
    """A cheaper way to score, on fewer images or steps; `name` is what the log calls it."""

    name: str
    score: Score


@dataclass
class Search:
    """One search in one folder.

    score: the full setting. costs: what one step of each width costs (0 for width 0).
    objective(distance, cost) -> number for the weighted search. identity: what a distance depends
    on; a log made under another one is refused. start: schedules for the first population, before
    the usual ones. ladder: cheaper rungs, the cheapest first: the search runs on that one, and of
    what it saw the best `ladder_keep` climb to the next, and so on to the full setting.
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
    known: dict[tuple, dict] = field(default_factory=dict, init=False)
    worst: float = field(default=math.inf, init=False)  # the largest distance of interest

    @property
    def log(self) -> Path:
        return self.folder / "search.jsonl"

    def run(self) -> list[Candidate]:
        """Search; returns every candidate scored at the full setting, in order of the asking."""
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
                schedules = [c.schedule for c in climbing]
                scored = list(self._scored(rung, schedules, climbing[0].generation, bar))
                self._compare(rung, climbing, scored)
                self._limit(scored)
                candidates = scored
        return candidates

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one to use: the least weighted sum, the best within the budget, or the knee."""
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
        """NSGA-II on one rung; every candidate that was asked for."""
        s = self.settings
        algorithm = NSGA2(
            pop_size=s.pop_size,
            n_offsprings=s.pop_size * max(1, s.surrogate),
            sampling=self._first_population(),
            crossover=SinglePointCrossover(),
            mutation=ResetMutation(s.mutation_prob, len(self.genome.widths)),
            repair=SomeStep(self.genome),
            eliminate_duplicates=True,
        )
        # The problem is but a description: candidates are scored here, not by pymoo.
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
            for candidate in self._scored(rung, schedules, generation, bar):
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
        """Let these candidates of one rung say which distances are of interest."""
        if self.settings.distance_limit:
            self.worst = self.settings.distance_limit * min(c.distance for c in candidates)

    def _values(self, candidate: Candidate) -> list[float]:
        if self.settings.search_objective == "weighted":
            return [self.objective(candidate.distance, candidate.cost)]
        return [candidate.distance, candidate.cost]

    def _first_population(self) -> np.ndarray:
        s, genome = self.settings, self.genome
        chosen = [genome.encode(schedule) for schedule in self.start]
        if not s.random_init:
            chosen += genome.uniform()
            if s.level_seeds:
                chosen += genome.levels()[: max(0, (s.pop_size - len(chosen) + 1) // 2)]
        unique = list({tuple(genes): genes for genes in chosen}.values())[: s.pop_size]
        random = np.random.default_rng([s.seed, 1])
        drawn = random.integers(0, len(genome.widths), (s.pop_size - len(unique), genome.genes))
        return SomeStep(genome)._do(None, np.array([*unique, *drawn]))

    def _screened(self, genes: np.ndarray, seen: Sequence[Candidate]) -> np.ndarray:
        """Which pop_size rows of `genes` a ridge regression on the candidates so far likes best, of
        those that are not scored yet where there are any.

        Its inputs say which width each gene has; costs are exact.
        """
        from sklearn.linear_model import Ridge

        def inputs(rows: np.ndarray) -> np.ndarray:
            return np.eye(len(self.genome.widths))[rows].reshape(len(rows), -1)

        known = inputs(np.array([self.genome.encode(c.schedule) for c in seen]))
        model = Ridge(alpha=1.0).fit(known, np.log([c.distance + 1e-12 for c in seen]))
        schedules = [self.genome.decode(row) for row in genes]
        scored = {c.schedule.widths for c in seen}
        new = [i for i, schedule in enumerate(schedules) if schedule.widths not in scored]
        rows = np.array(new or range(len(genes)))
        guesses = [
            Candidate(schedules[i], distance, self._cost(schedules[i]), 0, {})
            for i, distance in zip(rows, np.exp(model.predict(inputs(genes[rows]))), strict=True)
        ]
        return np.sort(rows[self._ranking(guesses)[: self.settings.pop_size]])

    def _ranking(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Indices, the best first: by objective, or by fronts and then the crowding within, those
        beyond the distance limit last."""
        values = np.array([self._values(c) for c in candidates])
        if values.shape[1] == 1:
            return np.argsort(values[:, 0], kind="stable")
        good = np.flatnonzero(values[:, 0] <= self.worst)
        order = []
        for front in NonDominatedSorting().do(values[good]) if len(good) else ():
            crowding = calc_crowding_distance(values[good][front])
            order += [good[front[i]] for i in np.argsort(-crowding, kind="stable")]
        bad = np.flatnonzero(values[:, 0] > self.worst)
        return np.array([*order, *bad[np.argsort(values[bad, 0], kind="stable")]])

    def _promoted(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best share, at least a front's worth; uniform widths come along for comparison."""
        ranking = self._ranking(candidates)
        count = max(2, math.ceil(self.settings.ladder_keep * len(candidates)))
        uniform = [i for i, c in enumerate(candidates) if len(set(c.schedule.widths)) == 1]
        return [candidates[i] for i in sorted({*ranking[:count], *uniform})]

    def _compare(self, rung: Rung, before: Sequence[Candidate], after: Sequence[Candidate]) -> None:
        """Note how well the rung below ranked those that climbed (Spearman's ρ of distances)."""
        again = {c.schedule.widths: c.distance for c in after}
        pairs = [(c.distance, again[c.schedule.widths]) for c in before]
        rho = spearmanr(*zip(*pairs, strict=True)).statistic if len(pairs) > 2 else math.nan
        known = float(rho) if math.isfinite(rho) else None
        self.correlations.append(
            {"rung": rung.name or "full", "candidates": len(pairs), "rank_correlation": known}
        )

    def _scored(
        self, rung: Rung, schedules: Sequence[WidthSchedule], generation: int, bar: tqdm
    ) -> Iterator[Candidate]:
        """Candidates for the schedules, each scored once in the life of the log."""
        unique = {schedule.widths: schedule for schedule in schedules}
        new = [s for widths, s in unique.items() if (rung.name, widths) not in self.known]
        bar.update(len(schedules) - len(new))
        for index, scores in rung.score(new) if new else ():
            record = {
                "generation": generation,
                "rung": rung.name,
                "schedule": list(new[index].widths),
                "cost": self._cost(new[index]),
                **scores,
            }
            if distributed.is_main():
                append_jsonl(self.log, record)
            self.known[rung.name, new[index].widths] = record
            bar.update()
            bar.set_postfix(generation=generation, distance=f"{record['distance']:.4g}")
        for widths, schedule in unique.items():
            record = self.known[rung.name, widths]
            yield Candidate(schedule, record["distance"], self._cost(schedule), generation, record)

    def _cost(self, schedule: WidthSchedule) -> float:
        return average(schedule, self.genome.entries_for_calls(schedule), self.costs)

    def _read_log(self) -> None:
        """Take over what the log of an earlier, killed or finished run of this search knows."""
        records = distributed.gather(read_jsonl(self.log) if distributed.is_main() else None)[0]
        if not records:
            if distributed.is_main():
                write_jsonl(self.log, [{"evaluation": dict(self.identity)}])
            return
        before = records[0].get("evaluation", {}) if isinstance(records[0], dict) else {}
        differing = [
            f"{name}: {before.get(name)} there, {value} here"
            for name, value in self.identity.items()
            # Logs of earlier versions do not know the weights.
            if before.get(name, value if name == "weights" else None) != value
        ]
        if differing:
            raise UserError(
                f"{self.log} holds candidates that were scored otherwise ({'; '.join(differing)}); "
                "use the same settings to continue it, or another --search_dir"
            )
        if distributed.is_main():
            write_jsonl(self.log, records)  # without the half line of a killed writer
        for schedule, record in schedules_of(records, self.log):
            self.known[record.get("rung", ""), schedule] = record


def schedules_of(records: Sequence[object], path: Path) -> Iterator[tuple[tuple[float, ...], dict]]:
    """(widths, record) of each candidate in a search log's records."""
    for number, record in enumerate(records[1:], 2):
        try:
            widths = tuple(float(w) for w in record["schedule"])
            if not math.isfinite(record["distance"]):
                raise ValueError("distance is not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number} is no scored candidate ({error})") from error
        yield widths, record


def warm_start(path: str | Path, genome: Genome, count: int) -> list[WidthSchedule]:
    """Up to `count` schedules of another search's log, best fronts first, for a first population.

    Schedules of another length are read as covering the same chain at another resolution.
    """
    records = read_jsonl(path)
    if not records:
        raise UserError(f"--search_warm_start={path}: no search log there")
    found = {}
    for widths, record in schedules_of(records, Path(path)):
        # The full setting's score, where there is one, replaces those of lower rungs.
        if widths not in found or not record.get("rung"):
            found[widths] = (record["distance"], float(record.get("cost", 0)))
    if not found:
        raise UserError(f"--search_warm_start={path}: the log has no candidate yet")
    keys = list(found)
    order = [i for front in NonDominatedSorting().do(np.array(list(found.values()))) for i in front]
    steps = genome.timesteps
    schedules = []
    for i in order[:count]:
        widths = keys[i]
        spread = [widths[j * len(widths) // len(steps)] for j in range(len(steps))]
        schedules.append(WidthSchedule(spread, steps))
    return schedules


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none beats in both distance and cost, the dearest first."""
    values = np.array([[c.distance, c.cost] for c in candidates])
    first = NonDominatedSorting().do(values, only_non_dominated_front=True)
    unique = {(candidates[i].distance, candidates[i].cost): candidates[i] for i in first}
    return sorted(unique.values(), key=lambda c: -c.cost)


def knee(front: Sequence[Candidate]) -> Candidate:
    """The point of a front that lies farthest below the line between its ends (both axes scaled
    to the front's range)."""
    values = np.array([[c.distance, c.cost] for c in front])
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(0)) / np.where(span > 0, span, 1)
    return front[int(scaled.sum(1).argmin())]


def hypervolume(candidates: Sequence[Candidate], reference: tuple[float, float]) -> float:
    """The area between the front and `reference` (distance, cost); larger is better."""
    return float(
        HV(ref_point=np.array(reference))(np.array([[c.distance, c.cost] for c in candidates]))
    )
