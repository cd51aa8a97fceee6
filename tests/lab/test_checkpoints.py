"""A checkpoint is whole, its own training's, and read again to the last bit."""

import re
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from adv.defenses.critic import Critic, RunningConfidence
from adv.lab import checkpoints
from adv.lab.checkpoints import checksums, described, load, save
from adv.lab.models import Normalize

SETTINGS = {"lr": 0.1, "loss": "mse", "data": [3, 4], "val": None, "model": "A(\n  (0): B()\n)"}


def test_what_was_saved_is_read_again(tmp_path):
    net = nn.BatchNorm1d(3)
    momenta = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.5, 0.9)}]}
    state = {"model": net.state_dict(), "steps": momenta, "best": None, "loss": [0.25, 1e-300]}
    save(tmp_path / "deep" / "run.pt", SETTINGS, state)
    again = load(tmp_path / "deep" / "run.pt", SETTINGS)
    assert again["steps"] == momenta
    assert (again["best"], again["loss"]) == (None, [0.25, 1e-300])
    assert isinstance(again["model"], OrderedDict)
    assert again["model"]._metadata == net.state_dict()._metadata
    assert again["model"].keys() == net.state_dict().keys()
    assert all(map(torch.equal, again["model"].values(), net.state_dict().values()))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["run.pt"]
    assert load(tmp_path / "other.pt", SETTINGS) is None


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    """torch reads no others from a file that it doesn't trust."""
    rates = {"lr": np.float64(0.1), "data": [np.int64(3), 4]}
    group = {"lr": np.float32(0.5), "betas": (np.float64(0.5), 0.9), "amsgrad": np.bool_(True)}
    save(tmp_path / "run.pt", SETTINGS | rates, {"groups": [group]})
    assert rates["data"][0].dtype == np.int64
    for given in (SETTINGS, SETTINGS | rates):
        again = load(tmp_path / "run.pt", given)["groups"][0]
        assert again == {"lr": 0.5, "betas": (0.5, 0.9), "amsgrad": True}
        assert [type(value) for value in again.values()] == [float, tuple, bool]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 0.2}, "lr = 0.1 there, 0.2 here"),
        ({"data": [3, 5]}, "data = [3, 4] there, [3, 5] here"),
        ({"val": [7]}, "val = None there, [7] here"),
        ({"seed": 1}, "seed = nothing there, 1 here"),
        ({"model": "A(\n  (0): C()\n)"}, "model = (0): B() there, (0): C() here"),
        ({"model": "A(\n  (0): B()\n)\nw"}, "model = nothing there, w here"),
        ({"lr": 0.2, "loss": "nll"}, "lr = 0.1 there, 0.2 here, loss = mse there, nll here"),
    ],
)
def test_other_settings_are_named(tmp_path, change, told):
    save(tmp_path / "run.pt", SETTINGS, {})
    with pytest.raises(ValueError, match=rf"run\.pt is .* another run \({re.escape(told)}\)"):
        load(tmp_path / "run.pt", SETTINGS | change)
    save(tmp_path / "run.pt", SETTINGS | {"seed": 1}, {})
    with pytest.raises(ValueError, match="seed = 1 there, nothing here"):
        load(tmp_path / "run.pt", SETTINGS)


@pytest.mark.parametrize("kind", ["empty", "words", "half", "weights", "code", "folder"])
def test_what_is_no_checkpoint_is_refused(tmp_path, kind):
    file = tmp_path / "run.pt"
    save(file, SETTINGS, {"model": nn.Linear(2, 2).state_dict()})
    if kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "weights":
        torch.save(nn.Linear(2, 2).state_dict(), file)
    elif kind == "code":  # whole networks are code, which isn't run
        torch.save({"settings": SETTINGS, "state": {"model": nn.Linear(2, 2)}}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "words": b"hello", "half": whole[:-200]}[kind])
    with pytest.raises(ValueError, match=r"run\.pt is no checkpoint"):
        load(file, SETTINGS)


def test_an_interrupted_save_leaves_the_file_before(tmp_path, monkeypatch):
    def half(_, file):
        file.write(b"half")
        raise KeyboardInterrupt

    save(tmp_path / "run.pt", SETTINGS, {"epoch": 1})
    monkeypatch.setattr(checkpoints.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "run.pt", SETTINGS, {"epoch": 2})
    monkeypatch.undo()
    assert load(tmp_path / "run.pt", SETTINGS) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_two_may_save_at_once(tmp_path, monkeypatch):
    """One begins and ends while the other is writing: each leaves a whole file."""
    write, seen = torch.save, []

    def slow(content, file):
        if not seen:
            seen.append("inside")
            save(tmp_path / "run.pt", SETTINGS, {"epoch": 2})
            seen.append(load(tmp_path / "run.pt", SETTINGS))
        write(content, file)

    monkeypatch.setattr(checkpoints.torch, "save", slow)
    save(tmp_path / "run.pt", SETTINGS, {"epoch": 1})
    assert seen == ["inside", {"epoch": 2}]
    assert load(tmp_path / "run.pt", SETTINGS) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_checksums_are_of_the_bytes():
    x, y = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2])
    assert checksums(x, y) == [zlib.crc32(t.numpy().tobytes()) for t in (x, y)]
    assert checksums(x.T) == [zlib.crc32(x.T.contiguous().numpy().tobytes())]
    assert checksums(x) != checksums(x.T) != checksums(x + 1)
    assert checksums(torch.zeros(0), torch.tensor(True)) == [0, zlib.crc32(b"\x01")]
    half = torch.ones(2, dtype=torch.bfloat16)  # which NumPy does not know
    assert checksums(half, half.to_sparse()) == [zlib.crc32(b"\x80\x3f\x80\x3f")] * 2


class Scale(nn.Module):
    """A layer that doesn't print what is in it."""

    def __init__(self, size, bend=torch.relu):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(size))
        self.bend = bend

    def extra_repr(self):
        return f"bend={self.bend}"


def test_a_network_is_described_by_all_but_its_values():
    def net(width=4, bend=nn.ReLU, size=3):
        return nn.Sequential(nn.Linear(2, width), bend(), nn.Linear(width, 3), Scale(size))

    others = [net(5), net(bend=nn.Tanh), net(size=1), net().double()]
    others += [net().requires_grad_(False), nn.Sequential(net())]
    texts = [described(model) for model in [net(), *others]]
    assert len(set(texts)) == len(texts)
    assert described(net()) == texts[0]
    assert "(1): ReLU()" in texts[0]
    assert "3.factor: (3,) torch.float32 trained" in texts[0].splitlines()


def test_settings_that_are_no_parameters_tell_networks_apart():
    nets = [Normalize([0.5], [1.0]), Normalize([0.5], [2.0]), Normalize([0.25], [1.0])]
    nets += [Critic((4, 2)), Critic((4, 2), slope=0.1), Critic((4, 2), noise=(0.0, 0.0))]
    nets += [RunningConfidence(3), RunningConfidence(3, decay=0.9)]
    assert len({described(net) for net in nets}) == len(nets)


def test_where_a_function_lies_in_memory_is_no_setting():
    nets = [Scale(3, bend=lambda x: x) for _ in range(2)]
    assert repr(nets[0]) != repr(nets[1])
    assert described(nets[0]) == described(nets[1])
