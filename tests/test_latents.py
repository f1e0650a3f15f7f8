"""latents.py: small autoencoders in diffusers' format, the file of latents, a whole run in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, run_main, tiny_network
from PIL import Image

import build
import dataset as data
import diffusion
from dataset import latents
from dataset.latents import Autoencoder
from model import checkpoint
from runtime.errors import NotFiniteError, UserError
from sampling.generate import Generator
from sampling.samplers import make_sampler
from settings import Configuration, SamplingSettings

Refused = Callable[..., str]
BLOCKS = dict(
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
)  # fmt: skip
LATENT = [*TRAIN, "--img_size=16", "--latent_vae=vae", "--data_root=.", "--logdir=run"]
EVAL = ["--logdir=run", "--device=cpu", "--num_images=20", "--batch_size=20", "--T=10"]
EVAL += ["--fid_encoder=pixels", "--fid_cache=stats.npz"]


def write_autoencoder(folder: Path, seed: int = 0, kind: str = "AutoencoderKL", **more) -> None:
    """A small one with random weights; two pixels a side make one latent."""
    import diffusers

    torch.manual_seed(seed)
    own = {"AutoencoderKL": {"latent_channels": 4, "scaling_factor": 0.5},
           "VQModel": {"latent_channels": 3, "num_vq_embeddings": 16}}[kind]  # fmt: skip
    images = {"in_channels": 1, "out_channels": 1}
    getattr(diffusers, kind)(**{**BLOCKS, **images, **own, **more}).save_pretrained(folder)


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoders")
    write_autoencoder(folder / "vae")
    write_autoencoder(folder / "other", seed=1)
    write_autoencoder(folder / "shifted", shift_factor=0.3)
    write_autoencoder(folder / "vq", kind="VQModel")
    write_autoencoder(folder / "colour", in_channels=3, out_channels=3)
    return folder


@pytest.fixture
def vae(autoencoders: Path, here: Path) -> Path:
    """./vae in the working folder."""
    shutil.copytree(autoencoders / "vae", here / "vae")
    return here / "vae"


def digits(count: int = 30) -> data.Images:
    whole = data.load("digits", ".", 16)
    return data.Images("digits", whole.tensor[:count], False, whole.labels[:count], whole.classes)


def test_latents_are_scaled_as_said(vae: Path, refused: Refused) -> None:
    """--latent_scale in place of the config's 0.5; runs and files of latents know it."""
    train = [*LATENT, "--total_steps=1", "--sample_step=0"]
    said = run_main(*train)
    assert said.status == 0, said.err
    usual = Autoencoder(vae, "cpu").encode(digits().tensor[:30])
    assert f"latents: mean {float(usual.half().float().mean()):.1g}"[:13] in said.out
    other = [*train, "--latent_scale=5"]
    refused("run/ckpt.pt|latents", *other)
    said = run_main(*other, "--logdir=other", "--latent_cache=other.npy")
    assert said.status == 0, said.err
    latents_5 = np.load("other.npy").astype(np.float32)
    np.testing.assert_allclose(latents_5[:30], 10 * usual, rtol=2e-3, atol=1e-3)
    # What a checkpoint was trained with is what it is sampled with.
    made = run_main("--generate", "--logdir=other", "--device=cpu", "--num_images=1")
    assert made.status == 0, made.err
    both = ["--eval_ensemble", "--large_logdir=run", "--small_logdir=other", "--small_ch=16"]
    refused("latent_scale: 5.0 small, 0.0 large", *EVAL, *both)
    refused("--latent_scale", *TRAIN, "--logdir=new", "--latent_scale=2")


# --- The autoencoder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "shift"), [("vae", 4, 0.0), ("shifted", 4, 0.3), ("vq", 3, 0.0)]
)
def test_encoding_is_what_diffusers_does(
    autoencoders: Path, name: str, channels: int, shift: float
) -> None:
    import diffusers

    ours = Autoencoder(autoencoders / name, "cpu")
    kind = getattr(diffusers, type(ours.network).__name__)
    theirs, images = kind.from_pretrained(ours.folder).eval(), digits(5).tensor
    assert (ours.factor, ours.image_channels, ours.shape(16)) == (2, 1, (channels, 8, 8))
    with torch.no_grad():
        output = theirs.encode(data.to_network(images))
        z = output.latents if name == "vq" else output.latent_dist.mean
        decoded = data.to_uint8(theirs.decode(z).sample)
    z_scaled = (z - shift) * theirs.config.scaling_factor
    torch.testing.assert_close(ours.encode(images), z_scaled)
    assert (ours.to_images(z_scaled).int() - decoded.int()).abs().max() <= 1


