"""The search on a known landscape: operators, first populations, determinism, resume, fronts."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, Result, contents, run_main
from PIL import Image
from pymoo.core.population import Population
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import looks
import report
from commands.search import latency_table
from evaluate import Evaluator
from model import WidthSchedule
from runtime import files, processes
from runtime.errors import UserError
from runtime.files import read_jsonl
from score import ENCODERS, Encoder
from search import (
    UNUSABLE,
    Candidate,
    Genome,
    Search,
    SearchSettings,
    evolution,
    hypervolume,
    knee,
    pareto_front,
    warm_start,
)
from settings import Configuration

WIDTHS = (0.25, 0.5, 0.75, 1.0)
UNIFORM = [(w,) * 8 for w in WIDTHS[::-1]]
COSTS = {0.0: 0.0, 0.25: 2.0, 0.5: 8.0, 0.75: 18.0, 1.0: 32.0}
IDENTITY = {"checkpoint": "ckpt", "step": 6, "sampler": {"sampler": "ddpm"}, "widths": [1.0]}
PARETO = dict(search_objective="pareto")


def genome(steps: int = 8, segments: int = 0) -> Genome:
    return Genome(WIDTHS, tuple(range(steps)), steps, segments)


def distance(schedule: WidthSchedule) -> float:
    """Late steps need their width, early ones hardly do."""
    return 1 + sum((1 - w) ** 2 * 2.0**-i for i, w in enumerate(schedule.widths))


class Score:
    """Scores in reversed order; notes the schedules and stops the program after `limit`."""

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.scored = limit, []

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, dict]]:
        for i in reversed(range(len(schedules))):
            if len(self.scored) == self.limit:
                raise KeyboardInterrupt
            self.scored.append(schedules[i].widths)
            yield i, {"distance": distance(schedules[i]), "label": "toy", "seconds": 0.5}


def make(folder: Path, score: Score | None = None, **changes: object) -> Search:
    names = ("start", "on_generation", "genome", "seed")
    extra = {k: changes.pop(k) for k in names if k in changes}
    settings = dict(num_generation=5, pop_size=8, mutation_prob=0.1, fid_weight=1.0)
    folder.mkdir(exist_ok=True)
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


def mate(algorithm: object, parents: np.ndarray) -> np.ndarray:
    """Children (2, n, genes) of pairs (n, 2, genes), by the algorithm's crossover and mutation."""
    n, _, genes = parents.shape
    population = Population.new("X", parents.reshape(2 * n, genes))
    children = algorithm.mating._do(
        algorithm.problem,
        population,
        2 * n,
        parents=[population[pair] for pair in np.arange(2 * n).reshape(n, 2)],
        algorithm=algorithm,
        random_state=np.random.default_rng(0),
    )
    return children.get("X").reshape(2, n, genes)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 1.0])
def test_genes_mutate_at_mutation_prob(algorithms: list, tmp_path: Path, rate: float) -> None:
    """Per gene, whatever pymoo's own probability per individual, and to each other width alike."""
    make(tmp_path, mutation_prob=rate, genome=genome(1000), num_generation=1).run()
    parents = np.repeat(np.random.default_rng(0).integers(0, 4, (200, 1, 1000)), 2, axis=1)
    children = mate(algorithms[0], parents)
    changed = children != parents[:, 0]
    deviation = (rate * (1 - rate) / changed.size) ** 0.5
    assert abs(changed.mean() - rate) <= 5 * deviation
    assert set(np.unique(children)) <= {0, 1, 2, 3}
    if rate >= 0.1:
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
    assert {int(np.flatnonzero(np.diff(row))[0]) for row in first if np.ptp(row)} == set(range(19))


# --- first population -----------------------------------------------------------------------------


def first_population(tmp_path: Path, **changes: object) -> list[tuple]:
    candidates = make(tmp_path, num_generation=1, **changes).run()
    return [c.schedule.widths for c in candidates]


def test_first_population_has_each_width(tmp_path: Path) -> None:
    population = first_population(tmp_path)
    assert population[:4] == UNIFORM
    assert len(set(population)) == 8
    assert all(len(set(widths)) > 1 for widths in population[4:])
    assert all(len(set(widths)) > 1 for widths in first_population(tmp_path, random_init=True))


