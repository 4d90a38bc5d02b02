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
CAPTURE = "capture"  # the kind of a folder of photos; other kinds are one file
_PLACES = (Path(__file__).parent / "_scenes", Path(__file__).parents[1] / "scenes")


def names() -> list[str]:
    """The embedded scenes by name."""
    return sorted({p.parent.name for place in _PLACES for p in place.glob(f"*/{ABOUT}")})


def resolve(target: str | Path) -> Path:
    """What a target means: a path, or the name of an embedded scene ("scenes/NAME" too). A scene
    stands for its file; where it is a capture, for its folder.

    Raises FileNotFoundError, with the known scenes, if it is neither.
    """
    path = Path(target)
    if path.exists() and not (path / ABOUT).is_file():
        return path
    name = path.name if path.parent in (Path("."), Path("scenes")) else ""
    for folder in [path, *(place / name for place in _PLACES if name)]:
        if (folder / ABOUT).is_file():
            about = scene(folder / ABOUT)
            return folder if about["kind"] == CAPTURE else folder / about["file"]
    raise FileNotFoundError(
        f"{target}: no such file, and no embedded scene (those are {', '.join(names()) or 'none'})"
    )


def companions(target: str | Path) -> dict[str, str]:
    """The data that an embedded scene comes with, as paths by name: `views`, where its scene.toml
    names a capture, and `truth`, where it names a file beside it. Empty for any other target."""
    about = resolve(target).parent / ABOUT
    if Path(target).exists() or not about.is_file():
        return {}
    values = scene(about)
    found = {"views": str(resolve(values["views"]))} if "views" in values else {}
    if "truth" in values:
        found["truth"] = str(about.parent / Path(values["truth"]).name)
    return found


def scene(about: Path) -> dict[str, str]:
    """What a scene.toml says, `kind` in any case. Raises FormatError if its file is not beside it:
    the one it names, or the transforms.json of a capture."""
    try:
        values = tomllib.loads(about.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise FormatError(about, f"not a scene: {problem}") from None
    values.setdefault("kind", "splat")
    name = "transforms.json" if values["kind"] == CAPTURE else values.get("file")
    beside = isinstance(name, str) and Path(name).name == name and (about.parent / name).is_file()
    if not beside:
        raise FormatError(about, f"file = {name!r}: expected the name of a file beside it")
    return values
