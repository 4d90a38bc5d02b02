"""What a smaller pipeline costs and what it still draws, beside the one that it was made of."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement, macs
from gencompress.measure.cost import cost_rows, peak_memory
from gencompress.measure.speed import time_call
from gencompress.t2i.calibrate import Calibration, batches
from gencompress.t2i.distill import predict
from gencompress.t2i.evaluate import compare_images, make_images
from gencompress.t2i.inputs import Inputs
from gencompress.t2i.pipeline import denoiser, hushed, sequence_length, token_limits
from gencompress.t2i.tiny import flux_ids

FORWARDS = 5  # that a time is the median of
TIMED, COMPARED = 4, 64  # samples of a forward that is timed; latents that answers are compared on
EXACT_DB = 100.0  # what no difference at all counts as


def pipeline_rows(
    before: Any, after: Any, data: Inputs, progress: Progress = quiet
) -> list[Measurement]:
    """Parameters and MACs of the denoisers, time and memory of a forward, and all that the pictures
    of `data.wanted` tell with `data.judges` (t2i/evaluate.py)."""
    size = data.wanted.size
    old, new = denoiser(before)[0], denoiser(after)[0]
    costs = cost_rows(old, new, forward_inputs(before, size))
    return costs + drawing_rows(before, after, data, progress)


def drawing_rows(
    before: Any, after: Any, data: Inputs, progress: Progress = quiet
) -> list[Measurement]:
    """The same without parameters and MACs."""
    rows = forward_rows(before, after, data.wanted.size)
    pictures = [make_images(pipe, data.wanted, progress=progress) for pipe in (before, after)]
    return rows + compare_images(*pictures, data.wanted.prompts, data.judges, progress)


def forward_inputs(pipe: Any, size: int, batch: int = 1) -> dict[str, Any]:
    """Zeros in the shapes of one forward of the denoiser: pictures of `size` pixels, prompts of
    full length. Of Flux, the places of the tokens are true."""
    model, _ = denoiser(pipe)
    latent, tokens = size // pipe.vae_scale_factor, text_tokens(pipe)
    inputs = macs.model_inputs(model, latent, tokens, batch, model.device)
    if "img_ids" in inputs:
        ids = flux_ids(latent // 2, tokens)
        inputs |= {n: one.to(inputs[n]) for n, one in zip(("img_ids", "txt_ids"), ids, strict=True)}
    return inputs


def beside(before: Any, after: Any) -> Any:
    """The second pipeline where the first one's denoiser is, in its dtype."""
    model, _ = denoiser(before)
    with hushed():
        return after.to(device=model.device, dtype=model.dtype)


def point(
    series: str, x: float, x_name: str, y: float, y_name: str, unit: str = ""
) -> dict[str, Any]:
    """Of a curve in the report; `unit` is that of y."""
    return {
        "kind": "curve", "series": series, "x": x, "x_name": x_name, "x_unit": "", "y": y,
        "y_name": y_name, "y_unit": unit,
    }  # fmt: skip


def error_db(before: Any, after: Any, seen: Calibration, generator: torch.Generator) -> float:
    """How near the answers of the second denoiser are to those of the first on the same noisy
    latents: 10 log10 of the mean square of the answers over that of the difference."""
    power = apart = 0.0
    with torch.no_grad():
        for met, told in batches(seen, before, 1, min(COMPARED, 4 * len(seen.latents)), generator):
            wanted, found = (predict(denoiser(pipe)[0], met, told) for pipe in (before, after))
            power += float(wanted.double().square().sum())
            apart += float((wanted - found).double().square().sum())
    return EXACT_DB if apart == 0 else min(10 * math.log10(power / apart), EXACT_DB)


def text_tokens(pipe: Any) -> int:
    """How many the denoiser is told. Stable Diffusion 3 joins those of CLIP and of T5, and has
    zeros for a T5 that is not there."""
    limits = token_limits(pipe)
    if macs.family(denoiser(pipe)[0]) != "sd3":
        return max(limits.values())
    usual = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
    return limits["tokenizer"] + sequence_length(pipe).get("max_sequence_length", usual)


def forward_rows(before: Any, after: Any, size: int) -> list[Measurement]:
    """The median time of a forward of a few samples at once, and the memory it takes at most."""
    times, peaks = [], []
    for pipe in (before, after):
        model, _ = denoiser(pipe)
        inputs = forward_inputs(pipe, size, TIMED)

        def forward(model: Any = model, inputs: dict[str, Any] = inputs) -> None:
            with torch.no_grad():
                model(**inputs)

        times.append(time_call(forward, repeats=FORWARDS))
        peaks.append(float(peak_memory(forward, model.device)))
    return [
        Measurement(
            f"time of a forward of {TIMED}", times[0].median, times[1].median, "s", "lower",
            FORWARDS, times[1].spread,
        ),
        Measurement(f"memory of a forward of {TIMED}", peaks[0], peaks[1], "B", "lower"),
    ]  # fmt: skip
