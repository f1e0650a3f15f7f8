"""DDSM: train a slimmable diffusion model, search the width of each step, evaluate the result.

    python main.py --train|--search|--eval|--eval_stepaware|--eval_ensemble|--profile [flags]
    python main.py --export_diffusers DIR [flags]

The only file that knows flags: it turns them into settings and calls what does the work.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from absl import app, flags
from torch import nn

import dataset as data
import diffusion
import score
from commands import plan as estimate
from evaluate import Evaluator, Schedule, Scores, SharedStates
from model import (
    SlimmableUNet,
    UNetSettings,
    WidthSchedule,
    arithmetic,
    average,
    check_compiler,
    checkpoint,
    entries_for_calls,
    keep_freed,
    sampling_networks,
)
from model.networks import latency
from report import SearchProgress, SearchResult, front_table, pick_point, read_front, table
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import (
    Unfinished,
    alone_in,
    read_json,
    save_grid,
    writable_folder,
    write_json,
    write_text,
)
from sampling import conditioning as classes
from sampling import noise as rng
from sampling.conditioning import Classes
from search import SEGMENTS, Genome, Rung, Search, SearchSettings, search_stages, warm_start
from train import Interrupted, Trainer, TrainSettings

MODES = (
    "train", "search", "eval", "eval_stepaware", "eval_ensemble", "profile", "export_diffusers",
)  # fmt: skip
FLAGS = flags.FLAGS
CIFAR10_STATISTICS = "./stats/cifar10.train.npz"
LOOK = -2  # the value of --pick without a number


def define_flags() -> None:
    """Every flag, by group. Names and defaults of the published code are kept."""
    boolean, integer, real = flags.DEFINE_bool, flags.DEFINE_integer, flags.DEFINE_float
    text, choice = flags.DEFINE_string, flags.DEFINE_enum
    # Modes
    boolean("train", False, "train a network, or continue training it")
    boolean("search", False, "search a width schedule for a trained supernet")
    boolean("eval", False, "score one width (--assigned_width)")
    boolean("eval_stepaware", False, "score the schedule in LOGDIR/search.txt (or --schedule)")
    boolean("eval_ensemble", False, "score a large and a small network that take turns")
    boolean("profile", False, "print parameters, GFLOPs and latency of every width")
    text("export_diffusers", "", "write the step-aware model of LOGDIR/search.txt (or --schedule) "
         "to this new folder, for diffusers' pipelines")  # fmt: skip
    # Network
    integer("ch", 128, "channels of the first level")
    flags.DEFINE_multi_integer("ch_mult", [1, 2, 2, 2], "channels of each level over --ch")
    flags.DEFINE_multi_integer("attn", [1], "levels with attention")
    integer("num_res_blocks", 2, "residual blocks a level")
    real("dropout", 0.1, "dropout rate of the residual blocks")
    integer("num_groups", 32, "groups of every group norm")
    boolean("slimmable_unet", False, "the network works at several widths")
    boolean("slimmable_g16", False, "slimmable, with 16 groups in every group norm")
    choice("skip_slicing", "leading", ["leading", "segments"],
           "columns that serve the skip at a narrow width: the leading ones of [h, skip] "
           "(published), or the leading ones of each segment")  # fmt: skip
    choice("norm_groups", "fixed", ["fixed", "proportional"],
           "what a group norm keeps at a narrow width: its number of groups (published), or the "
           "channels of each group, without which narrow widths are hardly of use")  # fmt: skip
    integer("num_classes", 0, "classes of a class-conditional network; 0: not conditional")
    # Diffusion
    real("beta_1", 1e-4, "first β")
    real("beta_T", 0.02, "last β")
    integer("T", 1000, "timesteps")
    choice("beta_schedule", "linear", [*diffusion.BETA_SCHEDULES],
           "how β gets from --beta_1 to --beta_T; the names are diffusers'")  # fmt: skip
    choice("mean_type", "epsilon", [*diffusion.MEAN_TYPES], "what the network predicts")
    choice("var_type", "fixedlarge", ["fixedlarge", "fixedsmall"], "variance of an ancestral step")
    choice("precond", "none", [*diffusion.PRECONDITIONINGS],
           "edm: EDM's preconditioning, noise levels and loss in place of β and --mean_type; "
           "--T is then the number of noise levels")  # fmt: skip
    real("P_mean", -1.2, "--precond=edm: mean of ln σ in training")
    real("P_std", 1.2, "--precond=edm: deviation of ln σ in training")
    real("sigma_data", 0.5, "--precond=edm: deviation of the data, in [-1, 1]")
    # Sampling
    text("sampler", "ddpm", "ddpm, ddim, edm, dpm_solver, or a scheduler class of diffusers, such "
         "as UniPCMultistepScheduler; after --precond=edm the default is edm")  # fmt: skip
    integer("sample_steps", 0, "steps of the sampler; 0: one for every timestep")
    choice("timestep_spacing", "uniform", [*diffusion.SPACINGS],
           "which timesteps ddpm and ddim keep")  # fmt: skip
    real("eta", 0.0, "DDIM: 0 is deterministic, 1 as noisy as DDPM")
    boolean("clip_denoised", False, "clip the predicted x_0 to [-1, 1] within each step")
    real("rho", 7.0, "edm: the larger, the more steps at small noise")
    boolean("heun", True, "edm: second-order steps of two network passes; else Euler steps of one")
    real("S_churn", 0.0, "edm: noise that the whole chain adds; 0 is deterministic")
    real("S_tmin", 0.0, "edm: smallest noise level at which it is added")
    real("S_tmax", math.inf, "edm: largest noise level at which it is added")
    real("S_noise", 1.0, "edm: deviation of the noise that is added")
    text("scheduler_options", "", "entries for the config of a scheduler of diffusers, as JSON: "
         "'{\"use_karras_sigmas\": true}'")  # fmt: skip
    real("guidance_scale", 1.0,
         "class-conditional: the answer is without + scale·(with − without) the "
         "class; 1 is plainly conditional, at one network pass a step instead of two")  # fmt: skip
    text("classes", "", "class-conditional: classes of the images, by number or name, as in 3,5 "
         "or cat,dog; default: drawn like the training set's")  # fmt: skip
    # Data
    text("dataset", "cifar10", "one of " + ", ".join(data.NAMES) + "; see docs/datasets.md")
    text("data_root", "./data", "folder of the data set; downloaded to where that is possible")
    integer("img_size", 32, "pixels a side")
    integer("num_workers", 4, "processes that decode images, for data sets of image files")
    text("background", "white", "what transparent pixels show: a colour name, or #rrggbb")
    choice("channels", "auto", ["auto", "1", "3"],
           "of data sets of image files; auto: 3 where any image has colour")  # fmt: skip
    choice("flip", "auto", ["auto", "on", "off"],
           "mirror images in training; auto: where the data set allows it")  # fmt: skip
    text("latent_vae", "", "diffuse in the latents of the AutoencoderKL or VQModel in this folder, "
         "which diffusers wrote")  # fmt: skip
    text("latent_cache", "", "file of the data set's latents, made where it is missing; default "
         "DATA_ROOT/latents/NAME.npy")  # fmt: skip
    # Training
    real("lr", 2e-4, "learning rate")
    real("grad_clip", 1.0, "largest norm of the gradient")
    integer("total_steps", 800000, "training steps")
    integer("warmup", 5000, "steps over which the learning rate rises")
    integer("batch_size", 128, "images a training step, or a sampling batch")
    real("ema_decay", 0.9999, "decay of the averaged weights")
    boolean("sandwich", False, "train with the sandwich rule")
    boolean("distill", False, "narrower widths of a sandwich step learn the full width's answer")
    real("label_dropout", 0.1, "class-conditional: share of training images whose class is not "
         "told, which --guidance_scale needs")  # fmt: skip
    text("init_diffusers", "", "start from the UNet in this folder that diffusers wrote")
    real("min_width", 0.25, "smallest width")
    integer("num_sandwich_sampling", 3, "widths a sandwich step: 1, --min_width, and some between")
    flags.DEFINE_multi_float("candidate_width", [0.75, 0.5], "widths between; repeat the flag")
    integer("sample_size", 64, "images in the grids drawn during training")
    integer("sample_step", 1000, "steps between these grids; 0: none")
    integer("save_step", 5000, "steps between checkpoints")
    integer("eval_step", 0, "steps between evaluations during training; 0: none")
    integer("log_step", 100, "steps between lines of train.jsonl")
    # Evaluation
    integer("num_images", 50000, "images to generate for a score")
    real("assigned_width", 1.0, "eval: the width to score")
    text("schedule", "", "width schedule to use; default LOGDIR/search.txt")
    choice("fid_encoder", "inception", ["inception", "efficientnet_lite0", "pixels"],
           "features in which the Fréchet distance is taken")  # fmt: skip
    text("fid_cache", CIFAR10_STATISTICS,
         "statistics of the data set (.npz with mu, sigma); computed and saved where missing. "
         "For other data sets or encoders the default is a name of its own in ./stats")  # fmt: skip
    text("fid_weights", "", "Inception weights file; default: torch hub's checkpoint folder")
    boolean("fid_use_torch", False, "no longer does anything: the distance always uses torch")
    text("large_logdir", "./logs/DDPM_CIFAR10_EPS", "eval_ensemble: folder of the large network")
    text("small_logdir", "./logs/DDPM_CIFAR10_EPS", "eval_ensemble: folder of the small network")
    integer("small_ch", 64, "eval_ensemble: --ch of the small network")
    integer("start", 200, "eval_ensemble: the small network runs where end < t < start")
    integer("end", 0, "eval_ensemble: see --start")
    # Search
    choice("search_method", "evolution", ["evolution", "sensitivity"],
           "an evolutionary algorithm (published), or a table of what each part of the chain loses "
           "at each width, and rounds of scoring what an additive model expects")  # fmt: skip
    integer("num_generation", 1000, "generations, the first population included")
    integer("pop_size", 10, "candidates a generation")
    real("fid_weight", 0.5, "weight of the distance in the weighted objective")
    real("macs_weight", 0.001, "weight of a step's average MMACs (half its MFLOPs) in it")
    real("mutation_prob", 0.001, "probability that a gene mutates, per gene")
    boolean("random_init", False, "a first population without the uniform widths")
    choice("search_objective", "weighted", ["weighted", "pareto"],
           "minimise one weighted sum (published), or distance and cost both")  # fmt: skip
    choice("cost", "flops", ["flops", "latency"], "what a step costs: FLOPs, or time measured here")
    real("flops_budget", 0.0, "pareto: share of full width's cost that the chosen schedule may "
         "have; 0: the front's knee")  # fmt: skip
    real("distance_limit", 0.0, "pareto: the largest distance of interest, as a multiple of the "
         "least in the first generation; 0: any")  # fmt: skip
    integer("pick", -1, "take this point of the finished search's front as search.txt instead; "
            "without a number: print the front as a table")  # fmt: skip
    integer("num_segments", 0, "genes, each for a run of steps; 0: one gene per step, or with "
            "--search_method=sensitivity 12")  # fmt: skip
    boolean("level_seeds", False, "two- and three-level schedules in the first population")
    boolean("allow_skip", False, "0 is a width too: the step is left out")
    text("search_ladder", "", "cheap rungs, IMAGESxSTEPS,…, that candidates climb to be scored "
         "at the full setting")  # fmt: skip
    real("ladder_keep", 0.25, "share of a rung's candidates that climb to the next")
    integer("surrogate", 0, "offspring made for each that is scored, screened by a regression "
            "on the log; 0: none are screened")  # fmt: skip
    integer("confirm_images", 0, "sensitivity: images on fresh noise, at most, for each schedule "
            "that could be on the front; 0: twice --num_images")  # fmt: skip
    real("search_minutes", 0.0, "stop scoring after so many minutes; 0: when the search is done")
    real("state_memory", 2.0, "GiB for states that chains share; 0: none are shared")
    choice("state_device", "device", ["device", "host"], "where these are kept")
    text("search_warm_start", "", "log of another search whose best schedules start this one")
    text("search_dir", "", "folder of the search; default LOGDIR/search")
    # Run
    text("logdir", "./logs/DDPM_CIFAR10_EPS", "folder of the run")
    text("ckpt_name", "ckpt", "checkpoint LOGDIR/NAME.pt to write, continue, or use")
    integer("seed", 0, "seed of everything random", lower_bound=0, upper_bound=2**63 - 1)
    text("device", "auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    boolean("parallel", False, "DataParallel over the visible GPUs")
    choice("amp", "none", ["none", "auto", "bf16", "fp16"], "arithmetic of the network; auto: the "
           "fastest on this machine, by measurement, kept in the run's folder")  # fmt: skip
    boolean("compile", False, "torch.compile, with CUDA graphs where a GPU samples")
    boolean("dry_run", False, "say what the command would cost, from a short measured burst")


# --- flags to settings ----------------------------------------------------------------------------

# What a checkpoint says of its network; a flag that is given must agree with it.
NETWORK_FLAGS = ("T", "ch", "ch_mult", "attn", "num_res_blocks", "num_groups", "skip_slicing",
                 "norm_groups", "num_classes")  # fmt: skip
MODEL_FLAGS = (
    *NETWORK_FLAGS, "beta_1", "beta_T", "beta_schedule", "mean_type", "img_size", "precond",
    "P_mean", "P_std", "sigma_data",
)  # fmt: skip
# How the pipeline of a model of diffusers samples; its checkpoints have these, and they may differ.
SAMPLING_FLAGS = ("var_type", "clip_denoised")
# What is taken from the checkpoint where the flag is not given, and may differ.
DEFAULT_FLAGS = (
    "slimmable_unet", "slimmable_g16", "min_width", "candidate_width", "dataset", "dropout",
    "latent_vae", "background", "channels",
)  # fmt: skip
TRAINING_FLAGS = (
    *MODEL_FLAGS, *DEFAULT_FLAGS, "lr", "grad_clip", "warmup", "batch_size", "ema_decay", "seed",
    "sandwich", "num_sandwich_sampling", "distill", "amp", "label_dropout", "flip",
)  # fmt: skip


def from_flags(settings: type, **given: object):
    """A settings dataclass filled from the flags of the same names."""
    values = {f.name: FLAGS[f.name].value for f in fields(settings) if f.name in FLAGS}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return settings(**values | given)


def choose_mode(argv: Sequence[str]) -> str:
    """The one mode that is on; the command line wins over flagfiles."""
    said: dict[str, bool] = {}  # the last word on a mode counts
    for argument in argv:
        match = re.fullmatch(r"--?(no)?(\w+?)(?:=(.*))?", argument)
        if match and match[2] in MODES:
            on = match[1] is None and (match[3] or "true").lower() in ("true", "t", "1", "yes", "y")
            if match[2] == "export_diffusers":  # the one mode that is not a boolean
                on = bool(FLAGS.export_diffusers)
            said[match[2]] = on
    modes = [mode for mode, on in said.items() if on] or [
        mode for mode in MODES if FLAGS[mode].value and said.get(mode, True)
    ]
    if len(modes) != 1:
        what = f"{len(modes)} modes at once ({', '.join(modes)})" if modes else "no mode"
        raise UserError(f"{what}: give exactly one of {', '.join('--' + m for m in MODES)}")
    return modes[0]


def write_flagfile(path: Path) -> None:
    """This project's flags, but for the modes, as a flagfile."""
    lines = [FLAGS[name].serialize() for name in OWN_FLAGS if name not in MODES]
    write_text(path, "\n".join(line for line in lines if line) + "\n")


