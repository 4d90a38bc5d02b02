"""`compress dori` on a miniature: masks within their share, what a file holds, rows before and
after, arms beside it, and refusals."""

import csv
import dataclasses
import json

import pytest
import torch
from PIL import Image

from gencompress import draw, run
from gencompress.artifact import read_log
from gencompress.core.budget import parse_budget
from gencompress.core.mask import Mask
from gencompress.measure.estimate import wilson
from gencompress.recipe import RecipeError, apply_overrides, config_from, from_dict, read_recipe
from gencompress.t2i import dori, tiny
from gencompress.t2i.dori import locate, nemo, quality, wanda
from gencompress.t2i.dori.masks import model_digest, read_mask, written
from gencompress.t2i.dori.settings import MASK_FILE, Config
from gencompress.t2i.pipeline import encode_prompts, hushed, load_pipeline, save_pipeline

QUICK = {
    "calls": 1, "steps": 2, "audit_steps": 2, "search_steps": 1, "draws": 1, "seeds": 2,
    "magnitudes": 1, "agreement": 1, "images": 2, "latents": 4, "epochs": 1, "triggers": 1,
    "batch": 2, "surrogates": 1, "tried": 1, "ordinary": 2, "size": 32, "rate": 1e-3,
}  # fmt: skip
REPORT = """
method = "dori"
target = "{place}/sd"
budget = "90%"
data = {{ pairs = "{place}/pairs.csv", prompts = "{place}/prompts.txt", judges = "{judges}" }}
config = {{ compare = ["magnitude", "caption"] }}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline, pairs, prompts and a copy detector."""
    folder = tmp_path_factory.mktemp("dori")
    with hushed():
        save_pipeline(tiny.mini_pipeline("sd"), folder / "sd")
    rows = [("image", "caption", "role")]
    for name, text, role in (
        ("a", "a red car", ""), ("b", "a blue cat", ""), ("c", "a white cup", "control")
    ):  # fmt: skip
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(ord(name)))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{name}.png")
        rows.append((f"{name}.png", text, role))
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    things = ("car", "cat", "cup", "hat")
    texts = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in things]
    (folder / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "judges").mkdir()
    copies = run.resolve("tiny-eval") / "copies"
    (folder / "judges" / "copies").symlink_to(copies)
    return folder


def named(place):
    files = {"pairs": "pairs.csv", "prompts": "prompts.txt", "judges": "judges"}
    return {name: str(place / file) for name, file in files.items()}


def loaded(place, **config):
    made = Config(**{**QUICK, **config})
    return (*dori.load(str(place / "sd"), named(place), "cpu", "float32", made), made)


@pytest.fixture(scope="module")
def ground(place):
    """(pipeline, data, config); asked for what it does not change."""
    return loaded(place)


@pytest.fixture(scope="module")
def artifact(place):
    """Of a recipe file, with arms."""
    text = REPORT.format(place=place, judges=place / "judges")
    (place / "dori.toml").write_text(text, encoding="utf-8")
    sets = [f"config.{name}={value}" for name, value in QUICK.items()]
    return run.run(read_recipe(place / "dori.toml", sets), place / "artifact")


def test_what_an_artifact_holds(artifact, place):
    from diffusers import DiffusionPipeline

    folder = artifact.folder / "model"
    plain = DiffusionPipeline.from_pretrained(folder)
    made = dori.restore(folder)
    before = load_pipeline(place / "sd")
    assert model_digest(plain) == model_digest(made.pipe) != model_digest(before)
    mask, about = read_mask(folder / MASK_FILE)
    assert about["method"] == "wanda" and about["model"] == model_digest(before)
    assert about["settings"]["rho"] == pytest.approx(0.1) and about["num_prompts"] == 2
    assert all(torch.equal(keep, made.mask.keep[name]) for name, keep in mask.keep.items())
    removed = 0
    for name, keep in mask.keep.items():
        assert name.endswith("ff.net.2.weight")
        most = int(0.1 * keep.shape[1] + 1e-9)
        assert int((~keep).sum(1).max()) <= most
        removed += int((~keep).sum())
    assert removed > 0
    starts = ("caption", "normal")
    names = {f"{stage} {start}" for stage in ("base", "pruned", "repaired") for start in starts}
    assert set(made.triggers) == names
    assert made.triggers["base caption"].shape == (3, 32, 24)
    # the parts that are not repaired are what they were
    same, other = before.text_encoder.state_dict(), plain.text_encoder.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in same.items())


