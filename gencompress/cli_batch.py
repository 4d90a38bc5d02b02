"""The command `gencompress batch`: parsing, progress on stderr, what became of runs on stdout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gencompress.console import (
    PLAIN,
    Json,
    Quiet,
    out_console,
    print_values,
    running,
    show_outcomes,
)


def batch(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, or shipped ones.")],
    out: Annotated[Path, typer.Option(help="Folder for artifacts and report.")],
    targets: Annotated[
        list[str] | None, typer.Option(help="Run on these instead: 'scenes/*.ply'")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, sharing the cores.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Give the runs to a Ray cluster.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other artifacts.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run many recipes, or one on many targets; keeps what is there. Exit 1 if a run fails."""
    from gencompress.batch import plan, run_batch

    how = {"jobs": jobs, "ray": ray, "overwrite": overwrite}
    with running("batch", quiet) as say:
        outcomes = run_batch(plan(recipes, targets or []), out, progress=say, **how)
    if as_json:
        print_values({"runs": [dataclasses.asdict(outcome) for outcome in outcomes]}, True)
    else:
        show_outcomes(outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if len(failed) < len(outcomes) and not as_json:
        out_console.print(f"report: {out / 'report.html'}", **PLAIN)
    if failed:
        raise typer.Exit(1)
