"""What the pixels of image files become: every mode of Pillow is converted by its range, or refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from image_sets import encoded, read, write_splits
from PIL import Image

from drelu_timm.errors import InputError

RAMP = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (16, 1))  # [16, 16], from 0 to 255


def decoded(tmp_path: Path, content: bytes, suffix: str = "png", size: int = 16, in_chans: int = 1) -> np.ndarray:
    """What an image file becomes: uint8 [C, H, W]."""
    folder = write_splits(tmp_path, {f"a/1.{suffix}": content, f"b/1.{suffix}": content})
    return read(folder, size=size, in_chans=in_chans).images[0].numpy()


@pytest.mark.parametrize(
    ("suffix", "format", "dtype"),
    [
        ("png", "PNG", "<u2"),
        ("tif", "TIFF", "<u2"),
        ("tif", "TIFF", ">u2"),
        ("pgm", "PPM", "<u2"),
        ("jp2", "JPEG2000", "<u2"),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_16_bit_ramp_stays_a_ramp(tmp_path, suffix, format, dtype, in_chans):
    content = encoded(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(dtype)), format)
    np.testing.assert_array_equal(decoded(tmp_path, content, suffix, in_chans=in_chans), [RAMP] * in_chans)


def test_values_between_those_of_8_bits_are_rounded(tmp_path):
    content = encoded(Image.fromarray(np.array([[128, 129, 65406, 65407]] * 4, dtype=np.uint16)))
    assert decoded(tmp_path, content, size=4)[0, 0].tolist() == [0, 1, 254, 255]


def test_a_pgm_is_scaled_by_the_maximum_in_its_header(tmp_path):
    values = " ".join(str(round(1000 * value / 255)) for value in RAMP.ravel().tolist())
    np.testing.assert_array_equal(decoded(tmp_path, f"P2 16 16 1000 {values}".encode(), "pgm")[0], RAMP)


def test_a_tiff_of_12_bits_is_scaled_by_its_own_maximum(tmp_path):
    pairs = RAMP.astype(int).reshape(-1, 2) * 4095 // 255
    data = b"".join(int(first << 12 | second).to_bytes(3, "big") for first, second in pairs)
    # Width, height, bits, no compression, black is zero, then where the pixels are: one strip after the header.
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 16, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
    np.testing.assert_array_equal(decoded(tmp_path, content, "tif")[0], RAMP)


def test_a_tiff_in_which_white_is_0_is_refused(tmp_path):
    """Pillow inverts such images of 8 bits, but not of 16."""
    content = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0})
    with pytest.raises(InputError, match="has pixels of Pillow's mode 'I;16' in a file of format TIFF"):
        decoded(tmp_path, content, "tif")


@pytest.mark.parametrize(
    ("image", "mode"), [(RAMP / np.float32(255), "F"), (RAMP.astype(np.int32), "I"), (RAMP * np.int32(70_000), "I")]
)
def test_pixels_of_unknown_range_are_refused(tmp_path, image, mode):
    content = encoded(Image.fromarray(image), "TIFF")
    with pytest.raises(InputError, match=rf"[ab]/1.tif in .*train has pixels of Pillow's mode '{mode}' in a file of f"):
        decoded(tmp_path, content, "tif")


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("LA", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")],
)
def test_modes_of_8_bits(tmp_path, mode, format, in_chans):
    image = decoded(tmp_path, encoded(Image.fromarray(RAMP).convert("RGB").convert(mode), format), in_chans=in_chans)
    assert np.abs(image - RAMP.astype(int)).max() <= 1  # by rounding, in YCbCr


def test_lab_is_converted(tmp_path):
    content = encoded(Image.new("LAB", (16, 16), (255, 128, 128)), "TIFF")
    for in_chans in (1, 3):
        assert decoded(tmp_path / str(in_chans), content, "tif", in_chans=in_chans).min() >= 253


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.fromarray(RAMP > 100)
    assert image.mode == "1"
    np.testing.assert_array_equal(decoded(tmp_path, encoded(image))[0], 255 * (RAMP > 100))


def test_alpha_is_dropped(tmp_path):
    colour = (10, 20, 30)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 255, 255, *colour])
    for name, content in {
        "rgba": encoded(Image.new("RGBA", (16, 16), (*colour, 0))),
        "palette": encoded(palette, transparency=1),
    }.items():
        assert decoded(tmp_path / name, content, in_chans=3)[:, 0, 0].tolist() == [*colour]


def test_the_first_frame_is_read(tmp_path):
    frames = [Image.new("L", (16, 16), grey) for grey in (40, 80, 120)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.unique(decoded(tmp_path, content, "gif")).tolist() == [40]


def test_exif_orientation_is_applied(tmp_path):
    turned = Image.fromarray(np.rot90(RAMP, 1).copy())  # as a camera on its side stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    np.testing.assert_array_equal(decoded(tmp_path, encoded(turned, exif=exif))[0], RAMP)
