"""An audit of any text-to-image pipeline, whoever compressed it, as a folder: audit.json, audit.md,
audit.html and a row of pictures for every training picture."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gencompress import __version__
from gencompress.artifact import read_artifact
from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError, locked, sweep, writing
from gencompress.recipe import config_from
from gencompress.report.audit import audit_html, audit_markdown
from gencompress.run import METHODS, WORK, method
from gencompress.scenes import located, resolve

SCHEMA = 1  # of audit.json; grows when a field changes its meaning or goes away
JSON, PAGE, TEXT, PICTURES = "audit.json", "audit.html", "audit.md", "pictures"
JUDGES = "tiny-eval"  # whose copy detector compares, if no other is named
NOTES = {
    "optiprune": "OptiPrune leaves the weights as they are. Searches and pictures have its tokens "
    "pruned in every step, from noise that is not optimised; the memory is in the weights all the "
    "same.",
    "aptp": "The router sends prompts to experts, and triggers are no prompts: every picture is "
    "audited in the expert that its caption goes to.",
}


def audit_pipeline(
    source: str,
    pairs: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    encoder: str = JUDGES,
    trust: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Audits a pipeline and writes the folder `out`, whole or not at all; returns what audit.json
    holds. Triggers and judged pictures are kept beside `out` until then, so an audit that was
    stopped and is started again does none of them twice.

    Args:
        source: a folder of diffusers, an embedded scene, a hub's name, or an artifact.
        pairs: a file as in t2i/dori/pairs.py.
        settings: fields of t2i.dori.audit.AuditConfig.
        encoder: of copies: the folder of a model of transformers, a folder that holds one as
            `copies`, an embedded scene, or SSCD as a TorchScript file.
        trust: the TorchScript file is a program, which may run.

    Raises:
        RecipeError: a setting is wrong.
        FormatError: a file is not what it should be.
        FileExistsError: `out` exists, and `overwrite` is False or it holds no audit.
        FileNotFoundError: there is no such pipeline, pairs file or folder to hold `out`.
        ValueError: a pipeline that cannot be searched.
    """
    from gencompress.t2i.dori.audit import AuditConfig, audit, merged
    from gencompress.t2i.dori.pairs import load_pairs
    from gencompress.t2i.dori.summary import curve, summary, write_rows

    out = Path(out)
    _check_out(out, overwrite)
    config = config_from(AuditConfig, settings or {})
    given = load_pairs(pairs)
    detector = _detector(encoder, trust, device)
    progress("loading")
    work = out.with_name(WORK.format(out.name))
    with contextlib.ExitStack() as stack:
        parts, notes = _parts(source, device, [pair.caption for pair in given], config.size, stack)
        stack.enter_context(locked(work))
        sweep(out)
        work.mkdir(exist_ok=True)
        found = merged(
            [
                audit(pipe, given, detector, config, only=only, workdir=work, progress=progress)
                for pipe, only in parts
            ]
        )
        progress("writing")
        document = {
            "schema": SCHEMA,
            "gencompress": __version__,
            "title": f"Audit of {Path(source).name}",
            "pipeline": Path(source).name,
            "device": device,
            "notes": notes,
            "curves": [*curve(found, "targets"), *curve(found, "controls", "control")],
            **summary(found),
        }
        with writing(out, overwrite=overwrite) as part:
            _write(part, document, lambda folder: write_rows(found, folder))
        shutil.rmtree(work, ignore_errors=True)
    return document


def _write(part: Path, document: dict[str, Any], pictures: Callable[[Path], list[Path]]) -> None:
    folder = part / PICTURES
    folder.mkdir(parents=True)
    images = []
    for one, path in zip(document["pictures"], pictures(folder), strict=True):
        one["file"] = f"{PICTURES}/{path.name}"
        images.append(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}")
    files = {
        JSON: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        TEXT: audit_markdown(document),
        PAGE: audit_html(document, images),
    }
    for name, text in files.items():
        (part / name).write_text(text, encoding="utf-8", newline="\n")


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuses before the work what would be refused after it."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists already; choose another name or --overwrite")
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (out / JSON).is_file():
        raise FileExistsError(f"{out}: exists and is not an audit; not replacing it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")


def _detector(source: str, trust: bool, device: str) -> Any:
    from gencompress.measure.encoders import load_encoder

    path = resolve(source)
    if path.is_file():
        name = f"{path.name}, sscd-320"
        return load_encoder(path, "sscd-320", name=name, device=device, trust=trust)
    if (path / "copies").is_dir():
        return load_encoder(path / "copies", "copies", name=f"{path.name}/copies", device=device)
    return load_encoder(path, "copies", device=device)


def _parts(
    source: str, device: str, captions: list[str], size: int | None, stack: contextlib.ExitStack
) -> tuple[list[tuple[Any, list[int] | None]], list[str]]:
    """The pipelines to search, each with the places of its pairs (None: all), and what a reader has
    to know about them. Tokens of OptiPrune are pruned until `stack` closes."""
    import torch

    from gencompress.t2i.pipeline import load_pipeline

    place = located(source)
    folder = Path(place)
    dtype = torch.float32 if device == "cpu" else None
    if not (folder / "manifest.json").is_file():
        return [(load_pipeline(place, device=device, dtype=dtype), None)], []
    artifact = read_artifact(folder)
    kind = artifact.manifest["method"]
    if not METHODS.get(kind, "").startswith("gencompress.t2i."):
        raise FormatError(folder, f"an artifact of {kind!r}; expected one of a pipeline")
    made = method(kind).restore(artifact.folder / "model")
    notes = [NOTES[kind]] if kind in NOTES else []
    if kind == "optiprune":
        _prune_tokens(made, size, stack)
    if not hasattr(made, "experts"):
        return [(getattr(made, "pipe", made).to(device), None)], notes
    from gencompress.t2i.aptp.routed import pipeline_of
    from gencompress.t2i.aptp.router import route

    goes = route(made.router, captions).tolist()
    return [
        (pipeline_of(made, expert).to(device), [i for i, own in enumerate(goes) if own == expert])
        for expert in sorted({*goes})
    ], notes


def _prune_tokens(made: Any, size: int | None, stack: contextlib.ExitStack) -> None:
    from gencompress.t2i.optiprune.prune import pruned
    from gencompress.t2i.optiprune.settings import pruning_of
    from gencompress.t2i.sample import default_size

    how = pruning_of(made, size or default_size(made.pipe))
    if how is not None:
        stack.enter_context(pruned(made.pipe, replace(how, rest=0.0), bypass="never"))
