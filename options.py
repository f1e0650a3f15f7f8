"""Flags: made from settings.py, read from the command line and flagfiles, and written to flagfiles.

Beside main.py the only file that knows absl.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from runtime.errors import UserError
from runtime.files import read_text
from runtime.settings import Option, options_of
from settings import GROUPS, LOOK, OPTIONS, Configuration, RetiredSettings

FLAGS = flags.FLAGS
MODES = {
    "train": "train a network, or continue training it",
    "search": "search a width schedule for a trained supernet",
    "eval": "score one width (--assigned_width)",
    "eval_stepaware": "score the schedule in LOGDIR/search.txt (or --schedule)",
    "eval_ensemble": "score a large and a small network that take turns",
    "generate": "make images and save them, at --assigned_width or by a --schedule",
    "profile": "print parameters, GFLOPs and latency of every width",
    "export_diffusers": OPTIONS["export_diffusers"].help,
}
EXAMPLES = """\
The published experiment:
  python main.py --train --flagfile config/slimmable_CIFAR10.txt --parallel --logdir work_dir
  python main.py --search --flagfile work_dir/flagfile.txt --batch_size 2048 --num_images 4096
  python main.py --eval_stepaware --flagfile work_dir/flagfile.txt --batch_size 1024
"""
HELP = ("-h", "-?", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull")


def define() -> None:
    """Define every flag, once per process."""
    for name, text in MODES.items():
        if name not in OPTIONS:
            flags.DEFINE_bool(name, False, text)
    one = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float,
           str: flags.DEFINE_string}  # fmt: skip
    many = {int: flags.DEFINE_multi_integer, float: flags.DEFINE_multi_float}
    for name, option in OPTIONS.items():
        if option.many:
            many[option.kind](name, list(option.default), option.help)
        elif option.choices:
            flags.DEFINE_enum(name, option.default, list(option.choices), option.help)
        else:
            one[option.kind](name, option.default, option.help)


define()
_typed: set[str] = set()  # what the command line itself says, as FLAGS cannot tell


# --- reading --------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read `argv`; what is no flag (the program's name first), and what a user should hear.

    The command line wins over flagfiles, for lists and modes too, and wherever it stands. Raises
    UserError; SystemExit after --help.
    """
    if set(HELP) & set(argv[1:]):
        print(help_text())
        raise SystemExit(0)
    try:
        command, files = [], []
        for name, words in _by_flag(argv[1:]):
            if name == "flagfile":
                named = words[0].partition("=")[2] or words[-1]
                files += _by_flag(_flagfile(named, (), []))
            else:
                command.append((name, words))
        said = {name for name, _ in command}
        _typed.clear()
        _typed.update(said & OPTIONS.keys())
        if "log_dir" in said:
            raise UserError("--log_dir is not an option here: did you mean --logdir?")
        if any(name in MODES and not _is_off(name, words) for name, words in command):
            said |= MODES.keys()
        kept = [words for name, words in files if name not in said]
        rest = FLAGS(
            [argv[0], *(w for words in [*kept, *(ws for _, ws in command)] for w in words)]
        )
    except (flags.Error, ValueError) as error:  # ValueError: --nosandwich=1
        raise UserError(" ".join(str(error).split())) from error
    return rest, [*_overruled(command, files), *_retired()]


def _flagfile(name: str, above: tuple[str, ...], read: list[str]) -> Iterator[str]:
    """The arguments in a flagfile, and in those that it names.

    above: the files that it is named in, which it cannot name again. read: all files so far.
    """
    path = os.path.expanduser(name)
    read.append(path)
    if path in above or len(read) > 1000:
        raise UserError(f"--flagfile={path}: flagfiles name each other without end")
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError as error:
        raise UserError(f"--flagfile={path}: there is no such file") from error
    except UserError as error:
        raise UserError(f"--flagfile={path}: {error}") from error
    for line in map(str.strip, lines):
        if nested := re.fullmatch(r"--?flagfile(?:=(.*))?", line):
            yield from _flagfile((nested[1] or "").strip(), (*above, path), read)
        elif line and not line.startswith(("#", "//")):
            yield line


