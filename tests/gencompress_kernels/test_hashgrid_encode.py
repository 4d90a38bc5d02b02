"""hashgrid_encode: features, gate and gradients, against the definitions."""

import itertools
import math

import numba
import numpy as np
import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.hashgrid_encode import (
    Levels,
    _encode,
    _encode_backward,
    hashgrid_encode,
    hashgrid_levels,
)
from numerics import assert_as_accurate

SMALL = hashgrid_levels(5, 2, 4, 40, log2_rows=9)  # two dense levels, three hashed
TCNN = hashgrid_levels(5, 2, 4, 40, log2_rows=9, convention="tcnn")


def plain(points, table, levels, logits=None, cells=None):
    """The same from the definitions, for autograd; a corner at a time, indices by numpy."""
    count, width = len(points), levels.features
    saliency = torch.ones_like(points[:, 0])
    if logits is not None:
        at = points.detach() * (len(logits) - 1)
        low = at.floor().clamp_max(len(logits) - 2)
        fraction, z = points * (len(logits) - 1) - low, 0
        for corner in itertools.product((0, 1), repeat=3):
            x, y, w = (low.long() + torch.tensor(corner)).unbind(1)
            z = z + weight(fraction, corner) * logits[x, y, w]
        saliency = torch.sigmoid(z)
    if cells is not None:
        place = (points.detach() * len(cells)).long().clamp_max(len(cells) - 1)
        saliency = torch.where(cells[tuple(place.unbind(1))], saliency, 0)
    parts = []
    for level, scale in enumerate(levels.scales):
        start, end = levels.offsets[level : level + 2]
        low = (points.detach() * scale + 0.5).floor()
        fraction, value = points * scale + 0.5 - low, torch.zeros(count, width).to(points)
        for corner in itertools.product((0, 1), repeat=3):
            vertex = low.long().numpy() + np.array(corner)
            rows = torch.from_numpy(row_of(vertex, levels.strides[level], end - start))
            value = value + weight(fraction, corner)[:, None] * table[start + rows]
        parts.append(value)
    features = saliency[:, None] * torch.cat(parts, 1)
    # the root has no derivative at 0
    norms = (features.square().sum(1) + 1e-40).sqrt()
    return features, norms, saliency


def weight(fraction, corner):
    return torch.where(torch.tensor(corner).bool(), fraction, 1 - fraction).prod(1)


def row_of(vertex, stride, rows):
    """int64 [M] of vertices [M, 3]."""
    if stride:
        return (vertex @ np.array([1, stride, stride**2])) % rows
    x, y, z = vertex.astype(np.uint32).T
    return ((x ^ y * np.uint32(2654435761) ^ z * np.uint32(805459861)) % rows).astype(np.int64)


