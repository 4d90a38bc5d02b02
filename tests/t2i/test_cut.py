"""Cut models: sizes, stand-ins, and files that plain diffusers loads."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import nn

from gencompress.t2i import cut, tiny

UNET = {
    "down_blocks.0.resnets.0.norm2": 3,
    "down_blocks.0.resnets.1": 0,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1": 1,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2": 2,
    "down_blocks.0.attentions.0.transformer_blocks.0.ff": 5,
    "mid_block.attentions.0": 0,
    "up_blocks.0.resnets.0": 0,
    "up_blocks.1.resnets.2": 0,
}
FLUX = {
    "transformer_blocks.0.attn": 3,
    "transformer_blocks.0.ff": 7,
    "transformer_blocks.0.ff_context": 9,
    "transformer_blocks.1": 0,
    "single_transformer_blocks.0.attn": 1,
    "single_transformer_blocks.0.proj_mlp": 5,
    "single_transformer_blocks.1.proj_mlp": 6,
    "single_transformer_blocks.2": 0,
}
SD3 = {
    "transformer_blocks.0.attn": 2,
    "transformer_blocks.0.attn2": 1,
    "transformer_blocks.0.ff_context": 4,
    "transformer_blocks.1": 0,
    "transformer_blocks.2.attn": 3,
    "transformer_blocks.2.ff": 6,
}
PIXART = {
    "transformer_blocks.0.attn1": 2,
    "transformer_blocks.0.attn2": 1,
    "transformer_blocks.0.ff": 6,
    "transformer_blocks.2": 0,
}
CASES = {
    "unet": (tiny.mini_unet, cut.CutUNet2DConditionModel, UNET),
    "flux": (tiny.mini_flux, cut.CutFluxTransformer2DModel, FLUX),
    "sd3": (lambda: tiny.mini_sd3(dual=True), cut.CutSD3Transformer2DModel, SD3),
    "pixart": (tiny.mini_pixart, cut.CutPixArtTransformer2DModel, PIXART),
}


def out(model, **more):
    inputs = tiny.mini_inputs(model, **more)
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", CASES)
def test_files_hold_cut_models(name, tmp_path):
    make, kind, layout = CASES[name]
    torch.manual_seed(0)
    model = kind.from_config(make().config, cut=layout).eval()
    before = out(model)
    assert bool(before.isfinite().all())
    model.save_pretrained(tmp_path / "whole")
    loaded = kind.from_pretrained(tmp_path / "whole")
    assert dict(loaded.config.cut) == layout and not loaded.training
    assert torch.equal(out(loaded), before)

    model.half().save_pretrained(tmp_path / "half")
    half = kind.from_pretrained(tmp_path / "half", torch_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert all(torch.equal(v, half.state_dict()[k]) for k, v in model.state_dict().items())
    sizes = [(tmp_path / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in
             ("half", "whole")]  # fmt: skip
    assert sizes[0] < 0.55 * sizes[1]


@pytest.mark.parametrize("name", CASES)
def test_without_a_layout_nothing_changes(name):
    make, kind, _ = CASES[name]
    model = make()
    same = kind.from_config(model.config)
    same.load_state_dict(model.state_dict())
    assert torch.equal(out(same.eval()), out(model)) and same.config.cut == {}


def test_sizes_of_a_unet():
    model = tiny.mini_unet()
    dense = model.down_blocks[0].attentions[0].transformer_blocks[0]
    head_dim, scale = dense.attn1.to_q.out_features // dense.attn1.heads, dense.attn1.scale
    width = model.down_blocks[0].resnets[0].norm2.num_channels // 8
    cut.shrink(model, UNET)
    resnet = model.down_blocks[0].resnets[0]
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels) == (3, 3 * width)
    assert resnet.conv1.out_channels == resnet.time_emb_proj.out_features == 3 * width
    assert (resnet.conv2.in_channels, resnet.conv2.out_channels) == (3 * width, 32)
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    assert (block.attn1.heads, block.attn2.heads) == (1, 2)
    assert block.attn1.scale == scale == head_dim**-0.5
    assert block.attn2.inner_dim == block.attn2.inner_kv_dim == 2 * head_dim
    assert block.attn2.to_k.in_features == 24 and block.attn2.to_k.out_features == 2 * head_dim
    assert (block.attn2.to_out[0].in_features, block.attn2.to_out[0].out_features) == (
        2 * head_dim,
        32,
    )
    assert (block.ff.net[0].proj.out_features, block.ff.net[2].in_features) == (10, 5)
    assert [len(list(model.get_submodule(k).parameters())) for k, n in UNET.items() if not n] == [
        0
    ] * 4


def test_sizes_of_flux():
    model = tiny.mini_flux()
    cut.shrink(model, FLUX)
    double, single = model.transformer_blocks[0].attn, model.single_transformer_blocks
    assert double.heads == 3 and double.head_dim == 12 and double.inner_dim == 36
    for layer in (double.add_q_proj, double.add_k_proj, double.add_v_proj, double.to_v):
        assert (layer.in_features, layer.out_features) == (48, 36)
    for layer in (double.to_out[0], double.to_add_out):
        assert (layer.in_features, layer.out_features) == (36, 48)
    assert single[0].proj_out.in_features == 12 + 5 and single[0].mlp_hidden_dim == 5
    assert single[0].proj_out._tp_packed_row_blocks == [12, 5]
    assert single[1].proj_out.in_features == 48 + 6


def test_new_layers_take_after_the_old():
    with torch.device("meta"):
        model = tiny.unet((16, 16), 1, norm_num_groups=4, **TWO_LEVELS).to(torch.bfloat16)
    cut.shrink(model, {"mid_block.resnets.0.norm2": 1, "mid_block.resnets.1.norm2": 3})
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    scale_shift = ResnetBlock2D(
        in_channels=8, temb_channels=6, groups=4, eps=1e-3, time_embedding_norm="scale_shift"
    )
    bare = ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)
    cut.shrink(nn.ModuleList([scale_shift, bare]), {"0.norm2": 3, "1.norm2": 1})
    assert scale_shift.time_emb_proj.out_features == 12 and scale_shift.norm2.eps == 1e-3
    assert scale_shift(torch.ones(1, 8, 3, 5), torch.ones(1, 6)).shape == (1, 8, 3, 5)
    assert bare(torch.ones(1, 8, 3, 5), None).shape == (1, 8, 3, 5)


TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.parametrize(
    ("activation", "halves"), [("gelu", 1), ("gelu-approximate", 1), ("geglu", 2), ("swiglu", 2)]
)
def test_feed_forwards(activation, halves):
    ff = nn.ModuleDict({"ff": FeedForward(6, mult=2, activation_fn=activation)})
    cut.shrink(ff, {"ff": 5})
    assert ff["ff"].net[0].proj.out_features == 5 * halves
    assert ff["ff"](torch.ones(2, 6)).shape == (2, 6)


def test_stand_ins():
    x, text = torch.arange(24.0).view(1, 6, 2, 2), torch.ones(1, 3, 4)
    resnet = ResnetBlock2D(in_channels=6, out_channels=4, temb_channels=None, groups=2)
    assert torch.equal(cut.stand_in(resnet)(x, None), x[:, :4])
    stack = Transformer2DModel(2, 3, in_channels=6, norm_num_groups=2)
    assert cut.stand_in(stack)(x, encoder_hidden_states=text).sample is x
    assert cut.stand_in(stack)(x, encoder_hidden_states=text, return_dict=False) == (x,)
    assert cut.stand_in(stack.transformer_blocks[0])(x, timestep=None) is x
    flux, sd3 = tiny.mini_flux(), tiny.mini_sd3()
    for block in (flux.transformer_blocks[0], flux.single_transformer_blocks[0]):
        assert cut.stand_in(block)(x, text, None) == (text, x)
    first, *_, last = (cut.stand_in(block) for block in sd3.transformer_blocks)
    assert first(hidden_states=x, encoder_hidden_states=text, temb=None) == (text, x)
    assert last(hidden_states=x, encoder_hidden_states=text, temb=None) == (None, x)
    assert first.context_pre_only is False and last.context_pre_only is True
    with pytest.raises(ValueError, match="from 6 to 8 channels"):
        cut.stand_in(ResnetBlock2D(in_channels=6, out_channels=8, groups=2))
    with pytest.raises(ValueError, match="a Linear cannot be dropped"):
        cut.stand_in(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({"mid_block.resnets.7.norm2": 1}, "'mid_block.resnets.7.norm2', which the model does not"),
        ({"mid_block.resnets.0.norm2": 9}, "keeps 9 of .* expected 1 to 8"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": 5}, "expected 1 to 4"),
        ({"mid_block.attentions.0.transformer_blocks.0.ff": -1}, "keeps -1 of"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": 0}, "Attention cannot be dropped"),
        ({"mid_block.resnets.0.norm1": 2}, "a GroupNorm"),
        ({"mid_block.resnets.0": 2}, "a ResnetBlock2D"),
        ({"mid_block.attentions.0": 0, "mid_block.attentions.0.proj_in": 1}, "does not have"),
    ],
)
def test_layouts_that_do_not_fit(layout, problem):
    with pytest.raises(ValueError, match=problem):
        cut.shrink(tiny.mini_unet(), layout)


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
for folder, part in zip(sys.argv[1::2], sys.argv[2::2]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    model = getattr(pipeline, part)
    assert type(model).__name__.startswith("Cut"), type(model)
    held = load_file(f"{folder}/held.safetensors")
    expected = held.pop("expected")
    with torch.no_grad():
        got = model(**held, return_dict=False)[0]
        assert (got - expected).abs().max() < 1e-5, (got - expected).abs().max()
assert not [name for name in sys.modules if name.split(".")[0] == "gencompress"]
"""


def test_plain_diffusers_loads_a_cut_pipeline(tmp_path):
    """As a stranger would: no import of ours, only the file in the folder."""
    arguments = []
    for family, part, (_, kind, layout) in (
        ("sd", "unet", CASES["unet"]),
        ("flux", "transformer", CASES["flux"]),
    ):
        pipeline, folder = tiny.mini_pipeline(family), tmp_path / family
        model = kind.from_config(getattr(pipeline, part).config, cut=layout).eval()
        setattr(pipeline, part, model)
        pipeline.save_pretrained(folder)
        shutil.copy(cut.__file__, folder / part / "cut.py")
        index = json.loads((folder / "model_index.json").read_text())
        assert index[part] == ["gencompress.t2i.cut", kind.__name__]
        index[part] = ["cut", kind.__name__]
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
    """cut.py is copied away, so it may import nothing of ours."""
    nodes = list(ast.walk(ast.parse(Path(cut.__file__).read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots <= {"__future__", "collections", "inspect", "typing", "torch", "diffusers"}
