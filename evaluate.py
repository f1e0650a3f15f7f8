"""From a schedule to scores: sample images, encode them, compare them with the data's statistics.

What eval prints and what search calls its fitness come from here. This file knows candidate
networks, chains and encoders; it does not know flags, nor how schedules are found.

All schedules are scored on the same noise, so chains that agree from the start down to some
timestep have the same x there. With a memory budget such states are kept and a chain starts where
it parts from what was seen; the images are bit for bit those of a chain run from the start.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dataset as data
import diffusion
import score
from model import StepAwareDenoiser, WidthSchedule, entries_for_calls
from runtime import processes as distributed
from runtime.files import Unfinished
from sampling import noise as rng
from sampling.conditioning import Classes

Schedule = WidthSchedule | Sequence[Hashable]


@dataclass(frozen=True)
class Scores:
    """What a schedule's images are worth.

    distance: Fréchet distance to the data in the features of `encoder`; `label` is its name in
    full. inception_score: mean and standard deviation over splits, None where the encoder has no
    classifier. passes: network passes (images × steps) that were run; passes_saved: those that
    shared states made unnecessary. sampling_seconds: time in the sampler, all processes together;
    decoding_seconds: the same of making images of what the sampler made.
    """

    label: str
    encoder: str
    distance: float
    inception_score: tuple[float, float] | None
    images: int
    passes: int
    passes_saved: int
    sampling_seconds: float
    decoding_seconds: float = 0.0


@dataclass
class _Chain:
    """The timesteps that a schedule's chain visits, falling, and the networks of each step.

    Its state at position p is x just before the network runs at steps[p]. It depends on what ran
    before and on steps[p] alone, which `key` holds.
    """

    steps: list[int]
    networks: list[tuple[Hashable, ...]]  # one for each call that the step makes

    @classmethod
    def of(
        cls, schedule: Schedule, sampler: diffusion.Sampler, noise_schedule: diffusion.Schedule
    ) -> _Chain:
        steps = sampler.timesteps(noise_schedule)[::-1]
        if sampler.skips:
            steps = [t for t in steps if schedule[t] != 0]
        calls = sampler.evaluations(noise_schedule, steps)
        networks: dict[int, list[Hashable]] = {t: [] for t in steps}
        for (step, _), t in zip(calls, entries_for_calls(schedule, calls), strict=True):
            networks[step].append(schedule[t])
        return cls(steps, [tuple(networks[t]) for t in steps])

    def calls(self, start: int) -> int:
        """How often a network is called from position `start` on."""
        return sum(map(len, self.networks[start:]))

    def key(self, position: int) -> tuple:
        before = zip(self.steps[:position], self.networks[:position], strict=True)
        return (*before, self.steps[position])

    def shared(self, other: _Chain) -> int:
        """The last position where both chains have the same state."""
        position = 0
        mine = zip(self.steps, self.networks, strict=True)
        for here, there in zip(mine, zip(other.steps, other.networks, strict=True), strict=False):
            if here[0] != there[0]:
                return max(0, position - 1)
            if here[1] != there[1]:
                return position
            position += 1
        return max(0, position - 1)


@dataclass
class _Tally:
    """What the images so far come to, of one process.

    first: batches of the images that are kept, by their first index. seconds: of sampling and of
    decoding before this process began.
    """

    moments: score.Moments
    inception: score.InceptionScore
    classified: bool = False
    first: list[tuple[int, Tensor]] = field(default_factory=list)
    batches: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)

    def state(self) -> dict[str, object]:
        """What a file keeps."""
        return dict(vars(self), moments=self.moments.state(), inception=self.inception.state())

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> _Tally:
        """The inverse of `state`."""
        return cls(
            **dict(
                state,
                moments=score.Moments.from_state(state["moments"]),
                inception=score.InceptionScore.from_state(state["inception"]),
                first=[(index, images.cpu()) for index, images in state["first"]],
            )
        )


@dataclass
class SharedStates:
    """x at chosen positions of the chains scored so far, within `budget` bytes.

    device: where states are kept, None for where they arise. When memory runs out, the state that
    was not used for longest goes first, and those that a chain of the running call will start
    from (`planned`) go last.
    """

    budget: int
    device: torch.device | None = None
    planned: set[tuple] = field(default_factory=set)
    whose: Hashable = None
    _states: OrderedDict[tuple, dict[int, Tensor]] = field(default_factory=OrderedDict)

    def belong_to(self, whose: Hashable) -> None:
        """Forget states that are of other images, or of another sampler's chain, than `whose`."""
        if whose != self.whose:
            self._states.clear()
        self.whose = whose

    def deepest(self, chain: _Chain) -> int:
        """The last position of `chain` whose state is known; 0 where none is."""
        known = {key[-1] for key in self._states}
        for position in reversed(range(1, len(chain.steps))):
            if chain.steps[position] in known and (key := chain.key(position)) in self._states:
                self._states.move_to_end(key)
                return position
        return 0

    def reserve(self, chain: _Chain, start: int, branches: set[int], state_bytes: int) -> set[int]:
        """Make room; returns the positions after `start` whose states are to be kept.

        These are the `branches`, where chains of the running call will start, and, as far as there
        is room, 16 even positions, where the next generation's chains may.
        """
        capacity = self.budget // state_bytes
        in_use = {chain.key(start)} if start else set()
        room = capacity - len(in_use)
        kept = [p for p in sorted(branches) if p > start][: max(0, room)]
        self.planned |= {chain.key(p) for p in kept}
        room -= len(kept) + len(self.planned & self._states.keys() - in_use)
        every = max(1, len(chain.steps) // 16)
        even = [p for p in range(every, len(chain.steps), every) if p > start and p not in branches]
        kept += even[: max(0, room)]
        for planned in (False, True):
            for key in [k for k in self._states if (k in self.planned) == planned]:
                if len(self._states) + len(kept) <= capacity:
                    return set(kept)
                if key not in in_use:
                    del self._states[key]
        return set(kept)

    def get(self, key: tuple, batch: int, device: torch.device) -> Tensor:
        return self._states[key][batch].to(device)

    def put(self, key: tuple, batch: int, x: Tensor) -> None:
        self._states.setdefault(key, {})[batch] = x.to(self.device or x.device, copy=True)


@dataclass
class Evaluator:
    """Scores width schedules; built once, used for every schedule of a run.

    networks: the candidates, each called as network(x, t). reference: of the data's features; None
    for an evaluator that only samples. stream: of the noise (see rng).
    compiled: a GPU draws noise by a compiled function. alone: this process makes all images of a
    schedule, where several processes otherwise share them. classes: which class each image is
    asked to show. to_images: what the chain made -> uint8 images, a decoder for latents. each_step:
    called at every sampling step, which it may leave by an exception.
    """

    networks: Mapping[Hashable, nn.Module]
    noise_schedule: diffusion.Schedule
    sampler: diffusion.Sampler
    encoder: score.Encoder | None
    reference: score.Gaussian | None
    image_shape: tuple[int, int, int]
    device: torch.device
    num_images: int
    batch_size: int
    seed: int = 0
    stream: int = rng.SAMPLING
    states: SharedStates | None = None
    progress: bool = True
    compiled: bool = False
    alone: bool = False
    classes: Classes | None = None
    to_images: Callable[[Tensor], Tensor] = data.to_uint8
    each_step: Callable[[], None] | None = None

    def timesteps(self) -> list[int]:
        """The timesteps that the sampler visits, rising."""
        return self.sampler.timesteps(self.noise_schedule)

    def evaluations(self) -> list[tuple[int, int]]:
        """(step, timestep shown) of each call of the network in a chain, in order."""
        return self.sampler.evaluations(self.noise_schedule)

    def _chain(self, schedule: Schedule) -> _Chain:
        return _Chain.of(schedule, self.sampler, self.noise_schedule)

    def score(
        self, schedule: Schedule, keep: int = 0, unfinished: Unfinished | None = None
    ) -> tuple[Scores, Tensor]:
        """The scores of `schedule`, and its first `keep` images, uint8 (keep, C, H, W).

        unfinished: where the work is kept now and then, and gone on from.
        """
        chain = self._chain(schedule)
        return self._score(schedule, chain, set(), keep, True, unfinished)

    def score_all(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, Scores]]:
        """(index, scores) of every schedule, in the order that shares most states; distances only.

        Several processes share the schedules where there is at least one for each, because then
        none waits for another within a chain and no batch is cut; otherwise they share the images.
        """
        chains = [self._chain(s) for s in schedules]
        order = sorted(
            range(len(chains)),
            key=lambda i: list(zip(chains[i].steps, chains[i].networks, strict=True)),
            reverse=True,
        )
        world = distributed.world()
        by_schedule = not self.alone and 1 < world <= len(order)
        if self.states is not None and not self.alone:
            images = (self.num_images, self.seed, self.stream)
            self.states.belong_to((by_schedule, images, self.sampler))
        if by_schedule:
            yield from self._score_mine(schedules, np.array_split(order, world))
            return
        shared = [0] + [chains[a].shared(chains[b]) for a, b in itertools.pairwise(order)]
        for place, index in enumerate(order):
            # Neighbours share most: a later chain starts from this one unless one between is
            # closer, so this one keeps the falling minima of what neighbours share.
            branches, least = set(), len(self.timesteps())
            for common in shared[place + 1 :]:
                if 0 < common <= least:
                    branches.add(common)
                least = min(least, common)
            yield index, self._score(schedules[index], chains[index], branches)[0]
        if self.states is not None:
            self.states.planned.clear()

    # --- how ---

    def _score_mine(
        self, schedules: Sequence[Schedule], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Scores]]:
        """(index, scores) of every schedule, where process r makes those of parts[r].

        Everybody hears of each as soon as the others have one, too. Parts are runs of the order
        that shares most states.
        """
        mine = parts[distributed.rank()]
        scored = replace(self, alone=True).score_all([schedules[i] for i in mine])
        for _ in range(max(map(len, parts))):
            found = next(scored, None)
            for each in distributed.gather(found and (int(mine[found[0]]), found[1])):
                if each is not None:
                    yield each
        next(scored, None)  # to its end, where it tidies up

    def _score(
        self,
        schedule: Schedule,
        chain: _Chain,
        branches: set[int],
        keep: int = 0,
        classify: bool = False,
        unfinished: Unfinished | None = None,
    ) -> tuple[Scores, Tensor]:
        known = unfinished.read(self.device) if unfinished else None
        tally = _Tally(score.Moments(), score.InceptionScore(self.num_images))
        if known:  # else, or where it does not fit together, from the beginning
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                tally = _Tally.from_state(known)
        before = tally.seconds
        start, wanted = self._plan(chain, branches)
        clock = _Clock(self.device)
        for indices, images in self._sample(schedule, chain, start, wanted, clock, tally.batches):
            with clock.beside(images):
                features = self.encoder(images)
                tally.moments.update(features)
                probabilities = self.encoder.class_probabilities(features) if classify else None
                if probabilities is not None:
                    tally.classified = True
                    tally.inception.update(probabilities, indices)
            if indices[0] < keep:
                tally.first.append((int(indices[0]), images[: keep - int(indices[0])].cpu()))
            tally.batches += 1
            if unfinished and unfinished.due():
                clock.join()
                tally.seconds = clock.both(before)
                unfinished.write(tally.state())
        clock.join()
        moments, inception, classified = tally.moments, tally.inception, tally.classified
        first, seconds = tally.first, clock.both(before)
        together = distributed.world() > 1 and not self.alone
        if together:
            moments, inception, first, seconds = _together(moments, inception, first, seconds)
            classified = inception.count > 0
        distance = math.nan
        if distributed.is_main() or not together:
            distance = self.reference.distance(moments.mean, moments.covariance)
        if together:
            # One process computes it: machines may round differently, and all have to agree.
            distance = distributed.gather(distance)[0]
        passes = self.num_images * (self.classes.passes if self.classes else 1)
        scores = Scores(
            label=self.encoder.label,
            encoder=self.encoder.name,
            distance=distance,
            inception_score=inception.result() if classified else None,
            images=self.num_images,
            passes=passes * chain.calls(start),
            passes_saved=passes * (chain.calls(0) - chain.calls(start)),
            sampling_seconds=seconds[0],
            decoding_seconds=seconds[1],
        )
        kept = [images for _, images in sorted(first, key=lambda pair: pair[0])]
        return scores, torch.cat(kept) if kept else torch.empty(0, *self.image_shape).byte()

    def sample(self, schedule: Schedule, count: int) -> Tensor:
        """The first `count` images of `schedule`, uint8 (count, C, H, W), in every process."""
        some = replace(self, num_images=count, states=None)
        chain = self._chain(schedule)
        parts = some._sample(schedule, chain, 0, set(), _Clock(self.device))
        mine = [(int(indices[0]), images.cpu()) for indices, images in parts]
        everyone = [part for parts in distributed.gather(mine) for part in parts]
        return torch.cat([images for _, images in sorted(everyone, key=lambda part: part[0])])

    def _mine(self) -> list[tuple[int, int]]:
        """This process's batches of images, as (first, one past the last)."""
        starts = range(0, self.num_images, self.batch_size)
        rank, world = (0, 1) if self.alone else (distributed.rank(), distributed.world())
        mine = list(starts)[rank::world]
        return [(i, min(i + self.batch_size, self.num_images)) for i in mine]

    def _plan(self, chain: _Chain, branches: set[int]) -> tuple[int, set[int]]:
        """The position where the chain starts, and those whose states it keeps."""
        mine = self._mine()
        if self.states is None or not mine or not self.sampler.restartable:
            return 0, set()
        start = self.states.deepest(chain)
        images = sum(end - first for first, end in mine)
        state_bytes = 4 * images * int(np.prod(self.image_shape))
        return start, self.states.reserve(chain, start, branches, state_bytes)

    def _sample(
        self,
        schedule: Schedule,
        chain: _Chain,
        start: int,
        wanted: set[int],
        clock: _Clock,
        made: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the chain from position `start`, keeping the states at the `wanted` positions, for
        all batches but the first `made`."""
        T = self.noise_schedule.T
        denoise = StepAwareDenoiser(self.networks, schedule, T, self.device)
        keys = {chain.steps[p]: chain.key(p) for p in wanted}
        mine = self._mine()
        compiled = self.compiled and self.device.type == "cuda"
        steps = len(chain.steps) - start
        with self._bar(len(mine) * steps, made * steps) as bar:
            for first, end in mine[made:]:
                indices = torch.arange(first, end, device=self.device)
                noise = rng.ImageNoise(self.seed, self.stream, indices, self.image_shape, compiled)
                denoise.condition = self.classes.condition(indices) if self.classes else None

                def observe(t: int, x: Tensor, batch: int = first) -> None:
                    bar.update()
                    if self.each_step:
                        self.each_step()
                    if t in keys:
                        self.states.put(keys[t], batch, x)

                with clock.running("sampling"), torch.inference_mode():
                    if start:
                        x = self.states.get(chain.key(start), first, self.device)
                    else:
                        x = noise.initial()
                    x_0 = self.sampler(
                        denoise, x, self.noise_schedule, noise, chain.steps, observe, start
                    )
                with clock.running("decoding"), torch.inference_mode():
                    images = self.to_images(x_0)
                yield indices.cpu(), images

    def _bar(self, steps: int, made: int) -> tqdm:
        return tqdm(
            total=steps,
            initial=made,
            desc="sample",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not (self.progress and distributed.is_main()),
        )


class _Clock:
    """Time in the sampler, and a second queue of device work so that scoring runs beside it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self.cuda else None
        self._spans: dict[str, list[tuple]] = defaultdict(list)

    @contextlib.contextmanager
    def running(self, what: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[what].append((start, self._now()))

    def _now(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def beside(self, images: Tensor) -> Iterator[None]:
        """On a GPU, do the block's work while the next batch is sampled."""
        if not self.cuda:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(images.device))
        images.record_stream(self._side)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        if self.cuda:
            self._side.synchronize()

    def seconds(self, what: str) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self._spans[what])
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) / 1000 for start, end in self._spans[what])

    def both(self, before: tuple[float, float]) -> tuple[float, float]:
        """Seconds of sampling and of decoding, with those `before`."""
        return before[0] + self.seconds("sampling"), before[1] + self.seconds("decoding")


def _together(
    moments: score.Moments,
    inception: score.InceptionScore,
    first: list[tuple[int, Tensor]],
    seconds: tuple[float, float],
) -> tuple[score.Moments, score.InceptionScore, list[tuple[int, Tensor]], tuple[float, ...]]:
    """The same for all processes' images; merged in the order of ranks, so all get the same."""
    state = {name: value.cpu() for name, value in moments.state().items()}
    everyone = distributed.gather((state, inception, first, seconds))
    moments = score.Moments()
    inception = score.InceptionScore(inception.total)
    for theirs, scores, _, _ in everyone:
        moments.merge(score.Moments.from_state(theirs))
        inception.merge(scores)
    images = [pair for _, _, pairs, _ in everyone for pair in pairs]
    return moments, inception, images, tuple(map(sum, zip(*(s for *_, s in everyone), strict=True)))
