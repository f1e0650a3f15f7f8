"""Whatever bytes a file has, reading it ends in a value or in a UserError, and it stays as it was.

A few mutations of a valid file of each kind in every run of the tests; `make fuzz` tries others for
FUZZ_MINUTES, and says how many.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_diffusers_loading import make
from test_diffusers_loading import save as write_pipeline
from test_latents import digits, write_autoencoder
from test_train import trainer

import build
import dataset
import looks
import options
import report
import score
from commands.evaluate import Evaluation
from commands.generate import claim
from commands.search import Latencies
from dataset import latents
from dataset.decoding import decode, read_header
from model import WidthSchedule, arithmetic, checkpoint
from model.diffusers.loading import read_model
from model.diffusers.supernet import SlimmableDiffusersUNet
from model.diffusers.trained import trained_diffusion
from runtime.errors import UserError
from runtime.files import read_json, read_jsonl, write_jsonl
from search import Genome, warm_start
from search.log import SearchLog
from settings import Configuration

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
EXAMPLES = 12  # of each kind, where there is no time for more
SECONDS, MEMORY = 20, 4 * 2**30  # that one reading may take
WIDTHS = (0.25, 0.5, 0.75, 1.0)
counts: dict[str, int] = {}


@dataclass(frozen=True)
class Kind:
    """A kind of file. write(folder): a valid one and what lies around it. name: of the file.
    read(path): what the program does with it."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


# --- the kinds ------------------------------------------------------------------------------------


def text(content: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "a").write_text(content)

    return write


def line(value: object) -> str:
    return json.dumps(value) + "\n"


SCORED = {
    "generation": 1, "rung": "", "schedule": [1.0, 0.5], "cost": 2.0, "distance": 3.5,
    "label": "toy", "passes": 8, "passes_saved": 0,
}  # fmt: skip
POINT = {
    "distance": 1.0, "distance_error": None, "cost": 3.0, "average_gflops": 0.5, "saving": 0.25,
    "latency_ms": 3.0, "generation": 1, "schedule": [1.0, 0.5],
}  # fmt: skip
EVALUATION = {
    "mode": "eval", "checkpoint": "ckpt", "step": 6, "width": 1.0, "label": "toy", "images": 8,
    "encoder": "pixels", "distance": 1.5, "inception_score": [1.0, 0.1], "passes": 80, "seed": 0,
    "passes_saved": 0, "sampling_seconds": 0.5, "decoding_seconds": 0.0, "average_gflops": 0.1,
    "full_width_gflops": 0.1, "saving": 0.0, "images_per_second": 8.0, "processes": 1,
    "sampler": {"S_tmax": float("inf")}, "device": "cpu", "arithmetic": {"1.0": "float32"},
}  # fmt: skip
FRONT = {
    "label": "toy", "encoder": "pixels", "images": 8, "timesteps": [0, 5], "cost": "flops",
    "full_width_gflops": 1.0, "points": [POINT, {**POINT, "distance": 2.0}], "chosen_point": 0,
    "chosen": POINT, "uniform": [POINT], "scored": [[3.0, 1.0]], "generations": [],
}  # fmt: skip


def write_checkpoint(folder: Path) -> None:
    trained = trainer(folder)
    trained.train_step(trained.net, torch.zeros(8, 1, 8, 8))
    trained.save()
    state = checkpoint.load(folder / "ckpt.pt")
    net = trained.net.settings_dict()
    settings = {"lr": 1e-3, "slimmable_unet": True, "class_names": ["a", "b"], **net}
    checkpoint.save(folder / "ckpt.pt", {**state, "settings": settings})


def write_converted(folder: Path) -> None:
    """A checkpoint of a diffusers network, whose settings shape it."""
    net = SlimmableDiffusersUNet(make(), 10)
    widths = {"slimmable_unet": True, "min_width": 0.5, "candidate_width": [0.5]}
    state = net.state_dict()
    settings = net.settings_dict() | widths | {"img_size": 8}
    checkpoint.save(
        folder / "ckpt.pt", {"net_model": state, "ema_model": state, "settings": settings}
    )


TRAINER: list = []


def read_checkpoint(path: Path) -> None:
    config = Configuration.of(logdir=str(path.parent), device="cpu")
    build.load_model(config)
    if not TRAINER:
        TRAINER.append(trainer(path.parent))
    TRAINER[0].path = path
    TRAINER[0].resume(checkpoint.load(path))
    TRAINER[0].train_step(TRAINER[0].net, torch.zeros(8, 1, 8, 8))


def read_converted(path: Path) -> None:
    build.load_model(Configuration.of(logdir=str(path.parent), device="cpu"))


