"""The optional kernels: right to rounding, and put in without a change of any parameter."""

import platform
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import KERNELS, ROOT, tiny_network
from torch import Tensor, nn

if not KERNELS:
    pytest.skip("there is no model/cpu", allow_module_level=True)

from model import cpu, ready_to_train, sampling_networks
from model.cpu import fused, native, norm, winograd
from model.cpu.dropout import FastDropout
from runtime import processes

compiled = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
CPU = torch.device("cpu")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def error(value: Tensor, expected: Tensor) -> float:
    """The largest error over the expected root mean square."""
    value, expected = value.detach(), expected.detach()
    return float((value - expected).abs().max() / expected.square().mean().sqrt())


def mean_error(value: Tensor, expected: Tensor) -> float:
    """The root mean square error over that of the expected."""
    return float((value.detach() - expected.detach()).norm() / expected.detach().norm())


def check(function: object, reference: object, inputs: list[Tensor]) -> None:
    """The values and the gradients of `function` are those of `reference` in double precision,
    up to the rounding of the first input's type."""
    half = inputs[0].dtype == torch.bfloat16
    how, tolerance = (mean_error, 2**-8) if half else (error, 1e-4)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    inputs = [v.detach().requires_grad_() for v in inputs]
    value, expected = function(*inputs), reference(*exact)
    gradient = torch.randn_like(expected)
    value.backward(gradient.to(value))
    expected.backward(gradient)
    assert how(value, expected) < tolerance
    for ours, theirs in zip(inputs, exact, strict=True):
        assert how(ours.grad, theirs.grad) < tolerance


# --- the loops, against torch's own in double precision -------------------------------------------


# Images, channels in and out, height, width: sizes that 4 does not divide, one pixel, and more
# tiles than are worked on at a time.
@compiled
@pytest.mark.parametrize(
    "shape", [(1, 16, 32, 7, 7), (2, 32, 16, 5, 9), (3, 48, 16, 1, 1), (5, 16, 48, 32, 32)]
)
@pytest.mark.parametrize("size", [1, 3])
def test_convolution(shape: tuple[int, int, int, int, int], size: int) -> None:
    n, c, k, h, w = shape
    torch.manual_seed(0)
    x, weight = torch.randn(n, c, h, w), torch.randn(k, c, size, size) / (size * size * c) ** 0.5
    inputs = [x, weight, torch.randn(k)]
    for layout in LAYOUTS:
        inputs[0] = x.to(memory_format=layout)
        check(winograd.convolution, lambda *v: F.conv2d(*v, padding=size // 2), inputs)
    for added in ((n, k, h, w), (n, k, 1, 1)):
        check(
            winograd.convolution,
            lambda *v: F.conv2d(*v[:3], padding=size // 2) + v[3],
            [*inputs, torch.randn(added)],
        )


@compiled
def test_an_image_does_not_depend_on_its_batch() -> None:
    x, bias = torch.randn(9, 32, 24, 24), torch.randn(32)
    kernel = winograd.transformed(torch.randn(32, 32, 3, 3))
    alone = torch.cat([winograd.convolve(image[None], kernel, bias) for image in x])
    assert error(alone, winograd.convolve(x, kernel, bias)) < 1e-6


@compiled
def test_other_convolutions_stay_direct() -> None:
    def conv(kernel: int, channels: tuple[int, int] = (32, 32), **settings: object) -> nn.Conv2d:
        return nn.Conv2d(*channels, kernel, **settings)

    same = [conv(3, padding=1), conv(1)]
    assert all(winograd.fits(layer, layer.weight) for layer in same)
    others = [
        *(conv(3, channels, padding=1) for channels in ((3, 32), (32, 3), (16, 24))),
        conv(3), conv(1, padding=1), conv(1, stride=2), conv(5, padding=2), conv((1, 3)),
        conv(3, padding=1, stride=2), conv(3, padding=1, groups=2),
        conv(3, padding=1, bias=False), conv(3, padding=1, padding_mode="circular"),
        conv(3, padding=1).double(), conv(3, padding=1).to("meta"),
    ]  # fmt: skip
    assert not any(winograd.fits(layer, layer.weight) for layer in others)
    with torch.autocast("cpu", torch.bfloat16):
        assert not any(winograd.fits(layer, layer.weight) for layer in same)


# Images and channels, groups, height, width; the channels' mean is far from 0.
@compiled
@pytest.mark.parametrize("shape", [(1, 32, 32, 1, 3), (2, 96, 32, 5, 9), (3, 64, 8, 16, 16)])
@pytest.mark.parametrize("silu", [True, False])
def test_norm(shape: tuple[int, int, int, int, int], silu: bool) -> None:
    n, c, groups, h, w = shape
    torch.manual_seed(0)
    x = 3 * torch.randn(n, c, h, w) + 30 * torch.randn(c)[:, None, None]

    def reference(*inputs: Tensor) -> Tensor:
        out = F.group_norm(inputs[0], groups, *inputs[1:], 1e-5)
        return F.silu(out) if silu else out

    for layout in LAYOUTS:
        inputs = [x.to(memory_format=layout), torch.randn(c), torch.randn(c)]
        assert norm.fits(inputs[0])
        check(lambda *v: norm.norm(*v, groups, 1e-5, silu), reference, inputs)


@compiled
@pytest.mark.parametrize("silu", [True, False])
def test_norm_of_bfloat16(silu: bool) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 64, 16, 16) + 3 * torch.randn(64)[:, None, None]).bfloat16()

    def reference(*inputs: Tensor) -> Tensor:
        out = F.group_norm(inputs[0], 8, *inputs[1:], 1e-5)
        return F.silu(out) if silu else out

    inputs = [x, torch.randn(64), torch.randn(64)]
    assert norm.fits(x)
    check(lambda *v: norm.norm(*v, 8, 1e-5, silu), reference, inputs)
    value, exact = norm.norm(*inputs, 8, 1e-5, silu), reference(*(v.double() for v in inputs))
    torch.testing.assert_close(value, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    assert (value == exact.bfloat16()).double().mean() > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm.norm(*inputs, 8, 1e-5, silu), value)


@compiled
def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    # A norm whose scale is 0 writes its shift; two of these lie between two numbers of bfloat16.
    bias = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e38]).repeat(8)
    x = torch.randn(1, 32, 2, 2).bfloat16()
    assert torch.equal(norm.norm(x, torch.zeros(32), bias, 1, 1e-5)[0, :, 0, 0], bias.bfloat16())
    assert norm.norm(x * torch.nan, torch.ones(32), bias, 1, 1e-5).isnan().all()


