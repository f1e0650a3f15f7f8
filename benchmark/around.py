"""What lies around the products: a step of sampling in which convolutions and attention give zeros.

    python -m benchmark.around [--batches 16,64] [--compile] [--repeats 5] [--out FILE.json]

Where a processor has units for products (AMX, a GPU), these are cheap, and the rest decides whether
time follows the FLOPs. The rest can be measured on any machine. The CIFAR-10 network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

from torch import Tensor, nn

import build
from benchmark import machine
from benchmark.recipe import untrained
from benchmark.sampling import SHARES, steps
from looks import table
from model import sampling_networks

WIDTHS = list(SHARES)


def zeros(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `conv` gives, but for its values: x (B, C, H, W) -> (B, K, H', W'), channels last."""
    high, wide = (side // stride for side, stride in zip(x.shape[2:], conv.stride, strict=True))
    out = x.new_zeros(len(x), high, wide, len(weight))
    return out.permute(0, 3, 1, 2)


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Convolutions and attention give zeros."""
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with patch.object(nn.Conv2d, "_conv_forward", zeros), patch(attention, lambda q, k, v: q * 0):
        yield


def networks(model: build.Model, compiled: bool) -> dict[str, dict[float, nn.Module]]:
    """By what they are called: float32, bfloat16 with torch's norms, compiled, and as it is."""
    make = partial(sampling_networks, model.net, WIDTHS)
    with patch("model.networks.available", lambda: False):
        nets = {"float32": make("float32"), "bfloat16, torch's norms": make("bfloat16")}
    if compiled:
        nets["bfloat16, compiled"] = make("bfloat16", compiled=True)
    return {**nets, "bfloat16": make("bfloat16")}


def main() -> None:
    parser = machine.arguments(__doc__, "around")
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--compile", action="store_true", help="bfloat16 compiled, too: minutes")
    given = parser.parse_args()
    model, measured, rows = untrained("slimmable_CIFAR10", "--sample_steps=1"), [], []
    for batch in map(int, given.batches.split(",")):
        works: dict[tuple[str, float], Callable] = {}
        for name, nets in networks(model, given.compile).items():
            works |= {(name, w): step for w, step in steps(model, nets, batch).items()}
        with without_products():
            times = machine.in_turns(works, given.repeats)
        for (name, width), seconds in times.items():
            measured.append({"program": name, "batch": batch, "width": width, "seconds": seconds})
        for name in dict.fromkeys(name for name, _ in works):
            cells = [machine.spread(times[name, w], batch) for w in WIDTHS]
            rows.append([str(batch), name, *cells])
    print(table(["batch", "ms per image and step", *(f"{w:g}" for w in WIDTHS)], rows))
    machine.save(given.out, {"measured": measured})


if __name__ == "__main__":
    main()
