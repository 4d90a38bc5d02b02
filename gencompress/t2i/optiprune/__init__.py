"""OptiPrune (arXiv 2507.00789): initial noise guided by attention, and tokens pruned by similarity,
both while sampling. The weights stay as they are."""

from gencompress.t2i.optiprune.method import (
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
from gencompress.t2i.optiprune.settings import Config, draw
from gencompress.t2i.optiprune.wrap import optiprune
from gencompress.t2i.pipeline import is_hub_name

__all__ = [
    "Config", "apply", "compare", "compress", "draw", "is_hub_name", "load", "measure",
    "optiprune", "predict", "preview", "restore", "sample", "save", "score",
]  # fmt: skip
