"""Fitting splats to pictures: photos of a scene, or renders of a larger cloud of it.

Loss and rates are those of 3D Gaussian Splatting (Kerbl et al. 2023) and, for clouds with two
scales, of 2D Gaussian Splatting (Huang et al. 2024). Step counts that the papers give for 30,000
steps scale with the length of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gencompress_kernels.adam_rows import adam_rows_
from gencompress_kernels.rasterize_splats import rasterize_splats
from gencompress_kernels.rasterize_surfels import rasterize_surfels
from gencompress_kernels.ssim import ssim
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.splat.cloud import SplatCloud
from gencompress.splat.density import Policy, after_step
from gencompress.splat.render import lens, render
from gencompress.splat.score import look
from gencompress.splat.state import State, start, to_cloud
from gencompress.views.camera import Camera
from gencompress.views.fit import Checkpoint, Log, fit, view_order
from gencompress.views.images import unit
from gencompress.views.photos import Photo

BACKGROUNDS = ("black", "white", "random")
FULL_RUN = 30_000  # steps that the papers' step counts are meant for
BETAS, EPS = (0.9, 0.999), 1e-15
BEYOND = 1e-8  # keeps a division by alpha finite


@dataclass(frozen=True)
class Target:
    """What one camera should see."""

    camera: Camera  # without distortion
    colors: Tensor  # [H, W, 3] over black: float32 in [0, 1], or uint8 in 0 to 255
    alphas: Tensor | None = None  # [H, W] as colors; None: the picture covers everything
    depths: Tensor | None = None  # [H, W] float32 along z, world units; 0 where unknown


@dataclass(frozen=True)
class Training:
    """How to fit; learning rates are Adam's, of the raw parameters."""

    steps: int = FULL_RUN
    batch: int = 1  # views a step; rates grow with its square root
    degree: int = 3  # of the harmonics, reached by one every 1,000 of 30,000 steps
    ramp: bool = True  # False: all harmonics from the first step
    background: str = "black"  # black, white, or another random colour each step
    ssim: float = 0.2  # share of 1 - SSIM in the colour loss; the rest is L1
    alpha: float = 0.0  # weight of the L1 error of alpha, where the target has one
    depth: float = 0.0  # of the L1 error of the expected depth, where the target has one
    normal: float = 0.0  # surfels: of 1 - cosine of rendered normals and those of the depth
    distortion: float = 0.0  # surfels: of the spread of depths along a ray
    opacity: float = 0.0  # of the mean opacity (0.01 with relocation)
    scale: float = 0.0  # of the mean standard deviation (0.01 with relocation)
    means_rate: float = 1.6e-4  # times the extent of the scene
    means_decay: float = 0.01  # what is left of it at the end, exponentially
    quats_rate: float = 1e-3
    scales_rate: float = 5e-3
    opacities_rate: float = 5e-2
    dc_rate: float = 2.5e-3  # of the constant harmonic
    rest_rate: float = 1.25e-4  # of the others
    decay: float = 1.0  # what is left at the end of all rates but that of the means

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps = {self.steps}, batch = {self.batch}: at least 1 each")
        if self.degree not in (0, 1, 2, 3):
            raise ValueError(f"degree = {self.degree}: 0 to 3")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r}: one of {', '.join(BACKGROUNDS)}")
        if not 0 <= self.ssim <= 1:
            raise ValueError(f"ssim = {self.ssim:g}: a share from 0 to 1")
        if not (0 < self.means_decay <= 1 and 0 < self.decay <= 1):
            raise ValueError("means_decay and decay are above 0 and at most 1")


def from_photo(photo: Photo) -> Target:
    """A photo as a target; its alpha multiplied into the colours."""
    if photo.alpha is None:
        return Target(photo.camera, photo.color)
    color, alpha = unit(photo.color), unit(photo.alpha)
    return Target(photo.camera, color * alpha[..., None], alpha)


def from_cloud(cloud: SplatCloud, cameras: Sequence[Camera], depths: bool = False) -> list[Target]:
    """What a cloud looks like: targets for one that shall replace it."""
    drawn = [(camera, render(cloud, camera)) for camera in cameras]
    return [
        Target(
            camera,
            picture.colors[0],
            picture.alphas[0],
            _expected(picture.depths[0], picture.alphas[0]) if depths else None,
        )
        for camera, picture in drawn
    ]


