"""Any UNet2DModel or UNet2DConditionModel of diffusers as a slimmable supernet.

This file knows which channels of each of diffusers' layers are one stream, so that a width keeps
the leading channels of every stream. It has no arithmetic of its own: a width runs diffusers' own
forward on a shallow copy of the model whose layers hold slices of the weights. The copy lives for
one call, so a width is never state: threads, replicas and gradient checkpointing are safe.

How a stream narrows: `channels·width`, rounded up to what the group norms on it divide; group norms
keep their number of groups, or the size of each (norm_groups="proportional"). [h, skip] inputs,
GEGLU's halves and scale–shift projections keep the leading channels of each part. Attention keeps
whole leading heads where width·heads is whole, otherwise the leading part of every head. Image
channels, sinusoids and text embeddings stay whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import Tensor, nn

from model.diffusers.step_aware_unet import Leading, fit, set_heads
from model.slimmable import replace_dropout
from runtime.errors import UserError

CLASSES = ("UNet2DModel", "UNet2DConditionModel")
WEIGHTS = "diffusion_pytorch_model"
MEAN_TYPES = {"epsilon": "epsilon", "sample": "xstart", "v_prediction": "v"}  # theirs -> ours
TOKENS = 77  # of a text prompt, for counting FLOPs where none is given

# Modules that see image, text or time inputs alone, under these names, are never narrowed.
_WHOLE = (
    "time_proj",
    "add_time_proj",
    "encoder_hid_proj",
    "add_embedding.pool",
    "add_embedding.norm1",
    "add_embedding.input_hint_block",
)
_Resnets = (ResnetBlock2D, ResnetBlockCondNorm2D)


@dataclass(frozen=True)
class Side:
    """One dimension of a weight: concatenated blocks of channels, or the heads of attention."""

    blocks: tuple[int, ...]
    heads: int | None = None

    @property
    def total(self) -> int:
        return sum(self.blocks)

    def kept_heads(self, width: float) -> tuple[int, int]:
        """How many heads `width` keeps, and how many channels of each."""
        dim = self.total // self.heads
        heads = self.heads * width
        if math.isclose(heads, round(heads), abs_tol=1e-9):
            return round(heads), dim
        return (self.heads, _ceil(dim * width)) if dim > 1 else (_ceil(heads), dim)


@dataclass(frozen=True)
class Cut:
    """What a layer keeps: `outputs` along dimension 0, `inputs` along 1; None keeps all."""

    outputs: Side | None
    inputs: Side | None = None


@dataclass
class Plan:
    """How a model narrows: the sides of each layer, by its name, and the norms they feed."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    norms: list[tuple[str, int, Side]] = field(default_factory=list)  # name, groups, channels
    proportional: bool = False  # norms keep the size of a group, not the number of groups
    quanta: dict[int, int] = field(default_factory=dict)  # channels -> what they round up to

    def kept(self, channels: int, width: float) -> int:
        """How many of a stream's `channels` stay at `width`."""
        quantum = self.quanta.get(channels, 1)
        return min(channels, _ceil(channels * width / quantum) * quantum)

    def unit(self, groups: int, side: Side) -> int:
        """What must divide the channels of a norm that has `groups` groups at full width."""
        return side.total // groups if self.proportional else groups

    def count(self, side: Side, width: float) -> int:
        """How many entries of `side` stay at `width`."""
        return sum(length for _, length in self.ranges(side, width))

    def ranges(self, side: Side, width: float) -> Iterator[tuple[int, int]]:
        """(start, length) of each run of entries that stays at `width`."""
        if side.heads is not None:
            heads, dim = side.kept_heads(width)
            full = side.total // side.heads
            runs = [(0, heads * dim)] if dim == full else [(h * full, dim) for h in range(heads)]
            yield from runs
            return
        start = 0
        for block in side.blocks:
            yield start, self.kept(block, width)
            start += block

    def take(self, tensor: Tensor, side: Side | None, width: float, dim: int) -> Tensor:
        """The entries of `tensor` along `dim` that stay; a view where they are one run."""
        if side is None:
            return tensor
        parts = [tensor.narrow(dim, start, n) for start, n in self.ranges(side, width)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _ceil(value: float) -> int:
    """The next whole number, with room for the rounding of `channels·width`."""
    return max(1, math.ceil(value - 1e-9))


def _default_cut(name: str, layer: nn.Module) -> Cut:
    """One stream in, one stream out."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return Cut(Side((layer.out_channels,)), Side((layer.in_channels,)))
    if isinstance(layer, nn.Linear):
        return Cut(Side((layer.out_features,)), Side((layer.in_features,)))
    if isinstance(layer, nn.GroupNorm):
        return Cut(Side((layer.num_channels,)))
    if isinstance(layer, nn.LayerNorm):
        return Cut(Side(tuple(layer.normalized_shape)))
    raise UserError(f"cannot narrow {name}: a {type(layer).__name__} is not supported")


class _Planner:
    """Walks a model once and collects its Plan. Layers that no rule names are one stream a side."""

    def __init__(self, model: ModelMixin, proportional: bool) -> None:
        self.model, self.plan = model, Plan(proportional=proportional)
        self.special: dict[int, Cut] = {}
        temb = (model.time_embedding.linear_2.out_features,)
        self.temb = temb * 2 if getattr(model.config, "class_embeddings_concat", False) else temb
        self.segments = self._segments()

    def __call__(self) -> Plan:
        for module in self.model.modules():
            if isinstance(module, _Resnets):
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
                unit = self.plan.unit(groups, side)
                self.plan.quanta[channels] = math.lcm(self.plan.quanta.get(channels, 1), unit)
        return self.plan

    def _leaf(self, name: str, module: nn.Module) -> None:
        if any(name == whole or name.startswith(f"{whole}.") for whole in _WHOLE):
            return
        if isinstance(module, AdaGroupNorm):
            cut = self.special.get(id(module.linear)) or self._ada_norm(module, None)
            half = cut.outputs.blocks[: len(cut.outputs.blocks) // 2]
            self.plan.norms.append((name, module.num_groups, Side(half)))
        if not any(parameter is not None for parameter in module._parameters.values()):
            return
        cut = self.special.get(id(module)) or _default_cut(name, module)
        self.plan.cuts[name] = cut
        if isinstance(module, nn.GroupNorm) and cut.outputs is not None:
            self.plan.norms.append((name, module.num_groups, cut.outputs))

    def _segments(self) -> dict[int, tuple[int, ...]]:
        """The (h, skip) inputs of each block on the way up, whatever kind of block it is."""
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
        self.special[id(block.conv1)] = Cut(Side((inner,)), inputs)
        if block.conv_shortcut is not None:
            outputs = Side((block.conv_shortcut.out_channels,))
            self.special[id(block.conv_shortcut)] = Cut(outputs, inputs)
        if isinstance(block.norm1, AdaGroupNorm):
            self._ada_norm(block.norm1, blocks)
        else:
            self.special[id(block.norm1)] = Cut(inputs)
        projection = getattr(block, "time_emb_proj", None)
        if projection is not None:
            outputs = Side((inner,) * (projection.out_features // inner))  # scale and shift
            self.special[id(projection)] = Cut(outputs, Side(self.temb))

    def _ada_norm(self, norm: AdaGroupNorm, blocks: tuple[int, ...] | None) -> Cut:
        blocks = blocks or (norm.linear.out_features // 2,)
        self.special[id(norm.linear)] = cut = Cut(Side(blocks * 2), Side(self.temb))
        return cut

    def _attention(self, attention: Attention) -> None:
        inner = Side((attention.to_q.out_features,), heads=attention.heads)
        stream = Side((attention.query_dim,))
        # Layers with added keys see the text through those alone.
        added = attention.added_kv_proj_dim is not None
        context = None if attention.is_cross_attention and not added else stream
        self.special[id(attention.to_q)] = Cut(inner, stream)
        for layer in (attention.to_k, attention.to_v):
            if layer is not None:
                self.special[id(layer)] = Cut(inner, context)
        for layer in (attention.add_k_proj, attention.add_v_proj):
            if layer is not None:
                self.special[id(layer)] = Cut(inner, None)
        self.special[id(attention.to_out[0])] = Cut(stream, inner)
        if attention.norm_cross is not None and attention.is_cross_attention:
            self.special[id(attention.norm_cross)] = Cut(None)

    def _feed_forward(self, layer: FeedForward) -> None:
        first, last = layer.net[0].proj, layer.net[2]
        hidden = (last.in_features,) * (first.out_features // last.in_features)  # gated: two
        self.special[id(first)] = Cut(Side(hidden), Side((first.in_features,)))

    def _ends(self) -> None:
        """Where images, timesteps, classes and texts enter and images leave."""
        model = self.model
        temb = Side(self.temb[:1])
        self.special[id(model.conv_in)] = Cut(Side((model.conv_in.out_channels,)))
        self.special[id(model.conv_out)] = Cut(None, Side((model.conv_out.in_channels,)))
        for block in model.down_blocks:
            if getattr(block, "skip_conv", None) is not None:
                self.special[id(block.skip_conv)] = Cut(Side((block.skip_conv.out_channels,)))
        for block in model.up_blocks:
            if getattr(block, "skip_conv", None) is not None:
                inputs = Side((block.skip_conv.in_channels,))
                self.special[id(block.skip_conv)] = Cut(None, inputs)
        for name in ("time_embedding", "class_embedding", "add_embedding"):
            embedding = getattr(model, name, None)
            if isinstance(embedding, TimestepEmbedding):
                self.special[id(embedding.linear_1)] = Cut(temb)
                if embedding.cond_proj is not None:
                    self.special[id(embedding.cond_proj)] = Cut(None)
            elif isinstance(embedding, nn.Embedding):
                self.special[id(embedding)] = Cut(None, temb)
            elif embedding is not None:
                for layer in embedding.modules():
                    if isinstance(layer, nn.Linear):
                        self.special[id(layer)] = Cut(temb)


def _narrow(
    model: nn.Module, plan: Plan, width: float, hold: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of `model` at `width`: modules of its own, weights `hold(slice of the original's)`."""
    copies: dict[int, nn.Module] = {}

    def parameters(module: nn.Module, new: nn.Module, name: str) -> None:
        # A replica of DataParallel has its parameters as plain attributes.
        names = [*module._parameters, *getattr(module, "_former_parameters", ())]
        new._parameters = {}
        cut = plan.cuts.get(name, Cut(None))
        for entry in names:
            tensor = getattr(module, entry)
            if tensor is not None:
                tensor = plan.take(tensor, cut.outputs, width, 0)
                if tensor.ndim > 1:
                    tensor = plan.take(tensor, cut.inputs, width, 1)
                tensor = hold(tensor)
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
            set_heads(new, plan.cuts[f"{name}.to_q"].outputs.kept_heads(width)[0])
        return new

    narrow = copy(model, "")
    if plan.proportional:
        for name, groups, side in plan.norms:
            norm = narrow.get_submodule(name)
            norm.num_groups = plan.count(side, width) // plan.unit(groups, side)
    if isinstance(getattr(narrow, "class_embedding", None), nn.Identity):
        narrow.class_embedding = Leading(narrow.time_embedding.linear_2.out_features)
    return narrow


@dataclass(frozen=True)
class DiffusersSettings:
    """What defines a network. T: trained timesteps. in_ch: image channels. levels: resolutions."""

    T: int
    in_ch: int
    levels: int
    class_name: str
    config: dict = field(hash=False)
    norm_groups: str = "fixed"

    def check_image_size(self, size: int) -> None:
        """Raise UserError where the levels cannot halve an image of `size` pixels a side."""
        if size < 1 or size % 2 ** (self.levels - 1):
            raise UserError(
                f"--img_size={size}: {self.levels} levels halve the image {self.levels - 1} times; "
                f"use a multiple of {2 ** (self.levels - 1)}"
            )


class DenseDiffusersUNet(nn.Module):
    """A diffusers model, `.model`, called as a network of this project: (x, t) -> a tensor."""

    def __init__(self, model: ModelMixin) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        return self.model(x, t, return_dict=False, **conditioning)[0]


class SlimmableDiffusersUNet(nn.Module):
    """The supernet: `net(x, t, width)` predicts with the leading `width` of every stream.

    model: a UNet2DModel or UNet2DConditionModel, which the supernet takes over. T: the timesteps it
    was trained with. norm_groups: see UNetSettings; width 1 is the same with both.
    x (B, in_ch, H, W), t (B,) -> (B, out_ch, H, W). Raises UserError where a
    layer is of a kind that cannot be narrowed.
    """

    def __init__(self, model: ModelMixin, T: int = 1000, norm_groups: str = "fixed") -> None:
        super().__init__()
        if type(model).__name__ not in CLASSES:
            raise UserError(f"a {type(model).__name__} is not one of {', '.join(CLASSES)}")
        self.model = model
        replace_dropout(model)
        self.plan = _Planner(model, norm_groups == "proportional")()
        config = json.loads(model.to_json_string())
        self.settings = DiffusersSettings(
            T=T,
            in_ch=config["in_channels"],
            levels=len(config["block_out_channels"]),
            class_name=type(model).__name__,
            config={k: v for k, v in config.items() if not k.startswith("_")},
            norm_groups=norm_groups,
        )

    def forward(self, x: Tensor, t: Tensor, width: float = 1.0, **conditioning: object) -> Tensor:
        """conditioning: class_labels, encoder_hidden_states, … as the diffusers model takes them.

        On the meta device, where FLOPs are counted, what is missing of it is made up.
        """
        if x.is_meta:
            conditioning = {**self._stand_ins(x), **conditioning}
        self._check_conditioning(conditioning)
        model = self.model if width == 1 else _narrow(self.model, self.plan, width, lambda w: w)
        return model(x, t, return_dict=False, **conditioning)[0]

    def check_width(self, width: float) -> None:
        """Raise UserError that names the first layer that `width` does not narrow, or breaks."""
        if not 0 < width <= 1:
            raise UserError(f"width {width}: a width must be in (0, 1]")
        if width == 1:
            return
        plan = self.plan
        for name, groups, side in plan.norms:
            channels, unit = plan.count(side, width), plan.unit(groups, side)
            if channels == side.total:
                raise UserError(
                    f"width {width} cannot narrow the {channels} channels of {name}, which stay "
                    f"a multiple of {plan.quanta.get(channels, unit)} for its groups; ask for a "
                    "smaller width"
                )
            if channels % unit:
                of = f"groups of {unit}" if plan.proportional else f"{unit} groups"
                raise UserError(
                    f"width {width} leaves {channels} channels in {name}, which {of} do not "
                    "divide; change the widths"
                )
        for name, module in self.model.named_modules():
            self._check_module(name, module, width)

    def _check_module(self, name: str, module: nn.Module, width: float) -> None:
        plan = self.plan
        if isinstance(module, Attention):
            inner, stream = plan.cuts[f"{name}.to_q"].outputs, plan.cuts[f"{name}.to_q"].inputs
            kept = plan.count(inner, width)
            # diffusers' added-key processor takes the stream's channels for its heads'.
            added = module.added_kv_proj_dim is not None
            if kept == inner.total or (added and kept != plan.count(stream, width)):
                raise UserError(
                    f"width {width} cannot narrow {name}: {module.heads} heads of "
                    f"{inner.total // module.heads} channels; change the widths"
                )
        if isinstance(module, _Resnets) and module.conv_shortcut is None:
            before = plan.count(plan.cuts[f"{name}.conv1"].inputs, width)
            after = plan.count(plan.cuts[f"{name}.conv2"].outputs, width)
            if before != after:
                raise UserError(
                    f"width {width} leaves {before} channels into {name} and {after} out of it, "
                    "which it adds; change the widths"
                )

    def parameter_count(self, width: float) -> int:
        """How many parameters `width` uses."""
        narrow = _narrow(self.model, self.plan, width, lambda weight: weight)
        return sum(weight.numel() for weight in narrow.parameters())

    @torch.no_grad()
    def subnet(self, width: float) -> DenseDiffusersUNet:
        """A dense network of its own, in eval mode: `net.subnet(w)(x, t) == net(x, t, w)`.

        Its `.model` is of the original's class, with contiguous copies of what `width` uses.
        """
        self.check_width(width)

        def own(weight: Tensor) -> nn.Parameter:
            copied = weight.detach().clone(memory_format=torch.contiguous_format)
            return nn.Parameter(copied, requires_grad=False)

        model = _narrow(self.model, self.plan, width, own)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        return DenseDiffusersUNet(model).eval()

    def settings_dict(self) -> dict:
        """What `from_settings` takes, as plain JSON-friendly values."""
        return {
            "kind": "diffusers",
            "class": self.settings.class_name,
            "config": self.settings.config,
            "T": self.settings.T,
            "norm_groups": self.settings.norm_groups,
        }

    @classmethod
    def from_settings(cls, settings: Mapping) -> SlimmableDiffusersUNet:
        """A network with fresh weights from `settings_dict()`'s values."""
        try:
            name, config, T = settings["class"], settings["config"], settings["T"]
            groups = settings.get("norm_groups", "fixed")
            if name not in CLASSES:
                raise UserError(f"a {name} is not one of {', '.join(CLASSES)}")
            return cls(getattr(diffusers, name).from_config(dict(config)), int(T), groups)
        except UserError:
            raise
        except Exception as error:  # whatever diffusers makes of odd values
            raise UserError(f"not the settings of a diffusers network: {error!r}") from error

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, T: int | None = None, norm_groups: str = "fixed"
    ) -> SlimmableDiffusersUNet:
        """Read a model folder, or a pipeline folder that holds one as unet/. Never downloads.

        T: trained timesteps; None asks the pipeline's scheduler, and takes 1000 where there is
        none. Raises UserError where the folder holds no such model in safetensors.
        """
        folder, root = Path(directory), Path(directory)
        if (folder / "unet").is_dir():
            folder = folder / "unet"
        elif folder.name == "unet":
            root = folder.parent
        name = _class_name(folder)
        _check_weights(folder, name)
        if T is None:
            scheduler = root / "scheduler" / "scheduler_config.json"
            T = (
                _read_json(scheduler).get("num_train_timesteps", 1000)
                if scheduler.exists()
                else 1000
            )
        try:
            model, info = getattr(diffusers, name).from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except Exception as error:  # whatever diffusers makes of odd values
            text = " ".join(str(error).split())[:200]
            raise UserError(f"cannot read the diffusers model in {folder}: {text}") from error
        if info["missing_keys"]:
            raise UserError(
                f"{folder}: the weights have no entry {sorted(info['missing_keys'])[0]}"
            )
        return cls(model.float(), int(T), norm_groups)

    def conditioning(self) -> list[str]:
        """What the model needs beside x and t."""
        needed = []
        if getattr(self.model, "class_embedding", None) is not None:
            needed.append("class_labels")
        if self.settings.class_name == "UNet2DConditionModel":
            needed.append("encoder_hidden_states")
        return needed

    def _check_conditioning(self, conditioning: Mapping[str, object]) -> None:
        for name in self.conditioning():
            if conditioning.get(name) is None:
                raise UserError(f"this {self.settings.class_name} needs {name} beside x and t")

    def _stand_ins(self, x: Tensor) -> dict[str, object]:
        """Conditioning without meaning, of the usual shapes."""
        config, made = self.settings.config, {}
        if getattr(self.model, "class_embedding", None) is not None:
            kind, width = (
                config["class_embed_type"],
                self.model.time_embedding.linear_2.out_features,
            )
            size = {
                "identity": width,
                "projection": config.get("projection_class_embeddings_input_dim"),
                "simple_projection": config.get("projection_class_embeddings_input_dim"),
            }.get(kind)
            labels = x.new_zeros(len(x), dtype=torch.long)
            made["class_labels"] = labels if size is None else x.new_zeros(len(x), size)
        if self.settings.class_name == "UNet2DConditionModel":
            size = config["encoder_hid_dim"] or config["cross_attention_dim"]
            size = size if isinstance(size, int) else size[0]
            made["encoder_hidden_states"] = x.new_zeros(len(x), TOKENS, size)
            if config["addition_embed_type"] == "text_time":
                times = 6 * config["addition_time_embed_dim"]
                pooled = config["projection_class_embeddings_input_dim"] - times
                made["added_cond_kwargs"] = {
                    "text_embeds": x.new_zeros(len(x), pooled),
                    "time_ids": x.new_zeros(len(x), 6),
                }
        return made