def make(levels, count, side=0, cells=False, seed=0):
    """points, table, logits, cells; no point near a border between cells, where the gradient of
    the points jumps and rounding decides."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(2 * count + 50, 3, generator=g)
    at = points.double()[..., None] * torch.tensor(levels.scales).double() + 0.5
    grid = points.double()[..., None] * max(side - 1, 1)
    away = torch.cat([at, grid], -1)
    points = points[((away - away.round()).abs() > 1e-3).all(-1).all(-1)][:count]
    assert len(points) == count
    return (
        points,
        torch.randn(levels.offsets[-1], levels.features, generator=g),
        2 * torch.randn(side, side, side, generator=g) if side else None,
        torch.rand(side - 1, side - 1, side - 1, generator=g) < 0.7 if cells else None,
    )


def outputs_and_gradients(run, inputs, levels, dtype=torch.float32, seed=1, only=(0, 1, 2)):
    """Three outputs and the gradients by points, table and logits of a random sum of them."""
    g = torch.Generator().manual_seed(seed)
    leaves = [t if t is None else t.detach().to(dtype) for t in inputs[:3]]
    moved = [leaves[k].requires_grad_() for k in only if leaves[k] is not None]
    outputs = run(leaves[0], leaves[1], levels, logits=leaves[2], cells=inputs[3])
    total = 0
    for output in outputs:
        slopes = torch.randn(output.shape, generator=g).to(output)
        total = total + (output * slopes).sum()
    return [o.detach() for o in outputs], torch.autograd.grad(total, moved, materialize_grads=True)


def on(backend):
    return lambda *args, **options: hashgrid_encode(*args, **options, backend=backend)


@pytest.mark.parametrize("stride", [0, 12, 10], ids=["hashed", "torch-ngp", "tcnn"])
def test_a_vertex_gives_its_row_and_nothing_else(backend, device, stride):
    """Scales are powers of two, so that a vertex is met exactly."""
    rows = {0: 512, 12: 1728, 10: 1000}[stride]
    levels = Levels((8.0,), (9,), (0, rows), (stride,), 2, "tcnn" if stride == 10 else "torch-ngp")
    table = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    vertices = np.array(list(itertools.product(range(1, 9), repeat=3)))
    points = torch.from_numpy((vertices - 0.5) / 8).float()
    got = hashgrid_encode(points.to(device), table.to(device), levels, backend=backend)
    assert torch.equal(got[0].cpu(), table[row_of(vertices, stride, rows)])
    if stride == 0:
        one = (1 ^ 2654435761 ^ 805459861) % 512
        assert torch.equal(got[0][0].cpu(), table[one])
    else:
        assert torch.equal(got[0][0].cpu(), table[1 + stride + stride**2])


@pytest.mark.parametrize("features", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("count", "side", "cells"),
    [(1, 0, False), (255, 2, False), (1025, 9, True), (300, 4, False), (2500, 17, True)],
)
def test_outputs_and_gradients(backend, device, features, count, side, cells):
    convention = "tcnn" if count % 2 else "torch-ngp"
    levels = hashgrid_levels(5, features, 4, 40, log2_rows=9, convention=convention)
    inputs = make(levels, count, side, cells, seed=features)
    truth = outputs_and_gradients(plain, inputs, levels, torch.float64)
    exact = outputs_and_gradients(on("reference"), inputs, levels, torch.float64)
    single = outputs_and_gradients(on("reference"), inputs, levels)
    moved = [t if t is None else t.to(device) for t in inputs]
    got = outputs_and_gradients(on(backend), moved, levels)
    results = [outputs + list(slopes) for outputs, slopes in (truth, exact, single, got)]
    for number, (a, b, c, d) in enumerate(zip(*results, strict=True)):
        name = ("features", "norms", "saliency", "by points", "by table", "by logits")[number]
        size = max(float(a.abs().max()), 1e-30)
        assert float((b - a).abs().max()) < 1e-6 * size, name
        assert float((d.cpu() - a).abs().max()) < 1e-4 * size, name
        assert_as_accurate(d, c, a, floor=2e-6 * size, name=name)


def test_paper_sized_levels(backend, device):
    levels = hashgrid_levels(log2_rows=14)
    inputs = make(levels, 700, 64)
    truth = outputs_and_gradients(on("reference"), inputs, levels, torch.float64)
    single = outputs_and_gradients(on("reference"), inputs, levels)
    got = outputs_and_gradients(on(backend), [t if t is None else t.to(device) for t in inputs],
                                levels)  # fmt: skip
    for a, b, c in zip(*(o + list(g) for o, g in (truth, single, got)), strict=True):
        assert_as_accurate(c, b, a, floor=2e-6 * float(a.abs().max()))


def test_gradcheck_of_the_reference():
    levels = hashgrid_levels(2, 2, 2, 5, log2_rows=4)
    points, table, logits, _ = make(levels, 6, 3)
    leaves = [t.double().requires_grad_() for t in (points, table, logits)]

    def run(points, table, logits):
        return hashgrid_encode(points, table, levels, logits=logits, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)


def test_borders(backend, device):
    """Corners of the cube and of cells, points outside, and T = 2."""
    for levels in (SMALL, TCNN):
        for side in (2, 3, 5):
            steps = [-1.0, -1e-7, 0.0, 1e-7, 1 - 2**-24, 1.0, 1 + 1e-6, math.inf, -math.inf]
            steps += [k / (side - 1) for k in range(side)]
            steps += [(k - 0.5) / levels.scales[-1] for k in (1, 2, 39)]
            points = torch.tensor(list(itertools.product(steps, repeat=3)))
            _, table, logits, cells = make(levels, 0, side, True)
            cells[0] = True
            expected = plain(points.clamp(0, 1), table, levels, logits, cells)
            inputs = (t.to(device) for t in (points, table, logits, cells))
            points, table, logits, cells = inputs
            points.requires_grad_()
            got = hashgrid_encode(
                points, table, levels, logits=logits, cells=cells, backend=backend
            )
            for ours, theirs in zip(got, expected, strict=True):
                assert torch.allclose(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
            (slopes,) = torch.autograd.grad(got[0].sum(), points)
            outside = (points < 0) | (points > 1)
            assert bool((slopes[outside] == 0).all()) and bool((slopes[~outside] != 0).any())


def test_a_point_that_is_not_a_number_reads_no_foreign_memory():
    table = torch.ones(SMALL.offsets[-1], 2)
    points = torch.full((300, 3), math.nan)
    assert torch.allclose(hashgrid_encode(points, table, SMALL, backend="cpu")[0], torch.ones(()))


def test_infinite_logits_are_exactly_open_and_closed(backend, device):
    points, table, _, _ = (t if t is None else t.to(device) for t in make(SMALL, 1500))
    wanted = outputs_and_gradients(on(backend), (points, table, None, None), SMALL, only=(0, 1))
    for value in (math.inf, 128.0):
        logits = torch.full((4, 4, 4), value, device=device)
        got = outputs_and_gradients(on(backend), (points, table, logits, None), SMALL)
        same = got[0] + list(got[1][:2]), wanted[0] + list(wanted[1])
        assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))
        assert bool((got[1][2] == 0).all())
    for value in (-math.inf, -128.0):
        logits = torch.full((4, 4, 4), value, device=device)
        got = outputs_and_gradients(on(backend), (points, table, logits, None), SMALL)
        assert all(bool((tensor == 0).all()) for tensor in got[0] + list(got[1]))
        assert not torch.signbit(got[0][0]).any()


def test_open_beside_closed(backend, device):
    """Between logits of both infinities the gradients stay numbers."""
    logits = torch.full((3, 3, 3), math.inf, device=device)
    logits[2] = -math.inf
    points, table, _, _ = (t if t is None else t.to(device) for t in make(SMALL, 400, 3))
    (_, _, saliency), slopes = outputs_and_gradients(
        on(backend), (points, table, logits, None), SMALL
    )
    assert bool((saliency[points[:, 0] < 0.5] == 1).all())
    assert float(saliency[points[:, 0] > 0.9].max()) < 1e-15
    assert all(bool(tensor.isfinite().all()) for tensor in slopes)


def test_cells_switch_off(backend, device):
    points, table, logits, cells = (t.to(device) for t in make(SMALL, 3000, 6, True))
    got = outputs_and_gradients(on(backend), (points, table, logits, cells), SMALL)
    every = outputs_and_gradients(on(backend), (points, table, logits, None), SMALL)
    inside = cells[tuple((points * 5).long().unbind(1))]
    assert 0.6 < float(inside.float().mean()) < 0.8
    for ours, others in zip(got[0], every[0], strict=True):
        assert torch.equal(ours[inside], others[inside])
        assert bool((ours[~inside] == 0).all())
    assert torch.equal(got[1][0][inside], every[1][0][inside])
    assert bool((got[1][0][~inside] == 0).all())
    slopes = torch.randn(3000, 10, generator=torch.Generator().manual_seed(2)).to(device)
    leaves = table.requires_grad_(), logits.requires_grad_()
    options = {"logits": logits, "backend": backend}
    whole = hashgrid_encode(points, table, SMALL, cells=cells, **options)[0]
    part = hashgrid_encode(points[inside], table, SMALL, **options)[0]
    found = torch.autograd.grad(whole, leaves, slopes)
    expected = torch.autograd.grad(part, leaves, slopes[inside])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_logits", [False, True])
def test_all_cells_off_reads_no_level(backend, device, with_logits):
    points, table, logits, _ = (t if t is None else t.to(device) for t in make(SMALL, 700, 4))
    logits = logits if with_logits else None
    cells = torch.zeros(3, 3, 3, dtype=torch.bool, device=device)
    nothing = torch.full_like(table, math.nan)
    outputs, slopes = outputs_and_gradients(on(backend), (points, nothing, logits, cells), SMALL)
    assert all(bool((tensor == 0).all()) for tensor in [*outputs, *slopes])
    on_again = outputs_and_gradients(on(backend), (points, table, logits, ~cells), SMALL)
    wanted = outputs_and_gradients(on(backend), (points, table, logits, None), SMALL)
    for a, b in zip(on_again[0] + list(on_again[1]), wanted[0] + list(wanted[1]), strict=True):
        assert torch.equal(a, b)


def test_norms_near_zero(backend, device):
    """The direction of a feature of length 0 is no direction."""
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).to(device)
    for size, expected in ((0.0, 0.0), (1e-14, 0.0), (1e-9, 1.0)):
        table = torch.full((SMALL.offsets[-1], 2), size, device=device, requires_grad=True)
        norms = hashgrid_encode(points, table, SMALL, backend=backend)[1]
        assert torch.allclose(norms, torch.full_like(norms, size * math.sqrt(10)), atol=1e-20)
        (slopes,) = torch.autograd.grad(norms.sum(), table)
        # every column of a row that all points share alike: 1 / sqrt(10) of a point
        total = float(slopes.sum()) / (40 * math.sqrt(10))
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-30)


def two_in_one_row():
    """A hashed level, and two of its vertices that share a row, far apart in x."""
    levels = Levels((64.0,), (65,), (0, 64), (0,), 2, "torch-ngp")
    rows = {}
    for vertex in itertools.product(range(1, 65), range(1, 5), range(1, 5)):
        row = int(row_of(np.array([vertex]), 0, 64)[0])
        for other in rows.setdefault(row, []):
            if other[0] < 20 and vertex[0] > 45:
                return levels, torch.tensor([other, vertex]).sub(0.5) / 64
        rows[row].append(vertex)
    raise AssertionError("no two vertices share a row")


@pytest.mark.parametrize("gated", [True, False])
def test_a_shared_row_serves_the_point_that_is_open(backend, device, gated):
    levels, points = two_in_one_row()
    logits = torch.full((4, 4, 4), math.inf)
    logits[2:] = -math.inf
    targets = torch.tensor([[0.3, -0.2], [-0.7, 0.9]])
    points, logits, targets = (t.to(device) for t in (points, logits, targets))
    table = torch.zeros(64, 2, device=device, requires_grad=True)
    for _ in range(60):
        features, _, saliency = hashgrid_encode(
            points, table, levels, logits=logits if gated else None, backend=backend
        )
        (slopes,) = torch.autograd.grad(0.5 * (features - targets).square().sum(), table)
        with torch.no_grad():
            table -= 0.4 * slopes
    assert int((table != 0).any(1).sum()) == 1
    if gated:
        assert saliency.tolist() == [1, 0]
        assert torch.allclose(features[0], targets[0], rtol=0, atol=1e-6)
        assert bool((features[1] == 0).all())
    else:  # neither gets its own
        assert torch.allclose(features, targets.mean(0).expand(2, 2), rtol=0, atol=1e-6)


def test_same_result_at_any_thread_count():
    levels = hashgrid_levels(6, 2, 4, 64, log2_rows=10)
    inputs = make(levels, 5000, 9, True)
    before, found = numba.get_num_threads(), []
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(threads)
        try:
            outputs, slopes = outputs_and_gradients(on("cpu"), inputs, levels)
            found.append(outputs + list(slopes))
        finally:
            numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_level_has_one_thread():
    from gencompress_kernels.hashgrid_encode.cpu import _owners

    for threads in (1, 2, 3, 40):
        owners = _owners((9, 12, 0, 0, 0), True, True, threads)
        assert owners.min() >= 0 and len(set(owners)) == min(threads, 6)
    assert _owners((9, 0), False, True, 2).tolist() == [-1, -1, 0]
    assert _owners((9, 0), True, False, 1).tolist() == [0, 0, -1]


def test_more_points_than_a_thread_takes_at_once(backend, device):
    """A point's features do not depend on where in the batch it lies."""
    levels = hashgrid_levels(1, 2, 3, 3, log2_rows=7)
    points, table, logits, cells = (t.to(device) for t in make(levels, 2000, 3, True))
    options = {"logits": logits, "cells": cells, "backend": backend}
    once = hashgrid_encode(points, table, levels, **options)
    many = hashgrid_encode(points.repeat(200, 1), table, levels, **options)
    for a, b in zip(once, many, strict=True):
        assert torch.allclose(b.view(200, *a.shape), a.expand(200, *a.shape), rtol=1e-6, atol=1e-7)