def plain(value: object) -> object:
    """A flag's value as it is in a checkpoint: JSON-friendly."""
    return list(value) if isinstance(value, (list, tuple)) else value


def stored(name: str, value: object, path: Path) -> object:
    """What a checkpoint says that a flag was, as the flag's own parser takes it."""
    flag = FLAGS[name]
    try:
        if not isinstance(flag, flags.MultiFlag):
            return flag.parser.parse(value)
        return [flag.parser.parse(one) for one in value]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its settings have {name}={value!r} ({error})") from error


def agree_with(known: Mapping[str, object], path: Path) -> None:
    """Take what a checkpoint says of its network; refuse flags that were given and differ."""
    known = {
        name: stored(name, known[name], path)
        for name in (*MODEL_FLAGS, *DEFAULT_FLAGS, *SAMPLING_FLAGS)
        if name in known
    }
    differing = [
        f"--{name}: {known[name]} there, {plain(FLAGS[name].value)} here"
        for name in MODEL_FLAGS
        if name in known and FLAGS[name].present and known[name] != plain(FLAGS[name].value)
    ]
    if differing:
        raise UserError(f"{path} is for other settings ({'; '.join(differing)})")
    for name in (*MODEL_FLAGS, *DEFAULT_FLAGS, *SAMPLING_FLAGS):
        if name in known and not FLAGS[name].present:
            FLAGS[name].value = known[name]


