"""The slimmable network, its width schedules and its checkpoints. Sees tensors, nothing else."""

from model.ema import EMA
from model.stepaware import Candidate, StepAwareDenoiser, WidthSchedule, average, candidates
from model.unet import SlimmableUNet, UNetSettings

__all__ = [
    "EMA",
    "Candidate",
    "SlimmableUNet",
    "StepAwareDenoiser",
    "UNetSettings",
    "WidthSchedule",
    "average",
    "candidates",
]
