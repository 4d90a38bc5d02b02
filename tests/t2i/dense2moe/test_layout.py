"""Sizes and groups against a dense model: what fits, and what is said of the rest."""

import pytest
import torch
from t2i.dense2moe.mixture_samples import MINIS, converted
from torch import nn

from gencompress.core.mask import Mask
from gencompress.t2i import coupling, tiny
from gencompress.t2i.dense2moe.layout import (
    Group,
    Layout,
    feed_forwards,
    groups_of,
    structure,
)


def test_what_becomes_a_mixture():
    flux = structure(tiny.mini_flux(), Layout())["experts"]
    assert list(flux) == [
        *(f"transformer_blocks.{i}.{end}" for i in range(2) for end in ("ff", "ff_context")),
        *(f"single_transformer_blocks.{i}.proj_mlp" for i in range(3)),
    ]
    assert set(map(tuple, flux.values())) == {(48, 12, 12, 2)}
    image = structure(tiny.mini_flux(), Layout(streams="image"))["experts"]
    assert list(image) == [path for path in flux if not path.endswith("context")]
    sd3 = structure(tiny.mini_sd3(dual=True), Layout())["experts"]
    assert len(sd3) == 2 * 3 - 1  # the last block has no text of its own
    assert len(structure(tiny.mini_pixart(), Layout())["experts"]) == 3
    unet = tiny.mini_unet()
    assert structure(unet, Layout())["experts"].keys() == feed_forwards(unet).keys()
    assert all(path.endswith(".ff") for path in feed_forwards(unet))


def test_other_sizes_and_widths():
    layout = Layout(shared=2, experts=4, expansion=0.5, top_k=1)
    [sizes] = {tuple(v) for v in structure(tiny.mini_flux(), layout)["experts"].values()}
    assert sizes == (96, 4, 24, 1)
    for wrong in (
        Layout(shared=1, experts=7, expansion=3 / 7),
        Layout(shared=1, experts=12, expansion=0.3),
        Layout(shared=2),
        Layout(shared=0.3, experts=1, expansion=3.7, top_k=1),
    ):
        with pytest.raises(ValueError, match=r"\.ff has 192 neurons on 48 channels: a shared "):
            structure(tiny.mini_flux(), wrong)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"top_k": 13}, "top_k 13: expected 0 to the 12"),
        ({"top_k": -1}, "top_k -1"),
        ({"shared": 0}, "shared 0"),
        ({"experts": 0}, "experts 0"),
        ({"expansion": -1}, "expansion -1"),
        ({"gate": "hard"}, "gate 'hard': one of scaled_softmax, "),
        ({"streams": "text"}, "streams 'text'"),
        ({"adaln": "none"}, "adaln 'none'"),
        ({"rank": 0}, "rank 0"),
    ],
)
def test_numbers_out_of_range(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Layout(**settings)


def test_models_that_are_not_dense():
    flux = tiny.mini_flux()
    with pytest.raises(ValueError, match="MoEFluxTransformer2DModel is converted already"):
        structure(converted(flux), Layout())
    units = coupling.units(flux, ("channel",))
    keep = torch.arange(192) < 96
    with pytest.raises(ValueError, match="CutFluxTransformer2DModel, expected one of"):
        structure(coupling.compact(flux, units, Mask({units[0].name: keep})), Layout())
    with pytest.raises(ValueError, match="a Linear, expected one of FluxTransformer2DModel, "):
        structure(nn.Linear(2, 2), Layout())
    flux.is_quantized = True
    with pytest.raises(ValueError, match="a quantised Flux"):
        structure(flux, Layout())
    other = tiny.mini_flux()
    other.transformer_blocks[0].ff.net[2] = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="is a Bilinear, expected a plain Linear"):
        structure(other, Layout())


def test_modulation_of_models_that_have_none():
    for name in ("pixart", "unet"):
        with pytest.raises(ValueError, match="no modulation of their own, expected 'full'"):
            structure(MINIS[name](), Layout(adaln="shared"))
    with pytest.raises(ValueError, match="rank 49 of modulations of rank 48"):
        structure(tiny.mini_flux(), Layout(adaln="lowrank", rank=49))


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (((0, 2), 1), "expected consecutive ones"),
        (((1, 0), 1), "expected consecutive ones"),
        (((), 1), "expected consecutive ones"),
        (((2, 3), 1), "single_transformer_blocks.3 is a NoneType"),
        (((0, 1), 3), "keeps 3, expected 1 to all"),
        (((0, 1), 0), "keeps 0, expected 1 to all"),
    ],
)
def test_groups_that_cannot_be(groups, problem):
    places, keep = groups
    group = Group(tuple(f"single_transformer_blocks.{i}" for i in places), keep)
    with pytest.raises(ValueError, match=problem):
        structure(tiny.mini_flux(), Layout(groups=(group,)))


def test_groups_of_other_blocks():
    one = Group(("transformer_blocks.0", "transformer_blocks.1"))
    last = Group(("transformer_blocks.1", "transformer_blocks.2"))
    two = Group(("transformer_blocks.1", "single_transformer_blocks.2"))
    with pytest.raises(ValueError, match="expected consecutive ones of one list"):
        structure(tiny.mini_flux(), Layout(groups=(two,)))
    with pytest.raises(ValueError, match="some are in another group already"):
        structure(tiny.mini_flux(), Layout(groups=(one, Group(("transformer_blocks.1",)))))
    with pytest.raises(ValueError, match="transformer_blocks.2 is a JointTransformerBlock: groups"):
        structure(tiny.mini_sd3(), Layout(groups=(last,)))
    with pytest.raises(ValueError, match="is a BasicTransformerBlock: groups are of blocks of"):
        structure(tiny.mini_pixart(), Layout(groups=(one,)))
    assert structure(tiny.mini_sd3(), Layout(groups=(one,)))["groups"] == [
        {"blocks": ["transformer_blocks.0", "transformer_blocks.1"], "keep": 1}
    ]


def test_groups_of_published_sizes():
    with torch.device("meta"):
        small = tiny.flux()  # 3 double and 6 single blocks
    assert groups_of(small, "L") == ()
    assert [len(one.blocks) for one in groups_of(small, "S")] == [2, 2, 2]
    assert groups_of(small, "XS")[0].blocks == ("transformer_blocks.1", "transformer_blocks.2")
    assert groups_of(small, "XS")[-1].blocks[-1] == "single_transformer_blocks.5"
    with pytest.raises(ValueError, match="size 'XL': one of L, M, S, XS"):
        groups_of(small, "XL")
    with pytest.raises(ValueError, match="sizes are of Flux"):
        groups_of(tiny.mini_pixart(), "M")
