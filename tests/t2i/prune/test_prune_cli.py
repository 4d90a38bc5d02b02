"""`prune` on the command line: from a folder to an artifact, its pictures, and what is refused."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from splat.scene_samples import ball
from t2i.prune.prune_samples import QUICK, bytes_of_weights, write_pipeline, write_prompts

from gencompress import run
from gencompress.artifact import read_artifact, read_log, read_masks, read_scores, verify
from gencompress.core.budget import parse_budget
from gencompress.recipe import Recipe
from gencompress.splat.formats import write_splats
from gencompress.t2i import calibrate, checkpoint, pipeline
from gencompress.t2i.formats import describe
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.prune import method

SETTINGS = [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]
TIMES = {"time of a forward of 4", "compression time"}


def plan(target, prompts, keep="0.7xMACs", **config):
    data = {"prompts": str(prompts)}
    return Recipe("prune", str(target), parse_budget(keep), data, {**QUICK, **config}, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline in half precision, prompts, and an artifact made of them."""
    folder = tmp_path_factory.mktemp("cli")
    write_pipeline(folder, "pixart", torch.float16)
    write_prompts(folder)
    recipe = plan(folder / "pixart", folder / "prompts.txt", finetune=2, compare=["random"])
    run.run(recipe, folder / "r")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*arguments, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", refused)


def one_line(err):
    return len(err.strip().splitlines()) == 1 and err.startswith("error: ")


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_artifact_tells_the_whole_run(place):
    artifact = read_artifact(place / "r")
    assert verify(artifact) == [] and artifact.manifest["title"] == "pixart, prune"
    rows = {row.name: row for row in artifact.measurements}
    before, after = rows["MACs per forward"].before, rows["MACs per forward"].after
    assert 0.65 * before < after <= 0.7 * before
    assert rows["file size"].before == describe(place / "pixart")["bytes"]
    assert rows["file size"].after == describe(place / "r" / "model")["bytes"]
    assert rows["file size"].after < rows["file size"].before
    weights = [bytes_of_weights(place / name) for name in ("pixart", "r/model")]
    assert weights[1] == 2 * rows["parameters"].after < weights[0]
    assert rows["same-seed PSNR"].after > 0 and rows["same-seed PSNR"].repeats == 4
    masks = read_masks(artifact)["main"]
    scores, criterion, _ = read_scores(artifact)
    assert criterion == "flap" and {*scores} == {*masks.keep}
    log = read_log(artifact)
    (kept,) = (row for row in log if row["kind"] == "kept")
    assert (kept["cost"], kept["units"]) == (after, masks.num_kept)
    assert {row["series"] for row in log if row["kind"] == "curve"} == {"flap", "random"}
    assert (place / "r" / "preview" / "index.json").is_file()
    left = {path.name for path in place.iterdir()} - {"s", "t"}
    assert left == {"pixart", "prompts.txt", "r"}  # no working folder


def test_compress_info_measure_report(call, place, tmp_path):
    target, out = place / "pixart", tmp_path / "r"
    arguments = ["compress", "prune", target, "--data", f"prompts={place / 'prompts.txt'}"]
    arguments += [*SETTINGS, "--keep", "60% params"]
    code, text, err = call(*arguments, "--dry-run", "--json")
    told = json.loads(text)
    assert code == 0 and told["most params"] == pytest.approx(0.6 * told["params before"]), err
    assert told["bytes_before"] == describe(target)["bytes"] and not out.exists()
    code, text, err = call(*arguments, "--out", out, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(text)["measurements"]}
    assert rows["parameters"]["before"] == told["params before"]
    assert rows["parameters"]["after"] <= told["most params"]
    assert any(line.split()[-1] == "writing" for line in err.splitlines())
    code, _, err = call(*arguments, "--out", out, "--quiet")
    assert code == 1 and one_line(err) and "--overwrite" in err

    code, text, _ = call("info", target, "--json")
    assert code == 0 and json.loads(text)["cut"] == 0
    code, text, _ = call("info", out / "model", "--json")
    assert code == 0 and json.loads(text)["cut"] > 0
    code, text, _ = call("info", out, "--json")
    assert code == 0 and json.loads(text)["parameters"] == rows["parameters"]["after"]
    code, text, err = call("measure", out)
    assert code == 0 and "DIFFERS" not in text, err
    assert text.count("same") >= len(rows) - len(TIMES)
    code, text, err = call("report", out, place / "r", "--out", tmp_path / "page")
    assert code == 0 and (tmp_path / "page" / "report.html").is_file(), err
    page = (tmp_path / "page" / "report.html").read_text()
    assert "MACs per forward" in page and "answers against dense" in page


