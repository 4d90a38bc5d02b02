"""The plan of the rooms, kept by reading imports: who may import whom, and what stays light."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for top in ("gencompress", "kernels") for path in (ROOT / top).rglob("*.py"))

# room -> the other rooms it may import. A room is a file or folder of gencompress/; "" is the
# package itself (its version). Arrows never turn back.
BELOW_METHODS = {"files", "kernels", "core", "measure"}
ROOMS = {
    "kernels": set(),
    "files": set(),
    "core": {"kernels"},
    "measure": {"files", "kernels", "core"},
    "views": BELOW_METHODS,
    "t2i": BELOW_METHODS | {"scenes"},  # an artifact of OptiPrune names its pipeline
    "nerf": BELOW_METHODS | {"views"},
    "splat": BELOW_METHODS | {"views"},
    "mesh": BELOW_METHODS | {"views"},
    "recipe": {"files", "core"},
    "artifact": {"", "files", "kernels", "core", "measure", "recipe"},
    "report": {"", "files", "measure", "recipe", "artifact"},
    "scenes": {"files"},
    "run": {"", "scenes", "views", "recipe", "artifact", "t2i", "nerf", "splat", "mesh"}
    | BELOW_METHODS,
    "draw": {"run", "scenes", "artifact"},
    "batch": {"files", "core", "run", "report", "recipe", "artifact"},
    "audit": {
        "",
        "files",
        "core",
        "measure",
        "scenes",
        "recipe",
        "artifact",
        "report",
        "run",
        "t2i",
    },
    "console": {"measure", "report", "artifact"},
    "stream": {"core", "scenes", "run", "recipe"},
    "hub": {"files", "scenes", "run", "report", "artifact"},
    "cli_audit": {"audit", "console"},
    "cli_batch": {"batch", "console"},
    "cli_demo": {"run", "console", "report", "recipe", "artifact"},
    "cli": {"", "scenes", "run", "draw", "stream", "hub", "console", "report", "recipe", "artifact"}
    | {"cli_audit", "cli_batch", "cli_demo"}
    | BELOW_METHODS,
    "__main__": {"cli"},
    "": {"files", "kernels", "core", "measure", "recipe", "artifact", "run", "hub"},
}
T2I_METHODS = {"aptp", "dense2moe", "dori", "optiprune"}
DIFFUSION = {"diffusers", "transformers", "accelerate"}
# pictures are judged by encoders in the format of transformers, also where there is no pipeline
MAY = {"t2i": DIFFUSION, "run": DIFFUSION, "measure": {"transformers"}}
MODEL_LIBRARIES = DIFFUSION | {"trimesh", "PIL", "imageio", "skimage", "safetensors"}
FORBIDDEN = {
    "core": MODEL_LIBRARIES | {"io", "logging", "os", "pathlib", "shutil", "tempfile"},
    "kernels": MODEL_LIBRARIES | {"gencompress"},
    "report": DIFFUSION | {"torch", "numba"},
    "cli": DIFFUSION | {"torch", "numba"},
    "cli_audit": DIFFUSION | {"torch", "numba"},
    "cli_batch": DIFFUSION | {"torch", "numba"},
    "cli_demo": DIFFUSION | {"torch", "numba"},
    "console": DIFFUSION | {"torch", "numba"},
}
MAX_LINES = 450
LONG = {
    "kernels/gencompress_kernels/rasterize_splats/cpu.py": "the stages of one kernel, in order",
}


def room_of(module: str) -> str:
    """The room of a dotted module name, or the top name of a foreign package."""
    top, *rest = module.split(".")
    if top == "gencompress_kernels":
        return "kernels"
    return (rest[0] if rest else "") if top == "gencompress" else top


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    base = ROOT / ("kernels" if name.startswith("gencompress_kernels") else ".")
    path = base.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(module: str, tree: ast.AST, package: bool) -> Iterator[str]:
    """Every module that is imported anywhere in the file, lazily or not, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if source.startswith("gencompress") and is_module(inner) else source