def train(
    state: State,
    targets: Sequence[Target],
    training: Training,
    policy: Policy | None,
    generator: torch.Generator,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Progress = quiet,
) -> Log:
    """Fits `state` in place and returns the log: the rows of `views.fit`, and one of kind
    "density" for whatever the policy did. A checkpoint makes the run resumable; the same bits come
    out as without a stop, given the same number of threads.

    Raises:
        RuntimeError: the loss is not finite; names the step and the checkpoint that was kept.
        FormatError: the checkpoint is of another run.
        ValueError: no targets, or a loss that these splats or targets do not have.
    """
    _check(state, targets, training)
    seed, cameras = generator.initial_seed(), [target.camera for target in targets]

    def advance(step: int, generator: torch.Generator, log: Log) -> dict[str, float]:
        chosen = view_order(step, len(targets), batch=training.batch, seed=seed)
        losses = take_step(state, [targets[i] for i in chosen], training, policy, generator)
        if policy is not None and math.isfinite(losses["loss"]):
            known = len(state.events)
            after_step(policy, state, generator, lambda: look(to_cloud(state), cameras).weight)
            log.extend({"kind": "density", **event} for event in state.events[known:])
            if not len(state):
                raise RuntimeError(f"step {state.step}: density control removed every splat")
        return losses | {"splats": len(state)}

    return fit(
        advance,
        training.steps,
        generator,
        dump=lambda: dump(state),
        load=lambda tensors: load(state, tensors),
        checkpoint=checkpoint,
        progress=progress,
    )


def finetune(
    cloud: SplatCloud,
    targets: Sequence[Target],
    training: Training,
    extent: float,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    progress: Progress = quiet,
) -> SplatCloud:
    """The same splats, fitted to the targets: no density control, all harmonics from the start.
    Resumes, and raises, as `train`."""
    state, how = start(cloud, extent), replace(training, ramp=False)
    train(state, targets, how, None, generator, checkpoint=checkpoint, progress=progress)
    return to_cloud(state)


def take_step(
    state: State,
    targets: Sequence[Target],
    training: Training,
    policy: Policy | None,
    generator: torch.Generator,
) -> dict[str, float]:
    """One step of Adam on the mean loss over a batch of views; notes what density control needs."""
    leaves = {n: v.detach().requires_grad_() for n, v in state.parameters.items()}
    bands = _bands(state, training)
    total: dict[str, float] = {}
    gradients: dict[str, Tensor] = {}
    for target in targets:
        loss, terms, probe = _loss(state, leaves, bands, target, training, policy, generator)
        wanted = [*leaves.values(), *([probe] if policy is not None else [])]
        found = torch.autograd.grad(loss / len(targets), wanted)
        for name, gradient in zip(leaves, found, strict=False):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        if policy is not None:
            _note(state, found[-1][0] * len(targets), target.camera, policy)
        for name, value in terms.items():
            total[name] = total.get(name, 0.0) + float(value.detach()) / len(targets)
    state.step += 1
    # a finite loss can come with a gradient that is not, and Adam would keep it for ever
    slope = sum(float(gradient.sum()) for gradient in gradients.values())
    if not math.isfinite(slope):
        return total | {"gradient": slope}
    if math.isfinite(total["loss"]):
        _update(state, gradients, training, len(targets))
    return total


def dump(state: State) -> dict[str, Tensor]:
    """Everything a checkpoint needs, by name."""
    tensors = {
        f"{group}.{name}": value
        for group in ("parameters", "first", "second", "notes")
        for name, value in getattr(state, group).items()
    }
    about = json.dumps({"step": state.step, "events": state.events}).encode()
    return tensors | {"about": torch.frombuffer(bytearray(about), dtype=torch.uint8)}


def load(state: State, tensors: dict[str, Tensor]) -> None:
    """Puts back what `dump` gave."""
    about = json.loads(bytes(tensors["about"].tolist()))
    state.step, state.events = about["step"], about["events"]
    for group in ("parameters", "first", "second", "notes"):
        parts = {n: v for n, v in tensors.items() if n.startswith(group + ".")}
        setattr(state, group, {n.partition(".")[2]: v for n, v in parts.items()})


def _check(state: State, targets: Sequence[Target], training: Training) -> None:
    if not targets:
        raise ValueError("no pictures to fit to")
    flat = state.parameters["scales"].shape[1] == 2
    if not flat and (training.normal or training.distortion):
        raise ValueError("the normal and distortion losses are for surfels (two scales)")
    if training.depth and all(target.depths is None for target in targets):
        raise ValueError("a depth loss, and no target has depths")
    if training.alpha and all(target.alphas is None for target in targets):
        raise ValueError("an alpha loss, and no target has alpha")


