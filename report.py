"""Tables, pictures and files of results. Knows how they look, not how they came about."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import torch
from msgspec import Meta

from evaluate import Evaluator
from model import average
from runtime import processes
from runtime.errors import UserError
from runtime.files import append_jsonl, read_json, read_jsonl, replacing, write_jsonl, write_text
from runtime.schema import TWO, Amount, Count, Name, Number, Width, Widths, check
from search import Candidate, Search, hypervolume, pareto_front


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _figure(size: tuple[float, float] = (6.4, 4.0)):
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_schedule(
    path: str | Path, timesteps: Sequence[int], widths: Sequence[float], title: str
) -> None:
    """Width over timestep, noise on the left as the sampler sees it."""
    figure, axes = _figure()
    axes.step(timesteps, widths, where="mid", linewidth=1)
    axes.set(xlabel="timestep t (sampling runs from left to right)", ylabel="width", title=title)
    axes.set_ylim(-0.05, 1.05)
    axes.invert_xaxis()
    _save(figure, path)


def plot_front(
    path: str | Path,
    groups: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    line: str | None = None,
    unit: str = "average GFLOPs per step",
    numbers: Sequence[tuple[float, float]] = (),
) -> None:
    """Distance over cost: one kind of mark for each group of (cost, distance) points.

    line: the group whose points are joined. numbers: points that carry their index.
    """
    figure, axes = _figure()
    marks = itertools.cycle("osD^v*PX")
    for (name, points), mark in zip(groups.items(), marks, strict=False):
        if not points:
            continue
        x, y = zip(*sorted(points), strict=True)
        many = len(points) > 50
        axes.plot(
            x,
            y,
            mark,
            linestyle="-" if name == line else "",
            label=name,
            markersize=3 if many else 7,
            alpha=0.4 if many else 0.9,
        )
    for index, point in enumerate(numbers):
        axes.annotate(str(index), point, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=unit, ylabel=label)
    heights = [y for points in groups.values() for _, y in points if y > 0]
    if heights and max(heights) > 8 * min(heights):
        axes.set_yscale("log")  # else the narrowest widths squash all others
    axes.legend()
    _save(figure, path)


def plot_fronts(
    path: str | Path, fronts: Mapping[int, Sequence[tuple[float, float]]], label: str, unit: str
) -> None:
    """The front (cost, distance) after each of some generations, later ones darker."""
    from matplotlib import colormaps

    figure, axes = _figure()
    colours = colormaps["viridis_r"]
    last = max(fronts)
    for generation, points in fronts.items():
        x, y = zip(*sorted(points), strict=True)
        colour = colours(generation / last)
        axes.plot(x, y, "o-", markersize=3, color=colour, label=f"generation {generation}")
    axes.set(xlabel=unit, ylabel=label)
    axes.legend(fontsize="small")
    _save(figure, path)


def labelled_grid(
    path: str | Path, images: torch.Tensor, labels: Sequence[str], title: str, columns: int
) -> None:
    """Images (N, C, H, W) uint8 in rows of `columns`, each with its label, under a title."""
    from torchvision.utils import make_grid

    side, padding = images.shape[-1], 2
    grid = make_grid(images, nrow=columns, padding=padding, pad_value=255).permute(1, 2, 0)
    figure, axes = _figure((8.0, 8.0 * grid.shape[0] / grid.shape[1] + 0.4))
    axes.imshow(grid.numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize="small", wrap=True)
    for index, label in enumerate(labels):
        x, y = index % columns * (side + padding), index // columns * (images.shape[-2] + padding)
        axes.text(x + padding, y + padding, label, va="top", fontsize=6, color="red")
    _save(figure, path)


class Losses(TypedDict):
    """train.jsonl, a line: the mean loss of each width since the line before."""

    step: Count
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
    generation, so it is the same for a search that was killed and started again.
    """

    folder: Path
    generations: list[dict] = field(default_factory=list)
    _writer: object = None
    _reference: tuple[float, float] = (0.0, 0.0)

    def note(self, generation: int, candidates: Sequence[Candidate]) -> None:
        """Record generation number `generation`; candidates: all so far."""
        if generation == 1:
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
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder))
            self._writer.add_scalar("hypervolume", volume, generation)
            self._writer.add_scalar("best_distance", front[0].distance, generation)
            self._writer.flush()


