"""OptiPrune as a method: budgets, what is saved, what is measured, and the command line."""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from gencompress_kernels.token_merge import match_tokens

from gencompress.artifact import read_artifact, read_log, verify
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.report.preview import read_previews
from gencompress.scenes import resolve
from gencompress.t2i import tiny
from gencompress.t2i.optiprune import Config, apply, method, optiprune, restore
from gencompress.t2i.optiprune.noise import NoiseConfig
from gencompress.t2i.optiprune.price import macs_of
from gencompress.t2i.optiprune.prune import PruneConfig
from gencompress.t2i.optiprune.settings import identity_of, place_of
from gencompress.t2i.pipeline import denoiser, save_pipeline
from gencompress.t2i.sample import sample

QUICK = {"images": 4, "steps": 2, "rounds": 1, "round_steps": 1, "last_steps": 0, "bypass": "never"}
PROMPTS = ("a red car and a blue cat", "a cat and a car")
FILE = ["a red car and a blue cat", "red on blue", "a cat", "a cat", "white background", "a hat"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a pipeline, prompts, and one artifact made on the command line's way."""
    folder = tmp_path_factory.mktemp("optiprune")
    save_pipeline(tiny.mini_pipeline("sd"), folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(FILE), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(ground):
    return load(ground)


def load(ground, data=None, **config):
    made = Config(**{**QUICK, "prompts": PROMPTS, **config})
    return method.load(str(ground / "sd"), data or {}, "cpu", "float32", made)


def compress(loaded, keep="50%", **config):
    pipe, data = loaded
    made = Config(**{**QUICK, "prompts": PROMPTS, **config})
    return method.compress(
        pipe, data, parse_budget(keep), made, torch.Generator().manual_seed(0), None
    )


@pytest.fixture(scope="module")
def result(loaded):
    return compress(loaded)


@pytest.fixture(scope="module")
def saved(result, loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    method.save(result, folder, result.model.config, loaded[1])
    return folder


# prompts


def test_prompts_come_again_with_other_seeds(loaded):
    _, data = loaded
    assert data.wanted.prompts == PROMPTS * 2 and data.wanted.seeds == (0, 1, 2, 3)
    assert [[s.word for s in one] for one in data.subjects[:2]] == [["car", "cat"], ["cat", "car"]]


def test_of_a_file_those_with_subjects(ground):
    data = {"prompts": str(ground / "prompts.txt")}
    _, asked = load(ground, data, prompts=(), images=5)
    assert asked.wanted.prompts[:3] == ("a red car and a blue cat", "a cat", "a hat")
    assert asked.wanted.prompts[3] == FILE[0] and asked.skipped == 2
    assert compress(load(ground, data, prompts=())).log[0] == {
        "kind": "skipped", "prompts without subjects": 2,
    }  # fmt: skip
    _, named = load(ground, data, prompts=(), subjects=("cat",))
    assert set(named.wanted.prompts) == {FILE[0], "a cat"}
    _, numbered = load(ground, subjects=(3,))
    assert numbered.subjects[0][0].tokens == (3,)


@pytest.mark.parametrize(
    ("data", "config", "text"),
    [
        ({}, {"prompts": ()}, "no prompts: expected --prompt TEXT, or --data prompts=FILE"),
        ({}, {"prompts": ("red on blue",)}, "no subject in 'red on blue'"),
        ({"views": "x"}, {}, "data views: optiprune knows prompts, judges"),
        ({"prompts": "prompts.txt"}, {"prompts": (), "subjects": ("dog",)}, "none of 5 prompts"),
        ({}, {"size": 30}, "size 30"),
        ({}, {"compare": ("plain",)}, "compare: no detector among the judges"),
    ],
)
def test_data_that_is_refused(ground, data, config, text):
    data = {k: str(ground / v) for k, v in data.items()}
    with pytest.raises(ValueError, match=text):
        load(ground, data, **config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"images": 1}, "images 1"),
        ({"batch": 0}, "batch 0"),
        ({"updates": "none"}, "updates 'none': known are excite, initno"),
        ({"bypass": "always"}, "bypass 'always'"),
        ({"compare": ("best",)}, "compare 'best': known are plain"),
        ({"rounds": 0}, "rounds"),
        ({"mode": "middle"}, "mode 'middle'"),
        ({"patch": (0, 2)}, "patch of 0 x 2"),
        ({"rest": 1.0}, "rest 1.0"),
    ],
)
def test_settings_that_cannot_be(config, text):
    with pytest.raises(ValueError, match=text):
        Config(**config)


