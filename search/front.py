"""Scored schedules, the Pareto front of distance and cost, and how good a front is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from model import WidthSchedule

UNUSABLE = 1e30  # stands for the distance of a candidate that has none


@dataclass(frozen=True)
class Candidate:
    """A scored schedule.

    cost: mean FLOPs per step, or in the unit of the search's cost table. error: the standard error
    of `distance`, where it was measured.
    """

    schedule: WidthSchedule
    distance: float
    cost: float
    generation: int
    record: Mapping[str, object]
    error: float | None = None


def usable(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that have a distance."""
    return [c for c in candidates if c.distance < UNUSABLE]


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that none beats in both distance and cost, the most expensive first."""
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
