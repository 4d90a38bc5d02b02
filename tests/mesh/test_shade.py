"""Pictures of meshes: light, masks over renders, colours of scores, models for the page."""

import json
import struct

import numpy as np
import pytest
import torch

from gencompress.mesh import shade
from gencompress.mesh.surface import TriMesh
from gencompress.views.camera import Camera, look_at

QUAD = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])


def camera(eye=(0.0, 0.0, 3.0), width=5, height=3, focal=4.0):
    """From +z, with y up."""
    view = look_at(torch.tensor(eye), torch.zeros(3), (0.0, 1.0, 0.0))
    return Camera(view, focal, focal, width / 2, height / 2, width, height)


def quad(*, turned=False):
    """Two faces that show their outside to +z, or to -z."""
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    return TriMesh(QUAD, faces.flip(1) if turned else faces)


def test_light_falls_with_the_angle_to_the_eye():
    hits = torch.zeros(3, 5, dtype=torch.int32)
    hits[0, 4] = -1
    hits[2, 4] = 1
    colors = torch.tensor([[1.0, 0.5, 0.25], [0.0, 1.0, 0.0]])
    image = shade.shaded(quad(), camera(), hits, colors, background=0.125)
    assert image.dtype == torch.float32 and image.shape == (3, 5, 3)
    assert image[0, 4].tolist() == [0.125] * 3
    assert image[1, 2].tolist() == pytest.approx([1, 0.5, 0.25])  # head on, at the middle
    light = 0.3 + 0.7 * 4 / (4**2 + 2**2 + 1) ** 0.5
    assert image[2, 4].tolist() == pytest.approx([0, light, 0])  # two right and one down of it
    grey = shade.shaded(quad(), camera(), hits)
    assert grey[1, 2].tolist() == pytest.approx([shade.ALBEDO] * 3)
    bytes_ = shade.shaded(quad(), camera(), hits, (255 * colors).to(torch.uint8), background=0.125)
    assert (bytes_ - image).abs().max() < 0.003


def test_the_back_of_a_face_is_darker_and_warmer():
    hits = torch.zeros(3, 5, dtype=torch.int64)
    front, back = (
        shade.shaded(quad(turned=turned), camera(), hits, torch.ones(2, 3)) for turned in (0, 1)
    )
    assert torch.allclose(back, front * torch.tensor(shade.BACK))
    assert shade.BACK[0] > shade.BACK[1] > shade.BACK[2]
    # a tilted face: the same light on both sides
    seen = [shade.shaded(quad(turned=t), camera((2.0, 0.0, 2.0)), hits)[1, 2, 0] for t in (0, 1)]
    assert seen[0] == pytest.approx(shade.ALBEDO * (0.3 + 0.7 * 0.5**0.5))
    assert seen[1] == pytest.approx(float(seen[0]) * shade.BACK[0])


def test_finer_hits_are_averaged():
    hits = torch.full((6, 10), -1)
    hits[2:4, 4] = 0  # the left half of the middle pixel
    image = shade.shaded(quad(), camera(), hits, torch.zeros(2, 3))
    assert image[1, 2].tolist() == [0.5] * 3
    assert image.sum() == 14 * 3 + 1.5
    hits[:] = 0
    fine, coarse = (shade.shaded(quad(), camera(), h)[1, 2, 0] for h in (hits, hits[:3, :5]))
    assert fine < coarse == pytest.approx(shade.ALBEDO)  # rays beside the axis, so the lens grew
    assert fine == pytest.approx(float(coarse), abs=0.01)


@pytest.mark.parametrize("shape", [(3, 4), (6, 5), (2, 5), (9, 10)])
def test_hits_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="for a picture of 3 x 5"):
        shade.shaded(quad(), camera(), torch.zeros(shape, dtype=torch.int32))


def test_hits_of_other_faces_are_refused():
    with pytest.raises(ValueError, match="face 2 of 2"):
        shade.shaded(quad(), camera(), torch.full((3, 5), 2))


