"""Model folders of diffusers: what is read of them, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from model.diffusers.loading import read_model
from model.diffusers.supernet import SlimmableDiffusersUNet
from model.diffusers.trained import ALLOWED, trained_diffusion
from runtime.errors import UserError

UNET = dict(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
WEIGHTS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


def make() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**UNET).eval()


# --- the scheduler --------------------------------------------------------------------------------


def save(folder: Path, T: int = 50) -> None:
    """A pipeline folder."""
    DDPMPipeline(make(), DDPMScheduler(num_train_timesteps=T)).save_pretrained(folder)


def flat(folder: Path) -> None:
    make().save_pretrained(folder)
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder)


def checkpoint(folder: Path) -> None:
    """What diffusers' training scripts leave while they run."""
    make().save_pretrained(folder / "checkpoint-20/unet")
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "scheduler")


def linked(folder: Path) -> None:
    save(folder / "elsewhere/pipeline")
    (folder / "link").symlink_to(folder / "elsewhere/pipeline/unet", target_is_directory=True)


def with_linked_unet(folder: Path) -> None:
    save(folder)
    (folder / "unet").rename(folder.parent / "store")
    (folder / "unet").symlink_to(folder.parent / "store", target_is_directory=True)


PLACES = [  # how the folder is made, where we are in it, what --init_diffusers is
    (save, ".", "."),
    (save, "unet", "."),
    (save, ".", "unet"),
    (save, "scheduler", "../unet/"),
    (save, ".", "unet/diffusion_pytorch_model.safetensors"),
    (flat, ".", "."),
    (checkpoint, ".", "checkpoint-20/unet"),
    (checkpoint, "checkpoint-20", "."),
    (checkpoint, "checkpoint-20/unet", "."),
    (linked, ".", "link"),
    (with_linked_unet, ".", "unet"),
]


@pytest.mark.parametrize(("prepare", "folder", "name"), PLACES)
def test_the_scheduler_is_found_where_people_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable, folder: str, name: str
) -> None:
    prepare(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path / "pipeline" / folder)
    assert trained_diffusion(name).flags["T"] == 50
    net = SlimmableDiffusersUNet(read_model(name))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    torch.testing.assert_close(net(x, t), make()(x, t).sample, atol=1e-5, rtol=0)


def test_a_model_without_a_scheduler(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    assert trained_diffusion(tmp_path / "model") is None
    net = SlimmableDiffusersUNet(read_model(tmp_path / "model"))
    net.settings.check_image_size(8)
    with pytest.raises(UserError, match="img_size=7"):
        net.settings.check_image_size(7)


def changed(default: object) -> object:
    """Another value of the same kind."""
    if isinstance(default, str):
        return "other"
    return (not default) if isinstance(default, bool) else (default or 0.0) + 0.5


def test_what_changes_the_noise_levels_is_refused(tmp_path: Path) -> None:
    """Whatever a scheduler with β has beside what is known: the network would be told otherwise."""
    known = {*ALLOWED, "beta_start", "beta_end", "num_train_timesteps", "clip_sample"}
    refused = set()
    for scheduler in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        for name in defaults.keys() - known if "beta_start" in defaults else ():
            entries = {"_class_name": scheduler, name: changed(defaults[name])}
            (tmp_path / "scheduler_config.json").write_text(json.dumps(entries))
            with pytest.raises(UserError, match=rf"scheduler_config\.json.*{name}"):
                trained_diffusion(tmp_path)
            refused.add(name)
    assert {"timestep_type", "sigma_min", "flow_shift", "snr_shift_scale"} <= refused


def test_two_schedulers_that_differ_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    DDPMScheduler(num_train_timesteps=50).save_pretrained(tmp_path)
    assert trained_diffusion(tmp_path).flags["T"] == 50  # the same twice
    DDPMScheduler(num_train_timesteps=60).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"/scheduler_config\.json and .*/scheduler/scheduler_config"
    ):
        trained_diffusion(tmp_path)


# --- weights in every form that diffusers writes --------------------------------------------------


def pickled(folder: Path, **_: object) -> None:
    """What diffusers wrote before safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()


def renamed(folder: Path) -> None:
    """The names that attention layers had in the first versions."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    for name in [name for name in state if ".attentions." in name]:
        for now, before in new.items():
            if f".{now}." in name:
                state[name.replace(f".{now}.", f".{before}.")] = state.pop(name)
    assert "mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, folder / WEIGHTS)


