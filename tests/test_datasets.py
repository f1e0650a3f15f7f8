"""dataset/sets.py: each large set in its real layout, and archives that were unpacked in part."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAIN, run_main
from PIL import Image

import dataset as data
from dataset import sets
from runtime.errors import UserError


def picture(path: Path, value: int = 128, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path, format=FORMATS[path.suffix])


FORMATS = {".jpg": "JPEG", ".JPEG": "JPEG", ".png": "PNG", ".webp": "WEBP"}
SYNSETS = ("n01440764", "n01443537", "n01484850")
LAYOUTS = {
    "celeba": [f"celeba/img_align_celeba/{i:06d}.jpg" for i in range(1, 7)],
    "celeba_hq": [f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg" for i in range(6)],
    "afhq": [f"afhq/train/{c}/{i}.png" for c in ("cat", "dog", "wild") for i in range(2)],
    "lsun_bedroom": [f"bedroom_train/{i}/f/{i}a.webp" for i in range(6)],
    "imagenet": [f"train/{c}/{c}_{i}.JPEG" for c in SYNSETS for i in range(2)],
}


@pytest.fixture(autouse=True)
def six_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets have six images here, and ImageNet three classes."""
    monkeypatch.setattr(sets, "COUNTS", dict.fromkeys(sets.COUNTS, 6))
    monkeypatch.setitem(sets.CLASSES, "imagenet", 3)


@pytest.fixture(params=LAYOUTS)
def unpacked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A set's name, and the folder that holds it."""
    for i, path in enumerate(LAYOUTS[request.param]):
        picture(tmp_path / path, 40 * i)
    return request.param, tmp_path


def test_real_layouts(unpacked: tuple[str, Path]) -> None:
    name, root = unpacked
    found = data.load(name, root, 8)
    assert (found.name, len(found), found.channels, found.flip) == (name, 6, 3, True)
    assert found[0].shape == (3, 8, 8)
    # In the order of their paths, as they were made.
    assert [round(int(found[i][0].float().mean()) / 40) for i in range(6)] == [*range(6)]
    if name in ("afhq", "imagenet"):
        assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert found.labels.dtype == torch.int64
        assert found.classes == (SYNSETS if name == "imagenet" else ("cat", "dog", "wild"))
    else:
        assert (found.labels, found.classes) == (None, ())


def test_nothing_there(unpacked: tuple[str, Path], tmp_path: Path) -> None:
    name, _ = unpacked
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "all.zip").write_bytes(b"PK")
    for root, match in (("nowhere", "nowhere.*--data_root"), ("empty", r"--data_root.*all\.zip")):
        with pytest.raises(UserError, match=rf"{name}: .*{match}"):
            data.load(name, tmp_path / root, 8)


