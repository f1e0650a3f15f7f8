"""Scores of images: encoders, streaming statistics, Fréchet distance, Inception Score, FLOPs."""

from score.features import ENCODERS, Encoder, encoder
from score.fid import Gaussian, Moments, frechet_distance
from score.flops import flops
from score.inception import InceptionScore
from score.statistics import (
    Images,
    UnavailableError,
    default_path,
    load_or_compute,
    load_statistics,
    save_statistics,
    statistics_of,
)

__all__ = [
    "ENCODERS",
    "Encoder",
    "Gaussian",
    "Images",
    "InceptionScore",
    "Moments",
    "UnavailableError",
    "default_path",
    "encoder",
    "flops",
    "frechet_distance",
    "load_or_compute",
    "load_statistics",
    "save_statistics",
    "statistics_of",
]
