"""From a diffusers folder to a step-aware diffusers folder, by the program's flags alone."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_main
from PIL import Image
from test_latents import write_autoencoder

import dataset
from diffusion import NoiseSchedule
from model import checkpoint
from model.diffusers.importance import order_by_importance
from model.diffusers.loading import read_embeddings, read_model
from model.diffusers.supernet import SlimmableDiffusersUNet
from runtime.errors import UserError
from sampling.noise import SAMPLING, ImageNoise
from sampling.samplers import make_sampler
from settings import SamplingSettings

UNET = dict(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=8,
)  # fmt: skip
BETAS = dict(num_train_timesteps=20, beta_start=0.001, beta_end=0.3)
TRAIN = [
    "--train", "--init_diffusers=model", "--sandwich", "--dataset=digits",
    "--batch_size=8", "--total_steps=4", "--save_step=2", "--sample_step=4", "--sample_size=2",
    "--log_step=1", "--warmup=0", "--min_width=0.5", "--candidate_width=0.75", "--device=cpu",
    "--logdir=run", "--fid_encoder=pixels",
]  # fmt: skip
BEFORE = [
    "--init_diffusers=model", "--dataset=digits", "--num_images=3", "--batch_size=2",
    "--min_width=0.5", "--candidate_width=0.75", "--fid_encoder=pixels", "--device=cpu",
    "--logdir=run",
]  # fmt: skip
FLAGS = ["--flagfile=run/flagfile.txt", "--num_images=8", "--batch_size=8"]


def save_model(folder: Path, scheduler: dict | None = None, **changes: object) -> None:
    """A pipeline folder, as save_pretrained writes it, of a small network with random weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**UNET, **changes})
    betas = diffusers.DDPMScheduler(**{**BETAS, **(scheduler or {})})
    diffusers.DDPMPipeline(unet, betas).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    save_model(folder)
    return folder


@pytest.fixture
def beside(here: Path, model: Path) -> Path:
    """An empty working folder, with ./model in it."""
    (here / "model").symlink_to(model, target_is_directory=True)
    return here


def succeeds(*arguments: str) -> str:
    result = run_main(*arguments)
    assert result.status == 0, result.err
    return result.out


def test_a_run_goes_on_without_its_folder(beside: Path) -> None:
    succeeds(*TRAIN, "--total_steps=2", "--sample_step=0")
    Path("model").unlink()
    succeeds(*TRAIN)  # the same command
    whole = torch.load("run/ckpt.pt", weights_only=True)
    assert whole["step"] == 4
    result = run_main(*TRAIN, "--grad_clip=2", "--total_steps=6")
    assert "grad_clip: 1.0 there, 2.0 here" in result.error


