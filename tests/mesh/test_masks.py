"""Masks from every kind of file, at other sizes, and files that are not what they should be."""

import zipfile

import numpy as np
import pytest
import torch
from mesh import mesh_scenes as scenes
from mesh.mesh_samples import icosphere, moved, torus

from gencompress.files import FormatError
from gencompress.mesh import masks as module
from gencompress.mesh.masks import MaskViews, dilated, load_masks, placed, resized, subset
from gencompress.mesh.method import check_fit, load_views
from gencompress.mesh.score import Judge, Work, view_errors
from gencompress.views.camera import project

CONVENTIONS = ("c2w", "w2c", "opencv", "pytorch3d")


@pytest.fixture(scope="module")
def ring():
    """12 views of 64 x 48 px, in steps of 1/255."""
    found = scenes.masks_of(scenes.ring(), scenes.rig(12, 64, height=48))
    found.masks[:] = torch.from_numpy(scenes.bytes_of(found.masks)).float() / 255
    return found


def scores(loaded):
    """Errors of a filled ring in the views of both splits, and whether each view may speak."""
    mesh = scenes.filled_ring(2)
    found = [
        view_errors(mesh.vertices, mesh.faces, Work(some, dilated(some.masks, 1)), Judge())
        for some in loaded
    ]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def write(folder, ring, kind):
    if kind in CONVENTIONS:
        return scenes.write_npz(folder / "masks.npz", ring, kind)
    if kind == "colmap":
        return scenes.write_colmap(folder, ring)
    return scenes.write_transforms(folder, ring)


@pytest.mark.parametrize("kind", [*CONVENTIONS[1:], "transforms", "colmap"])
def test_every_convention_gives_the_same_scores(tmp_path, ring, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = load_masks(write(tmp_path / "a", ring, "c2w"), every=4)
    other = load_masks(write(tmp_path / "b", ring, kind), every=4)
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.masks, second.masks)
        assert torch.allclose(first.viewmats, second.viewmats, atol=1e-12)
        assert torch.allclose(first.intrinsics, second.intrinsics, atol=1e-9)
    (errors, valid), (again, valid_again) = scores(one), scores(other)
    assert int((errors > 0.5).sum()) > 100 and int((errors == 0).sum()) > 200
    assert torch.equal(valid, valid_again)
    # poses written as quaternions or inverted come back to 1e-16, and float32 keeps half of that
    torch.testing.assert_close(errors, again, atol=1e-5, rtol=0)
    assert torch.equal(errors > 0.5, again > 0.5)


def test_the_same_poses_by_another_name_are_wrong(tmp_path, ring):
    """Each convention is read as itself: none of them passes for another."""
    right = load_masks(scenes.write_npz(tmp_path / "a.npz", ring), every=4)[0].viewmats
    rows = scenes.poses(ring, "pytorch3d")
    wrong = {**scenes.poses(ring, "opencv"), "convention": np.array("pytorch3d")}
    flipped = {"R": rows["R"], "t": rows["T"]}
    for number, entries in enumerate((wrong, flipped)):
        path = scenes.write_npz(tmp_path / f"{number}.npz", ring, c2w=None, **entries)
        assert not torch.allclose(load_masks(path, every=4)[0].viewmats, right, atol=0.1)
    path = scenes.write_npz(tmp_path / "c.npz", ring, c2w=scenes.poses(ring, "w2c")["w2c"])
    assert not torch.allclose(load_masks(path, every=4)[0].viewmats, right, atol=0.1)


