"""One search in one folder: its method, its log, and the choice of one candidate of the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from model import WidthSchedule
from runtime import processes as distributed
from runtime.errors import UserError
from search.evolution import Evolution
from search.front import Candidate, knee, pareto_front
from search.genome import Genome
from search.log import SearchLog
from search.scoring import OutOfTime, Rung, Score, Scorer
from search.sensitivity import Sensitivity
from search.settings import SearchSettings


@dataclass
class Search:
    """One search in one folder.

    score: the full setting. costs: the cost per step of each width (0 for width 0).
    objective(distance, cost) -> number for the weighted search. identity: what a distance depends
    on; a log made under another one is refused. start: schedules for the first population, before
    the usual ones. ladder: cheaper rungs, the cheapest first: the search runs on that one, and the
    best `ladder_keep` of its candidates climb to the next, and so on to the full setting. images:
    of a score at the full setting, which --search_method=sensitivity has to know. say: prints.
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
    images: int = 0
    say: Callable[[str], None] = tqdm.write
    correlations: list[dict] = field(default_factory=list, init=False)
    records: dict[tuple, dict] = field(default_factory=dict, init=False)  # the log's

    def run(self) -> list[Candidate]:
        """Search; every candidate scored at the full setting, in the order of their making."""
        log = SearchLog(self.folder / "search.jsonl", self.identity)
        log.read()
        self.records = log.records
        minutes = self.settings.search_minutes
        end = time.monotonic() + 60 * minutes if minutes else None
        with tqdm(
            desc="search", unit="cand", dynamic_ncols=True, disable=not distributed.is_main()
        ) as bar:
            scorer = Scorer(self.genome, self.costs, log, bar, end)
            try:
                return self._method(scorer).run()
            except OutOfTime:
                candidates = scorer.known("")
        if not candidates:
            raise UserError(
                f"--search_minutes={minutes:g} was too short to score a candidate at the full "
                "setting; the same command continues the search"
            )
        self.say(f"stopped after {minutes:g} minutes; the same command continues the search")
        return candidates

    def _method(self, scorer: Scorer) -> Evolution | Sensitivity:
        if self.settings.search_method == "sensitivity":
            if self.ladder:
                raise UserError("--search_ladder: only with --search_method=evolution")
            return Sensitivity(
                self.settings, self.genome, scorer, self.score, self.images, self.start,
                self.on_generation, self.say,
            )  # fmt: skip
        evolution = Evolution(
            self.settings, self.genome, scorer, [*self.ladder, Rung("", self.score)],
            self.objective, self.start, self.on_generation,
        )  # fmt: skip
        self.correlations = evolution.correlations
        return evolution

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
