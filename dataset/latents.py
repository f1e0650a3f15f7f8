"""Latent diffusion: a frozen autoencoder from diffusers, and a data set encoded with it once.

This file knows AutoencoderKL and VQModel folders and the latents file. It does not know the network
that is trained on latents, nor flags.

The latents file is a .npy of float16 (N, c, h, w), scaled as the network sees them, and is read by
memory mapping; NAME.npy.json beside it says which autoencoder made it from which images.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dataset.batches import everything
from dataset.images import AnySet, Images, fingerprint, to_network, to_uint8
from runtime import processes as distributed
from runtime.errors import NotFiniteError, UserError, one_line
from runtime.files import alone_in, check_file, read_json, remove_partial, write_json
from runtime.identity import agree
from runtime.progress import progress
from runtime.schema import SHORT, Count, Few, Name, Number, Positive, Size, check

KINDS = ("AutoencoderKL", "VQModel")
REMEDY = "delete it and the next run makes it again"
PIXELS_AT_ONCE = 2**22  # that are decoded together: a decoder's activations are large


class Autoencoder:
    """The autoencoder in a folder that diffusers wrote, in float32.

    channels: of the latents. image_channels: of the images. factor: side of an image over the side
    of its latents. fingerprint: of weights, config and `scale`, which replaces the config's
    scaling_factor where it is neither 0 nor the same.
    """

    def __init__(self, folder: str | Path, device: torch.device | str, scale: float = 0.0) -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        stored = _config(self.folder)
        self.fingerprint = _fingerprint(self.folder, stored)
        if scale and scale != stored.get("scaling_factor"):
            self.fingerprint += f" × {scale!r}"
            stored["scaling_factor"] = scale
        self.network = _network(self.folder, stored["_class_name"]).to(device)
        config = self.network.config  # with the defaults of its class
        self.quantised = "num_vq_embeddings" in config
        self.channels = int((self.quantised and config.vq_embed_dim) or config.latent_channels)
        self.image_channels = int(config.in_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.shift, self.scale = self._normalisation(stored)
        if config.out_channels != self.image_channels:
            raise UserError(
                f"--latent_vae: {folder} turns images of {self.image_channels} channels into "
                f"images of {config.out_channels}"
            )

    def _normalisation(self, config: dict) -> tuple[float | Tensor, float | Tensor]:
        """(shift, scale), numbers or tensors (c, 1, 1): networks see (latents − shift)·scale.

        They are latents_mean or shift_factor, and scaling_factor / latents_std. scaling_factor must
        be in the file: the default of diffusers' classes is one model's, and wrong for others.
        """
        where = f"--latent_vae: {self.folder / 'config.json'}"
        if "scaling_factor" not in config:
            raise UserError(
                f"{where} has no scaling_factor, by which latents are multiplied; give "
                "--latent_scale (0.18215 for the first Stable Diffusion models; 1 leaves latents "
                "as they are)"
            )
        if config.get("shift_factor") and config.get("latents_mean"):
            raise UserError(f"{where} has both shift_factor and latents_mean")

        def numbers(name: str, default: float) -> float | Tensor:
            value = config.get(name)
            values = [default] if value is None else value if isinstance(value, list) else [value]
            if len(values) == 1:
                return float(values[0])
            if len(values) != self.channels:
                raise UserError(
                    f"{where}: {name} has {len(values)} numbers, not 1 or {self.channels}"
                )
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None]

        shift = numbers("shift_factor", 0.0) + numbers("latents_mean", 0.0)
        return shift, numbers("scaling_factor", 1.0) / numbers("latents_std", 1.0)

    def shape(self, img_size: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images of `img_size` pixels a side."""
        if img_size < self.factor or img_size % self.factor:
            raise UserError(
                f"--img_size={img_size}: {self.folder} makes one latent of {self.factor}×"
                f"{self.factor} pixels; use a multiple of {self.factor}"
            )
        return self.channels, img_size // self.factor, img_size // self.factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) → float32 latents (B, c, h, w), normalised as the config says; of an
        AutoencoderKL's Gaussian, the mean."""
        output = self.network.encode(to_network(images.to(self.device)))
        latents = output.latents if self.quantised else output.latent_dist.mode()
        return (latents - self.shift) * self.scale

    @torch.inference_mode()
    def to_images(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) → uint8 (B, C, H, W), PIXELS_AT_ONCE at a time.

        Raises NotFiniteError: such numbers would be black."""
        at_once = max(1, PIXELS_AT_ONCE // (latents[0, 0].numel() * self.factor**2))
        return torch.cat([to_uint8(self._decode(part)) for part in latents.split(at_once)])

    def _decode(self, latents: Tensor) -> Tensor:
        images = self.network.decode(latents.float() / self.scale + self.shift).sample
        if not bool(images.isfinite().all()):
            raise NotFiniteError(
                f"--latent_vae: {self.folder} makes images of these latents that are not finite: "
                "its scaling_factor is wrong, or they are far from its own"
            )
        return images

    def decoder_flops(self, img_size: int) -> int:
        """FLOPs (2 × multiply-adds) of decoding one image, counted on the meta device."""
        network = copy.deepcopy(self.network).to("meta")
        latents = torch.zeros(1, *self.shape(img_size), device="meta")
        # A quantiser's look-up costs next to nothing and needs values.
        options = {"force_not_quantize": True} if self.quantised else {}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.decode(latents, **options)
        return int(counter.get_total_flops())

    def decoder_parameters(self) -> int:
        return sum(p.numel() for p in self.network.decoder.parameters())


class Config(TypedDict):
    """config.json of an autoencoder; its other entries are diffusers' matter."""

    _class_name: Name
    in_channels: NotRequired[Size]
    out_channels: NotRequired[Size]
    latent_channels: NotRequired[Size]
    vq_embed_dim: NotRequired[Size | None]
    num_vq_embeddings: NotRequired[Size]
    block_out_channels: NotRequired[Annotated[list[Size], SHORT]]
    layers_per_block: NotRequired[Few]
    scaling_factor: NotRequired[Positive | Annotated[list[Positive], SHORT] | None]
    shift_factor: NotRequired[Number | Annotated[list[Number], SHORT] | None]
    latents_mean: NotRequired[Number | Annotated[list[Number], SHORT] | None]
    latents_std: NotRequired[Positive | Annotated[list[Positive], SHORT] | None]


