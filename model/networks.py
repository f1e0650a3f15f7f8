"""Networks ready to sample with: dense, in an arithmetic, compiled or not; and ready to train."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.compiling import compile_network
from runtime.errors import UserError

try:
    from model.cpu import available, fast_dropout, fuse, keep_freed
except ImportError:  # that folder may be missing

    def available() -> bool:
        """Whether Winograd's convolutions can be had here."""
        return False

    def fuse(network: nn.Module) -> None:
        """What Winograd's arithmetic needs."""
        raise UserError(
            "the arithmetic `winograd` needs the folder model/cpu, which is not there: put it "
            "back, or name another arithmetic with --amp"
        )

    def fast_dropout(network: nn.Module) -> None:
        """Torch's own stays."""

    def keep_freed(enabled: bool = True) -> None:
        """The C library's own way stays."""


class Supernet(Protocol):
    """What can be cut to a width."""

    def subnet(self, width: float) -> nn.Module: ...


# What a network computes in. Winograd is float32 with fewer multiplications, on a CPU; a network is
# compiled with any arithmetic but that.
ARITHMETIC = {
    "float32": torch.float32,
    "winograd": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _fuse(network: nn.Module, arithmetic: str, compiled: bool) -> None:
    """Put in the loops of model/cpu: with Winograd all, with bfloat16 on a CPU those of the norms,
    at each of which a compiled graph would end."""
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    norms = arithmetic == "bfloat16" and on_cpu and not compiled and available()
    if arithmetic == "winograd" or norms:
        fuse(network)


class SamplingNetwork(nn.Module):
    """A dense network ready for sampling: channels last, float32 in and out.

    arithmetic: a key of ARITHMETIC; weights are cast once, here. compiled: by torch.compile, with
    CUDA graphs on a GPU; not with Winograd's loops, at each of which a compiled graph would end.
    """

    def __init__(
        self, network: nn.Module, arithmetic: str = "float32", compiled: bool = False
    ) -> None:
        super().__init__()
        self.arithmetic, self.dtype = arithmetic, ARITHMETIC[arithmetic]
        network = network.to(dtype=self.dtype, memory_format=torch.channels_last)
        _fuse(network, arithmetic, compiled)
        self.compiled, self._batch = compiled and arithmetic != "winograd", 0
        self.network = compile_network(network, graphs=True) if self.compiled else network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) float32, t and labels (B,) long -> like x."""
        count, inputs = len(x), [x, t] if labels is None else [x, t, labels]
        if self.compiled:
            # Another size would be compiled anew, so a run's last, smaller batch is filled up.
            self._batch = max(self._batch, count)
            more = self._batch - count
            inputs = [torch.cat([v, v[:1].expand(more, *v.shape[1:])]) for v in inputs]
        x, t, *labels = inputs
        x = x.to(self.dtype, memory_format=torch.channels_last)
        out = self.network(x, t, **({"labels": labels[0]} if labels else {}))[:count]
        # A CUDA graph writes its next result over this one, hence a copy.
        return out.to(torch.float32, memory_format=torch.contiguous_format, copy=self.compiled)


def sampling_networks(
    net: Supernet,
    widths: Iterable[float],
    arithmetic: str | Mapping[float, str] = "float32",
    compiled: bool = False,
) -> dict[float, SamplingNetwork]:
    """A dense network for each width; `arithmetic` is for all or by width."""
    named = {w: arithmetic if isinstance(arithmetic, str) else arithmetic[w] for w in widths}
    return {w: SamplingNetwork(net.subnet(w), named[w], compiled) for w in named}


def ready_to_train(
    net: nn.Module, arithmetic: str, device: torch.device, compiled: bool = False
) -> None:
    """Put into `net`, in place, what its training steps run faster with; its parameters stay.

    arithmetic: a key of ARITHMETIC.
    """
    if device.type == "cpu":
        fast_dropout(net)
    _fuse(net, arithmetic, compiled)


class InBfloat16(nn.Module):
    """`net` with torch's autocast, in whichever thread it runs: those of DataParallel would take
    float16, as a thread has its own setting."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *arguments: object) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x, *arguments)


@torch.inference_mode()
def latency(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    seconds: float = 0.5,
) -> float:
    """Seconds an image of one call network(x, t): the median of calls over about `seconds`."""
    draw = torch.Generator(device).manual_seed(0)  # the run's own random numbers are left alone
    x = torch.randn(batch_size, *image_shape, device=device, generator=draw)
    t = torch.zeros(batch_size, dtype=torch.long, device=device)

    def call() -> float:
        start = time.perf_counter()
        network(x, t)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    call()  # the first call also allocates and compiles,
    call()  # and the second records a CUDA graph
    times = [call()]
    while sum(times) < seconds and len(times) < 1000:
        times.append(call())
    return float(np.median(times)) / batch_size
