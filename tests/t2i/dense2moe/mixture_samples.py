"""Miniatures and what they become, for the tests beside."""

import torch

from gencompress.t2i import tiny
from gencompress.t2i.dense2moe import adaln
from gencompress.t2i.dense2moe.convert import convert
from gencompress.t2i.dense2moe.layout import Layout, structure
from gencompress.t2i.distill import draws

MINIS = {
    "flux": tiny.mini_flux,
    "sd3": lambda: tiny.mini_sd3(dual=True),
    "pixart": tiny.mini_pixart,
    "unet": tiny.mini_unet,
}
FLUX_DEV = {"guidance_embeds": True}  # the rest are defaults


def random_scores(mixture, seed=0):
    made = torch.Generator().manual_seed(seed)
    sizes = {p: shared + experts * inner for p, (shared, experts, inner, _) in
             mixture["experts"].items()}  # fmt: skip
    return {path: torch.rand(count, generator=made) for path, count in sizes.items()}


def embeddings_of(model, count=64, seed=5):
    made = torch.Generator().manual_seed(seed)
    pooled = torch.randn(count, model.config.pooled_projection_dim, generator=made)
    return adaln.embeddings(model, pooled, draws(range(count)))


def converted(model, layout=None, *, seed=0, **more):
    """The model with routers of a seed, neurons dealt out at random."""
    mixture = structure(model, layout or Layout())
    if mixture["adaln"] != "full":
        more["embeddings"] = embeddings_of(model)
    generator = torch.Generator().manual_seed(seed)
    return convert(model, mixture, random_scores(mixture, seed), generator, **more)


def inputs_of(model, seed=0, batch=2, tokens=7):
    """`tiny.mini_inputs` in the model's dtype."""
    dtype = next(model.parameters()).dtype
    found = tiny.mini_inputs(model, seed, batch, tokens)
    return {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in found.items()
    }


def out(model, **more):
    with torch.no_grad():
        return model(**inputs_of(model, **more), return_dict=False)[0]


def far(one, other):
    """The largest difference, over the largest number."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())
