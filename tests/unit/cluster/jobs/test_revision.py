"""A run says which commit it was computed with, also as a job, which runs a copy of the package."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from glann.cluster.jobs import revision, shipping
from glann.cluster.jobs.revision import code_revision


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.example", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "glann"
    folder.mkdir()
    (folder / "__init__.py").touch()
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_checkout_says_its_commit_and_whether_it_was_changed(checkout: Path):
    commit = git(checkout, "rev-parse", "HEAD")
    assert code_revision(checkout) == commit
    (checkout / "__init__.py").write_text("x = 1\n")
    assert code_revision(checkout) == f"{commit}-dirty"


def test_the_shipped_package_has_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipping, "code_revision", lambda: "c0ffee-dirty")
    assert code_revision(shipping.stage_package(tmp_path)) == "c0ffee-dirty"
    monkeypatch.setattr(shipping, "code_revision", lambda: None)
    assert code_revision(shipping.stage_package(tmp_path / "other")) is None


def test_the_repository_of_a_user_is_not_taken_for_ours(checkout: Path):
    installed = checkout / ".venv" / "lib" / "site-packages" / "glann"
    installed.mkdir(parents=True)
    assert code_revision(installed) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [(json.dumps({"vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}), "c0ffee"), ("{}", None), (None, None)],
)
def test_an_installation_from_git_says_what_pip_recorded(tmp_path: Path, monkeypatch, text: str | None, found):
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / name, read_text=lambda name: text)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    assert revision.code_revision(tmp_path / "glann") == found
