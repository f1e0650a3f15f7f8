"""runtime/: progress bars in logs, files that cannot be what they should, stored results."""

import io
import os
import re
import resource
import socket
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from resource import RLIMIT_FSIZE

import numpy as np
import pytest
import torch

import options
from dataset.decoding import decode
from model import WidthSchedule, checkpoint
from runtime import files, memory
from runtime import progress as bars
from runtime.errors import UserError
from runtime.identity import agree
from runtime.npz import read_arrays, read_scalars
from runtime.progress import progress


def scalars(path: Path | str) -> dict:
    return read_scalars(path, ["name", "n", "x"])


def schedule(path: Path) -> WidthSchedule:
    return WidthSchedule.load(path, 10, [1.0])


# --- progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_in_a_log_is_a_line_every_half_minute(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with progress(100, "train", "step", initial=10, mininterval=0) as bar:
        for _ in range(90):
            now[0] += 1
            bar.update()
            bar.set_postfix(loss=0.5)
    log = capsys.readouterr().err
    assert "\r" not in log
    done = [
        re.match(r"train: +(\d+)%\|.*\| (\d+)/100 \[.*step/s.*loss=0.5", x)
        for x in log.splitlines()
    ]
    assert [match and match.groups() for match in done] == [
        ("40", "40"),
        ("70", "70"),
        ("100", "100"),
    ]


@pytest.mark.parametrize("leave", [True, False])
def test_a_quick_bar_in_a_log_is_its_last_line(capsys: pytest.CaptureFixture, leave: bool) -> None:
    with progress(3, "scores", "img", leave=leave) as bar:
        bar.update(3)
    bar.close()
    log = capsys.readouterr().err
    assert log.count("\n") == log.count("scores: 100%") == int(leave)


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(3, "scores", "img") as bar:
        bar.update(3)
    assert "\rscores: 100%" in sys.stderr.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_only_the_main_process_has_bars(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    monkeypatch.setattr(sys, "stderr", kind())
    monkeypatch.setattr(bars.processes, "is_main", lambda: False)
    with progress(3, "scores", "img") as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""


# --- files of other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        files.read_json,
        files.read_jsonl,
        files.read_image,
        checkpoint.load,
        scalars,
        schedule,
        lambda path: decode(str(path)),
        lambda path: options.parse(["main.py", f"--flagfile={path}"]),
    ],
)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("FIFO", "FIFO"), ("folder", "directory"), ("device", "device"), ("socket", "socket"),
        ("long", "too long"), ("null", "null"), ("loop", "symbolic links"),
    ],
)  # fmt: skip
def test_special_files_are_refused_at_once(
    here: Path, read: Callable, kind: str, reason: str
) -> None:
    path = Path({"device": "/dev/zero", "long": "a" * 300, "null": "a\0b"}.get(kind, "file"))
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        place = socket.socket(socket.AF_UNIX)
        place.bind(str(path))
        place.close()
    with pytest.raises(UserError, match=rf"{path.name[:1]}.*{reason}"):
        read(path)


def test_long_names_of_machines_stay_apart() -> None:
    pods = {files._shortened("trainer_" * 6 + end) for end in ("worker_0", "worker_1")}
    assert len(pods) == 2
    assert all(re.fullmatch(r"\w{40}", name) for name in pods)
    assert files._shortened("node_7") == "node_7"


