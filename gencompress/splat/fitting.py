"""`fit splat`: splats from posed photos, with density control inside the training.

Offers what a method offers, so the same loop in `run.py` runs it; the model that goes in is the
cloud that training starts from.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from gencompress.core.allocate import Budget
from gencompress.core.mask import Compressed
from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError
from gencompress.measure import Measurement
from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, rows, with_tensors
from gencompress.splat.density import POLICIES, Policy, scaled
from gencompress.splat.formats import FORMATS, suffix_format, write_splats
from gencompress.splat.initial import MCMC, USUAL, at_random, extent, from_points
from gencompress.splat.method import restore
from gencompress.splat.render import render
from gencompress.splat.score import look
from gencompress.splat.state import start, to_cloud
from gencompress.splat.train import Training, from_photo, train
from gencompress.views.bounds import focus
from gencompress.views.fit import Checkpoint
from gencompress.views.loaders import load_points
from gencompress.views.photos import Photo, load_capture

__all__ = [
    "Config", "compare", "compress", "load", "measure", "predict", "preview", "restore", "sample",
    "save",
]  # fmt: skip

NO_POLICY = "none"
REGULARISED = 0.01  # opacity and scale in the loss with relocation (Kheradmand et al. 2024)
SURFEL_CULL = 0.05  # opacity below which the default policy removes surfels (2DGS)


@dataclass(frozen=True)
class Config:
    """Settings of `fit splat`."""

    steps: int = 3000
    policy: str = "percentile"  # percentile, default, mcmc; none keeps the splats it starts with
    density: tuple[str, ...] = ()  # settings of the policy as name=value, for a run of 30,000 steps
    surfels: bool = False  # 2DGS: flat splats, with normals
    degree: int = 3  # of the harmonics
    batch: int = 1  # photos a step
    background: str = "auto"  # black, white, random; auto: random where photos have alpha
    ssim: float = 0.2  # share of 1 - SSIM in the loss
    alpha: float = 0.1  # weight of the alpha error, where photos have alpha
    normal: float = 0.05  # surfels: weight of normals against those of the depth
    distortion: float = 0.0  # surfels: weight of the spread of depths along a ray
    points: int = 20_000  # splats to start with at random, for a capture without points
    hold_out: int = 8  # every so manyth photo measures and is not trained on
    images: str = ""  # folder of the photos of a COLMAP model, say images_4
    checkpoint_every: int = 500  # steps
    format: str = ".ply"  # of the result

    def __post_init__(self) -> None:
        if self.policy not in (*POLICIES, NO_POLICY):
            known = ", ".join((*POLICIES, NO_POLICY))
            raise ValueError(f"policy {self.policy!r}: known are {known}")
        if self.density and self.policy == NO_POLICY:
            raise ValueError("density settings, and the policy is none")
        if self.points < 2 or self.hold_out < 2 or self.checkpoint_every < 1:
            raise ValueError("points and hold_out are 2 or more, checkpoint_every 1 or more")
        if self.format == "same" or suffix_format("x" + self.format) is None:
            raise ValueError(f"format {self.format!r}: one of {', '.join(FORMATS)}")
        if self.surfels and self.format != ".ply":
            raise ValueError(f"{self.format} holds no 2DGS surfels; only .ply does")
        training(self, False)
        policy(self, 0)


@dataclass(frozen=True)
class Capture:
    """Photos to fit, photos that measure, and the size of the scene."""

    train: list[Photo]
    test: list[Photo]
    extent: float  # world units


def training(config: Config, has_alpha: bool) -> Training:
    """How the trainer shall fit."""
    relocation = config.policy == "mcmc"
    background = config.background
    if background == "auto":
        background = "random" if has_alpha else "black"
    return Training(
        steps=config.steps,
        batch=config.batch,
        degree=config.degree,
        background=background,
        ssim=config.ssim,
        alpha=config.alpha if has_alpha else 0.0,
        normal=config.normal if config.surfels else 0.0,
        distortion=config.distortion if config.surfels else 0.0,
        opacity=REGULARISED if relocation else 0.0,
        scale=REGULARISED if relocation else 0.0,
    )


def policy(config: Config, target: int) -> Policy | None:
    """The density policy for a run of this length that ends at `target` splats (0: no budget)."""
    if config.policy == NO_POLICY:
        return None
    kind = POLICIES[config.policy]
    chosen = dict(_setting(kind, text) for text in config.density)
    if config.policy == "default" and config.surfels:
        chosen.setdefault("prune_opacity", SURFEL_CULL)
    if config.policy == "mcmc":  # its noise follows the rates of the trainer
        chosen.setdefault("rate", kind.rate * math.sqrt(config.batch))
        chosen.setdefault("last_rate", kind.last_rate * math.sqrt(config.batch))
    if target and config.policy == "mcmc":
        chosen["cap"] = target
    elif target and config.policy == "percentile":
        chosen["target"] = target
        # what a budget takes away it takes where growth adds, so the count does not swing between
        chosen.setdefault("prune_offset", 0)
        chosen.setdefault("min_count", min(target, kind.min_count))
    return scaled(kind(**chosen), config.steps)


def load(
    target: str, data: dict[str, str], device: str, dtype: str, config: Config, strict: bool = False
) -> tuple[SplatCloud, Capture]:
    """Reads a capture, and makes the splats to start with: on its points, else at random.

    Raises:
        FormatError: the capture is not what it should be, or has fewer than two views.
        ValueError: a dtype, device or name of data that splats do not know.
    """
    if data:
        raise ValueError(f"data {', '.join(sorted(data))}: fitting takes the capture alone")
    if dtype != "float32" or device != "cpu":
        raise ValueError(f"{dtype} on {device}: splats are float32, and on the cpu for now")
    train, test = load_capture(target, images=config.images or None, every=config.hold_out)
    cameras = [photo.camera for photo in train]
    preset = MCMC if config.policy == "mcmc" else USUAL
    found = load_points(target)
    if found is not None and len(found[0]) > 1:
        cloud = from_points(*found, config.degree, preset)
    else:
        centre, radius = focus(cameras)
        generator = torch.Generator().manual_seed(0)
        cloud = at_random(config.points, centre, radius, config.degree, generator, preset)
    if config.surfels:
        turns = torch.randn(len(cloud), 4, generator=torch.Generator().manual_seed(0))
        flat = {"scales": cloud.scales[:, :2].contiguous(), "quats": turns}
        cloud = with_tensors(cloud, flat)
    if not any(bool((render(cloud, camera).alphas > 0).any()) for camera in cameras):
        raise FormatError(target, "none of its cameras sees any of its points")
    return cloud, Capture(train, test, extent(cameras))


def compress(
    cloud: SplatCloud,
    data: Capture,
    budget: Budget,
    config: Config,
    generator: torch.Generator,
    workdir: Path,
    progress: Progress = quiet,
) -> Compressed:
    """Fits the cloud to the photos; resumes from `workdir` where an equal run was stopped there."""
    target = _target(cloud, budget, config)
    state = start(cloud, data.extent)
    how = training(config, any(photo.alpha is not None for photo in data.train))
    log = train(
        state,
        [from_photo(photo) for photo in data.train],
        how,
        policy(config, target),
        generator,
        checkpoint=Checkpoint(
            workdir / "fit.safetensors",
            f"{config} {budget} seed {generator.initial_seed()}, {len(data.train)} photos",
            config.checkpoint_every,
        ),
        progress=progress,
    )
    fitted = _within(to_cloud(state), data, budget, config)
    return Compressed(fitted, {}, {}, log)


def compare(
    before: SplatCloud,
    result: Compressed,
    data: Capture,
    config: Config,
    generator: torch.Generator,
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """The number of splats along the run, for the report."""
    counts = [(0, len(before))]
    counts += [(row["step"], row["splats"]) for row in result.log if row["kind"] == "density"]
    counts.append((config.steps, len(result.model)))
    return [
        {
            "kind": "curve", "series": config.policy, "x": step, "x_name": "step", "x_unit": "",
            "y": count, "y_name": "splats", "y_unit": "",
        }
        for step, count in counts
    ]  # fmt: skip


def predict(cloud: SplatCloud, data: Capture, budget: Budget, config: Config) -> dict[str, int]:
    """What is known before training: photos, and the splats it starts and may end with."""
    found = {"photos": len(data.train), "held out": len(data.test), "splats at first": len(cloud)}
    target = _target(cloud, budget, config)
    return found | ({"splats": target} if target else {})


def measure(
    before: SplatCloud, after: SplatCloud, data: Capture, progress: Progress = quiet
) -> list[Measurement]:
    """Against the held-out photos, and the time of a picture."""
    truth = quality.photo_truth(data.test)
    found = quality.compare(after, truth)
    timing = quality.render_time(after, [photo.camera for photo in data.test])
    many = len(data.test)
    return [
        Measurement("splats", None, len(after), "splats", "lower"),
        Measurement("PSNR", None, found.psnr, "dB", "higher", many, found.psnr_spread),
        Measurement("PSNR, worst view", None, found.worst, "dB", "higher", many),
        *quality.similarity_rows(after, truth),
        Measurement(
            "render time", None, timing.median, "s", "lower", timing.repeats, timing.spread
        ),
    ]  # fmt: skip


def save(result: Compressed, folder: Path, config: Config, data: Capture) -> Path:
    """Writes `folder/scene.<format>`."""
    path = folder / quality.file_name(config.format)
    write_splats(path, result.model)
    return path


def preview(
    before: SplatCloud,
    after: SplatCloud,
    result: Compressed,
    data: Capture,
    folder: Path,
    progress: Progress = quiet,
) -> None:
    """Held-out photos beside what the splats show there, and the cloud for the viewer."""
    quality.write_photo_preview(after, data.test, folder)


def sample(cloud: SplatCloud, data: Capture, folder: Path) -> list[Path]:
    """A picture of each held-out view, as PNG."""
    return quality.write_pictures(cloud, [photo.camera for photo in data.test], folder)


def _setting(kind: type, text: str) -> tuple[str, Any]:
    """("theta", 0.8) of "theta=0.8"; ValueError for a name or a kind of value it does not have."""
    name, equals, value = (part.strip() for part in text.partition("="))
    defaults = {field.name: field.default for field in fields(kind)}
    if not equals or name not in defaults:
        known = ", ".join(defaults)
        raise ValueError(f"density {text!r}: expected name=value, with a name of {known}")
    if isinstance(defaults[name], str):
        return name, value
    try:
        found = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    except (ValueError, SyntaxError):
        found = None
    wanted = type(defaults[name])
    if wanted is float and type(found) is int:
        found = float(found)
    if type(found) is not wanted:
        raise ValueError(f"density {text!r}: expected {wanted.__name__}")
    return name, found


def _target(cloud: SplatCloud, budget: Budget, config: Config) -> int:
    """Splats a budget asks for, 0 for none. Bytes are those of splats as they start."""
    if budget.relative:
        if budget.amount != 1:
            raise ValueError("fit: a share of what? give a number of splats, or bytes")
        return 0
    if config.policy not in ("percentile", "mcmc"):
        raise ValueError(f"fit: the policy {config.policy} holds no budget; percentile and mcmc do")
    if budget.unit == "units":
        target = int(budget.amount)
    elif budget.unit == "bytes":
        one, all_ = (
            quality.encoded_bytes(some, config.format) for some in (rows(cloud, slice(1)), cloud)
        )
        each = max((all_ - one) / max(len(cloud) - 1, 1), 1e-9)
        target = 1 + int((budget.amount - one) / each)
    else:
        raise ValueError(f"a budget in {budget.unit}: splats are counted, or weighed in bytes")
    if target < 1:
        raise ValueError(f"a budget of {budget.amount:g} {budget.unit} does not hold one splat")
    return target


def _within(cloud: SplatCloud, data: Capture, budget: Budget, config: Config) -> SplatCloud:
    """Without the splats that show least, where training ended a little above the budget."""
    if budget.relative:
        return cloud
    order = None
    while True:
        size = len(cloud)
        if budget.unit == "bytes":
            size = quality.encoded_bytes(cloud, config.format)
        if size <= budget.amount:
            return cloud
        if order is None:
            shown = look(cloud, [photo.camera for photo in data.train]).weight
            order, whole = shown.argsort(descending=True, stable=True), cloud
        count = min(len(cloud) - 1, int(len(cloud) * budget.amount / size))
        if count < 1:
            raise ValueError(f"a budget of {budget.amount:g} {budget.unit} does not hold one splat")
        cloud = rows(whole, order[:count].sort().values)
