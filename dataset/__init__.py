"""Images: named sets, folders, batches. Latents are in dataset.latents, which needs diffusers."""

from dataset.batches import batches, everything
from dataset.images import (
    NAMES,
    AnySet,
    Images,
    channels,
    describe,
    fingerprint,
    in_class_order,
    load,
    to_network,
    to_uint8,
)

__all__ = [
    "NAMES", "AnySet", "Images", "batches", "channels",
    "describe", "everything", "fingerprint", "in_class_order", "load", "to_network", "to_uint8",
]  # fmt: skip
