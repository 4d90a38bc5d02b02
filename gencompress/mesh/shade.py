"""Pictures of meshes: flat shading, masks over renders, faces coloured by score, GLB for a page.

H x W pixels, F faces, V vertices. Colours are sRGB in [0, 1] (uint8 where said) and are mixed as
stored, as browsers do. `hits` is what the z-buffer returns: for each pixel the front-most face, -1
where there is none.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencompress.files import writing
from gencompress.mesh.surface import TriMesh, face_normals
from gencompress.views.camera import Camera, pixel_rays

ALBEDO = 0.82  # of a face without a colour
AMBIENT = 0.3  # the rest comes from a light at the eye; taste, and the same in the page's viewer
BACK = (0.72, 0.58, 0.44)  # factor of back faces: darker and warmer, so that insides show
KEPT = (205, 205, 202)
# yellow, orange, dark red: told apart by their darkness alone
RAMP = ((250, 216, 70), (224, 104, 36), (92, 0, 24))
MISSING = (0.0, 0.45, 0.70)  # blue and vermillion of Okabe and Ito, safe for the colour-blind
OUTSIDE = (0.84, 0.37, 0.0)
OUTLINE = (0.08, 0.09, 0.10)
OVERLAY_LEGEND = (
    "blue is in the mask and not in the render, orange in the render and not in the mask; "
    "the dark line is the outline of the mask"
)
PREVIEW_FACES = 200_000


def shaded(
    mesh: TriMesh,
    camera: Camera,
    hits: Tensor,  # [s H, s W] int32 or int64, s a whole number: finer ones are averaged
    colors: Tensor | None = None,  # [F, 3] uint8, or float in [0, 1]; None: grey
    *,
    background: float = 1.0,
) -> Tensor:
    """float32 [H, W, 3]: flat faces under a light at the eye, both sides, over grey `background`.

    Brightness is AMBIENT + (1 - AMBIENT) |cos| of the angle between a face and the ray to it.

    Raises:
        ValueError: `hits` has no whole multiple of the camera's size, or names faces beyond F.
    """
    times = hits.shape[0] // camera.height
    if times < 1 or hits.shape != (times * camera.height, times * camera.width):
        raise ValueError(
            f"hits {tuple(hits.shape)} for a picture of {camera.height} x {camera.width}"
        )
    if hits.numel() and int(hits.max()) >= len(mesh):
        raise ValueError(f"hits name face {int(hits.max())} of {len(mesh)}")
    image = torch.full((*hits.shape, 3), float(background))
    at = hits >= 0
    face = hits[at].long()
    rays = pixel_rays(_finer(camera, times))[1][at]
    cosine = (face_normals(mesh.vertices, mesh.faces)[face] * rays).sum(-1)
    light = AMBIENT + (1 - AMBIENT) * cosine.abs()
    side = torch.where(cosine[:, None] > 0, cosine.new_tensor(BACK), 1.0)
    albedo = torch.full((1, 3), ALBEDO) if colors is None else _unit(colors)[face]
    image[at] = (albedo * light[:, None] * side).float()
    return image.unflatten(0, (-1, times)).unflatten(2, (-1, times)).mean((1, 3))


def _finer(camera: Camera, times: int) -> Camera:
    f = times
    size = {"width": f * camera.width, "height": f * camera.height}
    lens = {key: f * getattr(camera, key) for key in ("fx", "fy", "cx", "cy")}
    return replace(camera, **size, **lens)


def _unit(colors: Tensor) -> Tensor:
    return colors.float() / 255 if colors.dtype == torch.uint8 else colors


def overlay(image: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
    """The mask over a render, float32 [H, W, 3]; what its colours mean says OVERLAY_LEGEND.

    Args:
        image: [H, W, 3] in [0, 1], the render.
        mask: [H, W] in [0, 1], where the object should be.
        alpha: [H, W] in [0, 1], where the render has it. Where the two agree the render shows.
    """
    if not mask.shape == alpha.shape == image.shape[:2]:
        shapes = [tuple(x.shape) for x in (image, mask, alpha)]
        raise ValueError(f"image, mask and alpha have shapes {shapes}, expected one size")
    shown = image.float()
    for weight, color in ((mask * (1 - alpha), MISSING), (alpha * (1 - mask), OUTSIDE)):
        weight = 0.8 * weight.float()[..., None]  # some of the shading stays
        shown = shown * (1 - weight) + weight * shown.new_tensor(color)
    return torch.where(_outline(mask >= 0.5)[..., None], shown.new_tensor(OUTLINE), shown)


def _outline(inside: Tensor) -> Tensor:
    """[H, W] bool: pixels inside with one of their four neighbours outside."""
    wide = torch.nn.functional.pad(inside[None, None].float(), (1, 1, 1, 1), "replicate")[0, 0] > 0
    around = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return inside & ~around


def score_colors(errors: Tensor, removed: Tensor) -> Tensor:
    """uint8 [F, 3]: kept faces light grey, removed ones from yellow (the smallest error among
    them) to dark red (the largest), even in OKLab (Ottosson, 2020). `score_legend` says so.

    Args:
        errors: [F], larger is more wrong; NaN counts as the smallest.
        removed: [F] bool.
    """
    colors = torch.tensor(KEPT, dtype=torch.uint8).repeat(len(errors), 1)
    if removed.any():
        low, high = _range(errors, removed)
        share = (errors[removed].double().nan_to_num(low) - low) / ((high - low) or 1.0)
        colors[removed] = _ramp(share if high > low else torch.ones_like(share))
    return colors


def score_legend(errors: Tensor, removed: Tensor) -> str:
    """What the colours of `score_colors` mean, for people."""
    if not removed.any():
        return "grey for kept faces; none was removed"
    low, high = _range(errors, removed)
    span = f"yellow (error {low:.3g}) to dark red ({high:.3g})"
    shown = span if high > low else f"dark red (error {high:.3g})"
    return f"{shown} for removed faces, grey for kept ones"


def _range(errors: Tensor, removed: Tensor) -> tuple[float, float]:
    known = errors[removed & errors.isfinite()].double()
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)


def _ramp(share: Tensor) -> Tensor:
    """[K] in [0, 1] -> uint8 [K, 3], straight in OKLab between the stops of RAMP."""
    stops = _oklab(torch.tensor(RAMP, dtype=torch.float64) / 255)
    at = share.clamp(0, 1)[:, None] * (len(RAMP) - 1)
    low = at.long().clamp(max=len(RAMP) - 2)[:, 0]
    mixed = torch.lerp(stops[low], stops[low + 1], at - low[:, None])
    return (255 * _from_oklab(mixed)).round().clamp(0, 255).to(torch.uint8)


# From linear sRGB to cone responses, and from their cube roots to OKLab: the constants of
# Ottosson, "A perceptual color space for image processing", 2020.
_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _oklab(srgb: Tensor) -> Tensor:
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ srgb.new_tensor(_CONES).T
    return cones.pow(1 / 3) @ srgb.new_tensor(_LAB).T


def _from_oklab(lab: Tensor) -> Tensor:
    cones = (lab @ torch.linalg.inv(lab.new_tensor(_LAB)).T) ** 3
    linear = (cones @ torch.linalg.inv(lab.new_tensor(_CONES)).T).clamp(0, 1)
    return torch.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055
    )


def viewer_camera(camera: Camera, target: Tensor) -> dict[str, Any]:
    """Where the page's viewer starts: as `camera` looks, turning about the depth of `target` [3].
    The "camera" of a preview's index.json."""
    rotation = camera.world_to_camera[:3, :3]
    depth = max(float(rotation[2] @ (target.to(torch.float64) - camera.position)), 1e-6)
    shorter = min(camera.width / camera.fx, camera.height / camera.fy)
    return {
        "eye": camera.position.tolist(),
        "target": (camera.position + depth * rotation[2]).tolist(),
        "up": (-rotation[1]).tolist(),
        "fov_deg": 2 * math.degrees(math.atan(0.5 * shorter)),
    }


