import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, run_alone, tiny_network
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PyramidAttentionBroadcastConfig,
    UNet2DConditionModel,
    UNet2DModel,
)
from test_latents import write_autoencoder

import build
from commands.export import write
from diffusion import NoiseSchedule, sample_ddim, sample_ddpm
from model import SlimmableUNet, StepAwareDenoiser, WidthSchedule, sampling_networks
from model.diffusers.export import export_diffusers, step_aware
from model.diffusers.pipeline import StepAwarePipeline
from model.diffusers.step_aware_unet import StepAwareUNet
from model.diffusers.supernet import SlimmableDiffusersUNet
from runtime.errors import UserError
from sampling.prefixes import Chain
from settings import Configuration

T, SIZE = 20, 8
BETAS = (1e-3, 0.2, T)
WIDTHS = WidthSchedule([1.0] * 5 + [0.25] * 3 + [0.5] * 12)

# Runs in a process of its own: the folders in plain/ by diffusers' pipelines, those in searched/ by
# their own, which is not told how to sample.
RUN = """
from pathlib import Path
import numpy as np, torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline

def images(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    return pipeline(2, generator, output_type="np", **options).images

local = dict(trust_remote_code=True, local_files_only=True)
for folder in Path("plain").iterdir():
    ddpm, ddim = (cls.from_pretrained(folder, **local) for cls in (DDPMPipeline, DDIMPipeline))
    np.savez(f"{folder}.npz", ddpm=images(ddpm, num_inference_steps=10),
             ddim=images(ddim, num_inference_steps=5),
             ddim_eta=images(ddim, num_inference_steps=10, eta=0.7))
first = None
for folder in map(str, Path("searched").iterdir()):
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, **local)
    first = first or (folder, pipeline)
    np.save(f"{folder}.npy", images(pipeline))
folder, pipeline = first  # the others left it alone
np.testing.assert_array_equal(images(pipeline), np.load(f"{folder}.npy"))
"""


def own_network(norm_groups: str = "fixed") -> SlimmableUNet:
    torch.manual_seed(0)
    net = SlimmableUNet(T, 32, [1, 2], [1], 1, 0.1, num_groups=8, norm_groups=norm_groups)
    return jiggle(net)


def diffusers_network(norm_groups: str = "fixed", num_classes: int = 0) -> SlimmableDiffusersUNet:
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
        num_class_embeds=num_classes or None,
    )
    return jiggle(SlimmableDiffusersUNet(model, T, norm_groups, num_classes))


def conditional_network(rows: int, null: bool) -> SlimmableDiffusersUNet:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    net = jiggle(SlimmableDiffusersUNet(model, 10))
    net.set_embeddings(torch.randn(rows + null, 5, 12), null)
    return net


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


def write_plain(folder: Path, nets: Mapping[str, torch.nn.Module]) -> None:
    scheduler = DDPMScheduler(T, *BETAS[:2], variance_type="fixed_large", clip_sample=False)
    for name, net in nets.items():
        unet = step_aware(subnets(net), WIDTHS, (3, SIZE, SIZE))
        export_diffusers(folder / name, unet, scheduler)
        assert contents(folder / name).keys() == {
            "model_index.json",
            "pipeline.py",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/step_aware_unet.py",
        }
        config = json.loads((folder / name / "unet/config.json").read_text())
        assert config["schedule"] == list(WIDTHS.widths)


def test_a_fresh_process_gets_our_images_from_the_folder(tmp_path):
    write_autoencoder(tmp_path / "shifted", shift_factor=0.3, in_channels=3, out_channels=3)
    write_autoencoder(tmp_path / "vq", kind="VQModel", in_channels=3, out_channels=3)
    nets = {name: make() for name, make in NETWORKS.items()}
    models = {name: searched(name, tmp_path) for name in SEARCHED}
    write_plain(tmp_path / "plain", nets)
    for name, (model, schedule) in models.items():
        write(model, schedule, tmp_path / "searched" / name)
    run_alone(RUN, tmp_path)
    for name, net in nets.items():
        theirs = np.load(tmp_path / f"plain/{name}.npz")
        for sampler, images in our_images(net).items():
            expected = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
            assert expected.std() > 0.01
            np.testing.assert_allclose(theirs[sampler], expected, atol=2e-4, err_msg=name)
    for name, (model, schedule) in models.items():
        ours, theirs = (
            our_searched_images(model, schedule),
            np.load(tmp_path / f"searched/{name}.npy"),
        )
        assert ours.std() > 0.01
        np.testing.assert_allclose(theirs, ours, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["own", "diffusers"])