@compiled
def test_other_norms_stay_torchs() -> None:
    fitting = torch.ones(2, 32, 3, 3)
    assert norm.fits(fitting)
    others = [torch.ones(2, 40, 3, 3), torch.ones(2, 4096, 1, 1), torch.ones(2, 32, 9)]
    others += [fitting.double(), fitting.to("meta")]
    assert not any(map(norm.fits, others))


@compiled
def test_silu_far_from_zero() -> None:
    bias = torch.linspace(-200, 200, 32)
    value = norm.norm(torch.randn(1, 32, 2, 2), torch.zeros(32), bias, 32, 1e-5, silu=True)
    torch.testing.assert_close(value[0, :, 0, 0], F.silu(bias), rtol=1e-5, atol=1e-30)


# --- networks -------------------------------------------------------------------------------------

NETWORKS = {
    "published": dict(ch=64, num_groups=16),
    "proportional": dict(
        ch=32, num_groups=8, norm_groups="proportional", skip_slicing="segments", num_classes=3
    ),
    "some channels do not fit": dict(ch=24, num_groups=8),
}
BATCH = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])


@compiled
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_a_fused_supernet_trains_alike(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_network(**settings, dropout=0.0).train()
    parameters = dict(net.named_parameters())
    loops = Mock(side_effect=winograd.convolve)
    monkeypatch.setattr(winograd, "convolve", loops)

    def gradients() -> Tensor:
        net.zero_grad()
        for width in (1.0, 0.5):
            net(*BATCH, width).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    expected = gradients()
    names = list(net.state_dict())
    ready_to_train(net, "float32", CPU)
    assert torch.equal(gradients(), expected)
    assert not loops.called
    ready_to_train(net, "winograd", CPU)
    assert (gradients() - expected).norm() < 1e-4 * expected.norm()
    assert loops.called
    assert list(net.state_dict()) == names
    assert all(parameters[name] is value for name, value in net.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(net.subnet(0.5)(*BATCH), net.eval()(*BATCH, 0.5))


@compiled
@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_a_dense_network_agrees_and_its_weights_are_transformed_once(
    settings: dict, width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_network(**settings)
    plain, fast = (sampling_networks(net, [width], a)[width] for a in ("float32", "winograd"))
    monkeypatch.setattr(winograd, "transformed", Mock(side_effect=AssertionError))
    with torch.inference_mode():
        assert error(fast(*BATCH), plain(*BATCH)) < 1e-4
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert any(isinstance(m, fused.DenseFusedConv2d) for m in fast.modules())
    for network in (net, plain):
        assert not any(type(m).__module__.startswith("model.cpu") for m in network.modules())


def loops_of(network: nn.Module) -> bool:
    """Whether any of its layers is one of model/cpu."""
    return any(type(m).__module__.startswith("model.cpu.fused") for m in network.modules())


@compiled
def test_graphs_do_not_end_at_the_loops() -> None:
    net = tiny_network()
    assert not sampling_networks(net, [1.0], "winograd", compiled=True)[1.0].compiled
    assert not loops_of(sampling_networks(net, [1.0], "bfloat16", compiled=True)[1.0])
    ready_to_train(net, "bfloat16", CPU, compiled=True)
    assert not loops_of(net)


@compiled
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_bfloat16_has_the_loops_of_the_norms(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling and training are as near to float32 as torch's own norms are."""
    monkeypatch.setattr(winograd, "convolve", Mock(side_effect=AssertionError))
    net = tiny_network(**settings, dropout=0.0)
    exact = net(*BATCH, 0.5).detach()
    fast = sampling_networks(net, [0.5], "bfloat16")[0.5]
    with monkeypatch.context() as patch:
        patch.setattr("model.networks.available", lambda: False)
        eager = sampling_networks(net, [0.5], "bfloat16")[0.5]
    assert loops_of(fast)
    assert not loops_of(eager)
    with torch.inference_mode():
        near, far = ((net(*BATCH) - exact).norm() for net in (fast, eager))
        assert near < 1.5 * far
    assert not loops_of(net)

    def gradients() -> Tensor:
        net.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            net(*BATCH, 0.5).float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    before = gradients()
    ready_to_train(net, "bfloat16", CPU)
    assert loops_of(net)
    assert (gradients() - before).norm() < 0.03 * before.norm()


@compiled
def test_networks_of_diffusers() -> None:
    from diffusers import UNet2DModel

    from model.diffusers.supernet import SlimmableDiffusersUNet

    torch.manual_seed(0)
    sizes = dict(block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    net = SlimmableDiffusersUNet(UNet2DModel(sample_size=8, **sizes, **blocks)).eval()
    with torch.inference_mode():
        plain, fast = (
            sampling_networks(net, [0.5], a)[0.5](*BATCH) for a in ("float32", "winograd")
        )
        assert error(fast, plain) < 1e-4
        assert not torch.equal(fast, plain)
        norms = [m for m in sampling_networks(net, [0.5], "bfloat16")[0.5].modules()
                 if isinstance(m, nn.GroupNorm)]  # fmt: skip
        assert norms
        assert {type(m) for m in norms} == {fused.DenseGroupNorm}
        before = net(*BATCH, 0.5)
        cpu.fuse(net.requires_grad_(False))  # its layers are cut at each call
        assert torch.equal(net(*BATCH, 0.5), before)


def test_without_a_compiler_networks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert not cpu.available()
    net = tiny_network(ch=32)
    with torch.inference_mode():
        plain, same = (
            sampling_networks(net, [1.0], a)[1.0](*BATCH) for a in ("float32", "winograd")
        )
    assert torch.equal(plain, same)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: torch.memory_format) -> None:
    layer, x = FastDropout(0.3), torch.full((5, 7, 33, 31), 2.0).to(memory_format=layout)
    x.requires_grad_()
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), out)
    assert not torch.equal(layer(x), out)
    out.sum().backward()
    assert torch.equal(x.grad * 2, out)
    assert torch.equal(layer.eval()(x), x)
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], torch.full((int((~dropped).sum()),), 2 / 0.7))
    # Neighbours share a draw's bits: they, too, have to be independent.
    for many in (dropped, dropped.flatten()[::4]):
        share = many.double().mean()
        assert abs(share - 0.3) < 5 * (0.21 / many.numel()) ** 0.5
    both = (dropped.flatten()[1:] & dropped.flatten()[:-1]).double().mean()
    assert abs(both - 0.09) < 0.01


