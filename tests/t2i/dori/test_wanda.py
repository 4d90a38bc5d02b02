"""Weights by |W| ||x||: statistics against plain hooks, masks by definition, all else untouched."""

import math

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.dori import masks, wanda
from gencompress.t2i.dori.draw import Sampling
from gencompress.t2i.pipeline import encode_prompts, hushed
from gencompress.t2i.sample import sample

HOW = Sampling(steps=4, guidance=3.0, size=32, batch=2)
PROMPTS = ["a red car", "a blue cat", "a white background"]
CONFIG = wanda.WandaConfig(rho=0.05, steps=3)
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def norms(pipe):
    target = wanda.gather_norms(pipe, PROMPTS, [5, 6, 7], CONFIG, HOW)
    return target, wanda.gather_norms(pipe, [""] * 3, [5, 6, 7], CONFIG, HOW)


def test_statistics_by_plain_hooks(pipe, norms):
    """One picture at a time, activations kept, everything in float64."""
    layer, seen = pipe.unet.get_submodule(FIRST.removeprefix("unet.")), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    wanted = torch.zeros(3, layer.in_features, dtype=torch.float64)
    for prompt, seed in zip(PROMPTS, (5, 6, 7), strict=True):
        seen.clear()
        sample(pipe, [prompt], seeds=[seed], steps=4, guidance=3.0, size=32)
        assert len(seen) == 4
        for step in range(3):
            rows = seen[step].flatten(0, 1)
            wanted[step] += (rows / rows.norm(dim=1, keepdim=True)).square().sum(0)
    hook.remove()
    torch.testing.assert_close(norms[0].squares[FIRST].double(), wanted, rtol=1e-3, atol=1e-5)


def test_columns_sum_to_the_number_of_rows(norms):
    # 3 prompts, with and without text, 8 x 8 tokens, in each of 3 calls
    for squares in norms[0].squares.values():
        assert squares.shape[0] == 3
        counts = squares.sum(1)
        assert counts.tolist() == pytest.approx([round(float(counts[0]))] * 3, rel=1e-5)
    assert float(norms[0].squares[FIRST][0].sum()) == pytest.approx(3 * 2 * 64, rel=1e-5)


def test_parts_add_up(pipe, norms):
    parts = [
        wanda.gather_norms(pipe, [p], [s], CONFIG, HOW)
        for p, s in zip(PROMPTS, (5, 6, 7), strict=True)
    ]
    whole = parts[0] + parts[1] + parts[2]
    for name, squares in norms[0].squares.items():
        torch.testing.assert_close(whole.squares[name], squares, rtol=1e-3, atol=1e-4)


def selected(pipe, norms, **changed):
    config = wanda.WandaConfig(**{"rho": CONFIG.rho, "steps": CONFIG.steps, **changed})
    mask = wanda.select(pipe, *norms, config)
    return {name: ~keep for name, keep in mask.keep.items()}


def test_masks_by_definition(pipe, norms):
    target, base = norms
    nothing = wanda.Norms({name: 0 * one for name, one in base.squares.items()})
    for name, layer in wanda.layers(pipe, "ff.net.2").items():
        count = math.floor(0.05 * layer.in_features)
        alone = selected(pipe, (target, nothing), steps=1)[f"{name}.weight"]
        assert alone.sum(1).tolist() == [count] * layer.out_features
        wanted = torch.zeros_like(layer.weight, dtype=torch.bool)
        size = layer.weight.detach().abs()
        for step in range(3):
            ours = size * target.squares[name][step].sqrt()
            theirs = size * base.squares[name][step].sqrt()
            best = ours.sort(dim=1, descending=True, stable=True).indices[:, :count]
            top = torch.zeros_like(wanted).scatter_(1, best, True)
            wanted |= top & (ours > theirs)
        found = selected(pipe, norms)[f"{name}.weight"]
        assert torch.equal(found, wanted) and 0 < int(found.sum()) < found.numel() / 5


