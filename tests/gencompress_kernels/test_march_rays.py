"""march_rays: a walk that looks at each sample keeps the same ones, whatever is skipped."""

import functools
import itertools
import math

import numba
import numpy as np
import pytest
import torch
from gencompress_kernels import dispatch
from gencompress_kernels.march_rays import march_rays

UNIT = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
UNEVEN = torch.tensor([[-1.0, -1.5, -0.7], [1.2, 0.5, 0.8]])
FULL = torch.ones(8, 8, 8, dtype=torch.bool)


def make_rays(count, seed=0, away=2.0):
    """Origins all around, directions to about the middle, jitter."""
    g = torch.Generator().manual_seed(seed)
    origins = torch.randn(count, 3, generator=g) * away
    goals = torch.randn(count, 3, generator=g) * 0.4
    directions = torch.nn.functional.normalize(goals - origins, dim=1)
    return origins, directions, torch.rand(count, generator=g)


def along_axes(count, seed=0):
    """Parallel to the axes, on the borders of cells, and 30 not moving along one axis."""
    g = torch.Generator().manual_seed(seed)
    origins = torch.randint(-10, 11, (count, 3), generator=g) / 8
    directions = torch.eye(3)[torch.randint(0, 3, (count,), generator=g)]
    directions = directions * (torch.randint(0, 2, (count, 1), generator=g) * 2 - 1)
    flat = torch.nn.functional.normalize(torch.tensor([1.0, 0, -0.5]), dim=0)
    directions[:30] = flat
    return origins, directions, torch.zeros(count)


def make_grid(side, share, seed=0):
    return torch.rand(side, side, side, generator=torch.Generator().manual_seed(seed)) < share


def lumps(side):
    """A few occupied lumps, much empty space."""
    grid = torch.zeros(side, side, side, dtype=torch.bool)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, y, z = torch.randint(0, side - 3, (3,), generator=g).tolist()
        grid[x : x + 3, y : y + 4, z : z + 2] = True
    return grid


