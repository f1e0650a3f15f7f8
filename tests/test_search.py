"""The search against a landscape that is known: operators, determinism, resume, fronts."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from pymoo.core.population import Population

import main
from model import WidthSchedule
from runtime.errors import UserError
from search import (
    OBJECTIVES,
    Candidate,
    Genome,
    Rung,
    Search,
    SearchSettings,
    evolution,
    hypervolume,
    knee,
    pareto_front,
)

WIDTHS = (0.25, 0.5, 0.75, 1.0)
COSTS = {0.0: 0.0, 0.25: 2.0, 0.5: 8.0, 0.75: 18.0, 1.0: 32.0}
IDENTITY = {"checkpoint": "ckpt", "step": 6, "sampler": {"sampler": "ddpm"}, "widths": [1.0]}


def genome(steps: int = 8, segments: int = 0, T: int = 0) -> Genome:
    return Genome(WIDTHS, tuple(range(steps)), T or steps, segments)


def distance(schedule: WidthSchedule) -> float:
    """Late steps need their width, early ones hardly do."""
    return 1 + sum((1 - w) ** 2 * 2.0**-i for i, w in enumerate(schedule.widths))


class Score:
    """Scores in an order of its own; counts, and dies after `limit` candidates."""

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.asked = limit, []

    def __call__(self, schedules: Sequence[WidthSchedule]) -> Iterator[tuple[int, dict]]:
        for i in reversed(range(len(schedules))):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(schedules[i].widths)
            yield i, {"distance": distance(schedules[i]), "label": "toy"}


def make(folder: Path, score: Callable | None = None, **changes: object) -> Search:
    extra = {k: changes.pop(k) for k in ("start", "on_generation", "genome") if k in changes}
    settings = dict(num_generation=5, pop_size=8, mutation_prob=0.1, fid_weight=1.0)
    return Search(
        settings=SearchSettings(**{**settings, **changes}),
        score=score or Score(),
        costs=COSTS,
        objective=lambda d, c: d + 0.01 * c,
        folder=folder,
        identity=IDENTITY,
        **{"genome": genome(), **extra},
    )


def lines(folder: Path) -> list[str]:
    return (folder / "search.jsonl").read_text().splitlines(keepends=True)


def summary(candidates: Sequence[Candidate]) -> list[tuple]:
    return [(c.schedule.widths, c.distance, c.cost, c.generation) for c in candidates]


# --- operators ------------------------------------------------------------------------------------


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> list:
    """The NSGA2 objects that searches make."""
    made = []

    class Noted(evolution.NSGA2):
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **settings)
            made.append(self)

    monkeypatch.setattr(evolution, "NSGA2", Noted)
    return made


def mate(algorithm: object, parents: np.ndarray, seed: int = 0) -> np.ndarray:
    """The children of pairs (n, 2, genes), by the algorithm's own crossover and mutation."""
    n, _, genes = parents.shape
    population = Population.new("X", parents.reshape(2 * n, genes))
    pairs = np.arange(2 * n).reshape(n, 2)
    children = algorithm.mating._do(
        algorithm.problem,
        population,
        2 * n,
        parents=[population[pair] for pair in pairs],
        algorithm=algorithm,
        random_state=np.random.default_rng(seed),
    )
    return children.get("X").reshape(2, n, genes)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_genes_mutate_at_mutation_prob(algorithms: list, tmp_path: Path, rate: float) -> None:
    make(tmp_path, mutation_prob=rate, genome=genome(1000), num_generation=1).run()
    random = np.random.default_rng(0)
    parents = np.repeat(random.integers(0, 4, (200, 1, 1000)), 2, axis=1)
    children = mate(algorithms[0], parents)
    changed = children != parents[:, 0]
    expected, count = rate, changed.size  # 400,000 genes
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(changed.mean() - expected) <= 5 * deviation
    assert set(np.unique(children)) <= {0, 1, 2, 3}
    if rate >= 0.01:
        # To each of the three other values alike.
        steps = (children - parents[:, 0])[changed] % 4
        shares = np.bincount(steps, minlength=4) / len(steps)
        assert shares[0] == 0
        assert np.abs(shares[1:] - 1 / 3).max() < 5 * (2 / 9 / len(steps)) ** 0.5


