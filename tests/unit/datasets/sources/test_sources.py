"""Sources: every layout people have their images in is read in a fixed order, and bad input is named in one line."""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from glann.datasets.assets import catalogue as assets
from glann.datasets.codec import BadImage
from glann.datasets.pack import pack
from glann.datasets.sources.open import open_source
from glann.datasets.verify import describe
from glann.errors import EnvironmentFault, UserError
from glann.storage.base import TruncatedObject
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def png(seed, size=(8, 8)):
    """A random image as PNG bytes."""
    buffer = io.BytesIO()
    img_HWC = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(img_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def contents(source):
    return [item.read() for item in source.items(0)]


def names(source, start=0):
    return [item.name.replace(": ", "/").rsplit("/", 1)[-1] for item in source.items(start)]


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_folder_is_read_at_any_depth_in_natural_order(tmp_path):
    files = {"s10/1.png": png(3), "s2/10.PNG": png(2), "s2/9.png": png(1), "s2/notes.txt": b"", "s2/.hidden.png": b""}
    source = open_source(write(tmp_path, files))
    assert source.count == 3
    assert contents(source) == [png(1), png(2), png(3)]
    assert names(source, 1) == ["10.PNG", "1.png"]


def test_the_identity_is_that_of_the_contents_not_of_the_place(tmp_path):
    one = open_source(write(tmp_path / "one", {"a.png": png(1)}))
    two = open_source(write(tmp_path / "two", {"a.png": png(1)}))
    other = open_source(write(tmp_path / "three", {"a.png": png(1), "b.png": png(2)}))
    assert one.identity == two.identity != other.identity


def test_of_a_celebamask_folder_only_the_photographs_are_taken(tmp_path):
    files = {f"CelebA-HQ-img/{n}.jpg": png(n) for n in (0, 1, 2, 10, 11)}
    files |= {"CelebAMask-HQ-mask-anno/0/00000_hair.png": png(99), "CelebA-HQ-to-CelebA-mapping.txt": b""}
    assert contents(open_source(write(tmp_path, files))) == [png(n) for n in (0, 1, 2, 10, 11)]


def make_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_stylegan_zip_is_read_in_place(tmp_path, compression):
    files = {f"0000{n // 2}/img{n:08d}.png": png(n) for n in (3, 1, 2)}
    labels = json.dumps({"labels": [[name, 0] for name in files]}).encode()
    source = open_source(make_zip(tmp_path / "ffhq.zip", files | {"dataset.json": labels}, compression))
    assert contents(source) == [png(n) for n in (1, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["ffhq.zip"]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_archives_with_names_that_escape_are_refused(tmp_path, name):
    make_zip(tmp_path / "x.zip", {"good.png": png(1), name: png(2)})
    make_tar(tmp_path / "x.tar", {"good.png": png(1), name: png(2)})
    for archive in ("x.zip", "x.tar"):
        with pytest.raises(UserError, match="hostile member name"):
            open_source(str(tmp_path / archive))


def test_a_damaged_zip_member_is_bad_and_named(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.png": png(1)})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[60] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    item = next(open_source(path).items(0))
    assert item.name.endswith("x.zip: a.png")
    with pytest.raises(BadImage, match="damaged"):
        item.read()


def test_a_zip_bomb_is_stopped_at_the_size_it_admits_to(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"a.png": b"\0" * (8 << 20)}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<L", data, data.index(signature) + at, 100)  # uncompressed size
    path.write_bytes(data)
    with pytest.raises(BadImage, match="wrong length"):
        next(open_source(str(path)).items(0)).read()


def make_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_a_tar_is_read_in_place(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"./b/2.png": png(2), "./b/1.png": png(1), "1.json": b"{}"})
    assert contents(open_source(path)) == [png(1), png(2)]
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_links_in_a_tar_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError, match="holds no images"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.npz", "x.parquet", "x-idx3-ubyte", "x-idx3-ubyte.gz", "x.rar"])
@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"\x1f\x8b\x08garbage", b"\0\0\x08\x03\0\0\0\x09"])
def test_files_that_are_not_what_their_name_says_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / name))
    assert "\n" not in str(error.value)


