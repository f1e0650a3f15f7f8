"""From images to scores: encode them, and compare them with the statistics of the data.

What the eval modes print and what a search goes by come from here. This file knows encoders and
how work is shared; how images are made is the generator's matter, and flags are not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

import score
from runtime import processes
from runtime.clock import Clock
from runtime.errors import NotFiniteError
from runtime.files import Unfinished
from sampling.generate import Generator
from sampling.prefixes import Chain, Reuse, StepSchedule, by_shared_states


@dataclass(frozen=True)
class Scores:
    """Scores of one schedule's images.

    distance: Fréchet distance to the data in the features of `encoder`; `label` is its name in
    full. inception_score: mean and standard deviation over splits, None where the encoder has no
    classifier. passes: network passes (images × calls) that were run; passes_saved: those that
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
class _Partial:
    """What the images so far come to, of one process.

    first: batches of the images that are kept, by their first index. seconds: of sampling and of
    decoding, of earlier processes too.
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
    def from_state(cls, state: Mapping[str, object]) -> _Partial:
        """The inverse of `state`."""
        return cls(
            **dict(
                state,
                moments=score.Moments.from_state(state["moments"]),
                inception=score.InceptionScore.from_state(state["inception"]),
                first=[(index, images.cpu()) for index, images in state["first"]],
            )
        )

    def merged(self) -> _Partial:
        """All processes' together, in the order of ranks, so that all get the same."""
        sums = [processes.on_cpu(part.state()) for part in (self.moments, self.inception)]
        everyone = processes.gather((*sums, self.first, self.seconds))
        whole = _Partial(score.Moments(), score.InceptionScore(self.inception.total))
        for moments, inception, first, _ in everyone:
            whole.moments.merge(score.Moments.from_state(moments))
            whole.inception.merge(score.InceptionScore.from_state(inception))
            whole.first += first
        whole.classified = whole.inception.count > 0
        whole.seconds = tuple(map(sum, zip(*(part[3] for part in everyone), strict=True)))
        return whole


@dataclass
class Evaluator:
    """Scores schedules by `num_images` images of each; built once for all schedules of a run.

    reference: of the data's features.
    """

    generator: Generator
    encoder: score.Encoder
    reference: score.Gaussian
    num_images: int

    def varied(self, num_images: int | None = None, **generator: object) -> Evaluator:
        """The same with another number of images, or with a generator that differs in these."""
        return replace(
            self,
            generator=replace(self.generator, **generator),
            num_images=self.num_images if num_images is None else num_images,
        )

    def score(
        self, schedule: StepSchedule, keep: int = 0, unfinished: Unfinished | None = None
    ) -> tuple[Scores, Tensor]:
        """The scores of `schedule`, and its first `keep` images, uint8 (keep, C, H, W).

        unfinished: where the work is kept now and then, and gone on from.
        """
        return self._score(schedule, set(), keep, True, unfinished)

    def score_all(
        self, schedules: Sequence[StepSchedule]
    ) -> Iterator[tuple[int, Scores | NotFiniteError]]:
        """(index, scores) of every schedule, in the order that shares most states; distances only.
        Where a schedule's numbers are not finite, there is that error in place of scores.

        Several processes share the schedules where there is at least one for each, because then
        none waits for another within a chain and no batch is cut; otherwise they share the images.
        """
        g, world = self.generator, processes.world()
        order, branches = by_shared_states([Chain.of(s, g.sampler) for s in schedules])
        by_schedule = not g.alone and 1 < world <= len(order)
        if g.states is not None and not g.alone:
            g.states.belong_to((by_schedule, self.num_images, g.sampler, g.seed, g.stream))
        if by_schedule:
            yield from self._score_shares(schedules, np.array_split(order, world))
            return
        for index, kept in zip(order, branches, strict=True):
            try:
                result = self._score(schedules[index], kept)[0]
            except NotFiniteError as error:
                result = error
            yield index, result
        if g.states is not None:
            g.states.planned.clear()

    def _score_shares(
        self, schedules: Sequence[StepSchedule], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Scores | NotFiniteError]]:
        """(index, scores) of every schedule, where process r makes those of parts[r].

        Everybody hears of each as soon as the others have one, too. Parts are runs of the order
        that shares most states.
        """
        own = parts[processes.rank()]
        scored = self.varied(alone=True).score_all([schedules[i] for i in own])
        for _ in range(max(map(len, parts))):
            result = next(scored, None)
            for each in processes.gather(result and (int(own[result[0]]), result[1])):
                if each is not None:
                    yield each
        next(scored, None)  # to its end, where it tidies up

    def _score(
        self,
        schedule: StepSchedule,
        branches: set[int],
        keep: int = 0,
        classify: bool = False,
        unfinished: Unfinished | None = None,
    ) -> tuple[Scores, Tensor]:
        g = self.generator
        chain = Chain.of(schedule, g.sampler)
        reuse = g.reuse(chain, branches, self.num_images)
        together, failure = processes.world() > 1 and not g.alone, None
        with g.keeping(chain, reuse):
            try:
                partial = self._encode(schedule, reuse, keep, classify, unfinished)
            except NotFiniteError as error:
                failure = error
            if together:  # what one process cannot make, none has
                processes.raise_first(failure)
            if failure:
                raise failure
        if together:
            partial = partial.merged()
        distance = math.nan
        if processes.is_main() or not together:
            moments = partial.moments
            distance = self.reference.distance(moments.mean, moments.covariance)
        if together:
            # One process computes it: machines may round differently, and all have to agree.
            distance = processes.gather(distance)[0]
        passes = self.num_images * (g.classes.passes if g.classes else 1)
        scores = Scores(
            label=self.encoder.label,
            encoder=self.encoder.name,
            distance=distance,
            inception_score=partial.inception.result() if partial.classified else None,
            images=self.num_images,
            passes=passes * chain.calls(reuse.start),
            passes_saved=passes * (chain.calls(0) - chain.calls(reuse.start)),
            sampling_seconds=partial.seconds[0],
            decoding_seconds=partial.seconds[1],
        )
        first = [images for _, images in sorted(partial.first, key=lambda pair: pair[0])]
        return scores, torch.cat(first) if first else torch.empty(0, *g.image_shape).byte()

    def _encode(
        self,
        schedule: StepSchedule,
        reuse: Reuse,
        keep: int,
        classify: bool,
        unfinished: Unfinished | None,
    ) -> _Partial:
        """This process's images, made and encoded."""
        g = self.generator
        state = unfinished.read(g.device) if unfinished else None
        if state:
            partial = _Partial.from_state(state)
        else:
            partial = _Partial(score.Moments(), score.InceptionScore(self.num_images))
        before, clock = partial.seconds, Clock(g.device)

        def seconds() -> tuple[float, float]:
            clock.join()
            names = ("sampling", "decoding")
            return tuple(b + clock.seconds(n) for b, n in zip(before, names, strict=True))

        left = g.shares(self.num_images)[partial.batches :]
        made = g.batches(schedule, left, partial.batches, reuse, clock)
        for indices, images in made:
            with clock.beside(images):
                features = self.encoder(images)
                partial.moments.update(features)
                probabilities = self.encoder.class_probabilities(features) if classify else None
                if probabilities is not None:
                    partial.classified = True
                    partial.inception.update(probabilities, indices)
            if indices[0] < keep:
                partial.first.append((int(indices[0]), images[: keep - int(indices[0])].cpu()))
            partial.batches += 1
            if unfinished and unfinished.due():
                partial.seconds = seconds()
                unfinished.write(partial.state())
        partial.seconds = seconds()
        return partial
