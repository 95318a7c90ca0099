"""The run folder has a copy beside its checkpoints, and a driver on another machine resumes with it."""

import json

import pytest
from glann.config.run import validate
from glann.errors import EnvironmentFault, UserError
from glann.storage.open import open_store
from glann.tracking.outbox import OutboxState
from glann.tracking.runs import _state_of
from glann.trainers.run.mirror import RunMirror, take_back


def config(tmp_path, machine):
    return validate(
        {
            "name": "night",
            "runs_dir": str(tmp_path / machine),
            "data": {"url": "x", "resolution": 32},
            "generator": {"kind": "infogan"},
            "glo": {"epochs": 1},
            "checkpoint": {"url": str(tmp_path / "store")},
        },
        "test",
    )


def fill(folder):
    for name, text in {
        "config.yaml": "name: night\n",
        "metrics.jsonl": '{"stage":"glo","step":1}\n',
        "tracking.json": OutboxState(key="k", uri="u", sent_bytes=25).model_dump_json(),
        "images/glo-epoch-001-samples.png": "p",
        "model/model.json": "{}",
        "ray/workers/x": "not ours",
        ".lock": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_another_machine_finds_the_same_folder(tmp_path):
    first, second = config(tmp_path, "first"), config(tmp_path, "second")
    assert not take_back(second)
    fill(first.run_dir)
    mirror = RunMirror(first)
    mirror.send_soon()
    mirror.close(pytest.fail)
    assert take_back(second)
    found = sorted(path.relative_to(second.run_dir).as_posix() for path in second.run_dir.rglob("*") if path.is_file())
    assert found == [
        "config.yaml",
        "images/glo-epoch-001-samples.png",
        "metrics.jsonl",
        "model/model.json",
        "tracking.json",
    ]
    assert (second.run_dir / "metrics.jsonl").read_bytes() == (first.run_dir / "metrics.jsonl").read_bytes()
    assert not take_back(second)  # the folder that is there counts


def test_only_what_changed_is_copied_again_and_a_store_that_is_away_is_reported(tmp_path, monkeypatch):
    settings = config(tmp_path, "first")
    fill(settings.run_dir)
    mirror = RunMirror(settings)
    written = []
    keep = mirror.store.write

    def write(key, data, **options):
        written.append(key)
        keep(key, data, **options)

    monkeypatch.setattr(mirror.store, "write", write)
    mirror.send(mirror.store)
    assert written[:2] == ["tracking.json", "metrics.jsonl"]
    written.clear()
    (settings.run_dir / "metrics.jsonl").write_text('{"stage":"glo","step":1}\n{"stage":"glo","step":2}\n')
    mirror.send(mirror.store)
    assert written == ["metrics.jsonl"]

    def away(*_, **__):
        raise EnvironmentFault("the store is away")

    monkeypatch.setattr(mirror.store, "write", away)
    (settings.run_dir / "config.yaml").write_text("name: night\nseed: 1\n")
    mirror.send_soon()
    said = []
    mirror.close(said.append)
    assert len(said) == 1
    assert "the store is away" in said[0]


def test_a_copy_cut_short_is_taken_whole_the_next_time(tmp_path, monkeypatch):
    first, second = config(tmp_path, "first"), config(tmp_path, "second")
    fill(first.run_dir)
    RunMirror(first).close(pytest.fail)
    broken = open_store(str(tmp_path / "store" / "night"))
    monkeypatch.setattr("glann.trainers.run.mirror.mirror_store", lambda _: broken)
    download = broken.download

    def cut(key, path):
        if key == "tracking.json":
            raise EnvironmentFault("cut")
        download(key, path)

    monkeypatch.setattr(broken, "download", cut)
    with pytest.raises(EnvironmentFault, match="cut"):
        take_back(second)
    monkeypatch.setattr(broken, "download", download)
    assert take_back(second)


def test_a_hostile_copy_writes_nothing_outside(tmp_path, monkeypatch):
    settings = config(tmp_path, "first")
    store = open_store(str(tmp_path / "store"))
    hostile = ["../../outside", "images/../../../outside", "/etc/outside", ".lock", "checkpoints/step-000001/x"]
    monkeypatch.setattr(store, "list", lambda prefix="": ["config.yaml", *hostile])
    monkeypatch.setattr("glann.trainers.run.mirror.mirror_store", lambda _: store)
    taken = []
    monkeypatch.setattr(store, "download", lambda key, path: taken.append(path))
    with pytest.raises(UserError, match="must be relative"):
        take_back(settings)
    hostile.remove("/etc/outside")
    assert take_back(settings)
    assert taken == [settings.run_dir / "config.yaml"]


def test_what_an_older_copy_of_the_journal_lacks_is_not_taken_for_sent(tmp_path):
    OutboxState(key="k", uri="u", sent_bytes=1000).save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "glo", "step": 1}) + "\n")
    assert _state_of(tmp_path, "u").sent_bytes == (tmp_path / "metrics.jsonl").stat().st_size
