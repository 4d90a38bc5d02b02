"""Triangles by Triton in its interpreter: tiny silhouettes, coverage and hits as the reference's.

The suites of the op run on triton where there is a GPU; these here run everywhere.
"""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes, visible
from gencompress_kernels.rasterize_triangles.screen import project
from triangle_samples import ball, camera, flat, joined, to

pytestmark = pytest.mark.usefixtures("interpreted")
WIDTH, HEIGHT, SIGMA = 21, 15, 0.7
LEAVES = ("vertices", "viewmats", "intrinsics")


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_near(found, expected, tolerance=1e-5):
    """To `tolerance` of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def on_both(run):
    """What `run` gives on triton and on the reference."""
    expected = run("reference")
    return zip(run("triton"), expected, strict=True)


def soup(g, num=8):
    """Triangles of all sizes before two cameras, whose near plane cuts some to three corners and
    some to four; one twice, one behind, one that names a vertex twice."""
    centers = torch.randn(num, 1, 3, generator=g) * torch.tensor([0.8, 0.8, 0.5])
    corners = centers + torch.randn(num, 3, 3, generator=g) * torch.rand(num, 1, 1, generator=g)
    corners[:, :, 2] += 2.5
    corners[2] = corners[1]
    corners[3] = torch.tensor([[-0.6, -0.5, 2.0], [0.7, -0.4, 1.8], [0.1, 0.9, -1.5]])
    corners[4] = torch.tensor([[0.2, 0.3, 2.2], [-1.5, 0.4, -1.2], [1.8, 0.2, -1.0]])
    corners[5, :, 2] = -2
    faces = torch.arange(3 * num).view(num, 3)
    faces[6, 1] = faces[6, 0]
    cams = [camera(WIDTH, HEIGHT, focal=15.0, tilt=tilt, back=0.4) for tilt in (0.0, 0.3)]
    return {"vertices": corners.flatten(0, 1), "faces": faces, **joined(*cams), "near": 1.2}


def leaves_of(scene):
    return scene | {name: scene[name].clone().requires_grad_() for name in LEAVES}


def without_size(scene):
    return {k: v for k, v in scene.items() if k not in ("width", "height")}


def draw(scene, slopes, backend, sigma=SIGMA):
    """A silhouette and its gradients."""
    given = leaves_of(scene)
    found = silhouettes(**given, sigma=sigma, backend=backend)
    return found.detach(), *torch.autograd.grad((found * slopes).sum(), [given[k] for k in LEAVES])


def cover(scene, masks, slopes, backend, cull):
    """All that coverage gives, and its gradients."""
    given = leaves_of(scene)
    found = face_coverage(
        **without_size(given), masks=masks, sigma=SIGMA, cull=cull, backend=backend
    )
    loss = (found.area * slopes[0]).sum() + (found.outside * slopes[1]).sum()
    sums = found.area.detach(), found.outside.detach(), found.peak, found.extent, found.size
    return *sums, *torch.autograd.grad(loss, [given[k] for k in LEAVES])


def hits(scene, backend):
    return list(vars(visible(**scene, backend=backend)).values())


def test_silhouettes(g):
    scene, slopes = soup(g), torch.randn(2, HEIGHT, WIDTH, generator=g)
    results = list(on_both(lambda backend: draw(scene, slopes, backend)))
    for found, expected in results:
        assert expected.abs().max() > 0.1
        assert_near(found, expected)
    assert 0.05 < results[0][0].mean() < 0.9
    polygons = project(*(scene[k] for k in ("vertices", "faces", *LEAVES[1:], "near"))).polygons
    cut = polygons >= 2 * len(scene["vertices"])
    assert set(cut.sum(1).tolist()) == {0, 2, 3} and (polygons[:, 0] < 0).sum() == 4
    assert dispatch.last()["rasterize_triangles"] == "triton"


@pytest.mark.parametrize("cull", [False, True])
def test_coverage(g, cull):
    scene, masks = soup(g), torch.rand(2, HEIGHT, WIDTH, generator=g)
    masks[:, :11, 2:] = 1
    slopes = torch.randn(2, 2, len(scene["faces"]), generator=g)
    results = list(on_both(lambda backend: cover(scene, masks, slopes, backend, cull)))
    for found, expected in results:
        assert expected.abs().max() > 0.1
        assert_near(found, expected)
    area, outside, _, extent, _ = (found for found, _ in results[:5])
    skipped = (outside == 0) & (extent > 0) & (area == extent)
    assert bool(skipped.any()) == cull


def test_hits(g):
    scene = soup(g)
    scene |= {"vertices": torch.cat([scene["vertices"], ball(1)[0] * 0.5])}
    scene["vertices"][24:, 2] += 2
    scene["faces"] = torch.cat([scene["faces"], ball(1)[1] + 24])
    results = list(on_both(lambda backend: hits(scene, backend)))
    assert torch.equal(*results[0])
    assert len(results[0][0].unique()) > 10 and (results[0][0] == -1).any()
    for found, expected in results[1:]:
        assert_near(found, expected)


@pytest.mark.parametrize(
    "corners", [[[-40.0, -300], [50, 17.3], [-35, 310]], [[3, 2], [68, 34.7], [7, 31]]]
)
def test_boxes_of_many_tiles(g, corners):
    """Some of which lie beyond the blur; corners far outside of the picture. Against float64, from
    which the reference in float32 is further away."""
    scene = flat(corners, width=70, height=36)
    exact = to(scene, torch.float64)
    slopes, masks = torch.randn(1, 36, 70, generator=g), torch.rand(1, 36, 70, generator=g)
    ones = torch.ones(2, 1, 1)
    picture, slope, *_ = draw(scene, slopes, "triton")
    wanted, steep, *_ = draw(exact, slopes.double(), "reference")
    assert_near(picture, wanted.float(), 2e-6)
    # by depth and by the cameras torch adds up in float32 what nearly cancels
    assert_near(slope[:, :2], steep[:, :2].float(), 2e-5)
    wanted = cover(exact, masks.double(), ones.double(), "reference", False)[:5]
    for found, expected in zip(cover(scene, masks, ones, "triton", False), wanted, strict=False):
        assert_near(found, expected.float(), 1e-6)
    for found, expected in on_both(lambda backend: hits(scene, backend)):
        assert_near(found, expected)


def test_every_one_of_many_faces_counts(g):
    """Their logarithms as whole numbers, from inside the first to a share of 1e-4."""
    corners = torch.tensor([[4.6, 0.0], [30.0, 3.0], [4.6, 6.0]])
    corners = corners + 0.05 * torch.randn(20, 3, 2, generator=g)
    scene, slopes = flat(corners.reshape(-1, 2), width=6, height=5), torch.ones(1, 5, 6)
    results = list(on_both(lambda backend: draw(scene, slopes, backend)))
    for found, expected in results:
        assert_near(found, expected, 3e-5)
    assert ((results[0][0] > 0.05) & (results[0][0] < 0.95)).any()


def test_of_equal_depths_the_lower_face_is_in_front(g):
    corners = torch.tensor([[1.0, 1], [14, 2], [3, 12], [2, 5], [15, 1.5], [13, 12]])
    faces = torch.tensor([[3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]])
    scene = flat(corners, faces, width=16, height=14)
    found = visible(**scene, backend="triton").faces
    assert set(found.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(found, visible(**scene, backend="reference").faces)
    turned = scene | {"faces": faces.flip(0)}
    turned = visible(**turned, backend="triton").faces
    both = (found == 0) & (turned == 0)  # where the two kinds overlap: each time the first
    assert both.any() and set(turned.unique().tolist()) == {-1, 0, 1}


def test_no_pixel_falls_between_neighbours(g):
    """Edges through pixel centres, and others."""
    side = torch.arange(6.0)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    index = torch.arange(36).view(6, 6)
    a, b, c, d = (
        part.flatten() for part in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:])
    )
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([c, a, d], 1)])
    bent = 2.3 * grid + 0.3 * torch.randn(36, 2, generator=g)
    for points, inner in ((2 * grid + 0.5, slice(0, 10)), (bent, slice(1, 10))):
        found = visible(**flat(points, faces, 11, 11), backend="triton").faces[0]
        assert (found[inner, inner] >= 0).all()


def test_nothing_in_front():
    vertices, faces = ball(0)[0], ball(0)[1][:4]
    lens = joined(camera(9, 8), camera(9, 8, tilt=0.2))
    scene = {"vertices": vertices, "faces": faces, **lens}
    behind = scene | joined(camera(9, 8, back=-5.0), camera(9, 8, back=-6.0))
    twice = scene | {"faces": faces[:, [0, 1, 1]]}
    aside = scene | {"vertices": vertices + 40}
    empty = scene | {"faces": faces[:0]}
    for some in (behind, twice, aside, empty, empty | {"vertices": vertices[:0]}):
        count = len(some["faces"])
        assert not any(t.any() for t in draw(some, torch.ones(2, 8, 9), "triton"))
        for cull in (False, True):
            sums = cover(some, torch.zeros(2, 8, 9), torch.ones(2, 2, count), "triton", cull)
            assert sums[0].shape == (2, count)
            assert not any(t.any() for t in (*sums[:4], *sums[5:]))
        found, depths, weights = hits(some, "triton")
        assert (found == -1).all() and (depths == torch.inf).all() and not weights.any()


def test_what_has_no_area_blurs_about_its_line():
    corners = [[5, 5], [5, 5], [9, 7], [6, 6], [6, 6], [6, 6], [2.5, 2.5], [4.5, 4.5], [8.5, 8.5],
               [3, 3], [3.001, 3], [9, 11], [1e9, 4], [3, 9], [-1e9, 2]]  # fmt: skip
    scene, slopes = flat(corners, width=13, height=12), torch.ones(1, 12, 13)
    # which of two edges in one place is nearest, and so a gradient, is a matter of rounding
    for count, tolerance in ((15, 1e-4), (9, 1e-5)):
        some = scene | {"faces": scene["faces"][: count // 3]}
        (picture, *gradients), (wanted, *_) = (
            draw(some, slopes, b) for b in ("triton", "reference")
        )
        assert_near(picture, wanted, tolerance)
        assert all(slope.isfinite().all() for slope in gradients)
    assert (visible(**some, backend="triton").faces == -1).all()


def test_layout_and_views_change_no_bit(g):
    scene, masks = soup(g, 7), torch.rand(2, HEIGHT, WIDTH, generator=g).round()
    slopes = torch.randn(2, HEIGHT, WIDTH, generator=g)
    strided = dict(scene)
    for name in ("vertices", "viewmats", "intrinsics", "faces"):
        strided[name] = torch.stack([scene[name], scene[name] * 0], -1)[..., 0]
        assert not strided[name].is_contiguous()
    sums = torch.ones(2, 2, 7)
    found = draw(scene, slopes, "triton"), cover(scene, masks, sums, "triton", True)
    again = (
        draw(strided, slopes.mT.contiguous().mT, "triton"),
        cover(strided, masks.mT.contiguous().mT, sums, "triton", True),
    )
    front, also = hits(scene, "triton"), hits(strided, "triton")
    for one, other in (*zip(found, again, strict=True), (front, also)):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    alone = scene | {name: scene[name][1:] for name in ("viewmats", "intrinsics")}
    picture = silhouettes(**alone, sigma=SIGMA, backend="triton")
    both = silhouettes(**scene, sigma=SIGMA, backend="triton")
    assert torch.equal(picture[0], both[1])
    for one, other in zip(hits(alone, "triton"), front, strict=True):
        assert torch.equal(one[0], other[1])


def test_float64_is_refused():
    scene = to(flat([[3.0, 2.0], [9.0, 3.0], [5.0, 8.0]]), torch.float64)
    masks = torch.ones(1, 20, 24).double()
    for run in (
        lambda: silhouettes(**scene, backend="triton"),
        lambda: face_coverage(**without_size(scene), masks=masks, backend="triton"),
        lambda: visible(**scene, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"the triton backend takes float32, got torch\.float"):
            run()