# budgets


@pytest.mark.parametrize(
    ("keep", "kept"), [("50%", 128), ("25%", 64), ("30%", 77), ("100", 100), ("100%", 256)]
)
def test_units_are_tokens_of_the_largest_layers(loaded, keep, kept):
    found = compress(loaded, keep)
    row = found.log[-1]
    assert (row["kind"], row["grid"], row["tokens"], row["kept"]) == ("kept", "16x16", 256, kept)
    assert row["pruned"] == (kept < 256) == bool(found.model.ratio)
    assert found.masks == {}


def test_a_budget_in_macs_keeps_as_many_tokens_as_it_can(loaded):
    pipe, _ = loaded
    whole = macs_of(pipe, 64, None)
    for keep in ("95% macs", "0.9xMACs", f"{round(0.85 * whole)} macs"):
        ratio = compress(loaded, keep).model.ratio
        limit = parse_budget(keep).amount * (whole if parse_budget(keep).relative else 1)
        cost = macs_of(pipe, 64, PruneConfig(ratio, 256))
        more = macs_of(pipe, 64, PruneConfig(ratio - 1 / 256, 256))
        assert cost <= limit < more
    assert compress(loaded, "100% macs").model.ratio == 0


def test_macs_count_what_runs(loaded):
    """Attention over fewer tokens, and matching them."""
    pipe, _ = loaded
    whole, half = macs_of(pipe, 64, None), macs_of(pipe, 64, PruneConfig(0.5, 256))
    layers = [layer for layer in find(pipe) if layer.to_q.in_features == 32]
    assert len(layers) == 5
    linear = 4 * 32 * 32 * 128 * 5
    core = 2 * 32 * (256**2 - 128**2) * 5
    matching = 32 * (256 + 192 * 64)
    assert whole - half == linear + core - matching


def find(pipe):
    return [m for path, m in denoiser(pipe)[0].named_modules() if path.endswith(".attn1")]


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ("20%", "cannot keep 20%: 25% of the tokens is the least, one of each patch of 2 x 2"),
        ("10% macs", r"cannot keep 10% macs: [\d,]+ macs \([\d.]+%\) is the least, with one token"),
        ("50% bytes", "a budget in bytes: optiprune knows units, which are tokens, and macs"),
    ],
)
def test_budgets_that_cannot_be(loaded, keep, text):
    with pytest.raises(ValueError, match=text):
        compress(loaded, keep)


def test_smaller_layers_are_pruned_too_where_asked(loaded):
    found = compress(loaded, "50%", min_tokens=64)
    assert found.model.min_tokens == 64
    assert [row["tokens"] for row in found.log if row["kind"] == "tokens"] == [256, 64]
    assert macs_of(loaded[0], 64, PruneConfig(0.5, 64)) < macs_of(
        loaded[0], 64, PruneConfig(0.5, 256)
    )


def test_predict_is_what_comes(loaded):
    pipe, data = loaded
    found = method.predict(pipe, data, parse_budget("0.9xMACs"), data_config := Config(**QUICK))
    assert data_config.bypass == "never"
    made = compress(loaded, "0.9xMACs").model
    assert found["ratio"] == made.ratio and found["macs"] <= 0.9 * found["macs_before"]
    assert found["tokens_kept"] == 256 - math.floor(made.ratio * 256)


def row_of(tokens, saved):
    return {"grid": "16x16", "tokens": tokens, "kept": tokens // 2, "layers": 5, "pruned": True,
            "attention_ms": 2.0, "pruned_ms": 1.0, "matching_ms": 5 - saved, "saved_ms": saved,
            "helps": saved > 0}  # fmt: skip


