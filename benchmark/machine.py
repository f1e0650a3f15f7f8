"""What a number was measured on."""

import os
import platform
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    """Processor, cores, GPUs, versions: JSON-friendly."""
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
    }
