"""Image files: a folder → its paths, a path → uint8 pixels of one size; and LSUN's database.

This file knows how image files are found and decoded. It does not know the named sets, nor in
which order a run sees the images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.errors import UserError


@dataclass(frozen=True)
class Listing:
    """The image files of a set, sorted by path. labels: int64 (N,), or None where there are no
    classes; classes: their names."""

    paths: list[str]
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()


class ImageFiles(Dataset):
    """Image files, decoded on demand: shorter side resized to `img_size`, then centre crop.

    The first file's mode decides for all: greyscale → 1 channel, anything else → 3. `flip`,
    `labels` and `classes` as in images.Images.
    """

    tensor = None

    def __init__(self, name: str, files: Listing, img_size: int, flip: bool):
        self.name, self.paths, self.img_size, self.flip = name, files.paths, img_size, flip
        self.labels, self.classes = files.labels, files.classes
        self.channels = 1 if _is_grey(decode(self.paths[0])) else 3
        decode(self.paths[-1])  # an archive that was unpacked only in part ends in a torn file

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return resize_and_crop(decode(self.paths[index]), self.channels, self.img_size)


class LsunImages(Dataset):
    """LSUN's own database of encoded images, decoded on demand; needs the package lmdb.

    torchvision's reader keeps the list of keys as a pickle in the working directory; this one
    reads the keys from the database each time.
    """

    tensor, flip, labels, classes, channels = None, True, None, (), 3

    def __init__(self, name: str, folder: Path, img_size: int):
        self.name, self.folder, self.img_size = name, folder, img_size
        self._database = None
        try:
            with self._open().begin(buffers=False) as transaction:
                self.keys = list(transaction.cursor().iternext(values=False))
        except Exception as error:  # lmdb's errors have no base class outside the package
            raise self._broken(error) from error
        if not self.keys:
            raise UserError(f"{name}: {folder} contains no image: unpack it again")

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
        # Each loading process opens the database itself.
        return {**self.__dict__, "_database": None}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            with self._open().begin() as transaction:
                content = transaction.get(self.keys[index])
        except Exception as error:
            raise self._broken(error) from error
        return resize_and_crop(decode(io.BytesIO(content)), 3, self.img_size)


def resize_and_crop(image, channels: int, img_size: int) -> torch.Tensor:
    """A PIL image as uint8 (channels, img_size, img_size): shorter side resized, centre crop."""
    from torchvision.transforms.v2 import functional

    image = image.convert("L" if channels == 1 else "RGB")
    image = functional.resize(image, [img_size])  # PIL's bilinear is antialiased
    image = functional.center_crop(image, [img_size, img_size])
    return functional.pil_to_tensor(image)


def _is_grey(image) -> bool:
    return image.mode in ("1", "L", "LA")


def decode(path: str | io.BytesIO):
    """One image file as a PIL image, upright, 16-bit greys scaled to 8 bits. UserError names a
    damaged file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):
            # PIL's own conversion to 8 bits clips instead of scaling.
            values = np.asarray(image, dtype=np.float64) / 257
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        return image
    except Exception as error:  # PIL's decoders raise many kinds of errors
        reason = str(error).split("\n")[0] or type(error).__name__
        path = path if isinstance(path, str) else "in the database"
        raise UserError(
            f"cannot read the image {path} ({reason}): repair it or remove it from the folder"
        ) from error


# --- Finding image files -------------------------------------------------------------------------


def image_folder(root: Path) -> Listing:
    """Every image below `root`. The folders of the first level are the classes, if there are at
    least two and every image is in one of them."""
    if not root.is_dir():
        raise UserError(f"image_folder: {root} is not a directory")
    paths = sorted(images_below(root), key=Path)
    if not paths:
        raise UserError(
            f"image_folder: no image in {root} or below it (looked for {' '.join(_suffixes())})"
        )
    parts = [Path(path).relative_to(root).parts for path in paths]
    names = tuple(sorted({p[0] for p in parts}))
    if min(map(len, parts)) < 2 or len(names) < 2:
        return Listing(paths)
    number = {name: i for i, name in enumerate(names)}
    return Listing(paths, torch.tensor([number[p[0]] for p in parts]), names)


def _suffixes() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def images_in(folder: Path) -> list[str]:
    """The paths of the images directly in `folder`, sorted. Hidden files are leftovers of other
    programs (._photo.jpg, half-written temporaries)."""
    endings = _suffixes()
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if _is_image(e.name, endings))


def images_below(folder: Path) -> Iterable[str]:
    """The paths of the images at any depth below `folder`."""
    endings = _suffixes()
    for where, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(where, name) for name in names if _is_image(name, endings))


def _is_image(name: str, endings: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(endings)
