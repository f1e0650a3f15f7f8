"""search/flagfile.txt: what a search's schedule was searched with, and who uses the schedule so.

It is a flagfile of every option, which repeats the search, below two comments: fingerprints of the
schedule that is in use, and of the weights.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import options
from build import Model
from commands.pick import NAME, fingerprint_of, schedules_of
from model import WidthSchedule
from runtime.errors import UserError
from runtime.files import parse_json, read_text, write_text
from runtime.identity import fingerprint
from runtime.schema import digest, widths_line
from runtime.settings import options_of
from settings import OPTIONS, Configuration, SamplingSettings

log = logging.getLogger("ddsm")
# What a schedule is best used with; the classes are a question of what is wanted.
TAKEN = (options_of(SamplingSettings).keys() | {"allow_skip"}) - {"classes"}


def schedule_path(config: Configuration) -> Path:
    """The file of the schedule to use. UserError where the command line names a width instead."""
    if "assigned_width" in config.typed:
        raise UserError(
            "--assigned_width: this mode uses a schedule (T times the same number for one width); "
            "--eval and --generate use one width"
        )
    return Path(config.evaluation.schedule or Path(config.run.logdir) / "search.txt")


def write(folder: Path, model: Model, chosen: WidthSchedule) -> None:
    """Say in a search's folder what the schedule that it chose was searched with."""
    schedule, weights = digest(widths_line(chosen.widths)), fingerprint(model.net)
    text = options.flagfile_text(model.config)
    write_text(folder / NAME, f"# schedule: {schedule}\n# weights: {weights}\n{text}")


def as_searched(model: Model, path: Path) -> Model:
    """`model` with the sampler that the schedule in `path` was searched with.

    The command line wins over that, and that over flagfiles; where it names another sampler, the
    settings of the search's are not for it. Nothing is taken over where the file is not what a
    search beside it wrote. What differs is logged; of weights, where `model` has a source.
    """
    text = _companion(path)
    if not text:
        return model
    config, taken, kept, other = model.config, {}, [], []
    network = config.stored("network", "model")
    given, sampler = config.typed, re.search(r"^--sampler=(.*)$", text, re.MULTILINE)
    if "sampler" in given and sampler and sampler[1] != config["sampler"]:
        given = TAKEN | config.typed
        if 0 in parse_json(read_text(path), path):  # its skipped steps are the schedule itself
            given -= {"allow_skip"} - config.typed
    for line in text.splitlines():
        try:
            name, value = _parsed(line)
        except ValueError as error:
            raise UserError(f"{path} was searched with a {NAME} that has {line!r}") from error
        if name in network and value != config[name]:
            other.append(f"--{name}={config[name]} (there {value})")
        if name not in TAKEN or value == config[name]:
            continue
        if name in given:
            kept.append(f"--{name}={config[name]} (there {value})")
        else:
            taken[name] = value
    if taken:
        named = ", ".join(f"--{name}={value}" for name, value in taken.items())
        log.info(f"as {path} was searched: {named}")
    if kept:
        log.info(f"otherwise than {path} was searched: {', '.join(kept)}")
    weights = re.search(r"^# weights: (\w+)", text, re.MULTILINE)
    # A model without a source has not got its weights yet: training goes on from a checkpoint.
    if weights and model.source and weights[1] != fingerprint(model.net):
        log.info(f"warning: {path} was searched for other weights than those of {model.source}")
    if other:
        log.info(f"warning: {path} was searched for another network: {', '.join(other)}")
    return replace(model, config=config.changed(**taken))


def _companion(path: Path) -> str:
    """The flagfile of the search that wrote the schedule in `path`; "" where there is none."""
    for place in (path.parent / "search" / NAME, path.parent / NAME):
        if path.is_file() and place.is_file():
            text = read_text(place)
            stated = schedules_of(text)
            if fingerprint_of(path) in stated:
                return text
            if stated:
                log.info(f"{path} is not the schedule of {place}: the sampler is that of the flags")
    return ""


def _parsed(line: str) -> tuple[str, object]:
    """A flagfile's line as (name, value); ("", None) for what is no option of one value."""
    match = re.fullmatch(r"--(\w+)(?:=(.*))?", line)
    if not match:
        return "", None
    name, text = match.groups()
    if name not in OPTIONS and name.startswith("no"):
        name, text = name[2:], "false"
    option = OPTIONS.get(name)
    if option is None or option.many:
        return "", None
    if option.kind is bool:
        return name, text != "false"
    return name, option.parse(option.kind(text or ""))
