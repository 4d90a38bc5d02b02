"""The error rule of the kernels, and splat pictures computed without them.

A kernel's error against a float64 reference may be at most twice that of the float32 reference on
the same inputs, plus a stated floor.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import sph_harm_y
from torch import Tensor

THRESHOLD_MARGIN = 1e-6
MAX_EXCLUDED = 0.0005  # share of pixels


def assert_as_accurate(
    result: Tensor, float32: Tensor, float64: Tensor, *, floor: float, name: str = "result"
) -> None:
    """Largest and mean error of `result` are at most twice those of `float32`, plus `floor`
    (absolute) or, for the mean, a tenth of it."""
    assert result.shape == float64.shape, f"{name}: {result.shape}, expected {float64.shape}"
    if not result.numel():
        return
    assert bool(result.isfinite().all()), f"{name}: values that are not finite"
    ours = (result.cpu().double() - float64.cpu()).abs()
    plain = (float32.cpu().double() - float64.cpu()).abs()
    for kind, got, allowed in (
        ("largest", ours.max(), 2 * plain.max() + floor),
        ("mean", ours.mean(), 2 * plain.mean() + 0.1 * floor),
    ):
        assert got <= allowed, f"{name}: {kind} error {got:.3e}, allowed {allowed:.3e}"


def loop_picture(
    scene: dict[str, Tensor], viewmat: Tensor, lens: Tensor, width: int, height: int, **options
) -> dict[str, np.ndarray]:
    """One picture by explicit loops in float64: colors, alphas, depths, statistics, and `near`,
    the pixels where a rounding error could decide a comparison."""
    flat = flatten(scene, viewmat, lens, width, height, options.get("antialiased", False))
    background = np.asarray(options.get("background", (0.0, 0.0, 0.0)), float)
    num = len(scene["means"])
    colors, alphas = np.zeros((height, width, 3)), np.zeros((height, width))
    depths, statistics = np.zeros((height, width)), np.zeros((num, 4))
    raws, near = raw_alphas(flat, width, height)
    for row in range(height):
        for column in range(width):
            left, best, winner = 1.0, 0.0, -1
            for (k, _, _, _, depth, color), raw in zip(flat, raws[:, row, column], strict=True):
                alpha = min(0.99, raw)
                if alpha < 1 / 255:
                    continue
                after = left * (1 - alpha)
                if after <= 1e-4:
                    break
                weight = alpha * left
                colors[row, column] += weight * color
                depths[row, column] += weight * depth
                statistics[k] += (weight, 0, 1, 0)
                statistics[k, 1] = max(statistics[k, 1], weight)
                if weight > best:
                    best, winner = weight, k
                left = after
            colors[row, column] += left * background
            alphas[row, column] = 1 - left
            if winner >= 0:
                statistics[winner, 3] += 1
    return {
        "colors": colors, "alphas": alphas, "depths": depths, "statistics": statistics,
        "near": near,
    }  # fmt: skip


def raw_alphas(flat: list[tuple], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Opacity times Gaussian, [M, H, W], and the pixels [H, W] where it or the transmittance
    comes within 1e-6 of a threshold."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    raws, left = np.zeros((len(flat), height, width)), np.ones((height, width))
    near = np.zeros((height, width), bool)
    for raw, (_, center, conic, opacity, _, _) in zip(raws, flat, strict=True):
        d = np.stack([center[0] - x, center[1] - y], -1)
        raw[:] = opacity * np.exp(-0.5 * np.einsum("yxi,ij,yxj->yx", d, conic, d))
        left = left * (1 - np.where(raw < 1 / 255, 0, np.minimum(raw, 0.99)))
        for value, threshold in ((raw, 1 / 255), (raw, 0.99), (left, 1e-4)):
            near |= abs(value - threshold) < THRESHOLD_MARGIN
    return raws, near


def flatten(
    scene: dict[str, Tensor], viewmat: Tensor, lens: Tensor, width: int, height: int, aa: bool
) -> list[tuple]:
    """(index, centre, conic, opacity, depth, colour) of each splat in front, nearest first; the
    Jacobian by central differences of the pinhole projection, harmonics by scipy."""
    s = {name: value.double().numpy() for name, value in scene.items()}
    view, lens = viewmat.double().numpy(), lens.double().numpy()
    rotation, shift = view[:3, :3], view[:3, 3]

    def pinhole(point):
        return (lens @ point)[:2] / point[2]

    result = []
    for k in range(len(s["means"])):
        point = rotation @ s["means"][k] + shift
        if point[2] < 0.01:
            continue
        w, vector = s["quats"][k][0], s["quats"][k][1:]
        norm = math.sqrt(w * w + vector @ vector)
        w, vector = w / norm, vector / norm
        cross = np.cross(vector, np.eye(3)).T  # cross @ x = vector x x
        turn = np.eye(3) + 2 * w * cross + 2 * cross @ cross
        half = rotation @ turn * s["scales"][k]
        # the Jacobian is taken no further out than 0.3 of the half picture beyond its edges
        bounded = point.copy()
        for axis, size in ((0, width), (1, height)):
            edge = np.array([0, size]) + np.array([-0.15, 0.15]) * size
            low, high = (edge - lens[axis, 2]) / lens[axis, axis]
            bounded[axis] = point[2] * np.clip(point[axis] / point[2], low, high)
        step = 1e-5 * bounded[2]
        jacobian = np.stack(
            [
                (pinhole(bounded + step * e) - pinhole(bounded - step * e)) / (2 * step)
                for e in np.eye(3)
            ],
            1,
        )
        sharp = jacobian @ half @ half.T @ jacobian.T
        blurred = sharp + 0.3 * np.eye(2)
        opacity = s["opacities"][k]
        if aa:
            ratio = np.linalg.det(sharp) / np.linalg.det(blurred)
            opacity *= math.sqrt(max(ratio, 0.005**2))
        direction = s["means"][k] + rotation.T @ shift
        color = harmonics(direction, s["sh"].shape[1]) @ s["sh"][k] + 0.5
        result.append((k, pinhole(point), np.linalg.inv(blurred), opacity, point[2], color.clip(0)))
    return sorted(result, key=lambda splat: splat[4])


def harmonics(direction: np.ndarray, count: int) -> np.ndarray:
    """The first `count` real spherical harmonics, Condon-Shortley phase kept."""
    x, y, z = direction / np.linalg.norm(direction)
    polar, azimuth = math.acos(np.clip(z, -1, 1)), math.atan2(y, x)
    values = []
    for degree in range(math.isqrt(count)):
        for order in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(order), polar, azimuth)
            part = value.real if order >= 0 else value.imag
            values.append(part * (math.sqrt(2) if order else 1))
    return np.array(values)


def excluded(near: np.ndarray) -> Tensor:
    """Mask of the pixels to leave out of a comparison; too many of them fail the test."""
    assert near.mean() <= MAX_EXCLUDED, f"{near.sum()} of {near.size} pixels lie at a threshold"
    return torch.from_numpy(near)
