"""A pipeline with several denoisers, of which each prompt gets one: in memory and in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.mask import Mask
from gencompress.files import FormatError, save_tensors
from gencompress.t2i.aptp import storage
from gencompress.t2i.aptp.encoder import PromptEncoder, own_encoder, sentence_encoder
from gencompress.t2i.aptp.router import Router, load_router, route, save_router
from gencompress.t2i.evaluate import EvaluationSet
from gencompress.t2i.formats import float_type, headers, read_json, write_json
from gencompress.t2i.pipeline import (
    denoiser,
    hushed,
    load_part,
    load_pipeline,
    save_part,
    save_pipeline,
    with_denoiser,
)
from gencompress.t2i.sample import sample

EXPERTS, ROUTER, ABOUT = "experts", "router", "experts.json"
DENSE = "dense"  # below EXPERTS, where the others are differences from it


@dataclass(frozen=True, eq=False)
class Routed:
    """`pipe` has the denoiser of the expert `main`, the one that most prompts go to, and shares its
    other parts with all."""

    pipe: Any
    router: Router
    experts: tuple[Any, ...]  # denoisers
    main: int
    masks: tuple[Mask, ...]  # what each of them kept of the dense one, by the router's layout
    dense: Any = None  # that denoiser, where it is at hand


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


def save_routed(
    routed: Routed, encoder: str, folder: Path, dtype: torch.dtype, *, smaller: bool = False
) -> None:
    """Writes a folder of diffusers with the expert `main` in it, and beside its parts `router/` and
    the other denoisers as `experts/NUMBER/`. Without this package:

        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.unet = type(pipe.unet).from_pretrained(folder + "/experts/2")

    With `smaller` the others are stored as the dense denoiser and their differences from it
    (aptp/storage.py) where that takes fewer bytes; then only this package reads them, and any other
    still the expert `main`.

    Raises ValueError for `smaller` without the dense denoiser.
    """
    save_pipeline(routed.pipe, folder, dtype=dtype)
    (folder / EXPERTS).mkdir()
    streams: dict[int, dict[str, Tensor]] = {}
    apart = False
    if smaller:
        streams, (whole, packed) = differing(routed, routed.dense, dtype)
        apart = packed < whole
    for number, model in enumerate(routed.experts):
        if number == routed.main:
            continue
        place = folder / EXPERTS / str(number)
        if apart:
            save_tensors(
                place.with_suffix(".safetensors"), streams[number], {"expert": str(number)}
            )
        else:
            save_part(model, place, dtype)
    if apart:
        save_part(routed.dense, folder / EXPERTS / DENSE, dtype)
    save_router(routed.router, folder / ROUTER)
    about = {
        "experts": len(routed.experts), "main": routed.main, "encoder": encoder,
        "denoiser": denoiser(routed.pipe)[1], "differences": apart,
        "kept": [storage.kept_text(mask) for mask in routed.masks],
    }  # fmt: skip
    write_json(folder / ABOUT, about)


def differing(
    routed: Routed, dense: Any, dtype: torch.dtype
) -> tuple[dict[int, dict[str, Tensor]], tuple[int, int]]:
    """The streams of all experts but `main`, which is always stored whole; and the bytes of these
    experts whole, and as streams with the dense denoiser, all in `dtype`."""
    if dense is None:
        raise ValueError("the dense denoiser is not at hand, from which experts would differ")
    others = {k: one for k, one in enumerate(routed.experts) if k != routed.main}
    layout = routed.router.layout
    streams = {
        k: storage.streams_of(one, dense, layout, routed.masks[k], dtype)
        for k, one in others.items()
    }
    return streams, storage.sizes(others, dense, dtype, streams)


def load_routed(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Routed:
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
    router = load_router(folder / ROUTER, encoder_of(pipe, encoder, device))
    try:
        kept = about.get("kept")
        if not isinstance(kept, list) or len(kept) != count:
            raise ValueError(f"kept is {str(kept)[:80]}, expected one table for each expert")
        masks = tuple(storage.kept_mask(one, router.layout) for one in kept)
    except ValueError as problem:
        raise FormatError(folder / ABOUT, str(problem)) from None
    others = _others(folder, type(model), router, masks, main, about.get("differences") is True)
    with hushed():
        moved = {number: one.to(device=device, dtype=dtype) for number, one in others.items()}
    experts = [moved.get(number, model) for number in range(count)]
    return Routed(pipe, router, tuple(experts), main, masks)


def _others(
    folder: Path, kind: Any, router: Router, masks: tuple[Mask, ...], main: int, apart: bool
) -> dict[int, Any]:
    """The experts beside `main`, in the type of their files, which differences are exact in."""

    place = folder / EXPERTS

    def part(name: str) -> Any:
        dtype = getattr(torch, float_type(headers(place / name)[0]))
        return load_part(place / name, kind, dtype)

    numbers = [number for number in range(len(masks)) if number != main]
    if not apart:
        return {number: part(str(number)) for number in numbers}
    dense = part(DENSE)  # whose class also loads what is not cut
    return {
        number: storage.rebuilt(
            place / f"{number}.safetensors", dense, router.layout, masks[number]
        )
        for number in numbers
    }


def shares_of(router: Router, prompts: Sequence[str]) -> Tensor:
    """float64 [K], adding up to 1: how the prompts spread over the experts."""
    ids = route(router, prompts)
    return torch.bincount(ids, minlength=len(router.codes.logits)).double() / len(ids)
