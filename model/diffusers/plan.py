"""Which channels of a diffusers UNet are one stream, and how its layers narrow together.

A stream is a tensor that passes from layer to layer; a width keeps its leading channels. This file
knows how each kind of diffusers' layers is connected, and makes copies of a model at a width. It
has no arithmetic of its own, knows no settings and reads no files.

How a stream narrows: to channels·width, rounded up to a multiple that the group norms on it can
divide. Group norms keep their number of groups, or (proportional) the number of channels in a
group. [h, skip] inputs, GEGLU's halves and scale–shift projections keep the leading channels of
each part. Attention keeps whole leading heads where width·heads is an integer, otherwise the
leading part of every head. Image channels, sinusoids and text embeddings are never narrowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import Tensor, nn

from model.diffusers.step_aware_unet import fit, fit_classes, set_heads
from runtime.errors import UserError

# Modules of these names see only image, text or time inputs.
_NEVER_NARROWED = (
    "time_proj",
    "add_time_proj",
    "encoder_hid_proj",
    "add_embedding.pool",
    "add_embedding.norm1",
    "add_embedding.input_hint_block",
)
RESNETS = (ResnetBlock2D, ResnetBlockCondNorm2D)


@dataclass(frozen=True)
class Side:
    """One dimension of a weight: concatenated blocks of channels, or the heads of attention.

    blocks: the channels of each. heads: into how many heads the one block divides.
    """

    blocks: tuple[int, ...]
    heads: int | None = None

    @property
    def total(self) -> int:
        return sum(self.blocks)

    def heads_at(self, width: float) -> tuple[int, int]:
        """How many heads remain at `width`, and how many channels in each."""
        dim = self.total // self.heads
        heads = self.heads * width
        if math.isclose(heads, round(heads), abs_tol=1e-9):
            return round(heads), dim
        return (self.heads, _ceil(dim * width)) if dim > 1 else (_ceil(heads), dim)


@dataclass(frozen=True)
class Cut:
    """The sides of a layer's weight: `outputs` is dimension 0, `inputs` 1; None is not narrowed."""

    outputs: Side | None
    inputs: Side | None = None


