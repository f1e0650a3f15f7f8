"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """`ema.model` follows a network: after each update, decay·ema + (1 − decay)·network.

    The copy is in eval mode and never trains.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(net).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take one step towards `net`, which must have the same entries."""
        mine, theirs = self.model.state_dict(), net.state_dict()
        if mine.keys() != theirs.keys():
            raise ValueError(f"entries differ: {sorted(mine.keys() ^ theirs.keys())[:3]}")
        self._average(list(mine.values()), list(theirs.values()), 0)
