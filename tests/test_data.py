"""data.py: order, resume and shares of batches; pixel ranges; folders; what is refused."""

import gzip
import hashlib
import itertools
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import dataset as data
from runtime.errors import UserError


def first(n, batches):
    return list(itertools.islice(batches, n))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def numbered(n, flip=False, size=2):
    """n images that say their own number, dark on the left."""
    tensor = torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, size, size)
    tensor[..., 0] = 0
    return data.Images("numbered", tensor, flip)


@pytest.fixture
def photos(tmp_path):
    """Six colour images of different sizes in nested folders, and a hidden leftover."""
    random = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.PNG")
    (tmp_path / "photos" / "._0.png").write_bytes(b"no image")
    return tmp_path / "photos"


# --- Sets -----------------------------------------------------------------------------------------


def test_names_are_the_table():
    small = ("cifar10", "fashion_mnist", "image_folder", "digits")
    assert (*small, "celeba", "celeba_hq", "afhq", "lsun_bedroom", "imagenet") == data.NAMES
    with pytest.raises(UserError, match=r"unknown data set 'mnist': choose one of cifar10, "):
        data.load("mnist", ".", 8)


def test_digits_are_the_real_ones():
    digits = data.load("digits", "nowhere", 8)
    assert (len(digits), digits.channels, digits.flip, digits.name) == (1797, 1, False, "digits")
    assert digits.tensor.shape == (1797, 1, 8, 8)
    assert digits.tensor.dtype == torch.uint8
    from sklearn.datasets import load_digits

    values = torch.from_numpy(load_digits().images)
    assert torch.equal((digits.tensor[:, 0] * (16 / 255)).round(), values.float())
    assert data.load("digits", "nowhere", 16)[0].shape == (1, 16, 16)
    with pytest.raises(UserError, match="no test split"):
        data.load("digits", "nowhere", 8, train=False)


def test_size_must_be_positive():
    with pytest.raises(UserError, match="img_size is 0"):
        data.load("digits", ".", 0)