FORMS = {
    "fp16": lambda model, folder: model.half().save_pretrained(folder, variant="fp16"),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="100KB"),
    "fp16 shards": lambda model, folder: model.half().save_pretrained(
        folder, variant="fp16", max_shard_size="100KB"
    ),
    "bin": lambda model, folder: model.save_pretrained(folder, safe_serialization=False),
    "bin shards": lambda model, folder: model.save_pretrained(
        folder, safe_serialization=False, max_shard_size="100KB"
    ),
    "fp16 bin": lambda model, folder: model.half().save_pretrained(
        folder, variant="fp16", safe_serialization=False
    ),
    "old names": lambda model, folder: (model.save_pretrained(folder), renamed(folder)),
    "old names, bin": lambda model, folder: (
        model.save_pretrained(folder), renamed(folder), pickled(folder),
    ),
    "fp16 beside the whole": lambda model, folder: (
        model.save_pretrained(folder),
        copy.deepcopy(model).half().save_pretrained(folder, variant="fp16"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_as_they_come(tmp_path: Path, form: str) -> None:
    model = make()
    FORMS[form](copy.deepcopy(model), tmp_path)
    if "shards" in form:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    read = read_model(tmp_path)
    assert not read.training
    expected = model.half().float() if form.startswith("fp16") and "beside" not in form else model
    for name, value in expected.state_dict().items():
        assert read.state_dict()[name].dtype == torch.float32
        assert torch.equal(read.state_dict()[name], value), name


def test_a_file_of_weights_can_be_named(tmp_path: Path) -> None:
    model = make()
    for variant in ("ema", "fp16"):
        model.save_pretrained(tmp_path, variant=variant)
        model.conv_in.bias.data += 1
    with pytest.raises(UserError, match=r"model\.ema\.safetensors, .*model\.fp16\.safetensors"):
        read_model(tmp_path)
    fp16 = read_model(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    ema = read_model(tmp_path / "diffusion_pytorch_model.ema.safetensors")
    torch.testing.assert_close(fp16.conv_in.bias, ema.conv_in.bias + 1)


# --- what is refused ------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def change(**changes: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Damage that replaces weights by what the functions make of them, None by nothing."""

    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        for name, function in changes.items():
            state[name.replace("_weight", ".weight")] = function(state.get(name, torch.ones(1)))
        whole = {name: value for name, value in state.items() if value is not None}
        save_file(whole, folder / WEIGHTS)

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


BREAK = {  # what is wrong -> how it comes, what the error names
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "no json": (write("config.json", "{"), r"config\.json"),
    "other class": (write("config.json", '{"_class_name": "VQModel"}'), "VQModel"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), WEIGHTS),
    "fewer weights": (change(conv_in_weight=lambda w: None), r"lacks .*conv_in\.weight"),
    "more weights": (change(extra_weight=lambda w: w), r"unused: extra\.weight"),
    "other sizes": (
        lambda f: UNet2DModel(**{**UNET, "block_out_channels": (32, 64)}).save_config(f),
        r"conv_in\.\w+ is \(16,.*\(32,",
    ),
    "a smaller config": (
        lambda f: UNet2DModel(**{**UNET, "add_attention": False}).save_config(f),
        r"unused: .*attentions.* more",
    ),
    "whole numbers": (change(conv_in_weight=lambda w: torch.ones(16, 3, 3, 3).char()), "int8"),
    "not finite": (
        change(conv_in_weight=lambda w: torch.full((16, 3, 3, 3), torch.nan)), "finite",
    ),
    "code": (
        lambda f: ((f / WEIGHTS).unlink(), torch.save(Malicious(), f / BIN)),
        r"diffusion_pytorch_model\.bin",
    ),
    "an index of files elsewhere": (
        lambda f: ((f / WEIGHTS).unlink(),
                   write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "../b"}}')(f)),
        r"index\.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAK)
def test_a_folder_that_is_no_model_is_one_line(here: Path, what: str) -> None:
    make().save_pretrained("model")
    damage, message = BREAK[what]
    damage(Path("model"))
    with pytest.raises(UserError, match=message) as error:
        read_model("model")
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_what_is_no_unet_is_refused_by_its_kind(here: Path) -> None:
    with pytest.raises(UserError, match=r"google/ddpm-cat-256 is not a directory.*hub.*download"):
        read_model("google/ddpm-cat-256")
    with pytest.raises(UserError, match=r"nowhere is not a directory$"):
        read_model("nowhere")
    transformer = Path("pipeline/transformer")
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(UserError, match="DiTTransformer2DModel in transformer/"):
        read_model("pipeline")
    make().save_pretrained("run/checkpoint-20/unet")
    with pytest.raises(UserError, match="did you mean run/checkpoint-20"):
        read_model("run")
