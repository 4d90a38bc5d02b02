"""Artifacts: written whole or not at all, read without torch, suspicious of what they read."""

import hashlib
import json
import math
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from full_disk import no_file_over
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gencompress
from gencompress.artifact import (
    Artifact,
    model_path,
    read_artifact,
    read_log,
    read_masks,
    read_scores,
    verify,
    write_artifact,
)
from gencompress.core.budget import Budget
from gencompress.core.mask import Compressed, Mask
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.recipe import Recipe, from_dict

RECIPE = Recipe("splat", "scenes/spheres.ply", Budget(0.5, "bytes", relative=True), seed=3)
ROWS = [
    Measurement("PSNR", None, 31.25, "dB", "higher", repeats=3, spread=0.5),
    Measurement("bytes", 1000, 500, "B", "lower"),
    Measurement("time", 2.0, math.inf, "ms", "lower", spread=math.nan),
]
LOG = [
    {"step": 0, "loss": math.nan, "rate": torch.tensor(0.5), "kept": {"a": torch.tensor([1, 2])}},
    {"step": 1, "loss": -math.inf, "path": Path("x"), "flag": True, "none": None, "l": (1, 2.5)},
]


def result() -> Compressed:
    keep = torch.arange(19) % 3 == 0
    masks = {
        "main": Mask({"splats": keep}),
        "expert-1": Mask({"ff/net.0": ~keep, "heads": torch.ones(2, 4, dtype=torch.bool)}),
    }
    shared = torch.linspace(0, 1, 19)
    return Compressed(None, masks, {"splats": shared, "ff/net.0": shared, "t": torch.eye(3).T}, LOG)


def save_model(folder: Path) -> None:
    (folder / "scene.ply").write_bytes(b"ply\nend")


def save_preview(folder: Path) -> None:
    (folder / "before.png").write_bytes(b"png")
    (folder / "index.json").write_text("[]")


def write(folder: Path, **changes) -> Artifact:
    settings = {
        "recipe": RECIPE,
        "result": result(),
        "measurements": ROWS,
        "save_model": save_model,
        "save_preview": save_preview,
        "criterion": "opacity",
        "digest": "abc",
    }
    return write_artifact(folder, **{**settings, **changes})


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return write(tmp_path / "run")


