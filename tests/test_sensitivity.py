"""--search_method=sensitivity against landscapes that are additive in the log distance."""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from test_search import COSTS, IDENTITY, WIDTHS, lines, summary

from model import WidthSchedule
from runtime.errors import UserError
from search import (
    UNUSABLE,
    Candidate,
    Genome,
    Search,
    SearchSettings,
    hypervolume,
    pareto_front,
    stages,
)
from search.additive import Belief, exact_front, settled, stakes

GENES = 8
COST_TABLE = np.array([[(COSTS[w] - 32) / GENES for w in WIDTHS]] * GENES)
EFFECTS = np.array([[2.0 ** -(gene / 2) * (1 - w) ** 2 for w in WIDTHS] for gene in range(GENES)])


class Landscape:
    """Scores with log distance Σ effects; noise depends on its number and the schedule.

    shared: deviation of what a noise adds to every schedule, in units of `noise`.
    """

    def __init__(self, noise: float = 0.0, shared: float = 2.0, limit: int = 10**9) -> None:
        self.noise, self.shared, self.limit, self.scored = noise, shared, limit, []

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, dict]]:
        for i in reversed(range(len(schedules))):
            if len(self.scored) == self.limit:
                raise KeyboardInterrupt
            widths = schedules[i].widths
            self.scored.append((noise, widths))
            own = np.random.default_rng([noise, *(int(100 * w) for w in widths)]).standard_normal()
            all_ = np.random.default_rng([noise, 7]).standard_normal()
            error = self.noise * (own + self.shared * all_)
            yield i, {"distance": true_distance(widths) * math.exp(error), "passes": 1}


def true_distance(widths: Sequence[float]) -> float:
    """A skipped step is as bad as width 0.1."""
    log = sum(2.0 ** -(gene / 2) * (1 - max(w, 0.1)) ** 2 for gene, w in enumerate(widths))
    return math.exp(log)


def make(folder: Path, score: Landscape | None = None, **changes: object) -> Search:
    extra = {k: changes.pop(k) for k in ("genome", "say", "start", "seed") if k in changes}
    settings = dict(
        search_method="sensitivity", search_objective="pareto", num_generation=10, pop_size=8
    )
    folder.mkdir(exist_ok=True)
    return Search(
        settings=SearchSettings(**{**settings, **changes}),
        score=score or Landscape(),
        costs=COSTS,
        objective=lambda d, c: d,
        folder=folder,
        identity=IDENTITY,
        images=100,
        **{"genome": Genome(WIDTHS, tuple(range(GENES)), GENES), **extra},
    )


def volume(front: Sequence[Sequence[float]]) -> float:
    """Hypervolume of schedules by their true log distances; that of the uniform widths is 0."""

    def of(schedules: Sequence[Sequence[float]]) -> float:
        points = [
            Candidate(
                WidthSchedule(w),
                math.log(true_distance(w)),
                sum(COSTS[x] for x in w) / len(w),
                0,
                {},
            )
            for w in schedules
        ]
        return hypervolume(points, (2.0, 33.0))

    least = of([(w,) * GENES for w in WIDTHS])
    return of(front) - least


BEST = [tuple(WIDTHS[i] for i in row) for row in exact_front(EFFECTS, COST_TABLE)]


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_front_is_that_of_all_schedules(seed: int) -> None:
    random = np.random.default_rng(seed)
    effects = np.append(random.random((4, 3)).round(1), np.zeros((4, 1)), 1)
    effects[0, 1] = np.inf  # not to be used
    costs = np.sort(-random.random((4, 4)), 1)
    costs[:, -1] = 0
    every = [np.array(row) for row in itertools.product(range(4), repeat=4)]
    genes = np.arange(4)

    def value(row: np.ndarray, rate: float) -> float:
        return (effects[genes, row] + rate * costs[genes, row]).sum()

    front = exact_front(effects, costs)
    sums = [costs[genes, row].sum() for row in front]
    assert (np.diff(sums) < 0).all()
    for rate in np.geomspace(1e-3, 100, 200):
        least = min(value(row, rate) for row in every)
        assert min(value(row, rate) for row in front) == pytest.approx(least)


