"""Triton kernels in the interpreter: values and gradients of tiny inputs equal the reference's.

The suites of the ops run on triton where there is a GPU; these here run everywhere.
"""

import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.adam_rows import adam_rows_
from gencompress_kernels.compact import gather_rows, kept_indices
from gencompress_kernels.composite import composite, transmittance
from gencompress_kernels.hashgrid_encode import hashgrid_encode, hashgrid_levels
from gencompress_kernels.march_rays import march_rays
from gencompress_kernels.merge_splats import Blobs, energies, splat_merge_costs
from gencompress_kernels.rownorm_colsq import rownorm_colsq
from gencompress_kernels.ssim import ssim
from gencompress_kernels.token_merge import compact_tokens, match_tokens, recover_tokens
from gencompress_kernels.wanda_mask import wanda_mask

pytestmark = pytest.mark.usefixtures("interpreted")
BOTH = ("reference", "triton")


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_near(found, expected, atol=2e-6):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=atol)


def on_both(run):
    """What `run` gives on triton and on the reference."""
    expected = run("reference")
    found = run("triton")
    return zip(found, expected, strict=True)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (300, 4, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("rate", ["number", "columns"])
def test_adam(g, shape, some, rate):
    start = [torch.randn(shape, generator=g) for _ in range(2)] + [torch.rand(shape, generator=g)]
    gradient = torch.randn((*shape, 2), generator=g)[..., 0]  # strides of 2
    rows = torch.rand(shape[0], generator=g) < 0.5 if some else None
    columns = torch.rand(gradient[:1].numel() if shape[0] else 3, generator=g)
    size = 0.1 if rate == "number" else columns

    def run(backend):
        state = [tensor.clone() for tensor in start]
        adam_rows_(*state, gradient, size, 3, rows=rows, backend=backend)
        return state

    for (found, expected), before in zip(on_both(run), start, strict=True):
        assert_near(found, expected)
        if some:
            assert torch.equal(found[~rows], before[~rows])
    if shape[0]:
        assert dispatch.last()["adam_rows"] == "triton"


def test_adam_keeps_what_must_not_meet_a_nan():
    state = [torch.ones(3, 2) for _ in range(3)]
    gradient = torch.ones(3, 2)
    gradient[1] = torch.nan
    rows = torch.tensor([True, False, True])
    adam_rows_(*state, gradient, 0.1, 1, rows=rows, backend="triton")
    assert all(bool(tensor.isfinite().all()) for tensor in state)
    assert state[0].tolist()[1] == [1, 1] and state[0][0, 0] < 1


def test_rows_of_every_type(g):
    keep = torch.rand(40, generator=g) < 0.4
    tensors = [
        torch.randn(40, 3, generator=g),
        torch.randn(40, 4, 2, generator=g).transpose(1, 2),
        torch.randn(40, generator=g).double(),
        torch.randn(40, 5, generator=g).half(),
        torch.randint(0, 9, (40, 2), generator=g),
        torch.rand(40, 3, generator=g) < 0.5,
        torch.randn(40, 2, generator=g, dtype=torch.complex64),
        torch.zeros(40, 0),
    ]
    for rows in (keep, kept_indices(keep).flip(0), kept_indices(keep)[:0]):
        for found, expected in on_both(lambda b, r=rows: gather_rows(tensors, r, backend=b)):
            assert torch.equal(found, expected)
    # words of two bytes that begin between two words of four
    odd = torch.randn(41 * 2, generator=g).half()[1:-1].view(40, 2)
    (found,) = gather_rows([odd], keep, backend="triton")
    assert torch.equal(found, odd[keep])


def rays(g):
    counts = torch.tensor([3, 0, 150, 64, 65, 1])
    packed = torch.stack([counts.cumsum(0) - counts + 2, counts], 1)[[2, 0, 4, 1, 5, 3]]
    num = int(counts.sum()) + 5  # two samples before and three behind belong to no ray
    densities = torch.rand(num, generator=g) * 20
    densities[20] = torch.inf
    steps = torch.rand(num, generator=g) * 0.02
    steps[30] = 0
    return densities, torch.rand(num, 3, generator=g), steps, packed, torch.rand(num, generator=g)


@pytest.mark.parametrize("stop", [0.0, 1e-4, 0.5])
def test_composite(g, stop):
    densities, colors, steps, packed, distances = rays(g)
    slopes = torch.randn(len(packed), 5, generator=g)

    def run(backend):
        leaves = densities.clone().requires_grad_(), colors.clone().requires_grad_()
        found = composite(*leaves, steps, packed, distances, stop=stop, backend=backend)
        loss = (found[0] * slopes[:, :3]).sum() + found[1] @ slopes[:, 3] + found[2] @ slopes[:, 4]
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, leaves)]

    for found, expected in on_both(run):
        assert_near(found, expected)


