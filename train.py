"""The training loop: sandwich rule, EMA, checkpoints, resume.

Gets settings, a network and images; knows no flags and no data set by name. What is shown of a run
(grids, scores, logs) is called from outside it. Everything random in step n (the batch, the
timesteps, the noise, the widths, dropout) is a function of (seed, n), so a run that was stopped and
resumed makes the very steps that it would have made.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dataset
from diffusion import NoiseLevels
from model import EMA, InBfloat16, checkpoint, compile_network, ready_to_train
from runtime import memory, processes
from runtime.errors import UserError
from runtime.identity import agree
from runtime.progress import progress
from sampling.noise import SAMPLING, TRAINING, ImageNoise, normal
from settings import RunSettings, TrainSettings, WidthSettings

# What --allow_changes lets differ where training goes on from a checkpoint.
CHANGEABLE = ("lr", "warmup", "batch_size", "ema_decay", "amp", "grad_clip")
# Share of the averaged weights that may still be the first ones at the end: untrained, or trained.
FIRST = (0.01, 0.5)


class Interrupted(Exception):  # noqa: N818 - it is a state of affairs, not an error
    """The run was asked to stop and has saved itself."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True)
class Milestone:
    """What happens after some steps of a run: a grid, a score.

    every: steps from one to the next; 0 for never. last: whether the last step has one, too. make:
    does it. made: whether its results for a step are there already.
    """

    every: int
    last: bool
    make: Callable[[], None]
    made: Callable[[int], bool]

    def due(self, step: int, total: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or (self.last and step == total))


