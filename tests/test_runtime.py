"""runtime/: progress bars in logs, and stored results that are not what is wanted."""

import io
import re
import sys

import pytest

from runtime import progress as bars
from runtime.errors import UserError
from runtime.identity import agree
from runtime.progress import progress

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