def test_layout(artifact):
    names = {p.relative_to(artifact.folder).as_posix() for p in artifact.folder.rglob("*.*")}
    expected = {
        "manifest.json",
        "masks.safetensors",
        "scores.safetensors",
        "model/scene.ply",
        "measurements.json",
        "log.jsonl",
        "preview/before.png",
        "preview/index.json",
    }
    assert names == expected
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest == artifact.manifest
    assert set(manifest) == {
        *("format", "method", "title", "created", "gencompress", "recipe", "packages"),
        *("commit", "device", "backends", "model", "files"),
    }
    assert manifest["format"] == 1 and manifest["method"] == "splat"
    assert manifest["title"] == "splat on spheres.ply"
    assert datetime.fromisoformat(manifest["created"]).utcoffset().total_seconds() == 0
    assert manifest["gencompress"] == gencompress.__version__
    assert from_dict(manifest["recipe"]) == RECIPE
    assert manifest["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "numpy", "safetensors"} <= set(manifest["packages"])
    assert manifest["commit"] is None or re.match(r"[0-9a-f]{40}", manifest["commit"])
    assert manifest["device"]["kind"] == "cpu" and manifest["device"]["cores"] >= 1
    assert manifest["device"]["name"]
    assert manifest["model"] == {"file": "model/scene.ply"}
    assert set(manifest["files"]) == expected - {"manifest.json"}
    assert manifest["files"]["model/scene.ply"] == hashlib.sha256(b"ply\nend").hexdigest()


def test_round_trip(artifact):
    assert read_artifact(artifact.folder) == artifact
    assert artifact.measurements[:2] == ROWS[:2]
    assert artifact.measurements[2] == Measurement("time", 2.0, None, "ms", "lower")
    masks, original = read_masks(artifact), result()
    assert masks.keys() == original.masks.keys()
    for name, mask in original.masks.items():
        assert masks[name].keep.keys() == mask.keep.keys()
        assert all(torch.equal(masks[name].keep[g], keep) for g, keep in mask.keep.items())
    scores, criterion, digest = read_scores(artifact)
    assert (criterion, digest) == ("opacity", "abc") and scores.keys() == original.scores.keys()
    assert all(torch.equal(scores[name], s) for name, s in original.scores.items())
    assert read_log(artifact) == [
        {"step": 0, "loss": None, "rate": 0.5, "kept": {"a": [1, 2]}},
        {"step": 1, "loss": None, "path": "x", "flag": True, "none": None, "l": [1, 2.5]},
    ]
    assert model_path(artifact).read_bytes() == b"ply\nend"


def test_can_be_moved(artifact, tmp_path):
    moved = artifact.folder.rename(tmp_path / "elsewhere")
    assert verify(read_artifact(moved)) == []


def test_model_of_many_files_and_no_preview(tmp_path):
    def save(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "a.safetensors").write_bytes(b"1")
        (folder / "b.json").write_bytes(b"2")

    artifact = write(tmp_path / "run", save_model=save, save_preview=None, title="A title")
    assert artifact.manifest["model"] == {"file": "model"}
    assert "model/unet/a.safetensors" in artifact.manifest["files"]
    assert artifact.manifest["title"] == "A title"
    assert not (artifact.folder / "preview").exists()


def test_a_method_without_masks(tmp_path):
    artifact = write(tmp_path / "run", result=Compressed(None, {}, {}))
    assert read_masks(artifact) == {} and read_scores(artifact)[0] == {}
    assert read_log(artifact) == []


def test_verify_names_what_changed(artifact):
    (artifact.folder / "model/scene.ply").write_bytes(b"ply\nEnd")
    (artifact.folder / "preview/before.png").unlink()
    problems = verify(artifact)
    assert sorted(p.split(":")[0] for p in problems) == ["model/scene.ply", "preview/before.png"]
    assert any("changed" in p for p in problems) and any("missing" in p for p in problems)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"save_model": lambda folder: None}, ValueError, "wrote no file"),
        ({"save_model": lambda folder: 1 / 0}, ZeroDivisionError, "division"),
        ({"result": Compressed(None, {"a/b": Mask({})}, {})}, ValueError, "contains '/'"),
        ({"result": Compressed(None, {}, {}, [{"x": object()}])}, TypeError, "as JSON"),
    ],
)
def test_nothing_half_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(artifact, tmp_path, overwrite):
    folder = artifact.folder if overwrite else tmp_path / "new"
    large = Compressed(None, {}, {"splats": torch.rand(5000)})
    with pytest.raises(OSError, match=rf"File too large: '{folder}'"), no_file_over(3000):
        write(folder, result=large, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert verify(read_artifact(artifact.folder)) == []


def test_tensors_are_for_everybody_that_may_read_the_rest(artifact):
    modes = {p.name: p.stat().st_mode for p in artifact.folder.glob("*.*")}
    assert modes["masks.safetensors"] == modes["scores.safetensors"] == modes["manifest.json"]


def test_overwriting(artifact, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        write(artifact.folder)
    assert write(artifact.folder, title="new", overwrite=True).manifest["title"] == "new"
    with pytest.raises(ZeroDivisionError):
        write(artifact.folder, save_model=lambda folder: 1 / 0, overwrite=True)
    assert verify(read_artifact(artifact.folder)) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty, overwrite=True)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "absent" / "run")