@dataclass
class Trainer:
    """One training run in one folder.

    identity: every setting that the result depends on, kept in the checkpoint; a resumed run must
    agree with it. null_class: the label that stands for no class, in a class-conditional network.
    schedule: a width for each of T timesteps, each of which is then trained at its own width only.
    choose_arithmetic: called once in a run's life. log(record): gets the losses since the last
    record, every log_step steps.
    """

    settings: TrainSettings
    run: RunSettings
    widths: WidthSettings
    net: nn.Module
    data: dataset.AnySet
    levels: NoiseLevels
    mean_type: str
    image_shape: tuple[int, int, int]
    device: torch.device
    identity: Mapping[str, object]
    choose_arithmetic: Callable[[], str] = lambda: "float32"
    null_class: int | None = None
    schedule: Sequence[float] | None = None
    parallel: bool = False
    log: Callable[[Mapping[str, object]], None] = lambda record: None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        s = self.settings
        if self.device.type == "cpu":
            # Weights, their mean, gradients and two moments.
            size = 20 * sum(p.numel() for p in self.net.parameters())
            memory.require(size, "training this network", "lower --ch or --num_res_blocks")
        pixels = 4 * math.prod(self.image_shape)
        memory.require(s.sample_size * pixels, f"--sample_size={s.sample_size}", "lower it")
        self.net = self.net.to(self.device, memory_format=torch.channels_last).train()
        self.ema = EMA(self.net, s.ema_decay)
        # The frozen time table is among the parameters, as in released optimizer states.
        self.optim = torch.optim.Adam(self.net.parameters(), lr=s.lr, fused=True)
        self.sched = torch.optim.lr_scheduler.LambdaLR(
            self.optim, lambda step: min(step, s.warmup) / s.warmup if s.warmup else 1.0
        )
        images = torch.arange(s.sample_size)
        self.x_T = ImageNoise(self.run.seed, SAMPLING, images, self.image_shape).initial()
        self.path = Path(self.run.logdir) / f"{self.run.ckpt_name}.pt"
        self.grad_norm, self.rate = torch.zeros(()), 0.0  # of the last step
        self.arithmetic = ""
        self._signum = 0
        self._losses: dict[float, list[Tensor]] = defaultdict(list)

    def warnings(self) -> list[str]:
        """What is odd about how long the run is, and what it trains."""
        s, lines = self.settings, []
        if self.widths.slimmable and not s.sandwich and self.schedule is None:
            lines.append("--slimmable_unet without --sandwich trains width 1 alone")
        if s.warmup >= s.total_steps:
            lines.append(
                f"--warmup={s.warmup}: the learning rate never reaches --lr in --total_steps="
                f"{s.total_steps}"
            )
        share, trained = s.ema_decay**s.total_steps, bool(s.init_checkpoint or s.init_diffusers)
        if share > FIRST[trained]:
            lines.append(
                f"--ema_decay={s.ema_decay}: after --total_steps={s.total_steps} the averaged "
                f"weights, which make the images, are still {100 * share:.0f} % those of the start"
            )
        return lines

    # --- state ---

    def resume(self, state: Mapping[str, object]) -> dict[str, tuple[object, object]]:
        """Go on from a checkpoint's state. Returns what --allow_changes let change: name ->
        (value there, value here)."""
        stored, changed = checkpoint.settings(state), {}
        if self.settings.allow_changes:
            changed = {
                name: (stored[name], self.identity[name])
                for name in CHANGEABLE
                if name in stored and stored[name] != self.identity[name]
            }
        remedy = "use the same ones to continue it, or another --logdir to start anew"
        if not self.settings.allow_changes:
            remedy += f"; --allow_changes lets {', '.join(CHANGEABLE)} differ"
        # The VAE's folder may move; its fingerprint is another setting.
        agree(self.path, stored, self.identity, remedy, ignore=["latent_vae", "content", *changed])
        checkpoint.fill(self.net, state["net_model"], self.path)
        checkpoint.fill(self.ema.model, state["ema_model"], self.path)
        checkpoint.load_optimizer(self.optim, state.get("optim"), self.path)
        rate = checkpoint.load_scheduler(self.sched, state.get("sched"), self.path)
        self.step = int(state.get("step", self.sched.last_epoch))
        self.arithmetic = "" if "amp" in changed else str(state.get("arithmetic", ""))
        if self.arithmetic == "winograd" and self.device.type != "cpu":
            self.arithmetic = "float32"  # which it is off CPUs
        x_T = state.get("x_T", self.x_T)
        if getattr(x_T, "shape", None) == self.x_T.shape:  # else of another --sample_size
            checkpoint.check_tensor(x_T, self.x_T, f"{self.path}: x_T")
            self.x_T = x_T
        if "lr" not in stored:  # in a released file its optimizer's state alone says it
            if self.settings.allow_changes and rate != self.settings.lr:
                changed["lr"] = (rate, self.settings.lr)
            else:
                agree(self.path, {"lr": rate}, {"lr": self.settings.lr}, remedy)
        return changed

    def save(self, numbered: bool = False) -> None:
        """Write CKPT_NAME.pt and, where `numbered`, keep it as CKPT_NAME_STEP.pt too."""
        self._check_finite()
        if not processes.is_main():
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
            checkpoint.keep(self.path, self.numbered(self.step))

    def numbered(self, step: int) -> Path:
        """Where the checkpoint of that step is kept."""
        return self.path.with_name(f"{self.path.stem}_{step}.pt")

    def _check_finite(self) -> None:
        """Refuse to go on from, or to save, weights that a bad step has spoilt.

        A loss that is not finite makes such a gradient, in this and in every later step.
        """
        if not bool(self.grad_norm.isfinite()):
            raise UserError(
                f"the loss or its gradient is not finite at step {self.step}: give the same "
                f"command with --allow_changes and a lower --lr (it is {self.settings.lr:g}); it "
                f"goes on from {self.path}, or anew where there is none"
            )

    # --- one step ---

    def widths_of(self, step: int) -> list[float]:
        """The widths that step number `step` trains: 1, the smallest, and some drawn between; or
        one of the schedule's, each as often as its timesteps are drawn."""
        if self.schedule is not None:
            generator, width = torch.Generator().manual_seed(_mix(self.run.seed, step, -3)), 0.0
            while not width:  # a step that is left out needs no training
                width = self.schedule[int(self.levels.sample_timesteps(1, generator))]
            return [width]
        if not self.settings.sandwich:
            return [1.0]
        count, between = self.settings.num_sandwich_sampling - 2, self.widths.candidate_width
        choice = np.random.default_rng([self.run.seed, step]).choice(
            between, count, replace=count > len(between)
        )
        return [1.0, self.widths.min_width, *map(float, choice)]

    def _timesteps(self, width: float, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train `width` at, (count,) long: any, or the schedule's of that width."""
        t = self.levels.sample_timesteps(count, generator)
        if self.schedule is not None:
            own = torch.tensor(self.schedule) == torch.tensor(width)
            while len(others := (~own[t]).nonzero().squeeze(1)):
                t[others] = self.levels.sample_timesteps(len(others), generator)
        return t

    def train_step(self, network: nn.Module, x_0: Tensor, labels: Tensor | None = None) -> None:
        """One update on a batch; labels (B,) where the network has classes. `network` wraps
        self.net."""
        s, rank, world = self.settings, processes.rank(), processes.world()
        # Dropout's. On a CPU every process draws all masks, see model/cpu.
        together = self.device.type == "cpu" and not self._compiles()
        torch.manual_seed(_mix(self.run.seed, self.step, 0 if together else rank))
        share = processes.share(len(x_0) * world)
        places = torch.arange(share.start, share.stop, device=self.device)
        generator = torch.Generator().manual_seed(_mix(self.run.seed, self.step, -1))
        widths = self.widths_of(self.step)
        told = ()
        if self.null_class is not None:
            told = (self._dropped(labels, share, len(x_0) * world),)
        for i, width in enumerate(widths):
            t = self._timesteps(width, len(x_0) * world, generator)[share]
            t = t.to(self.device, non_blocking=True)
            noise = normal(self.run.seed, TRAINING + i, places, self.step, self.image_shape)
            x_t, target = self.levels.training_pair(x_0, t, noise, self.mean_type)
            # Gradients of all passes add up; several processes exchange them once.
            wait = getattr(network, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if i == len(widths) - 1 else wait():
                loss = nn.functional.mse_loss(network(x_t, t, width, *told).to(target), target)
                loss.backward()
            self._losses[width].append(loss.detach())
        self.grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), s.grad_clip)
        self.rate = self.sched.get_last_lr()[0]
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.sched.step()
        self.ema.update(self.net)
        self.step += 1

    def _dropped(self, labels: Tensor, share: slice, count: int) -> Tensor:
        """Labels (B,) on the device, some replaced by the null class: for guidance the network
        has to know what an image is like whatever its class."""
        generator = torch.Generator().manual_seed(_mix(self.run.seed, self.step, -2))
        dropped = torch.rand(count, generator=generator)[share] < self.settings.label_dropout
        return labels.where(~dropped, self.null_class).to(self.device, non_blocking=True)

    def batches(self, num_workers: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share of the images of each step from here on, and their labels."""
        return dataset.batches(
            self.data,
            self.run.batch_size,
            seed=self.run.seed,
            start_step=self.step,
            device=self.device,
            num_workers=num_workers,
            part=(processes.rank(), processes.world()),
        )

    def wrapped(self) -> nn.Module:
        """The network as `train_step` wants it: chosen arithmetic, compiled, in parallel."""
        self.arithmetic = self.arithmetic or self.choose_arithmetic()
        ready_to_train(self.net, self.arithmetic, self.device, self.run.compile)
        # Not as CUDA graphs: gradients add up over the passes, and a graph's would be overwritten.
        net = compile_network(self.net) if self._compiles() else self.net
        if self.arithmetic == "bfloat16":
            net = InBfloat16(net)
        if processes.world() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(net, device_ids=ids)
        return nn.DataParallel(net) if self.parallel else net

    def _compiles(self) -> bool:
        """Whether the steps' network is compiled; see SamplingNetwork."""
        return self.run.compile and self.arithmetic != "winograd"

    # --- the run ---

    def checkpoints(self) -> Milestone:
        """The first of a run's milestones."""
        return Milestone(
            self.settings.save_step,
            True,
            lambda: self.save(numbered=True),
            lambda step: self.numbered(step).exists(),
        )

    def owed(self, milestones: Sequence[Milestone]) -> list[Milestone]:
        """Those that are due at the step that the run goes on from, and missing, because the run
        was stopped there."""
        total = self.settings.total_steps
        missing = [
            i for i, m in enumerate(milestones) if m.due(self.step, total) and not m.made(self.step)
        ]
        return [milestones[i] for i in processes.gather(missing)[0]]

    def train(
        self, num_workers: int, milestones: Sequence[Milestone], owed: Sequence[Milestone] = ()
    ) -> None:
        """Train to total_steps. Raises Interrupted after SIGINT or SIGTERM, with all saved.

        milestones: in the order in which a step makes them. owed: of the step before.
        """
        with self._signals():
            for milestone in owed:
                milestone.make()
            if self.step < self.settings.total_steps:
                self._loop(self.wrapped(), self.batches(num_workers), milestones)

    def _loop(
        self,
        network: nn.Module,
        batches: Iterator[tuple[Tensor, Tensor | None]],
        milestones: Sequence[Milestone],
    ) -> None:
        s, total = self.settings, self.settings.total_steps
        with progress(total, "train", "step", initial=self.step) as bar:
            since, steps_since = time.perf_counter(), self.step
            for x_0, labels in batches:
                self.train_step(network, x_0, labels)
                bar.update()
                if self.step % s.log_step == 0 or self.step == total:
                    seconds = time.perf_counter() - since
                    rate = (self.step - steps_since) * self.run.batch_size / seconds
                    losses = self._record(rate)
                    bar.set_postfix({w: f"{loss:.4f}" for w, loss in losses.items()})
                    since, steps_since = time.perf_counter(), self.step
                self._stop_if_asked()
                for milestone in milestones:
                    if milestone.due(self.step, total):
                        milestone.make()
                if self.step == total:
                    return

    def _record(self, rate: float) -> dict[str, float]:
        """Log the mean loss of each width since the last time, and return it."""
        self._check_finite()
        losses = {f"{w:g}": float(torch.stack(v).mean()) for w, v in sorted(self._losses.items())}
        self._losses.clear()
        if processes.world() > 1:
            everyone = processes.gather(losses)
            losses = {w: sum(each[w] for each in everyone) / len(everyone) for w in losses}
        self.log(
            {
                "step": self.step,
                "loss": losses,
                "grad_norm": float(self.grad_norm),
                "lr": self.rate,
                "images_per_second": round(rate, 2),
            }
        )
        return losses

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM for the length of a block; the loop stops between two steps."""

        def note(signum: int, frame: object) -> None:
            self._signum = signum

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def give_way(self) -> None:
        """Leave a long chain of samples when asked to stop; going on begins with it (`owed`)."""
        if self._signum and processes.world() == 1:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        # Agreeing makes every process wait, so on fast devices it is done now and then.
        if processes.world() > 1 and (self.device.type == "cpu" or self.step % 10 == 0):
            self._signum = max(processes.gather(self._signum))
        elif processes.world() > 1:
            return
        if self._signum:
            self.save()
            raise Interrupted(
                f"stopped and saved at step {self.step} of {self.settings.total_steps} in "
                f"{self.path}; the same command goes on from there",
                self._signum,
            )


def _mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    state = np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0]) >> 1
