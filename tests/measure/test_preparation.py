"""Resizing against PIL and transformers' own processors, and the files that say how."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil

from gencompress.files import FormatError
from gencompress.measure.preparation import (
    SSCD_224,
    SSCD_320,
    Preparation,
    prepare,
    read_preparation,
)

HALF = (0.5, 0.5, 0.5)


def pictures(generator, *shape):
    """Smooth with a hard edge: what a resize may ring at."""
    small = torch.randint(0, 256, (shape[0], 3, 4, 5), generator=generator).float()
    images = torch.nn.functional.interpolate(small, shape[1:3], mode="bilinear")
    images[:, :, shape[1] // 2 :, shape[2] // 3 :] = 255
    return images.permute(0, 2, 3, 1).to(torch.uint8)


def levels(prepared):
    """[N, h, w, 3] back to 0 .. 255 of a preparation with mean and deviation one half."""
    return (prepared.permute(0, 2, 3, 1) * 0.5 + 0.5) * 255


def write(folder, **values):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": HALF, "image_std": HALF, **values}))
    return folder


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (31, 17), (16, 24)])
def test_stretching_is_pils(generator, shape):
    images = pictures(generator, 2, *shape)
    found = levels(prepare(images, Preparation((16, 24), None, HALF, HALF)))
    assert found.shape == (2, 16, 24, 3)
    for image, ours in zip(images, found, strict=True):
        theirs = Image.fromarray(image.numpy()).resize((24, 16), Image.Resampling.BICUBIC)
        difference = (ours - torch.from_numpy(np.array(theirs)).float()).abs()
        if shape[0] > shape[1]:  # PIL 13 goes down first
            assert difference.mean() < 0.5
        else:
            assert difference.max() < 1.01 and difference.mean() < 0.01


def test_an_image_of_the_right_size_is_left_alone(generator):
    images = pictures(generator, 2, 16, 24)
    found = levels(prepare(images, Preparation((16, 24), None, HALF, HALF)))
    torch.testing.assert_close(found, images.float(), atol=1e-3, rtol=0)


def test_mean_and_deviation_per_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 4, 4, 3)
    found = prepare(images, Preparation((4, 4), None, (0.5, 0.1, 0.0), (0.5, 0.2, 4.0)))
    assert found.dtype == torch.float32
    assert found[0, :, 2, 3].tolist() == pytest.approx([-1, 0.5, 0.25])


def test_a_fine_pattern_is_averaged_not_sampled():
    """Stripes of one pixel: without antialiasing a fourth of the size would be black or white."""
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8)[None, None, :, None].expand(1, 64, 64, 3)
    found = levels(prepare(stripes, Preparation((16, 16), None, HALF, HALF)))
    assert (found[:, 2:-2, 2:-2] - 127.5).abs().max() < 8


def test_nothing_rings_out_of_range():
    edge = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    edge[:, :, 20:] = 255
    found = levels(prepare(edge, Preparation((30, 30), None, HALF, HALF)))
    assert found.min() >= -1e-3 and found.max() <= 255.001


def test_a_centre_is_cut_where_the_shape_is_kept():
    """Left third red, middle green, right blue: of a wide image only the middle is left."""
    image = torch.zeros(1, 20, 60, 3, dtype=torch.uint8)
    for third in range(3):
        image[:, :, 20 * third : 20 * third + 20, third] = 255
    for picture in (image, image.transpose(1, 2)):
        kept = levels(prepare(picture, Preparation((8, 8), 10, HALF, HALF)))
        assert kept.shape == (1, 8, 8, 3) and kept[..., 1].min() > 200
        stretched = levels(prepare(picture, Preparation((9, 9), None, HALF, HALF)))
        assert stretched.amax((0, 1, 2)).min() > 200


def test_both_conventions_of_sscd(generator):
    """Aspect ignored and ImageNet's mean, or the centre at mean one half."""
    grey = torch.full((1, 30, 50, 3), 128, dtype=torch.uint8)
    wide, centre = prepare(grey, SSCD_320), prepare(grey, SSCD_224)
    assert wide.shape == (1, 3, 320, 320) and centre.shape == (1, 3, 224, 224)
    value = 128 / 255
    assert wide[0, :, 7, 7].tolist() == pytest.approx(
        [(value - 0.485) / 0.229, (value - 0.456) / 0.224, (value - 0.406) / 0.225], abs=1e-5
    )
    assert centre[0, :, 7, 7].tolist() == pytest.approx([2 * value - 1] * 3, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 40), (31, 57), (90, 33)])
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 18}),
        CLIPImageProcessorPil(size={"height": 24, "width": 30}, do_center_crop=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, resample=3),
    ],
    ids=["crop", "stretch", "crop_pct"],
)
def test_as_the_processor_that_wrote_the_file(generator, tmp_path, processor, shape):
    processor.save_pretrained(tmp_path)
    images = pictures(generator, 2, *shape)
    theirs = processor(list(images.numpy()), return_tensors="pt")["pixel_values"]
    ours = prepare(images, read_preparation(tmp_path))
    assert ours.shape == theirs.shape
    level = 1 / 255 / 0.26  # of 8 bits, over CLIP's deviation
    assert (ours - theirs).abs().mean() < (0.5 if shape[0] > shape[1] else 0.01) * level


