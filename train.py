"""The training loop: sandwich rule, EMA, checkpoints, resume, logs.

Gets settings, a network and images; knows no flags and no data set by name. Everything random in
step n (the batch, the timesteps, the noise, the widths, dropout) is a function of (seed, n), so a
run that was stopped and resumed makes the very steps that it would have made.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import dataset as data
import diffusion
from model import (
    EMA,
    Condition,
    StepAwareDenoiser,
    checkpoint,
    compile_network,
    ready_to_train,
    sampling_networks,
)
from runtime import processes as distributed
from runtime.errors import UserError
from runtime.files import append_jsonl, read_jsonl, save_grid, write_jsonl
from sampling import noise as rng
from sampling.conditioning import Classes


@dataclass(frozen=True)
class TrainSettings:
    """What a training run does; flags of the same names explain the fields."""

    lr: float = 2e-4
    grad_clip: float = 1.0
    warmup: int = 5000
    batch_size: int = 128
    ema_decay: float = 0.9999
    seed: int = 0
    sandwich: bool = False
    min_width: float = 0.25
    num_sandwich_sampling: int = 3
    distill: bool = False
    label_dropout: float = 0.1
    candidate_width: tuple[float, ...] = (0.75, 0.5)
    amp: str = "none"
    total_steps: int = 800000
    num_workers: int = 4
    sample_size: int = 64
    sample_step: int = 1000
    save_step: int = 5000
    eval_step: int = 0
    log_step: int = 100
    ckpt_name: str = "ckpt"

    def __post_init__(self) -> None:
        for name in ("batch_size", "total_steps", "save_step", "sample_size", "log_step"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in ("warmup", "sample_step", "eval_step", "num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        if not (0 < self.lr < math.inf and self.grad_clip > 0):
            raise UserError(f"--lr={self.lr} --grad_clip={self.grad_clip}: must be positive")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"--label_dropout={self.label_dropout}: must be in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay={self.ema_decay}: must be in [0, 1)")
        if self.amp == "fp16":
            raise UserError("--amp=fp16 is for sampling; train with --amp=auto, bf16 or none")
        if self.distill and not self.sandwich:
            raise UserError("--distill teaches narrower widths, so it needs --sandwich")
        if self.sandwich and self.num_sandwich_sampling < 2:
            raise UserError(
                f"--num_sandwich_sampling={self.num_sandwich_sampling}: a sandwich step has at "
                "least 2 widths, 1 and --min_width"
            )

    def widths(self, step: int) -> list[float]:
        """The widths that step number `step` trains: 1, the smallest, and some drawn between."""
        if not self.sandwich:
            return [1.0]
        drawn = self.num_sandwich_sampling - 2
        choice = np.random.default_rng([self.seed, step]).choice(
            self.candidate_width, drawn, replace=drawn > len(self.candidate_width)
        )
        return [1.0, self.min_width, *map(float, choice)]

    def shown_widths(self) -> list[float]:
        """The widths whose samples are shown during training."""
        return sorted({1.0, self.min_width}, reverse=True) if self.sandwich else [1.0]


class Interrupted(Exception):  # noqa: N818 - it is a state of affairs, not an error
    """The run was asked to stop and has saved itself."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class Trainer:
    """One training run in one folder.

    identity: every setting that the result depends on, kept in the checkpoint; a resumed run must
    agree with it. evaluate(net, width) -> scores, called every eval_step steps on the EMA network.
    classes: of a class-conditional network. to_images: what a chain makes -> uint8 images.
    """

    settings: TrainSettings
    net: nn.Module
    dataset: Dataset
    noise_schedule: diffusion.Schedule
    sampler: diffusion.Sampler
    image_shape: tuple[int, int, int]
    logdir: Path
    device: torch.device
    identity: Mapping[str, object]
    parallel: bool = False
    compiled: bool = False
    choose_arithmetic: Callable[[], str] | None = None
    evaluate: Callable[[nn.Module, float, Callable], Mapping[str, object]] | None = None
    classes: Classes | None = None
    to_images: Callable[[Tensor], Tensor] = data.to_uint8
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.sampler.timesteps(self.noise_schedule)  # raises where it is no sampler for this T
        self.net = self.net.to(self.device, memory_format=torch.channels_last).train()
        self.ema = EMA(self.net, s.ema_decay)
        # The frozen time table is among the parameters, as in released optimizer states.
        self.optim = torch.optim.Adam(self.net.parameters(), lr=s.lr, fused=True)
        self.sched = torch.optim.lr_scheduler.LambdaLR(
            self.optim, lambda step: min(step, s.warmup) / s.warmup if s.warmup else 1.0
        )
        self.x_T = rng.ImageNoise(
            s.seed, rng.SAMPLING, torch.arange(s.sample_size), self.image_shape
        ).initial()
        self.path = self.logdir / f"{s.ckpt_name}.pt"
        self.signum = 0
        self.norm = torch.zeros(())  # of the last step's gradient
        self.arithmetic = ""  # of the steps: chosen once in a run's life
        self._sums: dict[float, list[Tensor]] = defaultdict(list)

    # --- state ---

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder, if there is one."""
        if not self.path.exists():
            return False
        state = checkpoint.load(self.path)
        known = checkpoint.settings(state)
        differing = [
            f"{name}: {known[name]} there, {value} here"
            for name, value in self.identity.items()
            # The autoencoder's folder may move; its fingerprint is another setting.
            if name in known and known[name] != value and name != "latent_vae"
        ]
        if differing:
            raise UserError(
                f"{self.path} was trained with other settings ({'; '.join(differing)}); "
                "use the same ones to continue it, or another --logdir to start anew"
            )
        checkpoint.fill(self.net, state["net_model"], self.path)
        checkpoint.fill(self.ema.model, state["ema_model"], self.path)
        checkpoint.check_optimizer(state.get("optim"), self.optim, self.path)
        checkpoint.check_scheduler(state.get("sched"), self.sched, self.path)
        try:
            checkpoint.load_optimizer(self.optim, state["optim"])
            self.sched.load_state_dict(state["sched"])
            self.step = int(state["step"])
            self.arithmetic = str(state.get("arithmetic", ""))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} cannot be continued: its optim, sched or step does not fit ({error})"
            ) from error
        x_T = state.get("x_T", self.x_T)
        if getattr(x_T, "shape", None) == self.x_T.shape:  # else of another --sample_size
            checkpoint.check_tensor(x_T, self.x_T, f"{self.path}: x_T")
            self.x_T = x_T
        return True

    def save(self, numbered: bool = False) -> None:
        """Write CKPT_NAME.pt and, where `numbered`, keep it as CKPT_NAME_STEP.pt too."""
        self._check_finite()
        if not distributed.is_main():
            return
        checkpoint.save(
            self.path,
            {
                "net_model": self.net.state_dict(),
                "ema_model": self.ema.model.state_dict(),
                "sched": self.sched.state_dict(),
                "optim": self.optim.state_dict(),
                "step": self.step,
                "x_T": self.x_T,
                "arithmetic": self.arithmetic,
                "settings": dict(self.identity),
            },
        )
        if numbered:
            kept = self._numbered()
            kept.unlink(missing_ok=True)
            try:
                os.link(self.path, kept)  # the next save replaces CKPT_NAME.pt, not this file
            except OSError:
                shutil.copy2(self.path, kept)

    def _numbered(self) -> Path:
        return self.path.with_name(f"{self.path.stem}_{self.step}.pt")

    def _check_finite(self) -> None:
        """Refuse to go on from, or to save, weights that a bad step has spoilt.

        A loss that is not finite makes such a gradient, in this and in every later step.
        """
        if not bool(self.norm.isfinite()):
            raise UserError(
                f"the loss or its gradient is not finite at step {self.step}; lower --lr or raise "
                f"--warmup, and start again from the last checkpoint in {self.logdir}"
            )

    # --- one step ---

    def train_step(self, network: nn.Module, x_0: Tensor, labels: Tensor | None = None) -> None:
        """One update on a batch; labels (B,) where there are classes. `network` wraps self.net."""
        s, rank, world = self.settings, distributed.rank(), distributed.world()
        # Dropout's. On a CPU every process draws all masks, see model/cpu/dropout.py.
        together = self.device.type == "cpu" and not self._compiles()
        torch.manual_seed(_mix(s.seed, self.step, 0 if together else rank))
        mine = slice(rank * len(x_0), (rank + 1) * len(x_0))
        places = torch.arange(mine.start, mine.stop, device=self.device)
        draw = torch.Generator().manual_seed(_mix(s.seed, self.step, -1))
        widths = s.widths(self.step)
        half = self.arithmetic == "bfloat16"
        told = () if labels is None else (self._dropped(labels, mine, len(x_0) * world),)
        for i, width in enumerate(widths):
            # A distilled width sees what the full width saw, and learns what that answered.
            if i == 0 or not s.distill:
                t = self.noise_schedule.draw(len(x_0) * world, draw)[mine]
                t = t.to(self.device, non_blocking=True)
                noise = rng.normal(s.seed, rng.TRAINING + i, places, self.step, self.image_shape)
                x_t, target = self.noise_schedule.pair(x_0, t, noise, self.sampler.mean_type)
            last = i == len(widths) - 1
            # Gradients of all passes add up; several processes exchange them once.
            quiet = getattr(network, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else quiet():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    prediction = network(x_t, t, width, *told).to(target)
                    loss = nn.functional.mse_loss(prediction, target)
                loss.backward()
            if s.distill and i == 0:
                target = prediction.detach()
            self._sums[width].append(loss.detach())
        self.norm = nn.utils.clip_grad_norm_(self.net.parameters(), s.grad_clip)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.sched.step()
        self.ema.update(self.net)
        self.step += 1

    def _dropped(self, labels: Tensor, mine: slice, count: int) -> Tensor:
        """Labels (B,) on the device, some replaced by the null class: for guidance the network
        has to know what an image is like whatever its class."""
        draw = torch.Generator().manual_seed(_mix(self.settings.seed, self.step, -2))
        dropped = torch.rand(count, generator=draw)[mine] < self.settings.label_dropout
        return labels.where(~dropped, self.classes.count).to(self.device, non_blocking=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share of the images of each step from here on, and their labels."""
        s, part = self.settings, (distributed.rank(), distributed.world())
        common = {"seed": s.seed, "start_step": self.step, "part": part}
        images = data.batches(
            self.dataset, s.batch_size, device=self.device, num_workers=s.num_workers, **common
        )
        if self.classes is None:
            return zip(images, itertools.repeat(None), strict=False)
        labels = data.batch_labels(self.dataset, s.batch_size, **common)
        return zip(images, labels, strict=True)

    # --- the run ---

    def run(self) -> None:
        """Train to total_steps. Raises Interrupted after SIGINT or SIGTERM, with all saved."""
        s = self.settings
        resumed = self.resume()
        owed = self._owed() if resumed else []
        if self.step >= s.total_steps and not owed:
            if distributed.is_main():
                at = f"{self.path} is already at step {self.step} of {s.total_steps}"
                print(f"{at}; nothing to do", flush=True)
            return
        network = self.wrapped()
        batches = self.batches()
        with self._signals(), self._logging(resumed) as writer, self._bar() as bar:
            self._finish(owed, writer)
            if self.step >= s.total_steps:
                return
            since = time.perf_counter()
            steps_since = self.step
            for x_0, labels in batches:
                self.train_step(network, x_0, labels)
                bar.update()
                if self.step % s.log_step == 0 or self.step == s.total_steps:
                    rate = (self.step - steps_since) * s.batch_size / (time.perf_counter() - since)
                    self._log(writer, bar, rate)
                    since, steps_since = time.perf_counter(), self.step
                self._stop_if_asked()
                self._finish(self._due(), writer)
                if self.step == s.total_steps:
                    return

    def _due(self) -> list[str]:
        """What the step just made ends with."""
        s = self.settings
        done = self.step == s.total_steps
        due = {
            "checkpoint": done or self.step % s.save_step == 0,
            "samples": s.sample_step and (done or self.step % s.sample_step == 0),
            "scores": self.evaluate and s.eval_step and self.step % s.eval_step == 0,
        }
        return [name for name in due if due[name]]

    def _owed(self) -> list[str]:
        """What is due at this step and not on the disk, because the run was stopped there."""
        last = self.settings.shown_widths()[-1]
        made = {
            "checkpoint": self._numbered().exists(),
            "samples": self._grid(last).exists(),
            "scores": not self._unscored(),
        }
        elsewhere = not (self.logdir / "train.jsonl").exists()  # where the checkpoint comes from
        owed = [name for name in self._due() if not elsewhere and not made[name]]
        return distributed.gather(owed)[0]

    def _finish(self, due: Sequence[str], writer: object) -> None:
        """Do what is due at this step."""
        if "checkpoint" in due:
            self.save(numbered=True)
        if "samples" in due:
            self._show(writer)
        if "scores" in due:
            self._evaluate(writer)

    def wrapped(self) -> nn.Module:
        """The network as `train_step` wants it: chosen arithmetic, compiled, in parallel."""
        if not self.arithmetic:
            default = "bfloat16" if self.settings.amp == "bf16" else "float32"
            self.arithmetic = self.choose_arithmetic() if self.choose_arithmetic else default
        ready_to_train(self.net, self.arithmetic, self.device)
        # Not as CUDA graphs: gradients add up over the passes, and a graph's would be overwritten.
        net = compile_network(self.net) if self._compiles() else self.net
        if distributed.world() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(net, device_ids=ids)
        return nn.DataParallel(net) if self.parallel else net

    def _compiles(self) -> bool:
        """Whether the steps' network is compiled; see SamplingNetwork."""
        return self.compiled and self.arithmetic != "winograd"

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.settings.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM for the length of a block; the loop stops between two steps."""

        def note(signum: int, frame: object) -> None:
            self.signum = signum

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        # Agreeing makes every process wait, so on fast devices it is done now and then.
        if distributed.world() > 1 and (self.device.type == "cpu" or self.step % 10 == 0):
            self.signum = max(distributed.gather(self.signum))
        elif distributed.world() > 1:
            return
        if self.signum:
            self.save()
            raise Interrupted(
                f"stopped and saved at step {self.step} of {self.settings.total_steps} in "
                f"{self.path}; the same command goes on from there",
                self.signum,
            )

    # --- what is shown ---

    @contextlib.contextmanager
    def _logging(self, resumed: bool) -> Iterator[object]:
        """A TensorBoard writer in the main process, None elsewhere."""
        if not distributed.is_main():
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter

        for name in ("train.jsonl", "train_eval.jsonl"):
            log = self.logdir / name
            # What a killed run logged after its last checkpoint happens again.
            kept = [r for r in read_jsonl(log) if resumed and r["step"] <= self.step]
            if log.exists() or name == "train.jsonl":
                write_jsonl(log, kept)
        writer = SummaryWriter(str(self.logdir), purge_step=self.step + 1 if resumed else None)
        try:
            yield writer
        finally:
            writer.close()

    def _log(self, writer: object, bar: tqdm, rate: float) -> None:
        """Write the mean loss of each width since the last time."""
        self._check_finite()
        losses = {f"{w:g}": float(torch.stack(v).mean()) for w, v in sorted(self._sums.items())}
        self._sums.clear()
        if distributed.world() > 1:
            everyone = distributed.gather(losses)
            losses = {w: sum(each[w] for each in everyone) / len(everyone) for w in losses}
        if writer is None:
            return
        lr = self.sched.get_last_lr()[0]
        record = {"step": self.step, "loss": losses, "grad_norm": float(self.norm), "lr": lr}
        append_jsonl(self.logdir / "train.jsonl", record | {"images_per_second": round(rate, 2)})
        for width, value in losses.items():
            writer.add_scalar(f"loss/width_{width}", value, self.step)
        writer.add_scalar("grad_norm", float(self.norm), self.step)
        writer.add_scalar("lr", lr, self.step)
        writer.add_scalar("images_per_second", rate, self.step)
        bar.set_postfix({w: f"{value:.4f}" for w, value in losses.items()})

    def _show(self, writer: object) -> None:
        """Samples of the EMA network from x_T, really at each shown width; each process draws some
        of the images."""
        count = len(self.x_T)
        mine = torch.arange(count).tensor_split(distributed.world())[distributed.rank()]
        condition, columns = None, 0
        if self.classes:
            condition, columns = self.classes.rows(count, self.device)
            condition = replace(condition, labels=condition.labels[mine.to(self.device)])
        networks = sampling_networks(self.ema.model, self.settings.shown_widths())
        for width, network in networks.items():
            images = self._drawn(width, network, mine, condition) if len(mine) else None
            everyone = distributed.gather(images)
            if writer is None:
                continue
            images = torch.cat([part for part in everyone if part is not None])
            grid = save_grid(self._grid(width), images, columns)
            writer.add_image(f"sample/width_{width:g}", grid, self.step)

    def _grid(self, width: float) -> Path:
        return self.logdir / "sample" / f"{self.step}_width_{width:g}.png"

    def _drawn(
        self, width: float, network: nn.Module, mine: Tensor, condition: Condition | None
    ) -> Tensor:
        """The images of x_T with these indices, uint8 on the CPU."""
        T, places = self.noise_schedule.T, mine.to(self.device)
        denoise = StepAwareDenoiser({width: network}, [width] * T, T, self.device)
        denoise.condition = condition
        noise = rng.ImageNoise(self.settings.seed, rng.SAMPLING, places, self.image_shape)
        with torch.inference_mode():
            x_0 = self.sampler(
                denoise, self.x_T[mine].to(self.device), self.noise_schedule, noise,
                observe=lambda t, x: self._give_way(),
            )  # fmt: skip
            return self.to_images(x_0).cpu()

    def _give_way(self) -> None:
        """Leave a long chain of samples when asked to stop; going on begins with it (`_owed`)."""
        if self.signum and distributed.world() == 1:
            self._stop_if_asked()

    def _evaluate(self, writer: object) -> None:
        for width in distributed.gather(self._unscored())[0]:
            scores = self.evaluate(self.ema.model, width, self._give_way)
            if writer is None:
                continue
            record = {"step": self.step, "width": width, "scores": scores}
            append_jsonl(self.logdir / "train_eval.jsonl", record)
            for name, value in scores.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{name}/width_{width:g}", value, self.step)

    def _unscored(self) -> list[float]:
        """The widths whose scores at this step are not in the log."""
        known = read_jsonl(self.logdir / "train_eval.jsonl")
        scored = {record["width"] for record in known if record["step"] == self.step}
        return [width for width in self.settings.shown_widths() if width not in scored]


def _mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    state = np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0]) >> 1
