"""Names of embedded scenes, and what a scene.toml may say."""

from pathlib import Path

import pytest

from gencompress import scenes
from gencompress.files import FormatError
from gencompress.run import inspect


@pytest.fixture
def places(tmp_path, monkeypatch):
    for place, name in (("first", "one"), ("second", "one"), ("second", "two")):
        folder = tmp_path / place / name
        folder.mkdir(parents=True)
        (folder / "scene.toml").write_text('file = "x.ply"\n')
        (folder / "x.ply").write_text(place)
    monkeypatch.setattr(scenes, "_PLACES", (tmp_path / "first", tmp_path / "second"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def test_names_are_sorted_and_once(places):
    assert scenes.names() == ["one", "two"]


@pytest.mark.parametrize("form", ["{}", "scenes/{}", "./{}"])
def test_a_name_is_found_in_the_first_place(places, form):
    assert scenes.resolve(form.format("one")).read_text() == "first"
    assert scenes.resolve(form.format("two")).read_text() == "second"


def test_a_path_comes_before_a_name(places):
    Path("one").write_text("mine")
    assert scenes.resolve("one") == Path("one")


@pytest.mark.parametrize("target", ["three", "one.ply", "other/one", "../one", "/one", "scenes/"])
def test_neither_path_nor_name(places, target):
    with pytest.raises(FileNotFoundError, match="one, two"):
        scenes.resolve(target)


@pytest.mark.parametrize(
    "text",
    [b"file = ", b"\xff\xfe", b"", b"file = 3", b'file = "../x.ply"', b'file = "/x"', b'file = ""'],
)
def test_a_scene_that_says_nothing_useful(places, text):
    about = places / "first" / "one" / "scene.toml"
    about.write_bytes(text)
    with pytest.raises(FormatError, match=r"scene\.toml"):
        scenes.scene(about)


def test_the_folder_of_a_scene_stands_for_its_file(places):
    folder = places / "second" / "two"
    assert scenes.resolve(folder) == folder / "x.ply"


def test_a_capture_stands_for_its_folder(places):
    folder = places / "second" / "photos"
    folder.mkdir()
    (folder / "scene.toml").write_text('kind = "capture"\n')
    with pytest.raises(FormatError, match=r"transforms\.json"):
        scenes.resolve("photos")
    (folder / "transforms.json").write_text("{}")
    assert scenes.names() == ["one", "photos", "two"]
    assert scenes.resolve("photos") == scenes.resolve(folder) == folder


def test_a_scene_whose_file_is_gone(places):
    (places / "first" / "one" / "x.ply").unlink()
    with pytest.raises(FormatError, match=r"x\.ply"):
        scenes.resolve("one")


def test_the_real_ones_are_there():
    files = ["chair", "mug", "still_life", "still_life_trained"]
    folders = ["chair_views", "mug_views", "still_life_photos", "tiny-aptp", "tiny-eval"]
    folders += ["tiny-flux", "tiny-flux-moe", "tiny-memories", "tiny-sd"]
    assert scenes.names() == sorted(files + folders)
    for name in files:
        assert scenes.resolve(name).suffix == ".ply"
    for name in folders:
        assert scenes.resolve(name).is_dir()


def test_what_the_photos_say_of_themselves():
    found = inspect("still_life_photos")
    assert found["photos"] == 48 and found["held_out"] == 6
    assert found["sizes"] == ["200 x 200"] and found["points"] == 5000
    folder = scenes.resolve("still_life_photos")
    assert found["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.png"))
    assert found["capture"] == str(folder)


@pytest.fixture
def companion(places):
    """A scene that names masks and a truth, and the capture."""
    (places / "second" / "photos").mkdir()
    (places / "second" / "photos" / "scene.toml").write_text('kind = "capture"\n')
    (places / "second" / "photos" / "transforms.json").write_text("{}")
    folder = places / "second" / "two"
    text = 'kind = "mesh"\nfile = "x.ply"\nviews = "photos"\ntruth = "../../secret.ply"\n'
    (folder / "scene.toml").write_text(text)
    return folder


@pytest.mark.parametrize("form", ["two", "scenes/two", "./two"])
def test_a_scene_brings_its_views_and_its_truth(companion, form):
    found = scenes.companions(form)
    assert found["views"] == str(companion.parent / "photos")
    assert found["truth"] == str(companion / "secret.ply")  # beside it, whatever it says
    assert scenes.companions("one") == {}


def test_a_path_brings_nothing(companion):
    for path in (companion, companion / "x.ply"):
        assert scenes.companions(path) == {}
    Path("two").write_text("mine")
    assert scenes.companions("two") == {}
    with pytest.raises(FileNotFoundError):
        scenes.companions("three")


def test_what_is_given_comes_before_what_a_scene_brings(companion, monkeypatch):
    from gencompress import run
    from gencompress.core.budget import parse_budget
    from gencompress.recipe import Recipe

    class Package:
        @staticmethod
        def load(target, data, *rest):
            return target, data

    mine = Path("mine.ply")
    mine.write_text("")
    given = Recipe("mesh", "two", parse_budget("100%"), {"truth": str(mine)}, {}, 0)
    target, data = run._load(Package, given, None, False)
    assert target == str(companion / "x.ply")
    assert data == {"views": str(companion.parent / "photos"), "truth": str(mine)}


def test_the_real_ones_bring_theirs():
    for name in ("chair", "mug"):
        found = scenes.companions(name)
        assert Path(found["views"]) == scenes.resolve(f"{name}_views")
        assert Path(found["truth"]).is_file()
    assert scenes.companions("still_life") == {}
