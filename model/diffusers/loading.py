"""Reading a UNet from a folder that diffusers wrote: where its files are, its config, its weights.

This file knows the layout of such folders and the formats of weights. Nothing in them is executed
and nothing is downloaded. It does not know how a model is narrowed, nor what it was trained for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import diffusers
import safetensors.torch
import torch
from diffusers import ModelMixin
from msgspec import Meta
from torch import Tensor

from runtime import memory
from runtime.errors import UserError, one_line
from runtime.files import check_file, read_json, read_tensors
from runtime.schema import SHORT, TWO, Few, Name, Size, check

CLASSES = ("UNet2DModel", "UNet2DConditionModel")
WEIGHTS = "diffusion_pytorch_model"

# WEIGHTS.safetensors, WEIGHTS.fp16.bin; and the files that say in which shard a weight is
_FILE = re.compile(rf"{WEIGHTS}(?:\.(?P<variant>[\w-]+))?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(
    rf"{WEIGHTS}\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def find_model(directory: str | Path) -> tuple[Path, Path | None]:
    """The folder of the UNet that `directory` stands for, and the file of its weights if named.

    directory: a model's folder, a pipeline's with unet/ in it, or a file of weights. Raises
    UserError where it is none of these.
    """
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        check_file(path)
        return path.parent, path
    if not path.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory))
        hint = (
            "; if this is a model's name on the Hugging Face hub, download it first (hf download "
            f"{directory} --local-dir DIR) and name that directory: nothing is downloaded here"
        )
        raise UserError(f"{path} is not a directory{hint if hub else ''}")
    return (path / "unet" if (path / "unet").is_dir() else path), None


def read_model(directory: str | Path) -> ModelMixin:
    """The UNet that `directory` stands for (see find_model), in float32 and eval mode.

    Raises UserError where there is no such model, or its config and its weights do not agree.
    """
    folder, file = find_model(directory)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a diffusers model: it has no config.json as save_pretrained writes "
            f"it{_near(folder)}"
        )
    config = read_json(path, dict[str, object])
    model = build(config.get("_class_name"), config, path)
    file = file or _weights_file(folder)
    state = model._fix_state_dict_keys_on_load(_read_weights(file))  # old names of attention layers
    _fill(model, state, file)
    return model.eval()


def build(name: object, config: Mapping[str, object], where: object) -> ModelMixin:
    """A model of this class of CLASSES with fresh weights. UserError, which begins with `where`,
    where it cannot be built."""
    check_class(name, where)
    check(config, Config, where)
    kind = getattr(diffusers, name)
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind.from_config(dict(config)).parameters())
        memory.require(4 * size, f"{where}: the model", "a smaller one is needed")
        return kind.from_config(dict(config))
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds for values that it does not know
        raise UserError(
            f"{where}: diffusers cannot build this model ({one_line(error)})"
        ) from error


def config_of(model: ModelMixin) -> dict[str, object]:
    """What `build` makes such a model from, as plain JSON-friendly values."""
    config = json.loads(model.to_json_string())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def image_size(config: Mapping[str, object]) -> int | None:
    """Pixels a side of the images that a model's config is for; None where it does not say."""
    size = config.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise UserError(f"sample_size is {size} in the model's config: only square images are used")
    return sides[0]


File = Annotated[str, Meta(pattern=r"^[^/\\\0]+$")]  # a name without a folder


class Config(TypedDict):
    """config.json of a UNet: what gives it its size; its other entries are diffusers' matter."""

    _class_name: NotRequired[Name]
    sample_size: NotRequired[Size | Annotated[list[Size], TWO] | None]
    in_channels: NotRequired[Size]
    out_channels: NotRequired[Size]
    block_out_channels: NotRequired[Annotated[list[Size], SHORT]]
    down_block_types: NotRequired[Annotated[list[Name], SHORT]]
    up_block_types: NotRequired[Annotated[list[Name], SHORT]]
    layers_per_block: NotRequired[Few | Annotated[list[Few], SHORT]]
    transformer_layers_per_block: NotRequired[
        Few | Annotated[list[Few | Annotated[list[Few], SHORT]], SHORT]
    ]
    norm_num_groups: NotRequired[Size | None]
    attention_head_dim: NotRequired[Size | Annotated[list[Size], SHORT] | None]
    num_attention_heads: NotRequired[Size | Annotated[list[Size], SHORT] | None]
    cross_attention_dim: NotRequired[Size | Annotated[list[Size], SHORT] | None]
    num_class_embeds: NotRequired[Size | None]


class Index(TypedDict):
    """WEIGHTS.safetensors.index.json: the shard beside it that each weight is in."""

    weight_map: Annotated[dict[Name, File], Meta(min_length=1)]


