"""Config files are read strictly, and everything that is wrong with one is said at once."""

import ast
import dataclasses
import inspect
import shlex
import typing
from pathlib import Path

import pytest
import yaml

from fcn.config import (
    PRETRAINED,
    Config,
    Data,
    Loss,
    config_changes,
    config_from_dict,
    keys,
    load_config,
    protocol,
    save_config,
    to_dict,
    total_steps,
)
from fcn.config.keys import OWN as YOUR_OWN
from fcn.config.keys import AddedLosses, Model, Train, options_of
from fcn.config.load import MAY_CHANGE
from fcn.errors import InputError
from fcn.metrics import METRICS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

GOOD = """\
run_dir: runs/x
data:
  name: shapes
  root: data/shapes
  crop: [96, 64]
model:
  name: unet
train:
  batch_size: 12
  steps: 400
optim:
  lr: 0.01
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "c.yaml"


@pytest.fixture
def load(file):
    def load(text=GOOD, overrides=(), world_size=1):
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides, world_size)

    return load


@pytest.fixture
def problems(load):
    """The lines of the message that a wrong config gives."""

    def problems(*args, **kwargs):
        with pytest.raises(InputError) as caught:
            load(*args, **kwargs)
        return str(caught.value).splitlines()

    return problems


def fields(cls, prefix=""):
    """(dotted key, name) of every value in the config."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.name


# --- what is right loads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads_and_survives_saving(path, file):
    config = load_config(path)
    save_config(config, file)
    assert load_config(file) == config


def test_values_and_defaults(load):
    config = load()
    assert (config.run_dir, config.seed, config.resume) == ("runs/x", 0, "auto")
    assert (config.data.name, config.data.crop, config.data.val) == ("shapes", (96, 64), "val")
    assert (config.train.steps, config.train.epochs, config.optim.lr) == (400, None, 0.01)
    assert config.wandb.mode == "auto"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lr: 1", "lr", 1.0),
        ("lr: 1.0e-3", "lr", 0.001),
        ("lr: .5", "lr", 0.5),
        ("lr: +2.", "lr", 2.0),
        ("lr: 1.5E+1", "lr", 15.0),
        ("warmup: 1_000", "warmup", 1000),
        ("milestones: [0.25, 0.5, 0.75]", "milestones", (0.25, 0.5, 0.75)),
        ("milestones: []", "milestones", ()),
        ('schedule: "cosine"', "schedule", "cosine"),
    ],
)
def test_value_is_read_with_its_type(load, line, key, value):
    found = getattr(load(GOOD.replace("lr: 0.01", line)).optim, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "null",
        "010",
        "1e-3",
        "12:30",
        "2026-01-01",
        "a: b",
        "# no comment",
        "'quoted\"",
        "[x",
        "ü/→",
        " x ",
        "a\nb",
    ],
)
def test_text_survives_saving(load, file, text):
    config = load()
    config.run_dir = text
    save_config(config, file)
    assert load_config(file) == config


@pytest.mark.parametrize("number", [1e-5, 1e16, 0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 3.0])
def test_number_survives_saving(load, file, number):
    config = load()
    config.optim.lr = number
    save_config(config, file)
    assert load_config(file).optim.lr == number


def test_dict_round_trip(load):
    config = load(GOOD + "  milestones: [0.5, 0.75]\neval: {every: 7}\n")
    values = to_dict(config)
    assert config_from_dict(values, "checkpoint") == config
    assert values["data"]["crop"] == [96, 64]


def test_fault_in_a_dict_names_its_source(load):
    values = to_dict(load())
    values["optim"]["lr"] = -1.0
    with pytest.raises(InputError, match=r"^step_7\.pt: optim\.lr: found -1\.0; accepted: a number above 0$"):
        config_from_dict(values, "step_7.pt")


def test_byte_order_mark_is_no_fault(file):
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(file).run_dir == "runs/x"


# --- wrong values --------------------------------------------------------------------------------------------------

