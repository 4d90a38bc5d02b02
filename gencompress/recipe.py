"""Recipes: everything needed to repeat a run, as strict TOML. Imports no torch.

method = "splat"                             # which method
verb = "compress"                            # or fit: make the model from the target, say photos
target = "scenes/spheres"                    # the model: a file, a folder, or the name of a scene
budget = "50% bytes"                         # the grammar of --keep; or a table, see below
seed = 0
device = "cpu"
dtype = "float32"
data = { views = "photos/transforms.json" }  # named inputs beside the model
config = { score = "blend_weight" }          # fields of the method's Config

The budget as a table also names its constraints:
budget = { keep = "50% bytes", scope = "group", floor = 2, cap = 100, round_to = 8 }
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gencompress.core.budget import Budget, budget_text, parse_budget

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERBS = ("compress", "fit")
DTYPES = ("float32", "float16", "bfloat16", "float64")
_NEEDED = ("method", "target", "budget")
_LIMITS = ("scope", "floor", "cap", "round_to")  # fields of Budget beside what --keep says
_T = TypeVar("_T")


class RecipeError(ValueError):
    """A setting is unknown, missing or of the wrong kind; the message lists what is known."""


@dataclass(frozen=True)
class Recipe:
    """One run as one value. `data` and `config` hold plain values only."""

    method: str
    target: str
    budget: Budget
    data: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: str = "float32"
    verb: str = "compress"  # or fit: the target is what the model is made from


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, after `overrides` ("a.b=value", see `apply_overrides`).

    Raises RecipeError, with the file name, for a file that cannot be read or a setting that is
    wrong.
    """
    try:
        values = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
        return from_dict(apply_overrides(values, overrides))
    except FileNotFoundError:
        shipped = ", ".join(shipped_recipes()) or "none"
        raise RecipeError(f"{path}: no such recipe; shipped recipes: {shipped}") from None
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read: {problem.strerror}") from None
    except RecipeError as problem:
        raise RecipeError(f"{path}: {problem}") from None
    except (ValueError, RecursionError) as problem:  # numbers of thousands of digits among them
        raise RecipeError(f"{path}: not a TOML file: {problem}") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` (as read from TOML) with each "a.b=value" set, later ones winning.

    A value is read as TOML (0.3, true, [1, 2], "text"), or as the text it is where that fails.
    Where the budget is a text, "budget.keep=..." replaces it and "budget.floor=..." refines it.
    """
    result = dict(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise RecipeError(
                f"cannot set {override!r}: expected name=value, as in budget.keep=30%"
            )
        table = result
        for depth, name in enumerate(names[:-1]):
            inner = table.get(name, {})
            if depth == 0 and name == "budget" and not isinstance(inner, Mapping):
                inner = {"keep": inner}
            if not isinstance(inner, Mapping):
                raise RecipeError(f"cannot set {override!r}: {name!r} is a value, not a table")
            table[name] = dict(inner)
            table = table[name]
        table[names[-1]] = _value(text.strip())
    return result


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # dates and second lines are TOML too, but nothing a setting holds
    return parsed["value"] if len(parsed) == 1 and _is_plain(parsed["value"]) else text


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe these plain values describe. Raises RecipeError for unknown or missing keys and
    for values of the wrong kind."""
    known = [f.name for f in dataclasses.fields(Recipe)]
    _check_known(values, known, "recipe")
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise RecipeError(f"missing {', '.join(missing)}; a recipe needs {', '.join(_NEEDED)}")
    given = dict(values, budget=_read_budget(values["budget"]))
    for name in ("data", "config"):
        given[name] = _read_table(name, given.get(name, {}))
    recipe = Recipe(**given)
    for name in ("method", "target", "device", "dtype"):
        text = getattr(recipe, name)
        if not isinstance(text, str) or not text:
            raise RecipeError(f"{name} = {text!r}: expected a text")
    if recipe.verb not in VERBS:
        raise RecipeError(f"verb = {recipe.verb!r}: known are {', '.join(VERBS)}")
    if recipe.dtype not in DTYPES:
        raise RecipeError(f"dtype = {recipe.dtype!r}: known are {', '.join(DTYPES)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", recipe.device):
        raise RecipeError(f"device = {recipe.device!r}: expected cpu, cuda or cuda:N")
    if type(recipe.seed) is not int or not 0 <= recipe.seed < 2**63:
        raise RecipeError(f"seed = {recipe.seed!r}: expected a whole number from 0 to 2^63 - 1")
    return recipe


def _read_table(name: str, table: Any) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{name} = {table!r}: expected a table")
    for key, value in table.items():
        if name == "data" and not isinstance(value, str):
            raise RecipeError(f"data.{key} = {value!r}: expected a text")
        if not _is_plain(value):
            raise RecipeError(f"{name}.{key} = {value!r}: expected a plain, finite value")
    return dict(table)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values that `from_dict` reads back to an equal recipe, every default written out."""
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    limits = {name: getattr(recipe.budget, name) for name in _LIMITS}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    values["budget"] = {"keep": budget_text(recipe.budget), **limits}
    values["data"], values["config"] = dict(recipe.data), dict(recipe.config)
    return values


def config_from(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """A method's Config (a frozen dataclass) from the `config` table of a recipe.

    Whole numbers become floats and lists tuples where the field wants them. Raises RecipeError for
    unknown settings and values of the wrong type; a ValueError of the dataclass itself becomes one.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    _check_known(values, known, "config")
    fitted = {}
    for name, value in values.items():
        fitted[name] = _fit(value, hints[name])
        if fitted[name] is _MISFIT:
            raise RecipeError(f"config.{name} = {value!r}: expected {_name(hints[name])}")
    try:
        return kind(**fitted)
    except ValueError as problem:
        raise RecipeError(f"config: {problem}") from None


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    """`value` as a `hint`, or _MISFIT. Knows what TOML can hold: plain types, tuples, choices."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        exact = [(type(part), part) for part in parts]  # True is not 1
        return value if (type(value), value) in exact else _MISFIT
    if origin in (typing.Union, types.UnionType):
        fits = (_fit(value, part) for part in parts)
        return next((fit for fit in fits if fit is not _MISFIT), _MISFIT)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return _MISFIT
        wanted = parts if origin is tuple and parts[-1] is not Ellipsis else parts[:1] * len(value)
        items = [_fit(*pair) for pair in zip(value, wanted, strict=False)]
        return _MISFIT if len(value) != len(wanted) or _MISFIT in items else origin(items)
    if hint is float and type(value) is int:
        return float(value)
    if hint is types.NoneType:
        return None if value is None else _MISFIT
    return value if type(value) is (origin or hint) else _MISFIT


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _read_budget(value: Any) -> Budget:
    """From a text of the --keep grammar, a number (0.3 is 30%), or a table of `keep` and limits."""
    table = dict(value) if isinstance(value, Mapping) else {"keep": value}
    _check_known(table, ("keep", *_LIMITS), "budget")
    keep = table.pop("keep", None)
    if isinstance(keep, bool) or not isinstance(keep, str | int | float):
        raise RecipeError(f"budget keep = {keep!r}: expected a text such as '40%'")
    for name, limit in table.items():
        if type(limit) is not (str if name == "scope" else int):
            kind = "text" if name == "scope" else "whole number"
            raise RecipeError(f"budget.{name} = {limit!r}: expected a {kind}")
    try:
        return dataclasses.replace(parse_budget(str(keep)), **table)
    except ValueError as problem:
        raise RecipeError(str(problem)) from None


def _check_known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    unknown = sorted(map(str, values.keys() - set(known)))
    if unknown:
        raise RecipeError(
            f"unknown in {where}: {', '.join(unknown)}; known: {', '.join(known) or 'nothing'}"
        )


def _is_plain(value: Any) -> bool:
    """What TOML and JSON both hold: texts, numbers, booleans, and lists and tables of them."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))
