"""Numbers and tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 3:05:07, 12:30, 0:09."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def plural(number: int, what: str, many: str | None = None) -> str:
    """`1 image`, `3 images`, `no images`; `many` is the plural where it does not just end in s."""
    return f"{number or 'no'} {what if number == 1 else many or what + 's'}"


def printable(text: str) -> str:
    """Text that may come from a file, for a terminal: characters that control one are spelled out, as in `\\x1b`."""
    return "".join(
        x if x.isprintable() or x == "\n" else x.encode("unicode_escape", "surrogatepass").decode() for x in text
    )


def table(rows: Sequence[Sequence[str]], right: bool = False, width: int | None = None) -> str:
    """Cells in columns, two spaces apart.

    Args:
        rows: cells of each row. An empty row is an empty line.
        right: align all columns but the first to the right.
        width: characters of a line. Columns that do not fit continue below, next to the first column again.
    """
    columns = range(max(map(len, rows), default=0))
    widths = [max(len(row[column]) for row in rows if row) for column in columns]
    parts = [[0]] if columns else []
    for column in columns[1:]:
        used = sum(widths[place] + 2 for place in parts[-1])
        if width is not None and len(parts[-1]) > 1 and used + widths[column] > width:
            parts.append([0])
        parts[-1].append(column)

    def cell(row: Sequence[str], column: int) -> str:
        return row[column].rjust(widths[column]) if right and column else row[column].ljust(widths[column])

    return "\n\n".join(
        "\n".join("  ".join(cell(row, column) for column in part).rstrip() if row else "" for row in rows)
        for part in parts
    )
