"""Caches: the same numbers as without one, made anew when anything behind them changed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gencompress.files import FormatError
from gencompress.t2i import tiny
from gencompress.t2i.data import cache
from gencompress.t2i.data.cache import cache_latents, cache_texts, encode_images
from gencompress.t2i.pipeline import encode_prompts, hushed

CAPTIONS = ["a red car", "a blue cat", "a red car", "", "a blue cat"]


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return tiny.autoencoder((8, 8, 8)).eval()


@pytest.fixture(scope="module")
def pipe():
    with hushed():
        return tiny.mini_pipeline("sdxl")


@pytest.fixture
def pictures(generator):
    return torch.randint(0, 256, (5, 16, 16, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def made(monkeypatch):
    """Which encoders ran."""
    ran = []
    for name in ("encode_images", "encode_prompts"):
        plain = getattr(cache, name)

        def counted(*args, name=name, plain=plain):
            ran.append(name)
            return plain(*args)

        monkeypatch.setattr(cache, name, counted)
    return ran


# latents


def test_latents_are_those_of_the_autoencoder(vae, pictures, path):
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    found = cache_latents(vae, pictures, path, batch=2)
    assert found.dtype == torch.float16 and found.shape == (5, 4, 4, 4)
    with torch.no_grad():
        pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        wanted = (vae.encode(pixels).latent_dist.mean - 0.25) * 0.5
    assert torch.allclose(found.float(), wanted, atol=2e-3)
    assert wanted.std() > 0.01


def test_an_autoencoder_without_a_distribution(pictures, path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**small, **blocks, scaling_factor=2.0).eval()
    found = cache_latents(vae, pictures, path)
    with torch.no_grad():
        wanted = vae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latents * 2
    assert torch.allclose(found.float(), wanted, atol=2e-3)


def test_the_same_again_is_read(vae, pictures, path, made):
    first = cache_latents(vae, pictures, path, batch=2)
    assert made == ["encode_images"] * 3
    stamp = path.stat().st_mtime_ns
    again = cache_latents(vae, pictures, path, batch=3)
    assert len(made) == 3 and torch.equal(first, again) and path.stat().st_mtime_ns == stamp


def change_weight(vae, pictures):
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 0.5


def change_scale(vae, pictures):
    vae.register_to_config(scaling_factor=0.7)


def change_pixel(vae, pictures):
    pictures[3, 5, 5, 0] ^= 128


@pytest.mark.parametrize("change", [change_weight, change_scale, change_pixel])
def test_other_weights_or_pictures_make_it_anew(vae, pictures, path, made, change):
    first = cache_latents(vae, pictures, path)
    change(vae, pictures)
    second = cache_latents(vae, pictures, path)
    assert len(made) == 2 and not torch.equal(first, second)
    assert torch.equal(second, encode_images(vae, pictures).half())
    assert torch.equal(second, cache_latents(vae, pictures, path)) and len(made) == 2


def test_order_and_number_of_pictures_count(vae, pictures, path, made):
    first = cache_latents(vae, pictures, path).clone()
    assert torch.allclose(cache_latents(vae, pictures.flip(0), path), first.flip(0), atol=1e-3)
    assert len(cache_latents(vae, pictures[:2], path)) == 2
    assert len(made) == 3


def test_it_is_read_through_a_memory_map(vae, pictures, path):
    found = cache_latents(vae, pictures, path)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    assert found.isfinite().all()


def test_a_failure_leaves_the_old_cache(vae, pictures, path, monkeypatch):
    first = cache_latents(vae, pictures, path).clone()
    before = path.read_bytes()
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1e9)
    with pytest.raises(ValueError, match="latents reach .*, beyond float16"):
        cache_latents(vae, pictures, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    assert first.isfinite().all()


def test_a_file_that_is_no_cache_stays(vae, pictures, path):
    save_file({"mine": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="is not a cache; not replacing it"):
        cache_latents(vae, pictures, path)
    assert torch.equal(load_file(path)["mine"], torch.ones(2))


def test_a_broken_cache(vae, pictures, path):
    cache_latents(vae, pictures, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="broken"):
        cache_latents(vae, pictures, path)


def test_progress(vae, pictures, path):
    said = []
    cache_latents(vae, pictures, path, batch=3, progress=said.append)
    assert said == ["encoding pictures: 0 of 5", "encoding pictures: 3 of 5"]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 16, 16, 3), torch.zeros(16, 16, 3).byte()])
def test_other_pictures_are_refused(vae, path, wrong):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        cache_latents(vae, wrong, path)


# texts


def test_each_caption_is_stored_once(pipe, path):
    found = cache_texts(pipe, CAPTIONS, path, batch=2)
    assert found.rows.tolist() == [2, 1, 2, 0, 1]
    states = encode_prompts(pipe, CAPTIONS)
    assert found.states.keys() == states.keys() == {"encoder_hidden_states", "text_embeds"}
    for name, value in states.items():
        assert len(found.states[name]) == 3 and found.states[name].dtype == torch.float16
        assert torch.allclose(found.states[name][found.rows].float(), value, atol=5e-3), name
    empty = encode_prompts(pipe, [""])["text_embeds"]
    assert torch.allclose(found.states["text_embeds"][:1].float(), empty, atol=5e-3)


def test_masks_stay_whole_numbers(path):
    with hushed():
        pixart = tiny.mini_pipeline("pixart")
    mask = cache_texts(pixart, CAPTIONS, path).states["encoder_attention_mask"]
    assert mask.dtype == torch.int64
    assert mask[0].sum() < mask[1].sum()


def test_other_orders_of_captions_read_the_same_file(pipe, path, made):
    cache_texts(pipe, CAPTIONS, path)
    again = cache_texts(pipe, CAPTIONS[:2], path)
    assert len(made) == 1 and again.rows.tolist() == [2, 1]
    cache_texts(pipe, [*CAPTIONS, "a new one"], path)
    assert len(made) == 2


def test_other_text_encoders_make_it_anew(pipe, path, made):
    first = cache_texts(pipe, CAPTIONS, path).states["text_embeds"].clone()
    weight = pipe.text_encoder_2.text_projection.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(torch.eye(len(weight)))
        second = cache_texts(pipe, CAPTIONS, path).states["text_embeds"]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert len(made) == 2 and not torch.equal(first, second)


def test_other_limits_of_the_tokenizer_make_it_anew(pipe, path, made, monkeypatch):
    cache_texts(pipe, CAPTIONS, path)
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", 16)
    monkeypatch.setattr(pipe.tokenizer_2, "model_max_length", 16)
    assert cache_texts(pipe, CAPTIONS, path).states["encoder_hidden_states"].shape[1] == 16
    assert len(made) == 2


def test_latents_are_not_texts(pipe, vae, pictures, path, made):
    cache_texts(pipe, CAPTIONS, path)
    assert cache_latents(vae, pictures, path).shape == (5, 4, 4, 4)
    assert made == ["encode_prompts", "encode_images"]
