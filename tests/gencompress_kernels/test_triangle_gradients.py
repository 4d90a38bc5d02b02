"""Gradients of silhouettes and face_coverage: gradcheck, and autograd through maps face by face."""

import numba
import pytest
import torch
from gencompress_kernels import rasterize_triangles as op
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes
from numerics import assert_as_accurate
from triangle_samples import (
    camera,
    checker,
    crumpled,
    flat,
    inside_a_ball,
    joined,
    silhouette,
    soft_maps,
    to,
)

OP = "rasterize_triangles"  # of the `backend` fixture
LEAVES = ("vertices", "viewmats", "intrinsics")
KINDS = ("silhouette", "area", "outside", "ratio")
FLOOR = 1e-5  # absolute, as a share of the largest gradient of the input

SCENES = {
    "ball": lambda: crumpled(1, 0.02, width=41, height=29, focal=40.0),
    "crumpled": lambda: crumpled(1, 0.2, width=29, height=41, tilt=0.7, focal=40.0),
    "inside": inside_a_ball,
    "wide": lambda: flat([[-40.0, -300], [80, 30.3], [-35, 310]], width=90, height=70),
    "face": lambda: flat([[3.2, 2.1], [17.3, 5.9], [8.8, 16.4]]),
}


def weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(kind, picture, area, outside, use):
    """Of random slopes, so that every pixel and face counts for itself; `use` [H, W]: pixels."""
    if kind == "silhouette":
        return (picture * (weights(picture.shape) * use).to(picture.dtype)).sum()
    value = {"area": area, "outside": outside, "ratio": outside / area.clamp(min=1e-6)}[kind]
    return (value * weights(value.shape).to(value.dtype)).sum()


def gradients(scene, kind, use, dtype, backend):
    scene = to(scene, dtype)
    leaves = {name: scene[name].clone().requires_grad_() for name in LEAVES}
    scene = scene | leaves
    picture = area = outside = None
    if kind == "silhouette":
        picture = silhouettes(**scene, backend=backend)
    else:
        masks = checker(scene).to(dtype)
        inputs = {k: v for k, v in scene.items() if k not in ("width", "height")}
        found = face_coverage(**inputs, masks=masks, cull=False, backend=backend)
        area, outside = found.area, found.outside
    return torch.autograd.grad(loss(kind, picture, area, outside, use), list(leaves.values()))


