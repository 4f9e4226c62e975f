"""Call a user's own code by its import path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fcn.errors import InputError

TRUST_OPTION = "--trust-code"


def refuse_foreign_code(named: Mapping[str, str], source: str, trusted: Collection[str]) -> None:
    """Refuse what a file names as the user's own code, unless the person at the keyboard has named it, too.

    Args:
        named: config key → what it names: an import path, or a network or data set of fcn.
        source: the file, for the message.
        trusted: import paths that the person gave.

    Raises:
        InputError: something else would be imported.
    """
    foreign = {key: name for key, name in named.items() if ":" in name and name not in trusted}
    if foreign:
        found = " and ".join(f"{key}={name}" for key, name in foreign.items())
        allow = " ".join(f"{TRUST_OPTION} {name}" for name in dict.fromkeys(foreign.values()))
        raise InputError(
            f"{source}: asks to run code that you have not named, {found}; nothing was imported. If you trust it, add "
            f"{allow}"
        )


def call_by_path(
    section: str, path: str, returns: str, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Call `package.module:name` with the arguments and the options, all by name.

    The module is looked up as Python does, and in the current directory.

    Args:
        section: the config section; its `name` is the path and its `options` are the options.
        returns: what the callable should return, for messages.

    Raises:
        InputError: there is no such module or name, or it takes other arguments.
    """
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but what it imports is not
        raise InputError(
            f"{section}.name: found '{path}', but there is no module {error.name}; accepted: a module in the current "
            f"directory ({here}) or an installed one; start where it can be imported, or set PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or f"module {module_name}"
        raise InputError(
            f"{section}.name: found '{path}', but {where} has no function {name}; "
            f"accepted: package.module:function, whose function returns {returns}"
        )
    try:
        signature = inspect.signature(function)
        signature.bind(**arguments, **options)
    except TypeError as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise InputError(
            f"{section}.options: {path} cannot be called with {given} and "
            f"{', '.join(options) or 'no options'} ({error}); it accepts {signature}"
        ) from None
    except ValueError:  # functions written in C may have no signature
        pass
    return function(**arguments, **options)