@dataclass
class Plan:
    """How a model narrows: the cuts of its layers, by name, and its group norms."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    norms: list[tuple[str, int, Side]] = field(default_factory=list)  # name, groups, channels
    proportional: bool = False  # norms keep the channels of a group, not the number of groups
    multiples: dict[int, int] = field(default_factory=dict)  # channels -> rounded up to these

    def channels_at(self, channels: int, width: float) -> int:
        """How many of a stream's `channels` remain at `width`."""
        multiple = self.multiples.get(channels, 1)
        return min(channels, _ceil(channels * width / multiple) * multiple)

    def largest_narrow_width(self) -> float:
        """The largest width below 1 at which every norm has fewer channels; 0 where none has."""

        def of_side(side: Side) -> float:
            return max(1 - self.multiples.get(block, 1) / block for block in side.blocks)

        return min(of_side(side) for _, _, side in self.norms)

    def norm_divisor(self, groups: int, side: Side) -> int:
        """What must divide the channels of a norm that has `groups` groups at full width."""
        return side.total // groups if self.proportional else groups

    def count(self, side: Side, width: float) -> int:
        """How many entries of `side` remain at `width`."""
        return sum(length for _, length in self.ranges(side, width))

    def ranges(self, side: Side, width: float) -> Iterator[tuple[int, int]]:
        """(start, length) of each run of entries that remains at `width`."""
        if side.heads is not None:
            heads, dim = side.heads_at(width)
            full = side.total // side.heads
            runs = [(0, heads * dim)] if dim == full else [(h * full, dim) for h in range(heads)]
            yield from runs
            return
        start = 0
        for block in side.blocks:
            yield start, self.channels_at(block, width)
            start += block

    def narrowed(self, tensor: Tensor, side: Side | None, width: float, dim: int) -> Tensor:
        """The entries of `tensor` along `dim` that remain; a view where they are one run."""
        if side is None:
            return tensor
        parts = [tensor.narrow(dim, start, n) for start, n in self.ranges(side, width)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _ceil(value: float) -> int:
    """The next integer, at least 1; a value that is an integer but for rounding stays."""
    return max(1, math.ceil(value - 1e-9))


def _default_cut(name: str, layer: nn.Module) -> Cut:
    """For a layer that reads one stream and writes one."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return Cut(Side((layer.out_channels,)), Side((layer.in_channels,)))
    if isinstance(layer, nn.Linear):
        return Cut(Side((layer.out_features,)), Side((layer.in_features,)))
    if isinstance(layer, nn.GroupNorm):
        return Cut(Side((layer.num_channels,)))
    if isinstance(layer, nn.LayerNorm):
        return Cut(Side(tuple(layer.normalized_shape)))
    raise UserError(f"cannot narrow {name}: a {type(layer).__name__} is not supported")


class Planner:
    """Walks a model once and collects its Plan; layers that no rule names get _default_cut."""

    def __init__(self, model: ModelMixin, proportional: bool) -> None:
        self.model, self.plan = model, Plan(proportional=proportional)
        self.cuts: dict[int, Cut] = {}
        parts = 2 if getattr(model.config, "class_embeddings_concat", False) else 1
        self.temb = (model.time_embedding.linear_2.out_features,) * parts
        self.segments = self._segments()

    def __call__(self) -> Plan:
        for module in self.model.modules():
            if isinstance(module, RESNETS):
                self._resnet(module)
            elif isinstance(module, Attention):
                self._attention(module)
            elif isinstance(module, FeedForward):
                self._feed_forward(module)
        self._ends()
        for name, module in self.model.named_modules():
            if type(module).__name__ == "GatedSelfAttentionDense":
                raise UserError(f"cannot narrow {name}: gated attention (GLIGEN) is not supported")
            self._leaf(name, module)
        for _, groups, side in self.plan.norms:
            if len(side.blocks) == 1:
                channels = side.blocks[0]
                multiple = self.plan.multiples.get(channels, 1)
                multiple = math.lcm(multiple, self.plan.norm_divisor(groups, side))
                self.plan.multiples[channels] = multiple
        return self.plan

    def _leaf(self, name: str, module: nn.Module) -> None:
        if any(f"{name}.".startswith(f"{prefix}.") for prefix in _NEVER_NARROWED):
            return
        if isinstance(module, AdaGroupNorm):
            cut = self.cuts.get(id(module.linear)) or self._ada_norm(module, None)
            half = cut.outputs.blocks[: len(cut.outputs.blocks) // 2]
            self.plan.norms.append((name, module.num_groups, Side(half)))
        if not any(parameter is not None for parameter in module._parameters.values()):
            return
        cut = self.cuts.get(id(module)) or _default_cut(name, module)
        self.plan.cuts[name] = cut
        if isinstance(module, nn.GroupNorm) and cut.outputs is not None:
            self.plan.norms.append((name, module.num_groups, cut.outputs))

    def _segments(self) -> dict[int, tuple[int, ...]]:
        """Channels of (h, skip) at the input of each residual block of the up path, by its id."""
        segments = {}
        channels = self.model.config.block_out_channels[-1]
        for block in self.model.up_blocks:
            for resnet in block.resnets:
                skip = resnet.in_channels - channels
                segments[id(resnet)] = (channels, skip) if skip > 0 else (resnet.in_channels,)
                channels = resnet.conv2.out_channels
        return segments

    def _resnet(self, block: nn.Module) -> None:
        blocks = self.segments.get(id(block), (block.in_channels,))
        inputs, inner = Side(blocks), block.conv1.out_channels
        self.cuts[id(block.conv1)] = Cut(Side((inner,)), inputs)
        if block.conv_shortcut is not None:
            outputs = Side((block.conv_shortcut.out_channels,))
            self.cuts[id(block.conv_shortcut)] = Cut(outputs, inputs)
        if isinstance(block.norm1, AdaGroupNorm):
            self._ada_norm(block.norm1, blocks)
        else:
            self.cuts[id(block.norm1)] = Cut(inputs)
        projection = getattr(block, "time_emb_proj", None)
        if projection is not None:
            outputs = Side((inner,) * (projection.out_features // inner))  # scale and shift
            self.cuts[id(projection)] = Cut(outputs, Side(self.temb))

    def _ada_norm(self, norm: AdaGroupNorm, blocks: tuple[int, ...] | None) -> Cut:
        blocks = blocks or (norm.linear.out_features // 2,)
        self.cuts[id(norm.linear)] = cut = Cut(Side(blocks * 2), Side(self.temb))
        return cut

    def _attention(self, attention: Attention) -> None:
        inner = Side((attention.to_q.out_features,), heads=attention.heads)
        stream = Side((attention.query_dim,))
        # Layers with added keys see the text only through those.
        added = attention.added_kv_proj_dim is not None
        context = None if attention.is_cross_attention and not added else stream
        self.cuts[id(attention.to_q)] = Cut(inner, stream)
        for layer in (attention.to_k, attention.to_v):
            if layer is not None:
                self.cuts[id(layer)] = Cut(inner, context)
        for layer in (attention.add_k_proj, attention.add_v_proj):
            if layer is not None:
                self.cuts[id(layer)] = Cut(inner, None)
        self.cuts[id(attention.to_out[0])] = Cut(stream, inner)
        if attention.norm_cross is not None and attention.is_cross_attention:
            self.cuts[id(attention.norm_cross)] = Cut(None)

    def _feed_forward(self, layer: FeedForward) -> None:
        first, last = layer.net[0].proj, layer.net[2]
        hidden = (last.in_features,) * (first.out_features // last.in_features)  # gated: two
        self.cuts[id(first)] = Cut(Side(hidden), Side((first.in_features,)))

    def _ends(self) -> None:
        """The layers that read images, timesteps, classes or texts, or write images."""
        model = self.model
        temb = Side(self.temb[:1])

        def image_layers(blocks: nn.ModuleList) -> list[nn.Module]:
            layers = [getattr(block, "skip_conv", None) for block in blocks]
            return [layer for layer in layers if layer is not None]

        for layer in (model.conv_in, *image_layers(model.down_blocks)):
            self.cuts[id(layer)] = Cut(Side((layer.out_channels,)))
        for layer in (model.conv_out, *image_layers(model.up_blocks)):
            self.cuts[id(layer)] = Cut(None, Side((layer.in_channels,)))
        for name in ("time_embedding", "class_embedding", "add_embedding"):
            embedding = getattr(model, name, None)
            if isinstance(embedding, TimestepEmbedding):
                self.cuts[id(embedding.linear_1)] = Cut(temb)
                if embedding.cond_proj is not None:
                    self.cuts[id(embedding.cond_proj)] = Cut(None)
            elif isinstance(embedding, nn.Embedding):
                self.cuts[id(embedding)] = Cut(None, temb)
            elif embedding is not None:
                for layer in embedding.modules():
                    if isinstance(layer, nn.Linear):
                        self.cuts[id(layer)] = Cut(temb)


def narrow(
    model: nn.Module, plan: Plan, width: float, wrap: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of `model` at `width`, whose parameters are `wrap(slice of the original's)`."""
    copies: dict[int, nn.Module] = {}

    def parameters(module: nn.Module, new: nn.Module, name: str) -> None:
        # A replica of DataParallel has its parameters as plain attributes.
        names = [*module._parameters, *getattr(module, "_former_parameters", ())]
        new._parameters = {}
        cut = plan.cuts.get(name, Cut(None))
        for entry in names:
            tensor = getattr(module, entry)
            if tensor is not None:
                tensor = plan.narrowed(tensor, cut.outputs, width, 0)
                if tensor.ndim > 1:
                    tensor = plan.narrowed(tensor, cut.inputs, width, 1)
                tensor = wrap(tensor)
            new.__dict__.pop(entry, None)
            new._parameters[entry] = tensor

    def copy(module: nn.Module, name: str) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        copies[id(module)] = new = module.__new__(type(module))
        new.__dict__ = dict(module.__dict__)
        new._buffers = dict(module._buffers)
        parameters(module, new, name)
        new._modules = {
            key: None if child is None else copy(child, f"{name}.{key}" if name else key)
            for key, child in module._modules.items()
        }
        fit(new)
        if isinstance(new, Attention):
            set_heads(new, plan.cuts[f"{name}.to_q"].outputs.heads_at(width)[0])
        return new

    narrowed = copy(model, "")
    if plan.proportional:
        for name, groups, side in plan.norms:
            norm = narrowed.get_submodule(name)
            norm.num_groups = plan.count(side, width) // plan.norm_divisor(groups, side)
    fit_classes(narrowed)
    return narrowed
