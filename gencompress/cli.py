"""The command line: parsing, progress on stderr, results on stdout, exit codes. No maths."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import gencompress
from gencompress import cli_audit, cli_batch, cli_demo
from gencompress.artifact import model_path, read_artifact
from gencompress.console import (
    DIFFERS,
    PLAIN,
    Json,
    Overwrite,
    Quiet,
    err_console,
    number,
    out_console,
    print_values,
    running,
    show,
    verdict,
)
from gencompress.core.budget import parse_budget
from gencompress.files import FormatError, writing
from gencompress.recipe import (
    Recipe,
    RecipeError,
    apply_overrides,
    from_dict,
    read_recipe,
    shipped_recipes,
    to_dict,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Makes generative models smaller and faster, and proves what that cost.",
)
app.command()(cli_audit.audit)
app.command()(cli_batch.batch)
app.command()(cli_demo.demo)

Strict = Annotated[bool, typer.Option("--strict", help="Refuse files with values to drop.")]
Out = Annotated[Path | None, typer.Option(help="Artifact folder, or a model file.")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="Recipe file, or a shipped one.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="name=value")]
DataFiles = Annotated[list[str] | None, typer.Option("--data", help="name=path, say truth=FILE")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of every random choice.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Predict the size only.")]


def main() -> None:
    """Entry point. Exit 0: success; 1: a file or a run failed; 2: usage or a setting is wrong."""
    try:
        app()
    except (RecipeError, FormatError, OSError, ValueError, RuntimeError) as problem:
        err_console.print(f"error: {problem}", style="red", **PLAIN)
        sys.exit(2 if isinstance(problem, RecipeError) else 1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    if version:
        out_console.print(gencompress.__version__, highlight=False)
        raise typer.Exit


@app.command()
def compress(
    method: Annotated[str, typer.Argument(help="Method; see `gencompress list`.")],
    target: Annotated[str | None, typer.Argument(help="Model file, or an embedded scene.")] = None,
    out: Out = None,
    keep: Annotated[str | None, typer.Option(help="40%, 50k, 3MB, '40% bytes'")] = None,
    min_psnr: Annotated[float, typer.Option(help="Smallest result that holds it, dB.")] = 0.0,
    finetune: Annotated[int | None, typer.Option(help="Steps of training afterwards.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may repeat.")] = None,
    views: Annotated[str | None, typer.Option(help="Capture whose cameras to use.")] = None,
    data: DataFiles = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = None,
    dry_run: DryRun = False,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="File to file: a .ply larger than memory.")
    ] = False,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one model smaller and measure what that cost."""
    plan = _plan("compress", method, target, recipe, {"seed": seed, "device": device})
    if keep is not None and min_psnr:
        raise RecipeError("--keep and --min-psnr: give one of them")
    _set_budget(plan, "100%" if min_psnr else keep)
    _set_data(plan, [*(data or []), *([f"views={views}"] if views is not None else [])])
    given = {"min_psnr": float(min_psnr) or None, "finetune": finetune, "prompts": prompt}
    if unmeasured:
        _stream(_recipe(plan, given, settings), out, overwrite, as_json, quiet)
        return
    _deliver(_recipe(plan, given, settings), out, dry_run, strict, overwrite, as_json, quiet)


