"""Alpha masks and the cameras that saw them: captures, and arrays in an .npz file.

An .npz holds `masks` [N, H, W] (or `rgba` [N, H, W, 4] or [N, 4, H, W]), uint8 or float in [0, 1],
and the cameras in one of these ways:

- `c2w` [N, 4, 4], camera to world with OpenGL axes;
- `w2c` [N, 4, 4], world to camera with OpenCV axes;
- `R` [N, 3, 3] and `t` (or `T`) [N, 3], by `convention`: "opencv" (x_view = R x + t, default) or
  "pytorch3d" (row vectors, x_view = x R + T, x left and y up);
- `distance_elevation_azimuth` [N, 3], degrees, around the origin with y up, as SoftRas writes it.

Lens: `K` [3, 3] or [N, 3, 3] in px, or `fov_deg`, the whole angle of view along the shorter side
(SoftRas: 30 where there is none). With `center` [3] and `scale` the cameras see
(x - center) * scale; views are brought to the mesh's own units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError, read_arrays
from gencompress.views.images import unit
from gencompress.views.loaders import load_split
from gencompress.views.photos import Photo, load_photos

OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
PYTORCH3D = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
SOFTRAS_FOV = 30.0  # degrees: its demo of deformation has a viewing_angle of 15, half of it
MOST_PIXELS = 2**31  # of all masks of a file
RIGID = 1e-3  # on R^T R - 1


@dataclass(frozen=True, eq=False)
class MaskViews:
    """C views of one size."""

    viewmats: Tensor  # [C, 4, 4] float64, world to camera; x right, y down, z forward
    intrinsics: Tensor  # [C, 3, 3] float64, px; pixel centres at +0.5
    masks: Tensor  # [C, H, W] float32 in [0, 1], 1 inside
    names: tuple[str, ...]
    colors: Tensor | None = None  # [C, H, W, 3] uint8, what the masks were cut from

    def __len__(self) -> int:
        return self.masks.shape[0]


def load_masks(
    path: str | Path, *, every: int, progress: Progress = quiet
) -> tuple[MaskViews, MaskViews]:
    """(views to work with, held-out views) of a capture or an .npz file.

    The mask of a photo is its `mask_path`, its alpha, or the photo itself where it is grey. A
    capture's own test split is held out, else every `every`-th view.

    Raises:
        FormatError: no masks, fewer than two views, other sizes, or a file that is not what it
            should be.
        FileNotFoundError: `path` does not exist.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        views = _read_npz(path)
        held = torch.arange(len(views)) % every == 0
        split = subset(views, ~held), subset(views, held)
    else:
        split = _from_capture(path, every, progress)
    if not all(len(some) for some in split):
        raise FormatError(path, f"{sum(map(len, split))} views; two at least, one is held out")
    return split


def subset(views: MaskViews, which: Tensor) -> MaskViews:
    """The views that a bool [C] or an index names."""
    index = which.nonzero().squeeze(1) if which.dtype == torch.bool else which
    return MaskViews(
        views.viewmats[index],
        views.intrinsics[index],
        views.masks[index],
        tuple(views.names[i] for i in index.tolist()),
        None if views.colors is None else views.colors[index],
    )


def resized(views: MaskViews, size: int) -> MaskViews:
    """Masks whose longer side has `size` px: averaged over areas if smaller, else bilinear."""
    height, width = views.masks.shape[1:]
    longer = max(height, width)
    if longer == size:
        return views
    new = tuple(max(1, round(side * size / longer)) for side in (height, width))
    if size < longer:
        down, across = _shares(height, new[0]), _shares(width, new[1])
        masks = (down @ views.masks @ across.T).clamp(0, 1)
    else:
        finer = functional.interpolate(views.masks[:, None], new, mode="bilinear")
        masks = finer[:, 0].clamp(0, 1)
    scale = views.intrinsics.new_tensor([new[1] / width, new[0] / height, 1.0])
    return replace(views, masks=masks, intrinsics=views.intrinsics * scale[:, None], colors=None)


