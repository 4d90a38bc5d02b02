"""Pruning inside real attention layers: exact where it should be, and nothing stays behind."""

import functools

import pytest
import torch
import torch.nn.functional as F
from gencompress_kernels.token_merge import compact_tokens, recover_tokens

from gencompress.t2i import tiny
from gencompress.t2i.cut import CutUNet2DConditionModel
from gencompress.t2i.hooks import replace
from gencompress.t2i.optiprune import prune
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.sites import find_sites
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.sample import sample

MODELS = {
    "unet": tiny.mini_unet,
    "sd3": tiny.mini_sd3,
    "sd3.5": functools.partial(tiny.mini_sd3, dual=True),
    "pixart": tiny.mini_pixart,
    "flux": tiny.mini_flux,
}
never = functools.partial(pruned, bypass="never")
build = functools.cache(tiny.mini_pipeline)


def small(**more):
    """Of 16 x 16, 8 x 8 and 4 x 4 tokens in the miniatures, all but the last or all are pruned."""
    return PruneConfig(**{"min_tokens": 16} | more)


def inputs(model, height, width, batch=2, seed=0):
    """Keyword arguments for a grid of height x width tokens."""
    found = tiny.mini_inputs(model, seed, batch)
    made = torch.Generator().manual_seed(seed)
    if "img_ids" in found:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        found["img_ids"] = torch.stack([0 * rows, rows, columns], -1).view(-1, 3).float()
        shape = (batch, height * width, found["hidden_states"].shape[2])
        return found | {"hidden_states": torch.randn(shape, generator=made)}
    name = "sample" if "sample" in found else "hidden_states"
    patch = model.config.get("patch_size") or 1
    shape = (batch, 4, height * patch, width * patch)
    return found | {name: torch.randn(shape, generator=made)}


@torch.no_grad()
def run(model, given):
    return model(**given, return_dict=False)[0]


def pictures(pipe, seeds=(3, 4), steps=3, **more):
    prompts = ["a red car", "a blue cat on white"] * len(seeds)
    return sample(pipe, prompts[: len(seeds)], seeds=list(seeds), steps=steps, **more)


@pytest.fixture
def matches(monkeypatch):
    """The matches made, with the tokens that were matched and the noise."""
    seen = []
    genuine = prune.match_tokens

    def match(tokens, *args, **named):
        seen.append((genuine(tokens, *args, **named), tokens, named["noise"]))
        return seen[-1][0]

    monkeypatch.setattr(prune, "match_tokens", match)
    return seen


