"""Gaussian splats: a trained scene in, a smaller scene out, without the photos it came from."""

from gencompress.splat.method import (
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
