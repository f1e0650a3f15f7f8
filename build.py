"""From settings and checkpoints to what runs: networks, samplers, data, generators, evaluators.

Benchmarks and notebooks build with these functions what the modes of main.py run. No flag is known
here; what a user should hear of is logged to the logger "ddsm".
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import dataset
import score
from diffusion import EDMSchedule, NoiseLevels, NoiseSchedule
from evaluate import Evaluator
from model import SlimmableUNet, WidthSchedule, arithmetic, check_compiler, checkpoint
from model.networks import sampling_networks
from runtime import memory, processes
from runtime.errors import UserError
from runtime.files import writable_folder
from runtime.identity import agree, plain
from sampling import conditioning
from sampling.conditioning import Classes
from sampling.generate import Generator
from sampling.noise import SAMPLING
from sampling.protocol import CHURN, OURS, Sampler
from sampling.samplers import make_sampler, signal_at_start
from settings import CIFAR10_STATISTICS, OPTIONS, Configuration

log = logging.getLogger("ddsm")


@functools.cache
def log_once(text: str) -> None:
    log.info(text)


# --- devices --------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Under torchrun, "cuda" is this
    process's own GPU."""
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={asked}: not usable here ({reason})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def use_parallel(config: Configuration, device: torch.device) -> bool:
    """Whether DataParallel is asked for and there is more than one GPU for it."""
    if not config.run.parallel or processes.launched():
        return False
    count = torch.cuda.device_count()
    if count < 2:
        log_once(f"--parallel: {count} GPUs are visible, so the work stays on one device")
    elif device.index != 0:
        log_once(
            f"--parallel begins at the first GPU: --device={config.run.device} is the only one at "
            "work"
        )
        return False
    if count > 1 and config.run.compile:  # DataParallel cannot copy a compiled network
        raise UserError("--compile with --parallel: use torchrun, or leave one of them out")
    return count > 1


# --- networks -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def open_autoencoder(folder: str, scale: float, device: torch.device):
    """The autoencoder in `folder`; None for "", where diffusion is in pixels. scale: its
    scaling_factor where that is not 0."""
    if not folder:
        if scale:
            raise UserError(f"--latent_scale={scale}: only with --latent_vae")
        return None
    from dataset.latents import Autoencoder  # diffusers takes seconds to import

    return Autoencoder(folder, device, scale)


def autoencoder_of(config: Configuration, device: torch.device):
    """The autoencoder that the settings name, or None."""
    return open_autoencoder(config.data.latent_vae, config.data.latent_scale, device)


