"""What several tests share: the published network's numbers, and ways to run the program."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from torch import nn

from model import SlimmableUNet
from score import flops

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
UPSTREAM = TESTS / "upstream"
KERNELS = (ROOT / "model" / "cpu" / "__init__.py").exists()  # optional
SMALL = dict(T=50, ch=64, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.1, num_groups=16)

torch.set_num_threads(1)  # as the processes below have, so that they compute the same numbers

# A network that trains in milliseconds per step.
TINY = """
    --ch=16 --ch_mult=1 --ch_mult=2 --attn=1 --num_res_blocks=1 --num_groups=4 --T=10
    --beta_1=0.001 --beta_T=0.3 --img_size=8 --dataset=digits --slimmable_unet --device=cpu
    --num_workers=0 --fid_encoder=pixels
"""
TRAIN = f"""{TINY} --train --sandwich --batch_size=8 --total_steps=6 --save_step=3
    --sample_step=6 --sample_size=4 --log_step=1 --warmup=2 --ema_decay=0.9 --lr=0.001
"""
TINY, TRAIN = TINY.split(), TRAIN.split()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache directory for the tests alone, also of processes that they start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


# --- the published network ------------------------------------------------------------------------


def fill_by_recipe(net: nn.Module) -> nn.Module:
    """Weights that depend on an entry's name and shape alone: those behind the golden numbers."""
    state = net.state_dict()
    for name, value in state.items():
        if name == "time_embedding.timembedding.0.weight":
            continue
        random = np.random.default_rng(zlib.crc32(name.encode()))
        a = random.standard_normal(tuple(value.shape)).astype(np.float32)
        if name.endswith("bias"):
            a = 0.1 * a
        elif a.ndim == 1:
            a = 1 + 0.1 * a
        else:
            a = a / np.sqrt(np.prod(a.shape[1:]))
        state[name] = torch.from_numpy(np.asarray(a, dtype=np.float32))
    net.load_state_dict(state)
    return net.eval()


def golden_network() -> SlimmableUNet:
    return fill_by_recipe(SlimmableUNet(**SMALL))


def tiny_network(**changes: object) -> SlimmableUNet:
    settings = dict(
        T=10, ch=16, ch_mult=(1, 2), attn=(1,), num_res_blocks=1, dropout=0.1, num_groups=4
    )
    return fill_by_recipe(SlimmableUNet(**{**settings, **changes}))


# --- the program ----------------------------------------------------------------------------------


@dataclass
class Result:
    """How a run ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refused run says."""
        assert self.status in (1, 2), self
        assert "Traceback" not in self.err
        lines = [line for line in re.split(r"[\r\n]+", self.err) if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n")
        return lines[0]


_flops: dict[str, int] = {}


def flops_once(net: nn.Module, width: float, image_shape: tuple[int, int, int]) -> int:
    """score.flops, which takes a third of a second, once for networks of the same shape."""
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    key = f"{net.settings} {shapes} {width} {image_shape}"
    if key not in _flops:
        _flops[key] = flops(net, width, image_shape)
    return _flops[key]


def run_main(*arguments: object) -> Result:
    """`python main.py ARGUMENTS` without a process of its own; flags are as before afterwards.

    Latency is not measured, and FLOPs are counted once: both would be most of a small run's time.
    """
    from absl import app

    import main

    app.define_help_flags()  # released flagfiles name them
    argv = ["main.py", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        flagsaver.flagsaver(),
    ):
        patch.setattr(sys, "argv", argv)
        for command in ("plan", "search"):
            patch.setattr(f"commands.{command}.latency", lambda *arguments: 0.001)
        patch.setattr("score.flops", flops_once)
        try:
            main.run(main.parse(argv))
        except SystemExit as stopped:
            status = stopped.code or 0
    return Result(status, out.getvalue(), err.getvalue())


def process_main(folder: Path, *arguments: object) -> Result:
    """`python main.py ARGUMENTS` in `folder`, as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, arguments)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


# Copies of a process that has loaded torch and the program start at once; Python alone takes
# seconds of processor time to load them.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["conftest", "commands.train", "commands.search", "commands.evaluate", "sklearn.datasets",
     "torch.distributed.elastic.multiprocessing", "torch.utils.tensorboard"]
)  # fmt: skip


@pytest.fixture(scope="session")
def forks(cache_home: Path) -> None:
    """Start the process that `Started` copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, TESTS))))
        forkserver.ensure_running()


class Started:
    """`python main.py ARGUMENTS` as a process of its own in `folder`, in a group of its own.

    function: what to run with these arguments instead. Needs the fixture `forks`.
    """

    def __init__(self, folder: Path, *arguments: object, function: Callable | None = None) -> None:
        self.outputs = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
        self.process = FORKS.Process(
            target=_started, args=(folder, self.outputs, list(map(str, arguments)), function)
        )
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout: float = 100) -> Result:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it runs on"
        return Result(self.process.exitcode, *(path.read_text() for path in self.outputs))

    def wait_for(self, path: Path) -> None:
        """Until the file is there, and not empty."""
        deadline = time.monotonic() + 60
        while not path.exists() or not path.stat().st_size:
            assert self.process.exitcode is None, self.wait()
            assert time.monotonic() < deadline, path
            time.sleep(0.05)


def _started(folder: Path, outputs: list[Path], arguments: list[str], function: Callable) -> None:
    os.setsid()
    os.chdir(folder)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["main.py", *arguments]
    if function is None:
        from main import start as function
    function()


def alive(pid: int) -> bool:
    """Whether it runs; one that ended, and that nobody waits for, does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def run_alone(code: str, folder: Path, *arguments: object) -> None:
    """Python's `code` in `folder`, in a process that does not find this project."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    code += "\nimport sys\nassert not {'build', 'model', 'runtime'} & sys.modules.keys()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which we are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here: Path) -> Callable[..., str]:
    """Run the program; it must say one line that matches `match` and leave every file alone."""

    def call(match: str, *arguments: object) -> str:
        before = contents(here)
        line = run_main(*arguments).error
        assert re.search(match, line), line
        assert contents(here) == before
        return line

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny supernet, trained for six steps. Only to be read: see `run_folder`."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_main(*TRAIN, f"--logdir={folder}")
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def run_folder(trained: Path, here: Path) -> Path:
    """./run in the working folder: a trained supernet to work with."""
    folder = here / "run"
    folder.mkdir()
    for name in ("ckpt.pt", "flagfile.txt"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder
