"""The slimmable UNet: how the layers are wired. Names and arithmetic are those of the published
network, so that its checkpoints load and give the same numbers.

The network of Ho et al., "Denoising Diffusion Probabilistic Models" (2020), made slimmable as in
Yang et al., "Denoising Diffusion Step-aware Models" (ICLR 2024).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.slimmable import (
    Channels,
    Slimmable,
    SlimmableConv2d,
    SlimmableGroupNorm,
    SlimmableLinear,
    SlimmableSequential,
)
from runtime import memory
from runtime.errors import UserError
from runtime.identity import plain
from settings import DiffusionSettings, NetworkSettings

Norm = Callable[[Channels], SlimmableGroupNorm]


MODULES = 2**14  # bytes that the objects of a residual block take, at least


@dataclass(frozen=True, kw_only=True)
class UNetSettings(NetworkSettings):
    """What defines a network. Kept in every checkpoint.

    T: timesteps. in_ch: image channels. The others: see NetworkSettings.
    """

    T: int = DiffusionSettings.T
    in_ch: int = 3

    def check(self) -> None:
        for name in ("T", "in_ch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if not self.ch_mult:
            raise UserError("--ch_mult: a network has at least one level")
        if len(self.ch_mult) > 32:
            raise UserError(f"--ch_mult: {len(self.ch_mult)} levels; at most 32 can be")
        outside = [level for level in self.attn if level >= len(self.ch_mult)]
        if outside:
            raise UserError(f"--attn={outside[0]}: levels are 0 to {len(self.ch_mult) - 1}")
        for channels in (self.ch, *(self.ch * mult for mult in self.ch_mult)):
            if channels % self.num_groups:
                raise UserError(
                    f"a level of {channels} channels does not fall into "
                    f"--num_groups={self.num_groups} groups; change --num_groups, --ch or --ch_mult"
                )

    def check_memory(self) -> None:
        """Raise UserError where this machine cannot hold the weights: no more than they take."""
        size = (24 * self.T + 16 * self.num_classes) * self.ch  # the sinusoids in the making
        for mult in self.ch_mult:
            convolution = 9 * 4 * (self.ch * mult) ** 2
            size += (2 * self.num_res_blocks + 1) * (convolution + MODULES)
        flags = "--T, --ch, --ch_mult, --num_res_blocks or --num_classes"
        memory.require(size, "a network of these settings", f"lower {flags}")

    def check_image_size(self, size: int) -> None:
        """Raise UserError where the levels cannot halve an image of `size` pixels a side."""
        check_image_size(size, len(self.ch_mult), " or fewer levels in --ch_mult")


def check_image_size(size: int, levels: int, remedy: str = "") -> None:
    """Raise UserError where so many levels cannot halve an image of `size` pixels a side. remedy:
    what else helps."""
    halvings = levels - 1
    if size < 1 or size % 2**halvings:
        raise UserError(
            f"--img_size={size}: {levels} levels halve the image {halvings} times; "
            f"use a multiple of {2**halvings}{remedy}"
        )


def sinusoids(T: int, ch: int) -> Tensor:
    """The table [T, ch] of Vaswani et al. with sine and cosine in turn: entry (p, 2i) is
    sin(p·e^(−ln(10000)·2i/ch)), entry (p, 2i+1) its cosine."""
    frequency = torch.exp(torch.arange(0, ch, 2, dtype=torch.float64) * (-math.log(10000) / ch))
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :ch].float()


def _initialise(module: nn.Module, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(module.weight, gain=gain)
    nn.init.zeros_(module.bias)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, r(4·ch·width)): a frozen sinusoid table and a two-layer perceptron."""

    def __init__(self, T: int, ch: int) -> None:
        super().__init__()
        hidden = Channels((4 * ch,), divisor=16)
        self.timembedding = SlimmableSequential(
            nn.Embedding.from_pretrained(sinusoids(T, ch)),
            SlimmableLinear(Channels((ch,), divisor=None), hidden),
            nn.SiLU(),
            SlimmableLinear(hidden, hidden),
        )
        _initialise(self.timembedding[1])
        _initialise(self.timembedding[3])

    def forward(self, t: Tensor, width: float) -> Tensor:
        return self.timembedding(t, width)


