"""The small trained pipelines that ship in scenes/, and seeded miniatures for tests.

All are diffusers' and transformers' own classes; only the sizes are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TOKENS = 32  # of a prompt, both ends counted: the longest caption of a training scene takes 24
IMAGE_SIZE, LATENT_CHANNELS, TEXT_WIDTH = 64, 4, 128
GUIDANCE = 3.5  # told to the Flux transformer while it was trained
PIPELINES = ("sd", "sdxl", "sd3", "pixart", "flux")


def bpe_tokenizer(texts: Iterable[str], size: int = 932) -> Any:
    """A CLIPTokenizer with byte-pair merges learnt from `texts`: at most `size` tokens, every byte
    among them, so that any prompt can be spelt. Equal texts give equal tokens."""
    import json

    from tokenizers import Tokenizer, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer()
    bytes_ = sorted(ByteLevel.alphabet())
    start = [*bytes_, *(f"{symbol}</w>" for symbol in bytes_)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    learner: Tokenizer = blank.backend_tokenizer
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size - len(special),
            special_tokens=start,  # numbers them, which is what decides between equal counts
            min_frequency=2,
            show_progress=False,
            end_of_word_suffix="</w>",
        ),
    )
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in learnt]
    names = [*start, *("".join(pair) for pair in merges), *special]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def clip_text_config(tokenizer: Any, width: int = TEXT_WIDTH, layers: int = 3) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: Any, width: int = TEXT_WIDTH, layers: int = 2) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def autoencoder(widths: tuple[int, ...] = (16, 48, 96), layers: int = 1) -> Any:
    """An AutoencoderKL: 64 x 64 pixels to 4 x 16 x 16 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        shift_factor=0.0,
    )


def unet(widths: tuple[int, ...] = (64, 128, 160), layers: int = 1, **more: Any) -> Any:
    """A UNet2DConditionModel of three levels (7.24 M parameters), cross-attention on the first two
    and in the middle, GEGLU as in Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": IMAGE_SIZE // 4,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=layers, **settings | more
    )


def flux(double: int = 3, single: int = 6, heads: int = 5, head_width: int = 32) -> Any:
    """A FluxTransformer2DModel (5.35 M parameters) on 2 x 2 patches of 4-channel latents."""
    from diffusers import FluxTransformer2DModel

    time = head_width // 6 // 2 * 2
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(time, (head_width - time) // 2, (head_width - time) // 2),
    )


def sd_scheduler() -> Any:
    """Stable Diffusion's schedule, sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def flow_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def packed(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H / 2 * W / 2, 4 C]: the 2 x 2 patches that FluxPipeline makes tokens."""
    batch, channels, height, width = latents.shape
    split = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def flux_ids(side: int = IMAGE_SIZE // 8, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Where image and text tokens are: float32 [side * side, 3] and [tokens, 3]."""
    place = torch.arange(float(side))
    grid = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).view(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0)), torch.zeros(tokens, 3)


def mini_unet(seed: int = 0, **more: Any) -> Any:
    """0.77 M parameters, random weights, evaluation mode: two levels, one with attention."""
    torch.manual_seed(seed)
    settings = {
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _stirred(unet((32, 48), 2, **settings | more), seed)


def mini_flux(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    return _stirred(model, seed)


def mini_sd3(seed: int = 0, dual: bool = False, text_width: int = 24) -> Any:
    """Three joint blocks, the last without a text branch; `dual`: the first has a second attention,
    as in Stable Diffusion 3.5."""
    torch.manual_seed(seed)
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        caption_projection_dim=48,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return _stirred(model, seed)


def mini_pixart(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=48,
        sample_size=16,
        caption_channels=24,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    return _stirred(model, seed)


def mini_inputs(model: Any, seed: int = 0, batch: int = 2, tokens: int = 7) -> dict[str, Any]:
    """Keyword arguments for one forward of a miniature, or of any model of the same classes."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    config, kind = model.config, type(model).__name__
    time = torch.linspace(0.2, 0.9, batch)
    if "UNet" in kind:
        size, text = config.sample_size, normal(batch, tokens, config.cross_attention_dim)
        inputs = {
            "sample": normal(batch, config.in_channels, size, size),
            "timestep": (time * 999).long(),
            "encoder_hidden_states": text,
        }
        if config.addition_embed_type == "text_time":
            width = (
                config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
            inputs["added_cond_kwargs"] = {
                "text_embeds": normal(batch, width),
                "time_ids": torch.full((batch, 6), 64.0),
            }
        return inputs
    if "Flux" in kind:
        image_ids, text_ids = flux_ids(4, tokens)
        return {
            "hidden_states": normal(batch, 16, config.in_channels),
            "encoder_hidden_states": normal(batch, tokens, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
            "timestep": time,
            "guidance": torch.full((batch,), 3.5),
            "img_ids": image_ids,
            "txt_ids": text_ids,
        }
    latents = normal(batch, config.in_channels, config.sample_size, config.sample_size)
    if "SD3" in kind:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": normal(batch, tokens, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
            "timestep": time * 1000,
        }
    return {
        "hidden_states": latents,
        "encoder_hidden_states": normal(batch, tokens, config.caption_channels),
        "timestep": (time * 999).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def mini_pipeline(family: str, seed: int = 0) -> Any:
    """A whole pipeline of PIPELINES with random weights; its prompts have at most 32 tokens."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = bpe_tokenizer(["a red car and a blue cat on a white background"] * 2, 560)
    vae = autoencoder((16, 16, 16)).eval()
    clip, t5 = clip_text_config(tokenizer, 24, 2), t5_config(tokenizer, 24)
    if family in ("sd", "sdxl"):
        scheduler = sd_scheduler()
    elif family == "pixart":
        scheduler = diffusers.DPMSolverMultistepScheduler()
    else:
        scheduler = flow_scheduler()
    parts = {"vae": vae, "scheduler": scheduler, "tokenizer": tokenizer}
    if family == "sd":
        return diffusers.StableDiffusionPipeline(
            **parts,
            text_encoder=CLIPTextModel(clip).eval(),
            unet=mini_unet(seed),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sdxl":
        more = {
            "cross_attention_dim": 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
        }
        return diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder=CLIPTextModel(clip).eval(),
            text_encoder_2=CLIPTextModelWithProjection(clip).eval(),
            tokenizer_2=tokenizer,
            unet=mini_unet(seed, **more),
        )
    if family == "sd3":
        return diffusers.StableDiffusion3Pipeline(
            **parts,
            text_encoder=CLIPTextModelWithProjection(clip).eval(),
            tokenizer_2=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(clip).eval(),
            tokenizer_3=tokenizer,
            text_encoder_3=T5EncoderModel(t5_config(tokenizer, 48)).eval(),
            # its text states are two CLIPs' side by side, padded to the width of T5's
            transformer=mini_sd3(seed, text_width=48),
        )
    if family == "pixart":
        return diffusers.PixArtSigmaPipeline(
            **parts, text_encoder=T5EncoderModel(t5).eval(), transformer=mini_pixart(seed)
        )
    if family == "flux":
        return diffusers.FluxPipeline(
            **parts,
            text_encoder=CLIPTextModel(clip).eval(),
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=tokenizer,
            transformer=mini_flux(seed),
        )
    raise ValueError(f"no miniature of {family!r}; there are {', '.join(PIPELINES)}")


def _stirred(model: Any, seed: int) -> Any:
    """Every parameter a little away from the constants that many start at (norms at 1, gates and
    last layers at 0), so that nothing a test removes was silent to begin with."""
    made = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=made))
    return model.eval()
