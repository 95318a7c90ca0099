"""Files made to harm: each is refused in one line, before it takes memory, time or anything outside its folder.

Sizes, paths and forms that each reader refuses on its own stand in its own test file; here are those that an
attacker would make with a hash that fits, those that go through several readers, and what fuzzing has found.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from glann.cli.main import explain
from glann.cluster.checkpoints import reader, retention
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.config import run as configuration
from glann.config.run import Config
from glann.datasets.codec import BadImage
from glann.datasets.decoding.picture import decode_any
from glann.datasets.index import Index
from glann.datasets.shards import scan
from glann.datasets.sources.open import open_source
from glann.errors import UserError, redact
from glann.inference.package import export_model
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.reports.facts import RunFacts
from glann.samplers.gaussian import gaussian
from glann.storage import journal
from glann.storage.open import open_store
from glann.tracking.outbox import OutboxState
from glann.tracking.source import load_model
from glann.trainers.run.state import checked_state
from held_rows import Held

MIB = 1 << 20


class Exploit:
    """What unpickling would run: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def one_line(refusal: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


def safetensors_file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensor(dtype: str, shape: list[int], size: int) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


HOSTILE_TENSORS = {
    "a header of 10 GB": safetensors_file(b"{}", b"x" * 64, 10 << 30),
    "a header of 2^64 bytes": safetensors_file(b"{}", b"", 2**64 - 1),
    "nothing": b"",
    "half a length": b"\x01\x00",
    "deep nesting": safetensors_file(b'{"a":' * 100_000),
    "no object": safetensors_file(b"[]"),
    "not JSON": safetensors_file(b"{'a': 1}"),
    "more elements than bytes": safetensors_file(tensor("F32", [2**40, 2**20], 8), bytes(8)),
    "elements beyond 64 bits": safetensors_file(tensor("F32", [2**63, 2**63], 8), bytes(8)),
    "negative shape": safetensors_file(tensor("F32", [-1], 4), bytes(4)),
    "bytes beyond the end": safetensors_file(tensor("F32", [2], 800), bytes(8)),
    "a hole before the bytes": safetensors_file(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)
    ),
    "two tensors on the same bytes": safetensors_file(
        tensor("F32", [2], 8) | {"b": tensor("F32", [2], 8)["a"]}, bytes(8)
    ),
    "an unknown type": safetensors_file(tensor("X9", [1], 4), bytes(4)),
    "a type that torch has not": safetensors_file(tensor("F8_E8M0", [4], 4), bytes(4)),
    "NaN for a size": safetensors_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "text of another encoding": safetensors_file("{}".encode("utf-16")),
}


# checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint of step 1 with a group `generator` of one tensor."""
    store = open_store(str(tmp_path / "saved"))
    writer = CheckpointWriter(store, 0, 1, 3, 20.0, "a")
    rows = Held(0, {"z": np.ones((4, 2), np.float32), "steps": np.ones(4, np.int32)})
    writer.save(1, {"generator": {"a": torch.ones(2)}}, rows, {"rows": 4})
    writer.wait()
    assert torch.equal(reader.load_tensors(store, 1, "generator")["a"], torch.ones(2))
    return store


