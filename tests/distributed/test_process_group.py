import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fcn import distributed
from fcn.distributed import DistributedContext
from fcn.distributed.environment import read_place, slurm_rendezvous
from fcn.errors import InputError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        pytest.param({}, (0, 1, 0, "python"), id="python"),
        pytest.param(TORCHRUN, (5, 8, 1, "torchrun"), id="torchrun"),
        pytest.param(SRUN, (3, 4, 1, "slurm"), id="srun"),
        pytest.param(SRUN | TORCHRUN, (5, 8, 1, "torchrun"), id="torchrun under srun"),
        pytest.param({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0, "python"), id="python in an sbatch script"),
        pytest.param({"RANK": "5"}, (0, 1, 0, "python"), id="a stray RANK"),
    ],
)
def test_the_place_comes_from_the_launcher(environ, place):
    assert read_place(environ) == place


@pytest.mark.parametrize(
    ("nodes", "hosts", "address"),
    [
        ("2", "gpu[07-09,12],big3", "gpu07"),
        ("2", "n1,n2", "n1"),
        ("2", "n1,gpu[2-3]", "n1"),
        ("2", "node-a[3,7]", "node-a3"),
        ("4", "rack[1-2]node[03-04]", "rack1node03"),
        ("2", "n[1-2].cluster.example", "n1.cluster.example"),
        ("1", "gpu07", "127.0.0.1"),
    ],
)
def test_slurm_tasks_meet_on_the_first_host_of_the_step(nodes, hosts, address):
    environ = {"SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NODELIST": hosts, "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    assert slurm_rendezvous(environ)[0] == address


def test_the_site_can_set_another_address_and_port():
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert slurm_rendezvous(environ) == ("10.0.0.7", "1234")


def test_neighbouring_jobs_and_their_steps_meet_on_different_ports():
    ports = [
        int(slurm_rendezvous({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[1])
        for job in range(123_456, 123_476)
        for step in range(10)
    ]
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port <= 65535 for port in ports)


def test_every_task_of_a_step_computes_the_same_rendezvous():
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3"}
    found = {slurm_rendezvous(step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 2)}) for rank in range(4)}
    assert len(found) == 1


# --- one process: no group, and nothing happens


def test_one_process_starts_without_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert distributed.start() == DistributedContext(rank=0, size=1, local_rank=0, device=device, launcher="python")
    assert not distributed.is_active()
    assert not torch.distributed.is_initialized()
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize(
    "sum_over_ranks",
    [
        distributed.all_reduce_sum,
        lambda tensor: distributed.all_reduce_sum_async(tensor)(),
    ],
    ids=["all_reduce_sum", "all_reduce_sum_later"],
)
def test_a_sum_over_one_process_is_the_tensor_itself(sum_over_ranks):
    tensor = torch.tensor([1.5, -2.0])
    assert sum_over_ranks(tensor) is tensor
    assert tensor.tolist() == [1.5, -2.0]


def test_stacking_one_process_adds_a_dimension():
    assert distributed.all_gather(torch.tensor([1.5, -2.0])).tolist() == [[1.5, -2.0]]


def test_gathering_from_one_process_gives_a_list_of_one():
    value = object()
    assert distributed.all_gather_object(value) == [value]


def test_together_returns_what_the_action_returns():
    assert distributed.run_on_all_ranks(lambda: 7) == 7
    assert distributed.run_on_all_ranks(lambda: None) is None


def test_together_raises_the_fault_with_its_message_alone():
    def fail() -> None:
        raise InputError("a.png: truncated\nb.png: truncated")

    with pytest.raises(InputError) as caught:
        distributed.run_on_all_ranks(fail)
    assert str(caught.value) == "a.png: truncated\nb.png: truncated"


def test_together_lets_a_bug_keep_its_own_exception():
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distributed.run_on_all_ranks(fail)


def test_no_fault_raises_nothing():
    distributed.raise_on_all_ranks(None)


def test_the_model_of_one_process_is_not_wrapped():
    model = nn.Linear(2, 2)
    context = DistributedContext(0, 1, 0, torch.device("cpu"), "python")
    assert distributed.data_parallel(model, context, sync_bn=True) is model
    assert isinstance(distributed.no_sync(model), contextlib.nullcontext)


def test_the_report_of_torchrun_shows_the_reported_failure(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert distributed.report_failure("config.yaml: optim.lr: found -1")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert "config.yaml: optim.lr: found -1" in str(ChildFailedError("train_ddp.py", {0: failure}))


def test_the_report_of_torchrun_has_the_message_of_all_ranks_once_and_last(tmp_path, monkeypatch):
    failures = {}
    for rank in (2, 1, 0):
        file = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        for name, value in (("RANK", 4 + rank), ("WORLD_SIZE", 8), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        assert distributed.report_failure("optim.lr: found -1\noptim.\x1b: unknown key", of_all=True)
        failures[4 + rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(file))
    report = str(ChildFailedError("train_ddp.py", failures))
    cause = report.partition("Root Cause")[2]
    assert "  traceback : optim.lr: found -1\n  optim.\\x1b: unknown key\n" in cause
    assert report.count("optim.lr: found -1") == 1


@pytest.mark.parametrize(
    ("before", "count", "most", "enough"),
    [
        (None, 0, 0, True),
        (None, 0, 3, False),
        ("message", 1, 3, True),
        ("another message", 1, 3, False),
        (None, 1, 3, False),
        ("another message", 3, 3, True),
    ],
)
def test_what_the_report_of_torchrun_will_not_show_is_said(tmp_path, monkeypatch, before, count, most, enough):
    """It shows the last attempt; the same message need not be said at each."""
    for attempt in range(count + 1):
        (tmp_path / f"attempt_{attempt}" / "1").mkdir(parents=True)
    for attempt, message in ((count - 1, before), (count, "message")):
        if message:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / "1" / "error.json"))
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
            monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))
            found = distributed.report_failure(message)
    assert found is enough
    assert (tmp_path / f"attempt_{count}" / "1" / "error.json").exists()


def test_a_report_that_cannot_be_written_is_not_relied_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert not distributed.report_failure("message")


def test_without_torchrun_no_failure_file_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not distributed.report_failure("message")
    assert list(tmp_path.iterdir()) == []
