"""Strict YAML → dataclasses. One pass finds every problem and describes each in one line.

A field's annotation says what it accepts: a type, a union, a Literal, a tuple, or `Annotated[type, Accept(text,
holds)]`. Nothing is converted silently, except an integer where a number is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import string
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from fcn.errors import InputError
from fcn.files import read_text


class Accept(typing.NamedTuple):
    """A constraint on a value, and its description for the user."""

    text: str
    holds: Callable[[Any], bool]


PATH = Accept("a path that is not empty", lambda value: bool(value.strip()) and "\0" not in value)
"""In what a person has typed, `$DATA`, `${DATA}` and a leading ~ are replaced, and `$$` is a dollar."""


# --- YAML → tree of leaves that remember where they stand ----------------------------------------------------------


class _Leaf(typing.NamedTuple):
    value: Any
    where: str
    text: str | None = None
    """As a person has typed it into a file or a command; None for what a checkpoint says."""


class Section(dict):
    """Keys → leaves and sections, and where the section's own key stands; `text` as for a leaf."""

    def __init__(self, where: str, text: str | None = None) -> None:
        super().__init__()
        self.where, self.text = where, text


COMMAND_LINE = "command line: "
"""Begins the place of what an override says."""
MOST_BYTES = 1_000_000
"""Of a file; YAML takes a hundred times as many to parse."""
MOST_LEVELS = 8
"""Deeper nesting is an error; an alias that contains itself would never end."""


class _Loader(yaml.SafeLoader):
    """A safe loader for unambiguous scalars only: `yes`, `010`, `12:30` and dates stay strings, which are then
    refused."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def read_yaml(path: Path, problems: list[str]) -> Section:
    """Read a YAML file as a tree of dicts whose leaves know their line; duplicate keys go to `problems`.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or holds no keys.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {path.with_name(close[0])}?" if close else "such as configs/quickstart.yaml"
        raise InputError(f"{path}: no such config file; give a YAML file, {hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a YAML file in UTF-8") from None
    tree = _parse(text, str(path), "", problems)
    if not isinstance(tree, Section):
        if problems:
            raise InputError("\n".join(problems))
        raise InputError(f"{path}: found no keys; give a file of `key: value` lines, such as configs/quickstart.yaml")
    return tree


def tree_from_dict(values: Mapping[str, Any], source: str) -> Section:
    """Turn plain data into a tree as `read_yaml` does; every leaf is at `source`, and no path is resolved."""
    tree = Section(source)
    for key, value in values.items():
        tree[str(key)] = tree_from_dict(value, source) if isinstance(value, Mapping) else _Leaf(value, source)
    return tree


def apply_override(tree: Section, override: str, problems: list[str]) -> None:
    """Set one leaf or section of the tree from `section.key=YAML`, in place of what was there."""
    name, equals, text = override.partition("=")
    where = f"{COMMAND_LINE}{override!r}"
    if not equals or not name.strip():
        missing = "key" if equals else "'='"
        problems.append(f"{where}: found no {missing}; write KEY=VALUE, such as optim.lr=0.01")
        return
    *sections, last = name.strip().split(".")
    value = _parse(text, where, name.strip() + ".", problems, numbered=False)
    if value is None:
        return
    for section in sections:
        if not isinstance(tree.get(section), Section):
            tree[section] = Section(where)
        tree = tree[section]
    tree[last] = value