def test_an_orbit_as_softras_has_it(tmp_path):
    """A camera left-handed as theirs: from azimuth 0 it looks along +z, with x to the right."""
    orbit = np.array([[2.0, 0.0, 0.0], [2.0, 0.0, 90.0], [2.0, 30.0, 0.0]])
    entries = {"masks": np.ones((3, 8, 8), bool), "distance_elevation_azimuth": orbit}
    np.savez(tmp_path / "a.npz", **entries)
    held, rest = load_masks(tmp_path / "a.npz", every=2)[::-1]
    viewmats = torch.stack([held.viewmats[0], rest.viewmats[0], held.viewmats[1]])
    points = torch.tensor([[0.1, 0.2, 0.0, 1.0], [0.0, 0.2, 0.1, 1.0]], dtype=torch.float64)
    seen = (viewmats @ points.T).mT[..., :3]
    assert torch.allclose(seen[0, 0], torch.tensor([0.1, -0.2, 2.0]).double())
    assert torch.allclose(seen[1, 1], torch.tensor([0.1, -0.2, 2.0]).double())
    eye = -viewmats[2, :3, :3].T @ viewmats[2, :3, 3]
    assert torch.allclose(eye, torch.tensor([0.0, 1.0, -(3**0.5)]).double())
    lens = rest.intrinsics[0]  # 30 degrees over 8 px
    assert torch.allclose(lens[0], torch.tensor([4 * (2 + 3**0.5), 0, 4]).double())


def test_centre_and_scale_are_folded_into_the_cameras(tmp_path, ring):
    """Cameras that see (x - c) s, and a mesh in units of its own."""
    centre, scale = (3.0, -2.0, 0.5), 0.25
    path = scenes.write_npz(tmp_path / "a.npz", ring, center=centre, scale=scale)
    mesh = scenes.filled_ring(2)
    apart = moved(mesh, *centre, size=1 / scale)
    loaded = load_masks(path, every=4)[0]
    plain = load_masks(scenes.write_npz(tmp_path / "b.npz", ring), every=4)[0]
    found, seen = view_errors(apart.vertices, apart.faces, Work(loaded, loaded.masks), Judge())
    want, said = view_errors(mesh.vertices, mesh.faces, Work(plain, plain.masks), Judge())
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    assert torch.equal(seen, said) and int((want > 0.5).sum()) > 100


def test_lens_by_angle_along_the_shorter_side(tmp_path, ring):
    by_angle = scenes.write_npz(tmp_path / "a.npz", ring, K=None, fov_deg=scenes.FOV)
    each = scenes.write_npz(tmp_path / "b.npz", ring, K=ring.intrinsics.numpy())
    for path in (by_angle, each):
        assert torch.allclose(load_masks(path, every=4)[0].intrinsics, ring.intrinsics[1:10])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, bool])
def test_masks_in_every_type(tmp_path, ring, dtype):
    values = ring.masks.numpy()
    given = {np.uint8: scenes.bytes_of(ring.masks), bool: values > 0.5}.get(dtype)
    given = values.astype(dtype) if given is None else given
    path = scenes.write_npz(tmp_path / "a.npz", ring, masks=given)
    want = ring.masks > 0.5 if dtype is bool else ring.masks
    loaded = load_masks(path, every=3)
    assert torch.equal(loaded[1].masks, want[::3].float())
    assert loaded[1].names == ("000", "003", "006", "009") and loaded[1].colors is None


@pytest.mark.parametrize("channels_first", [False, True])
def test_colours_beside_the_alpha(tmp_path, ring, channels_first):
    alpha = scenes.bytes_of(ring.masks)[..., None]
    colors = np.random.default_rng(0).integers(0, 256, (*alpha.shape[:3], 3), np.uint8)
    rgba = np.concatenate([colors, alpha], -1)
    given = rgba.transpose(0, 3, 1, 2) if channels_first else rgba
    found = load_masks(scenes.write_npz(tmp_path / "a.npz", ring, masks=None, rgba=given), every=4)
    assert torch.equal(found[1].masks, ring.masks[::4])
    assert np.array_equal(found[1].colors.numpy(), colors[::4])


@pytest.mark.parametrize("kind", ["alpha", "grey", "mask"])
def test_a_capture_tells_its_masks_by_alpha_or_grey_or_a_file(tmp_path, ring, kind):
    score, test = load_masks(scenes.write_transforms(tmp_path, ring, kind), every=4)
    assert torch.equal(test.masks, ring.masks[::4]) and len(score) == 9
    if kind != "grey":
        assert test.colors[0, 0, 0].tolist() == [200, 0, 40]


def test_photos_without_masks_are_refused(tmp_path, ring):
    with pytest.raises(FormatError, match="no alpha, no mask and is not grey"):
        load_masks(scenes.write_transforms(tmp_path, ring, "plain"), every=4)


