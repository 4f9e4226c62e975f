"""`pip install .`: what is in the package, and that it works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, so that nothing is left in this one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("fcn", "tests", "benchmarks", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "train_ddp.py"):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(output), str(source)]
    subprocess.run(command, check=True)
    (found,) = output.glob("*.whl")
    return found


def test_the_wheel_has_the_package_with_its_template_and_nothing_else(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    package = {name for name in names if ".dist-info" not in name.parts[0]}
    there = {path.relative_to(ROOT) for path in (ROOT / "fcn").rglob("*") if path.suffix in (".py", ".j2")}
    assert package == there
    assert Path("fcn/reports/report.html.j2") in there


def test_the_wheel_needs_what_requirements_txt_pins(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    needed = {
        line.removeprefix("Requires-Dist: ").replace(" ", "") for line in lines if line.startswith("Requires-Dist")
    }
    pinned = {line.replace(" ", "") for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert needed == pinned


def test_it_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], check=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    start = {"event": "start", "step": 0, "time": "2026-01-01 00:00:00", "steps": 9, "facts": {"on": "1 x <CPU>"}}
    (run / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    for program in ([sys.executable, "-m", "fcn"], [sys.executable, str(installed / "bin" / "fcn")]):
        done = subprocess.run(
            [*program, "report", str(run)], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{run / 'report.html'}\n"
        page = (run / "report.html").read_text()
        assert "1 x &lt;CPU&gt;" in page
        (run / "report.html").unlink()
    refused = subprocess.run([*program, "nonsense"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: python -m fcn: argument command: invalid choice: 'nonsense'")
    assert refused.stderr.count("\n") == 1