def test_given_starts(tmp_path: Path) -> None:
    start = WidthSchedule([1, 1, 0.5, 0.5, 0.25, 0.25, 0.75, 0.75])
    assert first_population(tmp_path, start=[start])[:2] == [start.widths, UNIFORM[0]]


# --- genomes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [0, 1, 3, 5, 8])
def test_decode_and_encode(segments: int) -> None:
    g = genome(8, segments)
    assert g.genes == (segments or 8)
    for genes in np.random.default_rng(0).integers(0, 4, (20, g.genes)):
        schedule = g.decode(genes)
        assert list(schedule.widths) == [WIDTHS[genes[i * g.genes // 8]] for i in range(8)]
        assert (g.encode(schedule) == genes).all()


def test_genomes_of_shorter_chains() -> None:
    schedule = Genome(WIDTHS, (0, 3, 6), 10).decode(np.array([3, 0, 1]))
    assert schedule.widths == tuple(schedule[t] for t in (0, 3, 6)) == (1.0, 0.25, 0.5)
    with pytest.raises(UserError, match="--num_segments=9"):
        genome(8, 9)
    with pytest.raises(UserError, match="--candidate_width"):
        Genome((0.0, 1.0), (0, 1), 2)


@pytest.mark.parametrize("genes", [1, 2])
def test_the_shortest_genomes(tmp_path: Path, genes: int) -> None:
    candidates = make(tmp_path, genome=genome(8, segments=genes), num_generation=4).run()
    assert len({c.schedule.widths for c in candidates}) == len(candidates) > 3


def test_no_schedule_skips_every_step(tmp_path: Path) -> None:
    score, skipping = Score(), Genome((0.0, *WIDTHS[2:]), (0, 1), 2)
    make(tmp_path, score, genome=skipping, mutation_prob=0.5, num_generation=6).run()
    assert any(0.0 in widths for widths in score.scored)
    assert all(any(widths) for widths in score.scored)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["weighted", "pareto"])
def test_search_improves_and_scores_nothing_twice(tmp_path: Path, objective: str) -> None:
    score, generations = Score(), []
    job = make(
        tmp_path, score, search_objective=objective, num_generation=20, pop_size=12,
        on_generation=lambda number, candidates: generations.append(number),
    )  # fmt: skip
    candidates = job.run()
    assert len(score.scored) == len(set(score.scored)) == len(candidates)
    assert generations == list(range(1, 21))
    records = [json.loads(line) for line in lines(tmp_path)]
    assert records[0] == {"evaluation": IDENTITY}
    assert [tuple(r["schedule"]) for r in records[1:]] == score.scored
    for record in records[1:]:
        widths = record["schedule"]
        assert record["cost"] == pytest.approx(sum(COSTS[w] for w in widths) / 8)
        assert record["distance"] == distance(WidthSchedule(widths))
    first, best = [c for c in candidates if c.generation == 1], job.best(candidates)
    if objective == "weighted":
        values = [c.distance + 0.01 * c.cost for c in candidates]
        assert best.distance + 0.01 * best.cost == min(values) < min(values[: len(first)])
    else:
        assert hypervolume(candidates, (10.0, 40.0)) > hypervolume(first, (10.0, 40.0))


@pytest.mark.parametrize("objective", ["weighted", "pareto"])
def test_resume_from_any_line(tmp_path: Path, objective: str) -> None:
    changes = dict(search_objective=objective, num_generation=3, pop_size=5)
    expected = summary(make(tmp_path / "whole", **changes).run())
    assert summary(make(tmp_path / "again", **changes).run()) == expected
    assert summary(make(tmp_path / "other", **changes, seed=1).run()) != expected
    log = lines(tmp_path / "whole")
    assert lines(tmp_path / "again") == log
    torn = ["", '{"gen', '{"generation": 1, "schedule": [1.0, 0.5']
    for count in range(len(log) + 1):
        folder, score = tmp_path / str(count), Score()
        job = make(folder, score, **changes)
        (folder / "search.jsonl").write_text("".join(log[:count]) + torn[count % 3])
        assert summary(job.run()) == expected
        assert sorted(lines(folder)) == sorted(log)
        assert len(score.scored) == len(log) - max(1, count)
        assert {record["seconds"] for record in job.records.values()} == {0.5}  # the log's too


def test_a_longer_search_uses_the_log(tmp_path: Path) -> None:
    make(tmp_path, num_generation=3).run()
    before, score = len(lines(tmp_path)) - 1, Score()
    assert len(make(tmp_path, score, num_generation=6).run()) == before + len(score.scored)


def test_a_stopped_search_chooses_from_its_own_widths(tmp_path: Path) -> None:
    """The log may have candidates of a search with --allow_skip."""
    make(tmp_path, genome=Genome((0.0, *WIDTHS), tuple(range(8)), 8), random_init=True).run()
    candidates = make(tmp_path, search_minutes=1e-6, seed=1).run()
    assert candidates
    assert not any(0.0 in c.schedule.widths for c in candidates)


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    make(tmp_path).run()
    before, job = lines(tmp_path), make(tmp_path)
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


def places(*candidates: Candidate) -> list[tuple[float, float]]:
    return [(c.distance, c.cost) for c in candidates]


POINTS = [at(1, 10), at(2, 4), at(3, 3), at(8, 1), at(3, 4), at(2, 5), at(9, 9), at(1, 12)]


def test_front_and_knee_by_hand() -> None:
    assert places(*pareto_front(POINTS)) == [(1, 10), (2, 4), (3, 3), (8, 1)]
    assert len(pareto_front([*POINTS, at(2, 4)])) == 4
    assert places(*pareto_front([at(1, 1)])) == [(1, 1)]
    # Scaled to the front's range, (2, 4) is (1/7, 3/9): 0.476; (3, 3) is (2/7, 2/9): 0.508.
    assert places(knee(pareto_front(POINTS))) == [(2, 4)]
    flat = [at(1, 2), at(1, 2)]
    assert knee(flat) is flat[0]


def test_hypervolume_by_hand() -> None:
    # Rectangles under (10, 12), from the left: 1·2 + 1·8 + 5·9 + 2·11.
    assert hypervolume(POINTS, (10.0, 12.0)) == pytest.approx(2 + 8 + 45 + 22)
    assert hypervolume([at(2, 3)], (4.0, 7.0)) == pytest.approx(2 * 4)
    assert hypervolume([at(5, 8)], (4.0, 7.0)) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(**PARETO, flops_budget=1.0), (1, 10)),
        (dict(**PARETO, flops_budget=10 / 32), (1, 10)),
        (dict(**PARETO, flops_budget=0.2), (2, 4)),
        (dict(**PARETO, flops_budget=0.01), (8, 1)),
        (dict(), (1, 10)),  # the least distance + 0.01·cost
        (PARETO, (2, 4)),  # the knee
    ],
)
def test_the_best(tmp_path: Path, changes: dict, expected: tuple) -> None:
    assert places(make(tmp_path, **changes).best(POINTS)) == [expected]


