"""Errors that are reported in one line, without a traceback.

`UserError`: the input is wrong; exit status 2.  `EnvironmentFault`: storage, a server or a node
failed after the stated retries; exit status 1.
"""

from __future__ import annotations

import re

# user:password@ of an address. A password may hold a slash (SQLAlchemy takes one); a port is no password.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/:@]*:(?!\d+(?:[/\s]|$))[^\s@]*@)")


def redact(text: str) -> str:
    """The text with `user:password@` of every address in it replaced by `***@`."""
    return _CREDENTIALS.sub("***@", text)


class GlannError(Exception):
    """Base of the errors whose message says what, where and what to do. Passwords in addresses are removed."""

    exit_status = 1

    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(GlannError):
    """Invalid configuration, data or path given by the user."""

    exit_status = 2


class EnvironmentFault(GlannError):
    """Failure of storage, a server, a disk or a node that retries did not resolve."""

    exit_status = 1
