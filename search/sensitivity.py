"""The search that starts from a table of sensitivities and scores what an additive model expects.

1. Uniform widths. One whose score is hopeless is left out.
2. The table: one gene narrowed to one width, all others at full width, on the same noise as full
   width; the change of log distance is the entry. First the narrowest width of every gene. What the
   other widths do follows roughly from the uniform scores, and is scored where that is not enough.
3. Rounds: a model of all scores so far has exact fronts, its own and those of effects drawn from
   what the scores leave open. Score the points that are expected to add most.
4. Fresh noise: what could be on the front is scored again, more than once. The spread over these
   noises is the error of a distance.

All scores but the last have the same images, so entries are candidates like any other. Few images
for many entries would not do: while a noise has no more images than the encoder has features, the
distance is that of the missing images, and a narrow gene hardly shows in it.

Effects add up well, but a table cannot see what only happens when many genes are narrow at once. So
the table is a start: every point of the result has been scored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from model import WidthSchedule
from search.additive import Belief, exact_front, settled, stakes
from search.front import Candidate, hypervolume, pareto_front, usable
from search.genome import Genome
from search.scoring import Scorer
from settings import SearchSettings

SEGMENTS = 12  # genes, where --num_segments does not say
HOPELESS = 8.0  # a width's uniform distance, as a multiple of the best uniform one
AT_STAKE = 2e-3  # in log distance: entries are scored where knowing them could save more than this
PATIENCE = 3  # rounds in which the hypervolume must grow …
GROWTH = 2e-3  # … by this share, or the search ends
FRESH = 32  # number of the first noise that no part of the search has seen


@dataclass
class Sensitivity:
    """See the file's first lines.

    images: of a score. start: schedules that are scored with the table.
    """

    settings: SearchSettings
    seed: int
    genome: Genome
    scorer: Scorer
    images: int
    start: Sequence[WidthSchedule]
    on_generation: Callable[[int, Sequence[Candidate]], None]
    say: Callable[[str], None]
    candidates: dict[WidthSchedule, Candidate] = field(default_factory=dict, init=False)
    changes: np.ndarray = field(init=False)  # (widths,) of log distance, of uniform widths
    reference: tuple[float, float] = field(init=False)  # of hypervolumes

    def run(self) -> list[Candidate]:
        """The candidates that could be on the front, and the uniform widths, on fresh noise."""
        settings, bar = self.settings, self.scorer.bar
        uniform = len(self.genome.uniform())
        rounds = range(2, settings.num_generation + 1)
        bar.total = uniform + self.genome.genes + len(rounds) * settings.pop_size
        self._uniform()
        if np.isfinite(self.changes).sum() < 2:
            return [*self.candidates.values()]  # nothing to choose from
        rows = [self.genome.keep_one_step(self.genome.encode(s)) for s in self.start]
        self._add([self.genome.decode(row) for row in rows], 1)
        if usable([self.candidates[self._narrowed(0, -1)]]):
            self._table()  # its entries are of full width but for one gene
        self.on_generation(1, [*self.candidates.values()])
        volumes = [hypervolume([*self.candidates.values()], self.reference)]
        for generation in rounds:
            new = self._proposed(generation)
            if not new:
                break
            self._add(new, generation)
            self.on_generation(generation, [*self.candidates.values()])
            volumes.append(hypervolume([*self.candidates.values()], self.reference))
            if len(volumes) > PATIENCE and volumes[-1] < (1 + GROWTH) * volumes[-1 - PATIENCE]:
                break
        return self._confirmed([*self.candidates.values()])

    # --- the start ---

    def _uniform(self) -> None:
        """Score the uniform widths and choose the usable ones."""
        rows = self.genome.uniform()
        self._add([self.genome.decode(row) for row in rows], 1)
        scored = usable(self.candidates.values())
        self.changes = np.full(len(self.genome.widths), np.inf)
        if not scored:
            return
        # Where full width has no distance, the widest that has one stands for it.
        level, least = scored[0].distance, min(c.distance for c in scored)
        self.changes[-1] = 0
        others = [*self.candidates.values()][1:]
        for (column, *_), candidate in zip(rows[1:], others, strict=True):
            width, distance = self.genome.widths[column], candidate.distance
            if distance <= HOPELESS * least:
                self.changes[column] = math.log(distance / level)
            elif candidate in scored:
                self.say(
                    f"width {width:g} is left out: at every step its distance is {distance:.4g}, "
                    f"{distance / least:.0f} times the best uniform width's"
                )
            else:
                self.say(f"width {width:g} is left out: at every step it has no distance")
        if self.genome.widths[0] == 0:  # has no uniform score
            self.changes[0] = 2 * self.changes[np.isfinite(self.changes)].max()
        good = [c for c in scored if c.distance <= HOPELESS * least]
        self.reference = 1.1 * max(c.distance for c in good), 1.1 * max(c.cost for c in good)

    def _table(self) -> None:
        """Score entries: the narrowest width of every gene, then others that decide."""
        used = np.flatnonzero(np.isfinite(self.changes))
        columns = [c for c in used if self.genome.widths[c] > 0][:1]
        if self.genome.widths[0] == 0:
            columns.append(0)
        entries = [(gene, column) for gene in range(self.genome.genes) for column in columns]
        done = set()
        while entries:
            done |= {*entries}
            schedules = [self._narrowed(*entry) for entry in entries]
            self._add([s for s in schedules if s is not None], 1)
            belief = self._belief()
            stake = stakes(settled(belief.mean, self.genome.widths), belief.errors, self.costs)
            entries = [e for e in np.ndindex(stake.shape) if stake[e] > AT_STAKE and e not in done]

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

    def _proposed(self, generation: int) -> list[WidthSchedule]:
        """Up to pop_size schedules that are not scored yet.

        Each is, of an exact front, the one that is expected to add most to the hypervolume of what
        is scored and chosen. Every other front is that of effects that are drawn, to explore.
        """
        random = np.random.default_rng([self.seed, 2, generation])
        belief, points, new = self._belief(), [*self.candidates.values()], []
        for place in range(self.settings.pop_size):
            effects = belief.draw(random) if place % 2 else belief.mean
            options = []
            for row in exact_front(settled(effects, self.genome.widths), self.costs):
                schedule = self.genome.decode(row)
                if any(schedule.widths) and schedule not in self.candidates and schedule not in new:
                    distance = math.exp(belief.level + effects[np.arange(len(row)), row].sum())
                    options.append(Candidate(schedule, distance, self.scorer.cost(schedule), 0, {}))
            if options:
                points.append(max(options, key=lambda c: hypervolume([*points, c], self.reference)))
                new.append(points[-1].schedule)
        return new

    def _belief(self) -> Belief:
        used = {w for w, c in zip(self.genome.widths, self.changes, strict=True) if c < np.inf}
        scored = [c for c in usable(self.candidates.values()) if set(c.schedule.widths) <= used]
        rows = np.array([self.genome.encode(c.schedule) for c in scored])
        logs = np.array([math.log(c.distance) for c in scored])
        count = len(self.genome.timesteps)
        shares = np.bincount(np.arange(count) * self.genome.genes // count) / count
        belief = Belief.of(self.changes, shares, rows, logs)
        # An entry without a distance is not to be used.
        for entry in np.ndindex(belief.mean[:, :-1].shape):
            candidate = self.candidates.get(self._narrowed(*entry))
            if candidate and not usable([candidate]):
                belief.mean[entry] = np.inf
        return belief

    # --- the end ---

    def _confirmed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that could be on the front, and the uniform ones, on fresh noise."""
        logs: dict[WidthSchedule, list[float]] = {}
        noise_error = self._belief().noise
        left = self._contenders(candidates, noise_error)
        noises = fresh_noises(self.settings, self.images)
        self.scorer.bar.total = self.scorer.bar.n + noises * len(left)
        for noise in range(noises):
            generations = {c.schedule: c.generation for c in left}
            fresh = self.scorer.candidates(generations, FRESH + noise)
            scored = usable(fresh)
            if not scored:
                return fresh
            for c in scored:
                logs.setdefault(c.schedule, []).append(math.log(c.distance))
            own, paired = _spread([logs[c.schedule] for c in scored], noise_error)
            means = {c.schedule: math.exp(np.mean(logs[c.schedule])) for c in scored}
            scored = [
                replace(c, distance=means[c.schedule], error=own and own * means[c.schedule])
                for c in scored
            ]
            left = self._contenders(scored, paired)
        return left

    def _contenders(self, candidates: Sequence[Candidate], error: float) -> list[Candidate]:
        """The front, its rivals, and the uniform widths.

        Of the front the 2·pop_size points without which it would lose most; of the candidates that
        the front beats by no more than one standard error, the pop_size / 2 nearest to it.
        """
        candidates = usable(candidates)
        front = pareto_front(candidates)
        while len(front) > max(2, 2 * self.settings.pop_size):
            areas = [
                (dearer.cost - c.cost) * math.log(cheaper.distance / c.distance)
                for dearer, c, cheaper in zip(front, front[1:], front[2:], strict=False)
            ]
            del front[1 + int(np.argmin(areas))]
        chosen = {c.schedule for c in front}
        excesses = {
            c.schedule: math.log(
                c.distance / min(other.distance for other in candidates if other.cost <= c.cost)
            )
            for c in candidates
        }
        rivals = sorted((s for s in excesses if 0 < excesses[s] <= error), key=excesses.get)
        chosen |= {*rivals[: self.settings.pop_size // 2]}
        chosen |= {c.schedule for c in candidates if len(set(c.schedule.widths)) == 1}
        return [c for c in candidates if c.schedule in chosen]

    # --- how ---

    def _add(self, schedules: Sequence[WidthSchedule], generation: int) -> None:
        """Score schedules on the search's own noise."""
        for c in self.scorer.candidates(dict.fromkeys(schedules, generation)):
            self.candidates.setdefault(c.schedule, c)


def fresh_noises(settings: SearchSettings, images: int) -> int:
    """How many fresh noises --confirm_images allows, and at least one. images: of a score."""
    return max(1, (settings.confirm_images or 2 * images) // images)


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