def test_reads_files(tmp_path):
    def read(**values):
        found = read_preparation(write(tmp_path, **values))
        return found.size, found.short_side

    assert read(size={"height": 8, "width": 6}) == ((8, 6), None)
    assert read(size=8) == ((8, 8), None)
    assert read(size=8, crop_size=6) == ((6, 6), 8)
    assert read(size={"shortest_edge": 9}, crop_size={"height": 7, "width": 5}) == ((7, 5), 9)
    assert read(size={"shortest_edge": 224}, crop_pct=0.875) == ((224, 224), 256)
    assert read(size={"shortest_edge": 384}, crop_pct=0.875) == ((384, 384), None)
    assert read(size=8, crop_size=6, do_center_crop=False) == ((8, 8), None)
    found = read_preparation(write(tmp_path, size=8, image_mean=[0.1, 0.2, 0.3]))
    assert found.mean == (0.1, 0.2, 0.3) and found.deviation == HALF


def test_reads_the_newer_file(tmp_path):
    values = {"image_processor": {"size": 8, "image_mean": HALF, "image_std": HALF}}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    assert read_preparation(tmp_path).size == (8, 8)
    write(tmp_path, size=9)  # both: the one that is only of images
    assert read_preparation(tmp_path).size == (9, 9)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, r"expected one size.*KeyError\('size'\)"),
        ({"size": {"longest_edge": 9}}, "expected one size"),
        ({"size": {"shortest_edge": 9}}, "of one shortest edge are not of one size"),
        ({"size": 9, "image_mean": None}, "image_mean and image_std"),
        ({"size": 9, "image_mean": [0.5]}, "expected 3 channels"),
        ({"size": 9, "image_std": [0.5, 0, 1]}, "expected 3 channels"),
        ({"size": 0}, r"size of \(0, 0\)"),
        ({"size": 8, "crop_size": 9}, r"\(9, 9\) out of a shortest edge of 8"),
        ({"size": {"height": 8, "width": 8}, "crop_size": 6}, "images stretched"),
        ({"size": 8, "do_normalize": False}, "do_normalize false"),
    ],
)
def test_refuses_files(tmp_path, values, says):
    with pytest.raises(FormatError, match=says) as error:
        read_preparation(write(tmp_path, **values))
    assert error.value.path.endswith("preprocessor_config.json")


def test_refuses_what_is_no_file(tmp_path):
    for text in (None, "{", "[1]", '"x"'):
        if text is not None:
            (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(FormatError, match="not a JSON"):
            read_preparation(tmp_path)
