"""The embedded scenes: found by name, in the installed package or in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from gencompress.files import FormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PLACES = (Path(__file__).parent / "_scenes", Path(__file__).parents[1] / "scenes")


def names() -> list[str]:
    """The embedded scenes by name."""
    return sorted({p.parent.name for place in _PLACES for p in place.glob("*/scene.toml")})


def resolve(target: str | Path) -> Path:
    """The file a target means: a path, or the name of an embedded scene ("scenes/NAME" too).

    Raises FileNotFoundError, with the known scenes, if it is neither.
    """
    path = Path(target)
    if path.exists():
        return path
    name = path.name if path.parent in (Path("."), Path("scenes")) else ""
    for place in _PLACES:
        about = place / name / "scene.toml"
        if name and about.is_file():
            return about.parent / scene(about)["file"]
    raise FileNotFoundError(
        f"{target}: no such file, and no embedded scene (those are {', '.join(names()) or 'none'})"
    )


def scene(about: Path) -> dict[str, str]:
    """What a scene.toml says. Raises FormatError if it names no file beside it."""
    try:
        values = tomllib.loads(about.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise FormatError(about, f"not a scene: {problem}") from None
    name = values.get("file")
    beside = isinstance(name, str) and Path(name).name == name and (about.parent / name).is_file()
    if not beside:
        raise FormatError(about, f"file = {name!r}: expected the name of a file beside it")
    return values
