"""score/: closed forms for the numbers, pytorch-fid for the features, and refused files."""

import re
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dataset as data
import score
from runtime import files
from runtime.errors import UserError
from score import features as score_features

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


def spd(dim, rank=None, seed=0):
    a = np.random.default_rng(seed).normal(size=(dim, rank or dim))
    return a @ a.T / dim


# --- Fréchet distance -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_frechet_distance_of_scaled_and_shifted_unit_gaussians(kind):
    dim, s, m = 7, 1.7, np.linspace(-1, 2, 7)
    unit = (kind(np.zeros(dim)), kind(np.eye(dim)))
    other = (kind(m), kind(np.eye(dim) * s**2))
    expected = m @ m + dim * (s - 1) ** 2
    assert score.frechet_distance(*unit, *other) == pytest.approx(expected, abs=1e-6)
    assert score.frechet_distance(*other, *unit) == pytest.approx(expected, abs=1e-6)
    assert score.frechet_distance(*other, *other) == pytest.approx(0, abs=1e-6)


def gives_up(matrix):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


@pytest.mark.parametrize("lapack", ["works", "gives up"])
@pytest.mark.parametrize(("zeros", "rel"), [((0, 0), 1e-12), ((0, 3), 1e-12), ((3, 3), 1e-7)])
def test_frechet_distance_of_commuting_covariances(zeros, rel, lapack, monkeypatch):
    """Same eigenvectors: Σ (√a − √b)², also where some eigenvalues are zero."""
    if lapack == "gives up":  # as it does on some covariances of 12 images
        monkeypatch.setattr(torch.linalg, "eigvalsh", gives_up)
    random = np.random.default_rng(1)
    a, b = random.uniform(0.1, 3, (2, 8))
    a[: zeros[0]] = b[8 - zeros[1] :] = 0
    mu = random.normal(size=8)
    expected = mu @ mu + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    for basis in (np.eye(8), np.linalg.qr(random.normal(size=(8, 8)))[0]):
        sigmas = [basis * values @ basis.T for values in (a, b)]
        distance = score.frechet_distance(np.zeros(8), sigmas[0], mu, sigmas[1])
        assert distance == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_equals_scipy(seed):
    s1, s2, mu = spd(12, seed=seed), spd(12, seed=seed + 50), spd(12)[0]
    expected = mu @ mu + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert score.frechet_distance(mu, s1, 0 * mu, s2) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [(np.zeros(4), np.eye(4)), (np.zeros(3),) * 2, (np.zeros(3), np.eye(3) * np.nan)],
)
def test_frechet_distance_refuses_nonsense(mu, sigma):
    with pytest.raises(ValueError, match=r"expected|finite"):
        score.frechet_distance(np.zeros(3), np.eye(3), mu, sigma)


# --- Moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 64, 200])
def test_moments_equal_numpy_for_every_split(size):
    # A mean far from zero is what breaks the sum-of-squares formula.
    x = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1e-2, 1, 2, 3, 100]) + 1000
    streamed, merged = score.Moments(), score.Moments()
    for batch in (*x.split(size), x[:0]):
        streamed.update(batch)
        part = score.Moments()
        part.update(batch)
        merged.merge(score.Moments.from_state(part.state()))
    for moments in (streamed, merged):
        assert moments.count == 200
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T.numpy()), rtol=1e-10, atol=1e-10)


def test_moments_share_no_memory_and_one_sample_has_no_covariance():
    one, two = score.Moments(), score.Moments()
    one.update(torch.ones(1, 3))
    two.merge(one)
    two.update(torch.zeros(2, 3))
    assert one.mean.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        _ = one.covariance


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_have_no_score(value):
    moments = score.Moments()
    for batch in torch.ones(6, 3).index_put((torch.tensor(1),), torch.tensor(value)).split(2):
        moments.update(batch)
    with pytest.raises(UserError, match="finite"):
        _ = moments.covariance


# --- Inception Score ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [(torch.tensor([[0.5, 0.3, 0.2]]).repeat(60, 1), 1), (torch.eye(4).repeat(60, 1), 4)],
    ids=["all alike", "sure and even"],
)
def test_inception_score_of_extremes(probabilities, expected):
    inception_score = score.InceptionScore(len(probabilities), splits=6)
    for batch in probabilities.split(7):
        inception_score.update(batch)
    assert inception_score.result() == pytest.approx((expected, 0), abs=1e-6)


