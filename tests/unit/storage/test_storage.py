"""Local storage: an object is there as a whole or not at all, keys never leave the folder, faults are one line."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading

import pytest
from glann.errors import EnvironmentFault, UserError
from glann.storage import files
from glann.storage import local as storage
from glann.storage.base import MissingObject, ObjectExists, TruncatedObject, split_url
from glann.storage.local import LocalStore
from glann.storage.open import open_store
from hypothesis import given, settings
from hypothesis import strategies as st


def test_what_is_written_is_read(tmp_path):
    store = open_store(str(tmp_path / "not" / "yet"))
    assert store.list() == []
    store.write("a/b.bin", b"0123456789")
    (tmp_path / "c").write_bytes(b"from a file")
    store.write("c.bin", tmp_path / "c")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.sizes() == {"a/b.bin": 10, "c.bin": 11}
    assert store.list("a/") == ["a/b.bin"]
    assert store.size("c.bin") == 11
    store.download("c.bin", tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == b"from a file"
    store.delete("c.bin")
    store.delete("c.bin")
    assert not store.exists("c.bin")


def test_a_stream_is_stored_as_a_whole_or_not_at_all(tmp_path):
    store = LocalStore(tmp_path)
    store.write("a", iter([memoryview(b"012"), memoryview(b""), memoryview(b"3")]))
    assert store.read("a") == b"0123"

    def breaking():
        yield memoryview(b"012")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.write("b", breaking())
    assert os.listdir(tmp_path) == ["a"]


def test_folders_go_with_their_last_file(tmp_path):
    store = LocalStore(tmp_path / "root")
    store.write("a/b/c/x", b"")
    store.write("a/y", b"")
    store.delete("a/b/c/x")
    assert os.listdir(tmp_path / "root" / "a") == ["y"]
    store.delete("a/y")
    assert os.listdir(tmp_path / "root") == []


def test_what_a_killed_writer_left_is_swept(tmp_path):
    store = LocalStore(tmp_path)
    for folder in ("step-1/a", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{files.TEMPORARY}1").write_bytes(b"half")
    (tmp_path / "step-2" / "b").mkdir(parents=True)  # killed before its first file
    store.write("step-3/c/x", b"whole")
    (tmp_path / "step-3" / "d").mkdir()
    store.sweep("step-")
    assert sorted(os.listdir(tmp_path)) == ["other", "step-3"], "an empty folder looks like a checkpoint to a user"
    assert os.listdir(tmp_path / "step-3") == ["c"], "the folder of a removed checkpoint would never become empty"
    assert os.listdir(tmp_path / "other")


def test_a_file_url_is_a_folder(tmp_path):
    open_store(f"file://{tmp_path}").write("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_missing_object_is_said_so(tmp_path):
    store = LocalStore(tmp_path)
    for attempt in (
        lambda: store.read("none"),
        lambda: store.read_range("none", 0, 1),
        lambda: store.size("none"),
        lambda: store.download("none", tmp_path / "copy"),
    ):
        with pytest.raises(MissingObject, match="no such file"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_a_range_beyond_the_end_is_never_short(tmp_path):
    store = LocalStore(tmp_path)
    store.write("x", b"0123")
    with pytest.raises(TruncatedObject):
        store.read_range("x", 2, 3)


def test_a_conditional_write_never_overwrites(tmp_path):
    store = LocalStore(tmp_path)
    store.write("x", b"first", only_if_absent=True)
    with pytest.raises(ObjectExists):
        store.write("x", b"second", only_if_absent=True)
    assert store.read("x") == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_of_many_conditional_writers_one_wins(tmp_path):
    store, won = LocalStore(tmp_path), []

    def write(number):
        try:
            store.write("x", str(number).encode(), only_if_absent=True)
            won.append(number)
        except ObjectExists:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("x") == str(won[0]).encode()


def test_an_interrupted_write_leaves_the_old_object_and_nothing_else(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.write("x", b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write("x", b"new")
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, EnvironmentFault), (errno.EACCES, UserError)])
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, number, kind):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", refuse)
    with pytest.raises(kind, match="disk full" if number == errno.ENOSPC else "no permission") as error:
        LocalStore(tmp_path).write("x", b"new")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("only_if_absent", [False, True])
def test_a_write_into_a_folder_that_is_just_emptied_succeeds(tmp_path, only_if_absent):
    """One rank gives up a save and removes its parts, and with them the folder, while another writes into it."""
    done = threading.Event()

    def empty_it_again_and_again():
        store = LocalStore(tmp_path)
        while not done.is_set():
            with contextlib.suppress(OSError):
                (tmp_path / "step" / "b").mkdir(parents=True)
            store.delete("step/b/mine")

    remover = threading.Thread(target=empty_it_again_and_again)
    remover.start()
    try:
        for round in range(500):
            store = LocalStore(tmp_path)
            store.write("step/b/yours", bytes([round % 256]), only_if_absent=only_if_absent)
            assert store.read("step/b/yours") == bytes([round % 256])
            store.delete("step/b/yours")
    finally:
        done.set()
        remover.join()


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    for key in ("a/x", "a/b/x"):
        with pytest.raises((UserError, MissingObject)) as error:
            LocalStore(tmp_path).write(key, b"")
        assert "\n" not in str(error.value)
        assert str(tmp_path / "a") in str(error.value)


def test_files_that_are_still_written_are_neither_listed_nor_swept(tmp_path):
    with storage.temporary_beside(tmp_path / "x") as temporary:
        temporary.write(b"half")
        LocalStore(tmp_path).write("y", b"")
        assert LocalStore(tmp_path).list() == ["y"]
        assert os.path.exists(temporary.name)
    assert os.listdir(tmp_path) == ["y"]


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from glann.storage.files import temporary_beside\n"
        "with temporary_beside(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert len(os.listdir(tmp_path)) == 1
    LocalStore(tmp_path).write("y", b"")
    assert os.listdir(tmp_path) == ["y"]


def test_folders_that_link_to_themselves_are_listed_once(tmp_path):
    LocalStore(tmp_path).write("a/x", b"1")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert LocalStore(tmp_path).list() == ["a/x"]


@pytest.mark.parametrize("gone", ["step-1", "step-1/a", "step-1/a/x"])
def test_what_is_removed_while_it_is_listed_is_left_out(tmp_path, monkeypatch, gone):
    """One rank may remove an old checkpoint at the moment in which another one looks for a new one."""
    store = LocalStore(tmp_path)
    store.write("step-1/a/x", b"1")
    store.write("step-2/a/x", b"22")
    looks = {name: getattr(os, name) for name in ("stat", "scandir")}

    def removing(name):
        def look(path, *args, **kwargs):
            if str(path) == str(tmp_path / gone):
                shutil.rmtree(tmp_path / "step-1", ignore_errors=True)
            return looks[name](path, *args, **kwargs)

        return look

    for name in looks:
        monkeypatch.setattr(os, name, removing(name))
    assert store.sizes() == {"step-2/a/x": 2}
    assert not (tmp_path / "step-1").exists()


def test_a_prefix_is_looked_for_where_it_is(tmp_path):
    store = LocalStore(tmp_path)
    for key in ("step-1/a", "step-10/a", "step-1-old", "other/step-1/a"):
        store.write(key, b"1")
    assert store.list("step-1") == ["step-1-old", "step-1/a", "step-10/a"]
    assert store.list("step-1/") == ["step-1/a"]
    assert store.list("step-3/") == store.list("step-1-old/") == []
    with pytest.raises(UserError, match="not a usable file name"):
        store.list("../")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".", "x\0", "a/./b"])
def test_hostile_keys_are_refused(tmp_path, key):
    store = LocalStore(tmp_path / "in")
    for attempt in (store.read, store.size, store.delete, store.exists, lambda key: store.write(key, b"")):
        with pytest.raises(UserError, match="not a usable file name"):
            attempt(key)
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_backslash_is_read_but_never_written(tmp_path):
    """On other systems it would lead elsewhere; here others may have named a file so."""
    (tmp_path / "a\\..\\b").write_bytes(b"1")
    store = LocalStore(tmp_path)
    assert store.list() == ["a\\..\\b"]
    assert store.read("a\\..\\b") == b"1"
    for attempt in (store.delete, lambda key: store.write(key, b"")):
        with pytest.raises(UserError, match="not a usable file name"):
            attempt("a\\..\\b")
    assert store.read("a\\..\\b") == b"1"


def test_what_cannot_be_read_is_listed_with_its_reason(tmp_path):
    store = LocalStore(tmp_path)
    store.write("a/x", b"12")
    (tmp_path / "a" / "lost").symlink_to("/not/mounted")
    (tmp_path / "a" / "round").symlink_to("round")
    os.mkfifo(tmp_path / "pipe")
    assert sorted(store.entries()) == [
        ("a/lost", 0, "a link to /not/mounted, where nothing is"),
        ("a/round", 0, "a link to round, round in a circle"),
        ("a/x", 2, ""),
        ("pipe", 0, "a named pipe"),
    ]
    with pytest.raises(UserError, match=r"a/(lost|round) is a link to"):
        store.sizes()
    for name in ("lost", "round"):
        (tmp_path / "a" / name).unlink()
    assert store.sizes() == {"a/x": 2}


@settings(deadline=None)
@given(key=st.text())
def test_no_key_leaves_the_folder(key):
    try:
        path = LocalStore("/some/folder").path(key)
    except UserError:
        return
    assert os.path.normpath(path).startswith("/some/folder/")


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "http://host/x", "x\0y"])
def test_places_that_are_none_are_refused(url):
    with pytest.raises(UserError):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["s3:/faces/packed", "S3://faces/x", "s3:faces", "file:/x", "file://x", "foo:/x", " s3://a/b"]
)
def test_a_misspelt_address_makes_no_folder(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        open_store(url).write("x", b"1")
    with pytest.raises(UserError):
        split_url(f"{url}/x.zip")
    assert not list(tmp_path.iterdir())


def test_the_file_of_a_file_url_is_found(tmp_path):
    (tmp_path / "a b.zip").write_bytes(b"1")
    parent, name = split_url((tmp_path / "a b.zip").as_uri())
    assert open_store(parent).url == str(tmp_path)
    assert name == "a b.zip"
    assert split_url("file:///x.zip") == ("/", "x.zip")
    assert open_store((tmp_path / "a b").as_uri()).url == str(tmp_path / "a b")


def test_a_home_folder_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="there is no user no-such-user-here here; write the whole path"):
        open_store("~no-such-user-here/x")


def test_a_file_where_a_folder_should_be_is_said_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = LocalStore(tmp_path / "file")
    for attempt in (store.list, lambda: store.read("x"), lambda: store.write("x", b"")):
        with pytest.raises(UserError):
            attempt()


def test_a_folder_goes_with_its_last_file(tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.write("step-000001/a", b"1")
    store.write("step-000001/b", b"2")
    store.delete("step-000001/a")
    assert (tmp_path / "store" / "step-000001").is_dir()
    store.delete("step-000001/b")
    assert list((tmp_path / "store").iterdir()) == []
    store.delete("step-000001/b")  # already gone


@pytest.mark.parametrize("made", [0, 1, 2])
def test_a_refused_write_leaves_no_empty_folders(tmp_path, monkeypatch, made):
    """As under umask 777: the first folder is made, and nothing can be made in it; or all are, and the disk is full."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    if made == 2:
        monkeypatch.setattr(files, "fill", refuse)
        monkeypatch.setattr("glann.storage.local.fill", refuse)
    elif made:
        monkeypatch.setattr(files, "open", refuse, raising=False)
    else:
        whole = os.mkdir
        monkeypatch.setattr(
            os, "mkdir", lambda path, *more: refuse() if str(path).endswith("b") else whole(path, *more)
        )
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="no permission"):
        LocalStore(tmp_path / "a" / "b").write("packing.json", b"{}", only_if_absent=True)
    with pytest.raises(UserError, match="no permission"):
        LocalStore(tmp_path / "kept" / "a" / "b").write("packing.json", b"{}")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["pipe", "endless"])
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, name: str):
    """`--labels /dev/full` read until the memory was full, `--labels pipe` for ever."""
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    store = LocalStore(tmp_path)
    for read in (
        lambda: store.read(name),
        lambda: store.read_range(name, 0, 3),
        lambda: store.download(name, tmp_path / "copy"),
        lambda: store.write("copy", tmp_path / name),
    ):
        with pytest.raises(UserError, match="is no file to read: it is not a regular file"):
            read()
    assert not (tmp_path / "copy").exists()
