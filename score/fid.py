"""From features to a Fréchet distance: streaming moments, Gaussians.

This file knows numbers only: not which network made the features, nor where images come from.
Everything is computed in float64 on the device where the features lie.
"""

import hashlib

import numpy as np
import scipy.linalg
import torch

from runtime.errors import UserError

Array = np.ndarray | torch.Tensor


class Moments:
    """Mean and covariance of features that arrive in batches; how they are split is no matter.

    Chan, Golub & LeVeque (1979): the scatter matrix about the running mean is merged, so no
    large sums of squares cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: torch.Tensor | None = None  # (D,) float64
        self.scatter: torch.Tensor | None = None  # (D, D) float64, Σ (x − mean)(x − mean)ᵀ

    def update(self, features: torch.Tensor) -> None:
        """Add a batch (B, D) of any float type."""
        if len(features) == 0:
            return
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        self._combine(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Add all that `other` has seen."""
        if other.count:
            self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        mean, scatter = mean.to(self.mean.device), scatter.to(self.mean.device)
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter += torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased (D, D), as np.cov; ValueError with fewer than two samples.

        UserError where any feature was not finite, which the sums then are not, either. Looking at
        every batch would have a GPU wait.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        if not bool(self.mean.isfinite().all() and self.scatter.isfinite().all()):
            raise UserError(
                f"the features of {self.count} images are not all finite numbers, so they have no "
                "score: see the encoder's weights (--fid_weights)"
            )
        return self.scatter / (self.count - 1)

    def state(self) -> dict[str, torch.Tensor]:
        """Plain tensors (count, mean, scatter) for another process or a file."""
        empty = torch.zeros(0, dtype=torch.float64)
        return {
            "count": torch.tensor(self.count),
            "mean": empty if self.mean is None else self.mean,
            "scatter": empty if self.scatter is None else self.scatter,
        }

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> "Moments":
        """The inverse of `state`."""
        moments = cls()
        if count := int(state["count"]):
            moments._combine(count, state["mean"], state["scatter"])
        return moments


class Gaussian:
    """What Fréchet distances are measured from.

    mu (D,), sigma (D, D) symmetric; arrays or tensors of any float type, float64 on `device` here.
    source: the file that they are from. ValueError for shapes that don't fit and for numbers that
    are not finite.
    """

    def __init__(
        self, mu: Array, sigma: Array, device: torch.device | str = "cpu", source: str = ""
    ) -> None:
        self.mu, self.sigma = _moments(mu, sigma, device)
        self.source = source

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return len(self.mu)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that other statistics would change."""
        numbers = torch.cat([self.mu.flatten(), self.sigma.flatten()]).cpu().numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        """Norms that other statistics would change, and computing the same ones again would not."""
        norms = self.mu.norm(), self.sigma.trace(), self.sigma.norm()
        return " ".join(f"{float(norm):.6g}" for norm in norms)

    def distance(self, mu: Array, sigma: Array) -> float:
        """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½) to another one (Dowson & Landau 1982).

        Where Σ2 = F Fᵀ, Σ1 Σ2 has the eigenvalues of the symmetric Fᵀ Σ1 F, and zeros. Those that
        rounding pushes below 0 count as 0, so singular covariances are welcome.
        """
        mu, sigma = _moments(mu, sigma, self.mu.device)
        if len(mu) != self.dim:
            raise ValueError(f"expected {self.dim} dimensions, got {len(mu)}")
        factor = _factor(sigma)
        overlap = _eigvalsh(factor.T @ self.sigma @ factor).clamp(min=0).sqrt().sum()
        apart = (mu - self.mu).square().sum()
        return max(0.0, float(apart + self.sigma.trace() + sigma.trace() - 2 * overlap))


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """F (D, rank) of a semidefinite sigma (D, D) = F Fᵀ.

    Where Cholesky's meets no pivot that could be rounding, that; otherwise with the largest pivot
    first, until what is left is rounding: the covariance of N images has a rank below N, and the
    roots of what its zeros are rounded to would add up.
    """
    factor, failed = torch.linalg.cholesky_ex(sigma)
    rounding = len(sigma) * torch.finfo(sigma.dtype).eps * sigma.diagonal().max()
    if not failed and factor.diagonal().min().square() > rounding:
        return factor
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma.cpu().numpy(), lower=1)
    factor = np.empty_like(lower)
    factor[pivots - 1] = np.tril(lower)
    return torch.as_tensor(factor[:, :rank]).to(sigma)


def _eigvalsh(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (D,) of a symmetric matrix, rising.

    LAPACK's divide and conquer, which torch calls, now and then gives up where many eigenvalues are
    equal; the slower QR iteration does not.
    """
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        values = scipy.linalg.eigh(matrix.cpu().numpy(), eigvals_only=True, driver="ev")
        return torch.as_tensor(values).to(matrix)


def _moments(
    mu: Array, sigma: Array, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    mu, sigma = (torch.as_tensor(a, dtype=torch.float64, device=device) for a in (mu, sigma))
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"expected (D,), (D, D), got {tuple(mu.shape)}, {tuple(sigma.shape)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("means and covariances must be finite")
    return mu, sigma


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """The Fréchet distance of two Gaussians, see `Gaussian`; on the device of the first tensor."""
    given = (mu1, sigma1, mu2, sigma2)
    device = next((a.device for a in given if isinstance(a, torch.Tensor)), "cpu")
    return Gaussian(mu1, sigma1, device).distance(mu2, sigma2)
