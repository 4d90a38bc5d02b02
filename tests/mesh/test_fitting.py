"""`fit mesh` from masks to an artifact: the hole opens, a stopped run goes on in the same bits."""

import json

import pytest
import torch
from mesh import mesh_scenes as scenes

from gencompress import run
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.mesh import fitting
from gencompress.mesh.fitting import Config
from gencompress.mesh.formats import write_mesh
from gencompress.recipe import Recipe, RecipeError

QUICK = {"level": 3, "steps": 40, "refine": 10, "cycles": 1, "size": 96, "hold_out": 3}


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Masks of a torus, as a file."""
    found = scenes.masks_of(scenes.ring(), scenes.rig(12, 64))
    return scenes.write_npz(tmp_path_factory.mktemp("views") / "masks.npz", found)


def recipe(masks, data=None, **config):
    found = {**QUICK, **config}
    return Recipe("mesh", str(masks), parse_budget("100%"), data or {}, found, 0, verb="fit")


def fitted(masks, workdir, **config):
    config = Config(**{**QUICK, **config})
    start, data = fitting.load(str(masks), {}, "cpu", "float32", config)
    generator = torch.Generator().manual_seed(0)
    return fitting.compress(start, data, parse_budget("100%"), config, generator, workdir)


@pytest.mark.parametrize("start", ["sphere", "hull"])
def test_from_masks_to_an_artifact(masks, tmp_path, start):
    write_mesh(tmp_path / "truth.ply", scenes.ring())
    plan = recipe(masks, {"truth": str(tmp_path / "truth.ply")}, start=start)
    artifact = run.run(plan, tmp_path / "r")
    rows = {row.name: row.after for row in artifact.measurements}
    assert rows["boundary loops"] >= 2 and rows["silhouette IoU"] > 0.85
    assert rows["F-score at 1% of the diagonal"] > 0 and rows["faces"] == len(
        fitting.restore(artifact.folder / "model")
    )
    stages = [json.loads(line) for line in (artifact.folder / "log.jsonl").open()]
    events = {row["event"]: row for row in stages if row["kind"] == "event"}
    assert events["start"]["iou"] < events["deformed"]["iou"] < events["refined"]["iou"]
    assert events["pruned"]["faces"] < events["deformed"]["faces"] == 1280
    index = json.loads((artifact.folder / "preview" / "index.json").read_text())
    assert index["labels"]["after"] == "fitted" and len(index["views"]) == 4
    again = {row.name: row.after for row in run.measure_again(artifact)}
    assert again["silhouette IoU"] == rows["silhouette IoU"]


def test_a_stopped_run_goes_on_in_the_same_bits(masks, tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = fitted(masks, tmp_path / "whole").model

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fitting, "prune", stop)
        with pytest.raises(KeyboardInterrupt):
            fitted(masks, tmp_path / "stopped")
    kept = tmp_path / "stopped" / "stage1.safetensors"
    assert kept.is_file()
    before = kept.read_bytes()
    resumed = fitted(masks, tmp_path / "stopped").model
    assert kept.read_bytes() == before  # it was read, not made again
    assert torch.equal(resumed.faces, whole.faces)
    assert torch.equal(resumed.vertices, whole.vertices)


def test_a_checkpoint_of_other_settings_is_refused(masks, tmp_path):
    fitted(masks, tmp_path, cycles=0)
    with pytest.raises(FormatError, match="stage1"):
        fitted(masks, tmp_path, cycles=0, level=2)


def test_a_prediction_without_the_work(masks):
    found = run.predict(recipe(masks))
    assert found == {"masks": 8, "held out": 4, "faces at first": 1280}


@pytest.mark.parametrize(
    "config",
    [{"start": "cube"}, {"level": 0}, {"steps": 0}, {"cycles": -1}, {"format": ".xyz"},
     {"hold_out": 1}, {"across": "some"}],
)  # fmt: skip
def test_settings_that_are_wrong(masks, tmp_path, config):
    with pytest.raises(RecipeError):
        run.run(recipe(masks, **config), tmp_path / "r")


def test_what_fitting_does_not_take(masks, tmp_path):
    with pytest.raises(ValueError, match="budget"):
        config = Config(**QUICK)
        start, data = fitting.load(str(masks), {}, "cpu", "float32", config)
        fitting.compress(start, data, parse_budget("50%"), config, torch.Generator(), tmp_path)
    with pytest.raises(ValueError, match="knows only truth"):
        fitting.load(str(masks), {"prompts": "x"}, "cpu", "float32", Config())
    with pytest.raises(ValueError, match="its views are the target"):
        fitting.load(str(masks), {"views": str(masks)}, "cpu", "float32", Config())
    with pytest.raises(ValueError, match="cpu"):
        fitting.load(str(masks), {}, "cuda", "float32", Config())
