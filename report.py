"""Tables, pictures and files of results. Knows how they look, not how they came about."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch

from evaluate import Evaluator
from looks import (
    COST_UNITS,
    cells,
    draw_front,
    new_figure,
    plot_fronts,
    save_figure,
    table,
    write_front,
)  # fmt: skip
from model import WidthSchedule, average
from runtime import processes
from runtime.files import append_jsonl, read_image, read_jsonl, write_jsonl
from runtime.schema import Amount, Count, Name, Width
from search import Candidate, Search, hypervolume, pareto_front


def labelled_grid(
    path: str | Path, images: torch.Tensor, labels: Sequence[str], title: str, columns: int
) -> None:
    """Images (N, C, H, W) uint8 in rows of `columns`, each with its label, under a title."""
    from torchvision.utils import make_grid

    side, padding = images.shape[-1], 2
    grid = make_grid(images, nrow=columns, padding=padding, pad_value=255).permute(1, 2, 0)
    figure, axes = new_figure((8.0, 8.0 * grid.shape[0] / grid.shape[1] + 0.4))
    axes.imshow(grid.numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize="small", wrap=True)
    for index, label in enumerate(labels):
        x, y = index % columns * (side + padding), index // columns * (images.shape[-2] + padding)
        axes.text(x + padding, y + padding, label, va="top", fontsize=6, color="red")
    save_figure(figure, path)


class Losses(TypedDict):
    """train.jsonl, a line: the mean loss of each width since the line before, or what changed."""

    step: Count
    changed: NotRequired[dict[Name, object]]
    loss: NotRequired[dict[Name, float]]
    grad_norm: NotRequired[float]
    lr: NotRequired[Amount]
    images_per_second: NotRequired[Amount]


class StepScores(TypedDict):
    """train_eval.jsonl, a line: the scores of one width during training."""

    step: Count
    width: Width
    scores: NotRequired[dict[Name, float | None]]


class TrainingLog:
    """train.jsonl, train_eval.jsonl and TensorBoard of a run, written by the main process alone.

    step: where the run goes on from, None for a new one. What a killed run logged after its last
    checkpoint happens again, so it is forgotten.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step
        self._writer = None

    def __enter__(self) -> TrainingLog:
        if processes.is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            logs = {"train.jsonl": Losses, "train_eval.jsonl": StepScores}
            for name, schema in logs.items() if self.step is not None else ():
                read_jsonl(self.folder / name, schema)  # refused before anything is changed
            for name in logs:
                log = self.folder / name
                records = read_jsonl(log) if self.step is not None else []
                if log.exists() or name == "train.jsonl":
                    write_jsonl(log, [r for r in records if r["step"] <= self.step])
            purge = None if self.step is None else self.step + 1
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.close()

    def losses(self, record: Mapping[str, object]) -> None:
        """What Trainer.log gets."""
        if not self._writer:
            return
        append_jsonl(self.folder / "train.jsonl", record)
        for width, value in record["loss"].items():
            self._writer.add_scalar(f"loss/width_{width}", value, record["step"])
        for name in ("grad_norm", "lr", "images_per_second"):
            self._writer.add_scalar(name, record[name], record["step"])

    def changes(self, step: int, changed: Mapping[str, Sequence]) -> None:
        """What --allow_changes let change at `step`: name -> (before, now)."""
        if self._writer and changed:
            append_jsonl(self.folder / "train.jsonl", {"step": step, "changed": changed})

    def scores(self, step: int, name: str, width: float, scores: Mapping[str, object]) -> None:
        """Scores at one step, of one width or of a schedule's mean width, which `name` names."""
        if not self._writer:
            return
        record = {"step": step, "width": width, "scores": scores}
        append_jsonl(self.folder / "train_eval.jsonl", record)
        for score, value in scores.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{score}/{name}", value, step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        if self._writer:
            self._writer.add_image(name, image, step)


@dataclass
class SearchProgress:
    """The front after each generation, written to TensorBoard at once.

    The hypervolume's reference point is 1.1 times the largest distance and cost of the first
    generation that has any, so it is the same for a search that was killed and started again.
    """

    folder: Path
    generations: list[dict] = field(default_factory=list)
    _reference: tuple[float, float] = (0.0, 0.0)

    def note(self, generation: int, candidates: Sequence[Candidate]) -> None:
        """Record generation number `generation`; candidates: all so far."""
        if not self.generations:
            worst = (max(c.distance for c in candidates), max(c.cost for c in candidates))
            self._reference = (1.1 * worst[0], 1.1 * worst[1])
        front = pareto_front(candidates)
        volume = hypervolume(front, self._reference) / (self._reference[0] * self._reference[1])
        self.generations.append(
            {
                "generation": generation,
                "candidates": len(candidates),
                "hypervolume": volume,
                "front": [[c.cost, c.distance] for c in front],
            }
        )
        if processes.is_main():
            self._writer.add_scalar("hypervolume", volume, generation)
            self._writer.add_scalar("best_distance", front[0].distance, generation)
            self._writer.flush()

    def pictures(self) -> None:
        """Show TensorBoard the result's pictures, of which samples may be missing."""
        for name in ("front", "schedule", "samples"):
            path = self.folder / f"{name}.png"
            if path.exists():
                self._writer.add_image(name, read_image(path)[:3], len(self.generations))
        self._writer.flush()

    @functools.cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return SummaryWriter(str(self.folder))


