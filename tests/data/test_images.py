"""Every kind of image file arrives as the RGB pixels that a viewer shows."""

import numpy as np
import pytest
from PIL import Image

from fcn.data import decode, is_image, open_image, read_pixels, size_of, voc_palette
from fcn.data.images import _decode_jpeg, orientation
from fcn.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = PIXELS[..., 0]


def read(path) -> np.ndarray:
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    return pixels


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".ppm", ".webp"])
def test_lossless_types_keep_every_pixel(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    assert is_image(path.name)
    assert np.array_equal(read(path), PIXELS)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif", ".jpg"])
def test_grey_becomes_three_equal_channels(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.full((5, 7), 90, np.uint8)).save(path)
    assert np.array_equal(read(path), np.full((5, 7, 3), 90))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colours", [*({"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")), {"keep_rgb": True}])
@pytest.mark.parametrize("quality", [30, 75, 98])
def test_a_jpeg_has_pillows_bits(tmp_path, quality, colours, progressive):
    pytest.importorskip("simplejpeg")
    path, rng = tmp_path / "image.jpg", np.random.default_rng(quality)
    for height, width in ((1, 1), (2, 3), (17, 16), (33, 70), (129, 95)):
        smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), 3))
        pixels = (smooth + rng.integers(0, 30, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=quality, progressive=progressive, restart_marker_blocks=3, **colours)
        with Image.open(path) as opened:
            assert _decode_jpeg(opened) is not None, "by the short way"
        assert np.array_equal(read(path), np.asarray(Image.open(path)))


def test_photographs_have_pillows_bits(voc_root, camvid_root):
    photographs = sorted((voc_root / "JPEGImages").glob("*.jpg")) + sorted(camvid_root.rglob("*.jpg"))[::20]
    assert len(photographs) > 150
    for path in photographs:
        assert np.array_equal(read_pixels(path), np.asarray(Image.open(path).convert("RGB"))), path


def test_a_jpeg_with_a_flaw_is_what_pillow_makes_of_it(tmp_path):
    """A byte of the compressed data is another: some decoders notice, and some of that Pillow reads all the same."""
    pytest.importorskip("simplejpeg")
    path = tmp_path / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    whole, seen = bytearray(path.read_bytes()), set()
    for place in range(len(whole) // 3, len(whole) - 2, len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with Image.open(path) as opened:
            seen.add(_decode_jpeg(opened) is None)
        try:
            expected = np.asarray(Image.open(path))
        except OSError:
            with pytest.raises(InputError, match="broken image"):
                read(path)
        else:
            assert np.array_equal(read(path), expected)
    assert seen == {False, True}, "noticed, and not"


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint16), (".tif", np.uint16), (".tif", np.int32)])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, dtype):
    path = tmp_path / f"image{suffix}"
    deep = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype)
    Image.fromarray(deep).save(path)
    assert read(path)[..., 1].tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / f"image.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}"
    stored = Image.fromarray(PIXELS).quantize(16) if mode == "P" else Image.fromarray(PIXELS).convert(mode)
    stored.save(path)
    assert read(path).shape == (5, 7, 3)
    if mode == "P":
        assert np.array_equal(read(path), np.asarray(stored.convert("RGB")))


def test_alpha_is_dropped(tmp_path):
    image = Image.fromarray(PIXELS)
    image.putalpha(Image.fromarray(GREY))
    image.save(tmp_path / "image.png")
    assert np.array_equal(read(tmp_path / "image.png"), PIXELS)


def orient(number) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


TURNS = {
    1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("number", TURNS)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_orientation_turns_the_image_or_leaves_it_as_it_is_stored(tmp_path, number, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS).save(path, exif=orient(number), **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(read(path), TURNS[number](PIXELS))
    assert np.array_equal(read_pixels(path, exif=False), PIXELS)


@pytest.mark.parametrize("number", TURNS)
def test_exif_orientation_of_a_jpeg(tmp_path, number):
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).save(path, exif=orient(number))
    stored = np.asarray(Image.open(path))
    assert np.array_equal(read(path), TURNS[number](stored))
    assert np.array_equal(read_pixels(path, exif=False), stored)


@pytest.mark.parametrize("number", TURNS)
@pytest.mark.parametrize("kind", ["P", "L", "1", "I;16", "tiff", "late"])
def test_masks_are_turned_alike_and_their_headers_tell_their_size(tmp_path, number, kind):
    path, labels = tmp_path / ("mask.tif" if kind == "tiff" else "mask.png"), GREY // 128
    mask = Image.fromarray(labels.astype(np.uint16) if kind == "I;16" else labels)
    if kind == "P":
        mask = mask.convert("P")
        mask.putpalette(np.array(voc_palette(256)).ravel().tolist())
    mask = mask.point(lambda x: 255 * x).convert("1") if kind == "1" else mask
    mask.save(path, exif=orient(number))
    if kind == "late":  # behind the pixels, where some programs write it
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    for exif, expected in ((True, TURNS[number](labels)), (False, labels)):
        found = decode(path, exif)
        assert (found.mode, found.format) == (mask.mode, "TIFF" if kind == "tiff" else "PNG")
        assert np.array_equal(found, expected)
        assert found.getpalette() == mask.getpalette()
        with open_image(path) as opened:
            assert size_of(opened, exif) == found.size


def test_a_png_without_late_metadata_is_not_decoded_for_its_orientation(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "image.png", exif=orient(8))
    content = (tmp_path / "image.png").read_bytes()
    (tmp_path / "image.png").write_bytes(content[: content.index(b"IDAT")] + b"IDAT no pixels")
    with open_image(tmp_path / "image.png") as image:
        assert orientation(image) == 8
        assert image.tile, "not loaded"


def test_damaged_exif_stops_nobody(tmp_path, recwarn):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0131] = 6, "camera", "editor"
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", exif=exif)
    whole = (tmp_path / "image.jpg").read_bytes()
    place = whole.index(b"Exif") + 6
    rng = np.random.default_rng(0)
    shapes = set()
    for number in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[place + rng.integers(8, 60)] = rng.integers(256)
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(damaged)
        shapes.add(read(path).shape)
    assert shapes == {(5, 7, 3), (7, 5, 3)}, "turned where the orientation is still there, else as stored"
    assert not recwarn.list


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "image.gif") == 10).all()


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((2, 2), 0.5, np.float32), "found an image in mode F (floating-point pixels have no fixed range)"),
        (np.array([[0, 70000]], np.int32), "found pixel values from 0 to 70000; accepted: 8 or 16 bits"),
        (np.array([[-3, 7]], np.int32), "found pixel values from -3 to 7; accepted: 8 or 16 bits"),
    ],
)
def test_pixels_without_a_range_are_refused(tmp_path, pixels, words):
    path = tmp_path / "image.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError) as caught:
        read_pixels(path)
    assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".gif", ".bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.6])
def test_a_cut_file_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError) as caught:
        read_pixels(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_counts_as_an_image():
    names = ["a.JPG", "a.b.tiff", "._a.jpg", ".png", "a.txt", "a", "a.npy"]
    assert [name for name in names if is_image(name)] == ["a.JPG", "a.b.tiff"]