def put(store, name: str, content: bytes) -> None:
    """Replace a file the way an attacker would: its size and hash in the manifest fit."""
    manifest = json.loads(store.read("step-000001/manifest.json"))
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    [place] = [key for key in store.list() if key.endswith(f"/{name}")]
    store.write(place, content)
    store.write("step-000001/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("content", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_hostile_tensors_of_a_checkpoint_are_refused(saved, content):
    put(saved, "generator.safetensors", content)
    with pytest.raises(UserError) as refusal:
        reader.load_tensors(saved, 1, "generator")
    one_line(refusal)


def test_a_pickle_by_the_name_of_a_checkpoint_is_never_run(saved, tmp_path):
    for evil in (pickle.dumps(Exploit(tmp_path / "evil")), torch_zip(tmp_path / "evil")):
        put(saved, "generator.safetensors", evil)
        with pytest.raises(UserError):
            reader.load_tensors(saved, 1, "generator")
        put(saved, "latents-0-4.safetensors", evil)
        with pytest.raises(UserError):
            reader.load_rows(saved, 1, range(4))
    assert not (tmp_path / "evil").exists()


def torch_zip(path: Path) -> bytes:
    """What torch.save writes, with an exploit in it."""
    buffer = io.BytesIO()
    torch.save({"a": Exploit(path)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", "NaN"),
        ("rows", "Infinity"),
        ("rows", "1e400"),
        ("rows", "-1"),
        ("rows", "1" * 5000),
        ("step", "1.5"),
        ("step", "true"),
        ("attempt", '"../../x"'),
        ("attempt", '"/etc"'),
        ("attempt", '"a/b"'),
        ("files", "[" * 10_000),
        ("files", '{"a\\u0000.json": {"size": 1, "sha256": "' + "0" * 64 + '"}}'),
        ("files", '{"a.json\\n": {"size": 1, "sha256": "' + "0" * 64 + '"}}'),
        ("files", '{"state.json": {"size": 1e30, "sha256": "' + "0" * 64 + '"}}'),
    ],
)
def test_a_manifest_with_an_impossible_value_is_refused(saved, key, value):
    manifest = json.loads(saved.read("step-000001/manifest.json"))
    parts = [f'"{name}": {value if name == key else json.dumps(held)}' for name, held in manifest.items()]
    saved.write("step-000001/manifest.json", ("{" + ", ".join(parts) + "}").encode())
    with pytest.raises(UserError) as refusal:
        reader.load_tensors(saved, 1, "generator")
    one_line(refusal)
    assert retention.latest(saved) is None


def test_of_a_key_given_twice_only_what_is_used_counts(saved):
    """A second `files` is checked like a first: there is no reader that sees one and trusts the other."""
    text = saved.read("step-000001/manifest.json").decode().strip()
    evil = '"files": {"../x.json": {"size": 1, "sha256": "' + "0" * 64 + '"}}'
    saved.write("step-000001/manifest.json", (text[:-1] + ", " + evil + "}").encode())
    with pytest.raises(UserError):
        reader.load_tensors(saved, 1, "generator")
    saved.write("step-000001/manifest.json", ("{" + evil + ", " + text[1:]).encode())
    assert torch.equal(reader.load_tensors(saved, 1, "generator")["a"], torch.ones(2))


GOOD_STATE = {
    "position": {"stage": "glo", "epoch": 1, "step": 2, "serial": 3},
    "updates": {"generator": 3, "mapping": None},
    "rows": 4,
    "fingerprint": "f",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"position": None},
        {"position": {"stage": "glo", "epoch": -1, "step": 0, "serial": 0}},
        {"position": {"stage": "../x", "epoch": 0, "step": 0, "serial": 0}},
        {"position": {"stage": "glo", "epoch": 0, "step": 0, "serial": 10**30}},
        {"updates": {}},
        {"updates": {"generator": "3", "mapping": None}},
        {"rows": "4"},
        {"rows": 4.5},
        {"fingerprint": None},
    ],
)
def test_a_state_of_another_form_is_refused(changes):
    assert checked_state(GOOD_STATE, "here") == GOOD_STATE
    with pytest.raises(UserError) as refusal:
        checked_state(GOOD_STATE | changes, "here")
    one_line(refusal)
    for missing in changes:
        with pytest.raises(UserError):
            checked_state({key: value for key, value in GOOD_STATE.items() if key != missing}, "here")