def test_children_are_crossed_at_one_point(algorithms: list, tmp_path: Path) -> None:
    make(tmp_path, mutation_prob=0.0, genome=genome(20), num_generation=1).run()
    parents = np.tile(np.stack([np.zeros(20, int), np.full(20, 3)]), (500, 1, 1))
    first, second = mate(algorithms[0], parents)
    assert (first + second == 3).all()
    switches = (np.diff(first) != 0).sum(1)
    assert set(switches) <= {0, 1}
    assert (switches == 1).mean() > 0.8
    cuts = {int(np.flatnonzero(np.diff(row))[0]) for row in first if np.ptp(row)}
    assert cuts == set(range(19))


def test_an_individual_never_escapes_mutation(algorithms: list, tmp_path: Path) -> None:
    """pymoo's own probability, per individual, stays out of it."""
    make(tmp_path, mutation_prob=1.0, num_generation=1).run()
    parents = np.zeros((300, 2, 8), int)
    assert (mate(algorithms[0], parents) != 0).all()


@pytest.mark.parametrize("genes", [1, 2])
def test_the_shortest_genomes(tmp_path: Path, genes: int) -> None:
    found = make(tmp_path, genome=genome(8, segments=genes), num_generation=4).run()
    assert len({c.schedule.widths for c in found}) == len(found) > 3


# --- where candidates are spent -------------------------------------------------------------------


def test_candidates_beyond_the_distance_limit_do_not_survive(
    algorithms: list, tmp_path: Path
) -> None:
    found = make(tmp_path, search_objective="pareto", pop_size=12, distance_limit=1.3).run()
    first = [c.distance for c in found if c.generation == 1]
    worst = 1.3 * min(first)
    assert max(first) > worst
    assert algorithms[0].pop.get("F")[:, 0].max() <= worst


@pytest.mark.parametrize("surrogate", [0, 8])
def test_the_limit_spends_candidates_where_it_matters(tmp_path: Path, surrogate: int) -> None:
    def of_interest(seed: int, limit: float) -> float:
        job = make(
            tmp_path / f"{seed}-{limit}", search_objective="pareto", genome=genome(12),
            pop_size=12, seed=seed, surrogate=surrogate, distance_limit=limit,
        )  # fmt: skip
        later = [c.distance for c in job.run() if c.generation > 1]
        return np.mean([distance <= 1.3 for distance in later])

    without, limited = (np.mean([of_interest(i, n) for i in range(4)]) for n in (0.0, 1.3))
    assert limited > without + 0.1


@pytest.mark.parametrize(
    "changes",
    [
        dict(distance_limit=0.9, search_objective="pareto"),
        dict(distance_limit=float("inf"), search_objective="pareto"),
        dict(distance_limit=1.5, search_objective="weighted"),
    ],
)
def test_limits_that_make_no_sense(changes: dict) -> None:
    with pytest.raises(UserError, match="--distance_limit"):
        SearchSettings(**changes)


def test_a_rung_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """Distances of other rungs are on another scale."""

    def tenfold(schedules: Sequence[WidthSchedule]) -> Iterator[tuple[int, dict]]:
        for i, scores in Score()(schedules):
            yield i, {"distance": 10 * scores["distance"]}

    job = make(tmp_path, search_objective="pareto", distance_limit=1.2)
    job.ladder = [Rung("coarse", tenfold)]
    found = job.run()
    assert job.worst == 1.2 * min(c.distance for c in found)