def test_inception_score_equals_its_definition_in_any_order():
    p = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    scores = [
        (part * (part / part.mean(0)).log()).sum(1).mean().exp().item() for part in p.chunk(5)
    ]
    straight, left, right = (score.InceptionScore(50, splits=5) for _ in range(3))
    straight.update(p)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    left.update(p[order[:20]], order[:20])
    with pytest.raises(ValueError, match="seen 20 of 50"):
        left.result()
    right.update(p[order[20:]], order[20:])
    left.merge(score.InceptionScore(50, splits=5))
    left.merge(score.InceptionScore.from_state(right.state()))
    for inception_score in (straight, left):
        expected = (np.mean(scores), np.std(scores))
        assert inception_score.result() == pytest.approx(expected, rel=1e-9)


# --- Statistics files -----------------------------------------------------------------------------


def test_statistics_files_round_trip(tmp_path):
    path, mu, sigma = tmp_path / "deep" / "digits.npz", torch.arange(3.0), torch.eye(3)
    score.save_statistics(path, mu, sigma, encoder="pixels", count=10, dataset="digits")
    loaded = score.load_statistics(path, 3, "pixels", count=10, dataset="digits", img_size=8)
    for array, expected in zip(loaded, (mu, sigma), strict=True):
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, expected)
    assert [p.name for p in path.parent.iterdir()] == ["digits.npz"]
    np.savez(path, mu=mu, sigma=sigma)  # as pytorch-fid does: nothing about itself
    score.load_statistics(path, 3, "inception", dataset="cifar10")


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    ("content", "about"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"mu .*\(4,\)"),
        (GOOD | {"sigma": np.eye(2)}, r"sigma .*\(2, 2\)"),
        (GOOD | {"sigma": np.full((3, 3), np.inf)}, "sigma"),
        (GOOD | {"sigma": -np.eye(3)}, "sigma"),
        (GOOD | {"sigma": np.diag([1.0, 1.0, -0.1])}, "sigma"),
        (GOOD | {"sigma": np.eye(3) + 2 * np.ones((3, 3)) * (1 - np.eye(3))}, "sigma"),
        (GOOD | {"sigma": np.triu(np.full((3, 3), 0.5)) + np.eye(3)}, "sigma"),
        (GOOD | {"mu": np.array(["a", "b", "c"])}, "mu"),
        (GOOD | {"mu": np.zeros(3, dtype=object)}, "stats"),
        (GOOD | {"encoder": "inception"}, "encoder: inception there, pixels here"),
        (GOOD | {"dataset": "digits"}, "dataset: digits there, cifar10 here"),
        (b"", "stats"),
        (b"no npz", "stats"),
        (b"PK\x03\x04 cut off", "stats"),
        (np.zeros(3), "stats"),
        (None, "stats"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, content, about):
    path = tmp_path / "stats.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with open(path, "wb") as file:
            np.save(file, content)
    with pytest.raises(UserError, match=about) as caught:
        score.load_statistics(path, 3, "pixels", dataset="cifar10")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_covariances_of_few_images_are_read(tmp_path, kind):
    features = np.random.default_rng(0).random((5, 50))  # of rank 4
    for sigma in (np.cov(features, rowvar=False), np.zeros((50, 50))):
        np.savez(tmp_path / "stats.npz", mu=features[0].astype(kind), sigma=sigma.astype(kind))
        read = score.load_statistics(tmp_path / "stats.npz", 50, "pixels")[1]
        np.testing.assert_array_equal(read, sigma.astype(kind))


@pytest.mark.parametrize("count", [0, 1])
def test_statistics_of_one_image_are_refused(tmp_path, count):
    images = score.Images(count, "", lambda start, stop: iter(()))
    pixels = score.encoder("pixels", "cpu")
    with pytest.raises(UserError, match="--dataset"):
        score.load_or_compute(tmp_path / "stats.npz", pixels, 3, {}, lambda: images, "digits")
    assert not list(tmp_path.iterdir())


def test_statistics_that_cannot_be_saved_are_not_computed(tmp_path):
    def batches(start, stop):
        raise AssertionError("an image was read")

    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "stats.npz", "/proc/stats.npz"):
        with pytest.raises(UserError, match=r"(file|/proc): .*--fid_cache"):
            score.load_or_compute(
                path, score.encoder("pixels", "cpu"), 3, {},
                lambda: score.Images(2, "", batches), "digits",
            )  # fmt: skip


def images_of(tensor, content="one"):
    return score.Images(len(tensor), content, lambda start, stop: tensor[start:stop].split(7))


