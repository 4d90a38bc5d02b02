"""Reports of meshes: models in the page, words for topology, legends, what is refused."""

import base64
import json
import re
import struct

import pytest
from report_samples import MESH_ROWS, make_artifact, make_fit, make_mesh, splat

from gencompress.files import FormatError
from gencompress.report import preview, write_report
from gencompress.report.rows import change, change_words, group_of

EVIL = "</script><script>alert('&\"')</script>"


def written(folders, out):
    page = write_report(folders, out)
    texts = [(out / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "json")]
    return page.read_text(encoding="utf-8"), texts[0], json.loads(texts[1])


def edited(folder, **changes):
    path = folder / "preview" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def glb(gltf, data=b"", *, spare=b""):
    text = gltf if isinstance(gltf, bytes) else json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    size = 28 + len(text) + len(data)
    head = struct.pack("<5I", 0x46546C67, 2, size, len(text), 0x4E4F534A)
    return head + text + struct.pack("<2I", len(data), 0x004E4942) + data + spare


def test_the_page_holds_the_models_and_says_what_their_colours_mean(tmp_path):
    folder = make_mesh(tmp_path / "a")
    page, _, _ = written([folder], tmp_path / "report")
    models = dict(re.findall(r'data-model="(\w+)">([^<]*)</script>', page))
    assert list(models) == ["before", "after", "removed"]
    for name, data in models.items():
        assert base64.b64decode(data) == (folder / "preview" / f"{name}.glb").read_bytes()
    assert "original: 12 faces shown; pruned: 10 faces shown; removed faces: 12 faces shown" in page
    assert "The faces of cube, drawn in 3D" in page and "dark red was removed." in page
    choices = re.findall(r'type="radio"[^>]*value="(\w+)"><span>([^<]*)</span>', page)
    assert choices == [
        ("before", "original"), ("after", "pruned"), ("split", "split"),
        ("removed", "removed faces"),
    ]  # fmt: skip
    assert ">mask over render</span></div>" in page and 'alt="view 1: mask over render"' in page
    assert "mask over render: blue is missing, orange lies outside</span></figcaption>" in page
    assert "meshModel = " in page and "splatModel = " not in page and "edges</button>" in page


def test_a_page_holds_only_the_viewers_it_needs(tmp_path):
    cloud = {"after": [splat((0, 0, 0), (1, 1, 1), (9, 9, 9, 9))]}
    splats = make_artifact(tmp_path / "a", scene=cloud)
    page, _, _ = written([splats], tmp_path / "one")
    assert "splatModel = " in page and "meshModel = " not in page and "edges</button>" not in page
    page, _, _ = written([splats, make_mesh(tmp_path / "b")], tmp_path / "two")
    assert "splatModel = " in page and "meshModel = " in page
    page, _, _ = written([make_artifact(tmp_path / "c", views=1)], tmp_path / "three")
    assert "Model = " not in page and "webgl2" not in page


def test_text_of_a_mesh_is_escaped(tmp_path):
    names = dict.fromkeys(("before", "after", "difference", "removed"), EVIL)
    folder = make_mesh(tmp_path / "a", title=EVIL)
    view = json.loads((folder / "preview" / "index.json").read_text())["views"][0]
    scene = {"legend": EVIL, "background": EVIL}
    edited(folder, labels=names, scene=scene, views=[{**view, "legend": EVIL}])
    page, _, _ = written([folder], tmp_path / "report")
    assert page.count("</script>") == 5  # ours, the settings and three models
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert") > 8


def test_too_many_faces_are_not_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "MAX_SHOWN", 11)
    page, _, _ = written([make_mesh(tmp_path / "a")], tmp_path / "report")
    assert "12 faces are too many to embed in a page" in page
    assert "data-model=" not in page and "webgl2" not in page


ONE = {"meshes": [{"primitives": [{"indices": 0}]}], "accessors": [{"count": 3}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 bytes, expected a glTF"),
        (glb(ONE, spare=b"more"), "expected a glTF 2.0 header"),
        (b"x" + glb(ONE)[1:], "expected a glTF 2.0 header"),
        (glb(b"{"), "one primitive"),
        (glb(b"[" * 100_000), "one primitive"),
        (glb(b"\xff\xff"), "one primitive"),
        (glb([]), "one primitive"),
        (glb({**ONE, "meshes": []}), "one primitive"),
        (glb({**ONE, "meshes": [{"primitives": [{}]}]}), "one primitive"),
        (glb({**ONE, "accessors": [{"count": None}]}, bytes(12)), "None indices"),
        (glb({**ONE, "accessors": [{"count": 4}]}, bytes(16)), "4 indices, expected three"),
        (glb({**ONE, "accessors": [{"count": -3}]}), "-3 indices"),
        (glb({**ONE, "accessors": [{"count": 3 * 10**12}]}), "inside the file"),
    ],
)
def test_a_broken_glb_is_refused_by_its_name(tmp_path, content, expected):
    folder = make_mesh(tmp_path / "a")
    (folder / "preview" / "after.glb").write_bytes(content)
    with pytest.raises(FormatError, match=expected) as caught:
        write_report([folder], tmp_path / "report")
    assert caught.value.path.endswith("after.glb") and not (tmp_path / "report").exists()


