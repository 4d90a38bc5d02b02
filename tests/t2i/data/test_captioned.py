"""A user's captions: layouts that are read, and rows that are named when they are wrong."""

import csv
import json
import sys
import types
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.t2i.data.captioned import Captioned, images, load_captions, parquet_why_not

RED, BLUE = (200, 30, 30), (20, 40, 220)


def picture(path, color=RED, size=(8, 8), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **more)
    return path


def table(path, rows, columns=("file_name", "text")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def encoded(color=RED, size=(8, 8)):
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def pairs(found):
    return [(item.image.name, item.caption) for item in found]


# layouts


def test_a_folder_of_pictures_and_texts(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.JPG")
    (tmp_path / "b.txt").write_text("a red\n car \n")
    (tmp_path / "a.txt").write_text("\ufeffein grüner Frosch", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("of no picture")
    assert pairs(load_captions(tmp_path)) == [
        ("a.JPG", "ein grüner Frosch"),
        ("b.png", "a red car"),
    ]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_layout_of_hugging_face(tmp_path, form):
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "b.png")
    rows = [("one/a.png", ' a "red", car '), ("b.png", "a cat\nbelow")]
    if form == "csv":
        table(tmp_path / "metadata.csv", rows)
    else:
        rows_of_json = [{"file_name": name, "text": text} for name, text in rows]
        lines(tmp_path / "metadata.jsonl", [*rows_of_json, ""])
    found = load_captions(tmp_path)
    assert pairs(found) == [("a.png", 'a "red", car'), ("b.png", "a cat\nbelow")]
    assert found[0].image == tmp_path / "one" / "a.png"
    assert found == load_captions(tmp_path / f"metadata.{form}")


def test_other_names_of_columns(tmp_path):
    picture(tmp_path / "a.png")
    path = table(tmp_path / "mine.csv", [("7", "a cat", "a.png")], ("id", "caption", "image"))
    assert pairs(load_captions(path)) == [("a.png", "a cat")]


# what is refused


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/secret.png",
        "one/../../secret.png",
        "C:\\a.png",
        "..\\a.png",
        "x\0.png",
    ],
)
def test_a_name_that_leads_out(tmp_path, name):
    picture(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    picture(tmp_path / "set" / "a.png")
    rows = [{"file_name": "a.png", "text": "fine"}, {"file_name": name, "text": "not"}]
    path = lines(tmp_path / "set" / "metadata.jsonl", rows)
    with pytest.raises(FormatError, match=r"metadata.jsonl, row 2: names .*expected a file within"):
        load_captions(path)


def test_a_link_that_leads_out(tmp_path):
    secret = picture(tmp_path / "secret.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").symlink_to(secret)
    (folder / "a.txt").write_text("a cat")
    with pytest.raises(FormatError, match="a link leads out"):
        load_captions(folder)
    table(folder / "metadata.csv", [("a.png", "a cat")])
    with pytest.raises(FormatError, match="row 1: .*a link leads out"):
        load_captions(folder)
    (folder / "metadata.csv").unlink()
    (folder / "a.png").unlink()
    picture(folder / "a.png")
    (folder / "a.txt").unlink()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(FormatError, match="a link leads out"):
        load_captions(folder)


def test_a_link_that_stays_is_followed(tmp_path):
    picture(tmp_path / "real.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "real.png")
    table(tmp_path / "metadata.csv", [("a.png", "a cat")])
    assert len(load_captions(tmp_path)) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.png", "fine"), ("a.png", " ")], ("file_name", "text"), "row 2: text is ' '"),
        ([("a.png",)], ("file_name", "text"), "row 1: text is None"),
        ([("", "a cat")], ("file_name", "text"), "row 1: file_name is ''"),
        ([("b.png", "a cat")], ("file_name", "text"), "row 1: names 'b.png', .*no such file"),
        ([("a.png", "a cat")], ("file_name", "words"), "row 1: columns file_name, words; expected"),
        ([("a.png", "a cat")], ("where", "text"), "expected one of file_name, image, path"),
        ([], ("file_name", "text"), "holds no pictures"),
    ],
)
def test_rows_that_are_wrong(tmp_path, rows, columns, message):
    picture(tmp_path / "a.png")
    path = table(tmp_path / "mine.csv", rows, columns)
    with pytest.raises(FormatError, match=message) as caught:
        load_captions(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2: not JSON"),
        ("[1]", "row 2: .* is no table"),
        ({"file_name": 7, "text": "a"}, "row 2: file_name is 7; expected a text"),
        ({"file_name": "a.png", "text": None}, "row 2: text is None"),
    ],
)
def test_lines_that_are_wrong(tmp_path, line, message):
    picture(tmp_path / "a.png")
    path = lines(tmp_path / "mine.jsonl", [{"file_name": "a.png", "text": "fine"}, line])
    with pytest.raises(FormatError, match=message):
        load_captions(path)