def test_any_timestep_takes_the_width_of_the_nearest_trained_one(kind):
    net = NETWORKS[kind]()
    schedule = WidthSchedule([1.0, 0.5, 0.25], [0, 6, 12])
    unet = step_aware(subnets(net), schedule, (3, SIZE, SIZE))
    assert [unet.width(t) for t in (-1, 0, 2.9, 3.1, 6, 8.5, 9.5, 19)] == (
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    )
    full = step_aware(subnets(net), WIDTHS, (3, SIZE, SIZE))
    assert [full.width(t) for t in (4.4, 4.6, 7.6, 25.0)] == [1.0, 0.25, 0.5, 0.5]
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        out = full(x, torch.tensor(4.2)).sample
        again = full(x, torch.tensor([4.2, 4.2]), return_dict=False)[0]
        exact = net(x, torch.tensor([4, 4]) if kind == "own" else torch.tensor([4.2, 4.2]))
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
        ("Linear", dict(networks=dict.fromkeys((1.0, 0.5, 0.25), torch.nn.Linear(1, 1)))),
        ("SlimmableUNet", dict(networks=dict.fromkeys((1.0, 0.5, 0.25), own_network()))),
    ],
)
def test_what_is_no_step_aware_model(what, changes):
    arguments = dict(networks=subnets(own_network()), schedule=WIDTHS, image_shape=(3, SIZE, SIZE))
    with pytest.raises(UserError, match=what):
        step_aware(**arguments | changes)


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    unet = step_aware(subnets(own_network()), WIDTHS, (3, SIZE, SIZE))
    with pytest.raises(UserError, match="not empty"):
        export_diffusers(tmp_path / "b", unet, DDPMScheduler())
    assert contents(tmp_path) == {"b/mine.txt": b"mine"}


# --- what was searched ----------------------------------------------------------------------------