class ClassEmbedding(Slimmable, nn.Embedding):
    """Adds what a class means to the time embedding: (B, C), labels (B,) -> (B, C).

    Label `classes` is the null class, which says nothing of the image; None is that for all.
    Narrow versions are the leading columns, as those of the time embedding's outputs.
    """

    def __init__(self, classes: int, ch: int) -> None:
        nn.Embedding.__init__(self, classes + 1, 4 * ch)
        self.outputs = Channels((4 * ch,), divisor=16)
        # Share of each class in the training set: which classes a score's images should have.
        self.register_buffer("frequencies", torch.full((classes,), 1 / classes))
        nn.init.xavier_uniform_(self.weight)

    def slice(self, width: float) -> tuple[Tensor]:
        """The table (classes + 1, C) at `width`."""
        return (self.outputs.take(self.weight, width, dim=1),)

    def forward(self, temb: Tensor, labels: Tensor | None, width: float) -> Tensor:
        (table,) = self.slice(width)
        return temb + (table[-1] if labels is None else table[labels])


class _AllBlocks(nn.Module):
    """Stands for the class embedding in a subnet: t (B,), labels (B,) -> what every block adds,
    side by side, (B, ΣC).

    A table of that for each t and class would be too large, so the embeddings are kept as tables
    and the blocks' layers as one: time (T, D), classes (N + 1, D), weight (ΣC, D), bias (ΣC,).
    """

    def __init__(self, time: Tensor, classes: Tensor, layers: Sequence[tuple]) -> None:
        super().__init__()
        self.register_buffer("time", time)
        self.register_buffer("classes", classes)
        self.register_buffer("weight", torch.cat([weight for weight, _ in layers]))
        self.register_buffer("bias", torch.cat([bias for _, bias in layers]))

    def forward(self, t: Tensor, labels: Tensor | None, width: float) -> Tensor:
        added = self.classes[-1] if labels is None else self.classes[labels]
        return F.linear(F.silu(self.time[t] + added), self.weight, self.bias)


class _Part(nn.Module):
    """One block's columns of what _AllBlocks makes."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.columns = slice(start, stop)

    def forward(self, added: Tensor, width: float) -> Tensor:
        return added[:, self.columns]


class _AsGiven(nn.Module):
    """Stands for the time embedding in a subnet: its blocks look timesteps up themselves."""

    def forward(self, t: Tensor, width: float) -> Tensor:
        return t


class _TimeTable(nn.Module):
    """t (B,) -> (B, C): what a block adds at each of the T timesteps, computed once."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, t: Tensor, width: float) -> Tensor:
        return self.table[t]


class Attention(nn.Module):
    """One head over all pixels, (B, C, H, W) -> the same, with a residual connection."""

    def __init__(self, ch: int, norm: Norm) -> None:
        super().__init__()
        outer, inner = Channels((ch,)), Channels((ch,), divisor=1)
        self.group_norm = norm(outer)
        self.proj_q = SlimmableConv2d(outer, inner, 1)
        self.proj_k = SlimmableConv2d(outer, inner, 1)
        self.proj_v = SlimmableConv2d(outer, inner, 1)
        self.proj = SlimmableConv2d(inner, outer, 1)
        for layer in (self.proj_q, self.proj_k, self.proj_v):
            _initialise(layer)
        _initialise(self.proj, gain=1e-5)

    def attend(self, x: Tensor, width: float) -> Tensor:
        """What each pixel takes from all, before it is projected and added."""
        h = self.group_norm(x, width)
        q, k, v = (
            proj(h, width).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, C)
            for proj in (self.proj_q, self.proj_k, self.proj_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # scaled by the sliced C
        return h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)

    def forward(self, x: Tensor, width: float) -> Tensor:
        return self.proj(self.attend(x, width), width) + x  # a sum is laid out as its first term