@dataclass
class SearchResult:
    """The result of a search, and the files that show it.

    calls: of the network, for one image.
    flops, times: FLOPs and seconds per image of one pass at each width.
    """

    search: Search
    candidates: Sequence[Candidate]
    flops: Mapping[float, float]
    times: Mapping[float, float]
    evaluator: Evaluator
    generations: Sequence[dict]

    def __post_init__(self) -> None:
        self.front = pareto_front(self.candidates)
        self.chosen = self.search.best(self.candidates)
        self.timesteps = list(self.search.genome.timesteps)
        self.calls = len(self.search.genome.calls)
        self.label = self.evaluator.encoder.label
        points = [(c.distance, c.cost) for c in self.front]
        chosen = (self.chosen.distance, self.chosen.cost)
        # None where the weighted sum is least off the front, which ties alone allow.
        self.chosen_point = points.index(chosen) if chosen in points else None
        spread = np.linspace(0, len(points) - 1, min(9, len(points))).round()
        self.sampled = sorted({*map(int, spread)} | {self.chosen_point or 0})

    def point(self, candidate: Candidate) -> dict:
        """A candidate as front.json has it; its schedule is what search.txt would hold."""
        genome = self.search.genome
        entries = genome.entries_for_calls(candidate.schedule)
        gflops = average(candidate.schedule, entries, self.flops) / 1e9
        return {
            "distance": candidate.distance,
            "distance_error": candidate.error,
            "cost": candidate.cost,
            "average_gflops": gflops,
            "saving": 1 - gflops * 1e9 / self.flops[1.0],
            "latency_ms": 1000 * self.calls * average(candidate.schedule, entries, self.times),
            "generation": candidate.generation,
            "schedule": list(genome.stored(candidate.schedule).widths),
        }

    def uniform(self) -> list[Candidate]:
        """The candidates that have one width at every step."""
        return [c for c in self.candidates if len(set(c.schedule.widths)) == 1]

    def passes(self) -> tuple[int, int]:
        """Network passes that were run, and those that shared states saved."""
        records = self.search.records.values()
        return (
            int(sum(r.get("passes", 0) for r in records)),  # a log that is read has floats
            int(sum(r.get("passes_saved", 0) for r in records)),
        )

    def summary(self) -> str:
        """The chosen point beside the uniform widths, as a table."""
        rows = [("searched", self.chosen)]
        rows += [(f"width {c.schedule.widths[0]:g}", c) for c in self.uniform()]
        run, saved = self.passes()
        shown = table(
            ["schedule", self.label, "GFLOPs / step", "saved", "ms / image"],
            [[name, *cells(self.point(candidate))] for name, candidate in rows],
        )
        return (
            f"{shown}\n{len(self.search.records)} candidates scored, {run:.4g} network passes run "
            f"and {saved:.4g} ({100 * saved / max(1, run + saved):.1f} %) saved by shared states"
        )

    @property
    def stored(self) -> WidthSchedule:
        """The chosen schedule as search.txt has it."""
        return self.search.genome.stored(self.chosen.schedule)

    def save(self, folder: Path, search_txt: Path) -> dict:
        """search.txt, front.json, which is returned, and its pictures but for the samples."""
        self.stored.save(search_txt)
        run, saved = self.passes()
        (folder / "samples.png").unlink(missing_ok=True)  # they are another front's
        front = {
            "label": self.label,
            "encoder": self.evaluator.encoder.name,
            "images": self.evaluator.num_images,
            "timesteps": self.timesteps,
            "full_width_gflops": self.flops[1.0] / 1e9,
            "cost": self.search.settings.cost,
            "points": [self.point(c) for c in self.front],
            "chosen_point": self.chosen_point,
            "chosen": self.point(self.chosen),
            "sampled": self.sampled,
            "uniform": [self.point(c) for c in self.uniform()],
            "scored": [[c.cost, c.distance] for c in self.candidates],
            "candidates": len(self.search.records),
            "passes": run,
            "passes_saved": saved,
            "generations": list(self.generations),
        }
        write_front(folder, front)
        draw_front(folder, front)
        if not self.generations:
            return front  # --search_minutes ended the first one
        every = max(1, len(self.generations) // 6)
        shown = {g["generation"]: g["front"] for g in [*self.generations[::-1][::every]][::-1]}
        plot_fronts(
            folder / "generations.png",
            {n: [(cost / 1e9, d) for cost, d in points] for n, points in shown.items()},
            self.label,
            COST_UNITS[front["cost"]],
        )
        return front