def test_masks_of_other_sizes_are_refused(tmp_path, ring):
    folder = scenes.write_transforms(tmp_path, ring)
    from PIL import Image

    path = folder / "images" / "003.png"
    Image.open(path).resize((32, 24)).save(path)
    with pytest.raises(FormatError, match=r"32 x 24.* 64 x 48"):
        load_masks(folder, every=4)


@pytest.mark.parametrize("kind", ["npz", "capture"])
def test_one_view_cannot_be_held_out_and_used(tmp_path, ring, kind):
    one = MaskViews(ring.viewmats[:1], ring.intrinsics[:1], ring.masks[:1], ring.names[:1])
    path = tmp_path
    if kind == "npz":
        path = scenes.write_npz(tmp_path / "a.npz", one)
    else:
        scenes.write_transforms(tmp_path, one)
    with pytest.raises(FormatError, match="1 views; two at least"):
        load_masks(path, every=4)


def test_neither_a_capture_nor_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "a.npz", every=4)
    with pytest.raises(FormatError, match="COLMAP"):
        load_masks(tmp_path, every=4)


def bad(name, ring):
    """Entries of an .npz that make it wrong."""
    c2w = scenes.poses(ring, "c2w")["c2w"]
    masks = ring.masks.numpy()
    nan, turned = c2w.copy(), c2w.copy()
    nan[2, 0, 3] = np.nan
    turned[5, :3, :3] *= 1.1
    last, mirrored = c2w.copy(), c2w.copy()
    last[1, 3] = 0
    mirrored[4, :3, 0] *= -1
    return {
        "no masks": {"masks": None},
        "int16": {"masks": scenes.bytes_of(ring.masks).astype(np.int16)},
        "complex": {"masks": masks.astype(complex)},
        "text": {"masks": np.array(["a"])},
        "above one": {"masks": masks * 255},
        "negative": {"masks": masks - 0.5},
        "NaN mask": {"masks": masks * np.nan},
        "flat": {"masks": masks[0]},
        "none": {"masks": masks[:0], "c2w": c2w[:0]},
        "no width": {"masks": masks[:, :, :0]},
        "rgb": {"masks": None, "rgba": np.zeros((12, 8, 8, 3), np.uint8)},
        "no poses": {"c2w": None},
        "few poses": {"c2w": c2w[:-1]},
        "3 x 4": {"c2w": c2w[:, :3]},
        "text poses": {"c2w": np.array("c2w")},
        "NaN pose": {"c2w": nan},
        "scaled pose": {"c2w": turned},
        "scaled w2c": {"c2w": None, "w2c": np.linalg.inv(turned)},
        "no last row": {"c2w": last},
        "mirrored": {"c2w": mirrored},
        "R alone": {"c2w": None, "R": c2w[:, :3, :3]},
        "scaled R": {"c2w": None, "R": turned[:, :3, :3], "t": c2w[:, :3, 3]},
        "convention": {
            "c2w": None, "R": c2w[:, :3, :3], "t": c2w[:, :3, 3], "convention": "blender"
        },
        "no lens": {"K": None},
        "no focal": {"K": np.diag([0.0, 50.0, 1.0])},
        "NaN lens": {"K": np.full((3, 3), np.nan)},
        "wide": {"K": None, "fov_deg": 180.0},
        "scale 0": {"scale": 0.0},
        "scale NaN": {"scale": np.nan},
        "centre": {"center": [1.0, 2.0]},
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name, says",
    [
        ("no masks", "expected masks or rgba"),
        ("int16", "masks is int16"),
        ("complex", "masks is complex128"),
        ("text", r"masks is <U1 \(1,\)"),
        ("above one", r"from 0 to 255, not in \[0, 1\]"),
        ("negative", r"from -0.5 to 0.5, not in \[0, 1\]"),
        ("NaN mask", "finite floats"),
        ("flat", r"masks is float32 \(48, 64\)"),
        ("none", r"masks is float32 \(0, 48, 64\)"),
        ("no width", r"masks is float32 \(12, 48, 0\)"),
        ("rgb", r"rgba is uint8 \(12, 8, 8, 3\)"),
        ("no poses", "expected c2w, w2c, R and t"),
        ("few poses", r"c2w is float64 \(11, 4, 4\)"),
        ("3 x 4", r"c2w is float64 \(12, 3, 4\)"),
        ("text poses", "c2w is <U3"),
        ("NaN pose", "c2w holds values that are not finite"),
        ("scaled pose", "camera 5: its axes are no rotation"),
        ("scaled w2c", "camera 5: its axes are no rotation"),
        ("no last row", "camera 1: the last row"),
        ("mirrored", "camera 4: its axes are no rotation"),
        ("R alone", "but no T"),
        ("scaled R", "camera 5: its axes are no rotation"),
        ("convention", "opencv or pytorch3d"),
        ("no lens", "neither K nor fov_deg"),
        ("no focal", "focal length is not above 0"),
        ("NaN lens", "K holds values that are not finite"),
        ("wide", "fov_deg is 180"),
        ("scale 0", "scale is 0"),
        ("scale NaN", "scale holds"),
        ("centre", r"center is float64 \(2,\)"),
    ],
)
def test_arrays_that_cannot_be(tmp_path, ring, name, says):
    path = scenes.write_npz(tmp_path / "a.npz", ring, **bad(name, ring))
    with pytest.raises(FormatError, match=says):
        load_masks(path, every=4)


