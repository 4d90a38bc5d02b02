"""The command `gencompress audit`: parsing, progress on stderr, the verdict on stdout. No maths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gencompress.console import PLAIN, Json, Quiet, out_console, print_values, running


def audit(
    pipeline: Annotated[str, typer.Argument(help="Pipeline, artifact or embedded scene.")],
    pairs: Annotated[Path, typer.Option(help="Training pictures and captions: .csv or .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the audit.")],
    encoder: Annotated[
        str, typer.Option(help="Copy detector: a folder, or SSCD's file.")
    ] = "tiny-eval",
    trust: Annotated[
        bool, typer.Option("--trust", help="Let the file of --encoder, a program, run.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Of each search, 50.")] = None,
    draws: Annotated[int | None, typer.Option(help="Of noise and timestep a step, 8.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Pictures of a caption, 10.")] = None,
    starts: Annotated[
        list[str] | None, typer.Option(help="caption, normal, other; may repeat.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Cosine of a copy, 0.7.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale, 7.5.")] = None,
    sampling_steps: Annotated[int | None, typer.Option(help="Of a picture, 50.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A class of diffusers.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice, 0.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an audit.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Whether a pipeline still holds training pictures: by caption, and by a search. Resumes."""
    from gencompress.audit import audit_pipeline

    given = {
        "steps": steps, "draws": draws, "seeds": seeds, "starts": starts, "threshold": threshold,
        "guidance": guidance, "sampling_steps": sampling_steps, "scheduler": scheduler,
        "size": size, "seed": seed,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    with running("audit", quiet) as say:
        found = audit_pipeline(
            pipeline, pairs, out, settings, encoder=encoder, trust=trust, device=device,
            overwrite=overwrite, progress=say,
        )  # fmt: skip
    if as_json:
        print_values(found, True)
        return
    print_values({"verdict": found["verdict"], "says": found["says"]}, False)
    out_console.print(f"audit: {out / 'audit.html'}", **PLAIN)
