"""Triangle meshes: wrong faces found by 2D alpha masks, and removed."""

from gencompress.mesh.config import Config
from gencompress.mesh.method import (
    apply,
    compact,
    compare,
    compress,
    load,
    measure,
    predict,
    preview,
    restore,
    sample,
    save,
    score,
)

__all__ = [
    "Config",
    "apply",
    "compact",
    "compare",
    "compress",
    "load",
    "measure",
    "predict",
    "preview",
    "restore",
    "sample",
    "save",
    "score",
]
