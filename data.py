"""Named data sets: a name → uint8 images of one size, and endless training batches of them.

This file knows where images come from and in which order a run sees them. It does not know what
they are for: no network, no diffusion, no score, no flags.
"""

import functools
import gzip
import itertools
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from errors import UserError

# An in-memory set up to this size lives on the training device, where picking a batch is free.
RESIDENT_BYTES = 2 * 2**30


# --- What a data set is ---------------------------------------------------------------------------


class Images(Dataset):
    """A whole set in memory: `tensor` uint8 (N, C, H, W).

    `flip` says whether a mirrored image is as good as the image itself.
    """

    def __init__(self, name: str, tensor: torch.Tensor, flip: bool):
        self.name, self.tensor, self.flip = name, tensor, flip
        self.channels = tensor.shape[1]

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]


class ImageFiles(Dataset):
    """A list of image files, decoded when asked for: shorter side to `img_size`, centre crop.

    The first file's mode decides for all: greyscale → 1 channel, anything else → 3.
    """

    tensor = None

    def __init__(self, name: str, paths: list[str], img_size: int, flip: bool):
        self.name, self.paths, self.img_size, self.flip = name, paths, img_size, flip
        self.channels = 1 if _is_grey(_open_image(paths[0])) else 3

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        image = _open_image(self.paths[index])
        image = image.convert("L" if self.channels == 1 else "RGB")
        image = functional.resize(image, [self.img_size])  # PIL's bilinear is antialiased
        image = functional.center_crop(image, [self.img_size, self.img_size])
        return functional.pil_to_tensor(image)


def _is_grey(image) -> bool:
    return image.mode in ("1", "L", "LA")


