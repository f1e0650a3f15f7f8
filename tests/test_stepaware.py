"""Width schedules as files and as maps; the denoiser that follows one."""

import json
from pathlib import Path

import pytest
import torch

from model import StepAwareDenoiser, WidthSchedule, average
from runtime.errors import UserError

WIDTHS = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.txt"


def test_round_trip_keeps_integers(path: Path) -> None:
    WidthSchedule([1.0, 0.5, 0.25]).save(path)
    assert path.read_text() == "[1, 0.5, 0.25]\n"
    schedule = WidthSchedule.load(path, 3, WIDTHS)
    assert schedule == WidthSchedule([1, 0.5, 0.25])
    assert hash(schedule) == hash(WidthSchedule([1, 0.5, 0.25]))
    assert [schedule[t] for t in range(3)] == [1, 0.5, 0.25]
    assert all(type(width) is float for width in schedule.widths)
    assert len(schedule) == 3
    assert [p.name for p in path.parent.iterdir()] == ["search.txt"]
    path.write_text("[1, 1.0, 0.75,0.5]")  # as the published search writes it
    assert WidthSchedule.load(path, 4, WIDTHS).widths == (1, 1, 0.75, 0.5)


def test_one_entry_per_sampler_step(path: Path) -> None:
    path.write_text("[1, 0.5, 0.25]")
    timesteps = [0, 33, 66]
    schedule = WidthSchedule.load(path, 100, WIDTHS, timesteps)
    assert [schedule[t] for t in timesteps] == [1, 0.5, 0.25]
    # Any other timestep, whole or not, takes the nearest one's.
    assert [schedule[t] for t in (1, 16.4, 16.6, 50, 99)] == [1, 1, 0.5, 0.25, 0.25]
    # Entry 0 is the smallest timestep, in whichever order they come.
    assert WidthSchedule.load(path, 100, WIDTHS, timesteps[::-1]) == schedule
    assert schedule != WidthSchedule([1, 0.5, 0.25])
    # T entries are one per timestep, whatever the sampler keeps.
    path.write_text(json.dumps([0.5] * 99 + [1]))
    whole = WidthSchedule.load(path, 100, WIDTHS, timesteps)
    assert (whole[98], whole[99]) == (0.5, 1)
    path.write_text("[1, 0.5]")
    with pytest.raises(UserError, match=r"2 entries; expected 100 .* or 3 "):
        WidthSchedule.load(path, 100, WIDTHS, timesteps)


def test_steps_that_meet_have_one_width(tmp_path: Path) -> None:
    """Where two steps of a sampler round to one timestep, no entry is passed over in silence."""
    path, timesteps = tmp_path / "s.txt", [0, 1, 1, 4]
    for text in ("[0.5, 0.75, 0.75, 1]", "[0.5, 0.75, 1]"):
        path.write_text(text)
        schedule = WidthSchedule.load(path, 5, WIDTHS, timesteps)
        assert [schedule[t] for t in (0, 1, 4)] == [0.5, 0.75, 1]
    path.write_text("[0.5, 0.25, 0.75, 1]")
    with pytest.raises(UserError, match=r"0\.25 and 0\.75 for timestep 1"):
        WidthSchedule.load(path, 5, WIDTHS, timesteps)
    with pytest.raises(ValueError, match="zip"):
        WidthSchedule([1, 0.5], [0, 1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1 0.5 1]", "is not JSON"),
        ("1, 0.5, 1", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"0": 1}', "expected array, got object"),
        ("null", "expected array, got null"),
        ("[[1, 0.5, 1]]", r"\[0\].* got array"),
        ('[1, "0.5", 1]', r"\[1\].* got str"),
        ("[true, 1, 1]", r"\[0\].* got bool"),
        ("[1, 0.5]", "has 2 entries; expected 3 "),
        ("[]", "length >= 1"),
        ("[1, 0.6, 1]", r"entry 1 is width 0\.6, .*\(1, 0\.75, 0\.5, 0\.25\)"),
        ("[1, NaN, 1]", r"\[1\]"),
        ("[1, 1e999, 1]", r"\[1\].*1\.0"),
        ("[1, 1, 0]", "entry 2 is width 0"),
        ('__import__("os").system("touch ran")', "is not JSON"),
        (b"\xff\xfe\x00[1]", "cannot read"),
        (None, r"no width schedule at .*--search"),
    ],
)
def test_bad_files(here: Path, text: str | bytes | None, message: str) -> None:
    path = here / "search.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        WidthSchedule.load(path, 3, WIDTHS)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()
    with pytest.raises(UserError, match="directory"):
        WidthSchedule.load(here, 3, WIDTHS)


def test_the_denoiser_picks_the_network_of_each_timestep() -> None:
    calls = []

    def network(name: str, sign: int):
        def run(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            calls.append((name, t.tolist()))
            return sign * x

        return run

    large, small, x = network("large", 1), network("small", -1), torch.ones(2, 3, 4, 4)
    denoise = StepAwareDenoiser({1.0: large, 0.5: small}, WidthSchedule([1, 0.5, 1]), 3, "cpu")
    for t, sign in ((2, 1), (1, -1), (0, 1)):
        assert torch.equal(denoise(x, t), sign * x)
    assert calls == [("large", [2, 2]), ("small", [1, 1]), ("large", [0, 0])]
    # Candidates may have any names, a schedule gaps.
    denoise = StepAwareDenoiser({"a": large, "b": small}, ["a", "b"], 2, "cpu")
    assert torch.equal(denoise(x, 1), -x)
    denoise = StepAwareDenoiser(
        {0.5: small, 1.0: large}, WidthSchedule([0.5, 1], [0, 7]), 10, "cpu"
    )
    calls.clear()
    denoise(x, 7)
    denoise(x, 1, step=7)  # the second call of a step
    assert calls == [("large", [7, 7]), ("large", [1, 1])]


def test_average_counts_timesteps() -> None:
    schedule = WidthSchedule([1, 0.5, 0.5, 0.25])
    cost = {1.0: 8.0, 0.5: 2.0, 0.25: 1.0}
    assert average(schedule, range(4), cost) == (8 + 2 + 2 + 1) / 4
    assert average(schedule, [0, 2], cost) == 5
    assert average(schedule, iter([3]), cost) == 1