def test_edges(pipe, norms):
    target, base = norms
    for given, more in (((target, target), {}), (norms, {"rho": 0.0})):
        assert not any(bool(gone.any()) for gone in selected(pipe, given, **more).values())
    previous = None
    for steps in (1, 2, 3):
        found = selected(pipe, norms, steps=steps)
        assert previous is None or all(bool((found[n] | ~previous[n]).all()) for n in found)
        previous = found
    # in more than a third of three steps: in two of them or more
    some, often = selected(pipe, norms), selected(pipe, norms, select_ratio=1 / 3)
    always = selected(pipe, norms, select_ratio=0.9)
    counts = [sum(int(one.sum()) for one in found.values()) for found in (some, often, always)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_scale_of_activations_and_weights(pipe, norms):
    bigger = tuple(wanda.Norms({n: 16 * one for n, one in part.squares.items()}) for part in norms)
    found, again = selected(pipe, norms), selected(pipe, bigger)
    assert all(torch.equal(found[name], again[name]) for name in found)
    layer = pipe.unet.get_submodule(FIRST.removeprefix("unet."))
    with torch.no_grad():
        layer.weight.mul_(4)
        again = selected(pipe, norms)
        layer.weight.div_(4)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_the_whole_way_changes_only_its_scope(pipe):
    mask = wanda.find(pipe, PROMPTS[:2], CONFIG, HOW, seed=3)
    assert set(mask.keep) == {f"{name}.weight" for name in wanda.layers(pipe, "ff.net.2")}
    target = wanda.gather_norms(pipe, PROMPTS[:2], [3, 4], CONFIG, HOW)
    base = wanda.gather_norms(pipe, ["", ""], [3, 4], CONFIG, HOW)
    wanted = wanda.select(pipe, target, base, CONFIG)
    assert all(torch.equal(mask.keep[name], wanted.keep[name]) for name in mask.keep)
    made = masks.written(pipe, mask)
    before = pipe.unet.state_dict()
    for name, value in made.unet.state_dict().items():
        same = f"unet.{name}" not in mask.keep
        assert torch.equal(value, before[name]) == same
    # a group for each caption: what either removes
    alone = wanda.WandaConfig(rho=CONFIG.rho, steps=2, group_size=1)
    parts = [
        wanda.find(pipe, [p], alone, HOW, seed=s) for p, s in zip(PROMPTS[:2], (3, 4), strict=True)
    ]
    both, wanted = wanda.find(pipe, PROMPTS[:2], alone, HOW, seed=3), masks.union(parts)
    assert all(torch.equal(both.keep[name], wanted.keep[name]) for name in both.keep)


@pytest.mark.parametrize("scope", wanda.SCOPES)
def test_scopes(pipe, scope):
    found = wanda.layers(pipe, scope)
    part = "text_encoder" if scope == "mlp.fc2" else "unet"
    model = pipe.components[part]
    wanted = [f"{part}.{name}" for name, _ in model.named_modules() if name.endswith("." + scope)]
    assert list(found) == wanted and len(wanted) == (2 if part == "text_encoder" else 6)


def test_the_text_scope_runs_once(pipe):
    config = wanda.WandaConfig(scope="mlp.fc2", rho=0.1)
    norms = wanda.gather_norms(pipe, PROMPTS, [1, 2, 3], config, HOW)
    assert all(
        float(one.sum()) == pytest.approx(3 * 32, rel=1e-5) for one in norms.squares.values()
    )
    mask = wanda.find(pipe, PROMPTS, config, HOW)
    assert all(name.startswith("text_encoder.") for name in mask.keep)
    with masks.applied(pipe, mask):
        encode_prompts(pipe, PROMPTS)


def test_layers_of_sdxl_come_from_the_model():
    with hushed():
        pipe = tiny.mini_pipeline("sdxl")
    found = wanda.layers(pipe, "ff.net.2")
    # two transformer blocks in the deeper level, and two text encoders
    assert any("transformer_blocks.1." in name for name in found)
    assert len(found) == sum(name.endswith(".ff.net.2") for name, _ in pipe.unet.named_modules())
    texts = wanda.layers(pipe, "mlp.fc2")
    assert {name.partition(".")[0] for name in texts} == {"text_encoder", "text_encoder_2"}
    norms = wanda.gather_norms(pipe, ["a car"], [1], wanda.WandaConfig(steps=1), HOW)
    assert norms.squares.keys() == found.keys()


def test_wrong_callers(pipe, norms):
    for more, said in (
        ({"scope": "conv"}, "scope 'conv'"),
        ({"rho": 1.5}, "rho 1.5"),
        ({"steps": 0}, "steps 0"),
        ({"select_ratio": 1.0}, "select_ratio 1.0"),
        ({"group_size": 0}, "group_size 0"),
    ):
        with pytest.raises(ValueError, match=said):
            wanda.WandaConfig(**more)
    with pytest.raises(ValueError, match="4 sampling steps call the denoiser 4 times; 5 are asked"):
        wanda.gather_norms(pipe, ["a"], [1], wanda.WandaConfig(steps=5), HOW)
    with pytest.raises(ValueError, match="1 prompts and 2 seeds"):
        wanda.gather_norms(pipe, ["a"], [1, 2], CONFIG, HOW)
    with pytest.raises(ValueError, match="norms of other layers than those of attn2.to_k"):
        wanda.select(pipe, *norms, wanda.WandaConfig(scope="attn2.to_k"))
    with pytest.raises(ValueError, match="no masks"):
        wanda.find(pipe, [], CONFIG, HOW)
