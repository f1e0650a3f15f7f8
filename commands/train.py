"""--train: train into LOGDIR, or go on with what is there; grids and scores as it goes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import build
import dataset
import options
from build import Model
from commands import plan, searched
from evaluate import Evaluator
from model import arithmetic, check_compiler, checkpoint, sampling_networks
from report import StepScores, TrainingLog
from runtime import processes
from runtime.errors import UserError
from runtime.files import alone_in, read_jsonl, save_grid, writable_folder, write_text
from runtime.identity import fingerprint
from runtime.processes import say
from sampling.generate import Generator
from settings import Configuration
from train import Milestone, Trainer


def train(config: Configuration) -> None:
    """Train the network that the settings describe, or go on with LOGDIR's."""
    if config.run.amp == "fp16":
        raise UserError("--amp=fp16 is for sampling; train with --amp=auto, bf16 or none")
    if config["distill"]:
        raise UserError(
            "--distill is gone, as it made narrow widths worse: train a new run without it, from "
            "the old one's weights with --init_checkpoint"
        )
    logdir = writable_folder(config.run.logdir)
    alone = processes.is_main() and not config.run.dry_run
    # Two runs that add to the same files, of which one was forgotten, would spoil them.
    with alone_in(logdir, wait=False) if alone else contextlib.nullcontext():
        path = build.checkpoint_path(config)
        state = checkpoint.load(path) if path.exists() else None
        own = checkpoint.own_path(path, state) if state else path
        if own != path and own.exists():
            raise UserError(
                f"{path} is kept as it is, and the run's own {own.name} is there, too: go on from "
                f"that with --ckpt_name={own.stem}, or start a new run from this one with "
                f"--init_checkpoint={path} and another --logdir"
            )
        model, images = build.model_to_train(config, state)
        shown = shown_model(model)
        trainer = make_trainer(model, images, shown)
        changed = {}
        if state is not None:
            if config.training.init_checkpoint:
                say(f"goes on from {path}: --init_checkpoint is for a run's first start")
            changed = trainer.resume(state)  # refuses before anything in the folder changes
            for name, (there, here) in changed.items():
                say(f"from step {trainer.step} on, --{name} is {here} instead of {there}")
            content = checkpoint.settings(state).get("content")
            if content and content != trainer.identity.get("content"):
                say("warning: the images are not those that the run was trained on so far")
        check_same_start(trainer, loaded=bool(state or config.training.init_checkpoint))
        for line in trainer.warnings():
            say(f"warning: {line}")
        if config.run.dry_run:
            say(plan.training_plan(trainer, model))
            return
        others = [] if state else sorted(p.stem for p in logdir.glob("[!.]*.pt"))
        if others:
            raise UserError(
                f"{logdir} has no {path.name} but {', '.join(others)}: name the one to go on from "
                "with --ckpt_name, or another --logdir to start anew"
            )
        # Where all is as it was, the run makes these very files again.
        otherwise = changed or (state and "format" not in state)
        later = [p for p in checkpoint.later(own, trainer.step) if p != path]
        if otherwise and later:
            raise UserError(
                f"{later[0]} is of a run that was trained otherwise and would pass for this one's, "
                f"which goes on from step {trainer.step}: move such files away first"
            )
        if own != path:
            say(f"{path} is kept as it is; the run goes on as {own}")
            trainer.path = own
            model = replace(model, config=model.config.changed(ckpt_name=own.stem))
        elif state and processes.is_main():
            checkpoint.keep_foreign(path, state)
        run(trainer, model, shown, logdir, state is not None, changed)


def run(
    trainer: Trainer,
    model: Model,
    shown: Model,
    logdir: Path,
    resumed: bool,
    changed: Mapping[str, Sequence],
) -> None:
    """Train to the end, with logs, grids and scores in `logdir`. shown: see shown_model. changed:
    by --allow_changes."""
    config, total, step = model.config, trainer.settings.total_steps, trainer.step
    evaluator = functools.cache(lambda: build.evaluator(shown, {}))
    log = TrainingLog(logdir, step if resumed else None)
    milestones = [
        trainer.checkpoints(),
        grids(trainer, shown, logdir, log),
        scores(trainer, evaluator, logdir, log),
    ]
    owed = []
    # Without a log the checkpoint is from elsewhere. Process 0, which soon makes one, decides.
    if resumed and processes.gather((logdir / "train.jsonl").exists())[0]:
        owed = trainer.owed(milestones)
    flagfile = logdir / "flagfile.txt"
    if processes.is_main():
        write_text(flagfile, options.flagfile_text(config.changed(allow_changes=False)))
    if step >= total and not owed:
        say(f"{trainer.path} is already at step {step} of {total}; nothing to do")
        return
    if config.training.eval_step:
        evaluator()  # what it lacks is said now, not at the first score
    with log:
        log.changes(trainer.step, changed)
        trainer.log = log.losses
        trainer.train(config.data.num_workers, milestones, owed)
    then, schedule = "--search" if config.widths.slimmable else "--eval", ""
    if config.training.finetune_schedule:
        then, schedule = "--eval_stepaware", f" --schedule {config.training.finetune_schedule}"
    say(
        f"trained: {trainer.path}, step {trainer.step} of {total}; look at {logdir / 'sample'}\n"
        "and go on with (--dry_run says first what it takes; --num_images makes it shorter)\n"
        f"  python main.py {then} --flagfile {flagfile}{schedule}\n"
        f"  python main.py --generate --flagfile {flagfile}{schedule} --num_images 16"
    )


