"""Model folders of diffusers: what is read of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from model.diffusers.supernet import SlimmableDiffusersUNet
from runtime.errors import UserError

UNET = dict(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(folder: Path, T: int | None = None) -> UNet2DModel:
    """A small model, as a pipeline with a scheduler of T timesteps, or alone."""
    torch.manual_seed(0)
    model = UNet2DModel(**UNET).eval()
    whole = DDPMPipeline(model, DDPMScheduler(num_train_timesteps=T)) if T else model
    whole.save_pretrained(folder)
    return model


@pytest.mark.parametrize("T", [50, None])
def test_reads_a_folder(tmp_path: Path, T: int | None) -> None:
    model = save(tmp_path, T)
    net = SlimmableDiffusersUNet.from_pretrained(tmp_path)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    torch.testing.assert_close(net(x, t), model(x, t).sample, atol=1e-5, rtol=0)
    assert (T or 1000) == net.settings.T
    assert SlimmableDiffusersUNet.from_pretrained(tmp_path, T=7).settings.T == 7
    if T:
        assert SlimmableDiffusersUNet.from_pretrained(tmp_path / "unet").settings.T == T
    net.settings.check_image_size(8)
    with pytest.raises(UserError, match="img_size=7"):
        net.settings.check_image_size(7)


def without_a_weight(weights: Path) -> None:
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


BREAK = {  # what is wrong -> how it comes, what the error names
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "other class": (
        lambda f: (f / "config.json").write_text('{"_class_name": "VQModel"}'), "VQModel",
    ),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / WEIGHTS.replace("safetensors", "bin")), "bin"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]), "read"),
    "other sizes": (
        lambda f: UNet2DModel(**{**UNET, "block_out_channels": (32, 32)}).save_config(f), "read",
    ),
    "fewer weights": (lambda f: without_a_weight(f / WEIGHTS), r"conv_in\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAK)
def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, what: str) -> None:
    save(tmp_path)
    damage, message = BREAK[what]
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        SlimmableDiffusersUNet.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
