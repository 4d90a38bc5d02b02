"""merge_splats on every backend, against numeric integration of the pictures."""

import math

import numpy as np
import pytest
import torch
from gencompress_kernels.merge_splats import Blobs, energies, merge, splat_merge_costs

Y0 = 0.28209479177387814
# world axes seen along z, x and y
PLANES = ((0, 1), (1, 2), (0, 2))


def make_blobs(num=40, bands=1, seed=0, size=0.1, opacity=1.0):
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(num, 3, 3, generator=g, dtype=torch.float64) * size
    half += 0.5 * size * torch.eye(3, dtype=torch.float64)
    return Blobs(
        torch.randn(num, 3, generator=g, dtype=torch.float64) * 0.15,
        pack(half @ half.mT),
        torch.rand(num, generator=g, dtype=torch.float64) * opacity,
        torch.randn(num, 3 * bands, generator=g, dtype=torch.float64),
    )


def pack(matrices):
    return torch.stack([matrices[:, i, j] for i in range(3) for j in range(i, 3)], -1)


def unpack(rows):
    xx, xy, xz, yy, yz, zz = rows.unbind(-1)
    return torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).reshape(-1, 3, 3)


def some_pairs(num, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(num, (count,), generator=g)
    return torch.stack([first, (first + torch.randint(1, num, (count,), generator=g)) % num], 1)


def picture(blobs, plane, background):
    """Sum of o (c - background) G on a grid of step 0.02 over [-2, 2]^2, [G, G, 3]."""
    axis = np.arange(-100, 101) * 0.02
    u, v = np.meshgrid(axis, axis, indexing="ij")
    total = np.zeros((*u.shape, 3))
    covariances = unpack(blobs.covariances).numpy()
    for k in range(len(blobs.means)):
        covariance = covariances[k][np.ix_(plane, plane)]
        mean = blobs.means[k].numpy()[list(plane)]
        d = np.stack([u - mean[0], v - mean[1]], -1)
        shape = np.exp(-0.5 * np.einsum("uvi,ij,uvj->uv", d, np.linalg.inv(covariance), d))
        color = 0.5 + Y0 * blobs.colors[k].numpy() - background
        total += float(blobs.opacities[k]) * shape[..., None] * color
    return total


def test_cost_equals_numeric_integration(backend, device):
    blobs, pairs = make_blobs(8), torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6]])
    got = splat_merge_costs(_to(blobs, device), pairs.to(device), backend=backend).cpu()
    merged = merge(blobs, pairs)
    for e, pair in enumerate(pairs):
        two = Blobs(*(field[pair] for field in blobs))
        one = Blobs(*(field[e : e + 1] for field in merged))
        changes = [
            ((picture(two, plane, b) - picture(one, plane, b)) ** 2).sum() * 0.02**2
            for plane in PLANES
            for b in (0.0, 1.0)
        ]
        assert abs(got[e] - np.mean(changes)) < 1e-4 * np.mean(changes) + 1e-9
    assert got.min() > 1e-4


def test_energy_equals_numeric_integration():
    blobs = make_blobs(3, seed=4)
    for k, energy in enumerate(energies(blobs)):
        alone = Blobs(*(field[k : k + 1] for field in blobs))
        values = [(picture(alone, p, b) ** 2).sum() * 0.02**2 for p in PLANES for b in (0.0, 1.0)]
        assert abs(energy - np.mean(values)) < 1e-4 * np.mean(values)


@pytest.mark.parametrize("bands", [1, 4, 9, 16])
def test_equals_the_reference_in_either_order(backend, device, bands):
    blobs, pairs = make_blobs(200, bands), some_pairs(200, 3000)
    truth = splat_merge_costs(blobs, pairs, backend="reference")
    got = splat_merge_costs(_to(blobs, device), pairs.to(device), backend=backend).cpu()
    turned = splat_merge_costs(_to(blobs, device), pairs.flip(1).to(device), backend=backend).cpu()
    # cancellation: the cost is a small difference of energies, in float64
    scale = energies(blobs)[pairs].sum(1)
    assert ((got - truth).abs() <= 1e-12 * scale).all()
    assert ((got - turned).abs() <= 1e-12 * scale).all()
    assert (got >= 0).all() and (got > 1e-3 * scale).float().mean() > 0.9


def test_two_equal_halves_merge_for_nothing(backend, device):
    single = make_blobs(1, 4, seed=2)
    halves = Blobs(*(torch.cat([field, field]) for field in single))
    for opacity in (1e-1, 1e-2, 1e-3):
        halves = halves._replace(opacities=torch.full((2,), opacity, dtype=torch.float64))
        pair = torch.tensor([[0, 1]])
        cost = splat_merge_costs(_to(halves, device), pair.to(device), backend=backend).cpu()
        # the pair adds to 2 o; composited, its integral is that of 2 o - o^2 / 2
        share = float(cost[0] / energies(halves)[0])
        assert share == pytest.approx(opacity**2 / 4, rel=1e-3)
    # apart it is not for nothing, and less so with opposite colours
    moved = halves._replace(means=halves.means + torch.tensor([[0.0], [0.3]]))
    opposite = moved._replace(colors=moved.colors * torch.tensor([[1.0], [-1.0]]))
    same, other = (
        float(splat_merge_costs(_to(b, device), pair.to(device), backend=backend)[0])
        for b in (moved, opposite)
    )
    assert 0.1 * float(energies(moved)[0]) < same < other


