"""The tool that draws the picture of the README from a demo."""

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("readme_pictures")


def test_before_above_after(tool, tmp_path):
    for name, before, after, tiles in tool.COLUMNS[:4]:
        if name == "mesh":
            continue  # a method that was not run has no column
        for file, colour in ((before, "#ff0000"), (after, "#0000ff")):
            path = tmp_path / "demo" / name / "preview" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (600, 300) if tiles else (64, 64), colour).save(path)
    tool.draw(tmp_path / "demo", tmp_path / "new" / "sheet.png")
    sheet, side, gap = Image.open(tmp_path / "new" / "sheet.png"), tool.SIDE, tool.GAP
    assert sheet.size == (3 * (side + gap) + gap, tool.TEXT + 2 * (side + gap))
    for column in range(3):
        middle = gap + column * (side + gap) + side // 2
        assert sheet.getpixel((middle, tool.TEXT + side // 2)) == (255, 0, 0)
        assert sheet.getpixel((middle, tool.TEXT + gap + side + side // 2)) == (0, 0, 255)


def test_a_tile_of_a_sheet(tool, tmp_path):
    sheet = Image.new("RGB", (600, 300), "white")
    sheet.paste("#00ff00", (200, 4, 392, 196))
    sheet.save(tmp_path / "sheet.png")
    found = tool.picture(tmp_path / "sheet.png", 1)
    assert found.size == (tool.SIDE, tool.SIDE) and found.getcolors() == [(22500, (0, 255, 0))]
