"""Statistics of a data set's features: computed by all processes, written to files.

This file knows images as batches that it is given: no data sets, no flags.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime import files, memory, processes
from runtime.errors import UserError
from runtime.identity import agree
from runtime.npz import read_arrays, read_scalars
from runtime.progress import progress
from score.features import Encoder
from score.fid import Array, Gaussian, Moments

# What our files say.
FACTS = ("encoder", "encoder_weights", "dataset", "img_size", "split", "count", "content")
REMEDY = "delete it or name another file with --fid_cache, and it is computed again"


@dataclass(frozen=True)
class Images:
    """A data set, as its statistics see it.

    content: a fingerprint of the images. batches(start, stop): images start … stop − 1, in order,
    uint8 (≤ batch size, C, H, W).
    """

    count: int
    content: str
    batches: Callable[[int, int], Iterable[torch.Tensor]]


class UnavailableError(UserError):
    """The images are not here; statistics of them that are here can be used all the same."""


def default_path(
    folder: str | Path, dataset: str, img_size: int, encoder_name: str, content: str
) -> Path:
    """The file in `folder` that statistics of these images have by default.

    Earlier versions left `content` out of the name; such a file is used where it is there alone.
    """
    names = (f"{dataset}{img_size}{part}.train.{encoder_name}.npz" for part in (f"-{content}", ""))
    path, older = (Path(folder) / name for name in names)
    return older if older.exists() and not path.exists() else path


def load_or_compute(
    path: str | Path,
    encoder: Encoder,
    dim: int,
    about: dict[str, str | int],
    images: Callable[[], Images],
    description: str,
    say: Callable[[str], None] = print,
) -> Gaussian:
    """Mean (dim,) and covariance (dim, dim) of a data set's features, from the file `path`.

    On the encoder's device. Where there is no such file, all processes compute it together and go
    on after a kill. A file that says which images it is of must be of these. One that doesn't is
    believed, as is any where `images` raises UnavailableError, and `say` is told so, in the main
    process.

    about: what the file is for, besides encoder and images (dataset, img_size, split).
    description: for the bar.
    """
    path, data = Path(path), None
    if encoder.device.type == "cpu":  # the sum so far, a batch's, and what they are read from
        covariances = 3 * dim**2 * torch.float64.itemsize
        what = f"the covariance of {dim:,} features ({encoder.name})"
        memory.require(covariances, what, "choose another --fid_encoder")
    if not processes.gather(path.exists())[0]:
        data = images()
        _compute(path, encoder, about, data, description)
    mu, sigma, stored = _read(path, dim, encoder.name)
    doubt = ""
    if data is None and stored.keys() & {"content", "count"}:
        try:
            data = images()
        except UnavailableError as error:
            doubt = f"its images are not here to be compared ({error})"
    if "content" not in stored:
        doubt = "it does not say of which images it is"
    if data is not None:
        about = {**about, "count": data.count, "content": data.content}
    agree(path, stored, encoder.identity | about, REMEDY)
    if doubt and processes.is_main():
        say(f"statistics in {path} are believed: {doubt}")
    return Gaussian(mu, sigma, encoder.device, str(path))


def _compute(
    path: Path,
    encoder: Encoder,
    about: dict[str, str | int],
    images: Images,
    description: str,
) -> None:
    """Write the statistics of `images` to `path`."""
    if images.count < 2:
        raise UserError(
            f"{description}: a covariance needs at least 2 images, and the data set has "
            f"{images.count}; see --dataset and --data_root"
        )
    if processes.is_main():
        files.writable_folder(path.parent, "--fid_cache")  # not after hours
    share, rank = processes.share(images.count), processes.rank()
    identity = {
        **about,
        **encoder.identity,
        "content": images.content,
        "images": (share.start, share.stop),
    }
    unfinished = files.Unfinished(
        path.with_name(f".{path.name}.unfinished-{rank}.pt"), json.dumps(identity)
    )
    moments = _moments_of(images, share, encoder, description, unfinished)
    if processes.is_main():
        save_statistics(
            path, moments.mean, moments.covariance, count=moments.count, content=images.content,
            **encoder.identity, **about,
        )  # fmt: skip
    processes.gather(None)  # the others wait for the file
    unfinished.remove()
    if processes.is_main():  # those of a run with more processes, too
        files.remove_partial(path, ".unfinished-*.pt")


def _moments_of(
    images: Images,
    share: slice,
    encoder: Encoder,
    description: str,
    unfinished: files.Unfinished,
) -> Moments:
    """Of the features of all images, of which this process encodes its share."""
    moments, size = Moments(), share.stop - share.start
    if state := unfinished.read(encoder.device):
        moments = Moments.from_state(state)
    rest = images.batches(share.start + moments.count, share.stop)
    moments = statistics_of(rest, encoder, size, description, moments, unfinished)
    everyone = processes.gather(processes.on_cpu(moments.state()))
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
    mu, sigma, stored = _read(path, dim, encoder_name)
    agree(path, stored, {"encoder": encoder_name, **about}, REMEDY)
    return mu, sigma


def _read(
    path: str | Path, dim: int, encoder_name: str
) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """mu (dim,), sigma (dim, dim) in float64, and what the file says of itself."""
    with _advice():
        stored = read_scalars(path, FACTS)
    # Of another encoder is the better message where the shapes differ, too.
    agree(path, stored, {"encoder": encoder_name}, REMEDY)
    with _advice():
        arrays = read_arrays(path, {"mu": (dim,), "sigma": (dim, dim)})
        if not _is_covariance(arrays["sigma"]):
            raise UserError(f"{path}: sigma is no covariance: not symmetric, or negative somewhere")
    return arrays["mu"], arrays["sigma"], stored


def _is_covariance(sigma: np.ndarray) -> bool:
    """Whether sigma is symmetric and positive semidefinite, but for what half precision rounds."""
    rounding = 1e-3 * sigma.diagonal().max()
    if not np.allclose(sigma, sigma.T, rtol=0, atol=rounding):
        return False
    raised = sigma + rounding * np.sqrt(len(sigma)) * np.eye(len(sigma))
    return not sigma.any() or not int(torch.linalg.cholesky_ex(torch.from_numpy(raised)).info)


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Add to errors what the user can do."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from error
