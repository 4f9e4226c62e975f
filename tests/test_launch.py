"""The shell scripts, as far as they can be judged without a cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for folder in ("launch", "tests", ".ci")
    for path in (ROOT / folder).glob("*")
    if path.suffix in (".sh", ".sbatch") or folder == ".ci"
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck (apt install shellcheck)")
    done = subprocess.run(["shellcheck", "--external-sources", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
