"""Settings as main.py reads them, and untrained networks of them."""

from __future__ import annotations

from pathlib import Path

from absl.testing import flagsaver

import build
import options
from settings import Configuration

CONFIG = Path(__file__).resolve().parent.parent / "config"


def configuration(*flags: str) -> Configuration:
    """What main.py would make of these flags; UserError where it would refuse them."""
    with flagsaver.flagsaver():
        options.parse(["benchmark", *flags])
        return options.configuration()


def untrained(name: str, *flags: str) -> build.Model:
    """The network of a recipe in config/, with random weights, which take as long as others."""
    recipe = f"--flagfile={CONFIG / name}.txt"
    return build.load_model_or_untrained(configuration(recipe, "--logdir=", *flags))