def test_merge_keeps_the_moments_of_the_mixture():
    blobs, pairs = make_blobs(40, 4), some_pairs(40, 30)
    merged = merge(blobs, pairs)
    covariances = unpack(blobs.covariances)
    for e, (i, j) in enumerate(pairs.tolist()):
        masses = [
            float(blobs.opacities[k])
            * np.mean([float(covariances[k][list(p)][:, list(p)].det().sqrt()) for p in PLANES])
            for k in (i, j)
        ]
        weight = np.array(masses) / sum(masses)
        mean = sum(w * blobs.means[k] for w, k in zip(weight, (i, j), strict=True))
        second = sum(
            w * (covariances[k] + torch.outer(blobs.means[k], blobs.means[k]))
            for w, k in zip(weight, (i, j), strict=True)
        )
        assert torch.allclose(merged.means[e], mean)
        covariance = unpack(merged.covariances[e : e + 1])[0]
        assert torch.allclose(covariance + torch.outer(mean, mean), second)
        color = sum(w * blobs.colors[k] for w, k in zip(weight, (i, j), strict=True))
        assert torch.allclose(merged.colors[e], color)


def test_merged_opacity_times_area_is_that_of_the_two_composited():
    blobs = make_blobs(2, opacity=0.2)
    merged = merge(blobs, torch.tensor([[0, 1]]))
    assert 0 < merged.opacities[0] < 0.995
    sums = []
    for plane in PLANES:
        white = [
            picture(Blobs(m, c, o, torch.full_like(x, 0.5 / Y0)), plane, 0.0)[..., 0]
            for m, c, o, x in (
                [field[:1] for field in blobs],
                [field[1:] for field in blobs],
                merged,
            )
        ]
        sums.append([(white[0] + white[1] - white[0] * white[1]).sum(), white[2].sum()])
    both, one = np.mean(sums, 0)
    assert one == pytest.approx(both, rel=1e-6)


def test_extremes_are_finite_and_never_negative(backend, device):
    rows = [
        [0.0, 0, 0, 0, 0, 0],
        [1e-30, 0, 0, 1e-30, 0, 1e-30],
        [1e12, 0, 0, 1, 0, 1e-9],
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 1],
    ]
    covariances = torch.tensor(rows, dtype=torch.float64)
    num = len(covariances)
    means = torch.tensor([0.0, 0, 1e8, 1, 1], dtype=torch.float64)[:, None].expand(-1, 3)
    every = torch.cartesian_prod(torch.arange(num), torch.arange(num))
    for opacity in (0.0, 1e-300, 1.0):
        blobs = Blobs(
            means, covariances, torch.full((num,), opacity, dtype=torch.float64),
            torch.full((num, 3), 3.0, dtype=torch.float64),
        )  # fmt: skip
        got = splat_merge_costs(_to(blobs, device), every.to(device), backend=backend).cpu()
        assert bool(got.isfinite().all()) and (got >= 0).all()
        truth = splat_merge_costs(blobs, every, backend="reference")
        scale = energies(blobs)[every].sum(1)
        # a point counts as an area of 1e-15, twice a point too
        assert ((got - truth).abs() <= 1e-9 * scale + 1e-12).all()
        for field in merge(blobs, every):
            assert bool(field.isfinite().all())


def test_no_pairs_and_strided_inputs(backend, device):
    blobs, pairs = make_blobs(20, 4), some_pairs(20, 50)
    none = splat_merge_costs(_to(blobs, device), pairs[:0].to(device), backend=backend)
    assert none.shape == (0,) and none.dtype == torch.float64
    strided = Blobs(*(torch.stack([f, -f], -1)[..., 0] for f in blobs))
    turned = pairs.T.contiguous().T
    assert not strided.means.is_contiguous() and not turned.is_contiguous()
    expected = splat_merge_costs(_to(blobs, device), pairs.to(device), backend=backend)
    got = splat_merge_costs(_to(strided, device), turned.to(device), backend=backend)
    assert torch.equal(got, expected) and expected.max() > 0


@pytest.mark.parametrize(
    ("change", "pairs", "message"),
    [
        ({"means": torch.zeros(4, 2, dtype=torch.float64)}, [[0, 1]], "means: got"),
        ({"covariances": torch.zeros(4, 3, 3, dtype=torch.float64)}, [[0, 1]], "covariances: got"),
        ({"opacities": torch.zeros(4)}, [[0, 1]], "opacities: got torch.float32"),
        ({"opacities": torch.full((4,), math.nan, dtype=torch.float64)}, [[0, 1]], "not finite"),
        ({}, [[0, 4]], "outside 0 to 3"),
        ({}, [[-1, 0]], "outside 0 to 3"),
        ({}, [[0, 1, 2]], "pairs: got"),
        ({}, [[0.0, 1.0]], "pairs: got"),
    ],
)
def test_bad_input_is_one_clear_error(change, pairs, message):
    with pytest.raises(ValueError, match=message):
        splat_merge_costs(make_blobs(4)._replace(**change), torch.tensor(pairs))


def _to(blobs, device):
    return Blobs(*(field.to(device) for field in blobs))
