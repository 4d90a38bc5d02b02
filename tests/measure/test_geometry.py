"""Distances between surfaces whose distances are known in closed form."""

import math

import pytest
import torch

from gencompress.measure.geometry import compare_surfaces, nearest, sample_surface


def square(z=0.0, size=1.0, turned=False):
    vertices = size * torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    vertices[:, 2] = z
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    return vertices, faces.flip(1) if turned else faces


def sphere(radius, num=96):
    """Latitudes and longitudes; the quads shrink to triangles, some of no area, at the poles."""
    polar, turn = torch.meshgrid(
        torch.linspace(0, math.pi, num // 2 + 1), torch.arange(num) * (2 * math.pi / num),
        indexing="ij",
    )  # fmt: skip
    points = torch.stack([polar.sin() * turn.cos(), polar.sin() * turn.sin(), polar.cos()], 2)
    index = torch.arange(len(polar) * num).reshape(-1, num)
    a, b = index[:-1], index[1:]
    c, d = b.roll(-1, 1), a.roll(-1, 1)
    faces = torch.cat([torch.stack([a, b, c], 2), torch.stack([a, c, d], 2)])
    return radius * points.reshape(-1, 3).double(), faces.reshape(-1, 3)


def test_parallel_planes_are_as_far_as_they_are(generator):
    """Distance d over a diagonal of sqrt 2: L1 is d / sqrt 2, TMN 1000 x 2 x d^2 / 2."""
    found = compare_surfaces(*square(0.1), *square(), generator, count=20_000, tmn_count=20_000)
    assert found.chamfer_l1 == pytest.approx(0.1 / math.sqrt(2), rel=0.002)
    assert found.chamfer_tmn == pytest.approx(1000 * 0.01, rel=0.004)
    assert found.f_score == found.precision == found.recall == 0
    assert found.normal_consistency == pytest.approx(1)
    assert found.count == 20_000


def test_scale_of_both_changes_nothing_and_the_truth_sets_the_unit():
    for size in (1, 50):
        found = compare_surfaces(
            *square(0.1 * size, size), *square(0, size), torch.Generator().manual_seed(1)
        )
        assert found.chamfer_l1 == pytest.approx(0.1 / math.sqrt(2), rel=0.01)
        assert found.chamfer_tmn == pytest.approx(10, rel=0.03)
    # half of the square's side for the truth: d is twice the share of its diagonal
    found = compare_surfaces(*square(0.1, 0.5), *square(0, 0.5), torch.Generator().manual_seed(1))
    assert found.chamfer_l1 == pytest.approx(0.2 / math.sqrt(2), rel=0.01)


def test_spheres_one_within_the_other(generator):
    """The nearest point of a concentric sphere is on the same ray, d away."""
    radius, d = 1.0, 0.1
    found = compare_surfaces(
        *sphere(radius + d), *sphere(radius), generator, count=20_000, tmn_count=50_000
    )
    diagonal = 2 * math.sqrt(3) * radius
    assert found.chamfer_l1 == pytest.approx(d / diagonal, rel=0.02)
    assert found.chamfer_tmn == pytest.approx(1000 * 2 * (d / diagonal) ** 2, rel=0.04)
    assert found.normal_consistency > 0.995


def test_both_ways_count_alike(generator):
    """Ours is the left half of the truth: all of ours is true, half of the truth is found; the
    mean distance from the truth's right half [1/2, 1] is 1/4."""
    half = square()[0] * torch.tensor([0.5, 1, 1]), square()[1]
    found = compare_surfaces(*half, *square(), generator, count=40_000, tmn_count=40_000)
    assert found.precision > 0.999
    assert found.recall == pytest.approx(0.5 + 0.01 * math.sqrt(2), abs=0.01)
    assert found.f_score == pytest.approx(2 * found.recall / (1 + found.recall), rel=1e-3)
    assert found.chamfer_l1 == pytest.approx(0.5 * 0.5 * 0.25 / math.sqrt(2), rel=0.05)
    assert found.chamfer_tmn == pytest.approx(1000 * 0.5 * 0.25 / 3 / 2, rel=0.02)
    other = compare_surfaces(*square(), *half, generator, count=40_000)
    assert other.recall > 0.999 and 0.5 < other.precision < 0.53


def test_f_score_turns_at_a_hundredth_of_the_diagonal(generator):
    for share, wanted in ((0.0098, 1), (0.0102, 0)):
        found = compare_surfaces(*square(share * math.sqrt(2)), *square(), generator, count=100_000)
        assert found.f_score == pytest.approx(wanted, abs=0.2), share


def test_normals_across_and_turned_over(generator):
    flat, faces = square()
    upright = flat[:, [2, 0, 1]]
    assert compare_surfaces(upright, faces, flat, faces, generator).normal_consistency < 1e-6
    over = compare_surfaces(*square(turned=True), flat, faces, generator)
    assert over.normal_consistency == pytest.approx(1)
    slope = flat.clone()
    slope[:, 2] = flat[:, 0]
    sloped = compare_surfaces(slope, faces, flat, faces, generator, count=5000).normal_consistency
    assert sloped == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_equal_surfaces_have_only_the_spacing_between_them(generator):
    """Random points of density n have their nearest at 1 / (2 sqrt n) on average."""
    few, many = (
        compare_surfaces(*square(), *square(), generator, count=n, tmn_count=n)
        for n in (10_000, 100_000)
    )
    assert few.chamfer_l1 == pytest.approx(0.5 / 100 / math.sqrt(2), rel=0.05)
    assert many.chamfer_l1 == pytest.approx(few.chamfer_l1 / math.sqrt(10), rel=0.05)
    assert few.f_score > 0.99 and many.f_score == 1


def test_points_are_spread_by_area(generator):
    """Moments of a square made of four unequal triangles: means 1/2, variances 1/12; none of the
    three faces without area is drawn."""
    vertices = torch.tensor(
        [[0.0, 0, 3], [1, 0, 3], [1, 1, 3], [0, 1, 3], [0.2, 0.3, 3], [9, 9, 9]]
    )
    faces = torch.tensor(
        [[5, 5, 5], [0, 1, 4], [1, 2, 4], [5, 0, 5], [2, 3, 4], [3, 0, 4], [0, 0, 5]]
    )
    points, normals = sample_surface(vertices, faces, 200_000, generator)
    assert points.dtype == normals.dtype == torch.float64
    assert (points[:, 2] - 3).abs().max() < 1e-12
    assert torch.equal(normals, torch.tensor([0.0, 0, 1]).double().expand_as(normals))
    flat = points[:, :2]
    assert (flat.mean(0) - 0.5).abs().max() < 0.004
    assert (flat.var(0) - 1 / 12).abs().max() < 0.001
    assert abs(float((flat[:, 0] * flat[:, 1]).mean()) - 0.25) < 0.004
    left = ((flat < 0.5).double().mean(0) - 0.5).abs().max()
    assert left < 0.006


@pytest.mark.parametrize("size", [1.0, 0.7, 3.3e-5])
def test_no_draw_takes_a_face_without_area(generator, monkeypatch, size):
    """The lowest and the highest draw there is: the first and the last face with an area."""
    vertices = size * torch.tensor(
        [[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [4, 0, 0], [5, 1, 0]]
    )
    faces = torch.tensor([[0, 0, 1], [0, 1, 2], [3, 4, 4], [3, 5, 4], [5, 5, 5], [1, 3, 4]])
    for draw, wanted in ((0.0, 0.0), (1 - 2**-53, 4.0)):
        monkeypatch.setattr(
            torch, "rand", lambda *a, draw=draw, **k: torch.full((3, 2), draw, dtype=torch.float64)
        )
        points, normals = sample_surface(vertices, faces, 2, generator)
        assert normals.norm(dim=1).tolist() == pytest.approx([1, 1])
        assert points[:, 0].tolist() == pytest.approx([wanted * size] * 2)


def test_one_triangle_is_filled_evenly(generator):
    """Every corner weight has mean 1/3 and variance 1/18, every pair covariance -1/36."""
    points, _ = sample_surface(torch.eye(3), torch.tensor([[0, 1, 2]]), 200_000, generator)
    assert (points.sum(1) - 1).abs().max() < 1e-12 and points.min() >= 0
    assert (points.mean(0) - 1 / 3).abs().max() < 0.002
    wanted = torch.full((3, 3), -1 / 36).double() + torch.eye(3).double() / 12
    assert (torch.cov(points.T) - wanted).abs().max() < 0.001


def test_same_generator_same_numbers():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return compare_surfaces(*sphere(1.0), *square(), generator, count=500)

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_nearest():
    distance, index = nearest(
        torch.tensor([[0.0, 0, 0], [5, 0, 0]]).double(), torch.tensor([[4.0, 0, 3], [0, 1, 0]])
    )
    assert index.tolist() == [1, 0]
    assert distance.tolist() == pytest.approx([1, math.sqrt(10)])


@pytest.mark.parametrize(
    ("vertices", "faces", "count", "says"),
    [
        (torch.zeros(3, 3), [[0, 1, 2]], 5, "area of 1 faces is 0"),
        (torch.eye(3), [[0, 1, 1]], 5, "area"),
        (torch.full((3, 3), math.nan), [[0, 1, 2]], 5, "area of 1 faces is nan"),
        (torch.eye(3) * math.inf, [[0, 1, 2]], 5, "area"),
        (torch.eye(3), [[0, 1, 2]], 0, "count is 0"),
        (torch.eye(3), [[0, 1, 3]], 5, "outside 0 to 2"),
        (torch.eye(3), [[0, 1, -1]], 5, "outside 0 to 2"),
        (torch.eye(3)[:, :2], [[0, 1, 2]], 5, r"expected \[V, 3\]"),
        (torch.eye(3), [[0, 1]], 5, r"expected \[V, 3\]"),
    ],
)
def test_bad_surfaces(generator, vertices, faces, count, says):
    with pytest.raises(ValueError, match=says):
        sample_surface(vertices, torch.tensor(faces), count, generator)


def test_no_faces(generator):
    empty = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="area of 0 faces"):
        sample_surface(torch.eye(3), empty, 5, generator)
    with pytest.raises(ValueError, match="no faces"):
        compare_surfaces(*square(), torch.eye(3), empty, generator)
    with pytest.raises(ValueError, match="diagonal of 0"):
        compare_surfaces(*square(), torch.ones(3, 3), torch.tensor([[0, 1, 2]]), generator)
