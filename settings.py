"""Every option of the program, once: name, type, default, bounds and help.

Flags, `--help`, docs/flags.md and the range checks come from here. A class holds the options of one
part of the program, which gets it as an argument; a name belongs to one class alone. This file
imports neither torch nor absl, so that a refused flag need not wait for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtime import memory
from runtime.errors import UserError
from runtime.identity import plain
from runtime.settings import Option, Settings, option, options_of

MEAN_TYPES = ("epsilon", "xprev", "xstart", "v")
VAR_TYPES = ("fixedlarge", "fixedsmall")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PRECONDITIONINGS = ("none", "edm")
SPACINGS = ("uniform", "quadratic", "leading", "trailing", "linspace")
SKIP_SLICING = ("leading", "segments")
NORM_GROUPS = ("fixed", "proportional")
ENCODERS = ("inception", "efficientnet_lite0", "efficientnet_lite2", "pixels")
DATASETS = ("cifar10", "fashion_mnist", "image_folder", "digits", "celeba", "celeba_hq", "afhq",
            "lsun_bedroom", "imagenet")  # fmt: skip
CIFAR10_STATISTICS = "./stats/cifar10.train.npz"
LOOK = -2  # the value of --pick without a number
DEFAULT_LOGDIR = "./logs/DDPM_CIFAR10_EPS"

# What a checkpoint's value of an option means (Option.stored). "network": shapes the network;
# "model": what the weights were trained for; of both the checkpoint's value counts, and a flag that
# is given must agree. "default": the checkpoint's value counts where the flag is not given.
# "sampling": likewise, of networks that came from diffusers alone. "training": a run that goes on
# must have the same.


# An option is a row of a table.
# fmt: off


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """What shapes a network of this project, but for its timesteps and image channels."""

    ch: int = option(128, "channels of the first level", least=1, stored="network")
    ch_mult: tuple[int, ...] = option((1, 2, 2, 2), "channels of each level over --ch", least=1,
        stored="network")
    attn: tuple[int, ...] = option((1,), "levels with attention", least=0, stored="network")
    num_res_blocks: int = option(2, "residual blocks per level", least=1, stored="network")
    dropout: float = option(0.1, "dropout rate of the residual blocks", least=0, below=1,
        stored="default")
    num_groups: int = option(32, "groups of every group norm", least=1, stored="network")
    skip_slicing: str = option("leading", "columns that serve the skip at a narrow width: the "
        "leading ones of [h, skip] (published), or the leading ones of each segment",
        choices=SKIP_SLICING, stored="network")
    norm_groups: str = option("fixed", "what a group norm keeps at a narrow width: its number of "
        "groups (published), or the channels of each group, without which narrow widths are "
        "hardly of use", choices=NORM_GROUPS, stored="network")
    num_classes: int = option(0, "classes of a class-conditional network; 0: not conditional",
        least=0, stored="network")


@dataclass(frozen=True, kw_only=True)
class WidthSettings(Settings):
    """The widths that a network works at."""

    slimmable_unet: bool = option(False, "the network works at several widths", stored="default")
    slimmable_g16: bool = option(False, "slimmable, with 16 groups in every group norm",
        stored="default")
    min_width: float = option(0.25, "smallest width", above=0, most=1, stored="default")
    candidate_width: tuple[float, ...] = option((0.75, 0.5), "widths between", above=0, most=1,
        stored="default")

    @property
    def slimmable(self) -> bool:
        return self.slimmable_unet or self.slimmable_g16

    @property
    def all(self) -> list[float]:
        """The widths that the network was trained for, rising."""
        return sorted({1.0, self.min_width, *self.candidate_width}) if self.slimmable else [1.0]


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(Settings):
    """The noise levels that a network is trained at, and what it predicts."""

    T: int = option(1000, "timesteps", least=1, most=10**6, stored="network")
    beta_1: float = option(1e-4, "first β", above=0, below=1, stored="model")
    beta_T: float = option(0.02, "last β", above=0, below=1, stored="model")
    beta_schedule: str = option("linear", "how β gets from --beta_1 to --beta_T; the names are "
        "diffusers'", choices=BETA_SCHEDULES, stored="model")
    mean_type: str = option("epsilon", "what the network predicts", choices=MEAN_TYPES,
        stored="model")
    precond: str = option("none", "edm: EDM's preconditioning, noise levels and loss in place of "
        "β and --mean_type; --T is then the number of noise levels", choices=PRECONDITIONINGS,
        stored="model")
    P_mean: float = option(-1.2, "--precond=edm: mean of ln σ in training", stored="model")
    P_std: float = option(1.2, "--precond=edm: deviation of ln σ in training", above=0,
        stored="model")
    sigma_data: float = option(0.5, "--precond=edm: deviation of the data, in [-1, 1]", above=0,
        stored="model")

    def check(self) -> None:
        if self.beta_1 > self.beta_T:
            raise UserError(f"--beta_1={self.beta_1}: must be at most --beta_T={self.beta_T}")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """How a chain of steps makes images; each sampler heeds some of it."""

    sampler: str = option("ddpm", "ddpm, ddim, edm, dpm_solver, or a scheduler class of "
        "diffusers, such as UniPCMultistepScheduler; after --precond=edm the default is edm")
    sample_steps: int = option(0, "steps of the sampler; 0: one for every timestep", least=0)
    timestep_spacing: str = option("uniform", "which of T timesteps K steps of ddpm and ddim keep: "
        "0, T/K, 2T/K, … (published, as is quadratic), or those of diffusers' spacing of that name",
        choices=SPACINGS)
    var_type: str = option("fixedlarge", "variance of an ancestral step", choices=VAR_TYPES,
        stored="sampling")
    eta: float = option(0.0, "DDIM: 0 is deterministic, 1 as noisy as DDPM", least=0)
    clip_denoised: bool = option(False, "clip the predicted x_0 to [-1, 1] within each step",
        stored="sampling")
    rho: float = option(7.0, "edm: the larger, the more steps at small noise", above=0)
    heun: bool = option(True, "edm: second-order steps of two network passes; else Euler steps of "
        "one")
    S_churn: float = option(0.0, "edm: noise that the whole chain adds; 0 is deterministic",
        least=0)
    S_tmin: float = option(0.0, "edm: smallest noise level at which it is added", least=0)
    S_tmax: float = option(math.inf, "edm: largest noise level at which it is added", least=0,
        finite=False)
    S_noise: float = option(1.0, "edm: deviation of the noise that is added", least=0)
    scheduler_options: str = option("", "entries for the config of a scheduler of diffusers, as "
        'JSON: \'{"use_karras_sigmas": true}\'')
    guidance_scale: float = option(1.0, "class-conditional: the answer is without + scale·(with − "
        "without) the class; 1 is plainly conditional, at one network pass per step instead of two",
        least=0)
    classes: str = option("", "class-conditional: classes of the images, by number or name, as in "
        "3,5 or cat,dog; default: drawn like the training set's")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """The images."""

    dataset: str = option("cifar10",
        f"one of {', '.join(DATASETS)}; see docs/datasets.md", stored="default")
    data_root: str = option("./data", "folder of the data set; downloaded to where that is "
        "possible", path=True)
    img_size: int = option(32, "pixels per side", least=1, stored="model")
    num_workers: int = option(4, "processes that decode images, for data sets of image files",
        least=0)
    background: str = option("white", "what transparent pixels show: a colour name, or #rrggbb",
        stored="default")
    channels: str = option("auto", "of data sets of image files; auto: 3 where any image has "
        "colour", choices=("auto", "1", "3"), stored="default")
    flip: str = option("auto", "mirror images in training; auto: where the data set allows it",
        choices=("auto", "on", "off"), stored="training")
    latent_vae: str = option("", "diffuse in the latents of the AutoencoderKL or VQModel in this "
        "folder, which diffusers wrote", path=True, stored="default")
    conditioning: str = option("", "what a UNet2DConditionModel is shown: a .safetensors file with "
        "encoder_hidden_states (N, L, D), one row for all images or row i mod N for image i, and "
        "null (1, L, D), which --guidance_scale needs", path=True)
    latent_scale: float = option(0.0, "number that latents are multiplied by, in place of the "
        "scaling_factor in the VAE's config; 0: as the config says", least=0, stored="default")
    latent_cache: str = option("", "file of the data set's latents, made where it is missing; "
        "default DATA_ROOT/latents/NAME.npy", path=True)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The training loop."""

    lr: float = option(2e-4, "learning rate", above=0, stored="training")
    grad_clip: float = option(1.0, "largest norm of the gradient", above=0, finite=False,
        stored="training")
    total_steps: int = option(800000, "training steps", least=1)
    warmup: int = option(5000, "steps over which the learning rate rises", least=0,
        stored="training")
    ema_decay: float = option(0.9999, "decay of the averaged weights", least=0, below=1,
        stored="training")
    sandwich: bool = option(False, "train with the sandwich rule", stored="training")
    num_sandwich_sampling: int = option(3, "widths per sandwich step: 1, --min_width, and some "
        "between", least=2, stored="training")
    label_dropout: float = option(0.1, "class-conditional: share of training images whose class "
        "is not told, which --guidance_scale needs", least=0, most=1, stored="training")
    init_diffusers: str = option("", "start from the UNet in this folder that diffusers wrote; "
        "without a checkpoint, score, search and sample it as it is", path=True)
    init_checkpoint: str = option("", "start a new run from this checkpoint's averaged weights; "
        "what shapes the network comes from it", path=True)
    finetune_schedule: str = option("", "train each timestep at its own width of this schedule "
        "only; with --init_checkpoint", path=True)
    allow_changes: bool = option(False, "go on from a checkpoint although --lr, --warmup, "
        "--batch_size, --ema_decay, --amp or --grad_clip differ from it")
    sample_size: int = option(64, "images in the grids drawn during training", least=1)
    sample_step: int = option(1000, "steps between these grids; 0: none", least=0)
    save_step: int = option(5000, "steps between checkpoints", least=1)
    eval_step: int = option(0, "steps between evaluations during training; 0: none", least=0)
    log_step: int = option(100, "steps between lines of train.jsonl", least=1)

    def check(self) -> None:
        if self.init_checkpoint and self.init_diffusers:
            raise UserError("--init_checkpoint and --init_diffusers: a run starts from one of them")
        if self.finetune_schedule and not self.init_checkpoint:
            raise UserError(
                "--finetune_schedule: the trained network to start from is --init_checkpoint"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """What is scored, and in which features."""

    num_images: int = option(50000, "images to generate", least=1)
    assigned_width: float = option(1.0, "eval, generate: the width of every step", above=0, most=1)
    schedule: str = option("", "width schedule to use; default LOGDIR/search.txt", path=True)
    out: str = option("", "generate: folder of the images; default LOGDIR/generated", path=True)
    export_diffusers: str = option("", "write the step-aware model of LOGDIR/search.txt (or "
        "--schedule) to this new folder, for diffusers' pipelines", path=True)
    fid_encoder: str = option("inception", "features in which the Fréchet distance is taken",
        choices=ENCODERS)
    fid_cache: str = option(CIFAR10_STATISTICS, "statistics of the data set (.npz with mu, "
        "sigma); computed and saved where missing. For other data sets or encoders the default is "
        "a name of its own in ./stats", path=True)
    fid_weights: str = option("", "Inception weights file; default: torch hub's checkpoint folder",
        path=True)


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(Settings):
    """--eval_ensemble: a large and a small network that take turns."""

    large_logdir: str = option(DEFAULT_LOGDIR, "eval_ensemble: folder of the large network",
        path=True)
    small_logdir: str = option(DEFAULT_LOGDIR, "eval_ensemble: folder of the small network",
        path=True)
    small_ch: int = option(64, "eval_ensemble: --ch of the small network", least=1)
    start: int = option(200, "eval_ensemble: the small network runs where end < t < start")
    end: int = option(0, "eval_ensemble: see --start")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Settings):
    """The search for a width schedule."""

    search_method: str = option("evolution", "an evolutionary algorithm (published), or a table "
        "of what each part of the chain loses at each width, and rounds of scoring what an "
        "additive model expects", choices=("evolution", "sensitivity"))
    num_generation: int = option(1000, "generations, the first population included", least=1)
    pop_size: int = option(10, "candidates per generation", least=2)
    fid_weight: float = option(0.5, "weight of the distance in the weighted objective", least=0)
    macs_weight: float = option(0.001, "weight of a step's average MMACs (half its MFLOPs) in it",
        least=0)
    mutation_prob: float = option(0.001, "probability that a gene mutates, per gene", least=0,
        most=1)
    random_init: bool = option(False, "a first population without the uniform widths")
    search_objective: str = option("weighted", "minimise one weighted sum (published), or "
        "distance and cost both", choices=("weighted", "pareto"))
    cost: str = option("flops", "what a step costs: FLOPs, or time measured here",
        choices=("flops", "latency"))
    flops_budget: float = option(0.0, "pareto: share of full width's cost that the chosen "
        "schedule may have; 0: the front's knee", least=0, most=1)
    pick: int = option(-1, "take this point of the finished search's front as search.txt instead; "
        "without a number: the best one within --flops_budget, or print the front as a table")
    num_segments: int = option(0, "genes, each for a run of steps; 0: one gene per step, or with "
        "--search_method=sensitivity 12", least=0)
    allow_skip: bool = option(False, "0 is a width too: the step is left out")
    confirm_images: int = option(0, "sensitivity: images on fresh noise, at most, for each "
        "schedule that could be on the front; 0: twice --num_images", least=0)
    search_minutes: float = option(0.0, "stop scoring after so many minutes; 0: when the search "
        "is done", least=0)
    state_memory: float = option(2.0, "GiB for states that chains share; 0: none are shared",
        least=0)
    state_device: str = option("device", "where these are kept", choices=("device", "host"))
    search_warm_start: str = option("", "log of another search whose best schedules start this one",
        path=True)
    search_dir: str = option("", "folder of the search; default LOGDIR/search", path=True)

    def check(self) -> None:
        # Each of a population is compared with every other one.
        memory.require(8 * self.pop_size**2, f"--pop_size={self.pop_size}", "lower it")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Where a run lives and what it runs on."""

    logdir: str = option(DEFAULT_LOGDIR, "folder of the run", path=True)
    ckpt_name: str = option("ckpt", "checkpoint LOGDIR/NAME.pt to write, continue, or use")
    batch_size: int = option(128, "images per training step, or per sampling batch", least=1,
        stored="training")
    seed: int = option(0, "seed of everything random", least=0, most=2**63 - 1,
        stored="training")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    parallel: bool = option(False, "DataParallel over the visible GPUs")
    amp: str = option("none", "arithmetic of the network; auto: the fastest on this machine, by "
        "measurement, kept in the run's folder", choices=("none", "auto", "bf16", "fp16"),
        stored="training")
    compile: bool = option(False, "torch.compile, with CUDA graphs where a GPU samples")
    dry_run: bool = option(False, "say what the command would cost, from a short measured burst")


@dataclass(frozen=True, kw_only=True)
class RetiredSettings(Settings):
    """What flagfiles of the published code and of earlier versions may hold; nobody asks for it."""

    fid_use_torch: bool = option(False, "no longer does anything: the distance always uses torch")
    distill: bool = option(False, "no longer does anything, and --train refuses it: it made narrow "
        "widths worse", stored="training")
    level_seeds: bool = option(False, "no longer does anything: see --search_method=sensitivity")
    surrogate: int = option(0, "no longer does anything: see --search_method=sensitivity")
    distance_limit: float = option(0.0, "no longer does anything: see --search_method=sensitivity")
    search_ladder: str = option("", "no longer does anything: see --confirm_images")
    ladder_keep: float = option(0.25, "no longer does anything: see --confirm_images")


# fmt: on

# By heading, as --help and docs/flags.md show them.
GROUPS: dict[str, tuple[type[Settings], ...]] = {
    "Network": (NetworkSettings, WidthSettings),
    "Diffusion": (DiffusionSettings,),
    "Sampling": (SamplingSettings,),
    "Data": (DataSettings,),
    "Training": (TrainSettings,),
    "Evaluation": (EvaluationSettings, EnsembleSettings),
    "Search": (SearchSettings,),
    "Run": (RunSettings,),
    "Retired": (RetiredSettings,),
}


def owners(groups: Mapping[str, Iterable[type[Settings]]]) -> dict[str, Option]:
    """Every option by name. Raises ValueError where two classes have one of the same name."""
    all_options: dict[str, Option] = {}
    for settings in (each for classes in groups.values() for each in classes):
        for name, each in options_of(settings).items():
            if name in all_options:
                raise ValueError(f"{name} has a second owner, {settings.__name__}")
            all_options[name] = each
    return all_options


OPTIONS = owners(GROUPS)


def _part(settings: type[Settings]) -> functools.cached_property:
    """A configuration's object of one settings class, made when it is first asked for."""
    names = options_of(settings)
    return functools.cached_property(lambda c: settings(**{name: c[name] for name in names}))