def test_only_artifacts_are_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for place in (home, home / "thesis.txt"):
        with pytest.raises(FileExistsError, match="not an artifact"):
            write(place, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def edit(artifact: Artifact, **changes) -> None:
    manifest = {**artifact.manifest, **changes}
    manifest = {name: value for name, value in manifest.items() if value is not ...}
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"format": ...}, "format None, expected 1"),
        ({"recipe": ...}, "'recipe' is nothing, expected dict"),
        ({"title": 3}, "'title' is int, expected str"),
        ({"files": []}, "'files' is list, expected dict"),
        ({"files": {"model/scene.ply": 3}}, "sha256 of 'model/scene.ply'"),
        ({"model": {}}, "file None"),
        *(
            ({"files": {name: "0"}}, "a relative path inside the artifact")
            for name in (
                "../x",
                "/etc/passwd",
                "a/../../x",
                "",
                ".",
                "a\\b",
                "C:x",
                "a\0b",
                "out/x",
            )
        ),
        ({"model": {"file": "../run2"}}, "a relative path inside the artifact"),
    ],
)
def test_wrong_manifests(artifact, tmp_path, changes, message):
    (artifact.folder / "out").symlink_to(tmp_path)
    edit(artifact, **changes)
    with pytest.raises(FormatError) as refused:
        read_artifact(artifact.folder)
    assert message in str(refused.value) and "manifest.json" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"", "not JSON"),
        ("manifest.json", b"[]", "format 'list'"),
        ("manifest.json", b"\xff\xfe", "not UTF-8"),
        ("manifest.json", b'{"format": NaN}', "NaN is not a JSON number"),
        ("manifest.json", b"[" * 100_000, "not JSON"),
        ("measurements.json", b"{}", "expected a list"),
        ("measurements.json", b"[3]", "row 0 is not a measurement"),
        ("measurements.json", b'[{"name": "x"}]', "row 0 is not a measurement"),
        ("measurements.json", None, "missing"),
        *(
            (
                "measurements.json",
                json.dumps([{**vars(ROWS[1]), key: value}]).encode(),
                "row 0 is not a measurement",
            )
            for key, value in [
                *(("name", 3), ("before", "3"), ("better", "both"), ("repeats", 1.5)),
                *(("extra", 1), ("spread", True), ("unit", None)),
            ]
        ),
        (
            "measurements.json",
            json.dumps([vars(ROWS[1])]).replace("1000", "1e999").encode(),
            "row 0",
        ),
    ],
)
def test_wrong_files(artifact, name, content, message):
    if content is None:
        (artifact.folder / name).unlink()
    else:
        (artifact.folder / name).write_bytes(content)
    with pytest.raises(FormatError) as refused:
        read_artifact(artifact.folder)
    assert message in str(refused.value) and name in str(refused.value)


def test_not_an_artifact(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FormatError, match="not an artifact"):
            read_artifact(place)


def test_wrong_tensors_and_logs(artifact):
    from safetensors.torch import save_file

    path = artifact.folder / "masks.safetensors"
    one = {"main/g": torch.zeros(1, dtype=torch.uint8)}
    for metadata in (
        None,
        {"counts": "x"},
        {"counts": "[]"},
        {"counts": '{"main/g": [99]}'},
        {"counts": '{"main/g": 3}'},
        {"counts": '{"main/g": ["8"]}'},
    ):
        save_file(one, path, metadata)
        with pytest.raises(FormatError, match="not the masks"):
            read_masks(artifact)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(FormatError, match="not a safetensors file"):
        read_masks(artifact)
    path.unlink()
    with pytest.raises(FormatError, match="missing"):
        read_masks(artifact)
    log = artifact.folder / "log.jsonl"
    for line, message in (("3", "line 2 is int"), ("{", "line 2"), ('{"a": Infinity}', "line 2")):
        log.write_text('{"step": 0}\n' + line + "\n")
        with pytest.raises(FormatError, match=message):
            read_log(artifact)


@given(place=st.integers(0, 5000), junk=st.binary(min_size=1, max_size=8), cut=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["manifest.json", "measurements.json", "masks.safetensors"])
def test_any_damage_is_a_format_error(artifact, name, place, junk, cut):
    path = artifact.folder / name
    whole = path.read_bytes()
    place %= len(whole)
    try:
        path.write_bytes(whole[:place] + junk + (b"" if cut else whole[place + len(junk) :]))
        read = read_artifact(artifact.folder)
        verify(read)
        read_masks(read)
    except FormatError as problem:
        assert str(artifact.folder) in str(problem)
    finally:
        path.write_bytes(whole)


def test_reading_needs_no_torch(artifact):
    code = (
        "import sys; from gencompress.artifact import read_artifact, read_log, verify\n"
        f"a = read_artifact({str(artifact.folder)!r}); assert verify(a) == [] and read_log(a)\n"
        "assert 'torch' not in sys.modules, 'torch came in'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