def test_settled_effects_never_fall_as_the_width_does() -> None:
    table = np.array([[0.5, 0.1, 0.2, 0.0], [-0.1, -0.3, 0.1, 0.0], [0.3, 0.2, 0.1, 0.0]])
    expected = [[0.5, 0.15, 0.15, 0], [0, 0, 0, 0], [0.3, 0.2, 0.1, 0]]
    np.testing.assert_allclose(settled(table, WIDTHS), expected, atol=1e-12)
    # Skipping may do less harm than a narrow width.
    np.testing.assert_allclose(settled(table[2:], (0.0, 0.5, 0.75, 1.0)), table[2:])
    table[2, 0] = 0.15
    np.testing.assert_allclose(settled(table[2:], (0.0, 0.5, 0.75, 1.0)), table[2:])
    table[:, 0] = np.inf
    assert np.isinf(settled(table, WIDTHS)[:, 0]).all()


def test_stakes_by_simulation() -> None:
    effects, costs = np.array([[0.30, 0.12, 0.0]]), np.array([[-0.9, -0.5, 0.0]])
    errors = np.array([[0.05, 0.04, 0.0]])
    rates = [0.12 / 0.5, 0.18 / 0.4]  # where the front moves
    draws = np.random.default_rng(0).standard_normal(200_000)
    for column in (0, 1):
        saved = 0.0
        for rate in rates:
            values = effects[0] + rate * costs[0]
            best = values.argmin()
            drawn = np.repeat(values[None], len(draws), 0)
            drawn[:, column] += errors[0, column] * draws
            saved += (drawn[:, best] - drawn.min(1)).mean() / len(rates)
        assert stakes(effects, errors, costs)[0, column] == pytest.approx(saved, rel=0.05)


def test_a_belief_learns_the_effects() -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 4, (60, GENES))
    logs = EFFECTS[np.arange(GENES), rows].sum(1)
    shares = np.full(GENES, 1 / GENES)
    beliefs = [Belief.of(EFFECTS.sum(0), shares, rows[:n], logs[:n]) for n in (2, 20, 60)]
    np.testing.assert_allclose(beliefs[2].mean, EFFECTS, atol=0.02)
    assert np.std([beliefs[2].draw(random) - EFFECTS for _ in range(20)]) < 0.02
    sizes = [belief.errors[:, :-1].mean() for belief in beliefs]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


# --- searches -------------------------------------------------------------------------------------


def test_the_exact_front_is_found(tmp_path: Path) -> None:
    job = make(tmp_path)
    front = pareto_front(job.run())
    scored = {widths for rung, widths in job.records if not rung}
    assert {*BEST} <= scored
    assert len(scored) < 100 < len(WIDTHS) ** GENES
    assert volume([c.schedule.widths for c in front]) > 0.9 * volume(BEST)


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_noise_is_handled(tmp_path: Path, noise: float) -> None:
    """Nearly the exact front by true distances, better than evolution with as many candidates."""
    for seed in range(2):
        job = make(tmp_path / f"s{seed}", Landscape(noise), seed=seed)
        found = volume([c.schedule.widths for c in pareto_front(job.run())])
        count = sum(not rung for rung, _ in job.records)
        evolved = make(
            tmp_path / f"e{seed}", Landscape(noise), search_method="evolution", seed=seed,
            mutation_prob=1 / GENES, num_generation=count // 8 + 1,
        ).run()  # fmt: skip
        assert found > volume([c.schedule.widths for c in pareto_front(evolved)])
        assert found > 0.85 * volume(BEST)


def test_errors_are_those_of_fresh_noise(tmp_path: Path) -> None:
    """Ratios of the distances' true errors to the reported ones are as a normal's."""
    score = Landscape(0.02, shared=0.0)
    candidates = make(tmp_path, score, confirm_images=800).run()
    ratios = [(c.distance - true_distance(c.schedule.widths)) / c.error for c in candidates]
    assert 0.5 < np.std(ratios) < 1.6
    assert np.mean([c.error / c.distance for c in candidates]) == pytest.approx(
        0.02 / math.sqrt(8), rel=0.3
    )
    fresh = {widths for noise, widths in score.scored if noise}
    assert {c.schedule.widths for c in candidates} <= fresh


