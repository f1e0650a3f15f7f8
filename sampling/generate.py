"""From a schedule to images: the one chain that training's grids, scores, searches and --generate
run.

Image i is a function of the seed and i: not of the batch it is in, of the number of processes or
GPUs, or of where a stopped run went on. Several processes share the batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import to_uint8
from model.denoiser import StepAwareDenoiser
from runtime import memory, processes
from runtime.clock import Clock
from runtime.errors import NotFiniteError
from runtime.progress import progress
from sampling.conditioning import Classes
from sampling.noise import SAMPLING, ImageNoise
from sampling.prefixes import ALL, Chain, Reuse, SharedStates, StepSchedule
from sampling.protocol import Sampler


@dataclass
class Generator:
    """Makes images; built once for all schedules of a run.

    networks: the candidates, each called as network(x, t). image_shape: (C, H, W) of x. to_images:
    what the chain made -> uint8 images, a decoder for latents. stream: of the noise, see noise.py.
    classes: which class each image is asked to show. x_T: the initial noise of the first images,
    (N, C, H, W), where it is not that of the stream. states: where chains leave x for others.
    parallel: DataParallel over the visible GPUs, each of which runs whole chains. compiled: a GPU
    draws noise by a compiled function. alone: this process makes all images. each_step: called at
    every step, which it may leave by an exception.
    """

    networks: Mapping[Hashable, nn.Module]
    sampler: Sampler
    image_shape: tuple[int, int, int]
    device: torch.device
    batch_size: int
    to_images: Callable[[Tensor], Tensor] = to_uint8
    seed: int = 0
    stream: int = SAMPLING
    classes: Classes | None = None
    x_T: Tensor | None = None
    states: SharedStates | None = None
    parallel: bool = False
    compiled: bool = False
    progress: bool = True
    alone: bool = False
    each_step: Callable[[], None] | None = None

    def shares(self, count: int) -> list[tuple[int, int]]:
        """This process's batches of `count` images, as (first, one past the last)."""
        rank, world = (0, 1) if self.alone else (processes.rank(), processes.world())
        starts = range(0, count, self.batch_size)[rank::world]
        memory.require(128 * len(starts), f"--num_images={count}", "lower it")
        return [(i, min(i + self.batch_size, count)) for i in starts]

    def reuse(self, chain: Chain, branches: set[int], count: int) -> Reuse:
        """What `chain` can take from kept states, and should keep itself; `branches` are positions
        where other chains will start."""
        shares = self.shares(count)
        if self.states is None or not shares or not self.sampler.resumes:
            return ALL
        start = self.states.deepest(chain)
        images = sum(end - first for first, end in shares)
        state_bytes = 4 * images * torch.Size(self.image_shape).numel()
        return Reuse(start, self.states.reserve(chain, start, branches, state_bytes))

    @contextlib.contextmanager
    def keeping(self, chain: Chain, reuse: Reuse) -> Iterator[None]:
        """A block that makes `chain`; where it ends by an exception, what it kept is forgotten,
        because some batches are missing."""
        try:
            yield
        except BaseException:
            if self.states is not None:
                self.states.forget(map(chain.key, reuse.kept))
            raise

    def batches(
        self,
        schedule: StepSchedule,
        shares: Sequence[tuple[int, int]],
        made: int = 0,
        reuse: Reuse = ALL,
        clock: Clock | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, images) of the batches in `shares`, some of what that method returns; images
        uint8.

        made: how many others were made before, for the bar. reuse: what that method returned.
        Raises NotFiniteError.
        """
        clock = clock or Clock(self.device)
        chain = Chain.of(schedule, self.sampler)
        steps = len(chain.steps) - reuse.start
        bar = progress(
            (made + len(shares)) * steps, "sample", "step", initial=made * steps, leave=False,
            disable=not self.progress,
        )  # fmt: skip
        with bar:
            run: nn.Module = _RunChain(self, schedule, chain, reuse, bar)
            if self.parallel:
                run = nn.DataParallel(run)
            for first, end in shares:
                indices = torch.arange(first, end, device=self.device)
                with clock.running("sampling"), torch.inference_mode():
                    x_0 = run(indices)
                if not bool(x_0.isfinite().all()):
                    raise self._not_finite(schedule, chain, indices)
                limit = self.sampler.limit
                with clock.running("decoding"), torch.inference_mode():
                    images = self.to_images(x_0.clamp(-limit, limit))
                yield indices.cpu(), images

    def images(self, schedule: StepSchedule, count: int) -> Tensor:
        """The first `count` images, uint8 (count, C, H, W) on the CPU, in every process.

        Raises NotFiniteError, in every process, too.
        """
        unshared, own, failure = replace(self, states=None), [], None
        try:
            for indices, images in unshared.batches(schedule, unshared.shares(count)):
                own.append((int(indices[0]), images.cpu()))
        except NotFiniteError as error:
            failure = error
        processes.raise_first(failure)
        parts = [part for parts in processes.gather(own) for part in parts]
        return torch.cat([images for _, images in sorted(parts, key=lambda part: part[0])])

    def _not_finite(self, schedule: StepSchedule, chain: Chain, indices: Tensor) -> NotFiniteError:
        """What to say of such a batch; it is run once more to find the call that is to blame."""

        def check(name: Hashable) -> Callable:
            def hook(network: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                if not bool(output.isfinite().all()):
                    arithmetic = getattr(network, "arithmetic", "float32")
                    raise NotFiniteError(
                        f"the network at width {name} makes numbers that are not finite at "
                        f"timestep {int(arguments[1][0])} in {arithmetic}: use --amp=none or "
                        "--amp=bf16, or another checkpoint or sampler"
                    )

            return hook

        hooks = [net.register_forward_hook(check(name)) for name, net in self.networks.items()]
        try:
            with torch.inference_mode():
                _RunChain(replace(self, states=None), schedule, chain, ALL, None)(indices)
        except NotFiniteError as error:
            return error
        finally:
            for hook in hooks:
                hook.remove()
        return NotFiniteError(
            f"--sampler={self.sampler.settings.sampler} makes numbers that are not finite, though "
            "the network's are: use more steps, or another sampler"
        )


class _RunChain(nn.Module):
    """indices (B,) -> x_0 (B, C, H, W), on whichever device the indices are: what DataParallel
    wraps, so that weights travel once per batch and not once per step."""

    def __init__(
        self,
        generator: Generator,
        schedule: StepSchedule,
        chain: Chain,
        reuse: Reuse,
        bar: tqdm | None,
    ) -> None:
        super().__init__()
        self.generator, self.schedule, self.chain = generator, schedule, chain
        self.start, self.bar = reuse.start, bar
        self.kept = {chain.steps[p]: chain.key(p) for p in reuse.kept}
        self.names = list(generator.networks)
        self.networks = nn.ModuleList(generator.networks.values())

    def forward(self, indices: Tensor) -> Tensor:
        g, device, first = self.generator, indices.device, int(indices[0])
        networks = dict(zip(self.names, self.networks, strict=True))  # a replica has its own
        condition = g.classes.condition(indices) if g.classes else None
        denoise = StepAwareDenoiser(networks, self.schedule, g.sampler.levels.T, device, condition)
        compiled = g.compiled and device.type == "cuda"
        noise = ImageNoise(g.seed, g.stream, indices, g.image_shape, compiled)
        counts = first % g.batch_size == 0  # of several replicas, the first moves the bar

        def observe(t: int, x: Tensor) -> None:
            if self.bar is not None and counts:
                self.bar.update()
            if g.each_step:
                g.each_step()
            if t in self.kept:
                g.states.put(self.kept[t], first, x)

        if self.start:
            x = g.states.get(self.chain.key(self.start), first, device)
        elif g.x_T is not None:
            x = g.x_T[indices.to(g.x_T.device)].to(device)
        else:
            x = noise.initial()
        return g.sampler.sample(denoise, x, noise, self.chain.steps, observe, self.start)
