"""The slimmable network, its width schedules and its checkpoints.

Knows no flags, data sets or samplers.
"""

from model.compiling import check_compiler, compile_network
from model.denoiser import Condition, StepAwareDenoiser
from model.ema import EMA
from model.networks import (
    ARITHMETIC,
    InBfloat16,
    SamplingNetwork,
    keep_freed,
    latency,
    ready_to_train,
    sampling_networks,
)
from model.schedule import WidthSchedule, average, entries_for_calls
from model.unet import SlimmableUNet, UNetSettings

__all__ = [
    "ARITHMETIC",
    "EMA",
    "Condition",
    "InBfloat16",
    "SamplingNetwork",
    "SlimmableUNet",
    "StepAwareDenoiser",
    "UNetSettings",
    "WidthSchedule",
    "average",
    "check_compiler",
    "compile_network",
    "entries_for_calls",
    "keep_freed",
    "latency",
    "ready_to_train",
    "sampling_networks",
]
