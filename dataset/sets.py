"""Where the files of the large public image sets are: a folder → paths, labels, class names.

This file knows each set's layout as its archives unpack it, and how many images it has, so that an
archive that was unpacked only in part is an error before hours of training. It decodes no image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dataset.folders import Listing, images_below, images_in
from runtime.errors import UserError
from runtime.files import read_text

# Images of each split. AFHQ: of its second version, which is slightly smaller than its first.
COUNTS = {
    ("celeba", True): 162_770,
    ("celeba", False): 19_962,
    ("celeba_hq", True): 30_000,
    ("afhq", True): 14_336,
    ("afhq", False): 1_467,
    ("imagenet", True): 1_281_167,
    ("imagenet", False): 50_000,
    ("lsun_bedroom", True): 303_125,  # the smallest export in use: a tenth of the set
    ("lsun_bedroom", False): 300,
}
CLASSES = {"afhq": 3, "imagenet": 1000}
# With a smaller share of its images than this, a set counts as unpacked only in part.
ENOUGH = 0.99
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")


def celeba(root: Path, train: bool) -> Listing:
    """img_align_celeba/*.jpg; with list_eval_partition.txt beside it, only the split's images."""
    folder = _folder("celeba", root, ["celeba/img_align_celeba", "img_align_celeba"])
    paths = images_in(folder)
    partition = folder.parent / "list_eval_partition.txt"
    if partition.exists():
        try:
            pairs = (line.split() for line in read_text(partition).splitlines() if line.strip())
            names = {name for name, part in pairs if part == ("0" if train else "2")}
        except ValueError as error:
            raise UserError(
                f"celeba: {partition} is not the set's list of splits: download it again"
            ) from error
        paths = [path for path in paths if os.path.basename(path) in names]
    elif not train:
        raise UserError(
            f"celeba: {partition}, which lists the test images, is missing: put it there"
        )
    _check_complete("celeba", folder, len(paths), train)
    return Listing(paths)


def celeba_hq(root: Path, train: bool) -> Listing:
    """CelebAMask-HQ/CelebA-HQ-img/*.jpg, 1024×1024, or a copy of them at 256×256."""
    if not train:
        raise UserError("celeba_hq has no test split: use its 30,000 training images")
    places = ["CelebAMask-HQ/CelebA-HQ-img", "CelebA-HQ-img", "celeba_hq_256"]
    folder = _folder("celeba_hq", root, places)
    paths = images_in(folder)
    _check_complete("celeba_hq", folder, len(paths), train)
    return Listing(paths)


def afhq(root: Path, train: bool) -> Listing:
    """afhq/train/{cat,dog,wild}/*, first or second version; the test folder is test or val."""
    splits = ["train"] if train else ["test", "val"]
    places = [f"{top}{split}" for top in ("afhq/", "afhq_v2/", "") for split in splits]
    return _classified("afhq", _folder("afhq", root, places), train)


def imagenet(root: Path, train: bool) -> Listing:
    """train/n01440764/*.JPEG, …: one folder per class, 1000 of them; the same in val."""
    split = "train" if train else "val"
    tops = ("", "imagenet/", "ILSVRC/Data/CLS-LOC/", "ILSVRC2012/")
    return _classified("imagenet", _folder("imagenet", root, [top + split for top in tops]), train)


def lsun_bedroom(root: Path, train: bool) -> Listing:
    """Images exported from LSUN's database, in bedroom_train or bedroom, at any depth."""
    split = "train" if train else "val"
    places = [f"{top}bedroom_{split}" for top in ("", "lsun/")]
    places += ["bedroom", "lsun/bedroom", "data0/lsun/bedroom"] if train else []
    folder = _folder("lsun_bedroom", root, places)
    paths, left_out = images_below(folder)
    _check_complete("lsun_bedroom", folder, len(paths), train)
    return Listing(sorted(paths), left_out=left_out)


def lsun_database(root: Path, train: bool) -> Path | None:
    """The folder of LSUN's own database, bedroom_train_lmdb; None where there is none."""
    name = f"bedroom_{'train' if train else 'val'}_lmdb"
    places = [root / name, root / "lsun" / name]
    folder = next((place for place in places if place.is_dir()), None)
    if folder and not (folder / "data.mdb").is_file():
        raise UserError(f"lsun_bedroom: {folder} has no data.mdb: unpack {name}.zip again")
    return folder


# --- Helpers --------------------------------------------------------------------------------------


def _folder(name: str, root: Path, places: Sequence[str]) -> Path:
    """The first of `places` below `root` that exists; UserError where none does."""
    for place in places:
        if (root / place).is_dir():
            return root / place
    archives = _archives(root)
    hint = f"; {archives[0]} is there, but not unpacked" if archives else ""
    where = root if root.is_dir() else f"{root}, which is not a directory"
    raise UserError(
        f"{name}: no {places[0]} in {where} (see --data_root and docs/datasets.md){hint}"
    )


def _archives(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ARCHIVES)


def _check_complete(name: str, folder: Path, count: int, train: bool) -> None:
    """Raise UserError where `folder` has far fewer images than the set."""
    expected = COUNTS[name, train]
    if count < ENOUGH * expected:
        archives = _archives(folder) or _archives(folder.parent)
        again = f"unpack {archives[0]} again" if archives else "unpack its archive again"
        raise UserError(
            f"{name}: {folder} has {count} of the set's {expected} images, as if unpacked only in "
            f"part: {again}, or use a part on purpose with --dataset=image_folder"
        )


def _classified(name: str, folder: Path, train: bool) -> Listing:
    """The images of a folder that has one folder per class."""
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    archives = _archives(folder)
    if len(classes) != CLASSES[name]:
        hint = f"; {archives[0]} is not unpacked" if archives else ""
        raise UserError(
            f"{name}: {folder} has {len(classes)} folders, and the set has {CLASSES[name]} "
            f"classes{hint}"
        )
    paths, labels = [], []
    for label, class_name in enumerate(classes):
        images = images_in(folder / class_name)
        if not images:
            raise UserError(
                f"{name}: {folder / class_name} contains no image: unpack the set again"
            )
        paths += images
        labels += [label] * len(images)
    _check_complete(name, folder, len(paths), train)
    return Listing(paths, torch.tensor(labels), tuple(classes))