def test_other_noise_schedules_travel(here: Path) -> None:
    save_model(
        Path("model"), dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    )
    succeeds(*TRAIN, "--total_steps=1", "--sample_step=0")
    settings = torch.load("run/ckpt.pt", weights_only=True)["settings"]
    expected = dict(kind="diffusers", T=20, beta_T=0.3, img_size=8,
                    beta_schedule="squaredcos_cap_v2", mean_type="v")  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    Path("run/search.txt").write_text("[1, 0.5, 0.5, 0.5]")
    steps = ["--sampler=dpm_solver", "--sample_steps=4", "--clip_denoised=false"]
    succeeds(*FLAGS, *steps, "--export_diffusers=out")
    assert not [path for path in Path("out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    scheduler = diffusers.DDPMScheduler.from_pretrained("out/scheduler")
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert scheduler.config.prediction_type == "v_prediction"


def trained_network(weights: str = "ema_model") -> SlimmableDiffusersUNet:
    """The network of run/ckpt.pt."""
    state = checkpoint.load("run/ckpt.pt")
    net = SlimmableDiffusersUNet.from_settings(state["settings"]).requires_grad_(False).eval()
    checkpoint.fill(net, state[weights], "run/ckpt.pt")
    return net


PIPELINES = {  # the scheduler's settings, the flags that they become
    "clips": ({}, dict(var_type="fixedsmall", clip_denoised=True)),
    "does not": (dict(clip_sample=False), dict(var_type="fixedsmall", clip_denoised=False)),
    "large": (dict(variance_type="fixed_large"), dict(var_type="fixedlarge", clip_denoised=True)),
    "log": (dict(variance_type="fixed_small_log"), dict(var_type="fixedsmall", clip_denoised=True)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_converted_model_makes_the_images_of_its_own_pipeline(here: Path, name: str) -> None:
    options, expected = PIPELINES[name]
    save_model(Path("model"), options)
    out = succeeds(*TRAIN, "--total_steps=1", "--lr=1e-12", "--sample_step=0")
    settings = torch.load("run/ckpt.pt", weights_only=True)["settings"]
    flags = {flag: settings[flag] for flag in expected}
    assert flags == expected
    for flag, value in flags.items():
        assert f"--{flag}={value}" in out
    net, ordered = trained_network("net_model"), SlimmableDiffusersUNet(read_model("model"))
    order_by_importance(ordered)
    torch.testing.assert_close(net.state_dict(), ordered.state_dict())
    noise_schedule = NoiseSchedule(0.001, 0.3, 20)

    def ours(sampler: str, **more: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = lambda t: torch.randn(2, 1, 8, 8, generator=generator)  # noqa: E731
        options = {**flags, **more}
        mean_type = options.pop("mean_type", "epsilon")
        settings = SamplingSettings(sampler=sampler, **options)
        chain = make_sampler(settings, noise_schedule, mean_type)
        x_0 = chain.sample(lambda x, t: net(x, torch.full((2,), t)), noise(0), noise)
        return x_0.clamp(-1, 1)[:, 0] / 2 + 0.5

    def theirs(pipeline: type, **more: object) -> torch.Tensor:
        pipeline = pipeline.from_pretrained("model")
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(2, torch.Generator().manual_seed(0), output_type="np", **more).images
        return torch.from_numpy(images)[..., 0]

    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close(images := ours("ddpm"), theirs(diffusers.DDPMPipeline, num_inference_steps=20))
    others = (
        dict(clip_denoised=not flags["clip_denoised"]),
        dict(var_type="fixedlarge" if flags["var_type"] == "fixedsmall" else "fixedsmall"),
    )
    assert all((ours("ddpm", **other) - images).abs().mean() > 0.005 for other in others)
    steps = dict(num_inference_steps=5)
    close(ours("DDIMScheduler", sample_steps=5), theirs(diffusers.DDIMPipeline, **steps))
    steps["use_clipped_model_output"] = True
    close(ours("ddim", sample_steps=5), theirs(diffusers.DDIMPipeline, **steps))


def their_images(pipeline: object, count: int, monkeypatch: pytest.MonkeyPatch, **options) -> list:
    """uint8 (H, W) of each image of a pipeline that draws the noise of --seed=0."""
    noise = ImageNoise(0, SAMPLING, torch.arange(count), (1, 8, 8))

    def drawn(shape: object, **more: object) -> torch.Tensor:
        return noise.initial() if not calls else noise(int(calls[-1]))

    calls: list = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1]))
    for module in (
        sys.modules[type(pipeline).__module__],
        sys.modules[type(pipeline.scheduler).__module__],
    ):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    pipeline.set_progress_bar_config(disable=True)
    return [np.asarray(image) for image in pipeline(count, **options).images]


UNTRAINED = {  # the scheduler that the folder has, flags that make its pipeline's images, steps
    "DDPMScheduler": ([], 20),
    "DDIMScheduler": (["--sampler=DDIMScheduler", "--sample_steps=5"], 5),
}


@pytest.mark.parametrize("scheduler", UNTRAINED)
def test_before_training_a_model_makes_the_images_of_its_own_pipeline(
    here: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(Path("model"))
    flags, steps = UNTRAINED[scheduler]
    pipeline = getattr(diffusers, scheduler.replace("Scheduler", "Pipeline"))
    pipeline.from_pretrained("model").save_pretrained("model")
    out = succeeds("--generate", *BEFORE, *flags, "--out=images")
    if flags:
        assert "--sampler=DDIMScheduler" in succeeds("--profile", *BEFORE)
    else:
        assert "--sampler=ddpm" in out
    theirs = their_images(
        pipeline.from_pretrained("model"), 3, monkeypatch, num_inference_steps=steps
    )
    for i, image in enumerate(theirs):
        ours = np.asarray(Image.open(f"images/{i:06d}.png"))
        assert np.abs(ours.astype(int) - image.astype(int)).max() <= 1
        assert ours.std() > 10


def test_a_model_is_scored_and_searched_before_training(beside: Path, refused: Callable) -> None:
    steps = [*BEFORE, "--sampler=ddim", "--sample_steps=3"]
    succeeds("--eval", *steps)
    said = json.loads(Path("run/eval.json").read_text())
    assert (said["checkpoint"], said["step"]) == ("model", 0)
    succeeds("--search", *steps, "--num_generation=1", "--pop_size=2")
    succeeds("--eval_stepaware", *steps)
    assert "network passes" in succeeds("--eval", "--dry_run", *steps)
    Path("run/other.pt").touch()  # the folder of a run: its checkpoint is missing
    refused("no checkpoint at run/ckpt.pt", "--eval", *steps)


def test_images_of_one_group_norm_alone(beside: Path, refused: Callable) -> None:
    narrow = [*BEFORE, "--generate", "--assigned_width=0.5", "--sampler=ddim", "--sample_steps=2"]
    succeeds(*narrow, "--num_images=1", "--norm_groups=fixed")
    refused(r"images.json.*norm_groups: fixed there", *narrow, "--norm_groups=proportional")


UNDECIDED = [  # a setting that no flag of ours has, a flag that says what to do instead
    (dict(thresholding=True), "--clip_denoised=true"),
    (dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.8),
     "--clip_denoised=true"),
    (dict(clip_sample_range=2.0), "--clip_denoised=false"),
    (dict(timestep_spacing="trailing"), "--timestep_spacing=uniform"),
    (dict(steps_offset=1), "--timestep_spacing=quadratic"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "flag"), UNDECIDED)
def test_what_no_flag_takes_over_must_be_decided(
    here: Path, refused: Callable, options: dict, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(Path("model"), options)
    profile = ["--profile", "--init_diffusers=model", "--device=cpu"]
    option, name = next(iter(options)), flag.split("=")[0]
    line = refused(rf"{option} is .*give {name} .*--scheduler_options='.*\"{option}\"", *profile)
    assert f"{name} decides" in succeeds(*profile, flag)
    refused(f"{option} is ", *profile, "--scheduler_options={}")
    # The flags that the line names make the images of the model's own pipeline.
    own = shlex.split(line[line.index("--sampler=") :])
    succeeds("--generate", *BEFORE, *own, "--sample_steps=10", "--out=images")
    pipeline = diffusers.DDPMPipeline.from_pretrained("model")
    for i, image in enumerate(their_images(pipeline, 3, monkeypatch, num_inference_steps=10)):
        ours = np.asarray(Image.open(f"images/{i:06d}.png")).astype(int)
        assert np.abs(ours - image).max() <= 1


def test_a_scheduler_that_clips_latents_must_be_decided(here: Path, refused: Callable) -> None:
    save_model(Path("model"), in_channels=4, out_channels=4)
    write_autoencoder(Path("vae"))
    profile = ["--profile", "--init_diffusers=model", "--latent_vae=vae", "--device=cpu"]
    refused("clip_sample.*--clip_denoised=false", *profile)
    assert "--img_size=16" in succeeds(*profile, "--clip_denoised=false")


def test_image_sizes_are_those_of_the_model_or_given(here: Path, refused: Callable) -> None:
    profile = ["--profile", "--init_diffusers=model", "--device=cpu"]
    save_model(Path("model"))
    config = json.loads(Path("model/unet/config.json").read_text())
    for size in ([8, 8], None, [8, 16]):
        Path("model/unet/config.json").write_text(json.dumps({**config, "sample_size": size}))
        if size == [8, 8]:
            out = succeeds(*profile, "--var_type=fixedlarge")
            assert "--img_size=8" in out
            assert re.search(r"variance_type +fixed_small +--var_type=fixedlarge \(given\)", out)
        else:
            refused("sample_size", *profile)
            assert "--img_size=16" in succeeds(*profile, "--img_size=16")


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_are_diffusers_own(kind: str) -> None:
    theirs = diffusers.DDPMScheduler(1000, 0.001, 0.02, kind).betas.double()
    ours = torch.from_numpy(NoiseSchedule(0.001, 0.02, 1000, kind).betas)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_diffusers=nowhere"], "nowhere is not a directory"),
        (["--init_diffusers=model/scheduler"], "is not a diffusers model"),
        (["--T=1000"], "--T: 20 there, 1000 here"),
        (["--beta_schedule=scaled_linear"], "--beta_schedule: linear there"),
        (["--precond=edm"], "--init_diffusers"),
        (["--candidate_width=0.99"], "width 0.99 cannot narrow"),
        (["--img_size=9"], "--img_size=9"),
        (["--slimmable_unet=false"], "--sandwich trains several widths"),
    ],
)
def test_mistakes_are_one_line(
    beside: Path, refused: Callable, flags: list[str], message: str
) -> None:
    Path("run").mkdir()
    refused(message, *TRAIN, *flags)


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ({}, dict(in_channels=3, out_channels=3), "has 1 channels and the model 3"),
        ({}, dict(out_channels=2), "1 channels and makes 2.*variance"),
        ({}, dict(in_channels=2), "2 channels and makes 1.*inpaint"),
        ({}, dict(class_embed_type="timestep"), "needs class_labels"),
        ({}, dict(time_embedding_type="learned", num_train_timesteps=10), "10 timesteps.*--T=20"),
        ({}, dict(num_class_embeds=11), "--num_classes=11, or 10"),
        (dict(beta_schedule="sigmoid"), {}, "beta_schedule is sigmoid"),
        (dict(trained_betas=[0.1] * 20), {}, "trained_betas"),
        (dict(rescale_betas_zero_snr=True), {}, "rescale_betas_zero_snr"),
    ],
)
def test_models_that_cannot_be_used(
    here: Path, refused: Callable, scheduler: dict, changes: dict, message: str
) -> None:
    save_model(Path("model"), scheduler, **changes)
    Path("run").mkdir()
    refused(message, *TRAIN)


