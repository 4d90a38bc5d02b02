"""Every method offers the same names, so that who knows one knows all."""

import dataclasses
import importlib
import inspect

import pytest

from gencompress.run import FITS, METHODS

FIRST = {
    "load": ["target", "data", "device", "dtype", "config"],
    "score": ["model", "data", "config", "generator"],
    "apply": ["model", "masks"],
    "compact": ["model", "masks"],
    "compress": ["model", "data", "budget", "config", "generator", "workdir"],
    "measure": ["before", "after", "data"],
    "save": ["result", "folder", "config", "data"],
    "restore": ["folder"],
}
OWN_NAME = {"splat": "cloud", "mesh": "mesh", "nerf": "field"}  # what a method calls its model


# what makes a model instead of making one smaller has nothing to score or cut
FIT = ("load", "compress", "measure", "save", "restore")


# tokens are chosen anew in every call, and single weights are not cut: a layer keeps its shape
CANNOT = {"optiprune": ("compact",), "dori": ("compact",)}


@pytest.mark.parametrize("name", METHODS)
def test_names_and_signatures(name):
    cannot = CANNOT.get(name, ())
    check(METHODS[name], name, {f: names for f, names in FIRST.items() if f not in cannot})
    assert not any(hasattr(importlib.import_module(METHODS[name]), f) for f in cannot)


@pytest.mark.parametrize("name", FITS)
def test_names_and_signatures_of_fits(name):
    check(FITS[name], name, {function: FIRST[function] for function in FIT})


def check(module, name, functions):
    package = importlib.import_module(module)
    assert dataclasses.is_dataclass(package.Config)
    assert package.Config.__dataclass_params__.frozen
    for function, wanted in functions.items():
        found = list(inspect.signature(getattr(package, function)).parameters)
        wanted = [OWN_NAME.get(name, w) if w == "model" else w for w in wanted]
        assert found[: len(wanted)] == wanted, function
