"""What a stored value may be: one mechanism, msgspec's, for every text that is read.

The schema of a file is a TypedDict or a type beside its owner, of the types below. Names that a
schema does not know, as a newer version may write, are passed over; docs/files.md has them all.
Two of something are a list: msgspec 0.22 reads beyond a tuple of two beside bounded numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from runtime.errors import UserError

T = TypeVar("T")

# Never NaN nor infinite. 1e30 stands for what has no distance, and its square is still a number.
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
Amount = Annotated[float, Meta(ge=0, le=1e30)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Width = Annotated[float, Meta(ge=0, le=1)]
Widths = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=2**20)]  # of a schedule
Name = Annotated[str, Meta(max_length=2**12)]
Size = Annotated[int, Meta(ge=1, le=2**20)]  # channels, pixels a side
Few = Annotated[int, Meta(ge=0, le=2**6)]  # layers of a block
SHORT = Meta(min_length=1, max_length=2**6)
TWO = Meta(min_length=2, max_length=2)


def widths_line(widths: Iterable[float]) -> str:
    """A width schedule as search.txt has it: one line of JSON."""
    return json.dumps([int(w) if w == int(w) else w for w in widths]) + "\n"


def digest(text: str) -> str:
    """16 hexadecimal digits that another text would change."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(value: object, schema: type[T], name: object, remedy: str = "") -> T:
    """`value`, which came from JSON, as `schema` says: tuples for lists, numbers for keys, without
    the entries that it does not know. UserError, which begins with `name`, where it is not so."""
    try:
        return msgspec.convert(value, schema, str_keys=True)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        what, _, place = str(error).partition(" - at ")
        place = place.strip("`").removeprefix("$").removeprefix(".")
        what = what[:1].lower() + what[1:].replace("`", "")
        parts = [str(name), *([place] if place else []), what]
        raise UserError(": ".join(parts) + (f"; {remedy}" if remedy else "")) from error
