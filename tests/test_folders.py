"""dataset/folders.py, decoding.py, survey.py: which files are found, and what their pixels are."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, run_main
from PIL import EpsImagePlugin, Image

import dataset as data
from dataset import survey
from dataset.decoding import decode, resize_and_crop
from model import checkpoint
from runtime.errors import UserError
from settings import DataSettings


def load(folder: Path, size: int = 4, **options: str) -> data.AnySet:
    return data.load("image_folder", folder, size, options=DataSettings(**options))


def save(path: Path, color: object = (9, 99, 199), mode: str = "RGB", **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), color).save(path, **more)


def tiff(bits: int, photometric: int, rows: list[bytes], more: Sequence[tuple] = ()) -> bytes:
    """A grey TIFF of 4 pixels a row, which Pillow cannot write. more: tags."""
    count = 8 + len(more)
    entries = [(256, 4, 4), (257, 4, len(rows)), (258, 3, bits), (259, 3, 1),
               (262, 3, photometric), (273, 4, 8 + 2 + 12 * count + 4), (277, 3, 1),
               (279, 4, sum(map(len, rows))), *more]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, count) + directory + b"\0\0\0\0" + b"".join(rows)


# --- Pixels ---------------------------------------------------------------------------------------


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    pixels = np.zeros((8, 20), dtype=np.uint8)
    pixels[:, 6:14] = np.arange(8)[:, None] + 100
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.png")
    image = load(tmp_path, 8)[0]
    assert torch.equal(image, torch.from_numpy(pixels[None, :, 6:14]).expand(3, -1, -1))


def test_images_stand_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the first row is the right-hand side. Damaged EXIF data is ignored."""
    pixels = np.repeat([[10], [20], [30], [40]], 4, axis=1).astype(np.uint8)
    orientation = Image.Exif()
    orientation[274] = 6
    for name, exif in (("a", b""), ("b", orientation), ("c", b"Exif\0\0garbage, no TIFF")):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", exif=exif)
    first_rows = [image[0, 0].tolist() for image in map(load(tmp_path).__getitem__, range(3))]
    assert first_rows == [[10] * 4, [40, 30, 20, 10], [10] * 4]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_turned_tiffs_stand_upright(tmp_path: Path, compression: str | None) -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    orientation = Image.Exif()
    orientation[274] = 6
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif=orientation, compression=compression)
    assert np.asarray(decode(str(tmp_path / "a.tif"))).tolist() == [[3, 0], [4, 1], [5, 2]]


RED, HIDDEN, HALF = (200, 0, 0, 255), (0, 200, 0, 0), (0, 0, 200, 51)


@pytest.mark.parametrize(
    ("background", "behind"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))]
)
def test_transparent_pixels_show_the_background(
    tmp_path: Path, background: str, behind: tuple[int, int, int]
) -> None:
    """51 / 255 is a fifth."""
    Image.new("RGBA", (4, 4), HIDDEN).save(tmp_path / "hidden.png")
    Image.new("RGBA", (4, 4), HALF).save(tmp_path / "half.webp", lossless=True, exact=True)
    Image.new("RGBA", (4, 4), RED).save(tmp_path / "opaque.png")
    Image.new("LA", (4, 4), (0, 51)).save(tmp_path / "shape.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "z.gif", transparency=1)
    Image.new("RGB", (4, 4), (7, 8, 9)).save(tmp_path / "zz.png", transparency=(7, 8, 9))
    images = load(tmp_path, background=background)
    pixels = {Path(p).stem: images[i][:, 0, 0].tolist() for i, p in enumerate(images.paths)}
    fifth = [round(0.8 * value) for value in behind]
    assert pixels.pop("half") == pytest.approx([fifth[0], fifth[1], fifth[2] + 40], abs=1)
    assert pixels.pop("shape") == pytest.approx(fifth, abs=1)
    assert pixels == {
        "hidden": [*behind], "opaque": [200, 0, 0], "z": [*behind], "zz": [*behind],
    }  # fmt: skip
    assert "6 with alpha, on #" in data.describe(images)
    assert data.fingerprint(images) != data.fingerprint(load(tmp_path, background="red"))


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize(
    ("bits", "colour", "value", "row"),
    [
        (4, 0, struct.pack(">H", 5), b"\x05\xaf"),
        (16, 2, b"\x55\0" * 3, b"".join(bytes([x, 0]) * 3 for x in (0, 85, 170, 255))),
    ],
    ids=["4 bits grey", "16 bits colour"],
)
def test_a_transparent_value_of_other_bits_than_8(
    tmp_path: Path, bits: int, colour: int, value: bytes, row: bytes
) -> None:
    """Pixels that are thirds of white, of which the second is transparent; Pillow cannot write
    these."""
    chunks = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)),
        chunk(b"tRNS", value),
        chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)),
        chunk(b"IEND", b""),
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert load(tmp_path, background="#010101")[0][0, 0].tolist() == [0, 1, 170, 255]


