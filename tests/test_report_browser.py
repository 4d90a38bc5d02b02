"""The page of a report in a real browser: sliders, themes, sorting, the 3D view."""

import math

import numpy as np
import pytest
from report_browser import browse, find_chromium
from report_samples import LOG, make_artifact, make_fit, splat

from gencompress.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with browse(chromium, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def scene_report(tmp_path):
    """Before: half-transparent red in front of green, and a long blue splat up on the right, turned
    by its rotation to run down to the right. After: red is gone."""
    red = splat((0, 0, -0.5), (0.2, 0.2, 0.2), (255, 0, 0, 128))
    green = splat((0, 0, 0.5), (0.2, 0.2, 0.2), (0, 255, 0, 255))
    w, z = (round(128 + 128 * f(math.pi / 8)) for f in (math.cos, math.sin))  # an eighth turn
    blue = splat((0.7, -0.5, 0), (0.15, 0.01, 0.01), (0, 0, 255, 255), (w, 128, 128, z))
    scene = {"before": [red, green, blue], "after": [blue, green]}
    folder = make_artifact(tmp_path / "a", log=LOG, views=3, scene=scene)
    return write_report([folder], tmp_path / "report")


def test_page_in_a_browser(page, scene_report):
    backgrounds = {}
    for width, dark in ((390, False), (1440, True), (390, True), (1440, False)):
        page.open(scene_report, width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        backgrounds[dark] = page.run("getComputedStyle(document.body).backgroundColor")
        shown = page.run(
            "[...document.querySelectorAll('.chart')].filter(e => e.clientWidth).length"
        )
        assert shown == 2  # one size of the curve, and the loss
    assert backgrounds[True] == "rgb(20, 22, 24)" and backgrounds[False] == "rgb(253, 252, 250)"
    page.run("document.getElementById('theme').click()")
    assert page.run("getComputedStyle(document.body).backgroundColor") == backgrounds[True]

    box = page.box(".compare")
    y = box["y"] + 20
    picture = page.picture()
    colour = [tuple(picture[int(y + 30), int(box["x"] + box["width"] * s)]) for s in (0.4, 0.6)]
    assert colour == [(255, 0, 0), (0, 0, 255)]  # before on the left, after on the right
    page.drag(box["x"] + box["width"] / 2, y, -box["width"] / 4, 0)
    at = "parseFloat(document.querySelector('.compare').style.getPropertyValue('--at'))"
    assert page.run(at) == pytest.approx(25, abs=1)
    picture = page.picture()
    assert tuple(picture[int(y + 30), int(box["x"] + box["width"] * 0.4)]) == (0, 0, 255)
    moved = page.run(at)
    page.key("ArrowRight")
    assert page.run(at) > moved
    page.run("document.querySelectorAll('.thumbs button')[2].click()")
    assert page.run("document.querySelector('.view:not([hidden])').dataset.name") == "view 3"

    column = "[...document.querySelectorAll('.plot tbody tr')].map(r => r.cells[2].textContent)"
    page.run("document.querySelectorAll('.plot thead button')[2].click()")
    assert [c.split("\N{NO-BREAK SPACE}")[0] for c in page.run(column)] == [
        "23.60",
        "36.80",
        "41.90",
        "missing",
    ]
    page.run("document.querySelectorAll('.plot thead button')[2].click()")
    assert [c[:5] for c in page.run(column)] == ["41.90", "36.80", "23.60", "missi"]  # still last
    assert page.errors == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data", "about"}


def test_a_fit_is_called_what_it_is(page, tmp_path):
    """Labels of the pictures, the slider and the 3D view, which has one cloud to show."""
    folders = [make_fit(tmp_path / policy, policy) for policy in ("default", "percentile")]
    report = write_report(folders, tmp_path / "report")
    for width in (390, 1440):
        page.open(report, width)
        assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelector('.compare input').ariaValueText") == "50% photo"
    if page.run("!!document.createElement('canvas').getContext('webgl2')"):
        page.box("canvas")
        page.wait("Number(document.querySelector('canvas').dataset.drawn || 0) > 0")
        tags = "[...document.querySelectorAll('.stage .tag')].slice(0, 2)"
        assert page.run(f"{tags}.map(t => t.hidden ? '' : t.textContent)") == ["", "fitted"]
        assert page.run("document.querySelector('.split').hidden")
    assert page.errors == []


def test_3d_view_blends_in_the_right_order_and_follows_the_camera(page, scene_report):
    page.open(scene_report, 1440)
    if not page.run("!!document.createElement('canvas').getContext('webgl2')"):
        pytest.skip("this Chromium offers no WebGL 2")
    assert page.run("document.querySelector('canvas').dataset.drawn") is None  # not on screen yet

    drawn = "Number(document.querySelector('canvas').dataset.drawn || 0)"

    def settled(old):
        page.wait(f"{drawn} > {old}")
        page.wait("(c => c.width === c.clientWidth)(document.querySelector('canvas'))")

    def look(mode):
        box = page.box("canvas")
        page.wait(f"{drawn} > 0")
        old = page.run(drawn)
        page.run(f"document.querySelector('.choice input[value={mode}]').click()")
        page.run("document.querySelector('[data-do=reset]').click()")
        page.run("document.querySelectorAll('.stage .tag').forEach(t => t.style.display = 'none')")
        settled(old)
        focal = 0.5 * box["height"] / math.tan(math.radians(22.5))
        # the canvas is painted on whole pixels, wherever the text above it ends
        centre = (round(box["x"]) + box["width"] / 2, round(box["y"]) + box["height"] / 2)
        return page.picture().astype(int), centre, focal, box

    picture, (cx, cy), focal, box = look("before")
    # red covers 128/255 of green, which is capped at an opacity of 0.99
    assert picture[int(cy), int(cx)] == pytest.approx([128, 0.99 * 127, 0], abs=3)
    x, y, long = cx + focal * 0.7 / 3, cy - focal * 0.5 / 3, focal * 0.15 / 3 * math.sqrt(0.5)
    near = picture[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2, 2]
    assert near.max() == pytest.approx(0.99 * 255, abs=3)
    row, column = np.unravel_index(near.argmax(), near.shape)
    x, y = int(x) - 1 + column, int(y) - 1 + row
    assert picture[int(y + long), int(x + long), 2] == pytest.approx(255 * math.exp(-0.5), abs=12)
    assert picture[int(y - long), int(x + long), 2] < 10  # not up to the right

    picture, *_ = look("after")
    assert picture[int(cy), int(cx)] == pytest.approx([0, 252, 0], abs=3)

    picture, *_ = look("split")
    below = int(cy) + 30  # clear of the knob of the divider
    assert picture[below, int(cx) - 6, 0] > 80 and picture[below, int(cx) + 6, 0] < 10

    look("before")
    page.run("document.querySelector('canvas').focus({preventScroll: true})")
    page.drag(cx, cy, box["height"] * math.pi / 2 / 3.5, 0)  # a quarter turn to the right
    page.key("Home")
    old = page.run(drawn)
    page.drag(cx, cy, box["height"] * math.pi / 2 / 3.5, 0)
    settled(old)
    turned = page.picture().astype(int)
    # What was in front (red) has gone to the right, what was behind (green) to the left.
    aside = int(focal * 0.5 / 3)
    assert turned[int(cy), int(cx) + aside, 0] > 90 > turned[int(cy), int(cx) + aside, 1]
    assert turned[int(cy), int(cx) - aside, 1] > 200 > turned[int(cy), int(cx) - aside, 0]
    assert page.errors == []
