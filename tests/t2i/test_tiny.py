"""The small models: a tokenizer that spells anything, sizes that stay small, equal seeds."""

import pytest
import torch

from gencompress.t2i import tiny
from gencompress.t2i.pipeline import denoiser, encode_prompts

MINIATURES = {
    "unet": tiny.mini_unet,
    "flux": tiny.mini_flux,
    "sd3": tiny.mini_sd3,
    "pixart": tiny.mini_pixart,
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"a {color} {what}" for color in ("red", "blue") for what in ("car", "cat", "clock")]
    return tiny.bpe_tokenizer(texts * 2, 600)


def same(one, other):
    states = [model.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


# the tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "a red car",
        "a zebra, 17 x-rays & ~`^|\\",
        "Bär ñandú Ωmega привет",
        "漢字 ไทย العربية",
        "\U0001f600\U0001f468\u200d\U0001f469",
        "\x00\x01\x7f\x80\xa0\xad",
        "",
    ],
)
def test_any_text_can_be_spelt(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    inner = ids[1:-1]
    assert tokenizer.unk_token_id not in inner and all(0 <= i < len(tokenizer) for i in inner)
    letters = "".join(text.lower().split())
    if text.isprintable():
        assert "".join(tokenizer.decode(inner).split()) == letters


def test_every_byte_is_a_token(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = tokenizer.get_vocab()
    assert len(ByteLevel.alphabet()) == 256
    assert all({c, f"{c}</w>"} <= vocab.keys() for c in ByteLevel.alphabet())
    assert sorted(vocab.values()) == list(range(len(tokenizer)))


def test_words_that_came_often_are_one_token(tokenizer):
    assert len(tokenizer("a red car").input_ids) == 2 + 3
    assert len(tokenizer("a red zebra").input_ids) > 2 + 3
    assert 514 < len(tokenizer) <= 600
    assert len(tiny.bpe_tokenizer(["one two three"] * 4, 516)) == 516


def test_equal_texts_give_equal_tokens():
    """Also where many pairs are as common as each other."""
    texts = ["car cat cap cab can cad cam"] * 2
    first, *others = (tiny.bpe_tokenizer(texts, 700).get_vocab() for _ in range(5))
    assert all(other == first for other in others)


def test_prompts_end_at_32_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert one.model_max_length == tiny.TOKENS == 32
        more = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = one(["a red car", "red " * 90, ""], **more).input_ids
        assert ids.shape == (3, 32)
        ends = (ids == one.eos_token_id).int().argmax(1)
        assert ends.tolist() == [4, 31, 1]


# sizes


@pytest.mark.parametrize(("make", "most"), [(tiny.unet, 7.5e6), (tiny.flux, 5.5e6)])
def test_what_ships_stays_small(make, most):
    with torch.device("meta"):
        model = make()
    count = sum(p.numel() for p in model.parameters())
    assert 0.9 * most < count <= most
    words = make.__doc__
    assert f"{count / 1e6:.2f} M parameters" in words


def test_shapes_that_ship(generator):
    """Their latents are those of the autoencoder, and the ids those of the tokens."""
    vae = tiny.autoencoder().eval()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert vae.decode(latents).sample.shape == (1, 3, 64, 64)
    assert latents.shape == (1, tiny.LATENT_CHANNELS, 16, 16)
    assert tiny.unet((16, 16, 16)).config.sample_size == 16
    image_ids, text_ids = tiny.flux_ids()
    assert tiny.packed(latents).shape == (1, len(image_ids), 16)
    assert text_ids.shape == (tiny.TOKENS, 3)


def test_packing_and_ids_are_those_of_the_pipeline(generator):
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 16, 16, generator=generator)
    assert torch.equal(tiny.packed(latents), FluxPipeline._pack_latents(latents, 2, 4, 16, 16))
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    assert torch.equal(tiny.flux_ids()[0], ids)


# miniatures


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_are_what_their_seed_says(name):
    make = MINIATURES[name]
    one, again, other = make(3), make(3), make(4)
    assert not one.training and sum(p.numel() for p in one.parameters()) < 1e6
    assert same(one, again) and not same(one, other)
    for key, value in one.named_parameters():  # nothing silent from the start
        assert value.abs().max() > 0 and value.std() > 0 or value.numel() == 1, key
    inputs = [tiny.mini_inputs(one, seed, batch=3) for seed in (0, 0, 1)]
    with torch.no_grad():
        first, twin, third = (one(**given, return_dict=False)[0] for given in inputs)
    assert len(first) == 3 and first.isfinite().all()
    assert torch.equal(first, twin) and not torch.allclose(first, third)


def test_a_second_attention_where_it_is_asked_for():
    assert hasattr(tiny.mini_sd3(dual=True).transformer_blocks[0], "attn2")
    assert getattr(tiny.mini_sd3().transformer_blocks[0], "attn2", None) is None


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_whole_pipelines_are_what_their_seed_says(family):
    one, again, other = (tiny.mini_pipeline(family, seed) for seed in (0, 0, 1))
    parts = [n for n, part in one.components.items() if isinstance(part, torch.nn.Module)]
    assert {"vae", "text_encoder"} <= {*parts}
    for name in parts:
        assert not getattr(one, name).training, name
        assert same(getattr(one, name), getattr(again, name)), name
        assert not same(getattr(one, name), getattr(other, name)), name
    states = encode_prompts(one, ["a red car"])
    assert states["encoder_hidden_states"].shape[1] in (tiny.TOKENS, 2 * tiny.TOKENS)
    assert denoiser(one)[1] == ("unet" if family in ("sd", "sdxl") else "transformer")


def test_an_unknown_pipeline():
    with pytest.raises(ValueError, match="'dalle'; there are sd, sdxl, sd3, pixart, flux"):
        tiny.mini_pipeline("dalle")
