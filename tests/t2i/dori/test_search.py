"""The search: fresh noise in every step, frozen weights, and no picture knows of its neighbours."""

import copy

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.dori import search as of
from gencompress.t2i.dori.search import SearchConfig, search, starts
from gencompress.t2i.hooks import replace
from gencompress.t2i.pipeline import hushed, with_denoiser, with_parts

CAPTIONS = ["a red car", "a blue cat", "a white background"]
SEEDS = [5, 6, 7]
CONFIG = SearchConfig(steps=4, draws=2, every=2, marks=(1, 3))


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def start(pipe):
    return starts(pipe, "caption", CAPTIONS, SEEDS)


@pytest.fixture(scope="module")
def found(pipe, latents, start):
    return search(pipe, latents, start, SEEDS, CONFIG)


def test_the_loss_on_the_same_noise_falls(pipe, latents):
    config = SearchConfig(steps=25, draws=8, every=25)
    start = starts(pipe, "normal", CAPTIONS[:1], SEEDS[:1])
    (trigger,) = search(pipe, latents[:1], start, SEEDS[:1], config)
    assert [row["step"] for row in trigger.log] == [0, 25]
    assert trigger.log[1]["loss"] < trigger.log[0]["loss"]
    # Adam moves by its rate at most, about
    moved = (trigger.states - start[0]).abs()
    assert 0.1 < float(moved.max()) < 0.1 * 25 * 1.5


def test_what_comes_back(found, start):
    for trigger in found:
        assert trigger.states.shape == start.shape[1:] and trigger.states.dtype == torch.float32
        assert sorted(trigger.at) == [1, 3, 4] and torch.equal(trigger.at[4], trigger.states)
        assert not torch.equal(trigger.at[1], trigger.at[3])
        assert [row["step"] for row in trigger.log] == [0, 2, 4] and trigger.seconds > 0


def test_weights_are_frozen_and_left_as_they_are(pipe, latents, start, monkeypatch):
    before = copy.deepcopy(pipe.unet.state_dict())
    fixed, seen = pipe.unet.conv_in.weight.requires_grad_(False), []

    def predict(model, *args, real=of.predict):
        seen.append([weight.requires_grad for weight in model.parameters()])
        return real(model, *args)

    monkeypatch.setattr(of, "predict", predict)
    pipe.unet.train()
    search(pipe, latents[:1], start[:1], SEEDS[:1], SearchConfig(steps=1, draws=2))
    assert pipe.unet.training and pipe.unet.mid_block.training
    pipe.unet.eval()
    # a loss before, one to descend, one after
    assert len(seen) == 3 and not any(any(flags) for flags in seen)
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    wants = [weight is not fixed for weight in pipe.unet.parameters()]
    assert [weight.requires_grad for weight in pipe.unet.parameters()] == wants
    fixed.requires_grad_(True)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_noise_is_fresh_in_every_step_but_not_where_losses_are_compared(
    pipe, latents, start, monkeypatch
):
    met = []

    def diffuse(*args, real=of.diffuse):
        met.append(real(*args))
        return met[-1]

    monkeypatch.setattr(of, "diffuse", diffuse)
    search(pipe, latents[:2], start[:2], SEEDS[:2], SearchConfig(steps=3, draws=2, every=3))
    first, *steps, last = met
    assert torch.equal(first.target, last.target) and torch.equal(first.timesteps, last.timesteps)
    rows = torch.cat([one.target.flatten(1) for one in (first, *steps)])
    # of every picture, draw and step
    assert len(rows.unique(dim=0)) == len(rows) == 16
    assert len({tuple(one.timesteps.tolist()) for one in (first, *steps)}) == 4


def test_the_same_seed_gives_the_same_bits(pipe, latents, start, found):
    again = search(pipe, latents, start, SEEDS, CONFIG)
    assert all(torch.equal(a.states, b.states) for a, b in zip(found, again, strict=True))
    other = search(pipe, latents[:1], start[:1], [99], CONFIG)
    assert not torch.equal(other[0].states, found[0].states)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_pictures_do_not_know_of_each_other(pipe, latents, start, dtype, tolerance):
    """In float32 larger products round otherwise, which Adam makes steps of up to its rate."""
    own = with_denoiser(pipe, copy.deepcopy(pipe.unet).to(dtype))
    together = search(own, latents, start, SEEDS, CONFIG)
    alone = [
        search(own, latents[i : i + 1], start[i : i + 1], SEEDS[i : i + 1], CONFIG)[0]
        for i in (2, 0)
    ]
    for one, other in zip((together[2], together[0]), alone, strict=True):
        assert float((one.states - other.states).abs().max()) <= tolerance
    assert float((together[0].states - start[0]).abs().max()) > 0.1


def test_keys_and_values_once_for_all_draws(pipe, latents, start):
    path = next(n for n, _ in pipe.unet.named_modules() if n.endswith(of.CROSS[0]))
    rows = []

    def counted(forward, x):
        rows.append(len(x))
        return forward(x)

    chance = of._each(SEEDS, 2, torch.device("cpu"))
    states = start.clone().requires_grad_()
    with replace(pipe.unet, path, counted), of.shared(pipe.unet, 2):
        loss = of.loss_of(pipe.unet, pipe.scheduler, latents, states, chance, 2)
    (gradient,) = torch.autograd.grad(loss.sum(), states)
    plain = of.loss_of(
        pipe.unet, pipe.scheduler, latents, states, of._each(SEEDS, 2, torch.device("cpu")), 2
    )
    (wanted,) = torch.autograd.grad(plain.sum(), states)
    assert rows == [3]
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