def test_files_that_are_no_arrays(tmp_path, ring):
    path = scenes.write_npz(tmp_path / "a.npz", ring)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"PK",
        whole[: len(whole) // 2],
        whole[:200] + b"\xff" * 300 + whole[500:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="not a readable"):
            load_masks(path, every=4)


def test_pickled_objects_are_not_opened(tmp_path, ring):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (Path(sprung),))

    from pathlib import Path

    sprung = str(tmp_path / "sprung")
    path = scenes.write_npz(tmp_path / "a.npz", ring, names=np.array([Trap()], object))
    with pytest.raises(FormatError, match="not a readable"):
        load_masks(path, every=4)
    assert not Path(sprung).exists()


def test_sizes_are_checked_before_anything_is_unpacked(tmp_path, ring, monkeypatch):
    path = scenes.write_npz(tmp_path / "a.npz", ring)
    monkeypatch.setattr(module, "MOST_PIXELS", ring.masks.numel() // 8)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(FormatError, match="its arrays take .* bytes, more than"):
        load_masks(path, every=4)


def test_a_shape_larger_than_its_array(tmp_path, ring):
    """A header of 40 GB with nothing behind it."""
    path = scenes.write_npz(tmp_path / "a.npz", ring, masks=None)
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (40000, 1000, 1000), }"
    header = text.ljust(117) + "\n"
    with zipfile.ZipFile(path, "a") as archive:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        archive.writestr("masks.npy", data)
    with pytest.raises(FormatError, match="not a readable"):
        load_masks(path, every=4)


def test_empty_masks_are_left_out_with_a_word(tmp_path, ring, caplog):
    masks = scenes.bytes_of(ring.masks)
    masks[[1, 4]] = 0
    score, test = load_views(str(scenes.write_npz(tmp_path / "a.npz", ring, masks=masks)), 4)
    assert score.names == ("002", "003", "005", "006", "007", "009", "010", "011")
    assert test.names == ("000", "008")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "001" in said[0] and "004" in said[1]
    path = scenes.write_npz(tmp_path / "b.npz", ring, masks=0 * masks)
    with pytest.raises(FormatError, match="masks are empty; 1 or white is inside"):
        load_views(str(path), 4)


def test_mesh_and_masks_of_one_scene_fit(ring, tmp_path):
    check_fit(scenes.ring(), ring, tmp_path, "masks")
    check_fit(scenes.filled_ring(2), ring, tmp_path, "masks")


def test_a_mesh_that_covers_thin_masks_fits(tmp_path):
    """However little of it is right: that is what pruning is for."""
    wire = scenes.masks_of(torus(12, 40, 0.03), scenes.rig(6, 64))
    check_fit(moved(icosphere(2), 0, 0, 0, size=1.1), wire, tmp_path, "masks")


