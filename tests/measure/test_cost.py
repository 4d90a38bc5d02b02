import os

import pytest

from gencompress.measure.cost import file_bytes


def test_file_and_folder(tmp_path):
    (tmp_path / "a.ply").write_bytes(bytes(100))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / ".hidden").write_bytes(bytes(23))
    assert file_bytes(tmp_path / "a.ply") == 100
    assert file_bytes(str(tmp_path)) == 123
    assert file_bytes(tmp_path / "deep") == 23


def test_links_inside_a_folder_are_not_counted(tmp_path):
    (tmp_path / "big").write_bytes(bytes(1000))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own").write_bytes(bytes(5))
    os.symlink(tmp_path / "big", tmp_path / "folder" / "link")
    os.symlink(tmp_path, tmp_path / "folder" / "circle")
    assert file_bytes(tmp_path / "folder") == 5
    assert file_bytes(tmp_path / "folder" / "link") == 1000  # asked for by name


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_bytes(tmp_path / "absent")
