"""Splats in a .glb (glTF 2.0) with the extension KHR_gaussian_splatting, as ratified by Khronos in
2026 (in the words of its release candidate; drafts before it kept log scales).

A primitive of points with float attributes: POSITION, KHR_gaussian_splatting:ROTATION (unit, x y z
w), SCALE (standard deviations, not their logarithm), OPACITY (0..1) and SH_DEGREE_l_COEF_n (red,
green, blue; n counts m from -l up), whose harmonics are those of .ply with their signs. COLOR_0,
linear as glTF wants it, is for programs that show points only. Axes in the file are right, up,
back, so y and z change sign. Order kept.

Writing keeps positions and harmonics exactly; scales and opacities to the rounding of float32, so
opacities above 1 - 2^-24 and scales below 1e-38 or above 3e38 become those. That a cloud was
trained antialiased is noted in `extras`, for want of a place in the extension.

Reading takes quantised attributes too, and moves splats by the nodes that show them: turned, scaled
alike in all directions and shifted. Compressed variants (SPZ within glTF: a draft that asks for
version 2 of .spz in yet other axes) are refused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gencompress_kernels.rasterize_splats.reference import sh_basis
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from gencompress.files import FormatError
from gencompress.splat.cloud import SH_C0, SplatCloud
from gencompress.views.glb import (
    ARRAY_BUFFER,
    SPLATS,
    Binary,
    accessor,
    decoded,
    item,
    nodes,
    read_buffers,
    read_container,
    refuse_compressed,
    write_container,
)

from .common import (
    Array,
    arrays,
    check_inflation,
    cloud_of,
    need_3dgs,
    quat_signs,
    sh_signs,
    to_byte,
    unit_quats,
)

log = logging.getLogger(__name__)

POINTS = 0
SIGNS = (1, -1, -1)  # between the axes of glTF and ours
SMALLEST, LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max
FULLEST = 1 - 2.0**-24  # the largest opacity whose logit is finite
COLOR_SPACE = "srgb_rec709_display"
MOST_SHOWN = 10_000  # primitives, each with a node; known files have one, or one a tile
RIGID = 1e-4  # of what a node may stretch or shear, beside its scale
DEGREES = {1: 0, 4: 1, 9: 2, 16: 3}


def write(path: Path, cloud: SplatCloud) -> None:
    """Raises ValueError for 2DGS, and for more than 4 GiB."""
    need_3dgs(cloud, ".glb")
    a = arrays(cloud)
    with np.errstate(over="ignore", under="ignore"):
        scales = np.minimum(np.exp(a["scales"].astype(np.float64)), LARGEST)
        opacities = 1 / (1 + np.exp(-a["opacities"].astype(np.float64)))
    quats = unit_quats(a["quats"]) * quat_signs(SIGNS)
    sh = a["sh"].copy()
    sh[:, 1:] *= sh_signs(SIGNS)[: sh.shape[1] - 1, None]
    colour = np.clip(0.5 + SH_C0 * sh[:, 0], 0, 1)
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    fallback = to_byte(255 * np.concatenate([linear, opacities[:, None]], 1))
    fields = {
        "ROTATION": np.roll(quats, -1, axis=1),
        "SCALE": scales,
        "OPACITY": opacities[:, None],
        **{_sh_name(k): sh[:, k] for k in range(sh.shape[1])},
    }
    binary = Binary()
    means = a["means"] * np.array(SIGNS, np.float32)
    attributes = {
        "POSITION": binary.accessor(means, ARRAY_BUFFER, bounds=True),
        "COLOR_0": binary.accessor(fallback, ARRAY_BUFFER, normalized=True),
    }
    for name, values in fields.items():
        number = binary.accessor(values.astype(np.float32), ARRAY_BUFFER)
        attributes[f"{SPLATS}:{name}"] = number
    about: dict[str, Any] = {"kernel": "ellipse", "colorSpace": COLOR_SPACE}
    about |= {"projection": "perspective", "sortingMethod": "cameraDistance"}
    if cloud.antialiased:
        about["extras"] = {"antialiased": True}
    primitive = {"attributes": attributes, "mode": POINTS, "extensions": {SPLATS: about}}
    root = {
        "asset": {"version": "2.0", "generator": "gencompress"},
        "extensionsUsed": [SPLATS],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
    }
    write_container(path, root, binary)


def read(path: Path) -> SplatCloud:
    """All splats that a node shows. Harmonics of less than the largest degree are filled up."""
    root, binary = read_container(path)
    try:
        refuse_compressed(path, root)
        buffers = read_buffers(path, root, binary)
        clouds = [
            _cloud(path, _fields(path, root, buffers, primitive), matrix, _antialiased(primitive))
            for primitive, matrix in _shown(path, root)
        ]
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise FormatError(path, f"its JSON is no sound glTF of splats ({problem:.200})") from error
    if not sum(map(len, clouds)):
        raise FormatError(path, "holds no splats")
    return _joined(clouds)


def _shown(path: Path, root: dict[str, Any]) -> list[tuple[dict[str, Any], NDArray[np.float64]]]:
    """(primitive, local to world) of each node that shows splats."""
    found = []
    for node, matrix in nodes(root):
        mesh = root["nodes"][node].get("mesh")
        primitives = [] if mesh is None else item(root, "meshes", mesh)["primitives"]
        found += [(p, matrix) for p in primitives if SPLATS in p.get("extensions", {})]
    if len(found) > MOST_SHOWN:
        raise FormatError(path, f"shows splats {len(found)} times, expected at most {MOST_SHOWN}")
    total = 0
    for primitive, _ in found:  # a few bytes can show splats many times
        attributes = primitive["attributes"]
        total += item(root, "accessors", attributes["POSITION"])["count"] * 12 * len(attributes)
    check_inflation(path, path.stat().st_size, total)
    return found


def _fields(
    path: Path, root: dict[str, Any], buffers: tuple[bytes, ...], primitive: dict[str, Any]
) -> dict[str, Array]:
    """The attributes as float32, by what `write` calls them, harmonics together as "sh"."""
    about, attributes = primitive["extensions"][SPLATS], primitive["attributes"]
    if about.get("extensions"):
        names = ", ".join(about["extensions"])
        raise FormatError(path, f"its splats are in {names}; export them without")
    if about.get("kernel") != "ellipse" or primitive.get("mode") != POINTS:
        raise FormatError(path, f"its splats have the kernel {about.get('kernel')!r:.40}")
    if about.get("colorSpace") != COLOR_SPACE:
        space = about.get("colorSpace")
        log.warning("%s: colours of %.40r are read as those of %s", path, space, COLOR_SPACE)
    used = [k for k in range(16) if f"{SPLATS}:{_sh_name(k)}" in attributes]
    if len(used) not in DEGREES or used != list(range(len(used))):
        raise FormatError(path, f"has {len(used)} harmonics, expected 1, 4, 9 or 16")
    names = {"POSITION": 3, f"{SPLATS}:ROTATION": 4, f"{SPLATS}:SCALE": 3, f"{SPLATS}:OPACITY": 1}
    names |= {f"{SPLATS}:{_sh_name(k)}": 3 for k in used}
    found = {}
    for name, width in names.items():
        if name not in attributes:
            raise FormatError(path, f"its splats have no {name}")
        values = accessor(root, buffers, attributes[name])
        normal = bool(item(root, "accessors", attributes[name]).get("normalized"))
        found[name.rpartition(":")[2]] = decoded(values, normal).astype(np.float32)
        if values.shape != (len(found["POSITION"]), width):
            raise FormatError(path, f"{name} has shape {values.shape}, expected [N, {width}]")
    if (found["SCALE"] < 0).any():
        raise FormatError(
            path, "has negative scales, as drafts did that kept logarithms; export anew"
        )
    found["sh"] = np.stack([found.pop(_sh_name(k)) for k in used], 1)
    return found


def _cloud(
    path: Path, fields: dict[str, Array], matrix: NDArray[np.float64], antialiased: bool
) -> SplatCloud:
    """The raw values in our axes, after the matrix of a node."""
    world = np.diag([*SIGNS, 1.0]) @ matrix
    size = np.cbrt(max(np.linalg.det(world[:3, :3]), 0.0))
    turn = world[:3, :3] / size if size else np.zeros((3, 3))
    if np.abs(turn.T @ turn - np.eye(3)).max() > RIGID:
        raise FormatError(path, "a node mirrors its splats, or scales them by direction")
    quats = unit_quats(np.roll(fields["ROTATION"], 1, axis=1))
    sh, signs = fields["sh"], np.diag(turn)
    if (np.abs(turn) == np.eye(3)).all():  # to the bit
        means = fields["POSITION"] * np.float32(size) * signs.astype(np.float32)
        quats = quats * quat_signs(tuple(signs))
        sh[:, 1:] *= sh_signs(tuple(signs))[: sh.shape[1] - 1, None]
    else:
        means = fields["POSITION"] @ (turn * size).T
        quats = _product(np.roll(Rotation.from_matrix(turn).as_quat(), 1), quats)
        sh = np.einsum("kj,njc->nkc", _turned_harmonics(turn, sh.shape[1]), sh)
    shift = world[:3, 3]
    means = means + shift if shift.any() else means
    scales = np.log(np.maximum(fields["SCALE"].astype(np.float64) * size, SMALLEST))
    share = np.clip(fields["OPACITY"][:, 0].astype(np.float64), SMALLEST, FULLEST)
    return cloud_of(means, quats, scales, np.log(share) - np.log1p(-share), sh, antialiased)


def _product(p: NDArray[np.float64], q: Array) -> NDArray[np.float64]:
    """Of one quaternion with each of [N, 4], w first."""
    w, x, y, z = p
    left = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    return q @ left.T


def _turned_harmonics(turn: NDArray[np.float64], bands: int) -> NDArray[np.float64]:
    """[K, K]: coefficients of colours that are seen at `turn @ d` as these were at d."""
    chance = torch.Generator().manual_seed(0)
    seen = torch.randn(64, 3, dtype=torch.float64, generator=chance)
    seen = torch.nn.functional.normalize(seen, dim=1)
    before = sh_basis(seen, DEGREES[bands]).numpy()
    after = sh_basis(seen @ torch.from_numpy(turn).T, DEGREES[bands]).numpy()
    return np.linalg.lstsq(after, before, rcond=None)[0]


def _antialiased(primitive: dict[str, Any]) -> bool:
    extras = primitive["extensions"][SPLATS].get("extras")
    return isinstance(extras, dict) and extras.get("antialiased") is True


def _joined(clouds: list[SplatCloud]) -> SplatCloud:
    if len(clouds) == 1:
        return clouds[0]
    most = max(cloud.sh.shape[1] for cloud in clouds)
    sh = [torch.nn.functional.pad(c.sh, (0, 0, 0, most - c.sh.shape[1])) for c in clouds]
    fields = ("means", "quats", "scales", "opacities")
    joined = {name: torch.cat([getattr(c, name) for c in clouds]) for name in fields}
    return SplatCloud(**joined, sh=torch.cat(sh), antialiased=any(c.antialiased for c in clouds))


def _sh_name(k: int) -> str:
    degree = int(np.sqrt(k))
    return f"SH_DEGREE_{degree}_COEF_{k - degree * degree}"


def header(path: Path) -> dict[str, Any]:
    """What its JSON says."""
    root, _ = read_container(path)
    found = [primitive for primitive, _ in _shown(path, root)]
    return {
        "version": root["asset"]["version"],
        "generator": root["asset"].get("generator"),
        "fields": list(found[0]["attributes"]) if found else [],
        "primitives": len(found),
    }
