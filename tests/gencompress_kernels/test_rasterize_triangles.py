"""Soft silhouettes and face coverage on every backend, against maps made face by face."""

import functools
import math

import pytest
import torch
from gencompress_kernels import rasterize_triangles as op
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes, visible
from numerics import assert_as_accurate
from triangle_samples import (
    SCENES,
    ball,
    camera,
    checker,
    clipped,
    crumpled,
    flat,
    joined,
    keep,
    silhouette,
    soft_maps,
    to,
)


def draw(scene, kind=torch.float32, backend=None, **options):
    return silhouettes(**to(scene, kind), backend=backend, **options)


def cover(scene, masks, kind=torch.float32, backend=None, **options):
    inputs = {k: v for k, v in to(scene, kind).items() if k not in ("width", "height")}
    return face_coverage(**inputs, masks=masks.to(kind), backend=backend, **options)


@functools.cache
def expected(name):
    return soft_maps(SCENES[name]())


@pytest.mark.parametrize("name", SCENES)
def test_silhouette_equals_maps_made_face_by_face(backend, name):
    scene, (maps, near) = SCENES[name](), expected(name)
    use, truth = keep(near), silhouette(maps)
    exact = draw(scene, torch.float64, "reference")[0]
    assert (exact - truth)[use].abs().max() < 1e-9
    plain, ours = draw(scene, backend="reference")[0], draw(scene, backend=backend)[0]
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    assert_as_accurate(ours[use], plain[use], truth[use], floor=2e-6)
    if name in ("ball", "one face"):
        assert (ours - truth)[use].abs().max() < 1e-5
        assert 0.1 < truth.mean() < 0.9


@pytest.mark.parametrize("name", SCENES)
def test_coverage_equals_sums_of_maps_made_face_by_face(backend, name):
    scene, (maps, near) = SCENES[name](), expected(name)
    keep(near)
    masks = checker(scene)
    outside = maps * (1 - masks[0].double())
    truth = (maps.sum((1, 2)), outside.sum((1, 2)), outside.amax((1, 2)))
    exact = cover(scene, masks, torch.float64, "reference", cull=False)
    plain = cover(scene, masks, backend="reference", cull=False)
    ours = cover(scene, masks, backend=backend, cull=False)
    # float32 holds a sum of 29,000 to 1e-3; and P changes by 1e-4 where it is cut off
    wide = 2e-7 * float(truth[0].max()) + 2e-4
    for k, floor in enumerate((wide, wide, 2e-6)):
        name = ("area", "outside", "peak")[k]
        values = [getattr(found, name)[0] for found in (ours, plain, exact)]
        assert (values[2] - truth[k]).abs().max() < 1e-8 * truth[k].max() + 2e-4 * near.sum(), name
        assert_as_accurate(values[0], values[1], truth[k], floor=floor, name=name)


def test_an_edge_is_a_half_and_a_distance_is_its_sigmoid(backend):
    scene = flat([[2.5, 2.5], [12.5, 2.5], [2.5, 12.5]])
    found = draw(scene, backend=backend)[0]
    assert (found[2:12, 2] - 0.5).abs().max() < 1e-6
    assert (found[2, 2:12] - 0.5).abs().max() < 1e-6
    assert (found[range(2, 12), range(12, 2, -1)] - 0.5).abs().max() < 1e-6
    # from a corner and from an edge, inside and out: SoftRas's sigmoid(+-d^2 / sigma^2)
    soft = draw(scene, backend=backend, sigma=2.0)[0]
    for row, column, square, side in ((2, 16, 16, -1), (0, 0, 8, -1), (5, 4, 4, 1), (3, 0, 4, -1)):
        truth = 1 / (1 + math.exp(-side * square / 4))
        assert float(soft[row, column]) == pytest.approx(truth, abs=1e-6)


def test_both_sides_of_an_edge_add_up_to_one(backend):
    scene = flat([[8, -900], [8, 900], [900, 0.0]], width=16, height=5)
    found = draw(scene, backend=backend, sigma=3.0)[0]
    assert (found + found.flip(1) - 1).abs().max() < 1e-6
    assert found[0, 0] < 0.01 and found[0, 15] > 0.99
    cut = draw(scene, backend=backend, sigma=2.0)[0]  # reach 6.07 px
    assert (cut[:, :2] == 0).all() and (cut[:, 2] > 0).all()


