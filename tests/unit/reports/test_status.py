"""The status of a run in words, and a status that nobody writes any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from glann.errors import UserError
from glann.reports.status import (
    FILE,
    DeviceUse,
    Status,
    devices_in_words,
    duration,
    health,
    progress,
    read_status,
    status_folder,
    summary,
    write_status,
)
from glann.storage.local import LocalStore

GIB = 1 << 30
STATUS = Status(
    name="faces",
    state="running",
    began=0.0,
    updated=1000.0,
    stage="stage 1 (GLO)",
    epoch=6,
    epochs=60,
    done=0.1,
    loss=0.2378,
    images_per_s=1004.0,
    mfu=0.34,
    left_s=12_000.0,
    checkpoint_step=7,
    checkpoint_at=760.0,
)


def device(rank: int, use: float | None, memory: float, gpu: bool = True) -> DeviceUse:
    name = "NVIDIA H100"
    return DeviceUse(rank=rank, node="a", device=name, gpu=gpu, use=use, memory=int(memory * GIB), total=int(80 * GIB))


def test_progress_in_words():
    assert progress(STATUS, 1000.0) == "epoch 6/60  3 h 20 min left  loss 0.2378  1,004 img/s  34% MFU"
    assert progress(STATUS, 4600.0).startswith("epoch 6/60  2 h 20 min left"), "the file is an hour old"
    assert health(STATUS, 1000.0) == "checkpoint 4 min ago"


@pytest.mark.parametrize(("rate", "words"), [(0.37, "0.37 img/s"), (6.449, "6.4 img/s"), (11.6, "12 img/s")])
def test_a_slow_run_is_not_shown_as_one_that_stands_still(rate, words):
    assert progress(STATUS.model_copy(update={"images_per_s": rate}), 1000.0).endswith(f"{words}  34% MFU")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "stage 1 (GLO)  epoch 6/60  loss 0.2378"),
        ({"state": "stopping"}, "stopping: stage 1 (GLO)  epoch 6/60  loss 0.2378"),
        ({"state": "stopped", "message": "by a user"}, "stopped: by a user"),
        ({"state": "finished"}, "finished"),
        (
            {"stage": "waiting for capacity", "message": "room for 1 of 2 workers", "epoch": None, "loss": None},
            "waiting for capacity: room for 1 of 2 workers",
        ),
    ],
)
def test_a_run_in_a_line(changes: dict[str, object], words: str):
    plain = STATUS.model_copy(update={"left_s": None, "images_per_s": None, "mfu": None})
    assert summary(plain.model_copy(update=changes)) == words


def test_devices_in_words():
    gpus = STATUS.model_copy(update={"devices": (device(0, 0.9, 61.0), device(1, 1.0, 40.0))})
    assert devices_in_words(gpus) == "2 GPUs 95%, 61.0 of 80.0 GiB"
    assert devices_in_words(STATUS.model_copy(update={"devices": (device(0, None, 1.0, gpu=False),)})) == (
        "1 worker, 1.0 of 80.0 GiB"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "1 h 40 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, words: str):
    assert duration(seconds) == words


def test_a_running_status_that_is_not_renewed_is_stale_and_a_finished_one_never():
    assert not STATUS.is_stale(1100.0)
    assert STATUS.is_stale(1200.0)
    assert not STATUS.model_copy(update={"state": "finished"}).is_stale(1e9)


def test_what_is_written_is_read(tmp_path: Path):
    store = LocalStore(tmp_path)
    assert read_status(store) is None
    write_status(store, STATUS)
    assert read_status(store) == STATUS


def test_a_newer_version_may_write_more_and_a_damaged_file_is_one_line(tmp_path: Path):
    (tmp_path / FILE).write_text(STATUS.model_dump_json().replace("{", '{"newer": 1, ', 1))
    assert read_status(LocalStore(tmp_path)) == STATUS
    for text in ("", "[", '{"name": 3}', "[" * 100_000):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=r"status.json is damaged") as caught:
            read_status(LocalStore(tmp_path))
        assert "\n" not in str(caught.value)


def test_it_lies_beside_the_checkpoints():
    assert status_folder("s3://bucket/runs/faces/checkpoints") == "s3://bucket/runs/faces"
