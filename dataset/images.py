"""Named data sets: a name → uint8 images of one size, and endless training batches of them.

This file knows where images come from and in which order a run sees them. It does not know what
they are for: no network, no diffusion, no score, no flags.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import os
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import sets
from runtime.errors import UserError
from runtime.files import alone_in

# An in-memory set up to this size lives on the training device, where picking a batch is free.
RESIDENT_BYTES = 2 * 2**30


# --- What a data set is ---------------------------------------------------------------------------


class Images(Dataset):
    """A whole set in memory: `tensor` (N, C, H, W), uint8, or float as a network sees it.

    `flip` says whether a mirrored image is as good as the image itself. `labels` int64 (N,) and
    the names of the `classes`, where the set has classes; otherwise None and ().
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


class ImageFiles(Dataset):
    """A list of image files, decoded when asked for: shorter side to `img_size`, centre crop.

    The first file's mode decides for all: greyscale → 1 channel, anything else → 3. `labels` and
    `classes` are as those of Images.
    """

    tensor = None

    def __init__(self, name: str, files: sets.Listing, img_size: int, flip: bool):
        self.name, self.paths, self.img_size, self.flip = name, files.paths, img_size, flip
        self.labels, self.classes = files.labels, files.classes
        self.channels = 1 if _is_grey(_open_image(self.paths[0])) else 3
        _open_image(self.paths[-1])  # what an archive that was half unpacked leaves torn

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return _fitted(_open_image(self.paths[index]), self.channels, self.img_size)


class LsunImages(Dataset):
    """LSUN's own database of encoded images, decoded when asked for; needs the package lmdb.

    torchvision's reader keeps the list of keys as a pickle in the working folder; this one reads
    it from the database each time.
    """

    tensor, flip, labels, classes, channels = None, True, None, (), 3

    def __init__(self, name: str, folder: Path, img_size: int):
        self.name, self.folder, self.img_size = name, folder, img_size
        self._database = None
        try:
            with self._open().begin(buffers=False) as transaction:
                self.keys = list(transaction.cursor().iternext(values=False))
        except Exception as error:  # lmdb's errors have no base that could be imported without it
            raise self._broken(error) from error
        if not self.keys:
            raise UserError(f"{name}: {folder} holds no image: unpack it again")

    def _open(self):
        import lmdb

        if self._database is None:
            self._database = lmdb.open(
                str(self.folder), readonly=True, lock=False, readahead=False, meminit=False
            )
        return self._database

    def _broken(self, error: Exception) -> UserError:
        reason = str(error).split("\n")[0] or type(error).__name__
        return UserError(f"{self.name}: cannot read {self.folder} ({reason}): unpack it again")

    def __getstate__(self) -> dict:
        # A process that decodes opens the database itself.
        return {**self.__dict__, "_database": None}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            with self._open().begin() as transaction:
                content = transaction.get(self.keys[index])
        except Exception as error:
            raise self._broken(error) from error
        return _fitted(_open_image(io.BytesIO(content)), 3, self.img_size)


def _fitted(image, channels: int, img_size: int) -> torch.Tensor:
    """A PIL image as uint8 (channels, img_size, img_size): resized, then its centre."""
    from torchvision.transforms.v2 import functional

    image = image.convert("L" if channels == 1 else "RGB")
    image = functional.resize(image, [img_size])  # PIL's bilinear is antialiased
    image = functional.center_crop(image, [img_size, img_size])
    return functional.pil_to_tensor(image)


def _is_grey(image) -> bool:
    return image.mode in ("1", "L", "LA")


def _open_image(path: str | io.BytesIO):
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
        path = path if isinstance(path, str) else "in the database"
        raise UserError(
            f"cannot read the image {path} ({reason}): repair it or take it out of the folder"
        ) from error


# --- Where the named sets come from ---------------------------------------------------------------


