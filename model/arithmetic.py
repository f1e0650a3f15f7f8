"""Which arithmetic each width's network computes in: as --amp says, or the fastest by measurement.

With `auto` a GPU takes bfloat16. A CPU gains by that where it has bfloat16 units and loses several
times where it has not, so there bfloat16, float32 and float32 with Winograd's convolutions are
timed against each other. Where bfloat16 is the fastest, and the run long enough for compiling to
pay, it is also timed compiled. A choice changes the last digits of every image, so it is kept in a
file.
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
from model.compiling import compiler
from model.networks import available, latency
from runtime import processes as distributed
from runtime.files import alone_in, read_json, write_json
from runtime.schema import Width

# `auto` is measured on a CPU; here stands what it is on a GPU.
AMP = {"none": "float32", "auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
CPU_CHOICES = ("float32", "winograd", "bfloat16")
BATCH = 8  # images of a measurement on a CPU: more take longer and tell nothing more
ROUNDS = 5
# Compiling a network for one width takes so many seconds and saves that share of a pass, as
# measured on a processor with AMX: whether it is tried goes by them, whether it is taken by a
# measurement.
COMPILING, SAVED = 60.0, 0.2

# arithmetic.json: what each width's network computes in.
Arithmetics = dict[Width, Literal[*ARITHMETIC]]


def chosen(
    net: nn.Module,
    widths: Sequence[float],
    amp: str,
    shape: tuple[int, int, int],
    device: torch.device,
    path: Path | None = None,
    passes: float = 0,
    batch: int = BATCH,
) -> dict[float, str]:
    """The arithmetic of each width's subnet, the same in every process.

    amp: a key of AMP. path: where `auto` keeps what it picks on a CPU. A file that is there is
    obeyed; by `bf16` too, which until `auto` came was its name. passes: of one image at each width,
    that the run will make about; batch: of how many images each.
    """
    if amp not in ("auto", "bf16") or device.type != "cpu":
        return {width: AMP[amp] for width in widths}
    stored = distributed.gather(_read(path))[0]
    if amp == "auto" and not stored.keys() >= set(widths):
        given = net, widths, shape, path, passes, batch
        measured = _measure(*given) if distributed.is_main() else {}
        stored = distributed.gather(measured)[0]
    return {width: stored.get(width, AMP[amp]) for width in widths}


def _read(path: Path | None) -> dict[float, str]:
    """The arithmetic of each width in the file; none where there is no file."""
    if path is None or not path.exists():
        return {}
    return read_json(path, Arithmetics, "delete it")


def _measure(
    net: nn.Module,
    widths: Sequence[float],
    shape: tuple[int, int, int],
    path: Path | None,
    passes: float,
    batch: int,
) -> dict[float, str]:
    """The fastest arithmetic of the widths that the file lacks, added to it, and all others in it.

    One process measures at a time; those that waited for it take what it has found.
    """
    # Not the folder itself: a search is alone in its own for as long as it runs.
    lock = path and path.with_name(f".{path.name}.lock")
    with alone_in(lock) if lock else contextlib.nullcontext():
        stored = _read(path)
        missing = [width for width in widths if width not in stored]
        stored |= {width: _fastest(net, width, shape, passes, batch) for width in missing}
        if path and missing:
            write_json(path, {str(width): name for width, name in stored.items()})
    return stored


def _fastest(
    net: nn.Module, width: float, shape: tuple[int, int, int], passes: float, batch: int
) -> str:
    """The one of CPU_CHOICES in which a pass of the subnet takes least time, or that compiled."""
    cpu = torch.device("cpu")
    names = [name for name in CPU_CHOICES if name != "winograd" or available()]
    networks = {name: SamplingNetwork(net.subnet(width), name) for name in names}
    # Where bfloat16 is emulated it is many times slower, and one image tells that already.
    one = {name: latency(network, shape, 1, cpu, 0.0) for name, network in networks.items()}
    near = [name for name in names if one[name] < 3 * min(one.values())]

    def quickest(names: Sequence[str], size: int) -> tuple[str, float]:
        # In turns, and the least of all turns: other programs slow some turns down, others not.
        times = dict.fromkeys(names, math.inf)
        for _ in range(ROUNDS):
            for name in names:
                spent = latency(networks[name], shape, size, cpu, 0.1)
                times[name] = min(times[name], spent)
        return min(times.items(), key=lambda item: item[1])

    fastest, seconds = quickest(near, BATCH)
    if fastest == "bfloat16" and compiler() and passes * seconds * SAVED > COMPILING:
        name = "bfloat16_compiled"
        networks[name] = SamplingNetwork(net.subnet(width), name)
        fastest, _ = quickest([fastest, name], batch)  # it is compiled for that size
    return fastest


def describe(chosen: Mapping[object, str]) -> str:
    """One line."""
    return ", ".join(f"{key:g}: {name}" for key, name in sorted(chosen.items()))
