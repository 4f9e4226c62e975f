"""Configuration: one YAML file ⇄ typed dataclasses, checked strictly and all at once.

The docstring under a field is its documentation. Its annotation is what the loader accepts: nothing is
converted silently, except a whole number where a number is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from fcn.errors import InputError


class Accept(typing.NamedTuple):
    """A constraint on a value, and how to say it to the user."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[float, Accept("a number above 0", lambda value: value > 0)]
NotNegative = Annotated[float, Accept("a number, 0 or more", lambda value: value >= 0)]
Fraction = Annotated[float, Accept("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Momentum = Annotated[float, Accept("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Count = Annotated[int, Accept("a whole number, 1 or more", lambda value: value >= 1)]
CountOrZero = Annotated[int, Accept("a whole number, 0 or more", lambda value: value >= 0)]
Byte = Annotated[int, Accept("a whole number from 0 to 255", lambda value: 0 <= value <= 255)]
Size = Annotated[tuple[int, int], Accept("[height, width], two whole numbers, 1 or more", lambda value: min(value) >= 1)]
ScaleRange = Annotated[
    tuple[float, float], Accept("[low, high], two numbers with 0 < low <= high", lambda value: 0 < value[0] <= value[1])
]
Milestones = Annotated[
    tuple[float, ...],
    Accept("rising fractions of the run, each between 0 and 1", lambda v: all(0 < x < 1 for x in v) and list(v) == sorted(set(v))),
]
Text = Annotated[str, Accept("a text that is not empty", lambda value: bool(value.strip()))]


@dataclass(slots=True, kw_only=True)
class Data:
    name: Literal["shapes", "camvid", "voc"]
    """Which data set, and so which layout under `root`, class names and palette."""
    root: Text
    """Folder of the data set. Relative paths start at the current directory."""
    train: Text = "train"
    """Split to train on."""
    val: Text = "val"
    """Split that is scored every `eval.every` steps and at the end of the run."""
    test: Text | None = None
    """Split that is scored once, with the weights of the last step. Then the summary reports it instead of `val`."""
    crop: Size | None = None
    """Training crop in pixels. null trains on whole images, padded to the largest of the global batch."""
    scale: ScaleRange | None = None
    """Range of the random resize factor before the crop. null leaves the size as it is."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    workers: CountOrZero = 4
    """Data-loader processes per training process. 0 loads in the training process itself."""


@dataclass(slots=True, kw_only=True)
class Model:
    name: Literal["unet", "linknet"]
    """Which network."""
    weights: None = None
    """Pretrained weights. Only null, training from scratch, so far."""
    width: Count | None = None
    """Channels of the first level (unet; null: 64, as in the paper)."""
    norm: Literal["batch", "none"] | None = None
    """Normalisation after each convolution (unet; null: batch; the paper has none)."""

    def options(self) -> dict[str, Any]:
        """The keys that `build_model` takes beside the name and the number of classes; unset ones are left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "weights") and value is not None}


MODEL_OPTIONS = {"unet": ("width", "norm"), "linknet": ()}
"""Which options each model takes; `fcn.models.build_model` has a parameter for each."""


@dataclass(slots=True, kw_only=True)
class Train:
    batch_size: Count
    """Images of one step over all processes. The run does not depend on how many processes share them."""
    micro_batch: Count | None = None
    """Most images per process and forward pass; more are accumulated. null: all of the process's share at once."""
    steps: Count | None = None
    """Length of the run in steps. Give this or `epochs`."""
    epochs: Positive | None = None
    """Length of the run in passes over the training split, converted to steps once."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Arithmetic of the forward pass. Weights stay float32 under bf16 and fp16; fp16 adds gradient scaling."""
    channels_last: bool = True
    """Keep images and activations in NHWC order, which convolutions on current hardware prefer."""
    sync_bn: bool = True
    """BatchNorm over the global batch instead of each process's part of it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    deterministic: bool = False
    """Ask PyTorch for deterministic kernels; an operation that has none is named in a warning."""
    grad_clip: Positive | None = None
    """Largest global norm of the gradient. null: no clipping."""
    log_every: Count = 10
    """Steps between progress lines. Only these steps wait for the device."""


@dataclass(slots=True, kw_only=True)
class Loss:
    name: Literal["cross_entropy"] = "cross_entropy"
    """Loss per pixel; a step's loss is its mean over all valid pixels of the global batch."""
    ignore_index: Byte = 255
    """Label value that enters neither loss nor score."""