def read_log(path: Path) -> None:
    identity = {"checkpoint": "ckpt", "sampler": {"sampler": "ddpm"}}
    before = path.read_bytes()
    log = SearchLog(path, identity)
    try:
        log.read()
        assert all(isinstance(record["distance"], float) for record in log.records.values())
    except UserError:
        assert path.read_bytes() == before
        raise
    finally:
        path.write_bytes(before)
    with contextlib.suppress(UserError):
        warm_start(path, Genome(WIDTHS, (0, 5), 10), 4)


def write_log(folder: Path) -> None:
    header = {"evaluation": {"checkpoint": "ckpt", "sampler": {"sampler": "ddpm"}}}
    write_jsonl(folder / "a", [header, SCORED, {**SCORED, "schedule": [0.5, 0.5]}])


def read_front(path: Path) -> None:
    front = looks.read_front(path)
    looks.front_table(front)
    looks.best_within(front, 0.5)
    for point in front["points"]:
        WidthSchedule(point["schedule"]).save(path.parent / "search.txt")
    if MINUTES and random.random() < 0.05:  # a picture takes long
        shutil.copy(path, path.parent / "front.json")
        looks.pick_point(path.parent, looks.read_front(path), 0, "pick")


def read_flagfile(path: Path) -> None:
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()):
        try:
            options.parse(["main.py", f"--flagfile={path}"])
            config = options.configuration()
            options.flagfile_text(config)
            for name in ("network", "widths", "diffusion", "sampling", "search", "run"):
                getattr(config, name)
        except SystemExit:
            pass  # --help


def write_statistics(folder: Path) -> None:
    score.save_statistics(
        folder / "a.npz", np.zeros(3), np.eye(3), encoder="pixels", dataset="digits", count=7
    )


class Stub:
    """An autoencoder, as the latents file sees it."""

    fingerprint, image_channels, folder, device = "abc", 1, Path("vae"), torch.device("cpu")

    def shape(self, img_size: int) -> tuple[int, int, int]:
        return 4, img_size // 2, img_size // 2

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), *self.shape(16))


def read_latents(path: Path) -> None:
    path = path.with_name("a.npy")
    data = latents.encoded(digits(3), Stub(), 16, path, 3, 0)
    assert data.tensor.shape == (3, 4, 8, 8)