def test_a_hopeless_end_leaves_the_knee(tmp_path: Path) -> None:
    job = make(tmp_path, **PARETO)
    assert places(job.best([*POINTS, at(50, 0.5)])) == places(job.best(POINTS)) == [(2, 4)]


class Overflowing(Score):
    """Schedules with the narrowest width have no distance."""

    def __call__(
        self, schedules: Sequence[WidthSchedule], noise: int = 0
    ) -> Iterator[tuple[int, dict]]:
        for i, scores in super().__call__(schedules):
            narrow = min(schedules[i].widths) == min(WIDTHS)
            yield i, {"distance": UNUSABLE, "unusable": "NaN"} if narrow else scores


@pytest.mark.parametrize("changes", [PARETO, {}])
def test_candidates_without_a_distance_are_left_out(tmp_path: Path, changes: dict) -> None:
    noted = []
    job = make(tmp_path, Overflowing(), on_generation=lambda n, seen: noted.extend(seen), **changes)
    for candidates in (job.run(), noted):
        assert candidates
        assert min(min(c.schedule.widths) for c in candidates) > min(WIDTHS)
    assert any("unusable" in record for record in job.records.values())


# --- what is stored is judged ---------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-5", "1e400", "1" + "0" * 400, "NaN", "[1]", '"1"', "true"])
def test_a_log_is_judged_before_it_is_touched(tmp_path: Path, value: str) -> None:
    header, scored = {"evaluation": IDENTITY}, {"schedule": [1.0] * 8, "distance": 7.5}
    log = tmp_path / "search.jsonl"
    text = "\n".join(json.dumps(record) for record in (header, scored, scored)) + "\n"
    # The keys that only newer versions know stay, those that older ones lack are not missed.
    text = text.replace('"distance"', '"newer": [1], "distance"') + '{"unfinished'
    log.write_text(text)
    assert len(warm_start(log, genome(), 4)) == 1
    log.write_text(bad := text.replace("7.5", value))
    for read in (make(tmp_path).run, lambda: warm_start(log, genome(), 4)):
        with pytest.raises(UserError, match=r"search\.jsonl, line 2.*distance"):
            read()
        assert log.read_text() == bad
    log.write_text(text)
    make(tmp_path, num_generation=1).run()
    assert log.read_text().startswith(text.removesuffix('{"unfinished'))