def _open_image(path: str):
    """Decode one file, upright, 16-bit greys scaled to 8 bits; UserError names a broken file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):
            # PIL's own conversion to 8 bits clips instead of scaling.
            values = np.asarray(image, dtype=np.float64) / 257
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        return image
    except Exception as error:  # PIL's decoders raise whatever their format's parser raises
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot read the image {path} ({reason}): repair it or take it out of the folder"
        ) from error


# --- Where the named sets come from ---------------------------------------------------------------


def _cifar10(root: Path, img_size: int, train: bool) -> Images:
    from torchvision.datasets import CIFAR10

    # The files are pickles; torchvision opens them only after their MD5 sums agree.
    raw = _download(
        lambda: CIFAR10(str(root), train=train, download=True),
        f"cifar10: put cifar-10-python.tar.gz (or its folder cifar-10-batches-py) into {root}",
    )
    return Images("cifar10", _resize(torch.from_numpy(raw.data).movedim(3, 1), img_size), True)


def _fashion_mnist(root: Path, img_size: int, train: bool) -> Images:
    from torchvision.datasets import FashionMNIST

    stem = f"{'train' if train else 't10k'}-images-idx3-ubyte"
    raw_folder = root / "FashionMNIST" / "raw"
    archives = [folder / f"{stem}.gz" for folder in (raw_folder, root)]
    archive = next((path for path in archives if path.is_file()), None)
    if archive and not (raw_folder / stem).is_file():
        images = _read_idx_gz(archive)
    else:
        raw = _download(
            lambda: FashionMNIST(str(root), train=train, download=True),
            f"fashion_mnist: put {stem}.gz into {root} (or into {raw_folder})",
        )
        images = raw.data
    images = images[:, None]
    if img_size == 32:  # the usual 28 → 32: a black margin keeps every pixel as it is
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    # Not flipped: every shoe of this set points to the left.
    return Images("fashion_mnist", _resize(images, img_size), False)


def _digits(root: Path, img_size: int, train: bool) -> Images:
    from sklearn.datasets import load_digits

    if not train:
        raise UserError("digits has no test split: use its 1797 training images")
    values = load_digits().images  # (1797, 8, 8), whole numbers from 0 to 16
    images = torch.from_numpy(np.round(values * 255 / 16).astype(np.uint8))[:, None]
    return Images("digits", _resize(images, img_size), False)


def _image_folder(root: Path, img_size: int, train: bool) -> ImageFiles:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not train:
        raise UserError("image_folder has no test split: name the test images' folder instead")
    if not root.is_dir():
        raise UserError(f"image_folder: there is no folder {root}")
    # Hidden files are other programs' leftovers (._photo.jpg, half-written temporaries).
    paths = sorted(
        str(path)
        for path in root.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )
    if not paths:
        suffixes = " ".join(IMG_EXTENSIONS)
        raise UserError(f"image_folder: no image in {root} or below it (looked for {suffixes})")
    return ImageFiles("image_folder", paths, img_size, True)


# A further data set is one more entry: (root, img_size, train) → Images or ImageFiles.
_LOADERS: dict[str, Callable[[Path, int, bool], Images | ImageFiles]] = {
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "image_folder": _image_folder,
    "digits": _digits,
}
NAMES = tuple(_LOADERS)


def channels(name: str) -> int:
    """Image channels of a named set, without loading it; 3 where only its files could tell."""
    return 1 if name in ("digits", "fashion_mnist") else 3


def load(name: str, root: str | Path, img_size: int, train: bool = True) -> Images | ImageFiles:
    """The data set `name`, whose files are (or are downloaded) below `root`.

    - cifar10: 50,000 / 10,000 colour images of 32×32.
    - fashion_mnist: 60,000 / 10,000 grey images of 28×28; `img_size` 32 pads them with zeros.
      The .gz files may lie in `root` itself, which is only read then.
    - image_folder: every image below `root`, sorted by path; shorter side resized, centre crop.
    - digits: scikit-learn's 1797 grey images of 8×8, all of them for training; needs no `root`.

    Other sizes are resized, bilinear and antialiased. Items are uint8 (C, img_size, img_size);
    the set has `name`, `channels`, `flip`, and `tensor` (N, C, H, W), which is None where images
    are decoded one by one. Raises UserError where files are missing, broken or not downloadable.
    """
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if img_size < 1:
        raise UserError(f"img_size is {img_size}: it must be at least 1")
    return _LOADERS[name](Path(root).expanduser(), img_size, train)


def _download(fetch: Callable, remedy: str):
    """Call `fetch`; where it can't get or use its files, say which file to put where."""
    try:
        return fetch()
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{remedy}; downloading or reading it failed ({reason})") from error


