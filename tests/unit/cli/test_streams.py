"""Whatever the shell made of the standard streams, a command ends with its own status and without a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from glann.cli import main as cli
from glann.trainers.run import driver

GLANN = f"{sys.executable} -m glann"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "status", "err"),
    [
        ("recipes >/dev/full", 1, "error: No space left on device\n"),
        ("recipes >&-", 0, ""),
        ("recipes <&-", 0, ""),
        ("train nothing 2>/dev/full", 2, ""),
        ("train nothing >&- 2>&-", 2, ""),
    ],
)
def test_closed_and_full_streams_change_no_status(command: str, status: int, err: str):
    done = shell(f"{GLANN} {command}")
    assert (done.returncode, done.stderr) == (status, err)


def test_a_closed_stream_does_not_become_a_file_of_the_command(tmp_path: Path):
    """Descriptor 1 is free after >&-, and what a child prints would go into the file that gets it."""
    code = (
        "import os; from glann.cli.streams import open_streams; open_streams(); f = open('x', 'w'); print(f.fileno())"
    )
    done = shell(f"cd {tmp_path}; {sys.executable} -c \"{code}; os.write(1, b'printed')\" >&-")
    assert (done.returncode, (tmp_path / "x").read_text()) == (0, "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "\\xe9\\u2603"), ("latin-1", "é\\u2603")])
def test_a_character_that_the_terminal_lacks_is_written_as_a_number(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
):
    raw = io.BytesIO()
    monkeypatch.setattr(driver, "train", lambda config, console: "é☃")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "digits"])
    assert (caught.value.code, raw.getvalue().decode(encoding)) == (0, f"{shown}\n")
