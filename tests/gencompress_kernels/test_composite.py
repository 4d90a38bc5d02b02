"""composite: a loop over samples, published numbers, identities and gradients, on every backend."""

import functools

import numba
import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.composite import (
    _composite,
    _composite_backward,
    composite,
    transmittance,
)
from numerics import assert_as_accurate

# nerfacc's documentation: render_weight_from_density
DENSITIES = torch.tensor([0.4, 0.8, 0.1, 0.8, 0.1, 0.0, 0.9])
PACKED = torch.tensor([[0, 3], [3, 2], [5, 2]])
WEIGHTS = torch.tensor([0.33, 0.37, 0.03, 0.55, 0.04, 0.0, 0.59])
TRANSMITTANCE = torch.tensor([1.0, 0.67, 0.30, 1.0, 0.45, 1.0, 1.0])


def make_rays(counts, seed=0, spare=0, density=6.0):
    """densities, colors, steps, packed, distances; rays in mixed order, with gaps of `spare`."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts)
    order = torch.randperm(len(counts), generator=g)
    ends = (counts[order] + spare).cumsum(0)
    starts = torch.empty_like(counts)
    starts[order] = ends - counts[order]
    num = int(ends[-1]) + spare
    densities = torch.rand(num, generator=g) * density
    densities *= torch.rand(num, generator=g) < 0.8  # some exactly empty
    colors, steps = torch.rand(num, 3, generator=g), torch.rand(num, generator=g) * 0.1
    distances = torch.rand(num, generator=g) * 4
    return densities, colors, steps, torch.stack([starts, counts], 1), distances


RAYS = {
    "odd": make_rays([3, 0, 63, 1, 65, 128, 0, 7]),
    "gaps": make_rays([5, 0, 40, 17], seed=1, spare=3),
    "one sample": make_rays([1], seed=2),
    "all empty": make_rays([0, 0, 0], seed=3, spare=2),
    "many": make_rays([(k * 7) % 11 for k in range(101)], seed=4),
    "opaque": make_rays([90] * 4, seed=5, density=80.0),
}


def by_loop(densities, colors, steps, packed, distances, stop):
    """The same in float64, one sample after the other, for autograd."""
    totals, weights = [], torch.zeros(len(densities), dtype=torch.float64)
    for start, count in packed.tolist():
        left = torch.ones((), dtype=torch.float64)
        total = 0 * (densities.sum() + colors.sum()).expand(5)
        for i in range(start, start + count):
            if left < stop:
                break
            through = torch.exp(-densities[i] * steps[i])
            weight = left * (1 - through)
            one = torch.ones(1, dtype=torch.float64)
            total = total + weight * torch.cat([colors[i], one, distances[i : i + 1]])
            weights[i] = weight.detach()
            left = left * through
        totals.append(total)
    totals = torch.stack(totals)
    return totals[:, :3], totals[:, 3], totals[:, 4], weights


def slopes_of(rays, seed=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rays, 3, generator=g), *torch.randn(2, rays, generator=g)


def everything(tensors, stop, run, dtype, device="cpu"):
    """Four outputs and the two gradients."""
    densities, colors, steps, packed, distances = (
        t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True) for t in tensors
    )
    leaves = densities.requires_grad_(), colors.requires_grad_()
    found = run(*leaves, steps, packed, distances, stop)
    slopes = [s.to(device, dtype) for s in slopes_of(len(packed))]
    loss = sum((f * s).sum() for f, s in zip(found, slopes, strict=False))
    gradients = torch.autograd.grad(loss, leaves)
    return [t.detach() for t in (*found, *gradients)]


def on(backend):
    return lambda d, c, s, p, t, stop: composite(d, c, s, p, t, stop=stop, backend=backend)


NAMES = ("colors", "opacity", "depth", "weights", "by density", "by color")


@functools.cache
def truth_of(name, stop):
    return everything(RAYS[name], stop, by_loop, torch.float64)


@pytest.mark.parametrize("stop", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("name", RAYS)
def test_values_and_gradients_equal_a_loop(backend, device, name, stop):
    tensors, truth = RAYS[name], truth_of(name, stop)
    exact = everything(tensors, stop, on("reference"), torch.float64)
    plain = everything(tensors, stop, on("reference"), torch.float32)
    got = everything(tensors, stop, on(backend), torch.float32, device)
    for name, t, e, p, g in zip(NAMES, truth, exact, plain, got, strict=True):
        assert torch.allclose(e, t, rtol=0, atol=1e-12), name
        assert g.dtype == torch.float32
        assert_as_accurate(g, p, t, floor=1e-7, name=name)


def test_gradcheck_of_the_reference():
    densities, colors, *rest = (
        t.double() if t.is_floating_point() else t for t in make_rays([4, 0, 6, 1])
    )
    leaves = (densities + 0.1).requires_grad_(), colors.requires_grad_()

    def run(d, c):
        return composite(d, c, *rest, stop=0, backend="reference")[:3]

    assert torch.autograd.gradcheck(run, leaves)


def test_published_example(backend, device):
    densities, packed = DENSITIES.to(device), PACKED.to(device)
    ones = torch.ones_like(densities)
    colors = ones[:, None].expand(-1, 3)
    weights = composite(densities, colors, ones, packed, ones, backend=backend)[3]
    assert torch.allclose(weights.cpu(), WEIGHTS, rtol=0, atol=0.005)
    arriving = transmittance(densities, ones, packed, backend=backend)
    assert torch.allclose(arriving.cpu(), TRANSMITTANCE, rtol=0, atol=0.005)


@pytest.mark.parametrize("name", RAYS)
def test_transmittance_and_what_is_left(backend, device, name):
    densities, colors, steps, packed, distances = (t.to(device) for t in RAYS[name])
    arriving = transmittance(densities, steps, packed, backend=backend)
    exact = transmittance(densities.double(), steps.double(), packed, backend="reference")
    plain = transmittance(densities, steps, packed, backend="reference")
    assert_as_accurate(arriving, plain, exact, floor=1e-7)
    found = composite(densities, colors, steps, packed, distances, stop=0, backend=backend)
    weights = arriving * -torch.expm1(-densities * steps)
    assert torch.allclose(found[3], weights, rtol=0, atol=1e-6)
    for (start, count), opacity in zip(packed.tolist(), found[1].tolist(), strict=True):
        own = slice(start, start + count)
        assert abs(opacity - float(found[3][own].sum())) < 1e-6
        left = float(torch.exp(-(densities[own] * steps[own]).sum()))
        assert abs(opacity + left - 1) < 1e-6  # sum of weights and what is left make 1


def test_splitting_a_step_changes_nothing(backend, device):
    densities, colors, steps, packed, distances = (t.to(device) for t in RAYS["odd"])
    whole = composite(densities, colors, steps, packed, distances, stop=0, backend=backend)
    twice = (t.repeat_interleave(2, dim=0) for t in (densities, colors, steps / 2))
    halves = composite(*twice, packed * 2, distances.repeat_interleave(2), stop=0, backend=backend)
    for one, two in zip(whole[:3], halves[:3], strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6)
    assert torch.allclose(whole[3], halves[3].view(-1, 2).sum(1), rtol=0, atol=1e-6)


def test_a_white_ray_over_white_is_white(backend, device):
    densities, colors, steps, packed, distances = (t.to(device) for t in RAYS["many"])
    white = torch.ones_like(colors)
    for stop in (0.0, 0.1):
        drawn, opacity, depth, _ = composite(
            densities, white, steps, packed, distances, stop=stop, backend=backend
        )
        assert torch.allclose(drawn + (1 - opacity)[:, None], white[: len(packed)], atol=1e-6)
        none = packed[:, 1] == 0
        assert none.any() and not drawn[none].any()
        assert not opacity[none].any() and not depth[none].any()


def test_where_the_walk_stops(backend, device):
    """Each sample lets half through: 1, 1/2, 1/4, 1/8 arrive; under `stop` nothing counts."""
    num = 6
    densities = torch.full((num,), 0.6931472, device=device).requires_grad_()
    colors = torch.rand(num, 3, device=device).requires_grad_()
    ones, packed = torch.ones(num, device=device), torch.tensor([[0, num]], device=device)
    for stop, walked in ((0.3, 2), (0.2501, 2), (0.2499, 3), (0.0, 6)):
        drawn, opacity, _, weights = composite(
            densities, colors, ones, packed, ones, stop=stop, backend=backend
        )
        expected = 0.5 ** torch.arange(1.0, num + 1, device=device)
        expected[walked:] = 0
        assert torch.allclose(weights, expected, atol=1e-6) and not weights[walked:].any()
        assert abs(float(opacity.detach()) - (1 - 0.5**walked)) < 1e-6
        loss = drawn.sum() + opacity.sum()
        for gradient in torch.autograd.grad(loss, (densities, colors)):
            assert gradient[:walked].all() and not gradient[walked:].any()
    # an empty sample is walked over, and could still become dense
    empty = torch.zeros(num, device=device).requires_grad_()
    _, opacity, _, _ = composite(empty, colors, ones, packed, ones, stop=0.3, backend=backend)
    (slope,) = torch.autograd.grad(opacity.sum(), empty)
    assert torch.equal(slope, ones)


def test_densities_without_bound(backend, device):
    """inf is opaque, but not where a sample has no length; huge and zero ones are as they say."""
    densities = torch.tensor([torch.inf, 0, 3e38, torch.inf, 1], device=device).requires_grad_()
    steps = torch.tensor([0, 1, 2.0, 1, 1], device=device)
    colors = torch.eye(5, 3, device=device).requires_grad_()
    distances = torch.arange(5.0, device=device)
    packed = torch.tensor([[0, 5], [3, 1], [0, 2]], device=device)[:2]
    packed[0, 1] = 3
    drawn, opacity, depth, weights = composite(
        densities, colors, steps, packed, distances, stop=0, backend=backend
    )
    assert weights.tolist() == [0, 0, 1, 1, 0]
    assert opacity.tolist() == [1, 1] and depth.tolist() == [2, 3]
    assert drawn.tolist() == [[0, 0, 1], [0, 0, 0]]
    gradients = torch.autograd.grad((drawn.sum() + depth.sum(),), (densities, colors))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert transmittance(densities, steps, packed, backend=backend).tolist() == [1, 1, 1, 1, 0]


def test_thin_samples_keep_their_digits(backend, device):
    """1 - exp(-x) of a small x: a fog of a thousand samples has the opacity 1 - exp(-0.001)."""
    num = 1000
    densities = torch.full((num,), 1e-3, device=device)
    colors, ones = torch.ones(num, 3, device=device), torch.ones(num, device=device)
    packed = torch.tensor([[0, num]], device=device)
    opacity = composite(densities, colors, ones / num, packed, ones, backend=backend)[1]
    assert abs(float(opacity) / 0.0009995001666 - 1) < 1e-5


def test_one_slope_at_a_time(backend, device):
    """Outputs that are not used have no part in the gradient, and weights never have."""
    densities, colors, *rest = (t.to(device) for t in RAYS["odd"])
    leaves = densities.clone().requires_grad_(), colors.clone().requires_grad_()
    found = composite(*leaves, *rest, backend=backend)
    assert [f.requires_grad for f in found] == [True, True, True, False]
    parts = [torch.autograd.grad(f.sum(), leaves, retain_graph=True) for f in found[:3]]
    joint = torch.autograd.grad(sum(f.sum() for f in found[:3]), leaves)
    for k in range(2):
        total = sum(part[k] for part in parts)
        assert torch.allclose(total, joint[k], atol=1e-5) and all(part[0].any() for part in parts)
    assert not parts[1][1].any() and not parts[2][1].any()


def test_same_result_at_any_thread_count(monkeypatch):
    from gencompress_kernels.composite import cpu

    before, found = numba.get_num_threads(), []
    for threads, small in ((1, 0), (2, 0), (1, 1 << 30)):
        monkeypatch.setattr(cpu, "SMALL", small)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            found.append(everything(RAYS["many"], 1e-4, on("cpu"), torch.float32))
        finally:
            numba.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


def test_strided_inputs_are_only_read(backend, device):
    tensors = [t.to(device) for t in RAYS["gaps"]]
    wide = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    before = [t.clone() for t in wide]
    assert not any(t.is_contiguous() for t in wide)
    got = composite(*wide, backend=backend)
    expected = composite(*tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wide, before, strict=True))


def test_no_rays_and_no_samples(backend, device):
    def empty(*shape):
        return torch.zeros(shape, device=device)

    for samples, rays in ((0, 0), (0, 4), (5, 0)):
        densities, colors = empty(samples).requires_grad_(), empty(samples, 3).requires_grad_()
        packed = torch.zeros(rays, 2, dtype=torch.int64, device=device)
        rest = empty(samples), packed, empty(samples)
        found = composite(densities, colors, *rest, backend=backend)
        assert [f.shape for f in found] == [(rays, 3), (rays,), (rays,), (samples,)]
        assert not any(f.any() for f in found)
        sum(f.sum() for f in found[:3]).backward()
        assert not densities.grad.any() and not colors.grad.any()
        assert transmittance(densities, *rest[:2], backend=backend).shape == (samples,)


def bad(**changes):
    tensors = dict(
        densities=torch.zeros(4), colors=torch.zeros(4, 3), steps=torch.zeros(4),
        packed=torch.tensor([[0, 4]]), distances=torch.zeros(4),
    )  # fmt: skip
    return tensors | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(densities=torch.zeros(4, 1)), "densities are torch.float32"),
        (bad(densities=torch.zeros(4).half()), "densities are torch.float16"),
        (bad(colors=torch.zeros(4, 4)), "colors: torch.float32"),
        (bad(steps=torch.zeros(3)), "steps: torch.float32"),
        (bad(distances=torch.zeros(4).double()), "distances: torch.float64"),
        (bad(packed=torch.zeros(3, dtype=torch.int64)), "packed is torch.int64"),
        (bad(packed=torch.zeros(3, 2)), "packed is torch.float32"),
        (bad(packed=torch.tensor([[1, 4]])), "a ray reaches outside the 4 samples"),
        (bad(packed=torch.tensor([[-1, 2]])), "a ray reaches outside"),
        (bad(packed=torch.tensor([[2, -1]])), "a ray reaches outside"),
        (bad(stop=1.0), "stop 1.0, expected"),
        (bad(stop=-0.1), "stop -0.1, expected"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        composite(**arguments)


def test_bad_input_of_transmittance():
    four = torch.zeros(4)
    with pytest.raises(ValueError, match="a ray reaches outside"):
        transmittance(four, four, torch.tensor([[3, 2]]))
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        transmittance(four.double(), four.double(), torch.tensor([[0, 2]]), backend="cpu")


def test_registered_op(backend, device):
    tensors = [t.to(device) for t in RAYS["gaps"]]
    densities, colors, *rest = tensors
    for leaves in ((densities, colors), (t.clone().requires_grad_() for t in tensors[:2])):
        torch.library.opcheck(_composite, (*leaves, *rest, 0.1, backend))
    found = _composite(*tensors, 0.1, backend)
    slopes = torch.rand(len(tensors[3]), 5, device=device)
    torch.library.opcheck(_composite_backward, (slopes, *tensors[1:], *found[3:], backend))
    composite(*tensors, backend=backend)
    assert dispatch.last()["composite"] == backend
