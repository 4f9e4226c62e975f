import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fcn.checkpoints import checkpoint_path, find_newest, list_checkpoints, load_checkpoint
from fcn.checkpoints.folder import prune, verify
from fcn.checkpoints.format import save_checkpoint
from fcn.errors import InputError

ROOT = Path(__file__).parents[2]


def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.arange(6, dtype=torch.float64).reshape(2, 3) + step}}


def save_steps(folder: Path, *steps: int) -> list[Path]:
    paths = [checkpoint_path(folder, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        save_checkpoint(path, state(step))
    return paths


def beat(path: Path) -> Path:
    """Put the right checksum beside a file that save_checkpoint did not write."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def empty_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_bytes(b"")


def garble_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\xfe\x00")


DAMAGE = [truncate, alter_one_bit, empty, lose_checksum, empty_checksum, garble_checksum]


# --- writing and reading back


def test_round_trip_keeps_every_bit_and_type(tmp_path):
    tensors = {
        "f64": torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64),
        "bf16": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "i64": torch.tensor([[2**62, -1]]),
        "scalar": torch.tensor(3.5),
    }
    rest = {"step": 7, "best": None, "nested": {"list": [1, 0.1, "text", True], "tuple": (0.9, 0.999)}}
    save_checkpoint(tmp_path / "step_00000007.pt", {**rest, "model": tensors})
    loaded = load_checkpoint(tmp_path / "step_00000007.pt")
    assert {key: loaded[key] for key in rest} == rest
    for key, tensor in tensors.items():
        assert loaded["model"][key].dtype == tensor.dtype
        assert torch.equal(loaded["model"][key], tensor)


def test_the_checksum_file_is_what_sha256sum_writes(tmp_path):
    (path,) = save_steps(tmp_path, 500)
    assert path.name == "step_00000500.pt"
    expected = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  step_00000500.pt\n"
    assert (tmp_path / "step_00000500.pt.sha256").read_text() == expected


def test_nothing_else_is_left_in_the_folder(tmp_path):
    save_steps(tmp_path / "new" / "checkpoints", 1, 1, 2)
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoints").iterdir()) == [
        "step_00000001.pt",
        "step_00000001.pt.sha256",
        "step_00000002.pt",
        "step_00000002.pt.sha256",
    ]


def test_saving_again_replaces_the_old_state(tmp_path):
    save_checkpoint(tmp_path / "best.pt", state(1))
    save_checkpoint(tmp_path / "best.pt", state(2))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2


def test_a_run_directory_stands_for_its_newest_checkpoint(tmp_path):
    save_steps(tmp_path / "checkpoints", 10, 30, 20)
    assert load_checkpoint(tmp_path)["step"] == 30
    assert load_checkpoint(str(tmp_path))["step"] == 30


def test_a_run_directory_skips_a_broken_checkpoint(tmp_path):
    truncate(save_steps(tmp_path / "checkpoints", 10, 20)[1])
    assert load_checkpoint(tmp_path)["step"] == 10


# --- broken files


def test_a_whole_file_verifies(tmp_path):
    (path,) = save_steps(tmp_path, 1)
    assert verify(path) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_is_not_loaded_and_is_named(tmp_path, damage):
    (path,) = save_steps(tmp_path, 1)
    damage(path)
    assert verify(path)
    with pytest.raises(InputError, match=str(path)):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_is_named_once_and_the_one_before_it_is_used(tmp_path, damage):
    older, newest = save_steps(tmp_path, 1, 2)
    damage(newest)
    broken: list[Path] = []
    assert find_newest(tmp_path, lambda path, problem: broken.append(path)) == older
    assert broken == [newest]


def test_no_checkpoint_verifies(tmp_path):
    paths = save_steps(tmp_path / "checkpoints", 1, 2)
    for path in paths:
        truncate(path)
    broken: list[Path] = []
    assert find_newest(tmp_path / "checkpoints", lambda path, problem: broken.append(path)) is None
    assert broken == paths[::-1]
    with pytest.raises(InputError, match=str(tmp_path)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["nothing.pt", "no/folder/step_00000001.pt"])
def test_a_missing_file_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / name)


def test_a_missing_folder_has_no_checkpoints(tmp_path):
    assert find_newest(tmp_path / "nothing") is None


# --- order and retention


def test_order_is_that_of_the_steps_and_not_of_the_names(tmp_path):
    save_steps(tmp_path, 100_000_000, 7, 99_999_999)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000007.pt",
        "step_99999999.pt",
        "step_100000000.pt",
    ]
    assert find_newest(tmp_path) == tmp_path / "step_100000000.pt"


@pytest.mark.parametrize("name", ["best.pt", "step_12.pt", "step_00000009.pt.sha256", ".step_00000009.pt.tmp", "x.txt"])
def test_other_files_are_no_checkpoints(tmp_path, name):
    (only,) = save_steps(tmp_path, 1)
    (tmp_path / name).write_bytes(b"")
    assert list_checkpoints(tmp_path) == [only]


@pytest.mark.parametrize("keep", [2, 3, 9])
def test_prune_keeps_the_newest_with_their_checksums_and_best(tmp_path, keep):
    steps = (99_999_998, 99_999_999, 100_000_000, 100_000_001)
    save_steps(tmp_path, *steps)
    save_checkpoint(tmp_path / "best.pt", state(1))
    prune(tmp_path, keep)
    kept = {f"step_{step}.pt" for step in steps[-keep:]} | {"best.pt"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {f"{name}.sha256" for name in kept}


# --- files that somebody else made


class Trap:
    """Unpickling it makes a folder, as it could run anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def plain_pickle(data: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(data, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_file_that_runs_code_is_refused_before_it_runs(tmp_path, write):
    path, proof = tmp_path / "step_00000001.pt", tmp_path / "it_ran"
    write({"format": 1, "step": 1, "model": {"w": Trap(proof)}}, path)
    beat(path)
    with pytest.raises(InputError, match=str(path)):
        load_checkpoint(path)
    assert not proof.exists()
    with path.open("rb") as file:  # the trap is a real one
        torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert proof.exists()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: torch.save(torch.zeros(3), path), id="tensor"),
        pytest.param(lambda path: torch.save([1, 2], path), id="list"),
        pytest.param(lambda path: torch.save({"model": {"w": torch.zeros(3)}}, path), id="weights of another program"),
        pytest.param(lambda path: torch.save({"format": 999, "model": {}}, path), id="later format"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"hello, world\n"), id="text"),
        pytest.param(lambda path: path.write_bytes(bytes(range(256)) * 8), id="bytes"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04" + bytes(64)), id="zip header"),
        pytest.param(lambda path: plain_pickle({"format": 1}, path), id="pickle"),
    ],
)
def test_a_file_of_another_format_is_an_input_error(tmp_path, write):
    path = tmp_path / "step_00000001.pt"
    write(path)
    with pytest.raises(InputError, match=str(path)):
        load_checkpoint(beat(path))


# --- crashes

# One import of torch serves all children. The audit hook sees each file operation just before it is done, so that the
# first kind of child dies between any two of them; the second kind is killed at any time from its third save on.
KILLED_BY_SIGKILL = """
import os, signal, sys, time
from pathlib import Path
import torch
from fcn.checkpoints.folder import checkpoint_path, list_checkpoints, prune
from fcn.checkpoints.format import save_checkpoint

torch.set_num_threads(1)  # a pool of threads does not survive a fork

def save(path, step):
    save_checkpoint(path, {"step": step, "model": {"w": torch.full((1 << 17,), step)}})

def is_killed(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

def killed_at_operation(moment, folder, name):
    save(folder / "step_00000001.pt", 1)
    save(folder / "best.pt", 1)
    child = os.fork()
    if child == 0:
        seen = 0
        def die(event, args):
            nonlocal seen
            if args and str(folder) in str(args[0]):
                seen += 1
                if seen > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        save(folder / name, 2)
        os._exit(0)
    return is_killed(child)

def kill_later(seconds, folder):
    child = os.fork()
    if child == 0:
        for step in range(1, 1000):
            save(checkpoint_path(folder, step), step)
            prune(folder, keep=2)
        os._exit(0)
    while len(list_checkpoints(folder)) < 2:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert is_killed(child)

root = Path(sys.argv[1])
for name in ("step_00000002.pt", "best.pt"):
    moment = 0
    while killed_at_operation(moment, root / "operation" / f"{name}-{moment}", name):
        moment += 1
for number in range(12):
    kill_later(0.003 * number, root / "time" / str(number))
"""


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory) -> dict[str, list[Path]]:
    """Folders in which a save was killed, by the kind of moment."""
    root = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-c", KILLED_BY_SIGKILL, root]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    folders = {kind: sorted((root / kind).iterdir()) for kind in ("operation", "time")}
    assert len(folders["operation"]) > 2 * 4  # at least: open and rename, of the file and of its checksum
    assert len(folders["time"]) == 12
    return folders


