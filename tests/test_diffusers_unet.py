import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from model.diffusers.importance import order_by_importance
from model.diffusers.supernet import SlimmableDiffusersUNet
from runtime.errors import UserError
from score import flops

# diffusers 0.34's own, in its FIR layers
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
SIZE = 8
BASE = {
    "sample_size": SIZE, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip


def blocks(down: str, up: str, **more: object) -> dict:
    return {"down_block_types": (down, down), "up_block_types": (up, up), **more}


UNCONDITIONAL = {
    "default": {},
    "scale_shift, attention norm": {
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4,
    },
    "resnet samplers": blocks(
        "AttnDownBlock2D", "AttnUpBlock2D", downsample_type="resnet", upsample_type="resnet"
    ),
    "conv samplers": blocks("AttnDownBlock2D", "AttnUpBlock2D"),
    "resnet blocks that sample": blocks("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "skip": blocks(
        "SkipDownBlock2D", "SkipUpBlock2D", block_out_channels=(64, 64), norm_num_groups=16
    ),
    "skip, unequal": blocks("SkipDownBlock2D", "SkipUpBlock2D"),
    "attention skip": blocks(
        "AttnSkipDownBlock2D", "AttnSkipUpBlock2D", block_out_channels=(128, 128),
        norm_num_groups=32, attention_head_dim=16,
    ),
    "one head": {"attention_head_dim": None},
    "three heads": {"attention_head_dim": 16, "block_out_channels": (32, 48)},
    "no middle attention": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "fourier": {"time_embedding_type": "fourier"},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "small settings": {
        "mid_block_scale_factor": 2.0, "dropout": 0.5, "center_input_sample": True,
        "time_embedding_dim": 40, "downsample_padding": 0, "in_channels": 1, "out_channels": 2,
    },
    "three levels": {
        "block_out_channels": (16, 32, 64), "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "act_fn": "gelu",
    },
    "class embedding": {"num_class_embeds": 5},
    "class timestep": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
}  # fmt: skip
CROSS = {
    **BASE, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 12, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SIMPLE = blocks(
    "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D", encoder_hid_dim=12,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=8,
)  # fmt: skip
CONDITIONAL = {
    "default": {},
    "linear projection": {"use_linear_projection": True, "transformer_layers_per_block": 2},
    "only cross attention": {"only_cross_attention": True},
    "simple": {**SIMPLE, "resnet_time_scale_shift": "scale_shift"},
    "simple, group norm": {
        **SIMPLE, "cross_attention_norm": "group_norm", "cross_attention_dim": 32,
    },
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "class embedding": {"num_class_embeds": 5},
    "class projection": {
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 6,
    },
    "class simple projection, concatenated": {
        "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": True,
    },
    "text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    "text_time": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 58,
    },
    "text projection": {"encoder_hid_dim": 10},
    "fourier": {"time_embedding_type": "fourier"},
    "time condition": {"time_cond_proj_dim": 7, "timestep_post_act": "silu"},
    "K blocks": {
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        "mid_block_type": None, "block_out_channels": (64, 128, 128), "layers_per_block": 2,
        "norm_num_groups": None, "attention_head_dim": 8, "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier",
    },
}  # fmt: skip
NETWORKS = {name: (UNet2DModel, {**BASE, **more}) for name, more in UNCONDITIONAL.items()}
NETWORKS |= {
    f"text to image: {name}": (UNet2DConditionModel, {**CROSS, **more})
    for name, more in CONDITIONAL.items()
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every entry random, so that no zero or one hides a wrong slice."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "time_proj" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def tiny(**changes: object) -> UNet2DModel:
    return randomize(UNet2DModel(**{**BASE, **changes}))


def conditioning_of(config: dict) -> dict:
    torch.manual_seed(2)
    made = {}
    if config.get("num_class_embeds"):
        made["class_labels"] = torch.tensor([1, 4])
    elif config.get("class_embed_type") == "timestep":
        made["class_labels"] = torch.tensor([10, 40])
    elif config.get("class_embed_type") == "identity":
        made["class_labels"] = torch.randn(2, 128)
    elif config.get("class_embed_type"):
        made["class_labels"] = torch.randn(2, 6)
    if "cross_attention_dim" in config:
        size = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        made["encoder_hidden_states"] = torch.randn(2, 5, size)
        if dim := config.get("time_cond_proj_dim"):
            made["timestep_cond"] = torch.randn(2, dim)
        if config.get("addition_embed_type") == "text_time":
            made["added_cond_kwargs"] = {
                "text_embeds": torch.randn(2, 10),
                "time_ids": torch.randn(2, 6),
            }
    return made


def batch(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, channels, SIZE, SIZE), torch.tensor([3, 700])


def case(name: str) -> tuple[torch.nn.Module, tuple, dict]:
    """A network of NETWORKS with random weights, its (x, t) and its conditioning."""
    cls, config = NETWORKS[name]
    model, conditioning = randomize(cls(**config)), conditioning_of(config)
    x, t = batch(config.get("in_channels", 3))
    fourier = config.get("time_embedding_type") == "fourier"
    return model, (x, t.float() if fourier else t), conditioning


@pytest.mark.parametrize("name", NETWORKS)
def test_every_option_of_the_config(name):
    """Width 1 is the original; every width runs, trains and equals its dense network."""
    model, inputs, conditioning = case(name)
    with torch.no_grad():
        expected = copy.deepcopy(model)(*inputs, **conditioning).sample
    net = SlimmableDiffusersUNet(model)
    torch.testing.assert_close(net(*inputs, **conditioning), expected, atol=1e-5, rtol=0)
    for width in (0.75, 0.25):
        net.check_width(width)
        out = net(*inputs, width, **conditioning)
        dense = net.subnet(width)
        assert isinstance(dense.model, type(model))
        torch.testing.assert_close(dense(*inputs, **conditioning), out, atol=1e-5, rtol=0)
        assert all(p.is_contiguous() for p in dense.parameters())
    out.square().mean().backward()
    grad = net.model.conv_in.weight.grad
    assert grad[0].abs().sum() > 0
    assert grad[-1].abs().sum() == 0
    rebuilt = SlimmableDiffusersUNet.from_settings(json.loads(json.dumps(net.settings_dict())))
    rebuilt.load_state_dict(net.state_dict())
    torch.testing.assert_close(rebuilt.eval()(*inputs, 0.25, **conditioning), out)


@pytest.mark.parametrize("name", ["default", "scale_shift, attention norm", "conv samplers"])
def test_proportional_groups(name):
    model, inputs, _ = case(name)
    net = SlimmableDiffusersUNet(model, norm_groups="proportional")
    wide_norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    with torch.no_grad():
        assert torch.equal(net(*inputs, 1), model(*inputs).sample)
        for width in (0.75, 0.25):
            net.check_width(width)
            dense = net.subnet(width)
            torch.testing.assert_close(dense(*inputs), net(*inputs, width))
            norms = [m for m in dense.modules() if isinstance(m, torch.nn.GroupNorm)]
            for narrow, wide in zip(norms, wide_norms, strict=True):
                size = wide.num_channels // wide.num_groups
                assert narrow.num_channels == size * narrow.num_groups
    again = SlimmableDiffusersUNet.from_settings(json.loads(json.dumps(net.settings_dict())))
    assert again.settings.norm_groups == "proportional"
    assert SlimmableDiffusersUNet(model).settings.norm_groups == "fixed"


@pytest.mark.parametrize("name", ["default", "class embedding", "text to image: default"])
def test_flops_fall_with_width(name):
    cls, config = NETWORKS[name]
    net = SlimmableDiffusersUNet(cls(**config), num_classes=config.get("num_class_embeds", 0))
    if cls is UNet2DConditionModel:
        net.set_embeddings(torch.zeros(1, 7, net.features), null=False)
    counts = [flops(net, width, (3, SIZE, SIZE)) for width in (0.25, 0.5, 1)]
    assert counts == sorted(set(counts))
    assert counts[1] < 0.4 * counts[2]


def test_a_width_is_diffusers_own_network_of_narrower_config():
    """Same shapes and numbers as the class built with half of the channels, sinusoids apart."""
    net = SlimmableDiffusersUNet(tiny())
    dense = net.subnet(0.5)
    built = UNet2DModel(**{**BASE, "block_out_channels": (16, 32)}).eval()
    built.time_proj = net.model.time_proj
    built.time_embedding.linear_1 = torch.nn.Linear(32, 64)
    built.load_state_dict(dense.model.state_dict())
    with torch.no_grad():
        expected = built(*batch()).sample
        torch.testing.assert_close(net(*batch(), 0.5), expected, atol=1e-5, rtol=0)
    assert [m.heads for m in dense.modules() if hasattr(m, "to_q")] == [4, 4, 4, 4]


def test_concatenated_inputs_keep_the_leading_channels_of_both_parts():
    model = tiny()
    full = model.up_blocks[1].resnets[0]
    net = SlimmableDiffusersUNet(model)
    cut = net.subnet(0.5).model.up_blocks[1].resnets[0]  # 64 from below and 32 that skip
    columns = [*range(32), *range(64, 80)]
    torch.testing.assert_close(cut.conv1.weight, full.conv1.weight[:16, columns])
    torch.testing.assert_close(cut.conv_shortcut.weight, full.conv_shortcut.weight[:16, columns])
    torch.testing.assert_close(cut.norm1.weight, full.norm1.weight[columns])


def test_gated_and_scale_shift_projections_keep_both_halves():
    model = randomize(UNet2DConditionModel(**{**CROSS, "resnet_time_scale_shift": "scale_shift"}))
    net = SlimmableDiffusersUNet(model)
    narrow = net.subnet(0.5).model

    def pair(path: str) -> tuple[torch.Tensor, torch.Tensor]:
        return model.get_parameter(path), narrow.get_parameter(path)

    full, cut = pair("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.bias")
    torch.testing.assert_close(cut, torch.cat([full[:64], full[128:192]]))
    full, cut = pair("down_blocks.0.resnets.0.time_emb_proj.bias")
    torch.testing.assert_close(cut, torch.cat([full[:16], full[32:48]]))


def test_heads_narrow_whole_or_each_in_part():
    net = SlimmableDiffusersUNet(tiny(attention_head_dim=16, block_out_channels=(32, 48)))
    full = net.model.mid_block.attentions[0]
    third = net.subnet(2 / 3).model.mid_block.attentions[0]
    assert (third.heads, third.to_q.out_features) == (2, 32)
    half = net.subnet(0.5).model.mid_block.attentions[0]
    assert (half.heads, half.to_q.out_features) == (3, 24)
    rows = [*range(8), *range(16, 24), *range(32, 40)]
    torch.testing.assert_close(half.to_q.weight, full.to_q.weight[rows, :24])


def test_threads_and_copies_do_not_disturb_each_other():
    net = SlimmableDiffusersUNet(tiny()).requires_grad_(False)
    widths, inputs = [1, 0.75, 0.5, 0.25] * 2, batch()
    expected = [net(*inputs, width) for width in widths]
    with ThreadPoolExecutor(len(widths)) as pool:
        outputs = list(pool.map(lambda width: net(*inputs, width), widths))
    torch.testing.assert_close(outputs, expected)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    torch.testing.assert_close(again(*inputs, 0.5), expected[2])


@pytest.mark.parametrize("num_classes", [5, 4])
def test_labels_are_classes_and_the_null_class(num_classes):
    """5 embeddings are 5 classes, to which a null class is added, or 4 and the null class."""
    model, (x, t) = tiny(num_class_embeds=5).requires_grad_(False), batch()
    original = copy.deepcopy(model)
    net = SlimmableDiffusersUNet(model, num_classes=num_classes)
    assert net.settings.null_class == (num_classes == 4)
    labels = torch.tensor([1, 3])
    expected = original(x, t, class_labels=labels).sample
    torch.testing.assert_close(net(x, t, 1, labels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x, t, 1), net(x, t, 1, torch.tensor([num_classes] * 2)))
    table = original.class_embedding.weight
    null = table[4] if num_classes == 4 else table.mean(0)
    torch.testing.assert_close(model.class_embedding.weight[num_classes], null)
    assert flops(net, 0.5, (3, SIZE, SIZE)) < flops(net, 1, (3, SIZE, SIZE))
    again = SlimmableDiffusersUNet.from_settings(json.loads(json.dumps(net.settings_dict())))
    assert again.settings == net.settings
    again.load_state_dict(net.state_dict())
    for given in (labels, None):
        dense = again.eval().subnet(0.5)
        torch.testing.assert_close(dense(x, t, given), net(x, t, 0.5, given))


@pytest.mark.parametrize(("num_classes", "embeddings"), [(3, 5), (6, 5), (2, None)])
def test_other_numbers_of_classes_are_refused(num_classes, embeddings):
    with pytest.raises(UserError, match=f"--num_classes={num_classes}"):
        SlimmableDiffusersUNet(tiny(num_class_embeds=embeddings), num_classes=num_classes)


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """What DataParallel makes of a module on each device: parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)
            replica._former_parameters[name] = parameter
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    return replica


def test_replicas_of_data_parallel_pass_gradients_back():
    net = SlimmableDiffusersUNet(tiny())
    out = replica_of(net)(*batch(), 0.5)
    torch.testing.assert_close(out, net(*batch(), 0.5))
    out.sum().backward()
    assert net.model.conv_in.weight.grad[:16].abs().sum() > 0


def test_gradient_checkpointing_sees_the_width_of_its_own_call():
    grads, model = [], tiny()
    for checkpointed in (False, True):
        net = SlimmableDiffusersUNet(copy.deepcopy(model)).train()
        if checkpointed:
            net.model.enable_gradient_checkpointing()
        sum(net(*batch(), width).square().mean() for width in (0.5, 0.25)).backward()
        grads.append(net.model.mid_block.resnets[0].conv1.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_width_that_does_not_fit_is_refused_by_name():
    net = SlimmableDiffusersUNet(tiny(norm_num_groups=32))
    with pytest.raises(UserError, match=r"32 channels of .*norm.* --norm_groups=proportional"):
        net.check_width(0.5)
    net = SlimmableDiffusersUNet(tiny(norm_num_groups=32, block_out_channels=(64, 128)))
    flags = r"--candidate_width or --min_width \(at most 0\.5\), or .*--norm_groups=proportional"
    with pytest.raises(UserError, match=rf"0\.75 cannot narrow the 64 channels.*{flags}"):
        net.check_width(0.75)
    net.check_width(0.5)
    SlimmableDiffusersUNet(net.model, norm_groups="proportional").check_width(0.75)
    with pytest.raises(UserError, match="must be in"):
        net.check_width(1.5)
    assert net.subnet(1)
    config = {**CROSS, **SIMPLE, "block_out_channels": (64, 64), "norm_num_groups": 16}
    simple = SlimmableDiffusersUNet(UNet2DConditionModel(**config))
    with pytest.raises(UserError, match=r"cannot narrow .*attentions.*8 heads of 8"):
        simple.check_width(0.625)  # 5 heads make 40 channels, but 16 groups need 48


def test_missing_conditioning_is_one_line():
    net = SlimmableDiffusersUNet(tiny(num_class_embeds=5))
    with pytest.raises(UserError, match="needs class_labels"):
        net(*batch(), 0.5)


def test_settings_of_something_else_are_refused():
    for settings in ({"kind": "diffusers"}, {"class": "VQModel", "config": {}, "T": 1}):
        with pytest.raises(UserError, match="the settings of"):
            SlimmableDiffusersUNet.from_settings(settings)


ORDERED = ["default", "scale_shift, attention norm", "class embedding", "one head", "skip"]
ORDERED += ["text to image: default", "text to image: simple"]


@pytest.mark.parametrize("name", ORDERED)
def test_ordering_changes_no_output_at_width_1(name):
    model, inputs, conditioning = case(name)
    net = SlimmableDiffusersUNet(model).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    expected = net(*inputs, **conditioning)
    order_by_importance(net)
    torch.testing.assert_close(net(*inputs, **conditioning), expected, atol=1e-5, rtol=1e-5)
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert any("to_q" in n for n in moved)
    assert any("conv2" in n for n in moved)


def weaken(net: SlimmableDiffusersUNet) -> None:
    """Let the leading half of every inner channel, head and time channel hardly matter.

    Of the residual streams, which are not ordered, the trailing half hardly matters, so that what
    half width loses is what ordering can win back.
    """
    for name, cut in net.plan.cuts.items():
        layer = net.model.get_submodule(name)
        side = cut.inputs or (cut.outputs if isinstance(layer, torch.nn.GroupNorm) else None)
        if side is None or name.endswith("norm2"):
            continue
        leading = [i for start, n in net.plan.ranges(side, 0.5) for i in range(start, start + n)]
        trailing = sorted(set(range(side.total)) - set(leading))
        if cut.inputs is not None:
            inner = name.endswith(("conv2", "to_out.0", "time_emb_proj", "linear_2"))
            layer.weight.data[:, leading if inner else trailing] *= 1e-2
        else:
            layer.weight.data[trailing] *= 1e-2
            layer.bias.data[trailing] *= 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_ordering_brings_half_width_closer_to_full_width(seed):
    torch.manual_seed(seed)
    net = SlimmableDiffusersUNet(UNet2DModel(**BASE).eval()).requires_grad_(False)
    weaken(net)

    def error() -> float:
        return (net(*batch(), 0.5) - net(*batch(), 1)).square().mean().item()

    before = error()
    order_by_importance(net)
    assert error() < 0.5 * before
