"""Files written whole: a reader, or a killed writer, never leaves half a file behind."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import pickle
import platform
import re
import stat
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from runtime import memory
from runtime.errors import UserError
from runtime.schema import check

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
DEEPEST = 32  # lists within lists that a JSON text may have


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, rename it onto `path`.

    The data reach the disk before the rename, so a crash leaves the old file or the new one.
    The temporary name keeps the suffix, because writers such as numpy and PIL look at it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{_HOST}-{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent)
        check_place(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    """`name`, or the start and a digest of a long one: names of pods differ at their end."""
    return name if len(name) <= 40 else f"{name[:31]}_{sha256(name.encode()).hexdigest()[:8]}"


_NODE = re.sub(r"[^A-Za-z0-9_]", "_", platform.node()) or "here"
_HOST = _shortened(_NODE)
_PARTIAL = re.compile(r"\.(?:.+\.)?(?:(\w+)-)?(\d+)\.tmp(?:\.\w+)?")
_cleared: set[Path] = set()  # folders that this process has cleared


def _clear(folder: Path) -> None:
    """Remove what writers that were killed on this machine left in `folder`.

    Once for each folder, as large ones take long to list. On a disk that machines share, the
    writers of another one may be alive; names that don't say a machine, or only the start of a long
    one, are of earlier versions.
    """
    folder, hosts = folder.resolve(), (_HOST, _NODE[:40], None)
    if folder in _cleared:
        return
    _cleared.add(folder)
    for entry in list(os.scandir(folder)):
        match = _PARTIAL.fullmatch(entry.name)
        if not match or match[1] not in hosts or not entry.is_file(follow_symlinks=False):
            continue
        try:
            os.kill(int(match[2]), 0)  # sends nothing
        except ProcessLookupError:
            if match[1] == _HOST or time.time() - entry.stat().st_mtime > 86400:
                Path(entry).unlink(missing_ok=True)
        except (OSError, OverflowError):
            continue  # alive, or no number of a process


def check_file(path: str | Path) -> None:
    """UserError, with the true reason, where `path` is something else than a plain file.

    Opening a FIFO, or reading some devices, would wait for ever. FileNotFoundError where there is
    nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot use {path}: {reason}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "directory", stat.S_ISFIFO: "FIFO", stat.S_ISSOCK: "socket"}
        kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
        raise UserError(f"cannot use {path}: it is a {kind}, not a file")


def check_place(path: str | Path) -> None:
    """UserError where something else than a file is in the place of one that is to be written: a
    device would be replaced by a file."""
    with contextlib.suppress(FileNotFoundError):
        check_file(path)


def read_tensors(
    path: str | Path, remedy: str = "take another file", device: str | torch.device = "cpu"
) -> object:
    """The value in a file that torch.save wrote; nothing in it is ever executed.

    FileNotFoundError where there is nothing. UserError, with a remedy, where it cannot be read, or
    is an archive that unpacks to much more than its size (torch.save does not compress).
    """
    import torch

    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location=device, weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever torch's reader makes of foreign or damaged bytes
        with open(path, "rb") as file:
            is_ours = file.read(1) in (b"P", b"\x80")  # a zip archive or a pickle
        if is_ours and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} holds more than tensors and plain values, which could carry code, so it "
                f"was not loaded; save it again as a dict of state dicts, or {remedy}"
            ) from error
        # Torch's own text is long, and advises to let files execute.
        raise UserError(f"{path} is damaged, or is no file of torch.save; {remedy}") from error


def _check_archive(path: str | Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(x.file_size for x in archive.infolist()), os.path.getsize(path)
        if unpacked > 8 * size + 2**20:
            raise UserError(f"{path} has {size:,} bytes, but unpacks to {unpacked:,} bytes")
        for entry in archive.infolist():  # torch checks no checksum, and loads wrong numbers
            if entry.CRC:  # 0: torch was told to leave it out
                with archive.open(entry) as file:
                    while file.read(2**20):
                        pass


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: str | Path) -> str:
    """The UTF-8 text in `path`: the one door of all text.

    FileNotFoundError where there is nothing; UserError for whatever cannot be read.
    """
    check_file(path)
    try:
        # Parsed JSON takes several times the space of its text.
        memory.require(8 * os.path.getsize(path), f"reading {path}", "it is too large")
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str, name: object) -> object:
    """The value of a JSON text; UserError, which begins with `name`, where it is none.

    Nothing here nests deep, and what does would exhaust the stack wherever it is looked at.
    """
    try:
        value = json.loads(text)
        level, depth = [value], 0
        if text.count("[") + text.count("{") > DEEPEST:
            while level := [v for v in level if isinstance(v, list | dict)]:
                level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
                depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it nests {depth} deep")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON that can be used ({error})") from error
    return value


