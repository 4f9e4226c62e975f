"""Files whose headers claim more than there is, or than fits: one line each, before their memory is taken."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fcn.data import is_image, read_pixels
from fcn.errors import InputError

READ = """
import resource, sys
from pathlib import Path
from fcn.data import decode, open_image, read_pixels, size_of
from fcn.data.inspection import hidden_damage
from fcn.errors import InputError

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

limit, *paths = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
for path in map(Path, paths):
    for way in (lambda path: size_of(open_image(path)), hidden_damage, decode, read_pixels):
        before = used()
        try:
            said = f"read {way(path)!r:.40}"
        except InputError as error:
            said = str(error)
        print(used() - before, said.replace(chr(10), "<newline>"))
"""
"""Reads files in every way and prints for each by how many MB the most memory rose, and what came of it."""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side: int, depth: int = 8, colour: int = 2, before: bytes = b"", after: bytes = b"") -> bytes:
    """Its pixels are those of 8x8."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\1" * 24) * 8))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    compress = zlib.compressobj(1)
    return b"".join(compress.compress(bytes(1 << 20)) for _ in range(count >> 20)) + compress.flush()


def tiff(side: int, content: bytes, claimed: int | None = None, tile: int | None = None, compression: int = 8) -> bytes:
    """One strip or one tile of grey."""
    claimed = len(content) if claimed is None else claimed
    tags = {256: side, 257: side, 258: 8, 259: compression, 262: 1, 277: 1}
    places = (322, 323, 324, 325) if tile else (278, 273, 279)
    offset = 14 + 12 * (len(tags) + len(places))
    tags |= dict(zip(places, (tile, tile, offset, claimed) if tile else (side, offset, claimed), strict=True))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def patched(kind: str, mark: bytes, offset: int, content: bytes) -> bytes:
    """A small image of this type, with other bytes at a place relative to the first `mark`."""
    file = io.BytesIO()
    Image.new("L" if kind == "gif" else "RGB", (16, 16)).save(file, kind)
    whole = file.getvalue()
    place = whole.index(mark) + offset
    return whole[:place] + content + whole[place + len(content) :]


TEXT = zeros(1 << 28)
PIXELS, BYTES = "has more pixels than 178,956,970; cut it into tiles", "found 42,949,672,960 bytes; accepted: up to 1,4"
LONG = "cannot be read (Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK)"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "pixels.png": (lambda: png(100_000), PIXELS),
    "most_pixels.png": (lambda: png(2**31 - 1), PIXELS),
    "deep.png": (lambda: png(100_000, 16, 0), PIXELS),
    "text.png": (lambda: png(8, before=chunk(b"zTXt", b"Comment\0\0" + TEXT)), LONG),
    "profile.png": (lambda: png(8, before=chunk(b"iCCP", b"name\0\0" + TEXT)), LONG),
    "xmp.png": (lambda: png(8, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TEXT)), LONG),
    "pixels.jpg": (lambda: patched("jpeg", b"\xff\xc0", 5, struct.pack(">HH", 65500, 65500)), PIXELS),
    "pixels.tif": (lambda: tiff(100_000, b"few"), PIXELS),
    "tile.tif": (lambda: tiff(100, zeros(20_000**2), tile=20_000), "has tiles of more pixels than 178,956,970"),
    "pixels.gif": (lambda: patched("gif", b"GIF8", 6, struct.pack("<HH", 65535, 65535)), PIXELS),
    "frame.gif": (lambda: patched("gif", b",\0\0\0\0", 5, struct.pack("<HH", 65535, 65535)), PIXELS),
    "pixels.webp": (lambda: patched("webp", b"VP8 ", 14, struct.pack("<HH", 16383, 16383)), PIXELS),
    "pixels.bmp": (lambda: patched("bmp", b"BM", 18, struct.pack("<ii", 100_000, 100_000)), PIXELS),
    "digits.ppm": (lambda: b"P6 " + b"9" * 5000 + b" 1 255\n", "cannot be read (b'Token too long"),
    "40GB.jpg": (lambda: patched("jpeg", b"\xff\xd8", 0, b"\xff\xd8"), BYTES),
    "40GB.png": (lambda: png(8), BYTES),
    "40GB.tif": (lambda: tiff(100, b"few", 2**32 - 1), BYTES),
}
BROKEN: dict[str, Callable[[], bytes]] = {
    "few.png": lambda: png(13_000),
    "few_deep.png": lambda: png(13_000, 16, 0),
    "late_text.png": lambda: png(8, after=chunk(b"zTXt", b"Raw profile type exif\0\0" + TEXT)),
    "strip.tif": lambda: tiff(100, zlib.compress(b"few"), 2**32 - 1),
    "strip_as_it_is.tif": lambda: tiff(100, b"few", 2**32 - 1, compression=1),
    "few.ppm": lambda: b"P6 13000 13000 255\nfew",
}
"""Their headers are believed."""


Results = list[tuple[int, str]]
"""(MB taken, what came of it) of each way to read a file."""


def read(paths: list[Path], limit: int = -1) -> list[Results]:
    """Read files in another process, with this many bytes of memory."""
    done = subprocess.run([sys.executable, "-c", READ, str(limit), *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    found = [(int(taken), said) for taken, said in lines]
    return [found[start : start + 4] for start in range(0, len(found), 4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Path, Results]]:
    folder, paths = tmp_path_factory.mktemp("hostile"), []
    for name, make in {**{name: make for name, (make, _) in HOSTILE.items()}, **BROKEN}.items():
        paths.append(folder / name)
        paths[-1].write_bytes(make())
        if name.startswith("40GB"):
            with paths[-1].open("r+b") as file:
                file.truncate(40 << 30)  # a hole, which takes no room
    return {path.name: (path, found) for path, found in zip(paths, read(paths), strict=True)}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_claims_too_much_is_refused_by_every_reader_before_its_memory_is_taken(results, name):
    path, found = results[name]
    assert [said.startswith(f"{path}: {HOSTILE[name][1]}") for _, said in found] == [True] * 4, found
    assert max(taken for taken, _ in found) < 100


@pytest.mark.parametrize("name", BROKEN)
def test_what_has_less_than_it_claims_is_broken(results, name):
    path, ((_, size), _, *decoded) = results[name]
    assert size.startswith("read (")
    for taken, said in decoded:
        assert said.startswith(f"{path}: broken image (")
        assert taken < 100


def test_an_image_that_does_not_fit_into_memory_is_named(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (13_000, 13_000)).save(path, compress_level=1)
    ((size, _, mask, image),) = read([path])
    assert size[1].startswith("read (13000, 13000)"), "its header is believed"
    assert (mask[1][:9], image[1][:10]) == ("read <PIL", "read array"), "there is room"
    ((_, _, *refused),) = read([path], 1 << 29)
    assert {said for _, said in refused} == {
        f"{path}: does not fit into memory; cut it into tiles, or lower data.workers"
    }


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_an_image_file_is_no_program(tmp_path: Path, name: str) -> None:
    """Pillow would start Ghostscript for PostScript, whatever the file is called."""
    path = tmp_path / name
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(InputError, match=rf"^{path}: cannot be read \(not an image\)"):
        read_pixels(path)
    assert is_image(name) == (name == "a.png")
