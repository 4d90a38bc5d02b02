"""What the repair of memories learns from: of every memorised picture the triggers that bring it
back now, and clean pictures with their captions.

N pictures, M triggers of each, T tokens of width C.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.files import save_tensors, writing
from gencompress.t2i.calibrate import Calibration, conditions
from gencompress.t2i.dori.search import SearchConfig, search, starts
from gencompress.t2i.train import Batch, Data, sample_order

ABOUT = "gencompress.triggers"  # the key of the metadata of a file: JSON
# where the searches of a picture begin, in turn; "earlier": its triggers of the epoch before
TURNS = ("caption", "normal", "earlier", "other")


@dataclass(frozen=True, eq=False)
class Pool:
    """The triggers of one epoch."""

    states: Tensor  # float32 [N, M, T, C]; the first of each picture is its caption
    row: dict[str, Any]  # for the log


def captions_only(pipe: Any, captions: Sequence[str]) -> Pool:
    """Each picture's caption and nothing else."""
    return Pool(starts(pipe, "caption", captions, range(len(captions)))[:, None], {})


def refreshed(
    pipe: Any,
    latents: Tensor,
    captions: Sequence[str],
    others: Tensor,
    num: int,
    config: SearchConfig,
    seed: int,
    *,
    before: Pool | None = None,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> Pool:
    """`num` searches for each picture on the weights as they are, from its caption, from N(0, 1),
    from an earlier trigger of it and from another caption, in turn; M is 1 + num.

    Args:
        latents: float [N, C, h, w].
        others: float [K, T, C], states of captions that are not memorised; from one of these, too,
            where there are no earlier triggers.
        seed: of all chance.
        before: the pool of the epoch before.
        workdir: keeps what was found until all is.

    Raises as `search.search`.
    """
    chance = np.random.default_rng(seed)
    own = chance.integers(2**31, size=(len(latents), num)).tolist()
    begin = [
        _start(pipe, TURNS[i % len(TURNS)], captions, [row[i] for row in own], others, before)
        for i in range(num)
    ]
    caption = starts(pipe, "caption", captions, range(len(captions)))
    found = search(
        pipe,
        latents.repeat_interleave(num, 0),
        torch.stack(begin, 1).flatten(0, 1),
        [one for row in own for one in row],
        config,
        workdir=workdir,
        progress=progress,
    )
    states = torch.stack([one.states for one in found]).unflatten(0, (len(latents), num))
    row = {
        "searches": len(found),
        **{
            name: float(np.mean([one.log[place]["loss"] for one in found]))
            for name, place in (("loss_before", 0), ("loss_after", -1))
        },
        "search_seconds": sum(one.seconds for one in found),
    }
    return Pool(torch.cat([caption[:, None], states], 1), row)


def kept(folder: Path | None, epoch: int, run: str, make: Callable[[Path | None], Pool]) -> Pool:
    """The pool of an epoch of the run from its file in `folder`, else what `make(searches)` gives,
    which is written there; `searches` is the folder for what is found on the way."""
    if folder is None:
        return make(None)
    path, searches = folder / f"triggers-{epoch}.safetensors", folder / f"searches-{epoch}"
    found = _read(path, run)
    if found is None:
        found = make(searches)
        with writing(path, overwrite=True) as part:
            about = json.dumps({"run": run, "row": found.row})
            save_tensors(part, {"states": found.states.contiguous()}, {ABOUT: about})
    shutil.rmtree(searches, ignore_errors=True)
    return found


def clean_samples(pipe: Any, seen: Calibration, seed: int, empty: float = 0.1) -> Data:
    """Samples for the clean part of `repair.repair`, by number: latents of `seen` in shuffled
    order with the states of their prompts, a share `empty` of them with those of the empty prompt,
    so that guidance keeps what it compares with.

    Raises ValueError for a share outside 0 to 1.
    """
    if not 0 <= empty <= 1:
        raise ValueError(f"a share {empty} of empty prompts; expected 0 to 1")
    states = seen.rows["encoder_hidden_states"]
    nothing = conditions(pipe, [""])["encoder_hidden_states"]

    def samples(numbers: list[int]) -> Batch:
        index = [sample_order(one, 1, len(states), seed)[0] for one in numbers]
        drop = [np.random.default_rng([seed, one]).random() < empty for one in numbers]
        told = torch.where(torch.tensor(drop)[:, None, None], nothing, states[index])
        return {"latents": seen.latents[index], "states": told}

    return samples


def _start(
    pipe: Any,
    kind: str,
    captions: Sequence[str],
    seeds: Sequence[int],
    others: Tensor,
    before: Pool | None,
) -> Tensor:
    """float32 [N, T, C]."""
    if kind in ("caption", "normal"):
        return starts(pipe, kind, captions, seeds)
    if kind == "earlier" and before is not None and before.states.shape[1] > 1:
        # the first is the caption
        count = before.states.shape[1] - 1
        return torch.stack(
            [row[1 + seed % count] for row, seed in zip(before.states, seeds, strict=True)]
        )
    return torch.stack([others[seed % len(others)] for seed in seeds]).float()


def _read(path: Path, run: str) -> Pool | None:
    """The pool of this run; None if there is none, or a broken file, which is made anew."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            if about["run"] == run:
                return Pool(file.get_tensor("states").clone(), about["row"])
    except (SafetensorError, OSError, ValueError, KeyError):
        pass
    return None
