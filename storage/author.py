"""Who writes: the user and machine that leases and histories name."""

from __future__ import annotations

import getpass
import os
import socket


def user_at_host() -> str:
    """`user@host` of this process; `uid-1000@host` where the user has no name, as in many containers."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # before and since Python 3.13
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
