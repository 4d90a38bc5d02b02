"""Fields on the command line: what a user types, and what he is told when it is wrong."""

import json
import logging
import re
from dataclasses import replace

import pytest
from nerf.nerf_samples import TINY, ball_capture, hollow_ball, random_field, save_work
from PIL import Image

from gencompress.artifact import read_artifact
from gencompress.core.allocate import parse_budget
from gencompress.files import FormatError
from gencompress.measure.cost import file_bytes
from gencompress.nerf import fitting, method
from gencompress.nerf import train as trainer
from gencompress.nerf.formats import is_field, read, write
from gencompress.recipe import Recipe, RecipeError
from gencompress.run import WORK, run

SETTINGS = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    return ball_capture(tmp_path_factory.mktemp("photos") / "ball", 9)


@pytest.fixture(autouse=True)
def less_work(monkeypatch):
    save_work(monkeypatch)


@pytest.fixture
def ball(tmp_path):
    write(tmp_path / "ball.safetensors", replace(hollow_ball()[0], bits=32))
    return tmp_path / "ball.safetensors"


def fit(folder, out, keep="20%", **config):
    config = {**TINY, "steps": 16, "prune_start": 4, "finetune": 8, **config}
    return run(Recipe("nerf", str(folder), parse_budget(keep), {}, config, verb="fit"), out)


def test_fit_then_compress_then_look(call, capture, tmp_path):
    arguments = ["fit", "nerf", capture, *SETTINGS, "--set", "steps=40", "--quiet"]
    code, out, err = call(*arguments, "--keep", "20%", "--out", tmp_path / "r", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["measurements"]}
    assert rows["file size"]["after"] == file_bytes(tmp_path / "r" / "model")
    told = read_artifact(tmp_path / "r").manifest["recipe"]
    assert told["verb"] == "fit" and told["config"]["steps"] == 40
    code, out, _ = call("measure", tmp_path / "r")
    assert code == 0 and "DIFFERS" not in out and out.count("same") >= 6
    code, out, _ = call("info", tmp_path / "r", "--json")
    assert code == 0 and json.loads(out)["PSNR"] == rows["PSNR"]["after"]
    code, out, _ = call("convert", tmp_path / "r", tmp_path / "field.safetensors")
    assert code == 0 and "cells" in out and is_field(tmp_path / "field.safetensors")
    # an artifact is an input of compress, and knows its photos
    smaller = ["compress", "nerf", tmp_path / "r", "--keep", "10%", "--finetune", "4", "--quiet"]
    smaller += ["--set", "prune_steps=12", "--set", "samples=2048"]
    code, out, err = call(*smaller, "--out", tmp_path / "s.safetensors")
    assert code == 0, err
    found = read(tmp_path / "s.safetensors")
    assert len(found) <= len(read(tmp_path / "field.safetensors"))
    left = {"r", "field.safetensors", "s.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_the_usual_budget_of_a_fit_is_a_share(call, capture, tmp_path):
    out = tmp_path / "r"
    arguments = ["fit", "nerf", capture, "--steps", "6", *SETTINGS[2:], "--quiet"]  # not those set
    assert call(*arguments, "--set", "prune_start=2", "--set", "finetune=0", "--out", out)[0] == 0
    keep = read_artifact(out).manifest["recipe"]["budget"]["keep"]
    assert keep.endswith("%") and keep != "100%"


def test_a_dry_run_says_what_is_known_and_writes_nothing(call, capture, ball, tmp_path):
    code, out, err = call("fit", "nerf", capture, *SETTINGS, "--dry-run", "--json", "--keep", "1MB")
    found = json.loads(out)
    assert code == 0 and (found["photos"], found["held out"]) == (7, 2), err
    assert found["most bytes"] == 1_000_000 and found["parameters"] > 9**3
    code, out, _ = call(
        "compress", "nerf", ball, "--views", capture, *SETTINGS, "--dry-run", "--json"
    )
    assert code == 0 and json.loads(out)["bytes_before"] == ball.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [ball.name]


def test_a_budget_in_bytes(call, capture, ball, tmp_path):
    arguments = ["compress", "nerf", ball, "--views", capture, "--finetune", "2", "--quiet"]
    arguments += ["--set", "prune_steps=12", "--set", "samples=2048"]
    out = tmp_path / "small.safetensors"
    code, _, err = call(*arguments, "--keep", "23kB", "--out", out)
    assert code == 0, err
    assert 18_000 < out.stat().st_size <= 23_000
    code, _, err = call(*arguments, "--keep", "3kB", "--out", tmp_path / "tiny.safetensors")
    assert code == 1 and "a budget of 3000 bytes: one cell alone takes" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "tiny.safetensors").exists()


