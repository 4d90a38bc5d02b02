"""The map from dense neurons to experts, and adapters that follow it."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from t2i.dense2moe.mixture_samples import MINIS, converted, far, out

from gencompress.files import FormatError
from gencompress.t2i import tiny
from gencompress.t2i.dense2moe.layout import Group, Layout
from gencompress.t2i.dense2moe.lora import neurons, read_neurons, save_neurons, slice_lora
from gencompress.t2i.dense2moe.moe import mixtures

GROUP = Group(("single_transformer_blocks.0", "single_transformer_blocks.1"), 2)


def test_every_neuron_is_in_one_place(tmp_path):
    model = tiny.mini_unet()
    mixed = converted(model)
    found = neurons(mixed)
    assert found.keys() == mixtures(mixed).keys()
    for path, table in found.items():
        layer, dense = mixed.get_submodule(path), model.get_submodule(path)
        shared = layer.second.in_features
        assert table.shape == (13, shared) and table.dtype == torch.int32
        assert sorted(table[table >= 0].tolist()) == list(range(len(layer.order)))
        inner, columns = layer.w2.shape[1], table[5, : layer.w2.shape[1]].long()
        assert torch.equal(layer.w2[4].T, dense.net[2].weight[:, columns])
        assert torch.equal(
            layer.w1[4][inner:], dense.net[0].proj.weight[len(layer.order) + columns]
        )
    save_neurons(mixed, tmp_path / "map.safetensors")
    again = read_neurons(tmp_path / "map.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(table, found[path]) for path, table in again.items())
    assert (tmp_path / "map.safetensors").stat().st_size < 30_000


def test_files_that_are_no_map(tmp_path):
    path = tmp_path / "map.safetensors"
    with pytest.raises(FormatError, match="no map of expert neurons"):
        read_neurons(path)
    for wrong in (torch.tensor([[0, 0]], dtype=torch.int32), torch.ones(1, 2)):
        save_file({"a": wrong}, path)
        with pytest.raises(FormatError, match="a does not give each neuron to one expert"):
            read_neurons(path)


@pytest.mark.parametrize("name", MINIS)
def test_an_adapter_adds_the_same(name):
    model = MINIS[name]()
    layout = Layout(top_k=12, groups=(GROUP,) if name == "flux" else ())
    mixed = converted(model, layout, router_std=0.0)
    made = torch.Generator().manual_seed(0)
    lora = {}
    ends = ("net.0.proj", "net.2", "proj_mlp", "blocks.0.proj_out", "to_q", "norm.linear")
    for path, layer in model.named_modules():
        if path.endswith(ends):
            down = torch.randn(4, layer.weight.shape[1], generator=made)
            lora[path] = (down, torch.randn(len(layer.weight), 4, generator=made))
    adapted = copy.deepcopy(model)
    with torch.no_grad():
        for path, (down, up) in lora.items():
            adapted.get_submodule(path).weight.add_(0.02 * up @ down)
        for path, added in slice_lora(mixed, lora, 0.02).items():
            mixed.get_parameter(path).add_(added)
    assert far(out(adapted), out(model)) > 0.02
    assert far(out(mixed), out(adapted)) < 1e-5


def test_adapters_that_do_not_fit():
    mixed = converted(tiny.mini_flux(), Layout(adaln="lowrank", rank=4))
    thin = torch.ones(2, 48)
    with pytest.raises(ValueError, match="norm1.linear.weight, of which the model has none"):
        slice_lora(mixed, {"transformer_blocks.0.norm1.linear": (thin, torch.ones(288, 2))})
    with pytest.raises(ValueError, match=r"\(40, 48\) for transformer_blocks.0.attn.to_q.weight"):
        slice_lora(mixed, {"transformer_blocks.0.attn.to_q": (thin, torch.ones(40, 2))})
