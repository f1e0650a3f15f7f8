"""Named data sets: a name → uint8 images of one size, in memory or as files.

This file knows where images come from. It does not know in which order a run sees them, nor what
they are for: no network, no diffusion, no score, no flags.
"""

import copy
import gzip
import hashlib
import importlib.util
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import sets
from dataset.folders import (
    ImageFiles,
    Listing,
    LsunImages,
    count_channels,
    flips,
    image_folder,
)
from runtime import memory
from runtime.errors import UserError, one_line
from runtime.files import alone_in, check_file
from settings import DataSettings

# --- What a data set is --------------------------------------------------------------------------


class Images(Dataset):
    """A whole data set in memory.

    tensor: (N, C, H, W), uint8, or float where it holds latents. flip: whether training may mirror
    the images. labels: int64 (N,), and the names of the classes; None and () where the set has no
    classes.
    """

    def __init__(
        self,
        name: str,
        tensor: torch.Tensor,
        flip: bool,
        labels: torch.Tensor | None = None,
        classes: Sequence[str] = (),
    ):
        self.name, self.tensor, self.flip = name, tensor, flip
        self.labels, self.classes = labels, tuple(classes)
        self.channels = tensor.shape[1]

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]


# --- The named sets -------------------------------------------------------------------------------


def _cifar10(root: Path, img_size: int, train: bool, options: DataSettings) -> Images:
    from torchvision.datasets import CIFAR10

    # The files are pickles; torchvision opens them only after their MD5 sums agree.
    source = _download(
        root,
        lambda: CIFAR10(str(root), train=train, download=True),
        f"cifar10: put cifar-10-python.tar.gz (or its folder cifar-10-batches-py) into {root}",
    )
    images = _resize(torch.from_numpy(source.data).movedim(3, 1), img_size)
    return Images(
        "cifar10", images, flips(options, True), torch.tensor(source.targets), source.classes
    )


def _fashion_mnist(root: Path, img_size: int, train: bool, options: DataSettings) -> Images:
    from torchvision.datasets import FashionMNIST

    stem = f"{'train' if train else 't10k'}-images-idx3-ubyte"
    raw_folder = root / "FashionMNIST" / "raw"
    archives = [folder / f"{stem}.gz" for folder in (raw_folder, root)]
    archive = next((path for path in archives if path.exists()), None)
    if archive and not (raw_folder / stem).is_file():
        images, labels = _read_idx_gz(archive, 3), None
        label_archive = archive.with_name(archive.name.replace("images-idx3", "labels-idx1"))
        if label_archive.exists():
            labels = _read_idx_gz(label_archive, 1).long()
    else:
        source = _download(
            root,
            lambda: FashionMNIST(str(root), train=train, download=True),
            f"fashion_mnist: put {stem}.gz into {root} (or into {raw_folder})",
        )
        images, labels = source.data, source.targets
    images = images[:, None]
    if img_size == 32:  # the usual 28 → 32: a black margin keeps every pixel as it is
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    # Not mirrored by default: every shoe of this set points to the left.
    classes = () if labels is None else FashionMNIST.classes
    flip = flips(options, False)
    return Images("fashion_mnist", _resize(images, img_size), flip, labels, classes)


