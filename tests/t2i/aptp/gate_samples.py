"""Models that gates are tried on, and what they compute."""

import torch
from diffusers import UNet2DConditionModel

from gencompress.t2i import tiny

SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
DEEP = {
    "sample_size": 8,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
MODELS = {
    "unet": lambda: tiny.mini_unet(sample_size=8),
    "sdxl": lambda: tiny.mini_unet(**DEEP),
    "scale_shift": lambda: tiny.mini_unet(sample_size=8, resnet_time_scale_shift="scale_shift"),
    "flux": tiny.mini_flux,
    "sd35": lambda: tiny.mini_sd3(dual=True),
    "pixart": tiny.mini_pixart,
}


def unet_on_meta(**settings):
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


def out(model, inputs=None, **more):
    with torch.no_grad():
        return model(**(inputs or tiny.mini_inputs(model)) | more, return_dict=False)[0]


def gap(one, two):
    return (one - two).abs().max().item()


def random_code(layout, generator, share=0.6):
    """Gates of 0 and 1, float32 [D]: something of each slice, about `share` of the rest."""
    code = (torch.rand(layout.size, generator=generator) < share).float()
    for start, length in zip(layout.offsets, layout.lengths, strict=True):
        code[start + int(torch.randint(length, (1,), generator=generator))] = 1
    return code


def one_left(layout, generator):
    """One entry of each slice, every depth gate on."""
    code = torch.zeros(layout.size)
    code[layout.width :] = 1
    for start, length in zip(layout.offsets, layout.lengths, strict=True):
        code[start + int(torch.randint(length, (1,), generator=generator))] = 1
    return code
