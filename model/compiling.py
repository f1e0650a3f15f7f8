"""torch.compile for networks, and whether this machine can do it."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import nn

from runtime.errors import UserError

# A network is compiled for each of its widths, and each width's subnet counts as one more version
# of the same code; torch's own limit is 8.
VERSIONS = 64


def compiler() -> str | None:
    """The path of a C++ compiler, the one of $CXX before others."""
    named = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next(filter(None, map(shutil.which, filter(None, named))), None)


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile finds no compiler for `device`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs triton on a GPU: install it, or leave --compile out")
    if compiler() is None:
        raise UserError(
            "--compile needs a C++ compiler (g++ or clang++, or one named in $CXX): install one, "
            "or leave --compile out"
        )


def compile_network(network: nn.Module, graphs: bool = False) -> nn.Module:
    """`network` compiled for the shapes that it is called with, at the first call.

    graphs: on a GPU, as CUDA graphs: the result of a call is overwritten by the next one.
    """
    import torch._dynamo  # not loaded with torch, and slow to load

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VERSIONS)
    limits.specialize_float = True  # a width decides shapes
    on_gpu = any(p.is_cuda for p in [*network.parameters(), *network.buffers()])
    mode = "reduce-overhead" if graphs and on_gpu else None
    return torch.compile(network, mode=mode, dynamic=False)
