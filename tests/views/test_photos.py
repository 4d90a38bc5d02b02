"""Photos in memory: exact where they can be, masked, undistorted, and refused with a reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.views.images import read_image
from gencompress.views.loaders import load_views
from gencompress.views.photos import coverage, load_capture, load_photo, load_photos, wanted
from gencompress.views.undistort import pinhole, resample


@pytest.fixture
def photographed(cameras, tmp_path):
    """Makes a camera with a photo, and a mask, of the given pixels; no distortion unless asked."""

    def make(pixels: np.ndarray, mask: np.ndarray | None = None, distorted: bool = False, name="a"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        if mask is not None:
            Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
        return replace(
            cameras[0],
            name=name,
            image=tmp_path / f"{name}.png",
            mask=None if mask is None else tmp_path / f"{name}_mask.png",
            width=pixels.shape[1],
            height=pixels.shape[0],
            distortion=(0.3, 0.1, 0.02, -0.03) if distorted else (),
        )

    return make


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_eight_bits_stay_as_they_are(photographed):
    pixels = noise(16, 24, 3)
    pixels.reshape(-1)[:256] = np.arange(256)  # every level
    camera = photographed(pixels)
    photo = load_photo(camera)
    assert photo.color.dtype == torch.uint8 and photo.alpha is None
    assert torch.equal(photo.color, torch.from_numpy(pixels))
    assert photo.camera is camera
    assert torch.equal(wanted(photo, (0.2, 0.3, 0.4)), read_image(camera))
    assert coverage(photo) is None


def test_straight_alpha_is_composited_over_any_background(photographed):
    pixels = noise(16, 24, 4)
    pixels[0, 0] = [255, 0, 51, 51]
    camera = photographed(pixels)
    photo = load_photo(camera)
    assert torch.equal(photo.color, torch.from_numpy(pixels[..., :3]))
    assert torch.equal(photo.alpha, torch.from_numpy(pixels[..., 3]))
    for background in ((0.5, 0.0, 1.0), (0.0, 0.0, 0.0)):
        assert torch.equal(wanted(photo, background), read_image(camera, background))
    found = wanted(photo, torch.tensor([0.5, 0.0, 1.0]))
    assert found[0, 0].tolist() == pytest.approx([0.2 + 0.4, 0.0, 0.04 + 0.8])
    assert coverage(photo)[0, 0] == pytest.approx(0.2)


def test_more_than_eight_bits_are_kept(photographed):
    grey = np.full((16, 24), 32_768, np.uint16)
    photo = load_photo(photographed(grey))
    assert photo.color.dtype == torch.float32
    assert photo.color.unique().tolist() == pytest.approx([32_768 / 65_535], abs=1e-7)
    assert torch.equal(wanted(photo, (0, 0, 0)), photo.color)
    bent = load_photo(photographed(grey, distorted=True))
    assert bent.color.dtype == torch.float32


def test_a_mask_is_alpha(photographed):
    mask = np.zeros((16, 24), np.uint8)
    mask[:, 8:] = 255
    mask[:, 16:] = 51
    photo = load_photo(photographed(noise(16, 24, 3), mask))
    assert torch.equal(photo.alpha, torch.from_numpy(mask))
    assert photo.color.shape == (16, 24, 3)
    over = wanted(photo, (1.0, 0.0, 0.5))
    assert over[3, 0].tolist() == [1.0, 0.0, 0.5]
    assert over[3, 20].tolist() == pytest.approx(
        [0.8 * b + 0.2 * c / 255 for b, c in zip((1, 0, 0.5), noise(16, 24, 3)[3, 20], strict=True)]
    )


def test_a_mask_multiplies_the_alpha_of_the_photo(photographed):
    pixels = noise(16, 24, 4)
    mask = noise(16, 24)
    photo = load_photo(photographed(pixels, mask))
    expected = pixels[..., 3].astype(float) * mask / 255
    assert (photo.alpha - torch.from_numpy(expected)).abs().max() <= 0.5 + 1e-4
    assert torch.equal(photo.color, torch.from_numpy(pixels[..., :3]))


def test_masks_of_other_kinds(photographed):
    """Two-valued, and colour with what is outside transparent."""
    shape = (16, 24)
    inside = np.zeros(shape, bool)
    inside[4:9] = True
    expected = torch.from_numpy(inside) * 255
    assert torch.equal(load_photo(photographed(noise(*shape, 3), inside)).alpha, expected.byte())
    clear = np.full((*shape, 4), 255, np.uint8)
    clear[..., 3] = inside * 255
    assert torch.equal(load_photo(photographed(noise(*shape, 3), clear)).alpha, expected.byte())


def test_distorted_photos_are_resampled_with_their_mask(photographed):
    """Rounded to 8 bits again, half a level at most; what is outside the mask does not bleed in."""
    y, x = np.mgrid[:16, :24]
    pixels = np.stack([x * 10, y * 15, 200 + 0 * x], axis=-1).astype(np.uint8)
    camera = photographed(pixels, distorted=True)
    photo = load_photo(camera)
    exact = resample(read_image(camera), camera, pinhole(camera))
    assert photo.color.dtype == torch.uint8
    assert photo.camera.distortion == () and photo.camera.fx == pinhole(camera).fx
    assert (photo.color / 255 - exact).abs().max() <= 0.5 / 255 + 1e-6
    assert (exact - read_image(camera)).abs().max() > 1 / 255
    mask = np.where(x < 12, 0, 255).astype(np.uint8)
    pixels[x < 12] = [0, 255, 0]
    pixels[x >= 12] = [180, 60, 40]
    half = load_photo(photographed(pixels, mask, distorted=True))
    assert ((half.alpha > 20) & (half.alpha < 235)).any()
    assert half.color[half.alpha > 0].unique(dim=0).tolist() == [[180, 60, 40]]


def test_rounding_after_resampling_costs_little(photographed):
    """Half a level uniformly is 58.9 dB."""
    camera = photographed(noise(64, 96, 3), distorted=True)
    camera = replace(camera, fx=80.0, fy=84.0, cx=46.0, cy=30.0)
    exact = resample(read_image(camera), camera, pinhole(camera))
    error = (wanted(load_photo(camera), (0, 0, 0)) - exact).square().mean()
    assert -10 * torch.log10(error) == pytest.approx(58.9, abs=0.3)


def test_sizes_may_differ_between_views(photographed):
    cameras = [photographed(noise(16, 24, 3), name="a"), photographed(noise(10, 8, 3), name="b")]
    told = []
    photos = load_photos(cameras, told.append)
    assert [photo.color.shape for photo in photos] == [(16, 24, 3), (10, 8, 3)]
    assert told == ["reading photos: 1 of 2", "reading photos: 2 of 2"]


def test_refuses_what_does_not_fit(photographed, tmp_path):
    good = photographed(noise(16, 24, 3), noise(16, 24))
    Image.fromarray(noise(24, 16)).save(tmp_path / "turned.png")
    with pytest.raises(
        FormatError, match=r"turned\.png: a mask of 16 x 24.*expected the 24 x 16 .*a\.png"
    ):
        load_photo(replace(good, mask=tmp_path / "turned.png"))
    with pytest.raises(FormatError, match=r"a\.png: 24 x 16 pixels, expected the camera's 25 x 16"):
        load_photo(replace(good, width=25))
    Image.fromarray((noise(16, 24) > 99).astype(np.uint8)).save(tmp_path / "labels.png")
    with pytest.raises(FormatError, match=r"labels\.png: .*write inside as 255"):
        load_photo(replace(good, mask=tmp_path / "labels.png"))
    black = photographed(noise(16, 24, 3), np.zeros((16, 24), np.uint8), name="black")
    assert load_photo(black).alpha.max() == 0  # a view that sees nothing is one to learn from
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(FormatError, match=r"torn\.png: not a readable image"):
        load_photo(replace(good, image=tmp_path / "torn.png"))


@pytest.mark.parametrize("kind", ["photo", "mask"])
def test_missing_files_show_before_any_is_read(photographed, tmp_path, kind):
    good = photographed(noise(16, 24, 3), noise(16, 24))
    gone = {"photo": "image", "mask": "mask"}[kind]
    told = []
    with pytest.raises(FormatError, match=f"gone.png: the {kind} of camera 'a' is missing"):
        load_photos([good, replace(good, **{gone: tmp_path / "gone.png"})], told.append)
    with pytest.raises(FormatError, match="camera 'blind': has no photo"):
        load_photos([good, replace(good, name="blind", image=None)], told.append)
    assert told == []


def test_load_capture_holds_views_out(writers, cameras, tmp_path):
    _, write_transforms, _ = writers
    write_transforms(tmp_path, cameras)
    training, held_out = load_capture(tmp_path, every=2)
    names = [[p.camera.name for p in photos] for photos in (training, held_out)]
    assert names == [
        ["images/0001.png", "images/0003.png"],
        ["images/0000.png", "images/0002.png", "images/0004.png"],
    ]


def test_a_single_view_is_refused(writers, cameras, tmp_path):
    _, write_transforms, _ = writers
    write_transforms(tmp_path, cameras[:1])
    with pytest.raises(FormatError, match="one view; at least two are needed"):
        load_capture(tmp_path)


def test_a_real_capture(shared_data):
    photos = load_photos(load_views(shared_data / "nerf" / "fox")[::10])
    assert len(photos) == 5
    for photo in photos:
        assert photo.color.shape == (512, 288, 3) and photo.color.dtype == torch.uint8
        assert not photo.camera.distortion
