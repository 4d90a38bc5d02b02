"""What README.md and docs/ say, held against the code: commands, settings, imports, links. A page
that names what is not there fails."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from report_samples import make_artifact

from gencompress import cli, run, scenes, stream
from gencompress.artifact import read_artifact
from gencompress.mesh.formats import FORMATS as MESHES
from gencompress.nerf.formats import SUFFIX
from gencompress.nerf.surface import FORMATS as SURFACES
from gencompress.recipe import config_from, from_dict, shipped_recipes
from gencompress.report import write_report
from gencompress.report.rows import GROUPS
from gencompress.splat.formats import FORMATS as SPLATS
from gencompress.t2i.aptp.start import KNOWN as BEGUN
from gencompress.t2i.dense2moe.start import KNOWN as BEFORE
from gencompress.t2i.dori.method import PAIRS
from gencompress.t2i.formats import DENOISERS
from gencompress.t2i.inputs import KNOWN
from gencompress.views.images import FORMATS as PHOTOS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "kernels" / "README.md"]
LANGUAGES = ("sh", "python", "toml")
# commands of the pages that are really run, in a temporary folder; all others are parsed
CHEAP = (
    "gencompress list",
    "gencompress info still_life",
    "gencompress info tiny-sd",
    "gencompress backends",
    "gencompress convert still_life scene.spz",
    "gencompress convert chair chair.glb",
    "gencompress compress splat still_life --recipe splat-demo --dry-run",
)
# what --data may name; else what t2i knows
DATA = {
    "splat": {"views"},
    "mesh": {"views", "truth"},
    "nerf": {"views"},
    "aptp": {*KNOWN, *BEGUN},
    "dense2moe": {*KNOWN, *BEFORE},
    "dori": {*KNOWN, PAIRS},
}
OPENED = ("path", "paths", "source", "pipeline", "pairs", "targets")  # what commands read
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)


class Planned(Exception):
    """A command got as far as running its recipe."""


@pytest.fixture
def nothing_runs(monkeypatch):
    """A recipe that is to be run or predicted is handed over instead."""

    def hand_over(recipe, *_, **__):
        raise Planned(recipe)

    for name in ("run", "run_to_file", "predict"):
        monkeypatch.setattr(run, name, hand_over)
    monkeypatch.setattr(stream, "stream", hand_over)


def blocks(path, language):
    return [m[2] for m in FENCE.finditer(path.read_text("utf-8")) if m[1] == language]


def commands(text):
    """The simple commands of shell lines, each as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def problem(words, made):
    """What is wrong with a command, "" if nothing is; `made` collects what commands write."""
    program, *rest = words
    try:
        if program == "gencompress":
            _gencompress(rest, made)
        elif program == "pip":
            _pip(rest)
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
        else:
            assert program == "pytest", f"{program}: no program that the pages know"
    except (Exception, SystemExit) as found:
        return f"{shlex.join(words)}: {type(found).__name__}: {found}"
    return ""


def _gencompress(words, made):
    name, *rest = words
    group = typer.main.get_command(cli.app)
    assert name in group.commands, f"no command {name}"
    values = group.commands[name].make_context(name, list(rest)).params
    if name in ("compress", "fit"):
        try:
            group.main([*words, "--quiet"], prog_name="gencompress", standalone_mode=False)
        except Planned as planned:
            _recipe(planned.args[0], made)
    for key in OPENED:
        found = values.get(key) or ()
        for one in [found] if isinstance(found, str | Path) else found:
            _known_place(str(one), made)
    for one in values.get("methods") or ():
        run.check_method(one)
    for one in values.get("recipes") or ():
        assert one in shipped_recipes() or one.endswith(".toml"), f"no recipe {one}"
    if values.get("out") is not None:
        made.add(str(values["out"]))


def _recipe(recipe, made):
    """Its settings are those of the method, and what it reads is there or to be given."""
    config_from(run.method(recipe.method, recipe.verb).Config, recipe.config)
    _known_place(recipe.target, made)
    unknown = recipe.data.keys() - DATA.get(recipe.method, {*KNOWN})
    assert not unknown, f"--data {unknown}"
    for place in recipe.data.values():
        _known_place(place, made)


def _known_place(text, made):
    """A name without a suffix is a scene or was made before; DIR, a/b and a.b are the reader's."""
    free = text.isupper() or "/" in text or "." in text
    assert free or text in made or text in scenes.names(), f"{text}: no scene, and made nowhere"


