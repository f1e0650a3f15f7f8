"""Who may import whom, and what no file may do. See the first lines of main.py and README.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# The house, from the ground up: a file imports from its own room and from the floors below.
FLOORS = (
    ("runtime",),
    ("model", "dataset", "score", "diffusion"),
    ("sampling", "search"),
    ("evaluate", "train"),
    ("report",),
    ("commands",),
    ("main",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
FILES = [
    ROOT / line
    for line in TRACKED.stdout.splitlines()
    if not line.startswith(("tests/", "benchmark/")) and (ROOT / line).exists()
]


def room(path: Path) -> str:
    """The folder at the top that a file lies in, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The first part of every imported name, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if not node.level else room(path)


def calls(path: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    mine, found = room(path), set(imports(path))
    assert ("absl" in found) <= (mine == "main")
    higher = [name for name in found - {mine} if ROOMS.get(name, -1) >= ROOMS[mine]]
    if mine == "diffusion":  # its Sampler, until that has moved
        higher.remove("sampling")
    assert not higher


def test_every_room_is_there() -> None:
    assert ROOMS.keys() == {room(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
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
    modules = ", ".join(sorted({room(path) for path in FILES}))
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
    assert not {room(path) for path in FILES} & sys.stdlib_module_names
