"""The search space: a candidate as integers, one gene for a run of sampler steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model import WidthSchedule, entries_for_calls
from runtime.errors import UserError


@dataclass(frozen=True)
class Genome:
    """A candidate as integers: one index into `widths` per gene.

    widths: rising; 0 skips the step. timesteps: the sampler's, rising. segments:
    number of genes, each for a run of neighbouring timesteps; 0 for a gene per timestep. T: for
    schedules that cover every timestep of the diffusion rather than the sampler's alone.
    calls: (step, timestep shown) of each call of the network, by default one per step.
    """

    widths: tuple[float, ...]
    timesteps: tuple[int, ...]
    T: int
    segments: int = 0
    calls: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.calls:
            object.__setattr__(self, "calls", tuple((t, t) for t in self.timesteps))
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
        """(genes,) indices -> the schedule, one entry per sampler step."""
        steps, total = len(self.timesteps), self.genes
        widths = [self.widths[genes[i * total // steps]] for i in range(steps)]
        return WidthSchedule(widths, None if steps == self.T else self.timesteps)

    def entries_for_calls(self, schedule: WidthSchedule) -> list[int]:
        """The timestep whose entry is the width of each call of the network."""
        return entries_for_calls(schedule, self.calls)

    def stored(self, schedule: WidthSchedule) -> WidthSchedule:
        """The schedule as files hold it: an entry per timestep, unless a step also calls the
        network at another timestep, whose entry would be a wrong width for that call."""
        if all(step == t for step, t in self.calls):
            return schedule.expanded(self.T)
        return schedule

    def encode(self, schedule: WidthSchedule) -> np.ndarray:
        """The genes whose schedule is nearest to `schedule`: a segment takes its first entry."""
        steps, total = len(self.timesteps), self.genes
        first = [-(-gene * steps // total) for gene in range(total)]
        widths = [schedule[self.timesteps[i]] for i in first]
        distance = np.abs(np.array(widths)[:, None] - np.array(self.widths)[None])
        return distance.argmin(1)

    def keep_one_step(self, rows: np.ndarray) -> np.ndarray:
        """Rows (…, genes) of which one that skips every step gets its last step back, at full
        width."""
        rows = rows.copy()
        skipped = (np.array(self.widths)[rows] == 0).all(-1)
        rows[..., 0] = np.where(skipped, len(self.widths) - 1, rows[..., 0])
        return rows

    def uniform(self) -> list[np.ndarray]:
        """Each width at every step, the largest first; skipping every step is not one of them."""
        return [
            np.full(self.genes, i) for i in reversed(range(len(self.widths))) if self.widths[i] > 0
        ]