def _parse(text: str, source: str, prefix: str, problems: list[str], numbered: bool = True) -> Section | _Leaf | None:
    """Parse YAML into a tree, or add to `problems` and return None; `numbered` says whether line numbers help."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark and numbered else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = _quotes_hint(source, prefix[:-1], text)
        if mark and numbered:
            begin = error.context_mark if str(error.context).startswith("while parsing a flow") else mark
            line = text[text.rfind("\n", 0, begin.index) + 1 :].partition("\n")[0]
            line = re.fullmatch(r"[\s-]*([\w.]+):\s+(.*?)\s*", line)
            hint = _quotes_hint(where, *line.groups()) if line else ""
        problems.append(f"{where}: not valid YAML ({reason}); check quotes, brackets and indentation there{hint}")
        return None
    if node is None:
        return _Leaf(None, source, text)

    def place(at: yaml.Node) -> str:
        return f"{source}:{at.start_mark.line + 1}" if numbered else source

    def convert(node: yaml.Node, key: yaml.Node, prefix: str, levels: int) -> Section | _Leaf | None:
        typed = text[node.start_mark.index : node.end_mark.index]
        if not isinstance(node, yaml.MappingNode):
            try:
                return _Leaf(loader.construct_object(node, deep=True), place(key), typed)
            except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
                problems.append(
                    f"{place(key)}: {prefix[:-1]}: not a plain value; write a text, number, list, or null"
                    f"{_quotes_hint(place(key), prefix[:-1], typed)}"
                )
                return None
        section = Section(place(key), typed)
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            if not isinstance(key_node, yaml.ScalarNode) or levels == 0:
                problems.append(f"{place(key_node)}: {prefix[:-1]}: no config key; accepted: plain names, few levels")
            elif name in lines:
                problems.append(f"{place(key_node)}: {prefix}{name}: found twice (first at {lines[name]}); keep one")
            else:
                lines[name] = place(key_node)
                value = convert(value_node, key_node, f"{prefix}{name}.", levels - 1)
                if value is not None:
                    section[name] = value
        return section

    return convert(node, node, prefix, MOST_LEVELS)


def _quotes_hint(where: str, key: str, text: str) -> str:
    """How to write a value that should have been a text, unless it has quotes."""
    quoted = json.dumps(text, ensure_ascii=False)
    if text[:1] in ("", "'", '"') or "\n" in text:
        return ""
    if where.startswith(COMMAND_LINE):
        return f"; if it is a text, quote it, for the shell as well: {key}={shlex.quote(quoted)}"
    return f"; if it is a text, quote it: {key.split('.')[-1]}: {quoted}"


# --- tree → dataclasses --------------------------------------------------------------------------------------------


class _Context(typing.NamedTuple):
    source: str
    problems: list[str]
    parsed: dict[str, Any]
    all_keys: list[str]


def build(cls: type, tree: Section, source: str, problems: list[str], parsed: dict[str, Any]) -> Any:
    """Build an instance of the dataclass `cls`, or add to `problems` and return None.

    Args:
        tree: what `read_yaml` returned.
        source: the file, for problems without a line.
        parsed: receives every valid value under its dotted name, for checks across keys.
    """
    return _build(cls, tree, "", _Context(source, problems, parsed, _all_keys(cls)))


def _build(cls: type, tree: Section, prefix: str, context: _Context) -> Any:
    source, problems, parsed, all_keys = context
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(cls)}
    before = len(problems)
    for key in tree:
        if key not in known:
            suggestion = _nearest(key, prefix, known, all_keys)
            problems.append(f"{tree[key].where}: {prefix}{key}: unknown key; {suggestion}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        key, hint = prefix + name, hints[name]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        section = dataclasses.is_dataclass(hint)
        found = tree.get(name, Section(source) if section else None)
        if section and isinstance(found, Section):
            values[name] = _build(hint, found, f"{key}.", context)
        elif name in tree:
            try:
                if section:
                    raise ValueError
                value = _convert(hint, _plain(found))
                resolve = isinstance(value, str) and found.text is not None and _is_path(hint)
                values[name] = parsed[key] = _resolved(value) if resolve else value
            except ValueError as error:
                problems.append(f"{found.where}: {key}: found {_fault(key, hint, found, str(error))}")
        elif required:
            problems.append(f"{source}: {key}: missing; accepted: {_accepted(hint)}")
        else:
            parsed[key] = field.default
    return cls(**values) if len(problems) == before else None


def _fault(key: str, hint: Any, found: Section | _Leaf, reason: str) -> str:
    """What was found, and what is accepted instead unless a reason is given."""
    if isinstance(found, Section):
        return f"a section; accepted: {_accepted(hint)}{_text_hint(key, hint, found)}"
    spelling = _number_hint(hint, found.value) or _word_hint(hint, found.value) or _text_hint(key, hint, found)
    return f"{show(found.value)}{reason or f'; accepted: {_accepted(hint)}{spelling}'}"


def _text_hint(key: str, hint: Any, found: Section | _Leaf) -> str:
    """Suggest quotes for what YAML takes for something else than a text, such as `a: b` or `2012`."""
    if found.text is None or (isinstance(found, _Leaf) and isinstance(found.value, str | types.NoneType)):
        return ""
    try:
        _convert(hint, found.text)
    except ValueError:
        return ""
    return _quotes_hint(found.where, key, found.text)


def _plain(tree: Section | _Leaf) -> Any:
    return {key: _plain(item) for key, item in tree.items()} if isinstance(tree, Section) else tree.value


def _convert(hint: Any, value: Any) -> Any:
    """Convert `value` to what the annotation `hint` accepts; ValueError if it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert(args[0], value)
        if not args[1].holds(value):
            raise ValueError
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value)
            except ValueError:
                pass
        raise ValueError
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ValueError
        return tuple(_convert(args[0], item) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError
    return value


def _is_path(hint: Any) -> bool:
    args = typing.get_args(hint)
    return PATH in args or any(map(_is_path, args))


def _resolved(path: str) -> str:
    """The path with its variables and a leading ~ replaced; ValueError with the rest of a message if that fails."""
    try:
        set_ones = {name: value for name, value in os.environ.items() if value.strip()}
        path = string.Template(path).substitute(set_ones)
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except KeyError as error:
        name = error.args[0]
        raise ValueError(f", but the variable {name} is not set; export {name}=…, or write the path itself") from None
    except ValueError:
        raise ValueError("; accepted: $NAME or ${NAME} for a variable, $$ for a dollar; correct it") from None
    except RuntimeError:  # ~nobody
        raise ValueError(", but there is no such home folder; write the path itself") from None


def escape_paths(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, the fields of `cls` as nested dicts, so that `build` resolves paths to what they are."""

    def escaped(value: Any, hint: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return escape_paths(hint, value)
        return value.replace("$", "$$") if isinstance(value, str) and _is_path(hint) else value

    hints = typing.get_type_hints(cls, include_extras=True)
    return {key: escaped(value, hints[key]) for key, value in values.items()}


def _accepted(hint: Any) -> str:
    """Describe what an annotation accepts."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return args[1].text
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_accepted(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(args) if len(args) > 1 else args[0]
    if dataclasses.is_dataclass(hint):
        return "a section with keys of its own"
    names = {types.NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return (names | {dict: "a section of keys and values"})[hint]


def show(value: Any) -> str:
    """A value as messages show it; strings are marked as text, so that `'1e-3'` and 0.001 look different."""
    if isinstance(value, str):
        return f"the text '{json.dumps(value, ensure_ascii=False)[1:-1]}'"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _number_hint(hint: Any, value: Any) -> str:
    """YAML 1.1 reads `1e-3` as a string. Suggest a spelling that every YAML reader takes for a number."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    for candidate in (int(number), number) if math.isfinite(number) else ():
        try:
            if candidate == number and _convert(hint, candidate) == candidate:
                spelled = repr(candidate)
                if "e" in spelled and "." not in spelled:
                    spelled = spelled.replace("e", ".0e")
                return f"; YAML reads {value} as a text, write {spelled}"
        except ValueError:
            continue
    return ""


def _word_hint(hint: Any, value: Any) -> str:
    """Suggest an accepted word that is similar to a wrong one."""
    words = _words(hint)
    if "disabled" in words and str(value).lower() in ("off", "none", "no", "false"):
        return "; did you mean disabled?"
    close = difflib.get_close_matches(value, words, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def _words(hint: Any) -> list[str]:
    """The literal words in an annotation."""
    args = typing.get_args(hint)
    return list(args) if typing.get_origin(hint) is Literal else [word for arg in args for word in _words(arg)]


def _nearest(key: str, prefix: str, known: Mapping[str, Any], all_keys: list[str]) -> str:
    """Suggest a known key for a wrong one: the same name elsewhere, a similar one here, or a similar one elsewhere."""
    leaves: dict[str, str] = {}
    for name in all_keys:
        leaves.setdefault(name.split(".")[-1], name)
    here = {name: prefix + name for name in known}
    for names in ({key: leaves[key]} if key in leaves else {}, here, leaves):
        close = difflib.get_close_matches(key, names, n=1)
        if close:
            return f"did you mean {names[close[0]]}?"
    return "accepted here: " + ", ".join(known)


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        keys += _all_keys(hint, f"{prefix}{field.name}.") if dataclasses.is_dataclass(hint) else [prefix + field.name]
    return keys