def test_masks_are_the_ones_of_existing_runs() -> None:
    torch.manual_seed(0)
    kept = FastDropout(0.5)(torch.ones(32)).bool()
    assert int("".join(str(int(k)) for k in kept), 2) == 0x208A16D6


def test_processes_drop_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FastDropout(0.3), torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    whole, parts = layer(x), []
    monkeypatch.setattr(processes, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        parts.append(layer(x[2 * rank : 2 * rank + 2]))
    assert torch.equal(torch.cat(parts), whole)


def test_training_on_a_cpu_has_fast_dropout() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.3))).eval()
    ready_to_train(net, "float32", torch.device("cuda"))
    assert type(net[1][0]) is nn.Dropout
    ready_to_train(net, "float32", CPU)
    assert type(net[1][0]) is FastDropout
    assert (net[1][0].p, net[1][0].training) == (0.3, False)


# --- memory ---------------------------------------------------------------------------------------

FAULTS = """
import resource, torch
from model.cpu import keep_freed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for kept in (False, True):
    keep_freed(kept)
    # Small blocks may take the first place that it left.
    print(min(faults() for _ in range(6)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept() -> None:
    command = [sys.executable, "-c", FAULTS]
    out = subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout
    given_back, kept = map(int, out.split())
    assert kept < 0.1 * given_back
