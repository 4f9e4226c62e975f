"""The documents are true: links, paths, commands, config keys, tables and examples."""

import dataclasses
import re
import shlex
import signal
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_ddp
from fcn.commands import cli, runner
from fcn.config import PRETRAINED, Config, Data, load_config
from fcn.config.keys import Loss, Model, options_of
from fcn.config.load import MAY_CHANGE
from fcn.data import LAYOUTS, build_dataset, classes_and_format
from fcn.metrics import CLASS_METRICS, METRICS, scores
from fcn.models import MODELS, Examined, build_model, convert_dropout, convert_sync_batchnorm, examine
from fcn.training.losses import LOSSES
from tests.cli import train

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", "CONTRIBUTING.md", "configs/README.md", "launch/README.md", "benchmarks/README.md"]
DOCUMENTS = [*GUIDES, "benchmarks/RESULTS.md"]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
PROSE = {name: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for name, text in TEXT.items()}


def blocks(name: str, language: str) -> list[str]:
    """The fenced code blocks of a document in one language; "" for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[name], re.M | re.S)


def section(name: str, title: str) -> str:
    """A document from a heading to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*)", TEXT[name], re.M | re.S)
    assert found, f"{name} has no heading {title!r}"
    return re.split(rf"^#{{1,{len(found[1])}}} ", found[2], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, without their heads."""
    lines = text.splitlines()
    rules = {number for number, line in enumerate(lines) if re.fullmatch(r"\|(-+\|)+", line)}
    kept = (line for number, line in enumerate(lines) if line.startswith("|") and not rules & {number, number + 1})
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def test_the_readme_is_read_in_one_sitting():
    assert len(TEXT["README.md"].splitlines()) <= 180


# --- links and paths -----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", PROSE[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_backticks_exist(name):
    folders, files = r"fcn|tests|configs|launch|benchmarks|\.ci", r"train_ddp\.py|requirements\.txt"
    tops = rf"(?:{folders})/[\w./-]*|[\w-]+\.(?:sh|sbatch|toml)|{files}"
    paths = [path for path in quoted(PROSE[name]) if re.fullmatch(tops, path)]
    assert [path for path in paths if not any((ROOT / folder / path).exists() for folder in ("", "launch"))] == []


@pytest.mark.parametrize("name", GUIDES)
def test_names_are_in_the_files_that_are_said_to_hold_them(name):
    for what, path in re.findall(r"`([\w.]+)`\s+(?:[\w ]+\s)?(?:in|of)\s+`(fcn/[\w/]+\.py)`", PROSE[name]):
        assert re.search(rf"\b{what.split('.')[-1]}\b", (ROOT / path).read_text(encoding="utf-8")), f"{what} in {path}"


def test_pictures_are_small():
    pictures = list((ROOT / "benchmarks" / "pictures").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 400_000
    assert {path.name for path in pictures} <= set(re.findall(r"pictures/([\w.]+)", TEXT["README.md"]))


# --- commands ------------------------------------------------------------------------------------------------------

SET, STARTS = r"[A-Z]\w*=\S+ ", "python|torchrun|bash|sbatch|srun|watch"
"""A variable before a command, and the words that commands begin with."""


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every command that is shown, in a block or, if it has arguments, in backticks."""
    found = []
    for name in GUIDES:
        lines = [line for block in blocks(name, "") for line in block.splitlines()]
        mentioned = r"python train_ddp\.py|python -m fcn( (" + "|".join(cli.COMMANDS) + "))?"
        lines += [text for text in quoted(PROSE[name]) if not re.fullmatch(mentioned, text)]
        found += [(name, line.replace("…", "")) for line in lines if re.match(rf"({SET})*({STARTS})\s", line)]
    return found


@pytest.mark.parametrize(("name", "line"), commands())
def test_commands_parse(name, line):
    words = shlex.split(line, comments=True)
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    if "train_ddp.py" in words:
        args = train_ddp.parser().parse_args(words[words.index("train_ddp.py") + 1 :])
        check_overrides(args.config, args.overrides)
    elif (script := next((word for word in words if re.search(r"\.(sh|sbatch)$", word)), None)) is not None:
        assert (ROOT / script).is_file()
        rest = words[words.index(script) + 1 :]
        if script == "launch/quickstart.sh":
            check_overrides("configs/quickstart.yaml", rest)
        elif script.startswith("launch/") and rest:
            array = any(word.startswith("--array=") for word in words)
            check_overrides(rest[0], [word.replace("%a", "0") if array else word for word in rest[1:]])
    else:
        module, *rest = words[words.index("-m") + 1 :]
        if module == "fcn":
            args = cli.parser().parse_args(rest)
            if overrides := getattr(args, "overrides", None):
                check_overrides(getattr(args, "config", "configs/linknet_camvid.yaml"), overrides)
        else:
            sources = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "benchmarks" / "common.py"]
            source = "".join(path.read_text(encoding="utf-8") for path in sources)
            assert [word for word in rest if word.startswith("--") and f'"{word}"' not in source] == []


