"""All arms start from the same noise and are counted alike."""

import sys
from dataclasses import replace

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.optiprune import arms
from gencompress.t2i.optiprune.arms import AIMED, ARMS, UPDATES, draw_arm, mapping_passes, merged
from gencompress.t2i.optiprune.noise import NoiseConfig
from gencompress.t2i.optiprune.prune import PruneConfig
from gencompress.t2i.optiprune.subjects import find_subjects
from gencompress.t2i.pipeline import denoiser, hushed
from gencompress.t2i.sample import sample

PROMPTS = ["a red car and a blue cat", "a cat and a car"]
SEEDS = [5, 6]
SHORT = NoiseConfig(rounds=2, steps=1, last_steps=1, pictures=2)
PRUNE = PruneConfig(ratio=0.5, min_tokens=256)  # the maps are of 8 x 8
STEPS = 3


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(autouse=True)
def few_updates(monkeypatch):
    fewer = {name: replace(one, most=1) for name, one in UPDATES.items()}
    monkeypatch.setattr(arms, "UPDATES", fewer)


@pytest.fixture(scope="module")
def subjects(pipe):
    return [find_subjects(pipe, prompt) for prompt in PROMPTS]


def drawn(pipe, name, subjects, **more):
    settings = {"steps": STEPS, "guidance": 2.0, "prune": PRUNE, "noise": SHORT}
    return draw_arm(pipe, name, PROMPTS, subjects, SEEDS, **settings | more)


@pytest.fixture(scope="module")
def plain(pipe):
    return drawn(pipe, "plain", [])


@pytest.fixture(scope="module")
def mapped(pipe, subjects):
    return drawn(pipe, "mapped", subjects)


def test_plain_pictures_are_those_of_the_pipeline(pipe, plain):
    wanted = sample(pipe, PROMPTS, seeds=SEEDS, steps=STEPS, guidance=2.0)
    assert torch.equal(plain.images, wanted)
    assert plain.passes == 2 * STEPS and plain.mapped is None and plain.seconds > 0
    assert drawn(pipe, "plain", [], guidance=1.0).passes == STEPS


@pytest.mark.parametrize("name", ARMS[1:])
def test_an_arm_changes_the_pictures_and_nothing_else(pipe, plain, subjects, name):
    if name == "tomesd":
        pytest.importorskip("tomesd")
    model = denoiser(pipe)[0]
    kinds = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    more = {"draws": 3} if name == "best_of" else {}
    found = drawn(pipe, name, subjects, **more)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.images.shape == plain.images.shape and found.images.dtype == torch.uint8
    assert not torch.equal(found.images, plain.images)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(m) or "_tome_info" in vars(m) for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert (found.mapped is not None) == (name in ("initno", "mapped", "ours", "best_of"))
    if name in ("simprune", "sito", "tomesd"):
        assert found.passes == plain.passes
    else:
        assert found.passes > plain.passes


def test_all_start_from_equal_noise(pipe, plain, mapped, subjects):
    first = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    found = mapped.mapped
    for log, start, one in zip(found.log, found.starts, first, strict=True):
        if log[0].start == min(rounds.start for rounds in log):
            assert torch.equal(start, one[0])
    only = drawn(pipe, "best_of", subjects, draws=1)
    assert torch.equal(only.mapped.latents, torch.cat(first))
    assert torch.equal(only.images, plain.images)
    assert [log[0].start for log in only.mapped.log] == [log[0].start for log in found.log]
    still = drawn(pipe, "ours", subjects, prune=replace(PRUNE, ratio=0))
    assert torch.equal(still.images, mapped.images)


def test_passes_are_those_that_were_run(pipe, subjects, plain, mapped):
    """Forwards once, backwards twice, and the first look of all, at both pictures."""
    rounds = [one for log in mapped.mapped.log for one in log]
    wanted = sum(3 * len(one.losses) - 2 for one in rounds)
    assert mapped.passes * 2 == plain.passes * 2 + wanted + 2
    assert mapping_passes(SHORT) == 3 * (2 + 2) == wanted / 2
    control = drawn(pipe, "best_of", subjects)
    assert control.mapped.passes == 2 * mapping_passes(SHORT)
    assert control.passes == mapped.passes
    assert mapping_passes(replace(SHORT, steps=5, last_steps=0)) == 2 * (6 + 10)


def test_updates_come_at_the_papers_shares_of_the_steps():
    assert arms._scaled(None, 20, 1) is None
    found = arms._scaled(UPDATES["excite"], 20, 8)
    assert found.until == 10 and [step for step, *_ in found.refine] == [0, 4, 8]
    assert found.pictures == 8
    assert arms._scaled(UPDATES["initno"], 50, 1) == UPDATES["initno"]


@pytest.mark.parametrize("name", ["mapped", "excite", "simprune"])
def test_batches_do_not_matter(pipe, subjects, name):
    together = drawn(pipe, name, subjects)
    alone = drawn(pipe, name, subjects, batch=1, noise=replace(SHORT, pictures=1))
    assert (together.images.int() - alone.images.int()).abs().max() <= 2


def test_the_pipeline_is_as_it_was(pipe, plain):
    assert torch.equal(drawn(pipe, "plain", []).images, plain.images)


def test_sito_chooses_other_tokens_than_simprune(pipe, subjects):
    one, other = (drawn(pipe, name, subjects).images for name in ("simprune", "sito"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", AIMED)
def test_no_subjects(pipe, subjects, name):
    for lacking in ([], [subjects[0], ()]):
        with pytest.raises(ValueError, match=f"arm '{name}' needs one subject"):
            drawn(pipe, name, lacking)


def test_says_what_it_cannot_do(pipe, monkeypatch):
    with pytest.raises(ValueError, match=r"arm 'all'; expected one of plain, excite"):
        drawn(pipe, "all", [])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        draw_arm(pipe, "plain", PROMPTS, [], [1], steps=2)
    with pytest.raises(ValueError, match="merges no tokens of a FluxTransformer2DModel"):
        merged(tiny.mini_flux(), 0.5).__enter__()
    with pytest.raises(ValueError, match="without attention at the size of its latents"):
        merged(tiny.mini_unet(down_block_types=("DownBlock2D",) * 2), 0.5).__enter__()
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(ImportError, match="arm 'tomesd' needs the package"):
        drawn(pipe, "tomesd", [])