@pytest.mark.parametrize(("images", "noises"), [(0, 2), (50, 1), (199, 1), (200, 2), (299, 2)])
def test_confirm_images_is_the_most(tmp_path: Path, images: int, noises: int) -> None:
    """A score has 100 images, and every schedule of the result has one."""
    job = make(tmp_path, confirm_images=images, num_generation=1)
    job.run()
    assert len({rung for rung, _ in job.records if rung}) == noises
    plan = stages(job.settings, job.genome, 100, True)[-1]
    assert (plan.name, plan.images) == ("fresh noise", 100 * noises)


def test_a_hopeless_width_is_left_out_and_said(tmp_path: Path) -> None:
    class Spoilt(Landscape):
        def __call__(self, schedules: Sequence, *arguments: object, **named: object) -> Iterator:
            for i, scores in super().__call__(schedules, *arguments, **named):
                count = schedules[i].widths.count(0.25)
                yield i, scores | {"distance": scores["distance"] * 2**count}

    said: list[str] = []
    job = make(tmp_path, Spoilt(), say=said.append)
    job.run()
    assert "0.25" in said[0]
    assert sum(0.25 in widths for rung, widths in job.records if not rung) == 1


class Overflowing(Landscape):
    """Schedules that `fails`(noise, widths) have no distance."""

    def __init__(self, fails: Callable[[int, Sequence[float]], bool], noise: float = 0.0) -> None:
        super().__init__(noise)
        self.fails = fails

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, dict]]:
        for i, scores in super().__call__(schedules, noise):
            bad = self.fails(noise, schedules[i].widths)
            yield i, {"distance": UNUSABLE, "unusable": "NaN"} if bad else scores


def best_without(genes: slice, width: float) -> list[tuple[float, ...]]:
    """The exact front where these genes do not have this width."""
    effects = EFFECTS.copy()
    effects[genes, WIDTHS.index(width)] = np.inf
    return [tuple(WIDTHS[i] for i in row) for row in exact_front(effects, COST_TABLE)]


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_a_width_without_a_distance_is_left_out(tmp_path: Path, width: float) -> None:
    job = make(tmp_path, Overflowing(lambda noise, widths: width in widths))
    found = [c.schedule.widths for c in job.run()]
    assert not any(width in widths for widths in found)
    best = best_without(slice(None), width)
    assert volume(found) > volume(best) - 0.1 * volume(BEST)
    assert sum("unusable" in record for record in job.records.values()) < 10


def test_an_entry_without_a_distance_is_left_out(tmp_path: Path) -> None:
    def fails(noise: int, widths: Sequence[float]) -> bool:
        return widths[3] == 0.25 and len(set(widths)) > 1

    job = make(tmp_path, Overflowing(fails))
    found, best = [c.schedule.widths for c in job.run()], best_without(slice(3, 4), 0.25)
    assert volume(found) > volume(best) - 0.05 * volume(BEST)
    assert sum("unusable" in record for record in job.records.values()) == 1


def test_fresh_noise_without_a_distance(tmp_path: Path) -> None:
    """Full width on one of the two noises: the errors of the others stay."""
    full = (1.0,) * GENES
    score = Overflowing(lambda noise, widths: noise > 32 and widths == full, 0.02)
    candidates = make(tmp_path, score).run()
    assert full not in {c.schedule.widths for c in candidates}
    assert all(c.error / c.distance < 0.1 for c in candidates)
    with pytest.raises(UserError, match="NaN"):
        make(tmp_path / "none", Overflowing(lambda noise, widths: noise > 0)).run()
    with pytest.raises(UserError, match="NaN"):
        make(tmp_path / "nothing", Overflowing(lambda noise, widths: True)).run()


def test_steps_can_be_skipped(tmp_path: Path) -> None:
    score, genome = Landscape(), Genome((0.0, 0.5, 1.0), (0, 1, 2), 3)
    front = pareto_front(make(tmp_path, score, genome=genome).run())
    assert any(0.0 in c.schedule.widths for c in front)
    assert all(any(widths) for _, widths in score.scored)


