"""Fast arithmetic: the same numbers to rounding, chosen by measurement, and the choice kept."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TRAIN, golden_network, run_main, tiny_network

from model import arithmetic, check_compiler, sampling_networks
from runtime.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = (3, 8, 8)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_sampling_networks_agree(width: float) -> None:
    net = golden_network()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    with torch.inference_mode():
        plain, half = (
            sampling_networks(net, [width], name)[width](x, t) for name in ("float32", "bfloat16")
        )
    assert (half - plain).square().mean() < 1e-3 * plain.square().mean()
    assert all(out.dtype == torch.float32 and out.is_contiguous() for out in (plain, half))


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What measurements will say, in turn; without one left, measuring fails."""
    answers = []
    monkeypatch.setattr(arithmetic, "_fastest", lambda *given: answers.pop(0))
    return answers


@pytest.mark.parametrize(
    ("amp", "device", "name"),
    [
        ("none", CPU, "float32"), ("bf16", CPU, "bfloat16"), ("fp16", CPU, "float16"),
        ("bf16", GPU, "bfloat16"), ("auto", GPU, "bfloat16"),
    ],
)  # fmt: skip
def test_only_auto_measures_and_on_a_cpu_alone(
    amp: str, device: torch.device, name: str, answers: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "arithmetic.json"
    assert arithmetic.chosen(None, [1.0], amp, SHAPE, device, path) == {1.0: name}
    assert not list(tmp_path.iterdir())


def test_measuring_leaves_the_net_and_the_random_numbers_alone() -> None:
    net = tiny_network().train()
    before = torch.get_rng_state()
    picked = arithmetic.chosen(net, [1.0, 0.5], "auto", SHAPE, CPU)
    assert set(picked) == {1.0, 0.5}
    assert set(picked.values()) <= set(arithmetic.CPU_CHOICES)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters())


