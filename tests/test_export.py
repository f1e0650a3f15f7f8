import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import contents
from diffusers import UNet2DModel

from diffusion import NoiseSchedule, sample_ddim, sample_ddpm
from model import SlimmableUNet, StepAwareDenoiser, WidthSchedule
from model.diffusers.export import export_diffusers, step_aware
from model.diffusers.step_aware_unet import build
from model.diffusers.supernet import SlimmableDiffusersUNet
from runtime.errors import UserError

T, SIZE = 20, 8
BETAS = (1e-3, 0.2, T)
WIDTHS = WidthSchedule([1.0] * 5 + [0.25] * 3 + [0.5] * 12)

# Runs in a process of its own that knows diffusers and the folder, and nothing of this project.
RUN = """
import sys
import numpy as np, torch
from diffusers import DDIMPipeline, DDPMPipeline

for folder in sys.argv[1:]:
    arrays = {}
    for cls, runs in (
        (DDPMPipeline, {"ddpm": {"num_inference_steps": 10}}),
        (DDIMPipeline, {"ddim": {"num_inference_steps": 5},
                        "ddim_eta": {"num_inference_steps": 10, "eta": 0.7}}),
    ):
        pipeline = cls.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        for name, options in runs.items():
            generator = torch.Generator().manual_seed(7)
            result = pipeline(batch_size=2, generator=generator, output_type="np", **options)
            arrays[name] = result.images
    np.savez(folder + ".npz", **arrays)
assert not any(name.split(".")[0] in ("model", "runtime", "diffusion") for name in sys.modules)
"""


def own_network(norm_groups: str = "fixed") -> SlimmableUNet:
    torch.manual_seed(0)
    net = SlimmableUNet(T, 32, [1, 2], [1], 1, 0.1, num_groups=8, norm_groups=norm_groups)
    return jiggle(net)


def diffusers_network(norm_groups: str = "fixed") -> SlimmableDiffusersUNet:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return jiggle(SlimmableDiffusersUNet(model, T, norm_groups))


def jiggle(net: torch.nn.Module) -> torch.nn.Module:
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
    return net.eval()


NETWORKS = {
    "own": own_network,
    "diffusers": diffusers_network,
    "own, proportional": functools.partial(own_network, "proportional"),
    "diffusers, proportional": functools.partial(diffusers_network, "proportional"),
}


def subnets(net: torch.nn.Module) -> dict[float, torch.nn.Module]:
    return {width: net.subnet(width) for width in (1.0, 0.5, 0.25)}


class Seeded:
    """Noise as a pipeline draws it: x_T, then one tensor per step, from one generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, t: int = -1) -> torch.Tensor:
        return torch.randn(2, 3, SIZE, SIZE, generator=self.generator)


@torch.no_grad()
def our_images(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    schedule = NoiseSchedule(*BETAS)
    denoise = StepAwareDenoiser(subnets(net), WIDTHS, T, "cpu")
    noise = Seeded()
    images = {"ddpm": sample_ddpm(denoise, noise(), schedule, noise=noise, steps=10)}
    images["ddim"] = sample_ddim(denoise, Seeded()(), schedule, steps=5)
    noise = Seeded()
    images["ddim_eta"] = sample_ddim(denoise, noise(), schedule, steps=10, eta=0.7, noise=noise)
    return images


def test_a_fresh_process_gets_our_images_from_the_folder(tmp_path):
    nets = {name: make() for name, make in NETWORKS.items()}
    for name, net in nets.items():
        export_diffusers(tmp_path / name, subnets(net), WIDTHS, (3, SIZE, SIZE), BETAS)
        assert contents(tmp_path / name).keys() == {
            "model_index.json",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/step_aware_unet.py",
        }
        config = json.loads((tmp_path / name / "unet/config.json").read_text())
        assert config["schedule"] == list(WIDTHS.widths)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *(str(tmp_path / name) for name in nets)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, net in nets.items():
        theirs = np.load(tmp_path / f"{name}.npz")
        for sampler, images in our_images(net).items():
            expected = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
            assert expected.std() > 0.01
            np.testing.assert_allclose(theirs[sampler], expected, atol=2e-4, err_msg=name)


def test_folders_of_earlier_versions_can_be_built():
    """They have one number of groups for all norms, or none where the config says it."""
    for net in (own_network(), diffusers_network()):
        unet = step_aware(subnets(net), WIDTHS, (3, SIZE, SIZE))
        spec = dict(unet.config.networks["width_0_5"])
        if spec["kind"] == "ddsm":
            spec["num_groups"] = 8
        else:
            del spec["num_groups"]
        network = build(spec)
        network.load_state_dict(unet.candidates["width_0_5"].state_dict())
        x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([4, 4])
        output = network(x, t)
        output = output if torch.is_tensor(output) else output.sample
        torch.testing.assert_close(output, net(x, t, 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_timestep_takes_the_width_of_the_nearest_trained_one(kind):
    net = NETWORKS[kind]()
    schedule = WidthSchedule([1.0, 0.5, 0.25], [0, 6, 12])
    unet = step_aware(subnets(net), schedule, (3, SIZE, SIZE), timesteps=[0, 6, 12])
    assert [unet.width(t) for t in (-1, 0, 2.9, 3.1, 6, 8.5, 9.5, 19)] == (
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    )
    full = step_aware(subnets(net), WIDTHS, (3, SIZE, SIZE))
    assert [full.width(t) for t in (4.4, 4.6, 7.6, 25.0)] == [1.0, 0.25, 0.5, 0.5]
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        out = full(x, torch.tensor(4.2)).sample
        again = full(x, torch.tensor([4.2, 4.2]), return_dict=False)[0]
        exact = net(x, torch.tensor([4, 4]) if kind.startswith("own") else torch.tensor([4.2, 4.2]))
        torch.testing.assert_close(out, again)
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="several widths"):
            full(x, torch.tensor([1, 19]))


def test_only_the_widths_in_use_are_written():
    unet = step_aware(subnets(own_network()), WidthSchedule([0.5] * T), (3, SIZE, SIZE))
    assert list(unet.candidates) == ["width_0_5"]


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        (r"width 0\.75", dict(schedule=WidthSchedule([0.75] * T))),
        ("mean_type=xprev", dict(mean_type="xprev")),
        ("var_type=learned", dict(var_type="learned")),
        ("Linear", dict(networks=dict.fromkeys((1.0, 0.5, 0.25), torch.nn.Linear(1, 1)))),
        ("SlimmableUNet", dict(networks=dict.fromkeys((1.0, 0.5, 0.25), own_network()))),
        ("not empty", dict(directory="b")),
    ],
)
def test_mistakes_are_one_line_and_overwrite_nothing(tmp_path, what, changes):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    arguments = dict(directory="a", networks=subnets(own_network()), schedule=WIDTHS,
                     image_shape=(3, SIZE, SIZE), betas=BETAS)  # fmt: skip
    arguments |= changes
    arguments["directory"] = tmp_path / arguments["directory"]
    with pytest.raises(UserError, match=what):
        export_diffusers(**arguments)
    assert contents(tmp_path) == {"b/mine.txt": b"mine"}
