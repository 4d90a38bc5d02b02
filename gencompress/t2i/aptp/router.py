"""The router: which expert gets a prompt. Decided by no noise, and saved without pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gencompress.core.gate import Kind
from gencompress.files import FormatError, save_tensors
from gencompress.t2i.aptp.architecture import (
    Codes,
    Predictor,
    Relaxation,
    comparison,
    relaxed,
    similarity,
)
from gencompress.t2i.aptp.assign import nearest
from gencompress.t2i.aptp.encoder import PromptEncoder, encode
from gencompress.t2i.aptp.layout import Layout, layout_from_json
from gencompress.t2i.formats import read_json, write_json

WEIGHTS, ABOUT = "router.safetensors", "router.json"
PROBE = "a photo of a red cat on a table"
LARGEST = 1e30  # of a setting: below what float32 holds
ALIKE = 0.05  # of the norm: far more than bfloat16 rounds, far less than encoders differ


@dataclass(frozen=True, eq=False)
class Router:
    """Raises ValueError where the parts do not fit each other."""

    encoder: PromptEncoder
    layout: Layout
    predictor: Predictor
    codes: Codes
    relaxation: Relaxation = Relaxation()
    mixed: bool = False  # of `comparison`

    def __post_init__(self) -> None:
        size, width = self.predictor.linear.weight.shape
        sizes = {self.layout.size, size, self.codes.logits.shape[1]}
        if len(sizes) > 1 or width != self.encoder.width:
            raise ValueError(
                f"layout of {self.layout.size} entries, codes of {self.codes.logits.shape[1]}, a "
                f"predictor from {width} to {size}, an encoder {self.encoder.width} wide: they do "
                "not fit"
            )


def route(router: Router, prompts: Sequence[str], batch: int = 1) -> Tensor:
    """int64 [N] on the CPU: the expert of each prompt, of equally near ones the first.

    Args:
        batch: prompts computed at once. With 1, a prompt goes to the same expert whatever
            is asked for with it; with more, one that lies halfway between two may not.

    Raises:
        ValueError: no prompts, or a batch below 1.
    """
    return nearest(similarities(router, prompts, batch))


@torch.no_grad()
def similarities(router: Router, prompts: Sequence[str], batch: int = 1) -> Tensor:
    """float32 [N, K] on the CPU: how near each expert is, as `route` compares them."""
    embeddings = encode(router.encoder, prompts, batch)
    codes = compared(router, router.codes.logits)
    found = [
        similarity(compared(router, router.predictor(part.to(codes.device))), codes)
        for part in torch.split(embeddings, batch)
    ]
    return torch.cat(found).cpu()


def save_router(router: Router, folder: str | Path) -> None:
    """Writes the two files of a router into a folder, made if it is not there; the encoder is only
    named.

    Raises:
        OSError: they cannot be written, or are there already.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (probe,) = encode(router.encoder, [PROBE])
    tensors = {
        "weight": router.predictor.linear.weight,
        "bias": router.predictor.linear.bias,
        "codes": router.codes.logits,
        "probe": probe,
    }
    plain = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    save_tensors(folder / WEIGHTS, plain, {})
    about = {
        "encoder": router.encoder.name,
        "layout": router.layout.to_json(),
        "relaxation": asdict(router.relaxation),
        "mixed": router.mixed,
    }
    write_json(folder / ABOUT, about)


def load_router(folder: str | Path, encoder: PromptEncoder) -> Router:
    """What `save_router` wrote, on the CPU; it routes as that did.

    Args:
        encoder: the one it was trained with; from another place or in another precision will do.

    Raises:
        FormatError: a file is missing or not what it should be.
        ValueError: another encoder.
    """
    folder = Path(folder)
    about = read_json(folder / ABOUT)
    layout, relaxation, mixed = _about(folder / ABOUT, about)
    path = folder / WEIGHTS
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as problem:
        raise FormatError(path, f"no weights of a router: {problem}") from None
    if held.keys() != {"weight", "bias", "codes", "probe"} or held["weight"].ndim != 2:
        raise FormatError(path, f"holds {', '.join(sorted(held))}: not the weights of a router")
    size, width = layout.size, held["weight"].shape[1]
    count = held["codes"].shape[0] if held["codes"].ndim == 2 else 0
    shapes = {"weight": (size, width), "bias": (size,), "codes": (count, size), "probe": (width,)}
    for name, shape in shapes.items():
        one = held[name]
        if tuple(one.shape) != shape or one.dtype != torch.float32 or 0 in shape:
            raise FormatError(
                path, f"{name} is {one.dtype} {tuple(one.shape)}, expected float32 {shape}"
            )
        if not bool(one.isfinite().all()):
            raise FormatError(path, f"{name} holds numbers that are not finite")
    _check_encoder(encoder, held["probe"], about["encoder"])
    predictor, codes = Predictor(width, layout), Codes(count, layout)
    with torch.no_grad():
        predictor.linear.weight.copy_(held["weight"])
        predictor.linear.bias.copy_(held["bias"])
        codes.logits.copy_(held["codes"])
    return Router(encoder, layout, predictor, codes, relaxation, mixed)


def compared(router: Router, logits: Tensor) -> Tensor:
    """Comparison vectors [..., E] of logits [..., D], without noise."""
    gates = relaxed(logits, router.layout, None, router.relaxation)
    return comparison(gates, router.layout, mixed=router.mixed)


def _about(path: Path, about: dict[str, Any]) -> tuple[Layout, Relaxation, bool]:
    try:
        if about.keys() != {"encoder", "layout", "relaxation", "mixed"}:
            raise ValueError(f"holds {', '.join(sorted(about))}")
        how, mixed = about["relaxation"], about["mixed"]
        if type(mixed) is not bool or type(about["encoder"]) is not str:
            raise ValueError("mixed is no truth value, or encoder no name")
        known = isinstance(how, dict) and how.keys() == asdict(Relaxation()).keys()
        if not known or how["kind"] not in get_args(Kind):
            raise ValueError(f"relaxation is {how}")
        if not all(type(how[name]) in (int, float) for name in ("temperature", "offset")):
            raise ValueError(f"relaxation is {how}")
        if not 0 < how["temperature"] < LARGEST or not abs(how["offset"]) < LARGEST:
            raise ValueError(f"relaxation is {how}")
        return layout_from_json(about["layout"]), Relaxation(**how), mixed
    except ValueError as problem:
        raise FormatError(path, f"not of a router: {problem}") from None


def _check_encoder(encoder: PromptEncoder, probe: Tensor, name: str) -> None:
    if encoder.width != len(probe):
        raise ValueError(
            f"the router was trained with {name}, {len(probe)} wide; {encoder.name} is "
            f"{encoder.width} wide"
        )
    (ours,) = encode(encoder, [PROBE])
    if not float((ours - probe).norm()) <= ALIKE * float(probe.norm()):
        raise ValueError(
            f"the router was trained with {name}; {encoder.name} encodes prompts otherwise"
        )