def test_temporary_files_of_long_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of an earlier version may be that of a living writer on a machine named alike."""
    node = "a" * 60
    monkeypatch.setattr(files, "_NODE", node)
    monkeypatch.setattr(files, "_HOST", files._shortened(node))
    names = [f".x.{files._HOST}-99999999.tmp", f".old.{node[:40]}-99999999.tmp",
             f".new.{node[:40]}-99999999.tmp"]  # fmt: skip
    for name in names:
        Path(name).touch()
    os.utime(names[1], (0, 0))
    files.write_text("file", "")
    assert sorted(os.listdir()) == [names[2], "file"]


def test_two_machines_may_try_a_folder_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch, names = Path.touch, []

    def touch_and_lose(path: Path) -> None:
        touch(path)
        path.unlink()  # as another machine with the same name and process number does
        names.append(path.name)

    monkeypatch.setattr(Path, "touch", touch_and_lose)
    assert files.writable_folder(here) == here
    assert files._HOST in names[0]


def test_a_device_is_not_replaced_by_a_file(here: Path) -> None:
    Path("link").symlink_to("/dev/null")
    with pytest.raises(UserError, match="device"):
        files.write_text("link", "text")
    assert Path("link").is_symlink()


def test_partial_results_that_cannot_be_kept_are_a_warning(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("file").touch()
    for folder, kept in (("file", False), ("folder", True)):  # one of them cannot be
        unfinished = files.Unfinished(Path(folder) / ".work.pt", "one", every=0)
        for step in range(2):
            unfinished.write({"step": step, "x": torch.zeros(3)})
        assert unfinished.read() is None if not kept else unfinished.read()["step"] == 1
        unfinished.remove()
        assert capsys.readouterr().err.count("warning: partial results") == int(not kept)
    assert not list(Path("folder").iterdir())


def test_partial_results_on_a_full_disk(here: Path, capsys: pytest.CaptureFixture) -> None:
    unfinished, limits = files.Unfinished(Path("w.pt"), ""), resource.getrlimit(RLIMIT_FSIZE)
    resource.setrlimit(RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        unfinished.write({"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(RLIMIT_FSIZE, limits)
    assert "w.pt: File too large" in capsys.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ("", []),
        ('{"n": 1}\n', [{"n": 1}]),
        ('{"n": 1}\n{"n": 2, "dist', [{"n": 1}]),  # of a killed writer
        ('{"n": 1, "dist', []),
        ('{"n": 1}\n{"n": 2}', [{"n": 1}, {"n": 2}]),  # of an editor
    ],
)
def test_a_line_after_an_unfinished_one(here: Path, left: str, kept: list) -> None:
    Path("log.jsonl").write_text(left)
    assert files.read_jsonl("log.jsonl") == kept
    files.append_jsonl("log.jsonl", {"n": 3})
    assert files.read_jsonl("log.jsonl") == [*kept, {"n": 3}]


def test_what_does_not_fit_into_memory_is_refused_with_the_number() -> None:
    memory.require(memory.total(), "a batch", "lower --batch_size")
    with pytest.raises(UserError, match=r"a batch takes .* GiB .*--batch_size"):
        memory.require(memory.total() + 1, "a batch", "lower --batch_size")


# --- .npz -----------------------------------------------------------------------------------------


def write_npz(path: Path, **entries: object) -> None:
    """Arrays, or (header, number of zero bytes that follow)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if isinstance(entry, np.ndarray):
                    np.save(file, entry)
                    continue
                shape, descr, size = entry
                header = {"shape": shape, "fortran_order": False, "descr": descr}
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))


def test_npz_arrays(here: Path) -> None:
    mu = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    write_npz(Path("a.npz"), mu=mu.astype(np.float16), name=np.array("digits"), n=np.array([3]))
    assert np.array_equal(read_arrays("a.npz", {"mu": (2, 3)})["mu"], mu)
    found = scalars("a.npz")
    assert found == {"name": "digits", "n": 3}
    assert type(found["n"]) is int


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (((10**12,), "<f8", 0), "1000000000000"),
        (((10**6, 10**6), "<f8", 0), "1000000, 1000000"),
        (((3,), "<f8", 2**24), r"16,777,\d+ bytes instead of 24"),
        (((3,), "|O", 0), "object"),
        (((3,), "<U8", 0), "numbers"),
        (((3,), "<f8", 0), "readable"),  # nothing follows
        (((-3,), "<f8", 0), "-3"),
        (np.array([1, 2, np.nan]), "finite"),
        (np.zeros(4), r"\(4,\), not \(3,\)"),
    ],
)
def test_npz_arrays_are_judged_by_their_headers(here: Path, entry: object, message: str) -> None:
    # What nobody asks for is not read: `other` would take a terabyte.
    write_npz(Path("a.npz"), mu=entry, name=entry, other=((2**37,), "<f8", 2**24))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"a\.npz.*{message}"):
        read_arrays("a.npz", {"mu": (3,)})
    assert scalars("a.npz") == {}
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# --- identity -------------------------------------------------------------------------------------


def test_what_agrees() -> None:
    stored = {"seed": 1, "widths": [1.0, [0.5]], "only there": 3, "folder": "a"}
    wanted = {"seed": 1, "widths": (1.0, (0.5,)), "only here": 3, "folder": "b"}
    agree("log.jsonl", stored, wanted, "delete it", ignore=["folder"])
    agree("log.jsonl", stored, wanted, "delete it", ["folder"], defaults={"only here": 3})


def test_every_difference_is_named() -> None:
    stored = {"seed": 1, "widths": [1.0, 0.5], "images": 10}
    wanted = {"seed": 2, "widths": (1.0, 0.75), "images": 10, "amp": "no"}
    with pytest.raises(UserError) as caught:
        agree("log.jsonl", stored, wanted, "delete it", defaults={"amp": "bf16", "seed": 9})
    assert str(caught.value) == (
        "log.jsonl is for other settings (seed: 1 there, 2 here; "
        "widths: [1.0, 0.5] there, (1.0, 0.75) here; amp: bf16 there, no here); delete it"
    )
