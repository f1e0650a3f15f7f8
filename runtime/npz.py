"""Arrays of .npz files, judged by what they claim before any memory is asked for.

Entries that nobody names are not read, and nothing is ever unpickled. This file does not know what
the numbers mean.
"""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.files import check_file

HEADER = 2**16  # bytes; numpy's own take about a hundred
SCALAR = 2**12  # bytes


def read_scalars(path: str | Path, names: Iterable[str]) -> dict[str, object]:
    """Numbers and strings, the entries of these names that the file has and that are single."""
    values = {}
    with _opened(path) as archive:
        for name in names:
            if f"{name}.npy" not in archive.namelist():
                continue
            shape, dtype = _header(archive, name)
            if math.prod(shape) == 1 and dtype.kind in "fiubU" and dtype.itemsize <= SCALAR:
                values[name] = _array(archive, name).item()
    return values


def read_arrays(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The named entries, float64 and finite. UserError where one is missing, has another shape than
    it should, or is not of numbers."""
    arrays = {}
    with _opened(path) as archive:
        for name, shape in shapes.items():
            if f"{name}.npy" not in archive.namelist():
                names = sorted(entry.removesuffix(".npy") for entry in archive.namelist())
                entries = ", ".join(names[:8]) or "none"
                raise UserError(f"{path} has no entry {name!r} (its entries: {entries})")
            stored, dtype = _header(archive, name)
            if stored != shape:
                raise UserError(f"{path}: {name} has shape {stored}, not {shape}")
            if dtype.kind not in "fiu":
                raise UserError(f"{path}: {name} holds {dtype}, not numbers")
            size = math.prod(shape) * dtype.itemsize
            unpacked = archive.getinfo(f"{name}.npy").file_size
            if unpacked > size + HEADER + 12:
                raise UserError(f"{path}: {name} unpacks to {unpacked:,} bytes instead of {size:,}")
            arrays[name] = _array(archive, name).astype(np.float64)
            if not np.isfinite(arrays[name]).all():
                raise UserError(f"{path}: {name} holds values that are not finite")
    return arrays


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """The file as an archive; whatever is wrong with it is a UserError."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (
        OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zlib.error,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is not a readable .npz of plain arrays") from error


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an entry, of which no more than its header is read."""
    formats = np.lib.format
    readers = {1: formats.read_array_header_1_0, 2: formats.read_array_header_2_0}
    with archive.open(f"{name}.npy") as file:
        start = file.read(12)
    if int.from_bytes(start[8 : 10 if start[6:7] == b"\1" else 12], "little") > HEADER:
        raise ValueError("a header that long is none of numpy's")
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = readers[formats.read_magic(file)[0]](file)
    return shape, dtype


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