@dataclass(slots=True, kw_only=True)
class Optim:
    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. Biases and normalisation parameters are never decayed."""
    lr: Positive = 0.01
    """Highest learning rate, reached at the end of the warm-up."""
    momentum: Momentum = 0.9
    """Momentum of SGD; the first beta of AdamW (whose second is 0.999)."""
    weight_decay: NotNegative = 1e-4
    """L2 penalty for SGD, decoupled decay for AdamW."""
    schedule: Literal["poly", "cosine", "step", "constant"] = "poly"
    """Shape of the learning rate after the warm-up."""
    warmup: CountOrZero = 0
    """Steps of linear rise from lr / warmup to lr."""
    power: Positive = 0.9
    """Exponent of `schedule: poly`."""
    milestones: Milestones = (0.6, 0.85)
    """Fractions of the run after which `schedule: step` multiplies the rate by `gamma`."""
    gamma: Fraction = 0.1
    """Factor of `schedule: step`."""


@dataclass(slots=True, kw_only=True)
class Eval:
    every: Count = 1000
    """Steps between evaluations of `data.val`; the last step is always evaluated."""
    batch_size: Count = 8
    """Most images per process and forward pass; only images of equal size share one. The score does not depend on it."""
    scale: Positive = 1.0
    """Images are resized by this factor for the network, and its logits back: labels are scored at native size."""
    pictures: CountOrZero = 4
    """Images of the split shown as panels at every evaluation."""


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    every: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Accept("a whole number, 2 or more", lambda value: value >= 2)] = 3
    """Checkpoints kept, newest first, beside best.pt."""


@dataclass(slots=True, kw_only=True)
class Wandb:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if W&B credentials are found, else offline; it never asks."""
    project: Text = "fcn"
    """W&B project."""


@dataclass(slots=True, kw_only=True)
class Config:
    """A run, completely described."""

    seed: CountOrZero = 0
    """Root of every random choice."""
    run_dir: Text
    """Folder that the run owns: checkpoints, metrics, pictures, log."""
    resume: Text = "auto"
    """auto continues from the newest checkpoint in run_dir; never starts afresh and refuses to overwrite; or a checkpoint file."""
    data: Data
    model: Model
    train: Train
    loss: Loss = dataclasses.field(default_factory=Loss)
    optim: Optim = dataclasses.field(default_factory=Optim)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    wandb: Wandb = dataclasses.field(default_factory=Wandb)


def load_config(path: str | Path, overrides: Iterable[str] = (), world_size: int = 1) -> Config:
    """Read one YAML file, apply `KEY=VALUE` overrides, check everything.

    Args:
        path: the YAML file.
        overrides: texts such as `"optim.lr=0.1"`; the value is YAML.
        world_size: processes that will share `train.batch_size`.

    Raises:
        InputError: with one line for each problem found.
    """
    problems: list[str] = []
    tree = _read_yaml(Path(path), problems)
    for override in overrides:
        _apply_override(tree, override, problems)
    return _checked(tree, str(path), problems, world_size)


def config_from_dict(values: Mapping[str, Any], source: str, overrides: Iterable[str] = (), world_size: int = 1) -> Config:
    """The config that `to_dict` described, as found in a checkpoint; `source` names it in messages."""
    problems: list[str] = []
    tree = _tree_from_dict(values, source)
    for override in overrides:
        _apply_override(tree, override, problems)
    return _checked(tree, source, problems, world_size)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, texts) that YAML and a weights-only checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal config."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")


def total_steps(train: Train, dataset_size: int) -> int:
    """Length of a run in steps: `train.steps`, or enough steps for `train.epochs` passes over the split."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return max(1, math.ceil(train.epochs * dataset_size / train.batch_size))


MAY_CHANGE = (
    "run_dir", "resume", "data.root", "data.val", "data.test", "data.workers",
    "train.micro_batch", "train.steps", "train.epochs", "train.precision", "train.channels_last", "train.compile",
    "train.deterministic", "train.log_every", "eval", "checkpoint", "wandb",
)  # fmt: skip
"""Keys that a resumed run may change: where things are and how they are computed, not what is computed, and its length."""


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two `to_dict` results, one line a difference: (those that make another run, those that may change)."""
    before, after = _flatten(old), _flatten(new)
    fatal: list[str] = []
    harmless: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            section = key.split(".")[0]
            found = harmless if key in MAY_CHANGE or section in MAY_CHANGE else fatal
            found.append(f"{key}: {_show(before.get(key))} → {_show(after.get(key))}")
    return fatal, harmless


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# --- YAML → tree of leaves that remember where they stand ----------------------------------------------------------


