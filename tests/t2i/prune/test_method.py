"""`compress prune` as a package: budgets kept, masks that are models, learning, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from t2i.prune.prune_samples import QUICK, Ground, bytes_of_weights, cost_of, kept_row

from gencompress.core.budget import parse_budget
from gencompress.recipe import RecipeError, config_from
from gencompress.t2i import calibrate, coupling, tiny
from gencompress.t2i.evaluate import make_images
from gencompress.t2i.pipeline import denoiser, save_pipeline
from gencompress.t2i.prune import Config, apply, compact, compare, method, restore, save
from gencompress.t2i.prune.room import prunable
from gencompress.t2i.quality import error_db

OTHERS = [family for family in tiny.PIPELINES if family != "sd"]
LEARNING = {"finetune": 30, "rate": 1e-3, "ema": 0.0}
PLAIN = {"compensate": False}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("prune"))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_masked_is_compact_is_saved(ground, family, tmp_path):
    """The same pictures, to one of 255 where sums run in another order; bit for bit from a file."""
    pipe, data = ground.loaded(family)
    before = weights_of(denoiser(pipe)[0])
    whole = make_images(pipe, data.wanted)
    _, result = ground.compress(family, "60% params", **PLAIN)
    with apply(pipe, result.masks) as masked:
        assert masked is pipe
        silenced = make_images(masked, data.wanted)
    smaller = compact(pipe, result.masks)
    assert_same_weights(weights_of(denoiser(smaller)[0]), weights_of(denoiser(result.model)[0]))
    left = make_images(smaller, data.wanted)
    apart = (left.int() - silenced.int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.02
    assert float((left.int() - whole.int()).abs().float().mean()) > 0.5
    assert save(result, tmp_path / "model", Config(), data) == tmp_path / "model"
    again = restore(tmp_path / "model")
    assert type(denoiser(again)[0]).__name__.startswith("Cut")
    assert torch.equal(make_images(again, data.wanted), left)
    assert_same_weights(before, weights_of(denoiser(pipe)[0]))
    assert torch.equal(make_images(pipe, data.wanted), whole)


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_keeps_its_budget_and_learns(ground, family, tmp_path):
    config = {"finetune": 2, "batch": 2, "batches": 1, "score": "taylor", "allocate": "global"}
    pipe, result = ground.compress(family, "0.6xMACs", **config)
    save(result, tmp_path / "model", Config(), None)
    after = restore(tmp_path / "model")
    assert 0.5 < cost_of(after, "macs") / cost_of(pipe, "macs") <= 0.6
    steps = [row for row in result.log if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [2] and steps[0]["blocks"] > 0
    assert after.dtype == torch.float32 and not denoiser(after)[0].training


def test_the_same_seed_gives_the_same_masks(ground):
    found = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        _, result = ground.compress("pixart", "50%", seed, score="random")
        found[name] = torch.cat([keep for keep in result.masks["main"].keep.values()])
    assert torch.equal(found["one"], found["two"])
    assert not torch.equal(found["one"], found["other"])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_compensation_brings_answers_nearer(ground, family):
    """Where units differ in how constant they are, as trained ones do."""
    found = {}
    for compensate in (True, False):
        pipe, result = ground.compress(family, "60%", compensate=compensate)
        seen = calibrate.calibrated(*ground.loaded(family), 8, ground.folder / f"{family}-work")
        chance = torch.Generator().manual_seed(5)
        found[compensate] = error_db(pipe, result.model, seen, chance), result.masks["main"].keep
    (made_up, masks), (plain, same) = found[True], found[False]
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    assert made_up > plain + 0.5


def test_obs_makes_up_and_leaves_the_model_as_it_was(ground):
    pipe, _ = ground.loaded("sd")
    before = weights_of(denoiser(pipe)[0])
    _, result = ground.compress("sd", "80%", score="obs")
    _, plain = ground.compress("sd", "80%", score="obs", compensate=False)
    assert_same_weights(before, weights_of(denoiser(pipe)[0]))
    one, other = (weights_of(denoiser(each.model)[0]) for each in (result, plain))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    inner = [g for g in prunable(denoiser(pipe)[0], ("head", "channel"))]
    readers = {f"{c.module}.weight" for cs in coupling.consumers(inner).values() for c in cs}
    assert changed and changed <= readers


def test_distillation_lowers_the_losses(ground):
    pipe, result = ground.compress("flux", "60%", **LEARNING)
    rows = [row for row in result.log if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["output"] < 0.7 * rows[0]["output"]
    assert rows[-1]["blocks"] < 0.8 * rows[0]["blocks"]
    _, plain = ground.compress("flux", "60%")
    seen = calibrate.calibrated(*ground.loaded("flux"), 8, ground.folder / "flux-work")
    taught, as_cut = (
        error_db(pipe, each.model, seen, torch.Generator().manual_seed(5))
        for each in (result, plain)
    )
    assert taught > as_cut + 1
    assert all(parameter.grad is None for parameter in denoiser(pipe)[0].parameters())


def test_a_stopped_run_goes_on_where_it_was(ground, tmp_path, monkeypatch):
    """Ends in the same bits; neither draws latents again nor repeats steps."""
    usual = method._training
    monkeypatch.setattr(
        method, "_training", lambda config: dataclasses.replace(usual(config), save_steps=10)
    )
    pipe, data = ground.loaded("pixart")
    config = Config(**QUICK, **LEARNING)

    def go(work, stop=None):
        said = []

        def progress(text):
            said.append(text)
            if stop and stop in text:
                raise KeyboardInterrupt

        work.mkdir(exist_ok=True)
        budget, chance = parse_budget("60%"), torch.Generator().manual_seed(0)
        return method.compress(pipe, data, budget, config, chance, work, progress), said

    whole, _ = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "work", stop="step 20")
    monkeypatch.setattr(calibrate, "clean_latents", None)
    again, said = go(tmp_path / "work")
    assert any("resuming: step 10 of 30" in text for text in said)
    assert_same_weights(weights_of(denoiser(whole.model)[0]), weights_of(denoiser(again.model)[0]))
    steps = [[r["step"] for r in one.log if r["kind"] == "step"] for one in (whole, again)]
    assert steps[0] == steps[1] == [10, 20, 30]


def test_latents_of_another_run_are_not_taken(ground, tmp_path, monkeypatch):
    """Kept for the same weights, prompts and settings; drawn anew for others, or a broken file."""
    pipe, data = ground.loaded("pixart")
    path, drawn = tmp_path / "latents.safetensors", []
    usual = calibrate.clean_latents

    def counting(*arguments, **more):
        drawn.append(1)
        return usual(*arguments, **more)

    monkeypatch.setattr(calibrate, "clean_latents", counting)

    def seen(pipe=pipe, data=data, count=4):
        # as another process would, with nothing in memory
        found = calibrate.calibrated(pipe, dataclasses.replace(data, sampled={}), count, tmp_path)
        assert len(found.latents) == len(found.prompts) == count and found.kind == "sampled"
        return found.latents, len(drawn)

    first, times = seen()
    assert times == 1 and torch.equal(seen()[0], first) and len(drawn) == 1
    wanted = dataclasses.replace(data.wanted, steps=3)
    assert seen(data=dataclasses.replace(data, wanted=wanted))[1] == 2
    assert torch.equal(seen()[0], first) and len(drawn) == 3
    assert seen(count=5)[1] == 4 and seen(count=4)[1] == 5
    assert seen(data=dataclasses.replace(data, prompts=data.prompts[::-1]))[1] == 6
    assert seen(tiny.mini_pipeline("pixart", seed=3))[1] == 7
    assert torch.equal(seen()[0], first) and len(drawn) == 8
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(seen()[0], first) and len(drawn) == 9
    # and once in a process, also where no folder keeps them
    again = [calibrate.calibrated(pipe, data, 3, None).latents for _ in range(2)]
    assert torch.equal(*again) and len(drawn) == 10


def test_comparing_scores(ground):
    """At the same budget, from the same latents, distilled as long."""
    pipe, data = ground.loaded("pixart")
    config = {"finetune": 10, "compare": ("random", "flap"), "score": "magnitude"}
    _, result = ground.compress("pixart", "0.55xMACs", **config)
    made, chance = Config(**QUICK, **config), torch.Generator().manual_seed(0)
    said = []
    rows = compare(pipe, result, data, made, chance, said.append)
    assert said[-1] != "" and {"baseline random", "baseline flap"} <= {*said}
    assert all(row["kind"] == "curve" and math.isfinite(row["y"]) for row in rows)
    steps = [row for row in rows if row["x_name"] == "step of distillation"]
    assert [(row["series"], row["x"]) for row in steps] == [("magnitude", 10)]
    points = {row["series"]: row for row in rows if row["x_name"] == "share of macs"}
    assert [*points] == ["magnitude", "random", "flap"]
    assert {row["x"] for row in points.values()} == {kept_row(result)["share"]}
    seen = calibrate.calibrated(pipe, data, 8, ground.folder / "pixart-work")
    for name, row in points.items():
        _, alone = ground.compress("pixart", "0.55xMACs", **{**config, "score": name})
        near = error_db(pipe, alone.model, seen, torch.Generator().manual_seed(0))
        assert row["y"] == near, name
    bare = compare(pipe, result, data, Config(**QUICK, score="magnitude"), chance)
    assert bare == steps


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"score": "size"}, "'size': known are magnitude"),
        ({"compare": ["flap", "size"]}, "'size': known are magnitude"),
        ({"allocate": "greedy"}, "'greedy': known are zscore"),
        ({"kinds": []}, "some of head, channel, block"),
        ({"kinds": ["layer"]}, "some of head, channel, block"),
        ({"kinds": ["block", "head"], "allocate": "global"}, "one or the other"),
        ({"kinds": ["block"]}, "must be global"),
        ({"precision": "fp16"}, "known are no, bf16"),
        ({"floor": 0}, "floor 0: 1 or more"),
        ({"multiple": 0}, "multiple 0: 1 or more"),
        ({"batches": 0}, "batches 0: 1 or more"),
        ({"batch": 0}, "batch 0: 1 or more"),
        ({"latents": 0}, "latents 0: 1 or more"),
        ({"finetune": -1}, "finetune -1: 0 or more"),
        ({"images": 1}, "images 1: 2 or more"),
        ({"steps": 0}, "steps 0: 1 or more"),
        ({"rate": 0}, "rate is above 0"),
        ({"ema": 1.0}, "below 1"),
        ({"denoise": -1.0}, "none is negative"),
        ({"denoise": 0, "output": 0, "blocks": 0}, "> 0"),
        ({"min_psnr": 30.0}, "unknown in config: min_psnr"),
        ({"steps": 2.5}, "expected int"),
    ],
)
def test_settings_that_are_wrong(values, text):
    with pytest.raises(RecipeError, match=text):
        config_from(Config, values)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"size": 60}, "size 60: expected a multiple of 8"), ({"guidance": -1.0}, "guidance -1.0")],
)
def test_what_a_pipeline_cannot_draw_is_refused_when_loading(ground, settings, text):
    ground.loaded("sd")
    with pytest.raises(ValueError, match=text):
        ground.load(ground.folder / "sd", **settings)


def test_data_that_is_wrong(ground):
    ground.loaded("sd")
    config, prompts = Config(**QUICK), str(ground.prompts)
    for data, text in (
        ({"views": prompts}, "views: pipelines know prompts, images, judges"),
        ({}, "neither prompts nor images"),
    ):
        with pytest.raises(ValueError, match=text):
            method.load(str(ground.folder / "sd"), data, "cpu", "float32", config)
    with pytest.raises(ValueError, match="dtype 'int8': known are float32"):
        method.load(str(ground.folder / "sd"), {"prompts": prompts}, "cpu", "int8", config)


def test_weights_are_stored_as_they_came(ground, tmp_path):
    """A pipeline in half precision stays one, and is worked with in float32."""
    whole, _ = ground.loaded("pixart")
    save_pipeline(whole, tmp_path / "half", dtype=torch.float16)
    pipe, data = ground.load(tmp_path / "half")
    chance = torch.Generator().manual_seed(0)
    budget = parse_budget("60% bytes")
    result = method.compress(pipe, data, budget, Config(**QUICK), chance, None)
    assert denoiser(result.model)[0].dtype == torch.float32
    save(result, tmp_path / "small", Config(), data)
    before, after = (bytes_of_weights(tmp_path / name) for name in ("half", "small"))
    assert after == kept_row(result)["cost"] and 0.59 * before < after <= 0.6 * before
    assert kept_row(result)["stored"] == "float16"
    size = sum(p.stat().st_size for p in (tmp_path / "half" / "vae").iterdir())
    assert size == sum(p.stat().st_size for p in (tmp_path / "small" / "vae").iterdir())
    again = restore(tmp_path / "small")
    assert again.dtype == torch.float32
    rows = method.measure(pipe, again.to(torch.bfloat16), data)
    assert again.dtype == torch.float32  # as what it is compared with
    assert {row.name: row.unit for row in rows}["size of parameters"] == "B"


def test_a_preview_and_samples(ground, tmp_path):
    pipe, data = ground.loaded("sd")
    _, result = ground.compress("sd", "60%")
    (tmp_path / "a").mkdir()
    method.preview(pipe, result.model, result, data, tmp_path / "a")
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    for view in index["views"]:
        for name in ("before", "after", "difference"):
            assert (tmp_path / "a" / view[name]).is_file()
    (tmp_path / "b").mkdir()
    paths = method.sample(result.model, data, tmp_path / "b")
    assert [Path(p).name for p in paths] == [*(f"{i:04}.png" for i in range(1, 5)), "sheet.png"]
