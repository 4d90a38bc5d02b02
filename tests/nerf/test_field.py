"""What a field is: its first values, its networks, the gate, and what it counts as."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels
from nerf.nerf_samples import BOX, LEVELS, random_field, tiny_field

from gencompress.nerf.field import (
    THIN,
    decode_color,
    decode_density,
    encode,
    harmonics,
    new_field,
    parameters,
    truncated_exp,
)


def test_first_values(generator):
    field = new_field(LEVELS, BOX, generator, saliency=7, occupancy=8, background=[0, 0.5, 1])
    assert field.table.shape == (LEVELS.offsets[-1], 2)
    assert 0.99e-4 < float(field.table.abs().max()) <= 1e-4 and abs(field.table.mean()) < 1e-5
    assert [tuple(layer.shape) for layer in field.layers] == [
        (10, 64), (64, 16), (31, 64), (64, 64), (64, 3),
    ]  # fmt: skip
    for layer in field.layers:
        bound = len(layer) ** -0.5
        assert 0.9 * bound < float(layer.abs().max()) <= bound
    assert field.logits.shape == (7, 7, 7) and bool((field.logits == 1).all())
    assert field.occupancy.shape == (8, 8, 8) and bool(field.occupancy.all())
    assert field.cells is None and field.background == (0, 0.5, 1) and len(field) == 6**3
    plain = tiny_field(0)
    assert plain.logits is None and set(plain.tensors) == set(field.tensors) - {"logits"}
    same, other = tiny_field(0, seed=0), tiny_field(0, seed=1)
    assert torch.equal(plain.table, same.table) and not torch.equal(plain.table, other.table)
    assert not torch.equal(plain.layers[3], other.layers[3])


@pytest.mark.parametrize(("saliency", "count"), [(0, 502_272), (64, 764_416)])
def test_parameters_are_those_of_the_paper(saliency, count, generator):
    """At a table of 2^14 rows a level."""
    field = new_field(hashgrid_levels(log2_rows=14), BOX, generator, saliency=saliency, occupancy=4)
    assert parameters(field) == count


def test_length_is_what_may_hold_something():
    field = tiny_field()
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[1, 2, 3:6] = True
    assert len(replace(field, cells=cells)) == 3
    occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    occupancy[0, 0, :5] = True
    assert len(replace(tiny_field(0), occupancy=occupancy)) == 5
    assert len(replace(field, occupancy=occupancy)) == 8**3


def test_the_networks_by_hand(generator):
    field = random_field(alpha=3.0)
    features = torch.randn(40, 10, generator=generator)
    norms = torch.rand(40, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator), dim=1)
    density, outputs = decode_density(field, features, norms)
    colors = decode_color(field, outputs, harmonics(directions))
    first, second, third, fourth, last = (layer.double() for layer in field.layers)
    hidden = (features.double() @ first).clamp(min=0) @ second
    wanted = (hidden[:, 0] - THIN).exp() * torch.tanh(3 * norms.double())
    torch.testing.assert_close(density.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.double(), hidden, rtol=1e-5, atol=1e-6)
    shown = torch.cat([hidden[:, 1:], harmonics(directions).double()], 1)
    shown = ((shown @ third).clamp(min=0) @ fourth).clamp(min=0) @ last
    torch.testing.assert_close(colors.double(), torch.sigmoid(shown), rtol=1e-5, atol=1e-6)
    # the density's own output has no say in the colour
    moved = outputs + torch.nn.functional.one_hot(torch.tensor(0), 16)
    assert torch.equal(decode_color(field, moved, harmonics(directions)), colors)


def test_the_gate_closes_where_the_feature_ends(generator):
    features = torch.zeros(5, 10)
    for seed in range(5):
        field = random_field(seed=seed, alpha=1e4)
        assert bool((decode_density(field, features, features[:, 0])[0] == 0).all())
        bare = replace(field, alpha=0.0)
        ungated = decode_density(bare, features, features[:, 0])[0]
        assert bool((ungated == torch.tensor(-THIN).exp()).all())
    wide = torch.randn(5, 10, generator=generator) + 1
    gated, bare = (
        decode_density(one, wide, wide.norm(dim=1))[0] for one in (field, replace(field, alpha=0.0))
    )
    assert torch.equal(gated, bare)  # wide open


@pytest.mark.parametrize("length", [1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("alpha", [1e4, 1e5])
def test_the_slope_of_the_gate(length, alpha, generator):
    """Along the feature, against central differences in float64."""
    field = random_field(alpha=alpha)
    field = replace(field, layers=tuple(layer.double() for layer in field.layers))
    unit = torch.nn.functional.normalize(
        torch.randn(1, 10, generator=generator, dtype=torch.float64), dim=1
    )

    def density(scale):
        features = unit * scale
        return decode_density(field, features, features.norm(dim=1))[0].sum()

    scale = torch.tensor(length, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(density(scale), scale)
    step = 1e-4 * min(length, 1 / alpha)
    with torch.no_grad():
        wanted = (density(scale + step) - density(scale - step)) / (2 * step)
    assert float(slope) == pytest.approx(float(wanted), rel=1e-6, abs=1e-6)


def test_the_exponential_keeps_its_gradient_in_bounds():
    x = torch.tensor([-80.0, -20.0, -3.0, 0.0, 2.0, 15.0, 20.0, 80.0], requires_grad=True)
    y = truncated_exp(x)
    assert torch.equal(y, x.detach().exp())
    y.sum().backward()
    wanted = x.detach().clamp(-15, 15).exp()
    assert torch.equal(x.grad, wanted) and bool(x.grad.isfinite().all())


def test_harmonics_are_an_orthonormal_basis():
    """Exactly integrated over the sphere; the first four are those of torch-ngp, signs included."""
    heights, weights = np.polynomial.legendre.leggauss(6)
    turns = np.arange(12) / 12 * 2 * math.pi
    z, turn = np.meshgrid(heights, turns, indexing="ij")
    r = np.sqrt(1 - z**2)
    directions = np.stack([r * np.cos(turn), r * np.sin(turn), z], -1).reshape(-1, 3)
    area = np.repeat(weights, 12) * 2 * math.pi / 12
    values = harmonics(torch.from_numpy(directions)).numpy()
    np.testing.assert_allclose(values.T @ (values * area[:, None]), np.eye(16), atol=1e-12)
    x, y, z = directions.T
    linear = math.sqrt(3 / (4 * math.pi))
    for row, wanted in enumerate(
        (0.28209479177387814 + 0 * x, -linear * y, linear * z, -linear * x)
    ):
        np.testing.assert_allclose(values[:, row], wanted, atol=1e-12)


def test_encoding_is_gated_by_the_saliency(generator):
    field = random_field()
    points = torch.rand(200, 3, generator=generator)
    features, norms, saliency = encode(field, points)
    plain, _, ones = encode(replace(field, logits=None), points)
    torch.testing.assert_close(features, plain * saliency[:, None])
    torch.testing.assert_close(norms, features.norm(dim=1))
    assert bool((ones == 1).all()) and 0 < float(saliency.min()) < float(saliency.max()) < 1
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[4:] = True  # x is the slowest axis
    features, _, _ = encode(replace(field, cells=cells), points)
    assert torch.equal((features != 0).any(1), points[:, 0] >= 0.5)