def test_nothing_is_written_or_removed_through_a_link_out_of_a_store(tmp_path):
    """A run folder from elsewhere may hold links; cleaning up behind a killed save must not follow them."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letters").write_text("dear")
    store = open_store(str(tmp_path / "checkpoints"))
    store.write("step-000001/x", b"1")
    os.symlink(precious, tmp_path / "checkpoints" / "step-000002")
    for attempt in (
        lambda: store.delete("step-000002/letters"),
        lambda: store.write("step-000002/letters", b"mine"),
        lambda: retention.remove_torn(store),
    ):
        with pytest.raises(UserError, match="leads out of"):
            attempt()
    assert (precious / "letters").read_text() == "dear"
    linked = open_store(str(tmp_path / "link"))  # the store as a whole may be a link: that is the user's own choice
    os.symlink(tmp_path / "checkpoints", tmp_path / "link")
    linked.write("step-000003/x", b"2")
    assert linked.read("step-000003/x") == b"2"


# packaged models ---------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    config = Config.model_validate(
        {
            "name": "tiny",
            "data": {"url": "data", "resolution": 28, "channels": 1},
            "generator": {"kind": "infogan", "latent_dim": 4, "width": 4},
            "glo": {"epochs": 1},
            "imle": {"noise_dim": 3, "hidden_dim": 4},
        }
    )
    generator = build_generator(config.generator, 28, 1).state_dict()
    mapping = build_mapping(config.sampler, 4).state_dict()
    return export_model(tmp_path / "model", config, generator, mapping, gaussian(torch.randn(9, 4)), 9, "f")


def replace(folder: Path, name: str, content: bytes) -> None:
    manifest = json.loads((folder / "model.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    (folder / "model.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("content", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
@pytest.mark.parametrize("name", ["generator.safetensors", "sampler-gaussian.safetensors"])
def test_hostile_tensors_of_a_model_are_refused(model, name, content):
    replace(model, name, content)
    with pytest.raises(UserError) as refusal:
        load_model(model)
    one_line(refusal)


@pytest.mark.parametrize("name", ["generator.safetensors", "sampler-imle.safetensors", "sampler-gaussian.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(model, name, dtype):
    """Names and shapes fit, so they would be taken, and sampling would end in a traceback."""
    import safetensors.torch

    state = safetensors.torch.load((model / name).read_bytes())
    victim = max(state, key=lambda key: state[key].numel())
    state[victim] = torch.zeros(state[victim].shape, dtype=dtype)
    replace(model, name, safetensors.torch.save(state))
    with pytest.raises(UserError):
        load_model(model)


def test_a_pickle_by_the_name_of_a_model_is_never_run(model, tmp_path):
    for evil in (pickle.dumps(Exploit(tmp_path / "evil")), torch_zip(tmp_path / "evil")):
        replace(model, "generator.safetensors", evil)
        with pytest.raises(UserError):
            load_model(model)
    assert not (tmp_path / "evil").exists()


def test_a_link_to_a_file_outside_is_refused_by_its_hash(model, tmp_path):
    (tmp_path / "secret").write_bytes(b"0" * (model / "sampler-gaussian.safetensors").stat().st_size)
    (model / "sampler-gaussian.safetensors").unlink()
    os.symlink(tmp_path / "secret", model / "sampler-gaussian.safetensors")
    with pytest.raises(UserError, match="SHA-256"):
        load_model(model)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("imle", "noise_dim", 2**62),
        ("imle", "noise_dim", 10**30),
        ("imle", "hidden_dim", 2**40),
        ("imle", "lr", float("nan")),
        ("imle", "lr", float("inf")),
        (None, "resolution", 1024),  # which this kind of generator cannot make
        (None, "rows", 10**400),
    ],
)
def test_networks_that_cannot_be_are_refused(model, section, key, value):
    manifest = json.loads((model / "model.json").read_text())
    (manifest["samplers"][section]["config"] if section else manifest)[key] = value
    (model / "model.json").write_text(json.dumps(manifest))
    if key == "rows":
        assert load_model(model)  # a number for people; nothing is sized by it
        return
    with pytest.raises(UserError) as refusal:
        load_model(model)
    one_line(refusal)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("http://me:hunter2@127.0.0.1:1/model", "http:// addresses are not supported"),
        ("ftp://x", "ftp:// addresses are not supported"),
        ("file:///etc/passwd", "/etc/passwd holds no packaged model"),
    ],
)
def test_a_model_is_not_fetched_from_just_anywhere(source, said):
    with pytest.raises(UserError, match=f"^{said}") as refusal:
        load_model(source)
    assert "hunter2" not in str(refusal.value)


# data sets and archives --------------------------------------------------------------------------


def test_an_index_of_any_size_is_refused_before_it_is_read(tmp_path):
    """A sparse file costs the sender nothing and would cost the reader all its memory."""
    for name in ("index.json", "images.bin"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UserError, match="too large for an index"):
        Index.load(str(tmp_path))


def block(name: str = "x.png", kind: bytes = tarfile.REGTYPE, size: bytes = b"00000000004", body: bytes = b"") -> bytes:
    """A tar member whose header says what it likes."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[156:157], header[124:136] = kind, size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def pax(records: bytes) -> bytes:
    return block("pax", tarfile.XHDTYPE, b"%011o" % len(records), records)


