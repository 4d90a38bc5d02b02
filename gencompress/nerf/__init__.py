"""Radiance fields on a hash grid: trained hollow, or pruned, within a budget of cells or bytes."""

from gencompress.nerf.method import (
    Config,
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
