"""Scores of images: encoders, streaming statistics, Fréchet distance, Inception Score, FLOPs."""

from score.features import ENCODERS, Encoder, encoder
from score.fid import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)
from score.flops import flops

__all__ = [
    "ENCODERS",
    "Encoder",
    "Gaussian",
    "InceptionScore",
    "Moments",
    "encoder",
    "flops",
    "frechet_distance",
    "load_statistics",
    "save_statistics",
    "statistics_of",
]