def state(model):
    """Everything that pruning could leave behind."""
    return {
        path: (
            getattr(module, "processor", None),
            vars(module).get("forward"),
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_ratio_0_is_bit_identical_and_nothing_stays(family):
    pipe = build(family)
    model = denoiser(pipe)[0]
    expected, before = pictures(pipe, guidance=2.0), state(model)
    with never(pipe, small(ratio=0)):
        assert torch.equal(pictures(pipe, guidance=2.0), expected)
    with never(pipe, small(ratio=0.5)) as pruning:
        processors = [getattr(m, "processor", None) for m in model.modules()]
        assert not torch.equal(pictures(pipe, guidance=2.0), expected)
    assert pruning.rows and all(row["pruned"] for row in pruning.rows)
    assert state(model) == before
    assert all(a is b[0] for a, b in zip(processors, before.values(), strict=True))
    assert torch.equal(pictures(pipe, guidance=2.0), expected)


def test_nothing_stays_after_an_error():
    model = tiny.mini_unet()
    before = state(model)
    with pytest.raises(KeyError), never(model, small()):
        raise KeyError
    assert state(model) == before
    with never(model, small()):
        pass


def spied(model, path, given, config):
    """What goes into and comes out of an attention, pruned."""
    seen = []

    def spy(forward, hidden_states, **named):
        seen.append((hidden_states, named, forward(hidden_states, **named)))
        return seen[-1][2]

    with never(model, config), replace(model, path, spy):
        run(model, given)
    return seen[0]


LAYERS = [
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
    ("unet", "up_blocks.1.attentions.2.transformer_blocks.0.attn1"),
    ("pixart", "transformer_blocks.1.attn1"),
    ("sd3", "transformer_blocks.0.attn"),
    ("sd3", "transformer_blocks.2.attn"),
    ("sd3.5", "transformer_blocks.0.attn"),
    ("sd3.5", "transformer_blocks.0.attn2"),
    ("flux", "transformer_blocks.1.attn"),
    ("flux", "single_transformer_blocks.0.attn"),
]


def whole(match, batch):
    """The match of all samples: in Flux one serves them all."""
    parts = (match.kept, match.source, match.counts)
    return type(match)(*(part.expand(batch, -1).contiguous() for part in parts))


@pytest.mark.parametrize(("family", "path"), LAYERS)
@torch.no_grad()
def test_pre_is_attention_over_the_expanded_copies(family, path, matches):
    model = MODELS[family]()
    given = inputs(model, 6, 8)
    config = small(ratio=0.6, mode="pre")
    hidden, named, got = spied(model, path, given, config)
    match = next(m for m, tokens, _ in matches if m.source.shape[1] == 48)
    match = whole(match, 2)
    lead = hidden.shape[1] - 48
    image = recover_tokens(compact_tokens(hidden[:, lead:], match), match)
    named = dict(named)
    if named.get("image_rotary_emb") is not None:
        copied = compact_tokens(torch.arange(48)[None].repeat(2, 1), match)
        rows = recover_tokens(copied, match)[0]
        named["image_rotary_emb"] = tuple(
            torch.cat([table[:-48], table[-48:][rows]]) for table in named["image_rotary_emb"]
        )
    expected = model.get_submodule(path)(torch.cat([hidden[:, :lead], image], 1), **named)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    plain = model.get_submodule(path)(hidden, **named)
    plain = plain[0] if isinstance(plain, tuple) else plain
    one = got[0] if isinstance(got, tuple) else got
    assert (one - plain).abs().max() > 1e-3, "nothing was pruned"


@pytest.mark.parametrize(("family", "path"), LAYERS)
@torch.no_grad()
def test_post_is_attention_over_the_kept_tokens_then_copied(family, path, matches):
    model = MODELS[family]()
    hidden, named, got = spied(model, path, inputs(model, 6, 8), small(mode="post"))
    match = whole(next(m for m, _, _ in matches if m.source.shape[1] == 48), 2)
    lead = hidden.shape[1] - 48
    named = dict(named)
    if named.get("image_rotary_emb") is not None:
        named["image_rotary_emb"] = tuple(
            torch.cat([table[:-48], table[-48:][match.kept[0]]])
            for table in named["image_rotary_emb"]
        )
    few = torch.cat([hidden[:, :lead], compact_tokens(hidden[:, lead:], match)], 1)
    expected = model.get_submodule(path)(few, **named)
    if isinstance(got, tuple):
        assert torch.equal(got[1], expected[1]), "the text's"
        got, expected = got[0], expected[0]
    assert torch.equal(got[:, :lead], expected[:, :lead])
    assert torch.equal(got[:, lead:], recover_tokens(expected[:, lead:].contiguous(), match))


def test_by_default_only_joint_attention_weighs_its_keys(matches):
    for family, mode in [("unet", "post"), ("pixart", "post"), ("sd3", "pre"), ("flux", "pre")]:
        model = MODELS[family]()
        given = inputs(model, 6, 8)
        found = []
        for wanted in (None, mode):
            with never(model, small(mode=wanted)):
                found.append(run(model, given))
        assert torch.equal(*found)


@torch.no_grad()
def test_patches_of_equal_tokens_lose_nothing(matches):
    """Check 4: an attention whose tokens are equal in each patch, three of four pruned."""
    model = tiny.mini_unet()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    block = model.get_submodule(path.rpartition(".")[0])
    tokens = torch.randn(2, 4, 3, 32, generator=torch.Generator().manual_seed(0))
    tokens = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    text = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    expected = block(tokens, encoder_hidden_states=text)
    for mode in prune.MODES:  # every token kept counts for four, so the bias is the same for all
        with never(model, small(ratio=0.75, mode=mode)) as pruning:
            pruning.step = 0
            pruning._grids[model.down_blocks[0].attentions[0]] = (8, 6)
            got = block(tokens, encoder_hidden_states=text)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(matches) == 2 and matches[0][0].kept.shape == (2, 12)


@pytest.mark.parametrize("family", MODELS)
def test_the_tokens_matched_are_those_before_the_norm(family, matches):
    model = MODELS[family]()
    blocks = [s.block for s in find_sites(model)]
    seen = []

    def look(_, args, named):
        seen.append(args[0] if args else named["hidden_states"])

    hook = blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    with never(model, small()):
        run(model, inputs(model, 6, 8))
    hook.remove()
    expected = seen[0]
    if family == "flux":
        cosines = F.normalize(expected, dim=-1) @ F.normalize(expected, dim=-1).mT
        tokens = matches[0][1]
        assert tokens.shape[0] == 1
        torch.testing.assert_close((tokens @ tokens.mT)[0] / 2, cosines.mean(0))
    else:
        assert torch.equal(matches[0][1], expected)


GRIDS = [(6, 10), (7, 5), (9, 13)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", MODELS)
def test_other_grids_run(family, grid, matches):
    model = MODELS[family]()
    if "sd3" in family:  # its table of places has 8 x 8
        grid = tuple(min(side, 8) for side in grid)
    given = inputs(model, *grid)
    with never(model, small(ratio=0.7, min_tokens=35)) as pruning:
        got = run(model, given)
    assert got.shape == run(model, given).shape and got.isfinite().all()
    assert pruning.rows[0]["grid"] == f"{grid[0]}x{grid[1]}"
    kept = matches[0][0].kept.shape[1]
    tokens = grid[0] * grid[1]
    assert kept == pruning.rows[0]["kept"] == tokens - int(0.7 * tokens)


def test_the_latents_of_a_full_hd_picture_run(matches):
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    model = tiny.unet((16,) * 3, down_block_types=down, up_block_types=up).eval()
    with never(model, PruneConfig(ratio=0.75, min_tokens=2040)) as pruning:
        got = run(model, inputs(model, 135, 240, batch=1))
    assert got.shape == (1, 4, 135, 240)
    assert got.isfinite().all() and [row["grid"] for row in pruning.rows] == ["68x120", "34x60"]
    kept = [match.kept.shape[1] for match, _, _ in matches]
    assert kept == [2040, 510]


@pytest.mark.parametrize("family", ["unet", "pixart", "sd3", "sd3.5"])
def test_samples_do_not_depend_on_their_batch(family, matches):
    model = MODELS[family]()
    given = inputs(model, 6, 8, batch=3) | {"timestep": torch.tensor([500, 500, 500])}
    with never(model, small()):
        together = run(model, given)
    for i in range(3):
        one = {
            name: value[i : i + 1] if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        with never(model, small()):
            alone = run(model, one)
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-4)
        assert torch.equal(matches[-1][0].kept[0], matches[0][0].kept[i]) or family == "unet"


def test_seeds_of_their_own(matches):
    model = tiny.mini_unet()
    given = inputs(model, 6, 8, batch=3)
    with never(model, small(seed=(5, 6, 7))):
        run(model, given)
    with never(model, small(seed=(7, 5, 6))):
        run(model, given)
    first, second = matches[0][2], matches[len(matches) // 2][2]
    assert torch.equal(first[[2, 0, 1]], second) and not torch.equal(first[0], first[1])
    with never(model, small(seed=(5, 6))), pytest.raises(ValueError, match="2 seeds for .* of 3"):
        run(model, given)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["unet", "pixart", "sd3"])
def test_both_halves_of_guidance_keep_the_tokens_of_the_conditional(family, share, matches):
    model = MODELS[family]()
    given = inputs(model, 6, 8, batch=4)
    name = "sample" if family == "unet" else "hidden_states"
    given[name] = given[name][:2].repeat(2, 1, 1, 1)
    with never(model, small(share_guidance=share)) as pruning:
        run(model, given)
        kept = next(m.kept for m in pruning._matches.values() if m.source.shape[1] == 48)
    assert matches[0][1].shape[0] == (2 if share else 4) and kept.shape[0] == 4
    if share:
        assert torch.equal(kept[:2], kept[2:]) and torch.equal(kept[:2], matches[0][0].kept)
    conditional = {k: v[2:] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with never(model, small()):
        matches.clear()
        run(model, conditional)
    assert torch.equal(kept[2:], matches[0][0].kept)


def test_flux_keeps_the_same_tokens_in_calls_with_the_same_latents(matches):
    model = tiny.mini_flux()
    given = inputs(model, 4, 6)
    other = given | {"encoder_hidden_states": 2 * given["encoder_hidden_states"]}
    for share, calls in [(True, 1), (False, 2)]:
        matches.clear()
        with never(model, small(share_guidance=share)):
            run(model, given)
            run(model, other)
        assert len(matches) == calls
    with never(model, small()):
        matches.clear()
        run(model, given)
        run(model, given | {"hidden_states": given["hidden_states"].clone()})
    assert len(matches) == 2


def walk(model, times, given):
    for time in times:
        latents = {"sample": given["sample"].clone()}
        run(model, given | latents | {"timestep": torch.tensor(time)})
        yield


def test_one_matching_serves_a_resolution_and_some_steps(matches):
    model = tiny.mini_unet()
    given = inputs(model, 6, 8)
    for every, expected in [
        (1, [1, 1, 1, 1, 1, 1]),
        (2, [1, 0, 1, 0, 1, 1]),
        (9, [1, 0, 0, 0, 0, 1]),
    ]:
        with never(model, small(every=every, min_tokens=48)):
            counts = []
            for _ in walk(model, [900, 700, 500, 300, 100, 900], given):
                counts.append(len(matches))
                matches.clear()
        assert counts == expected


def test_noise_changes_with_the_step_and_begins_again_with_a_run(matches):
    model = tiny.mini_unet()
    given = inputs(model, 6, 8)
    with never(model, small(min_tokens=48)) as pruning:
        steps = [pruning.step for _ in walk(model, [900, 500, 100, 900, 900, 500], given)]
    assert steps == [0, 1, 2, 0, 0, 1]
    noise = [noise for _, _, noise in matches]
    assert torch.equal(noise[0], noise[3]) and torch.equal(noise[1], noise[5])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])
    assert torch.equal(noise[0][0], noise[0][1])  # one seed for all
    matches.clear()
    with never(model, small(min_tokens=48, seed=1)):
        list(walk(model, [900], given))
    assert not torch.equal(matches[0][2], noise[0])


def test_resting_in_the_last_steps(matches):
    model = tiny.mini_unet()
    given = inputs(model, 6, 8)
    with never(model, small(min_tokens=48, rest=0.4, steps=5)):
        counts = [len(matches) for _ in walk(model, [900, 700, 500, 300, 100], given)]
    assert counts == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_same_seed_same_picture_and_the_global_state_is_left(family):
    pipe = build(family)
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    with never(pipe, small()):
        first = pictures(pipe, guidance=2.0)
        second = pictures(pipe, guidance=2.0)
    with never(pipe, small()):
        third = pictures(pipe, guidance=2.0)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), expected)