def _bands(state: State, training: Training) -> int:
    """Harmonics in use at this step."""
    highest = math.isqrt(state.parameters["sh"].shape[1]) - 1
    if training.ramp:
        every = max(1, round(1000 * training.steps / FULL_RUN))
        highest = min(highest, state.step // every)
    return (highest + 1) ** 2


def _loss(
    state: State,
    leaves: dict[str, Tensor],
    bands: int,
    target: Target,
    training: Training,
    policy: Policy | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The loss of one view, its terms, and the probe whose gradient density control reads."""
    background = _background(training, generator)
    probe = torch.zeros(1, len(state), 4, requires_grad=True) if policy is not None else None
    splats = {
        "means": leaves["means"],
        "quats": leaves["quats"],
        "scales": leaves["scales"].exp(),
        "opacities": leaves["opacities"].sigmoid(),
        "sh": leaves["sh"][:, :bands].contiguous(),
    }
    view = lens(leaves["means"], target.camera)
    options = {"background": background, "probe": probe}
    flat = leaves["scales"].shape[1] == 2
    if flat:
        drawn = rasterize_surfels(**splats, **view, **options)
    else:
        drawn = rasterize_splats(**splats, **view, **options, antialiased=state.antialiased)
    wanted = unit(target.colors)
    if target.alphas is not None:
        wanted = wanted + (1 - unit(target.alphas))[..., None] * background
    picture = drawn.colors[0]
    terms = {"l1": (picture - wanted).abs().mean()}
    loss = (1 - training.ssim) * terms["l1"]
    if training.ssim:
        terms["ssim"] = ssim(picture, wanted)
        loss = loss + training.ssim * (1 - terms["ssim"])
    if training.alpha and target.alphas is not None:
        terms["alpha"] = (drawn.alphas[0] - unit(target.alphas)).abs().mean()
        loss = loss + training.alpha * terms["alpha"]
    if training.depth and target.depths is not None:
        known = target.depths > 0
        depth = _expected(drawn.depths[0], drawn.alphas[0])
        terms["depth"] = ((depth - target.depths).abs() * known).sum() / known.sum().clamp_min(1)
        loss = loss + training.depth * terms["depth"]
    # from 7,000 and 3,000 of 30,000 steps, as in 2DGS
    if training.normal and state.step >= 7000 * training.steps / FULL_RUN:
        terms["normal"] = _normal_error(drawn, target.camera)
        loss = loss + training.normal * terms["normal"]
    if training.distortion and state.step >= 3000 * training.steps / FULL_RUN:
        terms["distortion"] = drawn.distortions.mean()
        loss = loss + training.distortion * terms["distortion"]
    if training.opacity:
        loss = loss + training.opacity * splats["opacities"].mean()
    if training.scale:
        loss = loss + training.scale * splats["scales"].mean()
    return loss, {"loss": loss} | terms, probe


def _background(training: Training, generator: torch.Generator) -> Tensor:
    if training.background == "random":
        return torch.rand(3, generator=generator)
    return torch.full((3,), 1.0 if training.background == "white" else 0.0)


def _expected(depths: Tensor, alphas: Tensor) -> Tensor:
    """Depth along z, 0 where nothing is."""
    return depths / alphas.clamp_min(BEYOND)


def _normal_error(drawn: Any, camera: Camera) -> Tensor:
    """Mean of 1 - cosine between rendered normals and those of the rendered depth, weighted by
    alpha (2DGS, with the weight held constant). Camera axes; the border has no neighbours."""
    alpha = drawn.alphas[0].detach()
    depth = _expected(drawn.depths[0], drawn.alphas[0])
    y, x = torch.meshgrid(
        torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij"
    )
    plane = torch.stack([(x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy], -1)
    points = torch.cat([plane, torch.ones_like(plane[..., :1])], -1) * depth[..., None]
    right = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    # x right, y down: down x right faces the camera
    facing = torch.nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)
    inner = (slice(1, -1), slice(1, -1))
    cosine = (drawn.normals[0][inner] * facing).sum(-1)
    return (alpha[inner] * (alpha[inner] - cosine)).mean()


def _note(state: State, slope: Tensor, camera: Camera, policy: Policy) -> None:
    """Adds a view's gradient by the projected centre, in half pictures, and who was seen."""
    columns = slope[:, 2:] if getattr(policy, "absgrad", False) else slope[:, :2]
    half = columns.new_tensor([camera.width / 2, camera.height / 2])
    state.notes["gradient"] += (columns * half).norm(dim=1)
    state.notes["seen"] += (slope[:, :2] != 0).any(1)


def _update(state: State, gradients: dict[str, Tensor], training: Training, batch: int) -> None:
    """Adam, with the rates of this step. A batch of B views: rates times sqrt(B), and moments
    that forget B times as fast (gsplat's rule)."""
    betas = tuple(1 - batch * (1 - beta) for beta in BETAS)
    for name, rate in rates(state, training).items():
        adam_rows_(
            state.parameters[name],
            state.first[name],
            state.second[name],
            gradients[name].contiguous(),
            rate * math.sqrt(batch),
            state.step,
            betas=betas,
            eps=EPS / math.sqrt(batch),
        )


def rates(state: State, training: Training) -> dict[str, float | Tensor]:
    """The learning rates of a step; one a column for the harmonics."""
    done = (state.step - 1) / training.steps
    fade = training.decay**done
    bands = state.parameters["sh"].shape[1]
    sh = torch.full((bands, 3), training.rest_rate)
    sh[0] = training.dc_rate
    return {
        "means": training.means_rate * state.extent * training.means_decay**done,
        "quats": training.quats_rate * fade,
        "scales": training.scales_rate * fade,
        "opacities": training.opacities_rate * fade,
        "sh": (sh * fade).flatten(),
    }