@pytest.mark.parametrize(
    ("schedule", "place"),
    [
        ([1, "x"], r"points\[1\]\.schedule\[1\]"), ([1, 2], r"schedule\[1\]"), ([], "schedule"),
        ([1, 1, 1], r"points\[1\]\.schedule has 3"), ("text", "schedule"),
    ],
)  # fmt: skip
def test_a_front_is_judged_before_search_txt_is_touched(
    refused: Callable[..., str], here: Path, schedule: object, place: str
) -> None:
    """refused: no file is other than before."""
    point = {"distance": 1, "average_gflops": 1, "saving": 0, "latency_ms": 1, "schedule": [1, 0.5]}
    front = {"label": "toy", "timesteps": [0, 5], "uniform": [], "full_width_gflops": 1.0}
    points = [point, {**point, "schedule": schedule}]
    files.write_json("run/search/front.json", front | {"points": points})
    files.write_text("run/search.txt", "[1, 1]")
    refused(rf"front\.json.*{place}", "--search", "--logdir=run", "--pick=0")


# --- through the program --------------------------------------------------------------------------


def test_search_through_the_program(run_folder: Path) -> None:
    """The published objective, fid_weight·FID + macs_weight·MMACs; search.txt replaced whole."""
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

    before, front = lines(run_folder / "search"), contents(run_folder)["search/front.json"]
    assert run_main(*arguments).status == 0
    assert sorted(lines(run_folder / "search")) == sorted(before)
    assert contents(run_folder)["search/front.json"] == front
    assert json.loads((run_folder / "search.txt").read_text()) == chosen
    assert "--search_objective" in run_main(*arguments, "--flops_budget=0.5").error
    refused = run_main(*arguments, "--num_images=9")
    assert "num_images: 8 there, 9 here" in refused.error
    assert lines(run_folder / "search") == before
    assert json.loads((run_folder / "search.txt").read_text()) == chosen