WRONG = [
    *[("batch_size: 12", f"batch_size: {v}", "train.batch_size", 9)
      for v in ("12.0", "true", "010", "12:30", "0x10", "'12'", "null", "", "0", "-4", "[12]", "12 images")],
    *[("lr: 0.01", f"lr: {v}", "optim.lr", 12)
      for v in (".nan", ".inf", "-.inf", "nan", "inf", "1.0e+400", "1e400", "true", "0", "-0.1", "[0.1]", "null")],
    *[("crop: [96, 64]", f"crop: {v}", "data.crop", 5)
      for v in ("[-96, 64]", "[96, 0]", "[96]", "[96, 64, 3]", "[96.0, 64]", "[true, 64]", "96", "96x64")],
    *[("steps: 400", f"steps: 400\n  channels_last: {v}", "train.channels_last", 11)
      for v in ("yes", "no", "on", "True", "1", "0", "'true'", "null")],
    *[("lr: 0.01", f"lr: 0.01\n  schedule: {v}", "optim.schedule", 13) for v in ("Poly", "linear", "1", "null")],
    ("crop: [96, 64]", "scale: [2.0, 0.5]", "data.scale", 5),
    ("crop: [96, 64]", "scale: [0.0, 0.5]", "data.scale", 5),
    ("crop: [96, 64]", "hflip: 1.5", "data.hflip", 5),
    ("crop: [96, 64]", "workers: -1", "data.workers", 5),
    ("lr: 0.01", "momentum: 1.0", "optim.momentum", 12),
    ("lr: 0.01", "milestones: [0.8, 0.6]", "optim.milestones", 12),
    ("lr: 0.01", "checkpoint: 3", "optim.checkpoint", 12),
    ("run_dir: runs/x", "run_dir: ' '", "run_dir", 1),
    ("run_dir: runs/x", "run_dir: 7", "run_dir", 1),
    ("optim:\n  lr: 0.01", "optim: 3", "optim", 11),
    ("optim:\n  lr: 0.01", "checkpoint: {keep: 1}", "checkpoint.keep", 11),
    ("optim:\n  lr: 0.01", "loss: {ignore_index: 256}", "loss.ignore_index", 11),
    *[("optim:\n  lr: 0.01", f"eval: {{{key}: {value}}}", f"eval.{key}", 11) for key, value in (
        ("preset", "coco"), ("scales", "[]"), ("scales", "[1.0, 0.0]"), ("scales", "[1, 1.0]"), ("scales", "0.5"),
        ("scale", "0.5"), ("flip", "1"), ("window", "512"), ("window", "[0, 8]"), ("crop", "[8]"))],
    *[("optim:\n  lr: 0.01", f"loss: {{weights: {v}}}", "loss.weights", 11)
      for v in ("[1, -1]", "[0, 0.0]", "[]", "[1, .nan]", "[1, .inf]", "[true, 1]", "1", "{road: 1}")],
    *[("optim:\n  lr: 0.01", f"loss: {{name: ohem, keep: {v}}}", "loss.keep", 11) for v in ("0", "1.5", ".nan")],
    *[("optim:\n  lr: 0.01", f"loss: {{label_smoothing: {v}}}", "loss.label_smoothing", 11) for v in ("1", "-0.1")],
    *[("optim:\n  lr: 0.01", f"loss: {{name: focal, gamma: {v}}}", "loss.gamma", 11) for v in ("-1", "two")],
    *[("optim:\n  lr: 0.01", f"loss: {{add: {{dice: {v}}}}}", "loss.add.dice", 11) for v in ("0", "-1", ".nan", "yes")],
    ("optim:\n  lr: 0.01", "loss: {add: {jaccard: 1}}", "loss.add.jaccard", 11),
    ("optim:\n  lr: 0.01", "loss: {add: dice}", "loss.add", 11),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "key", "line"), WRONG, ids=[new.split("\n")[-1] for _, new, _, _ in WRONG])
def test_wrong_value_is_named_with_file_and_line(problems, file, old, new, key, line):
    (problem,) = problems(GOOD.replace(old, new))
    assert problem.startswith(f"{file}:{line}: {key}: ")
    assert "accepted: " in problem or "unknown key" in problem


def test_unknown_choice_lists_the_choices(problems):
    (problem,) = problems(GOOD.replace("name: unet", "name: resnet"))
    assert "model.name: found the text 'resnet'; accepted: one of " in problem
    assert "unet" in problem.split("accepted")[1]
    assert "linknet" in problem.split("accepted")[1]


@pytest.mark.parametrize("text", ["1e-3", "2E5", "1e-12", "1e0", "5e+3"])
def test_number_that_yaml_reads_as_text_is_refused_with_a_spelling_that_loads(problems, load, text):
    (problem,) = problems(GOOD.replace("lr: 0.01", f"lr: {text}"))
    assert f"optim.lr: found the text '{text}'" in problem
    spelling = problem.split("write ")[1]
    assert load(GOOD.replace("lr: 0.01", f"lr: {spelling}")).optim.lr == float(text)


@pytest.mark.parametrize(
    ("old", "key", "text"),
    [
        ("batch_size: 12", "batch_size", "1e3"),
        ("batch_size: 12", "batch_size", "010"),
        ("batch_size: 12", "batch_size", "'12'"),
        ("steps: 400", "steps", "4e2"),
        ("name: unet", "name", "1e0"),
    ],
)
def test_a_spelling_is_suggested_only_if_it_loads(problems, load, old, key, text):
    (problem,) = problems(GOOD.replace(old, f"{key}: {text}"))
    if "write " in problem:
        load(GOOD.replace(old, f"{key}: {problem.split('write ')[1]}"))


@pytest.mark.parametrize(
    ("cut", "missing"),
    [
        ("run_dir: runs/x\n", ["run_dir"]),
        ("  root: data/shapes\n", ["data.root"]),
        ("  batch_size: 12\n", ["train.batch_size"]),
        ("data:\n  name: shapes\n  root: data/shapes\n  crop: [96, 64]\n", ["data.name", "data.root"]),
    ],
)
def test_missing_key_is_named(problems, file, cut, missing):
    found = problems(GOOD.replace(cut, ""))
    assert len(found) == len(missing)
    for problem, key in zip(found, missing):
        assert problem.startswith(f"{file}: {key}: missing; accepted: ")


# --- wrong keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD + "  moment: 0.9\n", 13, "optim.moment: unknown key; did you mean optim.momentum?"),
        (GOOD + "sead: 0\n", 13, "sead: unknown key; did you mean seed?"),
        (GOOD + "optimizer: {lr: 0.1}\n", 13, "optimizer: unknown key; did you mean optim?"),
        (GOOD + "lr: 0.1\n", 13, "lr: unknown key; did you mean optim.lr?"),
        (GOOD + "  crop: [9, 9]\n", 13, "optim.crop: unknown key; did you mean data.crop?"),
        (GOOD + "  xyzzy: 1\n", 13, "optim.xyzzy: unknown key; accepted here: name, lr, momentum"),
    ],
)  # fmt: skip
def test_unknown_key_is_named_with_the_nearest_known_one(problems, file, text, line, message):
    (problem,) = problems(text)
    assert problem.startswith(f"{file}:{line}: {message}")


TOP_LEVEL = {field.name for field in dataclasses.fields(Config)}
NESTED = sorted({name for key, name in fields(Config) if "." in key} - TOP_LEVEL)


@pytest.mark.parametrize("name", NESTED)
def test_key_at_top_level_is_sent_to_its_section(problems, name):
    owners = [key for key, leaf in fields(Config) if leaf == name]
    (problem,) = problems(f"{GOOD}{name}: 1\n")
    assert problem.split("did you mean ")[1].rstrip("?") in owners