def test_classes_from_a_folder_to_scores(here: Path, refused: Callable) -> None:
    save_model(Path("model"), num_class_embeds=10)
    refused("--num_classes=10, or 9", *TRAIN)
    refused("--num_classes=3", *TRAIN, "--num_classes=3")
    train = [*TRAIN, "--num_classes=10", "--total_steps=1", "--guidance_scale=2"]
    refused("--guidance_scale=2", *train, "--label_dropout=0")
    succeeds(*train)
    assert trained_network().class_embedding.frequencies.sum() == pytest.approx(1)
    steps = ["--sampler=ddim", "--sample_steps=3"]
    succeeds(*FLAGS, *steps, "--eval", "--assigned_width=0.5", "--classes=3,5")
    succeeds(*FLAGS, *steps, "--profile")
    refused("--num_classes", *FLAGS, *steps, "--eval", "--num_classes=9")


def save_conditional(folder: Path, **changes: object) -> None:
    """A folder with a small UNet2DConditionModel, and embeddings for it beside."""
    torch.manual_seed(0)
    changes |= dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=12,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    diffusers.UNet2DConditionModel(**{**UNET, **changes}).save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(**BETAS, clip_sample=False).save_pretrained(folder / "scheduler")
    rows = {"encoder_hidden_states": torch.randn(2, 5, 12), "null": torch.randn(1, 5, 12)}
    safetensors.torch.save_file(rows, "two.safetensors")
    rows["encoder_hidden_states"] = rows["encoder_hidden_states"][0]
    safetensors.torch.save_file(rows, "one.safetensors")