Pair = Annotated[list[Amount], TWO]  # cost and distance


class Point(TypedDict):
    """A scored schedule in front.json, which search.txt would hold."""

    schedule: Widths
    distance: Amount
    distance_error: NotRequired[Amount | None]
    cost: NotRequired[Amount]
    average_gflops: Amount
    saving: Number
    latency_ms: Amount
    generation: NotRequired[Count]


class Front(TypedDict):
    """front.json: the result of a search."""

    label: Name
    encoder: NotRequired[Name]
    images: NotRequired[Count]
    timesteps: Annotated[list[Count], Meta(min_length=1, max_length=2**20)]
    full_width_gflops: Amount
    cost: NotRequired[Literal["flops", "latency"]]
    points: Annotated[list[Point], Meta(min_length=1)]
    chosen_point: NotRequired[Count | None]
    chosen: NotRequired[Point]
    uniform: list[Point]
    scored: NotRequired[list[Pair]]
    candidates: NotRequired[Count]
    passes: NotRequired[Amount]
    passes_saved: NotRequired[Amount]
    rank_correlations: NotRequired[list[dict[Name, object]]]
    generations: NotRequired[list[dict[Name, object]]]


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
        self.calls = len(self.search.genome.evaluations)
        self.label = self.evaluator.encoder.label

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
            sum(r.get("passes", 0) for r in records),
            sum(r.get("passes_saved", 0) for r in records),
        )

    def summary(self) -> str:
        """The chosen point beside the uniform widths, as a table."""
        rows = [("searched", self.chosen)]
        rows += [(f"width {c.schedule.widths[0]:g}", c) for c in self.uniform()]
        run, saved = self.passes()
        lines = [
            table(
                ["schedule", self.label, "GFLOPs / step", "saved", "ms / image"],
                [[name, *_cells(self.point(candidate))] for name, candidate in rows],
            ),
            f"{len(self.search.records)} candidates scored, {run:.4g} network passes run and "
            f"{saved:.4g} ({100 * saved / max(1, run + saved):.1f} %) saved by shared states",
        ]
        lines += [
            f"rank correlation with rung {c['rung']}: {c['rank_correlation']:.3f} "
            f"over {c['candidates']} candidates"
            for c in self.search.correlations
            if c["rank_correlation"] is not None
        ]
        return "\n".join(lines)

    def save(self, folder: Path, search_txt: Path) -> None:
        """search.txt, front.json and the pictures."""
        self.search.genome.stored(self.chosen.schedule).save(search_txt)
        run, saved = self.passes()
        points = [(c.distance, c.cost) for c in self.front]
        chosen = (self.chosen.distance, self.chosen.cost)
        front = {
            "label": self.label,
            "encoder": self.evaluator.encoder.name,
            "images": self.evaluator.num_images,
            "timesteps": self.timesteps,
            "full_width_gflops": self.flops[1.0] / 1e9,
            "cost": "flops" if self.search.costs is self.flops else "latency",
            "points": [self.point(c) for c in self.front],
            # Null where the weighted sum is least off the front, which ties alone allow.
            "chosen_point": points.index(chosen) if chosen in points else None,
            "chosen": self.point(self.chosen),
            "uniform": [self.point(c) for c in self.uniform()],
            "scored": [[c.cost, c.distance] for c in self.candidates],
            "candidates": len(self.search.records),
            "passes": run,
            "passes_saved": saved,
            "rank_correlations": self.search.correlations,
            "generations": list(self.generations),
        }
        write_front(folder, front)
        draw_front(folder, front)
        if not self.generations:
            return  # --search_minutes ended the first one
        every = max(1, len(self.generations) // 6)
        shown = {g["generation"]: g["front"] for g in [*self.generations[::-1][::every]][::-1]}
        plot_fronts(
            folder / "generations.png",
            {n: [(cost / 1e9, d) for cost, d in points] for n, points in shown.items()},
            self.label,
            COST_UNITS[front["cost"]],
        )


COST_UNITS = {
    "flops": "average GFLOPs per step",
    "latency": "average time per step, on the scale of full width's GFLOPs",
}


def _cells(point: Mapping) -> list[str]:
    """Distance, GFLOPs, saving and time of a point of front.json, as a table has them."""
    error = point.get("distance_error")
    return [
        f"{point['distance']:.4g}" + ("" if error is None else f" ± {error:.2g}"),
        f"{point['average_gflops']:.4g}",
        f"{100 * point['saving']:.1f} %",
        f"{point['latency_ms']:.4g}",
    ]


def front_table(front: Mapping, budget: float = 0.0) -> str:
    """The points of a front to pick from; with `budget`, the best at that share of the FLOPs."""
    chosen = front.get("chosen_point")
    rows = [
        [f"{index}{' *' if index == chosen else ''}", *_cells(point)]
        for index, point in enumerate(front["points"])
    ]
    lines = [
        table(["point", front["label"], "GFLOPs / step", "saved", "ms / image"], rows),
        "* is in use; --pick POINT takes another one",
    ]
    if budget:
        limit = budget * front["full_width_gflops"] * (1 + 1e-9)
        within = [i for i, p in enumerate(front["points"]) if p["average_gflops"] <= limit]
        best = min(within, key=lambda i: front["points"][i]["distance"], default=None)
        lines.append(
            f"--flops_budget={budget:g}: "
            + ("no point is as cheap" if best is None else f"point {best} is the best")
        )
    return "\n".join(lines)


def write_front(folder: Path, front: Mapping) -> None:
    """front.json: indented, but each list of numbers, such as a schedule, on one line."""

    def joined(match: re.Match) -> str:
        return "[" + " ".join(match[1].split()) + "]"

    text = re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", joined, json.dumps(front, indent=2))
    write_text(folder / "front.json", text + "\n")


def draw_front(folder: Path, front: Mapping) -> None:
    """front.png, whose points carry their numbers, and schedule.png, from what front.json holds."""

    def marks(points: Sequence[Mapping]) -> list[tuple[float, float]]:
        return [(p.get("cost", p["average_gflops"] * 1e9) / 1e9, p["distance"]) for p in points]

    chosen, points = front["chosen"], front["points"]
    plot_front(
        folder / "front.png",
        {
            "scored": [(cost / 1e9, distance) for cost, distance in front.get("scored", ())],
            "front": marks(points),
            "uniform widths": marks(front["uniform"]),
            "chosen": marks([chosen]),
        },
        front["label"],
        line="front",
        unit=COST_UNITS[front.get("cost", "flops")],
        numbers=marks(points),
    )
    steps, widths = front["timesteps"], chosen["schedule"]
    if len(widths) != len(steps):
        widths = [widths[t] for t in steps]
    plot_schedule(folder / "schedule.png", steps, widths, "chosen schedule")


def pick_point(folder: Path, front: dict, index: int) -> None:
    """Make point `index` the chosen one in front.json and in the pictures."""
    front |= {"chosen_point": index, "chosen": front["points"][index]}
    write_front(folder, front)
    draw_front(folder, front)


def read_front(path: Path) -> dict:
    """front.json of a finished search; UserError for anything else."""
    front = read_json(path)
    known = check(front, Front, path, "is it the front of a finished search?")
    steps = known["timesteps"]
    for place, point in enumerate(known["points"]):
        entries = len(point["schedule"])
        if entries != len(steps) and entries <= max(steps):
            raise UserError(
                f"{path}: points[{place}].schedule has {entries} entries; expected {len(steps)}, "
                f"one for each sampler step, or one for each of at least {max(steps) + 1} timesteps"
            )
    return front