def _shares(old: int, new: int) -> Tensor:
    """[new, old] the share of each old pixel in the new ones along one side; rows sum to 1."""
    ends = torch.arange(new + 1, dtype=torch.float64) * old / new
    pixel = torch.arange(old, dtype=torch.float64)
    reach = torch.minimum(ends[1:, None], pixel + 1) - torch.maximum(ends[:-1, None], pixel)
    return (reach.clamp(min=0) * new / old).float()


def dilated(masks: Tensor, radius: int) -> Tensor:
    """The largest value within `radius` steps to one of the 4 neighbours. [C, H, W]"""
    for _ in range(radius):
        up = functional.pad(masks[:, 1:], (0, 0, 0, 1))
        down = functional.pad(masks[:, :-1], (0, 0, 1, 0))
        left = functional.pad(masks[:, :, 1:], (0, 1))
        right = functional.pad(masks[:, :, :-1], (1, 0))
        masks = torch.stack([masks, up, down, left, right]).amax(0)
    return masks


def placed(vertices: Tensor, views: MaskViews) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, viewmats and intrinsics in float32 as a kernel takes them, about the middle of the
    vertices, so that a mesh far from the origin keeps its digits."""
    middle = vertices.detach().double().mean(0) if len(vertices) else vertices.new_zeros(3).double()
    viewmats = views.viewmats.clone()
    viewmats[:, :3, 3] += viewmats[:, :3, :3] @ middle
    return (vertices.double() - middle).float(), viewmats.float(), views.intrinsics.float()


def seen_at(
    points: Tensor, viewmat: Tensor, lens: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixel in which points [..., 3] appear to one camera: row and column int64 [...], held to
    the frame, the depth, and whether they are before the camera and within the frame."""
    seen = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    flat = seen @ lens.T
    pixel = (flat[..., :2] / flat[..., 2:].clamp(min=1e-12)).clamp(-1e6, 1e6).floor().long()
    x, y = pixel.unbind(-1)
    inside = (seen[..., 2] > 0) & (x >= 0) & (y >= 0) & (x < width) & (y < height)
    return y.clamp(0, height - 1), x.clamp(0, width - 1), seen[..., 2], inside


def _from_capture(path: Path, every: int, progress: Progress) -> tuple[MaskViews, MaskViews]:
    split = load_split(path, every=every)
    photos = load_photos([*split[0], *split[1]], progress)
    sizes = sorted({tuple(photo.color.shape[:2]) for photo in photos})
    if len(sizes) > 1:
        shapes = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise FormatError(path, f"masks of {shapes} px; bring them to one size")
    masks = [_mask(photo, path) for photo in photos]
    cut = len(split[0])
    return _stack(photos[:cut], masks[:cut]), _stack(photos[cut:], masks[cut:])


def _mask(photo: Photo, path: Path) -> Tensor:
    if photo.alpha is not None:
        return unit(photo.alpha)
    color = unit(photo.color)
    if bool((color == color[..., :1]).all()):
        return color[..., 0]
    raise FormatError(
        path, f"the photo {photo.camera.name!r} has no alpha, no mask and is not grey"
    )


def _stack(photos: list[Photo], masks: list[Tensor]) -> MaskViews:
    if not photos:
        none = torch.zeros(0, 1, 1)
        return MaskViews(torch.zeros(0, 4, 4).double(), torch.zeros(0, 3, 3).double(), none, ())
    return MaskViews(
        torch.stack([photo.camera.world_to_camera for photo in photos]),
        torch.stack([photo.camera.intrinsics for photo in photos]),
        torch.stack(masks),
        tuple(photo.camera.name for photo in photos),
        torch.stack([(unit(photo.color) * 255).round().to(torch.uint8) for photo in photos]),
    )


