"""NeMo: activations without the U-Net are those within, blocked neurons are zeroed rows, and the
search keeps what it promises."""

import contextlib

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.dori import masks, nemo
from gencompress.t2i.dori.ms_ssim import ms_ssim, scaled
from gencompress.t2i.hooks import record
from gencompress.t2i.pipeline import hushed, with_parts

CONFIG = nemo.NemoConfig(seeds=3, steps=4, fall=1.0)
ORDINARY = ["a cat", "a red car", "white background", "a blue car and a red cat"]
PROMPT = "a blue cat on a white background"


@pytest.fixture(scope="module")
def pipe():
    """Its text decides what is predicted, nearly whatever the noise: as if it were memorised."""
    with hushed():
        pipe = tiny.mini_pipeline("sd")
    with torch.no_grad():
        for path in nemo.layers(pipe.unet):
            pipe.unet.get_parameter(path.replace("to_v", "to_out.0.weight")).mul_(1000)
        pipe.unet.conv_out.weight.mul_(300)
    return pipe


@pytest.fixture(scope="module")
def usual(pipe):
    return nemo.statistics(pipe, ORDINARY)


@pytest.fixture(scope="module")
def search(pipe):
    return nemo.probe(pipe, PROMPT, CONFIG)


def some(unet, share=0.3):
    chance = torch.Generator().manual_seed(1)
    return {
        path: torch.rand(unet.get_submodule(path).out_features, generator=chance) < share
        for path in nemo.layers(unet)
    }


def test_layers_on_the_way_down(pipe):
    blocks = "transformer_blocks.0.attn2.to_v"
    assert nemo.layers(pipe.unet) == [
        f"down_blocks.0.attentions.0.{blocks}",
        f"down_blocks.0.attentions.1.{blocks}",
        f"mid_block.attentions.0.{blocks}",
    ]
    with hushed():
        sdxl = tiny.mini_pipeline("sdxl")
    found = nemo.layers(sdxl.unet)
    assert any("transformer_blocks.1." in path for path in found)
    assert not any(path.startswith("up_blocks") for path in found)
    search = nemo.probe(sdxl, PROMPT, CONFIG)
    assert not torch.equal(search.deltas(), search.deltas(some(sdxl.unet)))


def test_activations_are_those_within_the_unet(pipe, search):
    rows = conditions(pipe, [PROMPT])["encoder_hidden_states"]
    found = nemo.activations(pipe.unet, rows)
    for noise, timestep in ((search.entering, search.timestep), (0 * search.entering + 3, 17)):
        with record(pipe.unet, nemo.layers(pipe.unet), detach=True) as seen:
            pipe.unet(noise, timestep, encoder_hidden_states=rows.expand(3, -1, -1))
        for path, row in found.items():
            torch.testing.assert_close(seen[path][1].abs().mean(0), row[0], rtol=1e-5, atol=1e-6)


