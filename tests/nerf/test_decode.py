"""The written-out gradient of the networks, against autograd of `field.decode_*`."""

from dataclasses import replace

import pytest
import torch
from nerf.nerf_samples import random_field
from numerics import assert_as_accurate

from gencompress.nerf import decode
from gencompress.nerf.field import THIN, decode_color, decode_density, harmonics

ALPHAS = [0.0, 2.0, 1e4]


def samples(count, generator, alpha):
    """Features, norms around where the gate opens, and harmonics."""
    features = torch.randn(count, 10, generator=generator)
    norms = torch.rand(count, generator=generator) * 3 / max(alpha, 1)
    norms[::7] = 0
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    return features, norms, harmonics(directions)


def by_autograd(field, passed, slopes, dtype):
    """Densities, colours, and gradients by features, norms and the layers."""
    features, norms, shapes = (t.to(dtype, copy=True) for t in passed)
    layers = tuple(layer.to(dtype, copy=True).requires_grad_() for layer in field.layers)
    field = replace(field, layers=layers)
    features.requires_grad_(), norms.requires_grad_()
    density, outputs = decode_density(field, features, norms)
    color = decode_color(field, outputs, shapes)
    total = (density * slopes[0]).sum() + (color * slopes[1]).sum()
    inputs = [features, norms, *layers]
    # without a gate the norms take no part
    grads = torch.autograd.grad(total, inputs, allow_unused=not field.alpha)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return [density.detach(), color.detach(), *grads]


def by_hand(field, passed, slopes, sizes, old=None):
    """The same in blocks of those sizes."""
    features, norms, shapes = passed
    d = decode.decoder(field.layers, max(sizes), old)
    by_features, by_norms = torch.zeros_like(features), torch.zeros_like(norms)
    shown, at = [], 0
    for size in sizes:
        here = slice(at, at + size)
        density, color = decode.forward(d, features[here], norms[here], shapes[here], field.alpha)
        shown.append((density.clone(), color.clone()))
        decode.backward(
            d, features[here], norms[here], field.alpha, color, slopes[0][here], slopes[1][here],
            by_features[here], by_norms[here],
        )  # fmt: skip
        at += size
    densities, colors = (torch.cat(parts) for parts in zip(*shown, strict=True))
    return d, [densities, colors, by_features, by_norms, *decode.gradients(d).values()]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sizes", [(50,), (33, 1, 16), (0, 50)])
def test_equals_autograd(alpha, sizes, generator):
    field = random_field(alpha=alpha)
    passed = samples(50, generator, alpha)
    slopes = torch.randn(50, generator=generator), torch.randn(50, 3, generator=generator)
    _, found = by_hand(field, passed, slopes, sizes)
    names = ["density", "color", "features", "norms", *(f"layer{n}" for n in range(5))]
    single, double = (by_autograd(field, passed, slopes, t) for t in (torch.float32, torch.float64))
    for name, ours, plain, exact in zip(names, found, single, double, strict=True):
        floor = 2e-6 * float(exact.abs().max())
        assert_as_accurate(ours, plain, exact, floor=floor, name=name)
        if name != "norms" or alpha:
            assert float(exact.abs().max()) > 0, name


@pytest.mark.parametrize("raw", [-40.0, 14.0, 40.0])
def test_the_exponentials_gradient_is_bounded_here_too(raw, generator):
    """The first output far out, so that the density is e^raw."""
    field = random_field(alpha=2.0)
    layers = [torch.zeros_like(layer) for layer in field.layers]
    layers[0][0, 0] = 1.0
    layers[1][0, 0] = raw + THIN
    field = replace(field, layers=(*layers[:2], *field.layers[2:]))
    passed = samples(9, generator, 2.0)
    passed[0][:, 0] = 1.0
    slopes = torch.ones(9), torch.zeros(9, 3)
    _, found = by_hand(field, passed, slopes, (9,))
    wanted = by_autograd(field, passed, slopes, torch.float32)
    for name, ours, exact in zip("dcfn", found, wanted, strict=False):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0, msg=f"{name} at {raw}")
    assert bool(found[2].isfinite().all())


def test_padding_is_not_seen():
    """The row for the density's output and the 13 columns beside the colours stay out."""
    field = random_field()
    d = decode.decoder(field.layers, 4)
    assert [tuple(layer.shape) for layer in d.layers] == [
        (10, 64), (64, 16), (32, 64), (64, 64), (64, 16),
    ]  # fmt: skip
    assert torch.equal(d.layers[2][1:], field.layers[2]) and not d.layers[2][0].any()
    assert torch.equal(d.layers[4][:, :3], field.layers[4]) and not d.layers[4][:, 3:].any()
    found = decode.gradients(d)
    assert list(found) == [f"layer{n}" for n in range(5)]
    for number, layer in enumerate(field.layers):
        assert found[f"layer{number}"].shape == layer.shape


def test_buffers_of_the_step_before(generator):
    """They are used again, hold nothing over, and go where the size is another."""
    field, passed = random_field(alpha=2.0), samples(50, generator, 2.0)
    slopes = torch.randn(50, generator=generator), torch.randn(50, 3, generator=generator)
    d, fresh = by_hand(field, passed, slopes, (50,))
    moved = replace(field, layers=tuple(layer * 2 for layer in field.layers))
    first = decode.decoder(moved.layers, 50, d)
    assert first.buffers is d.buffers
    assert not any(bool(slope.any()) for slope in first.slopes)
    assert torch.equal(first.layers[0], moved.layers[0])
    _, again = by_hand(field, passed, slopes, (50,), d)
    for one, other in zip(fresh, again, strict=True):
        assert torch.equal(one, other)
    assert decode.decoder(field.layers, 51, d).buffers == {}
