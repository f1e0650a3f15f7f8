"""Times, and the JSON of a result with what it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

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


def save(path: str | Path, result: Mapping[str, object]) -> None:
    """Write a result, and what it was measured on, as JSON."""
    write_json(path, {**result, "machine": describe()})
    print(f"saved {path}")
