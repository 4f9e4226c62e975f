"""`data.values`: what the pixels of a mask mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fcn.config.yaml_schema import show


class PixelClasses(NamedTuple):
    """`data.values`, parsed."""

    numbers: dict[int, int]
    """Pixel value from 0 to 65535 → class, or 255 for ignore."""
    colours: dict[tuple[int, int, int], int]
    """(red, green, blue) → class, or 255 for ignore."""
    rest: int | None
    """Class of all other pixels, or None if they are an error."""


def pixel_classes(names: Sequence[str], values: Mapping[str, Any]) -> PixelClasses:
    """Parse `data.values` for classes of these names.

    Raises:
        ValueError: names the entry, what was found, and what is accepted.
    """
    read = PixelClasses({}, {}, None)
    for name, entry in values.items():
        if name not in names and name != "ignore":
            raise ValueError(f"{name}: is no class; accepted: {', '.join(names)}, ignore")
        label = names.index(name) if name in names else 255
        for value in entry if isinstance(entry, list) else [entry]:
            if value == "rest" and read.rest is None:
                read = read._replace(rest=label)
                continue
            colour = re.fullmatch("#([0-9a-fA-F]{6})", value) if isinstance(value, str) else None
            known = read.colours if colour else read.numbers
            pixel: Any = tuple(bytes.fromhex(colour[1])) if colour else value
            if not colour and (type(value) is not int or not 0 <= value <= 65535):
                raise ValueError(
                    f"{name}: found {show(value)}; accepted: a number from 0 to 65535, a colour in quotes such as "
                    f'"#ff00ff", a list of those, or rest (once)'
                )
            if pixel in known:
                raise ValueError(f"{name}: found {value}, which another entry has; keep one")
            known[pixel] = label
    absent = [name for name in names if name not in values]
    if absent:
        raise ValueError(f"found nothing for {', '.join(absent)}; accepted: an entry for every class of data.classes")
    return read