def test_unknown_section_is_reported_at_its_own_line(problems, file):
    (problem,) = problems(GOOD + "optimizer:\n  lr: 0.1\n")
    assert problem.startswith(f"{file}:13: optimizer: unknown key")


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        (GOOD + "  lr: 0.02\n", "optim.lr", 12, 13),
        (GOOD + "run_dir: runs/y\n", "run_dir", 1, 13),
        (GOOD + "train: {steps: 3}\n", "train", 8, 13),
        (GOOD + "eval: {every: 1, batch_size: 2, every: 3}\n", "eval.every", 13, 13),
    ],
)
def test_duplicate_key_is_reported_with_both_lines(problems, file, text, key, first, second):
    (problem,) = problems(text)
    assert problem.startswith(f"{file}:{second}: {key}: found twice (first at {file}:{first})")


def test_option_of_another_model_is_refused(problems):
    (problem,) = problems(GOOD.replace("name: unet", "name: linknet\n  width: 16"))
    assert "model.width: linknet has no such option" in problem
    assert "unet" in problem


def test_model_options_are_those_that_are_set(load):
    assert load(GOOD.replace("name: unet", "name: unet\n  width: 16")).model.arguments() == {"width": 16}


# --- networks, their options and weights ---------------------------------------------------------------------------

NETWORKS = [
    "fcn32s", "fcn16s", "fcn8s", "fcn_resnet18", "fcn_resnet50", "fcn_resnet101", "fcn8_kitti", "unet", "linknet",
]  # fmt: skip
OWN = ["mine:build", "my_package.nets.small:Network", "_m1:_f1", "torchvision.models.segmentation:deeplabv3_resnet50"]


@pytest.fixture
def model(load):
    """The model section with these lines in it."""

    def model(*lines, overrides=()):
        return load(with_model(*lines), overrides).model

    return model


def with_model(*lines):
    return GOOD.replace("  name: unet\n", "".join(f"  {line}\n" for line in lines))


@pytest.mark.parametrize("name", [*NETWORKS, *OWN])
def test_network_is_one_of_nine_or_an_import_path(model, name):
    assert model(f"name: {name}").name == name


@pytest.mark.parametrize(
    "name",
    ["resnet", "UNet", "unet ", "''", "mine", "mine:", ":build", "a:b:c", "my/package:build", "mine:build()",
     "1st:build", "mine:1st", "my-package:build", "a..b:c", "mine :build", "mine:a.b", "3", "null"],
)  # fmt: skip
def test_another_network_is_refused_with_those_that_there_are(problems, file, name):
    quoted = f"'{name}'" if name.endswith((" ", ":")) else name
    (problem,) = problems(with_model(f"name: {quoted}"))
    assert problem.startswith(f"{file}:7: model.name: found ")
    accepted = problem.split("accepted: ")[1]
    assert all(network in accepted for network in NETWORKS)
    assert "package.module:function" in accepted


OPTIONS = {
    "layout": ["classic", "same"],
    "dropout": [0.0, 0.25],
    "width": [1, 64],
    "norm": ["batch", "none"],
    "encoder": ["resnet18", "plain"],
    "aux": [True, False],
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name in NETWORKS for option in options_of(Model, name) for value in OPTIONS[option]],
)
def test_option_that_is_set_reaches_the_network_even_if_it_is_0_or_false(model, name, option, value):
    assert model(f"name: {name}", f"{option}: {str(value).lower()}").arguments() == {option: value}


@pytest.mark.parametrize("name", [*NETWORKS, "mine:build"])
def test_options_that_are_null_are_left_to_the_network(model, name):
    nulls = [f"{option}: null" for option in (*OPTIONS, "options", "weights")]
    assert model(f"name: {name}", *nulls).arguments() == {}


@pytest.mark.parametrize(
    ("name", "line", "where"),
    [
        ("unet", "layout: same", "an option of fcn32s, fcn16s, fcn8s)"),
        ("fcn8_kitti", "layout: same", "an option of fcn32s, fcn16s, fcn8s)"),
        ("unet", "dropout: 0.5", "an option of fcn32s, fcn16s, fcn8s, fcn8_kitti)"),
        ("fcn_resnet50", "dropout: 0.0", "an option of fcn32s, fcn16s, fcn8s, fcn8_kitti)"),
        ("fcn_resnet18", "aux: false", "an option of fcn_resnet50, fcn_resnet101)"),
        ("fcn8s", "norm: batch", "an option of unet)"),
        ("fcn_resnet101", "encoder: plain", "an option of linknet)"),
        ("linknet", "width: 4", "an option of fcn32s, fcn16s, fcn8s, fcn8_kitti, unet)"),
        ("fcn8s", "options: {depth: 3}", "an option of a network of your own)"),
        ("unet", "options: {}", "an option of a network of your own)"),
    ],
)
def test_option_of_another_network_is_refused_with_its_owners(problems, file, name, line, where):
    (problem,) = problems(with_model(f"name: {name}", line))
    option = line.split(":")[0]
    assert problem == f"{file}: model.{option}: {name} has no such option; remove it ({where}"


@pytest.mark.parametrize("line", ["width: 4", "aux: false", "norm: none", "dropout: 0.0"])
def test_option_for_a_network_of_ones_own_belongs_under_options(problems, file, line):
    (problem,) = problems(with_model("name: mine:build", line))
    option = line.split(":")[0]
    assert problem.startswith(f"{file}: model.{option}: mine:build has no such option")
    assert problem.endswith("write it under model.options")