def slimmable() -> bool:
    return FLAGS.slimmable_unet or FLAGS.slimmable_g16


def all_widths() -> list[float]:
    """The widths that a supernet was trained for, rising."""
    return sorted({1.0, FLAGS.min_width, *FLAGS.candidate_width}) if slimmable() else [1.0]


def choose_device() -> torch.device:
    """The device that --device asks for; under torchrun, this process's own GPU."""
    name = FLAGS.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={FLAGS.device}: not usable here ({reason})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def use_parallel() -> bool:
    """Whether DataParallel is asked for and there is more than one GPU for it."""
    if not FLAGS.parallel or distributed.launched():
        return False
    count = torch.cuda.device_count()
    if count < 2:
        say_once(f"--parallel: {count} GPUs are visible, so the work stays on one device")
    elif choose_device().index != 0:
        say_once(
            f"--parallel begins at the first GPU: --device={FLAGS.device} is the only one at work"
        )
        return False
    return count > 1


def say(text: str) -> None:
    """Print, once for all processes."""
    if distributed.is_main():
        print(text, flush=True)


say_once = functools.cache(say)


# --- what the modes are made of -------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _autoencoder(folder: str, device: torch.device):
    from dataset.latents import Autoencoder

    return Autoencoder(folder, device)


def autoencoder():
    """The autoencoder of --latent_vae; None where diffusion is in pixels."""
    return _autoencoder(FLAGS.latent_vae, choose_device()) if FLAGS.latent_vae else None


def check_autoencoder(known: Mapping[str, object], path: Path) -> None:
    """Refuse to use a network in other latents than those that it was trained in."""
    vae, theirs = autoencoder(), known.get("autoencoder")
    if vae and not theirs:
        raise UserError(f"{path} was trained in pixels: leave --latent_vae out")
    if theirs and not vae:
        raise UserError(f"{path} was trained in latents: name its --latent_vae")
    if vae and vae.fingerprint != theirs:
        raise UserError(
            f"{path} was trained in the latents of another VAE ({theirs}) than {FLAGS.latent_vae} "
            f"({vae.fingerprint}): name that one with --latent_vae"
        )


def network_shape(channels: int) -> tuple[int, int, int]:
    """What a network of so many channels is shown: images of --img_size, or their latents."""
    vae = autoencoder()
    side = vae.shape(FLAGS.img_size)[1] if vae else FLAGS.img_size
    if vae and channels != vae.channels:
        raise UserError(
            f"--latent_vae: latents of {FLAGS.latent_vae} have {vae.channels} channels and the "
            f"network {channels}"
        )
    return channels, side, side


def picture_shape(net: nn.Module) -> tuple[int, int, int]:
    """What is scored and shown."""
    vae = autoencoder()
    channels = vae.image_channels if vae else net.settings.in_ch
    return channels, FLAGS.img_size, FLAGS.img_size


def chosen_classes(net: nn.Module) -> Classes | None:
    """Which classes images are asked to show; None where the network has none."""
    if not getattr(net.settings, "num_classes", 0):
        for name in ("guidance_scale", "classes"):
            if FLAGS[name].value != FLAGS[name].default:
                raise UserError(
                    f"--{name}={FLAGS[name].value}: the network has no classes; train one with "
                    "--num_classes"
                )
        return None
    if not 0 <= FLAGS.guidance_scale < math.inf:
        raise UserError(f"--guidance_scale={FLAGS.guidance_scale}: must not be negative")
    if FLAGS.guidance_scale != 1 and not (
        getattr(net.settings, "null_class", True) or FLAGS.label_dropout
    ):
        raise UserError(
            f"--guidance_scale={FLAGS.guidance_scale}: guidance needs a network that was also "
            "trained without classes; train it with --label_dropout"
        )
    shares = net.class_embedding.frequencies.tolist()
    names = getattr(net, "class_names", ())
    fixed = classes.parse(FLAGS.classes, names)
    result = Classes(tuple(shares), FLAGS.guidance_scale, fixed, FLAGS.seed)
    if fixed and names:
        say_once(f"--classes: {', '.join(f'{names[number]} ({number})' for number in fixed)}")
    return result


def passes_a_call(net: nn.Module) -> int:
    """Network passes that an image's step, or half of a second-order step, takes."""
    asked_for = chosen_classes(net)
    return asked_for.passes if asked_for else 1


def check_network(net: nn.Module) -> nn.Module:
    """`net`, if it can run at --img_size and at every width that it is to run at."""
    side = network_shape(net.settings.in_ch)[1]
    try:
        net.settings.check_image_size(side)
    except UserError as error:
        if not FLAGS.latent_vae:
            raise
        raise UserError(
            f"--img_size={FLAGS.img_size} makes latents of {side} a side: {error}"
        ) from error
    for width in all_widths():
        net.check_width(width)
    return net


def network_from_diffusers() -> nn.Module:
    """The UNet in --init_diffusers as a supernet; flags take what its scheduler says of it."""
    # diffusers takes seconds to import.
    from model.diffusers import importance, loading, supernet, trained

    folder = Path(FLAGS.init_diffusers)
    found = trained.trained_diffusion(folder)
    if found:
        agree_with(found.flags, found.path)
        sample_as_its_pipeline(found)
    else:
        check_told(folder, trained.NEEDED)
    if FLAGS.precond != "none":
        raise UserError("--init_diffusers: such a model was trained with --precond=none")
    net = supernet.SlimmableDiffusersUNet.from_pretrained(
        folder, FLAGS.T, FLAGS.norm_groups, FLAGS.num_classes
    )
    config, needs = net.settings.config, net.conditioning()
    if needs == ["class_labels"] and config["num_class_embeds"]:
        count = config["num_class_embeds"]
        raise UserError(
            f"{folder}: the model has embeddings of {count} classes: give --num_classes={count}, "
            f"or {count - 1} if the last one stands for images without a class"
        )
    if needs:
        raise UserError(f"{folder}: the model needs {needs[0]}; images have none here")
    reads, makes = config["in_channels"], config["out_channels"]
    if makes != reads:
        variance, other = "it also predicts a variance", "it upscales, inpaints or the like"
        reason = variance if makes == 2 * reads else other
        raise UserError(
            f"{folder}: the model reads {reads} channels and makes {makes}: {reason}; only a "
            "model whose output is like its noisy input can be used"
        )
    if not FLAGS["img_size"].present:
        size = loading.image_size(config)
        if size is None:
            raise UserError(f"{folder}: its config.json has no sample_size: give --img_size")
        FLAGS.img_size = size * (autoencoder().factor if FLAGS.latent_vae else 1)
    say(f"{folder}: sample_size {config['sample_size']}, --img_size={FLAGS.img_size}")
    if not FLAGS["slimmable_unet"].present:
        FLAGS.slimmable_unet = True
    importance.order_by_importance(net)
    return check_network(net)


