"""Attention maps: what is captured is what the model computes, and nothing is left behind."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from gencompress.t2i import tiny
from gencompress.t2i.optiprune import attention
from gencompress.t2i.optiprune.attention import default_grid, watch
from gencompress.t2i.pipeline import hushed

MINIS = {
    "unet": tiny.mini_unet,
    "pixart": tiny.mini_pixart,
    "sd3": tiny.mini_sd3,
    "flux": tiny.mini_flux,
}
GRIDS = {"unet": (16, 16), "pixart": (8, 8), "sd3": (8, 8), "flux": (4, 4)}


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MINIS.items()}


def latents_of(inputs):
    return "sample" if "sample" in inputs else "hidden_states"


@pytest.mark.parametrize("name", MINIS)
def test_maps_are_shares_of_every_place(models, name):
    model, (high, wide) = models[name], GRIDS[name]
    inputs = tiny.mini_inputs(model)
    with watch(model, (high, wide)) as look:
        maps = look(lambda: model(**inputs))
    assert maps.cross.shape == (2, high, wide, 7)
    assert maps.own.shape == (2, high, wide, high * wide)
    for found in (maps.cross, maps.own):
        assert found.dtype == torch.float32 and found.min() >= 0
        assert torch.allclose(found.sum(-1), torch.ones(2, high, wide), atol=1e-5)
        assert found.std(-1).min() > 1e-6


@pytest.mark.parametrize("grid", [(16, 16), (8, 8)])
def test_equal_explicit_attention_everywhere(grid):
    model = tiny.mini_unet()
    inputs = tiny.mini_inputs(model)
    with watch(model, grid) as look, torch.no_grad():
        found = look(lambda: model(**inputs))
    model.set_attn_processor(AttnProcessor())
    kept = {"cross": [], "own": []}
    for path, module in model.named_modules():
        if not path.endswith(("attn1", "attn2")):
            continue

        def scored(query, key, mask=None, module=module, path=path):
            probabilities = type(module).get_attention_scores(module, query, key, mask)
            if query.shape[1] == grid[0] * grid[1]:
                heads = probabilities.unflatten(0, (2, -1))
                kept["own" if path.endswith("attn1") else "cross"].append(heads)
            return probabilities

        module.get_attention_scores = scored
    with torch.no_grad():
        model(**inputs)
    # two on the way down and three up at 16, one in the middle at 8
    assert len(kept["own"]) == len(kept["cross"]) == (5 if grid == (16, 16) else 1)
    for name in kept:
        wanted = torch.cat(kept[name], 1).mean(1).unflatten(1, grid)
        assert torch.allclose(getattr(found, name), wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "text_first"), [("sd3", False), ("flux", True)])
def test_joint_attention_is_shared_out_again_between_text_and_image(models, name, text_first):
    model = models[name]
    inputs = tiny.mini_inputs(model)
    count, rows, original = (
        GRIDS[name][0] ** 2,
        [],
        torch.nn.functional.scaled_dot_product_attention,
    )
    blocks = 3 if name == "sd3" else 2  # Flux: not the single blocks after them

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                query, key = (args[0], args[1]) if args else (kwargs["query"], kwargs["key"])
                rows.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Spy():
        model(**inputs)
    image = slice(7, None) if text_first else slice(0, count)
    text = slice(0, 7) if text_first else slice(count, None)
    whole = torch.cat([one[:, :, image] for one in rows[:blocks]], 1)
    with watch(model, GRIDS[name]) as look, torch.no_grad():
        found = look(lambda: model(**inputs))
    for keys, maps in ((text, found.cross), (image, found.own)):
        part = whole[..., keys]
        wanted = (part / part.sum(-1, keepdim=True)).mean(1).unflatten(1, GRIDS[name])
        assert torch.allclose(maps, wanted, atol=1e-6)


@pytest.mark.parametrize("name", MINIS)
def test_stopping_early_changes_neither_maps_nor_gradients(models, name, monkeypatch):
    model, grid = models[name], GRIDS[name]
    if name == "unet":
        grid = (8, 8)  # the middle; the whole way up comes after it
    inputs = tiny.mini_inputs(model)
    ended = []
    last = model.conv_out if name == "unet" else model.proj_out
    hook = last.register_forward_hook(lambda *_: ended.append(1))
    leaf = inputs[latents_of(inputs)].requires_grad_()

    def slope(maps):
        return torch.autograd.grad(maps.cross[..., 2].square().sum() + maps.own.max(), leaf)[0]

    with watch(model, grid) as look:
        first = look(lambda: model(**inputs))
        assert len(ended) == 1  # the look around, without gradients
        stopped = look(lambda: model(**inputs))
        assert len(ended) == 1
        found = slope(stopped)
    checked = attention._checked
    monkeypatch.setattr(attention, "_checked", lambda *given: [*checked(*given), "none"])
    with watch(model, grid) as look:
        whole = look(lambda: model(**inputs))  # ends after no layer
        assert len(ended) == 3
    hook.remove()
    assert torch.equal(first.cross, stopped.cross) and torch.equal(first.own, stopped.own)
    assert torch.equal(stopped.cross, whole.cross)
    assert torch.equal(found, slope(whole)) and found.abs().max() > 0


@pytest.mark.parametrize("name", MINIS)
def test_everything_is_as_before_afterwards_and_between_looks(models, name):
    model = models[name]
    inputs = tiny.mini_inputs(model)
    processors = {n: id(p) for n, p in model.attn_processors.items()}
    states = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    still = next(model.parameters()).requires_grad_(False)
    learning = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        with pytest.raises(KeyError), watch(model, GRIDS[name]) as look:
            look(lambda: model(**inputs))
            assert not any(weight.requires_grad for weight in model.parameters())
            assert {n: id(p) for n, p in model.attn_processors.items()} == processors
            assert torch.equal(model(**inputs, return_dict=False)[0], before)
            raise KeyError
        assert torch.equal(model(**inputs, return_dict=False)[0], before)
    assert {n: id(p) for n, p in model.attn_processors.items()} == processors
    assert not any("forward" in vars(module) for module in model.modules())
    assert states == [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    assert learning == [weight.requires_grad for weight in model.parameters()]
    still.requires_grad_(True)


def test_a_failing_run_leaves_the_next_one_whole(models):
    model = models["unet"]
    inputs = tiny.mini_inputs(model)
    with watch(model, (8, 8)) as look:
        wanted = look(lambda: model(**inputs))
        with pytest.raises(ZeroDivisionError):
            look(lambda: 1 / 0)
        assert torch.equal(look(lambda: model(**inputs)).cross, wanted.cross)


def test_pictures_need_not_be_square(models):
    model = models["unet"]
    inputs = tiny.mini_inputs(model)
    inputs["sample"] = torch.randn(1, 4, 12, 18, generator=torch.Generator().manual_seed(1))
    inputs["timestep"], inputs["encoder_hidden_states"] = (
        inputs["timestep"][:1],
        inputs["encoder_hidden_states"][:1],
    )
    with watch(model, (6, 9)) as look, torch.no_grad():
        assert look(lambda: model(**inputs)).own.shape == (1, 6, 9, 54)


def test_masked_text_gets_nothing(models):
    model = models["pixart"]
    inputs = tiny.mini_inputs(model)
    inputs["encoder_attention_mask"] = torch.tensor([[1.0] * 5 + [0.0] * 2, [1.0] * 7])
    with watch(model, (8, 8)) as look, torch.no_grad():
        cross = look(lambda: model(**inputs)).cross
    assert cross[0, ..., 5:].max() < 1e-6 < cross[0, ..., :5].min()
    assert cross[1, ..., 5:].min() > 1e-6


def test_says_which_grids_there_are_and_what_it_cannot_watch(models):
    model = models["unet"]
    inputs = tiny.mini_inputs(model)
    with watch(model, (4, 4)) as look, pytest.raises(ValueError, match="4 x 4; .* 8 x 8, 16 x 16"):
        look(lambda: model(**inputs))
    own = tiny.mini_unet()
    own.set_attn_processor(AttnProcessor())
    with watch(own, (8, 8)) as look, pytest.raises(ValueError, match="mid_block.*does not call"):
        look(lambda: own(**inputs))
    with pytest.raises(ValueError, match="class Linear; expected one of UNet2D"):
        watch(torch.nn.Linear(1, 1), (8, 8)).__enter__()


def test_pruned_queries_are_refused(models):
    model = models["unet"]
    inputs = tiny.mini_inputs(model)
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    inner = layer.processor

    def pruned(attn, states, *args, **named):
        return inner(attn, states[:, :40], *args, **named).repeat(1, 2, 1)[:, :64]

    layer.processor = pruned
    with watch(model, (8, 8)) as look, pytest.raises(ValueError, match="from 40 of its 64 tokens"):
        look(lambda: model(**inputs))
    layer.processor = inner


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_the_default_grid_is_one_that_the_model_has(family):
    with hushed():
        pipe = tiny.mini_pipeline(family)
    assert default_grid(pipe, 64) == (8, 8)
    if family in ("sd", "sdxl"):
        pipe.vae_scale_factor = 8
        assert default_grid(pipe, 512) == (16, 16) and default_grid(pipe, 1024) == (32, 32)
        assert default_grid(pipe, 520) == (17, 17)