def test_captions_that_are_missing(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(FormatError, match="a.png: has no caption; expected it in a.txt"):
        load_captions(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(FormatError, match="a.txt: is empty"):
        load_captions(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="a.txt: not UTF-8"):
        load_captions(tmp_path)


def test_other_sources(tmp_path):
    with pytest.raises(FormatError, match="no pictures"):
        load_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_captions(tmp_path / "nothing.csv")
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(FormatError, match="expected a folder, or a .csv"):
        load_captions(tmp_path / "a.toml")
    (tmp_path / "a.csv").write_text('file_name,text\n"a.png,unclosed')
    with pytest.raises(FormatError, match="not a table"):
        load_captions(tmp_path / "a.csv")


# parquet


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A stand-in for pyarrow that gives these rows."""
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")

    def give(rows):
        def read_table(asked):
            assert asked == path
            return types.SimpleNamespace(to_pylist=lambda: rows)

        module = types.ModuleType("pyarrow.parquet")
        module.read_table = read_table
        monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
        return path

    return give


def test_parquet_rows(parquet):
    rows = [
        {"image": {"bytes": encoded(RED), "path": "../a.png"}, "text": "a red square"},
        {"image": {"bytes": encoded(BLUE), "path": None}, "text": "a blue square"},
    ]
    found = load_captions(parquet(rows))
    assert [item.caption for item in found] == ["a red square", "a blue square"]
    assert images(found, 2)[:, 0, 0].tolist() == [list(RED), list(BLUE)]
    rows = [{"image": encoded(), "caption": "plain bytes"}]
    assert load_captions(parquet(rows))[0].caption == "plain bytes"


def test_parquet_rows_that_are_wrong(parquet):
    fine = {"image": encoded(), "text": "fine"}
    only_path = {"image": {"bytes": None, "path": "/etc/a.png"}, "text": "a cat"}
    with pytest.raises(FormatError, match="row 2: image holds no bytes"):
        load_captions(parquet([fine, only_path]))
    with pytest.raises(FormatError, match="row 1: text is None"):
        load_captions(parquet([fine | {"text": None}]))
    with pytest.raises(FormatError, match="row 1: columns picture, text"):
        load_captions(parquet([{"picture": b"", "text": "a"}]))


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"no")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "needs the package pyarrow" in parquet_why_not()
    with pytest.raises(ImportError, match="train.parquet: reading .parquet needs"):
        load_captions(path)


def test_real_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert parquet_why_not() is None
    rows = [{"image": {"bytes": encoded(), "path": "a.png"}, "text": "a cat"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_captions(tmp_path / "a.parquet")[0].image == encoded()
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(FormatError, match="not a parquet file"):
        load_captions(tmp_path / "a.parquet")


# pictures


def item(path):
    return Captioned(path, "", f"row of {path.name}")


def test_the_square_in_the_middle(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (10, 200, 90)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    found = images([item(tmp_path / "wide.png"), item(tmp_path / "tall.png")], 5)
    assert found.dtype == torch.uint8 and found.shape == (2, 5, 5, 3)
    assert (found == torch.tensor([10, 200, 90])).all()
    with pytest.raises(FormatError, match="row of wide.png: 30 x 10 pixels, expected a square"):
        images([item(tmp_path / "wide.png")], 5, strict=True)


def test_a_square_of_the_right_size_is_kept_exactly(tmp_path, generator):
    pixels = torch.randint(0, 256, (9, 9, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    assert torch.equal(images([item(tmp_path / "a.png")], 9, strict=True)[0], pixels)


def test_transparent_turned_grey_and_deep_pictures(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:, 2:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    sides = np.zeros((4, 4, 3), np.uint8)
    sides[:2] = 255
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(sides).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)).save(tmp_path / "deep.png")
    names = ("clear", "turned", "grey", "deep")
    found = images([item(tmp_path / f"{name}.png") for name in names], 4)
    assert found[0, 0, 0].tolist() == [255] * 3 and found[0, 0, 3].tolist() == [200, 0, 0]
    assert found[1, 0, 0].tolist() == [0] * 3 and found[1, 3, 0].tolist() == [255] * 3
    assert (found[2:] == 77).all()


@pytest.mark.parametrize("broken", [b"", b"no picture", encoded()[:40]])
def test_broken_pictures_are_named(tmp_path, broken):
    (tmp_path / "a.png").write_bytes(broken)
    with pytest.raises(FormatError, match="row of a.png: not a readable picture"):
        images([item(tmp_path / "a.png")], 4)
    with pytest.raises(FormatError, match="row 3: not a readable picture"):
        images([Captioned(broken, "", "row 3")], 4)


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(FormatError, match="not a readable picture"):
        images([item(tmp_path / "a.png")], 4)


def test_none_and_no_size():
    assert images([], 4).shape == (0, 4, 4, 3)
    with pytest.raises(ValueError, match="size 0"):
        images([], 0)
