"""Reports of fields: plain pictures beside the views, in all three files, and what is refused."""

import base64
import json
import re

import pytest
from PIL import Image
from report_samples import cube_glb, make_artifact, make_fit

from gencompress.files import FormatError
from gencompress.report import write_report
from gencompress.report.preview import read_pictures

EVIL = "</script><script>alert('&\"')</script>"
CAPTIONS = {"depth.png": "depth along the rays: 2 to 5", "shell.png": "4.0% of the cells, cut open"}


def make_nerf(folder, captions=CAPTIONS, **more):
    """An artifact of the nerf method: two views, pictures with captions, and one surface."""
    recipe = {"method": "nerf", "target": "lego", "budget": {"keep": "4%"}, "seed": 0}
    make_artifact(folder, **{"method": "nerf", "views": 2, "recipe": recipe} | more)
    for number, name in enumerate(captions):
        Image.new("RGB", (60 + 300 * number, 40), (10 * number, 90, 200)).save(
            folder / "preview" / name
        )
    cube_glb(folder / "preview" / "after.glb")
    pictures = [{"file": name, "caption": words} for name, words in captions.items()]
    return edited(folder, pictures=pictures)


def edited(folder, **changes):
    path = folder / "preview" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def written(folders, out):
    page = write_report(folders, out)
    texts = [(out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "json")]
    return page.read_text(encoding="utf-8"), texts[0], json.loads(texts[1])


def test_pictures_are_in_all_three_files(tmp_path):
    folder = make_nerf(tmp_path / "lego 4%")
    page, words, report = written([folder], tmp_path / "report")
    section = page[page.index('id="a1-pictures"') :].split("</section>")[0]
    shown = re.findall(r'src="data:image/png;base64,([^"]*)"', section)
    assert [base64.b64decode(data) for data in shown] == [
        (folder / "preview" / name).read_bytes() for name in CAPTIONS
    ]
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", section) == list(CAPTIONS.values())
    assert page.index('id="a1-views"') < page.index('id="a1-pictures"')
    assert page.index('id="a1-pictures"') < page.index('id="a1-scene"')
    assert '<a href="#a1-pictures">pictures</a>' in page
    assert report["artifacts"][0]["pictures"] == [
        {"file": f"preview/{name}", "caption": caption} for name, caption in CAPTIONS.items()
    ]
    assert (
        "## Pictures\n\n- [preview/depth.png](<../lego%204%25/preview/depth.png>): depth" in words
    )
    assert "): 4.0% of the cells, cut open\n" in words


def test_without_pictures_there_is_no_section(tmp_path):
    folders = [
        make_artifact(tmp_path / "a", views=1),
        edited(make_fit(tmp_path / "b"), pictures=[]),
    ]
    for number, folder in enumerate(folders):
        page, words, report = written([folder], tmp_path / str(number))
        assert "-pictures" not in page and "Pictures" not in words + page
        assert report["artifacts"][0]["pictures"] == []


def test_each_artifact_of_several_has_its_own(tmp_path):
    folders = [make_nerf(tmp_path / "a"), make_artifact(tmp_path / "b", title="other")]
    folders.append(make_nerf(tmp_path / "c", {"turn.png": "a turn"}))
    page, words, report = written(folders, tmp_path / "report")
    assert re.findall(r'<h3 id="(\w+)-pictures">', page) == ["a1", "a3"]
    assert words.count("### Pictures") == 2
    assert [len(a["pictures"]) for a in report["artifacts"]] == [2, 0, 1]


def test_captions_and_names_are_escaped(tmp_path):
    name = "<img src=x onerror=alert(1)> [a](b).png"
    folder = make_nerf(tmp_path / "a", {name: EVIL})
    page, words, _ = written([folder], tmp_path / "report")
    assert (
        "<script>alert" not in page and "&lt;script&gt;alert" in page and "<img src=x" not in page
    )
    assert "<script" not in words.split("```")[0] and "<img" not in words.split("```")[0]
    assert r"\[a\](b).png](<../a/preview/%3Cimg%20src%3Dx" in words


def test_a_picture_may_move(tmp_path):
    folder = make_nerf(tmp_path / "a", {"turn.gif": "a turn"})
    page, _, _ = written([folder], tmp_path / "report")
    assert "data:image/gif;base64," in page


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        ("depth.png", "pictures need texts"),
        (["depth.png"], "pictures need texts"),
        ([{"file": "depth.png"}], "pictures need texts"),
        ([{"file": "depth.png", "caption": 3}], "pictures need texts"),
        ([{"file": None, "caption": "depth"}], "pictures need texts"),
        ([{"file": "none.png", "caption": ""}], "'none.png', which does not exist"),
        ([{"file": "../manifest.json", "caption": ""}], "outside the preview folder"),
        ([{"file": "index.json", "caption": ""}], "not a PNG"),
    ],
)
def test_wrong_pictures_are_refused(tmp_path, pictures, expected):
    folder = edited(make_nerf(tmp_path / "a"), pictures=pictures)
    with pytest.raises(FormatError, match=expected):
        read_pictures(folder)
    with pytest.raises(FormatError, match=expected):
        write_report([folder], tmp_path / "report")
    assert not (tmp_path / "report").exists()
