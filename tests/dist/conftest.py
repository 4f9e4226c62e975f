from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.dist.ranks import CHECKOUT


@pytest.fixture
def tiny(shapes_root: Path, tmp_path: Path):
    """`tiny(section__key=value)` writes the config of a run of seconds, in float64, and returns its path."""

    def write(**changes) -> str:
        config = yaml.safe_load((CHECKOUT / "configs" / "quickstart.yaml").read_text())
        config["run_dir"] = str(tmp_path / "run")
        config["data"] |= {"root": str(shapes_root), "crop": [48, 48], "workers": 0}
        config["model"]["width"] = 2
        config["train"] |= {"batch_size": 12, "steps": 10, "precision": "fp64", "log_every": 1}
        config["optim"] |= {"name": "sgd", "lr": 0.02, "warmup": 2}
        config["eval"] |= {"every": 5, "batch_size": 4, "pictures": 0}
        config["checkpoint"]["every"] = 4
        config["wandb"]["mode"] = "disabled"
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write