def test_given_starts_are_scored(tmp_path: Path) -> None:
    start = WidthSchedule([0.25, 1.0] * (GENES // 2))
    job = make(tmp_path, start=[start], num_generation=1)
    job.run()
    assert ("", start.widths) in job.records


@pytest.mark.parametrize("method", ["evolution", "sensitivity"])
def test_a_start_keeps_one_step(tmp_path: Path, method: str) -> None:
    """A gene takes its first entry, and here these are the skipped steps."""
    start, genome = WidthSchedule([0.0, 1.0] * 6), Genome((0.0, 0.5, 1.0), tuple(range(12)), 12, 6)
    job = make(tmp_path, start=[start], genome=genome, num_generation=1, search_method=method)
    job.run()
    assert ("", (1.0, 1.0) + (0.0,) * 10) in job.records
    assert all(any(widths) for _, widths in job.records)


# --- runs -----------------------------------------------------------------------------------------


def test_killed_again_and_again(tmp_path: Path) -> None:
    changes = dict(num_generation=4, pop_size=4)
    expected = summary(make(tmp_path / "whole", Landscape(0.02), **changes).run())
    assert summary(make(tmp_path / "other", Landscape(0.02), **changes, seed=1).run()) != expected
    for limit in itertools.cycle((1, 2, 5)):
        try:
            candidates = make(tmp_path / "cut", Landscape(0.02, limit=limit), **changes).run()
            break
        except KeyboardInterrupt:
            continue
    assert summary(candidates) == expected
    assert sorted(lines(tmp_path / "cut")) == sorted(lines(tmp_path / "whole"))
    assert len(set(lines(tmp_path / "cut"))) == len(lines(tmp_path / "cut"))


def test_the_last_digits_of_distances_decide_nothing(tmp_path: Path) -> None:
    """They differ between one process and several."""

    class Rounded(Landscape):
        def __call__(self, *arguments: object, **named: object) -> Iterator[tuple[int, dict]]:
            for i, scores in super().__call__(*arguments, **named):
                yield i, {"distance": float(f"{scores['distance']:.12g}")}

    jobs = [make(tmp_path / c.__name__, c(0.02)) for c in (Landscape, Rounded)]
    for job in jobs:
        job.run()
    assert jobs[0].records.keys() == jobs[1].records.keys()


def test_it_stops_early(tmp_path: Path) -> None:
    job = make(tmp_path, num_generation=1000)
    job.run()
    assert len(job.records) < 200


@pytest.mark.parametrize("method", ["evolution", "sensitivity"])
def test_search_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Scoring stops in time with what is known, and the same command goes on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Landscape):
        def __call__(self, *arguments: object, **named: object) -> Iterator:
            for each in super().__call__(*arguments, **named):
                now[0] += 60
                yield each

    changes = dict(search_method=method, num_generation=4, pop_size=6, mutation_prob=0.1)
    expected = summary(make(tmp_path / "whole", **changes).run())
    counts = []
    for _ in range(1000):
        score, said = Slow(), []
        changes["say"] = said.append
        candidates = make(tmp_path / "cut", score, **changes, search_minutes=6.5).run()
        if not said:
            break
        counts.append((len(score.scored), len(candidates)))
    assert {scored for scored, _ in counts} == {7}
    assert counts[0] == (7, 7)
    assert summary(candidates) == expected
    with pytest.raises(UserError, match="--search_minutes"):
        SearchSettings(search_minutes=-1)


def test_plan(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and time of each stage at a millisecond per image and call, and what fits in 1.04 s:
    uniform widths 0.32 s, table 0.24 s, and of two rounds of 0.32 s one."""
    monkeypatch.setattr("commands.plan._encoder_seconds", lambda model: 0.0)
    search = ["--search", "--dry_run", "--logdir=run", "--device=cpu", "--num_images=8",
              "--num_generation=3", "--pop_size=4", "--num_segments=2"]  # fmt: skip
    said = run_main(*search, "--search_method=sensitivity", f"--search_minutes={1.04 / 60}").out
    assert (
        "uniform widths: 4 candidates × 8 images × 10 network calls = 320 network passes, " in said
    )
    assert re.search(r"table: 6 candidates × 8 images × 5 network calls .*, about 0\.2 s", said)
    assert re.search(r"fresh noise: 10 candidates × 16 images × 10 .*, about 1\.6 s", said)
    assert "uniform widths, table, 1 of 2 generations of proposals" in said
    said = run_main(*search, f"--search_minutes={0.7 / 60}").out  # a generation takes 0.32 s
    assert "2 of 3 generations of evolution" in said