def wrong_arrows(module: str, source: str, package: bool = False) -> list[str]:
    here = room_of(module)
    if here not in ROOMS:
        return [f"{module}: {here!r} is no room of the plan (tests/test_layout.py lists them)"]
    wrong = []
    for name in imports(module, ast.parse(source), package):
        top = name.split(".")[0]
        if top in FORBIDDEN.get(here, ()) or (top in DIFFUSION - MAY.get(here, set())):
            wrong.append(f"{module} imports {name}, which {here} may not")
        elif top in ("gencompress", "gencompress_kernels"):
            there = room_of(name)
            if there != here and there not in ROOMS[here]:
                wrong.append(f"{module} imports {name}: no arrow from {here!r} to {there!r}")
            method = {name.split(".")[2] for name in (module, name) if name.count(".") >= 2}
            if here == there == "t2i" and len(method & T2I_METHODS) > 1:
                wrong.append(f"{module} imports {name}: methods do not import each other")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows(path):
    source = path.read_text(encoding="utf-8")
    assert wrong_arrows(module_of(path), source, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gencompress_kernels.select.cpu", "import gencompress"),
        ("gencompress_kernels.select.cpu", "def f():\n    from gencompress.core import mask"),
        ("gencompress.core.mask", "from gencompress.splat import cloud"),
        ("gencompress.core.mask", "from ..splat import cloud"),
        ("gencompress.core.mask", "from .. import splat"),
        ("gencompress.core.mask", "from gencompress import splat"),
        ("gencompress.core.mask", "import os.path"),
        ("gencompress.core.mask", "if TYPE_CHECKING:\n    from diffusers import UNet"),
        ("gencompress.splat.cloud", "from gencompress.mesh import surface"),
        ("gencompress.splat.cloud", "import gencompress.run"),
        ("gencompress.views.camera", "from gencompress.splat.cloud import SplatCloud"),
        ("gencompress.measure.image", "from gencompress.views.camera import Camera"),
        ("gencompress.recipe", "from gencompress.artifact import Artifact"),
        ("gencompress.splat.cloud", "import diffusers"),
        ("gencompress.report.page", "import torch.nn"),
        ("gencompress.cli", "from torch import Tensor"),
        ("gencompress.cli", "from gencompress.splat import formats"),
        ("gencompress.t2i.aptp.gates", "from gencompress.t2i.dori import probe"),
        ("gencompress.t2i.aptp.gates", "from ..dori.probe import search"),
        ("gencompress.helpers", "import math"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source):
    assert len(wrong_arrows(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gencompress.core.mask", "import torch\nfrom gencompress_kernels.compact import x"),
        ("gencompress.splat.cloud", "from gencompress.views import camera\nfrom . import formats"),
        ("gencompress.t2i.aptp.gates", "import diffusers\nfrom ..hooks import record"),
        ("gencompress.run", "from gencompress.splat import formats"),
        ("gencompress.artifact", "import gencompress\nimport torch"),
    ],
)
def test_a_right_arrow_passes(module, source):
    assert wrong_arrows(module, source) == []


def test_source_roots_hold_no_init():
    """`kernels` is a published package of somebody else: ours is only a folder of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []
    spec = importlib.util.find_spec("gencompress_kernels")
    # with tests/ on the path, tests/gencompress_kernels must not pass for the package
    assert spec is not None and spec.origin is not None, f"shadowed: {spec}"


def test_only_the_command_line_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if room_of(module_of(path)) not in ("cli", "console", "__main__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []


def test_files_stay_short():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES
    }
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert set(too_long) == set(LONG), f"over {MAX_LINES} lines: {too_long}; listed: {list(LONG)}"


@pytest.mark.parametrize(
    "module",
    [
        "gencompress",
        "gencompress.files",
        "gencompress.core",
        "gencompress.core.budget",
        "gencompress.measure",
        "gencompress.recipe",
        "gencompress.artifact",
        "gencompress.report",
        "gencompress.cli",
    ],
)
def test_stays_light(module):
    """Importing it brings in neither torch nor diffusers."""
    if not is_module(module):
        pytest.skip(f"{module}: not written yet")
    heavy = "{'torch', 'numba', 'diffusers', 'transformers'}"
    code = f"import sys, {module}; came = {heavy} & sys.modules.keys(); assert not came, came"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
