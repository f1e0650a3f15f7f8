"""Any UNet2DModel or UNet2DConditionModel of diffusers as a slimmable supernet.

This file knows the network and its settings. A width runs diffusers' own forward on a shallow copy
of the model whose layers hold slices of the weights, as plan.py says. The copy exists for one call,
so a width is never state: threads, replicas and gradient checkpointing are safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from model.diffusers.loading import build, check_class, config_of
from model.diffusers.plan import RESNETS, Planner, narrow
from model.unet import check_image_size
from runtime.errors import UserError

CHANGE = "change --candidate_width or --min_width"


@dataclass(frozen=True)
class DiffusersSettings:
    """What defines a network. T: trained timesteps.

    config: the model's as diffusers stores it. norm_groups: see UNetSettings. num_classes: 0 where
    there are none. null_class: whether the model that it was made from had one. embeddings: the
    shape of those that it is shown, where it is shown any; null_class is of their last row then.
    """

    T: int
    class_name: str
    config: dict = field(hash=False)
    norm_groups: str = "fixed"
    num_classes: int = 0
    null_class: bool = True
    embeddings: tuple[int, ...] = ()

    @property
    def in_ch(self) -> int:
        """Image channels."""
        return self.config["in_channels"]

    def check_image_size(self, size: int) -> None:
        """Raise UserError where the levels cannot halve an image of `size` pixels a side."""
        check_image_size(size, len(self.config["block_out_channels"]))


class DenseDiffusersUNet(nn.Module):
    """A diffusers model, `.model`, called as a network of this project: (x, t) -> a tensor.

    num_classes, embeddings: see SlimmableDiffusersUNet.
    """

    def __init__(
        self, model: ModelMixin, num_classes: int = 0, embeddings: Tensor | None = None
    ) -> None:
        super().__init__()
        check_class(type(model).__name__, "a supernet")
        self.model, self.num_classes = model, num_classes
        self.register_buffer("embeddings", embeddings)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, **conditioning: object
    ) -> Tensor:
        told = _told(x, labels, self.num_classes, self.embeddings) | conditioning
        return self.model(x, t, return_dict=False, **told)[0]


def _told(
    x: Tensor, labels: Tensor | None, num_classes: int, embeddings: Tensor | None
) -> dict[str, object]:
    """What labels (B,) stand for: rows of the embeddings, None being the first, or classes, None
    being the null class; nothing where there are neither."""
    if embeddings is not None:
        rows = embeddings[:1].expand(len(x), -1, -1) if labels is None else embeddings[labels]
        return {"encoder_hidden_states": rows}
    if not num_classes:
        return {}
    if labels is None:
        labels = torch.full((len(x),), num_classes, device=x.device)
    return {"class_labels": labels}


class _Frequencies(nn.Module):
    """Share of each class in the training set, where a ClassEmbedding has it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.full((num_classes,), 1 / num_classes))


