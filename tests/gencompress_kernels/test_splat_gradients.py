"""Gradients of rasterize_splats: gradcheck of the reference, and every backend against it."""

import numba
import pytest
import torch
from gencompress_kernels.rasterize_splats import rasterize_splats
from numerics import assert_as_accurate, flatten, raw_alphas
from raster_samples import camera, make_scene, one_splat, to

OP = "rasterize_splats"  # of the `backend` fixture
OUTPUTS = ("colors", "alphas", "depths")
# absolute, as a share of the largest gradient of the input
FLOOR = 2e-6


def gradients(scene, cam, kind, backend, *, mask=None, **options):
    """By random gradients of the outputs, 0 outside `mask` [H, W], which reach every term."""
    leaves = {n: v.to(kind).clone().requires_grad_() for n, v in scene.items()}
    cam = to(cam, kind)
    leaves["viewmats"] = cam["viewmats"] = cam["viewmats"].clone().requires_grad_()
    shape = (len(cam["viewmats"]), len(scene["means"]), 4)
    leaves["probe"] = torch.zeros(shape, dtype=kind, requires_grad=True)
    leaves["background"] = torch.tensor([0.25, 0.5, 0.75], dtype=kind, requires_grad=True)
    named = {n: leaves[n] for n in scene} | {"background": leaves["background"]}
    out = rasterize_splats(**named, **cam, probe=leaves["probe"], backend=backend, **options)
    generator = torch.Generator().manual_seed(0)
    loss = 0
    for name in OUTPUTS:
        value = getattr(out, name)
        factor = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(kind)
        if mask is not None:
            factor = factor * (mask if factor.ndim == 3 else mask[..., None])
        loss = loss + (value * factor).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def away_from_thresholds(num, width, height, degree, antialiased=False):
    """A scene none of whose pixels a rounding error or a small step could tip."""
    for seed in range(200):
        scene = make_scene(num, degree, seed=seed, spread=0.15, size=-1.6, opacity=-0.5)
        cam = camera(width, height, focal=12.0, tilt=0.1)
        flat = flatten(scene, cam["viewmats"][0], cam["intrinsics"][0], width, height, antialiased)
        raws, _ = raw_alphas(flat, width, height)
        left = (1 - raws.clip(max=0.99)).prod(0)
        if (abs(raws - 1 / 255) > 2e-5).all() and raws.max() < 0.98 and left.min() > 1e-3:
            return scene, cam
    raise AssertionError("no such scene found")


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("degree", [0, 3])
def test_gradcheck_of_the_reference(degree, antialiased):
    scene, cam = away_from_thresholds(10, 8, 8, degree, antialiased)
    scene, cam = to(scene, torch.float64), to(cam, torch.float64)
    background = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)

    def draw(*inputs):
        *splats, viewmats, behind = inputs
        named = dict(zip(scene, splats, strict=True))
        out = rasterize_splats(
            **named, **(cam | {"viewmats": viewmats}), background=behind,
            antialiased=antialiased, backend="reference",
        )  # fmt: skip
        return out[:3]

    inputs = [t.clone().requires_grad_() for t in (*scene.values(), cam["viewmats"], background)]
    assert torch.autograd.gradcheck(draw, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_every_gradient_is_as_accurate_as_the_reference(backend, degree, antialiased):
    for seed, size, spread in ((1, -3.0, 0.5), (2, -2.0, 0.9), (3, -4.5, 0.3)):
        scene, cam = make_scene(40, degree, seed, spread, size), camera(53, 37, tilt=0.2)
        flat = flatten(scene, cam["viewmats"][0], cam["intrinsics"][0], 53, 37, antialiased)
        mask = torch.from_numpy(~raw_alphas(flat, 53, 37)[1])
        assert mask.double().mean() > 0.999
        kinds = (
            (torch.float32, backend),
            (torch.float32, "reference"),
            (torch.float64, "reference"),
        )
        runs = [gradients(scene, cam, *kind, mask=mask, antialiased=antialiased) for kind in kinds]
        for name in runs[0]:
            ours, plain, exact = (run[name] for run in runs)
            scale = float(exact.abs().max())
            assert scale > 0, f"nothing tests {name}"
            assert_as_accurate(ours, plain, exact, floor=FLOOR * scale, name=name)


def test_each_output_alone_carries_its_gradient(backend):
    scene, cam = make_scene(20, 1, 5), camera(33, 20)
    for name in OUTPUTS:
        found = []
        for kind, which in ((torch.float32, backend), (torch.float64, "reference")):
            leaves = {n: v.to(kind).clone().requires_grad_() for n, v in scene.items()}
            out = rasterize_splats(**leaves, **to(cam, kind), backend=which)
            found.append(
                torch.autograd.grad(
                    getattr(out, name).square().sum(), list(leaves.values()),
                    allow_unused=True, materialize_grads=True,
                )
            )  # fmt: skip
        for ours, exact in zip(*found, strict=True):
            assert torch.allclose(ours.double(), exact, atol=2e-5 * float(exact.abs().max() + 1))


def test_the_probe_holds_the_gradient_of_the_centre_and_its_absolute_sums(backend):
    """Moving the principal point moves all centres: the sum of the probes is its gradient."""
    scene, cam = make_scene(12, 0, 7, size=-2.5), camera(24, 24)
    found = gradients(scene, cam, torch.float32, backend)["probe"].double()

    def loss(shift, axis):
        moved = to(cam, torch.float64)
        moved["intrinsics"] = moved["intrinsics"].clone()
        moved["intrinsics"][0, axis, 2] += shift
        out = rasterize_splats(
            **to(scene, torch.float64), **moved, backend="reference",
            background=torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        return sum(
            float((v * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum())
            for v in out[:3]
        )

    for axis in (0, 1):
        slope = (loss(1e-5, axis) - loss(-1e-5, axis)) / 2e-5
        assert found[0, :, axis].sum() == pytest.approx(slope, rel=1e-3, abs=1e-3)
    assert bool((found[0, :, 2:] >= found[0, :, :2].abs() - 1e-4).all())
    assert bool((found[0, :, 2:] > 1.01 * found[0, :, :2].abs()).any())


def test_a_probe_does_not_change_what_is_drawn(backend):
    scene, cam = make_scene(12), camera(24, 24)
    plain = rasterize_splats(**scene, **cam, backend=backend)
    probed = rasterize_splats(**scene, **cam, probe=torch.ones(1, 12, 4), backend=backend)
    assert torch.equal(plain.colors, probed.colors)
    with pytest.raises(ValueError, match="probe"):
        rasterize_splats(**scene, **cam, probe=torch.zeros(12, 4), backend=backend)


def test_cameras_add_up(backend):
    scene = make_scene(25, 2, 3)
    cams = [camera(31, 22), camera(31, 22, focal=50.0, tilt=0.3)]
    both = {
        "viewmats": torch.cat([c["viewmats"] for c in cams]),
        "intrinsics": torch.cat([c["intrinsics"] for c in cams]),
        "width": 31,
        "height": 22,
    }
    leaves = {n: v.clone().requires_grad_() for n, v in scene.items()}
    together = torch.autograd.grad(
        rasterize_splats(**leaves, **both, backend=backend).colors.square().sum(),
        list(leaves.values()),
    )
    alone = [
        torch.autograd.grad(
            rasterize_splats(**leaves, **cam, backend=backend).colors.square().sum(),
            list(leaves.values()),
        )
        for cam in cams
    ]
    for sum_, first, second in zip(together, *alone, strict=True):
        assert torch.allclose(sum_, first + second, rtol=1e-4, atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    scene, cam = make_scene(400, 1, 9), camera(150, 90)
    before = numba.get_num_threads()
    try:
        found = []
        for threads in sorted({1, before}):
            numba.set_num_threads(threads)
            found.append(gradients(scene, cam, torch.float32, "cpu"))
    finally:
        numba.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[-1][name]), name


def test_what_is_clamped_or_unseen_gets_no_gradient(backend):
    scene = one_splat(opacity=1.0, scale=3.0, color=-1.0)  # alpha 0.99 everywhere, colour below 0
    behind = one_splat(depth=-2.0)
    aside = one_splat()
    aside["means"] = torch.tensor([[50.0, 0.0, 2.0]])
    scene = {n: torch.cat([scene[n], behind[n], aside[n]]) for n in scene}
    found = gradients(scene, camera(16, 16), torch.float32, backend)
    assert not found["opacities"].any() and not found["scales"].any()
    assert not found["sh"].any()
    assert not found["probe"].any()
    assert not found["means"][1:].any()
    assert bool(found["means"][0, 2] != 0)  # depth alone moves it


def test_nothing_to_draw_and_nothing_asked(backend):
    empty = {n: v[:0].clone().requires_grad_() for n, v in make_scene(3).items()}
    out = rasterize_splats(**empty, **camera(9, 5), backend=backend)
    found = torch.autograd.grad(out.colors.sum(), list(empty.values()))
    assert [g.shape for g in found] == [v.shape for v in empty.values()]
    scene = make_scene(3)
    scene["means"].requires_grad_()
    out = rasterize_splats(**scene, **camera(9, 5), statistics=True, backend=backend)
    assert torch.autograd.grad(out.colors.sum(), scene["means"])[0].shape == (3, 3)
    with pytest.raises(RuntimeError):  # the statistics are measured, not differentiated
        rasterize_splats(
            **scene, **camera(9, 5), statistics=True, backend=backend
        ).statistics.sum().backward()


def test_the_op_keeps_torchs_rules(backend):
    scene, cam = make_scene(6), camera(17, 18)
    leaves = {n: v.clone().requires_grad_() for n, v in scene.items()}
    background, probe = torch.zeros(3), torch.zeros(1, 6, 4)
    torch.library.opcheck(
        torch.ops.gencompress.rasterize_splats.default,
        (*leaves.values(), cam["viewmats"], cam["intrinsics"], background, probe, 17, 18,
         False, False, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
