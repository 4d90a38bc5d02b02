"""Memorised pictures: detected, located in weights, cut out, searched for again (Dori), and
repaired away; and the audit of any pipeline."""

from gencompress.t2i.dori.audit import audit
from gencompress.t2i.dori.method import (
    apply,
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
from gencompress.t2i.dori.settings import Config
from gencompress.t2i.pictures import draw
from gencompress.t2i.pipeline import is_hub_name

__all__ = [
    "Config", "apply", "audit", "compare", "compress", "draw", "is_hub_name", "load", "measure",
    "predict", "preview", "restore", "sample", "save", "score",
]  # fmt: skip
