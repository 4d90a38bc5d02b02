"""Files are whole or absent, and what was there before is never lost."""

import os

import pytest

from gencompress.files import writing


def folder(path, text):
    path.mkdir()
    (path / "a").write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_old_one_survives_a_block_that_fails(tmp_path, kind):
    path = tmp_path / "x"
    path.write_text("old") if kind == "file" else folder(path, "old")
    with pytest.raises(RuntimeError), writing(path, overwrite=True) as part:
        part.write_text("half")
        raise RuntimeError
    assert (path if kind == "file" else path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_comes_back_if_its_replacement_cannot_be_moved(tmp_path, monkeypatch):
    path = tmp_path / "x"
    folder(path, "old")

    def fails(source, target):
        raise OSError("no")

    with pytest.raises(OSError, match="no"), writing(path, overwrite=True) as part:
        folder(part, "new")
        monkeypatch.setattr(os, "replace", fails)
    assert (path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    folder(path, "old")
    (path / "b").write_text("old")
    with writing(path, overwrite=True) as part:
        folder(part, "new")
    assert (path / "a").read_text() == "new" and [p.name for p in path.iterdir()] == ["a"]


def test_an_existing_path_is_refused_before_the_work(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError, match="x: exists"), writing(tmp_path / "x"):
        raise AssertionError("the block ran")
