"""The FLOPs of a network, counted on the network that runs.

This file knows how to count; it does not know which network, width or step is worth counting.
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flops(net: nn.Module, width: float, image_shape: tuple[int, int, int]) -> int:
    """FLOPs (2 × multiply-adds) of one forward pass `net(x, t, width)` of one image.

    Counts convolutions, Linears and both attention products; norms and activations are left
    out. `image_shape` is (C, H, W). `net` itself is untouched: a copy without data runs.
    """
    copied = copy.deepcopy(net).to("meta").eval()
    x = torch.zeros(1, *image_shape, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        copied(x, t, width)
    return int(counter.get_total_flops())
