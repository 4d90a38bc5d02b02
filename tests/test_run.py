"""Recipes into artifacts and back, without the command line."""

import dataclasses
import shutil
import zipfile

import pytest
import torch
from splat.scene_samples import ball

import gencompress
from gencompress import run
from gencompress.artifact import read_artifact, read_masks, read_scores, verify
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.recipe import Recipe, RecipeError
from gencompress.splat.cloud import tensors
from gencompress.splat.formats import read_splats, write_splats

QUICK = {"num_views": 2, "size": 32}


@pytest.fixture
def scene(tmp_path):
    write_splats(tmp_path / "a.ply", ball(300))
    return tmp_path / "a.ply"


def recipe(scene, keep="50%", seed=0, **config):
    return Recipe("splat", str(scene), parse_budget(keep), {}, {**QUICK, **config}, seed)


def test_an_artifact_tells_the_whole_run(scene, tmp_path):
    stages = []
    artifact = run.run(recipe(scene), tmp_path / "r", progress=stages.append)
    assert verify(artifact) == [] and artifact.manifest["title"] == "a.ply, splat"
    rows = {row.name: row for row in artifact.measurements}
    assert (rows["splats"].before, rows["splats"].after) == (300, 150)
    assert rows["file size"].before == scene.stat().st_size
    assert rows["file size"].after == file_bytes(tmp_path / "r" / "model")
    assert rows["PSNR"].after > rows["PSNR, worst view"].after > 20
    mask = read_masks(artifact)["main"].keep["splats"]
    assert mask.dtype == torch.bool and int(mask.sum()) == 150
    scores, criterion, digest = read_scores(artifact)
    assert scores["splats"].shape == (300,) and criterion == "merge" and digest
    assert stages[0] == "loading" and stages[-1] == "writing" and "measuring" in stages
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_digest_is_of_what_scores(scene, tmp_path):
    digests = [
        read_scores(run.run(r, tmp_path / str(i)))[2]
        for i, r in enumerate([recipe(scene), recipe(scene, "20%"), recipe(scene, seed=1)])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_same_recipe_same_model_bytes(scene, tmp_path):
    models = []
    for name in ("one", "two"):
        run.run(recipe(scene), tmp_path / name)
        models.append((tmp_path / name / "model" / "scene.ply").read_bytes())
    assert models[0] == models[1]


def test_what_is_measured_is_what_was_saved(scene, tmp_path):
    rows = [
        {r.name: r.after for r in run.run(recipe(scene, "100%", format=f), tmp_path / f[1:])
         .measurements}
        for f in (".ply", ".splat")
    ]  # fmt: skip
    assert rows[0]["PSNR"] == 100 and rows[1]["PSNR"] < 60
    again = run.measure_again(read_artifact(tmp_path / "splat"))
    assert {r.name: r.after for r in again}["PSNR"] == rows[1]["PSNR"]


@pytest.mark.parametrize("target", ["folder", "folder/meta.json"])
def test_a_sog_folder_goes_in_and_comes_out(tmp_path, target):
    write_splats(tmp_path / "folder" / "meta.json", ball(300))
    path = tmp_path / target
    artifact = run.run(recipe(path, format="meta.json"), tmp_path / "r")
    rows = {row.name: row for row in artifact.measurements}
    assert rows["file size"].before == file_bytes(tmp_path / "folder")
    assert (tmp_path / "r" / "model" / "scene" / "meta.json").is_file()
    words = run.convert(tmp_path / "r", tmp_path / "b.ply", strict=False, overwrite=False)
    assert words == "150 splats"
    assert run.inspect(tmp_path / "r")["splats"] == 150
    plain = run.run(recipe(path), tmp_path / "s")
    assert plain.manifest["model"]["file"] == "model/scene.sog"


def test_a_compressed_ply_by_another_name_stays_compressed(tmp_path):
    write_splats(tmp_path / "a.compressed.ply", ball(300))
    shutil.move(tmp_path / "a.compressed.ply", tmp_path / "a.ply")
    artifact = run.run(recipe(tmp_path / "a.ply"), tmp_path / "r")
    assert artifact.manifest["model"]["file"] == "model/scene.compressed.ply"


def test_outputs_that_cannot_be_are_refused_before_the_work(scene, tmp_path):
    said = []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run.run(recipe(scene), tmp_path / "no" / "r", progress=said.append)
    (tmp_path / "r").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        run.run(recipe(scene), tmp_path / "r", progress=said.append)
    assert said == []


def test_an_artifact_is_not_replaced_by_what_is_made_from_it(scene, tmp_path):
    run.run(recipe(scene), tmp_path / "r")
    inner = tmp_path / "r" / "model" / "scene.ply"
    with pytest.raises(FileExistsError, match="holds the input"):
        run.run(recipe(inner), tmp_path / "r", overwrite=True)
    assert len(read_splats(inner)) == 150
    again = run.run(recipe(scene, "20%"), tmp_path / "r", overwrite=True)
    assert verify(again) == [] and len(read_splats(inner)) == 60


def test_a_run_that_fails_leaves_nothing(scene, tmp_path, monkeypatch):
    from gencompress import splat

    monkeypatch.setattr(splat, "preview", lambda *a: (_ for _ in ()).throw(RuntimeError("late")))
    with pytest.raises(RuntimeError, match="late"):
        run.run(recipe(scene), tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_prediction_is_what_a_run_delivers(scene, tmp_path):
    found = run.predict(recipe(scene, "10kB"))
    run.run(recipe(scene, "10kB"), tmp_path / "r")
    size = file_bytes(tmp_path / "r" / "model")
    assert found["bytes"] == size <= 10_000 and found["bytes_before"] == scene.stat().st_size
    assert found["splats"] == len(read_splats(tmp_path / "r" / "model" / "scene.ply"))


def test_measuring_needs_the_target(scene, tmp_path):
    artifact = run.run(recipe(scene), tmp_path / "r")
    scene.rename(tmp_path / "moved.ply")
    with pytest.raises(FileNotFoundError, match=r"a\.ply"):
        run.measure_again(artifact)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "magic"}, "known are splat"),
        ({"config": {"scor": "merge"}}, "known: score"),
        ({"config": {"score": "magic"}}, "removal_error"),
        ({"config": {"size": 8}}, "16 to 4096"),
        ({"config": {"size": "big"}}, "expected int"),
    ],
)
def test_settings_that_are_wrong(scene, tmp_path, change, says):
    wrong = dataclasses.replace(recipe(scene), **change)
    with pytest.raises(RecipeError, match=says):
        run.run(wrong, tmp_path / "r")
    with pytest.raises(RecipeError, match=says):
        run.predict(wrong)


def test_one_call_with_and_without_a_folder(scene, tmp_path):
    plain = gencompress.compress(scene, method="splat", keep="60", **QUICK)
    kept = gencompress.compress(scene, method="splat", keep="60", out=tmp_path / "r", **QUICK)
    folder = gencompress.compress(scene, method="splat", keep="60", format="meta.json", **QUICK)
    assert len(plain) == len(folder) == 60
    for name, field in tensors(plain).items():
        assert torch.equal(field, tensors(kept)[name])
    assert verify(read_artifact(tmp_path / "r")) == []


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FormatError, match="expected a pipeline"):
        run.inspect(tmp_path)


def test_a_folder_of_sog_is_a_scene(scene, tmp_path):
    run.convert(scene, tmp_path / "whole.sog", strict=False, overwrite=False)
    with zipfile.ZipFile(tmp_path / "whole.sog") as archive:
        archive.extractall(tmp_path / "folder")
    assert run.inspect(tmp_path / "folder")["count"] == run.inspect(scene)["count"]
