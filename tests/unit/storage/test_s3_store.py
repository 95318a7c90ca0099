"""S3 through an in-process server: what is stored comes back whole, every failure is one line without keys."""

import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from glann.config.sections import S3Config
from glann.datasets.index import Index
from glann.datasets.left_out import in_words
from glann.datasets.loader import BadRows, PlannedBatch, batches
from glann.datasets.pack import pack
from glann.datasets.reader import CorruptImage, ImageRows
from glann.datasets.verify import verify
from glann.errors import EnvironmentFault, UserError
from glann.storage import s3 as s3_module
from glann.storage.base import MissingObject, ObjectExists, TruncatedObject
from glann.storage.open import open_store
from PIL import Image

SECRET = "a-secret-that-must-not-be-shown"


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A configuration that reaches a server with one empty bucket `images`."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    config = S3Config(endpoint_url=server, max_attempts=2, timeout_s=5)
    client = s3_module._client(config, server)
    client.create_bucket(Bucket="images")
    yield config
    for entry in client.list_objects_v2(Bucket="images").get("Contents", ()):
        client.delete_object(Bucket="images", Key=entry["Key"])
    client.delete_bucket(Bucket="images")


def test_what_is_written_is_read(s3, tmp_path):
    store = open_store("s3://images/run", s3)
    store.write("a/b.bin", b"0123456789")
    (tmp_path / "c").write_bytes(b"from a file")
    store.write("c.bin", tmp_path / "c")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.list() == ["a/b.bin", "c.bin"]
    assert store.list("a/") == ["a/b.bin"]
    assert store.sizes() == {"a/b.bin": 10, "c.bin": 11}
    assert store.exists("c.bin")
    store.delete("c.bin")
    store.delete("c.bin")
    assert not store.exists("c.bin")


def test_prefixes_do_not_see_their_neighbours(s3):
    open_store("s3://images/run-1", s3).write("x", b"1")
    assert open_store("s3://images/run", s3).list() == []


def test_a_big_file_goes_in_parts_and_comes_back_the_same(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_module, "MULTIPART_BYTES", 20 << 20)
    store = open_store("s3://images/run", s3)
    data = np.random.default_rng(1).bytes((25 << 20) + 7)
    (tmp_path / "big").write_bytes(data)
    store.write("big", tmp_path / "big")
    store.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "big"]