def test_strided_inputs_are_only_read(backend, device):
    inputs = [t.to(device) for t in make(SMALL, 333, 5, True)]
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    before = [t.clone() for t in turned]
    got = outputs_and_gradients(on(backend), turned, SMALL)
    expected = outputs_and_gradients(on(backend), inputs, SMALL)
    assert not any(t.is_contiguous() for t in turned)
    for a, b in zip(got[0] + list(got[1]), expected[0] + list(expected[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(turned, before, strict=True))


def test_slopes_of_any_layout(backend, device):
    points, table, _, _ = (t if t is None else t.to(device) for t in make(SMALL, 100))
    leaf = table.requires_grad_()
    features, norms, _ = hashgrid_encode(points, leaf, SMALL, backend=backend)
    wide = torch.randn(10, 100, generator=torch.Generator().manual_seed(0)).to(device)
    found = [torch.autograd.grad(features, leaf, s, retain_graph=True)[0]
             for s in (wide.mT, wide.mT.contiguous())]  # fmt: skip
    assert torch.equal(*found)
    one = torch.ones((), device=device)
    found = [torch.autograd.grad(norms, leaf, s, retain_graph=True)[0]
             for s in (one.expand(100), one.repeat(100))]  # fmt: skip
    assert torch.equal(*found)


def test_points_without_a_slope_change_nothing(backend, device):
    points, table, logits, _ = (t if t is None else t.to(device) for t in make(SMALL, 2000, 5))
    some = torch.arange(2000, device=device) % 3 == 1
    slopes = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)).to(device)
    leaves = table.requires_grad_(), logits.requires_grad_()
    whole = hashgrid_encode(points, table, SMALL, logits=logits, backend=backend)
    part = hashgrid_encode(points[some], table, SMALL, logits=logits, backend=backend)
    found = torch.autograd.grad(whole[0], leaves, slopes * some[:, None])
    expected = torch.autograd.grad(part[0], leaves, slopes[some])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_who_gets_a_gradient(backend, device):
    points, table, logits, cells = (t.to(device) for t in make(SMALL, 50, 4, True))
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [
            t.clone().requires_grad_(w)
            for t, w in zip((points, table, logits), wanted, strict=True)
        ]
        run = on(backend)
        outputs = run(leaves[0], leaves[1], SMALL, logits=leaves[2], cells=cells)
        assert all(output.requires_grad == any(wanted) for output in outputs)
        if any(wanted):
            (outputs[0].sum() + outputs[1].sum()).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        assert all(leaf.grad is None or bool(leaf.grad.abs().max() > 0) for leaf in leaves)