@pytest.mark.parametrize(
    ("saved", "ratio", "least"),
    [
        ({256: 1.0}, 0.5, None),
        ({256: -1.0}, 0.0, None),
        ({256: 1.0, 64: -0.1}, 0.5, None),
        ({256: 1.0, 64: 0.1}, 0.5, 64),
        ({256: -0.1, 64: 5.0}, 0.0, 64),
    ],
)
def test_what_does_not_help_is_left_alone(loaded, monkeypatch, caplog, saved, ratio, least):
    rows = [row_of(*one) for one in saved.items()]
    monkeypatch.setattr(method, "forecasts", lambda *_: rows)
    config = {"min_tokens": 64} if 64 in saved else {}
    found = compress(loaded, bypass="auto", **config)
    assert found.model.ratio == ratio and found.model.saving == sum(saved.values()) / 1e3
    if ratio:
        assert found.model.min_tokens == least or least is None
        assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    else:
        assert "not pruned, since it would not help here" in caplog.text
        assert all(not row["pruned"] for row in found.log if row["kind"] == "tokens")
        assert "it would not help" in found.log[-2]["says"]
    # a budget in MACs is kept nevertheless, and so is what is to be pruned always
    assert compress(loaded, "0.9xMACs", bypass="auto", **config).model.ratio > 0
    assert compress(loaded, bypass="never", **config).model.ratio == 0.5


# scores


def test_tokens_that_resemble_others_score_low(loaded):
    pipe, data = loaded
    chance = torch.Generator().manual_seed(0)
    (units,), scores = method.score(pipe, data, Config(**QUICK), chance)
    assert units.name == "16x16" and units.kind == "token" and units.cost.shape == (256,)
    assert (units.cost > 0).all() and scores["16x16"].shape == (256,)
    tokens = torch.randn(2, 24, 5, generator=chance)
    tokens[:, 7] = 2 * tokens[:, 0]  # of the same direction, in another patch
    found = method._unlike(tokens, (4, 6), PruneConfig(0.75, 4))
    bases = match_tokens(tokens, 4, 6, 0.75).kept
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    expected = torch.zeros(2, 24)
    for sample_, own in enumerate(bases.tolist()):
        for i in range(24):
            near = max(float(unit[sample_, i] @ unit[sample_, j]) for j in own)
            expected[sample_, i] = 2 if i in own else 1 - near
    assert len(bases[0]) == 6 and torch.allclose(found, expected.mean(0), atol=1e-5)


# what is kept of a run


def test_only_the_settings_are_saved(saved, ground, loaded):
    (path,) = saved.rglob("*")
    values = json.loads(path.read_text())
    assert path.name == "optiprune.json" and path.stat().st_size < 2000
    assert values["pipeline"]["place"] == str((ground / "sd").resolve())
    assert values["pipeline"]["identity"] == identity_of(loaded[0])
    assert values["ratio"] == 0.5 and values["config"]["rounds"] == 1


def test_what_is_restored_draws_the_same(saved, result):
    back = restore(saved)
    for field in dataclasses.fields(back):
        if field.name != "pipe":
            assert getattr(back, field.name) == getattr(result.model, field.name)
    asked = {"seeds": [3, 4], "steps": 2}
    with apply(result.model, {}) as pipe:
        one = sample(pipe, PROMPTS, **asked)
    with apply(back, {}) as pipe:
        other = sample(pipe, PROMPTS, **asked)
    assert torch.equal(one, other)
    noise = NoiseConfig(rounds=1, steps=1, last_steps=0, pictures=8)
    with optiprune(back.pipe, 0.5, noise=noise, bypass="never") as pipe:
        assert torch.equal(sample(pipe, PROMPTS, **asked), one)
    assert not torch.equal(sample(back.pipe, PROMPTS, **asked), one)


