"""Quadric decimation (Garland and Heckbert, 1997), by the package fast_simplification.

A baseline for reports: what merging edges gives at the same count of faces. It knows the surface
alone, keeps its wrong faces, and carries no attributes over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gencompress.mesh.surface import compact

AGGRESSIVENESS = 7.0  # the package's default; it stops early where this is too low for the target
MOST_AGGRESSIVE = 12.0


def decimate(vertices: Tensor, faces: Tensor, target_faces: int) -> tuple[Tensor, Tensor]:
    """At most `target_faces` faces with the shape of the given ones, as near as edges merge to it.

    Args:
        vertices: [V, 3] float32 or float64, each place once: what is not joined does not merge.
        faces: [F, 3] int64.
        target_faces: at least 1. From F on the input comes back as it is.

    Returns:
        vertices [V', 3] of the dtype and device of the input, each used by a face, and faces
        [F', 3] int64, F' <= target_faces, often one or two fewer. Borders may move.

    Raises:
        ValueError: `target_faces` below 1, not finite vertices, an index out of range, or the
            surface cannot be merged to so few faces.
    """
    import fast_simplification

    if target_faces < 1:
        raise ValueError(f"target_faces is {target_faces}, expected at least 1")
    if len(faces) and not 0 <= int(faces.min()) <= int(faces.max()) < len(vertices):
        raise ValueError(f"faces name a vertex outside 0 to {len(vertices) - 1}")
    if not vertices.isfinite().all():
        raise ValueError("vertices are not all finite")
    if target_faces >= len(faces):
        return vertices, faces
    given = vertices.detach().cpu().double().numpy(), faces.cpu().numpy().astype("int32")
    aggressiveness = AGGRESSIVENESS
    while True:
        points, triangles = fast_simplification.simplify(
            *given, target_count=target_faces, agg=aggressiveness
        )
        if 0 < len(triangles) <= target_faces or aggressiveness > MOST_AGGRESSIVE:
            break
        aggressiveness += 1
    if not 0 < len(triangles) <= target_faces:
        raise ValueError(
            f"{len(faces)} faces cannot be merged to {target_faces}: {len(triangles)} came out"
        )
    return compact(
        torch.from_numpy(points).to(vertices), torch.from_numpy(triangles.astype("int64")).to(faces)
    )
