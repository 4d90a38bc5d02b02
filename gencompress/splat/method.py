"""Splat compression: score or merge, allocate, cut, make up for the loss.

The default merges and removes splats by measured picture error (`merge.py`); any criterion of
`score.py` prunes plainly instead. Both can be corrected afterwards (`correct.py`). Pictures come
from a rig around the scene or from the cameras of a capture; those that measure never score.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.allocate import Budget, top
from gencompress.core.mask import Compressed, Mask, cut
from gencompress.core.units import Scores, Slice, Units
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, rows, tensors, with_tensors
from gencompress.splat.correct import Picture, correct, pictures
from gencompress.splat.formats import FORMATS, read_splats, sniff, suffix_format, write_splats
from gencompress.splat.merge import Simplified, simplify, start
from gencompress.splat.score import FROM_CLOUD, SCORES, scores
from gencompress.views.camera import Camera
from gencompress.views.loaders import load_views
from gencompress.views.rig import scene_rig, split_rig

Progress = Callable[[str], None]
GROUP = "splats"
MERGE = "merge"
SMALLEST_CURVE = 1e-4


def quiet(text: str) -> None:
    """Progress nobody reads."""


@dataclass(frozen=True)
class Config:
    """Settings of `compress splat`."""

    score: str = MERGE  # merge, or one of SCORES: plain pruning
    correct: bool = True  # adjust opacities and colours to the pictures afterwards
    num_views: int = 24  # pictures that score; as many others measure
    size: int = 512  # px, side of the rig's pictures
    up: tuple[float, ...] = (0.0, -1.0, 0.0)  # world direction that points up
    min_psnr: float = 0.0  # dB; above 0: the smallest result that holds it, whatever the budget
    compare: tuple[str, ...] = ()  # scores to measure beside, "all" for every one
    curve: tuple[float, ...] = ()  # shares in (0, 1] of the splats to measure too
    format: str = "same"  # of the result: same as the input, or a suffix such as .ply

    def __post_init__(self) -> None:
        known = (MERGE, *SCORES)
        for name in (self.score, *(n for n in self.compare if n != "all")):
            if name not in known:
                raise ValueError(f"score {name!r}: known are {', '.join(known)}")
        if not (1 <= self.num_views <= 1000 and 16 <= self.size <= 4096):
            raise ValueError("num_views is 1 to 1000 and size 16 to 4096 px")
        if not 0 <= self.min_psnr <= quality.IDENTICAL:
            raise ValueError(f"min_psnr = {self.min_psnr:g}: 0 to {quality.IDENTICAL:g} dB")
        if len(self.up) != 3 or not any(self.up):
            raise ValueError(f"up = {self.up}: expected three numbers, not all zero")
        if any(not SMALLEST_CURVE <= share <= 1 for share in self.curve):
            raise ValueError(f"curve = {self.curve}: shares of the splats, above 0 and at most 1")
        if self.format != "same" and suffix_format("x" + self.format) is None:
            raise ValueError(f"format {self.format!r}: same, or one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Views:
    """Cameras, and what kind of file the scene came from."""

    score: list[Camera]
    test: list[Camera]
    suffix: str  # of the target


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[SplatCloud, Views]:
    """Reads a splat file, and cameras from `data["views"]` or from a rig around the scene.

    Raises:
        FormatError: a file is not what it should be, or no camera sees the scene.
        ValueError: a dtype, device or name of data that splats do not know.
    """
    unknown = data.keys() - {"views"}
    if unknown:
        raise ValueError(f"data {', '.join(sorted(unknown))}: splats know only views")
    if dtype != "float32":
        raise ValueError(f"dtype {dtype}: splats are float32")
    if device != "cpu":
        raise ValueError(f"device {device}: splats have no GPU backend yet; use cpu")
    path = Path(target)
    cloud = read_splats(path, strict=strict)
    kind = sniff(path)  # by content: a compressed .ply may be called just .ply
    suffix = next(s for s, k in FORMATS.items() if k == kind)
    if "views" in data:
        cameras = load_views(data["views"])
        if len(cameras) < 2:
            raise FormatError(data["views"], "one view; two at least, to score and to measure")
        score_views, test_views = split_rig(cameras, every=min(8, len(cameras)))
        score_views = thin(score_views, config.num_views)
        test_views = thin(test_views, config.num_views)
    else:
        score_views, test_views = scene_rig(
            *quality.outline(cloud),
            num_score=config.num_views,
            num_test=config.num_views,
            width=config.size,
            height=config.size,
            up=config.up,
        )
    return cloud, Views(score_views, test_views, suffix)


def score(
    cloud: SplatCloud, data: Views, config: Config, generator: torch.Generator
) -> tuple[list[Units], Scores]:
    """Every splat is a unit. Merging is scored by the removal error it starts from."""
    name = "removal_error" if config.score == MERGE else config.score
    found = scores([name], cloud, data.score, generator)[name]
    if name not in (*FROM_CLOUD, "random") and not bool((found > 0).any()):
        raise ValueError(
            "no splat shows in any of the scoring views; do the cameras fit the scene?"
        )
    return units(cloud), {GROUP: found}


def units(cloud: SplatCloud) -> list[Units]:
    """One group; a splat owns its row of every field and costs one unit."""
    owns = tuple(Slice(name) for name in tensors(cloud))
    return [Units(GROUP, "splat", torch.ones(len(cloud), dtype=torch.float64), owns)]


@contextlib.contextmanager
def apply(cloud: SplatCloud, masks: dict[str, Mask]) -> Iterator[SplatCloud]:
    """The same rows, with the opacity of removed splats so low that they touch no pixel."""
    keep = masks["main"].keep[GROUP]
    hidden = torch.where(keep, cloud.opacities, torch.full_like(cloud.opacities, -100.0))
    yield with_tensors(cloud, {"opacities": hidden})


def compact(cloud: SplatCloud, masks: dict[str, Mask]) -> SplatCloud:
    """Only the kept rows, in order."""
    return with_tensors(cloud, cut(tensors(cloud), units(cloud), masks["main"]))


def compress(
    cloud: SplatCloud,
    data: Views,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Fewer splats within the budget; see the module. `masks["main"]` names the originals that
    the rows of the result descend from, in order. `workdir` is not needed: nothing is resumed."""
    suffix = _suffix(data, config)
    if cloud.scales.shape[1] == 2 and suffix != ".ply":
        raise ValueError(f"{suffix} holds no 2DGS surfels; only .ply does")
    progress("scoring")
    _, found = score(cloud, data, config, generator)
    wanted = pictures(cloud, data.score) if config.correct else []
    began = time.perf_counter()
    if config.min_psnr > 0:
        smaller, kept = _holding(cloud, found, data, config, suffix, wanted, progress)
    else:
        target = count_within(cloud, found[GROUP], budget, suffix)
        smaller, kept = _reduce(cloud, found, target, data, config, wanted, progress)
        limit = _bytes_limit(cloud, budget, suffix)
        while limit is not None and (size := quality.encoded_bytes(smaller, suffix)) > limit:
            target = _allowed(min(target - 1, int(target * limit / size)), len(cloud), budget)
            smaller, kept = _reduce(cloud, found, target, data, config, wanted, progress)
    log = [
        {
            "kind": "event",
            "event": "compressed",
            "score": config.score,
            "splats_before": len(cloud),
            "splats_after": len(smaller),
            "seconds": time.perf_counter() - began,
        }
    ]
    keep = torch.zeros(len(cloud), dtype=torch.bool)
    keep[kept] = True
    return Compressed(smaller, {"main": Mask({GROUP: keep})}, found, log)