class ResBlock(nn.Module):
    """(B, in, H, W), time embedding (B, tdim) -> (B, out, H, W)."""

    def __init__(
        self, inputs: Channels, out_ch: int, tdim: int, dropout: float, attn: bool, norm: Norm
    ) -> None:
        super().__init__()
        outputs = Channels((out_ch,))
        self.block1 = SlimmableSequential(
            norm(inputs), nn.SiLU(), SlimmableConv2d(inputs, outputs, 3)
        )
        # It is added to the convolution's output, so the convolution's rounding counts.
        self.temb_proj = SlimmableSequential(
            nn.SiLU(), SlimmableLinear(Channels((tdim,), divisor=16), outputs)
        )
        self.block2 = SlimmableSequential(
            norm(outputs),
            nn.SiLU(),
            nn.Dropout(dropout),
            SlimmableConv2d(outputs, outputs, 3),
        )
        self.shortcut = (
            SlimmableConv2d(inputs, outputs, 1) if inputs.total != out_ch else SlimmableSequential()
        )
        self.attn = Attention(out_ch, norm) if attn else SlimmableSequential()
        _initialise(self.block1[2])
        _initialise(self.temb_proj[1])
        _initialise(self.block2[3], gain=1e-5)
        if inputs.total != out_ch:
            _initialise(self.shortcut)

    def forward(self, x: Tensor, temb: Tensor, width: float) -> Tensor:
        h = self.block1(x, width)
        h = h + self.temb_proj(temb, width)[:, :, None, None]
        h = self.block2(h, width) + self.shortcut(x, width)
        return self.attn(h, width)


class DownSample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.main = SlimmableConv2d(Channels((ch,)), Channels((ch,)), 3, stride=2)
        _initialise(self.main)

    def forward(self, x: Tensor, temb: Tensor, width: float) -> Tensor:
        return self.main(x, width)


class UpSample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.main = SlimmableConv2d(Channels((ch,)), Channels((ch,)), 3)
        _initialise(self.main)

    def forward(self, x: Tensor, temb: Tensor, width: float) -> Tensor:
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"), width)