def test_masks_are_none(result):
    with (
        pytest.raises(ValueError, match="masks main: expected none"),
        apply(result.model, {"main": None}),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda v: v.update(format=2), FormatError, "format 2, expected 1"),
        (lambda v: v.pop("ratio"), FormatError, "not the settings of optiprune: 'ratio'"),
        (lambda v: v.update(ratio=0.9), FormatError, "ratio 0.9: expected 0 to 0.75"),
        (lambda v: v["config"].update(rounds=0), FormatError, "rounds"),
        (lambda v: v["config"].update(rounds="x"), FormatError, "not the settings"),
        (lambda v: v["config"].update(other=1), FormatError, "unexpected keyword"),
        (lambda v: v.update(pipeline=[]), FormatError, "not the settings"),
        (lambda v: v["pipeline"].update(dtype="int8"), FormatError, "not the settings"),
        (lambda v: v["pipeline"].update(place="/gone/away"), FileNotFoundError, "which is gone"),
        (lambda v: v["pipeline"].update(identity="0"), FormatError, "was made for other weights"),
    ],
)
def test_settings_that_were_changed(saved, tmp_path, change, error, text):
    values = json.loads((saved / "optiprune.json").read_text())
    change(values)
    (tmp_path / "optiprune.json").write_text(json.dumps(values))
    with pytest.raises(error, match=text) as problem:
        restore(tmp_path)
    assert "optiprune.json" in str(problem.value)


def test_a_pipeline_that_has_changed_is_refused(ground, tmp_path):
    shutil.copytree(ground / "sd", tmp_path / "sd")
    found = compress(load(tmp_path))
    (tmp_path / "m").mkdir()
    method.save(found, tmp_path / "m", found.model.config, None)
    restore(tmp_path / "m")
    path = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"beta_end": values["beta_end"] * 1.01}))
    with pytest.raises(FormatError, match="other weights or settings than"):
        restore(tmp_path / "m")
    path.write_text(json.dumps(values))
    restore(tmp_path / "m")
    save_pipeline(tiny.mini_pipeline("sd", 1), tmp_path / "sd")
    with pytest.raises(FormatError, match="make it anew"):
        restore(tmp_path / "m")


def test_the_pipeline_is_found_from_elsewhere(ground, tmp_path, monkeypatch):
    """A path that is not absolute stays so, and both may move as long as they do together."""
    shutil.copytree(ground / "sd", tmp_path / "here" / "sd")
    monkeypatch.chdir(tmp_path / "here")
    config = Config(**{**QUICK, "prompts": PROMPTS})
    loaded = method.load("sd", {}, "cpu", "float32", config)
    (tmp_path / "here" / "r" / "model").mkdir(parents=True)
    method.save(compress(loaded), Path("r/model"), config, None)
    assert json.loads(Path("r/model/optiprune.json").read_text())["pipeline"]["place"] == "sd"
    assert restore(Path("r/model")).place == "sd"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    assert Path(restore(Path("there/r/model")).place) == tmp_path / "there" / "sd"
    shutil.rmtree(tmp_path / "there" / "sd")
    with pytest.raises(FileNotFoundError, match="the pipeline sd, which is gone"):
        restore(Path("there/r/model"))


def test_an_embedded_pipeline_goes_by_its_name(ground):
    assert place_of(str(resolve("tiny-sd"))) == "tiny-sd"
    assert place_of("owner/name") == "owner/name"
    assert place_of(str(ground / "sd")) == (ground / "sd").as_posix()


# what is measured


def test_rows(loaded, saved):
    pipe, data = loaded
    rows = {row.name: row for row in method.measure(pipe, restore(saved), data)}
    assert rows["file size"].before == rows["file size"].after > 1e5
    whole, half = macs_of(pipe, 64, None), macs_of(pipe, 64, PruneConfig(0.5, 256))
    assert (rows["MACs per forward"].before, rows["MACs per forward"].after) == (whole, half)
    tokens = rows["tokens of the largest layers"]
    assert (tokens.before, tokens.after) == (256, 128)
    time, search = rows["time of a picture"], rows["time of a picture, search of noise"]
    assert time.after == search.after + rows["time of a picture, sampling"].after
    assert search.before is None and time.before > 0
    passes = rows["denoiser passes a picture"]
    # of two steps with guidance; a look for the layers in each of two groups of pictures at most
    assert passes.before == 4 and 4 + 4 < passes.after <= 4 + 4 + 1
    noise = rows["noise score (S_cross + S_self)"]
    assert noise.after <= noise.before and noise.repeats == 4
    assert "same-seed PSNR" in rows and rows["memory of a forward of 4"].after > 0