def _read_npz(path: Path) -> MaskViews:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    arrays = read_arrays(path, 4 * MOST_PIXELS)
    pixels = _pixels(arrays, path)
    masks = torch.from_numpy(np.ascontiguousarray(pixels[..., -1]))
    count, height, width = masks.shape
    viewmats = _poses(arrays, count, path)
    if "center" in arrays or "scale" in arrays:
        center = _get(arrays, "center", (3,), path, np.zeros(3))
        scale = float(_get(arrays, "scale", (), path, np.ones(())))
        if not scale > 0:
            raise FormatError(path, f"scale is {scale}, expected more than 0")
        # R s (x - c) + t, divided by s: depths change their unit, pixels do not
        viewmats[:, :3, 3] = viewmats[:, :3, 3] / scale - viewmats[:, :3, :3] @ torch.from_numpy(
            center
        )
    colors = None
    if pixels.shape[-1] == 4:
        colors = torch.from_numpy((pixels[..., :3] * 255).round().astype(np.uint8))
    return MaskViews(
        viewmats,
        _lenses(arrays, count, width, height, path),
        masks,
        tuple(f"{i:03d}" for i in range(count)),
        colors,
    )


def _pixels(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """float32 [N, H, W, 1 or 4] in [0, 1]; the last channel is the mask."""
    name = next((name for name in ("masks", "rgba") if name in arrays), None)
    if name is None:
        raise FormatError(path, f"holds {sorted(arrays)!r:.80}, expected masks or rgba")
    found = arrays[name]
    shape = f"{name} is {found.dtype} {found.shape}"
    if name == "masks":
        found = found[..., None]
    elif found.ndim == 4 and found.shape[1] == 4 and found.shape[3] != 4:
        found = found.transpose(0, 2, 3, 1)
    channels = 1 if name == "masks" else 4
    if found.ndim != 4 or found.shape[3] != channels or 0 in found.shape:
        raise FormatError(path, f"{shape}, expected [N, H, W] masks or [N, H, W, 4] rgba")
    if found.dtype == np.uint8:
        return found.astype(np.float32) / 255
    if found.dtype == bool:
        return found.astype(np.float32)
    if found.dtype.kind != "f" or not np.isfinite(found).all():
        raise FormatError(path, f"{shape}, expected uint8, bool, or finite floats")
    if found.min() < 0 or found.max() > 1:
        raise FormatError(path, f"{name} from {found.min():g} to {found.max():g}, not in [0, 1]")
    return found.astype(np.float32)


def _poses(arrays: dict[str, np.ndarray], count: int, path: Path) -> Tensor:
    """[N, 4, 4] float64, world to camera with OpenCV axes."""
    if "c2w" in arrays:
        c2w = torch.from_numpy(_get(arrays, "c2w", (count, 4, 4), path))
        _check_rigid(c2w, path)
        return torch.linalg.inv(c2w @ OPENGL)
    if "w2c" in arrays:
        w2c = torch.from_numpy(_get(arrays, "w2c", (count, 4, 4), path))
        _check_rigid(w2c, path)
        return w2c
    if "R" in arrays:
        turns = torch.from_numpy(_get(arrays, "R", (count, 3, 3), path))
        shifts = torch.from_numpy(_get(arrays, "t" if "t" in arrays else "T", (count, 3), path))
        _check_rigid(turns, path)
        convention = str(arrays.get("convention", "opencv"))
        if convention == "pytorch3d":
            turns, shifts = PYTORCH3D @ turns.mT, shifts @ PYTORCH3D
        elif convention != "opencv":
            raise FormatError(path, f"convention {convention!r:.40}: opencv or pytorch3d")
        viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
        viewmats[:, :3, :3], viewmats[:, :3, 3] = turns, shifts
        return viewmats
    if "distance_elevation_azimuth" in arrays:
        return _orbit(
            torch.from_numpy(_get(arrays, "distance_elevation_azimuth", (count, 3), path))
        )
    raise FormatError(
        path,
        f"holds {sorted(arrays)!r:.80}, expected c2w, w2c, R and t, or distance_elevation_azimuth",
    )


def _orbit(values: Tensor) -> Tensor:
    """Cameras that look at the origin from (d cos e sin a, d sin e, -d cos e cos a)."""
    distance = values[:, 0]
    elevation, azimuth = (values[:, 1:] * math.pi / 180).unbind(1)
    flat = distance * elevation.cos()
    eyes = torch.stack([flat * azimuth.sin(), distance * elevation.sin(), -flat * azimuth.cos()], 1)
    forward = -eyes / eyes.norm(dim=1, keepdim=True)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(forward)
    # a left-handed camera: x to the right of the picture is up x forward
    right = torch.linalg.cross(up, forward)
    right = right / right.norm(dim=1, keepdim=True)
    down = -torch.linalg.cross(forward, right)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(len(values), 1, 1)
    viewmats[:, :3, :3] = torch.stack([right, down, forward], 1)
    viewmats[:, :3, 3] = -(viewmats[:, :3, :3] @ eyes[..., None])[..., 0]
    return viewmats


def _lenses(
    arrays: dict[str, np.ndarray], count: int, width: int, height: int, path: Path
) -> Tensor:
    """[N, 3, 3] float64, px."""
    if "K" in arrays:
        single = arrays["K"].ndim == 2
        found = torch.from_numpy(_get(arrays, "K", (3, 3) if single else (count, 3, 3), path))
        if not bool((found.diagonal(dim1=-2, dim2=-1)[..., :2] > 0).all()):
            raise FormatError(path, "K: a focal length is not above 0")
        return found.expand(count, 3, 3).clone()
    soft = SOFTRAS_FOV if "distance_elevation_azimuth" in arrays else None
    if "fov_deg" not in arrays and soft is None:
        raise FormatError(path, "neither K nor fov_deg says how wide the cameras see")
    angle = float(_get(arrays, "fov_deg", (), path, None if soft is None else np.asarray(soft)))
    if not 0 < angle < 180:
        raise FormatError(path, f"fov_deg is {angle}, expected 0 to 180")
    focal = 0.5 * min(width, height) / math.tan(math.radians(angle) / 2)
    lens = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    return torch.tensor(lens, dtype=torch.float64).repeat(count, 1, 1)


def _get(
    arrays: dict[str, np.ndarray],
    name: str,
    shape: tuple[int, ...],
    path: Path,
    default: np.ndarray | None = None,
) -> np.ndarray:
    """float64 of this shape, finite."""
    found = arrays.get(name, default)
    if found is None:
        raise FormatError(path, f"holds {sorted(arrays)!r:.80}, but no {name}")
    if found.dtype.kind not in "fiu" or found.shape != shape:
        raise FormatError(path, f"{name} is {found.dtype} {found.shape}, expected numbers {shape}")
    if not np.isfinite(found).all():
        raise FormatError(path, f"{name} holds values that are not finite")
    return np.array(found, np.float64)


def _check_rigid(poses: Tensor, path: Path) -> None:
    """Of rotations [N, 3, 3] or rigid motions [N, 4, 4]."""
    turns = poses[:, :3, :3]
    off = (turns.mT @ turns - torch.eye(3, dtype=turns.dtype)).abs().amax((1, 2))
    off = torch.where(torch.linalg.det(turns) > 0, off, torch.inf)
    if float(off.max()) > RIGID:
        raise FormatError(path, f"camera {int(off.argmax())}: its axes are no rotation")
    if poses.shape[1] == 4:
        odd = (poses[:, 3] != poses.new_tensor([0.0, 0.0, 0.0, 1.0])).any(1)
        if bool(odd.any()):
            at = int(odd.int().argmax())
            raise FormatError(path, f"camera {at}: the last row is not 0 0 0 1")