def _pip(words):
    for flag, value in zip(words, words[1:], strict=False):
        extras = re.fullmatch(r"\.\[(\w+)\]", value)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        assert flag != "-c" or (ROOT / value).is_file(), f"there is no {value}"
        assert not extras or extras[1] in known["optional-dependencies"], f"no extra {value}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.usefixtures("nothing_runs")
def test_commands_exist_with_these_options_and_settings(page):
    made: set[str] = set()
    found = [words for block in blocks(page, "sh") for words in commands(block)]
    assert [p for p in (problem(words, made) for words in found) if p] == []


@pytest.mark.parametrize(
    "line",
    [
        "gencompress compres splat still_life --out x",
        "gencompress compress splat still_life --kep 50% --out x",
        "gencompress compress splat still_life --keep 0% --out x",
        "gencompress compress splat still_life --keep 50%",
        "gencompress compress splats still_life --out x",
        "gencompress compress splat stil_life --out x",
        "gencompress compress splat still_life --set scor=merge --out x",
        "gencompress compress splat still_life --set score=nothing --out x",
        "gencompress compress splat still_life --set num_views=many --out x",
        "gencompress compress splat still_life --recipe splat-dmo --out x",
        "gencompress compress splat still_life --recipe mesh-demo --out x",
        "gencompress compress splat still_life --data truth=a.ply --out x",
        "gencompress compress splat still_life --out x.xyz",
        "gencompress compress prune tiny-sd --data prompt=prompts.txt --out x",
        "gencompress compress prune tiny-sd --data prompts=prompts --out x",
        "gencompress compress optiprune tiny-sd --set prior=none --out x",
        "gencompress fit prune photos/ --out x",
        "gencompress fit splat photos/ --keep 50% --out x",
        "gencompress fit nerf photos/ --set pruner=nothing --out x",
        "gencompress demo splats",
        "gencompress batch splat-dmo --out x",
        "gencompress info nothing",
        "gencompress convert still_life",
        "gencompress sample tiny-sd --prompt frog",
        "gencompress measure half",
        "gencompress report half --out x",
        "gencompress report still_life --out x --titel y",
        "pip install -e . -c constraints/none.txt",
        "pip install -e '.[none]'",
        "python tools/nothing.py",
        "make everything",
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_wrong_commands_are_found(line):
    (words,) = commands(line)
    assert problem(words, set())


@pytest.mark.usefixtures("nothing_runs")
def test_right_commands_are_not_faulted():
    lines = """gencompress compress splat still_life --keep 25% --out half  # one
        pip install -e . -c constraints/cpu.txt && gencompress report half --out report
        gencompress compress prune DIR --data images=photos/ \\
            --set 'kinds=["block"]' --set allocate=global --out x
        gencompress compress splat scene.ply --recipe splat-demo --dry-run"""
    made: set[str] = set()
    found = list(commands(lines))
    kinds = [words[1] for words in found]
    assert kinds == ["compress", "install", "report", "compress", "compress"]
    assert [problem(words, made) for words in found] == [""] * 5
    assert made == {"half", "report", "x"}


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_run(command, call, monkeypatch, tmp_path):
    shell = [block for page in PAGES for block in blocks(page, "sh")]
    assert command in [shlex.join(words) for block in shell for words in commands(block)]
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*shlex.split(command)[1:])
    assert code == 0 and out.strip(), err


def verbs():
    return [("compress", name) for name in run.METHODS] + [("fit", name) for name in run.FITS]


def shown(default):
    """A default as the pages write it: as `--set` takes it."""
    if default is None:
        return "none"
    text = default if isinstance(default, str) and default else json.dumps(default)
    return f"`{text}`"


def fields(verb, method):
    kind = run.method(method, verb).Config
    return {field.name: shown(field.default) for field in dataclasses.fields(kind)}


def differences(section, wanted):
    """What a table of settings lacks, has too much, or says otherwise."""
    found = dict(ROW.findall(section))
    return {
        name: (found.get(name), wanted.get(name))
        for name in found | wanted
        if found.get(name) != wanted.get(name)
    }


@pytest.mark.parametrize(("verb", "method"), verbs(), ids=lambda text: text)
def test_settings_are_those_of_the_code(verb, method):
    text = (ROOT / "docs" / f"{method}.md").read_text("utf-8")
    heading = f"\n## Settings of `{verb} {method}`\n"
    assert text.count(heading) == 1
    section = text.partition(heading)[2].partition("\n## ")[0]
    wanted = fields(verb, method)
    if f"Those of `fit {method}`" in section:
        wanted = dict(wanted.items() - fields("fit", method).items())
        wanted |= {name: fields(verb, method)[name] for name, _ in ROW.findall(section)
                   if name in fields("fit", method)}  # fmt: skip
    assert differences(section, wanted) == {}


def test_wrong_settings_are_found():
    wanted = fields("compress", "splat")
    rows = "\n".join(f"| `{name}` | {value} | words |" for name, value in wanted.items())
    assert differences(rows, wanted) == {}
    assert differences(rows.replace("| `24` |", "| `25` |"), wanted) == {
        "num_views": ("`25`", "`24`")
    }
    assert differences(rows.replace("`score`", "`scor`"), wanted).keys() == {"score", "scor"}
    assert "format" in differences(rows.rpartition("\n")[0], wanted)


def code_problems(text):
    """Names that the Python of a page takes from this package and that are not there."""
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gencompress"):
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.startswith("gencompress")]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "gencompress":
            found.append(("gencompress", node.attr))
    return [names for names in found if not _is_there(*names)]


