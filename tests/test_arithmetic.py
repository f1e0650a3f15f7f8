"""Fast arithmetic: the same numbers to rounding, chosen by measurement, and the choice kept."""

from pathlib import Path

import pytest
import torch
from conftest import golden_network, tiny_network

from model import arithmetic, check_compiler, sampling_networks
from runtime.errors import UserError
from train import TrainSettings

CPU = torch.device("cpu")
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


def test_only_a_cpu_has_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_fastest", lambda *given: pytest.fail("measured"))
    for amp, name in (("none", "float32"), ("fp16", "float16")):
        assert arithmetic.chosen(None, [1.0], amp, SHAPE, CPU) == {1.0: name}
    gpu = torch.device("cuda")
    assert arithmetic.chosen(None, [1.0], "bf16", SHAPE, gpu) == {1.0: "bfloat16"}
    assert arithmetic.chosen_for_training(None, "bf16", SHAPE, gpu) == "bfloat16"


def test_the_choice_is_measured_and_the_net_left_alone() -> None:
    net = tiny_network().train()
    before = torch.get_rng_state()
    assert arithmetic.chosen_for_training(net, "bf16", SHAPE, CPU) in arithmetic.CPU_CHOICES
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters())
    found = arithmetic.chosen(net, [1.0, 0.5], "bf16", SHAPE, CPU)
    assert set(found) == {1.0, 0.5}
    assert set(found.values()) <= set(arithmetic.CPU_CHOICES)


def test_a_search_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arithmetic.json"
    answers = iter(["float32", "bfloat16"])
    monkeypatch.setattr(arithmetic, "_fastest", lambda *given: next(answers))
    first = arithmetic.chosen(None, [1.0, 0.5], "bf16", SHAPE, CPU, path)
    assert first == {1.0: "float32", 0.5: "bfloat16"}
    assert arithmetic.chosen(None, [0.5, 1.0], "bf16", SHAPE, CPU, path) == first
    path.write_text('{"1.0": "decimal"}')
    with pytest.raises(UserError, match=r"arithmetic\.json is no table"):
        arithmetic.chosen(None, [1.0], "bf16", SHAPE, CPU, path)


def test_fp16_does_not_train() -> None:
    with pytest.raises(UserError, match="fp16 is for sampling"):
        TrainSettings(amp="fp16")


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


def test_another_program_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else slows most measurements, the quiet ones still tell."""
    truth = {"float32": 3.0, "bfloat16": 4.0, "winograd": 2.0}
    turns = dict.fromkeys(truth, 0)
    monkeypatch.setattr(arithmetic, "SamplingNetwork", lambda net, name: name)
    monkeypatch.setattr(arithmetic, "available", lambda: True)

    def busy(name: str, shape: tuple, batch: int, *rest: object) -> float:
        if batch == 1:
            return truth[name]
        turns[name] += 1
        return truth[name] * (1 if turns[name] == 3 or name == "bfloat16" else 10)

    monkeypatch.setattr(arithmetic, "latency", busy)
    assert arithmetic.chosen(tiny_network(), [1.0], "bf16", SHAPE, CPU) == {1.0: "winograd"}
