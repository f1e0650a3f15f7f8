"""Additive models of the log distance: an effect for each gene at each width, and exact fronts.

All tables are (genes, widths) arrays; columns are the genome's widths, rising, the last one full
width, whose effect is 0. An effect is the change of log distance against full width; it is infinite
for a width that is not to be used. Costs are against full width, too, so they are at most 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtr

SMOOTH = 0.25  # of the chain: the reach of what neighbouring genes share
ALIKE = 0.8  # correlation of the deviations of a gene's widths
LEAST = 0.03  # of a width's deviation, in log distance, whatever its uniform score
LEVEL = 10.0  # deviation of the level, in log distance
SIZES = (0.3, 1.0, 3.0)  # of the genes' deviations, in units of their means
NOISES = (0.003, 0.01, 0.02, 0.04)  # of a log distance


def settled(effects: np.ndarray, widths: Sequence[float]) -> np.ndarray:
    """Effects that are at least 0 and do not rise with the width: the nearest such ones.

    Skipping a step (width 0) may do less harm than a narrow width, so it is only clipped.
    """
    from sklearn.isotonic import isotonic_regression

    result = np.maximum(effects, 0)
    for gene, row in enumerate(effects):
        used = [i for i, w in enumerate(widths[:-1]) if w > 0 and np.isfinite(row[i])]
        if used:
            result[gene, used] = isotonic_regression(row[used], y_min=0, increasing=False)
    result[:, -1] = 0
    return result


def exact_front(effects: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
    """The rows of genes with the least Σ effects + λ·Σ costs, for every λ > 0, the dearest first.

    Each gene decides alone, so it walks down the convex hull of its own (cost, effect) points; the
    front takes these moves in the order of their slopes.
    """
    return _walk(effects, costs)[0]


def _walk(effects: np.ndarray, costs: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The exact front, and the rising values of λ at which it goes from one row to the next."""
    least = effects <= effects.min(1, keepdims=True)
    row = np.where(least, costs, np.inf).argmin(1)
    moves = []
    for gene, here in enumerate(row):
        slope = 0.0
        while True:
            saved = costs[gene, here] - costs[gene]
            cheaper = np.flatnonzero((saved > 0) & np.isfinite(effects[gene]))
            if not len(cheaper):
                break
            slopes = (effects[gene, cheaper] - effects[gene, here]) / saved[cheaper]
            here = cheaper[np.lexsort((costs[gene, cheaper], slopes))[0]]
            slope = max(slope, slopes.min())  # rounding must not change the order of a gene's moves
            moves.append((slope, gene, here))
    moves.sort(key=lambda move: move[0])
    rows = [row]
    for _, gene, width in moves:
        rows.append(rows[-1].copy())
        rows[-1][gene] = width
    return rows, np.array([slope for slope, _, _ in moves])


def stakes(effects: np.ndarray, errors: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The log distance that knowing each effect exactly is expected to save a point of the front.

    At a multiplier λ a gene takes the width of the least effect + λ·cost. An effect that is known
    exactly changes that choice where it was wrong by more than its gap to the rival. For a normal
    error e and a gap g that saves e·(φ(g/e) − g/e·Φ(−g/e)). The mean over the front's multipliers.
    """
    rates = np.unique(_walk(effects, costs)[1])
    total = np.zeros_like(effects)
    for rate in rates:
        values = effects + rate * costs
        order = np.sort(values, axis=1)
        best = values == order[:, :1]
        gaps = np.where(best, order[:, 1:2] - order[:, :1], values - order[:, :1])
        with np.errstate(invalid="ignore", divide="ignore"):
            z = gaps / errors
            density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)  # of a Gaussian, at z
            gain = errors * (density - z * ndtr(-z))
        total += np.where(np.isfinite(gain) & (errors > 0), gain, 0)
    return total / max(1, len(rates))


@dataclass
class Belief:
    """What scored candidates say of the effects, as a normal distribution.

    log distance of a row = level + Σ effect[gene, width] + noise. Before any candidate, a gene has
    its share of what its width does where every gene has it. Genes differ from that, each for
    itself and neighbours alike, by a deviation of the same order; how large it is, and the noise,
    are those of the greatest likelihood. The noise includes what an additive model lacks.
    """

    mean: np.ndarray  # (genes, widths)
    errors: np.ndarray  # (genes, widths), standard deviations
    noise: float
    level: float
    _root: np.ndarray
    _used: list[int]

    @classmethod
    def of(
        cls, uniform: np.ndarray, shares: np.ndarray, rows: np.ndarray, log_distances: np.ndarray
    ) -> Belief:
        """uniform: (widths,) changes of log distance of the uniform widths, infinite for one that
        is not to be used. shares: (genes,) of the steps. rows: (n, genes), with their (n,) log
        distances."""
        used = [i for i in np.flatnonzero(np.isfinite(uniform)) if i != len(uniform) - 1]
        prior = np.outer(shares, uniform[used]).ravel()
        inputs = np.stack([rows == width for width in used], 2).reshape(len(rows), -1).astype(float)
        places = np.cumsum(shares) - shares / 2
        alike = np.exp(-0.5 * ((places[:, None] - places) / SMOOTH) ** 2) + np.eye(len(shares))
        sizes = np.abs(uniform[used]) + LEAST
        between = np.outer(sizes, sizes) * (ALIKE + (1 - ALIKE) * np.eye(len(used)))
        unit = np.kron(alike * np.outer(shares, shares) / 2, between)
        rest = log_distances - inputs @ prior
        fits = []
        for size, noise in itertools.product(SIZES, NOISES):
            of_data = size**2 * inputs @ unit @ inputs.T
            of_data += noise**2 * np.eye(len(rows)) + LEVEL**2
            factor = cho_factor(of_data, lower=True)
            solved = cho_solve(factor, rest)
            fit = -rest @ solved / 2 - np.log(np.diag(factor[0])).sum()
            fits.append((fit, size, noise, factor, solved))
        _, size, noise, factor, solved = max(fits, key=lambda fit: fit[0])
        gain = size**2 * unit @ inputs.T
        posterior = size**2 * unit - gain @ cho_solve(factor, gain.T)
        values, vectors = np.linalg.eigh((posterior + posterior.T) / 2)
        # The symmetric root: the last digits of the distances do not turn it, as they may vectors.
        root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        shape = len(shares), len(used)
        mean, errors = np.full((2, len(shares), len(uniform)), np.inf)
        mean[:, -1] = errors[:, -1] = 0
        mean[:, used] = (prior + gain @ solved).reshape(shape)
        errors[:, used] = np.sqrt((root**2).sum(1)).reshape(shape)
        level = np.mean(log_distances - mean[np.arange(len(shares)), rows].sum(1))
        return cls(mean, errors, noise, float(level), root, used)

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """Effects (genes, widths) as they may be."""
        effects = self.mean.copy()
        noise = self._root @ random.standard_normal(self._root.shape[1])
        effects[:, self._used] += noise.reshape(len(effects), -1)
        return effects
