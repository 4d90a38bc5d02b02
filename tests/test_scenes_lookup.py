"""Names of embedded scenes, and what a scene.toml may say."""

from pathlib import Path

import pytest

from gencompress import scenes
from gencompress.files import FormatError


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


def test_a_scene_whose_file_is_gone(places):
    (places / "first" / "one" / "x.ply").unlink()
    with pytest.raises(FormatError, match=r"x\.ply"):
        scenes.resolve("one")


def test_the_real_one_is_there():
    assert "still_life" in scenes.names() and scenes.resolve("still_life").is_file()
