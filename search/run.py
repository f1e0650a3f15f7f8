"""One search in one folder: its method, its log, and the choice of one candidate of the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model import WidthSchedule
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.progress import progress
from search.evolution import Evolution
from search.front import Candidate, knee, pareto_front, usable
from search.genome import Genome
from search.log import SearchLog
from search.scoring import OutOfTime, Score, Scorer
from search.sensitivity import HOPELESS, Sensitivity, fresh_noises
from settings import SearchSettings


@dataclass(frozen=True)
class Stage:
    """What a part of a search scores, at most: so many candidates, each on so many images by so
    many calls of the network, whose widths are these in equal parts. rounds: generations that this
    is done in."""

    name: str
    candidates: int
    images: int
    calls: int
    widths: Sequence[float]
    rounds: int = 1

    @property
    def passes(self) -> int:
        """One per image and call, before shared states save any."""
        return self.candidates * self.images * self.calls


def stages(settings: SearchSettings, genome: Genome, images: int, shared: bool) -> list[Stage]:
    """The parts of a search, for plans. shared: whether candidates' chains share states."""
    calls, widths = len(genome.calls), [w for w in genome.widths if w > 0]
    rounds, population = settings.num_generation, settings.pop_size
    if settings.search_method == "evolution":
        return [Stage("evolution", rounds * population, images, calls, widths, rounds)]
    entries = genome.genes * (len(genome.widths) - 1)
    # A narrowed chain goes on from full width's, so half of it is run.
    part = math.ceil(calls / 2) if shared else calls
    fresh = fresh_noises(settings, images) * images
    return [
        Stage("uniform widths", len(genome.uniform()), images, calls, widths),
        Stage("table", entries, images, part, [1.0]),
        Stage("proposals", (rounds - 1) * population, images, calls, widths, rounds - 1),
        Stage("fresh noise", 5 * population // 2, fresh, calls, widths),
    ]


@dataclass
class Search:
    """One search in one folder.

    costs: the cost per step of each width (0 for width 0). objective(distance, cost) -> number for
    the weighted search. identity: what a distance depends on; a log made under another one is
    refused. start: schedules for the first population, before the usual ones. images: of a score,
    which --search_method=sensitivity has to know. say: prints.
    """

    settings: SearchSettings
    genome: Genome
    score: Score
    costs: Mapping[float, float]
    objective: Callable[[float, float], float]
    folder: Path
    identity: Mapping[str, object]
    start: Sequence[WidthSchedule] = ()
    seed: int = 0
    on_generation: Callable[[int, Sequence[Candidate]], None] = lambda generation, candidates: None
    images: int = 0
    say: Callable[[str], None] = print
    records: dict[tuple, dict] = field(default_factory=dict, init=False)  # the log's

    def run(self) -> list[Candidate]:
        """Search; every candidate, in the order of their making."""
        log = SearchLog(self.folder / "search.jsonl", self.identity)
        log.read()
        self.records = log.records
        minutes = self.settings.search_minutes
        end = time.monotonic() + 60 * minutes if minutes else None
        with progress(0, "search", "cand") as bar:
            scorer = Scorer(self.genome, self.score, self.costs, log, bar, end)
            candidates, stopped = self._candidates(scorer)
        if stopped and not candidates:
            raise UserError(
                f"--search_minutes={minutes:g} was too short to score a candidate; the same "
                "command continues the search"
            )
        if stopped:
            self.say(f"stopped after {minutes:g} minutes; the same command continues the search")
        if not usable(candidates):
            raise UserError(f"no candidate has a distance: {candidates[0].record['unusable']}")
        return usable(candidates)

    def _candidates(self, scorer: Scorer) -> tuple[list[Candidate], bool]:
        """The method's, and whether there was too little time for it; the same in all processes."""
        result = None
        if distributed.is_main():
            try:
                result = self._method(scorer).run(), False
            except OutOfTime:
                result = scorer.known(), True
            distributed.gather(None)
        else:
            scorer.serve()
        return distributed.gather(result)[0]

    def _note(self, generation: int, candidates: Sequence[Candidate]) -> None:
        if usable(candidates):
            self.on_generation(generation, usable(candidates))

    def _method(self, scorer: Scorer) -> Evolution | Sensitivity:
        if self.settings.search_method == "sensitivity":
            return Sensitivity(
                self.settings, self.seed, self.genome, scorer, self.images, self.start, self._note,
                self.say,
            )  # fmt: skip
        return Evolution(
            self.settings, self.seed, self.genome, scorer, self.objective, self.start, self._note
        )

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate to use: the least weighted sum, the best within the budget, or the knee."""
        s = self.settings
        if s.search_objective == "weighted":
            return min(candidates, key=lambda c: self.objective(c.distance, c.cost))
        front = pareto_front(candidates)
        if s.flops_budget:
            limit = s.flops_budget * self.costs[max(self.costs)] * (1 + 1e-9)
            return min(front, key=lambda c: (max(0.0, c.cost - limit), c.distance))
        # A hopeless point would stretch the scale until any other one looks good.
        least = min(c.distance for c in front)
        return knee([c for c in front if c.distance <= HOPELESS * least])