def _reduce(
    cloud: SplatCloud,
    found: Scores,
    target: int,
    data: Views,
    config: Config,
    wanted: Sequence[Picture],
    progress: Progress,
    way: list[Simplified] | None = None,
) -> tuple[SplatCloud, Tensor]:
    """`target` splats, and the index of the original each row descends from.

    `way` holds clouds already merged for larger targets: merging goes on from the smallest of
    those that are large enough, and the new one is added.
    """
    if config.score == MERGE:
        way = [start(cloud)] if way is None else way
        nearest = min((s for s in way if len(s.kept) >= target), key=lambda s: len(s.kept))
        state = simplify(
            nearest, target, data.score, progress=lambda n: progress(f"merging: {n:,} left")
        )
        way.append(state)
        smaller, kept = state.cloud, state.kept
    else:
        mask = top(found, count=target)
        smaller, kept = compact(cloud, {"main": mask}), mask.keep[GROUP].nonzero().squeeze(1)
    if config.correct and len(smaller) < len(cloud):
        progress("correcting opacity and colour")
        smaller = correct(smaller, wanted)
    return smaller, kept


def _holding(
    cloud: SplatCloud,
    found: Scores,
    data: Views,
    config: Config,
    suffix: str,
    wanted: Sequence[Picture],
    progress: Progress,
) -> tuple[SplatCloud, Tensor]:
    """The smallest result whose mean held-out PSNR, as saved, is at least `min_psnr`, to 2% of its
    count, by bisection over stored scores and stored clouds. Raises ValueError if none holds it."""
    truth = quality.truth(cloud, data.test)
    psnr = quality.compare(quality.as_saved(cloud, suffix), truth).psnr
    if psnr < config.min_psnr:
        raise ValueError(f"min_psnr {config.min_psnr:g}: as {suffix} all splats give {psnr:.2f} dB")
    way = [start(cloud)]
    low, high, best = 0, len(cloud), (cloud, torch.arange(len(cloud)))
    while high - low > max(1, 0.02 * high):
        middle = max(low + 1, int((low * high) ** 0.5) if low else high // 3)
        tried = _reduce(cloud, found, middle, data, config, wanted, progress, way)
        psnr = quality.compare(quality.as_saved(tried[0], suffix), truth).psnr
        progress(f"holding: {middle:,} splats give {psnr:.2f} dB")
        if psnr >= config.min_psnr:
            high, best = middle, tried
        else:
            low = middle
    return best


def count_within(cloud: SplatCloud, found: Tensor, budget: Budget, suffix: str) -> int:
    """How many splats the budget leaves, at least one.

    Bytes are those of the best-scored splats as a file with this suffix: exact for formats of a
    fixed size a splat, a first estimate for .spz and .sog.

    Raises ValueError for a unit splats do not have, and for a budget below one splat.
    """
    num = len(cloud)
    if budget.unit == "units":
        count = int(budget.amount * num + 1e-9) if budget.relative else int(budget.amount)
    elif budget.unit == "bytes":
        limit = _bytes_limit(cloud, budget, suffix)
        order = found.argsort(descending=True, stable=True)
        count = _largest_within(
            num, limit, lambda n: quality.encoded_bytes(rows(cloud, order[:n]), suffix)
        )
    else:
        raise ValueError(f"a budget in {budget.unit}: splats are counted, or weighed in bytes")
    return _allowed(count, num, budget)


def _suffix(data: Views, config: Config) -> str:
    return data.suffix if config.format == "same" else config.format


def _allowed(count: int, num: int, budget: Budget) -> int:
    """The largest number up to `count` that cap and round_to allow; ValueError below the floor."""
    count = min(count, num, budget.cap or num)
    if count < num:
        count -= count % budget.round_to
    least = max(1, min(budget.floor, num))
    if count < least:
        raise ValueError(f"the budget leaves {count} of {num} splats, expected at least {least}")
    return count


def _largest_within(num: int, limit: float, size: Callable[[int], int]) -> int:
    """The largest count whose size is within the limit, to 1% for sizes that are not a line."""
    low, high = 1, num
    low_size, high_size = size(1), size(num)
    if high_size <= limit:
        return num
    if low_size > limit:
        raise ValueError(f"a budget of {limit:.0f} bytes does not hold one splat ({low_size})")
    for _ in range(10):
        if high - low <= 1:
            break
        guess = low + int((limit - low_size) / (high_size - low_size) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        at = size(guess)
        if at <= limit:
            low, low_size = guess, at
        else:
            high, high_size = guess, at
    return low


def _bytes_limit(cloud: SplatCloud, budget: Budget, suffix: str) -> float | None:
    if budget.unit != "bytes":
        return None
    if not budget.relative:
        return budget.amount
    return budget.amount * quality.encoded_bytes(cloud, suffix)


def compare(
    cloud: SplatCloud,
    result: Compressed,
    data: Views,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """Points of quality against size for the report: each of `config.compare` beside the score
    that was used, at the shares of `config.curve` and at that of the result. Empty if neither is
    asked for. Other scores are shown as they are, without the correction."""
    if not config.compare and not config.curve:
        return []
    smaller = result.model
    shares = sorted({*config.curve, len(smaller) / len(cloud)}, reverse=True)
    truth = quality.truth(cloud, data.test)
    wanted = pictures(cloud, data.score) if config.correct else []
    names = [config.score, *config.compare]
    if "all" in names:
        names = [config.score, MERGE, *SCORES]
    names = list(dict.fromkeys(names))
    plain = scores([n for n in names if n != MERGE], cloud, data.score, generator)
    points = []
    for name in names:
        own = replace(config, score=name, correct=config.correct and name == config.score)
        way = [start(cloud)]
        for share in shares:
            count = max(1, round(share * len(cloud)))
            progress(f"curve: {name} at {share:.0%}")
            began = time.perf_counter()
            if name == config.score and count == len(smaller):
                tried = smaller
            else:
                score_of = {GROUP: plain[name]} if name in plain else {}
                tried, _ = _reduce(cloud, score_of, count, data, own, wanted, quiet, way)
            found = quality.compare(tried, truth)
            points.append(
                {
                    "kind": "curve",
                    "series": f"{name} + correction" if own.correct else name,
                    "x": 100 * count / len(cloud),
                    "x_name": "splats kept",
                    "x_unit": "%",
                    "y": found.psnr,
                    "y_name": "PSNR",
                    "y_unit": "dB",
                    "worst": found.worst,
                    "count": count,
                    "seconds": time.perf_counter() - began,
                    "chosen": tried is smaller,
                }
            )
    return points


def predict(cloud: SplatCloud, data: Views, budget: Budget, config: Config) -> dict[str, int]:
    """What `compress` would deliver: count of splats and bytes of the file, without merging."""
    suffix = _suffix(data, config)
    found = scores(["opacity_volume"], cloud, [], torch.Generator())["opacity_volume"]
    count = count_within(cloud, found, budget, suffix)
    smaller = compact(cloud, {"main": top({GROUP: found}, count=count)})
    return {"splats": count, "bytes": quality.encoded_bytes(smaller, suffix)}


def measure(before: SplatCloud, after: SplatCloud, data: Views) -> list[Measurement]:
    """Counts, fidelity to the input on the held-out views, and time of a picture."""
    truth = quality.truth(before, data.test)
    found = quality.compare(after, truth)
    many = len(data.test)
    times = [quality.render_time(cloud, data.test) for cloud in (before, after)]
    return [
        Measurement("splats", len(before), len(after), "splats", "lower"),
        Measurement("PSNR", None, found.psnr, "dB", "higher", 2 * many, found.psnr_spread),
        Measurement("PSNR, worst view", None, found.worst, "dB", "higher", 2 * many),
        *(
            Measurement(
                name, None, statistics.fmean(values), "", "higher" if name == "SSIM" else "lower",
                many, statistics.stdev(values) if many > 1 else None,
            )
            for name, values in quality.similarity(after, truth).items()
        ),
        Measurement(
            "render time", times[0].median, times[1].median, "s", "lower",
            times[1].repeats, times[1].spread,
        ),
    ]  # fmt: skip


def save(result: Compressed, folder: Path, config: Config, data: Views) -> Path:
    """Writes `folder/scene.<format>`."""
    suffix = _suffix(data, config)
    path = folder / quality.file_name(suffix)
    write_splats(path, result.model)
    return path


def restore(folder: Path) -> SplatCloud:
    """The cloud that `save` wrote."""
    found = [p for p in Path(folder).rglob("*") if p.is_file() and suffix_format(p)]
    if len(found) != 1:
        raise FormatError(folder, f"holds {len(found)} splat files, expected one")
    return read_splats(found[0])


def preview(before: SplatCloud, after: SplatCloud, data: Views, folder: Path) -> None:
    """Pictures of both and of their difference, and both clouds for the interactive view."""
    quality.write_preview(before, after, data.test, folder)


def sample(cloud: SplatCloud, data: Views, folder: Path) -> list[Path]:
    """A picture of each held-out view, as PNG."""
    return quality.write_pictures(cloud, data.test, folder)


def thin(cameras: Sequence[Camera], most: int) -> list[Camera]:
    """At most `most` of them, evenly spread over the list."""
    if len(cameras) <= most:
        return list(cameras)
    return [cameras[i * len(cameras) // most] for i in range(most)]
