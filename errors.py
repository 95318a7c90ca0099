"""The two ways in which a run may fail that are not our fault, each told in one line.

`UserError`: the input is wrong; exit status 2.  `EnvironmentFault`: the world is wrong
(storage, a server, a node) after the stated retries; exit status 1.
"""

from __future__ import annotations


class GlannError(Exception):
    """A failure that is explained by its message: what, where and what to do."""

    exit_status = 1


class UserError(GlannError):
    """The configuration, data or a path given by the user cannot be used."""

    exit_status = 2


class EnvironmentFault(GlannError):
    """Storage, a server, a disk or a node failed, and retrying did not help."""

    exit_status = 1
