"""A search's log: what its distances depend on, then a line of JSON per scored candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from model import WidthSchedule
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import append_jsonl, read_jsonl, write_jsonl
from runtime.identity import agree
from runtime.schema import Amount, Count, Name, Widths, check
from search.genome import Genome
from settings import OPTIONS


class Header(TypedDict):
    """search.jsonl, the first line: what the distances depend on."""

    evaluation: dict[Name, object]


class Scored(TypedDict):
    """search.jsonl, every other line: a scored candidate.

    A score on another noise than the search's own has that noise's name as its rung, and one that
    has no distance says why it is unusable. Earlier versions also scored on fewer images or steps.
    """

    schedule: Widths
    distance: Amount
    cost: NotRequired[Amount]
    rung: NotRequired[Name]
    generation: NotRequired[Count]
    label: NotRequired[Name]
    passes: NotRequired[Amount]
    passes_saved: NotRequired[Amount]
    seconds: NotRequired[Amount]  # noted by benchmark.search
    unusable: NotRequired[str]


@dataclass
class SearchLog:
    """The file in which every scored candidate is a line at once; the main process writes it.

    identity: what a distance depends on; a log made under another one is refused. records:
    (rung, widths) -> the line of each candidate; rung: "" for the search's own noise.
    """

    path: Path
    identity: Mapping[str, object]
    records: dict[tuple[str, tuple[float, ...]], dict] = field(default_factory=dict, init=False)

    def read(self) -> None:
        """Take over the candidates of an earlier run of this search, killed or finished."""
        lines = distributed.gather(read_jsonl(self.path) if distributed.is_main() else None)[0]
        if not lines:
            if distributed.is_main():
                write_jsonl(self.path, [{"evaluation": dict(self.identity)}])
            return
        candidates = candidates_of(lines, self.path)
        stored = lines[0]["evaluation"]
        late = {"weights", "encoder_weights", "arithmetic", "statistics"}
        late |= {name for name, option in OPTIONS.items() if option.stored in ("network", "model")}
        agree(
            self.path,
            stored,
            self.identity,
            "use the same to continue the search, or another --search_dir",
            # Where the statistics are known, their file may have another name.
            ignore=["fid_cache"] if "statistics" in stored else [],
            # What logs of earlier versions lack is passed over. They did not say a guidance of 1.
            defaults={name: None for name in self.identity if name not in late}
            | {"guidance_scale": 1.0},
        )
        if distributed.is_main():
            write_jsonl(self.path, lines)  # without the unfinished line of a killed writer
        for record in candidates:
            self.records[record.get("rung", ""), record["schedule"]] = record

    def add(self, record: dict) -> None:
        """Store a candidate; it is on the disk when this returns."""
        if distributed.is_main():
            append_jsonl(self.path, record)
        self.records[record["rung"], tuple(record["schedule"])] = record


def candidates_of(records: Sequence[object], path: str | Path) -> list[Scored]:
    """The candidates in a search log's records; UserError where these are no search log."""
    check(records[0], Header, f"{path}, line 1")
    lines = enumerate(records[1:], 2)
    return [check(record, Scored, f"{path}, line {number}") for number, record in lines]


def warm_start(path: str | Path, genome: Genome, count: int) -> list[WidthSchedule]:
    """Up to `count` schedules of another search's log, best fronts first, for a first population.

    A schedule of another length is stretched or shrunk to this genome's steps.
    """
    records = read_jsonl(path)
    if not records:
        raise UserError(f"--search_warm_start={path}: there is no search log with candidates")
    scores = {}
    for record in candidates_of(records, path):
        # The score on the search's own noise, where there is one, replaces others.
        if record["schedule"] not in scores or not record.get("rung"):
            scores[record["schedule"]] = (record["distance"], record.get("cost", 0.0))
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
