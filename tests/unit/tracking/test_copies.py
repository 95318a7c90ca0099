"""MLflow's SQLite database in a store: saved whole, taken on any machine, never half, never by two servers."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from pathlib import Path

import pytest
from glann.cluster.checkpoints.lease import RunTaken, hold, require
from glann.errors import EnvironmentFault, UserError
from glann.storage.open import open_store
from glann.tracking import copies, server
from glann.tracking.copies import INDEX, KEEP, Keeper, bring, read_copies


@pytest.fixture
def store(tmp_path: Path):
    return open_store(str(tmp_path / "bucket"))


def write(path: Path, *words: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        base.execute("CREATE TABLE IF NOT EXISTS runs (name TEXT)")
        base.executemany("INSERT INTO runs VALUES (?)", [(word,) for word in words])


def rows(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as base:
        return [row[0] for row in base.execute("SELECT name FROM runs")]


def keeper(store, path: Path, said: list[str] | None = None) -> Keeper:
    return Keeper(store, path, lambda: None, (said if said is not None else []).append)


def test_a_database_outlives_its_machine(store, tmp_path: Path):
    here, there = tmp_path / "one" / "mlflow.db", tmp_path / "other" / "mlflow.db"
    assert bring(store, here) == "a new database"
    write(here, "first")
    saving = keeper(store, here)
    saving.save_if_due()
    write(here, "second")
    saving.close()
    assert bring(store, there).startswith("copy 2 of 20")
    assert rows(there) == ["first", "second"]


def test_only_what_has_changed_is_saved_and_at_most_every_five_seconds(store, tmp_path: Path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(copies, "monotonic", lambda: now[0])
    path = tmp_path / "mlflow.db"
    write(path, "first")
    saving = keeper(store, path)
    saving.save_if_due()
    write(path, "second")
    saving.save_if_due()
    assert [copy.number for copy in read_copies(store)] == [1], "too soon"
    now[0] += copies.EVERY_S
    saving.save_if_due()
    assert [copy.number for copy in read_copies(store)] == [1, 2]
    now[0] += 100
    saving.save_if_due()
    assert [copy.number for copy in read_copies(store)] == [1, 2], "nothing has changed"


def test_a_large_database_is_saved_more_rarely(store, tmp_path: Path, monkeypatch):
    ticks = iter([0.0, 10.0, 10.0])  # a copy that takes ten seconds
    monkeypatch.setattr(copies, "monotonic", lambda: next(ticks))
    write(path := tmp_path / "mlflow.db", "first")
    saving = keeper(store, path)
    saving.save_if_due()
    assert saving.due == 10.0 + 10 * copies.SHARE


def test_a_copy_is_one_moment_of_a_database_that_is_being_written(store, tmp_path: Path):
    """Each transaction writes two rows: no copy has one of them."""
    write(path := tmp_path / "mlflow.db", "a", "b")
    stop = threading.Event()

    def fill() -> None:
        while not stop.is_set():
            write(path, "a", "b")
            stop.wait(0.005)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        saving = keeper(store, path)
        for _ in range(20):
            saving.save()
            bring(store, tmp_path / "other" / "mlflow.db", saving.copies[-1].number)
            assert len(rows(tmp_path / "other" / "mlflow.db")) % 2 == 0
    finally:
        stop.set()
        thread.join()


def test_a_server_killed_while_it_saves_leaves_the_copy_before(store, tmp_path: Path, monkeypatch):
    """At each of its writes to the store: what is there afterwards is the old copy, or the new one, and whole."""
    for killed_at in range(3):
        write(path := tmp_path / f"{killed_at}" / "mlflow.db", "first")
        target = open_store(str(tmp_path / f"bucket-{killed_at}"))
        saving = keeper(target, path)
        saving.save()
        write(path, "second")
        calls = iter(range(9))
        whole = target.write

        def dies(key, data, killed_at=killed_at, calls=calls, whole=whole, **how):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            whole(key, data, **how)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(target, "write", dies)
            saving.save()
        lost = tmp_path / f"new-machine-{killed_at}" / "mlflow.db"
        bring(target, lost)
        assert rows(lost) == (["first"] if killed_at < 2 else ["first", "second"])
        assert bring(target, path).startswith("the working file"), "the same machine loses nothing"
        keeper(target, path).close()
        bring(target, lost)
        assert rows(lost) == ["first", "second"]


def test_a_working_file_is_taken_unless_another_machine_went_on(store, tmp_path: Path):
    here, there = tmp_path / "one" / "mlflow.db", tmp_path / "other" / "mlflow.db"
    write(here, "first")
    keeper(store, here).close()
    write(here, "never saved")
    assert bring(store, here) == f"the working file {here}"
    bring(store, there)
    write(there, "elsewhere")
    keeper(store, there).close()
    assert bring(store, here).startswith("copy 2 ")
    assert rows(here) == ["first", "elsewhere"]
    assert rows(here.with_name("mlflow.db.before-2")) == ["first", "never saved"], "set aside, not lost"


@pytest.mark.parametrize("fault", ["cut", "flipped", "missing"])
def test_a_damaged_copy_is_refused_in_one_line_that_names_the_one_before(store, tmp_path: Path, fault: str):
    write(path := tmp_path / "one" / "mlflow.db", "first")
    saving = keeper(store, path)
    saving.save()
    write(path, "second")
    saving.save()
    copy = tmp_path / "bucket" / saving.copies[-1].key
    data = copy.read_bytes()
    if fault == "missing":
        copy.unlink()
    else:
        copy.write_bytes(data[:-100] if fault == "cut" else data[:200] + b"x" + data[201:])
    there = tmp_path / "other" / "mlflow.db"
    with pytest.raises(
        UserError,
        match=r"copies?.*000002.sqlite is damaged: .*; take an earlier one: --restore 1 \(20|"
        r"000002.sqlite is damaged: .*; take an earlier one: --restore 1 \(20",
    ) as caught:
        bring(store, there)
    assert "\n" not in str(caught.value)
    assert not there.exists()
    bring(store, there, 1)
    assert rows(there) == ["first"]
    keeper(store, there).close()
    assert [copy.number for copy in read_copies(store)][-1] == 3, "it is served from now on"
    with pytest.raises(UserError, match="has no copy 9; there are"):
        bring(store, there, 9)


def test_a_damaged_list_of_copies_is_refused_and_no_empty_database_served(store, tmp_path: Path):
    write(path := tmp_path / "mlflow.db", "first")
    saving = keeper(store, path)
    for _ in range(2):
        saving.save()
    index = tmp_path / "bucket" / INDEX
    index.write_text(index.read_text()[:-20])
    with pytest.raises(UserError, match=r"copies.json is damaged; put an earlier version of it back"):
        bring(store, tmp_path / "other" / "mlflow.db")
    index.unlink()
    with pytest.raises(UserError, match=r"copies.json is missing beside database/000002.sqlite"):
        bring(store, tmp_path / "other" / "mlflow.db")


def test_a_database_that_is_damaged_here_is_not_saved_over_the_good_ones(store, tmp_path: Path, monkeypatch):
    write(path := tmp_path / "mlflow.db", "first")
    saving = keeper(store, path)
    saving.save()
    monkeypatch.setattr(copies, "fault_of", lambda path: "row 7 missing from index")
    with pytest.raises(UserError, match="is damaged and not saved: row 7"):
        saving.save()
    assert [copy.number for copy in read_copies(store)] == [1]


def test_the_last_copies_are_kept(store, tmp_path: Path):
    write(path := tmp_path / "mlflow.db", "first")
    saving = keeper(store, path)
    for _ in range(KEEP + 2):
        saving.save()
    assert len(list((tmp_path / "bucket" / "database").glob("*.sqlite"))) == KEEP


def test_a_store_that_fails_is_waited_for_and_said_once(store, tmp_path: Path, monkeypatch):
    write(path := tmp_path / "mlflow.db", "first")
    said: list[str] = []
    saving = keeper(store, path, said)

    def fails(*given, **how):
        raise EnvironmentFault("S3 does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", fails)
        for _ in range(3):
            saving.due = 0.0
            saving.save_if_due()
    assert said == ["the MLflow database is not saved, and is tried again: S3 does not answer"]
    saving.due = 0.0
    saving.save_if_due()
    assert said[1].startswith("the MLflow database is saved again, after")
    assert len(read_copies(store)) == 1


def test_a_server_that_was_taken_over_writes_nothing(store, tmp_path: Path, monkeypatch):
    write(path := tmp_path / "mlflow.db", "first")
    with hold(store, print, "serving MLflow") as lease:
        saving = Keeper(store, path, lambda: require(store, lease.ticket), print)
        saving.save()
        (key,) = store.list("lease-")
        taken = json.loads(store.read(key)) | {"number": 2, "owner": "ab"}
        store.write("lease-000002.json", json.dumps(taken).encode())
        with pytest.raises(RunTaken):
            saving.save()
    assert [copy.number for copy in read_copies(store)] == [1]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_crashed_server_wrote_last_is_saved_or_said_to_be_here(tmp_path: Path, monkeypatch, fails: bool):
    """The end of MLflow's process is not the end of its database."""
    path = tmp_path / "here" / "mlflow.db"

    def crashes(*_):
        write(path, "last")
        if fails:
            monkeypatch.setattr(Keeper, "save", lambda self: raise_fault())
        raise EnvironmentFault("the MLflow server ended with status 1; its log is above")

    def raise_fault():
        raise EnvironmentFault("S3 does not answer")

    monkeypatch.setattr(server, "prepare", lambda path: write(path, "first"))
    monkeypatch.setattr(server, "running", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(server, "wait", crashes)
    told = rf"not be saved at the end \(S3 does not answer\); {path} has all of it" if fails else "ended with status 1"
    with pytest.raises(EnvironmentFault, match=told):
        server.serve(server.Server(str(tmp_path / "bucket"), tmp_path / "here"), print)
    if not fails:
        bring(open_store(str(tmp_path / "bucket")), tmp_path / "other" / "mlflow.db")
        assert rows(tmp_path / "other" / "mlflow.db") == ["first", "last"]


def test_two_servers_on_one_store_are_refused(store, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("glann.cluster.checkpoints.lease.RENEW_S", 0.2)
    monkeypatch.setattr("glann.cluster.checkpoints.lease.PATIENCE_S", 3.0)
    second = server.Server(str(tmp_path / "bucket"), tmp_path / "other")
    with hold(store, print, "serving MLflow"), pytest.raises(RunTaken) as caught:
        server.serve(second, print)
    assert "has been serving MLflow at" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_password_of_a_database_is_on_no_command_line():
    own = server.Server("s3://bucket/mlflow", Path("x"), "postgresql://me:planted@db/mlflow")
    assert "planted" not in " ".join(server.command(own))
    given = {"MLFLOW_TRACKING_URI": "http://other", "PATH": "/bin"}
    env = server.environment(own, "postgresql://me:planted@db/mlflow", given)
    assert env["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:planted@db/mlflow"
    assert "MLFLOW_TRACKING_URI" not in env
    assert "s3://bucket/mlflow/artifacts" in server.command(own)
