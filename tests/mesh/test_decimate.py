"""Quadric decimation as a baseline: the count that was asked for, and the shape kept."""

import math

import pytest
import torch

from gencompress.mesh.decimate import decimate


def grid(num, bump):
    """[0, 1] x [0, 1] in 2 (num - 1)^2 faces, facing +z; bump: a height for every place."""
    line = torch.linspace(0, 1, num, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    vertices = torch.stack([x, y, bump(x, y)], 2).reshape(-1, 3)
    index = torch.arange(num * num).reshape(num, num)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = torch.cat([torch.stack([a, b, c], 2), torch.stack([a, c, d], 2)])
    return vertices, faces.reshape(-1, 3)


def sphere(num=40):
    """A closed surface: the grid's square wrapped twice, poles closed by welding."""
    vertices, faces = grid(num, lambda x, y: 0 * x)
    turn, polar = (2 * math.pi * vertices[:, 0], math.pi * vertices[:, 1])
    points = torch.stack([polar.sin() * turn.cos(), polar.sin() * turn.sin(), -polar.cos()], 1)
    unique, index = torch.unique((points * 1e9).round(), dim=0, return_inverse=True)
    faces = index[faces]
    a, b, c = faces.T
    return unique / 1e9, faces[(a != b) & (b != c) & (c != a)]


def volume(vertices, faces):
    a, b, c = vertices.double()[faces].unbind(1)
    return float((torch.linalg.cross(a, b) * c).sum() / 6)


def edges(faces):
    pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
    return torch.unique(pairs, dim=0, return_counts=True)


@pytest.mark.parametrize("target", [2900, 1001, 300, 60])
def test_a_sphere_stays_closed_turned_out_and_round(target):
    vertices, faces = sphere()
    fewer, kept = decimate(vertices, faces, target)
    assert target - 2 <= len(kept) <= target
    assert fewer.dtype == vertices.dtype and kept.dtype == torch.int64
    assert torch.equal(kept.unique(), torch.arange(len(fewer)))
    pairs, count = edges(kept)
    assert (count == 2).all() and len(fewer) - len(pairs) + len(kept) == 2
    assert (fewer.norm(dim=1) - 1).abs().max() < 8 / target  # sagitta: 5
    assert volume(fewer, kept) == pytest.approx(volume(vertices, faces), rel=20 / target)


def test_flat_parts_go_first():
    """A fold along x = 1/2: its two flat sides need few faces, and the fold stays sharp."""
    vertices, faces = grid(21, lambda x, y: (x - 0.5).abs())
    fewer, kept = decimate(vertices, faces, 40)
    assert 30 <= len(kept) <= 40
    assert (fewer[:, 2] - (fewer[:, 0] - 0.5).abs()).abs().max() < 1e-6
    assert (fewer[:, 2] < 1e-6).sum() >= 2


def test_enough_faces_come_back_as_they_are():
    vertices, faces = sphere(8)
    for target in (len(faces), len(faces) + 5):
        same = decimate(vertices, faces, target)
        assert same[0] is vertices and same[1] is faces
    before = vertices.clone(), faces.clone()
    decimate(vertices, faces, 20)
    assert torch.equal(vertices, before[0]) and torch.equal(faces, before[1])


def test_float32_in_float32_out_the_same_every_time():
    vertices, faces = sphere(20)
    first, second = (decimate(vertices.float(), faces, 100) for _ in range(2))
    assert first[0].dtype == torch.float32
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_separate_faces_are_dropped_one_by_one(generator):
    vertices = torch.rand(30, 3, generator=generator)
    fewer, kept = decimate(vertices, torch.arange(30).reshape(10, 3), 4)
    assert len(kept) == 4 and len(fewer) == 12


@pytest.mark.parametrize(
    ("change", "target", "says"),
    [
        (None, 0, "target_faces is 0"),
        (None, -3, "target_faces is -3"),
        (None, 1, "cannot be merged to 1"),
        ("nan", 10, "finite"),
        ("high", 10, "outside 0 to"),
        ("low", 10, "outside 0 to"),
    ],
)
def test_what_cannot_be_done(change, target, says):
    vertices, faces = sphere(10)
    if change == "nan":
        vertices[3, 1] = math.nan
    if change in ("high", "low"):
        faces[2, 1] = len(vertices) if change == "high" else -1
    with pytest.raises(ValueError, match=says):
        decimate(vertices, faces, target)