def sample_as_its_pipeline(found) -> None:
    """Flags that were not given take what the model's scheduler samples with."""
    given = {name for name in OWN_FLAGS if FLAGS[name].present}
    found.check(given)
    if FLAGS.latent_vae and found.sampling.get("clip_denoised") and "clip_denoised" not in given:
        raise UserError(
            f"{found.path}: clip_sample is true, and latents are not clipped here: give "
            "--clip_denoised=false to sample without"
        )
    for name, value in found.sampling.items():
        if name not in given:
            FLAGS[name].value = value
    say(found.table({name: FLAGS[name].value for name in OWN_FLAGS}, given))


def check_told(folder: Path, names: Sequence[str]) -> None:
    """Refuse a model without a scheduler unless the flags say what it was trained for."""
    if FLAGS.beta_schedule == "squaredcos_cap_v2":
        names = [name for name in names if name not in ("beta_1", "beta_T")]
    missing = [f"--{name}" for name in names if not FLAGS[name].present]
    if missing:
        raise UserError(
            f"{folder} has no scheduler_config.json, beside the model or in scheduler/, that says "
            f"what the model was trained for: copy it there, or give {', '.join(missing)}"
        )


def network_from_settings(known: Mapping[str, object]) -> nn.Module:
    """A diffusers network with fresh weights, as a checkpoint's settings describe it."""
    from model.diffusers.supernet import SlimmableDiffusersUNet

    net = check_network(SlimmableDiffusersUNet.from_settings(known))
    if FLAGS.num_classes != net.settings.num_classes:
        raise UserError(
            f"--num_classes={FLAGS.num_classes}: the network has {net.settings.num_classes} classes"
        )
    return net


def given_network() -> nn.Module | None:
    """The diffusers network that LOGDIR or --init_diffusers has; None where there is neither."""
    path = Path(FLAGS.logdir) / f"{FLAGS.ckpt_name}.pt"
    known = checkpoint.settings(checkpoint.load(path)) if path.exists() else {}
    if known.get("kind") == "diffusers":
        agree_with(known, path)
        return network_from_settings(known)
    return network_from_diffusers() if FLAGS.init_diffusers else None


def build_network(in_ch: int, ch: int | None = None) -> SlimmableUNet:
    """A network of this project as the flags describe it."""
    settings = from_flags(UNetSettings, in_ch=in_ch, ch=ch or FLAGS.ch)
    torch.manual_seed(FLAGS.seed)
    return check_network(SlimmableUNet(**asdict(settings)))


def load_network(logdir: str, ch: int | None = None) -> tuple[nn.Module, int]:
    """The EMA network of LOGDIR/CKPT_NAME.pt, and the step it was saved at."""
    path = Path(logdir) / f"{FLAGS.ckpt_name}.pt"
    state = checkpoint.load(path)
    known = checkpoint.settings(state)
    if ch is not None:
        known.pop("ch", None)
    agree_with(known, path)
    check_autoencoder(known, path)
    if known.get("kind") == "diffusers":
        net = network_from_settings(known)
    else:
        head = checkpoint.entries(state["ema_model"], path).get("head.weight")
        net = build_network(3 if head is None or head.ndim != 4 else head.shape[1], ch)
    checkpoint.fill(net, state["ema_model"], path)
    net.class_names = class_names(known, path)
    return net.to(choose_device()).eval(), int(state.get("step", 0))


def class_names(known: Mapping[str, object], path: Path) -> tuple[str, ...]:
    """The classes' names in a checkpoint's settings, in the order of their numbers."""
    names = known.get("class_names") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: its settings have class_names={names!r}, which are no names")
    return tuple(names)


def some_network() -> tuple[nn.Module, str]:
    """The trained network, or an untrained one for questions that weights do not matter to."""
    path = Path(FLAGS.logdir) / f"{FLAGS.ckpt_name}.pt"
    if path.exists():
        net, step = load_network(FLAGS.logdir)
        return net, f"{path}, step {step}"
    if FLAGS.init_diffusers:
        return network_from_diffusers().to(choose_device()).eval(), FLAGS.init_diffusers
    vae = autoencoder()
    channels = vae.channels if vae else data.channels(FLAGS.dataset, from_flags(data.ImageOptions))
    net = build_network(channels).to(choose_device()).eval()
    return net, f"there is no {path}; this is the network that the flags describe, untrained"


def noise_schedule() -> diffusion.Schedule:
    """The noise levels that the network was or will be trained at."""
    if FLAGS.precond == "none":
        return from_flags(diffusion.NoiseSchedule)
    if FLAGS.mean_type != "epsilon":
        raise UserError(
            f"--mean_type={FLAGS.mean_type}: with --precond=edm the network's answer is EDM's"
        )
    return from_flags(diffusion.EDMSchedule)


def chosen_sampler() -> diffusion.Sampler:
    """The sampler that the flags describe, checked against the noise schedule."""
    if FLAGS.precond == "edm" and not FLAGS["sampler"].present:
        FLAGS.sampler = "edm"
    sampler = from_flags(diffusion.Sampler, limit=math.inf if FLAGS.latent_vae else 1.0)
    sampler.timesteps(noise_schedule())
    if FLAGS.allow_skip and not sampler.skips:
        raise UserError(
            f"--allow_skip: --sampler={FLAGS.sampler} leaves no step out; use ddpm or ddim"
        )
    return sampler


def image_shape(net: nn.Module) -> tuple[int, int, int]:
    """What the network is shown."""
    return network_shape(net.settings.in_ch)


def to_images():
    """What makes images of what a chain made."""
    return autoencoder().to_images if FLAGS.latent_vae else data.to_uint8


def candidate_networks(
    net: nn.Module, widths: Sequence[float], path: Path | None = None
) -> dict[float, nn.Module]:
    """Dense networks ready to sample with, on every GPU where --parallel says so.

    path: where the arithmetic that was picked is kept; see arithmetic.chosen.
    """
    device = choose_device()
    if FLAGS.compile:
        check_compiler(device)
    chosen = arithmetic.chosen(net, widths, FLAGS.amp, image_shape(net), device, path)
    if set(chosen.values()) != {arithmetic.AMP[FLAGS.amp]} or FLAGS.amp == "auto":
        say(f"arithmetic by width: {arithmetic.describe(chosen)}")
    networks = sampling_networks(net, widths, chosen, FLAGS.compile)
    if use_parallel():
        return {width: nn.DataParallel(network) for width, network in networks.items()}
    return networks


def kept_arithmetic(name: str = "arithmetic") -> Path | None:
    """Where evaluations keep what --amp=auto picked, so that two equal ones agree."""
    return Path(FLAGS.logdir) / f"{name}.json" if FLAGS.amp == "auto" else None


def statistics(encoder: score.Encoder, shape: tuple[int, int, int]) -> score.Gaussian:
    """Mean and covariance of the data set's features, computed and saved where missing."""

    @functools.cache
    def images() -> score.Images:
        try:
            dataset = load_images()
        except UserError as error:
            raise score.UnavailableError(str(error)) from error
        if dataset.channels != shape[0]:
            raise UserError(
                f"--dataset={FLAGS.dataset} has {dataset.channels} channels and the network "
                f"{shape[0]}; name the data set that it was trained on, or --channels={shape[0]}"
            )
        batches = functools.partial(data.everything, dataset, FLAGS.batch_size, FLAGS.num_workers)
        return score.Images(len(dataset), data.fingerprint(dataset), batches)

    name, size = FLAGS.dataset, FLAGS.img_size
    path, usual = Path(FLAGS.fid_cache), (name, size, encoder.name) == ("cifar10", 32, "inception")
    if FLAGS.fid_cache == CIFAR10_STATISTICS and not usual:
        path = score.default_path("./stats", name, size, encoder.name, images().content)
    return score.load_or_compute(
        path,
        encoder,
        encoder.dim or math.prod(shape),
        {"dataset": name, "img_size": size, "split": "train"},
        images,
        f"statistics of {name} ({encoder.name})",
        say,
    )


def build_encoder() -> score.Encoder:
    return score.encoder(FLAGS.fid_encoder, choose_device(), FLAGS.fid_weights or None)


