"""--search: a width schedule for the supernet in LOGDIR."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

import build
from build import Model
from commands import pick, plan, searched
from commands.evaluate import conditions
from evaluate import Evaluator
from looks import write_page
from model import WidthSchedule, latency
from report import SearchProgress, SearchResult
from runtime import memory, processes
from runtime.errors import NotFiniteError, UserError
from runtime.files import alone_in, check_place, read_json, save_grid, writable_folder, write_json
from runtime.identity import agree, fingerprint
from runtime.processes import say
from runtime.schema import Count, Name, Positive, Width
from sampling.noise import SEARCH
from sampling.prefixes import SharedStates
from sampling.protocol import Sampler, timesteps
from search import SEGMENTS, UNUSABLE, Genome, Search, warm_start
from settings import Configuration

SHOWN = 8  # images of each point


def search(config: Configuration) -> None:
    """Search a width schedule and write LOGDIR/search.txt."""
    folder, chosen = pick.places(config)
    if config.search.flops_budget and config.search.search_objective == "weighted":
        raise UserError(
            f"--flops_budget={config.search.flops_budget:g} chooses from a front: add "
            "--search_objective=pareto, or --flops_budget=0 to leave it out"
        )
    if config.run.dry_run:
        model = build.load_model_or_untrained(config)
        plan.plan_search(model, search_space(model))
        return
    host = config.search.state_device == "host"
    if "state_memory" in config.given and (
        host or build.choose_device(config.run.device).type == "cpu"
    ):
        gib = config.search.state_memory
        memory.require(int(gib * 2**30), f"--state_memory={gib:g}", "lower it")
    with alone_in(folder, wait=False) if processes.is_main() else contextlib.nullcontext():
        check_place(chosen)  # not after hours
        check_place(folder / "front.json")
        model = build.load_model(config)
        run(model, writable_folder(folder, "--search_dir"), chosen)


def run(model: Model, folder: Path, search_txt: Path) -> None:
    """Search in `folder`, and write what was chosen to `search_txt`."""
    settings, widths = model.config.search, model.config.widths.all
    search_space(model)  # refused before statistics are made
    networks = build.candidates(model, widths, folder / "arithmetic.json")
    evaluator = build.evaluator(model, networks, SEARCH).varied(progress=False)
    job = make_search(model, evaluator, folder)
    seconds = latency_table(folder, model, evaluator)
    flops = job.costs
    times = {width: model.passes_per_call * seconds[width] for width in seconds}
    if settings.cost == "latency":
        # Times are put on FLOPs' scale, so that weights and budgets mean the same for both.
        job.costs = {width: times[width] / times[1.0] * flops[1.0] for width in flops}
    progress = SearchProgress(folder)
    job.on_generation = progress.note
    candidates = job.run()
    result = SearchResult(job, candidates, flops, times, evaluator, progress.generations)
    if processes.is_main():
        searched.write(folder, model, result.stored)
        front = result.save(folder, search_txt)
        say(result.summary())
    # All processes draw their share: full width and points of the front on the same noise.
    full = WidthSchedule([1.0] * model.levels.T)
    shown = [full, *(result.front[index].schedule for index in result.sampled)]
    shown = processes.gather(shown)[0]
    try:
        rows = [evaluator.generator.images(schedule, SHOWN) for schedule in shown]
    except NotFiniteError as error:  # of full width, which need not be usable
        say(f"no images are shown: {error}")
        rows = []
    if processes.is_main():
        if rows:
            save_grid(folder / "samples.png", torch.cat(rows), columns=SHOWN)
        progress.pictures()
        write_page(folder, front, pick.command(model.config))
    say(f"saved {search_txt}; look at {folder / 'report.html'} to choose another point")


def make_search(model: Model, evaluator: Evaluator, folder: Path) -> Search:
    """The search in `folder` that the settings describe, at the cost of FLOPs.

    evaluator: of one schedule; candidates' chains share states as --state_memory says.
    """
    config, settings = model.config, model.config.search
    evaluator = evaluator.varied(states=shared_states(config, model.sampler))
    genome = search_space(model)
    start = []
    if settings.search_warm_start:
        start = warm_start(settings.search_warm_start, genome, settings.pop_size // 2)
    return Search(
        settings=settings,
        seed=config.run.seed,
        genome=genome,
        score=scores_of(evaluator),
        costs=model.flops(config.widths.all),
        objective=lambda distance, cost: (
            settings.fid_weight * distance + settings.macs_weight * cost / 2e6
        ),
        folder=folder,
        identity=search_identity(model, evaluator),
        start=start,
        images=evaluator.num_images,
        say=say,
    )


def search_space(model: Model) -> Genome:
    """The schedules that a search chooses among."""
    if not model.config.widths.slimmable:
        raise UserError("--search chooses among widths: add --slimmable_unet")
    settings, sampler = model.config.search, model.sampler
    steps, segments = timesteps(sampler), settings.num_segments
    if settings.search_method == "sensitivity" and not segments:
        segments = min(SEGMENTS, len(steps))
    return Genome(
        ((0.0,) if settings.allow_skip else ()) + tuple(model.config.widths.all),
        tuple(steps),
        model.levels.T,
        segments,
        tuple(sampler.calls()),
    )


def search_identity(model: Model, evaluator: Evaluator) -> dict[str, object]:
    """What a searched distance depends on."""
    config, networks = model.config, evaluator.generator.networks
    return {
        **config.stored("network", "model"),
        "checkpoint": config.run.ckpt_name,
        "step": model.step,
        "weights": fingerprint(model.net),
        "num_images": config.evaluation.num_images,
        "seed": config.run.seed,
        "amp": config.run.amp,
        "arithmetic": {str(width): network.arithmetic for width, network in networks.items()},
        **evaluator.encoder.identity,
        "dataset": config.data.dataset,
        "fid_cache": config.evaluation.fid_cache,
        "sampler": model.sampler.as_json(),
        "widths": config.widths.all,
        "autoencoder": None,  # but where there is one
        **conditions(model),
        "statistics": evaluator.reference.summary,
    }


def shared_states(config: Configuration, sampler: Sampler) -> SharedStates | None:
    """Where candidates leave the states that others go on from, as --state_memory says."""
    gib = config.search.state_memory
    if gib and not sampler.resumes:
        say(f"--sampler={config.sampling.sampler} cannot go on from a step: no states are shared")
    if not gib or not sampler.resumes:
        return None
    where = torch.device("cpu") if config.search.state_device == "host" else None
    return SharedStates(int(gib * 2**30), where)


def scores_of(evaluator: Evaluator):
    """What the search calls to score schedules (search.Score)."""

    def scores(schedules: Sequence[WidthSchedule], noise: int = 0):
        # Streams below 256 are those of other uses.
        stream = evaluator.generator.stream + (noise << 8)
        chosen = evaluator.varied(stream=stream) if noise else evaluator
        for index, result in chosen.score_all(schedules):
            if isinstance(result, NotFiniteError):
                say(f"a candidate is left out: {result}")
                yield index, {"distance": UNUSABLE, "unusable": str(result)}
                continue
            names = ("distance", "label", "passes", "passes_saved")
            yield index, {name: getattr(result, name) for name in names}

    return scores


class Latencies(TypedDict):
    """latency.json: seconds of an image's pass at each width, and what they were measured on."""

    device: Name
    batch_size: Count
    amp: Name
    seconds_per_image: dict[Width, Positive]


def latency_table(folder: Path, model: Model, evaluator: Evaluator) -> dict[float, float]:
    """Seconds per image of each width's pass, measured once for the search in `folder`."""
    path, config, generator = folder / "latency.json", model.config, evaluator.generator
    batch = config.run.batch_size
    about = {"device": str(model.device), "batch_size": batch, "amp": config.run.amp}
    about = processes.gather(about)[0]  # the main process measures, on its own GPU
    if processes.is_main() and not path.exists():
        say("measuring the candidates' latency")
        seconds = {
            str(width): latency(
                network, generator.image_shape, min(batch, evaluator.num_images), model.device
            )
            for width, network in generator.networks.items()
        }
        write_json(path, about | {"seconds_per_image": seconds})
    processes.gather(None)
    stored = read_json(path, Latencies, "delete it")
    times = stored["seconds_per_image"]
    missing = [w for w in generator.networks if w not in times]
    remedy = "use the same, delete it, or name another --search_dir"
    if missing:
        raise UserError(f"{path} has no times of widths {', '.join(map(str, missing))}; {remedy}")
    if config.search.cost == "latency":
        agree(path, stored, about, remedy)
    return {0.0: 0.0} | times
