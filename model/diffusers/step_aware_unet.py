"""A step-aware diffusion network that diffusers' pipelines run: several dense candidate networks
and a schedule that names one of them for each timestep.

A copy of this file lies in every exported folder, so it imports only torch and diffusers. It does
not know how the networks were trained or narrowed: it rebuilds them from the shapes of their
weights, which are in the folder's config.json.

After Yang et al., "Denoising Diffusion Step-aware Models" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.resnet import (
    Downsample2D,
    ResnetBlock2D,
    ResnetBlockCondNorm2D,
    Upsample2D,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]
Groups = Mapping[str, int]  # by the name of the group norm


class Leading(nn.Module):
    """The first `count` entries of the last dimension."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.count]


def fit(module: nn.Module) -> None:
    """Set the sizes that a module stores beside its weights to the shapes of those weights."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, (Downsample2D, Upsample2D)):
        convolution = module.conv if hasattr(module, "conv") else module.Conv2d_0
        if isinstance(convolution, nn.Conv2d):
            module.out_channels, module.channels = convolution.weight.shape[:2]
    elif isinstance(module, (ResnetBlock2D, ResnetBlockCondNorm2D)):
        module.in_channels = module.conv1.weight.shape[1]
        module.out_channels = module.conv2.weight.shape[0]
        # Samplers without weights check how many channels they get from the block.
        for sampler in (module.upsample, module.downsample):
            if isinstance(sampler, (Downsample2D, Upsample2D)):
                sampler.channels = sampler.out_channels = module.in_channels


def set_heads(attention: Attention, heads: int) -> None:
    """Set the number of heads of an attention layer whose projections were narrowed."""
    attention.heads = attention.sliceable_head_dim = heads
    attention.inner_dim = attention.inner_kv_dim = attention.to_q.weight.shape[0]
    if attention.scale_qk:
        attention.scale = (attention.inner_dim // heads) ** -0.5


def fit_classes(model: nn.Module) -> None:
    """Cut class embeddings that come from outside to the time embedding of a narrowed model."""
    if isinstance(getattr(model, "class_embedding", None), nn.Identity):
        model.class_embedding = Leading(len(model.time_embedding.linear_2.weight))


def _rebuild(spec: Mapping) -> nn.Module:
    """A diffusers model of spec's class and config, narrowed to its shapes.

    heads: attention layer -> its number of heads. num_groups: group norm -> its number of groups.
    """
    if spec["class"] not in ("UNet2DModel", "UNet2DConditionModel"):
        raise ValueError(f"unknown network class {spec['class']}")
    model = getattr(diffusers, spec["class"]).from_config(dict(spec["config"]))
    for name, module in model.named_modules():
        for entry, parameter in list(module._parameters.items()):
            shape = spec["shapes"].get(f"{name}.{entry}")
            if parameter is not None and shape is not None and list(parameter.shape) != shape:
                module.register_parameter(entry, nn.Parameter(parameter.new_empty(shape)))
    for module in model.modules():
        fit(module)
    for name, count in spec["heads"].items():
        set_heads(model.get_submodule(name), count)
    for name, count in spec["num_groups"].items():
        model.get_submodule(name).num_groups = count
    fit_classes(model)
    return model


def _conv(shapes: Shapes, name: str, stride: int = 1) -> nn.Conv2d:
    out, inputs, kernel, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(inputs, out, kernel, stride=stride, padding=kernel // 2)


def _norm(shapes: Shapes, name: str, groups: Groups) -> nn.GroupNorm:
    return nn.GroupNorm(groups[name], shapes[f"{name}.weight"][0])


class _TimeTable(nn.Module):
    """t (B,) long -> (B, C): a block's time embedding, stored for each trained timestep."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(*shape))

    def forward(self, t: Tensor) -> Tensor:
        return self.table[t]


class _AllBlocks(nn.Module):
    """t (B,), labels (B,) -> what every block adds for timestep and class, side by side (B, ΣC).

    The last class, which None stands for, says nothing of the image.
    """

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for part in ("time", "classes", "weight", "bias"):
            self.register_buffer(part, torch.zeros(*shapes[f"{name}.{part}"]))

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        added = self.classes[-1] if labels is None else self.classes[labels]
        return F.linear(F.silu(self.time[t] + added), self.weight, self.bias)


class _Part(nn.Module):
    """One block's columns of what _AllBlocks makes."""

    def __init__(self, start: int, count: int) -> None:
        super().__init__()
        self.start, self.count = start, count

    def forward(self, added: Tensor) -> Tensor:
        return added[:, self.start : self.start + self.count]


