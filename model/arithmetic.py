"""Which arithmetic each width's network computes in: as --amp says, or the fastest by measurement.

With `auto` a GPU takes bfloat16. A CPU gains by that where it has bfloat16 units and loses several
times where it has not, so there bfloat16, float32 and float32 with Winograd's convolutions are
timed against each other. A choice changes the last digits of every image, so it is kept in a file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from model import ARITHMETIC, SamplingNetwork
from model.networks import available, latency
from runtime import processes as distributed
from runtime.files import alone_in, read_json, write_json
from runtime.schema import Width

# `auto` is measured on a CPU; here stands what it is on a GPU.
AMP = {"none": "float32", "auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
CPU_CHOICES = ("float32", "winograd", "bfloat16")
BATCH = 8  # images of a measurement on a CPU: more take longer and tell nothing more
ROUNDS = 5

# arithmetic.json: what each width's network computes in.
Arithmetics = dict[Width, Literal[*ARITHMETIC]]


def chosen(
    net: nn.Module,
    widths: Sequence[float],
    amp: str,
    shape: tuple[int, int, int],
    device: torch.device,
    path: Path | None = None,
) -> dict[float, str]:
    """The arithmetic of each width's subnet, the same in every process.

    amp: a key of AMP. path: where `auto` keeps what it picks on a CPU. A file that is there is
    obeyed; by `bf16` too, which until `auto` came was its name.
    """
    if amp not in ("auto", "bf16") or device.type != "cpu":
        return {width: AMP[amp] for width in widths}
    stored = distributed.gather(_read(path))[0]
    if amp == "auto" and not stored.keys() >= set(widths):
        measured = _measure(net, widths, shape, path) if distributed.is_main() else {}
        stored = distributed.gather(measured)[0]
    return {width: stored.get(width, AMP[amp]) for width in widths}


def _read(path: Path | None) -> dict[float, str]:
    """The arithmetic of each width in the file; none where there is no file."""
    if path is None or not path.exists():
        return {}
    return read_json(path, Arithmetics, "delete it")


def _measure(
    net: nn.Module, widths: Sequence[float], shape: tuple[int, int, int], path: Path | None
) -> dict[float, str]:
    """The fastest arithmetic of the widths that the file lacks, added to it, and all others in it.

    One process measures at a time; those that waited for it take what it has found.
    """
    # Not the folder itself: a search is alone in its own for as long as it runs.
    lock = path and path.with_name(f".{path.name}.lock")
    with alone_in(lock) if lock else contextlib.nullcontext():
        stored = _read(path)
        missing = [width for width in widths if width not in stored]
        stored |= {width: _fastest(net, width, shape) for width in missing}
        if path and missing:
            write_json(path, {str(width): name for width, name in stored.items()})
    return stored


def _fastest(net: nn.Module, width: float, shape: tuple[int, int, int]) -> str:
    """The one of CPU_CHOICES in which a pass of the subnet takes least time."""
    cpu = torch.device("cpu")
    names = [name for name in CPU_CHOICES if name != "winograd" or available()]
    networks = {name: SamplingNetwork(net.subnet(width), name) for name in names}
    # Where bfloat16 is emulated it is many times slower, and one image tells that already.
    one = {name: latency(network, shape, 1, cpu, 0.0) for name, network in networks.items()}
    times = {name: math.inf for name in names if one[name] < 3 * min(one.values())}
    # In turns, and the least of all turns: other programs slow some turns down and others not.
    for _ in range(ROUNDS):
        for name in times:
            spent = latency(networks[name], shape, BATCH, cpu, 0.1)
            times[name] = min(times[name], spent)
    return min(times, key=times.get)


def describe(chosen: Mapping[object, str]) -> str:
    """One line."""
    return ", ".join(f"{key:g}: {name}" for key, name in sorted(chosen.items()))
