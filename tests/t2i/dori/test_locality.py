"""Locality: distances, activations and agreement that were worked out by hand."""

import math

import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.t2i import tiny
from gencompress.t2i.dori import locality, nemo, wanda
from gencompress.t2i.hooks import record
from gencompress.t2i.pipeline import hushed

PROMPTS = ["a red car", "a blue cat", "a white background"]


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


def test_spread():
    rows = torch.tensor([[[0.0, 0]], [[3, 4]], [[0, 1]]])
    assert locality.spread(rows).tolist() == pytest.approx([5, 1, math.sqrt(18)])
    normal = torch.randn(40, 77, 768, generator=torch.Generator().manual_seed(0))
    assert float(locality.spread(normal).mean()) == pytest.approx(343.9, rel=2e-3)
    with pytest.raises(ValueError, match="1 rows"):
        locality.spread(rows[:1])


def test_plane_keeps_what_lies_in_one():
    chance = torch.Generator().manual_seed(0)
    flat = torch.randn(6, 2, generator=chance).double() * torch.tensor([5.0, 1.0])
    turned = flat @ torch.linalg.qr(torch.randn(30, 2, generator=chance).double())[0].T + 3
    found = locality.plane(turned.view(6, 5, 6))
    assert found.shape == (6, 2)
    torch.testing.assert_close(torch.pdist(found), torch.pdist(flat))
    assert float(found[:, 0].var()) > float(found[:, 1].var())
    torch.testing.assert_close(found.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("inputs", [False, True])
def test_discrepancy(pipe, inputs):
    if inputs:
        paths = [name.removeprefix("unet.") for name in wanda.layers(pipe, "ff.net.2")][:2]
    else:
        paths = nemo.layers(pipe.unet)[:2]
    states = torch.randn(3, 32, 24, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = locality.discrepancy(pipe, states, paths, latent, 500, inputs=inputs, batch=2)
    rows = {path: [] for path in paths}
    for one in states:
        with record(pipe.unet, paths, inputs=inputs, detach=True) as seen, torch.no_grad():
            pipe.unet(latent[None], 500, one[None])
        for path in paths:
            rows[path].append(seen[path].flatten().double())
    for path, (a, b, c) in rows.items():
        wanted = float((a - b).norm() + (a - c).norm() + (b - c).norm()) / 3
        assert found[path] == pytest.approx(wanted, rel=1e-3) and wanted > 0
    alike = locality.discrepancy(pipe, states[[0, 0]], paths[:1], latent, 500, inputs=inputs)
    assert alike[paths[0]] < 1e-3 * found[paths[0]]
    with pytest.raises(ValueError, match="no module 'x'"):
        locality.discrepancy(pipe, states, ["x"], latent, 500)


def removes(*rows):
    return Mask(
        {
            "a": ~torch.tensor(rows[0], dtype=torch.bool),
            "b": ~torch.tensor(rows[1], dtype=torch.bool),
        }
    )


def test_agreement_by_hand(monkeypatch):
    sets = [
        removes([1, 1, 0, 0], [[0, 0], [0, 0]]),
        removes([1, 1, 0, 0], [[0, 0], [0, 0]]),
        removes([0, 1, 1, 1], [[1, 0], [0, 0]]),
    ]
    for chunk in (locality.CHUNK, 3):
        monkeypatch.setattr(locality, "CHUNK", chunk)
        found = locality.agreement(sets)
        # the same: 1; one of four shared: 1/4 twice
        assert found["a"].iou == pytest.approx(0.5) and found["a"].iou_filled == pytest.approx(0.5)
        assert (found["a"].filled, found["a"].pairs) == (3, 3)
        # both empty: 1, and counted; an empty and a filled one: 0, twice
        assert found["b"].iou == pytest.approx(1 / 3) and found["b"].iou_filled == 0.0
        assert (found["b"].filled, found["b"].pairs) == (2, 3)
    same = locality.agreement(sets[:2])
    assert same["a"].iou == 1.0 and same["a"].filled == 1
    assert same["b"].iou == 1.0 and same["b"].filled == 0 and same["b"].iou_filled is None
    apart = locality.agreement([removes([1, 0], [[1]]), removes([0, 1], [[1]])])
    assert apart["a"].iou == 0.0 and apart["b"].iou == 1.0


def test_agreement_of_masks_that_do_not_compare():
    with pytest.raises(ValueError, match="1 masks"):
        locality.agreement([removes([1], [[1]])])
    with pytest.raises(ValueError, match="different layers or shapes"):
        locality.agreement([removes([1], [[1]]), removes([1, 0], [[1]])])