def test_statistics_of_other_images_are_refused(tmp_path):
    path, pixels, said = tmp_path / "stats.npz", score.encoder("pixels", "cpu"), []
    tensor = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)

    def use(images, **about):
        about = {"dataset": "digits", "split": "train"} | about
        return score.load_or_compute(path, pixels, 4, about, images, "digits", said.append)

    def missing():
        raise score.UnavailableError("no digits in ./data")

    reference = use(lambda: images_of(tensor))
    np.testing.assert_allclose(reference.mu, tensor.flatten(1).double().mean(0) / 255, rtol=1e-6)
    assert torch.equal(use(lambda: images_of(tensor)).sigma, reference.sigma)
    assert said == []
    for images, about, message in (
        (images_of(tensor, "two"), {}, "content: one there, two here"),
        (images_of(tensor[1:]), {}, "count: 20 there, 19 here"),
        (images_of(tensor), {"split": "test"}, "split: train there, test here"),
    ):
        with pytest.raises(UserError, match=rf"stats\.npz .*{message}"):
            use(lambda images=images: images, **about)
    assert torch.equal(use(missing).mu, reference.mu)
    assert re.search(r"stats\.npz are believed.*no digits", said.pop())
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))  # as pytorch-fid does
    assert not use(missing).mu.any()
    assert re.search(r"stats\.npz are believed", said.pop())
    score.save_statistics(path, np.zeros(4), np.eye(4), dataset="digits", count=19)  # older ones
    with pytest.raises(UserError, match="count: 19 there, 20 here"):
        use(lambda: images_of(tensor))


def test_statistics_of_other_encoder_weights_are_refused(tmp_path):
    path, tensor = tmp_path / "stats.npz", torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)

    def use(weights):
        toy = score.Encoder("toy", "cpu", 4, lambda x: x.flatten(1), weights=weights)
        return score.load_or_compute(path, toy, 4, {}, lambda: images_of(tensor), "digits")

    reference = use("one")
    assert torch.equal(use("one").mu, reference.mu)
    with pytest.raises(UserError, match="encoder_weights: one there, two here"):
        use("two")
    score.save_statistics(path, np.zeros(4), np.eye(4), encoder="toy", content="one")  # older ones
    assert not use("two").mu.any()


def test_partial_statistics_are_gone_on_from(tmp_path, monkeypatch):
    path, pixels = tmp_path / "stats.npz", score.encoder("pixels", "cpu")
    tensor = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)
    moments = score.Moments()
    moments.update(tensor[:14].flatten(1) / 255)
    starts = []

    def batches(start, stop):
        starts.append(start)
        return tensor[start:stop].split(7)

    monkeypatch.setattr(files.Unfinished, "read", lambda *_: moments.state())
    (tmp_path / ".stats.npz.unfinished-7.pt").touch()  # of a run with more processes
    images = score.Images(20, "", batches)
    found = score.load_or_compute(path, pixels, 4, {}, lambda: images, "digits")
    np.testing.assert_allclose(found.sigma, np.cov(tensor.flatten(1).T / 255), rtol=1e-6)
    assert list(tmp_path.iterdir()) == [path]
    assert starts == [14]


def test_a_covariance_that_does_not_fit_into_memory_is_refused(tmp_path):
    pixels = score.encoder("pixels", "cpu")
    with pytest.raises(UserError, match=r"12,582,912 features.*3,538,944\.0 GiB.*--fid_encoder"):
        score.load_or_compute(tmp_path / "s.npz", pixels, 3 * 2048**2, {}, None, "large")


def test_default_names_of_statistics(tmp_path):
    older = tmp_path / "digits8.train.pixels.npz"
    paths = [score.default_path(tmp_path, "digits", 8, "pixels", c) for c in ("one", "two")]
    assert len({*paths, older}) == 3
    older.touch()
    paths[0].touch()
    assert [score.default_path(tmp_path, "digits", 8, "pixels", c) for c in ("one", "two")] == [
        paths[0],
        older,
    ]


# --- Encoders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", ".", 8).tensor


@pytest.fixture(scope="module")
def lite():
    state = torch.get_rng_state()
    encoder = score.encoder("efficientnet_lite0", "cpu")
    assert torch.equal(torch.get_rng_state(), state)  # building it draws no random numbers
    return encoder


def test_distances_are_named_by_their_encoder(lite):
    pixels = score.encoder("pixels", "cpu")
    assert (pixels.label, pixels.key) == ("Fréchet distance (pixels)", "fd_pixels")
    assert lite.label == "Fréchet distance (efficientnet_lite0)"
    assert lite.key == "fd_efficientnet_lite0"
    larger = score.encoder("efficientnet_lite2", "cpu")
    assert larger.key == "fd_efficientnet_lite2"
    assert larger.identity["encoder_weights"] != lite.identity["encoder_weights"]
    with pytest.raises(UserError, match=r"vgg.*inception, efficientnet_lite0, .*pixels"):
        score.encoder("vgg", "cpu")


