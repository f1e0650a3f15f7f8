"""How results look: tables, pictures, and front.json, what a search found, as both.

Imports neither torch nor what does, so that to look at a front and pick a point takes no time.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

from runtime.errors import UserError
from runtime.files import read_json, replacing, write_text
from runtime.schema import TWO, Amount, Count, Name, Number, Widths, check


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def new_figure(size: tuple[float, float] = (6.4, 4.0)):
    from matplotlib.figure import Figure  # no pyplot: no global state and no display

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_schedule(
    path: str | Path, timesteps: Sequence[int], widths: Sequence[float], title: str
) -> None:
    """Width over timestep, noise on the left as the sampler sees it."""
    figure, axes = new_figure()
    axes.step(timesteps, widths, where="mid", linewidth=1)
    axes.set(xlabel="timestep t (sampling runs from left to right)", ylabel="width", title=title)
    axes.set_ylim(-0.05, 1.05)
    axes.invert_xaxis()
    save_figure(figure, path)


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
    figure, axes = new_figure()
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
    save_figure(figure, path)


def plot_fronts(
    path: str | Path, fronts: Mapping[int, Sequence[tuple[float, float]]], label: str, unit: str
) -> None:
    """The front (cost, distance) after each of some generations, later ones darker."""
    from matplotlib import colormaps

    figure, axes = new_figure()
    colours = colormaps["viridis_r"]
    last = max(fronts)
    for generation, points in fronts.items():
        x, y = zip(*sorted(points), strict=True)
        colour = colours(generation / last)
        axes.plot(x, y, "o-", markersize=3, color=colour, label=f"generation {generation}")
    axes.set(xlabel=unit, ylabel=label)
    axes.legend(fontsize="small")
    save_figure(figure, path)


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
    sampled: NotRequired[list[Count]]
    uniform: list[Point]
    scored: NotRequired[list[Pair]]
    candidates: NotRequired[Count]
    passes: NotRequired[Amount]
    passes_saved: NotRequired[Amount]
    generations: NotRequired[list[dict[Name, object]]]


COST_UNITS = {
    "flops": "average GFLOPs per step",
    "latency": "average time per step, on the scale of full width's GFLOPs",
}


def cells(point: Mapping) -> list[str]:
    """Distance, GFLOPs, saving and time of a point of front.json, as a table has them."""
    error = point.get("distance_error")
    return [
        f"{point['distance']:.4g}" + ("" if error is None else f" ± {error:.2g}"),
        f"{point['average_gflops']:.4g}",
        f"{100 * point['saving']:.1f} %",
        f"{point['latency_ms']:.4g}",
    ]


def front_table(front: Mapping) -> str:
    """The points of a front to pick from."""
    chosen = front.get("chosen_point")
    rows = [
        [f"{index}{' *' if index == chosen else ''}", *cells(point)]
        for index, point in enumerate(front["points"])
    ]
    header = ["point", front["label"], "GFLOPs / step", "saved", "ms / image"]
    return f"{table(header, rows)}\n* is in use; --pick POINT takes another one"


def best_within(front: Mapping, budget: float) -> int | None:
    """The index of the best point that costs no more than this share of full width."""
    limit = budget * front["full_width_gflops"] * (1 + 1e-9)
    points = front["points"]
    within = [index for index, point in enumerate(points) if giga_cost(point) <= limit]
    return min(within, key=lambda index: points[index]["distance"], default=None)


def giga_cost(point: Mapping) -> float:
    """What a point's step costs: GFLOPs, or time on the scale of full width's GFLOPs."""
    return point.get("cost", point["average_gflops"] * 1e9) / 1e9


def write_front(folder: Path, front: Mapping) -> None:
    """front.json: indented, but each list of numbers, such as a schedule, on one line."""

    def joined(match: re.Match) -> str:
        return "[" + " ".join(match[1].split()) + "]"

    text = re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", joined, json.dumps(front, indent=2))
    write_text(folder / "front.json", text + "\n")


def draw_front(folder: Path, front: Mapping) -> None:
    """front.png, whose points carry their numbers, and schedule.png, from what front.json holds."""

    def marks(points: Sequence[Mapping]) -> list[tuple[float, float]]:
        return [(giga_cost(p), p["distance"]) for p in points]

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
    plot_schedule(
        folder / "schedule.png", front["timesteps"], step_widths(front, chosen), "chosen schedule"
    )


def step_widths(front: Mapping, point: Mapping) -> list[float]:
    """The width of each of the sampler's steps, the last step's first."""
    steps, widths = front["timesteps"], point["schedule"]
    return widths if len(widths) == len(steps) else [widths[t] for t in steps]


def write_page(folder: Path, front: Mapping, command: str) -> None:
    """report.html: the front to choose from, with all that it shows inside.

    command: picks a point, whose number follows it.
    """

    def shown(point: Mapping) -> dict:
        return {
            "distance": point["distance"],
            "error": point.get("distance_error"),
            "cost": giga_cost(point),
            "gflops": point["average_gflops"],
            "saving": point["saving"],
            "milliseconds": point["latency_ms"],
            "widths": step_widths(front, point)[::-1],
        }

    data = {
        "where": str(folder),
        "command": command,
        "label": front["label"],
        "unit": COST_UNITS[front.get("cost", "flops")],
        "images": front.get("images"),
        "chosen": front.get("chosen_point"),
        "points": [*map(shown, front["points"])],
        "uniform": [*map(shown, front["uniform"])],
        "samples": _sheet(folder / "samples.png", front.get("sampled")),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script
    write_text(folder / "report.html", template.replace("__DATA__", text))


def _sheet(path: Path, rows: Sequence[int] | None) -> dict | None:
    """The picture of samples for a page, at most about 800 pixels wide: a row of full width, and
    below it one for each of these points. None where there is none."""
    if rows is None:
        return None
    from PIL import Image

    with contextlib.suppress(OSError), Image.open(path) as image:
        if image.width > 1000:
            image = image.reduce(image.width // 800 + 1)
        file = io.BytesIO()
        image.save(file, "png")
        return {
            "image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
            "width": image.width,
            "height": image.height,
            "rows": rows,
        }
    return None


def pick_point(folder: Path, front: dict, index: int, command: str) -> None:
    """Make point `index` the chosen one in front.json, in the pictures and on the page."""
    front |= {"chosen_point": index, "chosen": front["points"][index]}
    write_front(folder, front)
    draw_front(folder, front)
    write_page(folder, front, command)


def read_front(path: Path) -> dict:
    """front.json of a finished search; UserError for anything else."""
    front = read_json(path)
    known = check(front, Front, path, "is it the front of a finished search?")
    steps = known["timesteps"]
    for place, point in [
        (f"{kind}[{index}]", point)
        for kind in ("points", "uniform")
        for index, point in enumerate(known[kind])
    ]:
        entries = len(point["schedule"])
        if entries != len(steps) and entries <= max(steps):
            raise UserError(
                f"{path}: {place}.schedule has {entries} entries; expected {len(steps)}, "
                f"one for each sampler step, or one for each of at least {max(steps) + 1} timesteps"
            )
    return front