def test_whole_pixels_shift_the_map_exactly(backend):
    corners = torch.tensor([[3.25, 4.5], [10.75, 2.125], [6.5, 11.875], [9.0, 9.5]])
    faces = torch.tensor([[0, 1, 2], [1, 3, 2]])
    masks = torch.ones(1, 48, 40)
    masks[:, 5:9] = 0.25
    slack = 1e-6 if backend == "reference" else 0.0  # torch's sigmoid varies with the place

    def same(one, other):
        assert torch.allclose(one, other, rtol=slack, atol=slack)

    first = flat(corners, faces, 40, 48)
    before, sums = draw(first, backend=backend), cover(first, masks, backend=backend, cull=False)
    for x, y in ((1, 0), (13, 16), (0, 32), (25, 32)):
        moved = flat(corners + torch.tensor([x, y]), faces, 40, 48)
        same(draw(moved, backend=backend), before.roll((y, x), (1, 2)))
        after = cover(moved, masks.roll((y, x), (1, 2)), backend=backend, cull=False)
        for name in ("area", "outside", "peak", "extent"):
            same(getattr(after, name), getattr(sums, name))
    moved = flat(corners + torch.tensor([3, 7]), faces, 40, 48)
    assert (draw(moved, backend=backend) - before.roll((7, 3), (1, 2))).abs().max() < 1e-6


def test_sharp_maps_sum_to_the_projected_area(backend):
    g = torch.Generator().manual_seed(0)
    shape = torch.tensor([[0.0, 0.0], [9.0, 2.0], [3.0, 8.0]])  # 33 px^2
    corners = (shape + 4 + 6 * torch.rand(800, 1, 2, generator=g)).reshape(-1, 2)
    found = cover(flat(corners), torch.zeros(1, 20, 24), backend=backend, sigma=0.02)
    assert float(found.area.mean()) == pytest.approx(33, rel=0.01)
    assert torch.allclose(found.extent, torch.tensor(33.0)) and found.area.std() < 3
    blurred = cover(flat(corners), torch.zeros(1, 20, 24), backend=backend, sigma=0.8)
    assert abs(float(blurred.area.mean()) - 33) > 0.3


@pytest.mark.parametrize("name", SCENES)
def test_extent_is_the_area_within_the_frame(backend, name):
    scene = SCENES[name]()
    found = cover(scene, checker(scene), backend=backend)
    width, height = float(scene["width"]), float(scene["height"])
    for corners, extent, size in zip(clipped(scene), found.extent[0], found.size[0], strict=True):
        whole = polygon_area(corners) if corners is not None else 0.0
        assert float(size) == pytest.approx(whole, rel=1e-3, abs=1e-4)
        points = [] if corners is None else corners.tolist()
        for axis, limit in ((0, 0.0), (0, width), (1, 0.0), (1, height)):
            points = cut_off(points, axis, limit, 1 if limit == 0 else -1)
        assert float(extent) == pytest.approx(polygon_area(points), rel=1e-3, abs=1e-3)


def cut_off(points, axis, limit, sign):
    """The part of a polygon with sign * (coordinate - limit) >= 0."""
    kept = []
    for one, other in zip(points, points[1:] + points[:1], strict=True):
        a, b = sign * (one[axis] - limit), sign * (other[axis] - limit)
        if a >= 0:
            kept.append(one)
        if (a >= 0) != (b >= 0):
            kept.append([p + a / (a - b) * (q - p) for p, q in zip(one, other, strict=True)])
    return kept