def set_config(folder: Path, **entries: object) -> None:
    """Change entries of a config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | entries
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def test_means_and_deviations_of_channels_are_used(vae: Path) -> None:
    images = digits(3).tensor
    z = Autoencoder(vae, "cpu").encode(images) / 0.5
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    set_config(vae, latents_mean=mean, latents_std=std)
    autoencoder = Autoencoder(vae, "cpu")
    encoded = autoencoder.encode(images)
    for channel in range(4):
        expected = (z[:, channel] - mean[channel]) / std[channel] * 0.5
        torch.testing.assert_close(encoded[:, channel], expected)
    set_config(vae, latents_mean=None, latents_std=None)
    decoded = Autoencoder(vae, "cpu").to_images(0.5 * z)
    assert (autoencoder.to_images(encoded).int() - decoded.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        (dict(scaling_factor=...), "scaling_factor"),
        (dict(scaling_factor=0), "scaling_factor"),
        (dict(latents_mean=[0.0, 1.0]), "latents_mean"),
        (dict(latents_std=[1.0, 1.0, -1.0, 1.0]), "latents_std"),
        (dict(latents_std="wide"), "latents_std"),
        (dict(shift_factor=0.1, latents_mean=[1.0] * 4), "shift_factor and latents_mean"),
    ],
)
def test_a_normalisation_that_is_not_clear_is_refused(vae: Path, entries: dict, name: str) -> None:
    set_config(vae, **entries)
    with pytest.raises(UserError, match=f"--latent_vae.*config.json.*{name}"):
        Autoencoder(vae, "cpu")


def test_variants_that_are_not_used_do_not_change_the_fingerprint(vae: Path) -> None:
    before = Autoencoder(vae, "cpu").fingerprint
    weights = vae / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, vae / "diffusion_pytorch_model.fp16.safetensors")
    assert Autoencoder(vae, "cpu").fingerprint == before


def test_images_are_decoded_some_at_a_time(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = Autoencoder(vae, "cpu")
    z = torch.randn(5, 4, 8, 8)
    whole = autoencoder.to_images(z)
    monkeypatch.setattr(latents, "PIXELS_AT_ONCE", 2 * 16 * 16)
    assert (autoencoder.to_images(z).int() - whole.int()).abs().max() <= 1
    assert whole.shape == (5, 1, 16, 16)


def test_a_decoder_whose_numbers_are_not_finite_is_refused(vae: Path) -> None:
    """Its images would be black, and scored."""
    whole = Autoencoder(vae, "cpu")
    whole.network.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(NotFiniteError, match=r"--latent_vae: .*vae "):  # a search goes on
        whole.to_images(torch.zeros(1, 4, 8, 8))
    whole.network.save_pretrained(vae)
    with pytest.raises(UserError, match=r"--latent_vae: .*vae: decoder\.conv_out\.bias "):
        Autoencoder(vae, "cpu")


def test_decoder_flops_are_those_of_its_layers(autoencoders: Path) -> None:
    """2 × multiply-adds of every convolution and matrix product of AutoencoderKL's decoder."""

    def conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
        return 2 * inputs * outputs * kernel**2 * side**2

    def block(inputs: int, outputs: int, side: int) -> int:
        shortcut = conv(inputs, outputs, 1, side) if inputs != outputs else 0
        return conv(inputs, outputs, 3, side) + conv(outputs, outputs, 3, side) + shortcut

    attention = 4 * 2 * 64 * 16 * 16 + 2 * 2 * 64 * 64 * 16  # q, k, v, out; q·kᵀ, softmax·v
    middle = 2 * block(16, 16, 8) + attention
    up = 2 * block(16, 16, 8) + conv(16, 16, 3, 16) + block(16, 8, 16) + block(8, 8, 16)
    ends = conv(4, 4, 1, 8) + conv(4, 16, 3, 8) + conv(8, 1, 3, 16)
    autoencoder = Autoencoder(autoencoders / "vae", "cpu")
    assert autoencoder.decoder_flops(16) == ends + middle + up
    assert Autoencoder(autoencoders / "vq", "cpu").decoder_flops(16) > 0
    parameters = sum(p.numel() for p in autoencoder.network.parameters())
    assert 0 < autoencoder.decoder_parameters() < parameters