@pytest.mark.parametrize("which", range(3), ids=["features", "norms", "saliency"])
def test_one_output_alone(backend, device, which):
    inputs = make(SMALL, 200, 4)

    def only(run):
        return lambda *args, **options: run(*args, **options)[which : which + 1]

    truth = outputs_and_gradients(only(plain), inputs, SMALL, torch.float64)[1]
    moved = [t if t is None else t.to(device) for t in inputs]
    got = outputs_and_gradients(only(on(backend)), moved, SMALL)[1]
    assert [bool((t != 0).any()) for t in truth] == [True, which != 2, True]
    for a, b in zip(got, truth, strict=True):
        assert (a.cpu() - b).abs().max() <= 1e-4 * b.abs().max()


def test_no_points(backend, device):
    points, table, logits, cells = (t.to(device) for t in make(SMALL, 0, 4, True))
    outputs, slopes = outputs_and_gradients(on(backend), (points, table, logits, cells), SMALL)
    assert [tuple(t.shape) for t in outputs] == [(0, 10), (0,), (0,)]
    assert slopes[0].shape == (0, 3) and slopes[1].shape == table.shape
    assert bool((slopes[1] == 0).all()) and bool((slopes[2] == 0).all())


def test_registered_op(backend, device):
    levels = hashgrid_levels(2, 2, 3, 6, log2_rows=5)
    points, table, logits, cells = (t.to(device) for t in make(levels, 7, 3, True))
    layout = list(levels.scales), list(levels.offsets), list(levels.strides)
    leaves = [t.clone().requires_grad_() for t in (points, table, logits)]
    for x, h, g, c in (
        (points, table, None, None),
        (points, leaves[1], None, cells),
        (points, leaves[1], leaves[2], cells),
        (*leaves, None),
    ):
        torch.library.opcheck(_encode, (x, h, g, c, *layout, backend))
    saved = _encode(points, table, logits, cells, *layout, backend)
    slopes = [torch.ones_like(output) for output in saved]
    for wanted in ([True, True, True], [True, False, False]):
        torch.library.opcheck(
            _encode_backward, (*slopes, points, table, logits, *saved, *layout, wanted, backend)
        )
    hashgrid_encode(points, table, levels, backend=backend)
    assert dispatch.last()["hashgrid_encode"] == backend
