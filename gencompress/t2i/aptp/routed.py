"""A pipeline with several denoisers, of which each prompt gets one: in memory and in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.files import FormatError
from gencompress.t2i.aptp.encoder import PromptEncoder, own_encoder, sentence_encoder
from gencompress.t2i.aptp.router import Router, load_router, route, save_router
from gencompress.t2i.evaluate import EvaluationSet
from gencompress.t2i.formats import read_json, write_json
from gencompress.t2i.pipeline import (
    denoiser,
    load_part,
    load_pipeline,
    save_part,
    save_pipeline,
    with_denoiser,
)
from gencompress.t2i.sample import sample

EXPERTS, ROUTER, ABOUT = "experts", "router", "experts.json"


@dataclass(frozen=True, eq=False)
class Routed:
    """`pipe` has the denoiser of the expert `main`, the one that most prompts go to, and shares its
    other parts with all."""

    pipe: Any
    router: Router
    experts: tuple[Any, ...]  # denoisers
    main: int


def pipeline_of(routed: Routed, expert: int) -> Any:
    """An ordinary pipeline of one expert."""
    return with_denoiser(routed.pipe, routed.experts[expert])


def images(routed: Routed, prompts: Sequence[str], seeds: Sequence[int], **given: Any) -> Tensor:
    """uint8 [N, size, size, 3]: as `sample.sample`, each prompt by its expert."""
    ids = route(routed.router, prompts)
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for expert in ids.unique().tolist():
        rows = (ids == expert).nonzero().flatten().tolist()
        asked, own = [prompts[i] for i in rows], [seeds[i] for i in rows]
        made = sample(pipeline_of(routed, expert), asked, seeds=own, **given)
        for row, image in zip(rows, made, strict=True):
            found[row] = image
    return torch.stack(found)


def how(wanted: EvaluationSet) -> dict[str, Any]:
    """The settings of `sample` in it."""
    return {"steps": wanted.steps, "guidance": wanted.guidance, "size": wanted.size}


def encoder_of(pipe: Any, name: str, device: str | torch.device = "cpu") -> PromptEncoder:
    """The pipeline's own text encoder for "own", else `sentence_encoder(name)`."""
    return own_encoder(pipe) if name == "own" else sentence_encoder(name, device)


def save_routed(routed: Routed, encoder: str, folder: Path, dtype: torch.dtype) -> None:
    """Writes a folder of diffusers with the expert `main` in it, and beside its parts `router/` and
    the other denoisers as `experts/NUMBER/`. Without this package:

        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.unet = type(pipe.unet).from_pretrained(folder + "/experts/2")
    """
    save_pipeline(routed.pipe, folder, dtype=dtype)
    name = denoiser(routed.pipe)[1]
    (folder / EXPERTS).mkdir()
    for number, model in enumerate(routed.experts):
        if number != routed.main:
            save_part(model, folder / EXPERTS / str(number), dtype)
    save_router(routed.router, folder / ROUTER)
    about = {
        "experts": len(routed.experts), "main": routed.main, "denoiser": name, "encoder": encoder,
    }  # fmt: skip
    write_json(folder / ABOUT, about)


def load_routed(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """What `save_routed` wrote.

    Raises FormatError where the folder is not whole.
    """
    folder = Path(folder)
    about = read_json(folder / ABOUT)
    count, main, encoder = (about.get(name) for name in ("experts", "main", "encoder"))
    if type(count) is not int or type(main) is not int or not 0 <= main < count:
        raise FormatError(folder / ABOUT, f"experts {count!r} and main {main!r}: expected numbers")
    if not isinstance(encoder, str):
        raise FormatError(folder / ABOUT, f"encoder {encoder!r}: expected a name")
    pipe = load_pipeline(folder, device=device, dtype=dtype)
    model, _ = denoiser(pipe)
    experts = [
        model if number == main else load_part(folder / EXPERTS / str(number), type(model), dtype)
        for number in range(count)
    ]
    router = load_router(folder / ROUTER, encoder_of(pipe, encoder, device))
    return Routed(pipe, router, tuple(one.to(device) for one in experts), main)


def shares_of(router: Router, prompts: Sequence[str]) -> Tensor:
    """float64 [K], adding up to 1: how the prompts spread over the experts."""
    ids = route(router, prompts)
    return torch.bincount(ids, minlength=len(router.codes.logits)).double() / len(ids)
