"""Scores of candidates: from the log where it has them, else from the evaluation, to the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from model import WidthSchedule, average
from runtime import processes as distributed
from search.front import Candidate
from search.genome import Genome
from search.log import SearchLog


class Score(Protocol):
    """The evaluation of schedules."""

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, Mapping[str, object]]]:
        """(index, {"distance": …, "passes": …, …}) of each schedule, in any order.

        noise: 0 for the search's own; any other number for a noise that is independent of it and
        of those of all other numbers.
        """


class OutOfTime(Exception):  # noqa: N818 - it is an end, not an error
    """The time for scoring is over; what was scored is in the log."""


@dataclass
class Scorer:
    """Scores candidates, each at most once per log and noise.

    Of several processes the main one decides what is scored: machines may round and sort otherwise.
    costs: the cost per step of each width (0 for width 0). end: the time on the monotonic clock
    after which OutOfTime ends the scoring, where there is one.
    """

    genome: Genome
    score: Score
    costs: Mapping[float, float]
    log: SearchLog
    bar: tqdm
    end: float | None = None

    def cost(self, schedule: WidthSchedule) -> float:
        """The mean cost of a step, or of a call where steps have two."""
        return average(schedule, self.genome.entries_for_calls(schedule), self.costs)

    def candidates(
        self, generations: Mapping[WidthSchedule, int], noise: int = 0
    ) -> list[Candidate]:
        """A candidate for each schedule.

        generations: schedule -> the generation that it was made in. noise: see Score.
        """
        records, name = self.log.records, f"noise {noise}" if noise else ""
        new = [s for s in generations if (name, s.widths) not in records]
        self.bar.update(len(generations) - len(new))
        if new:
            distributed.gather((new, noise))  # see `serve`
        for index, scores in self._scores(new, noise) if new else ():
            schedule = new[index]
            record = {
                "generation": generations[schedule],
                "rung": name,
                "schedule": list(schedule.widths),
                "cost": self.cost(schedule),
                **scores,
            }
            self.log.add(record)
            self.bar.update()
            self.bar.set_postfix(
                generation=record["generation"], distance=f"{record['distance']:.4g}"
            )
        return [self._candidate(name, s, g) for s, g in generations.items()]

    def serve(self) -> None:
        """Take part in what the main process scores, until it tells that it is done."""
        while asked := distributed.gather(None)[0]:
            with contextlib.suppress(OutOfTime):
                for _ in self._scores(*asked):
                    pass

    def _scores(
        self, schedules: Sequence[WidthSchedule], noise: int
    ) -> Iterator[tuple[int, Mapping[str, object]]]:
        """What `score` says, until the time is over, in all processes."""
        for scores in self.score(schedules, noise):
            yield scores
            # One process decides, so that all stop after the same candidate.
            if self.end and distributed.gather(time.monotonic() > self.end)[0]:
                raise OutOfTime

    def known(self) -> list[Candidate]:
        """All candidates of this search space that the log has of the search's own noise."""
        steps = self.genome.timesteps
        keys = None if len(steps) == self.genome.T else steps
        return [
            self._candidate("", WidthSchedule(widths, keys), record.get("generation", 1))
            for (name, widths), record in self.log.records.items()
            if not name and len(widths) == len(steps) and set(self.genome.widths) >= set(widths)
        ]

    def _candidate(self, name: str, schedule: WidthSchedule, generation: int) -> Candidate:
        record = self.log.records[name, schedule.widths]
        return Candidate(schedule, record["distance"], self.cost(schedule), generation, record)
