"""Load, override, check, compare and save a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fcn.config import yaml_schema
from fcn.config.keys import OWN, PRETRAINED, AddedLosses, Config, Data, Loss, Model
from fcn.config.mask_values import pixel_classes
from fcn.errors import InputError
from fcn.files import read_text
from fcn.text import plural


def load_config(path: str | Path, overrides: Iterable[str] = (), world_size: int = 1) -> Config:
    """Read a YAML file, apply `KEY=VALUE` overrides, and check everything.

    Args:
        path: the YAML file.
        overrides: strings such as `"optim.lr=0.1"`; the value is YAML.
        world_size: processes that will share `train.batch_size`.

    Raises:
        InputError: with one line for each problem found.
    """
    problems: list[str] = []
    return _checked(yaml_schema.read_yaml(Path(path), problems), str(path), overrides, world_size, problems)


def config_from_dict(values: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> Config:
    """The config that `to_dict` described, for example in a checkpoint; messages call it `source`."""
    return _checked(yaml_schema.tree_from_dict(values, source), source, overrides, 1, [])


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain data (dicts, lists, numbers, strings) for YAML and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal config."""
    values = yaml_schema.escape_paths(Config, to_dict(config))
    path.write_text(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")


class _SavedLoader(yaml.SafeLoader):
    """For a config.yaml of anybody's: without aliases, a few of which would multiply to more than the memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("found an alias, which training does not write")
        return super().compose_node(parent, index)


def read_saved_config(path: Path) -> dict[str, Any]:
    """Dotted key → value of what `save_config` wrote, by whatever version of this program.

    Raises:
        InputError: the file cannot be read, or is no config.
        FileNotFoundError: there is none.
    """
    try:
        tree = yaml.load(read_text(path, yaml_schema.MOST_BYTES), _SavedLoader)
        return {str(key): value for key, value in flatten(tree).items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}); give a directory that training wrote") from None


MAY_CHANGE = (
    "run_dir", "resume", "data.root", "data.val", "data.test", "data.resize", "data.workers", "data.cache",
    "data.cache_dir", "data.on_error",
    "train.uneven", "train.micro_batch", "train.steps", "train.epochs", "train.precision", "train.channels_last",
    "train.compile", "train.deterministic", "train.log_every", "train.max_nonfinite", "train.timeout",
    "train.gradient_compression", "train.profile",
    "eval", "checkpoint", "wandb",
)  # fmt: skip
"""Keys that may differ in a resumed run: where things are, how they are computed, and how long the run is."""


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two `to_dict` results; returns (differences that make it another run, differences that are allowed)."""
    before, after = _defaults(Config) | flatten(old), flatten(new)  # a key that is newer than `old` was its default
    fatal: list[str] = []
    harmless: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            section = key.split(".")[0]
            found = harmless if key in MAY_CHANGE or section in MAY_CHANGE else fatal
            found.append(f"{key}: {yaml_schema.show(before.get(key))} → {yaml_schema.show(after.get(key))}")
    return fatal, harmless


def _defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key → default, as plain data, for every key that has a default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _defaults(hint, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            found[prefix + field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _checked(
    tree: yaml_schema.Section, source: str, overrides: Iterable[str], world_size: int, problems: list[str]
) -> Config:
    for override in overrides:
        yaml_schema.apply_override(tree, override, problems)
    parsed: dict[str, Any] = {}
    config = yaml_schema.build(Config, tree, source, problems, parsed)
    problems += _cross_checks(parsed, source, world_size)
    if problems:
        raise InputError("\n".join(problems))
    return config


def _cross_checks(parsed: Mapping[str, Any], source: str, world_size: int) -> list[str]:
    """Check what depends on more than one key; `parsed` contains the keys that are valid by themselves."""
    found: list[str] = []
    if {"train.steps", "train.epochs"} <= parsed.keys():
        steps, epochs = parsed["train.steps"], parsed["train.epochs"]
        if (steps is None) == (epochs is None):
            state = "neither is set" if steps is None else "both are set"
            found.append(
                f"{source}: train.steps, train.epochs: {state}; accepted: exactly one of them, the other null or absent"
            )
    found += _shard_checks(parsed, source, world_size)
    size, uneven = parsed.get("train.batch_size", world_size), parsed.get("train.uneven", True)
    if size % world_size and not uneven and not parsed.get("train.shards"):
        below = size // world_size * world_size
        multiples = " or ".join(str(fit) for fit in (below, below + world_size) if fit)
        found.append(
            f"{source}: train.batch_size: found {size}, which {world_size} processes cannot share equally; "
            f"accepted: a multiple of {world_size}, such as {multiples}; or start {_divisors(size)} processes; "
            f"or set train.uneven=true"
        )
    if size < world_size and uneven and not parsed.get("train.sync_bn", True):
        found.append(
            f"{source}: train.batch_size: found {size} for {world_size} processes without train.sync_bn, whose "
            f"BatchNorm cannot do without images; accepted: {world_size} or more, or train.sync_bn=true"
        )
    if parsed.get("data.test") and parsed.get("data.test") == parsed.get("data.val"):
        found.append(
            f"{source}: data.test: found '{parsed['data.test']}', as in data.val; accepted: another split, or null"
        )
    crops = [parsed.get(key, "wrong by itself") for key in ("eval.crop", "data.crop")]
    if parsed.get("eval.preset") == "center_crop" and crops == [None, None]:
        found.append(
            f"{source}: eval.crop: missing, and so is data.crop; accepted for eval.preset=center_crop: [height, width]"
        )
    found += _option_checks("data", Data, parsed, source) + _data_checks(parsed, source)
    found += _option_checks("model", Model, parsed, source) + _weights_checks(parsed, source)
    found += _option_checks("loss", Loss, parsed, source)
    return found


def _divisors(number: int, least: int = 1) -> str:
    return ", ".join(str(n) for n in range(least, number + 1) if number % n == 0)


def _shard_checks(parsed: Mapping[str, Any], source: str, world_size: int) -> list[str]:
    """What `train.shards` asks of the batch, the processes and other keys."""
    shards = parsed.get("train.shards")
    if not shards:
        return []
    found: list[str] = []
    size, micro_batch = parsed.get("train.batch_size", shards), parsed.get("train.micro_batch")
    if size % shards:
        found.append(
            f"{source}: train.shards: found {shards}, which does not divide train.batch_size={size}; "
            f"accepted: {_divisors(size)}"
        )
    elif micro_batch and micro_batch < size // shards:
        found.append(
            f"{source}: train.micro_batch: found {micro_batch}, less than the {size // shards} images of a shard; "
            f"accepted: {size // shards} or more, or more train.shards"
        )
    if world_size > shards:
        fitting = _divisors(size, world_size) or "a larger train.batch_size"
        found.append(
            f"{source}: train.shards: found {shards} for {world_size} processes; accepted: {fitting}; or start at most "
            f"{plural(shards, 'process', 'processes')}"
        )
    if parsed.get("train.compile"):
        found.append(
            f"{source}: train.compile: found true with train.shards, but a compiled network adds in an order of its "
            f"own; accepted: false, or train.shards=null"
        )
    return found


def _option_checks(section: str, cls: type, parsed: Mapping[str, Any], source: str) -> list[str]:
    """Options that the chosen data set, network or losses do not have."""
    name = parsed.get(f"{section}.name")
    if not name:
        return []
    chosen, found = [name], []
    if cls is Loss:
        added = [
            loss.name for loss in dataclasses.fields(AddedLosses) if parsed.get(f"loss.add.{loss.name}") is not None
        ]
        if name in added:
            found.append(f"{source}: loss.add.{name}: {name} is loss.name already, with weight 1; remove one of them")
        chosen = list(dict.fromkeys([name, *added]))
    what = {"data": "a data set of your own", "model": "a network of your own"}.get(section, "")
    for field in dataclasses.fields(cls):
        owners = field.metadata.get("only", ())
        kinds = {OWN if ":" in one else one for one in chosen}
        if owners and parsed.get(f"{section}.{field.name}") is not None and not kinds & set(owners):
            have = "has" if len(chosen) == 1 else "have"
            takers = ", ".join(what if owner == OWN else owner for owner in owners)
            remedy = f"; write it under {section}.options" if OWN in kinds else ""
            found.append(
                f"{source}: {section}.{field.name}: {' and '.join(chosen)} {have} no such option; "
                f"remove it (an option of {takers}){remedy}"
            )
    return found


def _data_checks(parsed: Mapping[str, Any], source: str) -> list[str]:
    """Keys of `data` that contradict each other, or that a data set cannot do without."""
    found: list[str] = []
    names, values = parsed.get("data.classes"), parsed.get("data.values")
    if parsed.get("data.name") == "folder" and "data.classes" in parsed and names is None:
        found.append(f"{source}: data.classes: missing; accepted: a list of names, such as [background, road]")
    if names and values is not None:
        try:
            pixel_classes(names, values)
        except ValueError as error:
            found.append(f"{source}: data.values: {error}")
    if parsed.get("data.resize") == "device" and parsed.get("data.jitter"):
        found.append(
            f"{source}: data.resize: found device, but data.jitter changes colours after the resize; accepted: cpu, or "
            "data.jitter=null"
        )
    if parsed.get("data.val_fraction") and parsed.get("data.train") == parsed.get("data.val"):
        found.append(
            f"{source}: data.val: found '{parsed['data.val']}', as in data.train; accepted: a name for each share"
        )
    return found


def _weights_checks(parsed: Mapping[str, Any], source: str) -> list[str]:
    """Pretrained weights that do not exist for the network."""
    name, weights = parsed.get("model.name"), parsed.get("model.weights")
    sets = [key for key, models in PRETRAINED.items() if name in models]
    if name == "linknet" and parsed.get("model.encoder") == "plain":
        sets = []
    if not name or weights not in PRETRAINED or weights in sets:
        return []
    accepted = ", ".join([*sets, "a file", "null"])
    return [f"{source}: model.weights: found {weights}, which does not exist for this {name}; accepted: {accepted}"]
