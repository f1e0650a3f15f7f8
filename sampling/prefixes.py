"""Chains that begin alike: which states they share, and the states themselves.

All schedules of a run are tried on the same noise, so chains that agree from the start down to some
timestep have the same x there. With a memory budget such states are kept and a chain starts where
it parts from what was seen; its images are bit for bit those of a chain run from the start.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.schedule import WidthSchedule, entries_for_calls
from sampling.protocol import Sampler, timesteps

StepSchedule = WidthSchedule | Sequence[Hashable]  # a candidate's name for each timestep


@dataclass
class Chain:
    """The timesteps that a schedule's chain visits, falling, and the networks of each step.

    Its state at position p is x just before the network runs at steps[p]. It depends on what ran
    before and on steps[p] alone, which `key` holds.
    """

    steps: list[int]
    networks: list[tuple[Hashable, ...]]  # one for each call that the step makes

    @classmethod
    def of(cls, schedule: StepSchedule, sampler: Sampler) -> Chain:
        steps = timesteps(sampler)[::-1]
        if sampler.skips:
            steps = [t for t in steps if schedule[t] != 0]
        calls = sampler.calls(steps)
        networks: dict[int, list[Hashable]] = {t: [] for t in steps}
        for call, t in zip(calls, entries_for_calls(schedule, calls), strict=True):
            networks[call.step].append(schedule[t])
        return cls(steps, [tuple(networks[t]) for t in steps])

    def calls(self, start: int) -> int:
        """How often a network is called from position `start` on."""
        return sum(map(len, self.networks[start:]))

    def key(self, position: int) -> tuple:
        before = zip(self.steps[:position], self.networks[:position], strict=True)
        return (*before, self.steps[position])

    def order(self) -> list[tuple[int, tuple[Hashable, ...]]]:
        """What chains are sorted by so that neighbours share most."""
        return list(zip(self.steps, self.networks, strict=True))

    def shared(self, other: Chain) -> int:
        """The last position where both chains have the same state."""
        pairs = zip(self.order(), other.order(), strict=False)
        for position, ((step, networks), (other_step, other_networks)) in enumerate(pairs):
            if step != other_step:
                return max(0, position - 1)
            if networks != other_networks:
                return position
        return max(0, min(len(self.steps), len(other.steps)) - 1)


class Reuse(NamedTuple):
    """The position at which a chain starts, and those whose states it keeps for other chains."""

    start: int = 0
    kept: frozenset[int] = frozenset()


ALL = Reuse()  # every step, for no other chain


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
    owner: Hashable = None
    _states: OrderedDict[tuple, dict[int, Tensor]] = field(default_factory=OrderedDict)

    def belong_to(self, owner: Hashable) -> None:
        """Forget states that are of other images, or of another sampler's chain, than `owner`'s."""
        if owner != self.owner:
            self._states.clear()
        self.owner = owner

    def deepest(self, chain: Chain) -> int:
        """The last position of `chain` whose state is known; 0 where none is."""
        known = {key[-1] for key in self._states}
        for position in reversed(range(1, len(chain.steps))):
            if chain.steps[position] in known and (key := chain.key(position)) in self._states:
                self._states.move_to_end(key)
                return position
        return 0

    def reserve(
        self, chain: Chain, start: int, branches: set[int], state_bytes: int
    ) -> frozenset[int]:
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
                    return frozenset(kept)
                if key not in in_use:
                    del self._states[key]
        return frozenset(kept)

    def get(self, key: tuple, batch: int, device: torch.device) -> Tensor:
        return self._states[key][batch].to(device)

    def put(self, key: tuple, batch: int, x: Tensor) -> None:
        self._states.setdefault(key, {})[batch] = x.to(self.device or x.device, copy=True)

    def forget(self, keys: Iterable[tuple]) -> None:
        """Drop the states of these keys, where there are any."""
        for key in keys:
            self._states.pop(key, None)


def by_shared_states(chains: Sequence[Chain]) -> tuple[list[int], list[set[int]]]:
    """The order in which chains share most, and for each place in it the positions whose states
    later chains will start from."""
    order = sorted(range(len(chains)), key=lambda i: chains[i].order(), reverse=True)
    shared = [0] + [chains[a].shared(chains[b]) for a, b in itertools.pairwise(order)]
    branches = []
    for place, index in enumerate(order):
        # Neighbours share most: a later chain starts from this one unless one between is closer,
        # so this one keeps the falling minima of what neighbours share.
        kept, least = set(), len(chains[index].steps)
        for common in shared[place + 1 :]:
            if 0 < common <= least:
                kept.add(common)
            least = min(least, common)
        branches.append(kept)
    return order, branches