@dataclass(frozen=True)
class Model:
    """A network, and the configuration as its checkpoint settles it.

    step: the training step that its weights are of. source: the file or folder they come from.
    class_names: in the order of the classes' numbers, where they are known. label_dropout: of the
    training that the weights come from, and widths that were trained, where the checkpoint says it.
    """

    net: nn.Module
    config: Configuration
    device: torch.device
    step: int = 0
    source: str = ""
    class_names: tuple[str, ...] = ()
    label_dropout: float | None = None
    trained_widths: tuple[float, ...] = ()

    @property
    def about(self) -> str:
        """Where the weights come from, for people."""
        return f"{self.source}, step {self.step}" if self.step else self.source

    @property
    def autoencoder(self):
        return autoencoder_of(self.config, self.device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """What the network is shown, (C, H, W)."""
        return _network_shape(self.config, self.device, self.net.settings.in_ch)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """What is scored and shown, (C, H, W)."""
        vae, side = self.autoencoder, self.config.data.img_size
        return (vae.image_channels if vae else self.net.settings.in_ch), side, side

    @functools.cached_property
    def levels(self) -> NoiseLevels:
        """The noise levels that the network was or will be trained at."""
        d = self.config.diffusion
        if d.precond == "none":
            return NoiseSchedule(d.beta_1, d.beta_T, d.T, d.beta_schedule)
        if d.mean_type != "epsilon":
            raise UserError(
                f"--mean_type={d.mean_type}: with --precond=edm the network's answer is EDM's"
            )
        return EDMSchedule(d.T, d.P_mean, d.P_std, d.sigma_data)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler that the settings describe, for these noise levels."""
        limit = math.inf if self.autoencoder else 1.0
        settings = self.config.sampling
        sampler = make_sampler(settings, self.levels, self.config.diffusion.mean_type, limit)
        if self.config.search.allow_skip and not sampler.skips:
            raise UserError(
                f"--allow_skip: --sampler={settings.sampler} leaves no step out; use ddpm or ddim"
            )
        self._say_idle(sampler)
        d, ours = self.config.diffusion, settings.sampler in OURS
        if (share := signal_at_start(sampler)) > 0.02:
            where = "--timestep_spacing=" if ours else "timestep_spacing in --scheduler_options: "
            log_once(
                f"warning: the chain starts at timestep {max(sampler.entries())} of {d.T}, where a "
                f"noised image still has {100 * share:.0f} % of its variance: {where}trailing "
                "starts at the last one"
            )
        if settings.sample_steps == 1 and settings.timestep_spacing != "trailing" and ours:
            log_once(f"the only step is at timestep {d.T - 1}, as a chain starts from noise")
        cosine = d.precond == "none" and d.beta_schedule == "squaredcos_cap_v2"
        if cosine and d.mean_type == "epsilon" and not settings.clip_denoised:
            with_clipping = "sample with --clip_denoised, or " if sampler.clips else ""
            if self.autoencoder is None and not sampler.clips:
                with_clipping = "sample with --sampler=ddim --clip_denoised, or "
            log_once(
                "warning: near t = T a cosine β leaves next to no signal, so small errors of "
                "--mean_type=epsilon become large ones of the image: "
                f"{with_clipping}train with --mean_type=v"
            )
        return sampler

    def _say_idle(self, sampler: Sampler) -> None:
        """Say which options of the command line do nothing with this sampler, or in training."""
        name, precond = self.config.sampling.sampler, self.config.diffusion.precond
        some = {"ddpm": {"var_type"}, "ddim": {"eta"}, "edm": set()}.get(name, {"var_type", "eta"})
        idle = {"var_type", "eta", "rho", "heun", *CHURN} - some - {*sampler.heeds}
        levels = {"beta_1", "beta_T", "beta_schedule"}
        if precond == "none":
            levels = {"P_mean", "P_std", "sigma_data"}
        for names, cause in ((idle, f"--sampler={name}"), (levels, f"--precond={precond}")):
            if named := sorted(names & self.config.typed):
                log_once(f"--{', --'.join(named)}: no effect with {cause}")

    @functools.cached_property
    def classes(self) -> Classes | None:
        """Which classes images are asked to show; None where the network has none."""
        s, settings = self.config.sampling, self.net.settings
        if getattr(settings, "embeddings", ()):
            return self._rows()
        if not getattr(self.net.settings, "num_classes", 0):
            for name in ("guidance_scale", "classes"):
                if self.config[name] != OPTIONS[name].default:
                    raise UserError(
                        f"--{name}={self.config[name]}: the network has no classes; train one "
                        "with --num_classes"
                    )
            return None
        self.check_guidance()
        shares = self.net.class_embedding.frequencies.tolist()
        fixed = conditioning.parse(s.classes, self.class_names)
        classes = Classes(tuple(shares), s.guidance_scale, fixed, self.config.run.seed)
        if fixed and self.class_names:
            named = ", ".join(f"{self.class_names[n]} ({n})" for n in fixed)
            log_once(f"--classes: {named}")
        return classes

    def check_guidance(self) -> None:
        """Raise UserError where --guidance_scale needs a null class that was never trained."""
        scale, dropout = self.config.sampling.guidance_scale, self.label_dropout
        dropout = self.config.training.label_dropout if dropout is None else dropout
        # A model of diffusers may have come with one; our own learn it by dropout alone.
        came_with_one = getattr(self.net.settings, "null_class", False)
        if scale != 1 and not (came_with_one or dropout):
            raise UserError(
                f"--guidance_scale={scale}: guidance needs a network that was also trained without "
                f"classes, which {self.source or 'this one'} was not; train it with --label_dropout"
            )

    def _rows(self) -> Classes | None:
        """Which row of the embeddings each image is shown, as Classes say it; None where all are
        shown the only one."""
        s, settings = self.config.sampling, self.net.settings
        count = settings.embeddings[0] - settings.null_class
        if s.guidance_scale != 1 and not settings.null_class:
            raise UserError(
                f"--guidance_scale={s.guidance_scale}: guidance needs embeddings that say nothing, "
                "null (1, L, D), in the file of --conditioning"
            )
        rows = conditioning.parse(s.classes) or tuple(range(count))
        classes = Classes((1 / count,) * count, s.guidance_scale, rows, self.config.run.seed)
        return None if count == 1 and s.guidance_scale == 1 else classes

    @property
    def passes_per_call(self) -> int:
        """Network passes that one call of the denoiser takes, for an image."""
        return self.classes.passes if self.classes else 1

    def flops(self, widths: Sequence[float]) -> dict[float, int]:
        """FLOPs of one image's step at each width, or of half of a second-order step; leaving a
        step out costs nothing."""
        shape, passes = self.image_shape, self.passes_per_call
        return {0.0: 0} | {width: passes * score.flops(self.net, width, shape) for width in widths}

    def schedule(self, path: str | Path) -> WidthSchedule:
        """The width schedule in a file, for this sampler."""
        widths = self.config.widths.all
        widths = [0.0, *widths] if self.config.search.allow_skip else widths
        return WidthSchedule.load(path, self.levels.T, widths, self.sampler.entries())


# Full width is the same network whatever these are: a run that starts from it may choose them.
FREE_AT_START = ("norm_groups", "skip_slicing")
ADOPTED = ("network", "model", "default", "sampling")  # kinds of options: see settings.py


def checkpoint_path(config: Configuration, logdir: str | None = None) -> Path:
    return Path(logdir or config.run.logdir) / f"{config.run.ckpt_name}.pt"


def adopt(config: Configuration, stored: Mapping[str, object], path: str | Path) -> Configuration:
    """`config` with what a checkpoint says of its network; UserError where options that were given
    differ from it."""
    values = {}
    for name, option in OPTIONS.items():
        if option.stored in ADOPTED and name in stored:
            try:
                values[name] = option.parse(stored[name])
            except UserError as error:
                raise UserError(f"{path}: in its settings, {error}") from error
    shaping = config.stored("network", "model").items()
    agree(
        path,
        {f"--{name}": value for name, value in plain(values).items()},
        {f"--{name}": value for name, value in shaping if name in config.given},
        "leave these flags out",
    )
    return settled(config.changed(**{n: v for n, v in values.items() if n not in config.given}))


def settled(config: Configuration) -> Configuration:
    """With the sampler that belongs to --precond=edm, where none was given."""
    if config.diffusion.precond == "edm" and "sampler" not in config.given:
        return config.changed(sampler="edm")
    return config


def _network_shape(
    config: Configuration, device: torch.device, channels: int
) -> tuple[int, int, int]:
    """What a network of so many channels is shown: images of --img_size, or their latents."""
    vae, side = autoencoder_of(config, device), config.data.img_size
    if vae is None:
        return channels, side, side
    if channels != vae.channels:
        raise UserError(
            f"--latent_vae: latents of {vae.folder} have {vae.channels} channels and the network "
            f"{channels}"
        )
    return channels, *vae.shape(side)[1:]


def _checked(net: nn.Module, config: Configuration, device: torch.device) -> nn.Module:
    """`net`, if it can run at --img_size and at every width that it is to run at."""
    side = _network_shape(config, device, net.settings.in_ch)[1]
    try:
        net.settings.check_image_size(side)
    except UserError as error:
        if not config.data.latent_vae:
            raise
        raise UserError(
            f"--img_size={config.data.img_size} makes latents of {side} per side: {error}"
        ) from error
    for width in config.widths.all:
        net.check_width(width)
    return net


def own_network(
    config: Configuration, device: torch.device, in_ch: int, ch: int | None = None
) -> SlimmableUNet:
    """A network of this project as the settings describe it, with fresh weights."""
    torch.manual_seed(config.run.seed)
    settings = {**vars(config.network), "in_ch": in_ch, "T": config.diffusion.T}
    net = SlimmableUNet(**settings | ({} if ch is None else {"ch": ch}))
    return _checked(net, config, device)


def _from_diffusers(config: Configuration, device: torch.device) -> Model:
    """The UNet in --init_diffusers as a supernet; its scheduler settles the diffusion."""
    # diffusers takes seconds to import.
    from model.diffusers import importance, loading, supernet, trained

    folder = Path(config.training.init_diffusers)
    found = trained.trained_diffusion(folder)
    if found:
        found.check(config.values, config.given)
        clips = found.sampling.get("clip_denoised") and "clip_denoised" not in config.given
        if clips and config.data.latent_vae:
            raise UserError(
                f"{found.path}: clip_sample is true, and latents are not clipped here: give "
                "--clip_denoised=false to sample without"
            )
        config = adopt(config, {**found.flags, **found.sampling}, found.path)
        log.info(found.table(config.values, config.given))
    else:
        _check_told(config, folder, trained.NEEDED)
    if config.diffusion.precond != "none":
        raise UserError("--init_diffusers: such a model was trained with --precond=none")
    net = supernet.SlimmableDiffusersUNet(
        loading.read_model(folder),
        config.diffusion.T,
        config.network.norm_groups,
        config.network.num_classes,
    )
    theirs, averaged = net.settings.config, folder / "unet_ema"
    if averaged.is_dir() and loading.find_model(folder)[0] != folder:
        log.info(f"{averaged}, the averaged weights, is not used: name it to use it")
    _set_embeddings(net, config)
    _check_suits(net, folder)
    taken = {} if "slimmable_unet" in config.given else {"slimmable_unet": True}
    if "img_size" not in config.given:
        size, vae = loading.image_size(theirs), autoencoder_of(config, device)
        if size is None:
            raise UserError(f"{folder}: its config.json has no sample_size: give --img_size")
        taken["img_size"] = size * (vae.factor if vae else 1)
    config = config.changed(**taken)
    log.info(f"{folder}: sample_size {theirs['sample_size']}, --img_size={config.data.img_size}")
    importance.order_by_importance(net)
    return Model(_checked(net, config, device), config, device, source=str(folder))


def _set_embeddings(net: nn.Module, config: Configuration) -> None:
    """Show `net` the embeddings of --conditioning, if there are any."""
    path, settings = config.data.conditioning, net.settings
    if not path:
        return
    if getattr(settings, "class_name", "") != "UNet2DConditionModel":
        raise UserError(f"--conditioning={path}: the network reads no embeddings")
    if config.network.num_classes:
        raise UserError("--conditioning and --num_classes: only one of them can be used")
    from model.diffusers import loading

    embeddings, null = loading.read_embeddings(path, net.features)
    net.set_embeddings(embeddings.to(next(net.parameters()).device), null)


def _check_suits(net: nn.Module, folder: Path) -> None:
    """Refuse a model of diffusers that needs or makes what there is not here."""
    config, needs = net.settings.config, net.conditioning()
    if needs == ["class_labels"] and config["num_class_embeds"]:
        count = config["num_class_embeds"]
        raise UserError(
            f"{folder}: the model has embeddings of {count} classes: give --num_classes={count}, "
            f"or {count - 1} if the last one stands for images without a class"
        )
    if needs:
        give = {"encoder_hidden_states": ": give them with --conditioning"}.get(needs[0], "")
        raise UserError(
            f"{folder}: the model needs {needs[0]}{give or ', which images have none of here'}"
        )
    fourier = config.get("time_embedding_type") == "fourier"
    if fourier and net.settings.class_name == "UNet2DModel":
        raise UserError(
            f"{folder}: the model's Fourier time embedding takes a logarithm of its time, and is "
            "not a number at timestep 0"
        )
    rows = config.get("num_train_timesteps") or 0
    if config.get("time_embedding_type") == "learned" and rows < net.settings.T:
        raise UserError(
            f"{folder}: the model has learned embeddings of {rows} timesteps, fewer than "
            f"--T={net.settings.T}"
        )
    reads, makes = config["in_channels"], config["out_channels"]
    if makes != reads:
        reason = "it does more than denoise, such as upscale or inpaint"
        if makes == 2 * reads:
            reason = "it also predicts a variance"
        raise UserError(
            f"{folder}: the model reads {reads} channels and makes {makes}: {reason}; only a "
            "model whose output is like its noisy input can be used"
        )


def _check_told(config: Configuration, folder: Path, names: Sequence[str]) -> None:
    """Refuse a model without a scheduler unless the options say what it was trained for."""
    if config.diffusion.beta_schedule == "squaredcos_cap_v2":
        names = [name for name in names if name not in ("beta_1", "beta_T")]
    missing = [f"--{name}" for name in names if name not in config.given]
    if missing:
        raise UserError(
            f"{folder} has no scheduler_config.json, beside the model or in scheduler/, that says "
            f"what the model was trained for: copy it there, or give {', '.join(missing)}"
        )


def _foreign_network(
    config: Configuration, device: torch.device, stored: Mapping[str, object]
) -> nn.Module:
    """A diffusers network with fresh weights, as a checkpoint's settings describe it."""
    from model.diffusers.supernet import SlimmableDiffusersUNet

    net = _checked(SlimmableDiffusersUNet.from_settings(stored), config, device)
    if config.network.num_classes != net.settings.num_classes:
        raise UserError(
            f"--num_classes={config.network.num_classes}: the network has "
            f"{net.settings.num_classes} classes"
        )
    return net


def model_to_train(
    config: Configuration, state: Mapping[str, object] | None
) -> tuple[Model, dataset.AnySet]:
    """A network as training starts with it, and the images. state: of the checkpoint in LOGDIR that
    the run goes on from, whose weights are not filled in here."""
    device, config = choose_device(config.run.device), settled(config)
    stored = checkpoint.settings(state) if state else {}
    if state:  # before hours of encoding
        _check_autoencoder(autoencoder_of(config, device), stored, checkpoint_path(config))
    if stored.get("kind") == "diffusers":
        config = adopt(config, stored, checkpoint_path(config))
        model = Model(_foreign_network(config, device, stored), config, device)
        _set_embeddings(model.net, config)
        theirs = checkpoint.entries(state["net_model"], checkpoint_path(config)).get("embeddings")
        same = theirs is not None and torch.equal(model.net.embeddings, theirs)
        if config.data.conditioning and not same:
            raise UserError("--conditioning: the run has begun with other embeddings")
    elif state is None and config.training.init_checkpoint:
        source = Path(config.training.init_checkpoint)
        state = checkpoint.load(source)
        model = _restored(config, device, state, source, free=FREE_AT_START)
        model = replace(model, label_dropout=None)  # this training may have another one
        stored = checkpoint.settings(state)
        log.info(f"starts from {model.about}")
    elif config.training.init_diffusers:
        model = _from_diffusers(config, device)
    else:
        model = None
    config = model.config if model else config
    shown = getattr(model.net.settings, "embeddings", ()) if model else ()
    if shown and shown[0] - model.net.settings.null_class != 1:
        raise UserError(
            "--conditioning: training shows all images the same embeddings, so it takes one row; "
            "sampling, search and evaluation take one for each image"
        )
    if config.training.sandwich and not config.widths.slimmable:
        raise UserError("--sandwich trains several widths: add --slimmable_unet")
    images = training_set(config, device, stored)
    if model is None:
        model = Model(own_network(config, device, images.channels), config, device)
    if config.network.num_classes:
        shares = conditioning.shares(images.labels, config.network.num_classes)
        model.net.class_embedding.frequencies.copy_(shares)
        model = replace(model, class_names=tuple(images.classes))
    if model.net.settings.in_ch != images.channels:
        raise UserError(
            f"--dataset={config.data.dataset} has {images.channels} channels and the model "
            f"{model.net.settings.in_ch}; see --channels"
        )
    return model, images


def load_model(config: Configuration, logdir: str | None = None, ch: int | None = None) -> Model:
    """The EMA network of LOGDIR/CKPT_NAME.pt; before training, the model of --init_diffusers. Where
    it is from is logged.

    logdir, ch: where they are not those of `config`, as for the small network of an ensemble.
    """
    device, path = choose_device(config.run.device), checkpoint_path(config, logdir)
    # A folder with other checkpoints is a run's: there a name is wrong, and nothing is untrained.
    if config.training.init_diffusers and not path.exists() and not any(path.parent.glob("*.pt")):
        model = _as_it_came(config, device)
    else:
        model = _restored(config, device, checkpoint.load(path), path, ch)
        log.info(model.about)
    model.net.to(device).eval()
    return model


def _as_it_came(config: Configuration, device: torch.device) -> Model:
    """The model of --init_diffusers before any training."""
    model = _from_diffusers(config, device)
    log.info(f"the model of {model.source} as it is, --sampler={model.config.sampling.sampler}")
    if model.config.network.num_classes:
        log.info("classes are drawn at equal odds: no training set says how frequent they are")
    # Nothing was trained here: guidance needs a null class that the model had.
    return replace(model, config=model.config.changed(label_dropout=0.0, ckpt_name=model.source))


def _restored(
    config: Configuration,
    device: torch.device,
    state: Mapping[str, object],
    path: Path,
    ch: int | None = None,
    free: Iterable[str] = (),
) -> Model:
    """The EMA network of a checkpoint's state, on the CPU. free: options that need not agree with
    it where they are given."""
    stored = checkpoint.settings(state)
    stored |= {name: config[name] for name in config.given.intersection(free)}
    if ch is not None:
        stored.pop("ch", None)
    config = adopt(config, stored, path)
    _check_autoencoder(autoencoder_of(config, device), stored, path)
    if stored.get("kind") == "diffusers":
        net = _foreign_network(config, device, stored)
    else:
        head = checkpoint.entries(state["ema_model"], path).get("head.weight")
        in_ch = 3 if head is None or head.ndim != 4 else head.shape[1]
        net = own_network(config, device, in_ch, ch)
    checkpoint.fill(net, state["ema_model"], path)
    _set_embeddings(net, config)
    model = Model(
        net,
        config,
        device,
        step=int(state.get("step", 0)),
        source=str(path),
        class_names=_class_names(stored),
        label_dropout=stored.get("label_dropout"),
        trained_widths=_trained_widths(state.get("settings", {})),
    )
    if "settings" not in state:
        _check_unsaid(model, state.get("x_T"))
    return model


def _check_unsaid(model: Model, x_T: object) -> None:
    """What a checkpoint of another program can tell beside its weights: the size of its images."""
    path, shape = model.source, model.image_shape
    if isinstance(x_T, torch.Tensor) and x_T.ndim == 4 and tuple(x_T.shape[1:]) != shape:
        raise UserError(
            f"{path} was trained for {tuple(x_T.shape[1:])}, as its x_T shows, and the flags are "
            f"for {shape}; see --img_size"
        )
    log.info(f"{path} does not say what it was trained for: --T, --beta_T, … are believed")


def _trained_widths(settings: Mapping[str, object]) -> tuple[float, ...]:
    """The widths that a run's settings train; none where they do not say it."""
    if not {"sandwich", "min_width", "candidate_width"} <= settings.keys():
        return ()
    if settings.get("finetune_schedule"):
        return ()
    if not settings["sandwich"]:
        return (1.0,)
    least, between = (OPTIONS[n].parse(settings[n]) for n in ("min_width", "candidate_width"))
    return tuple(sorted({1.0, least, *between}))


def _class_names(stored: Mapping[str, object]) -> tuple[str, ...]:
    """The classes' names in a checkpoint's settings, in the order of their numbers."""
    return tuple(stored.get("class_names") or ())


def _check_autoencoder(vae: object, stored: Mapping[str, object], path: Path) -> None:
    """Refuse to use a network in other latents than those that it was trained in."""
    theirs = stored.get("autoencoder")
    if vae and not theirs:
        raise UserError(f"{path} was trained in pixels: leave --latent_vae out")
    if theirs and not vae:
        raise UserError(f"{path} was trained in latents: name its --latent_vae")
    if vae and vae.fingerprint != theirs:
        raise UserError(
            f"{path} was trained in the latents of another VAE, or at another scale ({theirs}), "
            f"than {vae.folder} ({vae.fingerprint}): see --latent_vae and --latent_scale"
        )


def load_model_or_untrained(config: Configuration) -> Model:
    """The trained network, or an untrained one for questions that weights do not matter to."""
    path = checkpoint_path(config)
    if path.exists() or config.training.init_diffusers:
        return load_model(config)
    device, config = choose_device(config.run.device), settled(config)
    vae = autoencoder_of(config, device)
    channels = vae.channels if vae else dataset.channels(config.data.dataset, config.data)
    net = own_network(config, device, channels).to(device).eval()
    log.info(f"there is no {path}; this is the network that the flags describe, untrained")
    return Model(net, config, device)


# --- data -----------------------------------------------------------------------------------------


def load_images(config: Configuration) -> dataset.AnySet:
    """The data set, in pixels."""
    d = config.data
    return dataset.load(d.dataset, d.data_root, d.img_size, options=d)


def training_set(
    config: Configuration, device: torch.device, stored: Mapping[str, object]
) -> dataset.AnySet:
    """The data set, in latents where --latent_vae says so; with as many classes as the network, in
    the order of the checkpoint's settings `stored` where training goes on from one."""
    images, d, batch_size = load_images(config), config.data, config.run.batch_size
    conditioning.check(config.network.num_classes, d.dataset, images.labels, images.classes)
    if stored.get("num_classes") and stored["num_classes"] == len(images.classes):
        # Without names it is from when folders were numbered in the order of their names as text.
        text_order = sorted(images.classes) if d.dataset == "image_folder" else images.classes
        names = _class_names(stored) or text_order
        images = dataset.in_class_order(images, names)
    log.info(dataset.describe(images))
    vae = autoencoder_of(config, device)
    if vae is None:
        return images
    if d.flip == "on":
        raise UserError("--flip=on: a mirrored latent is not the latent of the mirrored image")
    from dataset import latents

    usual = Path(d.data_root) / "latents" / f"{d.dataset}{d.img_size}.npy"
    path = Path(d.latent_cache or usual)
    if config.run.dry_run and not path.exists():
        log.info(f"before training, {len(images)} images are encoded into {path}")
        made = latents.sample(images, vae, batch_size)
    else:
        made = latents.encoded(images, vae, d.img_size, path, batch_size, d.num_workers)
    levels = config.diffusion
    log.info(latents.spread(made, levels.sigma_data if levels.precond == "edm" else 1.0))
    return made


# --- images and scores ----------------------------------------------------------------------------


def candidates(
    model: Model, widths: Sequence[float], path: Path | None = None
) -> dict[float, nn.Module]:
    """Dense networks of these widths, ready to sample with.

    path: where the arithmetic that --amp=auto picks is kept; see arithmetic.chosen.
    """
    config, device, trained = model.config, model.device, model.trained_widths
    others = sorted(set(widths) - {*trained, 0.0}) if trained else []
    if others:
        named, known = (", ".join(f"{w:g}" for w in ws) for ws in (others, trained))
        log_once(f"warning: the training of {model.source} was at {known}, not at width {named}")
    if config.run.compile:
        check_compiler(device)
    shape, amp = model.image_shape, config.run.amp
    chosen = arithmetic.chosen(model.net, widths, amp, shape, device, path)
    if amp == "auto" or set(chosen.values()) != {arithmetic.AMP[amp]}:
        log.info(f"arithmetic by width: {arithmetic.describe(chosen)}")
    return sampling_networks(model.net, widths, chosen, config.run.compile)


def kept_arithmetic(config: Configuration, name: str = "arithmetic") -> Path | None:
    """Where a run keeps what --amp=auto picked, so that two equal evaluations agree."""
    return Path(config.run.logdir) / f"{name}.json" if config.run.amp == "auto" else None


def check_batch(model: Model, images: int) -> None:
    """Refuse a batch of which not even the first layer's output fits into this machine."""
    first = next(weight for weight in model.net.parameters() if weight.ndim == 4)
    C, H, W = model.image_shape
    channels = 3 * C + (len(first) if model.device.type == "cpu" else 0)
    what = f"a batch of {images} images of {H}×{W} (--batch_size={model.config.run.batch_size})"
    memory.require(4 * images * channels * H * W, what, "lower --batch_size or --img_size")


def generator(
    model: Model, networks: Mapping[Hashable, nn.Module], stream: int = SAMPLING
) -> Generator:
    """What makes images with these networks, which are `model`'s. stream: of the noise."""
    run, vae = model.config.run, model.autoencoder
    check_batch(model, min(run.batch_size, model.config.evaluation.num_images))
    return Generator(
        networks=networks,
        sampler=model.sampler,
        image_shape=model.image_shape,
        device=model.device,
        batch_size=run.batch_size,
        to_images=vae.to_images if vae else dataset.to_uint8,
        seed=run.seed,
        stream=stream,
        classes=model.classes,
        parallel=use_parallel(model.config, model.device),
        compiled=run.compile,
    )


def encoder(config: Configuration, device: torch.device) -> score.Encoder:
    e = config.evaluation
    return score.encoder(e.fid_encoder, device, e.fid_weights or None)


def reference(model: Model, encoder: score.Encoder) -> score.Gaussian:
    """The data set's features in short, computed and saved where --fid_cache has no file."""
    config, shape = model.config, model.picture_shape
    name, size = config.data.dataset, config.data.img_size

    @functools.cache
    def images() -> score.Images:
        try:
            loaded = load_images(config)
        except UserError as error:
            raise score.UnavailableError(str(error)) from error
        if loaded.channels != shape[0]:
            raise UserError(
                f"--dataset={name} has {loaded.channels} channels and the network {shape[0]}; "
                f"name the data set that it was trained on, or --channels={shape[0]}"
            )
        batches = functools.partial(
            dataset.everything, loaded, config.run.batch_size, config.data.num_workers
        )
        return score.Images(len(loaded), dataset.fingerprint(loaded), batches)

    path, usual = config.evaluation.fid_cache, (name, size, encoder.name)
    if path == CIFAR10_STATISTICS and usual != ("cifar10", 32, "inception"):
        path = score.default_path("./stats", name, size, encoder.name, images().content)
    return score.load_or_compute(
        path,
        encoder,
        encoder.dim or math.prod(shape),
        {"dataset": name, "img_size": size, "split": "train"},
        images,
        f"statistics of {name} ({encoder.name})",
        log.info,
    )


def evaluator(
    model: Model, networks: Mapping[Hashable, nn.Module], stream: int = SAMPLING
) -> Evaluator:
    """What scores schedules of these networks, with encoder and statistics loaded."""
    config = model.config
    count = config.evaluation.num_images
    if count < 2:
        raise UserError(f"--num_images={count}: a covariance needs at least 2 images")
    making = generator(model, networks, stream)  # a mistake here need not wait for statistics
    making.shares(count)
    writable_folder(config.run.logdir)
    features = encoder(config, model.device)
    statistics = reference(model, features)
    if count <= statistics.dim:
        log.info(
            f"warning: {count} images cannot fill a covariance of {statistics.dim} features "
            f"({features.name}); the distance is biased upwards and can only be compared with "
            "distances of as many images"
        )
    return Evaluator(making, features, statistics, count)
