"""Small seeded scenes and cameras for the rasterizer."""

import math

import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices


def make_scene(num=30, degree=1, seed=0, spread=0.5, size=-3.5, opacity=0.0):
    g = torch.Generator().manual_seed(seed)
    return {
        "means": torch.randn(num, 3, generator=g) * spread + torch.tensor([0.0, 0.0, 3.0]),
        "quats": torch.randn(num, 4, generator=g),
        "scales": torch.exp(torch.randn(num, 3, generator=g) * 0.4 + size),
        "opacities": torch.sigmoid(torch.randn(num, generator=g) + opacity),
        "sh": torch.randn(num, (degree + 1) ** 2, 3, generator=g) * 0.3,
    }


def one_splat(depth=2.0, scale=0.05, opacity=0.7, color=0.9):
    return {
        "means": torch.tensor([[0.0, 0.0, depth]]),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "scales": torch.full((1, 3), scale),
        "opacities": torch.tensor([opacity]),
        "sh": torch.full((1, 1, 3), (color - 0.5) / 0.28209479177387814),
    }


def camera(width, height, focal=70.0, tilt=0.0):
    """A camera near the origin, its principal point off the centre."""
    turn = torch.tensor([[math.cos(tilt), math.sin(tilt), 0.05 * tilt, 1.0]])
    view = torch.eye(4)
    view[:3, :3] = rotation_matrices(turn)[0] if tilt else torch.eye(3)
    view[:3, 3] = torch.tensor([0.1, -0.05, 0.2]) if tilt else torch.zeros(3)
    lens = torch.tensor(
        [[focal, 0, width / 2 - 0.7], [0, focal * 1.1, height / 2 + 0.4], [0, 0, 1]]
    )
    return {"viewmats": view[None], "intrinsics": lens[None], "width": width, "height": height}


def to(values, kind):
    return {k: v.to(kind) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