def _config(folder: Path) -> dict:
    """config.json of a supported autoencoder; UserError for anything else."""
    if not folder.is_dir():
        raise UserError(f"--latent_vae: {folder} is not a directory")
    if not (folder / "config.json").exists():
        subfolders = [name for name in ("vae", "vqvae", "movq") if (folder / name).is_dir()]
        hint = f"; did you mean {folder / subfolders[0]}?" if subfolders else ""
        raise UserError(f"--latent_vae: {folder} has no config.json of an autoencoder{hint}")
    path = folder / "config.json"
    check(config := read_json(path), Config, f"--latent_vae: {path}")
    if config["_class_name"] not in KINDS:
        kind = config["_class_name"]
        raise UserError(f"--latent_vae: {path} is for {kind}, not one of {', '.join(KINDS)}")
    return config


def _fingerprint(folder: Path, config: dict) -> str:
    """16 hexadecimal digits that identify config and weights."""
    ignored = ("_name_or_path", "_diffusers_version")
    settings = {key: value for key, value in config.items() if key not in ignored}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    whole = folder / "diffusion_pytorch_model.safetensors"
    # Variants beside it, such as .fp16, are not used.
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"--latent_vae: {folder} has no .safetensors weights, and other files can carry code"
        )
    for path in files:
        check_file(path)
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _network(folder: Path, kind: str) -> torch.nn.Module:
    import diffusers  # takes seconds

    diffusers.utils.logging.set_verbosity_error()  # what it says of weights is an error below
    try:
        network, info = getattr(diffusers, kind).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True,
            low_cpu_mem_usage=False, torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise UserError(f"--latent_vae: cannot load {folder} ({one_line(error)})") from error
    if info["missing_keys"]:
        raise UserError(f"--latent_vae: {folder} has no weights for {info['missing_keys'][0]}")
    if unused := info["unexpected_keys"]:
        names = ", ".join(sorted(unused)[:3])
        raise UserError(f"--latent_vae: {folder} has unused weights: {names}")
    for name, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            raise UserError(f"--latent_vae: {folder}: {name} holds values that are not finite")
    return network.eval().requires_grad_(False)