def curves_of(artifact):
    found = {}
    for row in read_log(artifact):
        if row["kind"] == "curve":
            found.setdefault(row["series"], {})[row["x"]] = row["y"]
    return found


def test_rows(artifact):
    rows = {row.name.partition(" (")[0]: row for row in artifact.measurements}
    for name in (
        "memorisation rate by caption",
        "memorisation rate after 2 steps of search",
        "controls found after 2 steps of search",
        "similarity to training pictures by caption",
        "similarity to training pictures after 2 steps of search",
    ):
        assert rows[name].before is not None and rows[name].after is not None, name
    pruned = rows["memorisation rate of the pruned model after 2 steps of search"]
    assert pruned.before is None and pruned.repeats == 2
    low, high = wilson(round(pruned.after / 50), 2)
    assert pruned.spread == pytest.approx(50 * (high - low))
    # the same audits as the curves are of
    curves = curves_of(artifact)
    for words, x in (("by caption", 0), ("after 2 steps of search", 2)):
        row = rows[f"memorisation rate {words}"]
        assert (row.before, row.after) == (curves["base"][x], curves["repaired"][x])
    assert pruned.after == curves["pruned"][2]
    found = rows["controls found after 2 steps of search"].after
    assert found == curves["repaired, controls"][2]
    assert rows["memorisation rate by caption"].unit == "%"
    assert (rows["steps of search to a copy, median"].after is None) == (curves["repaired"][2] == 0)
    assert rows["weights masked"].after > 0
    assert rows["FID to the pictures before"].after > 0 and "same-seed PSNR" in rows
    again = {row.name: row.after for row in run.measure_again(artifact)}
    for row in artifact.measurements:
        if "time" not in row.name and not row.name.startswith("memory of"):
            assert again[row.name] == row.after, row.name


def test_the_log_and_the_preview(artifact):
    log = read_log(artifact)
    curves = curves_of(artifact)
    stages = ("base", "pruned", "repaired")
    named = {*stages, *(f"{one}, controls" for one in stages), "magnitude", "caption"}
    assert set(curves) == named and all(list(points) == [0, 2] for points in curves.values())
    assert {y for points in curves.values() for y in points.values()} <= {0, 50, 100}
    kinds = {row["kind"] for row in log}
    assert {"detected", "kept", "surrogates", "refresh", "step", "audit", "agreement"} <= kinds
    (detected,) = (row for row in log if row["kind"] == "detected")
    assert len(detected["targets"]) == 2 == len(detected["others"]) and 0 <= detected["auc"] <= 1
    (kept,) = (row for row in log if row["kind"] == "kept")
    assert kept["removed"] == sum(kept["layers"].values()) <= 0.1 * kept["of"]
    (agreed,) = (row for row in log if row["kind"] == "agreement")
    assert agreed["names"] == ["1 caption", "1 from caption", "1 from normal"]
    table = torch.tensor(agreed["table"])
    assert torch.equal(table, table.T) and bool((table.diagonal() == 1).all())
    assert 0 <= float(table.min()) < 1
    folder = artifact.folder / "preview"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    names = ["memory_1.png", "memory_2.png", "triggers.png", "agreement.png"]
    assert [one["file"] for one in index["pictures"]] == names
    row = Image.open(folder / "memory_1.png")
    assert row.width > 6 * 100  # training picture, base, and two each of pruned and repaired
    assert len(index["views"]) == 1


def test_reports_and_samples(artifact, tmp_path):
    from gencompress.report import write_report

    page = write_report([artifact.folder], tmp_path / "report").read_text(encoding="utf-8")
    assert "memorisation rate" in page and page.count("data:image/png") >= 4
    paths = draw.sample(str(artifact.folder), tmp_path, ["a red car"], 0, steps=1)
    assert [path.name for path in paths] == ["0001.png", "sheet.png"]