class _Attention(nn.Module):
    """One head over all pixels, (B, C, H, W) -> the same, with a residual connection."""

    def __init__(self, shapes: Shapes, name: str, groups: Groups) -> None:
        super().__init__()
        self.group_norm = _norm(shapes, f"{name}.group_norm", groups)
        self.proj_q = _conv(shapes, f"{name}.proj_q")
        self.proj_k = _conv(shapes, f"{name}.proj_k")
        self.proj_v = _conv(shapes, f"{name}.proj_v")
        self.proj = _conv(shapes, f"{name}.proj")

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (
            proj(h).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, C)
            for proj in (self.proj_q, self.proj_k, self.proj_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class _Block(nn.Module):
    """(B, in, H, W), t (B,) -> (B, out, H, W); of a network with classes, _AllBlocks' result
    instead of t, in which this block's columns begin at `start`."""

    # Not asked by isinstance: diffusers runs this file anew for each model that it loads.
    takes_skip = True

    def __init__(self, shapes: Shapes, name: str, groups: Groups, start: int) -> None:
        super().__init__()
        self.block1 = nn.Sequential(
            _norm(shapes, f"{name}.block1.0", groups),
            nn.SiLU(),
            _conv(shapes, f"{name}.block1.2"),
        )
        table = shapes.get(f"{name}.temb_proj.table")
        self.added = self.block1[2].out_channels
        self.temb_proj = _TimeTable(table) if table else _Part(start, self.added)
        self.block2 = nn.Sequential(
            _norm(shapes, f"{name}.block2.0", groups),
            nn.SiLU(),
            nn.Identity(),  # where dropout was
            _conv(shapes, f"{name}.block2.3"),
        )
        projects, attends = (
            f"{name}.{part}.weight" in shapes for part in ("shortcut", "attn.proj")
        )
        self.shortcut = _conv(shapes, f"{name}.shortcut") if projects else nn.Identity()
        self.attn = _Attention(shapes, f"{name}.attn", groups) if attends else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(t)[:, :, None, None]
        return self.attn(self.block2(h) + self.shortcut(x))


class _Resample(nn.Module):
    """Halves or doubles H and W."""

    takes_skip = False

    def __init__(self, shapes: Shapes, name: str, double: bool) -> None:
        super().__init__()
        self.main, self.double = _conv(shapes, f"{name}.main", 1 if double else 2), double

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest") if self.double else x)


class DenseUNet(nn.Module):
    """The published DDSM network at one width: x (B, C, H, W), t (B,) -> like x.

    Timesteps are rounded to trained ones. class_labels (B,): of a network with classes.
    """

    def __init__(self, shapes: Shapes, num_groups: Groups) -> None:
        super().__init__()
        start = 0

        def layers(part: str) -> nn.ModuleList:
            nonlocal start
            found = nn.ModuleList()
            count = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith(f"{part}."))
            for name in (f"{part}.{i}" for i in range(count)):
                if f"{name}.main.weight" in shapes:
                    found.append(_Resample(shapes, name, double=part == "upblocks"))
                else:
                    found.append(_Block(shapes, name, num_groups, start))
                    start += found[-1].added
            return found

        self.head = _conv(shapes, "head")
        self.downblocks = layers("downblocks")
        self.middleblocks = layers("middleblocks")
        self.upblocks = layers("upblocks")
        self.tail = nn.Sequential(
            _norm(shapes, "tail.0", num_groups), nn.SiLU(), _conv(shapes, "tail.2")
        )
        classes = "class_embedding.time" in shapes
        self.class_embedding = _AllBlocks(shapes, "class_embedding") if classes else None
        tables = (".table", "class_embedding.time")
        self.T = next(shape[0] for name, shape in shapes.items() if name.endswith(tables))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        t = t.round().long().clamp(0, self.T - 1)
        if self.class_embedding is not None:
            t = self.class_embedding(t, class_labels)
        h = self.head(x)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h, t)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h, t)
        for layer in self.upblocks:
            h = layer(torch.cat([h, skips.pop()], 1) if layer.takes_skip else h, t)
        return self.tail(h)


def build(spec: Mapping) -> nn.Module:
    """The network that an entry of `networks` in config.json describes; weights are not set."""
    own = spec["kind"] == "ddsm"
    return DenseUNet(spec["shapes"], spec["num_groups"]) if own else _rebuild(spec)


def key(width: float) -> str:
    """The name of a width's network; a module's name cannot contain a dot."""
    return f"width_{width:g}".replace(".", "_")


class StepAwareUNet(ModelMixin, ConfigMixin, CacheMixin):
    """Candidate networks and the width schedule that names one of them for each timestep.

    networks: `key(width)` -> the argument of `build`. schedule: one width for each of `timesteps`,
    which are in rising order; without `timesteps`, entry t is for timestep t. Any other timestep,
    as samplers with other spacings or float timesteps use, takes the width of the nearest one.
    sampling: how pipeline.py runs the chain that the schedule was searched for. embeddings_shape:
    (N, L, D) of the encoder_hidden_states that lie beside the weights; where a call gives none, its
    class_labels are rows of these, and without labels all images are shown the first.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int],
        in_channels: int,
        out_channels: int,
        networks: dict,
        schedule: list[float],
        timesteps: list[int] | None = None,
        sampling: dict | None = None,
        embeddings_shape: list[int] | None = None,
    ) -> None:
        super().__init__()
        shown = torch.zeros(*embeddings_shape) if embeddings_shape else None
        self.register_buffer("embeddings", shown)
        self.candidates = nn.ModuleDict({name: build(spec) for name, spec in networks.items()})

    def width(self, timestep: float) -> float:
        """The schedule's width for the trained timestep nearest to this one."""
        timesteps, schedule = self.config.timesteps, self.config.schedule
        if timesteps is None:
            return schedule[min(max(round(timestep), 0), len(schedule) - 1)]
        return schedule[min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        return_dict: bool = True,
        width: float | None = None,
        **conditioning: object,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample (B, C, H, W), timestep a number or (B,) -> a prediction like sample.

        width: where it is not the schedule's at this timestep. conditioning: further inputs of a
        conditional network.
        """
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        if width is None:
            widths = {self.width(value) for value in t.unique().tolist()}
            if len(widths) > 1:
                raise ValueError(f"one batch has timesteps of several widths: {sorted(widths)}")
            (width,) = widths
        if self.embeddings is not None and "encoder_hidden_states" not in conditioning:
            rows = conditioning.pop("class_labels", None)
            rows = torch.zeros(len(sample), dtype=torch.long) if rows is None else rows
            conditioning["encoder_hidden_states"] = self.embeddings[rows]
        output = self.candidates[key(width)](sample, t, **conditioning)
        output = output if isinstance(output, Tensor) else output.sample
        return UNet2DOutput(sample=output) if return_dict else (output,)