def test_grey_that_was_multiplied_by_its_alpha() -> None:
    image = Image.new("LA", (4, 4), (100, 128)).convert("La")
    pixels = resize_and_crop(image, 1, 4, (0, 0, 0))
    assert pixels.tolist() == pytest.approx(np.full((1, 4, 4), 50), abs=1)


STEPS = [0, 0x555, 0xAAA, 0xFFF]  # thirds of 12 bits
TWELVE = bytes.fromhex("000555aaafff")
TWO_BYTES = struct.pack("<4H", 0, 21845, 43690, 65535)


def write_tagged(path: Path, values: list, dtype: str, tags: dict | None) -> None:
    pixels = np.array([values] * 4, dtype=dtype)
    Image.fromarray(pixels).save(path, tiffinfo=tags or {})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.with_suffix(".pgm").write_bytes(
            b"P5 4 4 4095\n" + struct.pack(">4H", *STEPS) * 4
        ),
        lambda path: path.write_bytes(tiff(12, 1, [TWELVE] * 4)),
        lambda path: path.write_bytes(tiff(16, 1, [TWO_BYTES] * 4)),
        lambda path: path.write_bytes(tiff(16, 0, [TWO_BYTES[::-1]] * 4)),  # 0 is white
        lambda path: write_tagged(path, [0, 21845, 43690, 65535], "uint16", None),
        lambda path: write_tagged(path, [-3, 0, 3, 6], "int32", {340: -3, 341: 6}),
        lambda path: write_tagged(path, [0.5, 1, 1.5, 2], "float32", {340: 0.5, 341: 2.0}),
        lambda path: write_tagged(path, [0, 85, 170, 255], "uint8", None),
    ],
    ids=["pgm 12", "tiff 12", "tiff 16", "inverted", "16", "integers", "floats", "8"],
)
def test_grey_is_scaled_from_the_range_of_its_file(tmp_path: Path, write) -> None:
    write(tmp_path / "a.tif")
    images = load(tmp_path)
    assert images.channels == 1
    assert images[0][0, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize(
    ("mode", "color", "grey", "expected"),
    [
        ("1", 1, True, [255]),
        ("L", 77, True, [77]),
        ("P", 3, False, [3, 3, 3]),
        ("CMYK", (0, 255, 255, 0), False, [255, 0, 0]),
        ("YCbCr", (77, 128, 128), False, [77, 77, 77]),
    ],
)
def test_other_modes(
    tmp_path: Path, mode: str, color: object, grey: bool, expected: list[int]
) -> None:
    image = Image.new(mode, (4, 4), color)
    if mode == "P":
        image.putpalette([value for grey in range(256) for value in [grey] * 3])
    image.save(tmp_path / "a.tif")
    images = load(tmp_path)
    assert (images.channels == 1) == grey
    assert images[0][:, 1, 1].tolist() == expected


@pytest.mark.parametrize("mode", ["F", "I", "LAB", "nan", "unsigned"])
def test_modes_without_a_rule_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    if mode == "unsigned":  # a white that Pillow's signed integers do not reach
        (tmp_path / "odd.tif").write_bytes(
            tiff(32, 1, [bytes(16)] * 4, [(340, 4, 0), (341, 4, 2**32 - 1)])
        )
        mode = "I"
    elif mode != "nan":
        Image.new(mode, (4, 4)).save(tmp_path / "odd.tif")
    if mode == "nan":
        write_tagged(tmp_path / "odd.tif", [np.nan] * 4, "float32", {340: 0.0, 341: 1.0})
        with pytest.raises(UserError, match=r"odd\.tif.*finite"):
            load(tmp_path)[0]
        return
    with pytest.raises(UserError, match=rf"odd\.tif \(mode {mode}"):
        load(tmp_path)


def test_only_named_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.delattr(EpsImagePlugin, "Ghostscript")
    with pytest.raises(UserError, match=r"a\.png \(it is none of JPEG"):
        load(tmp_path)


def test_files_that_would_take_all_memory_or_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 1 20000000 255\n")
    (tmp_path / "b.pgm").write_bytes(b"P5 100000 100000 255\n")
    os.mkfifo(tmp_path / "c.png")
    os.symlink("nowhere", tmp_path / "d.png")
    with pytest.raises(UserError, match="cannot read 4 of 4 images: ") as error:
        load(tmp_path)
    for name in ("a.pgm (1×20000000", "b.pgm (", "c.png (cannot use", "d.png (No such file"):
        assert f"/{name}" in str(error.value)


def test_all_torn_files_are_found_before_anything_else(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 90)
    for i, ending in enumerate(("png", "jpg", "webp", "gif", "bmp", "tif", "ppm")):
        noise.save(tmp_path / f"{i}.{ending}")
        noise.save(tmp_path / f"whole{i}.{ending}")
        content = (tmp_path / f"{i}.{ending}").read_bytes()
        (tmp_path / f"{i}.{ending}").write_bytes(content[:-200])
    noise.save(tmp_path / "more_after_its_end.jpg")
    with open(tmp_path / "more_after_its_end.jpg", "ab") as file:
        file.write(bytes(1000))
    with pytest.raises(UserError, match=r"7 of 15 images: .*/0\.png .*/4\.bmp .*, …"):
        load(tmp_path)


# --- The look at all headers ----------------------------------------------------------------------


def test_colour_anywhere_makes_three_channels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 77, "L")
    grey = load(tmp_path)
    assert grey.channels == 1
    before = data.fingerprint(grey)
    save(tmp_path / "b.png")
    mixed = load(tmp_path)
    assert (mixed.channels, mixed[0].shape, load(tmp_path, channels="3").channels) == (
        3,
        (3, 4, 4),
        3,
    )
    assert "3 channels (1 in colour, 1 grey)" in data.describe(mixed)
    as_grey = load(tmp_path, channels="1")
    assert (as_grey.channels, as_grey[1].shape) == (1, (1, 4, 4))
    assert len({before, data.fingerprint(mixed), data.fingerprint(as_grey)}) == 3


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers were read."""
    paths, read_header = [], survey.read_header

    def counting(path: str) -> object:
        paths.append(Path(path).name)
        return read_header(path)

    monkeypatch.setattr(survey, "read_header", counting)
    return paths


def test_headers_are_read_once(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    for name in ("a.png", "b.png"):
        save(folder / name)
    first = load(folder)
    assert load(folder).survey == first.survey
    assert sorted(looks) == ["a.png", "b.png"]
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "b.png"]
    (file,) = (tmp_path / "cache").rglob("*.json")
    for damaged in ("", "[]", "{", json.dumps({**json.loads(file.read_text()), "largest": [1]})):
        file.write_text(damaged)
        looks.clear()
        assert load(folder).survey == first.survey
        assert len(looks) == 2
    save(folder / "b.png", 7, "L")
    assert load(folder).survey.colour == 1


def test_cache_that_cannot_be_written(
    tmp_path: Path, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    save(tmp_path / "a.png")
    for _ in range(2):
        assert load(tmp_path).channels == 3
    assert len(looks) == 2


# --- Which files ----------------------------------------------------------------------------------


def test_what_is_found_and_what_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b/9.png", "a/x/2.jfif", "a/3.GIF", "b/10.png"):
        save(root / name, format={"f": "JPEG", "F": "GIF"}.get(name[-1]))
    save(tmp_path / "elsewhere" / "linked.png")
    os.symlink(tmp_path / "elsewhere", root / "c")
    os.symlink(root, root / "b" / "loop")
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/b/._9.png", "b/.Trash-1000/old.png"):
        save(root / name)
    for name in ("b/._9.png", "b/notes.txt", "photo.heic", os.fsdecode(b"a.\xff")):
        (root / name).write_bytes(b"no image")
    os.symlink("itself", root / "itself")
    images = load(root)
    names = [str(Path(path).relative_to(root)) for path in images.paths]
    assert names == ["a/3.GIF", "a/x/2.jfif", "b/10.png", "b/9.png", "c/linked.png"]
    assert (images.classes, images.labels.tolist()) == (("a", "b", "c"), [0, 0, 1, 1, 2])
    for part in (
        "5 images of 4×4 pixels, 3 channels, 3 classes (a, b, c), mirrored",
        "hidden or trash folders: 3 (.Trash-1000, .ipynb_checkpoints, __MACOSX)",
        "hidden files: 1", "other files: 4 ", "1 .heic", "1 .txt", "1 .?", "links back to a folder",
    ):  # fmt: skip
        assert part in data.describe(images)
    save(root / "loose.png")
    assert load(root).labels is None


def test_order_of_files_and_classes(tmp_path: Path) -> None:
    """Files in the order of their names as text, as ever; classes as people count."""
    for name in ("10", "9", "1", "a2b", "a10b"):
        save(tmp_path / name / "x.png")
    images = load(tmp_path)
    assert [Path(path).parent.name for path in images.paths] == ["1", "10", "9", "a10b", "a2b"]
    assert images.classes == ("1", "9", "10", "a2b", "a10b")
    assert images.labels.tolist() == [0, 2, 1, 4, 3]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "photo.heic").write_bytes(b"")
    for folder in ("missing", "empty"):
        with pytest.raises(UserError, match=rf"image_folder: .*{folder}"):
            load(tmp_path / folder)
    with pytest.raises(UserError, match=r"1 \.heic"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="test split"):
        data.load("image_folder", tmp_path, 8, train=False)
    for name in ("a", os.fsdecode(b"\xff")):
        save(tmp_path / "classes" / name / "a.png")
    with pytest.raises(UserError, match=r"'\\udcff' .* UTF-8"):
        load(tmp_path / "classes")


# --- Options --------------------------------------------------------------------------------------


def test_flip(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert [load(tmp_path, flip=flip).flip for flip in ("auto", "on", "off")] == [True, True, False]
    digits = [
        data.load("digits", ".", 8, options=DataSettings(flip=flip)).flip
        for flip in ("auto", "on", "off")
    ]
    assert digits == [False, True, False]


@pytest.mark.parametrize("option", ["background", "channels", "flip"])
def test_unknown_options_are_refused(tmp_path: Path, option: str) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"--{option}=nonsense"):
        load(tmp_path, **{option: "nonsense"})
    with pytest.raises(UserError, match="--channels=3: digits has 1"):
        data.load("digits", ".", 8, options=DataSettings(channels="3"))


# --- Through the program --------------------------------------------------------------------------

FOLDER = [*TRAIN, "--dataset=image_folder", "--data_root=photos", "--logdir=run", "--sample_step=0"]
EVAL = ["--eval", "--data_root=photos", "--logdir=run", "--device=cpu", "--num_images=20"]
EVAL += ["--batch_size=20", "--fid_encoder=pixels", "--fid_cache=stats.npz"]


def test_classes_of_a_run(refused: Callable[..., str], here: Path) -> None:
    for count, name in enumerate(("1", "2", "10"), 1):
        for i in range(count):
            save(here / "photos" / name / f"{i}.png", (80 * count, 0, 0))
    training = [*FOLDER, "--num_classes=3", "--total_steps=1"]
    result = run_main(*training)
    assert result.status == 0, result.err
    assert "6 images of 4×4 pixels, 3 channels, 3 classes (1, 2, 10), mirrored" in result.out
    path = here / "run" / "ckpt.pt"

    def names_and_frequencies() -> tuple[list[str], list[float]]:
        state = checkpoint.load(path)
        frequencies = 6 * state["net_model"]["class_embedding.frequencies"]
        return state["settings"]["class_names"], frequencies.round().tolist()

    assert names_and_frequencies() == (["1", "2", "10"], [1, 2, 3])
    result = run_main(*EVAL, "--classes=10,0,2")
    assert "--classes: 10 (2), 1 (0), 2 (1)" in result.out
    assert json.loads((here / "run" / "eval.json").read_text())["classes"] == [2, 0, 1]
    refused(r"--classes: .* 3; .* 0 to 2", *EVAL, "--classes=3")
    refused(r"--classes=cat.*1, 2, 10", *EVAL, "--classes=cat")

    state = checkpoint.load(path)
    del state["settings"]["class_names"]  # from before names were kept: the order was the text's
    checkpoint.save(path, state)
    refused(r"--classes=cat", *EVAL, "--classes=cat")
    result = run_main(*training, "--total_steps=2")
    assert "3 classes (1, 10, 2)" in result.out
    assert names_and_frequencies()[0] == ["1", "10", "2"]
    (here / "photos" / "2").rename(here / "photos" / "3")
    refused("3 classes.* 2, 3 ", *training, "--total_steps=3")


def test_how_images_are_read_is_kept(refused: Callable[..., str], here: Path) -> None:
    """The checkpoint says the background, so evaluation has the statistics of what was learnt."""
    for i in range(3):
        save(here / "photos" / f"{i}.png", (80 * i, 0, 0, 0), "RGBA")
    training = [*FOLDER, "--total_steps=1", "--background=black", "--channels=1", "--flip=off"]
    result = run_main(*training)
    assert result.status == 0, result.err
    assert "1 channel (3 in colour" not in result.out
    assert "3 with alpha, on #000000, not mirrored" in result.out
    settings = checkpoint.load(here / "run" / "ckpt.pt")["settings"]
    assert [settings[name] for name in ("background", "channels", "flip")] == ["black", "1", "off"]
    assert run_main(*EVAL).status == 0
    with np.load("stats.npz", allow_pickle=False) as statistics:
        assert statistics["mu"].shape == (64,)
        assert np.ptp(statistics["mu"]) == 0
        assert statistics["mu"][0] <= 0
    refused("flip: off there, on here", *training, "--flip=on", "--total_steps=2")
    refused("--background=nothing", *training, "--background=nothing")
    (here / "photos" / "torn.png").write_bytes((here / "photos" / "0.png").read_bytes()[:40])
    refused(r"1 of 4 images: photos/torn\.png", *FOLDER, "--logdir=new")
