"""The shape of the house, read from the sources."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = (
    "config", "distributed", "data", "models", "checkpoints", "tracking", "evaluation", "reports", "training",
    "commands",
)  # fmt: skip
"""A module imports only from its own room and from rooms before it."""
HALLWAY = ("errors", "lazy", "files", "seeding", "text", "metrics", "arguments")
"""Modules that every room may import, each only from those before it."""
WHOLE_MODULES = {"tracking.plots"}
"""Modules that a room hands out as they are."""

PLACE_VARIABLES = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|SLURM_\w+|MASTER_\w+|TORCHELASTIC_\w+"
)
FRAMEWORKS = {"lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "mmengine", "mmcv", "mmseg"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "fcn").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "fcn").rglob("*.py"))}
PROGRAM = [ROOT / "train_ddp.py", *MODULES.values()]
EVERY_FILE = [
    *PROGRAM,
    *(path for folder in ("tests", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")),
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(module: str) -> str:
    """The room of a module of fcn; "" for the hallway."""
    return module.split(".")[0] if module.split(".")[0] in ROOMS else ""


def runtime_imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module of fcn, names) of every import from fcn that happens when the program runs, wherever it stands."""
    for_types = {
        id(child)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    return [
        (node.module.removeprefix("fcn").removeprefix("."), [alias.name for alias in node.names])
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fcn" and id(node) not in for_types
    ]


def every_import(path: Path) -> list[tuple[str, str]]:
    """(module or room of fcn, name) of every import from fcn, also of those for type checkers alone."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fcn":
            source = node.module.removeprefix("fcn").removeprefix(".")
            found += [(source, alias.name) if source else (alias.name, "") for alias in node.names]
    return found


def test_every_module_is_in_a_room_or_in_the_hallway():
    assert set(MODULES) - {"", "__main__"} == {
        *HALLWAY, *ROOMS, *(name for name in MODULES if room(name) and "." in name)
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "__main__"}))
def test_a_module_imports_only_from_above(name):
    above = HALLWAY[: HALLWAY.index(name)] if name in HALLWAY else (*HALLWAY, *ROOMS[: ROOMS.index(room(name)) + 1])
    for source, _ in every_import(MODULES[name]):
        assert (source if source in HALLWAY else room(source)) in above, f"{name} imports {source}"


@pytest.mark.parametrize("path", PROGRAM, ids=relative)
def test_a_room_is_entered_by_its_door(path):
    """What a module imports of another room, or looks up in it, the room's `__init__` names."""
    own = room(module_name(path)) if path.is_relative_to(ROOT / "fcn") else ""
    rooms = [source for source, name in every_import(path) if source in ROOMS and not name]
    entered = [
        (node.value.id, node.attr)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms
    ]
    for source, name in [*every_import(path), *entered]:
        if room(source) in ("", own) or not name or path.name == "__main__.py":
            continue
        exported = importlib.import_module(f"fcn.{room(source)}").__all__
        assert source in ROOMS, f"imports fcn.{source}, not the door of its room"
        assert name in exported or f"{source}.{name}" in WHOLE_MODULES, f"fcn.{source} does not export {name}"


@pytest.mark.parametrize("name", ROOMS)
def test_a_door_exports_what_is_there_and_used(name):
    exported = importlib.import_module(f"fcn.{name}").__all__
    for attribute in exported:
        assert getattr(importlib.import_module(f"fcn.{name}"), attribute) is not None
    inside = set((ROOT / "fcn" / name).glob("[!_]*.py")) if name != "commands" else set()
    texts = [path.read_text(encoding="utf-8") for path in EVERY_FILE if path not in inside]
    unused = [attribute for attribute in exported if not any(re.search(rf"\b{attribute}\b", text) for text in texts)]
    assert unused == []


def in_distributed(path: Path) -> bool:
    return path.is_relative_to(ROOT / "fcn" / "distributed")


@pytest.mark.parametrize("path", [path for path in PROGRAM if not in_distributed(path)], ids=relative)
def test_only_distributed_touches_the_process_group(path):
    used = imported(path) | {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert {name for name in used if re.match(r"torch\.(distributed|nn\.parallel)\b", name)} == set()


@pytest.mark.parametrize("path", [path for path in PROGRAM if not in_distributed(path)], ids=relative)
def test_only_distributed_reads_the_place_from_the_environment(path):
    assert {text for text in strings(path) if PLACE_VARIABLES.fullmatch(text)} == set()


def test_distributed_does_both():
    """What the two tests above look for is found where it belongs."""
    inside = [path for path in PROGRAM if in_distributed(path)]
    assert any("torch.distributed" in imported(path) for path in inside)
    assert any(PLACE_VARIABLES.fullmatch(text) for path in inside for text in strings(path))


def strings(path: Path) -> set[str]:
    nodes = ast.walk(tree(path))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute of names; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


@pytest.mark.parametrize("name", ROOMS)
def test_modules_of_a_room_import_each_other_in_no_circle(name):
    graph = {}
    for module, path in MODULES.items():
        if module.startswith(f"{name}."):
            graph[module] = {source for source, _ in runtime_imports(path) if source.startswith(f"{name}.")}
            graph[module] |= {f"{name}.{x}" for s, names in runtime_imports(path) if s == name for x in names}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_no_training_framework_is_imported(path):
    assert {name.split(".")[0] for name in imported(path)} & FRAMEWORKS == set()


@pytest.mark.parametrize("path", PROGRAM, ids=relative)
def test_print_is_what_python_made_it(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "builtins"}
    for node in ast.walk(tree(path)):
        stored = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        assert not (stored or isinstance(node, ast.FunctionDef)) or name != "print"
        assert name != "__builtins__"


def documents_its_fields(node: ast.ClassDef) -> bool:
    """Whether every field of a class of fields has a text under it, which says more than one over all of them."""
    pairs = zip(node.body, [*node.body[1:], ast.Pass()], strict=True)
    fields = [(statement, after) for statement, after in pairs if isinstance(statement, ast.AnnAssign)]
    return bool(fields) and all(isinstance(after, ast.Expr) for _, after in fields)


def is_plain(node: ast.AST) -> bool:
    """A function of one or two statements, whose signature says what it does."""
    return isinstance(node, ast.FunctionDef) and sum(isinstance(part, ast.stmt) for part in ast.walk(node)) - 1 <= 2


def undocumented(module: ast.Module) -> list[str]:
    missing = [] if ast.get_docstring(module) else ["the module"]
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            fields = isinstance(node, ast.ClassDef) and documents_its_fields(node)
            if not (ast.get_docstring(node) or fields or is_plain(node)):
                missing.append(f"{node.name}:{node.lineno}")
    return missing


@pytest.mark.parametrize("path", MODULES.values(), ids=relative)
def test_public_functions_and_classes_have_a_docstring(path):
    assert undocumented(tree(path)) == []


@pytest.mark.parametrize(
    "words",
    [
        "-m fcn --help",
        "-m fcn evaluate --help",
        "-m fcn evaluate",
        "-m fcn nonsense",
        "-m fcn predict --checkpoint a --output b c --set optim.lr=1",
        "-m fcn status nowhere",
        "-m fcn compare nowhere",
        "-m fcn report nowhere",
        "train_ddp.py --help",
        "train_ddp.py --wrong",
        "-c import\\ train_ddp",
    ],
)
def test_what_answers_at_once_imports_no_torch(words):
    """Whatever only looks at arguments or at a run's directory; the loader's workers import train_ddp.py."""
    program = [word.replace("\\ ", " ") for word in re.split(r"(?<!\\) ", words)]
    done = subprocess.run([sys.executable, "-X", "importtime", *program], cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "fcn" in modules
    assert modules & {"torch", "torchvision", "wandb", "matplotlib"} == set()
