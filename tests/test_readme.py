"""The pages tell the truth. `python tests/test_readme.py` prints the tables of docs/flags.md."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
sys.path.insert(0, str(ROOT))

import main  # noqa: E402


def flag_table() -> str:
    """Every flag by group, as Markdown, from the groups in define_flags."""
    lines = []
    for line in inspect.getsource(main.define_flags).splitlines():
        if group := re.match(r"\s+# ([A-Z].*)", line):
            lines += ["", f"**{group[1]}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for name in re.findall(r"""^\s+[\w.]+\(\s*"(\w+)",""", line):
            flag = main.FLAGS[name]
            default = flag.default
            if isinstance(default, list):
                default = ", ".join(map(str, default))
            elif isinstance(default, bool):
                default = str(default).lower()
            shown = f"`{default}`" if default not in ("", None) else ""
            meaning = " ".join(flag.help.split()).replace("|", "\\|")
            lines.append(f"| `--{name}` | {shown} | {meaning} |")
    return "\n".join(lines).strip()


def test_every_flag_is_in_the_table() -> None:
    table = flag_table()
    assert [name for name in main.OWN_FLAGS if f"| `--{name}` |" not in table] == []


def test_the_page_of_flags_has_these_very_tables() -> None:
    assert flag_table() in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")


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


if __name__ == "__main__":
    print(flag_table())