# --- The latents file -----------------------------------------------------------------------------


class Identity(TypedDict):
    """NAME.npy.json: what the latents beside it are of; processes, while they are made."""

    autoencoder: Name
    dataset: Name
    img_size: Size
    images: Count
    content: Name
    processes: NotRequired[Size]


def identity(dataset: AnySet, autoencoder: Autoencoder, img_size: int) -> dict[str, object]:
    """What the content of a latents file depends on."""
    return {
        "autoencoder": autoencoder.fingerprint,
        "dataset": dataset.name,
        "img_size": img_size,
        "images": len(dataset),
        "content": fingerprint(dataset),
    }


def encoded(
    dataset: AnySet,
    autoencoder: Autoencoder,
    img_size: int,
    path: Path,
    batch_size: int,
    num_workers: int,
) -> Images:
    """`dataset` in latents, from the file `path`. Where it is missing, all processes of the group
    make it first. Raises UserError where the file is of another autoencoder or of other images."""
    check_channels(dataset, autoencoder)
    wanted = identity(dataset, autoencoder, img_size)
    shape = (len(dataset), *autoencoder.shape(img_size))
    if not distributed.gather(path.exists())[0]:
        with _only_maker(path):
            if not distributed.gather(path.exists())[0]:
                _make(dataset, autoencoder, wanted, shape, path, batch_size, num_workers)
    remedy = f"{REMEDY}, or name another file with --latent_cache"
    agree(path, read_json(_identity_path(path), Identity, REMEDY), wanted, remedy)
    try:
        check_file(path)
        # Copy-on-write, because torch has no read-only tensors.
        latents = np.lib.format.open_memmap(path, mode="c")
    except UserError:
        raise
    except Exception as error:  # numpy reads the header with Python's own parser
        raise UserError(f"cannot read {path} ({error}): {REMEDY}") from error
    if latents.shape != shape or latents.dtype != np.float16:
        raise UserError(f"{path} is damaged: {REMEDY}")
    # A mirrored latent is not the latent of the mirrored image.
    return Images(dataset.name, torch.from_numpy(latents), False, dataset.labels, dataset.classes)


