import os

import pytest
import torch
from torch import nn

from gencompress.measure import Measurement
from gencompress.measure.cost import (
    active_parameters,
    cost_rows,
    file_bytes,
    model_bytes,
    parameter_bytes,
    parameters,
    peak_memory,
)
from gencompress.report.rows import group_of


def test_file_and_folder(tmp_path):
    (tmp_path / "a.ply").write_bytes(bytes(100))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / ".hidden").write_bytes(bytes(23))
    assert file_bytes(tmp_path / "a.ply") == 100
    assert file_bytes(str(tmp_path)) == 123
    assert file_bytes(tmp_path / "deep") == 23


def test_links_inside_a_folder_are_not_counted(tmp_path):
    (tmp_path / "big").write_bytes(bytes(1000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own").write_bytes(bytes(5))
    os.symlink(tmp_path / "big", tmp_path / "folder" / "link")
    os.symlink(tmp_path, tmp_path / "folder" / "circle")
    assert file_bytes(tmp_path / "folder") == 5
    assert file_bytes(tmp_path / "folder" / "link") == 1000  # asked for by name


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_bytes(tmp_path / "absent")


def test_weights_of_a_saved_pipeline(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(bytes(9))
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(bytes(30))
    (tmp_path / "unet" / "config.json").write_bytes(bytes(500))
    (tmp_path / "model_index.json").write_bytes(bytes(500))
    assert model_bytes(tmp_path) == 39
    cache = tmp_path / "cache"  # as downloads are kept
    cache.mkdir()
    os.symlink(tmp_path / "vae" / "diffusion_pytorch_model.bin", cache / "model.bin")
    assert model_bytes(str(cache)) == 30


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_bytes(bytes(5))
    with pytest.raises(FileNotFoundError, match="no weights"):
        model_bytes(tmp_path)


class Experts(nn.Module):
    """A layer, and four experts of which a token takes one; the last layer is the first again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)  # 20 parameters
        self.block = nn.Module()
        self.block.experts = nn.ModuleList(nn.Linear(5, 2, bias=False) for _ in range(4))  # 40
        self.block.router = nn.Linear(5, 4, bias=False)  # 20
        self.last = self.first
        self.register_buffer("seen", torch.zeros(100))


def test_parameters_and_their_bytes():
    model = Experts()
    assert parameters(model) == 80
    assert parameter_bytes(model) == 320
    assert parameter_bytes(model.to(torch.bfloat16)) == 160
    assert parameters(model.to("meta")) == 80


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, 80),
        ({"block.experts": 0.25}, 50),
        ({"block.experts": 0.25, "block": 0.5}, 35),
        ({"block": 0.0}, 20),
        ({"": 0.5}, 40),
        ({"block.experts.1": 0.5}, 75),
    ],
)
def test_active_parameters(shares, expected):
    assert active_parameters(Experts(), shares) == expected


@pytest.mark.parametrize("shares", [{"block.expert": 0.5}, {"block": 1.5}, {"block": -0.1}])
def test_active_parameters_refuse(shares):
    with pytest.raises(ValueError, match="expected a module and a number"):
        active_parameters(Experts(), shares)


def test_peak_memory_follows_births_and_deaths():
    held = torch.ones(1000)

    def fn():
        a = torch.ones(1000)  # 4000 bytes
        b = a + held  # 8000
        view = b.view(10, 100).t()  # the same memory
        del a, b
        c = view.half()  # 4000 + 2000
        d = torch.zeros(250, dtype=torch.float64)  # 4000 + 2000 + 2000
        return c, d

    assert peak_memory(fn) == 8000
    assert peak_memory(fn) == 8000  # what an earlier call freed is counted again
    assert peak_memory(lambda: held.t().view(-1)) == 0
    assert peak_memory(lambda: held.add_(1)) == 0


def test_peak_memory_of_training_is_more_than_of_inference():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = torch.ones(256, 64)
    with torch.no_grad():
        forward = peak_memory(lambda: model(x))
    # only the input and the output of one layer live at once; training keeps the inputs of all
    assert forward == 2 * x.nbytes
    both = peak_memory(lambda: model(x).sum().backward())
    assert both > 4 * x.nbytes + parameter_bytes(model)


def test_peak_memory_of_a_cuda_device(monkeypatch):
    """Memory that the device reports, beyond what was allocated when `fn` started."""
    allocated, peak, calls = [700], [5000], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])

    def reset(device):
        peak[0] = allocated[0]
        calls.append("reset")

    def fn():
        peak[0] = 1200
        calls.append("fn")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert peak_memory(fn, "cuda:0") == 500
    assert calls == ["wait", "reset", "fn", "wait"]


def test_rows_of_two_models():
    before, after = nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.Linear(4, 2)).double()
    after.forward = lambda input: nn.Sequential.forward(after, input.double())
    rows = cost_rows(before, after, {"input": torch.ones(3, 4)})
    assert rows == [
        Measurement("parameters", 40, 10, "parameters", "lower"),
        Measurement("size of parameters", 160, 80, "B", "lower"),
        Measurement("MACs per forward", 96, 24, "MACs", "lower"),
    ]
    groups = [group_of(row.name, row.unit) for row in rows]
    assert groups == ["size", "size", "cost"]
