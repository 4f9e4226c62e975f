"""Reports: what a run's directory says about the run, on a page or in a terminal.

They read files alone, change nothing else, and must never import PyTorch.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    compare="compare_runs",
    html="write_report",
    status="run_status",
)