def blocks(side, share):
    """Full and empty blocks of 8^3 cells."""
    coarse = make_grid(-(-side // 8), share, seed=1)
    for axis in range(3):
        coarse = coarse.repeat_interleave(8, axis).narrow(axis, 0, side)
    return coarse


def walk(origin, direction, jitter, grid, box, step, cone=0.0, near=0.0, far=math.inf,
         contracted=False, most=1024):  # fmt: skip
    """One ray in Python numbers: list of (distance, step, point)."""
    (low, high), side = box.double().numpy(), len(grid)
    origin, direction = origin.double().numpy(), direction.double().numpy()
    enter, leave = near, far
    if not contracted:
        for o, d, a, b in zip(origin, direction, low, high, strict=True):
            if d == 0:
                enter = enter if a <= o <= b else math.inf
            else:
                enter = max(enter, min((a - o) / d, (b - o) / d))
                leave = min(leave, max((a - o) / d, (b - o) / d))
    kept, t = [], enter + float(jitter) * max(step, cone * enter)
    while t < leave and len(kept) < most:
        point = (origin + t * direction - low) / (high - low)
        if contracted:
            point = 2 * point - 1
            size = abs(point).max()
            point = (point if size <= 1 else (2 - 1 / size) * point / size) / 4 + 0.5
        point = point.clip(0, np.nextafter(1, 0))
        if grid[tuple((point * side).astype(int))]:
            kept.append((t, max(step, cone * t), point))
        t += max(step, cone * t)
    return kept


CASES = {
    "plain": dict(step=0.037),
    "fine": dict(step=0.004),
    "near and far": dict(step=0.02, near=1.3, far=2.9),
    "most": dict(step=0.01, most=5),
    "cone": dict(step=0.01, cone=0.02),
    "contracted": dict(step=0.06, far=20.0, contracted=True),
    "contracted cone": dict(step=0.02, cone=0.03, near=0.1, far=400.0, contracted=True),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_a_walk_in_python(name):
    case, grid = CASES[name], make_grid(7, 0.4)
    rays = [t.double() for t in make_rays(40)]
    packed, points, distances, steps = march_rays(
        *rays, grid, UNEVEN.double(), **case, backend="reference"
    )
    expected = [walk(*ray, grid, UNEVEN, **case) for ray in zip(*rays, strict=True)]
    assert packed[:, 1].tolist() == [len(kept) for kept in expected]
    t, size, place = zip(*itertools.chain(*expected), strict=True)
    assert len(t) > 100
    assert torch.allclose(distances, torch.tensor(t, dtype=torch.float64), rtol=0, atol=1e-11)
    assert torch.allclose(steps, torch.tensor(size, dtype=torch.float64), rtol=0, atol=1e-11)
    assert torch.allclose(points, torch.from_numpy(np.stack(place)), rtol=0, atol=1e-11)


GRIDS = {
    "few": make_grid(32, 0.01),
    "some": make_grid(13, 0.2),
    "one cell": make_grid(1, 2),
    "lumps": lumps(61),
    "blocks": blocks(59, 0.05),
}


RAYS = {
    "around": (*make_rays(150), UNEVEN),
    "inside": (*make_rays(150, seed=1, away=0.3), UNEVEN),
    "along axes": (*along_axes(150), UNIT),
}


@functools.cache
def by_reference(name, grid, rays):
    *tensors, box = RAYS[rays]
    return march_rays(*tensors, GRIDS[grid], box, **CASES[name], backend="reference")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rays", RAYS)
def test_the_same_samples_as_the_reference(backend, device, name, grid, rays):
    """To the bit, borders of cells and rounding included."""
    *tensors, box = (t.to(device) for t in RAYS[rays])
    got = march_rays(*tensors, GRIDS[grid].to(device), box, **CASES[name], backend=backend)
    for one, two in zip(got, by_reference(name, grid, rays), strict=True):
        assert one.dtype == two.dtype and torch.equal(one.cpu(), two)


@pytest.mark.parametrize("step", [1 / 4, 1 / 8, 1 / 32, 1 / 128])
def test_steps_that_meet_the_borders_of_cells(backend, device, step):
    """Samples exactly on borders, and where blocks of cells meet."""
    grid = make_grid(64, 0.1)
    grid[:, 16:48] = False
    rays = along_axes(900, seed=2)
    expected = march_rays(*rays, grid, UNIT, step=step, backend="reference")
    tensors = (t.to(device) for t in (*rays, grid, UNIT))
    got = march_rays(*tensors, step=step, backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    assert len(got[1]) > 100


def test_stretches_as_long_as_a_block(backend, device):
    """64 steps are 8 cells but for rounding, from border to border, on rays that run back."""
    g = torch.Generator().manual_seed(0)
    grid = blocks(32, 0.2)
    for _ in range(40):
        size, low = float(torch.rand(1, generator=g) * 3 + 0.1), float(torch.randn(1, generator=g))
        box = torch.tensor([[low] * 3, [low + size] * 3])
        directions = -torch.eye(3).repeat(20, 1)
        origins = low + size * torch.randint(0, 33, (60, 3), generator=g) / 32
        rays = torch.where(directions != 0, box[1], origins), directions, torch.zeros(60)
        step = float(box[1, 0] - box[0, 0]) / 32 / 8
        expected = march_rays(*rays, grid, box, step=step, backend="reference")
        got = march_rays(*(t.to(device) for t in (*rays, grid, box)), step=step, backend=backend)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_samples_lie_where_they_say(backend, device, name):
    """On their ray, in cells that are True, in order, at most so many."""
    grid = make_grid(20, 0.3).to(device)
    origins, directions, jitter = (t.to(device) for t in make_rays(200, seed=3))
    box, case = UNEVEN.to(device), CASES[name]
    packed, points, distances, steps = march_rays(
        origins, directions, jitter, grid, box, **case, backend=backend
    )
    starts, counts = packed.unbind(1)
    assert torch.equal(starts, counts.cumsum(0) - counts) and int(counts.sum()) == len(points)
    assert counts.max() <= case.get("most", 1024) and counts.max() > 4
    assert (points >= 0).all() and (points < 1).all()
    assert grid[tuple((points * len(grid)).long().T)].all()
    ray = torch.repeat_interleave(torch.arange(len(packed), device=device), counts)
    assert (distances.diff() > 0)[ray.diff() == 0].all()
    assert (distances >= case.get("near", 0)).all() and (distances < case.get("far", 9)).all()
    wanted = (distances * case.get("cone", 0.0)).clamp_min(case["step"])
    assert torch.allclose(steps, wanted, rtol=1e-6, atol=0)
    world = origins[ray] + distances[:, None] * directions[ray]
    if case.get("contracted"):
        x = points * 4 - 2
        size = x.abs().amax(1, keepdim=True)
        x = torch.where(size > 1, x / size / (2 - size), x)
        found, atol = box[0] + (x + 1) / 2 * (box[1] - box[0]), 1e-4
        near = size[:, 0] < 1.9  # beyond, a rounding of the point is a long way
        assert 10 < near.sum() < len(near)
        world, found = world[near], found[near]
    else:
        found, atol = box[0] + points * (box[1] - box[0]), 2e-6
    assert torch.allclose(found, world, rtol=0, atol=atol)


def march_one(origin, direction, backend, device, grid=FULL, jitter=0.0, **case):
    rays = torch.tensor([origin]), torch.tensor([direction]), torch.tensor([jitter])
    tensors = (t.to(device) for t in (*rays, grid, UNIT))
    packed, points, distances, _ = march_rays(*tensors, **case, backend=backend)
    assert packed.tolist() == [[0, len(points)]]
    return points.cpu(), distances.cpu()


@pytest.mark.parametrize(
    ("origin", "direction"),
    [
        ([3.0, 0, 0], [1.0, 0, 0]),  # the box lies behind
        ([-3.0, 0, 1.01], [1.0, 0, 0]),  # passes beside, parallel to an axis
        ([-3.0, 2, 0], [0.9701425, 0.2425356, 0.0]),  # passes beside
        ([0.0, 0, 0], [0.0, 0, 0]),  # no direction
    ],
)
def test_rays_that_miss(backend, device, origin, direction):
    assert not len(march_one(origin, direction, backend, device, step=0.1)[0])


def test_a_full_grid_is_sampled_evenly(backend, device):
    """From the face of the box, or from the origin where it lies inside, to the other face."""
    for origin, enter in (([-3.0, 0.1, 0.2], 2.0), ([0.5, 0.1, 0.2], 0.0)):
        for jitter in (0.0, 0.25, 0.75):
            length = 2.0 if enter else 0.5
            points, distances = march_one(
                origin, [1.0, 0, 0], backend, device, step=0.0099, jitter=jitter
            )
            expected = enter + (jitter + torch.arange(len(points))) * 0.0099
            assert abs(len(points) - length / 0.0099) <= 1
            assert torch.allclose(distances, expected, rtol=0, atol=1e-6)
            assert torch.allclose(points[:, 1:], torch.tensor([0.55, 0.6]), rtol=0, atol=1e-6)


def test_near_is_where_a_ray_inside_starts(backend, device):
    for direction in ([1.0, 0, 0], [0.0, -1, 0]):
        _, distances = march_one([0.0, 0, 0], direction, backend, device, step=0.1, near=0.35)
        assert torch.allclose(distances, 0.35 + 0.1 * torch.arange(7), atol=1e-6)
        _, distances = march_one([0.0, 0, 0], direction, backend, device, step=0.1, far=0.35)
        assert torch.allclose(distances, 0.1 * torch.arange(4), atol=1e-6)


def test_a_cone_covers_the_ray(backend, device):
    """Each sample begins where the one before ends, with steps that grow by the same factor."""
    rays = torch.tensor([[-5.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), torch.tensor([0.5])
    tensors = (t.to(device) for t in (*rays, FULL, UNIT))
    _, _, distances, steps = march_rays(*tensors, step=0.01, cone=0.01, backend=backend)
    assert torch.allclose(distances.diff(), steps[:-1], rtol=0, atol=2e-6)
    assert torch.allclose(steps[1:] / steps[:-1], torch.tensor(1.01, device=device), atol=1e-5)
    assert abs(float(distances[0]) - (4 + 0.5 * 0.04)) < 1e-6
    assert 6 - float(steps[-1]) <= float(distances[-1]) < 6


def test_the_first_samples_are_kept(backend, device):
    rays = [t.to(device) for t in make_rays(100, seed=4)]
    grid, box = make_grid(16, 0.3).to(device), UNEVEN.to(device)
    every = march_rays(*rays, grid, box, step=0.01, backend=backend)
    assert every[0][:, 1].max() > 40
    for most in (1, 7, 64):
        some = march_rays(*rays, grid, box, step=0.01, most=most, backend=backend)
        assert torch.equal(some[0][:, 1], every[0][:, 1].clamp_max(most))
        for (begin, count), (start, _) in zip(some[0].tolist(), every[0].tolist(), strict=True):
            for a, b in zip(some[1:], every[1:], strict=True):
                assert torch.equal(a[begin : begin + count], b[start : start + count])


def test_contraction_of_space(backend, device):
    """The box is the middle half, linearly; far away is near the rim; corners stay corners."""
    for direction in ([1.0, 0, 0], [0.6, -0.8, 0.0]):
        points, distances = march_one(
            [0.0, 0, 0], direction, backend, device, step=0.05, far=45.0, contracted=True,
        )  # fmt: skip
        largest = distances * max(abs(d) for d in direction)
        inside = largest <= 1
        straight = 0.5 + distances[inside, None] * torch.tensor(direction) / 4
        assert torch.allclose(points[inside], straight, rtol=0, atol=1e-6)
        reach = (points - 0.5).abs().amax(1)
        expected = torch.where(inside, largest, 2 - 1 / largest) / 4
        assert torch.allclose(reach, expected, rtol=0, atol=1e-6)
        assert reach.max() < 0.5 and len(points) == 900
        ratio = points[5:] - 0.5
        ratio = ratio / ratio.norm(dim=1, keepdim=True)
        assert torch.allclose(ratio, torch.tensor(direction).expand_as(ratio), atol=1e-5)
    points, _ = march_one(
        [0.0, 0, 0], [1.0, 0, 0], backend, device, step=1e4, far=1e8, contracted=True
    )
    assert points.max() < 1  # also where 2 - 1 / |x| rounds to 2


def test_nothing_to_sample(backend, device):
    rays = [t.to(device) for t in make_rays(70)]
    grid, box = FULL.to(device), UNIT.to(device)
    packed, *rest = march_rays(*rays, ~grid, box, step=0.01, backend=backend)
    assert not packed.any() and [len(t) for t in rest] == [0, 0, 0]
    for case in (dict(), dict(cone=0.1), dict(contracted=True, far=3.0)):
        none = [t[:0] for t in rays]
        packed, points, distances, steps = march_rays(
            *none, grid, box, step=0.01, **case, backend=backend
        )
        assert packed.shape == (0, 2) and packed.dtype == torch.int64
        assert points.shape == (0, 3) and distances.shape == steps.shape == (0,)


def test_same_result_at_any_thread_count_and_in_parts(monkeypatch):
    from gencompress_kernels.march_rays import cpu

    rays, grid = make_rays(500, seed=5), make_grid(24, 0.1)
    expected = march_rays(*rays, grid, UNIT, step=0.01, backend="reference")
    before = numba.get_num_threads()
    for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        for buffer in (cpu.BUFFER, 1):
            monkeypatch.setattr(cpu, "BUFFER", buffer)
            numba.set_num_threads(threads)
            try:
                got = march_rays(*rays, grid, UNIT, step=0.01, backend="cpu")
            finally:
                numba.set_num_threads(before)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strided_inputs_are_only_read(backend, device):
    tensors = [t.to(device) for t in (*make_rays(50), make_grid(9, 0.3), UNEVEN)]
    wide = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    before = [t.clone() for t in wide]
    got = march_rays(*wide, step=0.02, backend=backend)
    expected = march_rays(*tensors, step=0.02, backend=backend)
    assert not wide[0].is_contiguous() and len(got[1]) > 100
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wide, before, strict=True))
    assert dispatch.last()["march_rays"] == backend


def test_rays_that_are_not_finite_end(backend, device):
    """Their samples mean nothing, but they are in the grid and the other rays keep theirs."""
    rays = [t.to(device) for t in make_rays(40, seed=6)]
    grid, box = make_grid(10, 0.5).to(device), UNIT.to(device)
    for case in (dict(), dict(cone=0.01), dict(far=8.0, contracted=True)):
        good = march_rays(*rays, grid, box, step=0.02, **case, backend=backend)
        for which, value in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
            spoiled = [t.clone() for t in rays]
            spoiled[which].view(40, -1)[39, 0] = value
            packed, points, *_ = march_rays(*spoiled, grid, box, step=0.02, **case, backend=backend)
            assert torch.equal(packed[:39], good[0][:39])
            assert ((points >= 0) & (points < 1))[: int(packed[39, 0])].all()


def bad(**changes):
    tensors = dict(
        origins=torch.zeros(4, 3), directions=torch.zeros(4, 3), jitter=torch.zeros(4),
        occupancy=FULL, box=UNIT, step=0.1,
    )  # fmt: skip
    return tensors | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(origins=torch.zeros(4)), "origins are torch.float32"),
        (bad(origins=torch.zeros(4, 3).half()), "origins are torch.float16"),
        (bad(origins=torch.zeros(4, 2)), "origins: torch.float32"),
        (bad(directions=torch.zeros(3, 3)), "directions: torch.float32"),
        (bad(jitter=torch.zeros(4).double()), "jitter: torch.float64"),
        (bad(box=torch.zeros(3, 2)), "box: torch.float32"),
        (bad(box=torch.zeros(2, 3)), "expected low < high"),
        (bad(occupancy=FULL[:, :, :7]), "occupancy is torch.bool"),
        (bad(occupancy=FULL.float()), "occupancy is torch.float32"),
        (bad(occupancy=FULL[:0, :0, :0]), "occupancy is torch.bool"),
        (bad(occupancy=FULL[:1, :1, :1].expand(1025, 1025, 1025)), "N from 1 to 1024"),
        (bad(step=0.0), "expected a finite step > 0"),
        (bad(step=math.nan), "expected a finite step > 0"),
        (bad(cone=-0.1), "cone -0.1"),
        (bad(near=2.0, far=1.0), "near 2.0, far 1.0"),
        (bad(near=-1.0), "near -1.0"),
        (bad(contracted=True), "far is infinite"),
        (bad(most=0), "most 0, expected at least 1"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        march_rays(**arguments)


def test_the_cpu_backend_takes_float32():
    rays = (t.double() for t in make_rays(2))
    with pytest.raises(ValueError, match="the cpu backend takes float32"):
        march_rays(*rays, FULL, UNIT.double(), step=0.1, backend="cpu")
