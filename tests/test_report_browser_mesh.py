"""Meshes in the 3D view of a page, in a real browser: depth, sides, light, edges, refusals."""

import json
import math
import struct

import pytest
from report_browser import browse, find_chromium
from report_samples import COLOURS, make_mesh

from gencompress.mesh.shade import AMBIENT, BACK
from gencompress.report import write_report

DRAWN = "Number(document.querySelector('canvas').dataset.drawn || 0)"
FOCAL = 0.5 / math.tan(math.radians(22.5))  # in heights of the stage


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with browse(chromium, tmp_path_factory.mktemp("profile")) as opened:
        opened.open(empty(tmp_path_factory.mktemp("empty")), 800)
        if not opened.run("!!document.createElement('canvas').getContext('webgl2')"):
            pytest.skip("this Chromium offers no WebGL 2")
        yield opened


def empty(folder):
    (folder / "empty.html").write_text("<!doctype html>")
    return folder / "empty.html"


def opened(page, folder, out, width=1440):
    """The stage of a report with this one mesh, drawn."""
    page.open(write_report([folder], out), width)
    box = page.box("canvas")
    page.wait(f"{DRAWN} > 0")
    page.run("document.querySelectorAll('.stage .tag').forEach(t => t.style.opacity = 0)")
    return box


def look(page, action):
    """The picture after some JavaScript, once it is drawn in full."""
    old = page.run(DRAWN)
    page.run(action)
    return settled(page, old)


def settled(page, old):
    page.wait(f"{DRAWN} > {old}")
    page.wait("(c => c.width === c.clientWidth)(document.querySelector('canvas'))")
    return page.picture().astype(int)


def choose(mode):
    return f"document.querySelector('.choice input[value={mode}]').click()"


def press(what):
    return f"document.querySelector('[data-do={what}]').click()"


def lit(colour, x, y, depth, *, back=False):
    """A face square to the camera's axis, where its point (x, y, depth) shows."""
    light = AMBIENT + (1 - AMBIENT) * depth / math.hypot(x, y, depth)
    return [c * light * (b if back else 1) for c, b in zip(colour, BACK, strict=True)]


def test_sides_are_lit_and_hide_each_other(page, tmp_path):
    box = opened(page, make_mesh(tmp_path / "a"), tmp_path / "report")
    focal, height = FOCAL * box["height"], box["height"]
    cx, cy = box["x"] + box["width"] / 2, box["y"] + height / 2

    def at(picture, x, y, depth):
        return picture[int(cy + focal * y / depth), int(cx + focal * x / depth)]

    front, behind = COLOURS[0], COLOURS[1]
    before = look(page, choose("before"))
    for x, y in ((0.05, 0), (0.45, 0.4), (-0.4, -0.45)):  # front: 2.5 away; first in the file
        assert at(before, x, y, 2.5) == pytest.approx(lit(front, x, y, 2.5), abs=4)
    assert list(at(before, 0.8, 0, 2.5)) == [0, 0, 0]

    after = look(page, choose("after"))  # no front: the inside of the far side, and of a near one
    for x, y in ((0.05, 0), (0.3, -0.4)):
        assert at(after, x, y, 3.5) == pytest.approx(lit(behind, x, y, 3.5, back=True), abs=4)
    light = AMBIENT + (1 - AMBIENT) * 0.5 / math.hypot(0.5, 0.05, 3)
    yellow = [c * light * b for c, b in zip(COLOURS[3], BACK, strict=True)]
    assert at(after, 0.5, 0.05, 3) == pytest.approx(yellow, abs=3)
    removed = look(page, choose("removed"))
    assert at(removed, 0.05, 0, 2.5) == pytest.approx(lit((120, 0, 40), 0.05, 0, 2.5), abs=4)
    tags = "[...document.querySelectorAll('.stage .tag')].slice(0, 2)"
    assert page.run(f"{tags}.map(t => t.hidden ? '' : t.textContent)") == ["removed faces", ""]

    split = look(page, choose("split"))  # clear of the divider and its knob
    assert at(split, -0.1, 0.3, 2.5) == pytest.approx(lit(front, 0.1, 0.3, 2.5), abs=4)
    assert at(split, 0.1, 0.3, 3.5) == pytest.approx(lit(behind, 0.1, 0.3, 3.5, back=True), abs=4)
    assert page.run(f"{tags}.map(t => t.hidden ? '' : t.textContent)") == ["original", "pruned"]

    # a quarter turn to the right brings the side at -x to the front
    look(page, choose("before"))
    page.run("document.querySelector('canvas').focus({preventScroll: true})")
    old = page.run(DRAWN)
    page.drag(cx, cy, height * math.pi / 2 / 3.5, 0)
    turned = settled(page, old)
    assert at(turned, 0.2, 0.1, 2.5) == pytest.approx(lit(COLOURS[2], 0.2, 0.1, 2.5), abs=6)
    white = look(page, press("background"))
    assert list(at(white, 0.9, 0, 2.5)) == [255, 255, 255]
    assert page.errors == []


