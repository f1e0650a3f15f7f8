"""What the headers of all image files of a data set say, read once.

This file knows the summary of all headers and its cache: a JSON file in the user's cache directory,
whose name is a hash of all paths, sizes and modification times. The cache may be deleted at any
time; where it cannot be written, every run reads the headers again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset.decoding import Header, read_header, reason
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import read_json, write_json
from runtime.progress import progress

RULES = 1  # increase it when the same header gives another Header
CHUNK = 256  # files per task of a thread; threads help on network disks, where opening waits
NAMED = 5  # files that an error names


@dataclass(frozen=True)
class Survey:
    """Summary of all headers. colour, alpha, rescaled: number of images that have it, see
    decoding.Header; first_grey: whether the first file is grey; smallest, largest: (width, height)
    of the images with the least and the largest area."""

    images: int
    colour: int
    alpha: int
    rescaled: int
    first_grey: bool
    smallest: tuple[int, int]
    largest: tuple[int, int]

    def sizes(self) -> str:
        ends = [f"{width}×{height}" for width, height in (self.smallest, self.largest)]
        return " to ".join(dict.fromkeys(ends))


def survey(name: str, paths: Sequence[str]) -> Survey:
    """The summary for these files; each process of the group reads its share. UserError names
    files that cannot be decoded, if there are any."""
    cache = _cache_file(paths) if distributed.is_main() else None
    cached = distributed.gather(cache and _read(cache))[0]
    if cached:
        return cached
    share = distributed.share(len(paths))
    everyone = distributed.gather(_look(paths[share]))
    unusable = [pair for _, pairs in everyone for pair in pairs]
    if unusable:
        some = ", ".join(f"{path} ({why})" for path, why in unusable[:NAMED])
        more = ", …" if len(unusable) > NAMED else ""
        raise UserError(
            f"{name}: cannot read {len(unusable)} of {len(paths)} images: {some}{more}: repair "
            "them or remove them from the folder"
        )
    result = _summary(sum((headers for headers, _ in everyone), Counter()))
    if cache:
        with contextlib.suppress(OSError, UserError):
            write_json(cache, asdict(result))
    return result


def _look(paths: Sequence[str]) -> tuple[Counter[Header], list[tuple[str, str]]]:
    """How many files have which header, and (path, reason) of unusable ones."""
    headers, unusable = Counter(), []
    pool = ThreadPoolExecutor(8)
    try:
        hidden = len(paths) < 5000 or not distributed.is_main()
        with progress(len(paths), "read headers", "image", leave=False, disable=hidden) as bar:
            for path, header in zip(paths, _headers(pool, paths), strict=True):
                bar.update()
                if isinstance(header, Header):
                    headers[header] += 1
                else:
                    unusable.append((path, header))
    finally:
        pool.shutdown(cancel_futures=True)
    return headers, unusable


def _headers(pool: ThreadPoolExecutor, paths: Sequence[str]) -> Iterator[Header | str]:
    """The header of each file, or the reason why it cannot be used."""

    def header_or_reason(path: str) -> Header | str:
        try:
            return read_header(path)
        except Exception as error:  # Pillow's decoders raise many kinds of errors
            return reason(error)

    def chunk(start: int) -> list[Header | str]:
        return [*map(header_or_reason, paths[start : start + CHUNK])]

    return itertools.chain.from_iterable(pool.map(chunk, range(0, len(paths), CHUNK)))


def _summary(headers: Counter[Header]) -> Survey:
    """headers: in the order in which they were met, of the first file first."""
    by_area = sorted({header[:2] for header in headers}, key=lambda size: size[0] * size[1])
    return Survey(
        images=headers.total(),
        colour=sum(count for header, count in headers.items() if not header.grey),
        alpha=sum(count for header, count in headers.items() if header.alpha),
        rescaled=sum(count for header, count in headers.items() if header.rescaled),
        first_grey=next(iter(headers)).grey,
        smallest=by_area[0],
        largest=by_area[-1],
    )


# --- The cache ------------------------------------------------------------------------------------


def _cache_file(paths: Sequence[str]) -> Path | None:
    """The path of the cached summary for these files as they are now; None where a file or the
    user's home directory does not exist."""
    import PIL

    digest = hashlib.sha256(f"{RULES} {PIL.__version__}\n".encode())
    try:
        for path in paths:
            about = os.stat(path)
            digest.update(os.fsencode(os.path.abspath(path)))
            digest.update(f" {about.st_size} {about.st_mtime_ns}\n".encode())
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (OSError, RuntimeError):
        return None
    return Path(base) / "ddsm" / "images" / f"{digest.hexdigest()[:32]}.json"


def _read(cache: Path) -> Survey | None:
    """The summary in the file `cache`; None where it does not exist or is damaged."""
    try:
        return read_json(cache, Survey)
    except UserError:
        return None
