"""Who may import whom, and what no file may do. See the first lines of main.py and README.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "model").glob("*.py"), *(ROOT / "score").glob("*.py")])
LOW = {"diffusion", "data", "model", "score"}
MIDDLE = {"train", "evaluate", "search"}
# What knows nothing of images, networks or flags may be used by all.
COMMON = {"errors", "files", "rng", "distributed"}


def name(path: Path) -> str:
    """The module that a file belongs to: its folder's, where it has one."""
    return path.stem if path.parent == ROOT else path.parent.name


def imports(path: Path) -> Iterator[str]:
    """The first part of every imported name, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if not node.level else name(path)


def calls(path: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{name(path)}/{path.name}")
def test_import_directions(path: Path) -> None:
    mine, found = name(path), set(imports(path)) - {name(path)}
    assert ("absl" in found) <= (mine == "main")
    if mine != "main":
        assert "main" not in found
    if mine in LOW:
        assert not found & (LOW | MIDDLE)
    if mine in MIDDLE:
        assert not found & MIDDLE
    if mine in COMMON:
        assert not found & (LOW | MIDDLE)


def test_every_part_is_there() -> None:
    assert {"main"} | LOW | MIDDLE <= {name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{name(path)}/{path.name}")
def test_data_never_executes(path: Path) -> None:
    for call in calls(path):
        function = ast.unparse(call.func)
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        where = f"{path.name}:{call.lineno} {function}"
        assert function not in ("eval", "exec", "compile", "__import__"), where
        assert function.split(".")[0] not in ("pickle", "marshal", "shelve", "dill"), where
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if function in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", where


def test_no_file_fixes_a_device() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value != "cuda:0", path
        assert ".cuda()" not in path.read_text(), path


def test_importing_touches_no_device() -> None:
    modules = ", ".join(sorted({name(path) for path in FILES}))
    code = f"import {modules}, torch; assert not torch.cuda.is_initialized(), 'initialised'"
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_module_hides_one_of_the_standard_library() -> None:
    assert not {name(path) for path in FILES} & sys.stdlib_module_names