def _is_there(module, name):
    try:
        return not name or hasattr(importlib.import_module(module), name) or bool(
            importlib.util.find_spec(f"{module}.{name}")
        )  # fmt: skip
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_imports_what_is_there(page):
    text = page.read_text("utf-8")
    assert {m[1] for m in FENCE.finditer(text)} <= {*LANGUAGES}
    assert text.count("\n```") == 2 * len(FENCE.findall(text))
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        assert code_problems(block) == []
    for block in blocks(page, "toml"):
        recipe = from_dict(tomllib.loads(block))
        config_from(run.method(recipe.method, recipe.verb).Config, recipe.config)


def test_wrong_code_is_found():
    assert code_problems("import gencompress\ngencompress.compress('x')") == []
    assert code_problems("import gencompress\ngencompress.compres('x')")
    assert code_problems("from gencompress.t2i.optiprune import optiprun")
    assert code_problems("from gencompress.t2i.nothing import one")


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page, text):
    found = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        inside = target.resolve().is_relative_to(ROOT)
        whole = target.exists() and inside and (not anchor or anchor in anchors(target))
        if not link.startswith(("http://", "https://")) and not whole:
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text("utf-8")) == []


def test_broken_links_are_found():
    page = ROOT / "docs" / "README.md"
    text = "[a](nothing.md) ![b](none.png) [c](splat.md#no-such) [d](../README.md#limits) [e](#no)"
    assert broken_links(page, text) == ["nothing.md", "none.png", "splat.md#no-such", "#no"]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    linked = {link.partition("#")[0] for link in LINK.findall(index)}
    assert {page.name for page in PAGES[1:]} - linked == {"README.md"}


def test_formats_are_all_named():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    for name in [*SPLATS, *MESHES, *SURFACES, SUFFIX, *DENOISERS, *KNOWN]:
        assert f"`{name}`" in text, name
    for name in PHOTOS:
        assert name in text.upper(), name


def test_the_fields_of_a_report_are_all_named(tmp_path):
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    make_artifact(tmp_path / "made")
    page = write_report([tmp_path / "made"], tmp_path / "r")
    artifact = read_artifact(tmp_path / "made")
    report = json.loads(page.with_name("report.json").read_text("utf-8"))
    one = report["artifacts"][0]
    rows = one["measurements"]
    change = next(row["change"] for row in rows if row["change"])
    for name in [*artifact.manifest, *report, *one, *rows[0], *change, *report["comparison"]]:
        assert f"`{name}`" in text, name
    for name in GROUPS:
        assert name in text, name


def test_the_names_of_a_method_are_those_that_run_calls():
    text = (ROOT / "docs" / "extending.md").read_text("utf-8")
    table = {name for name, call in ROW.findall(text) if f"{name}(" in call or name == "Config"}
    tree = ast.parse((ROOT / "gencompress" / "run.py").read_text("utf-8"))
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "package"
    }
    assert called - {"sample", "draw"} == table
    for name in run.METHODS:
        package = run.method(name)
        assert [n for n in table if not hasattr(package, n)] == []
