"""The search for a width schedule: genome, methods, log, resume, Pareto front.

This room sees the evaluation as a callable from schedules to distances and the cost of a step as a
table. It knows nothing of networks, samplers, devices or flags.
"""

from search.front import UNUSABLE, Candidate, hypervolume, knee, pareto_front
from search.genome import Genome
from search.log import warm_start
from search.run import Search, Stage, stages
from search.scoring import Score
from search.sensitivity import SEGMENTS
from settings import SearchSettings

__all__ = [
    "SEGMENTS",
    "UNUSABLE",
    "Candidate",
    "Genome",
    "Score",
    "Search",
    "SearchSettings",
    "Stage",
    "hypervolume",
    "knee",
    "pareto_front",
    "stages",
    "warm_start",
]
