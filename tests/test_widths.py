"""The benchmark of widths: its commands run once, its tables are means over seeds."""

import argparse
import json
from pathlib import Path

import pytest

from benchmark import widths


def test_a_line_has_the_mean_and_the_range_over_seeds() -> None:
    distances = {"0": {"1": 1.0, "0.75": 2.0, "0.5": 3.0}, "1": {"1": 2.0, "0.75": 2.0, "0.5": 7.0}}
    cell = {
        seed: {"steps": 5, "cpu_seconds": 10.0 + int(seed) * 2, "distance": distance}
        for seed, distance in distances.items()
    }
    assert widths.markdown({"a cell": cell})[-1] == (
        "| a cell | 2 | 5 | 1.500 (1.000 to 2.000) | 2.000 (2.000 to 2.000) "
        "| 5.000 (3.000 to 7.000) |  | 11 |"
    )


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> widths.Widths:
    """A benchmark whose main.py writes what the real one would, and the flags it was given."""
    (tmp_path / "main.py").write_text(
        "import json, pathlib, sys\n"
        "flags = dict(flag.lstrip('-').partition('=')[::2] for flag in sys.argv[1:])\n"
        "with open('flags.jsonl', 'a') as file:\n"
        "    file.write(json.dumps(flags) + '\\n')\n"
        "folder = pathlib.Path(flags.get('logdir') or flags['flagfile']).with_suffix('')\n"
        "if 'train' in flags:\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    steps = flags.get('total_steps', '100')\n"
        "    (folder / 'steps').write_text(steps)\n"
        "else:\n"
        "    width = flags['assigned_width']\n"
        "    name = 'eval' if width == '1' else f'eval_width_{width}'\n"
        "    about = {'step': int((folder.parent / 'steps').read_text()), 'distance': 0.5}\n"
        "    about |= {'label': flags.get('fid_encoder', 'own'), 'average_gflops': float(width)}\n"
        "    (folder.parent / f'{name}.json').write_text(json.dumps(about))\n"
    )
    monkeypatch.setattr(widths, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return widths.Widths(
        argparse.Namespace(
            folder=Path("runs"),
            flagfile=Path("digits.txt"),
            seeds=1,
            images=20,
            data_root=None,
            steps=None,
            judge="another",
            finetune=False,
        )
    )


def test_what_is_done_is_not_done_again_and_compute_is_equal(job: widths.Widths) -> None:
    job.options.folder.mkdir()
    cells = [
        ("equal steps", "proportional groups, better"),
        ("equal steps", "proportional groups, published"),
        ("equal steps", "plain network"),
        ("equal compute", "proportional groups, published"),
        ("equal compute", "plain network"),
    ]
    for _ in range(2):
        for table, cell in cells:
            job.train_and_score(table, cell, 0)
    runs = [json.loads(line) for line in Path("flags.jsonl").read_text().splitlines()]
    # A training and its widths, once; a plain network has one width. Two encoders.
    assert len(runs) == 5 + 2 * (4 + 4 + 1 + 4 + 1)
    # Per step: better 1 + 0.75 + 0.5 + 0.25 = 2.5, published 1 + 0.625 + 0.25, plain 1.
    tables = json.loads(Path("results/widths/digits.json").read_text())["tables"]
    assert tables["equal steps"]["plain network"]["0"]["steps"] == 100
    longer = {cell: seeds["0"] for cell, seeds in tables["equal compute"].items()}
    assert {cell: result["steps"] for cell, result in longer.items()} == {
        "proportional groups, published": 133,
        "plain network": 250,
    }
    first = tables["equal steps"]["plain network"]["0"]["cpu_seconds"]
    assert longer["plain network"]["cpu_seconds"] > first  # of both parts
