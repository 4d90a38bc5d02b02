"""transforms.json: its dialects, its axes, and everything that may be wrong with one."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gencompress.files import FormatError
from gencompress.views.camera import project
from gencompress.views.images import read_image
from gencompress.views.loaders import load_points, load_split, load_views

FLIPPED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]]  # at z = 5, looking along -z


def edit(folder, **frame0):
    """Changes entries of the first frame; None drops them."""
    path = folder / "transforms.json"
    top = json.loads(path.read_text())
    frame = top["frames"][0] | frame0
    top["frames"][0] = {key: value for key, value in frame.items() if value is not None}
    path.write_text(json.dumps(top))


def single(folder, top, frame, size=(40, 20)):
    """A capture of one frame, written by hand."""
    Image.new("RGB", size).save(folder / "0.png")
    frame = {"file_path": "0.png", "transform_matrix": FLIPPED} | frame
    (folder / "transforms.json").write_text(json.dumps({**top, "frames": [frame]}))
    return load_views(folder)[0]


def test_opengl_axes_by_hand(tmp_path):
    """x right, y up, looking along -z: a point to the right and above appears so."""
    camera = single(tmp_path, {"fl_x": 50.0, "fl_y": 60.0}, {})
    assert camera.position.tolist() == [0, 0, 5]
    pixels, depth = project(camera, torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 6.0]]))
    assert pixels[0].tolist() == pytest.approx([20 + 50 * 0.1, 10 - 60 * 0.05])
    assert depth.tolist() == [5.0, -1.0]


def test_reads_back_the_cameras(transforms_capture, cameras, same_camera):
    loaded = load_views(transforms_capture)
    assert [camera.name for camera in loaded] == [f"images/{c.name}" for c in cameras]
    for got, expected in zip(loaded, cameras, strict=True):
        same_camera(got, expected)
        assert got.image == transforms_capture / got.name
    assert load_views(transforms_capture / "transforms.json")[2].name == loaded[2].name
    assert read_image(loaded[0])[3, 5].tolist() == pytest.approx([5 / 255, 3 / 255, 0])


def test_angle_of_view(tmp_path):
    camera = single(tmp_path, {"camera_angle_x": 2 * math.atan(0.5)}, {})
    assert (camera.fx, camera.fy) == pytest.approx((40.0, 40.0))
    assert (camera.width, camera.height, camera.cx, camera.cy) == (40, 20, 20.0, 10.0)
    top = {"camera_angle_x": 2 * math.atan(0.5), "camera_angle_y": 2 * math.atan(0.2)}
    camera = single(tmp_path, top, {})
    assert (camera.fx, camera.fy) == pytest.approx((40.0, 50.0))


def test_the_frame_wins_over_the_top(tmp_path):
    top = {"fl_x": 10.0, "fl_y": 11.0, "cx": 1.0, "k1": 0.1, "w": 40, "h": 20}
    camera = single(tmp_path, top, {"camera_angle_x": 2 * math.atan(0.5), "cx": 3.0, "k1": 0.2})
    assert (camera.fx, camera.fy, camera.cx) == pytest.approx((40.0, 40.0, 3.0))
    assert camera.distortion == (0.2, 0.0, 0.0, 0.0)


def test_distortion_params(tmp_path):
    camera = single(tmp_path, {"fl_x": 9.0}, {"distortion_params": [0.1, 0.2, 0, 0, 0.3, 0.4]})
    assert camera.distortion == (0.1, 0.2, 0.3, 0.4)
    assert single(tmp_path, {"fl_x": 9.0, "k1": 0.0, "p2": 0}, {}).distortion == ()


def test_three_by_four_and_slightly_rounded_poses(tmp_path):
    rounded = [[0.7071, -0.7071, 0, 1], [0.7071, 0.7071, 0, 2], [0, 0, 1, 3]]
    camera = single(
        tmp_path, {"fl_x": 9.0, "camera_model": "OPENCV"}, {"transform_matrix": rounded}
    )
    rotation = camera.world_to_camera[:3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3).double(), atol=1e-14, rtol=0)
    assert camera.position.tolist() == pytest.approx([1, 2, 3])


def test_smaller_photos_scale_the_lens(transforms_capture, cameras, writers):
    write_photos, *_ = writers
    write_photos(transforms_capture / "images", [camera.name for camera in cameras], (12, 8))
    camera = load_views(transforms_capture)[0]
    assert (camera.width, camera.height, camera.fx, camera.cy) == (12, 8, 10.0, 4.25)


def test_synthetic_splits_without_suffix(tmp_path, writers):
    write_photos, *_ = writers
    for split, count in (("train", 3), ("test", 2)):
        write_photos(tmp_path / split, [f"r_{i}.png" for i in range(count)])
        frames = [
            {"file_path": f"./{split}/r_{i}", "transform_matrix": FLIPPED} for i in range(count)
        ]
        top = {"camera_angle_x": 0.7, "frames": frames}
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps(top))
    assert [camera.name for camera in load_views(tmp_path)] == [f"./train/r_{i}" for i in range(3)]
    assert load_views(tmp_path, split="test")[1].image == tmp_path / "test" / "r_1.png"
    train, test = load_split(tmp_path)
    assert (len(train), len(test)) == (3, 2)
    with pytest.raises(FormatError, match=r"transforms_val\.json: .*transforms_test\.json"):
        load_views(tmp_path, split="val")


def test_nerfstudio_splits(tmp_path, cameras, writers):
    _, write_transforms, _ = writers
    lists = {
        "train_filenames": [f"images/000{i}.png" for i in (0, 1, 3, 4)],
        "test_filenames": ["images/0002.png"],
    }
    write_transforms(tmp_path, cameras, **lists)
    train, test = load_split(tmp_path)
    assert [camera.name for camera in train] == lists["train_filenames"]
    assert [camera.name for camera in test] == lists["test_filenames"]
    assert len(load_views(tmp_path)) == 5
    with pytest.raises(FormatError, match="no 'val' split"):
        load_views(tmp_path, split="val")
    write_transforms(tmp_path, cameras, test_filenames=["images/9.png"])
    with pytest.raises(FormatError, match="lists 1 images, 0 frames match"):
        load_views(tmp_path, split="test")


def test_without_a_split_every_eighth_view_is_held_out(transforms_capture):
    train, test = load_split(transforms_capture, every=3)
    assert [camera.name for camera in test] == ["images/0000.png", "images/0003.png"]
    assert len(train) == 3


def test_masks(transforms_capture, writers):
    write_photos, *_ = writers
    edit(transforms_capture, mask_path="masks/0.png")
    with pytest.raises(FormatError, match=r"1 of 6 .* missing: .*masks/0\.png"):
        load_views(transforms_capture)
    write_photos(transforms_capture / "masks", ["0.png"])
    first, second, *_ = load_views(transforms_capture)
    assert first.mask == transforms_capture / "masks" / "0.png" and second.mask is None


def test_missing_photos_are_one_error_or_none(transforms_capture, cameras, same_camera):
    for i in range(4):
        (transforms_capture / "images" / f"000{i}.png").unlink()
    with pytest.raises(FormatError, match=r"4 of 5 .* missing: .*0000\.png.* and 1 more"):
        load_views(transforms_capture)
    loaded = load_views(transforms_capture, require_images=False)
    assert [camera.image is None for camera in loaded] == [True] * 4 + [False]
    same_camera(loaded[0], cameras[0])


def test_no_size_without_photo(tmp_path):
    single(tmp_path, {"fl_x": 9.0}, {})
    (tmp_path / "0.png").unlink()
    with pytest.raises(FormatError, match="declares no size"):
        load_views(tmp_path, require_images=False)


SCALED = [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 5], [0, 0, 0, 1]]
MIRRORED = [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ({"transform_matrix": SCALED}, r"frame 0 \('images/0000\.png'\): .*not rigid"),
        ({"transform_matrix": MIRRORED}, "not rigid .*determinant -1"),
        ({"transform_matrix": FLIPPED[:3] + [[0, 0, 1, 1]]}, "last row"),
        ({"transform_matrix": FLIPPED[:2]}, "not a 4 x 4"),
        ({"transform_matrix": None}, "not a 4 x 4"),
        ({"transform_matrix": [[math.nan] * 4] * 4}, "no finite numbers"),
        ({"transform_matrix": [["1", 0, 0, 0]] + FLIPPED[1:]}, "no finite numbers"),
        ({"fl_x": 0.0}, "fl_x is 0.0"),
        ({"fl_x": True}, "fl_x is True"),
        ({"cx": math.inf}, "cx is inf"),
        ({"cy": 10**400}, "cy is 1000"),
        ({"k1": "a"}, "k1 is 'a'"),
        ({"k3": 0.1}, "k3 = 0.1"),
        ({"distortion_params": [0.1]}, "distortion_params"),
        ({"w": 0}, "0.0 x 16.0 pixels"),
        ({"w": 1e9}, "pixels, expected 1 to"),
        ({"w": 24, "h": 17}, "24 x 16 pixels, expected the shape"),
        ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE.*undistort"),
        ({"camera_model": ["OPENCV"]}, "camera model"),
        ({"is_fisheye": True}, "OPENCV_FISHEYE"),
        ({"file_path": None}, "no file_path"),
        ({"file_path": 3}, "file_path is 3"),
        ({"file_path": "../images/0000.png"}, "expected a path inside"),
        ({"file_path": "/etc/hostname"}, "expected a path inside"),
        ({"mask_path": "../m.png"}, "expected a path inside"),
    ],
)
def test_a_wrong_frame_is_named(transforms_capture, frame, says):
    edit(transforms_capture, **frame)
    if "h" in frame:  # only the shape differs: one pixel row more than rounding explains
        edit(transforms_capture, h=20)
    with pytest.raises(FormatError, match=says):
        load_views(transforms_capture)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "holds a list"),
        ("{}", "no list of frames"),
        ('{"frames": []}', "no list of frames"),
        ('{"frames": [1]}', "frame 0 is 1"),
        ('{"frames": [{"file_path": "images/0000.png"}]}', "neither fl_x nor camera_angle_x"),
        ('{"camera_angle_x": 4, "frames": [{"file_path": "images/0000.png"}]}', "radians"),
        (b"\xff\xfe\xfa".decode("latin-1"), "not readable as JSON"),
    ],
)
def test_a_wrong_file_is_named(transforms_capture, text, says):
    (transforms_capture / "transforms.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=rf"transforms\.json: .*{says}"):
        load_views(transforms_capture)


def test_applied_transform_moves_colmap_points(tmp_path, cameras, some_points, writers):
    """nerfstudio turns the world; the points of the COLMAP model beside it must follow."""
    _, write_transforms, write_colmap = writers
    applied = [[0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, -1, 0]]
    write_colmap(tmp_path, cameras, some_points, text=False)
    write_transforms(tmp_path, cameras)
    assert load_points(tmp_path) is None  # the two frames cannot be brought together
    write_transforms(tmp_path, cameras, applied_transform=applied)
    xyz, _ = load_points(tmp_path)
    expected = np.stack([some_points[:, 1] + 0.5, some_points[:, 0], -some_points[:, 2]], 1)
    np.testing.assert_allclose(xyz, expected, atol=1e-6)
    assert xyz.dtype == np.float32


def test_fox(shared_data):
    """A real instant-ngp capture: fifty photos, distortion, and points of the same frame."""
    views = load_views(shared_data / "nerf" / "fox")
    assert len(views) == 50
    assert (views[0].width, views[0].height) == (288, 512)
    assert views[0].distortion == (0.0578421, -0.0805099, -0.000980296, 0.00015575)
    xyz, rgb = load_points(shared_data / "nerf" / "fox")
    assert xyz.shape == rgb.shape == (13_380, 3)
    # Most points lie in front of most cameras, and their colours are those of the photos there.
    errors = []
    for view in views[::10]:
        pixels, _ = project(view, torch.from_numpy(xyz))
        x, y = pixels.unbind(1)
        seen = (x >= 0) & (x < 288) & (y >= 0) & (y < 512)
        assert seen.sum() > 2_000
        photo = read_image(view)[y[seen].long(), x[seen].long()]
        errors.append((photo - torch.from_numpy(rgb)[seen] / 255).abs().mean(1))
    # Measured: 0.085; 0.13 three pixels aside, 0.22 with x or colours mixed up.
    assert torch.cat(errors).median() < 0.1


def test_lego(shared_data):
    views = load_views(shared_data / "nerf" / "lego_200")
    assert len(views) == 100
    assert views[1].fx == pytest.approx(0.5 * 200 / math.tan(0.5 * 0.6911112070083618))
    assert [view.name for view in views[:2]] == ["./train/r_0", "./train/r_1"]
    for view in views[::20]:
        assert view.position.norm() == pytest.approx(4.03, abs=0.01)
        # The model stands at the origin: every camera sees it in the middle, opaque.
        pixels, _ = project(view, torch.zeros(3))
        assert pixels.tolist() == pytest.approx([100, 100], abs=2)
        image = read_image(view)
        assert image.shape == (200, 200, 4)
        assert image[90:110, 90:110, 3].mean() > 0.9
        assert image[0, 0, 3] == 0
        assert read_image(view, (1, 1, 1))[0, 0].tolist() == [1, 1, 1]