def test_transmittance(g):
    densities, _, steps, packed, _ = rays(g)
    ((found, expected),) = on_both(lambda b: [transmittance(densities, steps, packed, backend=b)])
    assert_near(found, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (2, 13, 20, 3), (1, 1, 300, 2)], ids=str)
def test_ssim(g, shape):
    images, wanted = torch.rand(shape, generator=g), torch.rand(shape, generator=g)
    slopes = torch.randn(shape[:-3], generator=g)

    def run(backend):
        leaf = images.clone().requires_grad_()
        values = ssim(leaf, wanted, backend=backend)
        return values.detach(), torch.autograd.grad(values, leaf, slopes)[0]

    for found, expected in on_both(run):
        assert_near(found, expected)
    assert_near(ssim(images, wanted, backend="triton"), run("reference")[0])


@pytest.mark.parametrize("recover_from", ["base", "kept"])
def test_token_merge(g, recover_from):
    x = torch.randn(2, 90, 37, generator=g)
    x[:, 40:60] = x[:, :20] + 0.1 * torch.randn(2, 20, 37, generator=g)
    x[0, 70:75] = x[0, 3]  # equal ones
    noise = torch.randn(2, 90, generator=g)

    def run(backend):
        match = match_tokens(x, 9, 10, 0.5, noise=noise, recover_from=recover_from, backend=backend)
        leaf = x.clone().requires_grad_()
        kept = compact_tokens(leaf, match, backend=backend)
        out = recover_tokens(kept.square(), match, backend=backend)
        (slope,) = torch.autograd.grad((out * noise[..., None]).sum(), leaf)
        return match.kept, match.source, match.counts, out.detach(), slope

    for found, expected in on_both(run):
        assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("gate", ["open", "logits", "cells", "both"])
@pytest.mark.parametrize("features", [1, 2, 3])
def test_hashgrid(g, gate, features):
    levels = hashgrid_levels(3, features, 4, 20, log2_rows=9)
    assert 0 in levels.strides and any(levels.strides)
    points = torch.rand(300, 3, generator=g) * 1.2 - 0.1
    points[0], points[1] = 0, 1
    table = torch.randn(levels.offsets[-1], features, generator=g)
    logits = torch.randn(5, 5, 5, generator=g) * 3 if gate in ("logits", "both") else None
    cells = torch.rand(4, 4, 4, generator=g) < 0.6 if gate in ("cells", "both") else None
    slopes = [torch.randn(300, 3 * features, generator=g), *torch.randn(2, 300, generator=g)]

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in (table, points, logits) if t is not None]
        z = leaves[2] if logits is not None else None
        found = hashgrid_encode(
            leaves[1], leaves[0], levels, logits=z, cells=cells, backend=backend
        )
        loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=True))
        return [*(t.detach() for t in found), *torch.autograd.grad(loss, leaves)]

    results = run("triton")
    for found, expected in zip(results, run("reference"), strict=True):
        assert_near(found, expected, 2e-5 * max(float(expected.abs().max()), 1))
    assert all(torch.equal(a, b) for a, b in zip(results, run("triton"), strict=True))


def test_no_points(g):
    levels = hashgrid_levels(2, 2, 4, 8, log2_rows=6)
    table = torch.randn(levels.offsets[-1], 2, generator=g).requires_grad_()
    features = hashgrid_encode(torch.zeros(0, 3), table, levels, backend="triton")[0]
    assert features.shape == (0, 4)
    assert not torch.autograd.grad(features.sum(), table)[0].any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 35, 7), (33, 150), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rownorm(g, shape, dtype):
    rows = (100 * torch.randn((*shape, 2), generator=g)).to(dtype)[..., 0]
    if shape[-2]:
        rows[..., 0, :] = 0
    ((found, expected),) = on_both(lambda b: [rownorm_colsq(rows, backend=b)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 37), (2, 1100)], ids=str)