def _by_flag(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, its words) for each flag, and ("", [word]) for what is none."""
    words = list(words)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?(\w+)(=.*)?", word, re.DOTALL)
        if not match:
            yield "", [word]
            continue
        name = match[1]
        if name not in FLAGS and name.startswith("no") and name[2:] in FLAGS:
            name = name[2:]
        boolean = name in FLAGS and FLAGS[name].boolean
        takes_next = not match[2] and not boolean and words and (name in FLAGS or
                                                                 name == "flagfile")  # fmt: skip
        if name == "pick" and takes_next and not re.fullmatch(r"-?\d+", words[0]):
            takes_next = False
        after = re.fullmatch(r"--?(\w+)(=.*)?", words[0], re.DOTALL) if takes_next else None
        if after and {after[1], after[1].removeprefix("no")} & {*FLAGS, "flagfile"}:
            raise UserError(f"--{name}: its value is missing, before {words[0]}")
        if name == "pick" and not match[2] and not takes_next:
            word = f"--pick={LOOK}"  # it may stand without a number
        yield name, [word, words.pop(0)] if takes_next else [word]


def _overruled(
    command: Iterable[tuple[str, list[str]]], files: Iterable[tuple[str, list[str]]]
) -> list[str]:
    """One line on what the command line says otherwise than the flagfiles."""
    said, ours = _values(files), _values(command)
    changed = [
        f"--{name}={', '.join(values)} (there {', '.join(said[name])})"
        for name, values in ours.items()
        if name in OPTIONS and name in said and said[name] != values and name != "pick"
    ]
    return [f"over the flagfile: {'; '.join(changed)}"] if changed else []


def _values(by_flag: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for name, words in by_flag:
        values.setdefault(name, []).append(_value(name, words))
    return values


def _retired() -> list[str]:
    """A line for each option that is set and no longer does anything."""
    retired = options_of(RetiredSettings).items()
    return [f"--{n} {o.help}" for n, o in retired if FLAGS[n].value != o.default]


def _value(name: str, words: Sequence[str]) -> str:
    if len(words) > 1:
        return words[1]
    text = words[0].lstrip("-")
    return text.partition("=")[2] if "=" in text else str(not text.startswith(f"no{name}")).lower()


def _is_off(name: str, words: Sequence[str]) -> bool:
    """Whether a mode is named to leave it out: --notrain, --train=false."""
    if not FLAGS[name].boolean:
        return False
    return not FLAGS[name].parser.parse(_value(name, words))


def mode() -> str:
    """The one mode that is on."""
    modes = [name for name in MODES if FLAGS[name].value]
    if len(modes) != 1:
        what = f"{len(modes)} modes at once ({', '.join(modes)})" if modes else "no mode"
        raise UserError(f"{what}: give exactly one of {', '.join('--' + m for m in MODES)}")
    return "pick" if modes == ["search"] and FLAGS.pick != -1 else modes[0]


def configuration() -> Configuration:
    """The options as they were read."""
    values = {name: FLAGS[name].value for name in OPTIONS}
    given = {name for name in OPTIONS if FLAGS[name].present}
    if values["slimmable_g16"] and "num_groups" not in given:
        values["num_groups"] = 16  # counts as given
        given.add("num_groups")
    return Configuration(values, given, _typed)


# --- writing --------------------------------------------------------------------------------------


def flagfile_text(config: Configuration) -> str:
    """The options as a flagfile has them."""
    lines = []
    for name in sorted(OPTIONS.keys() - MODES.keys() - options_of(RetiredSettings).keys()):
        value = config[name]
        if isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no{name}")
        else:
            lines += [f"--{name}={v}" for v in (value if isinstance(value, tuple) else (value,))]
    return "\n".join(lines) + "\n"


def _groups() -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """(heading, name -> (default, what it means)) of every group of flags."""
    yield (
        "Modes",
        {name: ("" if name in OPTIONS else "false", text) for name, text in MODES.items()},
    )
    for heading, classes in GROUPS.items():
        options = {n: o for each in classes for n, o in options_of(each).items()}
        yield heading, {n: (_default(o), _meaning(o)) for n, o in options.items() if n not in MODES}


def _default(option: Option) -> str:
    if option.many:
        return ", ".join(map(str, option.default))
    return str(option.default).lower() if option.kind is bool else str(option.default)


def _meaning(option: Option) -> str:
    choices = f"<{'|'.join(option.choices)}>: " if option.choices else ""
    repeat = "; repeat the flag for a list" if option.many else ""
    return choices + option.help + repeat


def help_text() -> str:
    """What --help prints."""
    lines = ["python main.py --MODE [flags]", "", EXAMPLES]
    for heading, entries in _groups():
        lines.append(f"{heading}:")
        for name, (default, meaning) in entries.items():
            shown = f" [{default}]" if default else ""
            lines.append(textwrap.fill(f"--{name}{shown}  {meaning}", 96, initial_indent="  ",
                                       subsequent_indent="      "))  # fmt: skip
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown() -> str:
    """Every flag by group, as docs/flags.md has them."""
    lines = []
    for heading, entries in _groups():
        lines += ["", f"**{heading}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for name, (default, meaning) in entries.items():
            shown = f"`{default}`" if default else ""
            lines.append(f"| `--{name}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines).strip()