def preview_glb(
    path: str | Path,
    vertices: Tensor,  # [V, 3]
    faces: Tensor,  # [F, 3]
    colors: Tensor | None = None,  # [F, 3] uint8, or float in [0, 1]; None: grey
    *,
    most: int = PREVIEW_FACES,
    overwrite: bool = False,
) -> int:
    """Writes a mesh for the page's viewer; returns the number of faces in it.

    A GLB of one primitive: POSITION float32, COLOR_0 uint8 RGBA (as shown, which is how the viewer
    takes it, where glTF means linear light), uint32 indices. Vertices are shared by faces of one
    colour and repeated where colours meet. Above `most` faces, vertices that fall into one cell of
    a grid become one, at their mean, cells growing until few enough faces keep three corners:
    coarser all over, never with new holes.

    Raises:
        ValueError: no face, or a vertex that is not finite.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    vertices, faces = vertices.detach().double(), faces.long()
    if not len(faces) or not vertices.isfinite().all():
        raise ValueError(f"{len(faces)} faces over {len(vertices)} vertices, expected finite ones")
    if colors is None:
        colors = torch.full((len(faces), 3), ALBEDO)
    colors = (255 * _unit(colors)).round().clamp(0, 255).to(torch.uint8)
    if len(faces) > most:
        vertices, faces, colors = _coarser(vertices, faces, colors, most)
    packed = (colors.long() * torch.tensor([1, 1 << 8, 1 << 16])).sum(1)  # below 1 << 24
    pairs, indices = ((faces << 24) + packed[:, None]).flatten().unique(return_inverse=True)
    rgba = (pairs.numpy() & 0xFFFFFF | 0xFF000000).astype("<u4")
    points = vertices[pairs >> 24].numpy().astype("<f4")
    with writing(path, overwrite=overwrite) as part:
        part.write_bytes(_glb(points, rgba, indices.numpy().astype("<u4")))
    return len(faces)


def _coarser(
    vertices: Tensor, faces: Tensor, colors: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """At most `most` faces by clustering vertices (Rossignac and Borrel, 1993)."""
    low = vertices.amin(0)
    reach = float((vertices.amax(0) - low).max()) or 1.0
    cells = max(2, 2 * math.isqrt(most))  # a side; finer than a surface of `most` faces needs
    while True:
        place = ((vertices - low) * (cells / reach)).long().clamp(max=cells - 1)
        key = (place[:, 0] * cells + place[:, 1]) * cells + place[:, 2]
        cell, of = key.unique(return_inverse=True)
        moved = of[faces]
        a, b, c = moved.unbind(1)
        left = ((a != b) & (b != c) & (a != c)).nonzero()[:, 0]
        if len(left) <= most or cells == 2:
            break
        cells = max(2, min(cells - 1, int(cells * math.sqrt(most / len(left)))))
    left = left[:most]  # a grid of two cells a side may still hold many copies of one face
    count = torch.bincount(of, minlength=len(cell)).double()
    middle = torch.zeros(len(cell), 3, dtype=torch.float64).index_add_(0, of, vertices)
    return middle / count[:, None], moved[left], colors[left]


def _glb(points: np.ndarray, rgba: np.ndarray, indices: np.ndarray) -> bytes:
    """One primitive as GLB (glTF 2.0, sections 3 and 4): points [V, 3], rgba [V], indices [3 F]."""
    arrays = (points, rgba, indices)
    starts = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
    views = [
        {"buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target}
        for start, array, target in zip(starts, arrays, (34962, 34962, 34963), strict=False)
    ]
    bounds = {"min": points.min(0).tolist(), "max": points.max(0).tolist()}
    accessors = [
        {"componentType": 5126, "count": len(points), "type": "VEC3", **bounds},
        {"componentType": 5121, "count": len(points), "type": "VEC4", "normalized": True},
        {"componentType": 5125, "count": len(indices), "type": "SCALAR"},
    ]
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}
    gltf = {
        "asset": {"version": "2.0", "generator": "gencompress"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"doubleSided": True, "pbrMetallicRoughness": {"metallicFactor": 0}}],
        "accessors": [{"bufferView": i, **accessor} for i, accessor in enumerate(accessors)],
        "bufferViews": views,
        "buffers": [{"byteLength": starts[-1]}],
    }
    text = json.dumps(gltf, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data = b"".join(array.tobytes() for array in arrays)
    head = struct.pack("<5I", 0x46546C67, 2, 28 + len(text) + len(data), len(text), 0x4E4F534A)
    return head + text + struct.pack("<2I", len(data), 0x004E4942) + data