EVERY, STEPS = [1.0] * 3 + [0.5] * 4 + [0.25] * 3, [0.5, 1.0, 0.25, 0.5]
STEPS_5 = [1.0, 0.25, 0.5, 1.0, 0.5]
SEARCHED = {  # network, schedule, sampling options
    "ddpm": ("own", EVERY, {}),
    "ddpm, clipped": ("own", STEPS_5, dict(
        sample_steps=5, var_type="fixedsmall", clip_denoised=True)),
    "ddpm, quadratic": ("diffusers", EVERY, dict(sample_steps=5, timestep_spacing="quadratic")),
    "ddpm, skip": ("own", [0.5, 0.0, 1.0] * 3 + [0.25], dict(allow_skip=True)),
    "ddim": ("own", STEPS_5, dict(sampler="ddim", sample_steps=5, mean_type="v")),
    "ddim, one step": ("own", [0.5], dict(sampler="ddim", sample_steps=1)),
    "ddim, leading": ("own", EVERY, dict(
        sampler="ddim", sample_steps=4, timestep_spacing="leading")),
    "ddim, trailing": ("own", EVERY, dict(
        sampler="ddim", sample_steps=5, timestep_spacing="trailing")),
    "ddim, eta": ("own", EVERY, dict(sampler="ddim", sample_steps=5, eta=0.7, clip_denoised=True)),
    "ddim, quadratic": ("diffusers with classes", EVERY, dict(
        sampler="ddim", sample_steps=5, timestep_spacing="quadratic", clip_denoised=True)),
    "ddim, linspace": ("own", STEPS, dict(
        sampler="ddim", sample_steps=4, timestep_spacing="linspace", eta=1.0, mean_type="v")),
    "ddim, skip": ("own", [0.0, 0.5, 1.0] * 3 + [0.25], dict(
        sampler="ddim", allow_skip=True, clip_denoised=True, eta=1.0)),
    "edm": ("own", STEPS, dict(sampler="edm", sample_steps=4, clip_denoised=True)),
    "edm, every": ("diffusers", EVERY, dict(
        sampler="edm", sample_steps=4, beta_schedule="scaled_linear")),
    "edm, Euler": ("own", STEPS, dict(sampler="edm", sample_steps=4, heun=False, rho=3.0)),
    "dpm_solver": ("diffusers", STEPS, dict(
        sampler="dpm_solver", sample_steps=4, scheduler_options='{"use_karras_sigmas": true}')),
    "cosine": ("diffusers", STEPS, dict(
        sampler="dpm_solver", sample_steps=4, scheduler_options='{"use_lu_lambdas": true}',
        beta_schedule="squaredcos_cap_v2", mean_type="v")),
    "ancestral": ("diffusers", EVERY, dict(
        sampler="EulerAncestralDiscreteScheduler", sample_steps=4)),
    "Heun": ("own", STEPS, dict(sampler="HeunDiscreteScheduler", sample_steps=4)),
    "DDIMScheduler": ("diffusers", EVERY, dict(
        sampler="DDIMScheduler", sample_steps=5, clip_denoised=True)),
    "classes": ("own with classes", EVERY, dict(
        guidance_scale=2.0, classes="3,5", clip_denoised=True)),
    "classes of diffusers": ("diffusers with classes", EVERY, dict(
        guidance_scale=0.5, sampler="edm", sample_steps=4)),
    "rows": ("rows", EVERY, dict(sampler="ddim", sample_steps=5)),
    "rows, guided": ("guided row", EVERY, dict(guidance_scale=2.0, sampler="ddim", sample_steps=5)),
    "one row": ("one row", EVERY, dict(sampler="ddim", sample_steps=5)),
    "latents": ("latent", EVERY, dict(latent_vae="shifted")),
    "quantised latents": ("own", STEPS_5, dict(latent_vae="vq", sampler="ddim", sample_steps=5)),
}  # fmt: skip
SEARCHED_NETWORKS = {
    "own": tiny_network,
    "own with classes": functools.partial(tiny_network, num_classes=10),
    "rows": functools.partial(conditional_network, 2, True),
    "guided row": functools.partial(conditional_network, 1, True),
    "one row": functools.partial(conditional_network, 1, False),
    "latent": functools.partial(tiny_network, in_ch=4),
    "diffusers": diffusers_network,
    "diffusers with classes": functools.partial(diffusers_network, num_classes=10),
}


def searched(name: str, folder: Path) -> tuple[build.Model, WidthSchedule]:
    network, widths, values = SEARCHED[name]
    net = SEARCHED_NETWORKS[network]()
    if "latent_vae" in values:
        values = {**values, "latent_vae": str(folder / values["latent_vae"]), "img_size": 16}
    values = {"img_size": SIZE, "T": 10, "beta_1": 1e-3, "beta_T": 0.3} | values
    model = build.Model(net, Configuration.of(**values), torch.device("cpu"))
    entries = None if len(widths) == 10 else model.sampler.entries()
    return model, WidthSchedule(widths, entries)