def check_class(name: object, where: object) -> None:
    """UserError, which begins with `where`, unless it is one of CLASSES."""
    if name not in CLASSES:
        names = " or a ".join(CLASSES)
        raise UserError(f"{where}: a {str(name)[:60]} cannot be used, only a {names}")


def _near(folder: Path) -> str:
    """Which models lie below a folder that is none."""
    models = {p.parent: p for p in sorted(folder.glob("*/config.json"))}
    models |= {p.parent.parent: p for p in sorted(folder.glob("*/unet/config.json"))}
    kinds = {path: read_json(p, Config).get("_class_name") for path, p in models.items()}
    usable = [str(path) for path, kind in kinds.items() if kind in CLASSES]
    if usable:
        return f"; did you mean {' or '.join(usable[:3])}?"
    others = [f"a {kind} in {path.name}/" for path, kind in kinds.items() if kind]
    classes = " or a ".join(CLASSES)
    return f" ({', '.join(others[:3])}; only a {classes} can be used)" if others else ""


def _weights_file(folder: Path) -> Path:
    """The file to read: without variant before one with, safetensors before .bin."""
    variants: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name) or _INDEX.fullmatch(path.name)
        if match and not _SHARD.search(path.name):
            variants.setdefault(match["variant"] or "", {})[match["format"]] = path
    if not variants:
        raise UserError(f"{folder} has no weights, {WEIGHTS}.safetensors or {WEIGHTS}.bin")
    if "" not in variants and len(variants) > 1:
        names = ", ".join(path.name for formats in variants.values() for path in formats.values())
        raise UserError(f"{folder} has several weights ({names}): name the file instead of it")
    formats = variants.get("") or next(iter(variants.values()))
    return formats.get("safetensors") or formats["bin"]


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of one file or of all shards that an index names."""
    if file.suffix != ".json":
        return _read_file(file)
    shards = read_json(file, Index)["weight_map"]
    states = {name: _read_file(file.with_name(name)) for name in sorted(set(shards.values()))}
    missing = [key for key, name in shards.items() if key not in states[name]]
    if missing:
        raise UserError(f"{file.with_name(shards[missing[0]])} has no {missing[0]}")
    return {key: states[name][key] for key, name in shards.items()}


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        check_file(file)
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = read_tensors(file)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds
        raise UserError(
            f"cannot read the weights in {file}: it is incomplete, or contains more than tensors "
            f"({one_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file} does not contain tensors by name")
    return state


def read_embeddings(path: str, features: int) -> tuple[Tensor, bool]:
    """What a file of --conditioning shows the network, float32 (rows, L, features), and whether the
    last row is the one that says nothing. UserError where it is no such file."""
    state, name = _read_file(Path(path)), "encoder_hidden_states"
    if name not in state or state.keys() - {name, "null"}:
        raise UserError(
            f"--conditioning={path}: has {_some(state) or 'nothing'}; wanted are {name} (N, L, D) "
            "and, for guidance, null (1, L, D)"
        )
    parts = [rows[None] if rows.ndim == 2 else rows for rows in (state[k] for k in sorted(state))]
    for rows in parts:
        fits = rows.ndim == 3 and len(rows) and rows.shape[1:] == parts[0].shape[1:]
        if not fits or rows.shape[2] != features or not rows.is_floating_point():
            raise UserError(
                f"--conditioning={path}: embeddings are {tuple(rows.shape)}; the model reads "
                f"(N, L, {features})"
            )
        if not bool(rows.float().isfinite().all()):
            raise UserError(f"--conditioning={path}: has entries that are not finite numbers")
    if len(parts) == 2 and len(parts[1]) != 1:
        raise UserError(f"--conditioning={path}: null has {len(parts[1])} rows; it must be one")
    return torch.cat([rows.float() for rows in parts]), len(parts) == 2


def _fill(model: ModelMixin, state: Mapping[str, Tensor], file: Path) -> None:
    """Copy `state` into `model`; UserError where one has what the other has not."""
    parameters = model.state_dict()
    missing, unused = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing:
        raise UserError(f"{file} lacks weights that its config.json asks for: {_some(missing)}")
    if unused:
        raise UserError(f"{file} has weights that its config.json leaves unused: {_some(unused)}")
    for name, tensor in state.items():
        shape = tuple(parameters[name].shape)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{file}: {name} is {tuple(tensor.shape)} there and {shape} by its config.json"
            )
        if parameters[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is of {tensor.dtype}; quantised weights are not read")
        if not bool(tensor.float().isfinite().all()):
            raise UserError(f"{file}: {name} has entries that are not finite numbers")
    model.load_state_dict(state)


def _some(names: Iterable[str]) -> str:
    """The first three of `names`, and how many there are beside them."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
