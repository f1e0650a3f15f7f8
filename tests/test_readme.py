"""The pages tell the truth. `python tests/test_readme.py` prints the tables of docs/flags.md, and
with `schemas` the schemas of docs/files.md."""

import inspect
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
sys.path.insert(0, str(ROOT))

import looks  # noqa: E402
import options  # noqa: E402
import report  # noqa: E402
from commands import evaluate, generate, search  # noqa: E402
from dataset import latents  # noqa: E402
from model import arithmetic, checkpoint  # noqa: E402
from model.diffusers import loading, trained  # noqa: E402
from runtime import schema  # noqa: E402
from search import log  # noqa: E402


def test_the_page_of_flags_is_made_from_the_options() -> None:
    assert options.markdown() in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")


def schemas() -> str:
    """The schemas of all files, as docs/files.md has them: their own source."""
    shared = inspect.getsource(schema)
    shared = re.search(r"^# Never NaN.*?(?=^def )", shared, re.M | re.S)[0].strip()
    owners = {
        "arithmetic.json": re.search(r"^Arithmetics = .*$", inspect.getsource(arithmetic), re.M)[0],
        "a checkpoint's settings": re.search(
            r"^Settings = .*?^\)$", inspect.getsource(checkpoint), re.M | re.S
        )[0],
    }
    classes = [
        log.Header, log.Scored, looks.Point, looks.Front, search.Latencies, report.Losses,
        report.StepScores, evaluate.Evaluation, generate.Generated, latents.Identity,
        latents.Config, loading.Config, loading.Index, trained.Config,
    ]  # fmt: skip
    texts = [f"# {name}\n{text}" for name, text in owners.items()]
    return "\n\n\n".join([shared, *texts, *(inspect.getsource(each).strip() for each in classes)])


def test_the_page_of_files_has_the_schemas() -> None:
    assert schemas() in (ROOT / "docs" / "files.md").read_text(encoding="utf-8")


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


def test_the_table_of_exports_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "results/benchmark/exported.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    for row in record["table"]:
        assert f"| {' | '.join(row)} |" in text


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


@pytest.mark.parametrize("name", ["digits", "fashion_mnist_14"])
def test_the_table_of_widths_is_that_of_the_recorded_runs(name: str) -> None:
    path = ROOT / "results" / "widths" / f"{name}.json"
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for cells in json.loads(path.read_text(encoding="utf-8"))["tables"].values():
        for cell, seeds in cells.items():
            runs = [*seeds.values()]
            start = f"| {cell}, {runs[0]['steps']} "
            (row,) = (line for line in text.splitlines() if line.startswith(start))
            for width in runs[0]["distance"]:
                values = [run["distance"][width] for run in runs]
                if name == "digits":
                    assert len(seeds) == 3
                    shown = f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                else:
                    judged = [next(iter(run["judged"].values()))[width] for run in runs]
                    distances = ", ".join(f"{value:.2f}" for value in values)
                    shown = f"{distances} ({', '.join(f'{1000 * value:.1f}' for value in judged)})"
                assert f"| {shown} |" in row


@pytest.mark.parametrize(("name", "digits"), [("search", 3), ("search_fashion_mnist", 2)])
def test_the_tables_of_searches_are_those_of_the_recorded_runs(name: str, digits: int) -> None:
    path = ROOT / "results" / "benchmark" / f"{name}.json"
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    for method in runs[0]:
        cells = []
        for budget in ("0.5", "0.3", "0.2"):
            fresh = [run[method]["fresh"].get(budget) for run in runs]
            if None in fresh:
                cells.append("–")
                continue
            error = math.sqrt(fmean(each["error"] ** 2 for each in fresh) / len(fresh))
            mean = fmean(each["distance"] for each in fresh)
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        if method != "full width":
            assert f"| {' | '.join(cells)} |" in text, method


if __name__ == "__main__":
    print(schemas() if "schemas" in sys.argv else options.markdown())
