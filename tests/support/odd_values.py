"""Odd values for options and arguments, and the folder of odd things that some of them name."""

from __future__ import annotations

import os
from pathlib import Path

LONG = "x" * 5000
VALUES = (
    *("", " ", "\n", "two\nlines", "\t", LONG, "/".join(["deep"] * 900)),
    *("é", "漢字", "①", "e\u0301", "\u202etxt", "\udcff", "\U0001f600", "\x1b[31m", "%s{0}%(x)s", "[red]x[/nothing]"),
    *("-", "--", ".", "..", "/", "~", "~nobody", "~nobody/x", "/nonexistent/x", "x/../y"),
    *("s3:/x", "s3://", "s3://b", "s3://[b]/x", "s3://b/../x", "s3://b//x", "S3://b/x", "s3://b/①"),
    *("http://[::1", "http://127.0.0.1:1", "http://127.0.0.1:99999", "http://", "ftp://h/x", "file:///x", "file://"),
    *("models:/", "models:/x", "models:/x@", "models:/tiny@champion", "models:/tiny@none", "models:/tiny/0"),
    *("models:/tiny/99999999999999999999", "models:/[x]/1", "sqlite:///folder", "sqlite://", "postgresql://h/x"),
    *("folder", "file", "pipe", "/dev/null", "/dev/full", "dangling", "loop", "file/x", "folder/x", "locked", "binary"),
    *("1e999", "nan", "-1", "00", "0x10", "1_0", "9" * 30, "2024-11-25", "12:30:45", "on", "null", "~"),
    *("{", "[1,", "a=b=c", "=", "[1, 2]", "{a: b}", "&a [*a]", "*a", "!!python/object/apply:os.system [x]", "%YAML 9"),
    *('"\\0"', '"\\ud800"', '"x\\ny"', "'", "cuda", "cuda:7", "gpu", "meta", "cpu:9", "127.0.0.1:1", "[::1]:1", "h:x"),
)
FEW_VALUES = (
    "",
    "x",
    "1e999",
    "nan",
    "-1",
    "0",
    "9" * 30,
    "\udcff",
    "1.5",
    "on",
    "12:30",
    "[1,",
    "{a: b}",
    "&a [*a]",
    "2024-11-25",
    "!!python/name:os.system",
    '"\\0"',
)  # where a number or word is wanted


def make_odd_files(folder: Path) -> None:
    """What the values name: a folder, files, a named pipe, links to nothing, and a folder that may not be read."""
    (folder / "folder").mkdir()
    (folder / "file").write_text("x: 1\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "locked").mkdir(mode=0)
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
