"""The search for a width schedule: genome, evolution, log, resume, Pareto front.

This room sees the evaluation as a callable from schedules to distances and the cost of a step as a
table. It knows nothing of networks, samplers, devices or flags.
"""

from search.front import Candidate, hypervolume, knee, pareto_front
from search.genome import Genome
from search.log import schedules_of, warm_start
from search.run import Search
from search.scoring import Rung, Score
from search.settings import OBJECTIVES, SearchSettings

__all__ = [
    "OBJECTIVES",
    "Candidate",
    "Genome",
    "Rung",
    "Score",
    "Search",
    "SearchSettings",
    "hypervolume",
    "knee",
    "pareto_front",
    "schedules_of",
    "warm_start",
]