class SlimmableUNet(nn.Module):
    """The supernet: `net(x, t, width)` predicts with the leading `width` of every layer.

    x (B, in_ch, H, W) float, t (B,) long in [0, T) -> (B, in_ch, H, W), H and W multiples of
    2^(levels − 1). labels (B,) long in [0, num_classes], the last of which is the null class, where
    the network has classes; None is the null class for all. See UNetSettings for the arguments.
    """

    def __init__(
        self,
        T: int,
        ch: int,
        ch_mult: Sequence[int],
        attn: Sequence[int],
        num_res_blocks: int,
        dropout: float,
        num_groups: int = NetworkSettings.num_groups,
        in_ch: int = 3,
        skip_slicing: str = NetworkSettings.skip_slicing,
        num_classes: int = NetworkSettings.num_classes,
        norm_groups: str = NetworkSettings.norm_groups,
    ) -> None:
        super().__init__()
        self.settings = s = UNetSettings(
            T=T, ch=ch, ch_mult=tuple(ch_mult), attn=tuple(attn), num_res_blocks=num_res_blocks,
            dropout=dropout, num_groups=num_groups, in_ch=in_ch, skip_slicing=skip_slicing,
            num_classes=num_classes, norm_groups=norm_groups,
        )  # fmt: skip
        s.check_memory()
        norm = functools.partial(
            SlimmableGroupNorm, num_groups, proportional=norm_groups == "proportional"
        )
        image = Channels((in_ch,), divisor=None)

        def block(blocks: tuple[int, ...], out: int, attention: bool) -> ResBlock:
            inputs = Channels(blocks, apart=s.skip_slicing == "segments")
            return ResBlock(inputs, out, 4 * ch, s.dropout, attention, norm)

        self.time_embedding = TimeEmbedding(T, ch)
        self.head = SlimmableConv2d(image, Channels((ch,)), 3)
        _initialise(self.head)

        now, skips = ch, [ch]
        self.downblocks = nn.ModuleList()
        for level, mult in enumerate(s.ch_mult):
            for _ in range(s.num_res_blocks):
                self.downblocks.append(block((now,), ch * mult, level in s.attn))
                now = ch * mult
                skips.append(now)
            if level != len(s.ch_mult) - 1:
                self.downblocks.append(DownSample(now))
                skips.append(now)

        self.middleblocks = nn.ModuleList([block((now,), now, True), block((now,), now, False)])

        self.upblocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(s.ch_mult))):
            for _ in range(s.num_res_blocks + 1):
                self.upblocks.append(block((now, skips.pop()), ch * mult, level in s.attn))
                now = ch * mult
            if level != 0:
                self.upblocks.append(UpSample(now))

        self.tail = SlimmableSequential(
            norm(Channels((now,))),
            nn.SiLU(),
            SlimmableConv2d(Channels((now,)), image, 3),
        )
        _initialise(self.tail[2], gain=1e-5)
        # Last, so that the other weights are drawn as they are without classes.
        if num_classes:
            self.class_embedding = ClassEmbedding(num_classes, ch)

    def forward(
        self, x: Tensor, t: Tensor, width: float = 1.0, labels: Tensor | None = None
    ) -> Tensor:
        temb = self.time_embedding(t, width)
        if self.settings.num_classes:
            temb = self.class_embedding(temb, labels, width)
        h = self.head(x, width)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h, temb, width)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h, temb, width)
        for layer in self.upblocks:
            if isinstance(layer, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, temb, width)
        return self.tail(h, width)

    def check_width(self, width: float) -> None:
        """Raise UserError where `width` is no width, or its channels do not fall into groups."""
        if not 0 < width <= 1:
            raise UserError(f"width {width}: a width must be in (0, 1]")
        for name, layer in self.named_modules():
            if isinstance(layer, SlimmableGroupNorm):
                try:
                    layer.groups(width)
                except UserError as error:
                    raise UserError(
                        f"width {width} leaves in {name}: {error}; change --num_groups, --ch or "
                        "the widths"
                    ) from error

    def parameter_count(self, width: float) -> int:
        """How many parameters `width` uses, the frozen time table included."""
        sliced = [m for m in self.modules() if hasattr(m, "slice")]
        table = self.time_embedding.timembedding[0].weight.numel()
        return table + sum(part.numel() for m in sliced for part in m.slice(width))

    @torch.no_grad()
    def subnet(self, width: float) -> SlimmableUNet:
        """A dense network of its own, in eval mode: `net.subnet(w)(x, t) == net(x, t, w)`.

        Holds contiguous copies of what `width` uses; what each block adds for the timestep is
        computed here once, for all T, where there are no classes.
        """
        self.check_width(width)
        everywhen = torch.arange(self.settings.T, device=self.head.weight.device)
        temb = self.time_embedding(everywhen, width)
        # What deepcopy finds in this table it takes from there instead of copying.
        copies: dict[int, nn.Module] = {id(self.time_embedding): _AsGiven()}
        if self.settings.num_classes:
            copies |= self._embeddings(temb, width)
        for module in self.modules():
            if isinstance(module, ResBlock) and not self.settings.num_classes:
                copies[id(module.temb_proj)] = _TimeTable(module.temb_proj(temb, width))
            elif isinstance(module, (SlimmableConv2d, SlimmableGroupNorm)):
                copies[id(module)] = module.cut(width)
        return copy.deepcopy(self, copies).eval().requires_grad_(False)

    def _embeddings(self, temb: Tensor, width: float) -> dict[int, nn.Module]:
        """What stands in a subnet for the class embedding and for each block's time projection."""
        blocks = [m for m in self.modules() if isinstance(m, ResBlock)]
        layers = [block.temb_proj[1].slice(width) for block in blocks]
        (classes,) = self.class_embedding.slice(width)
        found: dict[int, nn.Module] = {
            id(self.class_embedding): _AllBlocks(temb, classes.clone(), layers)
        }
        start = 0
        for block, (weight, _) in zip(blocks, layers, strict=True):
            found[id(block.temb_proj)] = _Part(start, start + len(weight))
            start += len(weight)
        return found

    def settings_dict(self) -> dict:
        """The settings as plain JSON-friendly values."""
        return plain(asdict(self.settings))