def test_pictures_of_prompts(call, place, tmp_path):
    """From a pipeline and from an artifact of one: the same seeds, the same files."""
    prompts = ["--prompt", "a red cat", "--prompt", "a blue cup"]
    arguments = [*prompts, "--seed", "5", "--steps", "2", "--quiet"]
    for source in ("pixart", "r"):
        out = tmp_path / source
        code, text, err = call("sample", place / source, *arguments, "--out", out)
        assert code == 0 and "3 pictures" in text, err
        names = {"0001.png", "0002.png", "sheet.png"}
        first = pictures(out)
        assert {*first} == names
        code, _, err = call("sample", place / source, *arguments, "--out", out)
        assert code == 1 and one_line(err) and "allow overwriting" in err
        assert call("sample", place / source, *arguments, "--overwrite", "--out", out)[0] == 0
        assert pictures(out) == first
    assert pictures(tmp_path / "pixart")["0001.png"] != pictures(tmp_path / "r")["0001.png"]
    out = tmp_path / "model"
    assert call("sample", place / "r" / "model", *arguments, "--out", out)[0] == 0
    assert pictures(out) == pictures(tmp_path / "r")
    more = ["--prompt", "a blue cup", "--seed", "6", "--steps", "2", "--quiet", "--out"]
    assert call("sample", place / "pixart", *more, tmp_path / "later")[0] == 0
    second = pictures(tmp_path / "pixart")["0002.png"]
    assert pictures(tmp_path / "later")["0001.png"] == second
    assert call("sample", place / "pixart", *more, tmp_path / "steps", "--steps", "3")[0] == 0
    assert pictures(tmp_path / "steps")["0001.png"] != second


def test_pictures_that_an_artifact_is_measured_on(call, place, tmp_path):
    code, text, err = call("sample", place / "r", "--out", tmp_path / "s")
    assert code == 0 and "5 pictures" in text, err
    data = method.load(
        str(place / "pixart"),
        {"prompts": str(place / "prompts.txt")},
        "cpu",
        "float32",
        method.Config(**QUICK),
    )[1]
    (tmp_path / "own").mkdir()
    method.sample(method.restore(place / "r" / "model"), data, tmp_path / "own")
    assert pictures(tmp_path / "s") == pictures(tmp_path / "own")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["pixart"], 1, "no artifact; of a pipeline, say what to draw: --prompt"),
        (["r", "--steps", "3"], 2, "--steps is for pictures of prompts"),
        (["r", "--seed", "0"], 2, "--seed is for pictures of prompts"),
        (["splat", "--prompt", "a car"], 1, "an artifact of 'splat', which draws no prompts"),
        (["prompts.txt", "--prompt", "a car"], 1, "a file; expected a folder"),
        ([".", "--prompt", "a car"], 1, "no model_index.json"),
        (["gone", "--prompt", "a car"], 1, "no such folder"),
        (["pixart", "--prompt", "a car", "--steps", "0"], 1, "steps 0"),
        (["pixart", "--prompt", "a car", "--size", "60"], 1, "size 60: expected a multiple of"),
        (["pixart", "--prompt", "a car", "--guidance", "-1"], 1, "guidance -1"),
        (["pixart", "--prompt", "a car", "--scheduler", "Euler"], 1, "scheduler 'Euler' is none"),
        (["pixart", "--prompt", "a red cat " * 30, "--strict"], 1, "longer than the"),
    ],
)
def test_pictures_that_are_refused(call, place, tmp_path, arguments, code, text, monkeypatch):
    if arguments[0] == "splat":
        write_splats(tmp_path / "a.ply", ball(300))
        config = {"num_views": 2, "size": 32}
        recipe = Recipe("splat", str(tmp_path / "a.ply"), parse_budget("50%"), {}, config, 0)
        run.run(recipe, tmp_path / "splat")
        arguments = [tmp_path / "splat", *arguments[1:]]
    else:
        arguments = [place / arguments[0], *arguments[1:]]
    found, out, err = call("sample", *arguments, "--out", tmp_path / "o", "--quiet")
    assert found == code and text in err and one_line(err) and out == ""
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o*"))


def test_only_pictures_are_replaced_by_pictures(call, place, tmp_path):
    shutil.copytree(place / "r", tmp_path / "r")
    arguments = ["--prompt", "a car", "--steps", "1", "--overwrite", "--quiet", "--out"]
    code, _, err = call("sample", tmp_path / "r", *arguments, tmp_path / "r")
    assert code == 1 and "holds more than pictures" in err
    assert verify(read_artifact(tmp_path / "r")) == []


