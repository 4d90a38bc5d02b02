"""Photos as rays: those of `pixel_rays`, the colours of the files, and refusals with a reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.views.camera import pixel_rays
from gencompress.views.loaders import load_views
from gencompress.views.photos import load_photos
from gencompress.views.rays import load_shots, load_shots_split, picture, shot_rays

FOX = (0.0578421, -0.0805099, -0.000980296, 0.00015575)
STRONG = (0.3, 0.1, 0.02, -0.03)
ROUNDING = 3e-7  # of numbers up to 1: a few float32 steps


@pytest.fixture
def photographed(cameras, tmp_path):
    """Makes one of the fixture's cameras see these pixels, through this mask and lens."""

    def make(number: int, pixels: np.ndarray, mask: np.ndarray | None = None, distortion=()):
        files = [tmp_path / f"{number}{kind}.png" for kind in ("", "_mask")]
        Image.fromarray(pixels).save(files[0])
        if mask is not None:
            Image.fromarray(mask).save(files[1])
        return replace(
            cameras[number],
            image=files[0],
            mask=None if mask is None else files[1],
            width=pixels.shape[1],
            height=pixels.shape[0],
            distortion=distortion,
        )

    return make


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_rays_of_cameras(shots):
    """Each pixel, asked for among all in a mixed order."""
    order = torch.randperm(len(shots.pixels), generator=torch.Generator().manual_seed(0))
    origins, directions, colors = shot_rays(shots, order)
    for found in (origins, directions, colors):
        assert found.dtype == torch.float32
    expected = [[side.reshape(-1, 3) for side in pixel_rays(c)] for c in shots.cameras]
    places, ways = (torch.cat(parts)[order] for parts in zip(*expected, strict=True))
    assert (origins - places).abs().max() <= ROUNDING * places.abs().max()
    assert (directions - ways).abs().max() <= ROUNDING
    assert (directions.double().norm(dim=1) - 1).abs().max() <= ROUNDING
    assert torch.equal(colors, shots.pixels[order].float() / 255)


@pytest.mark.parametrize("lenses", [[()], [FOX], [STRONG], [(), FOX, STRONG]])
def test_rays_are_those_of_the_cameras(photographed, lenses):
    sizes = [(16, 24), (11, 7), (16, 24), (20, 30)]
    shots = load_shots(
        [
            photographed(n, noise(*size, 3), distortion=lenses[n % len(lenses)])
            for n, size in enumerate(sizes)
        ]
    )
    assert shots.starts.tolist() == [0, 384, 461, 845, 1445]
    assert_rays_of_cameras(shots)