def idx(img_NHW):
    return struct.pack(">4L", 0x803, *img_NHW.shape) + img_NHW.tobytes()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte", "t10k-images-idx3-ubyte.gz"])
def test_an_idx_file_is_read(tmp_path, name):
    img_NHW = np.random.default_rng(1).integers(0, 256, (7, 5, 6), np.uint8)
    data = idx(img_NHW)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    np.testing.assert_array_equal(np.stack(contents(open_source(str(tmp_path / name)))), img_NHW)


def test_an_idx_file_of_labels_or_cut_short_is_refused(tmp_path):
    (tmp_path / "labels-idx1-ubyte").write_bytes(struct.pack(">2L", 0x801, 3) + b"\1\2\3")
    with pytest.raises(UserError, match="labels, not images"):
        open_source(str(tmp_path / "labels-idx1-ubyte"))
    (tmp_path / "x-ubyte").write_bytes(idx(np.zeros((3, 4, 4), np.uint8))[:-1])
    with pytest.raises(UserError, match="truncated"):
        open_source(str(tmp_path / "x-ubyte"))


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 3), (4, 3, 6, 5), (4, 6, 5, 1)])
def test_an_npz_file_is_read(tmp_path, shape):
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.arange(4))
    expected = images.transpose(0, 2, 3, 1) if shape[1] == 3 else images
    np.testing.assert_array_equal(np.stack(contents(open_source(str(tmp_path / "x.npz")))), expected)


