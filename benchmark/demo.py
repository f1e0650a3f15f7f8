"""The whole job on real images in minutes: train, search, evaluate scikit-learn's digits.

    python -m benchmark.demo [FOLDER]

Runs main.py as a user would. A second run in the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmark.machine import describe, main_py
from benchmark.recipe import CONFIG
from looks import plot_front, plot_schedule, table
from model import WidthSchedule
from runtime.files import read_json, write_json

WIDTHS = (1.0, 0.75, 0.5, 0.25)


def run(folder: Path) -> None:
    """Everything, into `folder`."""
    start = time.perf_counter()
    logdir = f"--logdir={folder}"
    main_py("--train", f"--flagfile={CONFIG / 'digits.txt'}", logdir)
    trained = time.perf_counter() - start

    flagfile = f"--flagfile={folder / 'flagfile.txt'}"
    score = [flagfile, "--batch_size=250", f"--fid_cache={folder / 'statistics.npz'}"]
    main_py("--search", *score, "--num_images=250")
    searched = time.perf_counter() - start - trained

    # Fresh noise, and more images than the search used.
    fresh = [*score, "--num_images=1000"]
    for width in WIDTHS:
        main_py("--eval", *fresh, f"--assigned_width={width:g}")
    main_py("--eval_stepaware", *fresh)
    seconds = {"train": trained, "search": searched}
    report(folder, seconds | {"all": time.perf_counter() - start})


def report(folder: Path, seconds: dict[str, float]) -> None:
    """The table, the plots, and the same numbers as JSON."""
    files = {"full width": "eval"}
    files |= {f"width {w:g}": f"eval_width_{w:g}" for w in WIDTHS if w != 1}
    files["searched schedule"] = "eval_stepaware"
    results = {name: read_json(folder / f"{file}.json") for name, file in files.items()}
    rows, numbers = [], {}
    for name, result in results.items():
        numbers[name] = {
            "distance": result["distance"],
            "average_gflops": result["average_gflops"],
            "saving": result["saving"],
            "ms_per_image": 1000 / result["images_per_second"],
        }
        n = numbers[name]
        rows.append(
            [
                name,
                f"{n['distance']:.4f}",
                f"{n['average_gflops']:.4f}",
                f"{100 * n['saving']:.1f} %",
                f"{n['ms_per_image']:.2f}",
            ]
        )
    first = results["full width"]
    schedule = WidthSchedule(results["searched schedule"]["schedule"])
    steps = read_json(folder / "search" / "front.json")["timesteps"]
    plot_schedule(
        folder / "schedule.png", steps, [schedule[t] for t in steps], "the searched schedule"
    )
    points = {name: [(n["average_gflops"], n["distance"])] for name, n in numbers.items()}
    plot_front(folder / "distance_over_gflops.png", points, first["label"])
    write_json(
        folder / "demo.json",
        {
            "label": first["label"],
            "images": first["images"],
            "sampler": first["sampler"],
            "results": numbers,
            "seconds": seconds,
            "machine": describe(),
        },
    )
    header = ["", first["label"], "GFLOPs / step", "saved", "ms / image"]
    print()
    print(table(header, rows))
    print(
        f"\n{first['images']} images each, {len(steps)} steps; lower distances are better. "
        f"Took {seconds['all']:.0f} s.\n"
        f"Full width: {folder / 'eval.png'}; searched: {folder / 'eval_stepaware.png'}; plots: "
        f"{folder / 'schedule.png'}, {folder / 'distance_over_gflops.png'}; numbers: "
        f"{folder / 'demo.json'}"
    )


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
