"""Loops that torch has no operator for, in C++: compiled for this processor, once a process."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from model.compiling import compiler

POINTER, LONG = ctypes.c_void_p, ctypes.c_long
ARGUMENTS = {
    **dict.fromkeys(("inputs", "gradients"), [POINTER] * 3 + [LONG] * 5),
    "winograd": [POINTER] * 8 + [LONG] * 10,
    "pointwise": [POINTER] * 4 + [LONG] * 3,
    "norm": [LONG] + [POINTER] * 5 + [LONG] * 6 + [ctypes.c_float],
    "norm_backward": [LONG] + [POINTER] * 7 + [LONG] * 6,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of ARGUMENTS; None where they cannot be compiled."""
    command, sources = compiler(), sorted(map(str, Path(__file__).parent.glob("*.cpp")))
    if command is None:
        return None
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        built = str(Path(folder) / "native.so")
        try:
            subprocess.run(
                [command, *options, *sources, "-o", built], check=True, capture_output=True
            )
            found = ctypes.CDLL(built)
        except (OSError, subprocess.CalledProcessError):
            return None
    for name, arguments in ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def available() -> bool:
    """Whether these loops can be compiled here."""
    return library() is not None


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous: images as the loops see them."""
    return x.permute(0, 2, 3, 1).contiguous()
