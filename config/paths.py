"""Local paths as users write them: `~`, relative paths, and addresses that are no paths."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def expand(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced.

    Raises:
        UserError: there is no such user, or this one has no home folder (no HOME, no line in /etc/passwd).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        first = Path(path).parts[0]
        if first == "~":
            raise UserError(f"{path}: this user has no home folder; set HOME, or write the whole path") from error
        raise UserError(f"{path}: there is no user {first[1:]} here; write the whole path") from error


def absolute(url: str) -> str:
    """Make a local path absolute; an address such as s3://bucket/prefix is returned as it is."""
    return url if "://" in url else str(expand(url).absolute())
