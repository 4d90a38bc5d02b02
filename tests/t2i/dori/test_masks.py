"""Masks: only what they name changes, they come back bit for bit, and their files say what made
them."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from gencompress.core.mask import Mask
from gencompress.files import FormatError
from gencompress.t2i import tiny
from gencompress.t2i.dori import masks
from gencompress.t2i.pipeline import hushed

FF = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
TO_V = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
TEXT = "text_encoder"


@pytest.fixture
def pipe():
    with hushed():
        return tiny.mini_pipeline("sd")


def hashes(pipe):
    """By name, of every tensor of every part."""
    return {
        f"{name}.{path}": hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for path, value in part.state_dict().items()
    }


def weight(pipe, name):
    part, _, path = name.partition(".")
    return pipe.components[part].get_parameter(path)


def a_mask(pipe, generator):
    entries = torch.rand(weight(pipe, FF).shape, generator=generator) > 0.1
    rows = torch.rand(len(weight(pipe, TO_V)), generator=generator) > 0.2
    return Mask({FF: entries, TO_V: rows})


def test_applied_and_undone(pipe, generator):
    mask, before = a_mask(pipe, generator), hashes(pipe)
    values = {name: weight(pipe, name).detach().clone() for name in (FF, TO_V)}
    with masks.applied(pipe, mask):
        assert torch.equal(weight(pipe, FF), values[FF] * mask.keep[FF])
        assert torch.equal(weight(pipe, TO_V), values[TO_V] * mask.keep[TO_V][:, None])
        assert {n for n, h in hashes(pipe).items() if h != before[n]} == {FF, TO_V}
    assert hashes(pipe) == before
    with pytest.raises(KeyError), masks.applied(pipe, mask):
        raise KeyError
    assert hashes(pipe) == before


def test_nested(pipe, generator):
    before = hashes(pipe)
    with masks.applied(pipe, a_mask(pipe, generator)):
        once = hashes(pipe)
        with masks.applied(pipe, a_mask(pipe, generator)):
            pass
        assert hashes(pipe) == once
    assert hashes(pipe) == before


def test_written(pipe, generator):
    mask, before = a_mask(pipe, generator), hashes(pipe)
    made = masks.written(pipe, mask)
    assert hashes(pipe) == before
    assert made.vae is pipe.vae and made.text_encoder is pipe.text_encoder
    assert {n for n, h in hashes(made).items() if h != before[n]} == {FF, TO_V}
    with masks.applied(pipe, mask):
        assert hashes(pipe) == hashes(made)


def test_an_empty_mask_leaves_every_bit(pipe):
    mask = Mask({FF: torch.ones(weight(pipe, FF).shape, dtype=torch.bool)})
    assert hashes(masks.written(pipe, mask)) == hashes(pipe)
    assert masks.num_removed(mask) == {FF: 0}


def test_union(pipe, generator):
    one, other = a_mask(pipe, generator), a_mask(pipe, generator)
    both = masks.union([one, other])
    for name in (FF, TO_V):
        assert torch.equal(~both.keep[name], ~one.keep[name] | ~other.keep[name])
    with pytest.raises(ValueError, match="no masks"):
        masks.union([])


def test_masks_that_do_not_fit(pipe):
    before = hashes(pipe)
    good = torch.zeros(weight(pipe, FF).shape, dtype=torch.bool)
    for name, keep, said in (
        ("unet.nowhere.weight", good, "no parameter"),
        ("vae2.x", good, "no parameter"),
        ("scheduler.x", good, "no parameter"),
        (TO_V, torch.zeros(3, dtype=torch.bool), "the mask of"),
    ):
        with (
            pytest.raises(ValueError, match=said),
            masks.applied(pipe, Mask({FF: good, name: keep})),
        ):
            pass
        assert hashes(pipe) == before


def test_files(pipe, generator, tmp_path):
    mask = a_mask(pipe, generator)
    about = masks.provenance(pipe, "wanda", ["a", "b"], {"rho": 0.01, "steps": 10})
    path = tmp_path / "mask.safetensors"
    masks.save_mask(path, mask, about)
    found, said = masks.read_mask(path)
    assert said == about and said["settings"] == {"rho": 0.01, "steps": 10}
    assert said["num_prompts"] == 2 and len(said["model"]) == len(said["prompts"]) == 64
    assert all(torch.equal(found.keep[name], mask.keep[name]) for name in (FF, TO_V))
    # a byte holds eight weights
    assert path.stat().st_size < weight(pipe, FF).numel() / 8 + 2000
    with pytest.raises(FileExistsError):
        masks.save_mask(path, mask, about)
    masks.expect_model(pipe, about)
    other = masks.provenance(pipe, "wanda", ["a", "c"], {})
    assert other["prompts"] != about["prompts"] and other["model"] == about["model"]
    with masks.applied(pipe, mask), pytest.raises(ValueError, match="found on a model with digest"):
        masks.expect_model(pipe, about)


def test_broken_files(pipe, generator, tmp_path):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a file of a mask"):
        masks.read_mask(path)
    with pytest.raises(FormatError, match="not a file of a mask"):
        masks.read_mask(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="not of a mask of memories"):
        masks.read_mask(path)
    about = masks.provenance(pipe, "nemo", ["a"], {})
    for changed, said in (
        ({"format": 9}, "format 9"),
        ({"shapes": {FF: [9, 9]}}, "a broken mask"),
        ({"shapes": {FF: "x"}}, "a broken mask"),
        ({"shapes": 3}, "a broken mask"),
    ):
        text = json.dumps({**about, "shapes": {FF: [2, 3]}, **changed})
        save_file({FF: torch.zeros(1, dtype=torch.uint8)}, path, {masks.ABOUT: text})
        with pytest.raises(FormatError, match=said):
            masks.read_mask(path)