class Configuration:
    """A value for every option, which of them the user gave, and which not in a flagfile but on the
    command line (typed); not to be changed.

    The settings classes are its attributes, made and checked when they are first asked for.
    """

    def __init__(
        self,
        values: Mapping[str, object] | None = None,
        given: Iterable[str] = (),
        typed: Iterable[str] = (),
    ) -> None:
        values = values or {}
        if unknown := values.keys() - OPTIONS.keys():
            raise UserError(f"there is no option --{min(unknown)}")
        self.values = {n: o.parse(values.get(n, o.default)) for n, o in OPTIONS.items()}
        self.given, self.typed = frozenset(given), frozenset(typed)

    @classmethod
    def of(cls, **values: object) -> Configuration:
        """With these options given and the defaults of all others."""
        return cls(values, values, values)

    def changed(self, **values: object) -> Configuration:
        """The same but for these; they do not count as given."""
        return Configuration({**self.values, **values}, self.given, self.typed)

    def __getitem__(self, name: str) -> object:
        return self.values[name]

    def stored(self, *kinds: str) -> dict[str, object]:
        """The options that checkpoints store, of these kinds (see above), as JSON has them."""
        return plain({n: self.values[n] for n, o in OPTIONS.items() if o.stored in kinds})

    network: NetworkSettings = _part(NetworkSettings)
    widths: WidthSettings = _part(WidthSettings)
    diffusion: DiffusionSettings = _part(DiffusionSettings)
    sampling: SamplingSettings = _part(SamplingSettings)
    data: DataSettings = _part(DataSettings)
    training: TrainSettings = _part(TrainSettings)
    evaluation: EvaluationSettings = _part(EvaluationSettings)
    ensemble: EnsembleSettings = _part(EnsembleSettings)
    search: SearchSettings = _part(SearchSettings)
    run: RunSettings = _part(RunSettings)