def test_overlay_tells_missing_from_outside():
    image = torch.full((5, 6, 3), 0.5)
    mask, alpha = torch.zeros(5, 6), torch.zeros(5, 6)
    mask[:, :5] = 1
    alpha[:, 1:] = 1
    shown = shade.overlay(image, mask, alpha)
    blue, orange = shown[2, 0], shown[2, 5]
    assert blue.tolist() == pytest.approx([0.1 + 0.8 * c for c in shade.MISSING])
    assert orange.tolist() == pytest.approx([0.1 + 0.8 * c for c in shade.OUTSIDE])
    assert blue[2] > blue[0] and orange[0] > orange[2]
    assert torch.equal(shown[:, 1:4], image[:, 1:4])  # agreement; the picture's rim is no outline
    assert torch.allclose(shown[:, 4], torch.tensor(shade.OUTLINE))
    soft = shade.overlay(image, 0.25 * mask, 0 * alpha)[2, 2]
    assert soft.tolist() == pytest.approx([0.8 * 0.5 + 0.2 * c for c in shade.MISSING])
    with pytest.raises(ValueError, match="one size"):
        shade.overlay(image, mask[1:], alpha)


def luminance(colors):
    linear = (colors.double() / 255) ** 2.2
    return linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)


def test_scores_darken_evenly_from_yellow_to_dark_red():
    errors = torch.linspace(0.5, 0.9, 9)
    errors = torch.cat([errors, torch.tensor([0.99, 0.1, torch.nan, torch.nan])])
    removed = torch.tensor([True] * 9 + [False, False, True, False])
    colors = shade.score_colors(errors, removed)
    assert colors.dtype == torch.uint8 and colors.shape == (13, 3)
    kept = [tuple(c) for c in colors[~removed].tolist()]
    assert kept == [shade.KEPT] * 3
    assert [tuple(colors[i].tolist()) for i in (0, 4, 8)] == list(shade.RAMP)
    assert tuple(colors[11].tolist()) == shade.RAMP[0]
    lightness = luminance(colors[:9]) ** (1 / 3)
    steps = -lightness.diff()
    assert (steps > 0.03).all() and steps.max() < 2.5 * steps.min()
    assert shade.score_legend(errors, removed) == (
        "yellow (error 0.5) to dark red (0.9) for removed faces, grey for kept ones"
    )
    one = torch.tensor([0.7])
    assert tuple(shade.score_colors(one, one > 0)[0].tolist()) == shade.RAMP[-1]
    assert shade.score_legend(one, one > 0).startswith("dark red (error 0.7) for removed")
    assert tuple(shade.score_colors(one, one > 1)[0].tolist()) == shade.KEPT
    assert "none was removed" in shade.score_legend(one, one > 1)


def read_glb(path):
    """Points, colours and faces, read by hand from the bytes."""
    data = path.read_bytes()
    magic, version, size, length, kind = struct.unpack_from("<4s2I I4s", data)
    assert (magic, version, size, kind) == (b"glTF", 2, len(data), b"JSON") and length % 4 == 0
    gltf = json.loads(data[20 : 20 + length])
    count, kind = struct.unpack_from("<I4s", data, 20 + length)
    body = data[28 + length :]
    assert kind == b"BIN\0" and count == len(body) == gltf["buffers"][0]["byteLength"]
    (primitive,) = gltf["meshes"][0]["primitives"]
    arrays = []
    for place, dtype, width in (
        (primitive["attributes"]["POSITION"], "<f4", 3),
        (primitive["attributes"]["COLOR_0"], "u1", 4),
        (primitive["indices"], "<u4", 3),
    ):
        view = gltf["bufferViews"][gltf["accessors"][place]["bufferView"]]
        start = view["byteOffset"]
        part = body[start : start + view["byteLength"]]
        arrays.append(np.frombuffer(part, dtype).reshape(-1, width))
    bounds = gltf["accessors"][0]
    assert bounds["min"] == arrays[0].min(0).tolist() and bounds["max"] == arrays[0].max(0).tolist()
    return arrays


