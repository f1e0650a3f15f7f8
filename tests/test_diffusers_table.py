"""docs/diffusers.md: its table, model by model, and its walk, command by command."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run_alone, run_main
from test_latents import write_autoencoder

import build
from runtime.files import save_image
from sampling.noise import SAMPLING, ImageNoise
from settings import Configuration

# diffusers 0.34's own, in its FIR layers
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
TABLE = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\|.*\|$", PAGE[PAGE.index("## Which models go") :], re.M)
]
ROWS = {model: (flags, result) for model, _, flags, result in TABLE[2:]}


def down_up(*kinds: str) -> dict[str, tuple[str, ...]]:
    """Block types of the levels, without "DownBlock2D", and the way back."""
    down = tuple(f"{kind}DownBlock2D" for kind in kinds)
    return {
        "down_block_types": down,
        "up_block_types": tuple(k.replace("Down", "Up").replace("down", "up") for k in down[::-1]),
    }


# An eighth of the published channels and groups, or less; as many levels, blocks and heads' kinds.
BASE = dict(in_channels=1, out_channels=1, sample_size=8, norm_num_groups=4, norm_eps=1e-6)
SIX = dict(block_out_channels=(16, 16, 32, 32, 64, 64), sample_size=32, layers_per_block=1,
           downsample_padding=0, attention_head_dim=None,
           **down_up("", "", "", "", "Attn", ""))  # fmt: skip
CONSISTENCY = dict(
    block_out_channels=(16, 32, 48), layers_per_block=1, num_class_embeds=10, attention_head_dim=8,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
)  # fmt: skip
SKIP = dict(
    block_out_channels=(128, 128), norm_num_groups=32, layers_per_block=1, attention_head_dim=16,
    in_channels=3, out_channels=3,  # these blocks know no others
    down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
)  # fmt: skip
FOURIER = dict(SKIP, time_embedding_type="fourier")
TEXT = dict(cross_attention_dim=12, attention_head_dim=4, layers_per_block=1)
K_BLOCKS = dict(
    TEXT, block_out_channels=(64, 128, 128), norm_num_groups=None, act_fn="gelu",
    mid_block_type=None, layers_per_block=2, attention_head_dim=8, time_embedding_type="fourier",
    down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    resnet_time_scale_shift="scale_shift",
)  # fmt: skip
DDPM = ("DDPMScheduler", {})
LDM = dict(beta_schedule="scaled_linear", clip_sample=False)
MODELS = {  # the model's config, its scheduler, its autoencoder
    "ddpm-cifar10-32": (
        dict(block_out_channels=(16, 32, 32, 32), attention_head_dim=None, flip_sin_to_cos=False,
             freq_shift=1, downsample_padding=0, **down_up("", "Attn", "", "")),
        ("DDPMScheduler", dict(variance_type="fixed_large")), "",
    ),
    "ddpm-cat-256, ddpm-celebahq-256": (SIX, DDPM, ""),
    "ddpm-butterflies-128": ({**SIX, "attention_head_dim": 8}, DDPM, ""),
    "the diffusers course's 64/128/128/256": (
        dict(block_out_channels=(8, 16, 16, 32), **down_up("", "", "Attn", "Attn")),
        ("DDPMScheduler", dict(beta_schedule="squaredcos_cap_v2")), "",
    ),
    "ldm-celebahq-256": (
        dict(block_out_channels=(28, 56, 84, 112), attention_head_dim=28, in_channels=3,
             out_channels=3, layers_per_block=1, **down_up("", "Attn", "Attn", "Attn")),
        ("DDIMScheduler", LDM), "vqvae",
    ),
    "Stable Diffusion 1.5": (
        dict(TEXT, in_channels=4, out_channels=4, block_out_channels=(16, 32, 64, 64),
             **down_up("CrossAttn", "CrossAttn", "CrossAttn", "")),
        ("PNDMScheduler", dict(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True)),
        "vae",
    ),
    "a UNet as of consistency models, trained with β": (CONSISTENCY, DDPM, ""),
    "cd_imagenet64_l2": (CONSISTENCY, ("CMStochasticIterativeScheduler", None), ""),
    "a UNet with Skip blocks, trained with β": (SKIP, DDPM, ""),
    "a UNet2DModel with Fourier time embedding": (FOURIER, DDPM, ""),
    "ncsnpp-celebahq-256": (FOURIER, ("ScoreSdeVeScheduler", None), ""),
    "a UNet with K blocks": (K_BLOCKS, DDPM, ""),
    "sd-x2-latent-upscaler": (dict(K_BLOCKS, in_channels=8, out_channels=5), DDPM, ""),
    "SDXL": (
        dict(TEXT, block_out_channels=(16, 32), addition_embed_type="text_time",
             addition_time_embed_dim=8, projection_class_embeddings_input_dim=58,
             **down_up("", "CrossAttn")), DDPM, "",
    ),
}  # fmt: skip
OPEN = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

for folder in sys.argv[1:]:
    print("opening", folder)
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = np.load(folder + ".npz")
    images = pipe(2, latents=torch.from_numpy(expected["x_T"]), output_type="np").images
    assert np.abs(255 * images - expected["images"]).max() < 1.5, folder
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where rows leave their exports, and noise and images beside. In the end, diffusers alone must
    make the same of all of them: one process, since it takes seconds to start."""
    folder = tmp_path_factory.mktemp("exports")
    yield folder
    run_alone(OPEN, folder, *sorted(path for path in folder.iterdir() if path.is_dir()))