class _Harm:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_nothing_in_an_npz_file_is_unpickled(tmp_path):
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|O", "fortran_order": False, "shape": (1, 1, 1)})
    make_zip(tmp_path / "x.npz", {"images.npy": array.getvalue() + pickle.dumps([_Harm()])})
    with pytest.raises(UserError, match="plain arrays"):
        open_source(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(("kind", "shape"), [("f4", (2, 4, 4)), ("u1", (0, 4, 4)), ("u1", (4,)), ("u1", (2, 4, 4, 5))])
def test_arrays_that_are_no_images_are_refused(tmp_path, kind, shape):
    np.savez(tmp_path / "x.npz", images=np.zeros(shape, kind))
    with pytest.raises(UserError, match=r"uint8|images"):
        open_source(str(tmp_path / "x.npz"))


def hugging_face(path, seeds, group=3):
    images = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
    table = pa.table({"image": images, "label": list(range(len(images)))})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def test_hugging_face_parquet_files_are_read_in_order_from_any_row(tmp_path):
    (tmp_path / "data").mkdir()
    hugging_face(tmp_path / "data" / "train-00001-of-00002.parquet", range(8, 12))
    hugging_face(tmp_path / "data" / "train-00000-of-00002.parquet", range(8))
    source = open_source(str(tmp_path))
    assert source.count == 12
    for start in (0, 1, 3, 7, 8, 9, 12):
        assert [item.read() for item in source.items(start)] == [png(seed) for seed in range(start, 12)]


def test_a_parquet_row_without_bytes_is_bad_and_named(tmp_path):
    table = pa.table({"image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": "somewhere.png"}]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = open_source(str(tmp_path / "x.parquet")).items(0)
    assert first.read() == png(1)
    assert second.name.endswith("x.parquet: row 1")
    with pytest.raises(BadImage, match="no image bytes"):
        second.read()


def test_a_parquet_file_without_images_is_refused(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="must have a column `image`"):
        open_source(str(tmp_path / "x.parquet"))


def test_a_packed_data_set_can_be_packed_again(tmp_path):
    write(tmp_path / "in", {f"{n}.png": png(n, (32, 32)) for n in range(5)})
    pack(str(tmp_path / "in"), str(tmp_path / "big"), resolution=32, shard_size_mb=0.01)
    index = pack(str(tmp_path / "big"), str(tmp_path / "small"), resolution=16)
    assert (index.rows, index.resolution) == (5, 16)
    direct = pack(str(tmp_path / "in"), str(tmp_path / "direct"), resolution=16, name="small")
    assert hashlib.sha256((tmp_path / "small" / "images.bin").read_bytes()).hexdigest() == direct.header.images_sha256


def test_a_named_asset_is_fetched(tmp_path, monkeypatch):
    """With held-out images, its own or those of the asset that it names, and with labels."""
    np.savez(tmp_path / "digits.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.array([7, 1, 2]))
    np.savez(tmp_path / "mnist-test.npz", images=np.zeros((5, 4, 4), np.uint8), labels=np.arange(5))
    np.savez(
        tmp_path / "mnist.npz",
        images=np.zeros((4, 4, 4), np.uint8),
        labels=np.array([{}] * 4),  # objects, which are not unpickled
        test_images=np.zeros((2, 4, 4), np.uint8),
        test_labels=np.array([3, 4], np.uint8),
    )
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / f"{name}.npz")
    source = open_source("digits")
    assert (source.name, source.count) == ("digits", 3)
    assert source.labels.column("class").tolist() == [7, 1, 2]
    assert (source.held_out.name, source.held_out.count) == ("mnist-test", 5)
    mnist = open_source("mnist")
    assert (mnist.count, mnist.labels) == (4, None)
    assert mnist.held_out.labels.value_NL.tolist() == [[3], [4]]


def test_an_asset_without_reachable_held_out_images_is_packed_with_a_warning(tmp_path, monkeypatch, caplog):
    def fetch(name):
        if name == "mnist-test":
            raise EnvironmentFault("cannot fetch mnist-test")
        return tmp_path / f"{name}.npz"

    np.savez(tmp_path / "digits.npz", images=np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
    monkeypatch.setattr(assets, "fetch", fetch)
    index = pack("digits", str(tmp_path / "set"), resolution=4, channels=1)
    assert (index.rows, index.held_out) == (3, None)
    assert index.asset == "digits"
    assert "CC BY-SA 3.0" in describe(str(tmp_path / "set"))["credit"]
    again = pack(str(tmp_path / "set"), str(tmp_path / "larger"), resolution=8, channels=1)
    assert again.asset == "digits", "packed again, they are still others' work"
    np.savez(tmp_path / "own.npz", images=np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
    own = pack(str(tmp_path / "own.npz"), str(tmp_path / "own"), resolution=4, channels=1, name="set")
    assert (own.asset, own.fingerprint == index.fingerprint) == (None, own.header.recipe == index.header.recipe)
    assert "no held-out images, so copying will not be measured: cannot fetch mnist-test" in caplog.text


def test_weights_are_no_images():
    with pytest.raises(UserError, match="weights, not of images"):
        open_source("lite0")


def test_an_unknown_name_gets_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean fashion-mnist"):
        open_source("fashon-mnist")
    for missing in ("no/such/folder", "no/such.zip"):
        with pytest.raises(UserError, match="there are no images at"):
            open_source(missing)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """A small file of every kind, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    files = {f"{n}.png": png(n) for n in range(3)}
    make_zip(folder / "x.zip", files, zipfile.ZIP_DEFLATED)
    make_tar(folder / "x.tar", files)
    np.savez_compressed(folder / "x.npz", images=np.zeros((3, 4, 4), np.uint8))
    (folder / "x-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((3, 4, 4), np.uint8))))
    hugging_face(folder / "x.parquet", range(3))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_file_of_any_kind_is_refused_or_read_but_never_a_traceback(whole_files, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(whole_files)))
    content = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(UserError):
        for item in open_source(str(path)).items(0):
            with contextlib.suppress(BadImage, TruncatedObject):
                item.read()


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        open_source(write(tmp_path, {"a.txt": b""}))
