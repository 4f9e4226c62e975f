"""Processes: who we are, and everything that crosses between us.

The only room that imports `torch.distributed` or reads RANK and its like; it must never know what is trained.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    collectives="all_gather all_gather_object all_reduce_sum all_reduce_sum_async barrier broadcast broadcast_object "
    "raise_on_all_ranks require_equal run_on_all_ranks",
    ddp="data_parallel no_sync",
    diagnosis="Diagnosis",
    environment="read_place report_failure wait_for_the_message",
    heartbeat="Heartbeat HeartbeatRecord file_heartbeat read_heartbeats",
    process_group="DistributedContext alone bound_waiting is_active is_communication_failure start stop",
    shards="Shards TreeSum aligned block_of subtrees tree_sum",
    signals="SIGNALS StopFlag end_with_creator end_with_launcher leave_at_once",
    stragglers="ComputeTimer StragglerDetector slowest",
)
