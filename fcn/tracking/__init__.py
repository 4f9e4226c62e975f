"""What a run records and shows: metrics.jsonl, console, plots, Weights & Biases.

Nothing here may stop a run or wait for another rank; only rank 0 records.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    console="Console nothing_to_score score_line score_table",
    environment="environment_of versions",
    metrics_file="MetricsFile record_failure",
    records="TIME_FORMAT Record event is_sound read_foreign read_records read_summary resumed_steps rewind_metrics "
    "scores_name",
    tracker="Sample Scores Tracker Trackers",
    wandb_process="WandbStart credentials wandb_is_installed",
    wandb_tracker="WandbTracker",
)
