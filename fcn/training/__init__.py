"""Training: the loop, the step and its state, losses, optimizers, throughput.

It may use every room but `commands`; it must never parse arguments or read another run's files.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    banner="end_banner show_start",
    lock="lock_run_dir record_failure_if_idle",
    loop="fit",
    losses="build_loss",
    memory="GB HEADROOM MB Memory Trial states",
    run="Run build_run images_of_processes",
    setup="describe_cache is_finished open_console open_splits open_trackers release_cache require_equal_data "
    "require_equal_programs require_room_for_batches start_or_resume",
    state="TrainingState",
    step="accumulation train_step",
)