def plain_gradients(scene, kind, use):
    """The same by autograd through float64 maps."""
    scene = to(scene, torch.float64)
    leaves = {name: scene[name].clone().requires_grad_() for name in LEAVES}
    maps, _ = soft_maps(scene | leaves)
    outside = (maps * (1 - checker(scene)[0].double())).sum((1, 2))[None]
    value = loss(kind, silhouette(maps)[None], maps.sum((1, 2))[None], outside, use)
    return torch.autograd.grad(value, list(leaves.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENES)
def test_every_gradient_is_that_of_maps_made_face_by_face(backend, name, kind):
    scene = SCENES[name]()
    near = soft_maps(scene)[1]
    assert near.sum() <= 1  # a silhouette leaves it out, a sum has it at 1e-4
    truth = plain_gradients(scene, kind, ~near)
    exact = gradients(scene, kind, ~near, torch.float64, "reference")
    plain = gradients(scene, kind, ~near, torch.float32, "reference")
    ours = gradients(scene, kind, ~near, torch.float32, backend)
    for leaf, *values in zip(LEAVES, ours, plain, exact, truth, strict=True):
        scale = float(values[3].abs().max())
        assert scale > 1e-3, f"nothing tests {leaf}"
        slack = 1e-9 if kind == "silhouette" or not near.any() else 1e-3
        assert (values[2] - values[3]).abs().max() < slack * scale, leaf
        assert_as_accurate(values[0], values[1], values[2], floor=FLOOR * scale, name=leaf)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    for scene in (crumpled(0, 0.1, seed=2, width=9, height=8, focal=8.0), inside_a_ball()):
        scene = to(scene, torch.float64)
        if "near" in scene:  # fewer pixels, all four ways to be cut
            scene |= {"width": 8, "height": 7}
            scene["intrinsics"] = torch.tensor(
                [[[4.0, 0, 4], [0, 4.4, 3.3], [0, 0, 1]]], dtype=torch.float64
            )
        rest = {k: v for k, v in scene.items() if k not in LEAVES}
        masks = checker(scene, 2).double()

        def value(vertices, viewmats, intrinsics, rest=rest, masks=masks):
            given = {"vertices": vertices, "viewmats": viewmats, "intrinsics": intrinsics}
            if kind == "silhouette":
                return silhouettes(**given, **rest, backend="reference")
            inputs = {k: v for k, v in rest.items() if k not in ("width", "height")}
            found = face_coverage(**given, **inputs, masks=masks, cull=False, backend="reference")
            return loss(kind, None, found.area, found.outside, None)

        leaves = [scene[name].clone().requires_grad_() for name in LEAVES]
        assert torch.autograd.gradcheck(value, leaves, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_views_add_up(backend, monkeypatch):
    scene = crumpled(1, 0.1, width=33, height=21)
    cams = [camera(33, 21, tilt=tilt, back=back) for tilt, back in ((0, 3), (1, 0.4))]
    use = torch.ones(21, 33)
    for kind in ("silhouette", "outside"):
        both = gradients(scene | joined(*cams), kind, use, torch.float32, backend)
        monkeypatch.setattr(op, "MOST_POLYGONS", 1)
        chunked = gradients(scene | joined(*cams), kind, use, torch.float32, backend)
        monkeypatch.undo()
        scale = both[0].abs().max()
        for one, other in zip(both, chunked, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=float(1e-5 * scale))
        leaf = scene["vertices"].clone().requires_grad_()
        parts = []
        for k, cam in enumerate(cams):
            given = scene | cam | {"vertices": leaf}
            if kind == "silhouette":
                value = silhouettes(**given, backend=backend) * weights((2, 21, 33)).float()[k]
            else:
                given = {n: v for n, v in given.items() if n not in ("width", "height")}
                masks = checker(scene | cam)
                found = face_coverage(**given, masks=masks, cull=False, backend=backend)
                value = found.outside * weights((2, len(scene["faces"]))).float()[k]
            parts.append(torch.autograd.grad(value.sum(), leaf)[0])
        assert torch.allclose(both[0], sum(parts), rtol=1e-4, atol=float(1e-5 * scale))


def test_what_is_culled_behind_or_off_screen_gets_no_gradient(backend):
    scene = flat([[5, 5], [15, 6], [8, 15], [-50, 3], [-40, 3], [-45, 9], [5, 5], [9, 5], [7, 8.0]])
    scene["vertices"][6:, 2] = -1.0
    leaf = scene["vertices"].clone().requires_grad_()
    given = scene | {"vertices": leaf, "near": 0.5}
    (grad,) = torch.autograd.grad(silhouettes(**given, backend=backend).sum(), leaf)
    assert (grad[:3, :2] != 0).all() and (grad[3:] == 0).all()
    given = {k: v for k, v in given.items() if k not in ("width", "height")}
    for masks, culled in ((torch.ones(1, 20, 24), True), (torch.zeros(1, 20, 24), False)):
        found = face_coverage(**given, masks=masks, backend=backend)
        (grad,) = torch.autograd.grad(found.area.sum(), leaf)
        assert (grad[3:] == 0).all() and bool((grad[:3] == 0).all()) == culled
    found = face_coverage(**given, masks=masks, backend=backend)
    assert not found.peak.requires_grad and not found.extent.requires_grad


def test_a_growing_face_covers_more(backend):
    """By a sign: all corners move away from the middle."""
    scene = flat([[8, 6], [17, 7], [11, 15.0]])
    leaf = scene["vertices"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(silhouettes(**scene | {"vertices": leaf}).sum(), leaf)
    outward = leaf.detach()[:, :2] - leaf.detach()[:, :2].mean(0)
    assert ((grad[:, :2] * outward).sum(1) > 1).all()


def test_degenerate_faces_have_finite_gradients(backend):
    corners = [[5, 5], [5, 5], [9, 7], [6, 6], [6, 6], [6, 6], [2.5, 2.5], [4.5, 4.5], [8.5, 8.5],
               [3, 3], [3.001, 3], [9, 12], [1e9, 4], [3, 9], [-1e9, 2]]  # fmt: skip
    scene = flat(corners)
    scene["vertices"][13, 2] = 1e-12
    for near in (None, 1e-9):
        for kind in KINDS:
            given = scene | {"near": near}
            for grad in gradients(given, kind, torch.ones(20, 24), torch.float32, backend):
                assert grad.isfinite().all()


def test_nothing_to_draw_and_nothing_asked(backend):
    scene = crumpled(0, width=9, height=8)
    empty = scene | {"faces": scene["faces"][:0]}
    for kind in ("silhouette", "area"):
        for grad in gradients(empty, kind, torch.ones(8, 9), torch.float32, backend):
            assert (grad == 0).all()
    leaf = scene["vertices"].clone().requires_grad_()
    inputs = {k: v for k, v in scene.items() if k not in ("width", "height", "vertices")}
    found = face_coverage(leaf, **inputs, masks=checker(scene), backend=backend)
    assert torch.autograd.grad(found.outside.sum(), leaf)[0].shape == leaf.shape
    with pytest.raises(RuntimeError):
        found.peak.sum().backward()


def test_any_number_of_threads_gives_the_same_bits():
    scene = crumpled(3, 0.1, width=150, height=90) | joined(camera(150, 90), camera(150, 90, 1.0))
    before, found = numba.get_num_threads(), []
    try:
        for threads in sorted({1, before}):
            numba.set_num_threads(threads)
            use = torch.ones(90, 150)
            kinds = ("silhouette", "ratio")
            found.append([gradients(scene, kind, use, torch.float32, "cpu") for kind in kinds])
    finally:
        numba.set_num_threads(before)
    for one, other in zip(sum(found[0], ()), sum(found[-1], ()), strict=True):
        assert torch.equal(one, other)
