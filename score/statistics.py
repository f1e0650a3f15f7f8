"""Statistics of a data set's features: computed by all processes, written to files.

This file knows images as batches that it is given: no data sets, no flags.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime import files, processes
from runtime.errors import UserError
from runtime.identity import agree
from runtime.progress import progress
from score.features import Encoder
from score.fid import Array, Gaussian, Moments


@dataclass(frozen=True)
class Images:
    """A data set, as its statistics see it.

    content: a fingerprint of the images. batches(start, stop): images start … stop − 1, in order,
    uint8 (≤ batch size, C, H, W).
    """

    count: int
    content: str
    batches: Callable[[int, int], Iterable[torch.Tensor]]


def load_or_compute(
    path: str | Path,
    encoder: Encoder,
    dim: int,
    about: dict[str, str | int],
    images: Callable[[], Images],
    description: str,
) -> Gaussian:
    """Mean (dim,) and covariance (dim, dim) of a data set's features, from the file `path`.

    On the encoder's device, and with a root that one process takes for all. Where there is no such
    file, all processes compute it together and go on after a kill.

    about: what the file is for, besides the encoder (dataset, img_size). description: for the bar.
    """
    path = Path(path)
    if not processes.gather(path.exists())[0]:
        _compute(path, encoder, about, images(), description)
    gaussian = Gaussian(*load_statistics(path, dim, encoder.name, **about), encoder.device)
    gaussian.share_root()
    return gaussian


def _compute(
    path: Path, encoder: Encoder, about: dict[str, str | int], images: Images, description: str
) -> None:
    """Write the statistics of `images` to `path`."""
    if images.count < 2:
        raise UserError(
            f"{description}: a covariance needs at least 2 images, and the data set has "
            f"{images.count}; see --dataset and --data_root"
        )
    share, rank = processes.share(images.count), processes.rank()
    identity = {
        **about,
        "encoder": encoder.name,
        "content": images.content,
        "images": (share.start, share.stop),
    }
    unfinished = files.Unfinished(
        path.with_name(f".{path.name}.unfinished-{rank}.pt"), json.dumps(identity)
    )
    moments = _moments_of(images, share, encoder, description, unfinished)
    if processes.is_main():
        save_statistics(
            path, moments.mean, moments.covariance, encoder=encoder.name, count=moments.count,
            **about,
        )  # fmt: skip
    processes.gather(None)  # the others wait for the file
    unfinished.remove()


def _moments_of(
    images: Images, share: slice, encoder: Encoder, description: str, unfinished: files.Unfinished
) -> Moments:
    """Of the features of all images, of which this process encodes its share."""
    state = unfinished.read(encoder.device)
    moments = Moments.from_state(state) if state else Moments()
    start = share.start + moments.count
    moments = statistics_of(
        images.batches(start, share.stop),
        encoder,
        share.stop - share.start,
        description,
        moments,
        unfinished,
    )
    everyone = processes.gather({key: value.cpu() for key, value in moments.state().items()})
    moments = Moments()
    for state in everyone:
        moments.merge(Moments.from_state(state))
    return moments


def statistics_of(
    batches: Iterable[torch.Tensor],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    total: int,
    description: str,
    moments: Moments | None = None,
    unfinished: files.Unfinished | None = None,
) -> Moments:
    """Images (B, C, H, W) uint8 → features → moments, under a progress bar of `total` images.

    moments: of the images before these. unfinished: where the moments are kept now and then.
    """
    moments = Moments() if moments is None else moments
    with progress(total, description, "img", initial=moments.count) as bar:
        for images in batches:
            moments.update(encoder(images))
            bar.update(len(images))
            if unfinished and unfinished.due():
                unfinished.write(moments.state())
    return moments


def save_statistics(path: str | Path, mu: Array, sigma: Array, **about: str | int) -> None:
    """Write mu (D,) and sigma (D, D) as pytorch-fid does, and what they are `about`.

    `about` (encoder, dataset, count, img_size, …) lets `load_statistics` refuse a wrong file.
    """
    mu, sigma = (np.asarray(torch.as_tensor(a).cpu(), dtype=np.float64) for a in (mu, sigma))
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, **about)


def load_statistics(
    path: str | Path, dim: int, encoder_name: str, **about: str | int
) -> tuple[np.ndarray, np.ndarray]:
    """mu (dim,) and sigma (dim, dim) in float64 from an .npz by pytorch-fid or by us.

    What the file says of itself must agree with `encoder_name` and `about`; pytorch-fid's files
    say nothing and are believed. UserError names the file, what is in it and what to do.
    """
    remedy = "delete it or name another file with --fid_cache, and it is computed again"
    entries = _read_npz(Path(path), remedy)
    for key in ("mu", "sigma"):
        if key not in entries:
            names = ", ".join(sorted(entries)) or "none"
            raise UserError(f"{path} has no entry {key!r} (its entries: {names}): {remedy}")
    stored = {name: value.item() for name, value in entries.items() if value.size == 1}
    agree(path, stored, {"encoder": encoder_name, **about}, remedy)
    for key, shape in (("mu", (dim,)), ("sigma", (dim, dim))):
        if entries[key].shape != shape:
            raise UserError(
                f"{path}: {key} has shape {entries[key].shape}, but features of the encoder "
                f"{encoder_name} need {shape}: {remedy}"
            )
        if entries[key].dtype.kind not in "fiu" or not np.isfinite(entries[key]).all():
            raise UserError(f"{path}: {key} holds values that are not finite numbers: {remedy}")
    return entries["mu"].astype(np.float64), entries["sigma"].astype(np.float64)


def _read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz; never unpickles."""
    try:
        with open(path, "rb") as file:  # np.load leaves a file that it cannot read open
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz with mu, sigma: {remedy}")
            with loaded:
                return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError as error:
        raise UserError(f"the statistics file {path} does not exist") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a readable .npz of plain arrays mu, sigma: {remedy}"
        ) from error
