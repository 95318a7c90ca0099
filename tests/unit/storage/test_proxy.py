"""Proxies: a request that goes through one is known, with the variable to change and the command to do it."""

from __future__ import annotations

import os
import shlex

import pytest
from glann.storage.proxy import proxy_hint, proxy_of


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "url", "found"),
    [
        ("http_proxy", "http://mlflow:5000/x", True),
        ("HTTP_PROXY", "http://mlflow:5000/x", True),
        ("https_proxy", "https://s3.example", True),
        ("https_proxy", "http://mlflow:5000", False),
        ("ALL_PROXY", "http://mlflow:5000", False),
        ("http_proxy", "http://[::1", False),
        ("http_proxy", "sqlite:///mlflow.db", False),
    ],
)
def test_the_variable_of_the_scheme_counts(monkeypatch: pytest.MonkeyPatch, variable: str, url: str, found: bool):
    monkeypatch.setenv(variable, "http://proxy:3128")
    proxy = proxy_of(url)
    assert (proxy.variable if proxy else None) == (variable if found else None)


def test_all_proxy_counts_for_libraries_that_read_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("all_proxy", "http://proxy:3128")
    assert "all_proxy" in proxy_hint("http://mlflow:5000", reads_all_proxy=True)


def test_a_host_that_is_left_out_has_no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "other,.example")
    assert proxy_hint("http://mlflow.example:5000") == ""
    assert "export no_proxy=other,.example,mlflow`" in proxy_hint("http://mlflow:5000")


def test_the_remedy_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "other")
    for url in ("http://mlflow:5000", "http://[::1]:5000", "http://user:pw@10.0.0.5:5000"):
        proxy = proxy_of(url)
        assert proxy is not None
        name, _, value = shlex.split(proxy.remedy)[1].partition("=")
        monkeypatch.setenv(name, value)
        assert proxy_of(url) is None


def test_a_proxys_password_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://me:hunter2@proxy:3128")
    assert "hunter2" not in proxy_hint("http://mlflow:5000")