class _Leaf(typing.NamedTuple):
    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """Safe loader that takes only unambiguous scalars: `yes`, `010`, `12:30` and dates stay texts, for a clear refusal."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; give an existing YAML file, such as configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a YAML file in UTF-8") from None
    tree = _parse(text, str(path), problems)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found no keys; a config is a YAML file of `key: value` lines, such as configs/quickstart.yaml")
    return tree


def _parse(text: str, source: str, problems: list[str], numbered: bool = True) -> dict[str, Any] | _Leaf:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return _from_node(loader, node, source, "", problems, numbered) if node else _Leaf(None, source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark and numbered else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: not valid YAML ({reason}); check quotes, brackets and indentation there") from None
    finally:
        loader.dispose()


def _from_node(loader: _Loader, node: yaml.Node, source: str, prefix: str, problems: list[str], numbered: bool) -> Any:
    def where(at: yaml.Node) -> str:
        return f"{source}:{at.start_mark.line + 1}" if numbered else source

    if not isinstance(node, yaml.MappingNode):
        return _Leaf(loader.construct_object(node, deep=True), where(node))
    tree: dict[str, Any] = {}
    first_line: dict[str, str] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in tree:
            problems.append(f"{where(key_node)}: {prefix}{key}: found twice (first at {first_line[key]}); keep one of them")
            continue
        first_line[key] = where(key_node)
        tree[key] = _from_node(loader, value_node, source, f"{prefix}{key}.", problems, numbered)
    return tree


def _tree_from_dict(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {k: _tree_from_dict(v, source) if isinstance(v, Mapping) else _Leaf(v, source) for k, v in values.items()}


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    name, equals, text = override.partition("=")
    where = f"command line: {override!r}"
    if not equals or not name.strip():
        problems.append(f"{where}: found no '='; write KEY=VALUE, such as optim.lr=0.01")
        return
    *sections, last = name.strip().split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    value = _parse(text, where, problems, numbered=False)
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        tree[last].update(value)
    else:
        tree[last] = value


# --- tree → dataclasses --------------------------------------------------------------------------------------------


def _checked(tree: dict[str, Any], source: str, problems: list[str], world_size: int) -> Config:
    config = _build(Config, tree, source, "", problems)
    if config is not None:
        problems += _cross_checks(config, source, world_size)
    if problems:
        raise InputError("\n".join(problems))
    return config


def _build(cls: type, tree: dict[str, Any], source: str, prefix: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`, or None after adding to `problems`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(cls)}
    before = len(problems)
    for key in tree.keys() - known.keys():
        problems.append(f"{_first_place(tree[key], source)}: {prefix}{key}: unknown key; {_nearest(key, prefix, known)}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hints[name]):
            section = tree.get(name, {})
            if isinstance(section, _Leaf):
                problems.append(f"{section.where}: {prefix}{name}: found {_show(section.value)}; accepted: a section with keys of its own")
            elif section or required:
                values[name] = _build(hints[name], section, source, f"{prefix}{name}.", problems)
        elif name in tree:
            leaf = tree[name]
            if isinstance(leaf, dict):
                problems.append(f"{_first_place(leaf, source)}: {prefix}{name}: found a section; accepted: {_accepted(hints[name])}")
                continue
            try:
                values[name] = _convert(hints[name], leaf.value)
            except ValueError:
                hint = _number_hint(leaf.value)
                problems.append(f"{leaf.where}: {prefix}{name}: found {_show(leaf.value)}; accepted: {_accepted(hints[name])}{hint}")
        elif required:
            problems.append(f"{source}: {prefix}{name}: missing; add it: {_accepted(hints[name])}")
    return cls(**values) if len(problems) == before else None


def _cross_checks(config: Config, source: str, world_size: int) -> list[str]:
    """Everything that depends on more than one key."""
    found: list[str] = []
    train, model = config.train, config.model
    if (train.steps is None) == (train.epochs is None):
        state = "both are set" if train.steps is not None else "neither is set"
        found.append(f"{source}: train.steps, train.epochs: {state}; accepted: exactly one of them, the other null or absent")
    if train.batch_size % world_size:
        below = train.batch_size // world_size * world_size
        fits = " or ".join(str(size) for size in (below, below + world_size) if size)
        sizes = ", ".join(str(n) for n in range(1, train.batch_size + 1) if train.batch_size % n == 0)
        found.append(
            f"{source}: train.batch_size: {train.batch_size} images cannot be shared equally by {world_size} processes; "
            f"accepted: a multiple of {world_size}, such as {fits}, or one of {sizes} processes"
        )
    for option in model.options():
        if option not in MODEL_OPTIONS[model.name]:
            owners = [name for name, options in MODEL_OPTIONS.items() if option in options]
            found.append(f"{source}: model.{option}: {model.name} has no such option; remove it (it belongs to {', '.join(owners)})")
    return found


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the annotation `hint` wants it; ValueError where it does not fit."""
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
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError
    return value


def _accepted(hint: Any) -> str:
    """What an annotation accepts, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return args[1].text
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_accepted(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(args) if len(args) > 1 else args[0]
    if dataclasses.is_dataclass(hint):
        return "a section with keys of its own"
    return {types.NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _number_hint(value: Any) -> str:
    """PyYAML follows YAML 1.1, where `1e-3` is a text. Say so, with the spelling that every YAML reader takes."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    spelled = repr(number)
    if "e" in spelled and "." not in spelled:
        spelled = spelled.replace("e", ".0e")
    return f"; YAML reads {value} as a text, write {spelled}"


def _nearest(key: str, prefix: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    everywhere = _all_keys(Config)
    same_name = [name for name in everywhere if name.split(".")[-1] == key]
    close = same_name or difflib.get_close_matches(prefix + key, everywhere, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return "accepted here: " + ", ".join(known)


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        keys += _all_keys(hint, f"{prefix}{field.name}.") if dataclasses.is_dataclass(hint) else [prefix + field.name]
    return keys


def _first_place(tree: Any, source: str) -> str:
    while isinstance(tree, dict) and tree:
        tree = next(iter(tree.values()))
    return tree.where if isinstance(tree, _Leaf) else source
