"""`fit nerf` and `compress nerf` from files to an artifact: what is kept, shown and measured."""

import json
from dataclasses import replace

import pytest
import torch
from nerf.nerf_samples import TINY, ball_capture, hollow_ball, random_field, save_work, tiny_field

import gencompress
from gencompress import run
from gencompress.artifact import read_artifact, read_log, read_masks, read_scores, verify
from gencompress.core.allocate import parse_budget
from gencompress.core.mask import Mask
from gencompress.measure.cost import file_bytes
from gencompress.nerf import fitting, method, pictures
from gencompress.nerf.field import encode
from gencompress.nerf.formats import read, write
from gencompress.nerf.render import render
from gencompress.nerf.storage import corner_peaks, sizes
from gencompress.recipe import Recipe
from gencompress.run import WORK

COMPRESS = {**TINY, "prune_steps": 30, "prune_start": 10}
TIMES = {"render time", "fitting time", "compression time"}


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return ball_capture(tmp_path_factory.mktemp("photos") / "ball", 9)


@pytest.fixture(autouse=True)
def less_work(monkeypatch):
    save_work(monkeypatch)


@pytest.fixture(scope="module")
def fitted(capture, tmp_path_factory):
    """An artifact of `fit nerf`."""
    with pytest.MonkeyPatch.context() as patch:
        save_work(patch)
        return run.run(plan(capture, "fit", compare=["plain"]), tmp_path_factory.mktemp("f") / "r")


@pytest.fixture
def trained(tmp_path):
    """A file of the ball, trained well."""
    write(tmp_path / "ball.safetensors", replace(hollow_ball()[0], bits=32))
    return tmp_path / "ball.safetensors"


def plan(target, verb, keep="20%", data=None, **config):
    config = {**(TINY if verb == "fit" else COMPRESS), **config}
    data = {name: str(path) for name, path in (data or {}).items()}
    return Recipe("nerf", str(target), parse_budget(keep), data, config, 0, verb=verb)


def plain_bytes(space, **more):
    """Of the file of a field before training, as float16."""
    field = fitting.blank(space, True, fitting.Config(**{**TINY, "pruner": "none", **more}))
    return sizes(replace(field, bits=16))["file bytes"]


def rows_of(artifact):
    return {row.name: row for row in artifact.measurements}


def test_fitting_makes_an_artifact(capture, fitted):
    assert verify(fitted) == [] and fitted.manifest["title"] == "ball, fit nerf"
    rows = rows_of(fitted)
    path = fitted.folder / "model" / "field.safetensors"
    assert rows["file size"].after == path.stat().st_size and rows["file size"].before is None
    assert rows["PSNR"].after > 10 and rows["PSNR"].before is None
    assert rows["PSNR, worst view"].after < rows["PSNR"].after and rows["PSNR"].repeats == 2
    field = read(path)
    assert (field.storage, field.bits) == ("quant", 8)
    keep = read_masks(fitted)["main"].keep["cells"]
    assert torch.equal(keep, field.cells.flatten()) and keep.shape == (8**3,)
    assert rows["saliency cells"].after == pytest.approx(100 * float(keep.float().mean()))
    scores, _, digest = read_scores(fitted)
    assert scores["cells"].shape == (8**3,) and digest
    assert float(scores["cells"][keep].min()) >= float(scores["cells"][~keep].max())
    log = read_log(fitted)
    steps = [(row["step"], row.get("stage")) for row in log if row["kind"] == "step"]
    assert steps == [(60, None), (10, "tune")]
    (event,) = (row for row in log if row["kind"] == "event")
    assert event["event"] == "emptied" and event["cells"] == int(keep.sum())
    curves = {row["series"] for row in log if row["kind"] == "curve"}
    assert curves == {"hollow", "Instant-NGP"}
    index = json.loads((fitted.folder / "preview" / "index.json").read_text())
    assert len(index["views"]) == 2 and index["labels"]["before"] == "photo"
    assert [p.name for p in fitted.folder.parent.iterdir()] == ["r"]  # no working folder
    again = {row.name: row.after for row in run.measure_again(read_artifact(fitted.folder))}
    for name, row in rows.items():
        assert name in TIMES or again[name] == row.after, name