def test_a_preview_shows_attention(loaded, saved, result, tmp_path):
    pipe, data = loaded
    (tmp_path / "preview").mkdir()
    count = len(result.log)
    method.preview(pipe, restore(saved), result, data, tmp_path / "preview")
    added, result.log[count:] = result.log[count:], []
    views = read_previews(tmp_path)[0]
    names = ["pictures without and with, sheet 1", "attention to the subjects, sheet 1"]
    assert [view["name"] for view in views] == names
    assert views[1]["before"] != views[1]["after"] and views[1]["difference"] is None
    assert [row["prompt"] for row in added if row["kind"] == "noise"] == list(PROMPTS * 2)


def test_samples_are_those_that_were_measured(loaded, saved, tmp_path):
    pipe, data = loaded
    back = restore(saved)
    paths = method.sample(back, data, tmp_path)
    assert [path.name for path in paths] == ["0001.png", "0002.png", "0003.png", "0004.png",
                                             "sheet.png"]  # fmt: skip


def test_other_arms(ground):
    judges = {"judges": str(resolve("tiny-eval"))}
    prompts = ("a cat and a car", "a cat")
    config = {"prompts": prompts, "compare": ("plain", "ours"), "images": 4}
    pipe, data = load(ground, judges, **config)
    assert data.two == [0, 2]
    made = Config(**{**QUICK, **config})
    found = compress((pipe, data), **config)
    said = []
    rows = method.compare(pipe, found, data, made, torch.Generator().manual_seed(0), said.append)
    arms = {row["arm"]: row for row in rows if row["kind"] == "arm"}
    assert list(arms) == ["plain", "ours"] and arms["plain"]["passes"] == 4
    assert arms["ours"]["passes"] > 4 and arms["ours"]["pictures"] == 2
    curves = [row for row in rows if row["kind"] == "curve"]
    assert [row["x_name"] for row in curves] == [
        "denoiser passes a picture", "time of a picture",
    ] * 2  # fmt: skip
    assert method.compare(pipe, found, data, Config(**QUICK), None) == []
    with pytest.raises(ValueError, match="0 of 4 pictures are of prompts that name two things"):
        load(ground, judges, prompts=("a cat",), compare=("plain",))


# the command line


def settings():
    return [f"--set={name}={value}" for name, value in QUICK.items()]


def test_on_the_command_line(call, ground, tmp_path):
    arguments = ["compress", "optiprune", ground / "sd", *settings()]
    for prompt in PROMPTS:
        arguments += ["--prompt", prompt]
    code, text, err = call(*arguments, "--dry-run", "--json")
    told = json.loads(text)
    assert code == 0 and told["tokens_kept"] == 128, err
    out = tmp_path / "o"
    code, text, err = call(*arguments, "--out", out, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(text)["measurements"]}
    assert rows["MACs per forward"]["after"] == told["macs"]
    artifact = read_artifact(out)
    assert verify(artifact) == [] and artifact.manifest["model"]["file"] == "model/optiprune.json"
    kinds = {row["kind"] for row in read_log(artifact)}
    assert kinds == {"tokens", "kept", "noise", "pictures"}
    code, text, err = call("measure", out)
    assert code == 0 and "DIFFERS" not in text, err
    code, text, err = call("report", out, "--out", tmp_path / "page")
    assert code == 0 and "smaller" not in (tmp_path / "page" / "report.md").read_text(), err

    more = ["--prompt", "a cat and a hat", "--steps", "2", "--quiet", "--out"]
    code, text, err = call("sample", out, *more, tmp_path / "s")
    assert code == 0 and "2 pictures" in text, err
    code, text, err = call("sample", ground / "sd", *more, tmp_path / "plain")
    assert code == 0, err
    one, other = ((tmp_path / n / "0001.png").read_bytes() for n in ("s", "plain"))
    assert one != other
    code, text, err = call("sample", out, "--out", tmp_path / "again", "--quiet")
    assert code == 0 and "5 pictures" in text, err
    code, _, err = call("sample", out, "--prompt", "blue", "--out", tmp_path / "no", "--quiet")
    assert code == 1 and "no subject in 'blue'" in err and len(err.strip().splitlines()) == 1
    code, _, err = call(
        "compress", "prune", ground / "sd", "--prompt", "a", "--out", tmp_path / "p"
    )
    assert code == 2 and "unknown in config: prompts" in err
