"""Surfaces of fields: where they lie, which way they face, hollows, colours, files, refusals."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from nerf.hollow_samples import BOX, GLOW, ball_cells, voxel_field

from gencompress.nerf import surface
from gencompress.nerf.field import Space
from gencompress.nerf.surface import Surface, extract, filled, write_surface
from gencompress.report.preview import read_previews


def volume(found):
    a, b, c = found.vertices.double()[found.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def parts(found):
    """Connected components, and whether every edge has its two faces, once each way."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    f = found.faces.numpy()
    edges = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(found.vertices),) * 2)
    ways = {tuple(edge) for edge in edges.tolist()}
    closed = len(ways) == len(edges) and all((b, a) in ways for a, b in ways)
    return connected_components(graph)[0], closed


@pytest.fixture
def dense(monkeypatch):
    """Puts an analytic density, of world points in BOX, in place of that of the field."""

    def put(density):
        monkeypatch.setattr(surface, "densities", lambda _, points: density(points * 2 - 1))
        return voxel_field(ball_cells(4, 2.0))

    return put


def soft_ball(points, radius=0.6, width=0.01, most=300.0):
    return most * torch.sigmoid((radius - points.norm(dim=-1)) / width)


def test_a_ball_lies_where_it_is_and_faces_out(dense):
    found = extract(dense(soft_ball), 48)
    side = 2 / 48
    threshold = math.log(2) / (2 / 32)  # half of the light in a thirty-second of the box
    radius = 0.6 + 0.01 * math.log(300 / threshold - 1)
    off = found.vertices.norm(dim=1) - radius
    assert off.abs().max() < 0.35 * side and off.mean().abs() < 0.1 * side
    assert volume(found) == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)  # not negative
    assert parts(found) == (1, True)
    assert found.vertices.dtype == torch.float32 and found.faces.dtype == torch.int64


def test_the_threshold_says_where(dense):
    """A ball whose density falls linearly to 100 at its rim: a higher threshold, a smaller ball."""
    field = dense(lambda p: (1100 - 1000 * p.norm(dim=-1) / 0.8).clamp(min=0))
    for threshold in (200.0, 500.0, 900.0):
        found = extract(field, 40, threshold)
        wanted = 0.8 * (1100 - threshold) / 1000
        assert float((found.vertices.norm(dim=1) - wanted).abs().max()) < 0.25 * 2 / 40
    with pytest.raises(ValueError, match=r"largest density .* of 40 cells a side is 1\.0\de\+03"):
        extract(field, 40, 1200.0)


def test_a_hollow_has_one_sheet(dense):
    """The inner surface of a shell is not there; the outer one is that of the solid ball, bit for
    bit, and so is it where a second hollow lies in a ball within the first."""

    def shell(points):
        radius = points.norm(dim=-1)
        return torch.where(
            (radius < 0.4) & ((radius > 0.25) | (radius < 0.15)), 0, soft_ball(points)
        )

    solid, hollow = (extract(dense(density), 40) for density in (soft_ball, shell))
    assert torch.equal(hollow.vertices, solid.vertices) and torch.equal(hollow.faces, solid.faces)
    assert parts(hollow) == (1, True)


def test_a_hollow_with_a_way_out_stays(dense):
    def cup(points):
        x, y, _ = points.unbind(-1)
        bored = (points.norm(dim=-1) < 0.4) | ((x.hypot(y) < 0.2) & (points[:, 2] > 0))
        return torch.where(bored, 0, soft_ball(points))

    found = extract(dense(cup), 40)
    assert volume(found) < 0.75 * volume(extract(dense(soft_ball), 40))
    assert parts(found) == (1, True)


def test_filling_goes_through_sides_not_edges():
    values = np.ones((5, 5, 5))
    values[1, 1, 1] = values[2, 2, 1] = 0.0
    values[0] = 0.0  # the outside; its side touches the first hole, which touches the second's edge
    found = filled(values, 0.5)
    assert found[1, 1, 1] == 0 and found[2, 2, 1] == 1
    assert (found[0] == 0).all() and (found[1:] == np.where(values[1:] == 0, found[1:], 1)).all()
    assert values[2, 2, 1] == 0  # the caller's is as it was


def test_what_reaches_the_border_is_closed_there(dense):
    found = extract(dense(lambda p: torch.where(p[:, 0] > 0, 1e3, 0.0)), 16)
    assert parts(found) == (1, True)
    low, high = found.vertices.amin(0), found.vertices.amax(0)
    assert torch.allclose(low, torch.tensor([0.0, -1.0, -1.0]), atol=0.07)
    assert torch.allclose(high, torch.ones(3), atol=0.07)


def test_axes_are_not_mixed_up(dense):
    found = extract(
        dense(
            lambda p: torch.where(
                (p - p.new_tensor([0.5, -0.25, 0])).abs().amax(-1) < 0.25, 1e3, 0.0
            )
        ),
        32,
    )  # noqa: E501
    middle = (found.vertices.amin(0) + found.vertices.amax(0)) / 2
    assert torch.allclose(middle, torch.tensor([0.5, -0.25, 0.0]), atol=0.02)


def test_only_where_rays_take_samples():
    occupancy = torch.ones(16, 16, 16, dtype=torch.bool)
    occupancy[:8] = False
    found = extract(voxel_field(ball_cells(16, 0.8), occupancy=occupancy), 32)
    assert float(found.vertices[:, 0].min()) > -0.05
    with pytest.raises(ValueError, match="no surface: the largest density .* is 0,"):
        extract(voxel_field(ball_cells(16, 0.8), occupancy=torch.zeros_like(occupancy)), 32)


