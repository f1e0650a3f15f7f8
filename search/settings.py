"""The settings of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.errors import UserError

METHODS = ("evolution", "sensitivity")
OBJECTIVES = ("weighted", "pareto")


@dataclass(frozen=True)
class SearchSettings:
    """How candidates are made and compared; flags of the same names explain the fields."""

    search_method: str = "evolution"
    num_generation: int = 1000
    pop_size: int = 10
    fid_weight: float = 0.5
    macs_weight: float = 0.001
    mutation_prob: float = 0.001
    random_init: bool = False
    level_seeds: bool = False
    search_objective: str = "weighted"
    flops_budget: float = 0.0
    distance_limit: float = 0.0
    num_segments: int = 0
    ladder_keep: float = 0.25
    surrogate: int = 0
    confirm_images: int = 0
    search_minutes: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_generation", 1),
            ("pop_size", 2),
            ("num_segments", 0),
            ("surrogate", 0),
            ("confirm_images", 0),
            ("search_minutes", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        for name in ("mutation_prob", "flops_budget", "ladder_keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be in [0, 1]")
        for name in ("fid_weight", "macs_weight"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        if self.distance_limit and not 1 <= self.distance_limit < math.inf:
            raise UserError(f"--distance_limit={self.distance_limit}: must be 0 or at least 1")
        for name, choices in (("search_method", METHODS), ("search_objective", OBJECTIVES)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name}={getattr(self, name)}: one of {', '.join(choices)}")
        if self.distance_limit and self.search_objective == "weighted":
            raise UserError("--distance_limit needs --search_objective=pareto")