def test_compressing_a_field(capture, trained, tmp_path):
    data = {"views": capture}
    artifact = run.run(plan(trained, "compress", "5%", data), tmp_path / "r")
    assert verify(artifact) == []
    rows = rows_of(artifact)
    assert rows["PSNR"].before > 20 and rows["PSNR"].after > 10
    # what it is compared with is the file that came in
    assert rows["file size"].before == trained.stat().st_size
    assert rows["file size"].after == file_bytes(tmp_path / "r" / "model")
    assert rows["file size"].after < 0.6 * rows["file size"].before
    assert (
        rows["size as float16 of what is kept"].after
        < rows["size as float16 of what is kept"].before
    )
    field = method.restore(tmp_path / "r" / "model")
    assert 0 < len(field) < 11**3 and rows["saliency cells"].before == 100
    assert field.space == hollow_ball()[0].space
    again = {row.name: row for row in run.measure_again(read_artifact(tmp_path / "r"))}
    for name, row in rows.items():
        assert name in TIMES or (again[name].before, again[name].after) == (row.before, row.after)


def test_compressing_a_capture(capture, tmp_path):
    """A plain field is trained first, and is what the result is compared with."""
    artifact = run.run(plan(capture, "compress"), tmp_path / "r")
    rows = rows_of(artifact)
    assert rows["PSNR"].before > 8 and rows["PSNR"].after > 8
    whole, after = (
        rows["parameters, all of the table"].before,
        read(tmp_path / "r" / "model" / "field.safetensors"),
    )
    assert rows["parameters, all of the table"].after == whole + 9**3
    # the input is a folder of photos, so the field before is what the file is compared with
    assert plain_bytes(after.space, saliency=0) == pytest.approx(rows["file size"].before, rel=0.02)
    assert rows["file size"].after == sizes(after)["file bytes"] < rows["file size"].before
    stages = [row.get("stage") for row in read_log(artifact) if row["kind"] == "step"]
    assert stages == ["plain", None, "tune"]
    assert after.logits.shape == (9, 9, 9) and after.cells is not None


def test_compressing_what_was_fitted(capture, fitted, tmp_path):
    """An artifact stands for its model and the capture it was fitted to."""
    found = run.predict(plan(fitted.folder, "compress"))
    assert found["photos"] == 7 and found["held out"] == 2
    assert found["bytes_before"] == file_bytes(fitted.folder / "model")
    artifact = run.run(plan(fitted.folder, "compress", "10%", prune_steps=14), tmp_path / "r")
    before, after = (read_masks(one)["main"].keep["cells"] for one in (fitted, artifact))
    assert not (after & ~before).any()  # what was emptied stays so
    assert rows_of(artifact)["PSNR"].before == rows_of(fitted)["PSNR"].after
    # and one that was compressed for its views, again
    found = run.predict(plan(artifact.folder, "compress"))
    assert found["photos"] == 7
    views = {"views": capture}
    direct = run.predict(
        plan(fitted.folder / "model" / "field.safetensors", "compress", data=views)
    )
    assert direct["parameters"] == found["parameters"]


@pytest.mark.parametrize("limit", ["24kB", "60% bytes"])
def test_a_budget_in_bytes_is_held(capture, tmp_path, limit):
    artifact = run.run(plan(capture, "fit", limit), tmp_path / "r")
    size = file_bytes(tmp_path / "r" / "model")
    # a share is of the trained field's, whose occupancy packs a little differently
    whole = 1.01 * plain_bytes(method.restore(tmp_path / "r" / "model").space)
    most = 24_000 if limit == "24kB" else 0.6 * whole
    assert 0.6 * most < size <= most
    assert rows_of(artifact)["file size"].after == size


