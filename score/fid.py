"""From features to scores: streaming moments, Fréchet distance, Inception Score, statistics files.

This file knows numbers only: not which network made the features, nor where images come from.
Everything is computed in float64 on the device where the features lie.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime import files
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
        """Unbiased (D, D), as np.cov; ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
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
        if int(state["count"]):
            moments._combine(int(state["count"]), state["mean"], state["scatter"])
        return moments


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))) per split, streaming (Salimans et al. 2016).

    Image i of `total` belongs to split ⌊i · splits / total⌋; there are at most `total` splits.
    """

    def __init__(self, total: int, splits: int = 10) -> None:
        if total < 1 or splits < 1:
            raise ValueError(f"total and splits must be positive, got {total} and {splits}")
        self.total, self.splits, self.count = total, min(splits, total), 0
        self._counts = self._negentropy = self._sums = None  # (S,), (S,), (S, classes)

    def update(self, probabilities: torch.Tensor, indices: torch.Tensor | None = None) -> None:
        """Add (B, classes); `indices` (B,) are the images' numbers, by default the next ones."""
        p = probabilities.detach().double()
        if indices is None:
            indices = torch.arange(self.count, self.count + len(p))
        split = indices.to(p.device) * self.splits // self.total
        if self._sums is None:
            self._counts, self._negentropy = p.new_zeros(self.splits), p.new_zeros(self.splits)
            self._sums = p.new_zeros(self.splits, p.shape[1])
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))
        self._negentropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._sums.index_add_(0, split, p)
        self.count += len(p)

    def merge(self, other: "InceptionScore") -> None:
        """Add what `other` (same total and splits, other images) has seen."""
        if (self.total, self.splits) != (other.total, other.splits):
            raise ValueError("only scores with the same total and splits can be merged")
        if other._sums is None:
            return
        if self._sums is None:
            like = other._counts, other._negentropy, other._sums
            self._counts, self._negentropy, self._sums = (torch.zeros_like(x) for x in like)
        self._counts += other._counts.to(self._counts.device)
        self._negentropy += other._negentropy.to(self._counts.device)
        self._sums += other._sums.to(self._counts.device)
        self.count += other.count

    def state(self) -> dict[str, object]:
        """Plain values and tensors for a file."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: dict[str, object]) -> "InceptionScore":
        """The inverse of `state`."""
        found = cls(state["total"], state["splits"])
        vars(found).update(state)
        return found

    def result(self) -> tuple[float, float]:
        """Mean and (population) standard deviation over the splits."""
        if self.count != self.total:
            raise ValueError(f"seen {self.count} of {self.total} images")
        marginal = self._sums / self._counts[:, None]
        divergence = self._negentropy / self._counts - torch.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))


class Gaussian:
    """What Fréchet distances are measured from; the root of its covariance is taken once.

    mu (D,), sigma (D, D) symmetric; arrays or tensors of any float type, float64 on `device` here.
    ValueError for shapes that don't fit and for numbers that are not finite.
    """

    def __init__(self, mu: Array, sigma: Array, device: torch.device | str = "cpu") -> None:
        self.mu, self.sigma = _moments(mu, sigma, device)
        values, vectors = torch.linalg.eigh(self.sigma)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, mu: Array, sigma: Array) -> float:
        """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (√Σ1 Σ2 √Σ1)^½) to another one (Dowson & Landau 1982).

        The symmetric form has real eigenvalues only; those that rounding pushes below 0 count as 0,
        so singular covariances are welcome.
        """
        mu, sigma = _moments(mu, sigma, self.mu.device)
        if len(mu) != len(self.mu):
            raise ValueError(f"expected {len(self.mu)} dimensions, got {len(mu)}")
        product = self.root @ sigma @ self.root
        values = torch.linalg.eigvalsh((product + product.T) / 2)
        overlap = values.clamp(min=0).sqrt().sum()
        apart = (mu - self.mu).square().sum()
        return max(0.0, float(apart + self.sigma.trace() + sigma.trace() - 2 * overlap))


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


def statistics_of(
    batches: Iterable[torch.Tensor],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    total: int,
    description: str,
    moments: Moments | None = None,
    unfinished: files.Unfinished | None = None,
    progress: bool = True,
) -> Moments:
    """Images (B, C, H, W) uint8 → features → moments, under a progress bar of `total` images.

    moments: of the images before these. unfinished: where the moments are kept now and then.
    """
    moments = Moments() if moments is None else moments
    with tqdm(
        total=total,
        initial=moments.count,
        desc=description,
        unit="img",
        dynamic_ncols=True,
        disable=not progress,
    ) as bar:
        for images in batches:
            moments.update(encoder(images))
            bar.update(len(images))
            if unfinished and unfinished.due():
                unfinished.write(moments.state())
    return moments


def save_statistics(path: str | Path, mu: Array, sigma: Array, **about: str | int) -> None:
    """Write mu (D,) and sigma (D, D) as pytorch-fid does, and what they are `about`.

    `about` (encoder, dataset, count, img_size, …) lets `load_statistics` refuse a wrong file.
    """
    mu, sigma = (np.asarray(torch.as_tensor(a).cpu(), dtype=np.float64) for a in (mu, sigma))
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, **about)


def load_statistics(
    path: str | Path, dim: int, encoder_name: str, **about: str | int
) -> tuple[np.ndarray, np.ndarray]:
    """mu (dim,) and sigma (dim, dim) in float64 from an .npz by pytorch-fid or by us.

    What the file says of itself must agree with `encoder_name` and `about`; pytorch-fid's files
    say nothing and are believed. UserError names the file, what is in it and what to do.
    """
    remedy = "delete it or name another file with --fid_cache, and it is computed anew"
    entries = _read_npz(Path(path), remedy)
    for key in ("mu", "sigma"):
        if key not in entries:
            found = ", ".join(sorted(entries)) or "nothing"
            raise UserError(f"{path} has no entry {key!r} (found: {found}): {remedy}")
    for key, expected in {"encoder": encoder_name, **about}.items():
        if key in entries and str(entries[key]) != str(expected):
            raise UserError(f"{path} is for {key} {entries[key]}, not {expected}: {remedy}")
    for key, shape in (("mu", (dim,)), ("sigma", (dim, dim))):
        if entries[key].shape != shape:
            raise UserError(
                f"{path}: {key} has shape {entries[key].shape}, but features of the encoder "
                f"{encoder_name} need {shape}: {remedy}"
            )
        if entries[key].dtype.kind not in "fiu" or not np.isfinite(entries[key]).all():
            raise UserError(f"{path}: {key} holds something else than finite numbers: {remedy}")
    return entries["mu"].astype(np.float64), entries["sigma"].astype(np.float64)


def _read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz; never unpickles."""
    try:
        with open(path, "rb") as file:  # np.load leaves a file that it cannot read open
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz with mu, sigma: {remedy}")
            with loaded:
                return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError as error:
        raise UserError(f"there is no statistics file {path}") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no readable .npz of plain arrays mu, sigma: {remedy}"
        ) from error