def test_what_does_not_fit_says_why(ring, tmp_path):
    upside_down = MaskViews(ring.viewmats @ turn(), ring.intrinsics, ring.masks, ring.names)
    inverted = MaskViews(ring.viewmats, ring.intrinsics, 1 - ring.masks, ring.names)
    small = moved(scenes.ring(), 0.9, 0.4, size=0.2)
    for mesh, views, says in (
        (scenes.ring(), inverted, "masks look inverted"),
        (small, upside_down, "camera convention"),
        (moved(scenes.ring(), 0, 0, 0, size=1e-4), ring, "IoU 0.00 only|nothing of it appears"),
        (moved(scenes.ring(), 1000, 0, 0), ring, "nothing of it appears .* same units and frame"),
    ):
        with pytest.raises(FormatError, match=says):
            check_fit(mesh, views, tmp_path / "a.ply", "masks")


def test_units_are_told_by_numbers(ring, tmp_path):
    """A mesh in millimetres, cameras in metres: it is behind or beside all of them."""
    big = moved(icosphere(2), 0, 0, 5000, size=1000)
    above = subset(ring, torch.arange(2))
    with pytest.raises(
        FormatError, match=r"it is 3.46e\+03 across and the cameras are 5e\+03 away"
    ):
        check_fit(big, above, tmp_path / "a.ply", "masks")


def turn():
    """Half a turn about y."""
    return torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("size", [16, 40, 64, 100, 256])
def test_another_size_keeps_the_place_of_things(size):
    """The centre of a mask is the same direction, by its camera."""
    cameras = scenes.rig(4, 64, height=48)
    found = scenes.ball_masks(cameras, 0.7)
    found.viewmats[:, :2, 3] += torch.tensor([0.2, -0.1])  # off the middle
    moved_ = MaskViews(found.viewmats, found.intrinsics, found.masks, found.names)
    other = resized(moved_, size)
    assert max(other.masks.shape[1:]) == size
    for one in range(4):
        assert torch.allclose(centre(moved_, one), centre(other, one), atol=2e-3)
    seen = (moved_, other)
    areas = [some.masks.sum() / some.intrinsics[0, :2, :2].det() for some in seen]
    assert float(areas[1] / areas[0]) == pytest.approx(1, abs=0.01)
    assert resized(moved_, 64) is moved_


def centre(views, number):
    """Where the mean pixel of a mask is on the plane at depth 1."""
    mask = views.masks[number].double()
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in mask.shape)
    mean = torch.stack([(mask * x).sum(), (mask * y[:, None]).sum(), mask.sum()]) / mask.sum()
    return (torch.linalg.inv(views.intrinsics[number]) @ mean)[:2]


def test_shrinking_takes_means_of_areas():
    views = MaskViews(
        torch.eye(4).double()[None],
        torch.tensor([[[8.0, 0, 4], [0, 8, 2], [0, 0, 1]]]).double(),
        torch.arange(32).view(1, 4, 8) / 31,
        ("",),
    )
    small = resized(views, 4)
    assert torch.allclose(small.masks, torch.nn.functional.avg_pool2d(views.masks, 2))
    assert small.intrinsics[0].tolist() == [[4, 0, 2], [0, 4, 1], [0, 0, 1]]


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_dilation_is_the_largest_value_in_steps_to_neighbours(generator, radius):
    masks = torch.rand(2, 7, 9, generator=generator)
    wide = dilated(masks, radius)
    for y in range(7):
        for x in range(9):
            near = [
                masks[:, v, u]
                for v in range(7)
                for u in range(9)
                if abs(v - y) + abs(u - x) <= radius
            ]
            assert torch.equal(wide[:, y, x], torch.stack(near).amax(0))


def test_a_mesh_far_away_keeps_its_digits():
    """Vertices go to float32 about their middle, and the cameras with them."""
    camera = scenes.rig(1, 64)[0]
    views = scenes.views([camera], torch.ones(1, 64, 64))
    mesh = icosphere(2)
    by = (1e6, -2e6, 5e5)
    local, viewmats, intrinsics = placed(moved(mesh, *by).vertices, scenes.shifted(views, by))
    assert local.dtype == viewmats.dtype == intrinsics.dtype == torch.float32
    want, _ = project(camera, mesh.vertices)
    seen = local @ viewmats[0, :3, :3].T + viewmats[0, :3, 3]
    pixels = (seen @ intrinsics[0].T)[:, :2] / seen[:, 2:]
    assert torch.allclose(pixels.double(), want, atol=1e-3)
