"""What OptiPrune costs and what its pictures show, beside the plain pipeline and other arms."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.measure.agreement import all_found
from gencompress.measure.encoders import Encoder, encode_images
from gencompress.measure.estimate import bootstrap
from gencompress.t2i.evaluate import EvaluationSet, compare_images, make_images, subjects
from gencompress.t2i.optiprune.arms import draw_arm
from gencompress.t2i.optiprune.maps import first_maps, write_maps
from gencompress.t2i.optiprune.price import macs_of
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.session import Passes
from gencompress.t2i.optiprune.settings import Config, OptiPruned, switched_on
from gencompress.t2i.optiprune.sites import largest_grid
from gencompress.t2i.optiprune.subjects import Subject
from gencompress.t2i.pictures import shown, write_index, write_pair
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_rows
from gencompress.t2i.sample import default_size


@dataclass(frozen=True, eq=False)
class Asked:
    """What a run works with beside the pipeline."""

    wanted: EvaluationSet
    subjects: tuple[tuple[Subject, ...], ...]  # of its prompts
    judges: tuple[Encoder, ...]
    place: str  # where the pipeline is, see `settings.place_of`
    skipped: int  # prompts of the data without subjects
    drawn: list[Pair]  # the last, for who asks again

    @property
    def two(self) -> list[int]:
        """The pictures whose prompts name two of the detector's labels."""
        labels = next((one.labels for one in self.judges if one.kind == "detector"), ())
        named = [subjects(prompt, labels) for prompt in self.wanted.prompts]
        return [i for i, names in enumerate(named) if len(names) == 2]


@dataclass(frozen=True, eq=False)
class Pair:
    """Pictures of one evaluation set without and with OptiPrune, and what they took."""

    pipes: tuple[Any, Any]  # (the plain pipeline, what `apply` takes)
    images: tuple[Tensor, Tensor]
    seconds: float  # a picture, without
    passes: float  # of the denoiser for a picture, without
    rows: list[dict[str, Any]]  # of the session
    starts: Tensor | None  # noise before and after; None where it is not optimised
    latents: Tensor | None


def pair(before: Any, after: OptiPruned, data: Asked, progress: Progress = quiet) -> Pair:
    """Drawn once for the same two."""
    for one in data.drawn:
        if one.pipes == (before, after):
            return one
    count, batch = len(data.wanted.prompts), after.config.batch
    passes = Passes()
    began = time.perf_counter()
    with passes.counted(denoiser(before)[0]):
        old = make_images(before, data.wanted, batch, progress)
    seconds = time.perf_counter() - began
    with switched_on(after, progress) as pipe:
        session = pipe.optiprune
        new = make_images(pipe, data.wanted, batch, progress)
    noise = session.noise
    found = Pair(
        (before, after),
        (old, new),
        seconds / count,
        passes.count / count,
        session.rows,
        torch.cat([one.starts for one in noise]) if noise else None,
        torch.cat([one.latents for one in noise]) if noise else None,
    )
    data.drawn[:] = [found]
    return found


def rows(
    before: Any,
    after: OptiPruned,
    data: Asked,
    prune: PruneConfig | None,
    progress: Progress = quiet,
) -> list[Measurement]:
    """Time and passes of a picture, MACs, time and memory of a forward, the scores of the noise,
    and all that the pictures tell with the judges (t2i/evaluate.py)."""
    size = data.wanted.size or default_size(before)
    both = pair(before, after, data, progress)
    count = len(data.wanted.prompts)
    calls = [row for row in both.rows if row["kind"] == "pictures"]
    search, sampling = (
        sum(row[f"{phase}_seconds"] for row in calls) / count for phase in ("search", "sampling")
    )
    passes = sum(row["passes"] * row["pictures"] for row in calls) / count
    tokens = math.prod(largest_grid(before, size, size))
    kept = tokens - math.floor(after.ratio * tokens)
    found = [
        Measurement("time of a picture", both.seconds, search + sampling, "s", "lower"),
        Measurement("time of a picture, search of noise", None, search, "s", "lower"),
        Measurement("time of a picture, sampling", both.seconds, sampling, "s", "lower"),
        Measurement("denoiser passes a picture", both.passes, passes, "", "lower"),
        Measurement("tokens of the largest layers", tokens, kept, "tokens", "lower"),
        Measurement(
            "MACs per forward", macs_of(before, size, None), macs_of(before, size, prune), "MACs",
            "lower",
        ),
    ]  # fmt: skip
    if after.saving is not None:
        name = "time of a forward saved by pruning, forecast"
        found.append(Measurement(name, None, after.saving, "s", "higher"))
    if prune is None:
        found += forward_rows(before, after.pipe, size)
    else:
        with pruned(after.pipe, prune, bypass="never"):
            found += forward_rows(before, after.pipe, size)
    noise = [row for row in both.rows if row["kind"] == "noise"]
    if noise:
        starts, ends = (sum(row[name] for row in noise) / count for name in ("start", "score"))
        valid = 100 * sum(row["valid"] for row in noise) / count
        name = "noise score (S_cross + S_self)"
        found += [
            Measurement(name, starts, ends, "", "lower", count),
            Measurement("valid noise", None, valid, "%", "higher", count),
        ]
    return found + compare_images(*both.images, data.wanted.prompts, data.judges, progress)


