"""Pictures of users: each is read as it is meant, in every format, or refused by name; never black, grey or cut."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from glann.datasets.codec import BadImage
from glann.datasets.decoding import jpeg, picture
from glann.datasets.decoding.depth import UnknownRange
from glann.datasets.decoding.picture import decode_any, is_picture
from PIL import Image, ImageCms, ImageFilter, PngImagePlugin


def saved(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def gradient(side=64):
    y, x = np.mgrid[0:side, 0:side]
    return Image.fromarray(np.stack([x * 3 % 256, y * 3 % 256, (x + y) % 256], -1).astype(np.uint8))


def pixels(data, **options):
    return np.asarray(decode_any(data, **options).image)


# formats -----------------------------------------------------------------------------------------

LOSSLESS = {"PNG": {}, "BMP": {}, "PPM": {}, "TIFF": {"compression": "tiff_lzw"}, "JPEG2000": {}}
LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}, "AVIF": {"quality": 95}}


@pytest.mark.parametrize("image_format", [*LOSSLESS, *LOSSY])
def test_every_format_keeps_its_pixels(image_format):
    image = gradient().filter(ImageFilter.GaussianBlur(3))
    out = pixels(saved(image, image_format, **(LOSSLESS | LOSSY)[image_format]))
    assert abs(out.astype(int) - np.asarray(image)).mean() <= (0 if image_format in LOSSLESS else 4)


@pytest.mark.parametrize("image_format", [*LOSSLESS, *LOSSY, "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_cut_short_is_refused_in_every_format(image_format, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = saved(noise, image_format, **(LOSSLESS | LOSSY).get(image_format, {}))
    with pytest.raises(BadImage):
        decode_any(data[: int(len(data) * share)])


def test_the_suffixes_are_those_of_readable_formats():
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".tif", ".pgm", ".jp2"} <= set(picture.SUFFIXES)
    assert not {".heic", ".eps", ".tga", ".qoi", ".pdf"} & set(picture.SUFFIXES)
    assert is_picture(saved(gradient()))
    assert not is_picture(bytes(64))


# 16 bits -----------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


def chunk(kind, body):
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png16(value):
    """A 16-bit PNG of 1 to 4 channels."""
    height, width, bands = value.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in value)
    header = struct.pack(">2L5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(value, maxval=65535):
    bands = value.shape[2] if value.ndim == 3 else 1
    head = b"%s\n%d %d\n%d\n" % (b"P6" if bands == 3 else b"P5", value.shape[1], value.shape[0], maxval)
    return head + value.astype(">u2").tobytes()


def files_of(value):
    """The same grey values in each kind of 16-bit file that does not state their range."""
    image = Image.fromarray(value)
    text = b"P2\n%d %d\n65535\n" % value.shape[::-1] + b" ".join(b"%d" % v for v in value.ravel()) + b"\n"
    packed = {f"TIFF {how}": saved(image, "TIFF", compression=how) for how in ("raw", "tiff_lzw")}
    big_endian = saved(Image.frombytes("I;16B", value.shape[::-1], value.astype(">u2").tobytes()), "TIFF")
    return {"PNG": saved(image), "PGM": pgm(value), "PGM text": text, "big-endian": big_endian} | packed


@pytest.mark.parametrize("kind", files_of(RAMP))
def test_sixteen_bits_are_read_alike_from_every_file(kind):
    np.testing.assert_array_equal(pixels(files_of(RAMP)[kind]), RAMP >> 8)


@pytest.mark.parametrize("kind", files_of(RAMP >> 4))
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_twelve_bits_in_sixteen_never_become_black(kind, bits):
    """The range is asked for, and then used."""
    value = RAMP >> 16 - bits
    data = files_of(value)[kind]
    with pytest.raises(UnknownRange, match=f"{bits} bits.*--levels {2**bits - 1}, or --levels 65535"):
        decode_any(data)
    np.testing.assert_array_equal(pixels(data, levels=2**bits - 1), value >> bits - 8)
    np.testing.assert_array_equal(pixels(data, levels=65535), value >> 8)


@pytest.mark.parametrize("bands", [3, 4])
def test_the_same_for_colours(bands):
    value = np.random.default_rng(0).integers(0, 4096, (6, 7, bands)).astype(np.uint16)
    value[:, :, 3:] = 4095  # opaque
    data = png16(value)
    with pytest.raises(UnknownRange, match="12 bits"):
        decode_any(data)
    np.testing.assert_array_equal(pixels(data, levels=4095), value[:, :, :3] >> 4)
    np.testing.assert_array_equal(pixels(png16(value << 4 | 15)), value[:, :, :3] >> 4)
    np.testing.assert_array_equal(pixels(pgm(value[:, :, :3], 4095)), value[:, :, :3] >> 4)


def test_dark_grey_with_transparency_is_refused_rather_than_black():
    with pytest.raises(BadImage, match="convert it to 8 bits"):
        decode_any(png16(np.full((4, 4, 2), 4095, np.uint16)))


def test_a_file_that_states_its_range_needs_no_option():
    value = RAMP >> 4
    np.testing.assert_array_equal(pixels(pgm(value, 4095)), value >> 4)
    tiff = saved(Image.fromarray(value), "TIFF", tiffinfo={281: 4095})  # MaxSampleValue
    np.testing.assert_array_equal(pixels(tiff), value >> 4)


def test_white_is_zero_where_a_tiff_says_so():
    data = bytearray(saved(Image.fromarray(RAMP), "TIFF"))
    at = data.index(struct.pack("<HHLH", 262, 3, 1, 1))
    data[at + 8] = 0
    np.testing.assert_array_equal(pixels(bytes(data)), 255 - (RAMP >> 8))


def test_black_is_black_in_every_range():
    assert not pixels(saved(Image.fromarray(np.zeros((4, 4), np.uint16)))).any()


def test_a_value_above_the_range_is_named():
    with pytest.raises(BadImage, match=r"a value of 65535 is more than --levels \(4095\)"):
        decode_any(saved(Image.fromarray(RAMP)), levels=4095)


# colour ------------------------------------------------------------------------------------------


def fixed(number):
    return struct.pack(">i", round(number * 65536))


def profile(tags, space):
    """An ICC profile of version 2 with these tags beside description and white point."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"cprt": b"text\0\0\0\0free\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1) + fixed(0.8249),
    } | tags
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    header[8:24] = b"\x02\x40\0\0mntr" + space + b"XYZ "
    header[36:40] = b"acsp"
    header[68:80] = fixed(0.9642) + fixed(1) + fixed(0.8249)
    return bytes(header) + table + body


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)


