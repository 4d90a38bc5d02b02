"""Which weights hold the memories of some captions, by Wanda or NeMo; masks of as many others,
which they have to beat; and whether triggers of one picture lead to the same weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gencompress.core.mask import Mask
from gencompress.core.progress import Progress, quiet
from gencompress.core.units import Scores, Units
from gencompress.files import FormatError
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.dori import nemo, wanda
from gencompress.t2i.dori.audit import Audit
from gencompress.t2i.dori.draw import expect_unet
from gencompress.t2i.dori.locality import agreement
from gencompress.t2i.dori.masks import provenance, read_mask, save_mask, union
from gencompress.t2i.dori.settings import MASKS, Config, Memories

MOST_COMPARED = 12  # masks, so that their table can be read


def locate(
    pipe: Any,
    data: Memories,
    config: Config,
    rho: float,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> tuple[Mask, dict[str, Any], Scores]:
    """The mask of all target captions, what made it, and what it was chosen by: of Wanda the
    squared norms [K, I] of each layer's input, from which masks of any other rho follow."""
    if config.pruner == "nemo":
        return *_by_nemo(pipe, data, config, workdir, progress), {}
    how = config.wanda_config(rho)
    groups = _norms(pipe, data.captions, how, config, progress)
    mask = union([wanda.select(pipe, *pair, how) for pair in groups])
    scores = {}
    for number, kind in enumerate(("captions", "the empty prompt")):
        total = groups[0][number]
        for pair in groups[1:]:
            total = total + pair[number]
        scores |= {f"{name}, norms for {kind}": one for name, one in total.squares.items()}
    about = provenance(pipe, "wanda", data.captions, wanda.settings(how, config.sampling))
    return mask, about, scores


def scored(
    pipe: Any, data: Memories, config: Config, progress: Progress = quiet
) -> tuple[list[Units], Scores]:
    """The removable weights of a Wanda scope, or the neurons of NeMo, and how little each has to do
    with the target captions: the negative of Wanda's score where it is above that for the empty
    prompt, else 0; of NeMo the negative of the most deviations from ordinary prompts."""
    if config.pruner == "nemo":
        unet = expect_unet(pipe)
        usual = nemo.statistics(pipe, data.ordinary)
        states = conditions(pipe, data.captions)["encoder_hidden_states"].to(unet.device)
        values = nemo.activations(unet, states)
        rows = [
            nemo.unusual({p: v[i] for p, v in values.items()}, usual) for i in range(len(states))
        ]
        found = {p: -torch.stack([row[p] for row in rows]).amax(0).cpu() for p in values}
        return [
            Units(path, "neuron", torch.ones(len(one), dtype=torch.float64))
            for path, one in found.items()
        ], found
    how = config.wanda_config(0.01)
    groups = _norms(pipe, data.captions, how, config, progress)
    found = {}
    for name, layer in wanda.layers(pipe, config.scope).items():
        size = layer.weight.detach().float().abs()
        best = torch.zeros_like(size)
        for pair in groups:
            for target, base in zip(*(norms.squares[name].sqrt() for norms in pair), strict=True):
                best = torch.maximum(best, torch.where(target > base, size * target, 0.0))
        found[name] = -best.flatten().cpu()
    return [
        Units(name, "weight", torch.ones(len(one), dtype=torch.float64))
        for name, one in found.items()
    ], found


def as_many(pipe: Any, mask: Mask, kind: str, generator: torch.Generator) -> Mask:
    """A mask that removes as many weights of each row as another (or as many rows): the largest
    ("magnitude"), or any ("random")."""
    if kind not in MASKS:
        raise ValueError(f"masks by {kind!r}; expected {' or '.join(MASKS)}")
    found = {}
    for name, keep in mask.keep.items():
        part, _, path = name.partition(".")
        size = getattr(pipe, part).get_parameter(path).detach().float().abs().cpu()
        if keep.ndim == 1:
            size = size.flatten(1).norm(dim=1)[None]
        count = (~keep).reshape(size.shape).sum(1, keepdim=True)
        if kind == "random":
            size = torch.rand(size.shape, generator=generator)
        place = size.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        found[name] = (place >= count).view(keep.shape)
    return Mask(found)