def _cifar10(root: Path, img_size: int, train: bool) -> Images:
    from torchvision.datasets import CIFAR10

    # The files are pickles; torchvision opens them only after their MD5 sums agree.
    raw = _download(
        root,
        lambda: CIFAR10(str(root), train=train, download=True),
        f"cifar10: put cifar-10-python.tar.gz (or its folder cifar-10-batches-py) into {root}",
    )
    images = _resize(torch.from_numpy(raw.data).movedim(3, 1), img_size)
    return Images("cifar10", images, True, torch.tensor(raw.targets), raw.classes)


def _fashion_mnist(root: Path, img_size: int, train: bool) -> Images:
    from torchvision.datasets import FashionMNIST

    stem = f"{'train' if train else 't10k'}-images-idx3-ubyte"
    raw_folder = root / "FashionMNIST" / "raw"
    archives = [folder / f"{stem}.gz" for folder in (raw_folder, root)]
    archive = next((path for path in archives if path.is_file()), None)
    if archive and not (raw_folder / stem).is_file():
        images, labels = _read_idx_gz(archive, 3), None
        beside = archive.with_name(archive.name.replace("images-idx3", "labels-idx1"))
        if beside.is_file():
            labels = _read_idx_gz(beside, 1).long()
    else:
        raw = _download(
            root,
            lambda: FashionMNIST(str(root), train=train, download=True),
            f"fashion_mnist: put {stem}.gz into {root} (or into {raw_folder})",
        )
        images, labels = raw.data, raw.targets
    images = images[:, None]
    if img_size == 32:  # the usual 28 → 32: a black margin keeps every pixel as it is
        images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    # Not flipped: every shoe of this set points to the left.
    classes = () if labels is None else FashionMNIST.classes
    return Images("fashion_mnist", _resize(images, img_size), False, labels, classes)


