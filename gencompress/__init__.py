"""gencompress: makes generative models smaller and faster, and proves what that cost."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that holds it; imported at first use, so that this import costs nothing
_PUBLIC = {
    "Artifact": "gencompress.artifact",
    "Budget": "gencompress.core.budget",
    "Recipe": "gencompress.recipe",
    "compress": "gencompress.run",
    "parse_budget": "gencompress.core.budget",
    "push_to_hub": "gencompress.hub",
    "read_artifact": "gencompress.artifact",
    "read_recipe": "gencompress.recipe",
    "write_report": "gencompress.report",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gencompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