def check_overrides(config: str, overrides: list[str]) -> None:
    """Load a config with the overrides of a command; mine.yaml stands for a user's own."""
    load_config(ROOT / ("configs/linknet_folder.yaml" if config == "mine.yaml" else config), overrides)


def test_the_readme_gives_the_test_command_of_continuous_integration():
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command.endswith("bash tests/run.sh")
    assert "bash tests/run.sh\n" in blocks("README.md", "")


# --- config --------------------------------------------------------------------------------------------------------


def config_keys(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every key of the config by its dotted name."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        nested = dataclasses.is_dataclass(hint)
        found |= config_keys(hint, f"{prefix}{field.name}.") if nested else {prefix + field.name: field}
    return found


def choices(hint: object) -> set[str]:
    """The words that an annotation lists."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return set().union(*map(choices, typing.get_args(hint)))


KEYS = config_keys()
KEY_ROWS = {quoted(key)[0]: (default, meaning) for key, default, meaning in rows(section("configs/README.md", "Keys"))}


def test_the_reference_has_every_key_and_no_other():
    assert list(KEY_ROWS) == list(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_the_reference_gives_the_default_of_a_key(key):
    default = KEY_ROWS.get(key, ("absent", ""))[0]
    if KEYS[key].default is dataclasses.MISSING:
        assert default == "required"
    else:
        expected = KEYS[key].default
        assert yaml.safe_load(default.strip("`")) == (list(expected) if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("key", KEYS)
def test_the_reference_names_every_choice_of_a_key(key):
    owner = Config
    for part in key.split(".")[:-1]:
        owner = typing.get_type_hints(owner)[part]
    meaning = KEY_ROWS.get(key, ("", ""))[1]
    assert choices(typing.get_type_hints(owner)[KEYS[key].name]) - set(quoted(meaning)) == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_keys_that_a_document_mentions_exist(name):
    sections = [field.name for field in dataclasses.fields(Config) if f"{field.name}." in " ".join(KEYS)]
    wanted = re.compile(rf"({'|'.join(sections)})((?:\.\w+)+)\s*(?:[=:].*)?")
    for text in quoted(TEXT[name]):
        if (found := wanted.fullmatch(text)) and not text.endswith((".txt", ".py")):
            assert found[1] + found[2] in KEYS, text


def test_the_reference_lists_what_a_resumed_run_may_change():
    listed = quoted(section("configs/README.md", "What a resumed run may change").split("\nSo may")[0])
    assert sorted(listed) == sorted(MAY_CHANGE)


def own_names(cell: str, known: typing.Iterable[str]) -> set[str]:
    return set(quoted(cell)) & set(known)


def test_the_reference_gives_options_and_weights_of_every_network():
    found = {}
    for names, _, options, weights in rows(section("configs/README.md", "Models"))[:6]:
        found |= {name: (set(quoted(options)), own_names(weights, PRETRAINED)) for name in quoted(names)}
    expected = {
        name: (set(options_of(Model, name)), {key for key, models in PRETRAINED.items() if name in models})
        for name in MODELS
    }
    assert found == expected


def test_the_reference_gives_the_options_of_every_loss():
    found = {
        quoted(name)[0]: set(quoted(options)) for name, _, _, options in rows(section("configs/README.md", "Losses"))
    }
    assert found == {name: set(options_of(Loss, name)) for name in LOSSES}


def test_the_reference_gives_the_classes_of_every_data_set():
    table = section("configs/README.md", "Data sets").split("\n### ")[0]
    found = {quoted(name)[0]: number for name, _, number, _ in rows(table)}
    own = Data(name="folder", root="", classes=("a", "b"))
    known = {name: own if name == "folder" else Data(name=name, root="") for name in LAYOUTS}
    assert found == {
        name: "yours" if name == "folder" else str(len(classes_and_format(data)[0])) for name, data in known.items()
    }


@pytest.mark.parametrize("name", ["README.md", "configs/README.md"])
def test_yaml_examples_are_configs(name, tmp_path):
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert blocks(name, "yaml")
    for number, block in enumerate(blocks(name, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(quickstart | yaml.safe_load(block)))
        load_config(path)


def test_the_masks_of_black_and_white_in_the_readme(tmp_path):
    """255 is a class there, and neither ignored nor an error, in masks of 8 bits, 1 bit and three equal channels."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    grey = Image.fromarray(np.array([[0, 255, 255], [255, 0, 0]], np.uint8))
    for stem, mask in (("a", grey), ("b", grey.convert("1")), ("c", grey.convert("RGB"))):
        Image.new("RGB", grey.size).save(tmp_path / "images" / f"{stem}.jpg")
        mask.save(tmp_path / "masks" / f"{stem}.png")
    config = yaml.safe_load((ROOT / "configs" / "linknet_folder.yaml").read_text(encoding="utf-8"))
    config["data"] |= yaml.safe_load(blocks("README.md", "yaml")[0])["data"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    data = load_config(tmp_path / "mine.yaml", [f"data.root={tmp_path}"]).data
    splits = [build_dataset(data, split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [2, 1]
    for split in splits:
        for index in range(len(split)):
            assert np.asarray(split.read(index)[1]).tolist() == [[0, 1, 1], [1, 0, 0]]
    assert splits[0].classes.names == ("background", "pond")


# --- what a run leaves, statuses, variables, benchmarks -------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(shapes_root, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("documents") / "run"
    keys = [
        f"data.root={shapes_root}", f"run_dir={folder}", "data.workers=0", "data.crop=[32,32]", "model.width=2",
        "train.batch_size=4", "train.steps=4", "train.log_every=1", "eval.pictures=1", "wandb.mode=disabled",
        "checkpoint.every=2", "optim.warmup=0",
    ]  # fmt: skip
    assert train(["--config", str(ROOT / "configs" / "quickstart.yaml"), *keys]) == 0
    return folder


EVENT_ROWS = rows(section("launch/README.md", "What a run leaves"))
EVENTS = {name: set(quoted(fields)) for names, _, fields in EVENT_ROWS for name in quoted(names)}


def test_the_records_of_a_run_hold_what_the_table_says(run_dir):
    records = [yaml.safe_load(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {record["event"] for record in records} == {"start", "train", "eval", "finish"}
    for record in records:
        own = record.keys() - {"event", "step", "time"}
        optional = {"slowest", "of_peak", "train.log_every"} if record["event"] == "train" else set()
        own -= {"steps", "epoch"} if record["event"] == "train" else set()
        assert own == EVENTS[record["event"]] - optional


def test_the_start_screen_of_the_readme_has_the_lines_of_a_start(run_dir):
    start = yaml.safe_load((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    screen = next(block for block in blocks("README.md", "") if block.startswith("model "))
    assert [line.split()[0] for line in screen.splitlines()] == list(start["facts"])


def test_every_event_has_its_row():
    pattern = r'event\("(\w+)"(?: if [^"]*"\w+" else "(\w+)")?|"event": "(\w+)"'
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fcn").rglob("*.py")]
    assert set(EVENTS) == {
        name for source in sources for found in re.findall(pattern, source) for name in found if name
    }


def test_every_metric_is_named_and_no_other():
    assert METRICS.keys() | {key for key, metric in CLASS_METRICS.items() if not metric.detail} <= EVENTS["eval"]
    titles = {metric.title for metric in METRICS.values()}
    assert {title for text in TEXT.values() for title in re.findall(r"\bm(?:IoU|Dice|[A-Z][a-z]+)\b", text)} <= titles


def test_the_list_of_files_has_every_file_of_a_run(run_dir):
    listed = blocks("launch/README.md", "")[-1]
    for path in run_dir.iterdir():
        assert re.search(rf"^{re.escape(path.name)}\b", listed, re.M), path.name
    for path in [*(run_dir / "checkpoints").iterdir(), *(run_dir / "pictures").glob("*.png")]:
        name = re.sub(r"0\d{7}", "00000500", path.name).removesuffix(".sha256").replace("val_", "SPLIT_")
        assert name in listed, path.name


def test_exit_statuses():
    table = {int(status) for status, _ in rows(section("launch/README.md", "Exit statuses"))}
    ours = {0, runner.LOST_RANK, runner.BAD_INPUT, train_ddp.NOT_SAVED, train_ddp.PREEMPTED}
    assert table == ours | {128 + signal.SIGTERM}


def test_environment_variables():
    listed = {
        name for names, *_ in rows(section("launch/README.md", "Environment variables")) for name in quoted(names)
    }
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "launch").iterdir() if path.is_file()}
    read = {
        name
        for text in scripts.values()
        for name in re.findall(r"\$\{([A-Z]\w+):[-?]", text)
        if not name.startswith("SLURM")
    }
    assert read - listed == set()
    sources = [*scripts.values(), *(path.read_text(encoding="utf-8") for path in (ROOT / "fcn").rglob("*.py"))]
    assert [name for name in listed if not any(name in source for source in sources)] == []


def test_every_benchmark_has_its_line():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert {
        name for name in programs if not re.search(rf"benchmarks[./]{name}\b", TEXT["benchmarks/README.md"])
    } == set()


# --- CONTRIBUTING --------------------------------------------------------------------------------------------------


def test_the_map_has_every_module_and_no_other():
    plan = next(block for block in blocks("CONTRIBUTING.md", "") if block.startswith("train_ddp.py"))
    body = plan.partition("fcn/\n")[2].partition("configs/ ")[0]
    found: dict[str, set[str]] = {"": set(re.findall(r"^  (\w+)\.py ", body, re.M))}
    for room, text in re.findall(r"^  (\w+)/ (.*?)(?=^  \w+/|\Z)", body, re.M | re.S):
        names = ",".join(part.partition(":")[0] for part in text.split("·"))
        found[room] = {name.strip() for name in names.split(",")}
    expected: dict[str, set[str]] = {}
    for path in (ROOT / "fcn").rglob("*.py"):
        if not path.stem.startswith("__"):
            expected.setdefault(path.parent.name if path.parent.name != "fcn" else "", set()).add(path.stem)
    assert found == expected


def example(file: str) -> types.SimpleNamespace:
    """Run the example that CONTRIBUTING.md gives for a file, and return its names."""
    code = next(block for block in blocks("CONTRIBUTING.md", "python") if block.startswith(f"# {file}\n"))
    names: dict[str, object] = {"__name__": "example"}
    exec(code, names)
    return types.SimpleNamespace(**names)


def test_the_network_of_the_example(monkeypatch):
    monkeypatch.setitem(MODELS, "ladder", None)  # the example puts its own there; undone at the end
    example("fcn/models/ladder.py")
    network = build_model("ladder", 5, width=8)
    for size in ((1, 1), (17, 21)):
        assert network.eval()(torch.zeros(2, 3, *size)).shape == (2, 5, *size)
    keys, network = convert_dropout(network), convert_sync_batchnorm(network)
    assert examine(network, keys, 5, (17, 21), torch.autocast("cpu", enabled=False), sync_bn=True) == Examined([], [])


def test_the_data_set_of_the_example(monkeypatch, tmp_path):
    monkeypatch.setitem(LAYOUTS, "ponds", None)
    example("fcn/data/layouts.py")
    (tmp_path / "train").mkdir()
    labels = [[0, 1, 255], [1, 1, 0]]
    for stem in ("b", "a"):
        Image.new("RGB", (3, 2)).save(tmp_path / "train" / f"{stem}.jpg")
        Image.fromarray(np.array(labels, np.uint8)).save(tmp_path / "train" / f"{stem}_mask.png")
    dataset = build_dataset(Data(name="ponds", root=str(tmp_path)), "train")
    assert [dataset.name(index) for index in range(len(dataset))] == ["a", "b"]
    assert dataset.classes.names == ("land", "water")
    assert np.asarray(dataset.read(0)[1]).tolist() == labels


def test_the_loss_of_the_example():
    loss = example("fcn/training/losses.py").brier
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 6, generator=generator)
    labels = torch.randint(0, 3, (4, 5, 6), generator=generator)
    labels[1:3, :2] = 255
    by_hand = sum(
        ((logits[n, :, y, x].softmax(0) - torch.eye(3)[labels[n, y, x]]) ** 2).sum()
        for n, y, x in (labels != 255).nonzero().tolist()
    )
    torch.testing.assert_close(loss(logits, labels), by_hand)
    torch.testing.assert_close(loss(logits, labels), loss(logits[:1], labels[:1]) + loss(logits[1:], labels[1:]))
    assert loss(logits, torch.full_like(labels, 255)) == 0


def test_the_metric_of_the_example(monkeypatch):
    monkeypatch.setitem(METRICS, "worst_iou", None)
    example("fcn/metrics.py")
    assert scores([[3, 1, 0], [0, 4, 0], [0, 0, 0]], ["a", "b", "absent"])["worst_iou"] == 3 / 4
    assert scores([[0, 0], [0, 0]], ["a", "b"])["worst_iou"] is None
