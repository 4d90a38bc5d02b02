"""Pictures, weights and gradients against gsplat and nerfacc, which need a CUDA device to draw."""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.composite import composite
from gencompress_kernels.rasterize_splats import rasterize_splats
from raster_samples import camera, make_scene, to


def peer_of(op, backend, name):
    """The package `name`, where it and our backend can run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = dispatch.why_not(op, backend, "cuda")
    if reason:
        pytest.skip(f"{op} on {backend}: {reason}")
    return pytest.importorskip(name, reason=f"{name} not installed")


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("antialiased", [False, True])
def test_splats_equal_gsplat(backend, antialiased):
    peer = peer_of("rasterize_splats", backend, "gsplat")
    scene, cam = to(make_scene(200, 3, size=-2.5), "cuda"), to(camera(75, 61, tilt=0.1), "cuda")
    scene["opacities"] = scene["opacities"] * 0.9  # gsplat holds alpha at another limit
    g = torch.Generator().manual_seed(0)
    slopes = [torch.randn(1, 61, 75, *last, generator=g).cuda() for last in ((3,), (), ())]

    def gradients(leaves, found):
        loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=True))
        return torch.autograd.grad(loss, list(leaves.values()))

    leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
    ours = rasterize_splats(**leaves, **cam, antialiased=antialiased, backend=backend)[:3]
    mine = gradients(leaves, ours)
    leaves = {k: v.clone().requires_grad_() for k, v in scene.items()}
    splats = {("colors" if k == "sh" else k): v for k, v in leaves.items()}
    drawn, alphas, _ = peer.rasterization(
        **splats, viewmats=cam["viewmats"], Ks=cam["intrinsics"], width=75, height=61,
        near_plane=0.01, sh_degree=3, packed=False, render_mode="RGB+D",
        rasterize_mode="antialiased" if antialiased else "classic",
    )  # fmt: skip
    theirs = drawn[..., :3], alphas[..., 0], drawn[..., 3]
    for a, b in zip(ours, theirs, strict=True):
        # a pixel may fall to the other side of 1/255, no more than a few do
        change = (a - b).abs()
        assert float((change > 1e-4).float().mean()) < 0.005 and float(change.max()) < 4 / 255
    for a, b in zip(mine, gradients(leaves, theirs), strict=True):
        assert float((a - b).norm()) < 0.02 * float(b.norm())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compositing_equals_nerfacc(backend):
    peer = peer_of("composite", backend, "nerfacc")
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 150, 64, 65, 1])
    packed = torch.stack([counts.cumsum(0) - counts, counts], 1).cuda()
    rays = torch.repeat_interleave(torch.arange(6), counts).cuda()
    num = len(rays)
    steps = (torch.rand(num, generator=g) * 0.02).cuda()
    starts = torch.rand(num, generator=g).cuda()
    inputs = (torch.rand(num, generator=g) * 20).cuda(), torch.rand(num, 3, generator=g).cuda()

    leaves = [t.clone().requires_grad_() for t in inputs]
    colors, opacity, _, weights = composite(
        *leaves, steps, packed, starts, stop=0.0, backend=backend
    )
    ours = [colors, opacity, weights]
    ours += torch.autograd.grad(colors.square().sum() + opacity.sum(), leaves)
    leaves = [t.clone().requires_grad_() for t in inputs]
    weights, _, _ = peer.render_weight_from_density(
        starts, starts + steps, leaves[0], ray_indices=rays, n_rays=6
    )
    sums = [
        peer.accumulate_along_rays(weights, values=values, ray_indices=rays, n_rays=6)
        for values in (leaves[1], None)
    ]
    theirs = [sums[0], sums[1][:, 0], weights]
    theirs += torch.autograd.grad(sums[0].square().sum() + sums[1].sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
