"""Ways to spend the same MACs and steps: APTP, what it leaves out by turns, and one network for all
prompts by a plain score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.allocate import zscore_by_cost
from gencompress.core.budget import Budget
from gencompress.core.mask import Mask
from gencompress.core.progress import Progress, quiet
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.choose import choose, costs
from gencompress.t2i.aptp.cost import MacsTable
from gencompress.t2i.aptp.encoder import encode
from gencompress.t2i.aptp.experts import expert, gate_values
from gencompress.t2i.aptp.learn import Objective, learn
from gencompress.t2i.aptp.routed import Routed, encoder_of, pipeline_of
from gencompress.t2i.aptp.router import Router, route
from gencompress.t2i.aptp.settings import SCORED, Config
from gencompress.t2i.calibrate import Calibration, batches
from gencompress.t2i.data.cache import digest
from gencompress.t2i.distill import Weights
from gencompress.t2i.pipeline import denoiser, with_denoiser
from gencompress.t2i.quality import error_db
from gencompress.t2i.score import scores
from gencompress.t2i.teach import teach
from gencompress.t2i.train import Log

SCORE_BATCHES = 8
ENCODED = 64  # prompts encoded at once


@dataclass(frozen=True, eq=False)
class Made:
    """What an arm ends with."""

    model: Any  # Routed, or a pipeline of one network
    masks: list[Mask]
    loads: Tensor  # int64 [K]: training prompts of each
    shares: Tensor  # float64 [K]: MACs of each, of the dense ones
    shift: float
    log: Log

    @property
    def mean_share(self) -> float:
        weight = self.loads.double() / self.loads.sum()
        return float(weight @ self.shares)


def make(
    pipe: Any,
    seen: Calibration,
    table: MacsTable,
    share: float,
    config: Config,
    arm: str,
    generator: torch.Generator,
    workdir: Path | None,
    progress: Progress = quiet,
    router: Router | None = None,
) -> Made:
    """Runs an arm: "ours" or one of ARMS. All distil for `config.finetune` times `config.experts`
    steps in all, and use `share` of the MACs on average over the training prompts.

    `router`: one that was learnt before, for "ours"; then nothing is learnt, whatever share it was
    learnt for."""
    if arm in SCORED:
        return _scored(pipe, seen, table, share, config, arm, generator, progress)
    num_codes = 1 if arm == "single" else config.experts
    log: Log = []
    if router is None or arm != "ours":
        objective = replace(Objective(), transport=arm != "nearest")
        encoder = encoder_of(pipe, config.encoder)
        embeddings = encode(encoder, seen.prompts, ENCODED)
        inner = None if workdir is None else workdir / "learn"
        predictor, codes, log = learn(
            pipe, seen, embeddings, table, share, num_codes, config.learning, objective, inner,
            generator, run=f"aptp {num_codes} of {config.encoder}", progress=progress,
        )  # fmt: skip
        router = Router(encoder, table.layout, predictor.cpu(), codes.cpu())
    ids = route(router, seen.prompts, ENCODED)
    loads = torch.bincount(ids, minlength=num_codes)
    model, _ = denoiser(pipe)
    masks, shift = choose(
        router.codes.logits, loads, model, table, share, router.relaxation, config.multiple
    )
    steps = config.finetune * config.experts // num_codes
    found = []
    for number, mask in enumerate(masks):
        rows = (ids == number).nonzero().flatten()
        student = expert(model, table.layout, mask)
        if len(rows) and steps:
            progress(f"expert {number + 1} of {num_codes}: {len(rows):,} latents")
            part = _part(seen, rows)
            folder = None if workdir is None else workdir / f"expert-{number}"
            log += _distilled(
                pipe, student, part, config, steps, folder, generator, number, progress
            )
        found.append(student)
    main = int(loads.argmax())
    whole = with_denoiser(pipe, found[main])
    made = Routed(whole, router, tuple(found), main, tuple(masks), model)
    return Made(made, masks, loads, costs(masks, table) / table.total, shift, log)


def routed_error(
    before: Any, after: Routed, seen: Calibration, generator: torch.Generator
) -> float:
    """`quality.error_db` of the experts, each on its own prompts: the mean over prompts, in dB."""
    ids = route(after.router, seen.prompts, ENCODED)
    total = 0.0
    for number in ids.unique().tolist():
        part = _part(seen, (ids == number).nonzero().flatten())
        total += len(part.latents) * error_db(before, pipeline_of(after, number), part, generator)
    return total / len(ids)


def _scored(
    pipe: Any,
    seen: Calibration,
    table: MacsTable,
    share: float,
    config: Config,
    name: str,
    generator: torch.Generator,
    progress: Progress,
) -> Made:
    """One network: the units of the layout that score best within the MACs, z-scores by layer."""
    model, _ = denoiser(pipe)
    groups = [g for g in gates.units(model, table.layout) if g.kind != "block"]
    chosen = batches(seen, pipe, SCORE_BATCHES, config.batch, generator)
    found = scores(model, groups, name, chosen, generator, progress=progress)
    ends = dict(zip((one.name for one in table.layout.slices), table.layout.offsets, strict=True))
    priced = [
        replace(g, cost=table.entries[ends[g.name] : ends[g.name] + g.cost.numel()]) for g in groups
    ]
    inside = float(sum(g.cost.sum() for g in priced))
    left = share * table.total - (table.total - inside)
    if left <= 0:
        raise ValueError(f"baseline {name}: {share:g} of the MACs is less than what has no score")
    inner = zscore_by_cost(found, priced, Budget(left, "macs", floor=1))
    depth = {path: torch.ones(1, dtype=torch.bool) for path in table.layout.depth}
    mask = Mask({**inner.keep, **depth})
    student = expert(model, table.layout, mask)
    steps = config.finetune * config.experts
    log = (
        _distilled(pipe, student, seen, config, steps, None, generator, 0, progress)
        if steps
        else []
    )
    used = table.current(gate_values(mask, table.layout)) / table.total
    loads = torch.tensor([len(seen.prompts)])
    return Made(with_denoiser(pipe, student), [mask], loads, used[None].cpu(), 0.0, log)


def _distilled(
    pipe: Any,
    student: Any,
    seen: Calibration,
    config: Config,
    steps: int,
    folder: Path | None,
    generator: torch.Generator,
    number: int,
    progress: Progress,
) -> Log:
    weights = Weights(config.denoise, config.output, config.blocks)
    how = replace(config.tuning, steps=steps, warmup=steps // 10)
    cut = digest([], student.state_dict().items())[:16]  # another router cuts another expert
    run = f"aptp expert {number} of {config.experts}, cut {cut}, {weights}"
    log = teach(pipe, student, seen, how, weights, folder, generator, run, progress)
    return [{**row, "series": f"expert {number}"} for row in log]


def _part(seen: Calibration, rows: Tensor) -> Calibration:
    return replace(
        seen,
        latents=seen.latents[rows],
        rows={name: row[rows] for name, row in seen.rows.items()},
        prompts=tuple(seen.prompts[i] for i in rows.tolist()),
    )