def test_a_choice_is_kept(tmp_path: Path, answers: list[str]) -> None:
    path = tmp_path / "run" / "arithmetic.json"

    def chosen(amp: str, *widths: float) -> dict[float, str]:
        return arithmetic.chosen(None, widths, amp, SHAPE, CPU, path)

    answers += ["float32", "winograd"]
    assert chosen("auto", 1.0, 0.5) == {1.0: "float32", 0.5: "winograd"}
    assert json.loads(path.read_text()) == {"1.0": "float32", "0.5": "winograd"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # the lock is gone
    assert chosen("auto", 0.5) == {0.5: "winograd"}
    answers.append("bfloat16")
    assert chosen("auto", 1.0, 0.25) == {1.0: "float32", 0.25: "bfloat16"}
    # Searches that began when bf16 was the name of auto go on as they began.
    assert chosen("bf16", 0.5, 0.75) == {0.5: "winograd", 0.75: "bfloat16"}
    assert chosen("none", 0.5) == {0.5: "float32"}
    path.write_text('{"1.0": "decimal"}')
    with pytest.raises(UserError, match=r"arithmetic\.json"):
        chosen("auto", 1.0)


def test_of_two_at_a_time_the_second_takes_what_the_first_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "arithmetic.json"
    code = f"""
import sys, time
from pathlib import Path
import torch
from model import arithmetic
def fastest(net, width, shape):
    print("measuring", flush=True)
    sys.stdin.readline()
    return "winograd"
arithmetic._fastest = fastest
arithmetic.chosen(None, [1.0], "auto", {SHAPE}, torch.device("cpu"), Path({str(path)!r}))
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout.readline() == "measuring\n"
    read = arithmetic._read
    reads = []

    def first_read(path: Path) -> dict:
        reads.append(read(path))
        if len(reads) == 1:  # we saw no file; the other process may write it now
            other.stdin.write("\n")
            other.stdin.flush()
        return reads[-1]

    monkeypatch.setattr(arithmetic, "_read", first_read)
    monkeypatch.setattr(arithmetic, "_fastest", lambda *given: "float32")
    assert arithmetic.chosen(None, [1.0], "auto", SHAPE, CPU, path) == {1.0: "winograd"}
    assert reads[0] == {}
    assert other.communicate()[0] == ""
    assert other.returncode == 0


@pytest.mark.parametrize("loops", [True, False])
def test_another_program_does_not_decide(monkeypatch: pytest.MonkeyPatch, loops: bool) -> None:
    """Where something else slows most measurements, the quiet ones still tell."""
    truth = {"float32": 3.0, "bfloat16": 4.0, "winograd": 2.0}
    turns = dict.fromkeys(truth, 0)
    monkeypatch.setattr(arithmetic, "SamplingNetwork", lambda net, name: name)
    monkeypatch.setattr(arithmetic, "available", lambda: loops)

    def busy(name: str, shape: tuple, batch: int, *rest: object) -> float:
        if batch == 1:
            return truth[name]
        turns[name] += 1
        return truth[name] * (1 if turns[name] == 3 or name == "bfloat16" else 10)

    monkeypatch.setattr(arithmetic, "latency", busy)
    fastest = "winograd" if loops else "float32"
    assert arithmetic.chosen(tiny_network(), [1.0], "auto", SHAPE, CPU) == {1.0: fastest}


def test_evaluations_keep_their_choice(run_folder: Path, answers: list[str]) -> None:
    answers.append("bfloat16")
    command = [*TINY, "--eval", "--logdir=run", "--amp=auto", "--num_images=4", "--T=10"]
    first, second = run_main(*command), run_main(*command)
    assert first.status == 0, first.err
    assert "1: bfloat16" in first.out
    assert "1: bfloat16" in second.out
    assert json.loads((run_folder / "arithmetic.json").read_text()) == {"1.0": "bfloat16"}
    assert json.loads((run_folder / "eval.json").read_text())["arithmetic"] == {"1.0": "bfloat16"}


def test_fp16_does_not_train(refused: Callable) -> None:
    refused("--amp=fp16", *TRAIN, "--logdir=run", "--amp=fp16")


# --- without the folder model/cpu -----------------------------------------------------------------

REST = """
import sys, pytest
sys.path[:0] = [".", "tests"]
from conftest import TRAIN, run_main, tiny_network
from model import networks
train = [*TRAIN, "--logdir=run", "--total_steps=1", "--amp=auto"]
assert not networks.available()
done = run_main(*train)  # a step at several widths, then samples
assert done.status == 0, done.err
try:
    networks.sampling_networks(tiny_network(), [0.5], "winograd")
except networks.UserError as error:
    assert "model/cpu" in str(error)
else:
    raise AssertionError("winograd ran")
tests = ["test_model.py", "test_cpu.py", "test_train.py"]
options = ["-q", "--collect-only", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *(f"tests/{name}" for name in tests)]))
"""


def test_everything_else_works_without_the_kernels(tmp_path: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        kept = name.endswith((".py", ".toml", ".txt")) and not name.startswith("model/cpu/")
        if kept and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", REST]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list((tmp_path / "run" / "sample").glob("1_width_*.png"))


# --- torch.compile --------------------------------------------------------------------------------


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        check_compiler(CPU)


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_agree_and_fill_up_the_last_batch() -> None:
    try:
        check_compiler(CPU)
    except UserError:
        pytest.skip("no C++ compiler")
    from torch._dynamo.utils import counters

    net = tiny_network(ch=8, ch_mult=(1,), attn=())
    plain = sampling_networks(net, [0.5])[0.5]
    compiled = sampling_networks(net, [0.5], compiled=True)[0.5]
    x, t = torch.randn(3, *SHAPE), torch.tensor([1, 2, 3])
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, t), plain(x, t), rtol=1e-4, atol=1e-4)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        torch.testing.assert_close(compiled(x[:1], t[:1]), plain(x, t)[:1], rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == graphs
