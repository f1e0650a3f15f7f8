"""Who may import whom, and what no file may do. See the first lines of main.py and README.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# The house, from the ground up: a file imports from its own room and from the floors below.
FLOORS = (
    ("runtime",),
    ("settings", "looks"),
    ("model", "dataset", "score", "diffusion"),
    ("sampling", "search"),
    ("evaluate", "train"),
    ("build", "report"),
    ("options",),
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
    if mine not in ("main", "options"):
        assert not {"absl", "options"} & found - ({"options"} if mine == "commands" else set())
    higher = [name for name in found - {mine} if ROOMS.get(name, -1) >= ROOMS[mine]]
    assert not higher


def modules(path: Path) -> set[Path]:
    """The files that a file imports, but for its room's own door."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {str(f.relative_to(ROOT).with_suffix("")).replace("/", "."): f for f in FILES}
    return {files[name] for name in names if name in files}


def test_no_circle_of_imports() -> None:
    imported = {path: modules(path) for path in FILES}

    def reached(path: Path, before: tuple[Path, ...]) -> None:
        assert path not in before, [str(p.relative_to(ROOT)) for p in (*before, path)]
        for other in imported[path]:
            reached(other, (*before, path))

    for path in FILES:
        reached(path, ())


def test_main_is_short_and_alone_reads_flags() -> None:
    assert len((ROOT / "main.py").read_text().splitlines()) <= 150
    readers = [path.name for path in FILES if "FLAGS" in path.read_text()]
    assert readers == ["options.py"]


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


def test_importing_touches_no_device_and_nothing_slow() -> None:
    modules = ", ".join(sorted({room(path) for path in FILES} | {
        f"commands.{path.stem}" for path in FILES if path.parent.name == "commands"
    }))  # fmt: skip
    slow = {"diffusers", "matplotlib", "scipy.stats", "sklearn", "tensorboard", "torch._dynamo"}
    code = (
        f"import {modules}, sys, torch; assert not torch.cuda.is_initialized(), 'initialised'; "
        f"assert not {slow} & set(sys.modules), {slow} & set(sys.modules)"
    )
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


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    allowed = re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    oldest = (ROOT / "constraints-oldest.txt").read_text()
    pinned = re.findall(r"^([\w-]+)==([\d.]+)", oldest, re.M)
    runs_on = dict(allowed[: [name for name, _ in allowed].index("pytest")])
    assert dict(pinned).keys() == runs_on.keys()
    for name, version in pinned:
        assert (version + ".0.0").startswith(runs_on[name] + "."), name
