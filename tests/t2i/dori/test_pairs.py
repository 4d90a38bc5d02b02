"""Pairs files: what is read, and rows that are named when they are wrong."""

import csv
import json

import pytest
from PIL import Image

from gencompress.files import FormatError
from gencompress.t2i import tiny
from gencompress.t2i.dori.pairs import check_captions, load_pairs, pictures
from gencompress.t2i.pipeline import hushed


def picture(path, size=(8, 6), color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def table(path, rows, columns=("image", "caption", "type", "role")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "deep/b.png", "c.png"):
        picture(tmp_path / "pairs" / name)
    return tmp_path / "pairs"


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


def test_a_table(folder):
    rows = [
        ("a.png", "a car", "vm", ""),
        ("deep/b.png", "a cat", "", "Target"),
        ("c.png", "x", "", "control"),
    ]
    pairs = load_pairs(table(folder / "pairs.csv", rows))
    assert [pair.caption for pair in pairs] == ["a car", "a cat", "x"]
    assert [pair.type for pair in pairs] == ["VM", None, None]
    assert [pair.role for pair in pairs] == ["target", "target", "control"]
    assert pictures(pairs, 4).shape == (3, 4, 4, 3)


def test_lines_without_type_and_role(folder):
    path = folder / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"file_name": n, "text": "t"}) for n in ("a.png", "c.png"))
    )
    assert [(pair.type, pair.role) for pair in load_pairs(path)] == [(None, "target")] * 2


@pytest.mark.parametrize("name", ["../out.png", "/etc/hostname", "deep/../../out.png", "link.png"])
def test_paths_that_leave_the_folder(folder, name):
    picture(folder.parent / "out.png")
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    path = table(folder / "pairs.csv", [("a.png", "x", "", ""), (name, "y", "", "")])
    with pytest.raises(FormatError, match=r"row 2: names .* (within|out of)"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("gone.png", "x", "", "")], r"row 1: names 'gone.png', and there is no such file"),
        ([("a.png", " ", "", "")], r"row 1: caption is ' '; expected a text"),
        ([("a.png", "x", "XX", "")], r"row 1: type is 'XX'; expected VM or TM"),
        ([("a.png", "x", "", "spare")], r"row 1: role is 'spare'; expected target or control"),
        ([("a.png", "x", "", "control")], "holds no pair of role target"),
        (
            [("a.png", "x", "", ""), ("a.png", "y", "", "control")],
            r"row 2 \(a.png\): is the picture of a target and of a control",
        ),
        ([], "holds no pictures"),
    ],
)
def test_wrong_rows(folder, rows, said):
    with pytest.raises(FormatError, match=said):
        load_pairs(table(folder / "pairs.csv", rows))


def test_other_files(folder):
    for path in (folder, picture(folder / "d.png")):
        with pytest.raises(FormatError, match=r"expected a .csv or .jsonl"):
            load_pairs(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pairs(folder / "none.csv")
    (folder / "bad.jsonl").write_text('{"image": "a.png", "caption": "x", "role": 3}')
    with pytest.raises(FormatError, match="row 1: role is 3"):
        load_pairs(folder / "bad.jsonl")


def test_a_picture_that_cannot_be_read(folder):
    (folder / "a.png").write_bytes(b"not a picture")
    pairs = load_pairs(table(folder / "pairs.csv", [("a.png", "x", "", "")]))
    with pytest.raises(FormatError, match="not a readable picture"):
        pictures(pairs, 4)


def test_captions_that_the_encoder_cannot_take(folder, pipe, monkeypatch):
    short = [("a.png", "a red car", "", ""), ("c.png", " ".join("x" * (tiny.TOKENS - 2)), "", "")]
    check_captions(pipe, load_pairs(table(folder / "short.csv", short)))
    rows = [short[0], ("c.png", " ".join("x" * (tiny.TOKENS - 1)), "", "")]
    with pytest.raises(FormatError, match=r"row 2 \(c.png\): a caption of 33 tokens; .* takes 32"):
        check_captions(pipe, load_pairs(table(folder / "long.csv", rows)))
    # our tokenizer spells every byte; control characters are all that it leaves out
    rows = [short[0], ("c.png", "\x00", "", "")]
    ids = pipe.tokenizer(["\x00"]).input_ids[0]
    if {*ids} - {*pipe.tokenizer.all_special_ids}:
        special = [*pipe.tokenizer.all_special_ids, *ids]
        monkeypatch.setattr(type(pipe.tokenizer), "all_special_ids", special)
    with pytest.raises(FormatError, match=r"row 2 .* has no token that tokenizer knows"):
        check_captions(pipe, load_pairs(table(folder / "mute.csv", rows)))