def pieces(data: bytes, size: int):
    return (memoryview(data)[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [0, 5, 5 << 20, (11 << 20) + 3])
def test_a_stream_of_any_length_comes_back_the_same(s3, monkeypatch, size):
    monkeypatch.setattr(s3_module, "STREAM_BYTES", 5 << 20)
    store = open_store("s3://images/run", s3)
    data = np.random.default_rng(2).bytes(size)
    store.write("stream", pieces(data, 1_000_003))
    assert store.read("stream") == data


def test_a_stream_is_held_a_few_parts_at_a_time(s3, monkeypatch):
    monkeypatch.setattr(s3_module, "STREAM_BYTES", 5 << 20)
    store = open_store("s3://images/run", s3)
    sent = []
    place = store._client.meta.events
    place.register("before-call.s3.UploadPart", lambda **_: sent.append(1), "count")
    ahead = []

    def produced():
        for number in range(1, 41):
            ahead.append(number - 5 * len(sent))
            yield memoryview(bytes(1 << 20))

    store.write("stream", produced())
    place.unregister("before-call.s3.UploadPart", unique_id="count")
    assert len(sent) == 8
    assert max(ahead) <= 5 * (s3_module.STREAM_PARTS + 2)


def test_a_stream_that_breaks_off_leaves_neither_object_nor_upload(s3, monkeypatch):
    monkeypatch.setattr(s3_module, "STREAM_BYTES", 5 << 20)
    store = open_store("s3://images/run", s3)

    def breaking():
        yield memoryview(bytes(12 << 20))
        raise RuntimeError("broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        store.write("stream", breaking())
    assert store.list() == []
    assert not store._client.list_multipart_uploads(Bucket="images").get("Uploads")


def test_uploads_of_killed_writers_are_swept_and_their_neighbours_left_alone(s3):
    store = open_store("s3://images/run", s3)
    for key in ("run/step-1/x", "run/other", "run-2/step-1/x"):
        store._client.create_multipart_upload(Bucket="images", Key=key)
    store.sweep("step-")
    left = store._client.list_multipart_uploads(Bucket="images")["Uploads"]
    assert {upload["Key"] for upload in left} == {"run/other", "run-2/step-1/x"}


def test_a_store_travels_to_another_process(s3):
    open_store("s3://images/run", s3).write("x", b"1")
    again = pickle.loads(pickle.dumps(open_store("s3://images/run", s3)))
    assert again.read("x") == b"1"


def test_a_conditional_write_never_overwrites(s3, tmp_path):
    store = open_store("s3://images/run", s3)
    store.write("manifest.json", b"first", only_if_absent=True)
    (tmp_path / "second").write_bytes(b"second")
    for data in (b"second", tmp_path / "second"):
        with pytest.raises(ObjectExists):
            store.write("manifest.json", data, only_if_absent=True)
    assert store.read("manifest.json") == b"first"


def test_a_missing_object_is_said_so(s3, tmp_path):
    store = open_store("s3://images/run", s3)
    for attempt in (
        lambda: store.read("none"),
        lambda: store.read_range("none", 0, 1),
        lambda: store.size("none"),
        lambda: store.download("none", tmp_path / "none"),
    ):
        with pytest.raises(MissingObject, match=r"no such object: s3://images/run/none"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_a_range_beyond_the_end_is_never_short(s3):
    store = open_store("s3://images/run", s3)
    store.write("x", b"0123")
    for offset, length in ((2, 9), (50, 1)):
        with pytest.raises(TruncatedObject):
            store.read_range("x", offset, length)


def test_a_missing_bucket_is_one_line(s3, tmp_path):
    for attempt in (
        lambda store: store.list(),
        lambda store: store.read("x"),
        lambda store: store.write("x", b""),
        lambda store: store.exists("x"),
        lambda store: store.size("x"),
        lambda store: store.download("x", tmp_path / "x"),
    ):
        with pytest.raises(UserError, match="there is no bucket no-such-bucket") as error:
            attempt(open_store("s3://no-such-bucket/run", s3))
        assert not isinstance(error.value, MissingObject)


def test_a_missing_bucket_is_not_advised_to_be_packed_into(s3):
    with pytest.raises(UserError, match="there is no bucket no-such-bucket") as error:
        Index.load("s3://no-such-bucket/faces", s3)
    assert "pack" not in str(error.value)


def test_a_bucket_is_asked_for_once_and_only_after_an_object_was_missing(s3, monkeypatch):
    asked = []
    store = open_store("s3://images/run", s3)
    client = store._client
    monkeypatch.setattr(client, "head_bucket", lambda **place: asked.append(place))
    store.write("x", b"1")
    assert store.exists("x")
    assert not asked
    assert not store.exists("y")
    assert not store.exists("z")
    assert asked == [{"Bucket": "images"}]


@pytest.mark.parametrize("url", ["s3://", "s3://key:secret@bucket/x", "s3://bucket/x?versionId=1"])
def test_addresses_that_are_none_are_refused_without_repeating_them(url):
    with pytest.raises(UserError) as error:
        open_store(url, S3Config())
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://[my-bucket]/faces", "s3://<bucket>/x", "s3://faces/\udcff"])
def test_a_bucket_that_cannot_be_is_one_line_that_names_the_address(url):
    with pytest.raises(UserError) as error:
        open_store(url, S3Config())
    assert url.encode("ascii", "backslashreplace").decode().split("/")[2] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "endpoint", ["http://[::1", "http://host:port", "http://host:99999", "http://a b", "http://", "x"]
)
def test_an_endpoint_that_cannot_be_is_one_line_that_names_it(endpoint):
    with pytest.raises(UserError, match="endpoint") as error:
        open_store("s3://bucket/x", S3Config(endpoint_url=endpoint))
    assert endpoint in str(error.value)


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "http://user:secret@host:1", "ftp://host", "http://u:secret@[::1"]
)
def test_endpoints_that_are_none_are_refused(endpoint):
    with pytest.raises(UserError, match="endpoint") as error:
        open_store("s3://bucket/x", S3Config(endpoint_url=endpoint))
    assert "secret" not in str(error.value)