def _read_idx_gz(archive: Path) -> torch.Tensor:
    """The uint8 (N, H, W) images of a gzipped idx file, unpacked outside its (system) folder."""
    from torchvision.datasets.mnist import read_image_file

    try:
        with tempfile.NamedTemporaryFile() as unpacked:
            with gzip.open(archive) as packed:
                shutil.copyfileobj(packed, unpacked)
            unpacked.flush()
            return read_image_file(unpacked.name)
    except (OSError, EOFError, zlib.error, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{archive} is damaged ({error}): fetch it again") from error


def _resize(images: torch.Tensor, img_size: int) -> torch.Tensor:
    """uint8 (N, C, H, W) → (N, C, img_size, img_size), in pieces to bound the memory."""
    from torchvision.transforms.v2 import functional

    if images.shape[-2:] == (img_size, img_size):
        return images.contiguous()
    size = [img_size, img_size]
    pieces = images.contiguous().split(1000)
    return torch.cat([functional.resize(piece, size, antialias=True) for piece in pieces])


# --- Pixels ---------------------------------------------------------------------------------------


def to_network(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1], clamped there → uint8, rounded to the nearest: what a PNG would hold."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --- Batches --------------------------------------------------------------------------------------


def batches(
    dataset: Images | ImageFiles,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    device: str | torch.device = "cpu",
    num_workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """Endless training batches, float32 in [-1, 1], (batch_size / world, C, H, W) on `device`.

    The batch of a step depends on `seed` and the step alone: it takes positions
    [step · batch_size, (step + 1) · batch_size) of an endless row of shuffled epochs, so
    starting at `start_step` continues a run exactly, and no image is dropped at an epoch's end.
    `part` = (rank, world) takes the rank's contiguous share of every step's batch.
    Where the set allows flips, each image is mirrored with probability ½.
    """
    rank, world = part
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {world} processes: "
            f"take a positive multiple of {world}"
        )
    share = batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    steps = _step_indices(len(dataset), batch_size, seed, start_step, mine)
    if dataset.tensor is not None:
        picked = _pick(dataset.tensor, steps, device)
    else:
        picked = _decode(dataset, steps, num_workers, torch.device(device).type == "cuda")

    def finished() -> Iterator[torch.Tensor]:
        for step, images in enumerate(picked, start_step):
            images = to_network(images.to(device, non_blocking=True))
            if dataset.flip:
                mirror = torch.rand(batch_size, generator=_generator(seed, "flip", step)) < 0.5
                mirror = mirror[mine].to(device, non_blocking=True)
                images = torch.where(mirror[:, None, None, None], images.flip(3), images)
            yield images

    return finished()


def everything(
    dataset: Images | ImageFiles, batch_size: int, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """Every image once, in order, never flipped: uint8 (≤ batch_size, C, H, W) on the CPU."""
    if dataset.tensor is not None:
        return iter(dataset.tensor.split(batch_size))
    return _decode(dataset, torch.arange(len(dataset)).split(batch_size), num_workers, False)


def _generator(seed: int, stream: str, counter: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, stream, counter)."""
    entropy = [seed % 2**64, zlib.crc32(stream.encode()), counter]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def _step_indices(
    count: int, batch_size: int, seed: int, start_step: int, mine: slice
) -> Iterator[torch.Tensor]:
    """For each step from `start_step` on, the indices of its batch's share `mine`."""

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> torch.Tensor:
        return torch.randperm(count, generator=_generator(seed, "epoch", epoch))

    for step in itertools.count(start_step):
        position, end = step * batch_size + mine.start, step * batch_size + mine.stop
        pieces = []
        while position < end:
            epoch, offset = divmod(position, count)
            pieces.append(epoch_order(epoch)[offset : offset + end - position])
            position += len(pieces[-1])
        yield torch.cat(pieces)


def _pick(
    tensor: torch.Tensor, steps: Iterable[torch.Tensor], device: str | torch.device
) -> Iterator[torch.Tensor]:
    """The images of each step's indices, out of a set that lies in memory."""
    if tensor.nbytes <= RESIDENT_BYTES:
        tensor = tensor.to(device)
    for indices in steps:
        yield tensor[indices.to(tensor.device, non_blocking=True)]


class _Fetched(Dataset):
    """What a loading process runs: a list of indices → one uint8 batch, or the UserError.

    Raised there, the error would arrive wrapped in that process's traceback; returned, it
    arrives as the one line that it is.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> torch.Tensor | UserError:
        try:
            return torch.stack([self.dataset[index] for index in indices])
        except UserError as error:
            return error


def _unchanged(batch: object) -> object:
    return batch


def _decode(
    dataset: Dataset, index_lists: Iterable[torch.Tensor], num_workers: int, pin: bool
) -> Iterator[torch.Tensor]:
    """The images of each list of indices, decoded by `num_workers` processes (0: right here)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    loader = DataLoader(
        _Fetched(dataset),
        batch_sampler=(indices.tolist() for indices in index_lists),
        collate_fn=_unchanged,
        num_workers=min(num_workers, cores),  # more would only wait for each other
        pin_memory=pin,
        generator=torch.Generator(),  # else it draws from the run's own random numbers
    )
    for images in loader:
        if isinstance(images, UserError):
            raise images
        yield images