def polygon_area(points):
    x, y = torch.as_tensor(points, dtype=torch.float64).reshape(-1, 2).T
    return float((x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2)


def test_outside_and_inside_make_up_the_area(backend):
    scene = SCENES["crumpled"]()
    masks = checker(scene)
    found = cover(scene, masks, backend=backend, cull=False)
    other = cover(scene, 1 - masks, backend=backend, cull=False)
    assert torch.allclose(found.outside + other.outside, found.area, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.area, other.area) and (found.outside > 0).any()
    none = cover(scene, torch.zeros_like(masks), backend=backend, cull=False)
    assert torch.allclose(none.outside, none.area, rtol=1e-6) and none.peak.max() > 0.9
    for cull in (True, False):
        full = cover(scene, torch.ones_like(masks), backend=backend, cull=cull)
        assert (full.outside == 0).all() and (full.peak == 0).all()


def test_culling_changes_nothing_but_the_area_of_what_is_skipped(backend):
    scene = joined(camera(48, 40), camera(48, 40, tilt=0.9))
    scene = dict(zip(("vertices", "faces"), ball(3), strict=True)) | scene
    masks = (draw(scene, backend=backend) > 0.5).float()
    masks[0, 15:22, 18:30] = 0.5
    plain = cover(scene, masks, backend=backend, cull=False)
    culled = cover(scene, masks, backend=backend, cull=True)
    for name in ("outside", "peak", "extent", "size"):
        assert torch.equal(getattr(plain, name), getattr(culled, name)), name
    skipped = culled.area != plain.area
    assert 0.2 < skipped.float().mean() < 0.9
    assert torch.equal(culled.area[skipped], culled.extent[skipped])
    assert (culled.outside[skipped] == 0).all() and (culled.outside > 0).any()
    # one pixel of the mask a little below 1 is enough to measure all whose box it lies in
    one = torch.ones(1, 40, 48)
    one[0, 20, 24] = 0.999
    face = flat([[20.5, 16.5], [29.0, 18.0], [22.0, 25.0]], width=48, height=40)
    found = cover(face, one, backend=backend)
    assert float(found.outside) == pytest.approx(1e-3, rel=1e-3)
    assert not torch.equal(found.area, found.extent)


def test_every_one_of_200_stacked_faces_counts(backend):
    g = torch.Generator().manual_seed(1)
    corners = torch.tensor([[2.0, 2.0], [7.0, 2.5], [4.0, 7.0]]) + 0.02 * torch.randn(
        200, 3, 2, generator=g
    )
    scene = flat(corners.reshape(-1, 2), width=9, height=9)
    found = cover(scene, torch.zeros(1, 9, 9), backend=backend)
    assert (found.area > 10).all() and (found.outside > 10).all() and (found.peak > 0.99).all()
    # thin enough together that the product of all 200 is not simply 0
    corners = torch.tensor([[9.6, 0.0], [30.0, 3.0], [9.6, 9.0]]) + 0.05 * torch.randn(
        200, 3, 2, generator=g
    )
    scene = flat(corners.reshape(-1, 2), width=9, height=9)
    maps, near = soft_maps(scene)
    truth = silhouette(maps)
    assert 0.05 < truth[4, 8] < 0.95 and (maps[:, 4, 8] > 0).sum() > 150
    assert torch.allclose(draw(scene, backend=backend)[0].double(), truth, atol=2e-4)


def test_near_plane_cuts_as_an_explicitly_cut_mesh(backend):
    cam = {"viewmats": torch.eye(4)[None], "width": 40, "height": 30}
    cam["intrinsics"] = torch.tensor([[[20.0, 0, 20], [0, 20, 15], [0, 0, 1]]])
    a, b, c = [0.1, 0.2, 2.0], [0.9, -0.3, -1.0], [-0.7, -0.4, -0.5]
    middle = lambda p, q, z: [x + (z - p[2]) / (q[2] - p[2]) * (y - x) for x, y in zip(p, q)]  # noqa
    one = {"vertices": torch.tensor([a, b, c]), "faces": torch.tensor([[0, 1, 2]]), **cam}
    cut = one | {"vertices": torch.tensor([a, middle(a, b, 0.5), middle(a, c, 0.5)])}
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)):
        turned = one | {"faces": torch.tensor([order]), "near": 0.5}
        assert torch.allclose(
            draw(turned, backend=backend), draw(cut, backend=backend), atol=2e-5
        ), order
    assert draw(cut, backend=backend).sum() > 20
    assert (draw(one | {"near": 2.5}, backend=backend) == 0).all()
    # None: a thousandth of the median depth of what lies in front
    whole = SCENES["inside"]()
    depths = whole["vertices"] @ whole["viewmats"][0, 2, :3] + whole["viewmats"][0, 2, 3]
    near = 1e-3 * float(depths[depths > 0].median())
    given = draw(whole | {"near": near}, backend=backend)
    whole.pop("near")
    assert torch.allclose(draw(whole, backend=backend), given, atol=1e-4) and given.min() > 0.5


def test_a_face_behind_the_camera_leaves_no_trace(backend):
    """Not even where a vertex behind is put out of harm's way, which a short lens would show."""
    scene = flat([[0, 0], [1, 0], [0, 1]], width=40, height=40)
    scene["vertices"][:, 2] = -3
    scene["intrinsics"] = torch.tensor([[[10.0, 0, 20], [0, 10, 20], [0, 0, 1]]])
    assert float(draw(scene, backend=backend).abs().max()) == 0
    found = cover(scene, torch.zeros(1, 40, 40), backend=backend)
    for values in (found.area, found.outside, found.peak, found.extent, found.size):
        assert float(values.abs().max()) == 0