BACKWARDS = b"\xff" * 8 + (2**32 - 1024).to_bytes(4, "big")  # -1024 in base 256
HUGE = b"\x80\0\0\0" + (2**62).to_bytes(8, "big")
HOSTILE_TARS = {
    "a member of negative size": block(size=BACKWARDS),
    "a long name of negative size": block(kind=tarfile.GNUTYPE_LONGNAME, size=BACKWARDS),
    "attributes of negative size": block(kind=tarfile.XHDTYPE, size=BACKWARDS),
    "attributes that make a size negative": pax(b"17 size=-1000000\n") + block(),
    "a long name of 2^62 bytes": block(kind=tarfile.GNUTYPE_LONGNAME, size=HUGE),
    "attributes of 2^62 bytes": block(kind=tarfile.XHDTYPE, size=HUGE),
    "global attributes of 8 GB": block(kind=tarfile.XGLTYPE, size=b"77777777777"),
    "attributes without end": pax(b"99999999999999999999 a=b\n") + block(),
    "attributes of no length": pax(b"0 a=b\n") + block(),
    "a member of 2^62 bytes": block(size=HUGE),
    "long names without end": block("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"00000000001", b"x") * 3000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", HOSTILE_TARS.values(), ids=HOSTILE_TARS)
def test_a_tar_that_points_back_or_has_no_end_is_refused(tmp_path, content):
    """Python's own reader goes round in circles in some of these, or takes any amount of memory."""
    path = tmp_path / "x.tar"
    path.write_bytes(content + bytes(1024))
    for read in (lambda: open_source(str(path)), lambda: scan(path, path.name)):
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as refusal:
                read()
            assert tracemalloc.get_traced_memory()[1] < 50 * MIB
        finally:
            tracemalloc.stop()
        one_line(refusal)


SPECIAL = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
}


@pytest.mark.parametrize("kind", SPECIAL.values(), ids=SPECIAL)
def test_links_and_devices_are_no_images(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    for read in (lambda: open_source(str(path)), lambda: scan(path, path.name)):
        with pytest.raises(UserError):
            read()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "a\\..\\x.png", "./../x.png"])
def test_a_tar_with_a_name_outside_is_refused_also_by_pax(tmp_path, name):
    record = b"path=" + name.encode() + b"\n"
    length = len(record) + 1 + len(str(len(record) + 3))
    (tmp_path / "x.tar").write_bytes(pax(b"%d %s" % (length, record)) + block(body=b"1234") + bytes(1024))
    with pytest.raises(UserError, match="hostile member name"):
        open_source(str(tmp_path / "x.tar"))


def read_source(path: Path) -> None:
    for item in open_source(str(path)).items(0):
        item.read()


def test_bombs_are_refused_before_they_go_off(tmp_path, monkeypatch):
    """Few bytes that unpack to many: refused by what they say, and cut off where they say less than there is."""
    from glann.datasets.sources import arrays

    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 8 * MIB)
    size = (16, 1024, 1024)
    header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in size)
    (tmp_path / "honest-ubyte.gz").write_bytes(gzip.compress(header + bytes(16 * MIB)))
    lie = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (1, 4, 4))
    (tmp_path / "lying-ubyte.gz").write_bytes(gzip.compress(lie + bytes(256 * MIB), 1))
    np.savez_compressed(tmp_path / "honest.npz", images=np.zeros(size, np.uint8))
    with zipfile.ZipFile(tmp_path / "lying.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        npy = io.BytesIO()
        np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 4, 4)})
        archive.writestr("images.npy", npy.getvalue() + bytes(MIB))
    for path in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as refusal:
                read_source(path)
            assert tracemalloc.get_traced_memory()[1] < 40 * MIB, path.name
        finally:
            tracemalloc.stop()
        one_line(refusal)


def test_a_zip_with_a_member_of_no_name_is_refused(tmp_path):
    """Python asks such a name for its last letter. Found by fuzzing."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("0.png", b"")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 28], content[entry + 32] = 0, 5  # the name becomes the comment
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match="hostile member name"):
        open_source(str(tmp_path / "x.zip"))


def test_a_parquet_file_with_a_column_that_is_no_text_is_refused(tmp_path):
    """Found by fuzzing."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": [b"1"]}), tmp_path / "x.parquet", store_schema=False)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content.replace(b"image", b"\xbdmage"))
    with pytest.raises(UserError, match="not a readable parquet file") as refusal:
        open_source(str(tmp_path / "x.parquet"))
    one_line(refusal)


def test_an_object_array_is_not_unpickled(tmp_path):
    array = np.empty(1, object)
    array[0] = Exploit(tmp_path / "evil")
    np.savez(tmp_path / "x.npz", images=array)
    with pytest.raises(UserError, match="plain arrays"):
        open_source(str(tmp_path / "x.npz"))
    assert not (tmp_path / "evil").exists()


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < MIB
    with pytest.raises(BadImage, match="pixels"):
        decode_any(buffer.getvalue())


# recipes -----------------------------------------------------------------------------------------

LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'lol'] * 9)}]" for n in range(12))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", ["name", "data", "glo", "surprise", "cluster"])
def test_a_billion_laughs_are_told_in_a_few_words(tmp_path, key):
    (tmp_path / "x.yaml").write_text(f"{LAUGHS}\n{key}: *a11\n")
    began = time.monotonic()
    with pytest.raises(UserError) as refusal:
        configuration.load(tmp_path / "x.yaml")
    assert time.monotonic() - began < 20
    assert len(str(refusal.value)) < 20_000