def test_the_surrogate_asks_for_nothing_twice(tmp_path: Path) -> None:
    score = Score()
    settings = dict(search_objective="pareto", surrogate=8, num_generation=6, pop_size=8)
    found = make(tmp_path, score, genome=genome(20), **settings).run()
    assert len(score.asked) == len(set(score.asked)) == len(found) == 6 * 8


def test_the_surrogate_of_a_small_space_ends(tmp_path: Path) -> None:
    """Every schedule is scored long before the last generation."""
    settings = dict(search_objective="pareto", surrogate=8, num_generation=20, pop_size=8)
    found = make(tmp_path, genome=genome(2), **settings).run()
    assert len({c.schedule.widths for c in found}) == len(found) == 4**2


# --- first population -----------------------------------------------------------------------------


def first_population(tmp_path: Path, **changes: object) -> list[tuple]:
    found = make(tmp_path, num_generation=1, **changes).run()
    return [c.schedule.widths for c in found]


def test_first_population_has_each_width(tmp_path: Path) -> None:
    found = first_population(tmp_path)
    assert found[:4] == [(w,) * 8 for w in (1.0, 0.75, 0.5, 0.25)]
    assert len(set(found)) == 8
    assert all(len(set(widths)) > 1 for widths in found[4:])


def test_random_first_population(tmp_path: Path) -> None:
    found = first_population(tmp_path, random_init=True)
    assert all(len(set(widths)) > 1 for widths in found)


def test_level_seeds(tmp_path: Path) -> None:
    found = first_population(tmp_path, level_seeds=True, pop_size=20)
    assert found[:4] == [(w,) * 8 for w in (1.0, 0.75, 0.5, 0.25)]
    for widths in found[4:12]:
        switches = np.flatnonzero(np.diff(widths))
        assert 1 <= len(switches) <= 2
        assert (np.diff(widths) >= 0).all() or (np.diff(widths) <= 0).all()


def test_start_comes_first(tmp_path: Path) -> None:
    start = WidthSchedule([1, 1, 0.5, 0.5, 0.25, 0.25, 0.75, 0.75])
    found = first_population(tmp_path, start=[start])
    assert found[0] == start.widths
    assert found[1] == (1.0,) * 8