def test_a_face_that_names_a_vertex_twice_is_not_there(backend):
    scene = flat([[5, 5], [15, 6], [8, 14]])
    alone = draw(scene, backend=backend)
    scene["faces"] = torch.tensor([[0, 1, 2], [1, 1, 2], [2, 0, 2], [0, 0, 0], [0, 2, 2]])
    assert torch.equal(draw(scene, backend=backend), alone)
    found = cover(scene, torch.zeros(1, 20, 24), backend=backend)
    assert float(found.area[0, 0]) > 0 and float(found.area[0, 1:].abs().max()) == 0
    scene["vertices"][1, 2] = -1  # the near plane cuts what names it, but not into being
    found = cover(scene, torch.zeros(1, 20, 24), backend=backend)
    assert float(found.area[0, 0]) > 0 and float(found.area[0, 1:].abs().max()) == 0


def test_the_near_plane_is_a_thousandth_of_the_median_depth(backend):
    scene = flat([[0, 0], [1, 0], [0, 1], [0.5, 0.5]], torch.tensor([[0, 1, 2], [0, 2, 3]]))
    scene["vertices"][:, 2] = torch.tensor([-1.0, 2, 4, 6])
    default = cover(scene, torch.zeros(1, 20, 24), backend=backend).size
    same, other = (
        cover(scene, torch.zeros(1, 20, 24), backend=backend, near=near).size
        for near in (4e-3, 8e-3)
    )
    assert torch.equal(default, same) and not torch.equal(default, other)


def test_degenerate_and_huge_input_has_finite_results(backend):
    for scale in (1e6, 1e12, 1e17):
        scene = crumpled(1, 0.2, width=20, height=20)
        scene["vertices"][::3] *= scale
        for near in (None, 1e-6):
            found = draw(scene, backend=backend, near=near)
            assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
            sums = cover(scene, checker(scene), backend=backend, near=near)
            assert all(getattr(sums, k).isfinite().all() for k in ("area", "outside", "peak"))
            assert sums.extent.isfinite().all() and sums.extent.max() <= 400 * (1 + 1e-5)
    behind = crumpled(1, width=20, height=20, back=-9.0)
    assert (draw(behind, backend=backend) == 0).all()
    assert (cover(behind, checker(behind), backend=backend).size == 0).all()


def test_no_faces_and_one_pixel(backend):
    scene = flat(torch.zeros(3, 2), torch.zeros(0, 3, dtype=torch.int64), 5, 4)
    assert torch.equal(draw(scene, backend=backend), torch.zeros(1, 4, 5))
    found = cover(scene, torch.ones(1, 4, 5), backend=backend)
    assert found.area.shape == found.outside.shape == found.extent.shape == (1, 0)
    none = scene | {"vertices": torch.zeros(0, 3)}
    assert torch.equal(draw(none, backend=backend), torch.zeros(1, 4, 5))
    small = flat([[0.3, 0.4], [0.6, 0.4], [0.4, 0.8]], width=1, height=1)
    assert float(draw(small, backend=backend)) == pytest.approx(
        float(soft_maps(small)[0]), abs=1e-6
    )


def test_views_chunks_and_layout_do_not_matter(backend, monkeypatch):
    scene = crumpled(1, 0.1, width=33, height=21)
    cams = [camera(33, 21, tilt=tilt, back=back) for tilt, back in ((0, 3), (1, 0.4), (2, 2.0))]
    scene |= joined(*cams)
    masks = checker(scene)
    masks[1] = 1 - masks[1]
    picture, sums = draw(scene, backend=backend), cover(scene, masks, backend=backend)
    for k, cam in enumerate(cams):
        assert torch.equal(draw(scene | cam, backend=backend)[0], picture[k])
        alone = cover(scene | cam, masks[k : k + 1], backend=backend)
        for name in ("area", "outside", "peak", "extent", "size"):
            assert torch.equal(getattr(alone, name)[0], getattr(sums, name)[k]), name
    mixed = dict(scene)
    for name in ("vertices", "viewmats", "intrinsics", "faces"):
        wide = torch.stack([scene[name], scene[name] * 0], -1)
        mixed[name] = wide[..., 0]
        assert not mixed[name].is_contiguous()
    for limit in (4_000_000, 1, 2 * len(scene["faces"])):
        monkeypatch.setattr(op, "MOST_POLYGONS", limit)
        assert torch.equal(draw(mixed, backend=backend), picture)
        again = cover(mixed, masks.mT.contiguous().mT, backend=backend)
        assert torch.equal(again.outside, sums.outside) and torch.equal(again.area, sums.area)


