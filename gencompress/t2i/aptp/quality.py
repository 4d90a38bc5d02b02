"""What experts cost as prompts use them, what they draw, and whom each of them serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gencompress.measure import Measurement
from gencompress.measure.cost import cost_rows, parameters
from gencompress.t2i.aptp.arms import Made
from gencompress.t2i.aptp.cost import MacsTable
from gencompress.t2i.aptp.routed import Routed, how, images, pipeline_of, shares_of
from gencompress.t2i.aptp.router import route
from gencompress.t2i.evaluate import WORD, compare_images, make_images
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_inputs, forward_rows

WORDS, EXAMPLES = 8, 3  # of an expert in the log


def routed_rows(before: Any, after: Routed, data: Inputs) -> list[Measurement]:
    """As `t2i.quality.pipeline_rows`, each row the mean over the held-out prompts of what their
    experts cost; then parameters of all experts together, and the largest part of the prompts that
    one expert gets."""
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
    total = sum(parameters(one) for one in after.experts)
    rows += [
        Measurement("parameters of all experts", parameters(old), total, "parameters", "lower"),
        Measurement("largest share of prompts", None, 100 * float(shares.max()), "%", "lower"),
    ]
    pictures = (
        make_images(before, data.wanted),
        images(after, data.wanted.prompts, data.wanted.seeds, **how(data.wanted)),
    )
    return rows + compare_images(*pictures, data.wanted.prompts, data.judges)


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