def test_an_unreachable_endpoint_is_one_line_in_bounded_time(s3):
    store = open_store("s3://images/run", S3Config(endpoint_url="http://127.0.0.1:9", max_attempts=2, timeout_s=2))
    for attempt in (store.list, lambda: store.read("x"), lambda: store.write("x", b"1")):
        with pytest.raises(EnvironmentFault, match=r"cannot reach S3 at http://127.0.0.1:9 after 2 tries") as error:
            attempt()
        assert SECRET not in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_keys_are_one_line(s3, server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3_module._client.cache_clear()
    with pytest.raises(UserError, match=r"set AWS_ACCESS_KEY_ID.*s3.anonymous=true \(--no-sign-request\)"):
        open_store("s3://images/run", S3Config(endpoint_url=server, max_attempts=1)).read("x")
    s3_module._client.cache_clear()


def test_a_public_bucket_is_read_without_keys(s3, server, monkeypatch, tmp_path):
    private = open_store("s3://images/run", s3)
    private.write("x", b"1")
    private._client.put_bucket_acl(Bucket="images", ACL="public-read")
    private._client.put_object_acl(Bucket="images", Key="run/x", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3_module._client.cache_clear()
    public = open_store("s3://images/run", S3Config(endpoint_url=server, max_attempts=1, anonymous=True))
    assert public.read("x") == b"1"
    assert public.list() == ["x"]
    assert pickle.loads(pickle.dumps(public)).read("x") == b"1"
    s3_module._client.cache_clear()


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Refuses every request, and records whether it was signed."""

    signed: ClassVar[list[bool]] = []

    def do_GET(self):
        self.signed.append("Authorization" in self.headers)
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("anonymous", "remedy"), [(True, "set the AWS_\\* keys"), (False, "s3.anonymous=true")])
def test_a_refusal_names_the_other_way_and_nothing_is_signed_unasked(s3, anonymous, remedy):
    _Refusing.signed = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{refusing.server_port}"
        with pytest.raises(UserError, match=remedy):
            open_store("s3://images", S3Config(endpoint_url=endpoint, max_attempts=1, anonymous=anonymous)).read("x")
        refusing.shutdown()
    assert _Refusing.signed == [not anonymous]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_dead_proxy_is_named_with_its_variable_and_the_way_around_it(s3, server, monkeypatch, variable):
    open_store("s3://images/run", s3).write("x", b"1")
    monkeypatch.setenv(variable, "http://user:hunter2@127.0.0.1:9")
    s3_module._client.cache_clear()
    with pytest.raises(EnvironmentFault, match=variable) as error:
        open_store("s3://images/run", s3).read("x")
    assert "the proxy http://***@127.0.0.1:9 of the variable" in str(error.value)
    assert "export NO_PROXY=127.0.0.1" in str(error.value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    s3_module._client.cache_clear()
    assert open_store("s3://images/run", s3).read("x") == b"1"
    s3_module._client.cache_clear()


class _Faulty(http.server.BaseHTTPRequestHandler):
    """Answers GET with what `script` says, in turn; the last answer is repeated."""

    script: tuple[str, ...] = ()
    requests = 0
    body = b"0123456789" * 1000

    def do_GET(self):
        fault = self.script[min(type(self).requests, len(self.script) - 1)]
        type(self).requests += 1
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: 10 if fault == "cut" else None])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def faulty(s3):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def open_with(*script):
        _Faulty.script, _Faulty.requests = script, 0
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        return open_store("s3://images/run", S3Config(endpoint_url=endpoint, max_attempts=4, timeout_s=5))

    yield open_with
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("script", [("cut", "whole"), ("503", "whole"), ("503", "cut", "whole")])
def test_a_passing_fault_is_retried(faulty, script):
    assert faulty(*script).read("x") == _Faulty.body
    assert _Faulty.requests == len(script)


def test_a_body_that_is_always_cut_is_never_accepted(faulty):
    with pytest.raises(EnvironmentFault):
        faulty("cut").read("x")
    assert _Faulty.requests == 4


def test_a_server_that_always_fails_is_left_after_the_allowed_tries(faulty):
    with pytest.raises(EnvironmentFault, match="after the allowed tries"):
        faulty("503").read("x")
    assert _Faulty.requests == 4


@pytest.fixture
def packed(s3, tmp_path):
    """A data set on S3 of 40 random 16 px images in several shards, and its pixels."""
    rng = np.random.default_rng(7)
    img_NHW = rng.integers(0, 256, (40, 16, 16), np.uint8)
    np.savez(tmp_path / "source.npz", images=img_NHW)
    pack(str(tmp_path / "source.npz"), "s3://images/set", resolution=16, channels=1, shard_size_mb=0.01, s3=s3)
    return img_NHW


def test_images_come_back_from_s3_and_then_from_the_cache(s3, packed, tmp_path, monkeypatch):
    images = ImageRows("s3://images/set", s3, cache_dir=str(tmp_path / "cache"), cache_gb=0.01, memory_mb=0)
    assert len(images.index.shards) > 1
    np.testing.assert_array_equal(np.stack([images.decode(row) for row in range(40)])[:, 0], packed)

    def unreachable(*_):
        raise AssertionError("the cache holds this row")

    monkeypatch.setattr(s3_module.S3Store, "read_range", unreachable)
    np.testing.assert_array_equal(np.stack([images.decode(row) for row in range(40)])[:, 0], packed)


def test_the_loader_reads_from_s3(s3, packed, tmp_path):
    images = ImageRows("s3://images/set", s3, cache_dir=str(tmp_path / "cache"))
    rows = np.random.default_rng(3).permutation(40)
    plan = [PlannedBatch(step, rows[8 * step : 8 * step + 8], np.ones(8, np.float32)) for step in range(5)]
    for batch in batches(images, plan, threads=3, prefetch=2, max_bad=BadRows(0, 40)):
        np.testing.assert_array_equal(batch.img_BCHW[:, 0], packed[batch.rows_B])


def test_a_damaged_object_on_s3_is_named_and_never_cached(s3, packed, tmp_path):
    store = open_store("s3://images/set", s3)
    images = ImageRows("s3://images/set", s3, cache_dir=str(tmp_path / "cache"))
    shard = images.index.shards[0]
    place = int(images.index.records_N["offset"][2]) + 5
    whole = store.read(shard.file)
    store.write(shard.file, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CorruptImage, match=rf"{shard.file}: 000000002.png"):
        images.decode(2)
    store.write(shard.file, whole)
    np.testing.assert_array_equal(images.decode(2)[0], packed[2])


def test_verify_finds_a_truncated_object_on_s3(s3, packed):
    store = open_store("s3://images/set", s3)
    assert verify("s3://images/set", s3) == []
    store.write(store.list()[-1], store.read(store.list()[-1])[:600])
    assert any("000" in str(fault) for fault in verify("s3://images/set", s3))


def test_sources_on_s3_are_read_in_place(s3, tmp_path):
    """A folder, a zip, a tar and a parquet file on S3 give the data set that the local folder gives."""
    rng = np.random.default_rng(8)
    store = open_store("s3://images/in", s3)
    (tmp_path / "in").mkdir()
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
    pngs = {path.name: path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in pngs.items():
            archive.writestr(name, data)
            tar.add(tmp_path / "in" / name, name)
            store.write(f"folder/{name}", data)
    images = [{"bytes": data, "path": name} for name, data in pngs.items()]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "x.parquet")
    for name in ("x.zip", "x.tar", "x.parquet"):
        store.write(name, tmp_path / name)
    options = {"resolution": 16, "name": "set"}
    local = pack(str(tmp_path / "in"), str(tmp_path / "set"), **options)
    for name in ("folder", "x.zip", "x.tar", "x.parquet"):
        index = pack(f"s3://images/in/{name}", f"s3://images/out/{name}", s3=s3, **options)
        assert index.shards == local.shards


def test_an_interrupted_pack_to_s3_goes_on(s3, tmp_path):
    rng = np.random.default_rng(9)
    np.savez(tmp_path / "source.npz", images=rng.integers(0, 256, (40, 16, 16), np.uint8))
    options = {"resolution": 16, "channels": 1, "shard_size_mb": 0.01, "s3": s3}

    def interrupt(done, total):
        if done == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(tmp_path / "source.npz"), "s3://images/set", progress=interrupt, **options)
    assert not open_store("s3://images/set", s3).exists("index.json")
    index = pack(str(tmp_path / "source.npz"), "s3://images/set", **options)
    other = pack(str(tmp_path / "source.npz"), str(tmp_path / "set"), **(options | {"s3": None}))
    assert index.fingerprint == other.fingerprint


def test_keys_that_others_named_are_read_as_they_are(s3, tmp_path):
    """A program that joins `prefix/` and `/key` leaves `faces//1.png`; a Windows program leaves backslashes."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(buffer, "PNG")
    client = s3_module._client(s3, s3.endpoint_url)
    for key in ("faces//1.png", "faces//a//2.png", "faces/b\\3.png", "faces/4.png", "faces//.git/5.png"):
        client.put_object(Bucket="images", Key=key, Body=buffer.getvalue())
    index = pack("s3://images/faces", str(tmp_path / "set"), resolution=16, s3=s3)
    assert (index.rows, in_words(index.header.left_out)) == (4, "1 in hidden folders (/.git/)")
    store = open_store("s3://images/faces", s3)
    assert store.read("/1.png") == buffer.getvalue()
    for attempt in (store.delete, lambda key: store.write(key, b"")):
        for key in ("/1.png", "b\\3.png"):
            with pytest.raises(UserError, match="not a usable file name"):
                attempt(key)


def test_a_key_that_http_would_change_is_named_with_the_way_out(s3):
    with pytest.raises(UserError, match=r"s3://images/a/\.\./b is not a usable .* copy the object to a key without"):
        open_store("s3://images", s3).read("a/../b")


def test_held_out_images_and_labels_live_on_s3_as_in_a_folder(s3, tmp_path):
    """Packed after an interruption, verified, read, packed again from there, and found by a run's configuration."""
    from glann.config.run import load
    from glann.datasets.reader import read_labels
    from glann.metrics.reference import held_out_images

    images = np.random.default_rng(5).integers(0, 256, (200, 28, 28), np.uint8)
    np.savez(tmp_path / "in.npz", images=images, labels=np.arange(200))
    options = {"resolution": 28, "channels": 1, "shard_size_mb": 0.03, "holdout": 0.2, "name": "x"}
    url = "s3://images/sets/x"

    def stop(done, total):
        if done == 150:
            raise InterruptedError("stopped")

    with pytest.raises(Exception, match="stopped"):
        pack(str(tmp_path / "in.npz"), url, s3=s3, progress=stop, **options)
    index = pack(str(tmp_path / "in.npz"), url, s3=s3, **options)
    local = pack(str(tmp_path / "in.npz"), str(tmp_path / "local"), **options)
    assert index.header == local.header
    files = {
        path.relative_to(tmp_path / "local").as_posix() for path in (tmp_path / "local").rglob("*") if path.is_file()
    }
    assert set(open_store(url, s3).list()) == files
    assert verify(url, s3) == []
    assert (read_labels(url, s3).value_NL == read_labels(str(tmp_path / "local")).value_NL).all()
    config = load("digits", changes={"data.url": url, "data.cache_dir": str(tmp_path / "cache")})
    unseen = held_out_images(config.model_copy(update={"s3": s3}), index)
    held_out = {unseen.decode(row).tobytes() for row in range(len(unseen))}
    assert held_out <= {image.tobytes() for image in images}
    again = pack(url, str(tmp_path / "again"), resolution=28, channels=1, s3=s3)
    assert again.held_out.rows == len(unseen)
    open_store(f"{url}/held-out", s3).delete("index.json")
    assert [fault.shard for fault in verify(url, s3)] == ["held-out"]
    with pytest.raises(UserError, match="held-out images of x are not at s3://images/sets/x/held-out"):
        held_out_images(config.model_copy(update={"s3": s3}), index)
