"""Image files: a folder → its files, a file → uint8 pixels of one size; and LSUN's database.

This file knows how image files are found. It does not know the named sets, nor in which order a run
sees the images.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dataset.decoding import ENDINGS, decode, resize_and_crop
from dataset.survey import survey
from runtime.errors import UserError, one_line
from settings import DataSettings

# Folders that hold no images of the set: other programs' previews, copies and deleted files.
TRASH = ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found")


def rgb(background: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a colour's name or #rrggbb."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(
            f"--background={background}: a colour name, such as black, or #rrggbb"
        ) from error


def count_channels(options: DataSettings, default: int) -> int:
    """--channels, or `default` where that is auto."""
    return default if options.channels == "auto" else int(options.channels)


def flips(options: DataSettings, default: bool) -> bool:
    """--flip, or `default` where that is auto."""
    return default if options.flip == "auto" else options.flip == "on"


@dataclass(frozen=True)
class Listing:
    """The image files of a set, sorted by path. labels: int64 (N,), or None where there are no
    classes; classes: their names. left_out: files and folders that are no part of it, in words."""

    paths: list[str]
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class ImageFiles(Dataset):
    """Image files, decoded on demand: shorter side resized to `img_size`, then centre crop.

    All headers are read first, see survey.py, and files that cannot be decoded are an error.
    `flip`, `labels` and `classes` as in images.Images.
    """

    tensor = None

    def __init__(self, name: str, files: Listing, img_size: int, options: DataSettings):
        self.name, self.paths, self.img_size = name, files.paths, img_size
        self.labels, self.classes, self.left_out = files.labels, files.classes, files.left_out
        self.survey, self.background = survey(name, files.paths), rgb(options.background)
        self.channels = count_channels(options, 3 if self.survey.colour else 1)
        self.flip = flips(options, True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = decode(self.paths[index])
        return resize_and_crop(image, self.channels, self.img_size, self.background)


class LsunImages(Dataset):
    """LSUN's own database of encoded images, decoded on demand; needs the package lmdb.

    torchvision's reader keeps the list of keys as a pickle in the working directory; this one
    reads the keys from the database each time.
    """

    tensor, labels, classes = None, None, ()

    def __init__(self, name: str, folder: Path, img_size: int, options: DataSettings):
        self.name, self.folder, self.img_size = name, folder, img_size
        self.channels, self.flip = count_channels(options, 3), flips(options, True)
        self.background = rgb(options.background)
        try:
            with _database(self.folder).begin(buffers=False) as transaction:
                self.keys = list(transaction.cursor().iternext(values=False))
        except Exception as error:  # lmdb's errors have no base class outside the package
            raise self._broken(error) from error
        if not self.keys:
            raise UserError(f"{name}: {folder} contains no image: unpack it again")

    def _broken(self, error: Exception) -> UserError:
        return UserError(
            f"{self.name}: cannot read {self.folder} ({one_line(error)}): unpack it again"
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            with _database(self.folder).begin() as transaction:
                content = transaction.get(self.keys[index])
        except Exception as error:
            raise self._broken(error) from error
        image = decode(io.BytesIO(content))
        return resize_and_crop(image, self.channels, self.img_size, self.background)


_databases: dict[str, tuple[int, object]] = {}  # by real path: a process, and what it has open


def _database(folder: Path):
    """The database in `folder`, which lmdb lets a process open once, and not use after a fork."""
    import lmdb

    path = os.path.realpath(folder)
    process, database = _databases.get(path, (None, None))
    if process != os.getpid():
        if database is not None:
            database.close()  # this process's copy of its parent's
        database = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
        _databases[path] = os.getpid(), database
    return database


# --- Finding image files --------------------------------------------------------------------------


def image_folder(root: Path, train: bool) -> Listing:
    """Every image below `root`. The folders of the first level are the classes, if there are at
    least two and every image is in one of them; they are numbered in natural order."""
    if not train:
        raise UserError(
            "image_folder has no test split: give the folder of the test images instead"
        )
    if not root.is_dir():
        raise UserError(f"image_folder: {root} is not a directory")
    paths, left_out = images_below(root)
    if not paths:
        hint = f"; there are {', '.join(left_out)}" if left_out else ""
        raise UserError(
            f"image_folder: no image in {root} or below it (looked for {' '.join(ENDINGS)}){hint}"
        )
    paths.sort(key=lambda path: path.split(os.sep))
    parts = [path[len(str(root)) :].strip(os.sep).split(os.sep) for path in paths]
    folders = {part[0] for part in parts}
    if min(map(len, parts)) < 2 or len(folders) < 2:
        return Listing(paths, left_out=left_out)
    names = tuple(sorted(folders, key=natural))
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise UserError(f"image_folder: {name!r} in {root} is not UTF-8: rename this class")
    number = {name: i for i, name in enumerate(names)}
    return Listing(paths, torch.tensor([number[part[0]] for part in parts]), names, left_out)


def natural(name: str) -> tuple:
    """A key by which 9 comes before 10."""
    texts, numbers = re.split(r"\d+", name), re.findall(r"\d+", name)
    return [*zip(texts, [*map(int, numbers), -1], strict=True)], name


def images_in(folder: Path) -> list[str]:
    """The paths of the images directly in `folder`, sorted. Hidden files are leftovers of other
    programs (._photo.jpg, half-written temporaries)."""
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if _is_image(entry.name))


def images_below(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The paths of the images at any depth below `folder`, also in linked folders, and what was
    left out, in words."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    paths, hidden, loops, skipped, others = [], 0, 0, Counter(), Counter()
    # Of each folder, those that it is in, by device and inode: a link to one would never end.
    above: dict[str, tuple] = {str(folder): ()}
    for top, folders, files in os.walk(str(folder), onerror=fail, followlinks=True):
        about = os.stat(top)
        here, around = (about.st_dev, about.st_ino), above.pop(top)
        if here in around:
            loops += 1
            folders.clear()
            continue
        skipped.update(name for name in folders if name.startswith(".") or name in TRASH)
        folders[:] = [name for name in folders if name not in skipped]
        above |= {os.path.join(top, name): (*around, here) for name in folders}
        paths += [os.path.join(top, name) for name in files if _is_image(name)]
        rest = sorted(name for name in files if not _is_image(name))
        hidden += sum(name.startswith(".") for name in rest)
        others.update(
            Path(name).suffix.lower() or "no ending" for name in rest if not name.startswith(".")
        )
    endings = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
    reasons = (
        ("hidden or trash folders", skipped.total(), ", ".join(sorted(skipped)[:5])),
        ("hidden files", hidden, ""),
        ("other files", others.total(), endings),
        ("links back to a folder that they are in", loops, ""),
    )
    left_out = [
        f"{what}: {count}" + (f" ({which})" if which else "")
        for what, count, which in reasons
        if count
    ]
    return paths, tuple(left_out)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(ENDINGS)
