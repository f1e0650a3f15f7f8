"""Winograd's convolutions, and group norm with SiLU, against torch's own in double precision."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_network
from torch import Tensor, nn

from model import arithmetic, candidates
from model.cpu import dense, native, norm, winograd
from model.slimmable import (
    Channels,
    SlimmableConv2d,
    SlimmableGroupNorm,
    SlimmableSequential,
)

pytestmark = pytest.mark.skipif(not native.library(), reason="no C++ compiler")
CPU = torch.device("cpu")

# Images, channels in and out, height, width: sizes that 4 does not divide, one pixel, and more
# tiles than are worked on at a time.
SHAPES = [(1, 16, 32, 7, 7), (2, 32, 16, 5, 9), (3, 48, 16, 1, 1), (5, 16, 48, 32, 32)]


def off(found: Tensor, expected: Tensor) -> float:
    """The largest error over the expected root mean square."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def check_with_gradients(
    found: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor]
) -> None:
    """The values, and the gradients of what they were made of, are those of double precision."""
    after = torch.randn_like(expected)
    found.backward(after.float())
    expected.backward(after)
    assert off(found, expected) < 1e-4
    for mine, theirs in zip(inputs, exact, strict=True):
        assert off(mine.grad, theirs.grad) < 1e-4


def drawn(n: int, c: int, k: int, h: int, w: int, size: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(k, c, size, size) / (size * size * c) ** 0.5
    return [torch.randn(n, c, h, w), weight, torch.randn(k)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_and_gradients(
    size: int, shape: tuple[int, int, int, int, int], layout: torch.memory_format
) -> None:
    inputs = drawn(*shape, size)
    exact = [v.double().requires_grad_() for v in inputs]
    inputs = [inputs[0].to(memory_format=layout), *inputs[1:]]
    inputs = [v.requires_grad_() for v in inputs]
    found, expected = winograd.convolution(*inputs), F.conv2d(*exact, padding=size // 2)
    check_with_gradients(found, expected, inputs, exact)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_added(size: int, shape: tuple[int, int, int, int, int], everywhere: bool) -> None:
    n, _, k, h, w = shape
    inputs = [*drawn(*shape, size), torch.randn(n, k, *((1, 1) if everywhere else (h, w)))]
    exact = [v.double().requires_grad_() for v in inputs]
    inputs = [v.requires_grad_() for v in inputs]
    found = winograd.convolution(*inputs)
    expected = F.conv2d(*exact[:3], padding=size // 2) + exact[3]
    check_with_gradients(found, expected, inputs, exact)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, weight, bias = drawn(9, 32, 32, 24, 24)
    kernel = winograd.transformed(weight)
    whole = winograd.convolve(x, kernel, bias)
    alone = torch.cat([winograd.convolve(image[None], kernel, bias) for image in x])
    assert off(alone, whole) < 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 32), (32, 3), (16, 24)])
def test_other_channels_stay_direct(inputs: int, outputs: int) -> None:
    layer = SlimmableConv2d(Channels((inputs,), None), Channels((outputs,), None), 3)
    assert not winograd.fits(layer, layer.weight)


def test_other_convolutions_stay_direct() -> None:
    def conv(kernel: int, **settings: object) -> nn.Conv2d:
        return nn.Conv2d(32, 32, kernel, **settings)

    same = [conv(3, padding=1), conv(1)]
    assert all(winograd.fits(layer, layer.weight) for layer in same)
    others = [
        conv(3), conv(1, padding=1), conv(1, stride=2), conv(5, padding=2), conv((1, 3)),
        conv(3, padding=1, stride=2), conv(3, padding=1, groups=2),
        conv(3, padding=1, bias=False), conv(3, padding=1, padding_mode="circular"),
        conv(3, padding=1).double(), conv(3, padding=1).to("meta"),
    ]  # fmt: skip
    assert not any(winograd.fits(layer, layer.weight) for layer in others)


# Images and channels, groups, height, width; the channels' mean is far from 0.
@pytest.mark.parametrize("shape", [(1, 32, 32, 1, 3), (2, 96, 32, 5, 9), (3, 64, 8, 16, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("silu", [True, False])
def test_norm(
    shape: tuple[int, int, int, int, int], layout: torch.memory_format, silu: bool
) -> None:
    n, c, groups, h, w = shape
    torch.manual_seed(0)
    x = 3 * torch.randn(n, c, h, w) + 30 * torch.randn(c)[:, None, None]
    inputs = [x.to(memory_format=layout), torch.randn(c), torch.randn(c)]
    exact = [v.double().requires_grad_() for v in inputs]
    inputs = [v.requires_grad_() for v in inputs]
    assert norm.fits(inputs[1], groups)
    found = norm.norm(*inputs, groups, 1e-5, silu)
    expected = F.group_norm(exact[0], groups, *exact[1:], 1e-5)
    expected = F.silu(expected) if silu else expected
    check_with_gradients(found, expected, inputs, exact)


def test_silu_far_from_zero() -> None:
    bias = torch.linspace(-200, 200, 32)
    found = norm.norm(torch.randn(1, 32, 2, 2), torch.zeros(32), bias, 32, 1e-5, silu=True)
    found = found[0, :, 0, 0]
    torch.testing.assert_close(found, F.silu(bias), rtol=1e-5, atol=1e-30)


def test_only_a_norm_before_silu_takes_it_along() -> None:
    def layers() -> list[nn.Module]:
        return [SlimmableGroupNorm(8, Channels((32,)))]

    x = torch.randn(2, 32, 4, 4)
    for after in ([nn.SiLU()], [nn.SiLU(), nn.SiLU()], [nn.ReLU(), nn.SiLU()], []):
        row = SlimmableSequential(*layers(), *after)
        with native.active():
            assert off(row(x, 1.0), row.double()(x.double(), 1.0)) < 1e-4


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_candidates_agree(width: float) -> None:
    net = tiny_network(ch=64, num_groups=16)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    with torch.inference_mode():
        plain, fast = (candidates(net, [width], a)[width] for a in ("float32", "winograd"))
        assert off(fast(x, t), plain(x, t)) < 1e-4
    assert any(isinstance(m, dense.WinogradConv2d) for m in fast.modules())
    assert not candidates(net, [width], "winograd", compiled=True)[width].compiled
    assert not any(isinstance(m, dense.WinogradConv2d) for m in [*net.modules(), *plain.modules()])


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_training_gradients_agree(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_network(ch=32, num_groups=8, dropout=0.0).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a: calls.append(a) or convolve(*a))

    def gradients(enabled: bool) -> Tensor:
        net.zero_grad()
        with native.active(enabled):
            net(x, t, width).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    expected = gradients(False)
    assert not calls
    found = gradients(True)
    assert calls
    assert not native.wanted()
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_without_a_compiler_it_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, t = tiny_network(ch=32), torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    monkeypatch.setattr(native, "library", lambda: None)
    with torch.inference_mode():
        plain, other = (candidates(net, [1.0], a)[1.0](x, t) for a in ("float32", "winograd"))
    assert torch.equal(plain, other)
    assert arithmetic.chosen_for_training(net, "bf16", (3, 8, 8), CPU) != "winograd"