def build_evaluator(networks: Mapping, net: nn.Module, stream: int = rng.SAMPLING) -> Evaluator:
    """An evaluator of these networks, which are `net`'s, with encoder and statistics loaded."""
    for name in ("num_images", "batch_size"):
        if FLAGS[name].value < 1:
            raise UserError(f"--{name}={FLAGS[name].value}: must be at least 1")
    if FLAGS.num_workers < 0:
        raise UserError(f"--num_workers={FLAGS.num_workers}: must not be negative")
    if FLAGS.num_images < 2:
        raise UserError(f"--num_images={FLAGS.num_images}: a covariance needs at least 2 images")
    device = choose_device()
    # A mistake here should not wait for the statistics.
    sampler, asked_for = chosen_sampler(), chosen_classes(net)
    writable_folder(FLAGS.logdir)
    encoder = build_encoder()
    reference = statistics(encoder, picture_shape(net))
    if FLAGS.num_images <= reference.dim:
        say(
            f"warning: {FLAGS.num_images} images cannot fill a covariance of "
            f"{reference.dim} features ({encoder.name}); the distance is biased upwards and "
            "can only be compared with distances of as many images"
        )
    return Evaluator(
        networks=networks,
        noise_schedule=noise_schedule(),
        sampler=sampler,
        encoder=encoder,
        reference=reference,
        image_shape=image_shape(net),
        device=device,
        num_images=FLAGS.num_images,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        stream=stream,
        compiled=FLAGS.compile,
        classes=asked_for,
        to_images=to_images(),
    )


def load_schedule(widths: Sequence[float]) -> WidthSchedule:
    """The schedule of --schedule or LOGDIR/search.txt, for the sampler that the flags name."""
    path = FLAGS.schedule or Path(FLAGS.logdir) / "search.txt"
    steps = chosen_sampler().entries(noise_schedule())
    return WidthSchedule.load(path, FLAGS.T, [0.0, *widths] if FLAGS.allow_skip else widths, steps)


def flops_table(net: nn.Module, widths: Sequence[float]) -> dict[float, int]:
    """FLOPs of one image's step at each width, or of half of a second-order step; leaving a step
    out costs nothing."""
    shape, passes = image_shape(net), passes_a_call(net)
    return {0.0: 0} | {width: passes * score.flops(net, width, shape) for width in widths}


# --- modes ----------------------------------------------------------------------------------------


def train() -> None:
    """Train into LOGDIR, or go on with what is there."""
    logdir = writable_folder(FLAGS.logdir)
    net = given_network()  # it may say what some flags are
    own = net is None
    settings = from_flags(TrainSettings)
    if settings.sandwich and not slimmable():
        raise UserError("--sandwich trains several widths: add --slimmable_unet")
    dataset = training_set()
    net = build_network(dataset.channels) if own else net
    if FLAGS.num_classes:
        net.class_embedding.frequencies.copy_(classes.shares(dataset.labels, FLAGS.num_classes))
        net.class_names = dataset.classes
    if net.settings.in_ch != dataset.channels:
        raise UserError(
            f"--dataset={FLAGS.dataset} has {dataset.channels} channels and the model "
            f"{net.settings.in_ch}; see --channels"
        )
    names = [n for n in TRAINING_FLAGS if own or n not in (*NETWORK_FLAGS, "dropout")]
    names += [] if own else SAMPLING_FLAGS
    identity = {name: plain(FLAGS[name].value) for name in names} | net.settings_dict()
    if FLAGS.num_classes:
        identity["class_names"] = list(dataset.classes)
    if FLAGS.latent_vae:
        identity["autoencoder"] = autoencoder().fingerprint
    device = choose_device()
    if FLAGS.compile:
        check_compiler(device)

    def choose_arithmetic() -> str:
        chosen = arithmetic.chosen_for_training(net, FLAGS.amp, image_shape(net), device)
        if FLAGS.amp == "auto":
            say(f"arithmetic: {chosen}")
        return chosen

    trainer = Trainer(
        settings=settings,
        net=net,
        dataset=dataset,
        noise_schedule=noise_schedule(),
        sampler=chosen_sampler(),
        image_shape=image_shape(net),
        logdir=logdir,
        device=device,
        identity=identity,
        parallel=use_parallel(),
        evaluate=training_scores(net) if FLAGS.eval_step else None,
        compiled=FLAGS.compile,
        choose_arithmetic=choose_arithmetic,
        classes=chosen_classes(net),
        to_images=to_images(),
    )
    if FLAGS.dry_run:
        flops = {width: score.flops(net, width, image_shape(net)) for width in all_widths()}
        say(estimate.training_plan(trainer, flops))
        return
    resumed = trainer.resume()  # refuses before anything in the folder changes
    others = [] if resumed else sorted(p.stem for p in logdir.glob("[!.]*.pt"))
    if others:
        raise UserError(
            f"{logdir} has no {trainer.path.name} but {', '.join(others)}: name the one to go on "
            "from with --ckpt_name, or another --logdir to start anew"
        )
    if distributed.is_main():
        write_flagfile(logdir / "flagfile.txt")
    trainer.run()


def load_images() -> data.AnySet:
    """The data set that the flags name."""
    options = from_flags(data.ImageOptions)
    return data.load(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, options=options)


def in_stored_class_order(dataset: data.AnySet) -> data.AnySet:
    """The data set with its classes numbered as in the checkpoint that training goes on from.

    One without class_names is from when folders were numbered in the order of their names as text.
    """
    path = Path(FLAGS.logdir) / f"{FLAGS.ckpt_name}.pt"
    known = checkpoint.settings(checkpoint.load(path)) if path.exists() else {}
    if not known.get("num_classes") or known["num_classes"] != len(dataset.classes):
        return dataset
    text_order = sorted(dataset.classes) if FLAGS.dataset == "image_folder" else dataset.classes
    return data.in_class_order(dataset, class_names(known, path) or text_order)


def training_set() -> data.AnySet:
    """The data set, in latents where --latent_vae says so; with as many classes as the network."""
    dataset = load_images()
    classes.check(FLAGS.num_classes, FLAGS.dataset, dataset.labels, dataset.classes)
    dataset = in_stored_class_order(dataset) if FLAGS.num_classes else dataset
    say(data.describe(dataset))
    if not FLAGS.latent_vae:
        return dataset
    if FLAGS.flip == "on":
        raise UserError("--flip=on: a mirrored latent is not the latent of the mirrored image")
    from dataset import latents

    vae, usual = autoencoder(), Path("latents") / f"{FLAGS.dataset}{FLAGS.img_size}.npy"
    path = Path(FLAGS.latent_cache or Path(FLAGS.data_root).expanduser() / usual)
    if FLAGS.dry_run and not path.exists():
        say(f"before training, {len(dataset)} images are encoded into {path}")
        return latents.sample(dataset, vae, FLAGS.batch_size)
    return latents.encoded(dataset, vae, FLAGS.img_size, path, FLAGS.batch_size, FLAGS.num_workers)


def training_scores(net: nn.Module):
    """What --eval_step calls: scores of one width of a network; encoder and statistics once."""
    evaluator = build_evaluator({}, net)

    def scores(net: nn.Module, width: float, each_step: Callable[[], None]) -> dict:
        evaluator.networks, evaluator.each_step = sampling_networks(net, [width]), each_step
        found, _ = evaluator.score([width] * FLAGS.T)
        return {evaluator.encoder.key: found.distance, "images": found.images}

    return scores


def evaluate_width() -> None:
    """Score the supernet at --assigned_width, or a plain network."""
    if FLAGS.dry_run:
        planned = planned_network()
        plan_scoring(planned, WidthSchedule([FLAGS.assigned_width] * FLAGS.T))
        return
    net, step = load_network(FLAGS.logdir)
    width = FLAGS.assigned_width
    if width != 1 and not slimmable():
        raise UserError(f"--assigned_width={width}: add --slimmable_unet; a plain network has 1")
    net.check_width(width)
    schedule = WidthSchedule([width] * FLAGS.T)
    costs = flops_table(net, [1.0, width])
    evaluator = build_evaluator(candidate_networks(net, [width], kept_arithmetic()), net)
    name = "eval" if width == 1 else f"eval_width_{width:g}"
    report_scores(name, evaluator, schedule, costs, {"width": width, "step": step})


