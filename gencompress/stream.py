"""From file to file, for what does not fit in memory: nothing is drawn, only sizes are measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from gencompress.core.progress import Progress, quiet
from gencompress.recipe import Recipe, RecipeError
from gencompress.run import check_method
from gencompress.scenes import resolve

STREAMS = {"splat": "gencompress.splat.stream"}


def stream(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Writes the smaller model to the file `out`; returns counts and bytes before and after.

    Raises:
        RecipeError: a method, setting or data that needs pictures.
        ValueError, FormatError, OSError: as the method's `prune_file`.
    """
    check_method(recipe.method)
    if recipe.method not in STREAMS:
        known = ", ".join(STREAMS)
        raise RecipeError(f"unmeasured: {recipe.method} needs memory for all; only {known} can")
    more = sorted(recipe.config.keys() - {"score", "format"}) + sorted(recipe.data)
    if more or "score" not in recipe.config:
        found = ", ".join(more) or "no score"
        raise RecipeError(
            f"unmeasured: {found}; it takes the setting score, without cameras, alone"
        )
    source, out = resolve(recipe.target), Path(out)
    package = importlib.import_module(STREAMS[recipe.method])
    before, after = package.prune_file(
        source, out, recipe.budget, recipe.config["score"], overwrite=overwrite, progress=progress
    )
    sizes = {"bytes_before": source.stat().st_size, "bytes": out.stat().st_size}
    return {"model": str(out), "splats_before": before, "splats": after, **sizes}