def read_json(path: str | Path, schema: type[T] = object, remedy: str = "") -> T:
    """The JSON value in `path`, as schema.check makes it; UserError where it is not so, or there is
    no such file."""
    try:
        return check(parse_json(read_text(path), path), schema, path, remedy)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def append_jsonl(path: str | Path, record: object) -> None:
    """Add one line of JSON to `path`; it is on the disk when this returns.

    What a killed writer, or a full disk, left of a last line is removed.
    """
    try:
        check_place(path)
        with open(path, "a+b") as file:
            _end_last_line(file)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _end_last_line(file: BinaryIO) -> None:
    """End the last line of a file that is open for appending; remove it where it is no JSON."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if _is_json(last):
        file.write(b"\n")  # an editor left it out
    else:
        file.truncate(size - len(last))


def _is_json(line: str | bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_jsonl(path: str | Path, schema: type[T] = object) -> list[T]:
    """The records of `path`, each as schema.check makes it; none where the file does not exist.

    A last line that a killed writer left unfinished is left out; anything else that is not JSON, or
    not as the schema says, is a UserError.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        return []
    if not _is_json(lines[-1]):
        lines.pop()
    return [
        check(parse_json(line, name := f"{path}, line {number}"), schema, name)
        for number, line in enumerate(lines, 1)
    ]


def write_jsonl(path: str | Path, records: Iterable[object]) -> None:
    """Replace `path` by these records, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tensors(path: str | Path, value: object) -> None:
    """Write `value` as torch.save does, whole or not at all."""
    import torch

    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's writer hides that, say, the disk is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@dataclass
class Unfinished:
    """A file with the partial results of long work, which goes on from there after a kill.

    identity: what they depend on; a file with another one is ignored, as is one that is damaged.
    every: seconds between two writes.
    """

    path: Path
    identity: str
    every: float = 60.0
    _written: float = field(default_factory=time.monotonic, init=False)
    _warned: bool = field(default=False, init=False)

    def read(self, device: str | torch.device = "cpu") -> dict | None:
        """The state that `write` was given, its tensors on `device`; None where there is none."""
        try:
            content = read_tensors(self.path, device=device)
        except (FileNotFoundError, UserError):
            return None
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            return None
        return content["state"]

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self.every

    def write(self, state: Mapping[str, object]) -> None:
        """Write `state`: tensors, numbers, and tuples, lists and dictionaries of them.

        Where that fails, as on a full disk, it is said on stderr once, and the work goes on.
        """
        try:
            write_tensors(self.path, {"identity": self.identity, "state": dict(state)})
        except UserError as error:
            if not self._warned:
                text = f"warning: partial results are not kept, so a kill loses them: {error}"
                print(text, file=sys.stderr, flush=True)
            self._warned = True
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the work is done."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def remove_partial(path: Path, ending: str) -> None:
    """Remove the partial files of `path`, .NAMEending, of runs with more processes too.

    ending: a pattern of pathlib's glob.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}{ending}"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


_locks: set[int] = set()  # file descriptors of folders that this process has locked


def _release_locks() -> None:
    """A child inherits its parent's locks, and would keep them where it outlives the parent."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)


@contextlib.contextmanager
def alone_in(folder: str | Path, wait: bool = True) -> Iterator[None]:
    """A block that one process of this machine at a time may run for this folder; the others wait,
    or raise UserError where `wait` is false.

    Makes the folder, and removes it again where it stayed empty. Where folders cannot be locked, as
    on some systems and network disks, no process waits.
    """
    locked = _lock(Path(folder), wait)
    try:
        yield
    finally:
        if locked:
            lock, made = locked
            _remove_empty(made)
            _unlock(lock)


def _lock(folder: Path, wait: bool) -> tuple[int, list[Path]] | None:
    """A descriptor that locks `folder`, and the folders that were made for it; None where it cannot
    be locked."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        while True:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(folder, os.O_RDONLY)
                _locks.add(lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    # Another process may have removed the folder that this one waited for.
                    if os.path.samestat(os.fstat(lock), os.stat(folder)):
                        return lock, missing
                except BlockingIOError as error:
                    _unlock(lock)
                    raise UserError(
                        f"another process is at work in {folder}: stop it or let it end, or name "
                        "another folder"
                    ) from error
                except BaseException:
                    _unlock(lock)
                    raise
                _unlock(lock)
    return None


def _unlock(lock: int) -> None:
    _locks.discard(lock)
    os.close(lock)


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def writable_folder(path: str | Path, flag: str = "--logdir") -> Path:
    """`path` as a folder that exists and can be written to, or UserError, which names `flag`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{_HOST}-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)  # that of another machine may have the same name
    except OSError as error:
        exists = isinstance(error, FileExistsError)
        why = "it is not a directory" if exists else error.strerror or error
        raise UserError(f"cannot write in {path}: {why}; see {flag}") from error
    return path


def save_grid(path: str | Path, images: Tensor, columns: int = 0) -> Tensor:
    """Save images (N, C, H, W) uint8 as one picture (C, H, W), which it returns.

    columns: images per row, about √N by default.
    """
    from torchvision.utils import make_grid

    grid = make_grid(images.cpu(), nrow=columns or math.ceil(math.sqrt(len(images))))
    save_image(path, grid)
    return grid


def save_image(path: str | Path, image: Tensor) -> None:
    """Save one image (C, H, W) uint8 as a PNG, whole or not at all."""
    from torchvision.io import encode_png

    with replacing(path) as temporary:
        # Not write_png, which leaves half a picture on a full disk and says nothing.
        temporary.write_bytes(encode_png(image.cpu()).numpy().tobytes())


def read_image(path: str | Path) -> Tensor:
    """The PNG at `path`, (C, H, W) uint8."""
    from torchvision.io import decode_image

    check_file(path)
    try:
        return decode_image(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: remove it, and it is made again") from error