def test_one_call(capture, trained):
    smaller = gencompress.compress(
        trained, method="nerf", keep="5%", data={"views": str(capture)},
        **{**COMPRESS, "prune_steps": 15, "finetune": 0},
    )  # fmt: skip
    assert type(smaller).__name__ == "Field" and smaller.cells is not None


def test_the_same_seed_gives_the_same_bytes(capture, tmp_path):
    files = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        recipe = replace(plan(capture, "fit", steps=12, prune_start=4), seed=seed)
        run.run_to_file(recipe, tmp_path / f"{name}.safetensors")
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.safetensors" for name in ("one", "two", "three")
    )


@pytest.fixture
def loaded(capture, trained):
    config = method.Config(**COMPRESS)
    return *method.load(str(trained), {"views": str(capture)}, "cpu", "float32", config), config


def test_units_and_scores_are_of_cells(loaded, generator):
    field, data, config = loaded
    (units,), scores = method.score(field, data, config, generator)
    assert units.name == "cells" and len(units.cost) == 11**3
    assert torch.equal(scores["cells"], corner_peaks(field.logits).flatten())
    plain = replace(field, logits=None)  # then, how much each shows
    (units,), scores = method.score(plain, data, config, generator)
    assert len(units.cost) == 8**3 and 0 < float((scores["cells"] > 0).float().mean()) < 0.8


def test_hidden_by_the_mask_equals_cut(loaded, generator, tmp_path):
    field, data, config = loaded
    keep = corner_peaks(field.logits).flatten() > 0.1
    masks = {"main": Mask({"cells": keep})}
    smaller = method.compact(field, masks)
    assert len(smaller) == int(keep.sum()) < 11**3 and field.cells is None
    with method.apply(field, masks) as hidden:
        for camera in data.test.cameras:
            one, other = render(hidden, camera), render(smaller, camera)
            assert torch.equal(one.colors, other.colors)
            assert not torch.equal(render(field, camera).colors, one.colors)
    every = {"main": Mask({"cells": torch.ones_like(keep)})}
    with method.apply(field, every) as whole:
        camera = data.test.cameras[0]
        assert torch.equal(render(whole, camera).colors, render(field, camera).colors)


@pytest.mark.parametrize("storage", ["faithful", "masked", "compact", "quant"])
def test_what_is_saved_is_restored(loaded, tmp_path, storage):
    """Once written and read, writing and reading changes nothing."""
    field, data, config = loaded
    keep = corner_peaks(field.logits).flatten() > 0.05
    model = method.compact(field, {"main": Mask({"cells": keep})})
    model = replace(model, storage=storage, bits=8 if storage == "quant" else 32)
    result = fitting.Compressed(model, {}, {}, [])
    path = method.save(result, tmp_path, config, data)
    assert path == tmp_path / "field.safetensors"
    back = method.restore(tmp_path)
    assert torch.equal(back.cells, model.cells) and back.space == model.space
    for camera in data.test.cameras:
        seen, wanted = render(back, camera).colors, render(model, camera).colors
        if storage == "faithful":
            assert torch.equal(seen, wanted)
        else:
            assert float((seen - wanted).square().mean()) < 1e-3
    path.unlink()
    method.save(replace(result, model=back), tmp_path, config, data)
    again = method.restore(tmp_path)
    assert torch.equal(render(again, camera).colors, render(back, camera).colors)


def test_a_fresh_saliency_changes_no_feature(generator):
    plain = random_field(0)
    hollow = method.hollowed(plain, 7)
    points = torch.rand(100, 3, generator=generator)
    assert hollow.logits.shape == (7, 7, 7) and plain.logits is None
    torch.testing.assert_close(encode(hollow, points)[0], encode(plain, points)[0])
    known = random_field()
    assert method.hollowed(known, 7) is known


