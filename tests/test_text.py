"""Numbers and tables as text."""

import pytest

from fcn.text import duration, plural, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"), (9.4, "0:09"), (59.4, "0:59"), (59.5, "1:00"), (750, "12:30"), (3599.6, "1:00:00"),
        (11107, "3:05:07"), (360000, "100:00:00"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plural():
    assert [plural(n, "image") for n in (0, 1, 2)] == ["no images", "1 image", "2 images"]
    assert plural(3, "process", "processes") == "3 processes"


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["", "left", "x"], [], ["long name", "1", "22"]]
    assert table(rows) == "           left  x\n\nlong name  1     22"
    assert table(rows, right=True) == "           left   x\n\nlong name     1  22"


def test_what_is_too_wide_continues_below():
    rows = [["class", "train", "val", "test"], ["sky", "1" * 30, "2" * 30, "3" * 30]]
    assert table(rows, right=True, width=80).split("\n\n") == [
        f"class{'train':>32}{'val':>32}\nsky    {'1' * 30}  {'2' * 30}",
        f"class{'test':>32}\nsky    {'3' * 30}",
    ]


def test_an_empty_table_is_empty():
    assert table([]) == ""