def test_kinds_of_models(pipe, latents, start):
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    one = SearchConfig(steps=2, draws=2)
    velocity = with_parts(pipe, scheduler=scheduler)
    half = with_denoiser(pipe, copy.deepcopy(pipe.unet).to(torch.bfloat16))
    results = [search(p, latents[:1], start[:1], SEEDS[:1], one)[0] for p in (pipe, velocity, half)]
    assert all(r.states.dtype == torch.float32 and bool(r.states.isfinite().all()) for r in results)
    assert results[0].log != results[1].log
    # steps of float32, though the model rounds to 8 bits
    assert not torch.equal(results[2].states, results[2].states.bfloat16().float())
    with hushed():
        others = [
            (tiny.mini_pipeline("sdxl"), "told more than text"),
            (tiny.mini_pipeline("flux"), "expected a U-Net"),
        ]
    for other, said in others:
        with pytest.raises(ValueError, match=said):
            search(other, latents[:1], start[:1], SEEDS[:1], one)


def test_the_start_token_can_be_left(pipe, latents, start):
    config = SearchConfig(steps=2, draws=2, freeze_first=True)
    (trigger,) = search(pipe, latents[:1], start[:1], SEEDS[:1], config)
    assert torch.equal(trigger.states[0], start[0, 0])
    assert float((trigger.states[1:] - start[0, 1:]).abs().min()) > 0


class Stopped(Exception):
    pass


def test_an_interrupted_search_goes_on_by_picture(pipe, latents, start, found, tmp_path):
    config = SearchConfig(steps=4, draws=2, every=2, marks=(1, 3), at_once=1)

    def stop(text):
        if text == "searching: picture 2 of 3":
            raise Stopped

    with pytest.raises(Stopped):
        search(pipe, latents, start, SEEDS, config, workdir=tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 2
    said = []
    done = search(pipe, latents, start, SEEDS, config, workdir=tmp_path, progress=said.append)
    assert said == [
        "searching: picture 2 of 3", *(f"steps of searching: {step} of 4" for step in (0, 2, 4))
    ]  # fmt: skip
    plain = search(pipe, latents, start, SEEDS, config)
    for one, other in zip(done, plain, strict=True):
        assert torch.equal(one.states, other.states) and one.log == other.log
        assert one.at.keys() == other.at.keys()
    # in another order, some of them, or more at once: the same pictures
    said.clear()
    back = search(
        pipe, latents[[2, 0]], start[[2, 0]], [7, 5], CONFIG, workdir=tmp_path, progress=said.append
    )
    assert said == [] and torch.equal(back[0].states, done[2].states)
    # what decides the result is not the same: searched anew; so is a file that is broken
    broken = sorted(tmp_path.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:50])
    search(pipe, latents, start, SEEDS, config, workdir=tmp_path, progress=said.append)
    assert [text.startswith("searching") for text in said] == [True, False, False, False]
    short = SearchConfig(steps=1, draws=2)
    for seed, weight in ((6, 0.0), (5, 0.1)):
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(weight)
        search(pipe, latents[:1], start[:1], [seed], short, workdir=tmp_path, progress=said.append)
    with torch.no_grad():
        pipe.unet.conv_in.bias.sub_(0.1)
    assert sum(text.startswith("searching") for text in said) == 3
    assert len(list(tmp_path.iterdir())) == 5


def test_starts(pipe):
    caption = starts(pipe, "caption", CAPTIONS, SEEDS)
    other = starts(pipe, "other", CAPTIONS, SEEDS, CAPTIONS[::-1])
    assert torch.equal(other, caption.flip(0))
    normal = starts(pipe, "normal", CAPTIONS, SEEDS)
    assert normal.shape == caption.shape and float(normal.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(starts(pipe, "normal", CAPTIONS[1:2], SEEDS[1:2])[0], normal[1])
    for kind, texts, said in (
        ("random", CAPTIONS, "start 'random'; expected one of caption, normal, other"),
        ("other", CAPTIONS[:1], "3 captions, 3 seeds, 1 texts"),
    ):
        with pytest.raises(ValueError, match=said):
            starts(pipe, kind, CAPTIONS, SEEDS, texts)


def test_wrong_callers(pipe, latents, start):
    for more, said in (
        ({"steps": 0}, "counts are 1"),
        ({"rate": 0.0}, "above 0"),
        ({"marks": (51,)}, "marks"),
    ):
        with pytest.raises(ValueError, match=said):
            SearchConfig(**more)
    with pytest.raises(ValueError, match="3 pictures, starts .* 2 seeds"):
        search(pipe, latents, start, [1, 2], CONFIG)
    with pytest.raises(ValueError, match="left the numbers"):
        search(pipe, latents[:1] * float("nan"), start[:1], [1], SearchConfig(steps=1, draws=1))
