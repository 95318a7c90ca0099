"""The two ways in which a run may fail that are not our fault, each told in one line.

`UserError`: the input is wrong; exit status 2.  `EnvironmentFault`: the world is wrong
(storage, a server, a node) after the stated retries; exit status 1.
"""

from __future__ import annotations

import re

# user:password@ of an address. A password may hold a slash (SQLAlchemy takes one); a port is no password.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/:@]*:(?!\d+(?:[/\s]|$))[^\s@]*@)")


def redact(text: str) -> str:
    """The text with `user:password@` of every address in it replaced by `***@`."""
    return _CREDENTIALS.sub("***@", text)


class GlannError(Exception):
    """A failure that is explained by its message: what, where and what to do. Addresses lose their passwords."""

    exit_status = 1

    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(GlannError):
    """The configuration, data or a path given by the user cannot be used."""

    exit_status = 2


class EnvironmentFault(GlannError):
    """Storage, a server, a disk or a node failed, and retrying did not help."""

    exit_status = 1