class Nothing(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_latents_are_not_clipped() -> None:
    levels = diffusion.NoiseSchedule(1e-3, 0.2, 10)
    for name in ("ddpm", "ddim", "edm", "dpm_solver"):
        for limit in (1.0, float("inf")):
            settings = SamplingSettings(sampler=name, sample_steps=8)
            generator = Generator(
                networks={1.0: Nothing()},
                sampler=make_sampler(settings, levels, "epsilon", limit),
                image_shape=(1, 2, 2),
                device=torch.device("cpu"),
                batch_size=1,
                to_images=lambda x: x,
                x_T=torch.full((1, 1, 2, 2), 30.0),
            )
            assert (float(generator.images([1.0] * 10, 1).max()) > 2.9) == (limit > 1)
    with pytest.raises(UserError, match="--clip_denoised is for pixels"):
        make_sampler(SamplingSettings(clip_denoised=True), levels, "epsilon", float("inf"))


def test_fingerprints(autoencoders: Path, vae: Path) -> None:
    first = Autoencoder(vae, "cpu").fingerprint
    assert Autoencoder(autoencoders / "vae", "cpu").fingerprint == first
    assert Autoencoder(autoencoders / "other", "cpu").fingerprint != first
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.1"}))
    assert Autoencoder(vae, "cpu").fingerprint == first
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    assert Autoencoder(vae, "cpu").fingerprint != first


# --- The file -------------------------------------------------------------------------------------


def encode(dataset: data.AnySet, folder: Path, path: Path) -> data.Images:
    return latents.encoded(dataset, Autoencoder(folder, "cpu"), 16, path, 8, 0)


def test_made_once_and_mapped(vae: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, dataset = here / "deep" / "digits.npy", digits()
    result = encode(dataset, vae, path)
    assert (result.tensor.shape, result.tensor.dtype) == ((30, 4, 8, 8), torch.float16)
    assert (result.flip, result.channels, result.classes) == (False, 4, dataset.classes)
    assert torch.equal(result.labels, dataset.labels)
    expected = Autoencoder(vae, "cpu").encode(dataset.tensor)
    torch.testing.assert_close(result.tensor.float(), expected, atol=2e-3, rtol=2e-3)
    assert np.load(path).shape == (30, 4, 8, 8)
    monkeypatch.delattr(Autoencoder, "encode")  # it is not needed again
    again = encode(dataset, vae, path)
    assert torch.equal(again.tensor, result.tensor)
    batch, _ = next(data.batches(again, 4, seed=0))
    assert (batch.dtype, batch.shape) == (torch.float32, (4, 4, 8, 8))
    assert sorted(p.name for p in path.parent.iterdir()) == ["digits.npy", "digits.npy.json"]


def test_a_stopped_encoding_goes_on(vae: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encode(digits(), vae, here / "whole.npy").tensor
    real, calls = Autoencoder.encode, []

    def stopping(self: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(Autoencoder, "encode", stopping)
    path = here / "part.npy"
    with pytest.raises(KeyboardInterrupt):
        encode(digits(), vae, path)
    assert not path.exists()
    with open(here / ".part.partial.npy", "ab") as file:
        file.write(b"half an image")
    assert torch.equal(encode(digits(), vae, path).tensor, expected)
    assert calls == [8, 8, 8, 8, 6]  # sixteen images were there already
    assert not (here / ".part.partial.npy").exists()
    # What another autoencoder left is not gone on with.
    shutil.copy(here / "whole.npy", here / ".other.partial.npy")
    identity = json.loads((here / "whole.npy.json").read_text())
    (here / "other.npy.json").write_text(json.dumps({**identity, "autoencoder": "another"}))
    assert torch.equal(encode(digits(), vae, here / "other.npy").tensor, expected)
    assert sum(calls[5:]) == 30


def test_an_identity_is_written_after_all_stale_shares_are_gone(
    vae: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, write_json, events = here / ".a.partial.npy", latents.write_json, []
    partial.write_bytes(bytes(10_000))  # of another VAE

    def gather(value: object) -> list[object]:
        events.append(partial.exists() and partial.stat().st_size)
        return [value]

    def write(*arguments: object) -> None:
        events.append("identity")
        write_json(*arguments)

    monkeypatch.setattr(latents.distributed, "gather", gather)
    monkeypatch.setattr(latents, "write_json", write)
    encode(digits(), vae, here / "a.npy")
    assert events[events.index("identity") - 1] < 10_000  # where all processes waited


def test_two_makers_wait_for_each_other(
    vae: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads do what processes do: each opens the lock itself."""
    real, calls, results = Autoencoder.encode, [], []

    def slow(self: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        time.sleep(0.05)
        return real(self, images)

    monkeypatch.setattr(Autoencoder, "encode", slow)
    path = here / "digits.npy"
    threads = [
        threading.Thread(target=lambda: results.append(encode(digits(), vae, path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(calls) == 30
    assert torch.equal(results[0].tensor, results[1].tensor)
    assert sorted(p.name for p in here.iterdir()) == ["digits.npy", "digits.npy.json", "vae"]


def test_stale_files(vae: Path, autoencoders: Path, here: Path) -> None:
    path = here / "latents.npy"
    encode(digits(), vae, path)
    changed = digits()
    changed.tensor[3, 0, 5, 5] ^= 1
    size = path.stat().st_size
    for dataset, folder, match in (
        (digits(), autoencoders / "other", r"\(autoencoder: \w{16} there, \w{16} "),
        (changed, vae, r"\(content: \w{16} there"),
        (digits(29), vae, r"\(images: 30 there, 29 here"),
    ):
        with pytest.raises(UserError, match=rf"latents.npy .*{match}.*delete it.*--latent_cache"):
            encode(dataset, folder, path)
    assert path.stat().st_size == size
    for torn in (path.read_bytes()[:-100], b"", b"text"):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"latents.npy .*delete it"):
            encode(digits(), vae, path)


def test_image_files_that_changed(here: Path) -> None:
    for i in range(3):
        Image.new("L", (16, 16), 60 * i).save(here / f"{i}.png")
    before = data.fingerprint(data.load("image_folder", here, 16))
    shutil.copytree(here, here.parent / "moved")
    assert data.fingerprint(data.load("image_folder", here.parent / "moved", 16)) == before
    Image.new("L", (16, 16), 61).save(here / "1.png")
    assert data.fingerprint(data.load("image_folder", here, 16)) != before


@pytest.mark.parametrize("folders", [["."], ["one"], ["one", "two"]])
def test_images_are_the_same_however_their_folder_is_named(here: Path, folders: list[str]) -> None:
    for folder in folders:
        (here / "photos" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("L", (16, 16), 60 * i).save(here / "photos" / folder / f"{i}.png")
    named = {data.fingerprint(data.load("image_folder", "photos", 16))}
    named.add(data.fingerprint(data.load("image_folder", here / "photos", 16)))
    os.chdir("photos")
    named.add(data.fingerprint(data.load("image_folder", ".", 16)))
    assert len(named) == 1


# --- A whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, autoencoders: Path) -> Path:
    """Real images in latents: trained with classes, searched, scored on decoded images."""
    folder = tmp_path_factory.mktemp("latent")
    shutil.copytree(autoencoders / "vae", folder / "vae")
    few = ["--num_generation=2", "--pop_size=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in (
            [*LATENT, "--dry_run"],
            [*LATENT, "--total_steps=3", "--eval_step=3", "--num_images=20", "--num_classes=10"],
            [*LATENT, "--num_classes=10"],
            [*EVAL, "--search", *few],
            [*EVAL, "--eval"],
            [*EVAL, "--eval_stepaware", "--guidance_scale=2"],
        ):
            result = run_main(*arguments)
            assert result.status == 0, (arguments, result.out, result.err)
        (folder / "profile.txt").write_text(run_main(*EVAL, "--profile").out)
        (folder / "dry_run.txt").write_text(run_main(*EVAL, "--eval", "--dry_run").out)
    return folder


@pytest.fixture
def run_latent(work: Path, here: Path) -> Path:
    for name in ("run", "vae", "latents"):
        shutil.copytree(work / name, here / name)
    shutil.copy(work / "stats.npz", here)
    return here / "run"


@pytest.mark.parametrize("name", ["eval", "eval_stepaware"])
def test_scores_are_of_decoded_images(work: Path, name: str) -> None:
    scores = json.loads((work / "run" / f"{name}.json").read_text())
    vae = Autoencoder(work / "vae", "cpu")
    assert scores["distance"] > 0
    assert scores["autoencoder"] == vae.fingerprint
    assert scores["decoder"]["gflops"] == pytest.approx(vae.decoder_flops(16) / 1e9)
    assert scores["decoder"]["ms_per_image"] > 0
    with np.load(work / "stats.npz", allow_pickle=False) as statistics:
        assert statistics["mu"].shape == (16 * 16,)
    with Image.open(work / "run" / f"{name}.png") as grid:
        assert grid.size == (5 * 18 + 2, 4 * 18 + 2)
    assert (work / "latents" / "digits16.npy").exists()
    settings = checkpoint.load(work / "run" / "ckpt.pt")["settings"]
    assert (settings["in_ch"], settings["latent_vae"]) == (4, "vae")
    for plan in ("profile", "dry_run"):
        assert "the decoder" in (work / f"{plan}.txt").read_text()
    gflops = vae.decoder_flops(16) / 1e9
    assert f"{gflops:.4f} GFLOPs" in (work / "profile.txt").read_text()
    with Image.open(work / "run" / "sample" / "6_width_1.png") as grid:
        assert grid.height % 18 == 2


def test_advice_on_cosine_betas_is_for_latents(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(build, "log_once", lines.append)
    config = Configuration.of(latent_vae="vae", T=10, beta_schedule="squaredcos_cap_v2")
    assert build.Model(tiny_network(in_ch=4), config, torch.device("cpu")).sampler
    (warning,) = (line for line in lines if "cosine" in line)
    assert "--mean_type=v" in warning
    assert "--clip_denoised" not in warning


@pytest.mark.parametrize("wanted", [1.0, 0.3])
def test_latents_that_the_noise_levels_are_not_for_are_said(wanted: float) -> None:
    z = torch.randn(200, 4, 8, 8)

    def said(tensor: torch.Tensor) -> str:
        return latents.spread(data.Images("", tensor.half(), False), wanted)

    small = said(0.2 * wanted * z)
    assert small.startswith("warning: ")
    assert float(re.search(r"deviation (\S+),", small)[1]) == pytest.approx(0.2 * wanted, rel=0.01)
    larger = float(re.search(r"--latent_scale (\S+) times", small)[1])
    assert "warning" not in said(larger * 0.2 * wanted * z)
    assert "warning" in said(wanted * (z + 0.8))
    assert "warning" in said(2 * wanted * z)


def test_a_scale_is_known_by_all_its_digits(vae: Path) -> None:
    usual = Autoencoder(vae, "cpu").fingerprint
    assert Autoencoder(vae, "cpu", 0.5).fingerprint == usual  # what the file says
    others = {Autoencoder(vae, "cpu", scale).fingerprint for scale in (0.18215, 0.18215001)}
    assert len(others | {usual}) == 3


def test_a_moved_autoencoder_is_still_the_same(run_latent: Path, here: Path) -> None:
    (here / "vae").rename(here / "moved")
    assert run_main(*EVAL, "--eval", "--latent_vae=moved").status == 0
    arguments = [*LATENT, "--num_classes=10", "--latent_vae=moved", "--total_steps=7"]
    result = run_main(*arguments, "--sample_step=0")
    assert result.status == 0, result.err


# --- What is refused ------------------------------------------------------------------------------


def test_evaluation_with_another_autoencoder(
    refused: Refused, run_latent: Path, autoencoders: Path
) -> None:
    for match, flag in (
        ("another VAE", f"--latent_vae={autoencoders / 'other'}"),
        ("--latent_vae", "--latent_vae="),
        ("nothing", "--latent_vae=nothing"),
        ("--clip_denoised", "--clip_denoised"),
    ):
        refused(match, *EVAL, "--eval", flag)


def test_training_with_another_autoencoder(
    refused: Refused, run_latent: Path, autoencoders: Path
) -> None:
    arguments = [*LATENT, "--num_classes=10", "--total_steps=9"]
    other = f"--latent_vae={autoencoders / 'other'}"
    refused("another VAE", *arguments, other)
    shutil.rmtree("latents")
    refused("another VAE", *arguments, other)  # before anything is encoded
    refused("another scale", *arguments, "--latent_scale=0.7")


def test_autoencoder_for_a_network_of_pixels(refused: Refused, run_folder: Path, vae: Path) -> None:
    refused("pixels.*--latent_vae", *EVAL, "--eval", "--latent_vae=vae")


def test_autoencoders_that_do_not_fit(refused: Refused, autoencoders: Path, here: Path) -> None:
    for name in ("vae", "colour"):
        shutil.copytree(autoencoders / name, here / name)
    refused("colour.* 3 .*--dataset=digits has 1", *LATENT, "--latent_vae=colour")
    refused("--img_size=15.*multiple of 2", *LATENT, "--img_size=15")
    line = run_main(*LATENT, "--img_size=6", "--latent_cache=six.npy").error
    assert re.search("--img_size=6 .*--ch_mult", line)


WEIGHTS = Path("vae/diffusion_pytorch_model.safetensors")
CONFIG = Path("vae/config.json")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-500]), "--latent_vae: .* vae "),
        (lambda: WEIGHTS.rename("vae/diffusion_pytorch_model.bin"), r"\.safetensors"),
        (lambda: CONFIG.unlink(), r"vae has no config\.json"),
        (lambda: shutil.copytree("vae", "vae/vae") and CONFIG.unlink(), "did you mean vae/vae"),
        (lambda: CONFIG.write_text('{"_class_name": "A"}'), " A, not one of AutoencoderKL, VQMo"),
        (lambda: CONFIG.write_text("{"), r"vae/config\.json"),
    ],
    ids=["torn", "no weights", "no config", "pipeline", "other class", "no JSON"],
)
def test_folders_without_an_autoencoder(
    refused: Refused, vae: Path, spoil: Callable[[], object], match: str
) -> None:
    spoil()
    refused(match, *LATENT)


def test_places_that_cannot_be_written(refused: Refused, vae: Path, here: Path) -> None:
    (here / "file").write_text("in the way")
    refused(r"file/latents\.npy.*--latent_cache", *LATENT, "--latent_cache=file/latents.npy")


# --- Samplers -------------------------------------------------------------------------------------

TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]


@pytest.fixture(scope="module")
def with_edm(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    """The same network, but preconditioned as EDM's; trained for one step."""
    folder = tmp_path_factory.mktemp("edm")
    result = run_main(
        *LATENT, "--num_classes=10", "--precond=edm", "--total_steps=1", "--sample_step=0",
        f"--logdir={folder}", f"--latent_vae={work / 'vae'}", f"--data_root={work}",
    )  # fmt: skip
    assert result.status == 0, result.err
    return folder


@pytest.mark.parametrize("row", TABLE[1:], ids=lambda row: re.sub(r"\W+", "-", row[0]))
def test_the_samplers_table(row: list[str], run_latent: Path, with_edm: Path) -> None:
    """Latents, classes and guidance at once, with every sampler."""
    says = dict(zip(TABLE[0], row, strict=True))
    arguments = [*EVAL, "--eval", f"--sampler={says['sampler'].split()[0]}", "--sample_steps=4"]
    if "precond" in says["sampler"]:
        shutil.copy(with_edm / "ckpt.pt", run_latent)
        arguments += ["--precond=edm", "--latent_vae=vae"]
    result = run_main(*arguments, "--guidance_scale=2", "--num_images=4")
    assert (result.status == 0) == (says["latent"] == "yes"), result.err
    assert says["latent"] == says["class-conditional"]
    if says["latent"] == "yes":
        scores = json.loads((run_latent / "eval.json").read_text())
        assert scores["passes"] % 8 == 0
        assert scores["decoder"]["gflops"] > 0
