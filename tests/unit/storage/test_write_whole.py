"""Protects every file that is read back later: it is there as a whole, old or new, whatever ends the writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from glann.errors import EnvironmentFault, UserError
from glann.storage import files
from glann.storage.files import TEMPORARY, read_document, replacing_folder, write_whole
from glann.storage.local import LocalStore


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("data", "stored"),
    [
        ("größer ∞ 𝛼\n", "größer ∞ 𝛼\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        ("", b""),
        (lambda file: file.write(b"by hand"), b"by hand"),
    ],
    ids=["text", "bytes", "nothing", "a writer"],
)
def test_what_was_given_is_what_is_there(tmp_path, data, stored):
    path = tmp_path / "Ünïcode 文件.txt"
    path.write_bytes(b"before")
    write_whole(path, data)
    assert path.read_bytes() == stored
    assert names(tmp_path) == [path.name]


def test_files_and_folders_have_the_modes_of_the_users_umask(tmp_path):
    """They go through temporary files, and a server of another user reads them."""
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "new")
        with replacing_folder(tmp_path / "folder") as staging:
            write_whole(staging / "inside", b"new")
        store = LocalStore(tmp_path / "store")
        store.write("a/b", b"new")
        store.download("a/b", tmp_path / "back")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {name: 0o750 if (tmp_path / name).is_dir() else 0o640 for name in modes}
    assert len(modes) == 7


def test_an_error_on_the_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def torn(file):
        file.write(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_whole(path, torn)
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["x"]


def test_a_kill_on_the_way_leaves_the_old_file_and_the_next_process_sweeps(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    script = (
        "import os, signal, sys; from pathlib import Path; from glann.storage.files import write_whole\n"
        "def torn(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(Path(sys.argv[1]), torn)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    assert any(name.startswith(TEMPORARY) for name in names(tmp_path))
    files._swept.discard(tmp_path)
    write_whole(path, "after")
    assert path.read_bytes() == b"after"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, EnvironmentFault, "disk full while writing"),
        (errno.EDQUOT, EnvironmentFault, "disk full while writing"),
        (errno.EROFS, UserError, "no permission for .*; make it accessible, or name another place"),
        (errno.EIO, EnvironmentFault, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_system_reports_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, number, kind, words, call):
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, refuse)
    with pytest.raises(kind, match=words) as error:
        write_whole(path, "after")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        write_whole(tmp_path / "x", "after")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EnvironmentFault, match="No such file"):
        write_whole(tmp_path / "missing" / "x", "after")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFault, match="folder"):
        write_whole(tmp_path / "folder", "after")


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    """A run folder of a stranger must not have other files overwritten."""
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    write_whole(tmp_path / "x", "after")
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert (tmp_path / "x").read_bytes() == b"after"


def test_writers_at_the_same_time_leave_one_of_their_files(tmp_path):
    """Of threads and of another process; a reader meanwhile never sees a part."""
    path, size = tmp_path / "x", 200_000
    write_whole(path, b"0" * size)
    script = (
        "import sys; from pathlib import Path; from glann.storage.files import write_whole\n"
        f"for _ in range(30): write_whole(Path(sys.argv[1]), b'9' * {size})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])

    def write(letter: bytes) -> None:
        for _ in range(30):
            write_whole(path, letter * size)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"1", b"2")]
    for thread in threads:
        thread.start()
    while process.poll() is None or any(thread.is_alive() for thread in threads):
        seen = path.read_bytes()
        assert len(seen) == size
        assert len({*seen}) == 1
    assert process.returncode == 0
    assert names(tmp_path) == ["x"]


def test_a_file_that_is_being_written_is_not_swept(tmp_path):
    def write(file):
        files.sweep(tmp_path)
        file.write(b"whole")

    write_whole(tmp_path / "x", write)
    assert (tmp_path / "x").read_bytes() == b"whole"


# Folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged", "renamed"])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    target = tmp_path / "model"
    for content in ("first", "second"):
        with replacing_folder(target) as folder:
            files.sweep(tmp_path)  # by another writer: what is being filled stays
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert names(target) == [content]
        assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_filled_or_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with replacing_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError, match="a bug"), replacing_folder(target):
        raise RuntimeError("a bug")
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    rename = os.rename

    def fails(source, destination):
        if Path(destination) == target and not Path(source).name.endswith("-old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), replacing_folder(target) as folder:
        (folder / "new").touch()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]


def test_a_link_or_a_file_is_not_replaced_by_a_folder(tmp_path):
    """A hostile run folder could have somebody's home moved away."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").touch()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(NotADirectoryError), replacing_folder(tmp_path / name):
            pass
    assert names(tmp_path) == ["file", "home", "link"]
    assert names(tmp_path / "home") == ["letters"]


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path):
    """Where the file system exchanges names in one step, as Linux's own do."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not files._exchanged(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two names")
    target, missing, stop = tmp_path / "model", [], threading.Event()
    target.mkdir()

    def look() -> None:
        while not stop.is_set():
            if not target.exists():
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    for number in range(50):
        with replacing_folder(target) as folder:
            (folder / str(number)).touch()
    stop.set()
    looker.join()
    assert not missing


def test_a_folder_left_by_a_killed_writer_is_swept(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from glann.storage.files import replacing_folder\n"
        "with replacing_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["model"]


# Reading -------------------------------------------------------------------------------------


def test_only_small_regular_files_are_read_as_documents(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_document(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_document(path, 4)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):  # and does not wait for a writer
        read_document(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        read_document(tmp_path)
