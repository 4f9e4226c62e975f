"""Data sets that several test modules read."""

from pathlib import Path

import pytest

from fcn.data.shapes import write_shapes

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `shapes` data set: 24 training and 10 validation images. Read only: copy it before breaking it."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert write_shapes(root, train=24, val=10)
    return root


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """The real CamVid, its images as JPEG: 367 + 101 + 233 images."""
    return _present(SHARED_DATA / "camvid")


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """A few real images of PASCAL VOC 2012 with their masks."""
    return _present(SHARED_DATA / "voc-mini" / "VOCdevkit" / "VOC2012")


def _present(root: Path) -> Path:
    if not root.is_dir():
        pytest.skip(f"needs the data set in {root}")
    return root
