"""Command-line arguments that several entry points share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from fcn.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError for a usage error, so that rank 0 alone prints it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As usual, but overrides may stand anywhere, before and after options."""
        found, rest = self.parse_known_args(args, namespace)
        overrides = [word for word in rest if "=" in word and not word.startswith("-")]
        unknown = [word for word in rest if word not in overrides or not hasattr(found, "overrides")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if overrides:
            found.overrides = [*found.overrides, *overrides]
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")

    def add_config(self) -> None:
        self.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/quickstart.yaml")

    def add_overrides(self) -> None:
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="override a config key, such as optim.lr=0.01 or data.crop=[256,256]",
        )

    def add_checkpoint(self) -> None:
        text = "a .pt file, or a run directory for its newest checkpoint"
        self.add_argument("--checkpoint", required=True, metavar="FILE|RUN_DIR", help=text)
        text = "let the checkpoint run code of your own that its config names, such as mynet:build; may be repeated"
        self.add_argument("--trust-code", action="append", default=[], metavar="MODULE:NAME", help=text)

    def add_run_dir(self) -> None:
        self.add_argument("run_dir", metavar="RUN_DIR", help="directory that training wrote")
