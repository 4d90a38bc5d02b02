"""The layer with experts, models built of it, and files that plain diffusers loads."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from t2i.dense2moe.mixture_samples import MINIS, converted, far, out
from torch import nn

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe import classes
from gencompress.t2i.dense2moe.classes import MixtureFeedForward, route
from gencompress.t2i.dense2moe.layout import Group, Layout
from gencompress.t2i.dense2moe.moe import set_top_k

ALL = {
    "full": Layout(),
    "lowrank": Layout(
        adaln="lowrank", rank=5, groups=(Group(("transformer_blocks.0", "transformer_blocks.1")),)
    ),
    "shared": Layout(
        adaln="shared", groups=(Group(("transformer_blocks.0", "transformer_blocks.1"), 2),)
    ),
}


def layer(activation="gelu-approximate", experts=5, inner=3, top_k=2, gate="scaled_softmax"):
    torch.manual_seed(0)
    rows = 2 if activation == "geglu" else 1
    made = MixtureFeedForward(
        nn.Linear(8, rows * (4 + experts * inner)), 6, True, (4, experts, inner, top_k),
        activation, gate,
    )  # fmt: skip
    with torch.no_grad():
        made.b1.normal_()
    return made.double()


def by_hand(made, x):
    """Token by token and expert by expert."""
    y = made.second(classes.activate(made.first(x), made.activation))
    chosen, gates = route(x @ made.router.weight.T, made.top_k, made.gate)
    rows = []
    for t in range(len(x)):
        row = y[t]
        for e, gate in zip(chosen[t].tolist(), gates[t], strict=True):
            hidden = classes.activate(F.linear(x[t], made.w1[e], made.b1[e]), made.activation)
            row = row + gate * (hidden @ made.w2[e])
        rows.append(row)
    return torch.stack(rows)


@pytest.fixture(params=["op", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(classes, "kernel", lambda: None)
    elif classes.kernel() is None:
        pytest.skip("the package with the op is not installed")
    return request.param


@pytest.mark.parametrize("activation", ["gelu-approximate", "gelu", "geglu"])
@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
def test_a_layer_is_its_definition(way, activation, top_k, generator):
    made = layer(activation, top_k=top_k)
    x = torch.randn(11, 8, dtype=torch.float64, generator=generator)
    assert far(made(x[None])[0], by_hand(made, x)) < 1e-12
    assert far(made(x.T.contiguous().T), made(x)) < 1e-12
    assert made(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("gate", classes.GATES)
def test_gradients_of_a_layer(way, gate, generator):
    made = layer("geglu", gate=gate)
    with torch.no_grad():
        made.router.weight.normal_(generator=generator)
    x = torch.randn(7, 8, dtype=torch.float64, generator=generator).requires_grad_()
    learnt = [(n, p) for n, p in made.named_parameters() if n != "router.bias"]  # in no gate
    names, parameters = zip(*learnt, strict=True)
    slopes = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad(made(x), (x, *parameters), slopes)
    theirs = torch.autograd.grad(by_hand(made, x), (x, *parameters), slopes)
    for name, one, other in zip(("x", *names), ours, theirs, strict=True):
        assert far(one, other) < 1e-10, name


def test_an_expert_without_tokens_gets_no_gradient(way, generator):
    made = layer(top_k=1)
    with torch.no_grad():
        made.router.weight.zero_()
    made(torch.randn(9, 8, dtype=torch.float64, generator=generator)).sum().backward()
    assert bool(made.w1.grad[0].any()) and bool(made.w2.grad[0].any())
    for parameter in (made.w1, made.b1, made.w2):
        assert not bool(parameter.grad[1:].any()) and bool(parameter.grad.isfinite().all())


def test_half_precision_keeps_the_router_wide(way, generator):
    made = layer().to(torch.bfloat16)
    x = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    assert far(made(x.bfloat16()).double(), by_hand(made.double(), x.bfloat16().double())) < 2e-2


def test_routes(generator):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    chosen, gates = route(logits, 3, "scaled_softmax")
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2]]  # ties to the lower index
    assert torch.equal(gates[1], torch.ones(3))
    assert torch.allclose(gates, 4 * logits.softmax(1).gather(1, chosen))
    assert torch.allclose(route(logits, 3, "softmax")[1], gates / 4)
    assert torch.allclose(route(logits, 3, "topk_renorm")[1].sum(1), torch.ones(2))
    assert torch.allclose(route(logits, 3, "sigmoid")[1], 2 * logits.sigmoid().gather(1, chosen))
    huge = route(torch.tensor([[1e4, -1e4]]), 2, "scaled_softmax")[1]
    assert torch.equal(huge, torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("gate", classes.GATES)
def test_gates_lead_to_the_router_by_finite_differences(gate, generator):
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)

    def weighted(w):
        _, gates = route(x @ w.T, 2, gate)
        return (gates * torch.arange(12.0, dtype=torch.float64).view(6, 2)).sum()

    assert torch.autograd.gradcheck(weighted, weight.requires_grad_())


def test_numbers_of_experts_a_token():
    made = layer()
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"top_k {wrong} of 5 experts"):
            made.set_top_k(wrong)
    assert made.top_k == 2


@pytest.mark.parametrize("name", ALL)
def test_files_hold_mixtures(name, tmp_path):
    model = converted(tiny.mini_flux(), ALL[name])
    before = out(model)
    for folder, most in (("whole", "10GB"), ("shards", "400KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=most)
        loaded = type(model).from_pretrained(tmp_path / folder)
        assert loaded.config.mixture == model.config.mixture and not loaded.training
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert far(out(loaded), before) < 1e-6
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2

    half = type(model).from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    kept = {p.dtype for n, p in half.named_parameters() if ".router." in n}
    assert kept == {torch.float32} and half.x_embedder.weight.dtype == torch.bfloat16
    assert bool(out(half).isfinite().all())
    set_top_k(model, 1)
    model.save_pretrained(tmp_path / "one")
    one = type(model).from_pretrained(tmp_path / "one")
    assert far(out(one), out(model)) < 1e-6 < far(out(one), before)


@pytest.mark.parametrize("name", MINIS)
def test_without_a_mixture_nothing_changes(name):
    model = MINIS[name]()
    same = getattr(classes, f"MoE{type(model).__name__}").from_config(model.config)
    same.load_state_dict(model.state_dict())
    assert torch.equal(out(same.eval()), out(model))


@pytest.mark.parametrize(
    ("mixture", "problem"),
    [
        ({"experts": {"transformer_blocks.9.ff": [48, 12, 12, 2]}}, "does not have"),
        ({"experts": {"transformer_blocks.0.attn": [48, 12, 12, 2]}}, "a FluxAttention, expected"),
        ({"experts": {"transformer_blocks.0.ff": [48, 12, 13, 2]}}, "has 192 neurons"),
        ({"experts": {"transformer_blocks.0.ff": [48, 12, 12, 13]}}, "top_k 13 of 12"),
        ({"experts": {"transformer_blocks.0.ff": [48, 12, 12, 2]}, "gate": "hard"}, "hard"),
        ({"adaln": "none"}, "adaln 'none'"),
        ({"groups": [{"blocks": ["transformer_blocks.0"], "keep": 2}]}, "keeps 2 of 1"),
    ],
)
def test_configs_that_do_not_fit(mixture, problem):
    config = dict(tiny.mini_flux().config)
    with pytest.raises(ValueError, match=problem):
        classes.MoEFluxTransformer2DModel.from_config(config, mixture=mixture)


LOAD = """
import sys, torch
sys.modules["gencompress_kernels"] = None  # as where it is not installed
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
for folder, part in zip(sys.argv[1::2], sys.argv[2::2]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    model = getattr(pipeline, part)
    assert type(model).__name__.startswith("MoE"), type(model)
    held = load_file(f"{folder}/held.safetensors")
    expected = held.pop("expected")
    with torch.no_grad():
        got = model(**held, return_dict=False)[0]
        assert (got - expected).abs().max() < 1e-5, (got - expected).abs().max()
assert not [name for name in sys.modules if name.split(".")[0] == "gencompress"]
"""


def test_plain_diffusers_loads_a_pipeline_of_mixtures(tmp_path):
    """As a stranger would: no import of ours, only the file in the folder."""
    arguments = []
    for family, part, layout in (("sd", "unet", Layout()), ("flux", "transformer", ALL["shared"])):
        pipeline, folder = tiny.mini_pipeline(family), tmp_path / family
        model = converted(getattr(pipeline, part), layout)
        setattr(pipeline, part, model)
        pipeline.save_pretrained(folder)
        shutil.copy(classes.__file__, folder / part / "dense2moe.py")
        index = json.loads((folder / "model_index.json").read_text())
        index[part] = ["dense2moe", type(model).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
        held = tiny.mini_inputs(model) | {"expected": out(model)}
        save_file(held, folder / "held.safetensors")
        arguments += [str(folder), part]
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, env=env,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_file_stands_alone():
    """classes.py is copied away, so it may import nothing of ours, nor ask for it to be there."""
    nodes = list(ast.walk(ast.parse(Path(classes.__file__).read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    standard = {"__future__", "collections", "functools", "importlib", "inspect", "typing"}
    assert roots <= standard | {"torch", "diffusers"}
