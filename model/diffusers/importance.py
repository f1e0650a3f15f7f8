"""Channels in order of importance: the leading ones, which narrow widths keep, come to matter most.

This file knows which layers hold the same channels, so that moving them together changes nothing
at full width. It does not know how channels are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor, nn

from model.diffusers.plan import RESNETS
from model.diffusers.supernet import SlimmableDiffusersUNet


@dataclass(frozen=True)
class _Place:
    """Where a layer stores a stream's channels: along `dim` of its weight, `parts` times."""

    layer: nn.Module
    dim: int = 0
    parts: int = 1

    def strength(self) -> Tensor:
        """The norm of each channel's weights, (channels,)."""
        rows = self.layer.weight.movedim(self.dim, 0).flatten(1)
        return rows.unflatten(0, (self.parts, -1)).square().sum((0, 2)).sqrt()

    def permute(self, order: Tensor) -> None:
        """Move channel order[i] to i."""
        index = torch.cat([order + len(order) * part for part in range(self.parts)])
        for weight in (self.layer.weight, getattr(self.layer, "bias", None)):
            if weight is not None and self.dim < weight.ndim:
                weight.copy_(weight.index_select(self.dim, index))


def _joint(writers: list[_Place], readers: list[_Place]) -> Tensor:
    """The norm of what writes each channel times the norm of what reads it, (channels,)."""
    pair = sum(p.strength() ** 2 for p in writers) * sum(p.strength() ** 2 for p in readers)
    return pair.sqrt()


def _best(strength: Tensor, groups: int) -> Tensor:
    """Groups of channels by falling strength."""
    return strength.unflatten(0, (groups, -1)).sum(1).argsort(descending=True, stable=True)


def _grouped_order(strength: Tensor, groups: int, first: Tensor | None = None) -> Tensor:
    """Groups as in `first`, or the best first, and channels by falling strength inside each."""
    by_group = strength.unflatten(0, (groups, -1))
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    first = _best(strength, groups) if first is None else first
    return (first[:, None] * by_group.shape[1] + inside[first]).flatten()


@torch.no_grad()
def order_by_importance(net: SlimmableDiffusersUNet) -> None:
    """Reorder channels in place so that the important ones lead; width 1 computes the same.

    A channel's importance is the norm of the weights that write it times the norm of those that
    read it. This orders the inner channels of residual blocks, heads and the channels inside each,
    hidden layers, and the time embedding. The residual streams keep their order: group norms over
    [h, skip] put their channels in groups that a reordering would mix.
    """
    for module in net.model.modules():
        if isinstance(module, RESNETS):
            _order_resnet(module)
        elif isinstance(module, Attention):
            _order_attention(module)
        elif isinstance(module, FeedForward):
            first, last = module.net[0].proj, module.net[2]
            parts = first.out_features // last.in_features
            _order([_Place(first, 0, parts)], [_Place(last, 1)])
        elif isinstance(module, TimestepEmbedding):
            _order([_Place(module.linear_1)], [_Place(module.linear_2, 1)])
    _order_time_embedding(net.model)


def _order(writers: list[_Place], readers: list[_Place]) -> None:
    order = _grouped_order(_joint(writers, readers), 1)
    for place in writers + readers:
        place.permute(order)


def _order_resnet(block: nn.Module) -> None:
    writer, reader, norm = _Place(block.conv1), _Place(block.conv2, 1), block.norm2
    between = []
    strength = writer.strength() * reader.strength()
    if isinstance(norm, AdaGroupNorm):
        between.append(_Place(norm.linear, 0, 2))
    elif isinstance(norm, nn.GroupNorm):
        between.append(_Place(norm))
        strength = strength * norm.weight.abs()
    else:
        return
    projection = getattr(block, "time_emb_proj", None)
    if projection is not None:
        between.append(_Place(projection, 0, projection.out_features // len(strength)))
    order = _grouped_order(strength, norm.num_groups)
    for place in (writer, reader, *between):
        place.permute(order)


def _order_attention(attention: Attention) -> None:
    """Heads move as wholes; inside each, queries move with keys, and values with their readers."""

    def present(*layers: nn.Module | None) -> list[_Place]:
        return [_Place(layer) for layer in layers if layer is not None]

    queries = present(attention.to_q)
    keys = present(attention.to_k, attention.add_k_proj)
    values = present(attention.to_v, attention.add_v_proj)
    out = _Place(attention.to_out[0], 1)
    heads = attention.heads

    value, score = _joint(values, [out]), _joint(queries, keys)
    best = _best(value, heads)
    if attention.norm_q is not None:  # its weights stay where they are, so the channels must
        score = torch.zeros_like(score)
    for places, strength in (([*queries, *keys], score), ([*values, out], value)):
        order = _grouped_order(strength, heads, best)
        for place in places:
            place.permute(order)


def _order_time_embedding(model: ModelMixin) -> None:
    """Order the time embedding's channels, where no other embedding is added to them."""
    others = ("class_embedding", "add_embedding")
    if any(getattr(model, name, None) is not None for name in others):
        return
    readers = []
    for module in model.modules():
        if isinstance(module, AdaGroupNorm):
            readers.append(_Place(module.linear, 1))
        elif getattr(module, "time_emb_proj", None) is not None:
            readers.append(_Place(module.time_emb_proj, 1))
    if readers:
        _order([_Place(model.time_embedding.linear_2)], readers)
