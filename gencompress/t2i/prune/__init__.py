"""Plain structured pruning of a denoiser, and distillation after it: the baselines."""

from gencompress.t2i.pictures import draw
from gencompress.t2i.pipeline import is_hub_name
from gencompress.t2i.prune.method import (
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
    "Config", "apply", "compact", "compare", "compress", "draw", "is_hub_name", "load",
    "measure", "predict", "preview", "restore", "sample", "save", "score",
]  # fmt: skip