def test_masks_of_as_many_weights(ground):
    pipe, data, config = ground
    mask, _, scores = locate.locate(pipe, data, config, 0.1)
    again, _, _ = locate.locate(pipe, data, config, 0.1)
    assert all(torch.equal(keep, again.keep[name]) for name, keep in mask.keep.items())
    assert all(one.shape[0] == 1 for one in scores.values())  # of one call
    for kind in ("magnitude", "random"):
        chance = torch.Generator().manual_seed(3)
        other = locate.as_many(pipe, mask, kind, chance)
        for name, keep in mask.keep.items():
            assert torch.equal((~keep).sum(1), (~other.keep[name]).sum(1))
            if kind == "magnitude":
                weight = pipe.unet.get_parameter(name.partition(".")[2]).abs()
                kept = torch.where(other.keep[name], weight, 0).amax(1)
                gone = torch.where(other.keep[name], torch.inf, weight).amin(1)
                assert bool((gone >= kept).all())
        assert any(not torch.equal(mask.keep[n], other.keep[n]) for n in mask.keep)
    path = f"{nemo.layers(pipe.unet)[0]}.weight"
    weight = pipe.unet.get_parameter(path)
    rows = Mask({f"unet.{path}": torch.arange(len(weight)) > 3})
    few = locate.as_many(pipe, rows, "magnitude", torch.Generator())
    biggest = weight.norm(dim=1).topk(4).indices.tolist()
    assert (~few.keep[f"unet.{path}"]).nonzero().flatten().tolist() == sorted(biggest)
    with pytest.raises(ValueError, match="masks by 'nothing'"):
        locate.as_many(pipe, mask, "nothing", torch.Generator())


def test_scores_are_those_of_the_mask(ground):
    pipe, data, config = ground
    units, scores = dori.score(pipe, data, config, torch.Generator())
    mask, _, _ = locate.locate(pipe, data, config, 0.1)
    assert [group.kind for group in units] == ["weight"] * len(mask.keep)
    for group in units:
        keep, score = mask.keep[f"{group.name}.weight"].flatten(), scores[group.name]
        assert score.shape == group.cost.shape == keep.shape and float(score.max()) <= 0
        assert bool((score[~keep] < 0).all())
    with dori.apply(pipe, {"main": mask}):
        masked = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    made = written(pipe, mask).unet.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in masked.items())


def test_nemo_is_kept_and_nothing_else_is_touched(place, tmp_path, monkeypatch):
    pipe, data, config = loaded(
        place, pruner="nemo", repair="none", starts=("normal",), agreement=0
    )
    asked = []

    def find(pipe, text, usual, tau, how):
        """What is unusual, without trials."""
        states = encode_prompts(pipe, [text])["encoder_hidden_states"]
        odd = nemo.unusual({p: v[0] for p, v in nemo.activations(pipe.unet, states).items()}, usual)
        asked.append((text, tau, usual.count))
        found = {path: value > 2 for path, value in odd.items()}
        return nemo.Found(True, found, found, 1.0, 0.0, tau)

    monkeypatch.setattr(nemo, "calibrate_tau", lambda pipe, texts, how: float(len(texts)))
    monkeypatch.setattr(nemo, "find", find)
    before = model_digest(pipe)
    result = dori.compress(
        pipe, data, parse_budget("99%"), config, torch.Generator().manual_seed(0), tmp_path
    )
    assert model_digest(pipe) == before
    ordinary = len(data.ordinary)
    assert asked == [("a red car", 2.0, ordinary), ("a blue cat", 2.0, ordinary)]
    mask = result.masks["main"]
    assert all(
        name.endswith("attn2.to_v.weight") and keep.ndim == 1 for name, keep in mask.keep.items()
    )
    assert 0 < mask.num_kept < mask.num_units
    made = result.model.pipe
    for name, keep in mask.keep.items():
        weight = made.unet.get_parameter(name.partition(".")[2])
        assert torch.equal(weight.abs().sum(1) > 0, keep)
    assert result.scores == {} and set(result.model.triggers) == {"base normal", "pruned normal"}

    def never(*_):
        raise AssertionError("located twice")

    monkeypatch.setattr(nemo, "find", never)
    again, about, _ = locate.locate(pipe, data, config, 0.01, tmp_path)
    assert about["method"] == "nemo"
    assert all(torch.equal(keep, again.keep[name]) for name, keep in mask.keep.items())
    units, scores = dori.score(pipe, data, config, torch.Generator())
    assert [group.kind for group in units] == ["neuron"] * len(mask.keep)
    assert all(float(one.max()) <= 0 for one in scores.values())
    assert dori.predict(pipe, data, parse_budget("99%"), config)["neurons"] == mask.num_units


