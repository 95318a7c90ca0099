"""Protects the promises to scripts and logs: exit statuses, and one line of an error that holds no password."""

from __future__ import annotations

import pickle

import pytest
from glann.errors import EnvironmentFault, ExitStatus, GlannError, UserError, first_line, one_line


def test_exit_statuses_never_change():
    statuses = {status.name: int(status) for status in ExitStatus}
    assert statuses == {"OK": 0, "ENVIRONMENT": 1, "USER": 2, "BUG": 70, "STOPPED": 75, "INTERRUPTED": 130}
    assert f"{ExitStatus.STOPPED}" == "75"
    assert (UserError.exit_status, EnvironmentFault.exit_status, GlannError.exit_status) == (2, 1, 1)
    assert pickle.loads(pickle.dumps(ExitStatus.USER)) is ExitStatus.USER


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (ValueError("bad\n  value:\t3\n"), "bad value: 3", "bad"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError("x" * 300), "x" * 200, "x" * 200),
    ],
)
def test_an_error_becomes_one_line(error, whole, first):
    assert one_line(error) == whole
    assert first_line(error) == first


def test_a_password_is_removed_before_the_line_is_cut():
    error = ValueError("no answer from s3://ada:" + "secret" * 5 + "@host/bucket")
    for line in (one_line(error, 40), first_line(error, 40)):
        assert line == "no answer from s3://***@host/bucket"