def evaluate_schedule() -> None:
    """Score the width schedule of LOGDIR/search.txt."""
    if FLAGS.dry_run:
        planned = planned_network()
        plan_scoring(planned, load_schedule(all_widths()))
        return
    net, step = load_network(FLAGS.logdir)
    schedule = load_schedule(all_widths())
    used = sorted(set(schedule.widths) - {0.0})
    costs = flops_table(net, [1.0, *used])
    evaluator = build_evaluator(candidate_networks(net, used, kept_arithmetic()), net)
    about = {"step": step, "schedule": list(schedule.widths)}
    report_scores("eval_stepaware", evaluator, schedule, costs, about)


def evaluate_ensemble() -> None:
    """Score a large network that a small one relieves where --end < t < --start."""
    own = set(NETWORK_FLAGS) - {"T", "num_classes"}
    shared = [name for name in (*MODEL_FLAGS, "latent_vae") if name not in own]
    small, _ = load_network(FLAGS.small_logdir, FLAGS.small_ch)
    theirs = {"channels": small.settings.in_ch} | {name: FLAGS[name].value for name in shared}
    large, step = load_network(FLAGS.large_logdir)
    ours = {"channels": large.settings.in_ch} | {name: FLAGS[name].value for name in shared}
    differing = [f"{n}: {theirs[n]} small, {ours[n]} large" for n in ours if theirs[n] != ours[n]]
    if differing:
        raise UserError(f"the two networks cannot take turns ({'; '.join(differing)})")
    shape, passes = image_shape(large), passes_a_call(large)
    # Two networks are candidates like any others; the keys are but names.
    names = {"large": large, "small": small}
    networks = {
        name: candidate_networks(net, [1.0], kept_arithmetic(f"arithmetic_{name}"))[1.0]
        for name, net in names.items()
    }
    schedule = ["small" if FLAGS.end < t < FLAGS.start else "large" for t in range(FLAGS.T)]
    costs = {name: passes * score.flops(net, 1.0, shape) for name, net in names.items()}
    about = {"step": step, "start": FLAGS.start, "end": FLAGS.end}
    evaluator = build_evaluator(networks, large)
    report_scores("eval_ensemble", evaluator, schedule, costs | {1.0: costs["large"]}, about)


def report_scores(
    name: str, evaluator: Evaluator, schedule: Schedule, costs: Mapping, about: Mapping
) -> None:
    """Score, print, and save LOGDIR/NAME.json and LOGDIR/NAME.png."""
    logdir = writable_folder(FLAGS.logdir)
    kept = logdir / f".{name}.unfinished-{distributed.rank()}.pt"
    unfinished = Unfinished(kept, score_identity(evaluator, schedule))
    found, images = evaluator.score(schedule, min(256, FLAGS.num_images), unfinished)
    calls, steps = evaluator.evaluations(), len(evaluator.timesteps())
    unit = "step" if len(calls) == steps else "pass"
    flops, full = average(schedule, entries_for_calls(schedule, calls), costs), costs[1.0]
    rate = found.images * distributed.world() / found.sampling_seconds
    result = {
        "mode": name,
        "checkpoint": FLAGS.ckpt_name,
        **about,
        **asdict(found),
        "average_gflops": flops / 1e9,
        "full_width_gflops": full / 1e9,
        "saving": 1 - flops / full,
        "images_per_second": rate,
        "processes": distributed.world(),
        "sampler": evaluator.sampler.settings(),
        "seed": FLAGS.seed,
        "device": str(evaluator.device),
        **conditions(evaluator, found),
        "arithmetic": {
            str(key): getattr(network, "module", network).arithmetic
            for key, network in evaluator.networks.items()
        },
    }
    say(f"{found.label}: {found.distance:.6g}")
    if found.inception_score:
        mean, deviation = found.inception_score
        say(f"Inception Score ({found.encoder}): {mean:.3f} ± {deviation:.3f}")
    say(
        f"average {flops / 1e9:.4f} GFLOPs a {unit}, full width {full / 1e9:.4f} "
        f"({100 * (1 - flops / full):.1f} % saved)"
    )
    passes = "" if len(calls) == steps else f" of {len(calls)} network passes"
    say(f"{rate:.3g} images/s sampled over {steps} steps{passes}")
    if "decoder" in result:
        say("the decoder, once an image and apart from all that: {gflops:.4g} GFLOPs, "
            "{ms_per_image:.4g} ms".format(**result["decoder"]))  # fmt: skip
    if distributed.is_main():
        write_json(logdir / f"{name}.json", result)
        save_grid(logdir / f"{name}.png", images)
        say(f"saved {logdir / name}.json and {name}.png")
    unfinished.remove()


def score_identity(evaluator: Evaluator, schedule: Schedule) -> str:
    """What the features of a schedule's images depend on, and how processes share them."""
    networks = evaluator.networks.items()
    about = {
        **{name: FLAGS[name].value for name in MODEL_FLAGS},
        "networks": {str(key): checkpoint.fingerprint(network) for key, network in networks},
        "schedule": [str(schedule[t]) for t in range(FLAGS.T)],
        "entries": getattr(schedule, "timesteps", None),
        "sampler": evaluator.sampler.settings(),
        "encoder": evaluator.encoder.name,
        "images": (evaluator.num_images, evaluator.batch_size, evaluator.seed, evaluator.stream),
        "processes": distributed.world(),
        **conditions(evaluator),
    }
    return json.dumps(about, sort_keys=True)


def conditions(evaluator: Evaluator, found: Scores | None = None) -> dict[str, object]:
    """What images and their cost depend on where there are classes, or latents to decode."""
    about: dict[str, object] = {}
    if evaluator.classes:
        about["classes"] = list(evaluator.classes.fixed) or "as in the training set"
        about["guidance_scale"] = evaluator.classes.guidance
    if FLAGS.latent_vae:
        about["autoencoder"] = autoencoder().fingerprint
    if FLAGS.latent_vae and found:
        about["decoder"] = {
            "gflops": autoencoder().decoder_flops(FLAGS.img_size) / 1e9,
            "ms_per_image": 1000 * found.decoding_seconds / found.images,
        }
    return about


def search_identity(evaluator: Evaluator, net: nn.Module, step: int) -> dict[str, object]:
    """What a searched distance depends on."""
    return {
        "checkpoint": FLAGS.ckpt_name,
        "step": step,
        "weights": checkpoint.fingerprint(net),
        "num_images": FLAGS.num_images,
        "seed": FLAGS.seed,
        "amp": FLAGS.amp,
        "encoder": FLAGS.fid_encoder,
        "dataset": FLAGS.dataset,
        "fid_cache": FLAGS.fid_cache,
        "sampler": evaluator.sampler.settings(),
        "widths": all_widths(),
        "ladder": FLAGS.search_ladder,
        **conditions(evaluator),
    }