def check_same_start(trainer: Trainer, loaded: bool) -> None:
    """Refuse where processes begin at different steps or with different weights. loaded: whether
    these come from a file, so that they are equal to the last bit."""
    if processes.world() == 1:
        return
    starts = processes.gather((trainer.step, loaded and fingerprint(trainer.net)))
    for rank, start in enumerate(starts):
        if start != starts[0]:
            weights = " with other weights" if start[0] == starts[0][0] else ""
            raise UserError(
                f"process {rank} goes on from step {start[0]}{weights}, process 0 from step "
                f"{starts[0][0]}: --logdir must be the same folder on all machines"
            )


def shown_model(model: Model) -> Model:
    """`model` as its samples and scores during training show it: with the sampler that its
    --finetune_schedule was searched with, whose steps the schedule's entries are for."""
    path = model.config.training.finetune_schedule
    return searched.as_searched(model, Path(path)) if path else model


def make_trainer(model: Model, images: dataset.AnySet, shown: Model | None = None) -> Trainer:
    """The trainer of a run, as the model's configuration describes it. shown: shown_model's, where
    the caller has it."""
    shown = shown or shown_model(model)
    config, net, device = model.config, model.net, model.device
    identity = config.stored("network", "model", "default", "training")
    if "kind" in net.settings_dict():  # a network of diffusers: its own config shapes it
        for name in (*config.stored("network"), "dropout"):
            identity.pop(name)
        identity |= config.stored("sampling")
    identity |= net.settings_dict()
    if images is not None and not config.data.latent_vae:  # latents' file says what they are of
        identity["content"] = dataset.fingerprint(images)
    if config.network.num_classes:
        identity["class_names"] = list(model.class_names)
    if model.autoencoder:
        identity["autoencoder"] = model.autoencoder.fingerprint
    if config.run.compile:
        check_compiler(device)
    build.check_batch(model, config.run.batch_size // processes.world())
    _ = shown.sampler, shown.classes  # refused now, not at the first grid

    schedule = None
    if config.training.finetune_schedule:
        schedule = shown.schedule(config.training.finetune_schedule).expanded(model.levels.T)
        if not any(schedule.widths):
            raise UserError(
                f"{config.training.finetune_schedule} leaves every step out: nothing is trained; "
                "take a schedule that has a width above 0"
            )
    # Its fingerprint: a schedule has a thousand entries.
    identity["finetune_schedule"] = schedule and schedule.fingerprint

    def choose_arithmetic() -> str:
        # The one in which a forward pass at full width takes least time.
        chosen = arithmetic.chosen(net, [1.0], config.run.amp, model.image_shape, device)[1.0]
        if config.run.amp == "auto":
            say(f"arithmetic: {chosen}")
        return chosen

    return Trainer(
        settings=config.training,
        run=config.run,
        widths=config.widths,
        net=net,
        data=images,
        levels=model.levels,
        mean_type=config.diffusion.mean_type,
        image_shape=model.image_shape,
        device=device,
        identity=identity,
        choose_arithmetic=choose_arithmetic,
        null_class=config.network.num_classes or None,
        schedule=schedule and schedule.widths,
        parallel=build.use_parallel(config, device),
    )


def shown_schedules(trainer: Trainer) -> dict[str, Sequence[float]]:
    """By name, what samples and scores are shown of during training."""
    if trainer.schedule is not None:
        return {"stepaware": trainer.schedule}
    least = trainer.widths.min_width if trainer.settings.sandwich else 1.0
    widths = sorted({1.0, least}, reverse=True)
    return {f"width_{width:g}": [width] * trainer.levels.T for width in widths}


def grids(trainer: Trainer, model: Model, logdir: Path, log: TrainingLog) -> Milestone:
    """Samples of the EMA network from x_T, really at each shown width."""
    schedules = shown_schedules(trainer)

    def path(step: int, name: str) -> Path:
        return logdir / "sample" / f"{step}_{name}.png"

    def make() -> None:
        count, columns, classes = len(trainer.x_T), 0, model.classes
        if classes:
            classes, columns = classes.in_rows(count)
        generator: Generator = replace(
            build.generator(model, {}),
            batch_size=-(-count // processes.world()),
            classes=classes,
            x_T=trainer.x_T,
            parallel=False,
            compiled=False,
            progress=False,
            each_step=trainer.give_way,
        )
        for name, schedule in schedules.items():
            networks = sampling_networks(trainer.ema.model, sorted({*schedule} - {0.0}))
            images = replace(generator, networks=networks).images(schedule, count)
            if processes.is_main():
                grid = save_grid(path(trainer.step, name), images, columns)
                log.image(f"sample/{name}", grid, trainer.step)

    def made(step: int) -> bool:
        return path(step, list(schedules)[-1]).exists()

    return Milestone(trainer.settings.sample_step, True, make, made)


def scores(
    trainer: Trainer, evaluator: Callable[[], Evaluator], logdir: Path, log: TrainingLog
) -> Milestone:
    """Scores of the EMA network at each shown width."""
    schedules = shown_schedules(trainer)
    widths = {name: fmean(schedule) for name, schedule in schedules.items()}

    def unscored(step: int) -> list[str]:
        records = read_jsonl(logdir / "train_eval.jsonl", StepScores)
        scored = {record["width"] for record in records if record["step"] == step}
        return [name for name, width in widths.items() if width not in scored]

    def make() -> None:
        for name in processes.gather(unscored(trainer.step))[0]:
            networks = sampling_networks(trainer.ema.model, sorted({*schedules[name]} - {0.0}))
            now = evaluator().varied(networks=networks, each_step=trainer.give_way)
            result, _ = now.score(schedules[name])
            values = {now.encoder.key: result.distance, "images": result.images}
            log.scores(trainer.step, name, widths[name], values)

    def made(step: int) -> bool:
        return not unscored(step)

    return Milestone(trainer.settings.eval_step, False, make, made)
