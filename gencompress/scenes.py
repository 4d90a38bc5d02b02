"""The embedded scenes: found by name, in the installed package or in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from gencompress.files import FormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ABOUT = "scene.toml"
# kinds of scenes that are a folder, and the file that such a folder has; other kinds are one file
FOLDERS = {
    "capture": "transforms.json",
    "pipeline": "model_index.json",
    "judges": "detector/config.json",
}
COMPANIONS = ("views", "prompts", "judges")
_PLACES = (Path(__file__).parent / "_scenes", Path(__file__).parents[1] / "scenes")


def names() -> list[str]:
    """The embedded scenes by name."""
    return sorted({p.parent.name for place in _PLACES for p in place.glob(f"*/{ABOUT}")})


def resolve(target: str | Path) -> Path:
    """What a target means: a path, or the name of an embedded scene ("scenes/NAME" too). A scene
    stands for its file; one of the kinds in FOLDERS, for its folder.

    Raises FileNotFoundError, with the known scenes, if it is neither.
    """
    path = Path(target)
    if path.exists() and not (path / ABOUT).is_file():
        return path
    name = path.name if path.parent in (Path("."), Path("scenes")) else ""
    return _stands_for(path) if (path / ABOUT).is_file() else _embedded(target, name)


def _embedded(target: str | Path, name: str) -> Path:
    for place in _PLACES:
        if name and (place / name / ABOUT).is_file():
            return _stands_for(place / name)
    raise FileNotFoundError(
        f"{target}: no such file, and no embedded scene (those are {', '.join(names()) or 'none'})"
    )


def _stands_for(folder: Path) -> Path:
    about = scene(folder / ABOUT)
    return folder if about["kind"] in FOLDERS else folder / about["file"]


def companions(target: str | Path) -> dict[str, str]:
    """The data that an embedded scene comes with, as paths by name: what its scene.toml calls
    `views`, `prompts` or `judges` is a file beside it or another embedded scene, `truth` a file
    beside it. Empty for any other target."""
    found = resolve(target)
    about = next((p for p in (found / ABOUT, found.parent / ABOUT) if p.is_file()), None)
    if Path(target).exists() or about is None:
        return {}
    values = scene(about)
    data = {}
    for key in (key for key in COMPANIONS if key in values):
        name = Path(values[key]).name
        beside = about.parent / name
        data[key] = str(beside if beside.is_file() else _embedded(values[key], name))
    if "truth" in values:
        data["truth"] = str(about.parent / Path(values["truth"]).name)
    return data


def scene(about: Path) -> dict[str, str]:
    """What a scene.toml says, `kind` in any case. Raises FormatError if its file is not beside it:
    the one it names, or that of its kind in FOLDERS."""
    try:
        values = tomllib.loads(about.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise FormatError(about, f"not a scene: {problem}") from None
    values.setdefault("kind", "splat")
    folder = FOLDERS.get(values["kind"])
    name = folder or values.get("file")
    inside = isinstance(name, str) and (bool(folder) or Path(name).name == name)
    beside = inside and (about.parent / name).is_file()
    if not beside:
        raise FormatError(about, f"file = {name!r}: expected the name of a file beside it")
    return values
