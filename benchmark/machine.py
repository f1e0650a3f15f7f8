"""Times, and the JSON of a result with what it was measured on.

A result of sampling.py, training.py and scaling.py is {"measured": […], "machine": …}, where each
record says what was done and has the seconds of every repeat.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch

from model import keep_freed
from runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "benchmark"


def describe() -> dict[str, object]:
    """Processor, cores, GPUs, versions, the checkout's commit: JSON-friendly."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [li.split(":", 1)[1].strip() for li in info.read_text().splitlines()
                  if li.startswith("model name")]  # fmt: skip
        processor = models[0] if models else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, with + where files differ from it; "" outside git."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def arguments(about: str, name: str) -> argparse.ArgumentParser:
    """What the benchmarks of speed have in common; `name` is the result's."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def in_turns(works: Mapping[Hashable, Callable[[], object]], repeats: int) -> dict[Hashable, list]:
    """Seconds of every repeat of each, in turns, so that a busy moment meets all alike. A first
    call of each, which allocates and compiles, does not count.

    What is called published has the C library's usual heap, everything else the one of main.py.
    """
    times: dict[Hashable, list[float]] = {key: [] for key in works}
    for turn in range(repeats + 1):
        for key, work in works.items():
            keep_freed("published" not in str(key))
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[key].append(time.perf_counter() - start)
    return times


def spread(seconds: Sequence[float], images: int) -> str:
    """Milliseconds per image: the median, and from the least to the most."""
    times = sorted(1000 * s / images for s in seconds)
    return f"{statistics.median(times):.4g} ({times[0]:.4g}–{times[-1]:.4g})"


def gain(before: Sequence[float], after: Sequence[float]) -> str:
    """How many times as fast."""
    return f"{statistics.median(before) / statistics.median(after):.2f}×"


def main_py(*arguments: object) -> None:
    """Run main.py with these flags, said first, and stop where it stops."""
    print("\n$ python main.py", *arguments, flush=True)
    code = subprocess.run([sys.executable, ROOT / "main.py", *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


def save(path: str | Path, result: Mapping[str, object]) -> None:
    """Write a result, and what it was measured on, as JSON."""
    write_json(path, {**result, "machine": describe()})
    print(f"saved {path}")