def test_what_is_learnt_from_holds_no_target(ground):
    _, data, _ = ground
    assert "a red car" in [pair.caption for pair in data.pairs]
    assert not {*data.captions} & {*data.inputs.prompts}
    assert data.ordinary[0] == "a white cup" and len(data.ordinary) == len({*data.ordinary})


def test_predictions(ground):
    pipe, data, config = ground
    found = dori.predict(pipe, data, parse_budget("90%"), config)
    layers = wanda.layers(pipe, "ff.net.2").values()
    assert found["weights"] == sum(one.weight.numel() for one in layers)
    assert found["most_removed"] == sum(
        one.out_features * int(0.1 * one.in_features) for one in layers
    )
    for text in ("0.9xMACs", "100 units", "12MB"):
        with pytest.raises(ValueError, match="share of each row"):
            dori.predict(pipe, data, parse_budget(text), config)


def test_plots():
    groups = {"one": torch.randn(3, 2, 4), "two": torch.randn(2, 2, 4)}
    image = quality.scatter(groups)
    assert image.dtype == torch.uint8 and image.shape[2] == 3
    colours = {tuple(pixel) for pixel in image.flatten(0, 1).tolist()}
    assert (0, 114, 178) in colours and (213, 94, 0) in colours  # the first two of COLOURS
    heat = quality.heat_map(["a", "b"], [[1.0, 0.0], [0.0, 1.0]])
    assert heat[2, -2 - quality.CELL].tolist() == [0, 90, 156]
    assert heat[2, -2].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        ("pairs", {}, "no pairs: expected --data pairs=FILE"),
        ("judges", {}, "no copy detector"),
        ("prompts", {}, "neither prompts nor images"),
        (None, {"views": "x"}, "data .*views"),
        (None, {"pairs": "none.csv"}, "none.csv"),
    ],
)
def test_data_that_is_missing(place, drop, add, said):
    data = named(place)
    data = {name: path for name, path in (data | add).items() if name != drop}
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        dori.load(str(place / "sd"), data, "cpu", "float32", Config(**QUICK))


def test_more_calls_than_sampling_makes_are_refused(place):
    wrong = dataclasses.replace(Config(**QUICK), calls=5, steps=4)
    with pytest.raises(ValueError, match="calls 5: 4 sampling steps call the denoiser 4 times"):
        dori.load(str(place / "sd"), named(place), "cpu", "float32", wrong)


def test_another_pipeline_is_refused(place, tmp_path):
    with hushed():
        save_pipeline(tiny.mini_pipeline("sdxl"), tmp_path / "sdxl")
    values = {"method": "dori", "target": str(tmp_path / "sdxl"), "budget": "99%"}
    values["data"] = named(place)
    recipe = from_dict(apply_overrides(values, ["config.size=32"]))
    with pytest.raises(ValueError, match="the search is for Stable Diffusion 1 and 2"):
        run.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pruner": "best"}, "pruner 'best': known are wanda, nemo, none"),
        ({"repair": "lora"}, "repair 'lora': known are search, caption, none"),
        ({"repair_from": "x"}, "repair_from"),
        ({"pruner": "none", "repair": "none"}, "nothing would change"),
        ({"compare": ("best",)}, "known are magnitude, random, caption, esd, ablation"),
        ({"pruner": "none", "compare": ("random",)}, "needs a pruner"),
        ({"starts": ("x",)}, "starts"),
        ({"scope": "conv"}, "scope"),
        ({"guidance": 1.0}, "guidance"),
        ({"epochs": 0}, "epochs 0"),
        ({"images": 1}, "images 1: 2 or more"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(RecipeError, match=said):
        config_from(Config, settings)