def write_model(name: str) -> type:
    """./DIR and ./FILE of a small model of this structure; the class of its UNet."""
    config, (scheduler, options), autoencoder = MODELS[name]
    if options is not None:
        options = dict(num_train_timesteps=20, beta_start=0.001, beta_end=0.3, **options)
    kind = (
        diffusers.UNet2DConditionModel if "cross_attention_dim" in config else diffusers.UNet2DModel
    )
    torch.manual_seed(0)
    kind(**{**BASE, **config}).save_pretrained("DIR/unet")
    getattr(diffusers, scheduler)(**options or {}).save_pretrained("DIR/scheduler")
    if autoencoder:
        vq = {"kind": "VQModel", "scaling_factor": 1.0} if autoencoder == "vqvae" else {}
        write_autoencoder(Path("DIR", autoencoder), **vq)
    safetensors.torch.save_file({"encoder_hidden_states": torch.randn(5, 12)}, "FILE")
    Path("FILE").rename("FILE.safetensors")
    return kind


def succeeds(*arguments: str) -> None:
    result = run_main(*arguments)
    assert result.status == 0, result.err


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def test_the_table_has_every_model() -> None:
    assert ROWS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS, ids=slug)
def test_a_model_goes_the_whole_way(
    here: Path, refused: Callable, exports: Path, name: str
) -> None:
    flags, result = ROWS[name]
    flags = flags.replace("FILE", "FILE.safetensors").split()
    kind = write_model(name)
    colours = 3 if "Skip" in str(MODELS[name]) else 1  # these blocks know three alone
    for i in range(10):  # folders are classes
        save_image(Path("images", f"{i}", "0.png"), torch.randint(256, (colours, 32, 32)).byte())
    way, _, reason = result.partition(": ")
    about = [
        "--init_diffusers=DIR", *flags, "--fid_encoder=pixels", "--device=cpu", "--num_images=2",
        "--batch_size=2", "--dataset=image_folder", "--data_root=images", "--min_width=0.5",
        "--candidate_width=0.5", "--logdir=run",
    ]  # fmt: skip
    train = [
        *about, "--train", "--sandwich", "--num_sandwich_sampling=2", "--total_steps=1",
        "--lr=1e-12", "--warmup=0", "--sample_step=0", "--label_dropout=0",
    ]  # fmt: skip
    if way == "refused":
        Path("run").mkdir()
        refused(reason, *train)
        refused(reason, *about, "--eval")
        return
    succeeds(*train)
    steps = dict(sampler="ddim", sample_steps=4)
    again = ["--flagfile=run/flagfile.txt", *(f"--{flag}={value}" for flag, value in steps.items())]
    again += ["--classes=1,3"] if "--num_classes=10" in flags else []
    search = ["--search_method=sensitivity", "--search_objective=pareto", "--flops_budget=0.8"]
    few = ["--num_segments=2", "--num_generation=1", "--pop_size=2"]
    succeeds(*again, "--search", *search, *few)
    assert json.loads(Path("run/search/front.json").read_text())["chosen"]["saving"] >= 0.2
    succeeds(*again, f"--export_diffusers={exports / slug(name)}")

    labels = {"classes": "1,3"} if "--num_classes=10" in flags else {}
    model = build.load_model(Configuration.of(logdir="run", device="cpu", **steps, **labels))
    schedule = model.schedule("run/search.txt")
    assert 0.5 in schedule.widths
    networks = build.candidates(model, sorted(set(schedule.widths)))
    images = build.generator(model, networks).images(schedule, 2)
    assert images.float().std() > 1
    x = ImageNoise(0, SAMPLING, torch.arange(2), model.image_shape).initial()
    images = images.permute(0, 2, 3, 1).numpy()
    np.savez(exports / f"{slug(name)}.npz", x_T=x.numpy(), images=images)

    theirs, given, shown, texts = kind.from_pretrained("DIR/unet"), {}, {}, {}
    if labels:
        given, shown = {"labels": torch.tensor([1, 3])}, {"class_labels": torch.tensor([1, 3])}
    if model.net.embeddings is not None:
        texts = {"encoder_hidden_states": model.net.embeddings.expand(2, -1, -1)}
    with torch.no_grad():
        whole, half = (model.net(x, torch.tensor([2, 2]), width, **given) for width in (1.0, 0.5))
        its = theirs(x, 2, **shown, **texts).sample
    torch.testing.assert_close(whole, its, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(half, its, atol=1e-3)


# --- the walk -------------------------------------------------------------------------------------

FEWER = {  # flags that make the walk short; the last of two counts
    "--train": ["--total_steps=2", "--sample_step=0"],
    "--search": ["--num_images=3", "--num_generation=1", "--pop_size=2", "--num_segments=2"],
    "--eval": ["--num_images=3"], "--eval_stepaware": ["--num_images=3"],
    "--generate": ["--num_images=2"],
}  # fmt: skip


def test_the_walk(here: Path) -> None:
    """Every command of the page, in turn."""
    lines = re.sub(r"\\\n\s*", "", PAGE)
    commands = re.findall(r"^ +python (?:- <<'EOF'\n((?:.*\n)*?) +EOF|main.py (.*))$", lines, re.M)
    flags = [flags.split() for _, flags in commands if flags]
    make, *use = (textwrap.dedent(code) for code, _ in commands if code)
    exec(make, {})
    assert len(flags) >= 7
    for each in flags:
        mode = next((mode for mode in FEWER if mode in each), None)
        succeeds(*each, *FEWER.get(mode, []), "--device=cpu")
    run_alone("\n".join(use), here)
    assert Path("sample.png").exists()
