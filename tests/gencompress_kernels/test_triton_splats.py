"""Splats and surfels by Triton in its interpreter: tiny pictures and gradients as the reference's.

The suites of the ops run on triton where there is a GPU; these here run everywhere.
"""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats import (
    rasterize_splats,
    splat_corrections,
    splat_removal_errors,
)
from gencompress_kernels.rasterize_splats.squares import splat_squared_gradients
from gencompress_kernels.rasterize_surfels import rasterize_surfels
from raster_samples import camera, make_scene, one_splat, to

pytestmark = pytest.mark.usefixtures("interpreted")


def assert_near(found, expected, tolerance=3e-5):
    """To `tolerance` of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def on_both(run):
    """What `run` gives on triton and on the reference."""
    expected = run("reference")
    return zip(run("triton"), expected, strict=True)


def views(width=27, height=21, count=1):
    cameras = [camera(width, height, focal=28.0, tilt=0.2 * k) for k in range(count)]
    both = {k: torch.cat([c[k] for c in cameras]) for k in ("viewmats", "intrinsics")}
    return both | {"width": width, "height": height}


@pytest.mark.parametrize(
    ("degree", "antialiased", "absolute"), [(0, False, False), (1, False, True), (3, True, True)]
)
def test_pictures_statistics_and_gradients(degree, antialiased, absolute):
    scene, lens = make_scene(24, degree, size=-2.0, opacity=1.5), views(count=2)
    scene["means"][0, 2] = -1
    g = torch.Generator().manual_seed(0)
    slopes = [torch.randn(2, 21, 27, *last, generator=g) for last in ((3,), (), ())]

    def run(backend):
        leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
        view = lens["viewmats"].clone().requires_grad_()
        behind = torch.full((3,), 0.3).requires_grad_()
        probe = torch.zeros(2, 24, 4).requires_grad_() if absolute else None
        found = rasterize_splats(
            **leaves, **(lens | {"viewmats": view}), background=behind, probe=probe,
            antialiased=antialiased, statistics=True, backend=backend,
        )  # fmt: skip
        loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=False))
        wanted = [*leaves.values(), behind, *((view, probe) if absolute else ())]
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]

    results = list(on_both(run))
    for found, expected in results:
        assert expected.abs().max() > 0
        assert_near(found, expected)
    assert dispatch.last()["rasterize_splats"] == "triton"


def test_splats_that_end_pixels_and_those_behind_them():
    """More of them than a program takes between two looks, opaque: pixels end, and so do tiles."""
    scene, lens = make_scene(60, 0, size=-0.7, opacity=4.0, spread=0.3), views(17, 9)
    scene = {k: torch.cat([v, v[:4]]) for k, v in scene.items()}  # equal depths

    def run(backend):
        found = rasterize_splats(**scene, **lens, statistics=True, backend=backend)
        return [*found, splat_removal_errors(**scene, **lens, backend=backend)]

    results = list(on_both(run))
    for found, expected in results:
        assert_near(found, expected)
    drawn = [found for found, _ in results]
    seen = drawn[3][0, :, 1] > 0
    assert 0 < seen.sum() < 60
    # what has no weight can go without changing a bit, and counting changes none
    rest = {k: v[seen] for k, v in scene.items()}
    plain = rasterize_splats(**rest, **lens, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], drawn[:3], strict=True))


def test_of_equal_weights_the_front_one_counts():
    scene = {k: torch.cat([v, v]) for k, v in one_splat(scale=1e6).items()}
    scene["means"][:, 2] = torch.tensor([3.0, 2.0])
    scene["opacities"] = torch.tensor([1 / 3, 0.25])
    tie = rasterize_splats(**scene, **camera(8, 8), statistics=True, backend="triton")
    assert tie.statistics[0, :, 1].tolist() == [0.25, 0.25]
    assert tie.statistics[0, :, 3].tolist() == [0, 64]


def test_corrections():
    scene, lens = make_scene(24, 1, size=-2.0), views(count=2)
    g = torch.Generator().manual_seed(0)
    wanted = {
        "colors": torch.rand(2, 21, 27, 3, generator=g),
        "alphas": torch.rand(2, 21, 27, generator=g),
    }
    cameras = {k: lens[k] for k in ("viewmats", "intrinsics")}
    run = lambda backend: [splat_corrections(**scene, **cameras, **wanted, backend=backend)]  # noqa: E731
    ((found, expected),) = on_both(run)
    for column, truth in zip(found.unbind(-1), expected.unbind(-1), strict=True):
        assert_near(column, truth)


@pytest.mark.parametrize("fisher", [False, True])
def test_squared_gradients(fisher):
    scene, lens = make_scene(24, 1, size=-2.0, opacity=1.5), views()
    scene["means"][0, 2] = -1

    def run(backend):
        return [splat_squared_gradients(**scene, **lens, fisher=fisher, backend=backend)]

    ((found, expected),) = on_both(run)
    for column, truth in zip(found.unbind(-1), expected.unbind(-1), strict=True):
        assert_near(column, truth, 1e-4)


@pytest.mark.parametrize("surface", [False, True])
def test_surfels(surface):
    """Colours alone, or every picture and the absolute gradients."""
    scene, lens = make_scene(24, 3, size=-1.5, opacity=1.5), views()
    scene["scales"] = scene["scales"][:, :2]
    scene["means"][0, 2] = -1
    scene["means"][1] = torch.tensor([0.3, 0.1, 0.2])  # reaches the plane of the camera
    g = torch.Generator().manual_seed(0)
    slopes = [torch.randn(1, 21, 27, *last, generator=g) for last in ((3,), (), (), (), (3,), ())]

    def run(backend):
        leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
        view = lens["viewmats"].clone().requires_grad_()
        probe = torch.zeros(1, 24, 4).requires_grad_()
        found = rasterize_surfels(
            **leaves, **(lens | {"viewmats": view}), background=torch.full((3,), 0.3),
            probe=probe if surface else None, statistics=surface, backend=backend,
        )  # fmt: skip
        pairs = zip(found, slopes, strict=False) if surface else [(found.colors, slopes[0])]
        loss = sum((f * s).sum() for f, s in pairs)
        wanted = [*leaves.values(), *((view, probe) if surface else ())]
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]

    for found, expected in on_both(run):
        assert_near(found, expected, 1e-4)
    assert dispatch.last()["rasterize_surfels"] == "triton"


def test_surfels_that_end_pixels():
    scene, lens = make_scene(50, 0, size=-0.7, opacity=4.0, spread=0.3), views(17, 9)
    scene["scales"] = scene["scales"][:, :2]
    run = lambda b: rasterize_surfels(**scene, **lens, statistics=True, backend=b)  # noqa: E731
    results = list(on_both(run))
    for found, expected in results:
        assert_near(found, expected, 1e-4)
    drawn = [found for found, _ in results]
    seen = drawn[-1][0, :, 1] > 0
    assert 0 < seen.sum() < 50
    rest = {k: v[seen] for k, v in scene.items()}
    plain = rasterize_surfels(**rest, **lens, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain[:6], drawn[:6], strict=True))


def test_strided_inputs_and_the_same_bits_again():
    scene, lens = make_scene(12, 1, size=-2.0), views(18, 10, count=2)
    strided = {k: torch.stack([v, -v], -1)[..., 0].requires_grad_() for k, v in scene.items()}

    def run(scene):
        found = rasterize_splats(**scene, **lens, statistics=True, backend="triton")
        wanted = [v for v in scene.values() if v.requires_grad]
        loss = found.colors.square().sum() + found.depths.square().sum()
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]

    whole = {k: v.detach().contiguous().requires_grad_() for k, v in strided.items()}
    assert not any(v.is_contiguous() for v in strided.values())
    for found, expected in zip(run(strided), run(whole), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rasterize", [rasterize_splats, rasterize_surfels])
def test_nothing_to_draw(rasterize):
    scene, lens = make_scene(3, 1), camera(9, 8)
    if rasterize is rasterize_surfels:
        scene["scales"] = scene["scales"][:, :2]
    scene["means"][:, 2] = -1
    background = torch.tensor([0.1, 0.2, 0.3])
    for some in (scene, {k: v[:0] for k, v in scene.items()}):
        leaves = {k: v.clone().requires_grad_() for k, v in some.items()}
        out = rasterize(
            **leaves, **lens, background=background, statistics=True, backend="triton"
        )  # fmt: skip
        assert torch.equal(out.colors, background.expand(1, 8, 9, 3))
        assert not out.alphas.any() and not out.depths.any() and not out.statistics.any()
        for slope in torch.autograd.grad(out.colors.sum() + out.depths.sum(), leaves.values()):
            assert not slope.any()


@pytest.mark.parametrize("rasterize", [rasterize_splats, rasterize_surfels])
def test_float64_is_refused(rasterize):
    scene, lens = to(make_scene(3, 1), torch.float64), to(camera(9, 8), torch.float64)
    if rasterize is rasterize_surfels:
        scene["scales"] = scene["scales"][:, :2]
    with pytest.raises(ValueError, match=r"the triton backend takes float32, got torch\.float64"):
        rasterize(**scene, **lens, backend="triton")