def spread(latents: Images, wanted: float) -> str:
    """The mean and deviation of latents, of about 1,000 images, and a warning where diffusion does
    not suit them: its noise levels are for numbers of mean 0 and deviation about `wanted`."""
    some = latents.tensor[:: max(1, len(latents) // 1000)].float()
    mean, deviation = float(some.mean()), max(float(some.std()), 1e-9)
    text = f"latents: mean {mean:.3g}, deviation {deviation:.3g}"
    if abs(mean) > 0.5 * wanted or not 0.6 < deviation / wanted < 1.7:
        text = (
            f"warning: {text}, far from 0 and {wanted:g}, which the noise levels are for; a "
            f"--latent_scale {wanted / deviation:.3g} times the scaling_factor in use would give "
            f"{wanted:g}"
        )
        if wanted != 1:
            text += ", or --sigma_data the deviation that there is"
    return text


def check_channels(dataset: AnySet, autoencoder: Autoencoder) -> None:
    """Raise UserError where the autoencoder is for images of other channels."""
    if dataset.channels != autoencoder.image_channels:
        raise UserError(
            f"--latent_vae: {autoencoder.folder} is for images of {autoencoder.image_channels} "
            f"channels, and --dataset={dataset.name} has {dataset.channels}"
        )


def sample(dataset: AnySet, autoencoder: Autoencoder, count: int) -> Images:
    """The first `count` images in latents, without a file; for measurements."""
    check_channels(dataset, autoencoder)
    images = next(iter(everything(dataset, count)))
    labels = None if dataset.labels is None else dataset.labels[:count]
    return Images(dataset.name, autoencoder.encode(images), False, labels, dataset.classes)


def _identity_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _only_maker(path: Path) -> contextlib.AbstractContextManager:
    """A block that one group of processes at a time is in, for this file; other groups wait."""
    if not distributed.is_main():
        return contextlib.nullcontext()  # waits for the first process, in `gather`
    # A folder of its own, because a run is alone in its LOGDIR, where `path` may be.
    return alone_in(path.with_name(f".{path.name}.lock"))


def _make(
    dataset: AnySet,
    autoencoder: Autoencoder,
    wanted: dict[str, object],
    shape: tuple[int, ...],
    path: Path,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the latents to a partial file, continuing one of a stopped run, and rename it when it
    is complete. Each process writes its share; the first appends the others' to its own."""
    suffixes = ["", *(f"-{rank}" for rank in range(1, distributed.world()))]
    partials = [path.with_name(f".{path.stem}.partial{suffix}.npy") for suffix in suffixes]
    partial, share = partials[distributed.rank()], distributed.share(len(dataset))
    header = _header(shape) if distributed.is_main() else b""
    image_bytes = 2 * math.prod(shape[1:])
    wanted = wanted | {"processes": len(partials)}  # another number would have other shares
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _identity_path(path)
        resumes = stored.exists() and read_json(stored, Identity, REMEDY) == wanted
        resumes = distributed.gather(resumes)[0] and partial.exists()
        with open(partial, "rb+" if resumes else "wb+") as file:
            file.write(header)
            written = max(0, os.fstat(file.fileno()).st_size - len(header)) // image_bytes
            done = min(written, share.stop - share.start)
            file.truncate(len(header) + done * image_bytes)
            file.seek(0, os.SEEK_END)
            distributed.gather(None)  # wait until no share holds what is of another identity
            if distributed.is_main():
                write_json(stored, wanted)
            rest = slice(share.start + done, share.stop)
            for latents in _latents(dataset, autoencoder, rest, done, batch_size, num_workers):
                file.write(latents.tobytes())
            file.flush()
            os.fsync(file.fileno())
        distributed.gather(None)  # wait until every share is complete
        if distributed.is_main():
            with open(partial, "ab") as whole:
                for other in partials[1:]:
                    with open(other, "rb") as file:
                        shutil.copyfileobj(file, whole, 2**24)
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(partial, path)
            remove_partial(path.with_suffix(""), ".partial-*.npy")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; see --latent_cache"
        ) from error
    distributed.gather(None)  # wait until the first process has renamed the file


def _header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a .npy of float16 with this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def _latents(
    dataset: AnySet,
    autoencoder: Autoencoder,
    part: slice,
    done: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[np.ndarray]:
    """Latents of these images in batches, float16, with a progress bar that starts at `done`."""
    with progress(done + part.stop - part.start, "encode", "image", initial=done) as bar:
        for images in everything(dataset, batch_size, num_workers, part.start, part.stop):
            latents = autoencoder.encode(images).half()
            if not bool(latents.isfinite().all()):
                raise UserError(
                    f"--latent_vae: {autoencoder.folder} makes latents that are not finite in "
                    "16 bits: it is damaged, or its scaling_factor is wrong"
                )
            bar.update(len(images))
            yield latents.cpu().numpy()
