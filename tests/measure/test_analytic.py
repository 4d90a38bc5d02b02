import pytest
import torch

from gencompress.core.mask import Mask
from gencompress.measure import analytic, macs
from gencompress.measure.cost import parameters
from gencompress.t2i import coupling, tiny

# the configs that these models are published with; what is not named has diffusers' default
SD15 = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
SD21 = {
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
PIXART_ALPHA = {"caption_channels": 4096, "out_channels": 8}
FLUX_DEV = {"guidance_embeds": True}

# class, config, latent, tokens, published parameters in millions (SD3: without its table of
# positions, 56.6), and GMACs of one image, as both counters found them with diffusers 0.42
PUBLISHED = {
    "sd15": ("UNet2DConditionModel", SD15, 64, 77, 859.52, 401.64),
    "sd21": ("UNet2DConditionModel", SD21, 96, 77, 865.91, 1074.55),
    "sdxl": ("UNet2DConditionModel", SDXL, 128, 77, 2567.46, 3380.62),
    "sd3": ("SD3Transformer2DModel", SD3_MEDIUM, 128, 333, 2028.33, 4452.17),
    "pixart": ("PixArtTransformer2DModel", PIXART_ALPHA, 128, 120, 611.35, 3254.76),
    "flux": ("FluxTransformer2DModel", FLUX_DEV, 128, 512, 11901.41, 37192.33),
}


def on_meta(name, config):
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


@pytest.fixture(scope="module")
def sd21():
    return on_meta("UNet2DConditionModel", SD21)


def assert_same(model, latent, tokens, batch=1):
    counted = macs.by_module(model, macs.model_inputs(model, latent, tokens, batch))
    assert analytic.by_module(model, latent, tokens, batch) == counted
    assert analytic.total(model, latent, tokens, batch) == sum(counted.values()) > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_equals_the_counter_and_the_publication(name):
    kind, config, latent, tokens, millions, giga = PUBLISHED[name]
    model = on_meta(kind, config)
    assert_same(model, latent, tokens)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    assert analytic.total(model, latent, tokens) / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize(
    ("make", "latent"),
    [
        (tiny.mini_unet, 16),
        (tiny.mini_unet, 15),  # levels of 15 and 8
        (lambda: tiny.mini_pipeline("sdxl").unet, 16),
        (lambda: tiny.mini_unet(mid_block_type=None), 8),
        (lambda: tiny.mini_unet(mid_block_type="UNetMidBlock2D"), 8),
        (
            lambda: tiny.mini_unet(
                transformer_layers_per_block=((1, 2), 1),
                reverse_transformer_layers_per_block=(1, (2, 1, 3)),
            ),
            8,
        ),
        (tiny.mini_flux, 8),
        (tiny.mini_sd3, 16),
        (lambda: tiny.mini_sd3(dual=True), 16),
        (tiny.mini_pixart, 16),
    ],
)
def test_miniatures_equal_the_counter(make, latent):
    model = make()
    assert_same(model, latent, tokens=5, batch=3)
    inputs = macs.model_inputs(model, latent, 5, 3)
    assert analytic.by_kind(model, latent, 5, 3) == macs.by_kind(model, inputs)


def test_pixart_of_1024_pixels_has_size_embedders():
    model = tiny.mini_pixart()
    larger = type(model).from_config(
        dict(model.config) | {"sample_size": 128, "use_additional_conditions": None}
    )
    assert larger.use_additional_conditions
    assert_same(larger, 16, tokens=5, batch=2)


@pytest.mark.parametrize(
    ("make", "latent"),
    [(tiny.mini_unet, 16), (tiny.mini_flux, 8), (tiny.mini_sd3, 16), (tiny.mini_pixart, 16)],
)
def test_cut_models_equal_the_counter(make, latent, generator):
    model = make()
    units = coupling.units(model, kinds=("head", "channel", "block"))
    keep = {}
    for group in units:
        kept = torch.rand(group.cost.numel(), generator=generator) < 0.7
        kept[0] |= group.kind != "block"
        keep[group.name] = kept
    cut = coupling.compact(model, units, Mask(keep))
    assert 0 in cut.config.cut.values() and max(cut.config.cut.values()) > 0
    assert_same(cut, latent, tokens=7)
    assert analytic.total(cut, latent, 7) < analytic.total(model, latent, 7)


def test_what_has_no_closed_form():
    with pytest.raises(ValueError, match="resnet_time_scale_shift='scale_shift'"):
        analytic.total(tiny.mini_unet(resnet_time_scale_shift="scale_shift"), 16, 7)
    with pytest.raises(ValueError, match="cross_attention_dim=.*one number"):
        analytic.total(tiny.mini_unet(cross_attention_dim=(24, 12)), 16, 7)
    with pytest.raises(ValueError, match="Linear, expected one of"):
        analytic.layers(torch.nn.Linear(2, 2), 16, 7)


# GMACs with 77 tokens; the second figure includes softmax, one operation per score
@pytest.mark.parametrize(
    ("latent", "true", "with_softmax"),
    [(96, 1074.55, 1077.3), (64, 402.13, 402.8), (32, 90.55, 90.6)],
)
def test_stable_diffusion_2_at_three_sizes(sd21, latent, true, with_softmax):
    layers = analytic.layers(sd21, latent, 77)
    found = sum(layer.macs for layer in layers) / 1e9
    assert found == pytest.approx(true, abs=0.005)
    scores = sum(layer.scores for layer in layers) / 1e9
    assert found + scores == pytest.approx(with_softmax, rel=6e-4)


def test_what_papers_count(sd21):
    kinds = analytic.by_kind(sd21, 96, 77)
    without_cores = (kinds["conv"] + kinds["linear"]) / 1e9
    assert without_cores == pytest.approx(760.8, rel=5e-4)
    assert analytic.aptp(sd21, 96) / 1e9 == pytest.approx(1384.2, rel=6e-4)
    assert analytic.aptp(sd21, 96) > 1.28 * sum(kinds.values())


def test_flops_of_dense2moe():
    published = {"dev": 66.00, "Lite": 53.15, "mini": 17.37}
    for name, tera in published.items():
        found = analytic.dense2moe_flops(*analytic.DENSE[name], tokens=4173)
        assert found / 1e12 == pytest.approx(tera, rel=5e-3), name
    for name, tera in {"L": 43.42, "S": 26.43, "XS": 20.26}.items():
        found = analytic.dense2moe_flops(*analytic.MIXTURES[name], tokens=4173, expansion=1.5)
        near = 5e-3 if name == "L" else 0.021  # no whole number of blocks gives S or XS
        assert found / 1e12 == pytest.approx(tera, rel=near), name
    # the default of 512 text tokens
    assert analytic.dense2moe_flops(19, 38, 4608) / 1e12 == pytest.approx(74.4, abs=0.05)
    assert analytic.dense2moe_flops(19, 38, 4608, 1.5) / 1e12 == pytest.approx(49.6, abs=0.05)


def test_flops_of_dense2moe_are_twice_the_macs_of_the_blocks():
    model = tiny.mini_flux()
    blocks = [
        layer
        for layer in analytic.layers(model, 8, 7)
        if "transformer_blocks" in layer.path and "norm" not in layer.path
    ]
    found = analytic.dense2moe_flops(2, 3, tokens=16 + 7, width=48)
    assert found == 2 * sum(layer.macs for layer in blocks)


def test_parameters_of_dense2moe():
    published = {"L": 5.15, "M": 4.0, "S": 3.19, "XS": 2.64}
    for name, billions in published.items():
        found = analytic.dense2moe_active_parameters(*analytic.MIXTURES[name]) / 1e9
        assert found == pytest.approx(billions, rel=0.01), name
    lite, mini = (
        on_meta("FluxTransformer2DModel", FLUX_DEV | {"num_layers": a, "num_single_layers": b})
        for a, b in (analytic.DENSE["Lite"], analytic.DENSE["mini"])
    )
    assert parameters(lite) / 1e9 == pytest.approx(8.163, abs=5e-4)
    assert parameters(mini) / 1e9 == pytest.approx(3.179, abs=5e-4)
