"""The network against the published one's numbers, names and counts, and the slicing itself."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, SMALL, golden_network, tiny_network
from torch import Tensor, nn

from model import SlimmableUNet, UNetSettings, sampling_networks
from model.slimmable import (
    Channels,
    SlimmableConv2d,
    SlimmableGroupNorm,
    SlimmableLinear,
    round_channels,
)
from model.unet import ResBlock, sinusoids
from runtime.errors import UserError

CIFAR = dict(T=1000, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2, dropout=0.1)
WIDTHS = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "slimmable_g16_ch64.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def small() -> SlimmableUNet:
    return golden_network()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 7])


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_golden_numbers(golden: dict, small: SlimmableUNet, width: float) -> None:
    x = torch.from_numpy(golden["x"])
    dense = small.subnet(width)
    for t in (0, 25, 49):
        expected = torch.from_numpy(golden[f"eps_w{width}_t{t}"])
        steps = torch.full((len(x),), t)
        tolerance = 1e-4 * float(expected.std())
        torch.testing.assert_close(small(x, steps, width), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(dense(x, steps), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "file"),
    [(SMALL, "slimmable_g16_ch64"), ({**CIFAR, "T": 50}, "slimmable_cifar10")],
)
def test_entries_have_the_published_names_shapes_and_order(settings: dict, file: str) -> None:
    with torch.device("meta"):
        net = SlimmableUNet(**{**settings, "dropout": 0.0})
    entries = [
        f"{name} {'x'.join(map(str, value.shape))}" for name, value in net.state_dict().items()
    ]
    assert entries == (GOLDEN / f"{file}.keys.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (CIFAR, 35_874_307),  # 35.87 M, with the table of 1000 × 128
        ({**CIFAR, "T": 50}, 35_874_307 - 950 * 128),
        # One channel instead of three: two 3×3 kernels of 128 channels fewer at each end, and
        # two biases in the tail.
        ({**CIFAR, "in_ch": 1}, 35_874_307 - 2 * (2 * 9 * 128) - 2),
    ],
)
def test_parameter_counts(settings: dict, count: int) -> None:
    with torch.device("meta"):
        net = SlimmableUNet(**settings)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(
    ("channels", "divisor", "expected"),
    [
        (128, 8, 128), (96, 8, 96), (64, 8, 64), (32, 8, 32),
        (6, 8, 8),  # half of 12: up to the next multiple
        (12, 8, 16),  # a tie goes up
        (18, 8, 24),  # 16 would be below 0.9·18
        (17, 8, 16),
        (24, 16, 32), (20, 16, 32), (17, 16, 16),
        (3, 8, 9),  # none left: at least 1, and then 1 < 0.9·3 adds the divisor
        (1, 8, 1),
        (2.5, 1, 3), (2.4, 1, 3), (2, 1, 2),
    ],
)  # fmt: skip
def test_round_channels(channels: float, divisor: int, expected: int) -> None:
    assert round_channels(channels, divisor) == expected


@pytest.mark.parametrize(
    ("layer", "dense", "x"),
    [
        (
            SlimmableConv2d(Channels((24,)), Channels((16,)), 3, stride=2),
            nn.Conv2d(24, 16, 3, stride=2, padding=1),
            torch.randn(2, 24, 6, 6),
        ),
        (
            SlimmableLinear(Channels((24,)), Channels((16,))),
            nn.Linear(24, 16),
            torch.randn(2, 24),
        ),
        (SlimmableGroupNorm(4, Channels((24,))), nn.GroupNorm(4, 24), torch.randn(2, 24, 6, 6)),
    ],
)
def test_width_one_equals_dense_layers(layer: nn.Module, dense: nn.Module, x: Tensor) -> None:
    nn.init.normal_(layer.weight)
    dense.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, 1.0), dense(x))


def test_narrow_layer_equals_the_leading_block() -> None:
    conv = SlimmableConv2d(Channels((32,)), Channels((48,)), 3)
    x = torch.randn(2, 16, 6, 6)
    expected = F.conv2d(x, conv.weight[:24, :16], conv.bias[:24], padding=1)
    assert torch.equal(conv(x, 0.5), expected)
    # The number of groups stays, so a group holds fewer channels.
    norm = SlimmableGroupNorm(8, Channels((32,)))
    nn.init.normal_(norm.weight)
    assert torch.equal(norm(x, 0.5), F.group_norm(x, 8, norm.weight[:16], norm.bias[:16]))
    # 16 channels of h and 8 of the skip, from where the skip's columns begin.
    conv = SlimmableConv2d(Channels((32, 16), apart=True), Channels((32,)), 3)
    x = torch.randn(2, 24, 6, 6)
    weight = torch.cat([conv.weight[:16, :16], conv.weight[:16, 32:40]], dim=1)
    assert torch.equal(conv(x, 0.5), F.conv2d(x, weight, conv.bias[:16], padding=1))


def test_time_table_is_the_closed_form() -> None:
    table = sinusoids(1000, 32)
    p, i = 937, 5
    angle = p * 10000 ** (-2 * i / 32)
    assert float(table[p, 2 * i]) == pytest.approx(np.sin(angle), abs=1e-6)
    assert float(table[p, 2 * i + 1]) == pytest.approx(np.cos(angle), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        (dict(ch=32), WIDTHS),
        (dict(in_ch=1), WIDTHS),
        # 24·w and 48·w are no multiples of 16 at most of these widths.
        (dict(ch=24, num_groups=8), (*WIDTHS, 0.3, 0.9)),
        (dict(ch=32, num_groups=8, norm_groups="proportional"), WIDTHS),
        (
            dict(ch=32, num_groups=8, norm_groups="proportional", skip_slicing="segments"),
            WIDTHS,
        ),
    ],
)
@torch.no_grad()
def test_dense_networks_equal_the_supernet(settings: dict, widths: Sequence[float]) -> None:
    net, t = tiny_network(**settings), torch.tensor([0, 5, 9])
    x = torch.randn(3, net.settings.in_ch, 8, 8)
    for width, network in sampling_networks(net, widths).items():
        net.check_width(width)
        out = net(x, t, width)
        assert out.shape == x.shape
        assert out.std() > 0.01
        torch.testing.assert_close(network(x, t), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.subnet(width)(x, t), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ch=32, num_groups=16), r"width 0\.25 leaves in .* 8 channels, .* 16 groups"),
        # 48 channels of [h, skip] in groups of 12
        (dict(norm_groups="proportional"), r"0\.25 leaves in upblocks\S+ 16 channels, .* of 12"),
    ],
)
def test_width_that_groups_do_not_divide_is_one_clear_error(settings: dict, message: str) -> None:
    net = tiny_network(**settings)
    net.check_width(0.5)
    for call in (net.check_width, net.subnet):
        with pytest.raises(UserError, match=message) as error:
            call(0.25)
        assert "\n" not in str(error.value)
    for width in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError, match="must be in"):
            net.check_width(width)


def _kept_columns(blocks: tuple[int, ...], width: float) -> Tensor:
    """Which of the concatenated columns "segments" keeps, then all others."""
    starts = np.cumsum([0, *blocks[:-1]])
    kept = [
        s + i
        for s, n in zip(starts, blocks, strict=True)
        for i in range(round_channels(n * width, 8))
    ]
    return torch.tensor([*kept, *(i for i in range(sum(blocks)) if i not in kept)])


@pytest.mark.parametrize("width", [0.75, 0.5, 0.25])
@torch.no_grad()
def test_segments_are_sliced_apart(width: float, batch: tuple) -> None:
    apart, leading = tiny_network(ch=32, skip_slicing="segments"), tiny_network(ch=32)
    assert torch.equal(apart(*batch, 1.0), leading(*batch, 1.0))
    narrow = apart(*batch, width)
    assert (narrow - leading(*batch, width)).std() > 0.01 * narrow.std()
    torch.testing.assert_close(apart.subnet(width)(*batch), narrow, rtol=1e-4, atol=1e-5)
    # With the kept columns moved to the front by hand, leading slices are the two segments.
    for block in leading.upblocks:
        if isinstance(block, ResBlock):
            norm, _, conv = block.block1
            columns = _kept_columns(norm.inputs.blocks, width)
            norm.weight.copy_(norm.weight[columns])
            norm.bias.copy_(norm.bias[columns])
            conv.weight.copy_(conv.weight[:, columns])
            block.shortcut.weight.copy_(block.shortcut.weight[:, columns])
    torch.testing.assert_close(leading(*batch, width), narrow)


@pytest.mark.parametrize("width", [0.75, 0.5, 0.25])
@pytest.mark.parametrize(
    ("blocks", "apart"), [((32,), False), ((64, 64), False), ((64, 64), True), ((128, 64), True)]
)
@torch.no_grad()
def test_a_proportional_group_sees_the_same_channels(
    width: float, blocks: tuple[int, ...], apart: bool
) -> None:
    """So its output is that of full width, wherever no group has channels of both segments."""
    inputs = Channels(blocks, apart=apart)
    layer = SlimmableGroupNorm(8 if len(blocks) < 2 or blocks[0] == 64 else 12, inputs, True)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, inputs.total, 4, 4) + torch.randn(inputs.total)[:, None, None]
    # "leading" takes the norm's leading channels whatever the segments are, as the weights are.
    kept = inputs.take(x, width, 1)
    torch.testing.assert_close(layer(kept, width), inputs.take(layer(x, 1.0), width, 1))
    fixed = SlimmableGroupNorm(layer.num_groups, inputs)
    fixed.load_state_dict(layer.state_dict())
    assert torch.equal(fixed(x, 1.0), layer(x, 1.0))
    assert not torch.allclose(fixed(kept, width), layer(kept, width), atol=0.1)


@torch.no_grad()
def test_a_group_that_straddles_keeps_its_size() -> None:
    """96 channels in 8 groups of 12: one of them has channels of h (64) and of the skip (32)."""
    layer = SlimmableGroupNorm(8, Channels((64, 32), apart=True), True)
    x = torch.randn(2, 48, 4, 4)  # 32 of h, 16 of the skip
    assert layer.groups(0.5) == 4
    torch.testing.assert_close(layer(x, 0.5), F.group_norm(x, 4))


@torch.no_grad()
def test_proportional_groups_change_narrow_widths_alone(batch: tuple) -> None:
    fixed, other = (
        tiny_network(ch=32, num_groups=8, norm_groups=rule) for rule in ("fixed", "proportional")
    )
    assert torch.equal(other(*batch), fixed(*batch))
    for width in WIDTHS[1:]:
        assert not torch.allclose(other(*batch, width), fixed(*batch, width), atol=0.01)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_subnet_is_a_network_of_its_own(width: float, batch: tuple) -> None:
    net = tiny_network(ch=32, skip_slicing="segments").train()
    dense = net.subnet(width)
    assert net.training
    assert not any(module.training for module in dense.modules())
    theirs = {v.untyped_storage().data_ptr() for v in net.state_dict().values()}
    mine = list(dense.state_dict().values())
    assert not theirs & {v.untyped_storage().data_ptr() for v in mine}
    assert all(v.is_contiguous() for v in mine)
    assert not any(p.requires_grad for p in dense.parameters())

    before = dense(*batch)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(*batch, width).square().mean().backward()
    optimiser.step()
    assert torch.equal(dense(*batch), before)
    assert not torch.allclose(net.eval()(*batch, width), before, rtol=1e-3)


def test_narrow_gradients_touch_the_leading_block_alone(batch: tuple) -> None:
    net, width = tiny_network(ch=32), 0.5
    net(*batch, width).square().mean().backward()
    for name, layer in net.named_modules():
        if isinstance(layer, (SlimmableConv2d, SlimmableLinear)):
            rows, columns = layer.outputs.count(width), layer.inputs.count(width)
            gradient = layer.weight.grad
            assert gradient[:rows, :columns].any(), name
            assert not gradient[rows:].any(), name
            assert not gradient[:, columns:].any(), name
        elif isinstance(layer, SlimmableGroupNorm):
            rows = layer.inputs.count(width)
            assert layer.weight.grad[:rows].all(), name
            assert not layer.weight.grad[rows:].any(), name
        else:
            continue
        if not name.endswith("proj_k"):  # softmax does not see a constant added to every key
            assert layer.bias.grad[:rows].any(), name
        assert not layer.bias.grad[rows:].any(), name


@torch.no_grad()
def test_threads_run_different_widths_at_once(batch: tuple) -> None:
    net = tiny_network()
    alone = {width: net(*batch, width) for width in WIDTHS}

    def repeat(width: float) -> list[Tensor]:
        with torch.no_grad():
            return [net(*batch, width) for _ in range(10)]

    with ThreadPoolExecutor(len(WIDTHS)) as pool:
        for width, outs in zip(WIDTHS, pool.map(repeat, WIDTHS), strict=True):
            assert all(torch.equal(out, alone[width]) for out in outs)


@torch.no_grad()
def test_a_call_leaves_nothing_behind(batch: tuple) -> None:
    # Replicas of a network share what its modules hold, so nothing may be kept between calls.
    def held(net: nn.Module) -> list[dict]:
        keep = ("_parameters", "_buffers", "_modules")
        return [
            {k: v for k, v in module.__dict__.items() if k not in keep} for module in net.modules()
        ]

    net = tiny_network()
    before, entries = held(net), {k: v.clone() for k, v in net.state_dict().items()}
    net(*batch, 0.5)
    net.subnet(0.25)
    assert held(net) == before
    assert net.state_dict().keys() == entries.keys()
    assert all(torch.equal(v, entries[k]) for k, v in net.state_dict().items())


def test_dropout_acts_in_training_alone(batch: tuple) -> None:
    net = tiny_network(dropout=0.5)
    assert torch.equal(net(*batch, 0.5), net(*batch, 0.5))
    net.train()
    assert not torch.equal(net(*batch, 0.5), net(*batch, 0.5))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"T": 0}, "T=0"), ({"ch": 0}, "ch=0"), ({"ch_mult": ()}, "ch_mult"),
        ({"ch_mult": (1, 0)}, "ch_mult"), ({"attn": (4,)}, "attn=4"), ({"attn": (-1,)}, "attn=-1"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"), ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"), ({"num_groups": 0}, "num_groups=0"),
        ({"ch": 24, "num_groups": 16}, "num_groups=16"), ({"in_ch": 0}, "in_ch=0"),
        ({"num_classes": -1}, "num_classes=-1"), ({"skip_slicing": "both"}, "skip_slicing=both"),
        ({"norm_groups": "all"}, "norm_groups=all"),
    ],
)  # fmt: skip
def test_settings_errors(change: dict, flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag}") as error:
        UNetSettings(**change)
    assert "\n" not in str(error.value)


def test_settings_rebuild_the_network() -> None:
    net = tiny_network(ch=32, skip_slicing="segments", norm_groups="proportional")
    again = SlimmableUNet(**net.settings_dict())
    assert again.settings == net.settings
    assert [v.shape for v in again.state_dict().values()] == [
        v.shape for v in net.state_dict().values()
    ]


def test_image_sizes() -> None:
    settings = UNetSettings(ch_mult=(1, 2, 2, 2))
    settings.check_image_size(32)
    for size in (0, 12, 28):
        with pytest.raises(UserError, match=f"--img_size={size}: .*multiple of 8"):
            settings.check_image_size(size)