@pytest.mark.parametrize(
    ("name", "line", "accepted"),
    [
        ("fcn8s", "layout: valid", "classic, same"),
        ("fcn8s", "dropout: 1.0", "from 0 to below 1"),
        ("fcn8s", "dropout: -0.1", "from 0 to below 1"),
        ("fcn8s", "width: 0", "1 or more"),
        ("linknet", "encoder: resnet34", "resnet18, plain"),
        ("fcn_resnet50", "aux: yes", "true or false"),
        ("fcn_resnet50", "aux: 1", "true or false"),
        ("fcn_resnet50", "weights: ' '", "a path that is not empty"),
        ("fcn_resnet50", "weights: true", "a path that is not empty"),
        ("fcn_resnet50", "weights: {a: b}", "a path that is not empty"),
        ("mine:build", "options: 3", "a section of keys and values"),
        ("mine:build", "options: [depth, 3]", "a section of keys and values"),
        ("mine:build", "options: depth=3", "a section of keys and values"),
    ],
)
def test_wrong_value_of_an_option_is_named_with_what_is_accepted(problems, file, name, line, accepted):
    (problem,) = problems(with_model(f"name: {name}", line))
    assert problem.startswith(f"{file}:8: model.{line.split(':')[0]}: found ")
    assert accepted in problem.split("accepted: ")[1]


@pytest.mark.parametrize("name", [*NETWORKS, "mine:build"])
def test_weights_may_be_a_file_for_every_network(model, name):
    assert model(f"name: {name}", "weights: runs/x/checkpoints/best.pt").weights == "runs/x/checkpoints/best.pt"


WITHOUT = {
    "imagenet": {"unet": "a file, null", "mine:build": "a file, null"},
    "coco": {name: "imagenet, a file, null" for name in NETWORKS if name.startswith(("fcn8", "fcn16", "fcn32"))}
    | {"fcn_resnet18": "imagenet, a file, null", "linknet": "imagenet, a file, null"}
    | {"unet": "a file, null", "mine:build": "a file, null"},
}


@pytest.mark.parametrize("weights", WITHOUT)
@pytest.mark.parametrize("name", [*NETWORKS, "mine:build"])
def test_weights_that_do_not_exist_are_refused_with_those_that_do(model, problems, file, name, weights):
    assert (name in PRETRAINED[weights]) == (name not in WITHOUT[weights])
    lines = [f"name: {name}", f"weights: {weights}"]
    if name not in WITHOUT[weights]:
        assert model(*lines).weights == weights
        return
    (problem,) = problems(with_model(*lines))
    assert problem == (
        f"{file}: model.weights: found {weights}, which does not exist for this {name}; "
        f"accepted: {WITHOUT[weights][name]}"
    )


@pytest.mark.parametrize("weights", ["imagenet", "coco"])
def test_plain_encoder_has_no_weights_but_a_file(model, problems, weights):
    lines = ["name: linknet", "encoder: plain"]
    (problem,) = problems(with_model(*lines, f"weights: {weights}"))
    assert problem.endswith(
        f"model.weights: found {weights}, which does not exist for this linknet; accepted: a file, null"
    )
    assert model(*lines, "weights: linknet.pt").weights == "linknet.pt"
    assert model("name: linknet", "encoder: resnet18", "weights: imagenet").weights == "imagenet"


NESTED_OPTIONS = """\
options:
    depth: 3
    rates: [6, 12, 1.5]
    head: {dropout: 0.1, norm: null, sizes: [[1, 2], [3]], deep: {er: {still: true}}}
    texts: ['1e-3', 'yes', 'null', '010', 'a: b', '', ü]
    none: null
    empty: {}
    small: 1.0e-5
"""
OPTIONS_READ = {
    "depth": 3,
    "rates": [6, 12, 1.5],
    "head": {"dropout": 0.1, "norm": None, "sizes": [[1, 2], [3]], "deep": {"er": {"still": True}}},
    "texts": ["1e-3", "yes", "null", "010", "a: b", "", "ü"],
    "none": None,
    "empty": {},
    "small": 1e-5,
}


def test_options_of_a_network_of_ones_own_are_any_plain_data(model):
    section = model("name: mine:build", NESTED_OPTIONS.rstrip())
    assert section.arguments() == section.options == OPTIONS_READ
    assert [type(value) for value in section.options["rates"]] == [int, int, float]


def test_options_survive_saving_and_a_checkpoint(load, file):
    config = load(with_model("name: mine:build", NESTED_OPTIONS.rstrip()))
    save_config(config, file)
    assert load_config(file) == config
    assert load_config(file).model.options == OPTIONS_READ
    values = to_dict(config)
    assert config_from_dict(values, "checkpoint") == config
    values["model"]["options"]["head"]["deep"]["er"]["still"] = False
    assert config.model.options == OPTIONS_READ, "to_dict is a copy"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.options.depth=4"], OPTIONS_READ | {"depth": 4}),
        (["model.options.new=[1, 2]"], OPTIONS_READ | {"new": [1, 2]}),
        (["model.options.head.deep.er.still=null"],
         OPTIONS_READ | {"head": OPTIONS_READ["head"] | {"deep": {"er": {"still": None}}}}),
        (["model.options.rates.first=6"], OPTIONS_READ | {"rates": {"first": 6}}),
        (["model.options={depth: 5, rates: []}"], {"depth": 5, "rates": []}),
        (["model.options=null"], None),
        (["model.options=null", "model.options.depth=3"], {"depth": 3}),
    ],
)  # fmt: skip
def test_override_of_an_option(model, overrides, expected):
    assert model("name: mine:build", NESTED_OPTIONS.rstrip(), overrides=overrides).options == expected


def test_override_makes_options_where_there_were_none(model):
    assert model("name: mine:build", overrides=["model.options.depth=3"]).arguments() == {"depth": 3}
    assert model("name: mine:build", "options: null", overrides=["model.options.a.b=1.5"]).options == {"a": {"b": 1.5}}