def test_unpacked_in_part(unpacked: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few images, or a last one that is torn."""
    name, root = unpacked
    last = root / LAYOUTS[name][-1]
    Image.effect_noise((64, 64), 90).convert("RGB").save(last, format=FORMATS[last.suffix])
    last.write_bytes(last.read_bytes()[:-900])
    with pytest.raises(UserError, match=last.name):
        data.load(name, root, 8)
    monkeypatch.setattr(sets, "COUNTS", dict.fromkeys(sets.COUNTS, 100))
    with pytest.raises(UserError, match=rf"^{name}: [^\n]* has 6 of [^\n]* 100 [^\n]*$") as error:
        data.load(name, root, 8)
    folder = re.search(r": (\S+) has 6", str(error.value))[1]
    (Path(folder).parent / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"images\.zip"):
        data.load(name, root, 8)


def test_classes_that_are_not_there(tmp_path: Path) -> None:
    for path in LAYOUTS["afhq"][:4]:
        picture(tmp_path / path)
    with pytest.raises(UserError, match=r"afhq: .* 2 folders.* 3 classes"):
        data.load("afhq", tmp_path, 8)
    (tmp_path / "afhq" / "train" / "wild").mkdir()
    with pytest.raises(UserError, match="train/wild"):
        data.load("afhq", tmp_path, 8)
    for name in SYNSETS[:2]:
        picture(tmp_path / "train" / name / "a.JPEG")
    (tmp_path / "train" / "n01484850.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 folders.*n01484850\.tar"):
        data.load("imagenet", tmp_path, 8)


def test_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "COUNTS", dict.fromkeys(sets.COUNTS, 1))
    for path in LAYOUTS["celeba"]:
        picture(tmp_path / path)
    with pytest.raises(UserError, match="list_eval_partition"):
        data.load("celeba", tmp_path, 8, train=False)
    lines = [f"{i:06d}.jpg {part}" for i, part in enumerate((0, 0, 0, 1, 2, 2), 1)]
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    partition.write_text("\n".join(lines) + "\n")
    assert len(data.load("celeba", tmp_path, 8)) == 3
    assert len(data.load("celeba", tmp_path, 8, train=False)) == 2
    partition.write_text("no list of pairs here\n")
    with pytest.raises(UserError, match="list_eval_partition"):
        data.load("celeba", tmp_path, 8)
    for folder in ("cat", "dog", "wild"):
        picture(tmp_path / "afhq" / "val" / folder / "a.jpg")
    assert len(data.load("afhq", tmp_path, 8, train=False)) == 3
    with pytest.raises(UserError, match="no test split"):
        data.load("celeba_hq", tmp_path, 8, train=False)


def test_lsun_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bedroom_train_lmdb"
    folder.mkdir()
    with pytest.raises(UserError, match=r"no data\.mdb: unpack bedroom_train_lmdb\.zip again"):
        data.load("lsun_bedroom", tmp_path, 8)
    (folder / "data.mdb").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install lmdb"):
            data.load("lsun_bedroom", tmp_path, 8)
    lmdb = pytest.importorskip("lmdb")
    with pytest.raises(UserError, match=r"lsun_bedroom: cannot read .*lmdb \("):
        data.load("lsun_bedroom", tmp_path, 8)
    (folder / "data.mdb").unlink()
    with lmdb.open(str(folder)) as database, database.begin(write=True) as transaction:
        for i in range(3):
            picture(tmp_path / "a.webp", 90 * i)
            transaction.put(f"{i}".encode(), (tmp_path / "a.webp").read_bytes())
    found = data.load("lsun_bedroom", tmp_path, 8)
    assert (len(found), found[2].shape, found.labels) == (3, (3, 8, 8), None)
    # A run loads it for training and for statistics, and lmdb opens a database once per process.
    again = data.load("lsun_bedroom", tmp_path, 8)
    for images, workers in ((found, 0), (again, 0), (found, 1), (again, 1)):
        many = torch.cat(list(data.everything(images, 2, num_workers=workers)))
        assert [round(int(image[0].float().mean()) / 90) for image in many] == [0, 1, 2]


# --- recipes --------------------------------------------------------------------------------------

GFLOPS = {
    "celeba": 53.79, "celeba_hq": 53.79, "afhq": 53.79, "imagenet": 79.43, "imagenet_latent": 79.69,
    "lsun_bedroom": 53.79, "slimmable_CIFAR10": 12.44, "image_folder_64": 46.74,
}  # fmt: skip


@pytest.mark.parametrize("name", GFLOPS)
def test_recipes_cost_what_they_say(name: str) -> None:
    import score
    from model import SlimmableUNet

    flags: dict[str, list[str]] = {}
    text = (ROOT / "config" / f"{name}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("--"):
            flag, _, value = line.removeprefix("--").partition("=")
            flags.setdefault(flag, []).append(value)
    latent = {"imagenet_latent": (4, 8), "lsun_bedroom": (3, 4)}
    channels, factor = latent.get(name, (3, 1))
    side = int(flags["img_size"][0]) // factor
    with torch.device("meta"):
        net = SlimmableUNet(
            1000, int(flags["ch"][0]), [*map(int, flags["ch_mult"])], [*map(int, flags["attn"])],
            int(flags["num_res_blocks"][0]), 0.0, in_ch=channels,
            skip_slicing=flags.get("skip_slicing", ["leading"])[0],
            norm_groups=flags.get("norm_groups", ["fixed"])[0],
        )  # fmt: skip
    for width in (1.0, 0.75, 0.5, 0.25):
        net.check_width(width)
    gflops = score.flops(net, 1.0, (channels, side, side)) / 1e9
    assert gflops == pytest.approx(GFLOPS[name], abs=0.006)
    assert f"{GFLOPS[name]:.2f}" in text
    assert f"{GFLOPS[name]:.2f}" in (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_training_from_a_real_layout(here: Path) -> None:
    for path in LAYOUTS["imagenet"]:
        picture(here / path)
    result = run_main(*TRAIN, "--dataset=imagenet", "--num_classes=3", "--data_root=.",
                      "--logdir=run", "--total_steps=1", "--sample_step=0")  # fmt: skip
    assert result.status == 0, result.err
    assert (here / "run" / "ckpt.pt").exists()


def test_every_data_set_is_on_its_page() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [name for name in data.NAMES if f"| `{name}` |" not in text] == []
    recipes = [path.stem for path in (ROOT / "config").glob("*.txt")]
    assert [name for name in recipes if f"| `{name}` |" not in text] == []
