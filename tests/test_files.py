"""Files that are replaced whole or not at all."""

import os

import pytest

from fcn.errors import InputError
from fcn.files import must_be_writable, replacing, write_atomically


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, monkeypatch, sync):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or real(file))
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path, sync=sync) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]
    assert len(synced) == sync


def test_text_is_written_as_utf_8(tmp_path):
    write_atomically(tmp_path / "a", "ä second\n")
    assert (tmp_path / "a").read_bytes() == "ä second\n".encode()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    write_atomically(tmp_path / "a", "old")

    def fail() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_must_be_writable_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught, must_be_writable(f"run_dir: {tmp_path}/file"):
        (tmp_path / "file" / "below").mkdir()
    assert str(caught.value) == (
        f"run_dir: {tmp_path}/file: cannot be written (Not a directory); free space there, or choose a folder that you "
        f"may write to"
    )
