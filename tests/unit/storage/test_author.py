"""Protects the name under which leases and histories are written, also in a container without user names."""

from __future__ import annotations

import os
import pwd

import pytest
from glann.storage.author import user_at_host


def test_the_user_and_the_machine_are_named(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "engine")
    assert user_at_host() == "ada@engine"


@pytest.mark.parametrize("fault", [KeyError, OSError])
def test_a_user_without_a_name_is_known_by_number(monkeypatch, fault):
    def unknown(number: int) -> None:
        raise fault(f"uid not found: {number}")

    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("socket.gethostname", lambda: "engine")
    assert user_at_host() == f"uid-{os.getuid()}@engine"