def test_what_a_budget_leaves():
    field = tiny_field()
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[:2] = True
    for one in (field, replace(field, cells=cells)):  # a share of the whole grid, whatever is left
        assert fitting.share(one, parse_budget("8%")) == pytest.approx(0.08)
        assert fitting.share(one, parse_budget("64")) == pytest.approx(64 / 512)
        assert fitting.share(one, parse_budget("1M")) == 1
        assert 0 < fitting.share(one, parse_budget("1MB")) < 0.5
    with pytest.raises(ValueError, match="cells are counted, or weighed in bytes"):
        fitting.share(field, parse_budget("3M params"))


def test_curves_of_the_baselines(loaded, generator):
    field, data, _ = loaded
    keep = corner_peaks(field.logits).flatten() > 0.1
    result = fitting.Compressed(method.compact(field, {"main": Mask({"cells": keep})}), {}, {}, [])
    config = method.Config(**COMPRESS, compare=("random", "density", "weight"))
    rows = method.compare(field, result, data, config, generator)
    found = {row["series"]: row for row in rows}
    assert list(found) == ["unpruned", "hollow", "random", "density", "weight"]
    best = {name: row["y"] for name, row in found.items()}
    assert best["random"] < best["hollow"] - 3 and best["random"] < best["weight"]
    assert found["hollow"]["x"] < found["unpruned"]["x"]
    assert method.compare(field, result, data, method.Config(**COMPRESS), generator) == []


def test_a_capture_without_alpha_is_unbounded(tmp_path):
    folder = ball_capture(tmp_path / "ball", 3, 16, alpha=False)
    field, data = fitting.load(str(folder), {}, "cpu", "float32", fitting.Config(**TINY))
    assert field.space.contracted and field.background == (0.0, 0.0, 0.0)
    assert not data.train.has_alpha
    artifact = run.run(plan(folder, "fit", steps=8, prune_start=4, finetune=0), tmp_path / "r")
    assert rows_of(artifact)["PSNR"].after > 5
    boxed = fitting.Config(**TINY, space="box")
    assert not fitting.load(str(folder), {}, "cpu", "float32", boxed)[0].space.contracted


def test_the_box_is_that_of_the_masks_or_the_one_given(capture):
    field, data = fitting.load(str(capture), {}, "cpu", "float32", fitting.Config(**TINY))
    assert not field.space.contracted and field.background == (1.0, 1.0, 1.0)
    assert all(-1.1 < low < -0.6 for low in field.space.low)
    assert all(0.6 < high < 1.1 for high in field.space.high)
    assert data.up[2] > 5 * data.up[:2].abs().max()
    box = (-1.0, -2.0, -3.0, 1.0, 2.0, 3.0)
    given = fitting.Config(**{**TINY, "box": box, "across": 100})
    field, _ = fitting.load(str(capture), {}, "cpu", "float32", given)
    assert (field.space.low, field.space.high) == (box[:3], box[3:])
    assert field.space.step == pytest.approx(56**0.5 / 100)


def test_samples_are_pictures_of_the_held_out_views(loaded, tmp_path, monkeypatch):
    field, data, _ = loaded
    turned = []
    monkeypatch.setattr(pictures, "turntable", lambda field, path, **more: turned.append(path))
    paths = method.sample(field, data, tmp_path)
    assert [path.name for path in paths if path.is_file()] == [
        "000.png", "000-depth.png", "001.png", "001-depth.png",
    ]  # fmt: skip
    assert turned == [paths[-1]]


def test_the_working_folder_goes(capture, tmp_path):
    run.run(plan(capture, "fit", steps=5, prune_start=2, finetune=0), tmp_path / "r")
    assert not (tmp_path / WORK.format("r")).exists()


def test_a_field_of_whole_numbers_is_cut_as_it_is_in_memory(loaded):
    field, _, _ = loaded
    keep = corner_peaks(field.logits).flatten() > 0.1
    small = method.compact(replace(field, storage="quant", bits=8), {"main": Mask({"cells": keep})})
    assert (small.storage, small.bits) == ("compact", 16)
    assert sizes(small)["file bytes"] > 0
