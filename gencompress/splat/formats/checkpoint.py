"""The checkpoint of gsplat's trainer, `ckpts/ckpt_<step>_rank0.pt`: only read.

A pickle of torch, so it is opened with `weights_only=True`: tensors and plain values, no code.
Under "splats": means, quats (w x y z), scales (log), opacities (logit), sh0 [N, 1, 3] and shN
[N, K - 1, 3], as a .ply has them. Axes as in .ply. Order kept. (gsplat 1.5, simple_trainer.py)
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from gencompress.files import FormatError
from gencompress.splat.cloud import SplatCloud

SUFFIX = ".pt"
FIELDS = ("means", "quats", "scales", "opacities", "sh0", "shN")


def read(path: Path) -> SplatCloud:
    splats = _load(path)["splats"]
    missing = [name for name in FIELDS if not isinstance(splats.get(name), torch.Tensor)]
    if missing:
        raise FormatError(path, f"its splats have no {', '.join(missing)}; export them as .ply")
    fields = {n: splats[n].detach().to("cpu", torch.float32).contiguous() for n in FIELDS}
    try:
        sh = torch.cat([fields.pop("sh0"), fields.pop("shN")], 1)
        cloud = SplatCloud(**fields, sh=sh)
    except (ValueError, RuntimeError, IndexError) as problem:
        raise FormatError(path, f"its splats do not fit together: {problem}") from None
    if not len(cloud):
        raise FormatError(path, "holds no splats")
    return cloud


def _load(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as problem:
        said = str(problem).strip().splitlines() or [type(problem).__name__]
        raise FormatError(path, f"no checkpoint of plain tensors ({said[0]:.120})") from None
    if not isinstance(found, dict) or not isinstance(found.get("splats"), dict):
        raise FormatError(path, "is no checkpoint of gsplat: has no table 'splats'")
    return found


def header(path: Path) -> dict[str, Any]:
    """What it says beside the splats."""
    found = _load(path)
    step = found.get("step")
    return {
        "version": "gsplat",
        "fields": list(found["splats"]),
        "step": step if isinstance(step, int) else None,
    }