def test_edges_can_be_drawn(page, tmp_path):
    box = opened(page, make_mesh(tmp_path / "a"), tmp_path / "report")
    cx, cy = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    plain = look(page, choose("before"))
    lined = look(page, press("edges"))
    middle = plain[int(cy), int(cx)].sum()  # the diagonal of the front goes through the middle
    assert lined[int(cy), int(cx)].sum() < 0.6 * middle
    aside = int(cx + 0.1 * box["height"])
    assert abs(lined[int(cy), aside] - plain[int(cy), aside]).max() <= 1
    assert page.run("document.querySelector('[data-do=edges]').ariaPressed") == "true"
    assert (look(page, press("edges")) == plain).all()


def test_a_mesh_without_a_camera_is_seen_from_above_its_front(page, tmp_path):
    folder = make_mesh(tmp_path / "a")
    path = folder / "preview" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"camera": None}))
    box = opened(page, folder, tmp_path / "report", 390)
    picture = look(page, choose("before"))
    x, y = int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)
    reach = int(0.2 * box["width"])
    left, right, above = (
        picture[y + reach, x - reach],
        picture[y + reach, x + reach],
        picture[y - reach, x],
    )
    assert left[1] > 2 * left[0] and right[1] > 2 * right[2] < right[0]  # green at +z, yellow at +x
    assert min(above) > 100  # and white on top, at +y
    y0, x0 = int(box["y"]) + 4, int(box["x"]) + 4
    stage = picture[y0 : y0 + int(box["height"]) - 8, x0 : x0 + int(box["width"]) - 8]
    rim = [stage[0], stage[-1], stage[:, 0], stage[:, -1]]
    assert max(part.max() for part in rim) == 0  # all of it is in the picture
    assert page.run("document.documentElement.scrollWidth") <= 390


def remade(path, edit):
    """The GLB with another JSON chunk."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    gltf = json.loads(data[20 : 20 + length])
    rest = bytearray(data[20 + length :])
    edit(gltf, rest)
    text = json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    size = 20 + len(text) + len(rest)
    head = struct.pack("<5I", 0x46546C67, 2, size, len(text), 0x4E4F534A)
    path.write_bytes(head + text + rest)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda g, _: g["nodes"][0].update(translation=[1, 0, 0]), "its node is transformed"),
        (lambda g, _: g.update(extensionsRequired=["KHR_draco"]), "it needs KHR_draco"),
        (lambda g, _: g["accessors"][0].update(componentType=5123), "POSITION is not VEC3"),
        (lambda g, _: g["accessors"][1].pop("normalized"), "COLOR_0 is not VEC4"),
        (lambda g, _: g["accessors"][0].update(count=10**6), "POSITION ends outside"),
        (lambda g, _: g["bufferViews"][1].update(byteStride=8), "not in the binary chunk, packed"),
        (lambda g, _: g["meshes"][0]["primitives"][0].update(mode=1), "one primitive of triangles"),
        (lambda g, d: d.__setitem__(slice(-4, None), b"\xff" * 4), "an index 4294967295 of 20"),
        (lambda g, d: d.__setitem__(slice(8, 12), b"\0\0\xc0\x7f"), "a vertex that is not finite"),
    ],
)
def test_what_the_viewer_cannot_read_it_names(page, tmp_path, edit, expected):
    folder = make_mesh(tmp_path / "a")
    remade(folder / "preview" / "after.glb", edit)
    page.open(write_report([folder], tmp_path / "report"), 1440)
    page.box("canvas")
    message = "document.querySelector('.stage .message').textContent"
    page.wait(f"{message}.includes('cannot be drawn')")
    assert expected in page.run(message)
    assert page.run(DRAWN) == 0
