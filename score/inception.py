"""The Inception Score, from class probabilities.

This file knows numbers only: not which network made the probabilities, nor of which images.
"""

import torch


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
        split = indices.to(p.device, non_blocking=True) * self.splits // self.total
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
        score = cls(state["total"], state["splits"])
        vars(score).update(state)
        return score

    def result(self) -> tuple[float, float]:
        """Mean and (population) standard deviation over the splits."""
        if self.count != self.total:
            raise ValueError(f"seen {self.count} of {self.total} images")
        marginal = self._sums / self._counts[:, None]
        divergence = self._negentropy / self._counts - torch.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))