def test_option_that_is_given_twice_is_reported_with_both_lines(problems, file):
    (problem,) = problems(with_model("name: mine:build", "options: {depth: 3, width: 1, depth: 4}"))
    assert problem.startswith(f"{file}:8: model.options.depth: found twice (first at {file}:8)")


def test_option_that_is_no_plain_value_is_refused(problems, file):
    (problem,) = problems(with_model("name: mine:build", "options: {depth: !!python/name:os.getcwd 1}"))
    assert problem.startswith(f"{file}:8: model.options.depth: not a plain value")


@pytest.mark.parametrize("value", [0.0, 0.4, 3.0])
def test_weight_of_the_auxiliary_loss_is_any_number_from_0(load, value):
    assert load(overrides=[f"loss.aux_weight={value}"]).loss.aux_weight == value
    assert load().loss.aux_weight == 0.5


@pytest.mark.parametrize("value", ["-0.1", "-1", ".nan", ".inf", "null", "true", "'0.4'"])
def test_another_weight_of_the_auxiliary_loss_is_refused(problems, file, value):
    (problem,) = problems(GOOD + f"loss: {{aux_weight: {value}}}\n")
    assert problem.startswith(f"{file}:13: loss.aux_weight: found ")
    assert "accepted: a number, 0 or more" in problem


def test_change_of_network_options_weights_or_auxiliary_loss_makes_another_run(load):
    old = to_dict(load(with_model("name: mine:build", "options: {depth: 3, head: {rate: 0.1}}")))
    new = to_dict(
        load(
            with_model("name: mine:build", "options: {depth: 4, head: {rate: 0.2}}", "weights: w.pt"),
            ["loss.aux_weight=0.4"],
        )
    )
    assert config_changes(old, new) == (
        [
            "loss.aux_weight: 0.5 → 0.4",
            "model.options.depth: 3 → 4",
            "model.options.head.rate: 0.1 → 0.2",
            "model.weights: null → the text 'w.pt'",
        ],
        [],
    )


@pytest.mark.parametrize(
    "line",
    [
        "{weights: [1, 0, 0.5], label_smoothing: 0.1}",
        "{name: focal, weights: [1, 0, 0.5], gamma: 0}",
        "{name: ohem, weights: [1, 0, 0.5], label_smoothing: 0.1, keep: 1}",
        "{name: dice, add: {ohem: 0.5}, keep: 0.1}",
        "{name: lovasz, add: {cross_entropy: 2, focal: 0.5}, weights: [1, 0, 0.5], gamma: 1, label_smoothing: 0.0}",
    ],
)
def test_options_that_a_chosen_loss_has(load, file, line):
    config = load(GOOD + f"loss: {line}\n")
    for key, value in yaml.safe_load(line).items():
        found = to_dict(config)["loss"][key]
        assert (found if key != "add" else {name: x for name, x in found.items() if x is not None}) == value
    save_config(config, file)
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        (
            "{name: dice, weights: [1, 2]}",
            "weights",
            "dice has no such option; remove it (an option of cross_entropy, f",
        ),
        ("{gamma: 2}", "gamma", "cross_entropy has no such option; remove it (an option of focal)"),
        ("{name: focal, label_smoothing: 0}", "label_smoothing", "focal has no such option"),
        ("{add: {dice: 1}, keep: 0.5}", "keep", "cross_entropy and dice have no such option"),
        ("{name: dice, add: {dice: 1}}", "add.dice", "dice is loss.name already, with weight 1; remove one of them"),
    ],
)
def test_options_that_no_chosen_loss_has(problems, file, line, key, message):
    (problem,) = problems(GOOD + f"loss: {line}\n")
    assert problem.startswith(f"{file}: loss.{key}: {message}")


def test_one_more_loss_from_the_command_line(load):
    assert load(overrides=["loss.add.dice=0.5"]).loss.add.dice == 0.5


def test_every_loss_has_its_options_listed_and_can_be_added():
    named = typing.get_args(typing.get_type_hints(Loss)["name"])
    assert set(named) == {field.name for field in dataclasses.fields(AddedLosses)}
    options = {option for name in named for option in options_of(Loss, name)}
    assert options == {field.name for field in dataclasses.fields(Loss)} - {"name", "add", "ignore_index", "aux_weight"}


# --- checks across keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "state"),
    [("", "neither is set"), ("  steps: 4\n  epochs: 2\n", "both are set"), ("  steps: null\n", "neither is set")],
)
def test_exactly_one_of_steps_and_epochs(problems, lines, state):
    (problem,) = problems(GOOD.replace("  steps: 400\n", lines))
    assert f"train.steps, train.epochs: {state}" in problem


