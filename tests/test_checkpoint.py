"""Checkpoints that must load, that must be refused, and the moving average they hold."""

import copy
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from model import EMA
from model.checkpoint import (
    fill,
    load,
    load_optimizer,
    load_scheduler,
    save,
)
from runtime.errors import UserError
from runtime.files import save_grid


def network(seed: int = 0, middle: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, middle), nn.Linear(middle, 2))


def state(net: nn.Module) -> dict:
    return {"net_model": net.state_dict(), "ema_model": net.state_dict()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_round_trip(path: Path) -> None:
    net = network()
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    more = {"step": 12, "x_T": torch.randn(2, 3), "optim": optimiser.state_dict()}
    more["settings"] = {"ch_mult": [1, 2], "skip_slicing": "leading"}
    save(path, {**state(net), **more})
    read = load(path)
    assert (read["step"], read["settings"]) == (12, more["settings"])
    assert torch.equal(read["x_T"], more["x_T"])
    torch.optim.Adam(net.parameters()).load_state_dict(read["optim"])
    other = network(1)
    fill(other, read["net_model"], path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
    torch.save(state(net), path)  # entries of our own may be absent
    assert load(path).keys() == {"net_model", "ema_model"}


@pytest.mark.parametrize("fault", ["content", "full disk"])
def test_a_failed_save_leaves_the_old_file(path: Path, fault: str) -> None:
    save(path, {**state(network()), "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "content":
        with pytest.raises((AttributeError, pickle.PicklingError)):
            save(path, {**state(network()), "step": lambda: 2})
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"ckpt\.pt"):
                save(path, {**state(network()), "step": 2, "more": torch.zeros(100_000)})
            images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
            with pytest.raises(UserError, match=r"grid\.png"):
                save_grid(path.with_name("grid.png"), images)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_what_a_killed_writer_left_is_removed(path: Path) -> None:
    writer = "import os, sys; from runtime.files import replacing"
    command = f"{writer}; file = replacing(sys.argv[1]).__enter__(); file.write_text('half')"
    kill = "os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", f"{command}; {kill}", str(path)], cwd=ROOT)
    (left,) = path.parent.iterdir()
    others = [left.with_name(".ckpt.1.tmp.pt"), left.with_name(".ckpt.mine.tmp.pt")]
    for other in others:
        other.touch()
    left = left.rename(left.with_name(left.name.replace("ckpt", "ckpt_3")))  # of whatever file
    elsewhere = left.with_name(re.sub(r"\w+-\d+\.tmp", "other_machine-99999999.tmp", left.name))
    elsewhere.touch()
    save(path, state(network()))
    assert sorted(path.parent.iterdir()) == sorted([path, elsewhere, *others])


def test_missing_file_names_what_is_there(path: Path) -> None:
    refused(path, "--train")
    for name in ("late", "early"):
        save(path.with_name(f"{name}.pt"), state(network()))
    refused(path, "early, late; see .*--ckpt_name")


@pytest.mark.parametrize(
    "content",
    [
        0.0, 0.1, 0.5, 0.99,  # of a checkpoint
        b"<html>not found</html>", b"[1, 0.5]", bytes(1000), b"PK\x03\x04",
        "folder",
        network().state_dict(), {"net_model": {}}, [1, 2], torch.zeros(2), 3,
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(path: Path, content: object) -> None:
    if isinstance(content, float):
        save(path, state(network()))
        path.write_bytes(path.read_bytes()[: int(content * path.stat().st_size)])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    else:
        torch.save(content, path)
    refused(path, "damaged|no net_model|directory")


def test_a_file_that_unpacks_to_more_than_it_is(path: Path) -> None:
    torch.save(state(network(middle=10**6)), path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(path.with_name("b.pt"), "w", 8) as packed:
        for name in stored.namelist():
            packed.writestr(name, bytes(10**7) if "/data/" in name else stored.read(name))
    refused(path.with_name("b.pt"), r"unpacks to [\d,]{10,} bytes")


def test_a_file_with_a_wrong_bit_is_refused(path: Path) -> None:
    weights = {"0.weight": torch.full((3, 2), 1.5)}
    save(path, {"net_model": weights, "ema_model": weights})
    content = path.read_bytes()
    assert content.count(weights["0.weight"].numpy().tobytes()) == 1
    path.write_bytes(content.replace(b"\0\0\xc0\x3f", b"\0\0\xc8\x3f", 1))
    refused(path, "damaged.*--ckpt_name")


def test_a_file_without_checksums_is_read(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(path, state(network()))
    finally:
        torch.serialization.set_crc32_options(before)
    assert load(path).keys() >= {"net_model", "ema_model"}


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["zip", "pickle", "legacy"])
def test_code_is_refused_and_not_run(path: Path, how: str) -> None:
    mark = path.with_name("ran")
    content = {**state(network()), "step": Malicious(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refused(path, "could carry code|not a checkpoint")
    assert not mark.exists()
    # The trap works: a reader that trusts the file would have sprung it.
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()


GOOD = network().state_dict()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (network(middle=4).state_dict(), r"0\.weight is \[4, 2\] there and \[3, 2\] here"),
        ({k: v for k, v in GOOD.items() if k[0] == "0"}, r"no entry 1\.weight"),
        (GOOD | {"2.weight": torch.zeros(1)}, r"entry 2\.weight has no place"),
        (GOOD | {"1.bias": torch.zeros(5)}, r"1\.bias"),
        (GOOD | {"1.bias": torch.tensor([0.0, torch.nan])}, r"1\.bias.*finite"),
        (GOOD | {"1.bias": torch.zeros(2).to_sparse()}, r"1\.bias.*dense"),
        (GOOD | {"1.bias": torch.zeros(2, device="meta")}, r"1\.bias.*dense"),
        (GOOD | {"1.bias": torch.zeros(2, dtype=torch.long)}, r"1\.bias.*int64"),
        *[(entries, "") for entries in (None, [1], {"0.weight": 3}, {"0.weight": [1.0]}, {})],
    ],
)
def test_the_first_mismatch_is_named_and_changes_nothing(entries: object, message: str) -> None:
    net = network(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match=rf"f\.pt.*{message}"):
        fill(net, entries, "f.pt")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- the state of a training run ------------------------------------------------------------------


def trained(net: nn.Module, steps: int = 3) -> tuple[torch.optim.Adam, LambdaLR]:
    """What a training run goes on from."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(noise)
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return optimizer, scheduler


def replaced(state: dict, *place: object) -> dict:
    """A copy of nested dictionaries and lists with the last of `place` at the others."""
    *keys, last, value = place
    state = inner = copy.deepcopy(state)
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return state


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("state", 3, "exp_avg", torch.zeros(3)), "3 exp_avg .*3.*2"),
        (("state", 0, "exp_avg", torch.zeros(())), "0 exp_avg "),
        (("state", 0, "exp_avg", torch.zeros(2, 3)), "0 exp_avg "),
        (("state", 0, "exp_avg", torch.zeros(3, 2).to_sparse()), "0 exp_avg .*dense"),
        (("state", 0, "exp_avg", torch.zeros(3, 2, dtype=torch.int8)), "0 exp_avg .*int8"),
        (("state", 0, "exp_avg", torch.full((3, 2), torch.inf)), "0 exp_avg .*finite"),
        (("state", 0, "exp_avg_sq", -torch.ones(3, 2)), "0 exp_avg_sq .*negative"),
        (("state", 0, "exp_avg_sq", [0.0]), "exp_avg_sq.*Tensor"),
        (("state", 0, "step", torch.zeros(2)), "0 step"),
        (("state", 0, "step", torch.tensor(-1.0)), "0 step"),
        (("state", 0, "step", torch.tensor(torch.nan)), "0 step"),
        (("state", 0, "step", "3"), "0 step"),
        (("state", 0, {}), "state.*step"),
        (
            ("state", 9, {"step": 1, "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}),
            "state 9",
        ),
        (("state", torch.zeros(2, 2), {}), "Tensor"),
        (("state", []), "state"),
        (("param_groups", {}), "group"),
        (("param_groups", 0, []), "group"),
        (("param_groups", 0, "params", [0, 1, 2]), "parameters"),
        (("param_groups", 0, "params", [0, 1, 2, 2]), "twice"),
        (("param_groups", 0, "params", [0, 1, 2, "a"]), "params"),
        (("param_groups", 0, "betas", [0.9]), "betas"),
        (("param_groups", 0, "betas", torch.ones(2)), "betas"),
        (("param_groups", 0, "eps", 0.1), "eps"),
        (("param_groups", 0, "amsgrad", True), "amsgrad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_optimizer_state_that_does_not_fit_is_refused(place: tuple, message: str) -> None:
    optimizer, _ = trained(network())
    state = optimizer.state_dict()
    load_optimizer(optimizer, state, "f.pt")
    with pytest.raises(UserError, match=rf"f\.pt: optim.*{message}") as error:
        load_optimizer(optimizer, replaced(state, *place), "f.pt")
    assert "\n" not in str(error.value)


def test_optimizer_states_of_other_programs_are_welcome() -> None:
    """Steps that are numbers, as torch 1.11 wrote them; groups without or with a few names more."""
    optimizer, scheduler = trained(network())
    state = optimizer.state_dict()
    group = {k: v for k, v in state["param_groups"][0].items() if k in ("lr", "betas", "eps")}
    group |= {"weight_decay": 0, "params": [5, 6, 7, 8], "amsgrad": False, "later": None}
    values = {5 + k: v | {"step": int(v["step"])} for k, v in state["state"].items()}
    other, later = trained(network(1), 1)
    load_optimizer(other, {"state": values, "param_groups": [group]}, "f.pt")
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert load_scheduler(later, scheduler.state_dict() | {"verbose": False}, "f.pt") == 0.1
    assert later.state_dict() == scheduler.state_dict()


def test_moments_go_to_their_own_weights_in_any_memory_order() -> None:
    nets = [nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)]
    optimizer, _ = trained(nets[0])
    other, _ = trained(nets[1], 0)
    nets[1].load_state_dict(nets[0].state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    load_optimizer(other, state, "f.pt")
    for net, one in zip(nets, (optimizer, other), strict=True):
        net(torch.ones(1, 3, 2, 2)).square().sum().backward()
        one.step()
    torch.testing.assert_close(nets[1].weight, nets[0].weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last_epoch", -1), ("last_epoch", 2.5), ("last_epoch", True),
        ("base_lrs", [0.1, 0.1]), ("base_lrs", ["a"]), ("base_lrs", [torch.nan]), ("base_lrs", 1),
    ],
)  # fmt: skip
def test_a_scheduler_state_that_does_not_fit_is_refused(name: str, value: object) -> None:
    _, scheduler = trained(network())
    for state in (scheduler.state_dict() | {name: value}, None, {}):
        with pytest.raises(UserError, match=rf"f\.pt: sched.*{name if state else ''}"):
            load_scheduler(scheduler, state, "f.pt")


def test_names_from_data_parallel() -> None:
    source, net = network(1), network()
    fill(net, {f"module.{k}": v for k, v in source.state_dict().items()}, "f.pt")
    assert torch.equal(net[0].weight, source[0].weight)


@pytest.mark.parametrize("before", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_from_compiled_networks(before: str) -> None:
    source, net = network(1), network()
    fill(net, {f"{before}{k}": v for k, v in source.state_dict().items()}, "f.pt")
    assert torch.equal(net[0].weight, source[0].weight)


def test_ema_closed_form() -> None:
    net, decay, steps = network(), 0.9, 7
    ema = EMA(net, decay)
    start = net[0].weight.detach().clone()
    target = torch.randn(3, 2)
    with torch.no_grad():
        net[0].weight.copy_(target)
    for _ in range(steps):
        ema.update(net)
    expected = decay**steps * start + (1 - decay**steps) * target
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert torch.equal(net[0].weight, target)


def test_ema_is_a_copy_that_never_trains() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    ema = EMA(net, 0.5)
    assert net.training
    assert not any(module.training for module in ema.model.modules())
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        net[0].weight.zero_()
    assert ema.model[0].weight.any()


def test_ema_of_another_network() -> None:
    ema = EMA(network(), 0.9)
    with pytest.raises(ValueError, match=r"entries differ.*2\.bias"):
        ema.update(nn.Sequential(*network(), nn.Linear(2, 2)))
