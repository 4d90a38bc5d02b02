"""A small U-Net that knows a picture by heart: its caption is told from others, the search brings
the picture back, from noise and from another caption, and does not bring back one it never saw."""

import pytest
import torch
import torch.nn.functional as F

from gencompress.t2i import tiny
from gencompress.t2i.distill import denoise_loss, diffuse, draws, predict
from gencompress.t2i.dori import detect
from gencompress.t2i.dori.draw import Sampling, walk
from gencompress.t2i.dori.search import search, starts
from gencompress.t2i.pipeline import encode_prompts, hushed, with_denoiser

SIDE, STEPS, RATE = 8, 440, 5e-3
KNOWN = "a red car"
OTHERS = ["a blue cat", "a white background", "a cat and a car", "a red cat", ""]
HOW = Sampling(steps=20, guidance=1.5, size=4 * SIDE, batch=16)


def pictures(count, chance):
    """Smooth latents of deviation 1."""
    rough = torch.randn(count, 4, 4, 4, generator=chance)
    smooth = F.interpolate(rough, size=SIDE, mode="bicubic")
    return smooth / smooth.std((1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def made():
    """The pipeline, the picture it knows, and one it never saw: [2, 4, SIDE, SIDE]."""
    with hushed():
        pipe = tiny.mini_pipeline("sd")
    torch.manual_seed(0)
    unet = tiny.unet(
        (32,), sample_size=SIDE, cross_attention_dim=24, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    pipe = with_denoiser(pipe, unet)
    chance = torch.Generator().manual_seed(1)
    known, unseen = pictures(1, chance), pictures(1, chance)
    states = encode_prompts(pipe, [KNOWN, *OTHERS])["encoder_hidden_states"]
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, fused=True)
    unet.train()
    for step in range(STEPS):
        # of every batch half is the picture, half are new ones with other captions or with none
        which = torch.randint(1, len(states), (3,), generator=chance).tolist()
        nowhere = torch.randn(1, *states.shape[1:], generator=chance)
        clean = torch.cat([known.expand(4, -1, -1, -1), pictures(4, chance)])
        noised = diffuse(clean, pipe.scheduler, draws(range(8 * step, 8 * step + 8)))
        told = {"encoder_hidden_states": torch.cat([states[[0, 0, 0, 0, *which]], nowhere])}
        loss = denoise_loss(predict(unet, noised, told), noised)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 30) * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unet.eval()
    return pipe, torch.cat([known, unseen])


def likeness(pipe, states, picture, seeds=4):
    """The largest cosine over seeds between what states [T, C] give and a picture."""
    rows = {"encoder_hidden_states": states.expand(seeds, -1, -1)}
    given = torch.cat(list(walk(pipe, rows, range(seeds), HOW)))
    return float(F.cosine_similarity(given.flatten(1), picture.flatten()[None]).max())


def test_the_memorised_caption_pulls_harder(made):
    pipe, _ = made
    found = detect.noise_magnitudes(pipe, [KNOWN, *OTHERS], (0, 1), HOW)
    for scores in (found.mean((1, 2)), found[:, 0, 0]):
        assert detect.separation(scores[:1], scores[1:]).auc > 0.9
    assert float(found[-1].max()) < 1e-4 < float(found[:-1].min())  # the empty prompt


@pytest.mark.parametrize("kind", ["normal", "other"])
def test_the_search_brings_back_what_was_memorised(made, kind):
    pipe, latents = made
    start = starts(pipe, kind, [KNOWN, KNOWN], [5, 6], OTHERS[2:4])
    before = [likeness(pipe, *pair) for pair in zip(start, latents, strict=True)]
    found = search(pipe, latents, start, [5, 6])
    after = [likeness(pipe, t.states, x) for t, x in zip(found, latents, strict=True)]
    assert before[0] < 0.9 and after[0] > 0.95, (before, after)
    assert max(before[1], after[1]) < 0.5, (before, after)
    for trigger in found:
        assert trigger.log[-1]["loss"] < trigger.log[0]["loss"]
