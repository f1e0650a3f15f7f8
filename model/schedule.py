"""Width schedules: which width each timestep has, their files, and what a schedule costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from runtime.errors import UserError
from runtime.files import parse_json, read_text, write_text
from runtime.schema import Widths, check, digest, widths_line


class WidthSchedule:
    """The width of each timestep: `schedule[t]`.

    `widths` has one entry a timestep, entry 0 for t = 0 (the last, least noisy step). With
    `timesteps`, it has one entry for each of those instead, entry 0 for the smallest; any other
    t, also a fractional one, has the width of the nearest. Such an entry is for a sampler's step:
    where the step calls the network twice, as Heun's does, it is for both calls (`entry_for_call`).
    """

    def __init__(self, widths: Iterable[float], timesteps: Sequence[int] | None = None) -> None:
        self.widths = tuple(widths)
        self.timesteps = None if timesteps is None else tuple(sorted(timesteps))
        keys = range(len(self.widths)) if timesteps is None else self.timesteps
        self._at = dict(zip(keys, self.widths, strict=True))

    def __getitem__(self, t: float) -> float:
        if t in self._at:
            return self._at[t]
        return self._at[min(self._at, key=lambda known: abs(known - t))]

    def expanded(self, T: int) -> WidthSchedule:
        """The same schedule with an entry for each of T timesteps."""
        return WidthSchedule([self[t] for t in range(T)])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that another width would change."""
        return digest(widths_line(self.widths))

    def __len__(self) -> int:
        return len(self.widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WidthSchedule) and self._at == other._at

    def __hash__(self) -> int:
        return hash(tuple(self._at.items()))

    @classmethod
    def load(
        cls,
        path: str | Path,
        T: int,
        candidates: Sequence[float],
        timesteps: Sequence[int] | None = None,
    ) -> WidthSchedule:
        """Read a JSON list of T widths, or of one width for each of a sampler's `timesteps`.

        Raises UserError for a file that is no JSON list of numbers, another length, or a width
        that is not among `candidates`. Nothing in the file is executed.
        """
        try:
            text = read_text(path)
        except FileNotFoundError as error:
            raise UserError(
                f"no width schedule at {path}; run --search first, or name one with --schedule"
            ) from error
        remedy = "a width schedule is one list, [1, 0.75, …]"
        widths = check(parse_json(text, path), Widths, path, remedy)
        # Steps that a sampler was asked for can meet: the file may name them all, or each once.
        lengths = {T} if timesteps is None else {T, len(timesteps), len(set(timesteps))}
        if len(widths) not in lengths:
            raise UserError(
                f"{path} has {len(widths)} entries; expected "
                + " (every timestep) or ".join(str(n) for n in sorted(lengths, reverse=True))
                + (" (one for each sampler step)" if len(lengths) > 1 else " (every timestep)")
            )
        for i, width in enumerate(widths):
            if width not in candidates:
                names = ", ".join(f"{c:g}" for c in candidates)
                raise UserError(
                    f"{path}: entry {i} is width {width:g}, which is no candidate ({names}); "
                    "see --candidate_width and --min_width"
                )
        if len(widths) == T:
            return cls(widths)
        if len(widths) != len(timesteps):
            return cls(widths, set(timesteps))
        schedule = cls(widths, timesteps)
        for t, width in zip(schedule.timesteps, widths, strict=True):
            if width != schedule[t]:
                raise UserError(
                    f"{path} has widths {width:g} and {schedule[t]:g} for timestep {t}, where "
                    "steps of the sampler meet; give both the same width, or each timestep one "
                    "entry"
                )
        return schedule

    def save(self, path: str | Path) -> None:
        """Write the schedule as one JSON line, whole or not at all."""
        write_text(path, widths_line(self.widths))


def entry_for_call(schedule: WidthSchedule | Sequence[Hashable], step: int, t: int) -> int:
    """The timestep whose entry is the width of a call at t, in the step that begins at `step`."""
    return step if getattr(schedule, "timesteps", None) is not None else t


def entries_for_calls(
    schedule: WidthSchedule | Sequence[Hashable], calls: Iterable[tuple[int, int]]
) -> list[int]:
    """`entry_for_call` of each of a sampler's `calls`, pairs of (step, t)."""
    return [entry_for_call(schedule, step, t) for step, t in calls]


def average(
    schedule: WidthSchedule, timesteps: Iterable[int], cost: Mapping[float, float]
) -> float:
    """The mean over `timesteps` of what each one's width costs."""
    return math.fsum(costs := [cost[schedule[t]] for t in timesteps]) / len(costs)
