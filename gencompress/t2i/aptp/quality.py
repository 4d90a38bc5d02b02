"""What experts cost as prompts use them, what they draw, and whom each of them serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.measure.cost import cost_rows, parameters
from gencompress.measure.speed import time_call
from gencompress.t2i.aptp.arms import Made
from gencompress.t2i.aptp.cost import MacsTable
from gencompress.t2i.aptp.routed import Routed, differing, how, images, pipeline_of, shares_of
from gencompress.t2i.aptp.router import route
from gencompress.t2i.evaluate import WORD, compare_images, make_images
from gencompress.t2i.formats import stored_type
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_inputs, forward_rows

WORDS, EXAMPLES = 8, 3  # of an expert in the log
TIMED, ROUNDS = 8, 7  # samples of a forward that is timed; rounds, each of every model once
MACS = "MACs per forward, mean over prompts"


def routed_rows(
    before: Any, after: Routed, data: Inputs, progress: Progress = quiet
) -> list[Measurement]:
    """As `t2i.quality.pipeline_rows`, each row the mean over the held-out prompts of what their
    experts cost; then what time the saved MACs save, parameters of all experts together, and the
    largest part of the prompts that one expert gets."""
    size, old = data.wanted.size, denoiser(before)[0]
    shares = shares_of(after.router, data.wanted.prompts)
    used = [k for k, share in enumerate(shares.tolist()) if share > 0]
    each = [
        [
            *cost_rows(old, after.experts[k], forward_inputs(before, size)),
            *forward_rows(before, pipeline_of(after, k), size),
        ]
        for k in used
    ]
    weight = shares[used]
    rows = []
    for column in zip(*each, strict=True):
        values = torch.tensor([row.after for row in column], dtype=torch.float64)
        spread = None if column[0].spread is None else max(row.spread or 0.0 for row in column)
        dense = torch.tensor([row.before for row in column], dtype=torch.float64)
        rows.append(
            replace(
                column[0], name=f"{column[0].name}, mean over prompts",
                before=float(dense.median()), after=float(weight @ values), spread=spread,
            )
        )  # fmt: skip
    (macs,) = (row for row in rows if row.name == MACS)
    saved = 1 - float(macs.after or 0) / float(macs.before or 1)
    rows += time_rows([old, *(after.experts[k] for k in used)], weight, saved,
                      forward_inputs(before, size, TIMED))  # fmt: skip
    total = sum(parameters(one) for one in after.experts)
    rows += [
        Measurement("parameters of all experts", parameters(old), total, "parameters", "lower"),
        Measurement("largest share of prompts", None, 100 * float(shares.max()), "%", "lower"),
    ]
    pictures = (
        make_images(before, data.wanted, progress=progress),
        images(
            after, data.wanted.prompts, data.wanted.seeds, **how(data.wanted), progress=progress
        ),
    )
    return rows + compare_images(*pictures, data.wanted.prompts, data.judges, progress)


def time_rows(
    models: Sequence[Any], weight: Tensor, saved: float, inputs: dict[str, Any]
) -> list[Measurement]:
    """The time of a forward, of the dense model and in the mean of its experts; and what part of
    it is saved for the part of the MACs that is: 1 where time falls as MACs do.

    Args:
        models: the dense one, then the experts.
        weight: float64 [experts], adding up to 1: how much each is used.
        saved: of the MACs, in that mean; with nothing saved there is no second row.
    """
    times = interleaved([partial(_forward, model, inputs) for model in models], ROUNDS)
    dense, mean = times[:, 0], times[:, 1:] @ weight
    rows = [
        Measurement(
            f"time of a forward of {TIMED}, mean over prompts", float(dense.median()),
            float(mean.median()), "s", "lower", ROUNDS, float(mean.std()),
        )
    ]  # fmt: skip
    if saved > 0:
        ratio = (1 - mean / dense) / saved  # of each round: what slows the machine slows both
        rows.append(
            Measurement(
                f"saving of time over saving of MACs, forwards of {TIMED}", None,
                float(ratio.median()), "", "higher", ROUNDS, float(ratio.std()),
            )
        )  # fmt: skip
    return rows


def interleaved(calls: Sequence[Callable[[], object]], rounds: int) -> Tensor:
    """float64 [rounds, calls]: seconds, each round one call of each, every other round from the
    last to the first, after one that does not count."""
    times = torch.zeros(rounds, len(calls), dtype=torch.float64)
    for call in calls:
        call()
    for number in range(rounds):
        order = range(len(calls))
        for i in order if number % 2 == 0 else reversed(order):
            times[number, i] = time_call(calls[i], repeats=1, warmup=0).median
    return times


def storage_row(before: Any, after: Routed) -> Measurement:
    """Bytes of the weights of all experts but the main one in files: whole before, and after as the
    dense model with their differences from it, to the bit (aptp/storage.py). Which of the two is
    there is for the setting `store` to say."""
    dense, _ = denoiser(before)
    _, (whole, apart) = differing(after, dense, getattr(torch, stored_type(dense)))
    name = "size of the other experts, whole against dense model and differences"
    return Measurement(name, whole, apart, "B", "lower")


def expert_rows(made: Made, table: MacsTable, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """For the log, of each expert: how many training prompts it has, its share of the MACs, what is
    left of each kind of unit, the words that are commonest there against all, and a few prompts."""
    ids = route(made.model.router, prompts, len(prompts)).tolist()
    every = Counter(word for text in prompts for word in _words(text))
    rows = []
    for number, mask in enumerate(made.masks):
        own = [text for text, k in zip(prompts, ids, strict=True) if k == number]
        here = Counter(word for text in own for word in _words(text))
        usual = len(own) / len(prompts)
        lift = {word: count / every[word] / usual for word, count in here.items() if count > 1}
        best = sorted(lift, key=lambda word: (-lift[word], -here[word], word))[:WORDS]
        best = [word for word in best if lift[word] > 1]
        left = Counter[str]()
        for one in table.layout.slices:
            left[one.kind] += int(mask.keep[one.name].sum())
        left["depth"] = sum(int(mask.keep[path]) for path in table.layout.depth)
        rows.append(
            {
                "kind": "expert", "expert": number, "prompts": len(own),
                "macs": float(made.shares[number]), **left, "words": " ".join(best),
                "examples": list(dict.fromkeys(own))[:EXAMPLES],
            }
        )  # fmt: skip
    return rows


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


@torch.no_grad()
def _forward(model: Any, inputs: dict[str, Any]) -> None:
    model(**inputs)