def test_a_box_that_is_no_cube_nor_at_the_origin():
    space = Space((1.0, -2.0, 0.0), (2.0, 4.0, 2.0))
    found = extract(voxel_field(ball_cells(20, 0.7), space=space), 40)
    low, high = found.vertices.amin(0), found.vertices.amax(0)
    assert torch.allclose((low + high) / 2, torch.tensor([1.5, 1.0, 1.0]), atol=0.02)
    assert torch.allclose(
        (high - low) / torch.tensor([1.0, 6.0, 2.0]), torch.tensor(0.7), atol=0.05
    )
    assert volume(found) > 0


def test_of_contracted_space_only_the_box():
    """Cells are of the contracted cube, whose middle half is the box."""
    kept = torch.zeros(16, 16, 16, dtype=torch.bool)
    kept[6:8, 6:10, 6:10] = True  # x from -0.5 to 0
    kept[0:3] = True  # far outside
    found = extract(voxel_field(kept, space=replace(BOX, contracted=True)), 32)
    low, high = found.vertices.amin(0), found.vertices.amax(0)
    assert torch.allclose(low, torch.tensor([-0.5, -0.5, -0.5]), atol=0.04)
    assert torch.allclose(high, torch.tensor([0.0, 0.5, 0.5]), atol=0.04)


def test_colours_are_those_seen_along_the_inward_normal(dense):
    found = extract(dense(soft_ball), 48)
    inward = -torch.nn.functional.normalize(found.vertices, dim=1)
    wanted = torch.sigmoid(GLOW * inward)
    off = (found.colors.float() / 255 - wanted).abs()
    assert found.colors.dtype == torch.uint8
    assert float(off.mean()) < 0.03 and float(off.max()) < 0.15


def test_a_vertex_beside_an_empty_cell_has_the_colour_behind_it(monkeypatch):
    """Colours are those of what takes the light, not of the empty point at the vertex."""
    field = voxel_field(ball_cells(32, 0.7))
    field.layers[4][:] = 0  # grey, but black where the features are exactly zero

    def color(field, points, _):
        cell = (points * 32).long().clamp(max=31)
        return torch.where(field.cells[cell.unbind(-1)][:, None], 0.8, 0.0).expand(-1, 3)

    monkeypatch.setattr(surface, "colors_at", color)
    found = extract(field, 48).colors.float() / 255
    assert float(found.min()) > 0.78


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_files_hold_the_surface(tmp_path, suffix):
    import trimesh

    found = extract(voxel_field(ball_cells(16, 0.7)), 24)
    path = tmp_path / f"ball{suffix}"
    write_surface(path, found)
    read = trimesh.load(path, process=False, force="mesh", maintain_order=True)
    assert np.allclose(read.vertices, found.vertices, atol=1e-6)
    assert np.array_equal(read.faces, found.faces)
    assert np.array_equal(read.visual.vertex_colors[:, :3], found.colors)
    with pytest.raises(FileExistsError, match="exists already"):
        write_surface(path, found)
    write_surface(path, replace(found, colors=255 - found.colors), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_obj_has_colours_after_the_coordinates(tmp_path):
    found = extract(voxel_field(ball_cells(16, 0.7)), 24)
    write_surface(tmp_path / "x.obj", found)
    lines = (tmp_path / "x.obj").read_text().splitlines()
    numbers = [line.split()[1:] for line in lines if line.startswith("v ")]
    assert len(numbers) == len(found.vertices)
    for line, place, color in zip(numbers, found.vertices, found.colors, strict=True):
        assert [float(x) for x in line] == pytest.approx(
            [*place.tolist(), *(color / 255).tolist()], abs=1e-6
        )
    assert sum(bool(re.fullmatch(r"f \d+ \d+ \d+", line)) for line in lines) == len(found.faces)


def test_a_glb_is_one_that_the_page_reads(tmp_path):
    preview = tmp_path / "preview"
    preview.mkdir()
    found = extract(voxel_field(ball_cells(16, 0.7)), 24)
    write_surface(preview / "after.glb", found)
    _, scene, _ = read_previews(tmp_path)
    assert scene["counts"] == {"after": len(found.faces)}
    data = (preview / "after.glb").read_bytes()
    gltf = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    kinds = {
        name: (gltf["accessors"][i]["componentType"], gltf["accessors"][i]["type"])
        for name, i in gltf["meshes"][0]["primitives"][0]["attributes"].items()
    }
    assert kinds == {"POSITION": (5126, "VEC3"), "COLOR_0": (5121, "VEC4")}
    assert not any("matrix" in node or "translation" in node for node in gltf["nodes"])


def test_refusals(tmp_path):
    field = voxel_field(ball_cells(16, 0.7))
    for resolution in (7, 1025):
        with pytest.raises(ValueError, match=f"resolution of {resolution}, expected 8 to 1024"):
            extract(field, resolution)
    for threshold in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a positive density"):
            extract(field, 16, threshold)
    nothing = Surface(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]), torch.zeros(3, 3).byte())
    with pytest.raises(ValueError, match="x.stl: a surface is written as .ply, .obj, .glb"):
        write_surface(tmp_path / "x.stl", nothing)
    assert list(tmp_path.iterdir()) == []