def search() -> None:
    """Search a width schedule for the supernet in LOGDIR and write LOGDIR/search.txt."""
    folder = search_folder()
    if FLAGS.pick != -1:
        pick(folder)
        return
    settings = from_flags(SearchSettings)
    if FLAGS.dry_run:
        plan_search(planned_network(), settings)
        return
    net, step = load_network(FLAGS.logdir)
    if not slimmable():
        raise UserError("--search chooses among widths: add --slimmable_unet")
    networks = candidate_networks(net, all_widths(), writable_folder(folder) / "arithmetic.json")
    flops = flops_table(net, all_widths())
    evaluator = build_evaluator(networks, net, rng.SEARCH)
    evaluator.progress = False
    evaluator.states = shared_states(evaluator.sampler)
    rungs = ladder(evaluator)
    times = latency_table(folder, evaluator)
    genome = search_genome(settings)
    start = []
    if FLAGS.search_warm_start:
        start = warm_start(FLAGS.search_warm_start, genome, settings.pop_size // 2)
    times = {width: passes_a_call(net) * seconds for width, seconds in times.items()}
    # Times are put on FLOPs' scale, so that weights and budgets mean the same for both.
    scaled = {width: times[width] / times[1.0] * flops[1.0] for width in flops}
    progress = SearchProgress(folder)
    job = Search(
        settings=settings,
        genome=genome,
        score=scores_of(evaluator),
        costs=flops if FLAGS.cost == "flops" else scaled,
        objective=lambda distance, cost: (
            settings.fid_weight * distance + settings.macs_weight * cost / 2e6
        ),
        folder=folder,
        identity=search_identity(evaluator, net, step),
        start=start,
        ladder=rungs,
        on_generation=progress.note,
        images=FLAGS.num_images,
        say=say,
    )
    seen = job.run()
    result = SearchResult(job, seen, flops, times, evaluator, progress.generations)
    if distributed.is_main():
        result.save(folder, search_txt(folder))
        say(result.summary())
    grid = result.grid(folder)  # all processes draw their share of it
    if distributed.is_main():
        say(f"saved {search_txt(folder)}, {folder / 'front.json'}, pictures and {grid}")


def search_genome(settings: SearchSettings) -> Genome:
    """The search space that the flags describe."""
    sampler, levels = chosen_sampler(), noise_schedule()
    steps = sampler.timesteps(levels)
    segments = settings.num_segments
    if settings.search_method == "sensitivity" and not segments:
        segments = min(SEGMENTS, len(steps))
    return Genome(
        ((0.0,) if FLAGS.allow_skip else ()) + tuple(all_widths()),
        tuple(steps),
        FLAGS.T,
        segments,
        tuple(sampler.evaluations(levels)),
    )


def planned_network() -> nn.Module:
    """The network that a plan is for; what its checkpoint says of flags holds from here on."""
    net, about = some_network()
    say(about)
    return net


def plan_scoring(net: nn.Module, schedule: WidthSchedule) -> None:
    """Say what scoring this schedule would cost."""
    calls = chosen_sampler().evaluations(noise_schedule())
    scoring = estimate.Scoring("evaluation", 1, FLAGS.num_images, len(calls))
    plan(net, [scoring], [schedule[t] for t in entries_for_calls(schedule, calls)], "no other load")


def plan_search(net: nn.Module, settings: SearchSettings) -> None:
    """Say what the search would cost, rung by rung or stage by stage."""
    sampler, count = chosen_sampler(), settings.num_generation * settings.pop_size
    note = "at the widths' mean cost, before shared states save any"
    if settings.search_method == "sensitivity":
        steps = len(sampler.evaluations(noise_schedule()))
        stages = search_stages(settings, search_genome(settings), FLAGS.num_images)
        scorings = [
            estimate.Scoring(name, count, images, max(1, round(share * steps)))
            for name, count, images, share in stages
        ]
        plan(net, scorings, all_widths(), f"{note}; at most")
        return
    scorings = []
    for name, images, rung in parse_ladder(sampler):
        steps = len(rung.evaluations(noise_schedule()))
        scorings.append(estimate.Scoring(f"rung {name}", count, images, steps))
        count = math.ceil(settings.ladder_keep * count)
    steps = len(sampler.evaluations(noise_schedule()))
    scorings.append(estimate.Scoring("full setting", count, FLAGS.num_images, steps))
    plan(net, scorings, all_widths(), note)


def plan(
    net: nn.Module, scorings: Sequence[estimate.Scoring], widths: Sequence[float], note: str
) -> None:
    """Print the cost of `scorings` where steps have these widths in equal parts."""
    device, shape = choose_device(), image_shape(net)
    batch = FLAGS.batch_size if device.type == "cuda" else min(FLAGS.batch_size, 16)
    used = sorted(set(widths) - {0.0})
    passes = passes_a_call(net)
    scorings = [replace(s, steps=s.steps * passes) for s in scorings]
    flops = {width: cost / passes for width, cost in flops_table(net, used).items()}
    times = estimate.measure(candidate_networks(net, used), shape, batch, device)
    times[0.0] = 0.0
    encoder = estimate.encoder_seconds(build_encoder, picture_shape(net), batch)
    if FLAGS.latent_vae:
        note += f"; without the decoder's {1000 * decoder_seconds(shape, batch):.3g} ms an image"
    mean = [sum(table[w] for w in widths) / len(widths) for table in (flops, times)]
    say(estimate.scoring_plan(scorings, *mean, encoder, note))


def decoder_seconds(shape: tuple[int, int, int], batch: int) -> float:
    """Seconds an image of decoding latents of this shape."""
    decode = autoencoder().to_images
    return latency(lambda latents, t: decode(latents), shape, batch, choose_device())


def search_folder() -> Path:
    """Where the search keeps what it has scored, and its results."""
    return Path(FLAGS.search_dir or Path(FLAGS.logdir) / "search")


def search_txt(folder: Path) -> Path:
    """Where the chosen schedule goes: LOGDIR/search.txt, or into a search's own folder."""
    return (folder if FLAGS.search_dir else Path(FLAGS.logdir)) / "search.txt"


def pick(folder: Path) -> None:
    """Print the front of a finished search, or write another point of it to search.txt."""
    front = read_front(folder / "front.json")
    if FLAGS.pick == LOOK:
        say(front_table(front, FLAGS.flops_budget))
        return
    if not 0 <= FLAGS.pick < len(front["points"]):
        raise UserError(
            f"--pick={FLAGS.pick}: the front has points 0 to {len(front['points']) - 1}"
        )
    point = front["points"][FLAGS.pick]
    WidthSchedule(point["schedule"]).save(search_txt(folder))
    if distributed.is_main():
        pick_point(folder, front, FLAGS.pick)
    say(
        f"point {FLAGS.pick}: {front['label']} {point['distance']:.6g} at "
        f"{point['average_gflops']:.4g} GFLOPs a step, now in {search_txt(folder)}"
    )


def parse_ladder(sampler: diffusion.Sampler) -> list[tuple[str, int, diffusion.Sampler]]:
    """--search_ladder as (name, images, sampler) of each rung."""
    rungs = []
    for part in filter(None, FLAGS.search_ladder.split(",")):
        match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        if not match or not 2 <= int(match[1]) <= FLAGS.num_images:
            raise UserError(
                f"--search_ladder={FLAGS.search_ladder}: a rung is IMAGESxSTEPS, with 2 to "
                f"{FLAGS.num_images} images (--num_images)"
            )
        rung = replace(sampler, sample_steps=int(match[2]))
        rung.timesteps(noise_schedule())
        rungs.append((part.strip(), int(match[1]), rung))
    return rungs


def ladder(evaluator: Evaluator) -> list[Rung]:
    """The rungs of --search_ladder, each scoring with a cheaper copy of `evaluator`."""
    return [
        Rung(name, scores_of(replace(evaluator, num_images=images, sampler=sampler)))
        for name, images, sampler in parse_ladder(evaluator.sampler)
    ]


def shared_states(sampler: diffusion.Sampler) -> SharedStates | None:
    """Where candidates leave the states that others go on from, as --state_memory says."""
    if not 0 <= FLAGS.state_memory < math.inf:
        raise UserError(f"--state_memory={FLAGS.state_memory}: must be a number of GiB, at least 0")
    if FLAGS.state_memory and not sampler.restartable:
        say(f"--sampler={sampler.sampler} cannot go on from a step: no states are shared")
    if not FLAGS.state_memory or not sampler.restartable:
        return None
    where = torch.device("cpu") if FLAGS.state_device == "host" else None
    return SharedStates(int(FLAGS.state_memory * 2**30), where)


def scores_of(evaluator: Evaluator):
    """What the search calls to score schedules (search.Score)."""
    kept = evaluator.timesteps()

    def with_a_step(schedule: WidthSchedule) -> WidthSchedule:
        """What --allow_skip leaves without any of a rung's steps gets the last one back."""
        if any(schedule[t] for t in kept):
            return schedule
        widths = [max(schedule.widths), *(0.0 for _ in kept[1:])]
        return WidthSchedule(widths, kept)

    def scores(schedules: Sequence[WidthSchedule], noise: int = 0):
        # Streams below 256 are those of other uses.
        on_noise = replace(evaluator, stream=evaluator.stream + (noise << 8))
        chosen = on_noise if noise else evaluator
        for index, found in chosen.score_all([*map(with_a_step, schedules)]):
            yield (
                index,
                {
                    "distance": found.distance,
                    "label": found.label,
                    "passes": found.passes,
                    "passes_saved": found.passes_saved,
                },
            )

    return scores


def latency_table(folder: Path, evaluator: Evaluator) -> dict[float, float]:
    """Seconds an image of each width's pass, measured once for the search in `folder`."""
    path = folder / "latency.json"
    about = {"device": str(evaluator.device), "batch_size": FLAGS.batch_size, "amp": FLAGS.amp}
    if distributed.is_main() and not path.exists():
        say("measuring the candidates' latency")
        batch = min(FLAGS.batch_size, FLAGS.num_images)
        seconds = {
            str(width): latency(network, evaluator.image_shape, batch, evaluator.device)
            for width, network in evaluator.networks.items()
        }
        write_json(path, about | {"seconds_per_image": seconds})
    distributed.gather(None)
    known = read_json(path)
    try:
        times = {float(w): float(s) for w, s in known["seconds_per_image"].items()}
        missing = [w for w in evaluator.networks if w not in times]
        same = all(known[name] == value for name, value in about.items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no table of latencies; delete it") from error
    if missing or (FLAGS.cost == "latency" and not same):
        raise UserError(
            f"{path} was measured for other widths or another device, batch size or arithmetic "
            f"({ {k: known[k] for k in about} }); use the same, delete it, or name another "
            "--search_dir"
        )
    return {0.0: 0.0} | times


def profile() -> None:
    """Print parameters, GFLOPs and measured latency of every width, and of a schedule."""
    net, about = some_network()
    say(about)
    shape, device, widths = image_shape(net), choose_device(), all_widths()[::-1]
    # A large batch on a CPU takes long and tells nothing more.
    batch = FLAGS.batch_size if device.type == "cuda" else min(FLAGS.batch_size, 16)
    flops, rows, times = flops_table(net, widths), [], {0.0: 0.0}
    for width, network in candidate_networks(net, widths).items():
        times[width] = passes_a_call(net) * latency(network, shape, batch, device)
        rows.append(
            [
                f"{width:g}",
                f"{net.parameter_count(width) / 1e6:.2f} M",
                f"{flops[width] / 1e9:.4f}",
                f"{100 * flops[width] / flops[1.0]:.1f} %",
                f"{1000 * times[width]:.3f}",
                f"{100 * times[width] / times[1.0]:.1f} %",
            ]
        )
    header = ["width", "parameters", "GFLOPs", "of full", "ms / image", "of full"]
    say(table(header, rows))
    passes = "one pass" if passes_a_call(net) == 1 else "two passes (--guidance_scale)"
    say(f"{passes}, images {shape}, batch {batch}, {device}, {FLAGS.amp} amp")
    if FLAGS.latent_vae:
        gflops = autoencoder().decoder_flops(FLAGS.img_size) / 1e9
        say(
            f"the decoder, once an image: {autoencoder().decoder_parameters() / 1e6:.2f} M "
            f"parameters, {gflops:.4f} GFLOPs, {1000 * decoder_seconds(shape, batch):.3f} ms"
        )
    if FLAGS.schedule or (Path(FLAGS.logdir) / "search.txt").exists():
        schedule = load_schedule(widths)
        kept = entries_for_calls(schedule, chosen_sampler().evaluations(noise_schedule()))
        mean, time = average(schedule, kept, flops), average(schedule, kept, times)
        say(
            f"the schedule averages {mean / 1e9:.4f} GFLOPs a step of {flops[1.0] / 1e9:.4f} "
            f"({100 * mean / flops[1.0]:.1f} %) and {1000 * time:.3f} ms of "
            f"{1000 * times[1.0]:.3f} ({100 * time / times[1.0]:.1f} %)"
        )


def export() -> None:
    """Write the EMA network and its width schedule as a folder for diffusers."""
    from model.diffusers.export import export_diffusers

    net, step = load_network(FLAGS.logdir)
    if FLAGS.latent_vae or getattr(net.settings, "num_classes", 0):
        raise UserError("--export_diffusers: only for networks of images without classes")
    if FLAGS.precond != "none":
        raise UserError("--export_diffusers: diffusers' DDPM and DDIM have no --precond=edm")
    schedule = load_schedule(all_widths())
    export_diffusers(
        FLAGS.export_diffusers,
        {width: net.subnet(width) for width in sorted(set(schedule.widths) - {0.0})},
        schedule,
        image_shape(net),
        (FLAGS.beta_1, FLAGS.beta_T, FLAGS.T),
        beta_schedule=FLAGS.beta_schedule,
        timesteps=schedule.timesteps,
        mean_type=FLAGS.mean_type,
        var_type=FLAGS.var_type,
        clip_denoised=FLAGS.clip_denoised,
    )
    say(f"saved {FLAGS.export_diffusers}: the EMA network of step {step}, for diffusers' pipelines")


# --- entry ----------------------------------------------------------------------------------------

COMMANDS = {
    "train": train,
    "search": search,
    "eval": evaluate_width,
    "eval_stepaware": evaluate_schedule,
    "eval_ensemble": evaluate_ensemble,
    "profile": profile,
    "export_diffusers": export,
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PLANNED = ("train", "search", "eval", "eval_stepaware")  # that --dry_run can tell the cost of
_others = set(FLAGS)
define_flags()
OWN_FLAGS = sorted(set(FLAGS) - _others)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parser, with one line for a mistake; --pick may stand without a number."""
    argv = [
        f"--pick={LOOK}" if a in ("-pick", "--pick") and not re.fullmatch(r"-?\d+", b) else a
        for a, b in zip(argv, [*argv[1:], ""], strict=True)
    ]
    try:
        rest = FLAGS(argv)
    except (flags.Error, UnicodeDecodeError) as error:
        complain(UserError(" ".join(str(error).split())))
    return rest


def thread_failed(args: threading.ExceptHookArgs) -> None:
    """Tensorboard's thread tells the main one of a full disk, which then says so in one line."""
    if getattr(args.exc_value, "errno", None) not in DISK_FULL:
        threading.__excepthook__(args)


def complain(error: UserError) -> None:
    """One line, once for all processes; exit status 2."""
    if distributed.first_to_speak():
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def alone_at_work(mode: str) -> contextlib.AbstractContextManager:
    """Two runs that add to the same files, of which one was forgotten, would spoil them."""
    folders = {"train": lambda: FLAGS.logdir, "search": search_folder}
    if mode not in folders or FLAGS.dry_run or FLAGS.pick != -1 or not distributed.is_main():
        return contextlib.nullcontext()
    return alone_in(folders[mode](), wait=False)


def run(argv: Sequence[str]) -> None:
    """Dispatch to the mode."""
    try:
        if len(argv) > 1:
            raise UserError(f"stray argument {argv[1]!r}: flags start with --")
        mode = choose_mode(sys.argv[1:])
        if FLAGS.dry_run and (mode not in PLANNED or FLAGS.pick != -1):
            raise UserError(f"--dry_run: only {', '.join('--' + m for m in PLANNED)} have plans")
        if FLAGS.slimmable_g16 and not FLAGS["num_groups"].present:
            FLAGS["num_groups"].parse("16")  # counts as given
        _autoencoder.cache_clear()
        say_once.cache_clear()
        keep_freed()
        threading.excepthook = thread_failed
        diffusion.Sampler(FLAGS.sampler)  # an unknown name should not wait for a checkpoint
        with distributed.group(choose_device()), alone_at_work(mode):
            COMMANDS[mode]()
    except UserError as error:
        complain(error)
    except OSError as error:  # a library's, such as tensorboard's; our own files say more
        if error.errno not in DISK_FULL:
            raise
        complain(UserError(f"cannot write {error.filename or 'a file'}: {error.strerror}"))
    except Interrupted as stopped:
        say(str(stopped))
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from what is on the disk")
        sys.exit(130)


def start() -> None:
    app.run(run, flags_parser=parse)


if __name__ == "__main__":
    start()