def test_wanda(g, shape):
    """With ties that reach over the cut, in blocks of columns and across them."""
    weight = torch.randn(shape, generator=g)
    target, base = torch.rand(2, 2, shape[1], generator=g).unbind()
    for tied in (weight, target):
        tied[:, 5:30] = tied[:, shape[1] - 4 :] = tied[:, :1]
    base[:, 5:30] = base[:, -4:] = 0
    for count in (1, 9, shape[1] // 2, shape[1]):
        for least in (1, 2):
            options = dict(least=least)
            ((found, expected),) = on_both(
                lambda b, c=count, o=options: [wanda_mask(weight, target, base, c, **o, backend=b)]
            )
            assert torch.equal(found, expected)
    assert found.any() and not found.all()


def test_wanda_of_the_smallest_numbers():
    weight, ones = torch.tensor([[1e-42, 2e-42, 0.0, 1e-45, -0.0]]), torch.ones(1, 5)
    for count in range(1, 6):
        ((found, expected),) = on_both(
            lambda b, c=count: [wanda_mask(weight, ones, 0 * ones, c, backend=b)]
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        dict(step=0.07),
        dict(step=0.05, near=1.3, far=2.9),
        dict(step=0.04, most=5),
        dict(step=0.03, cone=0.05),
        dict(step=0.2, far=8.0, contracted=True),
        dict(step=0.05, cone=0.1, near=0.1, far=100.0, contracted=True),
    ],
    ids=str,
)
def test_march(g, case):
    origins, goals = torch.randn(40, 3, generator=g) * 2, torch.randn(40, 3, generator=g) * 0.4
    directions = torch.nn.functional.normalize(goals - origins, dim=1)
    origins[0], directions[0] = torch.tensor([-2.0, 0, 0]), torch.tensor([1.0, 0, 0])
    directions[1], origins[2, 0], directions[3, 1] = 0, torch.nan, torch.inf
    rays = origins, directions, torch.rand(40, generator=g)
    grid = torch.rand(7, 7, 7, generator=g) < 0.4
    box = torch.tensor([[-1.0, -1.5, -0.7], [1.2, 0.5, 0.8]])
    for found, expected in on_both(lambda b: march_rays(*rays, grid, box, **case, backend=b)):
        assert torch.equal(found, expected) and len(found) > 20
    for few, cells in ((rays, torch.zeros_like(grid)), ([t[:0] for t in rays], grid)):
        pairs = on_both(lambda b, f=few, c=cells: march_rays(*f, c, box, **case, backend=b))
        assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("bands", [1, 4])
def test_merge_costs(g, bands):
    half = torch.randn(40, 3, 3, generator=g).double() * 0.1
    full = half @ half.mT
    full[0] = 0  # a point
    blobs = Blobs(
        torch.randn(40, 3, generator=g).double() * 0.15,
        torch.stack([full[:, i, j] for i in range(3) for j in range(i, 3)], -1),
        torch.rand(40, generator=g).double(),
        torch.randn(40, 3 * bands, generator=g).double(),
    )
    pairs = torch.randint(0, 40, (150, 2), generator=g)
    ((found, expected),) = on_both(lambda b: [splat_merge_costs(blobs, pairs, backend=b)])
    # cancellation: a cost is a small difference of energies; a point counts as an area of 1e-15
    assert ((found - expected).abs() <= 1e-12 * energies(blobs)[pairs].sum(1) + 1e-14).all()
    assert splat_merge_costs(blobs, pairs[:0], backend="triton").shape == (0,)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"the triton backend takes float32, got torch\.float64"):
        ssim(torch.ones(2, 2, 1).double(), torch.ones(2, 2, 1).double(), backend="triton")


def test_nobody_is_interpreted_unasked():
    ssim(torch.ones(2, 2, 1), torch.ones(2, 2, 1))
    assert dispatch.last()["ssim"] in ("cpu", "reference")
