"""Decoding, fitting and encoding: pictures keep their pixels, colours and orientation, or are refused by name."""

import io
import re

import numpy as np
import pytest
from glann.datasets.codec import BadImage, decode_packed, encode, fit
from glann.datasets.decoding import picture
from glann.datasets.decoding.picture import decode_any
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def saved(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(side):
    """A picture of slow gradients, which lossy codecs keep well."""
    axis = np.linspace(0, 255, side)
    falling = np.tile(axis[::-1], (side, 1)).T
    return np.stack([np.add.outer(axis, axis) / 2, np.tile(axis, (side, 1)), falling], -1).astype(np.uint8)


@pytest.mark.parametrize("crop", ["center", "pad", "none"])
def test_an_image_of_the_right_size_keeps_every_pixel(crop):
    img_HWC = noise(32, 32, 3)
    np.testing.assert_array_equal(fit(decode_any(saved(Image.fromarray(img_HWC))).image, 32, 3, crop), img_HWC)


def test_center_cuts_the_middle():
    img_HWC = noise(112, 92, 3)
    np.testing.assert_array_equal(fit(Image.fromarray(img_HWC), 92, 3, "center"), img_HWC[10:102])


def test_pad_never_enlarges():
    img_HW = noise(28, 28)
    padded = fit(Image.fromarray(img_HW), 32, 1, "pad")[:, :, 0]
    np.testing.assert_array_equal(padded[2:30, 2:30], img_HW)
    assert padded.sum() == img_HW.sum(dtype=int)


def test_pad_shrinks_the_long_side():
    padded = fit(Image.fromarray(np.full((100, 50), 200, np.uint8)), 20, 1, "pad")[:, :, 0]
    assert (padded[:, 5:15] == 200).all()
    assert padded.sum() == 200 * 20 * 10


def test_none_refuses_what_is_not_square():
    with pytest.raises(BadImage, match="not square"):
        fit(Image.fromarray(noise(10, 12, 3)), 8, 3, "none")


def test_a_number_cuts_so_many_pixels_from_the_middle():
    """CelebA, 178 x 218, as Lucic et al. take it: rows 29 to 188, columns 9 to 168."""
    img_HWC = noise(218, 178, 3)
    np.testing.assert_array_equal(fit(Image.fromarray(img_HWC), 160, 3, "160"), img_HWC[29:189, 9:169])
    smaller = fit(Image.fromarray(img_HWC), 64, 3, "160")
    np.testing.assert_array_equal(smaller, fit(Image.fromarray(img_HWC[29:189, 9:169]), 64, 3, "center"))
    with pytest.raises(BadImage, match="178 x 218 is smaller than crop=179; use a smaller crop"):
        fit(Image.fromarray(img_HWC), 64, 3, "179")


def test_shrinking_averages_instead_of_picking_pixels():
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    small = fit(Image.fromarray(checkers.astype(np.uint8)), 32, 1, "center")
    assert abs(small.astype(float) - 127.5).max() < 3


def test_grey_becomes_colour_and_colour_becomes_grey():
    grey = fit(Image.fromarray(noise(8, 8)), 8, 3, "center")
    np.testing.assert_array_equal(grey[:, :, 0], grey[:, :, 2])
    assert fit(Image.fromarray(noise(8, 8, 3)), 8, 1, "center").shape == (8, 8, 1)


def test_exif_orientation_is_applied():
    image = Image.fromarray(noise(6, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_any(saved(image, exif=exif)).image
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_transparent_pixels_are_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    out = np.asarray(decode_any(saved(Image.fromarray(rgba))).image)
    assert tuple(out[0, 0]) == (10, 20, 30)
    assert (out[1:] == 255).all()


def test_sixteen_bit_grey_keeps_its_upper_bits():
    wide = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(decode_any(saved(Image.fromarray(wide))).image), wide >> 8)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "LA"])
def test_other_modes_become_plain(mode):
    image = Image.fromarray(noise(8, 8, 3)).convert(mode)
    assert decode_any(saved(image, "TIFF" if mode == "CMYK" else "PNG")).image.mode in ("RGB", "L")


def test_a_bomb_is_refused_before_it_is_decompressed(monkeypatch):
    monkeypatch.setattr(picture, "MAX_PIXELS", 99)
    with pytest.raises(BadImage, match="pixels; the limit is"):
        decode_any(saved(Image.fromarray(noise(10, 10))))


CUT_SHORT = saved(Image.fromarray(noise(64, 64, 3)))[:-500]


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n", CUT_SHORT])
def test_what_is_not_a_complete_image_is_bad(data):
    with pytest.raises(BadImage) as error:
        decode_any(data)
    assert not re.search(r"0x[0-9a-f]+|\n", str(error.value))  # words, not the object that held the bytes


@settings(deadline=None)
@given(data=st.binary())
def test_arbitrary_bytes_are_bad_and_nothing_else(data):
    for attempt in (decode_any, *(lambda d, f=f: decode_packed(d, 8, 3, f) for f in ("jpeg", "png", "webp"))):
        with pytest.raises(BadImage):
            attempt(data)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_exact(channels):
    img_HWC = noise(16, 16, channels)
    out = decode_packed(encode(img_HWC, "png", 95), 16, channels, "png")
    np.testing.assert_array_equal(out, img_HWC.transpose(2, 0, 1))
    assert out.flags.c_contiguous


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossy_formats_stay_close(image_format, channels):
    img_HWC = smooth(64)[:, :, :channels]
    out = decode_packed(encode(img_HWC, image_format, 95), 64, channels, image_format)
    assert out.shape == (channels, 64, 64)
    assert abs(out.astype(int) - img_HWC.transpose(2, 0, 1)).mean() < 2.5


def test_jpeg_keeps_colour_at_full_resolution():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    out = decode_packed(encode(stripes, "jpeg", 95), 32, 3, "jpeg").transpose(1, 2, 0)
    assert abs(out.astype(int) - stripes).mean() < 12  # halved colour would mix red and blue: about 85


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_a_packed_image_of_another_size_or_format_is_bad(image_format):
    data = encode(noise(16, 16, 3), image_format, 95)
    with pytest.raises(BadImage, match="16 x 16, not 32 x 32"):
        decode_packed(data, 32, 3, image_format)
    with pytest.raises(BadImage):
        decode_packed(data, 16, 3, "png" if image_format == "jpeg" else "jpeg")


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_a_truncated_packed_image_is_bad(image_format):
    data = encode(noise(64, 64, 3), image_format, 95)
    with pytest.raises(BadImage):
        decode_packed(data[: len(data) // 2], 64, 3, image_format)