def _digits(root: Path, img_size: int, train: bool, options: DataSettings) -> Images:
    from sklearn.datasets import load_digits

    if not train:
        raise UserError("digits has no test split: use its 1797 training images")
    digits = load_digits()
    values = digits.images  # (1797, 8, 8), whole numbers from 0 to 16
    images = torch.from_numpy(np.round(values * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    images = _resize(images, img_size)
    return Images("digits", images, flips(options, False), labels, [*"0123456789"])


def _files(list_files: Callable[[Path, bool], Listing]) -> Callable:
    """The loader of a data set whose listing `list_files` makes."""

    def load_files(root: Path, img_size: int, train: bool, options: DataSettings) -> ImageFiles:
        return ImageFiles(list_files.__name__, list_files(root, train), img_size, options)

    return load_files


def _lsun_bedroom(
    root: Path, img_size: int, train: bool, options: DataSettings
) -> ImageFiles | LsunImages:
    folder = sets.lsun_database(root, train)
    if folder is None:
        return _files(sets.lsun_bedroom)(root, img_size, train, options)
    if importlib.util.find_spec("lmdb") is None:
        raise UserError(
            f"lsun_bedroom: reading {folder} needs the package lmdb (pip install lmdb); or export "
            "its images into a folder bedroom_train"
        )
    return LsunImages("lsun_bedroom", folder, img_size, options)


AnySet = Images | ImageFiles | LsunImages

# To add a data set, add an entry: (root, img_size, train, options) → one of AnySet.
_LOADERS: dict[str, Callable[[Path, int, bool, DataSettings], AnySet]] = {
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "image_folder": _files(image_folder),
    "digits": _digits,
    "celeba": _files(sets.celeba),
    "celeba_hq": _files(sets.celeba_hq),
    "afhq": _files(sets.afhq),
    "lsun_bedroom": _lsun_bedroom,
    "imagenet": _files(sets.imagenet),
}
NAMES = tuple(_LOADERS)


DEFAULTS = DataSettings()
UNPACKED = 2**28  # bytes of an idx file, at most; the largest known has 47 million


def channels(name: str, options: DataSettings = DEFAULTS) -> int:
    """Image channels of a named set, without loading it; 3 where that depends on its files."""
    return count_channels(options, 1 if name in ("digits", "fashion_mnist") else 3)


def load(
    name: str,
    root: str | Path,
    img_size: int,
    train: bool = True,
    options: DataSettings = DEFAULTS,
) -> AnySet:
    """The data set `name`, whose files are, or will be downloaded, below `root`.

    - cifar10: 50,000 / 10,000 colour images of 32×32.
    - fashion_mnist: 60,000 / 10,000 grey images of 28×28; `img_size` 32 pads them with zeros.
      Its .gz files may be in `root` itself, which is then only read.
    - image_folder: every image below `root`, sorted by path; shorter side resized, centre crop.
    - digits: scikit-learn's 1797 grey images of 8×8, all of them for training; needs no `root`.
    - celeba, celeba_hq, afhq, lsun_bedroom, imagenet: colour images in the folders that the sets'
      archives unpack to (sets.py); an archive that was unpacked only in part is an error.

    Images of another size are resized, bilinear and antialiased. Items are uint8
    (C, img_size, img_size). The set has `name`, `channels`, `flip`, `labels` and `classes` as
    Images has, and `tensor` (N, C, H, W), which is None where images are decoded on demand.
    Raises UserError where files are missing, damaged or cannot be downloaded. The processes of a
    group call it together.
    """
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if img_size < 1:
        raise UserError(f"img_size is {img_size}: it must be at least 1")
    dataset = _LOADERS[name](Path(root).expanduser(), img_size, train, options)
    if count_channels(options, dataset.channels) != dataset.channels:
        raise UserError(f"--channels={options.channels}: {name} has {dataset.channels}; use auto")
    return dataset


def in_class_order(dataset: AnySet, names: Sequence[str]) -> AnySet:
    """`dataset` with its classes numbered as in `names`. UserError where it has other classes."""
    if sorted(names) != sorted(dataset.classes):
        differing = sorted(set(names) ^ set(dataset.classes))
        raise UserError(
            f"--dataset={dataset.name} has {len(dataset.classes)} classes, not the {len(names)} of "
            f"the checkpoint; {', '.join(differing[:3])} are in one of them only"
        )
    if tuple(names) == dataset.classes:
        return dataset
    number = {name: i for i, name in enumerate(names)}
    result = copy.copy(dataset)
    result.labels = torch.tensor([number[name] for name in dataset.classes])[dataset.labels]
    result.classes = tuple(names)
    return result


def _download(root: Path, fetch: Callable, remedy: str):
    """The result of `fetch`, which runs in one process at a time: several would unpack into each
    other's files. Where it fails, the UserError says `remedy`: which file to put where."""
    try:
        with alone_in(root):
            return fetch()
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        raise UserError(
            f"{remedy}; downloading or reading it failed ({one_line(error)})"
        ) from error


def _read_idx_gz(archive: Path, dims: int) -> torch.Tensor:
    """The uint8 (N, H, W) images (dims 3) or (N,) labels (dims 1) of a gzipped idx file."""
    check_file(archive)
    start = 4 * (1 + dims)  # the kind of numbers, and the size of each dimension
    try:
        with gzip.open(archive) as packed:
            content = packed.read(UNPACKED + 1)
        kind, *shape = struct.unpack(f">{1 + dims}I", content[:start])
        if kind != 0x800 + dims or math.prod(shape) != len(content) - start:
            raise ValueError("it is not what its first bytes say")
        values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, struct.error) as error:
        raise UserError(f"{archive} is damaged ({error}): download it again") from error
    return torch.from_numpy(values.copy())


def _resize(images: torch.Tensor, img_size: int) -> torch.Tensor:
    """uint8 (N, C, H, W) → (N, C, img_size, img_size), 1000 images at a time to bound memory."""
    from torchvision.transforms.v2 import functional

    if images.shape[-2:] == (img_size, img_size):
        return images.contiguous()
    size = images.shape[0] * images.shape[1] * img_size**2
    memory.require(size, f"the data set at --img_size={img_size}", "lower it")
    size = [img_size, img_size]
    pieces = images.contiguous().split(1000)
    return torch.cat([functional.resize(piece, size, antialias=True) for piece in pieces])


# --- Pixels --------------------------------------------------------------------------------------


def to_network(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float32 in [-1, 1]. Floats (latents) keep their values."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float, clamped to [-1, 1] → uint8 0..255, rounded to nearest: what a PNG holds."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --- What a set is, in words and as a number ------------------------------------------------------


def describe(dataset: AnySet, names: int = 20) -> str:
    """One line: images, sizes, channels, alpha, classes in order, mirroring, and what was left out
    and why. names: how many classes are named."""
    sizes, seen, alpha = "", "", []
    if isinstance(dataset, ImageFiles):
        survey = dataset.survey
        sizes, grey = f" of {survey.sizes()} pixels", survey.images - survey.colour
        seen = f" ({survey.colour:,} in colour, {grey:,} grey)" if survey.colour and grey else ""
        background = "#" + bytes(dataset.background).hex()
        alpha = [f"{survey.alpha:,} with alpha, on {background}"] if survey.alpha else []
    elif dataset.tensor is not None:
        sizes = f" of {dataset.tensor.shape[3]}×{dataset.tensor.shape[2]}"
    parts = [
        f"{dataset.name}: {len(dataset):,} images{sizes}",
        f"{dataset.channels} channel{'s' * (dataset.channels > 1)}{seen}",
        *alpha,
    ]
    if dataset.labels is not None:
        shown = ", ".join(dataset.classes[:names]) + ", …" * (len(dataset.classes) > names)
        parts.append(f"{len(dataset.classes)} classes ({shown})")
    parts.append("mirrored in training" if dataset.flip else "not mirrored")
    left_out = getattr(dataset, "left_out", ())
    text = ", ".join(parts) + (f"; left out: {', '.join(left_out)}" if left_out else "")
    return text.encode(errors="replace").decode()  # names of files may be no UTF-8


def fingerprint(dataset: AnySet) -> str:
    """16 hexadecimal digits that identify the images, wherever the files are stored.

    Of image files: all relative paths and sizes, and the content of 64 files.
    """
    digest = hashlib.sha256()
    if isinstance(dataset, LsunImages):
        for key in dataset.keys:  # LSUN's keys are hashes of the images' content
            digest.update(key)
        digest.update(b"grey" if dataset.channels == 1 else b"")
    elif isinstance(dataset, ImageFiles):
        # Absolute, because commonpath leaves out the "." of ./NAME.
        names = [os.path.abspath(path) for path in dataset.paths]
        top = os.path.commonpath([*map(os.path.dirname, names)])
        for name, path in zip(names, dataset.paths, strict=True):
            digest.update(os.fsencode(name[len(top) :]) + b" %d\n" % os.stat(path).st_size)
        for path in dataset.paths[:: max(1, len(dataset) // 64)]:
            digest.update(Path(path).read_bytes())
        digest.update(_how_read(dataset).encode())
    else:
        for part in dataset.tensor.split(1000):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _how_read(dataset: ImageFiles) -> str:
    """What the pixels depend on beside the files; empty where there was never a choice."""
    survey, choices = dataset.survey, []
    if survey.alpha:
        choices.append(f"background {dataset.background}")
    if survey.rescaled:
        choices.append("ranges")
    if dataset.channels != (1 if survey.first_grey else 3):
        choices.append(f"channels {dataset.channels}")
    return "; ".join(choices)
