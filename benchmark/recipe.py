"""Settings as main.py reads them, and untrained networks of them."""

from __future__ import annotations

from absl.testing import flagsaver

import options
from settings import Configuration


def configuration(*flags: str) -> Configuration:
    """What main.py would make of these flags; UserError where it would refuse them."""
    with flagsaver.flagsaver():
        options.parse(["benchmark", *flags])
        return options.configuration()