def test_statistics_of_ordinary_prompts(pipe, usual):
    rows = conditions(pipe, ORDINARY)["encoder_hidden_states"]
    whole = nemo.statistics(pipe, ORDINARY, batch=3)
    for path, values in nemo.activations(pipe.unet, rows).items():
        torch.testing.assert_close(usual.mean[path], values.mean(0))
        torch.testing.assert_close(usual.deviation[path], values.std(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(whole.mean[path], usual.mean[path])
        odd = nemo.unusual({path: values[0]}, usual)[path]
        torch.testing.assert_close(
            odd, (values[0] - values.mean(0)).abs() / values.std(0), rtol=1e-3, atol=1e-4
        )
    assert usual.count == 4
    flat = nemo.Statistics({"x": torch.ones(2)}, {"x": torch.zeros(2)}, 9)
    assert nemo.unusual({"x": torch.tensor([1.0, 2.0])}, flat)["x"].tolist() == [0, torch.inf]
    with pytest.raises(ValueError, match="1 prompts; expected 2"):
        nemo.statistics(pipe, ["a"])


def test_blocking_is_zeroing_rows_bit_for_bit(pipe, search):
    blocked = some(pipe.unet)
    found = nemo.Found(True, blocked, blocked, 1.0, 0.0, 0.5)
    mask = nemo.to_mask([found])
    assert all(keep.ndim == 1 for keep in mask.keep.values())
    hooked = search.deltas(blocked)
    with masks.applied(pipe, mask):
        assert torch.equal(search.deltas(), hooked)
    assert not torch.equal(search.deltas(), hooked)
    made = masks.written(pipe, mask)
    assert torch.equal(nemo.probe(made, PROMPT, CONFIG).deltas(), hooked)


def test_nothing_blocked_is_alike_in_full(pipe, search):
    plain = search.deltas()
    again = search.deltas(
        {path: torch.zeros(1, dtype=torch.bool) for path in nemo.layers(pipe.unet)}
    )
    assert torch.equal(plain, again)
    assert ms_ssim(plain, again).tolist() == [1.0] * 3
    alike = nemo.likeness(plain)
    assert torch.equal(alike, alike.T) and alike.diagonal().tolist() == [0.0] * 3
    assert float(alike[0, 1]) == pytest.approx(float(ms_ssim(plain[:1], plain[1:2])), abs=1e-6)


def test_velocities_stand_for_epsilons(pipe):
    """A prediction of v and of epsilon give the same delta if v is what epsilon says."""
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    other = with_parts(pipe, scheduler=scheduler)
    search = nemo.probe(other, PROMPT, CONFIG)
    share = float(pipe.scheduler.alphas_cumprod[search.timestep])
    with torch.no_grad():
        out = pipe.unet(search.noise, search.timestep, **search.told).sample
    epsilon = share**0.5 * out + (1 - share) ** 0.5 * search.noise
    torch.testing.assert_close(search.deltas(), scaled(epsilon - search.noise))


def test_tau_of_ordinary_prompts(pipe):
    one, other = (nemo.likeness(nemo.probe(pipe, text, CONFIG).deltas()) for text in ORDINARY[:2])
    values = torch.tensor([m[i, j] for m in (one, other) for i, j in ((0, 1), (0, 2), (1, 2))])
    wanted = float(values.double().mean() + values.double().std())
    assert nemo.calibrate_tau(pipe, ORDINARY[:2], CONFIG) == pytest.approx(wanted, rel=1e-5)


def checked(pipe, usual, share, config=CONFIG):
    """`find` at a tau that is a share of the largest likeness, with what always holds."""
    search = nemo.probe(pipe, PROMPT, config)
    alike = nemo.likeness(search.deltas())
    tau = share * float(alike.max())
    found = nemo.find(pipe, PROMPT, usual, tau, config)
    plain, kept = search.deltas(), alike.amax(1) > tau
    left = float(ms_ssim(plain[kept], search.deltas(found.neurons)[kept]).max())
    assert found.memorised and left == found.left <= found.tau
    for path, neurons in found.neurons.items():
        assert bool((found.candidates[path] | ~neurons).all())
    return found, tau


def test_neurons_are_a_subset_that_still_blocks(pipe, usual):
    # steps that are small enough to take most of the neurons in, highest first
    found, tau = checked(pipe, usual, 0.97, nemo.NemoConfig(seeds=3, steps=4, theta=4, fall=0.1))
    count = sum(int(one.sum()) for one in found.neurons.values())
    assert found.tau == tau and 0 < count < sum(int(one.sum()) for one in found.candidates.values())
    # none of what is left can be spared: then the memory comes back
    search = nemo.probe(pipe, PROMPT, CONFIG)
    kept = nemo.likeness(search.deltas()).amax(1) > tau
    for path, neurons in found.neurons.items():
        if bool(neurons.any()):
            fewer = {**found.neurons, path: torch.zeros_like(neurons)}
            again = ms_ssim(search.deltas()[kept], search.deltas(fewer)[kept])
            assert float(again.max()) >= tau


def test_a_search_that_fails_keeps_what_it_reached(pipe, usual):
    found, tau = checked(pipe, usual, 0.01)
    assert len(found.trials) == 4  # theta 5, 4, 3, 2
    assert [t["highest"] for t in found.trials] == [0, 1, 2, 3]
    assert found.tau == found.trials[-1]["left"] > tau


def test_a_prompt_that_is_not_memorised(pipe, usual):
    found = nemo.find(pipe, PROMPT, usual, 1.0, CONFIG)
    assert not found.memorised and found.trials == []
    assert not any(bool(one.any()) for one in found.neurons.values())
    mask = nemo.to_mask([found, nemo.Found(True, some(pipe.unet), {}, 1.0, 0.0, 0.5)])
    assert sum(masks.num_removed(mask).values()) == sum(
        int(o.sum()) for o in some(pipe.unet).values()
    )
    with pytest.raises(ValueError, match="no prompts"):
        nemo.to_mask([])


def test_what_comes_before_is_not_computed_again(pipe, usual, search, monkeypatch):
    blocked = some(pipe.unet)
    stages = nemo._recorded(search, blocked)
    mid = nemo.layers(pipe.unet)[-1]
    fewer = {**blocked, mid: torch.zeros_like(blocked[mid])}
    calls = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append("in"))
    early = (
        pipe.unet.down_blocks[0]
        .resnets[0]
        .conv1.register_forward_hook(lambda *_: calls.append("resnet"))
    )
    with nemo._skipping(pipe.unet, stages, mid):
        cached = search.deltas(fewer)
    assert calls == ["in"]
    assert torch.equal(cached, search.deltas(fewer)) and calls == ["in", "in", "resnet"]
    hook.remove()
    early.remove()
    two = nemo.NemoConfig(seeds=3, steps=4, fall=2.0)
    found = nemo.find(pipe, PROMPT, usual, 0.3, two)
    monkeypatch.setattr(nemo, "_skipping", lambda *_: contextlib.nullcontext())
    plain = nemo.find(pipe, PROMPT, usual, 0.3, two)
    assert all(torch.equal(found.neurons[path], plain.neurons[path]) for path in plain.neurons)


def test_bad_settings():
    for more in ({"seeds": 1}, {"index": 50}, {"fall": 0.0}):
        with pytest.raises(ValueError, match="2 or more; index"):
            nemo.NemoConfig(**more)


# similarity


def test_similarity_of_three_scales_by_hand():
    """Against sums written out in float64, on planes that take all three scales."""
    chance = torch.Generator().manual_seed(0)
    a = torch.rand(2, 1, 44, 44, generator=chance)
    b = (a + 0.2 * torch.randn(a.shape, generator=chance)).clamp(0, 1)
    x = torch.arange(11).double() - 5
    window = torch.exp(-x.square() / 4.5)
    window = torch.outer(window, window) / window.sum() ** 2
    wanted = torch.ones(2, dtype=torch.float64)
    for scale in range(3):
        size = 2**scale
        one, other = (
            p.double().unfold(2, size, size).unfold(3, size, size).mean((4, 5)) for p in (a, b)
        )
        one, other = (p.unfold(2, 11, 1).unfold(3, 11, 1) for p in (one, other))
        mean = [(p * window).sum((4, 5)) for p in (one, other)]
        var = [(p * p * window).sum((4, 5)) - m**2 for p, m in zip((one, other), mean, strict=True)]
        both = (one * other * window).sum((4, 5)) - mean[0] * mean[1]
        value = (2 * both + 9e-4) / (var[0] + var[1] + 9e-4)
        if scale == 2:
            value *= (2 * mean[0] * mean[1] + 1e-4) / (mean[0] ** 2 + mean[1] ** 2 + 1e-4)
        wanted *= value.mean((1, 2, 3)) ** 0.33
    torch.testing.assert_close(ms_ssim(a, b).double(), wanted, rtol=1e-4, atol=1e-5)


def test_similarity_edges():
    a = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(ms_ssim(a, a)) == 1.0 and float(ms_ssim(a, 1 - a)) == 0.0
    planes = scaled(torch.stack([3 * a[0] - 7, torch.full((2, 16, 16), 5.0)]))
    assert planes[0].amin((1, 2)).tolist() == [0, 0] and planes[0].amax((1, 2)).tolist() == [1, 1]
    assert not planes[1].any()
    for b in (a[..., :12], a[0]):
        with pytest.raises(ValueError, match="11 entries across"):
            ms_ssim(a, b)
    with pytest.raises(ValueError, match="11 entries across"):
        ms_ssim(a[..., :10], a[..., :10])