def check_judged(data: Asked) -> None:
    """Raises ValueError where nothing says which subjects a picture shows."""
    if not any(judge.kind == "detector" for judge in data.judges):
        raise ValueError("compare: no detector among the judges, which counts the subjects shown")
    if len(data.two) < 2:
        raise ValueError(
            f"compare: {len(data.two)} of {len(data.wanted.prompts)} pictures are of prompts that "
            "name two things that the detector knows; expected 2 or more"
        )


def arm_rows(
    pipe: Any,
    data: Asked,
    config: Config,
    prune: PruneConfig | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Of each arm, the share of pictures that show both subjects (with its 95% interval), against
    passes of the denoiser and seconds, both a picture."""
    (detector,) = [judge for judge in data.judges if judge.kind == "detector"]
    prompts = [data.wanted.prompts[i] for i in data.two]
    named = [subjects(prompt, detector.labels) for prompt in prompts]
    found = []
    for name in config.compare:
        drawn = draw_arm(
            pipe, name, prompts, [data.subjects[i] for i in data.two],
            [data.wanted.seeds[i] for i in data.two], steps=config.steps,
            guidance=config.guidance, size=data.wanted.size, prune=prune,
            noise=config.noise_config(), progress=progress,
        )  # fmt: skip
        seen = all_found(encode_images(detector, drawn.images), detector.labels, named)
        rate = bootstrap(100 * seen.double(), name, torch.Generator().manual_seed(0))
        seconds = drawn.seconds / len(prompts)
        found.append(
            {"kind": "arm", "arm": name, "pictures": len(prompts), "both shown, %": rate.value,
             "low": rate.low, "high": rate.high, "passes": drawn.passes, "seconds": seconds}
        )  # fmt: skip
        axes = (drawn.passes, "denoiser passes a picture", ""), (seconds, "time of a picture", "s")
        found += [
            {"kind": "curve", "series": name, "x": x, "x_name": x_name, "x_unit": unit,
             "y": rate.value, "y_name": f"both subjects shown ({detector.name})", "y_unit": "%"}
            for x, x_name, unit in axes
        ]  # fmt: skip
    return found


def write_preview(
    before: Any, after: OptiPruned, data: Asked, folder: Path, progress: Progress = quiet
) -> list[dict[str, Any]]:
    """Sheets without and with, and the attention to each subject over these pictures; what the
    session noted."""
    both, few = pair(before, after, data, progress), shown(data.wanted)
    count = len(few.prompts)
    old, new = (images[:count] for images in both.images)
    start = "both from the same noise"
    if both.starts is not None:
        start = "the same noise before it is optimised"
    views = write_pair(old, new, few, folder, "pictures without and with", start)
    if both.starts is not None and both.latents is not None:
        size = few.size or default_size(before)
        named = data.subjects[:count]
        maps = {
            name: first_maps(
                before,
                few.prompts,
                named,
                latents[:count],
                steps=few.steps,
                size=size,
                peaks=after.config.peaks,
            )
            for name, latents in (("before", both.starts), ("after", both.latents))
        }
        views += write_maps(
            {"before": old, "after": new}, maps, few.prompts, named, folder, after.config.peaks
        )
    write_index(views, folder)
    return both.rows
