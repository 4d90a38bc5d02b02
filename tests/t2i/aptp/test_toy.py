"""The whole of APTP on a toy: prompts of two families, one of which needs what the other does not.

What the easy family is told is nothing, so its cross-attentions do nothing; the hard family's fill
them. At equal mean MACs two experts can be nearer to the dense model than one network for all.
"""

import pytest
import torch

from gencompress.measure import macs
from gencompress.t2i import tiny
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.architecture import Relaxation
from gencompress.t2i.aptp.arms import routed_error
from gencompress.t2i.aptp.choose import choose, costs
from gencompress.t2i.aptp.cost import macs_table
from gencompress.t2i.aptp.encoder import encode, own_encoder
from gencompress.t2i.aptp.experts import expert
from gencompress.t2i.aptp.learn import Objective, learn
from gencompress.t2i.aptp.routed import Routed
from gencompress.t2i.aptp.router import Router, route
from gencompress.t2i.calibrate import Calibration
from gencompress.t2i.distill import Weights
from gencompress.t2i.pipeline import hushed, with_denoiser
from gencompress.t2i.train import Training

EASY, HARD = (tuple(f"{word} " * count for count in range(6, 14)) for word in ("red", "cat"))
COPIES, TOKENS, SIDE, WIDE = 4, 32, 4, 96
SHARE, STEPS = 0.75, 50
# nearer to its threshold than the paper's 3, so that few steps are enough
EARLY = Relaxation(offset=1.0)
# the toy knows no true noise; and what rewards variety by itself would make either family's larger
ONLY_ANSWERS = Objective(after_teacher=Weights(0.0, 100.0, 0.0), spread=0.0, top=0.0)


def pipeline(seed):
    """One level, in which cross-attentions and feed-forwards count."""
    with hushed():
        pipe = tiny.mini_pipeline("sd")
        torch.manual_seed(seed)
        unet = tiny.unet(
            (16,), 1, sample_size=SIDE, cross_attention_dim=WIDE, attention_head_dim=8,
            norm_num_groups=4, mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
        chance = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance))
                if name.endswith(("attn2.to_out.0.weight", "ff.net.2.weight")):
                    parameter.mul_(3)
        return with_denoiser(pipe, unet.eval())


def told(seed):
    """Latents, and a vector each that the text states repeat: 0 for the easy family."""
    chance = torch.Generator().manual_seed(seed)
    prompts = (EASY + HARD) * COPIES
    states = torch.randn(len(prompts), 1, WIDE, generator=chance).repeat(1, TOKENS, 1)
    states[[text in EASY for text in prompts]] = 0
    latents = torch.randn(len(prompts), 4, SIDE, SIDE, generator=chance)
    return Calibration(latents, {"encoder_hidden_states": states}, prompts, 8 * SIDE, "sampled")


def spent(pipe, seen, table, count, seed):
    """What `count` experts make of SHARE: the routed pipeline, the expert of each latent, and the
    share of each expert."""
    encoder = own_encoder(pipe)
    embeddings = encode(encoder, seen.prompts, 64)
    how = Training(STEPS, 16, 0.1, 2, 1.0, decay=0.0, log_every=10)
    chance = torch.Generator().manual_seed(seed)
    predictor, codes, _ = learn(
        pipe, seen, embeddings, table, SHARE, count, how, ONLY_ANSWERS, None, chance,
        relaxation=EARLY,
    )  # fmt: skip
    router = Router(encoder, table.layout, predictor, codes, EARLY)
    ids = route(router, seen.prompts)
    loads = torch.bincount(ids, minlength=count)
    masks, _ = choose(codes.logits, loads, pipe.unet, table, SHARE, EARLY)
    cut = tuple(expert(pipe.unet, table.layout, mask) for mask in masks)
    made = Routed(with_denoiser(pipe, cut[0]), router, cut, 0, tuple(masks))
    return made, ids, costs(masks, table) / table.total


@pytest.mark.parametrize("seed", range(3))
def test_the_harder_family_gets_the_larger_expert_and_two_experts_beat_one(seed):
    pipe, seen = pipeline(seed), told(seed)
    inputs = macs.model_inputs(pipe.unet, SIDE, TOKENS)
    table = macs_table(pipe.unet, gates.layout(pipe.unet), inputs)
    errors = []
    for count in (2, 1):
        made, ids, shares = spent(pipe, seen, table, count, seed)
        used = shares[ids]
        assert abs(float(used.mean()) - SHARE) <= 0.02
        errors.append(routed_error(pipe, made, seen, torch.Generator().manual_seed(9)))
        if count == 2:
            easy = torch.tensor([text in EASY for text in seen.prompts])
            for family in (easy, ~easy):
                assert torch.bincount(ids[family]).max() >= 7 / 8 * family.sum()
            assert float(used[~easy].mean()) > float(used[easy].mean()) + 0.02
    assert errors[0] > errors[1] + 1  # dB; found 3.7, 6.2 and 4.1
