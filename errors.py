"""Errors that are explained in one line, the exit statuses they lead to, and one-line forms of other errors.

`UserError`: the input is wrong. `EnvironmentFault`: storage, a server or a node failed, after the stated retries.
"""

from __future__ import annotations

import re
from enum import IntEnum

# user:password@ of an address. A password may hold a slash (SQLAlchemy takes one); a port is no password.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/:@]*:(?!\d+(?:[/\s]|$))[^\s@]*@)")


class ExitStatus(IntEnum):
    """Exit statuses of the `glann` command.

    0: success.
    1: environment failure (storage, server, node), or a check that found something wrong.
    2: user error (configuration, data, arguments).
    70: internal error, a bug in glann (EX_SOFTWARE of sysexits.h).
    75: stopped on request, with everything saved; the same command continues (EX_TEMPFAIL of sysexits.h).
    130: interrupted by Ctrl-C (128 + SIGINT).
    """

    OK = 0
    ENVIRONMENT = 1
    USER = 2
    BUG = 70
    STOPPED = 75
    INTERRUPTED = 130


def redact(text: str) -> str:
    """The text with `user:password@` of every address in it replaced by `***@`."""
    return _CREDENTIALS.sub("***@", text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The whole message of an error on one line, without passwords, cut to `limit` characters.

    An error without a message gives the name of its type.
    """
    return " ".join(redact(str(error)).split())[:limit] or type(error).__name__


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, as `one_line`; for libraries whose further lines are advice or context."""
    return redact(str(error) or type(error).__name__).splitlines()[0][:limit]


class GlannError(Exception):
    """Base of the errors whose message says what, where and what to do. Passwords in addresses are removed."""

    exit_status = ExitStatus.ENVIRONMENT

    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(GlannError):
    """Invalid configuration, data or path given by the user."""

    exit_status = ExitStatus.USER


class EnvironmentFault(GlannError):
    """Failure of storage, a server, a disk or a node that retries did not resolve."""

    exit_status = ExitStatus.ENVIRONMENT