def test_embeddings_before_training(here: Path) -> None:
    save_conditional(Path("model"))
    sampling = ["--conditioning=two.safetensors", "--guidance_scale=2", "--sampler=ddim",
                "--sample_steps=5"]  # fmt: skip
    succeeds("--generate", *BEFORE, *sampling, "--out=images")
    unet = diffusers.UNet2DConditionModel.from_pretrained("model/unet").requires_grad_(False)
    scheduler = diffusers.DDIMScheduler.from_pretrained("model/scheduler")
    scheduler.set_timesteps(5)
    file = safetensors.torch.load_file("two.safetensors")
    rows, null = file["encoder_hidden_states"][[0, 1, 0]], file["null"].expand(3, -1, -1)
    x = ImageNoise(0, SAMPLING, torch.arange(3), (1, 8, 8)).initial()
    for t in scheduler.timesteps:
        shown, nothing = (unet(x, t, encoder_hidden_states=e).sample for e in (rows, null))
        x = scheduler.step(nothing + 2 * (shown - nothing), t, x).prev_sample
    for i, image in enumerate(dataset.to_uint8(x)[:, 0].numpy()):
        ours = np.asarray(Image.open(f"images/{i:06d}.png")).astype(int)
        assert np.abs(ours - image).max() <= 1
        assert ours.std() > 10


def test_a_model_that_reads_its_guidance_is_refused(here: Path, refused: Callable) -> None:
    save_conditional(Path("model"), time_cond_proj_dim=16)
    refused("needs timestep_cond", *BEFORE, "--profile", "--conditioning=one.safetensors")


def lacks(path: Path, name: str) -> None:
    """Make a record, or the first line of a log, one of a version that did not say `name`."""
    text = path.read_text()
    older = re.sub(rf'"{name}": [^,}}]+,?', "", text, count=1)
    assert older != text
    path.write_text(re.sub(r",(\s*})", r"\1", older, count=1))


