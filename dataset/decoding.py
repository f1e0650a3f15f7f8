"""One image file: what its header says, and its pixels as 8-bit grey or colour.

This file knows Pillow, its formats and modes, and the rule for each mode. It does not know data
sets.

Rules: of an animation the first frame; upright by its EXIF orientation; transparent pixels on the
background; 8-bit modes by Pillow's own conversion; 16-bit grey from the range that its format says
(0 to 65535, or 2^bits − 1); other integers and floats only from the range that a TIFF's
SMinSampleValue and SMaxSampleValue say. What has no rule is an error.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch

from runtime.errors import UserError, one_line
from runtime.files import check_file

if TYPE_CHECKING:
    from PIL import Image

# Nothing else is opened: for some formats Pillow starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
LONGEST_SIDE = 100  # in shorter sides: resizing makes the longer side as much longer
_EIGHT_BIT = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV",
)  # fmt: skip
_GREY = ("1", "L", "LA", "La", "I", "F")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_BITS, _PHOTOMETRIC, _LEAST, _LARGEST = 258, 262, 340, 341  # tags of TIFF


class Header(NamedTuple):
    """What is known of an image without decoding it. rescaled: it has a range other than 8 bits'
    or 0 to 65535."""

    width: int
    height: int
    grey: bool
    alpha: bool
    rescaled: bool


def read_header(path: str) -> Header:
    """The header of an image file that can be decoded; raises many kinds of errors for others.

    Truncated files count as such: those whose end is not as their format ends are decoded.
    """
    from PIL import Image

    check_file(path)
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        _check(image)
        header = Header(
            *image.size,
            grey=image.mode.split(";")[0] in _GREY,
            alpha=has_alpha(image),
            rescaled=_value_range(image) not in (None, (0, 65535)),
        )
        position = file.tell()
        complete = _ends_as_it_should(file, image.format)
        file.seek(position)
        if not complete:
            image.load()
        if image.mode == "F":
            _to_eight_bits(image, *_value_range(image))  # some values may not be finite
    return header


def decode(path: str | io.BytesIO) -> Image.Image:
    """One image, upright, in one of Pillow's 8-bit modes. UserError names a file that cannot be
    decoded."""
    from PIL import Image, ImageOps

    try:
        if isinstance(path, str):
            check_file(path)
        # Opened here: what Pillow opens by name it may map into memory, and a TIFF that its
        # orientation turns comes out torn then.
        with (
            open(path, "rb") if isinstance(path, str) else path as content,
            Image.open(content, formats=FORMATS) as file,
        ):
            _check(file)
            value_range = _value_range(file)
            _scale_transparent_value(file)
            file.load()
            try:
                image = ImageOps.exif_transpose(file)
            except Exception:  # damaged EXIF data, which is no reason to lose the image
                image = file.copy()
        return image if value_range is None else _to_eight_bits(image, *value_range)
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        where = path if isinstance(path, str) else "in the database"
        raise UserError(
            f"cannot read the image {where} ({reason(error)}): repair it or remove it from the "
            "folder"
        ) from error


def resize_and_crop(
    image: Image.Image, channels: int, img_size: int, background: tuple[int, int, int]
) -> torch.Tensor:
    """uint8 (channels, img_size, img_size): on the background, shorter side resized, centre."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    if has_alpha(image):
        # Pillow makes nothing else of La, grey that was multiplied by its alpha.
        image = image.convert("LA") if image.mode == "La" else image
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image = functional.resize(image, [img_size])  # Pillow's bilinear is antialiased
    image = functional.center_crop(image, [img_size, img_size])
    return functional.pil_to_tensor(image)


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels may be transparent."""
    return image.mode in _ALPHA or "transparency" in image.info


def reason(error: Exception) -> str:
    """What an error of Pillow or of the system says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) if isinstance(error, UserError) else one_line(error)


def _check(image: Image.Image) -> None:
    """Raise ValueError for what cannot be used whatever its pixels are."""
    width, height = image.size
    if max(width, height) > LONGEST_SIDE * min(width, height):
        raise ValueError(
            f"{width}×{height} pixels: one side is over {LONGEST_SIDE} times the other"
        )
    if _value_range(image) is not None and has_alpha(image):
        raise ValueError(f"mode {image.mode} with a transparent value: save it as 8 bits")


def _value_range(image: Image.Image) -> tuple[float, float] | None:
    """The values that are black and white; None for the 8-bit modes."""
    if image.mode in _EIGHT_BIT:
        return None
    if image.mode.split(";")[0] not in ("I", "F"):
        raise ValueError(f"mode {image.mode}: save it as RGB")
    tags = getattr(image, "tag_v2", {})
    black, white = (_first(tags.get(tag)) for tag in (_LEAST, _LARGEST))
    sixteen_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if sixteen_bits:
        black, white = 0, 2 ** int(_first(tags.get(_BITS)) or 16) - 1
    elif not (isinstance(black, (int, float)) and isinstance(white, (int, float))):
        black = white = 0
    # Pillow's integers end at 2^31 − 1; larger ones came out negative.
    fits = image.mode == "F" or white < 2**31
    if not (np.isfinite([black, white]).all() and black < white and fits):
        raise ValueError(f"mode {image.mode} and no range of its values: save it as 8 or 16 bits")
    return (white, black) if tags.get(_PHOTOMETRIC) == 0 else (black, white)


def _scale_transparent_value(image: Image.Image) -> None:
    """Of PNGs of 2, 4 and 16 bits: Pillow makes their pixels 8 bits, but not this value."""
    if image.format == "PNG" and "transparency" in image.info:
        raw_mode = image.tile[0][3]
        if raw_mode in ("L;2", "L;4"):
            image.info["transparency"] *= 85 if raw_mode == "L;2" else 17
        elif raw_mode == "RGB;16B":  # the upper half, as Pillow takes of the pixels
            image.info["transparency"] = tuple(x >> 8 for x in image.info["transparency"])


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) and value else value


def _to_eight_bits(image: Image.Image, black: float, white: float) -> Image.Image:
    """Grey values as mode L; Pillow's own conversion clips instead of scaling."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some of its values are not finite")
    values = (values - black) / ((white - black) / 255)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _ends_as_it_should(file: BinaryIO, kind: str | None) -> bool:
    """Whether the last bytes are those that end a file of this format. False also where the format
    has no such bytes, or others follow them."""
    file.seek(0)
    start = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 32))
    end = file.read()
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in end
    if kind == "PNG":
        return b"IEND" in end
    if kind == "GIF":
        return end.endswith(b";")
    if kind == "WEBP":
        return size >= 8 + int.from_bytes(start[4:], "little")
    return False
