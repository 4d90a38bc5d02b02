"""What the methods that learn from data begin with: a pipeline, and inputs that fit it."""

from __future__ import annotations

from typing import Any

import torch

from gencompress.t2i.inputs import Inputs, read_inputs
from gencompress.t2i.pipeline import load_pipeline
from gencompress.t2i.sample import default_size, sample

DTYPES = ("float32", "float16", "bfloat16")


def pipeline_and_inputs(
    target: str,
    data: dict[str, str],
    device: str,
    dtype: str,
    *,
    size: int | None,
    images: int,
    steps: int,
    guidance: float | None,
) -> tuple[Any, Inputs]:
    """Reads a pipeline (a folder, or a hub's name) and what `data` names: see t2i/inputs.py.

    Args:
        size: of pictures in pixels, either side; None: the pipeline's own.
        images: pictures that measure.
        steps, guidance: of sampling, as in `sample.sample`.

    Raises:
        FormatError: a file is not what it should be.
        OSError: the hub did not give the pipeline.
        ValueError: a dtype or name of data that is not known, or a size or guidance that the
            pipeline cannot take.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: known are float32, float16 and bfloat16")
    pipe = load_pipeline(target, device=device, dtype=getattr(torch, dtype))
    size = size or default_size(pipe)
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "size": size}
    inputs = read_inputs(data, count=images, device=device, **how)
    # no picture: refuses now what it would refuse after the work
    sample(pipe, (), seeds=(), **how)
    return pipe, inputs