def test_gradients_reach_the_latents():
    model = tiny.mini_unet().requires_grad_(False)
    given = inputs(model, 6, 8)
    slopes = []
    for _ in range(2):
        latents = given["sample"].clone().requires_grad_()
        with never(model, small(mode="pre")):
            out = model(**given | {"sample": latents}, return_dict=False)[0]
        slopes.append(torch.autograd.grad(out.square().sum(), latents)[0])
    assert torch.equal(*slopes) and slopes[0].abs().min() > 0


def test_checkpointing_gives_the_same_gradients():
    model = tiny.mini_unet().requires_grad_(False)
    given = inputs(model, 6, 8)
    slopes = []
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing()
            model.train()
        latents = given["sample"].clone().requires_grad_()
        with never(model, small()):
            out = model(**given | {"sample": latents}, return_dict=False)[0]
            slopes.append(torch.autograd.grad(out.square().sum(), latents)[0])
    torch.testing.assert_close(*slopes)


def test_a_block_that_runs_without_its_hooks_is_matched_after_the_norm(matches):
    model = tiny.mini_unet()
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    tokens = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    block = model.get_submodule(path)
    with never(model, small()) as pruning:
        run(model, inputs(model, 6, 8))
        pruning._matches.clear()
        block.forward(tokens, encoder_hidden_states=torch.zeros(2, 3, 24))
    assert torch.equal(matches[-1][1], block.norm1(tokens))


