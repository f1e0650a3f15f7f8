"""Width schedules as files and as maps; the denoiser that follows one."""

import json
from collections.abc import Callable
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


def test_reads_what_the_published_search_writes(path: Path) -> None:
    path.write_text("[1, 1.0, 0.75,0.5]")  # no newline at the end
    assert WidthSchedule.load(path, 4, WIDTHS).widths == (1, 1, 0.75, 0.5)


def test_one_entry_a_sampler_step(path: Path) -> None:
    path.write_text("[1, 0.5, 0.25]")
    timesteps = [0, 33, 66]
    schedule = WidthSchedule.load(path, 100, WIDTHS, timesteps)
    assert [schedule[t] for t in timesteps] == [1, 0.5, 0.25]
    # Any other timestep, whole or not, takes the nearest one's.
    assert [schedule[t] for t in (1, 16.4, 16.6, 50, 99)] == [1, 1, 0.5, 0.25, 0.25]
    # Entry 0 is the smallest timestep, in whichever order they come.
    assert WidthSchedule.load(path, 100, WIDTHS, timesteps[::-1]) == schedule
    assert schedule != WidthSchedule([1, 0.5, 0.25])
    # T entries are one a timestep, whatever the sampler keeps.
    path.write_text(json.dumps([0.5] * 99 + [1]))
    whole = WidthSchedule.load(path, 100, WIDTHS, timesteps)
    assert (whole[98], whole[99]) == (0.5, 1)


def test_length_must_fit_the_timesteps() -> None:
    with pytest.raises(ValueError, match="zip"):
        WidthSchedule([1, 0.5], [0, 1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1, 0.5", "is not JSON"),
        ("[1 0.5 1]", "is not JSON"),
        ("1, 0.5, 1", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("0.5", "is not a list of numbers"),
        ('{"0": 1}', "is not a list of numbers"),
        ("null", "is not a list of numbers"),
        ("[[1, 0.5, 1]]", "is not a list of numbers"),
        ('[1, "0.5", 1]', "is not a list of numbers"),
        ("[1, null, 1]", "is not a list of numbers"),
        ("[true, 1, 1]", "is not a list of numbers"),
        ("[1, 0.5]", "has 2 entries; expected 3 "),
        ("[]", "has 0 entries; expected 3 "),
        ("[1, 0.6, 1]", r"entry 1 is width 0\.6, .*\(1, 0\.75, 0\.5, 0\.25\)"),
        ("[1, NaN, 1]", "entry 1 is width nan"),
        ("[1, 1e999, 1]", "entry 1 is width inf"),
        ("[1, 1, 0]", "entry 2 is width 0"),
        ("[-1, 1, 1]", "entry 0 is width -1"),
    ],
)
def test_bad_files(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        WidthSchedule.load(path, 3, WIDTHS)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_length_names_every_length_that_would_do(path: Path) -> None:
    path.write_text("[1, 0.5]")
    with pytest.raises(UserError, match=r"2 entries; expected 100 .* or 3 "):
        WidthSchedule.load(path, 100, WIDTHS, [0, 33, 66])


def test_code_is_refused_and_not_run(path: Path) -> None:
    mark = path.with_name("ran")
    path.write_text(f'__import__("os").system("touch {mark}")')
    with pytest.raises(UserError, match="is not JSON"):
        WidthSchedule.load(path, 3, WIDTHS)
    assert not mark.exists()


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(UserError, match=r"no width schedule at .*--search"):
        WidthSchedule.load(path, 3, WIDTHS)
    with pytest.raises(UserError, match="cannot read"):
        WidthSchedule.load(path.parent, 3, WIDTHS)
    path.write_bytes(b"\xff\xfe\x00[1]")
    with pytest.raises(UserError, match="cannot read"):
        WidthSchedule.load(path, 3, WIDTHS)


def test_the_denoiser_picks_the_network_of_each_timestep() -> None:
    calls = []

    def network(name: str) -> Callable:
        def run(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            calls.append((name, t.tolist()))
            return x + 1

        return run

    networks = {1.0: network("large"), 0.5: network("small")}
    denoise = StepAwareDenoiser(networks, WidthSchedule([1, 0.5, 0.5, 1]), 4, "cpu")
    x = torch.zeros(2, 3, 4, 4)
    assert torch.equal(denoise(x, 3), x + 1)
    for t in (2, 1, 0):
        denoise(x, t)
    assert calls == [
        ("large", [3, 3]), ("small", [2, 2]), ("small", [1, 1]), ("large", [0, 0]),
    ]  # fmt: skip


def test_candidates_may_have_any_names_and_the_schedule_gaps() -> None:
    networks = {"a": lambda x, t: x, "b": lambda x, t: -x}
    x = torch.ones(1, 1, 1, 1)
    denoise = StepAwareDenoiser(networks, ["a", "b"], 2, "cpu")
    assert [float(denoise(x, t)) for t in (0, 1)] == [1, -1]
    seen = []
    networks = {0.5: lambda x, t: seen.append(t.tolist()) or x}
    schedule = WidthSchedule([0.5, 0.5], [0, 7])
    StepAwareDenoiser(networks, schedule, 10, "cpu")(x, 7)
    assert seen == [[7]]


def test_average_counts_timesteps() -> None:
    schedule = WidthSchedule([1, 0.5, 0.5, 0.25])
    cost = {1.0: 8.0, 0.5: 2.0, 0.25: 1.0}
    assert average(schedule, range(4), cost) == (8 + 2 + 2 + 1) / 4
    assert average(schedule, [0, 2], cost) == 5
    assert average(schedule, iter([3]), cost) == 1
