"""Pictures as files: sheets that a report takes, and samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.report.preview import read_previews
from gencompress.t2i import pictures, tiny
from gencompress.t2i.evaluate import EvaluationSet
from gencompress.t2i.pipeline import save_pipeline
from gencompress.t2i.sample import grid, sample


def wanted(count, prompts=None, seeds=None):
    prompts = prompts or [f"prompt {i}" for i in range(count)]
    many = tuple(prompts[i % len(prompts)] for i in range(count))
    return EvaluationSet(many, tuple(seeds or range(count)), steps=3, size=64)


def painted(value, size=64):
    """In place of `make_images`: picture i has i in red, `value` in green; the left half is black
    in blue, the right half white."""

    def make(pipe, asked, progress=None):
        images = torch.zeros(len(asked.prompts), size, size, 3, dtype=torch.uint8)
        images[..., 0] = torch.arange(len(images)).view(-1, 1, 1)
        images[..., 1] = value[pipe]
        images[:, :, size // 2 :, 2] = 255
        make.asked.append(asked)
        return images

    make.asked = []
    return make


@pytest.fixture
def paint(monkeypatch):
    def use(before=100, after=110, size=64):
        make = painted({"before": before, "after": after}, size)
        monkeypatch.setattr(pictures, "make_images", make)
        return make

    return use


def preview(folder, asked):
    (folder / "preview").mkdir()
    pictures.write_preview("before", "after", asked, folder / "preview")
    return read_previews(folder)[0]


def opened(path):
    return torch.from_numpy(np.array(Image.open(path)))


# previews


def test_a_report_takes_the_preview(tmp_path, paint):
    make = paint()
    views = preview(tmp_path, wanted(40))
    assert [view["name"] for view in views] == [f"held-out prompts, sheet {i}" for i in (1, 2)]
    for view in views:
        assert "3 steps" in view["caption"] and view["legend"].startswith("times 2")
        for name in ("before", "after", "difference"):
            assert view[name].startswith("data:image/png;base64,")
    assert views[0]["before"] != views[1]["before"] and views[0]["before"] != views[0]["after"]
    names = {path.name for path in (tmp_path / "preview").iterdir()}
    sheets = {f"{n}_{i}.png" for n in ("before", "after", "difference") for i in (1, 2)}
    assert names == {"index.json", *sheets}
    assert make.asked[0] == make.asked[1]
    assert (make.asked[0].steps, make.asked[0].size) == (3, 64)


def test_sheets_hold_six_pictures_in_the_order_of_the_prompts(tmp_path, paint):
    paint()
    preview(tmp_path, wanted(40))
    for number in (1, 2):
        sheet = opened(tmp_path / "preview" / f"before_{number}.png")
        images = torch.zeros(6, 192, 192, 3, dtype=torch.uint8)
        images[..., 0] = torch.arange(6 * (number - 1), 6 * number).view(-1, 1, 1)
        images[..., 1] = 100
        images[:, :, 96:, 2] = 255
        texts = [f"prompt {i}" for i in range(6 * (number - 1), 6 * number)]
        assert torch.equal(sheet, grid(images, texts, 3))


def test_the_difference_is_after_less_before_on_gray(tmp_path, paint):
    for name, before, after, green in (
        ("more", 100, 110, 148),
        ("less", 110, 100, 108),
        ("most", 0, 255, 255),
        ("least", 255, 0, 0),
    ):
        (tmp_path / name).mkdir()
        paint(before, after)
        preview(tmp_path / name, wanted(2))
        sheet = opened(tmp_path / name / "preview" / "difference_1.png")
        assert sheet[50, 50].tolist() == [128, green, 128], name


@pytest.mark.parametrize(
    ("count", "prompts", "expected"),
    [
        (2, None, [2]),
        (7, None, [6, 1]),
        (12, None, [6, 6]),
        (13, None, [6, 6]),
        (10, ["the one"], [6, 4]),
        (5, ["one", "two"], [5]),
    ],
)
def test_few_prompts(tmp_path, paint, count, prompts, expected):
    make = paint()
    asked = wanted(count, prompts, range(7, 7 + count))
    views = preview(tmp_path, asked)
    assert len(views) == len(expected)
    few = make.asked[0]
    assert few.prompts == asked.prompts[:12] and few.seeds == asked.seeds[:12]
    for number, held in enumerate(expected, 1):
        sheet = opened(tmp_path / "preview" / f"before_{number}.png")
        across = min(held, 3)
        assert sheet.shape[1] == across * (192 + 4) + 4
        assert sheet.shape[0] > -(-held // 3) * 192


def test_the_real_pictures_are_those_of_the_pipelines(tmp_path):
    one, other = (tiny.mini_pipeline("sd", seed) for seed in (0, 1))
    asked = EvaluationSet(("a red car", "a cat"), (3, 4), steps=1, size=64)
    (tmp_path / "preview").mkdir()
    pictures.write_preview(one, other, asked, tmp_path / "preview")
    for name, pipe in (("before", one), ("after", other)):
        images = sample(pipe, asked.prompts, seeds=asked.seeds, steps=1, size=64)
        expected = grid(pictures.resized(images), asked.prompts, 3)
        assert torch.equal(opened(tmp_path / "preview" / f"{name}_1.png"), expected)


# sizes on a sheet


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 192), (64, 192), (65, 130), (96, 192), (100, 100), (192, 192)]
)
def test_small_pictures_are_whole_times_as_large(size, expected, generator):
    images = torch.randint(0, 256, (2, size, size, 3), generator=generator, dtype=torch.uint8)
    found = pictures.resized(images)
    assert found.shape == (2, expected, expected, 3) and found.dtype == torch.uint8
    place = torch.arange(expected) * size // expected
    assert torch.equal(found, images[:, place][:, :, place])


@pytest.mark.parametrize("size", [193, 384, 1024])
def test_large_pictures_are_shrunk(size, generator):
    noise = torch.randint(0, 256, (2, size, size, 3), generator=generator, dtype=torch.uint8)
    found = pictures.resized(noise)
    assert found.shape == (2, 192, 192, 3) and found.dtype == torch.uint8
    assert (found.double().mean((1, 2)) - noise.double().mean((1, 2))).abs().max() < 2
    if size == 1024:  # means of many pixels, not some of them
        assert found.double().std() < 0.4 * noise.double().std()
    ramp = (torch.arange(size) * 255 / (size - 1)).round().byte().expand(1, 3, size, size)
    row = pictures.resized(ramp.permute(0, 2, 3, 1))[0, 50, :, 1]
    middles = (torch.arange(192) + 0.5) * 255 / 192
    assert (row.double() - middles)[2:-2].abs().max() < 1.6


def test_large_pictures_make_small_sheets(tmp_path, paint):
    paint(size=1024)
    preview(tmp_path, wanted(2))
    assert opened(tmp_path / "preview" / "before_1.png").shape[1] == 2 * (192 + 4) + 4


# samples


def test_samples_are_numbered(tmp_path, paint):
    paint()
    paths = pictures.write_samples("before", wanted(11), tmp_path)
    names = [f"{i:04}.png" for i in range(1, 12)]
    assert [path.name for path in paths] == [*names, "sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "sheet.png"]
    for i, path in enumerate(paths[:-1]):
        image = opened(path)
        assert image.shape == (64, 64, 3) and image[0, 0].tolist() == [i, 100, 0]
        assert image[0, -1].tolist() == [i, 100, 255]
    sheet = opened(paths[-1])
    assert sheet.shape[1] == 4 * 196 + 4 and sheet.shape[0] > 3 * 196
    assert sheet[10, 10].tolist() == [0, 100, 0] and sheet[10, 210].tolist() == [1, 100, 0]


def test_drawing_from_a_folder(tmp_path):
    """In float32 on a CPU, the seeds counting on."""
    pipe = tiny.mini_pipeline("sd")
    save_pipeline(pipe, tmp_path / "half", dtype=torch.float16)
    prompts, said = ["a red car", "a cat"], []
    how = {"steps": 1, "guidance": 2.0, "size": 64, "strict": True, "progress": said.append}
    (tmp_path / "out").mkdir()
    paths = pictures.draw(str(tmp_path / "half"), prompts, 5, tmp_path / "out", **how)
    assert len(paths) == 3 and said
    whole = pictures.load_pipeline(tmp_path / "half", dtype=torch.float32)
    expected = sample(whole, prompts, seeds=[5, 6], steps=1, guidance=2.0, size=64)
    for path, image in zip(paths, expected, strict=False):
        assert torch.equal(opened(path), image)
    with pytest.raises(ValueError, match="longer than"):
        pictures.draw(str(tmp_path / "half"), ["red " * 90], 0, tmp_path / "out", **how)


def test_the_index_is_plain_text(tmp_path, paint):
    paint()
    preview(tmp_path, wanted(2))
    index = json.loads((tmp_path / "preview" / "index.json").read_text(encoding="utf-8"))
    assert index.keys() == {"views"} and len(index["views"]) == 1
