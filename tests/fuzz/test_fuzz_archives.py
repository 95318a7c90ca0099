"""Archives, arrays and pictures of strangers are read or refused: no traceback, no hang, no bomb, nothing written."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from glann.datasets.codec import BadImage, decode_packed
from glann.datasets.decoding.picture import decode_any
from glann.datasets.shards import scan
from glann.datasets.sources.open import open_source
from glann.storage.base import TruncatedObject
from hypothesis import given
from hypothesis import strategies as st
from mutations import numbers, tampered, texts
from PIL import Image

PICTURES = [np.full((6, 6), 40 * n, np.uint8) for n in range(3)]


def picture(n: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURES[n]).save(buffer, kind)
    return buffer.getvalue()


def read_all(path: str) -> None:
    """What packing does with a source, except that a bad image is passed over."""
    source = open_source(path)
    for number, item in enumerate(source.items(0)):
        assert number < source.count
        with contextlib.suppress(BadImage):
            data = item.read()
            if isinstance(data, bytes):
                decode_any(data)


# tar ---------------------------------------------------------------------------------------------


def make_tar(format: int = tarfile.USTAR_FORMAT, names: tuple[str, ...] = ("0.png", "1.png", "2.png")) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture(n))
            archive.addfile(info, io.BytesIO(picture(n)))
    return buffer.getvalue()


LONG = "x" * 120 + ".png"
TARS = (make_tar(), make_tar(tarfile.PAX_FORMAT, (LONG, "é.png")), make_tar(tarfile.GNU_FORMAT, (LONG, "1.png")))
TYPES = [*b"01234567LKSxgXDMVNA\0z"]
SIZES = (b"00000000000", b"77777777777", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"-0000000512", b"\xff" * 10)


def checksummed(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


@st.composite
def tar_headers(draw: st.DrawFn) -> bytes:
    """A header whose checksum fits, of any name, kind and size: also before its file, endless or sparse."""
    block = bytearray(draw(st.sampled_from(TARS))[:512])
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(("name", "type", "size", "link", "prefix", "sparse", "noise")))
        name = draw(texts).encode("utf-8", "surrogatepass")
        if field == "name":
            block[0:100] = name[:100].ljust(100, b"\0")
        elif field == "type":
            block[156] = draw(st.sampled_from(TYPES))
        elif field == "size":
            block[124:136] = draw(st.sampled_from(SIZES) | numbers.map(lambda n: b"%o" % abs(n)))[:12].ljust(12, b"\0")
        elif field == "link":
            block[157:257] = name[:100].ljust(100, b"\0")
        elif field == "prefix":
            block[345:500] = name[:155].ljust(155, b"\0")
        elif field == "sparse":
            block[156], block[257:265] = ord("S"), b"ustar  \0"
            block[386:410] = draw(st.sampled_from(SIZES)).ljust(12, b"\0") + draw(st.sampled_from(SIZES)).ljust(12)
            block[482] = draw(st.integers(0, 1))
            block[483:495] = draw(st.sampled_from(SIZES)).ljust(12, b"\0")
        else:
            block[draw(st.integers(0, 511))] = draw(st.integers(0, 255))
    return bytes(checksummed(block))


@st.composite
def pax_records(draw: st.DrawFn) -> bytes:
    """An extended header with its records: of the next member or of all."""
    keys = ("path", "size", "linkpath", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.realsize")
    body = b""
    for _ in range(draw(st.integers(1, 3))):
        value = draw(texts | numbers.map(str)).encode("utf-8", "surrogatepass")
        record = b" %s=%s\n" % (draw(st.sampled_from(keys)).encode(), value)
        length = len(record) + len(str(len(record) + 2)) if draw(st.booleans()) else draw(st.integers(0, 10**6))
        body += b"%d%s" % (length, record)
    block = bytearray(TARS[0][:512])
    block[156] = draw(st.sampled_from(b"xg"))
    block[124:136] = b"%011o\0" % len(body)
    return bytes(checksummed(block)) + body.ljust(-len(body) % 512 + len(body), b"\0")


headers = st.lists(
    tar_headers() | pax_records() | st.sampled_from([TARS[0][:1024], bytes(1024)]), min_size=1, max_size=5
)
tars = st.one_of(tampered(*TARS), headers.map(b"".join), headers.map(lambda parts: b"".join(parts) + TARS[0]))


@given(content=tars)
def test_tar(jail, content):
    path = jail.fill({"x.tar": content}) / "x.tar"
    jail.read(lambda: read_all(str(path)), TruncatedObject)


@given(content=tars)
def test_shard(jail, content):
    path = jail.fill({"x-000000.tar": content}) / "x-000000.tar"
    jail.read(lambda: scan(path, path.name))


# zip ---------------------------------------------------------------------------------------------


def make_zip(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for n in range(3):
            archive.writestr(f"{n}.png", picture(n))
    return buffer.getvalue()


ZIPS = (make_zip(zipfile.ZIP_STORED), make_zip(zipfile.ZIP_DEFLATED))
# (signature, offset of a field, its size): what a reader goes by in local headers, directory and end record
ZIP_FIELDS = [
    *[(b"PK\x03\x04", at, size) for at, size in ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))],
    *[(b"PK\x01\x02", at, size) for at, size in ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2))],
    *[(b"PK\x01\x02", at, size) for at, size in ((32, 2), (36, 2), (38, 4), (42, 4))],
    *[(b"PK\x05\x06", at, size) for at, size in ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))],
]


@st.composite
def zip_files(draw: st.DrawFn) -> bytes:
    """A zip file some of whose fields lie, and whose names may."""
    content = bytearray(draw(st.sampled_from(ZIPS)))
    for _ in range(draw(st.integers(1, 3))):
        signature, at, size = draw(st.sampled_from(ZIP_FIELDS))
        starts = [i for i in range(len(content)) if content.startswith(signature, i)]
        place = draw(st.sampled_from(starts)) + at
        content[place : place + size] = (draw(numbers) % (1 << 8 * size)).to_bytes(size, "little")
    if draw(st.booleans()):
        name = draw(st.sampled_from((b"/e.pn", b"../.p", b"..\\.p", b"\xff.png", b"1.png", b"a//.g")))
        content = content.replace(b"0.png", name)
    return bytes(content)


@given(content=zip_files() | tampered(*ZIPS))
def test_zip(jail, content):
    path = jail.fill({"x.zip": content}) / "x.zip"
    jail.read(lambda: read_all(str(path)), TruncatedObject)


# arrays ------------------------------------------------------------------------------------------


def make_idx(images: np.ndarray) -> bytes:
    return struct.pack(">4L", 0x803, *images.shape) + images.tobytes()


IDX = make_idx(np.stack(PICTURES))


@st.composite
def idx_files(draw: st.DrawFn) -> bytes:
    """An idx file whose sizes lie, plain or gzipped, at times a bomb."""
    sizes = [draw(st.sampled_from((3, 6, 6))) if draw(st.booleans()) else draw(numbers) % 2**32 for _ in range(3)]
    body = draw(st.sampled_from((IDX[16:], b"", bytes(1 << 20))))
    content = struct.pack(">4L", draw(st.sampled_from((0x803, 0x801, 0x803))), *sizes) + body
    if draw(st.booleans()):
        content = gzip.compress(content, 1) * draw(st.integers(1, 3))
    return content


@given(content=idx_files() | tampered(IDX, gzip.compress(IDX)))
def test_idx(jail, content):
    path = jail.fill({"x-idx3-ubyte.gz": content}) / "x-idx3-ubyte.gz"
    jail.read(lambda: read_all(str(path)))


def make_npz(header: str, body: bytes, name: str = "images.npy") -> bytes:
    text = header.encode("latin1", "replace")
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65536) + text + body
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, npy)
    return buffer.getvalue()


def saved_npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


DTYPES = ("'|u1'", "'<f8'", "'|O'", "'<M8[ns]'", "[('a','|u1')]", "'|V100000000'", "'x'", "None", "('|u1',(1000,1000))")


@st.composite
def npz_files(draw: st.DrawFn) -> bytes:
    """An npz file whose array says anything of itself."""
    shape = tuple(draw(st.lists(numbers | st.sampled_from((3, 6)), max_size=5)))
    kind, fortran = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(("True", "False", "0", "[]")))
    told = draw(st.sampled_from((repr(shape), "(3, 6, 6)", "(3,) * 10**9", "[3, 6, 6]", "((3,), 6)", "(-3, -6, 6)")))
    header = f"{{'descr': {kind}, 'fortran_order': {fortran}, 'shape': {told}, }}"
    header = draw(
        st.sampled_from((header, header.ljust(117) + "\n", "(" * 9000, "{" + header, draw(st.text(max_size=40))))
    )
    name = draw(st.sampled_from(("images.npy", "images", "../images.npy", "a.npy", "images.npy/")))
    return make_npz(header, draw(st.sampled_from((np.stack(PICTURES).tobytes(), b"", bytes(4 << 20)))), name)


NPZ = (saved_npz(images=np.stack(PICTURES)), saved_npz(a=np.stack(PICTURES), b=np.arange(3)))


@given(content=npz_files() | tampered(*NPZ))
def test_npz(jail, content):
    path = jail.fill({"x.npz": content}) / "x.npz"
    jail.read(lambda: read_all(str(path)))


# others ------------------------------------------------------------------------------------------


def make_parquet() -> bytes:
    rows = [{"bytes": picture(n), "path": None} for n in range(3)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1, 2]}), buffer)
    return buffer.getvalue()


@given(content=tampered(make_parquet()))
def test_parquet(jail, content):
    path = jail.fill({"x.parquet": content}) / "x.parquet"
    jail.read(lambda: read_all(str(path)), BadImage)


DEFLATED = tuple(zlib.compress(bytes(size), 1) for size in (10, 100 << 20))  # the second is a bomb
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@st.composite
def png_files(draw: st.DrawFn) -> bytes:
    """A PNG that says of itself what it likes, in chunks whose checksums fit."""
    sizes = [draw(st.sampled_from((6, 6, 20_000, 2**31 - 1, 0))) for _ in range(2)]
    kinds = draw(st.sampled_from(((8, 0), (8, 2), (16, 0), (1, 0), (8, 3), (8, 6), (3, 7))))
    parts = [(b"IHDR", struct.pack(">2L5B", *sizes, *kinds, 0, 0, draw(st.integers(0, 1))))]
    text = b"k\0\0" + draw(st.sampled_from(DEFLATED))
    parts += draw(st.lists(st.sampled_from(((b"zTXt", text), (b"iCCP", text), (b"PLTE", b"1"))), max_size=2))
    parts.append((b"IDAT", zlib.compress(bytes(draw(st.sampled_from((42, 0, 1 << 20)))))))
    parts.append((b"IEND", b""))
    chunks = (struct.pack(">L", len(b)) + k + b + struct.pack(">L", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@given(content=tampered(*(picture(0, kind) for kind in KINDS)) | png_files())
def test_picture(jail, content):
    jail.read(lambda: decode_any(content), BadImage)
    for kind in ("jpeg", "png", "webp"):
        with contextlib.suppress(BadImage):
            assert decode_packed(content, 6, 1, kind).shape == (1, 6, 6)


# found here once ---------------------------------------------------------------------------------


def test_the_documents_are_good_before_they_are_tampered_with(jail):
    """Otherwise every case would be refused for one dull reason."""
    whole = {
        "x.zip": ZIPS[1],
        "x.npz": NPZ[0],
        "x.parquet": make_parquet(),
        "x-idx3-ubyte": IDX,
        "x-ubyte.gz": gzip.compress(IDX),
    }
    whole |= {f"{n}.tar": content for n, content in enumerate(TARS)}
    folder = jail.fill(whole)
    for name in whole:
        assert jail.read(lambda name=name: read_all(str(folder / name))), name
    assert jail.read(lambda: scan(folder / "0.tar", "0.tar"))