@pytest.mark.parametrize("value", ["[" * 200_000, "{" * 200_000, "x: {a: " * 100_000, "x" * (2 << 20)], ids=len)
def test_yaml_that_would_take_hours_is_refused_at_once(tmp_path, value):
    """PyYAML takes time with the square of the brackets that are open. Found by fuzzing."""
    (tmp_path / "x.yaml").write_text(value)
    began = time.process_time()
    for attempt in (
        lambda: configuration.load(tmp_path / "x.yaml"),
        lambda: configuration.load("digits", [f"x={value}"]),
    ):
        with pytest.raises(UserError) as refusal:
            attempt()
        one_line(refusal)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch evil']",
        "!!python/object/new:subprocess.Popen [['touch', 'evil']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!int x",
        "!!float x",
        "!!binary x",
        "[" * 3000,
        "1" * 6000,
        "&a [*a]",
        "&a {x: *a}",
        "{? [a] : b}",
        "\ud800",
        "{1: 2}",
    ],
    ids=lambda value: value[:30].encode("unicode_escape").decode(),
)
def test_yaml_that_is_more_than_data_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "x.yaml"
    recipe.write_bytes(f"name: {value}\n".encode("utf-8", "surrogatepass"))
    for attempt in (lambda: configuration.load(recipe), lambda: configuration.load("digits", [f"name={value}"])):
        with pytest.raises(UserError) as refusal:
            attempt()
        assert len(str(refusal.value)) < 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "tracking=http://me:hunter2@host",
        "tracking.uri=[http://me:hunter2@host",
        "s3.timeout_s=http://me:hunter2@host",
        "tracking.uri.x=http://me:hunter2@host",
        "http://me:hunter2@host",
    ],
)
def test_a_refused_override_does_not_repeat_a_password(override):
    with pytest.raises(UserError) as refusal:
        configuration.load("digits", [override, "tracking.uri=http://me:hunter2@host", "tracking.uri.y=1"])
    assert "hunter2" not in explain(refusal.value)[0]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at http://me:pass@host/x", "at http://***@host/x"),
        ("postgresql://me:pa/ss@host/db", "postgresql://***@host/db"),
        ("'mysql+pymysql://me:p'w@host'", "'mysql+pymysql://***@host'"),
        ("https://token@host/", "https://***@host/"),
        ("http://host:5000/models/x@alias", "http://host:5000/models/x@alias"),
        ("http://host/a@b and s3://bucket/x@y", "http://host/a@b and s3://bucket/x@y"),
        ("models:/faces@best", "models:/faces@best"),
    ],
)
def test_passwords_in_addresses_are_taken_out_and_nothing_else(text, redacted):
    assert redact(text) == redacted
    assert str(UserError(text)) == redacted


# run folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": ["glo"], "step": 1}',
        '{"stage": "glo", "step": "1"}',
        '{"stage": "glo", "step": {}}',
        '{"stage": "glo", "step": 1, "epoch": "x"}',
        '{"stage": "glo", "step": 1, "time": []}',
        '{"stage": "glo", "step": 1, "loss": NaN}',
        '{"stage": "glo", "step": 1, "loss": 1e999}',
        '{"stage": "glo", "step": ' + "9" * 400 + "}",
        "[1]",
        "[" * 100_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_journal_of_another_form_is_refused(tmp_path, line):
    (tmp_path / "config.yaml").write_text(configuration.load("digits").to_yaml())
    (tmp_path / journal.FILE).write_text('{"stage": "glo", "step": 0}\n' + line + "\n")
    with pytest.raises(UserError, match="damaged before byte") as refusal:
        RunFacts.read(tmp_path)
    one_line(refusal)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"metrics": []}', '{"timings": 3}', '{"metrics": {"l1": NaN}}', "[" * 100_000]
)
def test_a_summary_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(configuration.load("digits").to_yaml())
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError) as refusal:
        RunFacts.read(tmp_path)
    one_line(refusal)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "link", "images/../../secret"])
def test_a_run_folder_cannot_have_other_files_sent_to_the_tracking_server(tmp_path, path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("mine")
    os.symlink(tmp_path / "secret", run / "link")
    state = {"key": "k", "uri": "u", "parcels": [{"kind": "artifact", "path": "report.html"}]}
    (run / "tracking.json").write_text(json.dumps(state))
    assert OutboxState.load(run).parcels[0].path == "report.html"
    state["parcels"].append({"kind": "artifact", "path": path})
    (run / "tracking.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="outside this run"):
        OutboxState.load(run)