@pytest.fixture
def clothes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    payload = struct.pack(">4I", 2051, *images.shape) + images.tobytes()
    return torch.from_numpy(images), gzip.compress(payload), tmp_path


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_gz_without_writing(clothes, folder):
    images, archive, root = clothes
    (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(archive)
    before = sorted(root.rglob("*"))

    loaded = data.load("fashion_mnist", root, 28, train=False)
    assert torch.equal(loaded.tensor[:, 0], images)
    assert (loaded.channels, loaded.flip) == (1, False)
    padded = data.load("fashion_mnist", root, 32, train=False).tensor
    assert torch.equal(padded[:, 0, 2:-2, 2:-2], images)
    assert padded.sum() == images.sum(dtype=torch.long)
    assert data.load("fashion_mnist", root, 16, train=False).tensor.shape == (5, 1, 16, 16)
    assert sorted(root.rglob("*")) == before


def test_fashion_mnist_damaged_archive(clothes):
    _, archive, root = clothes
    (root / "train-images-idx3-ubyte.gz").write_bytes(archive[:-100])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.load("fashion_mnist", root, 28)


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-python.tar.gz"), ("fashion_mnist", "train-images-idx3-ubyte.gz")],
)
def test_failed_download_says_which_file_goes_where(monkeypatch, tmp_path, name, file):
    import torchvision.datasets as sets

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(sets.cifar, "download_and_extract_archive", no_network)
    monkeypatch.setattr(sets.mnist, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=f"put {file}") as caught:
        data.load(name, tmp_path, 32)
    assert str(tmp_path) in str(caught.value)
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_process_downloads_and_the_others_wait(tmp_path):
    """Each would see the other's half of a file, as torchvision's do when they unpack together."""
    root = tmp_path / "new"
    code = f"""
import pathlib, time
from dataset.images import _download
found = pathlib.Path({str(root)!r}) / "found"
def fetch():
    if not found.exists():
        found.write_text("ha")
        time.sleep(1)
        found.write_text("half and half")
        print("made")
    print(found.read_text())
_download(found.parent, fetch, "")
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=60)[0] for process in started)
    assert said == ["half and half\n", "made\nhalf and half\n"]


def test_cifar10_from_its_archive(monkeypatch, tmp_path):
    """The real format, a small set: rows of 3072 numbers, red then green then blue."""
    from torchvision.datasets import CIFAR10

    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": rows, "labels": [0] * 4}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["thing"]}))
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)

    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()

    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(tmp_path / CIFAR10.filename))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    loaded = data.load("cifar10", tmp_path, 32)
    assert torch.equal(loaded.tensor, torch.from_numpy(rows).view(4, 3, 32, 32))
    assert (loaded.channels, loaded.flip) == (3, True)
    assert data.load("cifar10", tmp_path, 16).tensor.shape == (4, 3, 16, 16)


# --- Folders --------------------------------------------------------------------------------------


def test_image_folder_is_sorted_and_lazy(photos):
    images = data.load("image_folder", photos, 8)
    assert (len(images), images.channels, images.flip, images.tensor) == (6, 3, True, None)
    assert [path[-5] for path in images.paths] == list("024135")
    assert images[0].shape == (3, 8, 8)
    assert images[0].dtype == torch.uint8


def test_image_folder_crops_the_centre(tmp_path):
    pixels = np.zeros((8, 20), dtype=np.uint8)
    pixels[:, 6:14] = np.arange(8)[:, None] + 100
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.png")
    image = data.load("image_folder", tmp_path, 8)[0]
    assert torch.equal(image, torch.from_numpy(pixels[None, :, 6:14]).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_image_folder_grey(tmp_path, mode):
    dtype, top = (np.uint16, 65535) if mode == "I;16" else (np.uint8, 255)
    pixels = np.full((4, 4), top, dtype=dtype)
    pixels[:, :2] = 0
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).save(tmp_path / "b.png")
    images = data.load("image_folder", tmp_path, 4)
    assert images.channels == 1
    assert images[0][0, 0].tolist() == [0, 0, 255, 255]
    assert images[1].shape == (1, 4, 4)


def test_image_folder_errors(photos, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        data.load("image_folder", tmp_path / "missing", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        data.load("image_folder", tmp_path / "empty", 8)
    with pytest.raises(UserError, match="no test split"):
        data.load("image_folder", photos, 8, train=False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_is_named_in_one_line(photos, num_workers):
    broken = photos / "class0" / "2.PNG"
    broken.write_bytes(broken.read_bytes()[:200])
    images = data.load("image_folder", photos, 8)
    with pytest.raises(UserError, match=r"cannot read the image .*2\.PNG") as caught:
        list(data.everything(images, 3, num_workers))
    assert "\n" not in str(caught.value)


# --- Pixels ---------------------------------------------------------------------------------------


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = data.to_network(pixels)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1, 1)
    assert torch.equal(data.to_uint8(x), pixels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0, 0.002])).tolist() == [0, 255, 128]


# --- Batches --------------------------------------------------------------------------------------


def test_every_epoch_shows_every_image_once():
    shown = torch.cat(first(14, data.batches(numbered(7), 3, seed=5)))[:, 0, 0, 1]
    epochs = ((shown + 1) * 127.5).round().view(6, 7)
    assert torch.equal(epochs.sort(1).values, torch.arange(7.0).expand(6, 7))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_batch_larger_than_the_set():
    (batch,) = first(1, data.batches(numbered(3), 8, seed=0))
    shown = ((batch[:, 0, 0, 1] + 1) * 127.5).round()
    assert sorted(shown[:3].tolist()) == sorted(shown[3:6].tolist()) == [0, 1, 2]


def test_batches_depend_on_the_seed_alone():
    images = numbered(50, flip=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once = first(4, data.batches(images, 8, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(once, first(4, data.batches(images, 8, seed=1)))
    assert not same(once, first(4, data.batches(images, 8, seed=2)))


@pytest.mark.parametrize("source", ["memory", "folder"])
def test_resume_and_shares_equal_the_whole(source, photos):
    images = numbered(50, flip=True) if source == "memory" else data.load("image_folder", photos, 8)
    whole = first(6, data.batches(images, 4, seed=3))
    assert whole[0].shape[0] == 4
    assert all(batch.min() >= -1 and batch.max() <= 1 for batch in whole)
    assert same(whole[4:], first(2, data.batches(images, 4, seed=3, start_step=4)))
    shares = [first(6, data.batches(images, 4, seed=3, part=(rank, 2))) for rank in (0, 1)]
    assert same(whole, [torch.cat(pair) for pair in zip(*shares, strict=True)])


def test_workers_change_nothing(photos):
    images = data.load("image_folder", photos, 8)
    state = torch.get_rng_state()
    alone = first(3, data.batches(images, 4, seed=3))
    helped = first(3, data.batches(images, 4, seed=3, num_workers=2))
    assert same(alone, helped)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_set_too_large_for_the_device_gives_the_same(monkeypatch):
    images = numbered(50, flip=True)
    whole = first(3, data.batches(images, 4, seed=3))
    monkeypatch.setattr(sys.modules["dataset.batches"], "RESIDENT_BYTES", 0)
    assert same(whole, first(3, data.batches(images, 4, seed=3)))


def test_flips_only_where_they_make_sense():
    dark_left = [
        torch.cat(first(20, data.batches(numbered(9, flip), 10, seed=0)))[:, 0, 0, 0] == -1
        for flip in (False, True)
    ]
    assert dark_left[0].all()
    # Image 0 is dark all over; of the others about half are mirrored.
    assert 70 < dark_left[1].sum() < 150


def test_batch_must_divide_among_processes():
    with pytest.raises(UserError, match="batch_size 10 cannot be shared by 4 processes"):
        data.batches(numbered(9), 10, seed=0, part=(0, 4))


def test_everything_is_in_order(photos):
    digits = data.load("digits", ".", 8)
    assert torch.equal(torch.cat(list(data.everything(digits, 500))), digits.tensor)
    images = data.load("image_folder", photos, 8)
    expected = torch.stack([images[i] for i in range(6)])
    for num_workers in (0, 1):
        pieces = list(data.everything(images, 4, num_workers))
        assert [len(piece) for piece in pieces] == [4, 2]
        assert torch.equal(torch.cat(pieces), expected)
