"""Settings: dataclasses whose fields say all that there is to say of an option.

A field's name, type, default, help and bounds stand in one place. Flags, their help, the range
checks and the table of flags are made from them; see options.py. No flag is known here.
"""

from __future__ import annotations

import functools
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields

from runtime.errors import UserError


@dataclass(frozen=True)
class Option:
    """What one option is.

    kind: bool, int, float or str, of each element where `many`. least, most: bounds that are
    allowed; above, below: bounds that are not. finite: whether infinity is refused. choices: the
    values there are. path: whether it names a file or folder, where ~ is the home folder. stored:
    what a checkpoint's value of it means, see settings.py.
    """

    name: str
    kind: type
    many: bool
    default: object
    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True
    choices: tuple[str, ...] | None = None
    path: bool = False
    stored: str = ""

    def parse(self, value: object) -> object:
        """`value` as this option's type, checked; it may come from JSON. Raises UserError."""
        if not self.many:
            return self._one(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"--{self.name}={value}: must be a list")
        return tuple(map(self._one, value))

    def _one(self, value: object) -> object:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is float and number:
            value = float(value)
        if not isinstance(value, self.kind) or isinstance(value, bool) != (self.kind is bool):
            raise self._wrong(value, f"must be a {self.kind.__name__}")
        if self.kind in (int, float):
            self._check_bounds(value)
        if self.kind is str and not _is_utf8(value):
            raise self._wrong(ascii(value), "must be UTF-8 without null bytes")
        if self.choices and value not in self.choices:
            raise self._wrong(value, f"one of {', '.join(self.choices)}")
        return os.path.expanduser(value) if self.path else value

    def _check_bounds(self, value: float) -> None:
        # Written so that a number that is none fails too.
        if (self.finite and not math.isfinite(value)) or math.isnan(value):
            raise self._wrong(value, "must be finite")
        if self.least is not None and not value >= self.least:
            raise self._wrong(value, f"must be at least {self.least}")
        if self.above is not None and not value > self.above:
            raise self._wrong(value, f"must be greater than {self.above}")
        if self.most is not None and not value <= self.most:
            raise self._wrong(value, f"must be at most {self.most}")
        if self.below is not None and not value < self.below:
            raise self._wrong(value, f"must be less than {self.below}")

    def _wrong(self, value: object, what: str) -> UserError:
        return UserError(f"--{self.name}={value}: {what}")


def _is_utf8(text: str) -> bool:
    """Whether this came from UTF-8, and can be a name or a line of a file."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def option(default: object, help: str, **bounds: object) -> Field:
    """A dataclass field that is an option; `bounds` are Option's."""
    return field(default=default, metadata={"help": help, **bounds})


@functools.cache
def options_of(settings: type) -> dict[str, Option]:
    """The options among the fields of a settings class, by name."""
    types = typing.get_type_hints(settings)
    found = {}
    for each in fields(settings):
        if "help" not in each.metadata:
            continue
        kind, many = types[each.name], False
        if typing.get_origin(kind) is tuple:
            kind, many = typing.get_args(kind)[0], True
        found[each.name] = Option(each.name, kind, many, each.default, **each.metadata)
    return found


class Settings:
    """Base of settings classes: whoever makes one gets it checked."""

    def __post_init__(self) -> None:
        for name, each in options_of(type(self)).items():
            object.__setattr__(self, name, each.parse(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raise UserError where values do not fit each other."""