def test_two_kinds_of_models_are_refused(tmp_path):
    folder = make_mesh(tmp_path / "a")
    (folder / "preview" / "after.splat").write_bytes(b"")
    with pytest.raises(FormatError, match="expected one kind"):
        write_report([folder], tmp_path / "report")


def test_measurements_of_a_mesh_have_their_groups(tmp_path):
    page, words, report = written([make_mesh(tmp_path / "a")], tmp_path / "report")
    rows = report["artifacts"][0]["measurements"]
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row["name"])
    assert groups == {
        "size": ["file size", "vertices", "faces"],
        "quality": [row["name"] for row in MESH_ROWS[3:8]],
        "topology": ["Euler characteristic", "genus", "boundary loops"],
        "cost": ["scoring time"],
    }
    by_name = {row["name"]: change_words(row) for row in rows}
    assert by_name["faces"] == "1.09× fewer" and by_name["Chamfer distance, L1"] == "3.15× lower"
    assert by_name["silhouette IoU"] == "+0.128" and by_name["F-score at 1%"] == "+22.5\xa0points"
    assert by_name["Euler characteristic"] == "2 lower" and by_name["boundary loops"] == "4 more"
    assert by_name["genus"] == "unchanged"
    verdicts = {row["name"]: row["change"]["verdict"] for row in rows if row["change"]}
    assert verdicts["boundary loops"] == "changed" and verdicts["genus"] == "same"
    assert verdicts["silhouette IoU"] == "better"
    assert "| boundary loops | 1 | 5 | 4 more | changed |" in words
    assert "| faces | 5,120 | 4,688 |" in words  # not "5,120 faces" beside "faces"
    assert words.count("faces |") == 1 and "5,120 faces<" not in page.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("name", "unit", "group"),
    [
        ("silhouette pass", "s", "speed"),
        ("holes", "", "topology"),
        ("components", "", "topology"),
        ("non-manifold edges", "", "topology"),
        ("faces never seen", "faces", "size"),
        ("surface distance, L1", "", "quality"),
        ("pruning time", "s", "cost"),
        ("size of the experts, whole against differences", "B", "size"),
        ("similarity to training pictures by caption", "", "quality"),
        ("memory of a training step", "B", "cost"),
        ("render time", "s", "speed"),
    ],
)
def test_groups_of_other_names(name, unit, group):
    assert group_of(name, unit) == group


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("genus", 0, 1, "1 higher"),
        ("genus", 2, 1, "1 lower"),
        ("boundary loops", 5, 0, "5 fewer"),
        ("components", 1, 4, "3 more"),
        ("Euler characteristic", 2, -6, "8 lower"),
    ],
)
def test_topology_changes_in_words(name, before, after, words):
    row = {"name": name, "group": "topology", "before": before, "after": after, "unit": ""}
    row |= {"better": "lower", "change": change(before, after, "", "lower", "topology")}
    assert change_words(row) == words


def figures(page):
    """(label, figure, detail) of the headline."""
    found = r"<dt>([^<]*)</dt><dd>([^<]*)</dd>(?:<dd class=\"detail\">([^<]*)</dd>)?"
    return re.findall(found, page[page.index('<dl class="figures">') :].split("</dl>")[0])


def test_the_headline_of_a_mesh(tmp_path):
    page, words, _ = written([make_mesh(tmp_path / "a")], tmp_path / "one")
    assert figures(page) == [
        ("faces removed", "432", "5,120 → 4,688"),
        ("silhouette IoU", "0.981", "was 0.853"),
        ("boundary loops", "5", "was 1"),
    ]
    assert "**432 faces removed, 0.981 silhouette IoU, 5 boundary loops**" in words
    rows = [dict(row) for row in MESH_ROWS]
    by_name = {row["name"]: row for row in rows}
    by_name["faces"]["after"] = 1280
    by_name["genus"]["after"] = 3
    page, _, _ = written([make_mesh(tmp_path / "b", measurements=rows)], tmp_path / "two")
    assert figures(page)[0] == ("fewer", "4.0×", "faces 5,120 → 1,280")
    assert figures(page)[2] == ("genus", "3", "was 0")
    for row in rows:
        row["after"] = row["before"]
    page, _, _ = written([make_mesh(tmp_path / "c", measurements=rows)], tmp_path / "three")
    assert figures(page)[0] == ("faces removed", "0", "5,120 → 5,120")
    assert figures(page)[2] == ("genus", "0", "unchanged")


def test_a_fit_from_masks_says_so(tmp_path):
    recipe = {"method": "mesh", "verb": "fit", "target": "torus", "budget": {"keep": "100%"}}
    rows = [dict(row, before=None) for row in MESH_ROWS]
    given = {"recipe": recipe, "measurements": rows, "title": "torus"}
    folder = make_mesh(tmp_path / "a", **given)
    page, _, _ = written([folder], tmp_path / "one")
    assert "torus, fitted by the method mesh" in page
    assert "Quality is against masks that were held out." in page and "photo" not in page
    assert [label for label, _, _ in figures(page)] == [
        "faces", "silhouette IoU", "genus",
    ]  # fmt: skip
    fits = [folder, make_mesh(tmp_path / "b", **given)]
    page, _, _ = written(fits, tmp_path / "two")
    assert "quality is against masks held out." in page
    page, _, _ = written([folder, make_fit(tmp_path / "c")], tmp_path / "three")
    assert "quality is against masks or photos held out." in page