def assert_whole(path: Path, steps: tuple[int, ...]) -> None:
    """By other means than `verify`: the bytes have their checksum and hold one step's state."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    content = torch.load(path, weights_only=True)
    assert content["step"] in steps
    assert (content["model"]["w"] == content["step"]).all()


def test_killed_between_any_two_file_operations_every_named_checkpoint_is_whole(after_kills):
    found = set()
    for folder in after_kills["operation"]:
        newest = find_newest(folder)
        assert newest is not None
        for path in list_checkpoints(folder):
            assert_whole(path, (1, 2))
        found.add(newest.name)
    assert found == {"step_00000001.pt", "step_00000002.pt"}


def test_killed_while_best_is_replaced_the_old_or_the_new_one_is_there(after_kills):
    broken = {}
    for folder in after_kills["operation"]:
        if problem := verify(folder / "best.pt"):
            broken[folder.name] = problem
    assert broken == {}


def test_killed_at_any_time_every_named_checkpoint_is_whole(after_kills):
    for folder in after_kills["time"]:
        present = list_checkpoints(folder)
        assert len(present) >= 2  # two were finished before the kill, and no pruning goes below
        for path in present:
            assert_whole(path, (int(path.stem.removeprefix("step_")),))
        assert find_newest(folder) == present[-1]