def write_image(kind: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        from PIL import Image

        pixels = np.arange(3 * 12 * 9, dtype=np.uint8).reshape(12, 9, 3)
        Image.fromarray(pixels).save(folder / f"a.{kind.lower()}", kind)

    return write


def read_image(path: Path) -> None:
    with contextlib.suppress(Exception):  # a survey takes whatever is raised for a reason
        read_header(str(path))
    decode(str(path))
    images = dataset.load("image_folder", path.parent, 8)
    assert images[0].shape == (images.channels, 8, 8)


IDX = "train-images-idx3-ubyte.gz"


def write_idx(folder: Path) -> None:
    header = struct.pack(">4i", 2051, 3, 28, 28)
    (folder / IDX).write_bytes(gzip.compress(header + bytes(3 * 28 * 28), 1))


def read_survey(path: Path) -> None:
    image = path.parent / "images"
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "ddsm" / "images"
    shutil.rmtree(cache, ignore_errors=True)
    images = dataset.load("image_folder", image, 8)
    (found,) = cache.iterdir()
    shutil.copy(path, found)
    assert dataset.load("image_folder", image, 8).survey == images.survey or path.exists()


def write_survey(folder: Path) -> None:
    (folder / "images").mkdir()
    write_image("PNG")(folder / "images")
    survey = dataset.load("image_folder", folder / "images", 8).survey
    (folder / "a").write_text(line(vars(survey)))


def read_generated(path: Path) -> None:
    (path.parent / "0.png").touch()
    identity = {"weights": "abc", "schedule": [1.0], "seed": 0}
    claim(path, identity, path.parent)


def read_scheduler(path: Path) -> None:
    found = trained_diffusion(path.parent.parent)
    if found:
        found.check(Configuration().values, ["clip_denoised", "timestep_spacing"])
        config = build.adopt(Configuration(), {**found.flags, **found.sampling}, found.path)
        found.table(config.values, config.given)
        assert config.diffusion.T >= 1


FOLDER = "unet/"
KINDS = {
    "checkpoint": Kind("ckpt.pt", write_checkpoint, read_checkpoint),
    "converted checkpoint": Kind("ckpt.pt", write_converted, read_converted),
    "schedule": Kind(
        "a", text(line([1, 0.5] * 5)), lambda path: WidthSchedule.load(path, 10, WIDTHS)
    ),
    "search log": Kind("a", write_log, read_log),
    "front": Kind("a", text(line(FRONT)), read_front),
    "latencies": Kind(
        "a",
        text(line({"device": "cpu", "batch_size": 8, "amp": "none",
                   "seconds_per_image": {"1.0": 0.1, "0.5": 0.05}})),
        lambda path: read_json(path, Latencies),
    ),
    "arithmetic": Kind("a", text(line({"1.0": "float32", "0.5": "winograd"})), arithmetic._read),
    "evaluation": Kind("a", text(line(EVALUATION)), lambda path: read_json(path, Evaluation)),
    "losses": Kind(
        "a",
        text(2 * line({"step": 1, "loss": {"1": 0.5}, "grad_norm": 1.0, "lr": 1e-3,
                       "images_per_second": 3.5})),
        lambda path: read_jsonl(path, report.Losses),
    ),
    "step scores": Kind(
        "a",
        text(line({"step": 3, "width": 1.0, "scores": {"fid": 1.5, "images": 8}})),
        lambda path: read_jsonl(path, report.StepScores),
    ),
    "generated": Kind(
        "a",
        text(line({"weights": "abc", "schedule": [1.0], "timesteps": None, "seed": 0,
                   "sampler": {"sampler": "edm", "S_tmax": float("inf")}, "images": 3})),
        read_generated,
    ),
    "flagfile": Kind(
        "a",
        text("--ch=16\n--ch_mult=1\n--ch_mult=2\n# a comment\n--train\n--lr=0.001\n"
             "--nosandwich\n--flagfile=b\n--classes=1,2\n--logdir=x\n--S_tmax=inf\n"),
        read_flagfile,
    ),
    "statistics": Kind(
        "a.npz", write_statistics, lambda path: score.load_statistics(path, 3, "pixels")
    ),
    "latents": Kind(
        "a.npy", lambda folder: latents.encoded(digits(3), Stub(), 16, folder / "a.npy", 3, 0),
        read_latents,
    ),
    "latents' identity": Kind(
        "a.npy.json", lambda folder: latents.encoded(digits(3), Stub(), 16, folder / "a.npy", 3, 0),
        read_latents,
    ),
    **{
        f"image {kind}": Kind(f"a.{kind.lower()}", write_image(kind), read_image)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")
    },
    "idx": Kind(IDX, write_idx, lambda path: dataset.load("fashion_mnist", path.parent, 8)),
    "survey": Kind("a", write_survey, read_survey),
    "UNet config": Kind(
        "unet/config.json", write_pipeline, lambda path: read_model(path.parent.parent)
    ),
    "UNet weights": Kind(
        "unet/diffusion_pytorch_model.safetensors", write_pipeline,
        lambda path: read_model(path.parent.parent),
    ),
    "scheduler config": Kind("scheduler/scheduler_config.json", write_pipeline, read_scheduler),
    "VAE config": Kind(
        "config.json", write_autoencoder, lambda path: latents.Autoencoder(path.parent, "cpu")
    ),
    "VAE weights": Kind(
        "diffusion_pytorch_model.safetensors", write_autoencoder,
        lambda path: latents.Autoencoder(path.parent, "cpu"),
    ),
}  # fmt: skip


# --- mutations ------------------------------------------------------------------------------------

RAW = [  # JSON, or nearly, in place of a value
    "-5", "0", "1.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, "9" * 5000,
    "1e-400", "9007199254740993", "1099511627776", "null", "true", "[]", "{}", '""', '"x"', '"nan"',
    "[1]", "[[1]]", '{"1.0": 1}', "[" * 40 + "]" * 40, "[" * 900 + "]" * 900, "[" * 9000,
    '{"a":' * 900 + "1" + "}" * 900, '"\\ud800"', '"\\u0000"', '"' + "x" * 9000 + '"', "[1, 2" * 3,
    "[" + "1," * 3000 + "1]", "",
]  # fmt: skip
WORDS = [b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", b"0" * 30, b"(", b"[" * 99, b"'descr': '|O'",
         b"--flagfile=a\n", b"--flagfile=/dev/zero\n", b"--ch=99999999999\n", b"\xe9"]  # fmt: skip


def paths(value: object, here: tuple = ()) -> Iterator[tuple]:
    """Where the values in a nest of dicts and lists are."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list | tuple) else ()  # fmt: skip
    for key, each in items:
        yield from paths(each, (*here, key))


def changed(value: object, path: tuple, new: object) -> object:
    """A copy with `new` in place of what is at `path`; without it where `new` is ABSENT."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    copy = {key: each for key, each in copy.items() if each is not ABSENT}
    return copy if isinstance(value, dict) else type(value)(copy.values())


ABSENT = object()


def mutated_json(valid: bytes, draw: random.Random) -> bytes | None:
    """One value of one line replaced, removed, or another added."""
    try:
        lines = [json.loads(each) for each in valid.decode().splitlines()]
    except ValueError:
        try:
            lines = [json.loads(valid)]
        except ValueError:
            return None
    number = draw.randrange(len(lines))
    where = draw.choice([*paths(lines[number])])
    action, raw = draw.random(), draw.choice(RAW)
    new = changed(lines[number], where, ABSENT if action < 0.2 and where else "@@")
    texts = [json.dumps(each) for each in lines]
    if action > 0.9 and isinstance(lines[number], dict):  # an unknown key is no fault
        new = {**lines[number], "a newer version's": "@@"}
    texts[number] = json.dumps(new).replace('"@@"', raw)
    return ("\n".join(texts) + "\n").encode()


def hostile(draw: random.Random, old: object) -> object:
    """What a checkpoint could hold in place of `old`."""
    shape = tuple(old.shape) if isinstance(old, torch.Tensor) else (2,)
    return draw.choice([
        ABSENT, None, True, -1, 0, 2**70, 10**400, 1.5, float("nan"), float("inf"), "x", "", [], {},
        [1, "a"], {"a": 1}, (1, 2), {1: {2: 3}}, torch.zeros(3), torch.zeros(0), torch.tensor(1.0),
        torch.zeros(shape), torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.complex64), torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape).to_sparse(), torch.zeros(1).expand(10**6, 10**6), -torch.ones(shape),
        torch.zeros(shape, device="meta"), torch.zeros(1).expand(shape or (1,)),
    ])  # fmt: skip


def mutated_tensors(valid: bytes, draw: random.Random) -> bytes:
    """One entry of a checkpoint replaced."""
    state = torch.load(io.BytesIO(valid), weights_only=True)
    where = [*paths(state)]
    short = [path for path in where if len(path) < 3 or path[0] in ("settings", "sched")]
    path = draw.choice(short if draw.random() < 0.6 else where)
    old = state
    for key in path:
        old = old[key]
    new = hostile(draw, old)
    if not path and new is ABSENT:
        new = {}
    file = io.BytesIO()
    torch.save(changed(state, path, new), file)
    return file.getvalue()


def mutated_bytes(valid: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, spliced."""
    content, action = bytearray(valid), draw.randrange(6)
    # The first and last bytes say most of what a file is.
    ends = [draw.randrange(len(content) + 1), draw.randrange(min(len(content), 600) + 1)]
    place = draw.choice([*ends, max(0, len(content) - ends[1])])
    if action == 0:
        return bytes(content[:place])
    if action == 1:
        for _ in range(draw.choice([1, 1, 4, 30])):
            at = min(len(content) - 1, abs(place + draw.randrange(-50, 50)))
            content[at] ^= 1 << draw.randrange(8)
    if action == 2:
        content[place:place] = draw.choice(WORDS)
    if action == 3:
        content[place : place + 9] = draw.choice(WORDS)
    if action == 4:
        start = draw.randrange(len(content))
        content[place:place] = content[start : start + draw.randrange(200)]
    if action == 5:
        del content[place : place + draw.randrange(1, 40)]
    return bytes(content)


def mutated(valid: bytes, number: int, name: str) -> bytes:
    """A mutation of `valid`; the number says which."""
    draw = random.Random(f"{name} {number}")
    if number == 0:
        return valid
    if number < 10:
        return draw.choice(
            [b"", b"\0", b"[]", b"{}", b"\n\n", draw.randbytes(300), b"\x80\2.", b"PK"]
        )
    if name == "ckpt.pt" and number % 3:
        return mutated_tensors(valid, draw)
    if number % 3 and (found := mutated_json(valid, draw)) is not None:
        return found
    return mutated_bytes(valid, draw)


# --- the test -------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A block that may take SECONDS and MEMORY; it hangs on, or asks for, nothing more."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    if MINUTES:
        print("\n".join(f"{count:9,} {name}" for name, count in counts.items()))
        print(f"{sum(counts.values()):9,} examples in all")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_a_value_or_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").mkdir()
    (tmp_path / "b").write_text("--seed=1\n")  # a flagfile that another one names
    KINDS[kind].write(tmp_path / "file")
    path = tmp_path / "file" / KINDS[kind].name
    valid = path.read_bytes()

    def try_one(number: int) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        content = mutated(valid, number, path.name)
        path.write_bytes(content)
        refused = contextlib.suppress(UserError) if number else contextlib.nullcontext()
        with bounded(), refused:
            KINDS[kind].read(path)
        assert path.read_bytes() == content

    try_one(0)  # the valid file
    end = time.monotonic() + 60 * MINUTES / len(KINDS)
    for _turn in range(10**9):
        run = given(st.integers(0, 2**32))(try_one)
        run = settings(
            max_examples=EXAMPLES, deadline=None, derandomize=not MINUTES, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )(run)  # fmt: skip
        (seed(time.time_ns())(run) if MINUTES else run)()
        if time.monotonic() > end:
            break
    gc.collect()  # msgspec's objects, too
