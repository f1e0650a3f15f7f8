"""dataset/: small named sets, pixel ranges; order, resume and shares of batches."""

import gzip
import hashlib
import itertools
import pickle
import struct
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import dataset as data
from dataset.images import _download
from runtime.errors import UserError


def first(n, batches):
    """The images of the first n batches."""
    return [images for images, _ in itertools.islice(batches, n)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def numbered(n, flip=False, size=2):
    """n images that show their own number, dark on the left; their labels are their numbers."""
    values = torch.arange(n, dtype=torch.uint8)
    tensor = values[:, None, None, None].repeat(1, 1, size, size)
    tensor[..., 0] = 0
    return data.Images("numbered", tensor, flip, values.long(), [*map(str, range(n))])


def numbers(batch):
    return ((batch[:, 0, 0, 1] + 1) * 127.5).round().long()


@pytest.fixture
def photos(tmp_path):
    """Six colour images of different sizes in two folders."""
    random = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.PNG")
    return tmp_path / "photos"


# --- Sets -----------------------------------------------------------------------------------------


def test_names():
    small = ("cifar10", "fashion_mnist", "image_folder", "digits")
    assert (*small, "celeba", "celeba_hq", "afhq", "lsun_bedroom", "imagenet") == data.NAMES
    with pytest.raises(UserError, match=r"'mnist'.* cifar10, "):
        data.load("mnist", ".", 8)
    with pytest.raises(UserError, match="img_size is 0"):
        data.load("digits", ".", 0)


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    digits, source = data.load("digits", "nowhere", 8), load_digits()
    assert (digits.channels, digits.flip, digits.name) == (1, False, "digits")
    assert (digits.tensor.shape, digits.tensor.dtype) == ((1797, 1, 8, 8), torch.uint8)
    values = torch.from_numpy(source.images)
    assert torch.equal((digits.tensor[:, 0] * (16 / 255)).round(), values.float())
    assert digits.labels.tolist() == source.target.tolist()
    assert digits.classes == tuple("0123456789")
    assert data.load("digits", "nowhere", 16)[0].shape == (1, 16, 16)
    with pytest.raises(UserError, match="test split"):
        data.load("digits", "nowhere", 8, train=False)


@pytest.fixture
def clothes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    payload = struct.pack(">4I", 2051, *images.shape) + images.tobytes()
    return torch.from_numpy(images), gzip.compress(payload), tmp_path


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_gz_without_writing(clothes, folder):
    images, archive, root = clothes
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "t10k-images-idx3-ubyte.gz").write_bytes(archive)
    before = sorted(root.rglob("*"))
    small, padded, halved = (
        data.load("fashion_mnist", root, size, train=False) for size in (28, 32, 16)
    )
    assert torch.equal(small.tensor[:, 0], images)
    assert (small.channels, small.flip) == (1, False)
    assert torch.equal(padded.tensor[:, 0, 2:-2, 2:-2], images)
    assert padded.tensor.sum() == images.sum(dtype=torch.long)
    assert halved.tensor.shape == (5, 1, 16, 16)
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
    with pytest.raises(UserError, match=rf"put {file}[^\n]*no route to host[^\n]*$") as error:
        data.load(name, tmp_path, 32)
    assert str(tmp_path) in str(error.value)


def test_one_process_downloads_and_the_others_wait(tmp_path):
    """Locks of two threads exclude each other as those of two processes do."""
    path, downloads, results = tmp_path / "new" / "file", [], []

    def fetch():
        if not path.exists():
            downloads.append(1)
            path.write_text("ha")
            time.sleep(0.2)
            path.write_text("half and half")
        return path.read_text()

    threads = [
        threading.Thread(target=lambda: results.append(_download(path.parent, fetch, "")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results, downloads) == (["half and half"] * 2, [1])


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


# --- Pixels and batches ---------------------------------------------------------------------------


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = data.to_network(pixels)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1, 1)
    assert torch.equal(data.to_uint8(x), pixels)
    assert data.to_uint8(torch.tensor([-3.0, 3.0, 0.002])).tolist() == [0, 255, 128]


def test_every_epoch_shows_every_image_once():
    epochs = numbers(torch.cat(first(14, data.batches(numbered(7), 3, seed=5)))).view(6, 7)
    assert torch.equal(epochs.sort(1).values, torch.arange(7).expand(6, 7))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    (large,) = map(numbers, first(1, data.batches(numbered(3), 8, seed=0)))
    assert sorted(large[:3].tolist()) == sorted(large[3:6].tolist()) == [0, 1, 2]


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


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_labels_go_with_their_images(part):
    common = {"seed": 3, "start_step": 4, "part": part}
    batches = data.batches(numbered(10), 6, **common)
    images, labels = zip(*itertools.islice(batches, 5), strict=True)
    assert same(map(numbers, images), labels)


def test_workers_change_nothing(photos):
    images = data.load("image_folder", photos, 8)
    state = torch.get_rng_state()
    alone = first(3, data.batches(images, 4, seed=3))
    assert same(alone, first(3, data.batches(images, 4, seed=3, num_workers=2)))
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
    with pytest.raises(UserError, match=r"--batch_size=10 .* 4 processes"):
        data.batches(numbered(9), 10, seed=0, part=(0, 4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_broke_since_is_named_in_one_line(photos, num_workers):
    images = data.load("image_folder", photos, 8)
    broken = photos / "class0" / "2.PNG"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"^[^\n]*2\.PNG[^\n]*$"):
        list(data.everything(images, 3, num_workers))


def test_everything_is_in_order(photos):
    digits = data.load("digits", ".", 8)
    assert torch.equal(torch.cat(list(data.everything(digits, 500))), digits.tensor)
    images = data.load("image_folder", photos, 8)
    expected = torch.stack([images[i] for i in range(6)])
    for num_workers in (0, 1):
        pieces = list(data.everything(images, 4, num_workers))
        assert [len(piece) for piece in pieces] == [4, 2]
        assert torch.equal(torch.cat(pieces), expected)