def _set_null_class(model: ModelMixin, num_classes: int) -> bool:
    """See that row `num_classes` of the class embedding is the null class; whether it was there.

    A row that is added is the mean of the classes, which training with --label_dropout improves on.
    """
    embedding = getattr(model, "class_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"--num_classes={num_classes}: the model has no classes; leave it out")
    rows = embedding.num_embeddings
    if num_classes == rows - 1:
        return True
    if num_classes != rows:
        raise UserError(
            f"--num_classes={num_classes}: the model has embeddings of {rows} classes: give "
            f"{rows}, or {rows - 1} if the last one stands for images without a class"
        )
    with torch.no_grad():
        weight = torch.cat([embedding.weight, embedding.weight.mean(0, keepdim=True)])
    model.class_embedding = nn.Embedding(*weight.shape, _weight=weight)
    model.register_to_config(num_class_embeds=rows + 1)
    return False


class SlimmableDiffusersUNet(nn.Module):
    """The supernet: `net(x, t, width)` predicts with the leading `width` of every stream.

    model: a UNet2DModel or UNet2DConditionModel, which the supernet takes over. T: the timesteps it
    was trained with. norm_groups: see UNetSettings; width 1 is the same with both.
    x (B, in_ch, H, W), t (B,) -> (B, out_ch, H, W). Raises UserError where a layer is of a kind
    that cannot be narrowed. num_classes: makes a model with a class embedding a class-conditional
    network, called with labels (B,) in [0, num_classes]. The last of these, like None, is the null
    class, which guidance needs: the embedding's last row if it has num_classes + 1, or a new one.
    After `set_embeddings` labels are rows of those.
    """

    def __init__(
        self, model: ModelMixin, T: int = 1000, norm_groups: str = "fixed", num_classes: int = 0
    ) -> None:
        super().__init__()
        check_class(type(model).__name__, "a supernet")
        self.model = model
        null_class = _set_null_class(model, num_classes) if num_classes else True
        self.plan = Planner(model, norm_groups == "proportional")()
        self.settings = DiffusersSettings(
            T=T,
            class_name=type(model).__name__,
            config=config_of(model),
            norm_groups=norm_groups,
            num_classes=num_classes,
            null_class=null_class,
        )
        if num_classes:
            self.class_embedding = _Frequencies(num_classes)
        self.register_buffer("embeddings", None)

    def set_embeddings(self, embeddings: Tensor, null: bool) -> None:
        """Show the network these encoder_hidden_states (N, L, D) where it is given no others; the
        last row is that which says nothing, if `null`."""
        self.embeddings = embeddings
        shape = tuple(embeddings.shape)
        self.settings = replace(self.settings, embeddings=shape, null_class=null)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        width: float = 1.0,
        labels: Tensor | None = None,
        **conditioning: object,
    ) -> Tensor:
        """conditioning: class_labels, encoder_hidden_states, … as the model takes them."""
        told = _told(x, labels, self.settings.num_classes, self.embeddings) | conditioning
        for name in self.conditioning():
            if told.get(name) is None:
                raise UserError(f"this {self.settings.class_name} needs {name} beside x and t")
        model = self.model if width == 1 else narrow(self.model, self.plan, width, lambda w: w)
        return model(x, t, return_dict=False, **told)[0]

    def check_width(self, width: float) -> None:
        """Raise UserError naming the first layer that `width` cannot narrow, or would break."""
        if not 0 < width <= 1:
            raise UserError(f"width {width}: a width must be in (0, 1]")
        if width == 1:
            return
        plan = self.plan
        for name, groups, side in plan.norms:
            channels, divisor = plan.count(side, width), plan.norm_divisor(groups, side)
            if channels == side.total:
                raise UserError(
                    f"width {width} cannot narrow the {channels} channels of {name}: for its "
                    f"groups they must be a multiple of {plan.multiples.get(channels, divisor)}; "
                    f"{self._remedy()}"
                )
            if channels % divisor:
                of = f"groups of {divisor}" if plan.proportional else f"{divisor} groups"
                raise UserError(
                    f"width {width} leaves {channels} channels in {name}, which cannot be "
                    f"divided into {of}; {self._remedy()}"
                )
        for name, module in self.model.named_modules():
            self._check_module(name, module, width)

    def _remedy(self) -> str:
        """What to do where group norms do not allow a width."""
        limit, choices = self.plan.largest_narrow_width(), []
        if limit > 0:
            choices.append(f"{CHANGE} (at most {math.floor(1000 * limit) / 1000:g})")
        if not self.plan.proportional:
            choices.append("use --norm_groups=proportional, which narrows to whole groups")
        return ", or ".join(choices) or "this model cannot be narrowed"

    def _check_module(self, name: str, module: nn.Module, width: float) -> None:
        plan = self.plan
        if isinstance(module, Attention):
            inner, stream = plan.cuts[f"{name}.to_q"].outputs, plan.cuts[f"{name}.to_q"].inputs
            channels = plan.count(inner, width)
            # diffusers' added-key processor takes the stream's channels for its heads'.
            added = module.added_kv_proj_dim is not None
            if channels == inner.total or (added and channels != plan.count(stream, width)):
                raise UserError(
                    f"width {width} cannot narrow {name}: {module.heads} heads of "
                    f"{inner.total // module.heads} channels; {CHANGE}"
                )
        if isinstance(module, RESNETS) and module.conv_shortcut is None:
            before = plan.count(plan.cuts[f"{name}.conv1"].inputs, width)
            after = plan.count(plan.cuts[f"{name}.conv2"].outputs, width)
            if before != after:
                raise UserError(
                    f"width {width} leaves {before} channels into {name} and {after} out of it, "
                    f"which it adds; {CHANGE}"
                )

    def parameter_count(self, width: float) -> int:
        """The number of parameters that `width` uses."""
        model = narrow(self.model, self.plan, width, lambda weight: weight)
        return sum(weight.numel() for weight in model.parameters())

    @torch.no_grad()
    def subnet(self, width: float) -> DenseDiffusersUNet:
        """A dense network of its own, in eval mode: `net.subnet(w)(x, t) == net(x, t, w)`.

        Its `.model` is of the original's class, with contiguous copies of what `width` uses.
        """
        self.check_width(width)

        def own(weight: Tensor) -> nn.Parameter:
            copy = weight.detach().clone(memory_format=torch.contiguous_format)
            return nn.Parameter(copy, requires_grad=False)

        model = narrow(self.model, self.plan, width, own)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        rows = None if self.embeddings is None else self.embeddings.clone()
        return DenseDiffusersUNet(model, self.settings.num_classes, rows).eval()

    def settings_dict(self) -> dict:
        """What `from_settings` takes, as plain JSON-friendly values."""
        s = self.settings
        values = {
            "kind": "diffusers",
            "class": s.class_name,
            "config": s.config,
            "T": s.T,
            "norm_groups": s.norm_groups,
        }
        if s.num_classes:
            values |= {"num_classes": s.num_classes, "null_class": s.null_class}
        if s.embeddings:
            values |= {"embeddings": list(s.embeddings), "null_class": s.null_class}
        return values

    @classmethod
    def from_settings(cls, settings: Mapping) -> SlimmableDiffusersUNet:
        """A network with fresh weights from `settings_dict()`'s values."""
        try:
            net = cls(
                build(settings["class"], settings["config"], "the settings of a diffusers network"),
                int(settings["T"]),
                settings.get("norm_groups", "fixed"),
                int(settings.get("num_classes", 0)),
            )
            null_class = bool(settings.get("null_class", True))
            net.settings = replace(net.settings, null_class=null_class)
            if shape := settings.get("embeddings"):
                net.set_embeddings(torch.zeros(*map(int, shape)), null_class)
            return net
        except UserError:
            raise
        except Exception as error:  # diffusers raises many kinds for values that it does not know
            raise UserError(f"not the settings of a diffusers network: {error!r}") from error

    def conditioning(self) -> list[str]:
        """Names of the inputs that the model needs beside x and t."""
        names = []
        classes = getattr(self.model, "class_embedding", None) is not None
        if classes and not self.settings.num_classes:
            names.append("class_labels")
        config = self.settings.config
        if self.settings.class_name == "UNet2DConditionModel":
            if self.embeddings is None:
                names.append("encoder_hidden_states")
            texts = config.get("addition_embed_type") in (None, "text")
            if not texts or config.get("encoder_hid_dim_type") not in (None, "text_proj"):
                names.append("added_cond_kwargs")
            if config.get("time_cond_proj_dim"):  # as latent consistency models read their guidance
                names.append("timestep_cond")
        return names

    @property
    def features(self) -> int:
        """Of each encoder_hidden_states vector that a UNet2DConditionModel reads."""
        config = self.settings.config
        size = config["encoder_hid_dim"] or config["cross_attention_dim"]
        return size if isinstance(size, int) else size[0]