def test_scores_of_other_encoder_weights_are_not_mixed(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = []

    def run(weights: str, *arguments: str) -> Result:
        def toy(device: torch.device, _: None) -> Encoder:
            return Encoder("pixels", device, 64, lambda x: x.flatten(1), weights=weights)

        monkeypatch.setitem(ENCODERS, "pixels", toy)
        return run_main(
            *arguments, "--logdir=run", "--device=cpu", "--num_images=8", "--fid_encoder=pixels",
            "--fid_cache=stats.npz", "--num_generation=1", "--pop_size=2",
        )  # fmt: skip

    def unfinished(path: Path, identity: str) -> files.Unfinished:
        identities.append(identity)
        return files.Unfinished(path, identity)

    monkeypatch.setattr("commands.evaluate.Unfinished", unfinished)
    assert run("", "--search").status == 0  # as earlier versions, which did not say the weights
    assert run("one", "--search").status == 0
    assert run("one", "--search", "--search_dir=other").status == 0
    refused = run("two", "--search", "--search_dir=other")
    assert "encoder_weights: one there, two here" in refused.error
    for weights in ("one", "two", "one"):
        assert run(weights, "--eval").status == 0
    assert identities[0] == identities[2] != identities[1]


def test_a_log_is_of_one_network(run_folder: Path) -> None:
    """Also where the checkpoint does not say what it was trained for, as a released one."""
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    del state["settings"], state["x_T"]  # whose size would tell the images'
    torch.save(state, run_folder / "ckpt.pt")
    kept = run_folder / "search" / "arithmetic.json"
    files.write_json(kept, {str(width): "float32" for width in WIDTHS})
    search = [*TINY, "--search", "--logdir=run", "--num_images=8", "--fid_cache=stats.npz",
              "--num_generation=1", "--pop_size=4", "--num_segments=2", "--amp=auto"]  # fmt: skip
    assert run_main(*search).status == 0
    log = lines(run_folder / "search")
    for change in ("beta_T=0.05", "num_groups=2", "img_size=16"):
        name, value = change.split("=")
        error = run_main(*search, f"--{change}", f"--fid_cache={value}.npz").error
        assert re.search(rf"search\.jsonl.*{name}: .* there, {value} here", error), error
    files.write_json(kept, {str(width): "bfloat16" for width in WIDTHS})
    assert re.search(r"search\.jsonl.*arithmetic: .*float32", run_main(*search).error)
    assert lines(run_folder / "search") == log
    # A log of earlier versions, which did not say so.
    files.write_json(kept, {str(width): "float32" for width in WIDTHS})
    header = json.loads(log[0])["evaluation"]
    for name in ("arithmetic", "T", "beta_T", "ch", "num_groups", "img_size"):
        del header[name]
    log[0] = json.dumps({"evaluation": header}) + "\n"
    (run_folder / "search" / "search.jsonl").write_text("".join(log))
    assert run_main(*search).status == 0
    assert lines(run_folder / "search") == log


def test_latency_is_of_the_main_process(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU's, which other processes have another number of."""
    ours = {"device": "cuda:0", "batch_size": 128, "amp": "none"}
    files.write_json("latency.json", ours | {"seconds_per_image": {"1.0": 0.001}})
    model = SimpleNamespace(config=Configuration.of(cost="latency"), device=torch.device("cuda:1"))
    evaluator = SimpleNamespace(generator=SimpleNamespace(networks={1.0: None}))
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "gather", lambda value: [value and ours, value])
    assert latency_table(here, model, evaluator) == {0.0: 0.0, 1.0: 0.001}
    ours["batch_size"] = 64
    with pytest.raises(UserError, match=r"latency\.json.*batch_size: 128 there, 64 here"):
        latency_table(here, model, evaluator)


def test_full_width_need_not_be_usable(run_folder: Path) -> None:
    """The search ends with its page, which then shows no images."""
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    state["ema_model"]["head.weight"][-1] = 3e38  # a channel that full width alone has
    torch.save(state, run_folder / "ckpt.pt")
    result = run_main(
        *TINY, "--search", "--search_method=sensitivity", "--search_objective=pareto",
        "--logdir=run", "--num_images=8", "--batch_size=8", "--fid_cache=stats.npz",
        "--num_generation=1", "--pop_size=2", "--num_segments=2",
    )  # fmt: skip
    assert result.status == 0, result.err
    page = page_data(run_folder / "search")
    assert page["points"]
    assert page["samples"] is None
    assert all(max(point["widths"]) < 1 for point in page["points"])


def test_shared_states_are_of_one_noise(run_folder: Path) -> None:
    """A sensitivity search scores on several noises: each has the distances that it has alone."""
    search = [
        "--search", "--search_method=sensitivity", "--logdir=run", "--device=cpu",
        "--num_images=8",
        "--batch_size=8", "--fid_encoder=pixels", "--fid_cache=stats.npz", "--num_generation=1",
        "--pop_size=2", "--num_segments=2",
    ]  # fmt: skip
    logs = []
    for name, memory in (("shared", 1), ("alone", 0)):
        result = run_main(*search, f"--search_dir={name}", f"--state_memory={memory}")
        assert result.status == 0, result.err
        records = [json.loads(line) for line in lines(Path(name))[1:]]
        logs.append({(r["rung"], *r["schedule"]): r["distance"] for r in records})
    assert logs[0] == logs[1]
    assert len({rung for rung, *_ in logs[0]}) == 3


def test_the_front_to_pick_from(run_folder: Path, here: Path) -> None:
    """By sensitivity: a table of points with their errors; a picked one is chosen everywhere."""
    common = ["--search", "--logdir=run", "--device=cpu", "--fid_encoder=pixels"]
    search = [
        *common, "--search_method=sensitivity", "--search_objective=pareto", "--num_images=8",
        "--batch_size=8", "--fid_cache=stats.npz", "--num_generation=2", "--pop_size=3",
        "--num_segments=2",
    ]  # fmt: skip
    result = run_main(*search, "--search_minutes=1e-6")
    assert result.status == 0, result.err
    assert len(lines(run_folder / "search")) == 2  # of what there was time for
    result = run_main(*search)
    assert result.status == 0, result.err
    text = (run_folder / "search" / "front.json").read_text()
    front = json.loads(text)
    assert all(point["distance_error"] > 0 for point in front["points"])
    for point in front["points"]:
        assert f'"schedule": {json.dumps(point["schedule"])}' in text  # in one line
    events = EventAccumulator(str(run_folder / "search")).Reload()
    assert {"front", "schedule", "samples"} <= {*events.Tags()["images"]}
    samples = page_data(run_folder / "search")["samples"]
    assert samples["rows"] == front["sampled"] == [*range(len(front["points"]))]
    files = contents(run_folder)
    (here / "budget.txt").write_text(
        "--flops_budget=0.01"
    )  # what it was searched for picks nothing
    result = run_main(*common, "--pick", "--flagfile=budget.txt")
    assert result.status == 0, result.err
    rows = [line.split() for line in result.out.splitlines()]
    for index, point in enumerate(front["points"]):
        row = next(row for row in rows if row[0] == str(index))
        assert f"{point['distance']:.4g}" in row
        assert f"{point['distance_error']:.2g}" in row
        assert ("*" in row) == (index == front["chosen_point"])
    assert contents(run_folder) == files
    for index in (0, len(front["points"]) - 1):
        assert run_main(*common, "--pick", index).status == 0
        changed = json.loads((run_folder / "search" / "front.json").read_text())
        assert changed == front | {"chosen_point": index, "chosen": front["points"][index]}
        chosen = json.loads((run_folder / "search.txt").read_text())
        assert chosen == front["points"][index]["schedule"]
        page = page_data(run_folder / "search")
        assert (page["chosen"], page["samples"]) == (index, samples)  # not made again
        assert run_main(*shlex.split(page["command"])[2:], index).status == 0
    assert "--pick=99" in run_main(*common, "--pick=99").error
    files = contents(run_folder)
    for kind in ("points", "uniform"):
        broken = {**front, kind: [{**front[kind][0], "schedule": [1.0] * 3}]}
        (run_folder / "search" / "front.json").write_text(json.dumps(broken))
        assert f"{kind}[0].schedule has 3" in run_main(*common, "--pick=0").error
    (run_folder / "search" / "front.json").write_bytes(files["search/front.json"])
    assert contents(run_folder) == files
    shares = [point["average_gflops"] / front["full_width_gflops"] for point in front["points"]]
    for budget in (1, shares[-1]):
        within = [i for i, share in enumerate(shares) if share <= budget + 1e-9]
        assert run_main(*common, "--pick", f"--flops_budget={budget}").status == 0
        best = min(within, key=lambda i: front["points"][i]["distance"])
        assert (
            json.loads((run_folder / "search" / "front.json").read_text())["chosen_point"] == best
        )
    assert "--flops_budget=0.01" in run_main(*common, "--pick", "--flops_budget=0.01").error


def page_data(folder: Path) -> dict:
    """What search/report.html shows."""
    text = (folder / "report.html").read_text()
    assert not re.findall(
        r"https?://(?!www.w3.org/2000/svg)", text
    )  # it is whole without a network
    return json.loads(re.search(r"const data = (.*);\n", text)[1])


BROWSER = shutil.which("chromium")
MEASURE = """<script>
  const box = e => e.getBoundingClientRect(), all = s => [...document.querySelectorAll(s)].map(box);
  const meets = (a, b) => a !== b && a.left < b.right && b.left < a.right
    && a.top + 3 < b.bottom && b.top + 3 < a.bottom;  // a line of text is higher than its letters
  const labels = all('.label'), marks = all('circle, rect');
  document.body.append(JSON.stringify({
    overlaps: labels.flatMap(a => [...labels, ...marks].filter(b => meets(a, b))).length,
    labels: labels.length, rows: all('#rows tr').length, strips: all('.strip').length,
    wide: document.documentElement.scrollWidth - innerWidth,
    title: title.textContent, command: command.textContent}) + '#');
</script>"""


@pytest.mark.skipif(not BROWSER, reason="there is no chromium")
@pytest.mark.parametrize("width", [1300, 500])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    """Points that lie close, and names that would end a script: no label hides another or a point,
    nothing sticks out, and #7 is point 7."""
    folder = tmp_path / "a</script>&b"
    folder.mkdir(parents=True)

    def point(share: float, schedule: list, error: float | None) -> dict:
        return {
            "distance": 0.1 + 0.02 / share, "distance_error": error, "average_gflops": share,
            "saving": 1 - share, "latency_ms": 5 * share, "schedule": schedule,
        }  # fmt: skip

    shares = [*np.linspace(0.9, 0.5, 9), *np.linspace(0.2, 0.18, 9), 0.1]
    front = {
        "label": "FID", "timesteps": [*range(100)], "full_width_gflops": 1.0, "chosen_point": 3,
        "points": [point(s, [0.25, 1] * 50, 0.004) for s in shares],
        "uniform": [point(w**2, [w] * 100, None) for w in WIDTHS], "sampled": [0, 7],
    }  # fmt: skip
    Image.new("RGB", (1600, 600), "#1668b5").save(folder / "samples.png")
    looks.write_page(folder, front, "python main.py --pick")
    path, picture = folder / "report.html", tmp_path / "page.png"
    path.write_text(path.read_text().replace("</html>", MEASURE))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
         f"--window-size={width},2400", f"--screenshot={picture}", f"{path.as_uri()}#7"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seen = json.loads(re.search(r"\{\"overlaps.*\}(?=#)", done.stdout)[0])
    assert (seen["overlaps"], seen["wide"]) == (0, 0)
    assert seen["labels"] >= 12
    assert (seen["rows"], seen["strips"]) == (len(shares) + len(WIDTHS), 2)
    assert (seen["title"], seen["command"]) == ("Point 7", "python main.py --pick 7")
    colours = dict((c, n) for n, c in Image.open(picture).convert("RGB").getcolors(2**24))
    assert colours[0xD9, 0x48, 0x0F] > 50  # the chosen point
    assert colours[0x16, 0x68, 0xB5] > 10000  # the images


def test_hypervolumes_begin_with_the_first_distance(tmp_path: Path) -> None:
    """The first generation may have none, as where every network overflows."""
    progress = report.SearchProgress(tmp_path)
    progress.note(2, [Candidate(WidthSchedule([1.0]), 2.0, 3.0, 2, {})])
    assert progress.generations[0]["hypervolume"] == pytest.approx((0.1 / 1.1) ** 2)


def test_settings_travel_with_the_schedule(run_folder: Path) -> None:
    """What uses search.txt samples as the search did, unless the command line says otherwise."""
    common = ["--flagfile=run/flagfile.txt", "--logdir=run", "--notrain", "--num_images=8",
              "--batch_size=8", "--fid_cache=stats.npz"]  # fmt: skip
    sampler = ["--sampler=ddim", "--eta=0.5", "--sample_steps=5", "--allow_skip"]
    search = [*common, *sampler, "--search", "--num_generation=1", "--pop_size=4",
              "--num_segments=2", "--search_objective=pareto"]  # fmt: skip
    assert run_main(*search).status == 0

    def scored(*flags: object) -> tuple[dict, str]:
        result = run_main(*common, "--eval_stepaware", *flags)
        assert result.status == 0, result.err
        return json.loads((run_folder / "eval_stepaware.json").read_text()), result.out

    score, said = scored()
    assert (score["sampler"]["sampler"], score["sampler"]["eta"]) == ("ddim", 0.5)
    assert "as run/search.txt was searched: " in said
    assert "--sample_steps=5" in said
    score, said = scored("--eta=0.25")
    assert (score["sampler"]["sample_steps"], score["sampler"]["eta"]) == (5, 0.25)
    assert "otherwise than run/search.txt was searched: --eta=0.25 (there 0.5)" in said
    profile = run_main(*common, "--profile").out  # of the steps that the search had
    assert "as run/search.txt was searched: " in profile
    assert f"averages {score['average_gflops']:.4f} GFLOPs" in profile
    score, said = scored("--sampler=ddpm")  # for which the search's settings are not
    assert [score["sampler"][n] for n in ("sampler", "sample_steps", "eta")] == ["ddpm", 0, 0]
    assert "--sampler=ddpm (there ddim)" in said
    # Another point of the front was searched likewise; a schedule from elsewhere was not.
    assert run_main("--search", "--logdir=run", "--pick=0").status == 0
    assert scored()[0]["sampler"]["sampler"] == "ddim"
    made = run_main(*common, "--generate", "--schedule=run/search.txt", "--out=images")
    assert made.status == 0, made.err
    assert json.loads(Path("images/images.json").read_text())["sampler"]["sampler"] == "ddim"
    # One that leaves no step out is for any sampler.
    points = json.loads((run_folder / "search" / "front.json").read_text())["points"]
    whole = next(i for i, point in enumerate(points) if 0 not in point["schedule"])
    assert run_main("--search", "--logdir=run", f"--pick={whole}").status == 0
    score, said = scored("--sampler=dpm_solver", "--sample_steps=5")
    assert score["sampler"]["sampler"] == "dpm_solver"
    path = run_folder / "search.txt"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # the same widths
    assert "as run/search.txt was searched: " in scored()[1]
    # A kill of --pick between its two files leaves a schedule that is known.
    (run_folder / "search.txt").rename("before.txt")
    assert run_main("--search", "--logdir=run", "--pick=0").status == 0
    Path("before.txt").rename(path)
    assert "as run/search.txt was searched: " in scored()[1]
    path.write_text(str([1] * 10))
    score, said = scored()
    assert score["sampler"]["sampler"] == "ddpm"
    assert "run/search.txt is not the schedule of run/search/flagfile.txt" in said
    assert "searched" not in said
    assert run_main("--search", "--logdir=run", "--pick=0").status == 0
    state = torch.load(run_folder / "ckpt.pt", weights_only=True)
    state["ema_model"]["tail.2.bias"] += 1
    torch.save(state, run_folder / "ckpt.pt")
    assert "warning: run/search.txt was searched for other weights" in scored()[1]
    # A network without weights of its own is compared with none.
    plan = run_main(*common, "--logdir=new", "--eval_stepaware", "--schedule=run/search.txt",
                    "--dry_run")  # fmt: skip
    assert plan.status == 0, plan.err
    assert "untrained" in plan.out
    assert "other weights" not in plan.out
    # Each score is kept with what it depends on.
    kept = read_jsonl(run_folder / "evaluations.jsonl")
    assert [(k["sampler"]["sampler"], k["sampler"]["eta"]) for k in kept] == [
        ("ddim", 0.5), ("ddim", 0.25), ("ddpm", 0.0), ("ddim", 0.5), ("dpm_solver", 0.0),
        ("ddim", 0.5), ("ddim", 0.5), ("ddpm", 0.0), ("ddim", 0.5),
    ]  # fmt: skip
    assert kept[0]["distance"] != kept[1]["distance"]
    # A flag that names what another mode scores is refused, not left out.
    for mode, flag in (("--eval", "--schedule=run/search.txt"),
                       ("--eval_stepaware", "--assigned_width=0.5"),
                       ("--export_diffusers=out", "--assigned_width=1")):  # fmt: skip
        assert flag.partition("=")[0] in run_main(*common, mode, flag).err
    assert kept[3]["weights"] != kept[8]["weights"]
    assert len({k["statistics_digest"] for k in kept}) == 1
    assert all(k["images"] == 8 and k["dataset"] == "digits" for k in kept)
    assert all((k["beta_T"], k["ch"], k["img_size"]) == (0.3, 16, 8) for k in kept)


def test_a_score_is_of_the_schedule_that_was_read(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--pick takes a second, and a score hours; the statistics are those that were read, too."""
    score, path = Evaluator.score, run_folder / "search.txt"
    path.write_text(line := "[0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1]\n")

    def slow(*arguments: object) -> tuple:
        path.unlink()
        return score(*arguments)

    monkeypatch.setattr(Evaluator, "score", slow)
    result = run_main("--eval_stepaware", "--logdir=run", "--device=cpu", "--num_images=8",
                      "--fid_encoder=pixels")  # fmt: skip
    assert result.status == 0, result.err
    (kept,) = read_jsonl(run_folder / "evaluations.jsonl")
    assert kept["schedule_digest"] == hashlib.sha256(line.encode()).hexdigest()[:16]
    (statistics,) = Path("stats").iterdir()
    assert kept["statistics"] == str(statistics)
