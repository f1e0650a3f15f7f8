"""Scores of candidates: from the log where it has them, else from the evaluation, to the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from model import WidthSchedule, average
from search.front import Candidate
from search.genome import Genome
from search.log import SearchLog

# Schedules in; (index, {"distance": …, "passes": …, …}) out, in any order.
Score = Callable[[Sequence[WidthSchedule]], Iterator[tuple[int, Mapping[str, object]]]]


@dataclass(frozen=True)
class Rung:
    """A cheaper way to score, on fewer images or steps; `name` is what the log calls it."""

    name: str
    score: Score


@dataclass
class Scorer:
    """Scores candidates, each at most once per log and rung.

    costs: the cost per step of each width (0 for width 0).
    """

    genome: Genome
    costs: Mapping[float, float]
    log: SearchLog
    bar: tqdm

    def cost(self, schedule: WidthSchedule) -> float:
        """The mean cost of a step, or of a call where steps have two."""
        return average(schedule, self.genome.entries_for_calls(schedule), self.costs)

    def candidates(self, rung: Rung, generations: Mapping[WidthSchedule, int]) -> list[Candidate]:
        """A candidate for each schedule.

        generations: schedule -> the generation that it was made in.
        """
        records = self.log.records
        new = [s for s in generations if (rung.name, s.widths) not in records]
        self.bar.update(len(generations) - len(new))
        for index, scores in rung.score(new) if new else ():
            schedule = new[index]
            record = {
                "generation": generations[schedule],
                "rung": rung.name,
                "schedule": list(schedule.widths),
                "cost": self.cost(schedule),
                **scores,
            }
            self.log.add(record)
            self.bar.update()
            self.bar.set_postfix(
                generation=record["generation"], distance=f"{record['distance']:.4g}"
            )
        return [
            Candidate(s, record["distance"], self.cost(s), generation, record)
            for s, generation in generations.items()
            for record in [records[rung.name, s.widths]]
        ]