def test_epochs_instead_of_steps(load):
    train = load(GOOD.replace("steps: 400", "epochs: 3\n  steps: null")).train
    assert (train.steps, train.epochs) == (None, 3.0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_batch_that_the_processes_share_equally(load, world_size):
    assert load(world_size=world_size).train.batch_size == 12


@pytest.mark.parametrize(
    ("world_size", "remedy"), [(5, "such as 10 or 15"), (8, "such as 8 or 16"), (13, "such as 13;")]
)
def test_batch_that_the_processes_cannot_share_equally(load, problems, world_size, remedy):
    (problem,) = problems(world_size=world_size)
    assert f"train.batch_size: found 12, which {world_size} processes cannot share equally" in problem
    assert remedy in problem
    assert "start 1, 2, 3, 4, 6, 12 processes; or set train.uneven=true" in problem
    assert load(world_size=world_size, overrides=["train.uneven=true"]).train.batch_size == 12


@pytest.mark.parametrize(("shards", "world_size"), [(1, 1), (6, 4), (12, 5), (12, 12)])
def test_shards_are_shared_by_any_number_of_processes_up_to_theirs(load, shards, world_size):
    train = load(world_size=world_size, overrides=[f"train.shards={shards}"]).train
    assert (train.shards, train.uneven) == (shards, False)


@pytest.mark.parametrize(
    ("override", "world_size", "words"),
    [
        ("train.shards=5", 1, "train.shards: found 5, which does not divide train.batch_size=12; accepted: 1, 2, 3, 4"),
        ("train.shards=24", 1, "train.shards: found 24, which does not divide train.batch_size=12"),
        ("train.shards=4", 5, "train.shards: found 4 for 5 processes; accepted: 6, 12; or start at most 4 processes"),
        ("train.shards=0", 1, "train.shards: found 0; accepted: a whole number, 1 or more"),
        ("train.micro_batch=2", 1, "train.micro_batch: found 2, less than the 3 images of a shard; accepted: 3 or"),
        ("train.compile=true", 1, "train.compile: found true with train.shards"),
    ],
)
def test_what_shards_do_not_go_with(problems, override, world_size, words):
    text = GOOD.replace("steps: 400", "steps: 400\n  shards: 4")
    found = problems(text, world_size=world_size, overrides=[override])
    assert any(words in problem for problem in found), found


def test_without_sync_bn_every_process_needs_an_image(problems):
    (problem,) = problems(GOOD.replace("steps: 400", "steps: 400\n  sync_bn: false\n  uneven: true"), world_size=13)
    assert "train.batch_size: found 12 for 13 processes without train.sync_bn" in problem
    assert "13 or more, or train.sync_bn=true" in problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "native"),
        (["eval.preset=short520", "eval.scales=[1.0]"], "short520"),
        (["eval.preset=center_crop"], "center_crop 96x64"),
        (["eval.preset=center_crop", "eval.crop=[480,480]", "data.crop=null"], "center_crop 480x480"),
        (["eval.crop=[480,480]", "eval.scales=[2]"], "native, scales 2"),
        (
            ["eval.preset=short520", "eval.scales=[0.5,1,1.75]", "eval.flip=true", "eval.window=[512,256]"],
            "short520, scales 0.5 1 1.75, flip, window 512x256",
        ),
    ],
)
def test_protocol_says_everything_that_a_score_depends_on(load, overrides, words):
    config = load(overrides=overrides)
    assert protocol(config.eval, config.data.crop) == words


def test_centre_crop_needs_a_size(problems, file):
    (problem,) = problems(overrides=["eval.preset=center_crop", "data.crop=null"])
    assert problem == (
        f"{file}: eval.crop: missing, and so is data.crop; accepted for eval.preset=center_crop: [height, width]"
    )


@pytest.mark.parametrize("jitter", ["[0.1, 0.1, 0.1]", "[0.1, 0.1, 0.1, 0.6]", "[-0.1, 0, 0, 0]", "0.4"])
def test_colour_jitter_is_four_numbers(problems, jitter):
    (problem,) = problems(overrides=[f"data.jitter={jitter}"])
    assert "accepted: [brightness, contrast, saturation, hue], each from 0 to 1, hue to 0.5" in problem


def test_all_problems_are_reported_together_one_a_line(problems, file):
    text = (
        GOOD.replace("run_dir: runs/x", "run_dir: 3")
        .replace("crop: [96, 64]", "crop: [-1, 64]")
        .replace("name: unet", "name: linknet\n  width: 4")
        .replace("steps: 400", "epochs: 2\n  steps: 400")
        .replace("lr: 0.01", "lr: 1e-3\n  lr: 2")
    ) + "  momentun: 0.5\n"
    found = problems(text, overrides=["eval.every=x", "nonsense"], world_size=5)
    expected = [
        f"{file}:1: run_dir: found 3",
        f"{file}:5: data.crop: found [-1, 64]",
        f"{file}: model.width: linknet has no such option",
        f"{file}: train.steps, train.epochs: both are set",
        f"{file}: train.batch_size: found 12",
        f"{file}:14: optim.lr: found the text '1e-3'",
        f"{file}:15: optim.lr: found twice",
        f"{file}:16: optim.momentun: unknown key",
        "command line: 'eval.every=x': eval.every: found the text 'x'",
        "command line: 'nonsense': found no '='",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in found) == 1, start


def test_a_text_of_several_lines_is_still_one_problem_in_one_line(problems):
    assert len(problems(GOOD + "  warmup: |\n    a\n    b\n")) == 1


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["optim.lr=0.5"], "optim.lr", 0.5),
        (["optim.lr=0.5", "optim.lr=0.25"], "optim.lr", 0.25),
        (["data.crop=[32,48]"], "data.crop", [32, 48]),
        (["data.crop=null"], "data.crop", None),
        (["optim={momentum: 0.5}"], "optim.lr", 0.01),
        (["optim={momentum: 0.5}"], "optim.momentum", 0.5),
        (["eval={every: 3}"], "eval.every", 3),
        (["eval.every=3"], "eval.every", 3),
        (["run_dir=runs/a=b"], "run_dir", "runs/a=b"),
        (["seed=7"], "seed", 7),
        (["train.steps=null", "train.epochs=2"], "train.epochs", 2.0),
    ],
)
def test_override_wins(load, overrides, key, value):
    found = to_dict(load(overrides=overrides))
    for part in key.split("."):
        found = found[part]
    assert found == value


