"""The pages tell the truth. `python tests/test_readme.py` prints the tables of docs/flags.md."""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_pages_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


if __name__ == "__main__":
    print(flag_table())
