"""The box of a scene: from masks, from points, or from where cameras look."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gencompress.files import FormatError
from gencompress.views import bounds
from gencompress.views.bounds import focus, inside, scene_box
from gencompress.views.camera import Camera, pixel_rays, project
from gencompress.views.rays import load_shots_split, picture
from gencompress.views.rig import fibonacci_rig, orbit_rig

SCENES = Path(__file__).resolve().parents[2] / "scenes"
MIDDLE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
STRONG = (0.3, 0.1, 0.02, -0.03)


def rig(views: int = 24, distortion=(), radius: float = 1.0):
    found = fibonacci_rig(MIDDLE, radius, views, width=40, height=32)
    return [replace(camera, distortion=distortion) for camera in found]


def seen(cameras, middle, axes):
    """Masks uint8 of an ellipsoid with half axes [3]."""
    middle, axes = (torch.as_tensor(side, dtype=torch.float64) for side in (middle, axes))
    masks = []
    for camera in cameras:
        origins, ways = (side / axes for side in pixel_rays(camera))
        apart = origins - middle / axes
        along = (apart * ways).sum(-1) / (ways * ways).sum(-1)
        masks.append(((apart - along[..., None] * ways).norm(dim=-1) < 1).byte() * 255)
    return masks


@pytest.mark.parametrize("distortion", [(), STRONG, (-0.2, 0.05, 0.01, -0.02)])
@pytest.mark.parametrize(
    ("middle", "axes"),
    [
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        ([1.3, 1.8, 3.2], [0.4, 0.4, 0.4]),  # not where the cameras look
        ([1.0, 2.0, 3.0], [0.8, 0.3, 0.1]),
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1]),  # three pixels wide
    ],
)
def test_masks_carve_a_cube_about_the_object(distortion, middle, axes):
    cameras = rig(distortion=distortion)
    low, high, how = scene_box(cameras, None, seen(cameras, middle, axes))
    assert how == "what the masks of 24 photos leave"
    assert low.dtype == high.dtype == torch.float64 and low.shape == high.shape == (3,)
    torch.testing.assert_close(high - low, (high - low)[:1].expand(3))
    middle, axes = torch.tensor(middle), torch.tensor(axes)
    assert (low <= middle - axes).all() and (high >= middle + axes).all()
    pixel = float((cameras[0].position - MIDDLE).norm()) / cameras[0].fx
    assert (high - low)[0] / 2 <= 1.3 * axes.max() + 2 * pixel
    assert inside(cameras, low, high) == []


def test_the_cube_is_about_what_was_carved_not_about_the_first_guess():
    cameras = rig()
    centres = []
    for middle in ([0.6, 2.0, 3.0], [1.0, 2.4, 2.7]):
        low, high, _ = scene_box(cameras, None, seen(cameras, middle, [0.3, 0.3, 0.3]))
        assert ((low + high) / 2 - torch.tensor(middle)).abs().max() < 0.1
        centres.append((low + high) / 2)
    assert (centres[0] - centres[1]).norm() > 0.5


def test_parallel_cameras_carve_too():
    """Their axes meet nowhere, but what they see does."""
    camera = rig(1)[0]
    moved = [camera.world_to_camera.clone() for _ in range(6)]
    for number, matrix in enumerate(moved):
        matrix[0, 3] += 0.4 * (number - 2.5)
        matrix[1, 3] += 0.4 * (number % 2 - 0.5)
    cameras = [replace(camera, world_to_camera=matrix) for matrix in moved]
    low, high, _ = scene_box(cameras, None, seen(cameras, MIDDLE, [0.3, 0.3, 0.3]))
    assert (low <= MIDDLE - 0.3).all() and (high >= MIDDLE + 0.3).all()
    assert (high - low)[0] / 2 < 0.7 * (camera.position - MIDDLE).norm()
    assert inside(cameras, low, high) == []


def test_a_wrong_mask_cuts_nothing_off():
    """One in twenty may miss half of the object, and views without anything say nothing."""
    cameras = rig(25)
    masks = seen(cameras, MIDDLE, [0.5, 0.5, 0.5])
    masks[4][:, :20] = 0
    masks[9].zero_()
    masks[11], masks[12] = None, torch.full_like(masks[12], 255)
    low, high, how = scene_box(cameras, None, masks)
    assert "23 photos" in how
    assert (low <= MIDDLE - 0.5).all() and (high >= MIDDLE + 0.5).all()
    for number in range(6):
        masks[2 * number][:, :20] = 0
    cut = scene_box(cameras, None, masks)
    assert (cut[0] > MIDDLE - 0.5).any() or (cut[1] < MIDDLE + 0.5).any()


def test_space_that_few_cameras_see_is_no_object():
    """Cameras above a plate: the cone below it is seen by some of them, and never against empty."""
    cameras = fibonacci_rig(MIDDLE, 1.0, 42, width=40, height=32, min_elevation=10.0)
    low, high, _ = scene_box(cameras, None, seen(cameras, MIDDLE, [0.8, 0.05, 0.8]))
    assert (low <= MIDDLE - torch.tensor([0.8, 0.05, 0.8])).all()
    assert (high - low)[0] / 2 < 1.2


@pytest.mark.parametrize("distortion", [(), STRONG, (-0.1, 0.0, 0.01, -0.02)])
def test_a_ball_that_shows_is_never_called_empty(distortion, generator):
    """Through a wide lens, with one white pixel: where its surface shows farthest to a side."""
    eye = torch.eye(4, dtype=torch.float64)
    lens = {"fx": 100.0, "fy": 100.0, "cx": 200.0, "cy": 150.0, "width": 400, "height": 300}
    camera = Camera(eye, **lens, distortion=distortion)
    around = torch.randn(1000, 3, generator=generator, dtype=torch.float64)
    around = 0.3 * torch.nn.functional.normalize(around, dim=1)
    judged = 0
    for _ in range(40):
        x, y, z = torch.rand(3, generator=generator, dtype=torch.float64)
        place = torch.stack([3 * x - 1.5, 2 * y - 1, torch.ones_like(z)]) * (1.5 + 2 * z)
        spots = project(camera, place + around)[0]
        if (
            spots.isnan().any()
            or (spots < 0).any()
            or (spots >= spots.new_tensor([400, 300])).any()
        ):
            continue
        for spot in spots[torch.cat([spots.argmin(0), spots.argmax(0)])].long().tolist():
            alpha = torch.zeros(300, 400, dtype=torch.uint8)
            alpha[spot[1], spot[0]] = 1
            mask = bounds._masks([camera] * 2, [alpha] * 2)[0]
            sees, empty = bounds._look(place[None], 0.3, mask)
            assert not empty
            judged += int(sees)
    assert judged > 40


def test_masks_that_leave_nothing_are_refused():
    cameras = rig()
    masks = seen(cameras, MIDDLE, [0.5, 0.5, 0.5])
    turn = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    opengl = [replace(c, world_to_camera=turn @ c.world_to_camera) for c in cameras]
    with pytest.raises(FormatError, match="24 photos agree on no place, so check that they are wh"):
        scene_box(opengl, None, masks)
    around = orbit_rig(MIDDLE, 1.0, 12, width=40, height=32, elevation=0.0)
    disagreeing = seen(around, MIDDLE, [0.5, 0.5, 0.5])
    for mask, side in zip(disagreeing, (slice(0, 19), slice(13, 32)) * 6, strict=True):
        mask[side] = 0
    with pytest.raises(FormatError, match="the axes which the file declares"):
        scene_box(around, None, disagreeing)
    with pytest.raises(FormatError, match="masks: all are empty"):
        scene_box(cameras, None, [torch.zeros_like(mask) for mask in masks])


def test_masks_that_outline_nothing_are_not_used(generator):
    cameras = rig()
    points = MIDDLE + 0.1 * torch.randn(500, 3, generator=generator)
    inverted = [255 - mask for mask in seen(cameras, MIDDLE, [0.5, 0.5, 0.5])]
    for given in (points, None):
        low, high, how = scene_box(cameras, given, inverted)
        plain = scene_box(cameras, given)
        assert torch.equal(low, plain[0]) and torch.equal(high, plain[1])
        assert how == "the masks do not bound it; " + plain[2]
    white = [torch.full_like(mask, 255) for mask in inverted]
    assert scene_box(cameras, points, white)[2] == "around the bulk of 500 points"
    assert scene_box(cameras, points, [None] * 24)[2] == "around the bulk of 500 points"


def test_points_give_the_box_without_masks(generator):
    points = MIDDLE + 0.4 * (2 * torch.rand(2000, 3, generator=generator) - 1)
    points[:20] += 100.0
    low, high, how = scene_box(rig(), points)
    assert how == "around the bulk of 2000 points"
    assert (low < MIDDLE - 0.38).all() and (high > MIDDLE + 0.38).all()
    assert (high - low).max() < 1.6
    torch.testing.assert_close(high - low, (high - low)[:1].expand(3))


def test_without_both_it_is_where_cameras_look():
    cameras = rig()
    for points in (None, torch.empty(0, 3)):
        low, high, how = scene_box(cameras, points)
        assert how.startswith("around the place that the cameras look at")
        distance = float((cameras[0].position - MIDDLE).norm())
        assert torch.allclose((low + high) / 2, MIDDLE, atol=1e-3)
        assert float((high - low)[0]) == pytest.approx(distance, rel=0.01)
        assert inside(cameras, low, high) == []


def test_cameras_that_look_the_same_way_have_a_focus():
    cameras = rig(12)
    centre, radius = focus(cameras)
    assert torch.allclose(centre, MIDDLE, atol=1e-3)
    distance = float((cameras[0].position - centre).norm())
    assert radius == pytest.approx(0.5 * distance, rel=0.01)
    moved = cameras[0].world_to_camera.clone()
    moved[0, 3] += 1
    centre, radius = focus([cameras[0], replace(cameras[0], world_to_camera=moved)])
    assert bool(centre.isfinite().all()) and radius > 0


def test_cameras_inside_are_named():
    cameras = orbit_rig((0.0, 0.0, 0.0), 1.0, 4, elevation=0.0)
    place = cameras[1].position
    assert inside(cameras, place - 0.1, place) == [cameras[1].name]
    assert inside(cameras, place - 0.2, place - 0.1) == []
    everywhere = torch.full((3,), 10.0, dtype=torch.float64)
    assert inside(cameras, -everywhere, everywhere) == [camera.name for camera in cameras]


def test_what_is_wrong_is_named():
    cameras = rig(2)
    masks = [torch.full((32, 40), 255, dtype=torch.uint8)] * 2
    with pytest.raises(ValueError, match=r"alpha is \(32, 39\), expected \(32, 40\)"):
        scene_box(cameras, None, [masks[0], masks[1][:, 1:]])
    with pytest.raises(ValueError, match="no cameras"):
        scene_box([])
    with pytest.raises(ValueError, match="none of 2 points is finite"):
        scene_box(cameras, torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="zip"):
        scene_box(cameras, None, masks[:1])


def test_the_embedded_capture():
    """The board is 1.76 across, its foot 0.30 below its top, the vase 0.795 high; y points down."""
    shots, _ = load_shots_split(SCENES / "still_life_photos")
    alphas = [picture(shots, number)[..., 3] for number in range(len(shots.cameras))]
    low, high, how = scene_box(shots.cameras, None, alphas)
    assert how == "what the masks of 42 photos leave"
    assert (low <= torch.tensor([-0.88, -0.795, -0.88])).all()
    assert (high >= torch.tensor([0.88, 0.30, 0.88])).all()
    assert (high - low)[0] / 2 < 1.2


def test_real_masks(shared_data):
    """The lego digger stands within 1.2 of the origin; the usual box reaches to 1.5."""
    shots, _ = load_shots_split(shared_data / "nerf" / "lego_200")
    cameras = shots.cameras[::3]
    alphas = [picture(shots, number)[..., 3] for number in range(0, len(shots.cameras), 3)]
    low, high, _ = scene_box(cameras, None, alphas)
    assert (high - low)[0] / 2 < 1.6
    assert (low <= torch.tensor([-0.64, -1.16, -0.6])).all()
    assert (high >= torch.tensor([0.64, 1.16, 1.0])).all()