def test_info_and_convert_of_a_field(call, ball, tmp_path):
    code, out, _ = call("info", ball, "--json")
    found = json.loads(out)
    assert code == 0 and found["saliency"] == [12, 12, 12] and found["format"] == "gencompress-nerf"
    assert found["bytes"] == ball.stat().st_size
    code, out, err = call("convert", ball, tmp_path / "surface.ply")
    assert code == 0, err
    code, out, _ = call("info", tmp_path / "surface.ply", "--json")
    bounds = json.loads(out)["bounds"]
    assert code == 0 and all(0.5 < high < 0.75 for high in bounds["max"])
    code, _, err = call("convert", ball, tmp_path / "surface.stl")
    assert code == 1 and "surface.stl" in err and len(err.strip().splitlines()) == 1


def test_a_field_with_nothing_in_it_has_no_surface(call, tmp_path):
    write(tmp_path / "fog.safetensors", random_field())
    code, _, err = call("convert", tmp_path / "fog.safetensors", tmp_path / "a.ply")
    assert code == 1 and "no surface" in err and not (tmp_path / "a.ply").exists()


@pytest.mark.parametrize("stop", [10, 20])
def test_a_stopped_run_goes_on_from_its_checkpoint(capture, tmp_path, monkeypatch, stop):
    """In training, and in the steps after."""
    original, seen = trainer._advance, []

    def stopping(*arguments):
        seen.append(arguments[3])
        if len(seen) == stop:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trainer, "_advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(capture, tmp_path / "out", checkpoint_every=3)
    work = tmp_path / WORK.format("out")
    assert not (tmp_path / "out").exists() and (work / "fit.safetensors").is_file()
    assert (work / "tune.safetensors").is_file() == (stop == 20)
    for other in ({"checkpoint_every": 3, "steps": 17}, {"checkpoint_every": 3, "levels": 4}):
        with pytest.raises(FormatError, match=r"fit\.safetensors: the checkpoint of another run"):
            fit(capture, tmp_path / "out", **other)
    with pytest.raises(FormatError, match="another run"):
        fit(capture, tmp_path / "out", "10%", checkpoint_every=3)
    seen.extend([0] * 100)
    artifact = fit(capture, tmp_path / "out", checkpoint_every=3)
    resumed = seen[stop + 100 :]
    assert resumed[0] == (9 if stop == 10 else 3) and not work.exists()
    monkeypatch.setattr(trainer, "_advance", original)
    whole = fit(capture, tmp_path / "whole", checkpoint_every=3)
    files = [one.folder / "model" / "field.safetensors" for one in (artifact, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stopped_compression_of_a_capture_goes_on(capture, tmp_path, monkeypatch):
    """The field that is trained first is there again, and the same."""
    config = {**TINY, "steps": 8, "prune_start": 3, "prune_steps": 8, "finetune": 0}
    recipe = Recipe("nerf", str(capture), parse_budget("20%"), {}, config)
    original, seen = trainer._advance, []

    def stopping(*arguments):
        seen.append(arguments[3])
        if len(seen) == 12:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trainer, "_advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    artifact = run(recipe, tmp_path / "out")
    monkeypatch.setattr(trainer, "_advance", original)
    whole = run(recipe, tmp_path / "whole")
    values = [
        {row.name: (row.before, row.after) for row in one.measurements if row.unit != "s"}
        for one in (artifact, whole)
    ]
    assert values[0] == values[1] and values[0]["PSNR"][0] is not None


def broken(folder, kind):
    """A capture with something wrong."""
    path = folder / "transforms.json"
    about = json.loads(path.read_text())
    if kind == "missing":
        (folder / "r-002.png").unlink()
    elif kind == "size":
        Image.new("RGBA", (20, 31)).save(folder / "r-001.png")
    elif kind == "matrix":
        about["frames"][1]["transform_matrix"][0][0] += 0.5
    elif kind == "number":
        about["frames"][1]["transform_matrix"][0][3] = float("nan")
    elif kind == "one view":
        about["frames"] = about["frames"][:1]
    elif kind == "json":
        path.write_text(path.read_text()[:-20])
        return folder
    elif kind == "damaged":
        data = (folder / "r-001.png").read_bytes()
        (folder / "r-001.png").write_bytes(data[: len(data) // 2])
    elif kind == "empty masks":
        for photo in folder.glob("*.png"):
            Image.new("RGBA", (24, 24)).save(photo)
    path.write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "r-002.png"),
        ("size", "r-001.png"),
        ("matrix", "rigid|rotation|orthogonal"),
        ("number", "finite|number"),
        ("one view", "one view; at least two"),
        ("json", "transforms.json"),
        ("damaged", "r-001.png"),
        ("empty masks", "all are empty"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "compress"])
def test_captures_that_cannot_be_used(call, tmp_path, kind, says, verb):
    folder = broken(ball_capture(tmp_path / "ball", 4), kind)
    code, out, err = call(verb, "nerf", folder, *SETTINGS, "--out", tmp_path / "r", "--quiet")
    assert code == 1 and out == "" and re.search(says, err), err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ball"]


@pytest.mark.parametrize("kind", ["truncated", "empty", "splats"])
def test_a_damaged_field_is_one_clear_error(call, capture, ball, tmp_path, kind):
    data = ball.read_bytes()
    ball.write_bytes({"truncated": data[:-100], "empty": b"", "splats": b"ply\n" + data}[kind])
    code, _, err = call(
        "compress", "nerf", ball, "--views", capture, "--out", tmp_path / "r", "--quiet"
    )
    assert code == 1 and ball.name in err and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [ball.name]


def test_what_is_missing_or_too_much(call, capture, ball, tmp_path):
    for arguments, says in (
        (["compress", "nerf", ball], "--views"),
        (["compress", "nerf", ball, "--data", f"masks={capture}"], "only views"),
        (["fit", "nerf", capture, "--data", f"views={capture}"], "takes the capture alone"),
        (["fit", "nerf", capture, "--device", "cuda"], "float32 on cuda"),
        (["fit", "nerf", capture, "--keep", "3M params"], "cells are counted"),
        (["fit", "nerf", tmp_path / "absent"], "absent"),
        (["compress", "nerf", tmp_path / "absent.safetensors"], "absent"),
    ):
        code, _, err = call(*arguments, *SETTINGS, "--quiet", "--out", tmp_path / "r")
        assert code in (1, 2) and says in err, err
        assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r").exists()
    (capture / "r").mkdir()
    code, _, err = call("fit", "nerf", capture, *SETTINGS, "--out", capture / "r" / "x" / "y")
    assert code == 1 and "does not exist" in err
    (capture / "r").rmdir()


def test_a_camera_inside_the_box_is_told(capture, caplog):
    caplog.set_level(logging.WARNING)
    box = (-3.0, -3.0, -3.0, 3.0, 3.0, 3.0)
    fitting.load(str(capture), {}, "cpu", "float32", fitting.Config(**TINY, box=box))
    (told,) = (record.getMessage() for record in caplog.records)
    assert "9 cameras are inside the box" in told and "r-00" in told and "unbounded" in told
    caplog.clear()
    config = fitting.Config(**TINY, box=box, space="unbounded")
    field, _ = fitting.load(str(capture), {}, "cpu", "float32", config)
    assert field.space.contracted and not caplog.records
    fitting.load(str(capture), {}, "cpu", "float32", fitting.Config(**TINY))
    assert not caplog.records


WRONG = [
    ({"pruner": "magic"}, "known are none"),
    ({"saliency": 0}, "needs a saliency grid"),
    ({"saliency": 1}, "2 to 256"),
    ({"log2_rows": 30}, "10 to 24"),
    ({"levels": 0}, "1 to 32"),
    ({"finest": 8}, "16 to 8192"),
    ({"across": 5}, "across"),
    ({"occupancy": 30}, "a multiple of 4"),
    ({"space": "sphere"}, "known are auto, box, unbounded"),
    ({"box": (0.0, 0.0, 0.0)}, "six numbers"),
    ({"box": (0.0, 0.0, 0.0, 1.0, 1.0, 0.0)}, "six numbers"),
    ({"storage": "zip"}, "known are faithful"),
    ({"bits": 5}, "bits 5 with quant"),
    ({"bits": 8, "storage": "compact"}, "bits 8 with compact"),
    ({"finetune": -1}, "not negative"),
    ({"hold_out": 1}, "hold_out 2 or more"),
    ({"checkpoint_every": 0}, "checkpoint_every|hold_out"),
    ({"threshold": 1.0}, "from 0 to below 1"),
    ({"compare": ("best",)}, "compare best: known are"),
    ({"format": ".ply"}, "gencompress convert"),
    ({"background": "grey"}, "white, black or random"),
    ({"samples": 10}, "1024 or more"),
    ({"steps": 0}, "1 or more"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG)
@pytest.mark.parametrize("config", [fitting.Config, method.Config])
def test_settings_that_are_wrong(config, settings, says):
    with pytest.raises(ValueError, match=says) as problem:
        config(**settings)
    assert len(str(problem.value).splitlines()) == 1


def test_wrong_settings_of_each_verb(call, capture, tmp_path):
    with pytest.raises(ValueError, match="float16 on cpu"):
        fitting.check_place("cpu", "float16")
    with pytest.raises(ValueError, match="prune_steps 0"):
        method.Config(prune_steps=0)
    for settings in ({"pruner": "none"}, {"gate": False}):
        with pytest.raises(ValueError, match="nothing would be removed"):
            method.Config(**settings)
        fitting.Config(**settings)
    assert fitting.Config(compare=("plain",)) and method.Config(compare=("weight",))
    with pytest.raises(ValueError, match="known are plain"):
        fitting.Config(compare=("weight",))
    with pytest.raises(RecipeError):
        fit(capture, tmp_path / "r", saliency=1)
    for verb in ("fit", "compress"):
        code, _, err = call(
            verb, "nerf", capture, "--set", "salience=3", "--out", tmp_path / "r", "--quiet"
        )
        assert code == 2 and "salience" in err and "saliency" in err
    assert not list(tmp_path.iterdir())
