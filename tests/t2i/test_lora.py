"""Low-rank adapters: learnt as part of the weights, written as diffusers does, read by adding."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gencompress.files import FormatError
from gencompress.t2i import lora, tiny
from gencompress.t2i.formats import ADAPTER, CARD, base_of
from gencompress.t2i.lora import adapted, merge, save_lora
from gencompress.t2i.pipeline import hushed, load_pipeline, save_pipeline

CONV, LINEAR = "conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    with hushed():
        save_pipeline(tiny.mini_pipeline("sd"), folder)
    return folder


@pytest.fixture
def unet(base):
    return load_pipeline(base, dtype=torch.float32).unet


@pytest.fixture
def folder(base, tmp_path):
    """Beside a link to the pipeline."""
    (tmp_path / "pipeline").symlink_to(base)
    made = tmp_path / "adapter"
    made.mkdir()
    return made


def random_adapter(unet, generator, rank=2):
    weight = unet.get_parameter(f"{LINEAR}.weight")
    return {
        LINEAR: (
            torch.randn(rank, weight.shape[1], generator=generator),
            torch.randn(len(weight), rank, generator=generator),
        )
    }


def test_learnt_ones_are_what_the_weights_gain(unet, generator):
    before, names = copy.deepcopy(unet.state_dict()), [n for n, _ in unet.named_parameters()]
    with adapted(unet, 2, 0) as adapters:
        for one in adapters.values():
            one.up.data.normal_(generator=generator)
        found = {path: (one.down.clone(), one.up.clone()) for path, one in adapters.items()}
    assert LINEAR in found and all(path.endswith(lora.ATTENTION) for path in found)
    assert [n for n, _ in unet.named_parameters()] == names
    for name, weight in unet.state_dict().items():
        down, up = found.get(name.removesuffix(".weight"), (None, None))
        added = 0 if down is None else up @ down
        assert torch.equal(weight, before[name] + added)


def test_none_of_rank_0(unet):
    with adapted(unet, 0, 0) as adapters:
        assert not adapters


def test_written_and_read(unet, folder, generator):
    adapter = random_adapter(unet, generator)
    save_lora(adapter, folder, "unet", "pipeline")
    assert {*load_file(folder / ADAPTER)} == {
        f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"
    }  # fmt: skip
    down, up = adapter[LINEAR]
    found = load_pipeline(folder).unet.state_dict()
    for name, weight in unet.state_dict().items():
        added = up @ down if name == f"{LINEAR}.weight" else 0
        torch.testing.assert_close(found[name], weight + added, rtol=1e-6, atol=1e-6)


def test_in_another_type(unet, folder, generator):
    adapter = random_adapter(unet, generator)
    save_lora(adapter, folder, "unet", "pipeline")
    found = load_pipeline(folder, dtype=torch.bfloat16).unet.get_parameter(f"{LINEAR}.weight")
    down, up = adapter[LINEAR]
    exact = unet.get_parameter(f"{LINEAR}.weight").bfloat16().float() + up @ down
    assert torch.equal(found, exact.bfloat16())


def test_of_a_convolution(unet, folder, generator):
    weight = unet.get_parameter(f"{CONV}.weight")
    down = torch.randn(3, *weight.shape[1:], generator=generator)
    up = torch.randn(len(weight), 3, 1, 1, generator=generator)
    save_lora({CONV: (down, up)}, folder, "unet", "pipeline")
    wanted = weight + torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    merge(unet, "unet", folder)
    torch.testing.assert_close(unet.get_parameter(f"{CONV}.weight"), wanted)


@pytest.mark.parametrize("how", ["tensor", "header", "pattern", "old names"])
def test_alpha_and_names(unet, folder, generator, how):
    down, up = random_adapter(unet, generator)[LINEAR]
    before = unet.get_parameter(f"{LINEAR}.weight").clone()
    ends = ("lora.down.weight", "lora.up.weight") if how == "old names" else (lora.DOWN, lora.UP)
    tensors = dict(zip([f"unet.{LINEAR}.{end}" for end in ends], (down, up), strict=True))
    notes, factor = {}, 3.0
    if how == "tensor":
        tensors[f"unet.{LINEAR}.alpha"] = torch.tensor(6.0)
    elif how == "header":
        notes = {"unet.lora_alpha": 6, "unet.r": 2}
    elif how == "pattern":
        notes = {"unet.lora_alpha": 1, "unet.alpha_pattern": {LINEAR: 6}}
    else:
        factor = 1.0
    save_file(tensors, folder / ADAPTER, {lora.SETTINGS: json.dumps(notes)})
    merge(unet, "unet", folder)
    found = unet.get_parameter(f"{LINEAR}.weight")
    torch.testing.assert_close(found, before + factor * up @ down)


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: owner/name\ntags:\n- lora\n---\nText", "owner/name"),
        ('---\ntags: [a]\nbase_model: "owner/na.me"\n---\n', "owner/na.me"),
    ],
)
def test_cards(folder, card, base):
    (folder / CARD).write_text(card)
    assert base_of(folder) == base


def test_a_plain_name_is_a_folder_beside(folder):
    (folder / CARD).write_text("---\nbase_model: other\n---\n")
    assert base_of(folder) == folder.parent / "other"


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "base_model: a/b\n",
        "---\ntags: a\n---\nbase_model: a/b\n",
        b"\xff\xfe",
        *(f"---\nbase_model: {x}\n---\n" for x in ("../x", "..", "a/..", "/etc", "a/b/c", "a\\b")),
    ],
)
def test_no_base(folder, card):
    if card is not None:
        (folder / CARD).write_bytes(card if isinstance(card, bytes) else card.encode())
    with pytest.raises(FormatError, match=r"README.md.*base_model"):
        base_of(folder)


def test_no_adapter_of_an_adapter(folder):
    """Two that name each other would never end."""
    other = folder.parent / "other"
    other.mkdir()
    for one, base in ((folder, "other"), (other, "adapter")):
        (one / CARD).write_text(f"---\nbase_model: {base}\n---\n")
        save_file({"a": torch.zeros(1)}, one / ADAPTER)
    with pytest.raises(FormatError, match="base_model other: an adapter too"):
        load_pipeline(folder)


BAD = {
    "cut": "no adapter",
    "another part": "text_encoder.*expected only unet",
    "kohya": "lora_unet_x.*expected only unet",
    "layer": "nowhere: unet has no such layer",
    "half": "has not both",
    "shape": r"for a weight of \(",
    "flat": r"for a weight of \(",
    "rank 0": r"for a weight of \(",
    "alphas": "alpha of 2 numbers",
    "header": "no adapter",
    "list": "no adapter",
    "text": "no adapter",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(unet, folder, generator, what):
    down, up = random_adapter(unet, generator)[LINEAR]
    a, b = f"unet.{LINEAR}.{lora.DOWN}", f"unet.{LINEAR}.{lora.UP}"
    tensors, notes = {a: down, b: up}, {}
    if what == "another part":
        tensors["text_encoder.a.lora_A.weight"] = down.clone()
    elif what == "kohya":
        tensors = {"lora_unet_x.lora_down.weight": down}
    elif what == "layer":
        tensors = {a.replace(LINEAR, "nowhere"): down, b.replace(LINEAR, "nowhere"): up}
    elif what == "half":
        del tensors[b]
    elif what == "shape":
        tensors[a] = torch.randn(2, down.shape[1] + 1)
    elif what == "flat":
        tensors[b] = torch.randn(2)
    elif what == "rank 0":
        tensors |= {a: down[:0], b: up[:, :0]}
    elif what == "alphas":
        tensors[f"unet.{LINEAR}.alpha"] = torch.ones(2)
    elif what == "header":
        notes = {lora.SETTINGS: "{"}
    elif what == "list":
        notes = {lora.SETTINGS: "[1]"}
    elif what == "text":
        notes = {lora.SETTINGS: '{"unet.lora_alpha": "x"}'}
    save_file(tensors, folder / ADAPTER, notes)
    if what == "cut":
        path = folder / ADAPTER
        path.write_bytes(path.read_bytes()[:-8])
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(FormatError, match=BAD[what]):
        merge(unet, "unet", folder)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_a_layer_of_a_norm(unet, folder):
    """A weight that is no matrix."""
    name = next(path for path, one in unet.named_modules() if isinstance(one, nn.GroupNorm))
    tensors = {
        f"unet.{name}.{lora.DOWN}": torch.randn(2, 4),
        f"unet.{name}.{lora.UP}": torch.randn(4, 2),
    }
    save_file(tensors, folder / ADAPTER)
    with pytest.raises(FormatError, match="for a weight of"):
        merge(unet, "unet", folder)
