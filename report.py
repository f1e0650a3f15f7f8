"""Tables and pictures of results. Knows matplotlib and nothing of how results came about."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from files import replacing


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
    unit: str = "average GFLOPs a step",
) -> None:
    """Distance over cost: one kind of mark for each group of (cost, distance) points.

    line: the group whose points are joined.
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
    axes.set(xlabel=unit, ylabel=label)
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
