"""What a stored result depends on, and whether it is what is wanted now.

For every file that work continues or uses again: checkpoints, search logs, latents, statistics,
latency tables, generated images. This file knows neither their formats nor what the names mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def agree(
    path: str | Path,
    stored: Mapping[str, object],
    wanted: Mapping[str, object],
    remedy: str,
    ignore: Iterable[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Raise UserError, which names every entry that differs, unless `stored` is as `wanted`.

    remedy: what the user can do about it, a clause. ignore: names that may differ. defaults: what
    an entry is where `stored` lacks it; one that has no default is passed over there. Entries that
    only `stored` has are passed over, too. Tuples equal lists, as JSON knows no tuples.
    """
    stored = {**(defaults or {}), **stored}
    differing = [
        f"{name}: {stored[name]} there, {value} here"
        for name, value in wanted.items()
        if name in stored and name not in ignore and plain(stored[name]) != plain(value)
    ]
    if differing:
        raise UserError(f"{path} is for other settings ({'; '.join(differing)}); {remedy}")


def plain(value: object) -> object:
    """`value` as JSON has it: lists for tuples, text for keys."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def fingerprint(net: nn.Module) -> str:
    """16 hexadecimal digits that other weights would change."""
    import torch

    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
