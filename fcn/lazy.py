"""Doors of rooms that cost nothing until someone walks through: a name is imported when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def door(room: str, **exports: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package (PEP 562).

    Importing a room imports none of its modules, so `python -m fcn status` does not wait for PyTorch.

    Args:
        room: the package's `__name__`.
        exports: for each module of the package, the names that other rooms may import, separated by spaces.
    """
    module_of = {name: module for module, names in exports.items() for name in names.split()}
    clashes = module_of.keys() & exports.keys()
    if clashes:
        raise ValueError(f"{room}: {', '.join(sorted(clashes))}: a module and a name it exports must differ")

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{room}.{module_of[name]}"), name)
        setattr(sys.modules[room], name, value)
        return value

    return load, sorted(module_of)