@dataclass(frozen=True)
class _Place:
    """Where a stream's channels lie in a layer: along `dim` of its weight, `parts` times."""

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


def _grouped_order(strength: Tensor, groups: int) -> Tensor:
    """Strongest groups first, and the strongest first inside each; groups stay together."""
    by_group = strength.unflatten(0, (groups, -1))
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    first = by_group.sum(1).argsort(descending=True, stable=True)
    return (first[:, None] * by_group.shape[1] + inside[first]).flatten()


@torch.no_grad()
def order_by_importance(net: SlimmableDiffusersUNet) -> None:
    """Reorder channels in place so that the important ones lead; width 1 computes the same.

    A channel's importance is the norm of the weights that make it times the norm of those that
    read it. Ordered are the inner channels of residual blocks, heads and the channels inside each,
    hidden layers, and the time embedding. The residual streams stay as they are: group norms over
    [h, skip] tie their channels to groups that no reordering keeps.
    """
    for module in net.model.modules():
        if isinstance(module, _Resnets):
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


def _order(makers: list[_Place], readers: list[_Place], groups: int = 1) -> None:
    strength = sum(p.strength() ** 2 for p in makers) * sum(p.strength() ** 2 for p in readers)
    order = _grouped_order(strength.sqrt(), groups)
    for place in makers + readers:
        place.permute(order)


