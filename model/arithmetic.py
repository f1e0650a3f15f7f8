"""Which arithmetic is fastest here: measured, per width, where that is not plain.

With reduced precision allowed, a GPU always gains by it. A CPU gains where it has bfloat16 units
and loses several times where it has not, so there bfloat16, float32 and float32 with Winograd's
convolutions are timed against each other. A choice changes the last digits of every image; whoever
wants to go on with a run keeps the run's choice (see `chosen`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from model import ARITHMETIC, SamplingNetwork
from model.networks import available, latency
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import read_json, write_json

AMP = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}
CPU_CHOICES = ("float32", "winograd", "bfloat16")
BATCH = 8  # images of a measurement on a CPU: more take longer and tell nothing more
ROUNDS = 5


def chosen(
    net: nn.Module,
    widths: Sequence[float],
    amp: str,
    shape: tuple[int, int, int],
    device: torch.device,
    path: Path | None = None,
) -> dict[float, str]:
    """The arithmetic of each width's subnet, the same in every process.

    amp: what is allowed, a key of AMP. path: file of a run that has chosen, or will have.
    """
    if amp != "bf16" or device.type != "cpu":
        return {width: AMP[amp] for width in widths}
    known = _read(path) if path and path.exists() else {}
    known = distributed.gather(known)[0]
    missing = [width for width in widths if width not in known]
    if missing:
        found = {w: _fastest(net, w, shape) for w in missing} if distributed.is_main() else {}
        known = known | distributed.gather(found)[0]
        if path and distributed.is_main():
            write_json(path, {str(w): known[w] for w in known})
    return {width: known[width] for width in widths}


def _read(path: Path) -> dict[float, str]:
    try:
        known = {float(w): str(name) for w, name in read_json(path).items()}
        if not set(known.values()) <= set(ARITHMETIC):
            raise ValueError(f"one of {', '.join(ARITHMETIC)} expected")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of arithmetics ({error}); delete it") from error
    return known


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


def chosen_for_training(
    net: nn.Module, amp: str, shape: tuple[int, int, int], device: torch.device
) -> str:
    """What training steps run in, the same in every process: on a CPU, the one of CPU_CHOICES in
    which a forward pass at full width takes least time."""
    return chosen(net, [1.0], amp, shape, device)[1.0]
