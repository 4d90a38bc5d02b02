"""Files are whole or absent, and what was there before is never lost."""

import os
import shutil
import stat

import pytest
import torch
from full_disk import no_file_over
from safetensors import safe_open

from gencompress.files import save_tensors, writing


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


def test_tensors_come_back_with_the_permissions_of_any_file(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.uint8)}
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    finally:
        os.umask(old)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"k": "v"} and set(file.keys()) == {"a", "b"}
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


def test_tensors_that_cannot_be_written_are_an_oserror(tmp_path):
    path = tmp_path / "x.safetensors"
    with no_file_over(1000), pytest.raises(OSError, match=r"File too large: .*x\.safe") as stop:
        save_tensors(path, {"a": torch.zeros(5000)}, {})
    assert stop.value.filename == str(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        save_tensors(tmp_path / "absent" / "x", {}, {})


def test_an_error_about_another_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError) as stop, writing(tmp_path / "x"):
        (tmp_path / "absent").read_text()
    assert stop.value.filename == str(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["bytes", "tensors", "copy", "copies"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, kind):
    """Python names no file where a write fails, shutil lists tuples, tensors a hidden folder."""
    path, source = tmp_path / "out" / "x", tmp_path / "source"
    path.parent.mkdir()
    folder(source, "much" * 1000)
    fill = {
        "bytes": lambda part: part.write_bytes(bytes(4000)),
        "tensors": lambda part: save_tensors(part, {"a": torch.zeros(1000)}, {}),
        "copy": lambda part: shutil.copyfile(source / "a", part),
        "copies": lambda part: shutil.copytree(source, part),
    }[kind]
    with pytest.raises(OSError) as stop, no_file_over(1000), writing(path) as part:
        fill(part)
    words = str(stop.value)
    assert str(path) in words and "File too large" in words
    assert ".part" not in words and len(words.splitlines()) == 1
    assert list(path.parent.iterdir()) == []