PRIMARIES = {b"r": (0.6097, 0.3111, 0.0195), b"g": (0.2053, 0.6257, 0.0609), b"b": (0.1492, 0.0632, 0.7446)}
WIDE = profile(
    {n + b"XYZ": b"XYZ \0\0\0\0" + b"".join(map(fixed, p)) for n, p in PRIMARIES.items()}
    | {n + b"TRC": curve(2.2) for n in PRIMARIES},
    b"RGB ",
)
STRANGE = WIDE.replace(b"acsp", b"xxxx"), WIDE.replace(b"RGB ", b"RG\0 ")  # the second was found by fuzzing
LINEAR_GREY = profile({b"kTRC": curve(1.0)}, b"GRAY")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_wide_colour_space_is_converted_to_srgb(image_format):
    image = Image.new("RGB", (64, 64), (120, 180, 90))
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    out = decode_any(saved(image, image_format, icc_profile=WIDE, **lossless))
    assert abs(np.asarray(out.image, int) - (81, 181, 83)).max() <= 4  # as viewers show it
    assert not out.remarks


def test_transparency_is_kept_under_a_profile():
    image = Image.new("RGBA", (4, 4), (120, 180, 90, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    out = pixels(saved(image, icc_profile=WIDE))
    assert (tuple(out[0, 0]), tuple(out[1, 1])) == ((255, 255, 255), (81, 181, 83))


def test_a_palette_is_converted_too():
    image = Image.new("RGB", (4, 4), (120, 180, 90)).quantize(2)
    assert tuple(pixels(saved(image, icc_profile=WIDE))[0, 0]) == (81, 181, 83)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_stays_grey_and_is_converted(mode):
    out = decode_any(saved(Image.new("L", (4, 4), 55).convert(mode), icc_profile=LINEAR_GREY))
    assert out.image.mode == "L"
    assert abs(out.image.getpixel((0, 0)) - 128) <= 2  # 55/255 of linear light


def test_srgb_profiles_change_no_pixel():
    np.testing.assert_array_equal(pixels(saved(gradient(), icc_profile=SRGB)), np.asarray(gradient()))


@pytest.mark.parametrize(
    "broken",
    [b"", b"garbage", WIDE[:200], LINEAR_GREY, WIDE.replace(b"acsp", b"xxxx"), WIDE.replace(b"RGB ", b"RG\0 ")],
)
def test_a_picture_with_a_broken_or_strange_profile_is_taken_and_counted(broken):
    for data in (saved(gradient(), icc_profile=broken or b"x"), saved(gradient(), "TIFF", icc_profile=broken or b"x")):
        out = decode_any(data)
        assert out.remarks == (picture.PROFILE,)
        np.testing.assert_array_equal(np.asarray(out.image), np.asarray(gradient()))


# metadata ----------------------------------------------------------------------------------------


def test_a_png_with_large_texts_or_profile_is_whole():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", '{"node": 1}' * 200_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>" * 200_000, zip=True)
    for _ in range(3):
        text.add_text("another", "x" * 900_000, zip=True)
    out = decode_any(saved(gradient(), pnginfo=text, icc_profile=SRGB + bytes(3 << 20)))
    np.testing.assert_array_equal(np.asarray(out.image), np.asarray(gradient()))


def test_a_profile_that_is_a_bomb_is_no_profile(monkeypatch):
    out = decode_any(saved(gradient(), icc_profile=bytes(64 << 20)))
    assert out.remarks == (picture.PROFILE,)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_is_applied_in_every_format(image_format):
    image = Image.fromarray(np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50, 32, 0), 32, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = pixels(saved(image.convert("RGB"), image_format, exif=exif))
    assert abs(out[:, :, 0].astype(int) - np.rot90(np.asarray(image), -1)).mean() < 8


def test_an_orientation_in_xmp_is_applied_also_without_exif():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>', zip=True)
    expected = np.rot90(np.asarray(gradient()), -1)
    np.testing.assert_array_equal(pixels(saved(gradient(), pnginfo=text)), expected)


def test_a_damaged_exif_block_costs_no_picture():
    out = decode_any(saved(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert out.image.size == (64, 64)


def test_of_an_animation_the_first_picture_is_taken_and_counted():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for image_format in ("GIF", "PNG", "TIFF", "WEBP"):
        out = decode_any(saved(frames[0], image_format, save_all=True, append_images=frames[1:]))
        assert out.remarks == (picture.FRAMES,), image_format
        assert out.image.getpixel((4, 4))[0] > 200


def test_a_gamma_is_counted():
    data = saved(gradient())
    at = data.index(b"IDAT") - 4
    for gamma, remarks in ((100_000, (picture.GAMMA,)), (45_455, ())):
        assert decode_any(data[:at] + chunk(b"gAMA", struct.pack(">L", gamma)) + data[at:]).remarks == remarks


# JPEG --------------------------------------------------------------------------------------------

WAYS = [*itertools.product((False, True), (0, 2), (0, 1, 3), ("L", "RGB", "CMYK"))]


def made(progressive, subsampling, restart, mode, seed=0, side=72):
    noise = np.random.default_rng(seed).integers(0, 256, (side, side + 5, 3), np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).convert(mode)
    options = {"progressive": progressive, "subsampling": subsampling, "restart_marker_blocks": restart}
    return saved(image, "JPEG", quality=90, **options)


@pytest.mark.parametrize("way", WAYS)
def test_every_good_jpeg_is_taken_with_the_pixels_of_pillow(way):
    data = made(*way)
    expected = Image.open(io.BytesIO(data))
    expected = np.asarray(expected.convert("RGB") if way[3] == "CMYK" else expected)
    for harmless in (data, data + b"camera notes\xff\xd9" * 9, data + bytes(99), data[:-2] + bytes(3) + data[-2:]):
        np.testing.assert_array_equal(pixels(harmless), expected)


# Pillow alone reads CMYK of which only the first ink has full resolution, and it does not report warnings.
@pytest.mark.parametrize("way", [way for way in WAYS if way[1::2] != (2, "CMYK")])
def test_a_jpeg_cut_short_and_closed_is_refused_wherever_it_is_cut(way):
    data = made(*way)
    begin = data.index(b"\xff\xda") + 14
    for cut in np.linspace(begin + 8, len(data) - 24, 60).astype(int):
        with pytest.raises(BadImage):
            decode_any(data[:cut] + b"\xff\xd9")


def test_a_progressive_jpeg_without_its_last_scans_is_refused():
    """libjpeg says nothing: between two scans a file is a complete, coarser picture."""
    data = made(True, 0, 0, "RGB")
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    tables = data.rindex(b"\xff\xc4", 0, scans[-1])
    with pytest.raises(BadImage, match="last scans are missing"):
        decode_any(data[:tables] + b"\xff\xd9")


def test_a_jpeg_of_scans_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(jpeg, "MAX_SCANNED", 77 * 72 * 3)
    with pytest.raises(BadImage, match="scans over"):
        decode_any(made(True, 0, 0, "RGB"))
