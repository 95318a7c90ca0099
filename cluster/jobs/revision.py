"""The commit of the running source: of a checkout, of a package installed from one, and of what a job was sent with."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

FILE = "REVISION"  # in a package that was shipped with a job, which has no repository
PACKAGE = Path(__file__).parents[2]


def code_revision(package: Path = PACKAGE) -> str | None:
    """The git commit of the running source, with `-dirty` if it was changed; None if it is unknown."""
    with suppress(OSError):
        return (package / FILE).read_text(encoding="utf-8").strip() or None
    return _of_checkout(package) or _of_installation(package)


def _of_checkout(package: Path) -> str | None:
    """Only if the package is the root of the repository: an installed one may lie in the repository of its user."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != package.resolve():
        return None
    commit, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit or None


def _of_installation(package: Path) -> str | None:
    """What pip recorded of `pip install git+https://...` (PEP 610)."""
    with suppress(metadata.PackageNotFoundError, ValueError, AttributeError):
        installed = metadata.distribution("glann")
        if Path(str(installed.locate_file("glann"))).resolve() == package.resolve():
            return json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return None


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # git is missing or hangs: the revision is unknown
        return None
    return done.stdout.strip() if done.returncode == 0 else None