MODES = "accepted: one of auto, online, offline, disabled"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "found no '='; write KEY=VALUE"),
        ("optim.l=1", "optim.l: unknown key; did you mean optim.lr?"),
        ("opt.lr=0.1", "opt: unknown key; did you mean optim?"),
        ("lr=0.1", "lr: unknown key; did you mean optim.lr?"),
        ("optim.lr=1e-3", "optim.lr: found the text '1e-3'; accepted: a number above 0; YAML reads 1e-3 as a text"),
        ("optim.lr=", "optim.lr: found null"),
        ("optim=3", "optim: found 3"),
        ("wandb.mode=off", f"wandb.mode: found the text 'off'; {MODES}; did you mean disabled?"),
        ("wandb.mode=false", f"wandb.mode: found false; {MODES}; did you mean disabled?"),
        ("wandb.mode=ofline", f"wandb.mode: found the text 'ofline'; {MODES}; did you mean offline?"),
        ("optim.lr.x=3", "optim.lr: found a section"),
        ("optim={lr: 1, lr: 2}", "optim.lr: found twice"),
        ("optim.lr=[1", "not valid YAML"),
        ("optim.lr=\x07", "not valid YAML"),
    ],
)  # fmt: skip
def test_wrong_override_is_quoted(problems, override, message):
    (problem,) = problems(overrides=[override])
    assert problem.startswith(f"command line: {override!r}: {message}")


NEED_QUOTES = [
    "{split}/x",
    "@x",
    "*.png",
    "*x",
    "a: b",
    "%x",
    "[x",
    "`x`",
    "{split}",
    "[x]",
    "!x",
    "2012",
    "true",
    "a's: b",
]
"""Texts that YAML takes for something else, or refuses."""


@pytest.mark.parametrize("text", NEED_QUOTES)
def test_an_override_that_needs_quotes_comes_with_one_that_loads(problems, load, text):
    (problem,) = problems(overrides=[f"run_dir={text}"])
    _, hint, remedy = problem.partition("; if it is a text, quote it, for the shell as well: ")
    assert hint
    assert load(overrides=shlex.split(remedy)).run_dir == text


@pytest.mark.parametrize("text", NEED_QUOTES)
def test_a_line_that_needs_quotes_comes_with_one_that_loads(problems, load, file, text):
    (problem,) = problems(GOOD.replace("name: unet", f"name: unet\n  weights: {text}"))
    assert problem.startswith(f"{file}:")
    _, hint, remedy = problem.partition("; if it is a text, quote it: ")
    assert hint
    assert load(GOOD.replace("name: unet", f"name: unet\n  {remedy}")).model.weights == text


@pytest.mark.parametrize("text", ["'x", '"x', "3", "[x]", "{a: b}"])
def test_quotes_are_not_suggested_where_they_do_not_help(problems, text):
    assert "quote it" not in problems(overrides=[f"{'run_dir' if text[1:] == 'x' else 'data.mean'}={text}"])[0]


def test_override_that_is_no_yaml_is_reported_with_the_other_problems(problems):
    assert len(problems(GOOD.replace("lr: 0.01", "lr: -1"), overrides=["data.crop=[1"])) == 2


# --- files that are no config --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "hello", "- a\n- b\n", "null\n", "{}\n"])
def test_file_without_keys(problems, file, text):
    assert problems(text)[0].startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("x: [1\ny: 2\n", 14),
        ("x: 'open\n", 14),
        ("\tx: 1\n", 13),
        ("---\nx: 1\n", 13),
        ("x: *nobody\n", 13),
    ],
)
def test_invalid_yaml_is_named_with_its_line(problems, file, more, line):
    (problem,) = problems(GOOD + more)
    assert problem.startswith(f"{file}:{line}: not valid YAML")


@pytest.mark.parametrize(
    "more",
    [
        "x: \x07\n",
        "x: !!python/name:os 1\n",
        "seed: !!int abc\n",
        "seed: !!float abc\n",
        "seed: !!timestamp abc\n",
        "a: &a {b: *a}\n",
    ],
)
def test_odd_yaml_is_an_input_error_too(problems, file, more):
    assert problems(GOOD + more)[0].startswith(str(file))


@pytest.mark.parametrize("line", ["lr: " + "9" * 400, "warmup: " + "9" * 5000])
def test_number_beyond_all_bounds_is_an_input_error_too(problems, file, line):
    assert problems(GOOD.replace("lr: 0.01", line))[0].startswith(f"{file}:12: ")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such config file; give a YAML file"):
        load_config(tmp_path / "nowhere.yaml")


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)


def test_file_that_is_not_utf8(file):
    file.write_bytes(GOOD.encode() + b"# \xe4\n")
    with pytest.raises(InputError, match=r"c\.yaml: cannot be read .*UTF-8"):
        load_config(file)


# --- length of the run, what may change ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "images", "batch", "steps"),
    [
        ({"steps": 7}, 100, 10, 7),
        ({"epochs": 2.0}, 10, 4, 5),
        ({"epochs": 1.0}, 10, 4, 3),
        ({"epochs": 0.1}, 3, 16, 1),
        ({"epochs": 300.0}, 367, 16, 6882),  # 110100 / 16 = 6881.25
        ({"epochs": 1.1}, 100, 10, 11),  # in floating point 1.1 · 100 is above 110
    ],
)
def test_total_steps(length, images, batch, steps):
    assert total_steps(Train(batch_size=batch, **length), images) == steps


@pytest.mark.parametrize(
    ("key", "value", "shown", "fatal"),
    [
        ("optim.lr", 0.5, "0.01 → 0.5", True),
        ("data.crop", None, "[96, 64] → null", True),
        ("train.batch_size", 24, "12 → 24", True),
        ("train.sync_bn", False, "true → false", True),
        ("seed", 1, "0 → 1", True),
        ("data.exif_orientation", False, "true → false", True),
        ("train.steps", 500, "400 → 500", False),
        ("train.precision", "fp32", "the text 'bf16' → the text 'fp32'", False),
        ("data.workers", 0, "4 → 0", False),
        ("run_dir", "y", "the text 'runs/x' → the text 'y'", False),
        ("eval.every", 3, "1000 → 3", False),
        ("checkpoint.keep", 5, "3 → 5", False),
        ("wandb.mode", "offline", "the text 'auto' → the text 'offline'", False),
    ],
)
def test_change_of_a_key_on_resume(load, key, value, shown, fatal):
    old, new = to_dict(load()), to_dict(load())
    *sections, last = key.split(".")
    place = new
    for section in sections:
        place = place[section]
    place[last] = value
    line = f"{key}: {shown}"
    assert config_changes(old, new) == (([line], []) if fatal else ([], [line]))
    assert config_changes(old, old) == ([], [])


