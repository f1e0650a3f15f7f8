"""The search that starts from a table of sensitivities and scores what additive models expect.

1. Uniform widths; one whose score is hopeless is left out.
2. The table: one gene narrowed to one width, all others at full width, on the same noise as full
   width; an entry is the change of log distance. Few images at first, on two noises; more where an
   entry's error could change the front. An entry's error comes from these repetitions.
3. Rounds: fit a model to the table and all candidates so far, take its exact front, and the fronts
   of the model on bootstrap samples for exploration; score what is new.
4. The last word: candidates that could be on the front are scored again on fresh noise, repeatedly,
   until they are told apart. A distance's error comes from these repetitions.

Log distances of single narrowings add up well, but a table cannot see what only happens when many
genes are narrow at once. So it is a start: every point of the result has been scored.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from model import WidthSchedule
from search.additive import Belief, exact_front, settled, stakes
from search.front import Candidate, hypervolume
from search.genome import Genome
from search.scoring import Rung, Score, Scorer
from search.settings import SearchSettings

SEGMENTS = 12  # genes, where --num_segments does not say
HOPELESS = 8.0  # a width's uniform distance, as a multiple of the best uniform one
TABLE_SHARE = 8  # a table's noise has num_images / this many images
SCALES = (0.5, 20.0)  # least and largest factor between a table of few images and the full setting
REPEATS = 4  # noises of a table's entry, at most
AT_STAKE = 5e-3  # of the whole table: entries that could save more than this get more images
PATIENCE, MOVED = (
    3,
    2e-3,
)  # rounds without a relative growth of hypervolume by so much end the search
FRESH = 32  # number of the first noise that no part of the search has seen


@dataclass
class Sensitivity:
    """See the file's first lines. images: the number of images of a score at the full setting."""

    settings: SearchSettings
    genome: Genome
    scorer: Scorer
    score: Score
    images: int
    on_generation: Callable[[int, Sequence[Candidate]], None] | None = None
    say: Callable[[str], None] = lambda text: None
    usable: list[int] = field(default_factory=list, init=False)  # columns, full width's the last
    noise_error: float = field(default=0.0, init=False)  # of a log distance's change, all images

    def run(self) -> list[Candidate]:
        """The candidates that could be on the front, and the uniform widths, on fresh noise."""
        s = self.settings
        candidates = {c.schedule: c for c in self._uniform()}
        table = self._table()
        self._generation(1, candidates)
        worst = max(c.distance for c in candidates.values())
        reference = (1.1 * worst, 1.1 * max(c.cost for c in candidates.values()))
        volumes = [hypervolume([*candidates.values()], reference)]
        for generation in range(2, s.num_generation + 1):
            new = self._proposed(generation, table, candidates)
            if not new:
                break
            for c in self._scored(Rung("", self.score), dict.fromkeys(new, generation)):
                candidates[c.schedule] = c
            self._generation(generation, candidates)
            volumes.append(hypervolume([*candidates.values()], reference))
            if len(volumes) > PATIENCE and volumes[-1] < (1 + MOVED) * volumes[-1 - PATIENCE]:
                break
        return self._confirmed([*candidates.values()])

    # --- the start ---

    def _uniform(self) -> list[Candidate]:
        """Score the uniform widths and choose the usable ones."""
        rows = self.genome.uniform()
        schedules = [self.genome.decode(row) for row in rows]
        candidates = self._scored(Rung("", self.score), dict.fromkeys(schedules, 1))
        least = min(c.distance for c in candidates)
        full = len(self.genome.widths) - 1
        self.usable = [full]
        for row, c in zip(rows, candidates, strict=True):
            width = self.genome.widths[row[0]]
            if row[0] == full:
                continue
            if c.distance <= HOPELESS * least:
                self.usable.append(row[0])
            else:
                self.say(
                    f"width {width:g} is left out: at every step its distance is {c.distance:.4g}, "
                    f"{c.distance / least:.0f} times the best uniform width's"
                )
        if self.genome.widths[0] == 0:
            self.usable.append(0)
        self.usable.sort()
        return candidates

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Effects and their standard errors."""
        images = max(2, self.images // TABLE_SHARE)
        entries = {
            (gene, width): self._narrowed(gene, width)
            for gene in range(self.genome.genes)
            for width in self.usable[:-1]
        }
        entries = {key: s for key, s in entries.items() if s is not None}
        seen: dict[tuple[int, int], list[float]] = {key: [] for key in entries}
        wanted = list(entries)
        for noise in range(1, REPEATS + 1):
            rung = self._rung(images, noise)
            full = self.genome.decode(np.full(self.genome.genes, len(self.genome.widths) - 1))
            schedules = [full, *(entries[key] for key in wanted)]
            scored = self._scored(rung, dict.fromkeys(schedules, 1))
            logs = {c.schedule: math.log(c.distance) for c in scored}
            for key in wanted:
                seen[key].append(logs[entries[key]] - logs[full])
            if noise >= 2:
                effects, errors = self._estimates(seen, images)
                plain = settled(effects, self.genome.widths, errors)
                stake = stakes(plain, errors, self.costs)
                whole = np.where(np.isfinite(plain), plain, 0).max(1).sum()
                wanted = [key for key in wanted if stake[key] > AT_STAKE * whole]
                if not wanted:
                    break
        return effects, errors

    def _estimates(
        self, seen: dict[tuple[int, int], list[float]], images: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard errors of the entries' repetitions; a variance from few of them is
        drawn towards the mean one."""
        degrees = sum(len(values) - 1 for values in seen.values())
        squares = {key: np.var(values) * len(values) for key, values in seen.items()}
        mean = sum(squares.values()) / degrees
        self.noise_error = math.sqrt(mean * images / self.images)
        shape = self.genome.genes, len(self.genome.widths)
        effects, errors = np.full(shape, np.inf), np.zeros(shape)
        effects[:, -1] = 0
        for key, values in seen.items():
            effects[key] = np.mean(values)
            variance = (4 * mean + squares[key]) / (4 + len(values) - 1)
            errors[key] = math.sqrt(variance / len(values))
        return effects, errors

    def _narrowed(self, gene: int, width: int) -> WidthSchedule | None:
        """One gene at one width, the others at full width; None where every step is skipped."""
        row = np.full(self.genome.genes, len(self.genome.widths) - 1)
        row[gene] = width
        schedule = self.genome.decode(row)
        return schedule if any(schedule.widths) else None

    @functools.cached_property
    def costs(self) -> np.ndarray:
        """(genes, widths) what a gene at a width adds to full width's cost."""
        full = self.scorer.cost(self._narrowed(0, len(self.genome.widths) - 1))
        costs = np.zeros((self.genome.genes, len(self.genome.widths)))
        for gene, width in np.ndindex(costs.shape):
            schedule = self._narrowed(gene, width)
            costs[gene, width] = self.scorer.cost(schedule) - full if schedule else -full
        return costs

    # --- rounds ---

    def _proposed(
        self,
        generation: int,
        table: tuple[np.ndarray, np.ndarray],
        candidates: Mapping[WidthSchedule, Candidate],
    ) -> list[WidthSchedule]:
        """Up to pop_size schedules that are not scored yet, spread over the costs of the front.

        Every other one is of the front of effects that are drawn, for exploration.
        """
        s, random = self.settings, np.random.default_rng([self.settings.seed, 2, generation])
        belief = self._belief(table, candidates)
        best = self._front(belief.mean)
        ends = [self._cost(best[0]), self._cost(best[-1])]
        new: dict[WidthSchedule, None] = {}
        for place in range(s.pop_size):
            rows = self._front(belief.draw(random)) if place % 2 else best
            target = ends[0] + (ends[1] - ends[0]) * (place + random.random()) / s.pop_size
            rows.sort(key=lambda row: abs(self._cost(row) - target))
            schedules = map(self.genome.decode, rows)
            fresh = (
                schedule
                for schedule in schedules
                if any(schedule.widths) and schedule not in candidates and schedule not in new
            )
            new |= dict.fromkeys(itertools.islice(fresh, 1))
        return list(new)

    def _belief(
        self,
        table: tuple[np.ndarray, np.ndarray],
        candidates: Mapping[WidthSchedule, Candidate],
    ) -> Belief:
        """The table, put on the scale of the full setting by the uniform widths, and corrected."""
        usable = {self.genome.widths[i] for i in self.usable}
        scored = [c for c in candidates.values() if set(c.schedule.widths) <= usable]
        rows = np.array([self.genome.encode(c.schedule) for c in scored])
        logs = np.array([math.log(c.distance) for c in scored])
        uniform = [i for i, row in enumerate(rows) if len(set(row)) == 1]
        sums = np.array([table[0][:, rows[i][0]].sum() for i in uniform])
        changes = logs[uniform] - logs[uniform][0]  # full width is the first
        scale = np.clip(sums @ changes / max(sums @ sums, 1e-12), *SCALES)
        count = len(self.genome.timesteps)
        shares = np.bincount(np.arange(count) * self.genome.genes // count) / count
        return Belief.of(scale * table[0], scale * table[1], shares, rows, logs)

    def _front(self, effects: np.ndarray) -> list[np.ndarray]:
        return exact_front(settled(effects, self.genome.widths), self.costs)

    def _cost(self, row: np.ndarray) -> float:
        return float(self.costs[np.arange(len(row)), row].sum())

    # --- the end ---

    def _confirmed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that could be on the front, and the uniform ones, on fresh noise."""
        images = self.settings.confirm_images or 2 * self.images
        logs: dict[WidthSchedule, list[float]] = {}
        left = self._contenders(candidates, self.noise_error)
        for noise in range(max(1, round(images / self.images))):
            scored = self._scored(
                self._rung(self.images, FRESH + noise), {c.schedule: c.generation for c in left}
            )
            for c in scored:
                logs.setdefault(c.schedule, []).append(math.log(c.distance))
            own, paired = _spread([logs[c.schedule] for c in scored], self.noise_error)
            means = {c.schedule: math.exp(np.mean(logs[c.schedule])) for c in scored}
            scored = [
                replace(c, distance=means[c.schedule], error=own and own * means[c.schedule])
                for c in scored
            ]
            left = self._contenders(scored, paired)
        return left

    def _contenders(self, candidates: Sequence[Candidate], error: float) -> list[Candidate]:
        """Candidates that no other one of at most their cost beats by more than a standard error,
        of pop_size ranges of cost the best two each; and the uniform widths."""
        costs = [c.cost for c in candidates]
        span = (max(costs) - min(costs)) / self.settings.pop_size or 1.0
        ranges: dict[int, list[tuple[float, float, int]]] = {}
        for index, c in enumerate(candidates):
            least = min(other.distance for other in candidates if other.cost <= c.cost)
            excess = math.log(c.distance / least)
            if excess <= error:
                place = int((c.cost - min(costs)) / span)
                ranges.setdefault(place, []).append((excess, c.distance, index))
        chosen = {index for found in ranges.values() for *_, index in sorted(found)[:2]}
        chosen |= {i for i, c in enumerate(candidates) if len(set(c.schedule.widths)) == 1}
        return [candidates[i] for i in sorted(chosen)]

    # --- how ---

    def _rung(self, images: int, noise: int) -> Rung:
        score = functools.partial(self.score, images=images, noise=noise)
        return Rung(f"{images} images, noise {noise}", score)

    def _scored(self, rung: Rung, generations: dict[WidthSchedule, int]) -> list[Candidate]:
        return self.scorer.candidates(rung, generations)

    def _generation(self, number: int, candidates: dict[WidthSchedule, Candidate]) -> None:
        if self.on_generation:
            self.on_generation(number, list(candidates.values()))


def stages(
    settings: SearchSettings, genome: Genome, images: int
) -> list[tuple[str, int, int, float]]:
    """(name, candidates, images, share of the chain) of each stage, at most: for plans."""
    widths, population = len(genome.widths) - 1, settings.pop_size
    return [
        ("uniform widths", len(genome.uniform()), images, 1.0),
        # On two noises; a narrowed chain goes on from full width's, so half of it is run.
        ("table", genome.genes * widths * 2, max(2, images // TABLE_SHARE), 0.5),
        ("rounds", (settings.num_generation - 1) * population, images, 1.0),
        ("fresh noise", 2 * population, settings.confirm_images or 2 * images, 1.0),
    ]


def _spread(logs: Sequence[Sequence[float]], before: float) -> tuple[float | None, float]:
    """Standard errors of the means of repeated log distances: of one, and of a difference.

    logs: (candidates, noises). The noises are the same for all candidates, so what they share drops
    out of a difference. before: the latter's estimate for one noise, for where there is but one.
    """
    values = np.array(logs)
    count, repeats = values.shape
    if repeats == 1:
        return None, before
    own = values.var(1, ddof=1).mean()
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    paired = 2 * (rest**2).sum() / max(1, (count - 1) * (repeats - 1))
    return math.sqrt(own / repeats), math.sqrt(paired / repeats)
