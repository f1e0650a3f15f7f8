"""The slimmable network, its width schedules and its checkpoints. Sees tensors, nothing else."""

from model import native
from model.allocator import keep_freed
from model.compiling import check_compiler, compile_network
from model.ema import EMA
from model.stepaware import (
    ARITHMETIC,
    Candidate,
    Condition,
    StepAwareDenoiser,
    WidthSchedule,
    asked,
    average,
    candidates,
)
from model.unet import SlimmableUNet, UNetSettings

__all__ = [
    "ARITHMETIC",
    "EMA",
    "Candidate",
    "Condition",
    "SlimmableUNet",
    "StepAwareDenoiser",
    "UNetSettings",
    "WidthSchedule",
    "asked",
    "average",
    "candidates",
    "check_compiler",
    "compile_network",
    "keep_freed",
    "native",
]
