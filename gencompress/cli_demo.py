"""The command `gencompress demo`: shipped demos one after the other, and a report over them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from gencompress.artifact import is_made, read_artifact
from gencompress.console import PLAIN, Overwrite, Quiet, out_console, running, show
from gencompress.recipe import RecipeError, read_recipe, shipped_recipes

# ends of the names of shipped recipes
WHOLE, QUICK = "-demo", "-quick"


def demo(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all if none.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for artifacts and report.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="In two to three minutes: less work, worse results.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run every method on its embedded default, then write one report. Goes on if stopped."""
    from gencompress.report.write import NAMES, write_report
    from gencompress.run import check_method, run

    for name in methods or []:
        check_method(name)
    end = QUICK if quick else WHOLE
    shipped = {
        file.removesuffix(end): path
        for file, path in shipped_recipes().items()
        if file.endswith(end)
    }
    having = list(dict.fromkeys(name.split("-")[0] for name in shipped))
    for name in methods or []:
        if name not in having:
            raise RecipeError(f"method {name!r}: has no such demo; those are {', '.join(having)}")
    if out.exists() and not overwrite and not _was_stopped(out, [*shipped, *NAMES], NAMES):
        raise FileExistsError(f"{out}: exists already; choose another --out or --overwrite")
    wanted = methods or having
    recipes = {n: read_recipe(p) for n, p in shipped.items() if n.split("-")[0] in wanted}
    out.mkdir(parents=True, exist_ok=True)
    folders = [out / name for name in recipes]
    for name, recipe in recipes.items():
        if overwrite or not is_made(out / name, recipe):
            with running(name, quiet) as say:
                run(recipe, out / name, overwrite=overwrite, progress=say)
    title = "gencompress demo, quick" if quick else "gencompress demo"
    page = write_report(folders, out, title=title, overwrite=True)
    for folder in folders:
        show(read_artifact(folder))
    out_console.print(f"report: {page}", **PLAIN)


def _was_stopped(folder: Path, known: Iterable[str], last: Iterable[str]) -> bool:
    """Whether a folder holds nothing but `known` (and what is hidden), and `last` not whole."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {*last}
    return {n for n in found if n[0] != "."} <= {*known} and not {*last} <= found