@torch.no_grad()
def test_the_image_prompts_of_flux_are_spread_too(matches):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(0)
    model, path = tiny.mini_flux(), "transformer_blocks.0.attn"
    attention = model.get_submodule(path)
    attention.set_processor(FluxIPAdapterAttnProcessor(48, 8, (3,)))
    image = {"ip_hidden_states": [torch.randn(2, 3, 8)]}
    given = inputs(model, 6, 8) | {"joint_attention_kwargs": image}
    _, named, got = spied(model, path, given, small(mode="post"))
    match = whole(matches[0][0], 2)
    assert len(got) == 3 and named["ip_hidden_states"] and got[2].std() > 1e-3
    copied = recover_tokens(compact_tokens(got[2], match), match)
    assert torch.equal(got[2], copied)


@torch.no_grad()
def test_masks_lose_the_entries_of_pruned_tokens(matches):
    model = tiny.mini_unet(mid_block_type=None)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    given = inputs(model, 6, 8)
    mask = (torch.rand(2, 48, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    given["attention_mask"] = mask
    hidden, named, got = spied(model, path, given, small(mode="post", min_tokens=48))
    match = matches[0][0]
    attention = model.get_submodule(path)
    bias = (1 - mask.gather(1, match.kept))[:, None] * -10000.0
    expected = attention(compact_tokens(hidden, match), attention_mask=bias)
    torch.testing.assert_close(got, recover_tokens(expected, match))
    bare = attention(compact_tokens(hidden, match))
    assert not torch.allclose(expected, bare)
    _, _, weighed = spied(model, path, given, small(mode="pre", min_tokens=48))
    expected = attention(
        compact_tokens(hidden, match), attention_mask=bias + match.counts.log()[:, None]
    )
    torch.testing.assert_close(weighed, recover_tokens(expected, match))


def test_a_mask_with_rows_of_queries_is_refused(matches):
    model = tiny.mini_flux()
    given = inputs(model, 4, 6)
    square = {"joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, 31, 31)}}
    with never(model, small()), pytest.raises(ValueError, match="one entry a token"):
        run(model, given | square)
    flat = {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 31, dtype=torch.bool)}}
    with never(model, small()):
        assert torch.allclose(run(model, given | flat), run(model, given), atol=1e-6)


def test_cross_attention_in_place_of_self_attention_is_left_alone(matches):
    model = tiny.mini_unet(only_cross_attention=True, mid_block_type=None)
    given = inputs(model, 6, 8)
    expected = run(model, given)
    with never(model, small()):
        assert torch.equal(run(model, given), expected)
    assert not matches


def test_only_self_attention_is_wrapped():
    model = tiny.mini_unet()
    with never(model, small()) as pruning:
        wrapped = {p for p, module in model.named_modules() if "forward" in vars(module)}
    assert wrapped == {site.path for site in pruning.sites} and len(wrapped) == 6
    assert all(path.endswith("attn1") for path in wrapped)


def test_processors_may_be_replaced_meanwhile(matches):
    from diffusers.models.attention_processor import AttnProcessor

    model = tiny.mini_unet()
    given = inputs(model, 6, 8)
    for mode in prune.MODES:
        other = AttnProcessor()
        with never(model, small(mode=mode)):
            expected = run(model, given)
            model.set_attn_processor(other)
            torch.testing.assert_close(run(model, given), expected)
        assert all(one is other for one in model.attn_processors.values())
        model.set_default_attn_processor()


def test_small_layers_are_named():
    """The case of SDXL: no attention at the largest resolution."""
    pipe = build("sdxl")
    least = PruneConfig(min_tokens=100)
    with never(pipe, least), pytest.raises(ValueError, match=r"no attention layer has 100 tokens"):
        pictures(pipe, seeds=(0,))
    model = denoiser(pipe)[0]
    with never(model, least), pytest.raises(ValueError, match=r"are 8 x 8 \(\d+ layers\)"):
        run(model, tiny.mini_inputs(model))
    with never(model, PruneConfig(min_tokens=64)) as pruning:
        run(model, tiny.mini_inputs(model))
    assert [row["tokens"] for row in pruning.rows] == [64]


def test_it_does_not_nest_but_may_be_applied_again():
    pipe = build("sd")
    outer, inner = never(pipe, small()), never(pipe.unet, small())
    with outer, pytest.raises(ValueError, match="being pruned already"), inner:
        pass
    with never(pipe, small()):
        pass


def test_another_wrapper_left_inside_is_seen():
    model = tiny.mini_unet()
    before = state(model)
    path = find_sites(model)[0].path
    block = never(model, small())
    block.__enter__()
    model.get_submodule(path).forward = lambda x, **_: x
    with pytest.raises(RuntimeError, match=f"replaced the forward of {path}"):
        block.__exit__(None, None, None)
    assert state(model) == before


class Deaf:
    """A processor of SD3 with an attention of its own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        return hidden_states, encoder_hidden_states


class Cropping:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states[:, 1:]


def test_processors_that_cannot_be_pruned_are_named():
    model = tiny.mini_sd3()
    model.set_attn_processor(Deaf())
    given = inputs(model, 6, 8)
    with never(model, small(mode="pre")), pytest.raises(ValueError, match="Deaf, does not call"):
        run(model, given)
    with never(model, small(mode="post")):
        run(model, given)
    model = tiny.mini_unet()
    model.set_attn_processor(Cropping())
    with never(model, small()), pytest.raises(ValueError, match="Cropping, gave 23 tokens for 24"):
        run(model, inputs(model, 6, 8))


def test_image_ids_that_are_no_grid():
    model = tiny.mini_flux()
    given = inputs(model, 4, 6)
    given["img_ids"] = given["img_ids"].flip(0)
    with never(model, small()), pytest.raises(ValueError, match="rows of one grid"):
        run(model, given)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"ratio": 0.8}, "0 to 0.75, since one token of each patch of 2 x 2"),
        ({"ratio": -0.1}, "ratio -0.1"),
        ({"ratio": 0.7, "patch": (1, 3)}, "0 to 0.666667"),
        ({"patch": (0, 2)}, "patch of 0 x 2"),
        ({"mode": "both"}, "post or pre"),
        ({"recover_from": "all"}, "base or kept"),
        ({"min_tokens": 0}, "min_tokens 0"),
        ({"every": 0}, "every 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"rest": 0.2}, "the number of steps"),
        ({"rest": 1.0, "steps": 5}, "rest 1.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": ()}, "seed"),
    ],
)
def test_settings_that_make_no_sense(more, text):
    with pytest.raises(ValueError, match=text):
        PruneConfig(**more)


def test_what_cannot_be_pruned():
    vae = pruned(tiny.autoencoder((16, 16, 16)))
    with pytest.raises(ValueError, match="of class AutoencoderKL; expected one of UNet2D"), vae:
        pass
    with pytest.raises(ValueError, match="auto or never"), pruned(build("sd"), bypass="always"):
        pass


def test_cut_models_are_pruned_and_dropped_layers_are_not():
    path = "down_blocks.0.attentions.{}.transformer_blocks.0{}"
    config = dict(tiny.mini_unet().config)
    layout = {path.format(0, ".attn1"): 3, path.format(1, ""): 0}
    torch.manual_seed(0)
    model = CutUNet2DConditionModel.from_config(config | {"cut": layout}).eval()
    for bypass in prune.BYPASSES:
        with pruned(model, small(min_tokens=48), bypass=bypass) as pruning:
            run(model, inputs(model, 6, 8))
        assert len(pruning.sites) == 5
        assert [row["tokens"] for row in pruning.rows] == [48, 48]
        assert [row["layers"] for row in pruning.rows] == [1, 3]


def test_what_does_not_help_is_left_alone(monkeypatch, matches):
    asked = []

    def forecast(shape, ratio, **more):
        asked.append((shape, ratio, more))
        return {"grid": "x", "tokens": 48, "helps": False}

    monkeypatch.setattr(prune, "forecast", forecast)
    model = tiny.mini_unet()
    given = inputs(model, 6, 8)
    expected = run(model, given)
    with pruned(model, small(ratio=0.4, every=2, min_tokens=48)) as pruning:
        assert torch.equal(run(model, given), expected)
        run(model, given)
    assert not matches and len(asked) == 1
    assert pruning.rows == [{"grid": "x", "tokens": 48, "helps": False, "pruned": False}]
    shape, ratio, more = asked[0]
    assert (shape.height, shape.width, shape.channels, shape.heads) == (6, 8, 32, 4)
    assert (shape.batch, shape.layers, shape.matched, shape.biased) == (2, 5, 2, False)
    assert ratio == 0.4 and more == {"patch": (2, 2), "every": 2}


def test_times_are_measured_by_default():
    model = tiny.mini_unet()
    with pruned(model, small(min_tokens=48)) as pruning:
        run(model, inputs(model, 6, 8))
    (row,) = pruning.rows
    assert row["pruned"] == row["helps"] == (row["saved_ms"] > 0)


def test_the_forecast_of_flux_knows_the_text_and_the_common_tokens(monkeypatch):
    asked = []

    def forecast(shape, ratio, **more):
        asked.append(shape)
        return {"helps": True}

    monkeypatch.setattr(prune, "forecast", forecast)
    model = tiny.mini_flux()
    with pruned(model, small()):
        run(model, inputs(model, 4, 6))
    (shape,) = asked
    assert (shape.text, shape.biased, shape.layers) == (7, True, 5)
    assert (shape.matched, shape.matched_channels) == (1, 96)