def test_a_ray_by_hand(photographed):
    """Half-pixel centres: pixel (x 2, y 1) of a camera at (1, 2, 3) that looks along z."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([-1.0, -2.0, -3.0])
    camera = replace(photographed(0, noise(16, 24, 3)), world_to_camera=matrix)
    camera = replace(camera, fx=10.0, fy=20.0, cx=12.0, cy=8.0)
    origins, directions, _ = shot_rays(load_shots([camera]), torch.tensor([24 + 2]))
    assert origins.tolist() == [[1.0, 2.0, 3.0]]
    slope = directions[0, :2] / directions[0, 2]
    assert slope.tolist() == pytest.approx([(2.5 - 12) / 10, (1.5 - 8) / 20], rel=1e-6)


def test_a_table_for_each_lens_and_none_without_distortion(photographed):
    def of(*lenses):
        cameras = [photographed(n, noise(16, 24, 3), None, lens) for n, lens in enumerate(lenses)]
        shots = load_shots(cameras)
        return len(shots.plane), shots.places.tolist()

    assert of((), (0.0, 0.0, 0.0, 0.0), ()) == (0, [0, 0, 0])
    assert of(FOX, FOX, FOX) == (384, [0, 0, 0])
    assert of(FOX, STRONG, FOX, ()) == (3 * 384, [0, 384, 0, 768])


def test_pixels_are_those_of_the_files(photographed):
    pixels = [noise(16, 24, 3), noise(11, 7, 4), noise(16, 24)]
    shots = load_shots([photographed(n, p, distortion=STRONG) for n, p in enumerate(pixels)])
    assert shots.has_alpha and shots.pixels.dtype == torch.uint8
    color, both, grey = (picture(shots, number).numpy() for number in range(3))
    assert (color[..., :3] == pixels[0]).all() and (color[..., 3] == 255).all()
    assert (both == pixels[1]).all()
    assert (grey[..., :3] == pixels[2][..., None]).all() and (grey[..., 3] == 255).all()
    assert torch.equal(shot_rays(shots, torch.tensor([384 + 9]))[2] * 255, shots.pixels[393:394])
    assert not load_shots([photographed(0, pixels[0])]).has_alpha


def test_masks_are_alpha_as_they_are_in_photos(photographed):
    masks = [noise(16, 24, seed=1), noise(16, 24, seed=2)]
    cameras = [
        photographed(0, noise(16, 24, 3), masks[0]),
        photographed(1, noise(16, 24, 4), masks[1]),
    ]
    shots = load_shots(cameras)
    assert shots.has_alpha
    for number, photo in enumerate(load_photos(cameras)):
        expected = torch.cat([photo.color, photo.alpha[..., None]], dim=-1)
        assert torch.equal(picture(shots, number), expected)


def test_more_than_eight_bits_are_rounded(photographed):
    levels = np.linspace(0, 65_535, 384).astype(np.uint16).reshape(16, 24)
    found = picture(load_shots([photographed(0, levels)]), 0)
    assert np.abs(found[..., 0].numpy() - levels / 257).max() <= 0.5 + 1e-3


def test_no_rays(photographed):
    shots = load_shots([photographed(0, noise(16, 24, 3))])
    found = shot_rays(shots, torch.empty(0, dtype=torch.int64))
    assert [tuple(part.shape) for part in found] == [(0, 3), (0, 3), (0, 4)]


def test_what_is_wrong_shows_before_any_photo_is_read(photographed, tmp_path):
    good = photographed(0, noise(16, 24, 3), noise(16, 24))
    told = []
    for field, kind in (("image", "photo"), ("mask", "mask")):
        gone = replace(good, **{field: tmp_path / "gone.png"})
        with pytest.raises(FormatError, match=f"gone.png: the {kind} of camera .* is missing"):
            load_shots([good, gone], told.append)
    with pytest.raises(FormatError, match="'blind': has no photo"):
        load_shots([good, replace(good, name="blind", image=None)], told.append)
    with pytest.raises(ValueError, match="'folded': its distortion .* cannot be inverted"):
        folded = replace(good, name="folded", distortion=(-3.0, 0.0, 0.0, 0.0))
        load_shots([good, folded], told.append)
    with pytest.raises(ValueError, match="no cameras"):
        load_shots([], told.append)
    assert told == []
    with pytest.raises(FormatError, match="24 x 16 pixels, expected the camera's 25 x 16"):
        load_shots([good, replace(good, width=25)], told.append)
    assert told == ["reading photos: 1 of 2", "reading photos: 2 of 2"]


def test_a_split_holds_views_out(writers, cameras, tmp_path):
    _, write_transforms, _ = writers
    write_transforms(tmp_path, cameras)
    training, held_out = load_shots_split(tmp_path, every=2)
    names = [[c.name for c in shots.cameras] for shots in (training, held_out)]
    assert names == [
        ["images/0001.png", "images/0003.png"],
        ["images/0000.png", "images/0002.png", "images/0004.png"],
    ]
    assert all(c.distortion == cameras[0].distortion for c in held_out.cameras)
    y, x = np.mgrid[:16, :24]
    expected = np.stack([x, y, 0 * x, 0 * x + 255], axis=-1)  # what the fixture writes
    for number in range(3):
        assert (picture(held_out, number).numpy() == expected).all()


def test_captures_that_cannot_be_split(writers, cameras, tmp_path):
    _, write_transforms, _ = writers
    write_transforms(tmp_path, cameras[:1])
    with pytest.raises(FormatError, match="one view; at least two are needed"):
        load_shots_split(tmp_path)
    write_transforms(tmp_path, cameras)
    (tmp_path / "images" / "0000.png").unlink()
    with pytest.raises(FormatError, match=r"1 of 5 images and masks are missing: .*0000\.png"):
        load_shots_split(tmp_path)


def test_a_real_capture(shared_data):
    cameras = load_views(shared_data / "nerf" / "fox")[::17]
    shots = load_shots(cameras)
    assert len(shots.plane) == 512 * 288 and not shots.has_alpha
    assert picture(shots, 2).shape == (512, 288, 4)
    assert_rays_of_cameras(shots)