@pytest.mark.parametrize("mode", ["generate", "search"])
def test_images_of_one_row_with_and_without_guidance_never_mix(
    here: Path, refused: Callable, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow in ("draw_front", "plot_fronts", "SearchProgress.pictures"):
        monkeypatch.setattr(f"report.{slow}", lambda *arguments: None)
    save_conditional(Path("model"))
    plain = [*BEFORE, f"--{mode}", "--conditioning=one.safetensors", "--sampler=ddim",
             "--sample_steps=2", "--num_generation=1", "--pop_size=2"]  # fmt: skip
    guided, where = [*plain, "--guidance_scale=8"], {"generate": "--out", "search": "--search_dir"}
    folders = [f"{where[mode]}={name}" for name in ("a", "b")]
    succeeds(*guided, folders[0])
    refused("guidance_scale: 8.0 there, 1.0 here", *plain, folders[0])
    succeeds(*plain, folders[1])
    lacks(Path("b", {"generate": "images.json", "search": "search.jsonl"}[mode]), "guidance_scale")
    refused("guidance_scale: 1.0 there, 8.0 here", *guided, folders[1])
    succeeds(*plain, folders[1])
    refused("--classes: there is no class 5", *plain, folders[1], "--classes=5")


def test_embeddings_of_a_run_are_in_its_checkpoint(here: Path, refused: Callable) -> None:
    save_conditional(Path("model"))
    refused("needs encoder_hidden_states.*--conditioning", "--eval", *BEFORE)
    refused("takes one row", *TRAIN, "--conditioning=two.safetensors")
    train = [*TRAIN, "--total_steps=1", "--conditioning=one.safetensors"]
    succeeds(*train, "--sample_step=0")
    Path("one.safetensors").rename("other")
    steps = ["--sampler=ddim", "--sample_steps=4", "--num_images=3"]
    succeeds(*FLAGS, *steps, "--eval", "--conditioning=")
    safetensors.torch.save_file(
        {"encoder_hidden_states": torch.zeros(1, 5, 12), "null": torch.zeros(1, 5, 12)},
        "one.safetensors",
    )
    refused("other embeddings", *train)


EMBEDDINGS = {  # what a file of --conditioning must not be
    "nothing": ({}, "encoder_hidden_states"),
    "features": ({"encoder_hidden_states": torch.zeros(1, 5, 8)}, "12"),
    "not finite": ({"encoder_hidden_states": torch.full((5, 12), torch.nan)}, "finite"),
    "empty": ({"encoder_hidden_states": torch.zeros(0, 5, 12)}, "12"),
    "many nulls": ({"encoder_hidden_states": torch.zeros(5, 12), "null": torch.zeros(2, 5, 12)},
                   "null has 2 rows"),
    "lengths": ({"encoder_hidden_states": torch.zeros(5, 12), "null": torch.zeros(1, 4, 12)}, "L"),
    "others": ({"encoder_hidden_states": torch.zeros(5, 12), "pooled": torch.zeros(1)}, "pooled"),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_files_that_hold_no_embeddings(tmp_path: Path, name: str) -> None:
    tensors, message = EMBEDDINGS[name]
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=f"file.safetensors.*{message}"):
        read_embeddings(str(path), 12)


def test_a_model_without_scheduler_needs_the_flags_that_it_would_set(
    here: Path, refused: Callable
) -> None:
    save_model(Path("model"))
    shutil.rmtree("model/scheduler")
    profile = ["--profile", "--init_diffusers=model", "--device=cpu"]
    told = ["--T=20", "--beta_schedule=squaredcos_cap_v2"]
    missing = ", ".join(f"--{name}" for name in ("T", "beta_1", "beta_T", "beta_schedule"))
    refused(rf"scheduler_config\.json.*give {missing}, --mean_type", *profile)
    refused("give --mean_type$", *profile, *told)
    succeeds(*profile, *told, "--mean_type=v")


def test_export_is_a_mode(run_folder: Path, refused: Callable) -> None:
    refused("2 modes at once", "--export_diffusers=out", "--eval", "--logdir=run")
    refused("no width schedule", "--flagfile=run/flagfile.txt", "--export_diffusers=out",
            "--logdir=run")  # fmt: skip
    Path("out").mkdir()
    Path("out/mine").touch()
    (run_folder / "search.txt").write_text("[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]")
    refused("out exists and is not empty", "--flagfile=run/flagfile.txt", "--export_diffusers=out",
            "--logdir=run")  # fmt: skip