def _order_resnet(block: nn.Module) -> None:
    maker, reader, norm = _Place(block.conv1), _Place(block.conv2, 1), block.norm2
    along = []
    strength = maker.strength() * reader.strength()
    if isinstance(norm, AdaGroupNorm):
        along.append(_Place(norm.linear, 0, 2))
    elif isinstance(norm, nn.GroupNorm):
        along.append(_Place(norm))
        strength = strength * norm.weight.abs()
    else:
        return
    projection = getattr(block, "time_emb_proj", None)
    if projection is not None:
        along.append(_Place(projection, 0, projection.out_features // len(strength)))
    order = _grouped_order(strength, norm.num_groups)
    for place in (maker, reader, *along):
        place.permute(order)


def _order_attention(attention: Attention) -> None:
    """Heads move whole; inside one, queries move with keys and values with what reads them."""

    def present(*layers: nn.Module | None) -> list[_Place]:
        return [_Place(layer) for layer in layers if layer is not None]

    queries = present(attention.to_q)
    keys = present(attention.to_k, attention.add_k_proj)
    values = present(attention.to_v, attention.add_v_proj)
    out = _Place(attention.to_out[0], 1)
    heads = attention.heads

    def channels(first: list[_Place], second: list[_Place]) -> Tensor:
        pair = sum(p.strength() ** 2 for p in first) * sum(p.strength() ** 2 for p in second)
        return pair.sqrt().unflatten(0, (heads, -1))  # (heads, channels of one)

    def moved(strength: Tensor) -> Tensor:
        inside = strength.argsort(dim=1, descending=True, stable=True)
        return (best[:, None] * strength.shape[1] + inside[best]).flatten()

    value, score = channels(values, [out]), channels(queries, keys)
    best = value.sum(1).argsort(descending=True, stable=True)
    if attention.norm_q is not None:  # its weights belong to the channels where they are
        score = torch.zeros_like(score)
    for places, strength in (([*queries, *keys], score), ([*values, out], value)):
        order = moved(strength)
        for place in places:
            place.permute(order)


def _order_time_embedding(model: ModelMixin) -> None:
    """Order what the residual blocks read of the timestep, where nothing else is added to it."""
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


def trained_diffusion(directory: str | Path) -> dict[str, object]:
    """What the scheduler beside a model says that the model was trained for: T, beta_1, beta_T,
    beta_schedule and mean_type; nothing where there is no scheduler.

    Raises UserError where that is no noise schedule of this project's.
    """
    root = Path(directory)
    root = root.parent if root.name == "unet" else root
    path = root / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {}
    config = _read_json(path)
    missing = [n for n in ("num_train_timesteps", "beta_start", "beta_end") if n not in config]
    if missing:
        raise UserError(f"{path} has no {missing[0]}: only models trained with β can be used")
    beta_schedule = config.get("beta_schedule", "linear")
    prediction = config.get("prediction_type", "epsilon")
    for name, value, known in (
        ("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        ("prediction_type", prediction, tuple(MEAN_TYPES)),
        ("trained_betas", config.get("trained_betas"), (None,)),
        ("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr", False), (False,)),
    ):
        if value not in known:
            names = " or ".join(map(str, known))
            raise UserError(f"{path}: {name} is {str(value)[:40]}; only {names} can be used")
    return {
        "T": config["num_train_timesteps"],
        "beta_1": config["beta_start"],
        "beta_T": config["beta_end"],
        "beta_schedule": beta_schedule,
        "mean_type": MEAN_TYPES[prediction],
    }


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings")
    return value


def _class_name(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{folder} is no diffusers model: it has no config.json; name a folder that "
            "save_pretrained wrote"
        )
    name = _read_json(config).get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{config} is for a {name}; only {' and '.join(CLASSES)} can be used")
    return name


def _check_weights(folder: Path, name: str) -> None:
    """Raise UserError unless the folder has safetensors, which execute nothing."""
    if any((folder / f"{WEIGHTS}.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights as a pickle (.bin), which could carry code, so it was not "
            f"read; if you trust it, convert it: diffusers.{name}.from_pretrained(DIR, "
            "use_safetensors=False).save_pretrained(DIR)"
        )
    raise UserError(
        f"{folder} has no {WEIGHTS}.safetensors; name a folder that save_pretrained wrote"
    )