# --- genomes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [0, 1, 3, 5, 8])
def test_decode_and_encode(segments: int) -> None:
    g = genome(8, segments)
    random = np.random.default_rng(0)
    for _ in range(20):
        genes = random.integers(0, 4, g.genes)
        schedule = g.decode(genes)
        assert len(schedule) == 8
        assert (g.encode(schedule) == genes).all()
        runs = [WIDTHS[genes[i * g.genes // 8]] for i in range(8)]
        assert list(schedule.widths) == runs
    assert g.genes == (segments or 8)


def test_genome_of_a_shorter_chain() -> None:
    g = Genome(WIDTHS, (0, 3, 6), 10)
    schedule = g.decode(np.array([3, 0, 1]))
    assert [schedule[t] for t in (0, 3, 6)] == [1.0, 0.25, 0.5]
    assert schedule.widths == (1.0, 0.25, 0.5)


def test_genomes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--num_segments=9: the sampler has 8 steps"):
        genome(8, 9)
    with pytest.raises(UserError, match="--candidate_width"):
        Genome((0.0, 1.0), (0, 1), 2)


def test_no_schedule_leaves_out_every_step(tmp_path: Path) -> None:
    score = Score()
    skipping = Genome((0.0, *WIDTHS[2:]), (0, 1), 2)
    make(tmp_path, score, genome=skipping, mutation_prob=0.5, num_generation=6).run()
    assert any(0.0 in widths for widths in score.asked)
    assert all(any(widths) for widths in score.asked)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_log(tmp_path: Path, objective: str) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        found = make(tmp_path / name, search_objective=objective, seed=seed).run()
        runs[name] = summary(found), lines(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"] != runs["c"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_improves_and_scores_nothing_twice(tmp_path: Path, objective: str) -> None:
    score, generations = Score(), []
    job = make(
        tmp_path, score, search_objective=objective, num_generation=20, pop_size=12,
        on_generation=lambda number, seen: generations.append((number, len(seen))),
    )  # fmt: skip
    found = job.run()
    assert len(score.asked) == len(set(score.asked)) == len(found)
    assert [number for number, _ in generations] == list(range(1, 21))
    records = [json.loads(line) for line in lines(tmp_path)]
    assert records[0] == {"evaluation": IDENTITY}
    assert [tuple(r["schedule"]) for r in records[1:]] == score.asked
    for record in records[1:]:
        widths = record["schedule"]
        assert record["cost"] == pytest.approx(sum(COSTS[w] for w in widths) / 8)
        assert record["distance"] == distance(WidthSchedule(widths))
    first = [c for c in found if c.generation == 1]
    if objective == "weighted":
        assert job.best(found).distance + 0.01 * job.best(found).cost == min(
            c.distance + 0.01 * c.cost for c in found
        )
        assert job.objective(job.best(found).distance, job.best(found).cost) < min(
            job.objective(c.distance, c.cost) for c in first
        )
    else:
        reference = (10.0, 40.0)
        assert hypervolume(found, reference) > hypervolume(first, reference)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resume_from_any_line(tmp_path: Path, objective: str) -> None:
    (tmp_path / "whole").mkdir()
    whole = Score()
    expected = summary(make(tmp_path / "whole", whole, search_objective=objective).run())
    log = lines(tmp_path / "whole")
    torn = ["", '{"gen', '{"generation": 1, "schedule": [1.0, 0.5']
    for kept in range(len(log) + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "search.jsonl").write_text("".join(log[:kept]) + torn[kept % 3])
        score = Score()
        again = make(folder, score, search_objective=objective).run()
        assert summary(again) == expected
        assert sorted(lines(folder)) == sorted(log)
        assert len(score.asked) == len(log) - max(1, kept)
        assert len(set(lines(folder))) == len(log)


@pytest.mark.parametrize(
    "changes", [{}, dict(search_objective="pareto", surrogate=8, distance_limit=1.2)]
)
def test_killed_again_and_again(tmp_path: Path, changes: dict) -> None:
    (tmp_path / "whole").mkdir()
    expected = summary(make(tmp_path / "whole", **changes).run())
    (tmp_path / "cut").mkdir()
    for _ in range(100):
        try:
            found = make(tmp_path / "cut", Score(limit=3), **changes).run()
            break
        except KeyboardInterrupt:
            continue
    assert summary(found) == expected
    assert sorted(lines(tmp_path / "cut")) == sorted(lines(tmp_path / "whole"))


def test_a_longer_search_uses_the_log(tmp_path: Path) -> None:
    make(tmp_path, num_generation=3).run()
    known = len(lines(tmp_path)) - 1
    score = Score()
    found = make(tmp_path, score, num_generation=6).run()
    assert len(found) == known + len(score.asked)


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    make(tmp_path).run()
    before = lines(tmp_path)
    job = make(tmp_path)
    job.identity = {**IDENTITY, "step": 9}
    with pytest.raises(UserError, match=r"search\.jsonl .*step: 6 there, 9 here.*--search_dir"):
        job.run()
    assert lines(tmp_path) == before


@pytest.mark.parametrize(
    "line", ['{"schedule": [1.0]}', '{"distance": 1.0}', "3", '{"schedule": 1, "distance": 1}',
             '{"schedule": [1.0], "distance": NaN}', "half a line"],
)  # fmt: skip
def test_a_log_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    header = json.dumps({"evaluation": IDENTITY})
    (tmp_path / "search.jsonl").write_text(f"{header}\n{line}\n")
    with pytest.raises(UserError, match=r"search\.jsonl.*line 2"):
        make(tmp_path).run()


# --- fronts ---------------------------------------------------------------------------------------


def at(distance: float, cost: float) -> Candidate:
    return Candidate(WidthSchedule([1.0]), distance, cost, 1, {})


POINTS = [at(1, 10), at(2, 4), at(3, 3), at(8, 1), at(3, 4), at(2, 5), at(9, 9), at(1, 12)]


def test_front_by_hand() -> None:
    front = pareto_front(POINTS)
    assert [(c.distance, c.cost) for c in front] == [(1, 10), (2, 4), (3, 3), (8, 1)]
    assert pareto_front([*POINTS, at(2, 4)]) == front or len(pareto_front(POINTS)) == 4
    assert [(c.distance, c.cost) for c in pareto_front([at(1, 1)])] == [(1, 1)]


def test_knee_by_hand() -> None:
    # Scaled to the front's range, (2, 4) is (1/7, 3/9): 0.476; (3, 3) is (2/7, 2/9): 0.508.
    assert (knee(pareto_front(POINTS)).distance, knee(pareto_front(POINTS)).cost) == (2, 4)
    assert knee([at(1, 1)]).cost == 1
    flat = [at(1, 2), at(1, 2)]
    assert knee(flat) is flat[0]


def test_hypervolume_by_hand() -> None:
    # Rectangles under (10, 12), from the left: 1·2 + 1·8 + 5·9 + 2·11.
    assert hypervolume(POINTS, (10.0, 12.0)) == pytest.approx(2 + 8 + 45 + 22)
    assert hypervolume([at(2, 3)], (4.0, 7.0)) == pytest.approx(2 * 4)
    assert hypervolume([at(5, 8)], (4.0, 7.0)) == 0


@pytest.mark.parametrize(
    ("budget", "expected"), [(1.0, (1, 10)), (10 / 32, (1, 10)), (0.2, (2, 4)), (0.01, (8, 1))]
)
def test_best_within_a_budget(tmp_path: Path, budget: float, expected: tuple) -> None:
    job = make(tmp_path, search_objective="pareto", flops_budget=budget)
    best = job.best(POINTS)
    assert (best.distance, best.cost) == expected


def test_best_by_weights_and_knee(tmp_path: Path) -> None:
    best = make(tmp_path).best(POINTS)  # distance + 0.01·cost
    assert (best.distance, best.cost) == (1, 10)
    best = make(tmp_path, search_objective="pareto").best(POINTS)
    assert (best.distance, best.cost) == (2, 4)


# --- through the program --------------------------------------------------------------------------


def test_search_through_the_program(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published objective, fid_weight·FID + macs_weight·MMACs; search.txt replaced whole."""
    monkeypatch.setattr(main, "latency", functools.partial(main.latency, seconds=0.05))
    (run_folder / "search.txt").write_text("something older")
    arguments = [
        "--search", "--logdir=run", "--device=cpu", "--num_images=8", "--batch_size=8",
        "--fid_encoder=pixels", "--fid_cache=stats.npz", "--num_generation=2", "--pop_size=5",
        "--fid_weight=2", "--macs_weight=3", "--mutation_prob=0.2",
    ]  # fmt: skip
    result = run_main(*arguments)
    assert result.status == 0, result.err
    chosen = json.loads((run_folder / "search.txt").read_text())
    records = [json.loads(line) for line in lines(run_folder / "search")][1:]
    # A multiply-add is two FLOPs.
    values = [2 * r["distance"] + 3 * r["cost"] / 2e6 for r in records]
    assert chosen == records[int(np.argmin(values))]["schedule"]
    assert len(chosen) == 10
    assert not list(run_folder.rglob(".*"))

    before = lines(run_folder / "search")
    again = run_main(*arguments)
    assert again.status == 0
    assert sorted(lines(run_folder / "search")) == sorted(before)
    assert json.loads((run_folder / "search.txt").read_text()) == chosen
    refused = run_main(*arguments, "--num_images=9")
    assert "num_images: 8 there, 9 here" in refused.error
    assert lines(run_folder / "search") == before
    assert json.loads((run_folder / "search.txt").read_text()) == chosen