def test_same_bits_with_one_thread_and_two():
    numba = pytest.importorskip("numba")
    scene = crumpled(3, 0.1, width=150, height=90) | joined(camera(150, 90), camera(150, 90, 1.0))
    results, before = [], numba.get_num_threads()
    for threads in (1, before):
        numba.set_num_threads(threads)
        try:
            found = cover(scene, checker(scene), backend="cpu")
            front = visible(**scene, backend="cpu")
            results.append(
                (draw(scene, backend="cpu"), found.area, found.outside, found.peak, front.faces)
            )
        finally:
            numba.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_custom_ops_pass_opcheck(backend):
    ops, polygons = torch.ops.gencompress, torch.tensor([[0, 1, 2, 2], [3, 1, 2, 4], [-1] * 4])
    points = 9 * torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    polygons, masks = polygons.to(torch.int32), torch.rand(1, 7, 9)
    leaf = points.clone().requires_grad_()
    torch.library.opcheck(ops.triangle_silhouettes.default, (leaf, polygons, 1, 7, 9, 0.4, backend))
    torch.library.opcheck(
        ops.triangle_silhouettes_backward.default, (masks, masks, points, polygons, 0.4, backend)
    )
    torch.library.opcheck(
        ops.triangle_coverage.default, (leaf, polygons, masks, 0.4, False, backend)
    )
    torch.library.opcheck(
        ops.triangle_coverage_backward.default,
        (torch.rand(3, 2), points, polygons, masks, 0.4, True, backend),
    )


def test_no_output_is_left_as_it_was_allocated(backend, monkeypatch):
    scene = joined(camera(70, 41), camera(70, 41, back=-9.0)) | {"faces": ball(1)[1]}
    scene["vertices"] = ball(1)[0]
    plain = draw(scene, backend=backend), cover(scene, checker(scene), backend=backend)
    new = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: new(self, *a, **k).fill_(torch.nan)
    )
    assert torch.equal(draw(scene, backend=backend), plain[0])
    again = cover(scene, checker(scene), backend=backend)
    for name in ("area", "outside", "peak", "extent", "size"):
        assert torch.equal(getattr(again, name), getattr(plain[1], name)), name
    front = visible(**scene, backend=backend)
    assert not front.depths.isnan().any() and front.weights.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vertices", torch.full((3, 3), torch.nan), "vertices: has values that are not finite"),
        ("vertices", torch.full((3, 3), 1e30), "vertices reach 1e"),
        ("vertices", torch.zeros(3, 2), "vertices: got"),
        ("vertices", torch.zeros(3), "vertices: got"),
        ("vertices", torch.zeros(3, 3, dtype=torch.float64), "viewmats: got"),
        ("faces", torch.tensor([[0, 1, 3]]), "faces name vertices 0 to 3 of 3"),
        ("faces", torch.tensor([[-1, 1, 2]]), "faces name vertices -1 to 2 of 3"),
        ("faces", torch.tensor([[0, 1, 2]], dtype=torch.int32), "expected int64"),
        ("faces", torch.tensor([0, 1, 2]), "expected int64"),
        ("viewmats", torch.zeros(0, 4, 4), "no camera"),
        ("viewmats", torch.zeros(1, 3, 4), "viewmats: got"),
        ("intrinsics", torch.zeros(2, 3, 3), "intrinsics: got"),
        ("intrinsics", -torch.eye(3)[None], "focal length"),
        ("width", 0, "expected 1 to"),
        ("height", 40000, "expected 1 to"),
        ("sigma", 0.0, "sigma 0.0"),
        ("sigma", math.nan, "sigma nan"),
        ("near", 0.0, "near 0.0"),
        ("near", math.nan, "near nan"),
    ],
)
def test_bad_input_is_one_clear_error(name, value, message):
    scene = flat([[3.0, 2.0], [9.0, 3.0], [5.0, 8.0]])
    with pytest.raises(ValueError, match=message):
        silhouettes(**scene | {name: value})


def test_bad_masks_and_dtypes_are_one_clear_error():
    scene = flat([[3.0, 2.0], [9.0, 3.0], [5.0, 8.0]])
    for masks, message in (
        (torch.zeros(20, 24), "masks: got"),
        (torch.zeros(2, 20, 24), "masks: got"),
        (torch.full((1, 20, 24), 1.5), "not in"),
        (torch.full((1, 20, 24), -0.5), "not in"),
        (torch.full((1, 20, 24), torch.nan), "masks: has values"),
        (torch.zeros(1, 0, 24), "expected 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            cover(scene, masks)
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        draw(scene, torch.float64, "cpu")
    with pytest.raises(ValueError, match="sigma"):
        cover(scene, torch.zeros(1, 20, 24), sigma=1000.0)
