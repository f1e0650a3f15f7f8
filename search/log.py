"""Search logs: one line of JSON per scored candidate, after a line of what distances depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from model import WidthSchedule
from runtime.errors import UserError
from runtime.files import read_jsonl
from search.genome import Genome


def schedules_of(records: Sequence[object], path: Path) -> Iterator[tuple[tuple[float, ...], dict]]:
    """(widths, record) of each candidate in a search log's records."""
    for number, record in enumerate(records[1:], 2):
        try:
            widths = tuple(float(w) for w in record["schedule"])
            if not math.isfinite(record["distance"]):
                raise ValueError("distance is not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number} is not a scored candidate ({error})") from error
        yield widths, record


def warm_start(path: str | Path, genome: Genome, count: int) -> list[WidthSchedule]:
    """Up to `count` schedules of another search's log, best fronts first, for a first population.

    A schedule of another length is stretched or shrunk to this genome's steps.
    """
    records = read_jsonl(path)
    if not records:
        raise UserError(f"--search_warm_start={path}: is not a search log")
    scores = {}
    for widths, record in schedules_of(records, Path(path)):
        # The full setting's score, where there is one, replaces a lower rung's.
        if widths not in scores or not record.get("rung"):
            scores[widths] = (record["distance"], float(record.get("cost", 0)))
    if not scores:
        raise UserError(f"--search_warm_start={path}: the log has no candidate yet")
    keys = list(scores)
    order = [
        i for front in NonDominatedSorting().do(np.array(list(scores.values()))) for i in front
    ]
    steps = genome.timesteps
    schedules = []
    for i in order[:count]:
        widths = keys[i]
        spread = [widths[j * len(widths) // len(steps)] for j in range(len(steps))]
        schedules.append(WidthSchedule(spread, steps))
    return schedules