def test_pixels(digits):
    pixels = score.encoder("pixels", "cpu")
    features = pixels(digits[:5])
    assert torch.equal(features, digits[:5].flatten(1) / 255)
    assert pixels.class_probabilities(features) is None
    assert pixels.identity == {"encoder": "pixels"}
    with pytest.raises(ValueError, match="expected uint8"):
        pixels(digits[:5].float())


def test_statistics_of_streams(digits, capsys):
    pixels = score.encoder("pixels", "cpu")
    moments = score.statistics_of(digits[:50].split(7), pixels, 50, "digits")
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, digits[:50].flatten(1).double().mean(0) / 255, 1e-6)
    assert "digits: 100%" in capsys.readouterr().err


def test_efficientnet_features(lite, digits):
    features = lite(digits[:8])
    assert (features.shape, features.dtype, lite.dim) == ((8, 1280), torch.float32, 1280)
    torch.testing.assert_close(lite(digits[3:4]), features[3:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lite(digits[:8].repeat(1, 3, 1, 1)), features)
    probabilities = lite.class_probabilities(features)
    assert probabilities.shape == (8, 1000)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))


def test_the_distance_of_few_images(lite, digits):
    """Covariances of 12 images in 1280 features; divide and conquer fails on some of them."""
    x, y = (lite(images).double() for images in (digits[100:112], digits[:12]))
    mu, sigma = x.mean(0), torch.cov(x.T)
    # In the span of both sets the covariances are small, and full.
    q = torch.linalg.qr(torch.cat([x - mu, y - mu]).T)[0]
    a, b = ((z - mu) @ q for z in (x, y))
    expected = score.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    found = score.frechet_distance(mu, sigma, y.mean(0), torch.cov(y.T))
    assert found == pytest.approx(expected, rel=1e-5)


def test_efficientnet_tells_digits_from_noise(lite, digits):
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (100, 1, 8, 8), generator=random, dtype=torch.uint8)
    # Other images of the same digits, which come in nearly the same order.
    sets = [lite(images).double() for images in (digits[:100], digits[100:200], noise)]
    (mu, sigma), *others = [(x.mean(0), torch.cov(x.T)) for x in sets]
    alike, unlike = (score.frechet_distance(mu, sigma, *other) for other in others)
    assert unlike > 5 * alike


def test_the_weights_of_an_encoder_are_known_by_their_numbers(tmp_path):
    network, digests = nn.BatchNorm2d(4), []
    good = network.state_dict()
    for changes in ({}, {"num_batches_tracked": torch.tensor(9)}, {"bias": torch.ones(4)}):
        torch.save(good | changes, tmp_path / "weights.pth")
        network = nn.BatchNorm2d(4)
        digests.append(score_features._frozen(network, tmp_path / "weights.pth", "cpu")[1])
    assert digests[0] == digests[1] != digests[2]


# --- Inception, against pytorch-fid ---------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A $TORCH_HOME's hub folder with an Inception file: right layout, random weights."""
    folder = tmp_path_factory.mktemp("home") / "hub"
    from pytorch_fid import inception

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        # Instead of loading weights, take the network as it was initialised.
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # keeps the signal alive through the layers
            nn.init.kaiming_normal_(module.weight, generator=torch.Generator().manual_seed(1))
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), folder / "checkpoints" / WEIGHTS)
    return folder


