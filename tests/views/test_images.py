"""Reading photos, scaling cameras to them, and never leaving the folder of the capture."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.views.images import fitted, image_size, inside, read_image, require_files


@pytest.fixture
def photographed(cameras, tmp_path):
    """Makes a camera with an image of the given pixels."""

    def make(pixels: np.ndarray, name: str = "photo.png"):
        path = tmp_path / name
        Image.fromarray(pixels).save(path)
        return replace(cameras[0], image=path, width=pixels.shape[1], height=pixels.shape[0])

    return make


def test_pixels_are_rows_of_columns_in_unit_range(photographed):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1, 2] = [255, 51, 0]
    image = read_image(photographed(pixels))
    assert image.shape == (4, 6, 3) and image.dtype == torch.float32
    assert image[1, 2].tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert image.sum() == pytest.approx(1.2)


def test_alpha_is_kept_or_composited(photographed):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = [255, 0, 0, 51]  # alpha 0.2, straight
    camera = photographed(pixels)
    assert read_image(camera)[0, 0].tolist() == pytest.approx([1, 0, 0, 0.2])
    over = read_image(camera, background=(0.5, 0.5, 1.0))
    assert over.shape == (2, 2, 3)
    assert over[0, 0].tolist() == pytest.approx([0.2 + 0.4, 0.4, 0.8])
    assert over[1, 1].tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_background_leaves_an_opaque_image_alone(photographed):
    camera = photographed(np.full((2, 2, 3), 128, np.uint8))
    assert torch.equal(read_image(camera, background=(1, 1, 1)), read_image(camera))


def test_sixteen_bit_grey_is_scaled_not_clipped(photographed):
    image = read_image(photographed(np.full((2, 2), 32_768, np.uint16)))
    assert image.shape == (2, 2, 3)
    assert image.mean() == pytest.approx(0.5, abs=1e-4)


def test_read_image_refuses(photographed, cameras, tmp_path):
    camera = photographed(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(FormatError, match="6 x 4 pixels, expected the camera's 7 x 4"):
        read_image(replace(camera, width=7))
    camera.image.write_bytes(camera.image.read_bytes()[:40])
    with pytest.raises(FormatError, match=r"photo\.png: not a readable image"):
        read_image(camera)
    with pytest.raises(ValueError, match="has no image"):
        read_image(cameras[0])
    with pytest.raises(FormatError, match="not a readable image"):
        image_size(tmp_path / "absent.png")


def test_fitted_scales_the_lens_with_the_image(photographed, cameras):
    half = photographed(np.zeros((8, 12, 3), np.uint8))
    camera = fitted(replace(cameras[0], image=half.image))
    assert (camera.width, camera.height) == (12, 8)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (10.0, 10.5, 5.5, 4.25)
    assert camera.distortion == cameras[0].distortion


def test_fitted_allows_one_pixel_of_rounding(photographed, cameras):
    photo = photographed(np.zeros((420, 648, 3), np.uint8)).image
    camera = fitted(replace(cameras[0], image=photo, width=1297, height=840))
    assert (camera.width, camera.height) == (648, 420)
    assert camera.fx == pytest.approx(20.0 * 648 / 1297)


def test_fitted_refuses_another_shape(photographed, cameras):
    photo = photographed(np.zeros((12, 12, 3), np.uint8)).image
    with pytest.raises(
        FormatError, match="12 x 12 pixels, expected the shape of the declared 24 x"
    ):
        fitted(replace(cameras[0], image=photo))


@pytest.mark.parametrize(
    "name",
    ["", ".", "/etc/passwd", "../a.png", "a/../../b", "a\\..\\..\\b", "C:\\a", "a\0b", "a" * 2000]
    + ["a" * 300],
)
def test_inside_refuses(tmp_path, name):
    with pytest.raises(FormatError, match="names the file"):
        inside(tmp_path, name, tmp_path / "transforms.json")


def test_inside_refuses_links_that_lead_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "out", tmp_path / "in" / "images")
    os.symlink("real.png", tmp_path / "in" / "alias.png")
    with pytest.raises(FormatError, match="a link leads out"):
        inside(tmp_path / "in", "images/0.png", tmp_path / "t.json")
    assert inside(tmp_path / "in", "alias.png", tmp_path / "t.json").name == "alias.png"


def test_inside_allows_a_linked_root(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "alias")
    assert inside(tmp_path / "alias", "./a b/ü.png", tmp_path / "t.json").name == "ü.png"


def test_missing_files_are_one_error(tmp_path):
    (tmp_path / "0.png").touch()
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    with pytest.raises(FormatError, match=r"5 of 6 .* missing: .*1\.png, .*3\.png and 2 more"):
        require_files(paths, tmp_path / "transforms.json")
    require_files(paths[:1], tmp_path / "transforms.json")
