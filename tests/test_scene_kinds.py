"""Scenes that are folders (captures, pipelines, judges) and what a scene brings along."""

from pathlib import Path

import pytest

from gencompress import run, scenes
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError
from gencompress.recipe import Recipe


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Scenes in another folder than the current one, whose names it does not have."""
    place = tmp_path / "place"
    for name, text, file in (
        (
            "cut",
            'kind = "pipeline"\nprompts = "prompts.txt"\njudges = "eyes"\n',
            "model_index.json",
        ),
        ("eyes", 'kind = "judges"\n', "detector/config.json"),
        ("photos", 'kind = "capture"\n', "transforms.json"),
        ("hull", 'kind = "mesh"\nfile = "x.ply"\nviews = "photos"\ntruth = "t.ply"\n', "x.ply"),
        ("plain", 'file = "x.ply"\n', "x.ply"),
        (
            "tuned",
            'kind = "adapter"\nprompts = "cut"\njudges = "eyes"\npairs = "p.csv"\n',
            "pytorch_lora_weights.safetensors",
        ),
        ("way", 'kind = "router"\n', "router.json"),
    ):
        path = place / name / file
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        (place / name / "scene.toml").write_text(text)
    (place / "cut" / "prompts.txt").write_text("a car\n")
    (place / "hull" / "t.ply").write_text("")
    (place / "tuned" / "p.csv").write_text("")
    monkeypatch.setattr(scenes, "_PLACES", (place,))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


@pytest.mark.parametrize("name", ["cut", "eyes", "photos", "tuned", "way"])
def test_a_folder_stands_for_itself(places, name):
    for target in (name, f"scenes/{name}", places / name):
        assert scenes.resolve(target) == places / name
    assert scenes.scene(places / name / "scene.toml")["kind"] in scenes.FOLDERS


def test_other_kinds_are_files(places):
    assert scenes.names() == ["cut", "eyes", "hull", "photos", "plain", "tuned", "way"]
    assert scenes.resolve("hull") == places / "hull" / "x.ply"
    assert scenes.resolve("plain") == places / "plain" / "x.ply"


@pytest.mark.parametrize(
    ("name", "file"),
    [("cut", "model_index.json"), ("eyes", "detector/config.json"), ("photos", "transforms.json")],
)
def test_a_folder_without_its_file(places, name, file):
    (places / name / file).unlink()
    for target in (name, places / name):
        with pytest.raises(FormatError, match=file.replace(".", r"\.")):
            scenes.resolve(target)


@pytest.mark.parametrize("form", ["{}", "scenes/{}"])
def test_what_a_scene_brings(places, form):
    """Files beside it, and other scenes as what they stand for."""
    found = scenes.companions(form.format("cut"))
    assert found == {
        "prompts": str(places / "cut" / "prompts.txt"),
        "judges": str(places / "eyes"),
    }
    hull = {"views": str(places / "photos"), "truth": str(places / "hull" / "t.ply")}
    assert scenes.companions(form.format("hull")) == hull
    # what another scene has by that name, if it has it
    assert scenes.companions(form.format("tuned")) == found | {
        "pairs": str(places / "tuned" / "p.csv")
    }
    for name in ("eyes", "photos", "plain"):
        assert scenes.companions(form.format(name)) == {}


def test_a_path_brings_nothing(places):
    for path in (places / "cut", places / "cut" / "model_index.json", places / "hull" / "x.ply"):
        assert scenes.companions(path) == {}
    Path("cut").mkdir()
    assert scenes.resolve("cut") == Path("cut") and scenes.companions("cut") == {}


def test_a_companion_that_is_not_there(places):
    (places / "cut" / "prompts.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts\.txt"):
        scenes.companions("cut")
    with pytest.raises(FileNotFoundError, match="no embedded scene"):
        scenes.companions("cup")


def test_companions_stay_beside_the_scene(places):
    """A name with folders in it leads nowhere else."""
    (places.parent / "secret.txt").write_text("")
    text = 'kind = "pipeline"\nprompts = "../../secret.txt"\n'
    (places / "cut" / "scene.toml").write_text(text)
    (places / "cut" / "secret.txt").write_text("")
    assert scenes.companions("cut") == {"prompts": str(places / "cut" / "secret.txt")}
    (places / "cut" / "secret.txt").unlink()
    with pytest.raises(FileNotFoundError):
        scenes.companions("cut")


def test_a_file_here_does_not_stand_in_for_a_scene(places):
    """Only scenes are companions of scenes, whatever the current folder holds."""
    Path("eyes").mkdir()
    assert scenes.companions("cut")["judges"] == str(places / "eyes")


def test_what_is_given_comes_before_what_a_scene_brings(places):
    class Package:
        @staticmethod
        def load(target, data, *rest):
            return target, data

    mine = Path("mine.txt")
    mine.write_text("a cat\n")
    recipe = Recipe("prune", "cut", parse_budget("50%"), {"prompts": str(mine)}, {}, 0)
    target, data = run._load(Package, recipe, None, False)
    assert target == str(places / "cut")
    assert data == {"prompts": str(mine), "judges": str(places / "eyes")}


def test_which_targets_may_be_of_the_hub(places):
    """Where the method takes those; a name of a scene that is not there is a mistake."""

    def resolved(method, target):
        return run._resolved(Recipe(method, target, parse_budget("50%"), {}, {}, 0))

    assert resolved("prune", "owner/name") == Path("owner/name")
    assert resolved("prune", "cut") == places / "cut"
    for method, target in (
        ("prune", "scenes/cup"),
        ("prune", "cup"),
        ("prune", "a/b/c"),
        ("prune", "../name"),
        ("splat", "owner/name"),
    ):
        with pytest.raises(FileNotFoundError, match="no embedded scene"):
            resolved(method, target)