@torch.no_grad()
def our_searched_images(model: build.Model, schedule: WidthSchedule) -> np.ndarray:
    """Two images (B, H, W, C) in [0, 1], on the noise that a pipeline draws."""
    networks = sampling_networks(model.net, (1.0, 0.5, 0.25))
    condition = model.classes.condition(torch.arange(2)) if model.classes else None
    if condition and not model.classes.fixed:
        condition = replace(condition, labels=torch.arange(2))
    denoise = StepAwareDenoiser(networks, schedule, 10, "cpu", condition)
    generator = torch.Generator().manual_seed(7)
    noise = lambda t=0: torch.randn(2, *model.image_shape, generator=generator)  # noqa: E731
    steps = Chain.of(schedule, model.sampler).steps
    every = len(steps) == len(set(model.sampler.entries()))
    x_0 = model.sampler.sample(denoise, noise(), noise, None if every else steps)
    if model.autoencoder:
        x_0 = model.autoencoder._decode(x_0)
    return (x_0.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def test_configs_are_json(tmp_path):
    config = Configuration.of(
        img_size=SIZE, T=10, beta_1=1e-3, beta_T=0.3, sampler="EulerDiscreteScheduler"
    )
    write(build.Model(tiny_network(), config, torch.device("cpu")), WidthSchedule(EVERY),
          tmp_path / "a")  # fmt: skip
    for path in (tmp_path / "a").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_cache_of_attention_is_of_the_images_being_made(tmp_path):
    write(*searched("DDIMScheduler", tmp_path), tmp_path / "a")
    unet = StepAwareUNet.from_pretrained(tmp_path / "a/unet")
    pipe = StepAwarePipeline(unet, DDIMScheduler.from_pretrained(tmp_path / "a/scheduler"))
    pipe.set_progress_bar_config(disable=True)
    cached = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 10),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    images, x = [], torch.randn(3, 3, SIZE, SIZE)
    for count, cache in ((2, None), (2, cached), (3, None), (2, None)):
        if cache:
            unet.enable_cache(cache)
        images.append(pipe(count, latents=x[:count], output_type="np").images)
    assert np.abs(images[1] - images[0]).max() > 1e-4
    np.testing.assert_array_equal(images[3], images[1])


@pytest.mark.parametrize("name", ["diffusers with classes", "rows without null"])
def test_guidance_that_the_program_refuses(tmp_path, name):
    net = conditional_network(2, False) if "null" in name else SEARCHED_NETWORKS[name]()
    values = dict(sampler="DDIMScheduler", sample_steps=5, label_dropout=0.0)
    config = Configuration.of(img_size=SIZE, T=10, beta_1=1e-3, beta_T=0.3, **values)
    model = build.Model(net, config, torch.device("cpu"))
    write(model, WidthSchedule([1.0] * 10), tmp_path / "a")
    unet = StepAwareUNet.from_pretrained(tmp_path / "a/unet")
    pipe = StepAwarePipeline(unet, DDIMScheduler.from_pretrained(tmp_path / "a/scheduler"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, output_type="np").images.std() > 0.01
    for guidance in (0.0, 3.0):
        with pytest.raises(ValueError, match="guidance_scale"):
            pipe(2, guidance_scale=guidance)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (dict(sampler="ddim", sample_steps=4, eta=0.5), "--eta=0.5.*--sample_steps that divides"),
        (dict(sampler="edm", sample_steps=4, S_churn=4.0), "--S_churn"),
        (dict(sampler="edm", sample_steps=4, mean_type="xstart"), "--mean_type=xstart"),
        (dict(sampler="edm", sample_steps=4, heun=False, clip_denoised=True), "--clip_denoised"),
        (dict(mean_type="xprev"), "--mean_type=xprev"),
        (dict(precond="edm", sampler="edm"), "--precond=edm"),
    ],
)
def test_chains_that_diffusers_does_not_have(tmp_path, values, what):
    config = Configuration.of(img_size=SIZE, T=10, **values)
    model = build.Model(tiny_network(), config, torch.device("cpu"))
    with pytest.raises(UserError, match=what):
        write(model, WidthSchedule(EVERY), tmp_path / "a")
    assert not contents(tmp_path)


def test_a_chain_that_leaves_its_last_step_out(tmp_path):
    model = build.Model(
        tiny_network(), Configuration.of(T=10, allow_skip=True), torch.device("cpu")
    )
    with pytest.raises(UserError, match="width 0"):
        write(model, WidthSchedule([0.0, *EVERY[1:]]), tmp_path / "a")
