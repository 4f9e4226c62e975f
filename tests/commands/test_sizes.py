"""What a file claims costs no memory: only what it holds does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fcn.checkpoints import save_checkpoint
from fcn.models import MODELS, build_model, shapes_of
from tests.dist.ranks import CHECKOUT, environment

CONFIG = {
    "run_dir": "gone",
    "data": {"name": "shapes", "root": "gone", "workers": 0},
    "model": {"name": "unet", "width": 2},
    "train": {"batch_size": 1, "steps": 1, "precision": "fp32"},
}
GREY = [0, 0, 0]
GB = 1 << 30


def state(**changes: Any) -> dict[str, Any]:
    weights = build_model("unet", 3, width=2).state_dict()
    described = {"config": CONFIG, "classes": ["a", "b", "c"], "palette": [GREY] * 3}
    return {"model": weights, "step": 7, **described, **changes}


def width(channels: int) -> dict[str, Any]:
    return CONFIG | {"model": {"name": "unet", "width": channels}}


def head(bias: torch.Tensor) -> dict[str, torch.Tensor]:
    return state()["model"] | {"classifier.bias": bias}


def doubled() -> dict[str, Any]:
    """2^40 keys, once each dict is copied."""
    tree: dict[str, Any] = {"a": 1}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    return tree


def endless() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["a"] = tree
    return tree


def one_value(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


ANOTHER, FOREIGN = "holds another network than model.* describes", "holds something that training does not write"
LACKS = "holds no network with its config and classes"
HOSTILE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a network of terabytes": (lambda: state(config=width(1_000_000)), ANOTHER),
    "a network that nothing can count": (lambda: state(config=width(10**18)), ANOTHER),
    "one value for a large network": (
        lambda: state(config=width(4_000), model=one_value(shapes_of("unet", 3, width=4_000))),
        "is larger than the file",
    ),
    "a million classes": (lambda: state(classes=["a"] * 10**6, palette=[GREY] * 10**6), LACKS),
    "an expanded tensor": (lambda: state(model=head(torch.zeros(1).expand(10**11))), "is larger than the file"),
    "an expanded tensor beside the network": (lambda: state(guard=[torch.zeros(()).expand(10**11)]), "is larger than"),
    "a sparse tensor": (lambda: state(model=head(torch.zeros(3).to_sparse())), FOREIGN),
    "a tensor without data": (lambda: state(model=head(torch.empty(10**11, device="meta"))), FOREIGN),
    "a config that doubles": (lambda: state(config=CONFIG | {"data": doubled()}), FOREIGN),
    "a config that contains itself": (lambda: state(config=CONFIG | {"data": endless()}), FOREIGN),
    "a config with a number as its key": (lambda: state(config=CONFIG | {3: 4}), "3: unknown key"),
    "no config": (lambda: state(config=None), LACKS),
    "classes without colours": (lambda: state(palette=[GREY]), LACKS),
    "a colour that is none": (lambda: state(palette=[GREY, GREY, [0, 0, 256]]), LACKS),
    "weights that are no tensors": (lambda: state(model={"classifier.bias": 3}), LACKS),
    "a compressed file": (lambda: state(extra=torch.zeros(GB // 8)), "its entries are compressed"),
}

CHILD = """
import json, re, sys, torch
from fcn.checkpoints import load_pretrained
from fcn.errors import InputError
from fcn.evaluation import load_trained
from fcn.models import build_model

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

load_trained("good.pt", [], torch.device("cpu"))
for name in sys.argv[1:]:
    calls = {
        "load_trained": lambda: load_trained(name, [], torch.device("cpu")),
        "load_pretrained": lambda: load_pretrained(build_model("unet", 3, width=2), "unet", name, 3),
    }
    for which, call in calls.items():
        before, message = peak(), ""
        try:
            call()
        except InputError as error:
            message = str(error)
        print(json.dumps([name, which, message, peak() - before]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, int]]:
    """(file, function) → (message, KiB that memory grew by), of one process that reads all hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    save_checkpoint(folder / "good.pt", state())
    for name, (make, _) in HOSTILE.items():
        save_checkpoint(folder / f"{name}.pt", make())
    compress(folder / "a compressed file.pt")
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *(f"{name}.pt" for name in HOSTILE)]
    done = subprocess.run(
        command, cwd=folder, env=environment() | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name.removesuffix(".pt"), which): (message, grown) for name, which, message, grown in lines}


def compress(path: Path) -> None:
    original = path.rename(path.with_suffix(".stored"))
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    original.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_in_one_line(answers, name):
    message, grown = answers[name, "load_trained"]
    assert message.startswith(f"{name}.pt: ")
    assert HOSTILE[name][1] in message
    assert "\n" not in message
    assert grown < 200_000, "KiB"


@pytest.mark.parametrize("name", HOSTILE)
def test_weights_from_such_a_file_cost_no_memory_either(answers, name):
    message, grown = answers[name, "load_pretrained"]
    assert "\n" not in message
    assert grown < 200_000, "KiB"


@pytest.mark.parametrize("model", MODELS)
def test_shapes_without_memory_are_those_of_the_network(model):
    expected = {key: tensor.shape for key, tensor in build_model(model, 3).state_dict().items()}
    assert shapes_of(model, 3) == expected


# --- run directories -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    (tmp_path / "heartbeat").mkdir()
    return tmp_path


COMMAND = """
import re, sys
from fcn.commands import cli

status = cli.main(sys.argv[1:])
print("VmHWM", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


def watched(*arguments: object) -> tuple[int, str, int]:
    """(status, what it printed, peak of its memory in KiB) of `python -m fcn`."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    output = subprocess.PIPE
    done = subprocess.run(command, cwd=CHECKOUT, env=environment(), stdout=output, stderr=subprocess.STDOUT, text=True)
    text, _, peak = done.stdout.partition("VmHWM")
    return done.returncode, text, int(peak)


LARGE = ["config.yaml", "summary.json", "metrics.jsonl", "scores_val.json", "heartbeat/rank_0.json"]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("command", ["status", "report", "compare"])
def test_a_file_of_gigabytes_in_a_run_directory_is_not_read(run_dir, command, name):
    with (run_dir / name).open("wb") as file:
        file.truncate(8 * GB)
    status, output, peak = watched(command, run_dir)
    assert peak < 800_000, "KiB"
    assert "Traceback" not in output
    if (name == "metrics.jsonl" and command != "status") or (name == "config.yaml" and command == "compare"):
        assert status == 2
        assert output.startswith(f"error: {run_dir / name}: ")
        assert output.count("\n") == 1


def test_a_config_of_gigabytes_is_refused(run_dir):
    with (run_dir / "config.yaml").open("wb") as file:
        file.truncate(8 * GB)
    status, output, peak = watched("check", "--config", run_dir / "config.yaml")
    assert (status, peak < 800_000) == (2, True)
    assert (
        output
        == f"error: {run_dir / 'config.yaml'}: cannot be read (it has more than 1 MB); give a YAML file in UTF-8\n"
    )
