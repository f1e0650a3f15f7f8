"""Statistics of a data set's features: computed by all processes, kept in files.

This file knows images as batches that it is given: no data sets, no flags.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from runtime import files
from runtime.errors import UserError
from runtime.progress import progress
from score.fid import Array, Moments


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
    remedy = "delete it or name another file with --fid_cache, and it is computed anew"
    entries = _read_npz(Path(path), remedy)
    for key in ("mu", "sigma"):
        if key not in entries:
            found = ", ".join(sorted(entries)) or "nothing"
            raise UserError(f"{path} has no entry {key!r} (found: {found}): {remedy}")
    for key, expected in {"encoder": encoder_name, **about}.items():
        if key in entries and str(entries[key]) != str(expected):
            raise UserError(f"{path} is for {key} {entries[key]}, not {expected}: {remedy}")
    for key, shape in (("mu", (dim,)), ("sigma", (dim, dim))):
        if entries[key].shape != shape:
            raise UserError(
                f"{path}: {key} has shape {entries[key].shape}, but features of the encoder "
                f"{encoder_name} need {shape}: {remedy}"
            )
        if entries[key].dtype.kind not in "fiu" or not np.isfinite(entries[key]).all():
            raise UserError(f"{path}: {key} holds something else than finite numbers: {remedy}")
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
        raise UserError(f"there is no statistics file {path}") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is no readable .npz of plain arrays mu, sigma: {remedy}"
        ) from error