def test_checkpoint_from_before_there_were_other_losses_is_of_the_same_run(load):
    old, new = to_dict(load()), to_dict(load())
    old["loss"] = {"name": "cross_entropy", "ignore_index": 255, "aux_weight": 0.5}
    assert config_changes(old, new) == ([], [])
    assert config_from_dict(old, "checkpoint") == load()


def test_a_key_that_is_newer_than_a_checkpoint_had_its_default():
    new = to_dict(load_config(CONFIGS[0]))
    old = to_dict(load_config(CONFIGS[0]))
    for key in ("mean", "std", "on_error", "values", "exif_orientation"):
        del old["data"][key]
    assert config_changes(old, new) == ([], [])
    new["data"]["mean"] = [0.5, 0.5, 0.5]
    assert config_changes(old, new)[0] == ["data.mean: [0.485, 0.456, 0.406] → [0.5, 0.5, 0.5]"]


def test_keys_that_may_change_exist():
    known = {key for key, _ in fields(Config)} | TOP_LEVEL
    assert set(MAY_CHANGE) <= known


def test_every_model_has_its_options_listed():
    named, _ = typing.get_args(typing.get_type_hints(Model)["name"])  # or an import path
    options = {option for name in typing.get_args(named) for option in options_of(Model, name)}
    assert options == {field.name for field in dataclasses.fields(Model)} - {"name", "weights", "options"}


def test_options_belong_to_names_that_exist():
    for section in (Data, Model, Loss):
        annotation = typing.get_type_hints(section)["name"]
        parts = (annotation, *typing.get_args(annotation))
        names = {YOUR_OWN, *(name for part in parts for name in typing.get_args(part))}
        for field in dataclasses.fields(section):
            assert set(field.metadata.get("only", ())) <= names, field.name


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_checkpoint_is_chosen_by_any_metric_of_the_table(load, metric):
    assert load(overrides=[f"checkpoint.best={metric}"]).checkpoint.best == metric


def test_every_field_is_documented_under_its_name():
    tree = ast.parse(inspect.getsource(keys))
    documented, bare = [], []
    hints = [hint for cls in (Config, Loss) for hint in typing.get_type_hints(cls).values()]
    sections = [hint for hint in hints if dataclasses.is_dataclass(hint)]
    names = {cls.__name__ for cls in (Config, *sections)}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names):
        for statement, below in zip(cls.body, [*cls.body[1:], None]):
            if isinstance(statement, ast.AnnAssign):
                has_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
                (documented if has_text else bare).append(f"{cls.name}.{statement.target.id}")
    assert bare == []
    assert len(documented) == len(list(fields(Config))) + len(sections)


# --- paths ---------------------------------------------------------------------------------------------------------


PATHS = ["run_dir", "resume", "data.root", "data.cache_dir", "data.images", "data.masks", "model.weights"]


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("STORE", "/store")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("$STORE/a", "/store/a"),
        ("${STORE}2/$STORE", "/store2//store"),
        ("~/camvid", "/somebody/camvid"),
        ("runs/a~b", "runs/a~b"),
        ("./runs//a", "./runs//a"),
        ("cost$$", "cost$"),
        ("$$STORE", "$STORE"),
    ],
)
@pytest.mark.parametrize("key", PATHS)
def test_variables_and_the_home_folder_are_resolved_in_paths(load, file, home, key, typed, path):
    folder = GOOD.replace("name: shapes", "name: folder\n  classes: [a, b]")
    *section, name = key.split(".")
    in_file = yaml.safe_load(folder)
    (in_file[section[0]] if section else in_file)[name] = typed
    for config in (load(folder, [f"{key}={typed}"]), load(yaml.safe_dump(in_file))):
        found = to_dict(config)
        for part in key.split("."):
            found = found[part]
        assert found == path
        save_config(config, file)
        assert load_config(file) == config


def test_other_texts_keep_their_dollars(load, home):
    assert load(overrides=["wandb.project=$STORE"]).wandb.project == "$STORE"


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("${NOWHERE}/a", "but the variable NOWHERE is not set; export NOWHERE=…, or write the path itself"),
        ("$EMPTY/a", "but the variable EMPTY is not set"),
        ("a$(pwd)", "accepted: $NAME or ${NAME} for a variable, $$ for a dollar; correct it"),
        ("~nobody.at.all/a", "but there is no such home folder; write the path itself"),
        ('"a\\0b"', "accepted: a path that is not empty"),
    ],
)
def test_a_path_that_cannot_be_resolved_is_named(problems, home, key, typed, message):
    text = GOOD.replace("name: shapes", "name: folder\n  classes: [a, b]")
    (problem,) = problems(text, overrides=[f"{key}={typed}"])
    assert f": {key}: found the text" in problem
    assert message in problem


def test_an_override_takes_the_place_of_a_variable_that_is_not_set(load, home):
    assert load(GOOD.replace("root: data/shapes", "root: $NOWHERE"), ["data.root=here"]).data.root == "here"


def test_the_paths_of_a_checkpoint_are_not_resolved(load, home):
    values = to_dict(load())
    values["data"]["root"], values["run_dir"] = "$STORE/$(x)", "~/run"
    config = config_from_dict(values, "a.pt", ["resume=$STORE/b.pt"])
    assert (config.data.root, config.run_dir, config.resume) == ("$STORE/$(x)", "~/run", "/store/b.pt")
