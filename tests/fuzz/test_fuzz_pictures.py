"""Pictures and names of strangers: pixels or one line, in bounded time and memory; no file is lost without a word."""

from __future__ import annotations

import io
import tarfile
import zipfile

import numpy as np
import pytest
from glann.datasets.codec import BadImage
from glann.datasets.decoding.picture import READABLE, SUFFIXES, Picture, decode_any
from glann.datasets.left_out import in_words
from glann.datasets.sources.names import NoImages
from glann.datasets.sources.open import open_source
from hypothesis import given
from hypothesis import strategies as st
from mutations import tampered
from PIL import Image, ImageCms

NOISE = np.random.default_rng(0).integers(0, 256, (24, 31, 4), np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def real_files() -> dict[str, bytes]:
    """A small file of every readable format, in several forms, with metadata."""
    colour, alpha = Image.fromarray(NOISE[:, :, :3]), Image.fromarray(NOISE)
    grey, wide = colour.convert("L"), Image.fromarray(NOISE.view(np.uint32)[:, :, 0].astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {kind: saved(colour, kind) for kind in READABLE}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        if kind in READABLE:
            files[f"{kind} with metadata"] = saved(colour, kind, icc_profile=SRGB, exif=exif)
    files["JPEG progressive"] = saved(colour, "JPEG", progressive=True, restart_marker_blocks=2)
    files["JPEG CMYK"] = saved(colour.convert("CMYK"), "JPEG", subsampling=0)
    files["PNG alpha"], files["PNG 16"] = saved(alpha, "PNG"), saved(wide, "PNG")
    files["PNG palette"] = saved(colour.quantize(8), "PNG", transparency=1)
    files["TIFF 16"], files["TIFF LZW"] = saved(wide, "TIFF"), saved(grey, "TIFF", compression="tiff_lzw")
    files["TIFF JPEG"] = saved(colour, "TIFF", compression="jpeg")
    files["PGM 16"] = b"P5\n31 24\n65535\n" + np.asarray(wide).astype(">u2").tobytes()
    files["PPM text"] = b"P3\n2 2\n9\n" + b"1 2 3 " * 4
    for kind in ("GIF", "PNG", "WEBP"):
        files[f"{kind} animated"] = saved(colour, kind, save_all=True, append_images=[colour.rotate(180)])
    return files


FILES = real_files()


def read(content: bytes) -> Picture:
    """A picture as packing reads it."""
    picture = decode_any(content, levels=65535)
    assert picture.image.mode in ("RGB", "L")
    return picture


@given(content=tampered(*FILES.values()))
def test_picture_files(jail, content):
    if not jail.read(lambda: read(content), BadImage):
        with pytest.raises(BadImage, match=r"\A[^\n]+\Z"):  # one line
            read(content)


@given(
    profile=tampered(SRGB), kind=st.sampled_from(("PNG", "JPEG", "TIFF")), mode=st.sampled_from(("L", "RGB", "CMYK"))
)
def test_profiles(jail, profile, kind, mode):
    """A damaged profile costs no picture."""
    image = Image.fromarray(NOISE[:, :, :3]).convert("RGB" if (kind, mode) == ("PNG", "CMYK") else mode)
    content = saved(image, kind, icc_profile=profile or b"x")
    assert jail.read(lambda: read(content), BadImage)


# names -------------------------------------------------------------------------------------------

FOLDERS = ("", "", "a", ".git", "@eaDir", "__MACOSX", "CelebAMask-HQ-mask-anno", "masks", "10²", "é", "x.png", "A" * 80)
words = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=("Cs",)), min_size=1, max_size=8)
folders = st.lists(st.sampled_from(FOLDERS) | words, max_size=3)
endings = st.sampled_from((*SUFFIXES, ".PNG", ".heic", ".txt", "", ".", ".0001", ".json")) | words.map(
    lambda w: f".{w}"
)


@st.composite
def names(draw: st.DrawFn) -> str:
    """A file name of a folder, an archive or a bucket; never one that leads out."""
    parts = [part for part in draw(folders) if part not in ("", ".", "..") and ":" not in part]
    last = draw(words) + draw(endings)
    last = "xx" + last if last in (".", "..") or ":" in last else last
    return "/".join([*parts, last]).removesuffix(".tar").removesuffix(".zip")


def without_clashes(given_names: list[str]) -> list[str]:
    """The names of which none is the folder of another, and none too long for a disk."""
    kept = [name for name in dict.fromkeys(given_names) if all(len(part.encode()) < 200 for part in name.split("/"))]
    return [name for name in kept if not any(other.startswith(f"{name}/") for other in kept)]


def account(path: str) -> tuple[list[str], dict[str, int], str]:
    """The names that are taken, the count of the others by reason, and the account in words."""
    try:
        source = open_source(path)
    except NoImages as error:
        return [], {group.reason: group.count for group in error.left_out}, in_words(error.left_out)
    taken = [item.name.rsplit("x.tar: ", 1)[-1].rsplit("x.zip: ", 1)[-1] for item in source.items(0)]
    assert len(taken) == source.count
    taken = [name.removeprefix(f"{path}/") for name in taken]
    return taken, {group.reason: group.count for group in source.left_out}, in_words(source.left_out)


@given(given_names=st.lists(names(), min_size=1, max_size=8).map(without_clashes).filter(bool))
def test_name_filters(jail, given_names):
    """Every listed file is taken or accounted for, the same from a folder, a zip and a tar."""
    outside = jail.fill(dict.fromkeys((f"x/{name}" for name in given_names), b"x"))
    with zipfile.ZipFile(outside / "x.zip", "w") as packed, tarfile.open(outside / "x.tar", "w") as bundle:
        for name in given_names:
            packed.writestr(zipfile.ZipInfo(name), b"x")
            member = tarfile.TarInfo(name)
            member.size = 1
            bundle.addfile(member, io.BytesIO(b"x"))
    found: list[tuple[list[str], dict[str, int], str]] = []
    for place in ("x", "x.zip", "x.tar"):
        assert jail.read(lambda place=place: found.append(account(str(outside / place))))
    assert found[0] == found[1] == found[2]
    taken, left_out, said = found[0]
    assert len(taken) + sum(left_out.values()) == len(given_names)
    assert set(taken) <= set(given_names)
    assert said.isprintable()
    assert len(said) < 2000


def test_the_pictures_are_good_before_they_are_tampered_with(jail):
    for name, content in FILES.items():
        assert jail.read(lambda content=content: read(content), BadImage), name
