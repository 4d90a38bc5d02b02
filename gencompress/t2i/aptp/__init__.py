"""APTP: experts for prompts that resemble each other, and the router between them."""

from gencompress.t2i.aptp.method import (
    apply,
    compact,
    compare,
    compress,
    draw,
    load,
    measure,
    predict,
    preview,
    restore,
    sample,
    save,
    score,
)
from gencompress.t2i.aptp.settings import Config
from gencompress.t2i.pipeline import is_hub_name

__all__ = [
    "Config", "apply", "compact", "compare", "compress", "draw", "is_hub_name", "load",
    "measure", "predict", "preview", "restore", "sample", "save", "score",
]  # fmt: skip
