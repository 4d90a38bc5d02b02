"""CUDA kernels in an emulation: values and gradients of tiny inputs equal the reference's.

The kernels run as C++ on the CPU, threads first to last and last to first, which must not change a
bit. The suites of the ops run on cuda where there is a GPU; these here run everywhere.
"""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.hashgrid_encode import hashgrid_encode, hashgrid_levels
from gencompress_kernels.rasterize_splats import (
    rasterize_splats,
    splat_corrections,
    splat_removal_errors,
)
from gencompress_kernels.rasterize_splats.squares import splat_squared_gradients
from gencompress_kernels.rasterize_surfels import rasterize_surfels
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes, visible
from gencompress_kernels.select import kth_value, select_top
from raster_samples import camera, make_scene

SIGMA = 0.7


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def on_cuda(emulated_cuda):
    """Results of `run` on cuda beside those of the reference, after comparing both orders."""

    def both(run):
        expected = run("reference")
        found = run("cuda")
        emulated_cuda(reverse=True)
        for ahead, back in zip(found, run("cuda"), strict=True):
            assert torch.equal(ahead, back)
        emulated_cuda(reverse=False)
        return zip(found, expected, strict=True)

    return both


def assert_near(found, expected, tolerance=1e-5):
    """To `tolerance` of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = float(expected[expected.isfinite()].abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def scores_of(kind, g):
    scores = torch.randn(9000, generator=g)
    if kind == "ties":
        scores = scores.round()  # zeros of both signs among them
    if kind == "extremes":
        scores[:9] = torch.tensor([torch.inf, -torch.inf, 0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1])
    return scores[::2] if kind == "strided" else scores


@pytest.mark.parametrize("kind", ["plain", "ties", "extremes", "strided"])
def test_select(on_cuda, g, kind):
    scores = scores_of(kind, g)
    for count in (1, 2000, len(scores)):

        def run(backend, count=count):
            keep = select_top(scores, count, backend=backend)
            return keep, kth_value(scores, count, backend=backend)

        for found, expected in on_cuda(run):
            assert torch.equal(found, expected)


def test_select_of_few(on_cuda):
    for scores in (torch.zeros(5), torch.tensor([2.0])):
        for found, expected in on_cuda(lambda b, s=scores: [select_top(s, 1, backend=b)]):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("gate", ["open", "both"])
@pytest.mark.parametrize("features", [2, 3])
def test_hashgrid(on_cuda, g, gate, features):
    levels = hashgrid_levels(3, features, 4, 20, log2_rows=9)
    points = torch.rand(300, 3, generator=g) * 1.2 - 0.1
    points[0], points[1] = 0, 1
    table = torch.randn(levels.offsets[-1], features, generator=g)
    logits = torch.randn(5, 5, 5, generator=g) * 3 if gate == "both" else None
    cells = torch.rand(4, 4, 4, generator=g) < 0.6 if gate == "both" else None
    slopes = [torch.randn(300, 3 * features, generator=g), *torch.randn(2, 300, generator=g)]

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in (table, points, logits) if t is not None]
        z = leaves[2] if logits is not None else None
        found = hashgrid_encode(
            leaves[1], leaves[0], levels, logits=z, cells=cells, backend=backend
        )
        loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=True))
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, leaves)]

    for found, expected in on_cuda(run):
        assert_near(found, expected, 2e-5)


def soup(g, num=25):
    """Triangles of all sizes, some across the near plane; one twice, one not there."""
    centers = torch.randn(num, 1, 3, generator=g) * torch.tensor([0.8, 0.8, 0.5])
    corners = centers + torch.randn(num, 3, 3, generator=g) * torch.rand(num, 1, 1, generator=g)
    corners[:, :, 2] += 2.5
    corners[2] = corners[1]
    corners[3, 0, 2] = -1
    faces = torch.arange(3 * num).view(num, 3)
    faces[4, 1] = faces[4, 0]
    views = [camera(37, 29, focal=25.0), camera(37, 29, focal=25.0, tilt=0.3)]
    views = {k: torch.cat([v[k] for v in views]) for k in ("viewmats", "intrinsics")}
    return corners.flatten(0, 1), faces, views


def test_silhouettes(on_cuda, g):
    vertices, faces, views = soup(g)
    slopes = torch.randn(2, 29, 37, generator=g)

    def run(backend):
        leaf = vertices.clone().requires_grad_()
        found = silhouettes(
            leaf, faces, **views, width=37, height=29, sigma=SIGMA, near=0.1, backend=backend
        )
        return found.detach(), torch.autograd.grad((found * slopes).sum(), leaf)[0]

    for found, expected in on_cuda(run):
        assert_near(found, expected)


@pytest.mark.parametrize("cull", [False, True])
def test_coverage(on_cuda, g, cull):
    vertices, faces, views = soup(g)
    masks = torch.rand(2, 29, 37, generator=g)
    masks[:, :20, 5:] = 1
    slopes = torch.randn(2, 2, len(faces), generator=g)

    def run(backend):
        leaf = vertices.clone().requires_grad_()
        found = face_coverage(
            leaf, faces, **views, masks=masks, sigma=SIGMA, near=0.1, cull=cull, backend=backend
        )
        loss = (found.area * slopes[0]).sum() + (found.outside * slopes[1]).sum()
        sums = found.area.detach(), found.outside.detach(), found.peak, found.extent, found.size
        return *sums, torch.autograd.grad(loss, leaf)[0]

    for found, expected in on_cuda(run):
        assert_near(found, expected)


def test_visible(on_cuda, g):
    vertices, faces, views = soup(g)

    def run(backend):
        hits = visible(vertices, faces, **views, width=37, height=29, near=0.1, backend=backend)
        return hits.faces, hits.depths, hits.weights

    results = list(on_cuda(run))
    assert (results[0][1] >= 0).any() and (results[0][1] < 0).any()
    assert torch.equal(*results[0])
    for found, expected in results[1:]:
        assert_near(found, expected)


def lens(width=27, height=21):
    views = [camera(width, height, focal=28.0), camera(width, height, focal=28.0, tilt=0.2)]
    tensors = {k: torch.cat([v[k] for v in views]) for k in ("viewmats", "intrinsics")}
    return tensors | {"width": width, "height": height}


@pytest.mark.parametrize(("degree", "antialiased"), [(0, False), (3, True)])
def test_splats(on_cuda, g, degree, antialiased):
    scene = make_scene(40, degree, size=-2.0, opacity=1.5)
    scene["means"][0, 2] = -1
    views, probe = lens(), torch.zeros(2, 40, 4)
    slopes = [torch.randn(2, 21, 27, *last, generator=g) for last in ((3,), (), ())]

    def run(backend):
        leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
        view = views["viewmats"].clone().requires_grad_()
        back = torch.full((3,), 0.3).requires_grad_()
        moved = probe.clone().requires_grad_()
        found = rasterize_splats(
            **leaves, **(views | {"viewmats": view}), background=back, probe=moved,
            antialiased=antialiased, statistics=True, backend=backend,
        )  # fmt: skip
        loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=False))
        wanted = [*leaves.values(), view, back, moved]
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]

    for found, expected in on_cuda(run):
        assert_near(found, expected, 3e-5)
    assert dispatch.last()["rasterize_splats"] == "cuda"


def test_splats_hide_what_is_behind_them(on_cuda, g):
    """More of them than fit a block at once, opaque: pixels end, and so do tiles."""
    scene = make_scene(150, 0, size=-1.0, opacity=4.0, spread=0.3)
    views = lens(17, 9)

    def run(backend):
        found = rasterize_splats(**scene, **views, statistics=True, backend=backend)
        return [*found, splat_removal_errors(**scene, **views, backend=backend)]

    results = list(on_cuda(run))
    assert (results[3][1][..., 0] == 0).any()
    for found, expected in results:
        assert_near(found, expected, 3e-5)
    plain = rasterize_splats(**scene, **views, backend="cuda")
    assert torch.equal(plain.colors, results[0][0])


def test_corrections(on_cuda, g):
    scene, views = make_scene(40, 1, size=-2.0), lens()
    colors, alphas = torch.rand(2, 21, 27, 3, generator=g), torch.rand(2, 21, 27, generator=g)
    cameras = {k: views[k] for k in ("viewmats", "intrinsics")}

    def run(backend):
        wanted = {"colors": colors, "alphas": alphas}
        return [splat_corrections(**scene, **cameras, **wanted, backend=backend)]

    for found, expected in on_cuda(run):
        assert_near(found, expected, 3e-5)


@pytest.mark.parametrize("fisher", [False, True])
def test_squared_gradients(on_cuda, fisher):
    scene, views = make_scene(40, 1, size=-2.0, opacity=1.5), lens()
    scene["means"][0, 2] = -1

    def run(backend):
        return [splat_squared_gradients(**scene, **views, fisher=fisher, backend=backend)]

    for found, expected in on_cuda(run):
        for column, truth in zip(found.unbind(-1), expected.unbind(-1), strict=True):
            assert_near(column, truth, 1e-4)


@pytest.mark.parametrize("surface", [False, True])
def test_surfels(on_cuda, g, surface):
    """Colours alone, or every picture and the absolute gradients."""
    scene = make_scene(40, 3, size=-1.5, opacity=1.5)
    scene["scales"] = scene["scales"][:, :2]
    scene["means"][0, 2] = -1
    scene["means"][1] = torch.tensor([0.3, 0.1, 0.2])  # reaches the plane of the camera
    views = lens()
    shapes = (3,), (), (), (), (3,), ()
    slopes = [torch.randn(2, 21, 27, *last, generator=g) for last in shapes]

    def run(backend):
        leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
        view = views["viewmats"].clone().requires_grad_()
        probe = torch.zeros(2, 40, 4).requires_grad_()
        found = rasterize_surfels(
            **leaves, **(views | {"viewmats": view}), background=torch.full((3,), 0.3),
            probe=probe if surface else None, statistics=surface, backend=backend,
        )  # fmt: skip
        pairs = zip(found, slopes, strict=False) if surface else [(found.colors, slopes[0])]
        loss = sum((f * s).sum() for f, s in pairs)
        wanted = [*leaves.values(), view, *([probe] if surface else [])]
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]

    for found, expected in on_cuda(run):
        assert_near(found, expected, 1e-4)
    assert dispatch.last()["rasterize_surfels"] == "cuda"


def test_nothing_to_draw(on_cuda):
    scene = {k: v[:0] for k, v in make_scene(3, 1).items()}
    for found, expected in on_cuda(lambda b: rasterize_splats(**scene, **lens(), backend=b)):
        assert torch.equal(found, expected)
    vertices, faces = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)
    views = {k: lens()[k] for k in ("viewmats", "intrinsics")}
    for backend in ("cuda", "reference"):
        found = silhouettes(vertices, faces, **views, width=9, height=8, backend=backend)
        assert not found.any() and found.shape == (2, 8, 9)


def test_float64_is_refused(emulated_cuda):
    scene = {k: v.double() for k, v in make_scene(3, 1).items()}
    views = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in lens().items()}
    with pytest.raises(ValueError, match=r"the cuda backend takes float32, got torch\.float64"):
        rasterize_splats(**scene, **views, backend="cuda")