def test_inception_equals_pytorch_fid(hub, tmp_path, monkeypatch, digits):
    from pytorch_fid import fid_score

    monkeypatch.setenv("TORCH_HOME", str(hub.parent))
    ours = []
    encoder = score.encoder("inception", "cpu")
    assert (encoder.label, encoder.key, encoder.dim) == ("FID", "fid", 2048)
    for name, chosen in (("a", digits[:5]), ("b", 255 - digits[5:10])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(chosen):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{i}.png")
        ours.append(score.statistics_of(chosen.split(3), encoder, 5, name))
        arguments = ["pytorch-fid", "--device", "cpu", "--num-workers", "0", "--batch-size", "5"]
        arguments += ["--save-stats", str(tmp_path / name), str(tmp_path / f"{name}.npz")]
        monkeypatch.setattr(sys, "argv", arguments)
        fid_score.main()

    expected = [score.load_statistics(tmp_path / f"{n}.npz", 2048, "inception") for n in "ab"]
    for moments, (mu, sigma) in zip(ours, expected, strict=True):
        np.testing.assert_allclose(moments.mean, mu, rtol=1e-4, atol=1e-5 * np.abs(mu).max())
        limit = 1e-4 * np.abs(sigma).max()
        np.testing.assert_allclose(moments.covariance, sigma, rtol=1e-3, atol=limit)
    # In the span of five images each, where both roots are fast.
    bases = [scipy.sparse.linalg.eigsh(sigma, k=4)[1] for _, sigma in expected]
    q = np.linalg.qr(np.concatenate(bases, 1))[0]
    ours, theirs = (
        [x for mu, sigma in pairs for x in (mu @ q, q.T @ sigma @ q)]
        for pairs in ([(m.mean.numpy(), m.covariance.numpy()) for m in ours], expected)
    )
    theirs[1], theirs[3] = (sigma + 1e-12 * np.eye(8) for sigma in theirs[1::2])
    distance = fid_score.calculate_frechet_distance(*theirs)
    assert score.frechet_distance(*ours) == pytest.approx(distance, rel=1e-3)


def test_inception_batches_and_classes(hub, digits):
    encoder = score.encoder("inception", "cpu", hub / "checkpoints" / WEIGHTS)
    features = encoder(digits[:3])
    scale = features.abs().max().item()
    torch.testing.assert_close(encoder(digits[1:2]), features[1:2], rtol=1e-4, atol=1e-5 * scale)
    state = torch.load(hub / "checkpoints" / WEIGHTS, weights_only=True)
    expected = (features @ state["fc.weight"].T).softmax(1)
    torch.testing.assert_close(encoder.class_probabilities(features), expected)


def test_missing_inception_weights(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=f"put {WEIGHTS} into .*--fid_encoder") as caught:
        score.encoder("inception", "cpu")
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
    with pytest.raises(UserError, match=r"missing\.pth"):
        score.encoder("inception", "cpu", tmp_path / "missing.pth")
    with pytest.raises(UserError, match="takes no weights"):
        score.encoder("pixels", "cpu", tmp_path / "missing.pth")


def test_wrong_inception_weights_name_the_entry(hub, monkeypatch, tmp_path):
    good = torch.load(hub / "checkpoints" / WEIGHTS, weights_only=True)
    network = score_features._inception_network()
    monkeypatch.setattr(score_features, "_inception_network", lambda: network)
    key, path = "Mixed_5b.branch1x1.conv.weight", tmp_path / "weights.pth"
    cases = {
        f"it has no entry {key}": {k: v for k, v in good.items() if k != key},
        rf"{key} has shape \(1,\), not \(64, 192, 1, 1\)": good | {key: torch.zeros(1)},
        f"{key} .*finite": good | {key: torch.full((64, 192, 1, 1), torch.nan)},
        "unexpected entry more": good | {"more": torch.zeros(1)},
        "list": [1],
    }
    for message, state in cases.items():
        torch.save(state, path)
        with pytest.raises(UserError, match=message):
            score.encoder("inception", "cpu", path)
    path.write_bytes(b"text")
    (tmp_path / "folder").mkdir()
    for wrong, about in ((path, r"weights\.pth"), (tmp_path / "folder", "directory")):
        with pytest.raises(UserError, match=about):
            score.encoder("inception", "cpu", wrong)


# --- FLOPs ----------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(8, 16)
        self.dropout, self.fused = nn.Dropout(), fused

    def forward(self, x, t, width):
        channels = int(16 * width)
        x = F.conv2d(x, self.conv.weight[:channels], self.conv.bias[:channels], padding=1)
        temb = self.linear(t[:, None].float().expand(-1, 8))[:, :channels]
        q = (x + temb[:, :, None, None]).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, C)
        if self.fused:
            return F.scaled_dot_product_attention(q, q, q)
        return self.dropout((q @ q.transpose(2, 3)).softmax(-1)) @ q


@pytest.mark.parametrize(
    ("fused", "width", "size"), [(True, 1, 4), (False, 1, 8), (True, 0.5, 8), (False, 0.5, 4)]
)
def test_flops_of_convolution_linear_and_attention(fused, width, size):
    net, channels, positions = Toy(fused), int(16 * width), size**2
    convolution = 2 * positions * channels * 3 * 9
    attention = 2 * 2 * positions**2 * channels
    expected = convolution + 2 * 8 * 16 + attention
    assert score.flops(net, width, (3, size, size)) == expected
    assert net.training
    assert net.conv.weight.device.type == "cpu"
