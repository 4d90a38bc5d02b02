"""Pictures of a pipeline or an artifact, as files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from gencompress.artifact import read_artifact
from gencompress.run import method, reopen
from gencompress.scenes import located


def sample(source: str, out: Path, prompts: list[str], seed: int, **how: Any) -> list[Path]:
    """Pictures in the new folder `out`: of the prompts, by a pipeline (a folder, an embedded scene,
    a hub's name, or the artifact of one), from seeds that count on from `seed`; without prompts,
    of what the artifact `source` is measured on. `how` is as in `t2i.sample.sample`.

    Raises ValueError for prompts and the artifact of another method, and for no prompts and no
    artifact.
    """
    place = located(source)
    artifact = read_artifact(place) if (Path(place) / "manifest.json").is_file() else None
    if not prompts:
        if artifact is None:
            raise ValueError(f"{source}: no artifact; of a pipeline, say what to draw: --prompt")
        package, _, data, model = reopen(artifact)
        return package.sample(model, data, out)
    if artifact is None:
        package = importlib.import_module("gencompress.t2i.pictures")
    else:
        kind = artifact.manifest["method"]
        place, package = str(artifact.folder / "model"), method(kind)
        if not hasattr(package, "draw"):
            raise ValueError(f"{source}: an artifact of {kind!r}, which draws no prompts")
    paths: list[Path] = package.draw(place, prompts, seed, out, **how)
    return paths