def test_no_other_format(call, place, tmp_path):
    for source in ("pixart", "r"):
        code, out, err = call("convert", place / source, tmp_path / "o")
        assert code == 1 and "a pipeline has no other format" in err and one_line(err)
        assert out == "" and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--keep", "2% macs"], 1, "cannot keep 2% macs: "),
        (["--keep", "40%active"], 1, "knows units, params, bytes and macs"),
        (["--set", "score=size"], 2, "known are magnitude"),
        (["--set", "scores=flap"], 2, "unknown in config: scores"),
        (["--set", "budget.floor=2"], 1, "settings of its own"),
        (["--min-psnr", "30"], 2, "min_psnr"),
        (["--data", "images=gone"], 1, "gone"),
        (["--data", "views=prompts.txt"], 1, "views: pipelines know prompts, images, judges"),
        (["--set", "size=60"], 1, "size 60"),
    ],
)
def test_runs_that_are_refused_before_they_work(
    call, place, tmp_path, monkeypatch, arguments, code, text
):
    monkeypatch.setattr(calibrate, "clean_latents", None)
    monkeypatch.chdir(place)
    usual = ["compress", "prune", "pixart", "--data", "prompts=prompts.txt", *SETTINGS]
    found, out, err = call(*usual, *arguments, "--out", tmp_path / "o", "--quiet")
    assert found == code and text in err and one_line(err), err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(call, place, tmp_path, monkeypatch):
    """A name of the hub is looked up, once, and only if it can be one."""
    asked = []

    def download(name, **more):
        asked.append(name)
        raise RuntimeError("no route to the hub\nand much more text")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    usual = ["--data", f"prompts={place / 'prompts.txt'}", "--quiet", "--out", tmp_path / "o"]
    code, _, err = call("compress", "prune", "owner/name", *usual)
    assert code == 1 and one_line(err) and asked == ["owner/name"]
    assert "owner/name: no folder here, and the hub did not give it (no route to the hub)" in err
    for target in ("tiny-sdd", "scenes/tiny-sdd", place / "gone", place / "a" / "b"):
        code, _, err = call("compress", "prune", target, *usual)
        assert code == 1 and one_line(err) and "no embedded scene" in err
    code, _, err = call("sample", "owner/name", "--prompt", "a", "--out", tmp_path / "o", "--quiet")
    assert code == 1 and one_line(err) and "the hub did not give it" in err
    assert asked == ["owner/name"] * 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["save", "preview", "measure"])
def test_no_half_of_an_artifact(place, tmp_path, monkeypatch, fails):
    """Whatever breaks, and whenever; what was there before stays."""
    out = tmp_path / "o"
    shutil.copytree(place / "r", out)

    def broken(*arguments, **more):
        raise OSError(28, "No space left on device")

    if fails == "save":  # in the middle of it
        monkeypatch.setattr(pipeline, "write_json", broken)
    else:
        monkeypatch.setattr(run.method("prune"), fails, broken)
    recipe = plan(place / "pixart", place / "prompts.txt")
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            run.run(recipe, target, overwrite=True)
        assert [p.name for p in target.parent.glob(f".{target.name}*")] == [f".{target.name}.work"]
    assert verify(read_artifact(out)) == [] and not (tmp_path / "new").exists()
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "clean_latents", None)  # they are there still
    run.run(recipe, tmp_path / "new")
    assert not (tmp_path / ".new.work").exists()


def test_a_stopped_run_resumes(place, tmp_path):
    """From the checkpoint beside the output, into the bytes of one that was not stopped."""
    recipe = plan(place / "pixart", place / "prompts.txt", finetune=20)

    def stop(text):
        if "measuring" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(recipe, tmp_path / "o", progress=stop)
    work = tmp_path / ".o.work"
    assert (work / "tune" / "checkpoint.safetensors").is_file() and not (tmp_path / "o").exists()
    said = []
    run.run(recipe, tmp_path / "o", progress=said.append)
    assert any("resuming: step 20 of 20" in text for text in said)
    run.run(recipe, tmp_path / "whole")
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    files = [(tmp_path / name / weights).read_bytes() for name in ("o", "whole")]
    assert files[0] == files[1] and not work.exists()
    assert checkpoint.ABOUT.encode() not in files[0]


def test_an_artifact_is_an_input_again(place, tmp_path):
    """What is cut can be cut further, and is compared with what came in."""
    recipe = plan(place / "r", place / "prompts.txt", "80% params")
    artifact = run.run(recipe, tmp_path / "s")
    rows = {row.name: row for row in artifact.measurements}
    first = {row.name: row for row in read_artifact(place / "r").measurements}
    assert rows["parameters"].before == first["parameters"].after
    assert rows["parameters"].after <= 0.8 * rows["parameters"].before
    model = load_pipeline(tmp_path / "s" / "model").transformer
    assert type(model).__name__ == "CutPixArtTransformer2DModel"