def compared(
    pipe: Any,
    found: Audit,
    config: Config,
    rho: float,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Rows of a log: how far the weights that Wanda selects agree for captions and triggers of a
    few pictures, for all pairs (intersection over union, mean over layers where either selects
    any), and by layer for the triggers of each picture, mean over pictures."""
    how = config.wanda_config(rho)
    names, states, of = [], [], []
    kinds = len(config.starts) + 1
    for number, one in enumerate(
        found.of("target")[: min(config.agreement, MOST_COMPARED // kinds)]
    ):
        told = conditions(pipe, [one.pair.caption])["encoder_hidden_states"][0].float()
        mine = {"caption": told, **{f"from {k}": t.states for k, t in one.triggers.items()}}
        for kind, state in mine.items():
            names.append(f"{number + 1} {kind}")
            states.append(state)
            of.append(number)
    if len(states) < 2 or config.scope == wanda.TEXT:  # which no trigger passes
        return []
    nothing = conditions(pipe, [""])["encoder_hidden_states"][0].float()
    base = wanda.norms_of_state(pipe, nothing, how, config.sampling)
    masks = []
    for number, state in enumerate(states):
        progress(f"comparing masks: {number} of {len(states)}")
        masks.append(
            wanda.select(pipe, wanda.norms_of_state(pipe, state, how, config.sampling), base, how)
        )
    table = [[1.0] * len(masks) for _ in masks]
    for i in range(len(masks)):
        for j in range(i):
            pair = agreement([masks[i], masks[j]])
            values = [one.iou_filled for one in pair.values() if one.iou_filled is not None]
            table[i][j] = table[j][i] = sum(values) / len(values) if values else 1.0
    rows = [{"kind": "agreement", "names": names, "table": table}]
    groups = [agreement([m for m, n in zip(masks, of, strict=True) if n == one]) for one in {*of}]
    for layer in groups[0]:
        mine = [group[layer] for group in groups]
        rows.append(
            {"kind": "agreement of a layer", "layer": layer,
             "iou": sum(one.iou for one in mine) / len(mine),
             "filled": sum(one.filled for one in mine), "pairs": sum(one.pairs for one in mine)}
        )  # fmt: skip
    return rows


def _by_nemo(
    pipe: Any, data: Memories, config: Config, workdir: Path | None, progress: Progress
) -> tuple[Mask, dict[str, Any]]:
    how, ordinary = config.nemo_config(), data.ordinary
    settings = {
        "seeds": how.seeds, "index": how.index, "steps": how.steps, "theta": how.theta,
        "ordinary": len(ordinary), "tau from": config.ordinary,
    }  # fmt: skip
    about = provenance(pipe, "nemo", data.captions, settings)
    path = None if workdir is None else workdir / "nemo.safetensors"
    if path is not None and path.is_file():
        try:
            mask, made_by = read_mask(path)
            if made_by == json.loads(json.dumps(about)):
                return mask, about
        except FormatError:
            pass  # made anew
    usual = nemo.statistics(pipe, ordinary)
    progress("calibrating tau")
    tau = nemo.calibrate_tau(pipe, ordinary[: config.ordinary], how)
    found = []
    for number, text in enumerate(data.captions):
        progress(f"locating: caption {number} of {len(data.captions)}")
        found.append(nemo.find(pipe, text, usual, tau, how))
    mask = nemo.to_mask(found)
    if path is not None:
        save_mask(path, mask, about, overwrite=True)
    return mask, about


def _norms(
    pipe: Any,
    captions: Sequence[str],
    how: wanda.WandaConfig,
    config: Config,
    progress: Progress,
) -> list[tuple[wanda.Norms, wanda.Norms]]:
    """For captions and for the empty prompt, of each group: as `wanda.find`."""
    size = how.group_size or len(captions)
    found = []
    for first in range(0, len(captions), size):
        part = captions[first : first + size]
        seeds = range(first, first + len(part))
        progress(f"locating: caption {first} of {len(captions)}")
        target, base = (
            wanda.gather_norms(pipe, texts, seeds, how, config.sampling)
            for texts in (part, [""] * len(part))
        )
        found.append((target, base))
    return found
