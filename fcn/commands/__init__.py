"""One module for each `python -m fcn` command, and what happens around every entry point.

Nothing below may import from here, and nothing here may compute what another room could.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    check_report="check_config",
    runner="run run_on_ranks",
)
