"""`gencompress audit`: the folder that it writes, artifacts of other methods, refusals, and an
audit that was stopped."""

import contextlib
import csv
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gencompress import audit as room
from gencompress.artifact import write_artifact
from gencompress.core.budget import parse_budget
from gencompress.core.mask import Compressed
from gencompress.recipe import Recipe
from gencompress.t2i import tiny
from gencompress.t2i.dense2moe.convert import convert
from gencompress.t2i.dense2moe.layout import Layout, structure
from gencompress.t2i.optiprune import settings as optiprune
from gencompress.t2i.pipeline import hushed, save_pipeline, with_denoiser

QUICK = ("--steps", 2, "--draws", 2, "--seeds", 2, "--sampling-steps", 2, "--size", 32, "--quiet")
HOSTILE = "a red <script>alert(1)</script> | car"


@pytest.fixture(scope="module")
def made():
    with hushed():
        return tiny.mini_pipeline("sd")


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A folder with a pipeline and pairs."""
    folder = tmp_path_factory.mktemp("audit")
    save_pipeline(made, folder / "sd")
    for name, color in (("a", (200, 30, 30)), ("b", (9, 90, 9)), ("c", (0, 0, 200))):
        Image.new("RGB", (48, 32), color).save(folder / f"{name}.png")
    rows = [("a.png", HOSTILE, "VM", ""), ("b.png", "a cat", "", ""), ("c.png", "a", "", "control")]
    table(folder / "pairs.csv", rows)
    return folder


def table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "type", "role"), *rows])
    return path


def artifact(folder, method, save):
    recipe = Recipe(method, "sd", parse_budget("50%"))
    write_artifact(folder, recipe, Compressed(None, {}, {}), [], save_model=save)
    return folder


def test_the_folder(call, place, tmp_path):
    out = tmp_path / "out"
    code, said, err = call("audit", place / "sd", "--pairs", place / "pairs.csv", "--out", out,
                           *QUICK, "--starts", "caption", "--starts", "normal")  # fmt: skip
    assert code == 0, err
    assert said.startswith("verdict: removed\n") and str(out / "audit.html") in said
    assert {path.name for path in out.iterdir()} == {
        "audit.json", "audit.md", "audit.html", "pictures"
    }  # fmt: skip
    found = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert found["settings"]["starts"] == ["caption", "normal"] and found["settings"]["size"] == 32
    assert found["encoder"] == "tiny-eval/copies" and found["notes"] == []
    assert [one["file"] for one in found["pictures"]] == [f"pictures/00{i}.png" for i in (1, 2, 3)]
    assert all((out / one["file"]).is_file() for one in found["pictures"])
    assert str(tmp_path) not in json.dumps(found) and str(place) not in json.dumps(found)
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert (
        page.count("data:image/png;base64,") == 3
        and "http://" not in page
        and "https://" not in page
    )
    assert found["says"].split(",")[0] in page and "<svg" in page
    text = (out / "audit.md").read_text(encoding="utf-8")
    assert "<script" not in text and "\\| car" in text
    assert "2 steps, from normal" in text and "0 of 2" in text
    # nothing is left beside it
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # refused, then replaced
    before = (out / "audit.json").read_bytes()
    code, _, err = call("audit", place / "sd", "--pairs", place / "pairs.csv", "--out", out, *QUICK)
    assert code == 1 and "exists already" in err and (out / "audit.json").read_bytes() == before
    code, said, err = call("audit", place / "sd", "--pairs", place / "pairs.csv", "--out", out,
                           *QUICK, "--overwrite", "--json")  # fmt: skip
    assert code == 0 and json.loads(said) == json.loads((out / "audit.json").read_text("utf-8"))
    assert json.loads(said)["settings"]["starts"] == ["caption"]


def test_what_is_no_audit_is_not_replaced(call, place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, err = call("audit", place / "sd", "--pairs", place / "pairs.csv", "--out",
                        tmp_path / "out", "--overwrite", *QUICK)  # fmt: skip
    assert code == 1 and "is not an audit" in err and (tmp_path / "out" / "mine.txt").is_file()


def test_a_stopped_audit_goes_on(place, tmp_path):
    settings = {"steps": 2, "draws": 2, "seeds": 2, "sampling_steps": 2, "size": 32}
    said = []

    def stop(text):
        said.append(text)
        if text == "judging: picture 1 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        room.audit_pipeline(
            str(place / "sd"), place / "pairs.csv", tmp_path / "out", settings, progress=stop
        )
    assert not (tmp_path / "out").exists() and any(x.startswith("searching") for x in said)
    said.clear()
    room.audit_pipeline(
        str(place / "sd"), place / "pairs.csv", tmp_path / "out", settings, progress=said.append
    )
    assert not any(text.startswith("searching") for text in said)
    assert sum(text.startswith("sampling") for text in said) == 2  # of the last two pictures
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_artifacts(call, made, place, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "audit_html", lambda *_: "")
    target = artifact(tmp_path / "art", "prune", lambda folder: save_pipeline(made, folder))
    plain = room.audit_pipeline
    given = {"steps": 1, "draws": 1, "seeds": 1, "sampling_steps": 1, "size": 32}
    found = plain(str(target), place / "pairs.csv", tmp_path / "one", given)
    direct = plain(str(place / "sd"), place / "pairs.csv", tmp_path / "two", given)
    assert found["notes"] == [] and found["model"] == direct["model"]
    # of dense2moe the mixture
    chance = torch.Generator().manual_seed(0)
    mixture = structure(made.unet, Layout(top_k=2))
    scores = {
        path: torch.rand(shared + count * width, generator=chance) + 0.5
        for path, (shared, count, width, _) in mixture["experts"].items()
    }
    mixed = with_denoiser(made, convert(made.unet, mixture, scores, chance).eval())
    target = artifact(tmp_path / "moe", "dense2moe", lambda folder: save_pipeline(mixed, folder))
    found = plain(str(target), place / "pairs.csv", tmp_path / "mixed", given)
    assert found["model"] != direct["model"] and found["pictures"][0]["losses"]["caption"]
    # of optiprune its pipeline while tokens are pruned, if any are
    for ratio, same in ((0.0, True), (0.5, False)):
        pruned = optiprune.OptiPruned(
            made, optiprune.Config(), ratio, None, None, str(place / "sd"),
            optiprune.identity_of(made),
        )  # fmt: skip
        target = artifact(tmp_path / f"opti {ratio}", "optiprune", partial(optiprune.write, pruned))
        found = plain(str(target), place / "pairs.csv", tmp_path / f"three {ratio}", given)
        assert "tokens pruned" in found["notes"][0] and found["model"] == direct["model"]
        for name in ("similarity by caption", "losses"):
            pair = (found["pictures"][0][name], direct["pictures"][0][name])
            assert (pair[0] == pair[1]) == same
    target = artifact(
        tmp_path / "cloud", "splat", lambda folder: (folder / "model.ply").write_text("ply")
    )
    code, _, err = call("audit", target, "--pairs", place / "pairs.csv", "--out", tmp_path / "x")
    assert code == 1 and "an artifact of 'splat'; expected one of a pipeline" in err


def test_experts_are_audited_with_the_captions_they_draw(made, place, tmp_path, monkeypatch):
    from gencompress.t2i.aptp import routed, router

    experts = SimpleNamespace(experts=("one", "two"), router=None, pipe=made)
    target = artifact(tmp_path / "art", "aptp", lambda folder: (folder / "a").write_text(""))
    monkeypatch.setattr(room, "method", lambda _: SimpleNamespace(restore=lambda folder: experts))
    asked = []

    def pipeline_of(of, expert):
        asked.append(expert)
        return made

    monkeypatch.setattr(routed, "pipeline_of", pipeline_of)
    monkeypatch.setattr(router, "route", lambda _, texts: torch.tensor([1, 0, 1]))
    stack = contextlib.ExitStack()
    parts, notes = room._parts(str(target), "cpu", ["a", "b", "c"], None, stack)
    assert asked == [0, 1] and [places for _, places in parts] == [[1], [0, 2]]
    assert "in the expert that its caption goes to" in notes[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("missing.png", "a cat", "", "")], "row 1: names 'missing.png', and there is no such"),
        ([("../a.png", "a cat", "", "")], "expected a file within"),
        ([("/etc/passwd", "a cat", "", "")], "expected a file within"),
        ([("a.png", "", "", "")], "expected a text"),
        ([("a.png", "a cat", "", "control")], "holds no pair of role target"),
        ([("text.png", "a cat", "", "")], "not a readable picture"),
    ],
)
def test_pairs_that_are_wrong(call, place, tmp_path, rows, said):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    (tmp_path / "text.png").write_text("no picture")
    pairs = table(tmp_path / "pairs.csv", rows)
    code, _, err = call("audit", place / "sd", "--pairs", pairs, "--out", tmp_path / "out", *QUICK)
    assert code == 1 and said in err.replace("\n", " ") and not (tmp_path / "out").exists()
    assert err.startswith("error: ") and err.count("\n") == 1


def test_what_is_refused(call, place, tmp_path):
    with hushed():
        save_pipeline(tiny.mini_pipeline("sdxl"), tmp_path / "sdxl")
    common = ("--pairs", place / "pairs.csv", "--out", tmp_path / "out")
    for arguments, status, said in (
        ((tmp_path / "sdxl", *common, *QUICK), 1, "the search is for Stable Diffusion 1 and 2"),
        ((place / "nothing here", *common), 1, "no such"),
        ((place / "sd", *common, "--starts", "open"), 2, "starts"),
        ((place / "sd", *common, "--guidance", "1"), 2, "guidance"),
        ((place / "sd", *common, "--encoder", place / "sd"), 1, "config.json"),
        ((place / "sd", *common, "--encoder", place / "a.png"), 1, "TorchScript, a program"),
        ((place / "sd", *common[:2], "--out", tmp_path / "no" / "out"), 1, "does not exist"),
        ((place / "sd", "--pairs", place / "none.csv", *common[2:]), 1, "none.csv"),
    ):
        code, _, err = call("audit", *arguments)
        assert code == status and said in err and "Traceback" not in err, (arguments, err)
        assert not (tmp_path / "out").exists()