def _digits(root: Path, img_size: int, train: bool) -> Images:
    from sklearn.datasets import load_digits

    if not train:
        raise UserError("digits has no test split: use its 1797 training images")
    digits = load_digits()
    values = digits.images  # (1797, 8, 8), whole numbers from 0 to 16
    images = torch.from_numpy(np.round(values * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    return Images("digits", _resize(images, img_size), False, labels, [*"0123456789"])


def _image_folder(root: Path, img_size: int, train: bool) -> ImageFiles:
    if not train:
        raise UserError("image_folder has no test split: name the test images' folder instead")
    return ImageFiles("image_folder", sets.image_folder(root), img_size, True)


def _files(list_files: Callable[[Path, bool], sets.Listing]) -> Callable:
    """The loader of a set that is a folder of image files."""

    def load_files(root: Path, img_size: int, train: bool) -> ImageFiles:
        return ImageFiles(list_files.__name__, list_files(root, train), img_size, True)

    return load_files


def _lsun_bedroom(root: Path, img_size: int, train: bool) -> ImageFiles | LsunImages:
    folder = sets.lsun_database(root, train)
    if folder is None:
        return _files(sets.lsun_bedroom)(root, img_size, train)
    if importlib.util.find_spec("lmdb") is None:
        raise UserError(
            f"lsun_bedroom: reading {folder} needs the package lmdb (pip install lmdb); or export "
            "its images into a folder bedroom_train"
        )
    return LsunImages("lsun_bedroom", folder, img_size)


AnySet = Images | ImageFiles | LsunImages

# A further data set is one more entry: (root, img_size, train) → Images or ImageFiles.
_LOADERS: dict[str, Callable[[Path, int, bool], AnySet]] = {
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "image_folder": _image_folder,
    "digits": _digits,
    "celeba": _files(sets.celeba),
    "celeba_hq": _files(sets.celeba_hq),
    "afhq": _files(sets.afhq),
    "lsun_bedroom": _lsun_bedroom,
    "imagenet": _files(sets.imagenet),
}
NAMES = tuple(_LOADERS)


def channels(name: str) -> int:
    """Image channels of a named set, without loading it; 3 where only its files could tell."""
    return 1 if name in ("digits", "fashion_mnist") else 3


def load(name: str, root: str | Path, img_size: int, train: bool = True) -> AnySet:
    """The data set `name`, whose files are (or are downloaded) below `root`.

    - cifar10: 50,000 / 10,000 colour images of 32×32.
    - fashion_mnist: 60,000 / 10,000 grey images of 28×28; `img_size` 32 pads them with zeros.
      The .gz files may lie in `root` itself, which is only read then.
    - image_folder: every image below `root`, sorted by path; shorter side resized, centre crop.
    - digits: scikit-learn's 1797 grey images of 8×8, all of them for training; needs no `root`.
    - celeba, celeba_hq, afhq, lsun_bedroom, imagenet: colour images in the folders that the sets'
      archives unpack to, see sets.py; an unpacking that broke off is noticed.

    Other sizes are resized, bilinear and antialiased. Items are uint8 (C, img_size, img_size);
    the set has `name`, `channels`, `flip`, `labels` (N,) int64 and `classes` (None and () where
    there are no classes), and `tensor` (N, C, H, W), which is None where images are decoded one by
    one. Raises UserError where files are missing, broken or not downloadable.
    """
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if img_size < 1:
        raise UserError(f"img_size is {img_size}: it must be at least 1")
    return _LOADERS[name](Path(root).expanduser(), img_size, train)


def _download(root: Path, fetch: Callable, remedy: str):
    """Call `fetch`, in one process at a time: several would unpack into each other's files. Where
    it can't get or use its files, say which file to put where."""
    try:
        with alone_in(root):
            return fetch()
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{remedy}; downloading or reading it failed ({reason})") from error


def _read_idx_gz(archive: Path, dims: int) -> torch.Tensor:
    """The uint8 (N, H, W) images (dims 3) or (N,) labels (dims 1) of a gzipped idx file, unpacked
    outside its (system) folder."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    read = read_image_file if dims == 3 else read_label_file
    try:
        with tempfile.NamedTemporaryFile() as unpacked:
            with gzip.open(archive) as packed:
                shutil.copyfileobj(packed, unpacked)
            unpacked.flush()
            return read(unpacked.name)
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
    """uint8 0..255 → float32 in [-1, 1]; what is float already, as latents are, stays."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1], clamped there → uint8, rounded to the nearest: what a PNG would hold."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --- Batches --------------------------------------------------------------------------------------


def batches(
    dataset: AnySet,
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


def batch_labels(
    dataset: AnySet,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """The labels, int64 (batch_size / world,) on the CPU, of the images that `batches` yields."""
    rank, world = part
    share = batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    for indices in _step_indices(len(dataset), batch_size, seed, start_step, mine):
        yield dataset.labels[indices]


def everything(
    dataset: AnySet, batch_size: int, num_workers: int = 0, start: int = 0, stop: int | None = None
) -> Iterator[torch.Tensor]:
    """Every image from `start` up to `stop` (all) once, in order, never flipped: uint8
    (≤ batch_size, C, H, W) on the CPU."""
    stop = len(dataset) if stop is None else stop
    if start >= stop:
        return iter(())
    if dataset.tensor is not None:
        return iter(dataset.tensor[start:stop].split(batch_size))
    return _decode(dataset, torch.arange(start, stop).split(batch_size), num_workers, False)


def fingerprint(dataset: AnySet) -> str:
    """16 hexadecimal digits that other images would change, wherever the files lie.

    Of image files: all names and sizes, and the content of 64 of them.
    """
    digest = hashlib.sha256()
    if isinstance(dataset, LsunImages):
        for key in dataset.keys:  # the keys are themselves made of the images' content
            digest.update(key)
    elif isinstance(dataset, ImageFiles):
        top = os.path.commonpath([*map(os.path.dirname, dataset.paths)])
        for path in dataset.paths:
            digest.update(f"{path[len(top) :]} {os.stat(path).st_size}\n".encode())
        for path in dataset.paths[:: max(1, len(dataset) // 64)]:
            digest.update(Path(path).read_bytes())
    else:
        for part in dataset.tensor.split(1000):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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


def _leave_signals(worker: int) -> None:
    """A signal to the whole group of processes is for the main one, which saves and ends us."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def heed_parent() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=heed_parent, daemon=True).start()


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
        worker_init_fn=_leave_signals,
    )
    for images in loader:
        if isinstance(images, UserError):
            raise images
        yield images
