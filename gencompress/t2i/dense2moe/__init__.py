"""Dense2MoE: feed-forwards to mixtures of experts, blocks to mixtures of blocks."""

from gencompress.t2i.dense2moe.method import (
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
from gencompress.t2i.dense2moe.settings import Config
from gencompress.t2i.pictures import draw
from gencompress.t2i.pipeline import is_hub_name

__all__ = [
    "Config", "apply", "compact", "compare", "compress", "draw", "is_hub_name", "load",
    "measure", "predict", "preview", "restore", "sample", "save", "score",
]  # fmt: skip
