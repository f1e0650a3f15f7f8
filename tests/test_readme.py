"""The pages tell the truth. `python tests/test_readme.py` prints the tables of docs/flags.md."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
sys.path.insert(0, str(ROOT))

import options  # noqa: E402


def test_the_page_of_flags_is_made_from_the_options() -> None:
    assert options.markdown() in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # a command on one line
    commands = re.findall(r"^ {4,}\S.*\bmain\.py (.*)$", text, re.M)
    names = {name for line in commands for name in re.findall(r"(?:^|\s)--?([a-zA-Z]\w*)", line)}
    own = {*options.OPTIONS, *options.MODES}
    assert names <= {*own, *(f"no{name}" for name in own), "flagfile"}


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_demo_table_is_that_of_the_recorded_run() -> None:
    record = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {
        row[1]: row[2].split() for row in re.finditer(r"^    (\w[\w. ]*?) {2,}(\d.*)$", text, re.M)
    }
    assert rows == {
        name: [
            f"{result['distance']:.4f}", f"{result['average_gflops']:.4f}",
            f"{100 * result['saving']:.1f}", "%", f"{result['ms_per_image']:.2f}",
        ]
        for name, result in record["results"].items()
    }  # fmt: skip
    assert f"{record['seconds']['all']:.0f} s" in text


def test_the_table_of_widths_is_that_of_the_recorded_runs() -> None:
    record = json.loads((ROOT / "results" / "widths" / "digits.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for cells in record["tables"].values():
        for name, seeds in cells.items():
            assert len(seeds) == 3
            runs = [*seeds.values()]
            (row,) = (
                li for li in text.splitlines() if li.startswith(f"| {name}, {runs[0]['steps']} ")
            )
            for width in runs[0]["distance"]:
                values = [run["distance"][width] for run in runs]
                shown = f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                assert f"| {shown} |" in row


if __name__ == "__main__":
    print(options.markdown())