@app.command()
def fit(
    method: Annotated[str, typer.Argument(help="Method: splat, mesh or nerf.")],
    target: Annotated[str | None, typer.Argument(help="Folder of a capture.")] = None,
    out: Out = None,
    keep: Annotated[str | None, typer.Option(help="Most splats, cells or bytes: 50k, 3MB")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training.")] = None,
    data: DataFiles = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = None,
    dry_run: DryRun = False,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a model from posed photos, with the pruning inside the training. Resumes if stopped."""
    plan = _plan("fit", method, target, recipe, {"seed": seed, "device": device})
    _set_data(plan, data or [])
    _set_budget(plan, keep)
    _deliver(
        _recipe(plan, {"steps": steps}, settings), out, dry_run, strict, overwrite, as_json, quiet
    )


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Methods, shipped recipes and embedded scenes."""
    from gencompress import scenes
    from gencompress.run import FITS, METHODS

    found = {
        "methods": list(METHODS),
        "fit": list(FITS),
        "recipes": {n: read_recipe(p).target for n, p in shipped_recipes().items()},
        "scenes": scenes.names(),
    }
    print_values(found, as_json)


@app.command()
def info(path: str, as_json: Json = False) -> None:
    """What a model file, scene or artifact holds."""
    from gencompress.run import inspect

    print_values(inspect(path), as_json)


@app.command()
def convert(source: str, out: Path, strict: Strict = False, overwrite: Overwrite = False) -> None:
    """Change the format of splats or of a mesh, by suffix; or take an artifact's model out."""
    from gencompress import run

    count = run.convert(source, out, strict=strict, overwrite=overwrite)
    out_console.print(f"{out}: {count}", **PLAIN)


@app.command()
def sample(
    path: Annotated[str, typer.Argument(help="Artifact, or a text-to-image pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may repeat.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first picture, 0; others count on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of sampling, 25.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale; the pipeline's own.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels; the pipeline's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A class of diffusers.")] = None,
    quiet: Quiet = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse prompts too long.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Pictures of prompts from a pipeline or its artifact; without prompts, of what an artifact is
    measured on."""
    from gencompress import draw

    given = {"steps": steps, "guidance": guidance, "size": size, "scheduler": scheduler}
    how = {name: value for name, value in given.items() if value is not None}
    useless = [name for name, value in {"seed": seed, **given}.items() if value is not None]
    if useless and not prompt:
        raise RecipeError(f"--{useless[0]} is for pictures of prompts: give --prompt")
    if out.is_dir() and any(path.suffix != ".png" for path in out.iterdir()):
        raise FileExistsError(f"{out}: exists and holds more than pictures; not replacing it")
    with running("sample", quiet) as progress, writing(out, overwrite=overwrite) as part:
        part.mkdir()
        how |= {"steps": 25 if steps is None else steps, "strict": strict, "progress": progress}
        paths = draw.sample(path, part, prompt or [], seed or 0, **how)
    out_console.print(f"{out}: {len(paths)} pictures", **PLAIN)


@app.command()
def measure(
    path: Annotated[Path, typer.Argument(help="Artifact folder.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an artifact again, beside the stored numbers; exit 1 if one differs."""
    from gencompress.run import measure_again

    artifact = read_artifact(path)
    stored = {row.name: row for row in artifact.measurements}
    with running("measure", quiet) as progress:
        rows = measure_again(artifact, progress)
    before = {row.name: stored[row.name].after if row.name in stored else None for row in rows}
    verdicts = {row.name: verdict(before[row.name], row) for row in rows}
    if as_json:
        print_values({"measurements": [dataclasses.asdict(row) for row in rows]}, True)
    else:
        table = Table("", "stored", "now", "")
        for row in rows:
            values = (number(value, row.unit) for value in (before[row.name], row.after))
            table.add_row(row.name, *values, verdicts[row.name])
        out_console.print(table)
    if DIFFERS in verdicts.values():
        raise typer.Exit(1)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(help="Artifact folders.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, .md and .json.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """One page over some artifacts."""
    from gencompress.report import write_report

    page = write_report(paths, out, title=title, overwrite=overwrite)
    out_console.print(f"report: {page}", **PLAIN)


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="Artifact folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write its card.md.")] = False,
) -> None:
    """Upload an artifact, with a model card of what was measured."""
    from gencompress.hub import push_to_hub

    place = push_to_hub(path, repo, private=not public, dry_run=dry_run)
    out_console.print(f"{'card' if dry_run else 'pushed'}: {place}", **PLAIN)


@app.command()
def backends(as_json: Json = False) -> None:
    """Ops by backends, with the reason for each no."""
    from gencompress_kernels import dispatch

    devices = {"cuda": "cuda", "triton": "cuda"}
    found = {
        op: {
            name: dispatch.why_not(op, name, devices.get(name, "cpu")) or "yes"
            for name in dispatch.BACKENDS
        }
        for op in dispatch.OPS
    }
    if as_json:
        print_values(found, True)
        return
    table = Table("op", *dispatch.BACKENDS)
    for op, row in found.items():
        table.add_row(op, *row.values())
    out_console.print(table)


def _plan(
    verb: str, method: str, target: str | None, recipe: str | None, more: dict[str, Any]
) -> dict[str, Any]:
    """Values of a recipe: those of a recipe file first, then what the command line says."""
    from gencompress.run import check_method

    check_method(method, verb)
    values: dict[str, Any] = {"method": method, "verb": verb}
    if recipe is not None:
        base = read_recipe(shipped_recipes().get(recipe, Path(recipe)))
        if (base.method, base.verb) != (method, verb):
            raise RecipeError(
                f"{recipe}: is to {base.verb} {base.method!r}, not to {verb} {method!r}"
            )
        values = to_dict(base)
    values |= {k: v for k, v in {"target": target, **more}.items() if v is not None}
    if "target" not in values:
        raise RecipeError("a target is missing: a model or capture, or an embedded scene")
    return values


def _set_budget(values: dict[str, Any], keep: Any) -> None:
    from gencompress.run import KEEP

    usual = KEEP[values["verb"]][values["method"]]
    if isinstance(keep, str):
        try:
            given = parse_budget(keep)
        except ValueError as problem:
            raise RecipeError(f"--keep: {problem}") from None
        if values["verb"] == "fit" and usual == "100%" and given.relative and given.amount != 1:
            raise RecipeError(f"--keep {keep}: a share of what? give a number, or bytes")
    values["budget"] = values.get("budget", usual) if keep is None else keep


def _set_data(values: dict[str, Any], given: list[str]) -> None:
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"--data {one!r}: expected name=path")
        values["data"] = {**values.get("data", {}), name: path}


def _recipe(values: dict[str, Any], given: dict[str, Any], settings: list[str] | None) -> Recipe:
    given = {name: value for name, value in given.items() if value is not None}
    values["config"] = {**values.get("config", {}), **given}
    return from_dict(apply_overrides(values, [_setting(s) for s in settings or []]))


def _deliver(
    plan: Recipe,
    out: Path | None,
    dry_run: bool,
    strict: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Runs a recipe into an artifact or a file, or predicts what that would give, and prints."""
    from gencompress.run import predict, run, run_to_file

    to_file = out is not None and bool(out.suffix) and not out.is_dir()
    if out is not None and to_file:
        plan = dataclasses.replace(plan, config={**plan.config, "format": _suffix(out)})
    if dry_run:
        if plan.config.get("min_psnr"):
            raise RecipeError("--dry-run: what min_psnr leaves is found by trying only")
        print_values(predict(plan, strict=strict), as_json)
        return
    if out is None:
        raise RecipeError("--out is missing: a folder for the artifact, or a model file")
    with running(plan.method, quiet) as say:
        if to_file:
            artifact = run_to_file(plan, out, strict=strict, overwrite=overwrite, progress=say)
            path = out
        else:
            artifact = run(plan, out, strict=strict, overwrite=overwrite, progress=say)
            path = model_path(artifact)
    rows = [dataclasses.asdict(row) for row in artifact.measurements]
    if as_json:
        print_values({"model": str(path), "measurements": rows}, True)
    else:
        show(artifact)
        out_console.print(f"model: {path}", **PLAIN)


def _stream(plan: Recipe, out: Path | None, overwrite: bool, as_json: bool, quiet: bool) -> None:
    from gencompress.stream import stream

    if out is None:
        raise RecipeError("--out is missing: a model file")
    with running(plan.method, quiet) as say:
        found = stream(plan, out, overwrite=overwrite, progress=say)
    print_values(found, as_json)


def _setting(text: str) -> str:
    """`--set score=opacity` means config.score; a dotted name is taken as it is."""
    known = ("seed", "device", "dtype", "target", "budget")
    name = text.partition("=")[0].strip()
    return text if "." in name or name in known else f"config.{text}"


def _suffix(out: Path) -> str:
    name = out.name.lower()
    return ".compressed.ply" if name.endswith(".compressed.ply") else out.suffix