def test_a_glb_shares_vertices_of_one_colour_only(tmp_path):
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    assert shade.preview_glb(tmp_path / "grey.glb", QUAD, faces) == 2
    points, rgba, index = read_glb(tmp_path / "grey.glb")
    assert len(points) == 4 and (points[index] == QUAD[faces].numpy()).all()
    assert (rgba == [209, 209, 209, 255]).all()
    tints = torch.tensor([[250, 1, 2], [3, 250, 4]], dtype=torch.uint8)
    shade.preview_glb(tmp_path / "two.glb", QUAD.double(), faces, tints)
    points, rgba, index = read_glb(tmp_path / "two.glb")
    assert len(points) == 6 and (points[index] == QUAD[faces].numpy()).all()
    assert rgba[index][:, :, :3].tolist() == [[c] * 3 for c in tints.tolist()]
    with pytest.raises(FileExistsError):
        shade.preview_glb(tmp_path / "two.glb", QUAD, faces)
    trimesh = pytest.importorskip("trimesh")  # another reader
    loaded = trimesh.load(tmp_path / "two.glb", force="mesh", process=False)
    assert (loaded.triangles == QUAD[faces].numpy()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_glb_of_nothing_or_of_what_is_not_finite_is_refused(tmp_path, value):
    faces = torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="0 faces"):
        shade.preview_glb(tmp_path / "a.glb", QUAD, faces[:0])
    with pytest.raises(ValueError, match="finite"):
        shade.preview_glb(tmp_path / "a.glb", QUAD.index_fill(1, torch.tensor(2), value), faces)
    assert list(tmp_path.iterdir()) == []


def test_many_faces_are_made_coarser_without_holes(tmp_path):
    """A closed torus of 28,800 faces stays closed, and on its surface."""
    n, m = 180, 80
    i, j = torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")
    u, v = 2 * torch.pi * i / n, 2 * torch.pi * j / m
    ring = 1 + 0.4 * v.cos()
    points = torch.stack([ring * u.cos(), ring * u.sin(), 0.4 * v.sin()], -1).reshape(-1, 3)
    a, b = i * m + j, (i + 1) % n * m + j
    c, d = (i + 1) % n * m + (j + 1) % m, i * m + (j + 1) % m
    faces = torch.stack([torch.stack(t, -1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))], 1)
    faces = faces.reshape(-1, 3)
    tints = (points[faces[:, 0], 2] > 0).long()[:, None] * torch.tensor([200, 0, 0])
    count = shade.preview_glb(tmp_path / "a.glb", points, faces, tints.to(torch.uint8), most=5000)
    points, rgba, index = read_glb(tmp_path / "a.glb")
    assert count == len(index) and 2500 < count <= 5000
    radial = np.hypot(points[:, 0], points[:, 1]) - 1
    assert abs(np.hypot(radial, points[:, 2]) - 0.4).max() < 0.05
    corners = np.unique(points, axis=0, return_inverse=True)[1].reshape(-1)[index]
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    forward = {}
    for x, y in edges.tolist():
        low, high = min(x, y), max(x, y)
        forward[low, high] = forward.get((low, high), 0) + (1 if x < y else -1)
    assert set(forward.values()) == {0}  # every edge is passed as often one way as the other
    red = rgba[index][:, 0, 0] > 100
    assert points[index].mean(1)[red, 2].min() > -0.1 and 0.3 < red.mean() < 0.7


def test_the_viewer_starts_where_the_camera_is():
    at = shade.viewer_camera(camera((0.0, 1.0, 3.0), 8, 4, 2.0), torch.tensor([0.5, 0.0, 0.0]))
    forward = torch.tensor([0.0, -1, -3]) / 10**0.5
    assert at["eye"] == pytest.approx([0, 1, 3]) and at["fov_deg"] == pytest.approx(90)
    assert at["target"] == pytest.approx((torch.tensor([0.0, 1, 3]) + forward * 10**0.5).tolist())
    assert at["up"] == pytest.approx([0, 3 / 10**0.5, -1 / 10**0.5])
