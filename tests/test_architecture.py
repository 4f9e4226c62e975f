"""The shape of the house, read from the sources."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    "errors", "schema", "config", "stragglers", "distributed", "heartbeat", "cli", "preempt", "seeding", "user_code",
    "data", "data.labels", "data.images", "data.masks", "data.layouts", "data.datasets", "data.cache",
    "data.transforms", "data.samplers", "data.loaders", "data.inspection",
    "models.layers", "models.custom", "models.fcn_resnet", "models.fcn_vgg", "models.linknet", "models.unet", "models",
    "losses", "metrics", "optim", "guard", "accounting", "pulse", "tracking", "checkpoint", "pretrained", "pictures",
    "wandb_process", "weights_and_biases", "run", "screens", "inference", "evaluation", "status", "report", "engine",
    "check", "predictions", "export", "compare", "data.shapes", "__main__",
)  # fmt: skip
"""A module imports only from modules before it. `data.shapes` writes a data set and is a command like `__main__`."""

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


def imported_modules(path: Path) -> set[str]:
    """The modules of fcn that a file imports, by their names in ORDER."""
    names = {name.removeprefix("fcn.") for name in imported(path) if name.startswith("fcn.")}
    return names & set(MODULES)


def test_every_module_has_a_place_in_the_order():
    assert set(ORDER) == set(MODULES) - {""}  # "" is fcn/__init__.py


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_above(module):
    above = set(ORDER[: ORDER.index(module)])
    assert imported_modules(MODULES[module]) - above - {""} == set()


def test_the_package_itself_imports_nothing():
    assert imported(MODULES[""]) == set()


def test_nothing_imports_the_entry_points():
    entries = {"train_ddp", "fcn.__main__"}
    assert {relative(path): imported(path) & entries for path in PROGRAM if imported(path) & entries} == {}


def dotted(node: ast.AST) -> str:
    """`torch.distributed.barrier` of an attribute chain; empty if it does not start at a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


@pytest.mark.parametrize("path", PROGRAM, ids=relative)
def test_only_distributed_touches_the_process_group(path):
    used = imported(path) | {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    found = {name for name in used if re.match(r"torch\.(distributed|nn\.parallel)\b", name)}
    assert bool(found) == (path == MODULES["distributed"])


@pytest.mark.parametrize("path", PROGRAM, ids=relative)
def test_only_distributed_reads_the_place_from_the_environment(path):
    texts = {
        node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    found = {text for text in texts if PLACE_VARIABLES.fullmatch(text)}
    assert bool(found) == (path == MODULES["distributed"])


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
