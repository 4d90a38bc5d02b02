"""A routed pipeline by hand: experts of random masks, of which nothing was learnt."""

import torch
from t2i.aptp.gate_samples import random_code

from gencompress.t2i import tiny
from gencompress.t2i.aptp import experts, gates
from gencompress.t2i.aptp.architecture import Codes, Predictor
from gencompress.t2i.aptp.encoder import own_encoder
from gencompress.t2i.aptp.routed import Routed
from gencompress.t2i.aptp.router import Router
from gencompress.t2i.pipeline import with_denoiser

COLOURS = ("red", "blue", "green", "white")
THINGS = ("car", "cat", "tree", "dog", "house", "cup")
PROMPTS = [f"a {colour} {thing}" for thing in THINGS for colour in COLOURS]


def random_router(pipe, count, seed=0):
    """Codes that differ, and a predictor that tells prompts apart."""
    chance = torch.Generator().manual_seed(seed)
    layout, encoder = gates.layout(pipe.unet), own_encoder(pipe)
    predictor, codes = Predictor(encoder.width, layout, chance), Codes(count, layout, chance)
    with torch.no_grad():
        predictor.linear.weight.mul_(3)
        predictor.linear.bias.sub_(3)
        codes.logits.copy_(3 * torch.randn(count, layout.size, generator=chance) - 3)
    return Router(encoder, layout, predictor, codes)


def routed(count=4, share=0.7, main=1, seed=0):
    chance = torch.Generator().manual_seed(seed)
    pipe = tiny.mini_pipeline("sd")
    router, dense = random_router(pipe, count, seed), pipe.unet
    masks = tuple(
        experts.harden(random_code(router.layout, chance, share), router.layout)
        for _ in range(count)
    )
    cut = tuple(experts.expert(dense, router.layout, mask) for mask in masks)
    return Routed(with_denoiser(pipe, cut[main]), router, cut, main, masks, dense)


def moved(made, by):
    """The same with every weight of an expert away from the dense one's, as after fine-tuning."""
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for one in made.experts:
            for parameter in one.parameters():
                parameter.add_(by * torch.randn(parameter.shape, generator=chance))
    return made
