"""Mutated addresses in every function that takes one: a store, or one line; never a folder named like an address."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from glann.cli.options import s3_at
from glann.cluster.jobs import client as jobs
from glann.config import run as configuration
from glann.config.address import address_fault, folder_fault
from glann.config.sections import S3Config
from glann.errors import UserError
from glann.storage.base import split_url
from glann.storage.local import LocalStore
from glann.storage.open import local_folder, open_store, require_local
from glann.storage.proxy import proxy_hint
from glann.storage.s3_address import endpoint_of, split_s3
from glann.tracking import address as tracking
from hypothesis import given
from hypothesis import strategies as st

GOOD = (
    "s3://bucket/prefix/x",
    "s3://bucket",
    "file:///data/faces",
    "data/faces",
    "~/faces",
    "http://host:9000",
    "https://me:hunter2@host/path",
    "http://[::1]:5000",
    "sqlite:///mlflow.db",
    "sqlite:////data/mlflow.db?timeout=3",
    "postgresql+psycopg2://me:hunter2@host/mlflow",
    "localhost:5000",
    "gs://bucket/x",
    "models:/digits@champion",
    "models:/digits/3",
)
PIECES = ("s3", "S3", "s3a", "file", "http", "https", "sqlite", "gs", "models", ":", "/", "//", "///", "://", "@")
PIECES = (
    *PIECES,
    "@",
    "[",
    "]",
    "%20",
    "%",
    "?",
    "#",
    "..",
    ".",
    "~",
    "~x",
    " ",
    "\t",
    "\n",
    "\0",
    "\u00e9",
    "\udcff",
    "'",
)
PIECES = (*PIECES, '"', "\\", "0", "99999", "-1", "bucket", "a" * 300, "$HOME", "*", "|", ";", "{}", "<x>", "::1", "C:")
PLACES = ("data.url", "data.source", "data.cache_dir", "checkpoint.url", "runs_dir")
SCHEMES = ("s3", "s3a", "gs", "file", "http", "https", "ftp", "hdfs")


@st.composite
def addresses(draw: st.DrawFn) -> str:
    """An address with parts removed, doubled, exchanged or put in; or parts alone."""
    text = draw(st.sampled_from(GOOD))
    kind = draw(st.sampled_from(("cut", "put", "put", "exchange", "parts", "case", "text")))
    at, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    if kind == "cut":
        return text[:at] + text[end:]
    if kind == "put":
        return text[:at] + "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3))) + text[at:]
    if kind == "exchange":
        return text[:at] + draw(st.sampled_from(PIECES)) + text[end:]
    if kind == "case":
        return text[:at] + text[at:end].swapcase() + text[end:]
    return (
        "".join(draw(st.lists(st.sampled_from(PIECES), max_size=6))) if kind == "parts" else draw(st.text(max_size=40))
    )


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """Keys, so that no request is made for them, and no proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


def one_line(action: Callable[[], Any]) -> Any:
    """The result, or None if it was refused by a UserError of one line without the password."""
    try:
        return action()
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert "\n" not in message
        assert len(message) < 2000
        return None


def looks_like_an_address(path: Path) -> bool:
    """Whether the first part of a path is a scheme of storage with its colon, in any spelling."""
    first = path.parts[0].strip(" '\"<").lower() if path.parts else ""
    return any(first.startswith(f"{scheme}:") for scheme in SCHEMES)


@given(url=addresses())
def test_store(jail, url):
    def read() -> None:
        store = one_line(lambda: open_store(url))
        one_line(lambda: split_url(url))
        path = one_line(lambda: local_folder(url))
        if isinstance(store, LocalStore):
            assert not url.startswith("s3:")
            assert path == store.root
            assert not looks_like_an_address(store.root), url
        elif store is not None:
            assert url.startswith("s3://")
            one_line(lambda: split_s3(url))

    jail.read(read)


@given(url=addresses())
def test_faults(jail, url):
    def read() -> None:
        for fault in (address_fault(url), folder_fault(url)):
            assert "\n" not in fault
            assert "hunter2" not in str(UserError(fault)) or "me:hunter2@" not in url
        assert not (folder_fault(url) == "" and address_fault(url))
        one_line(lambda: require_local(url, "--out"))
        proxy_hint(url)

    jail.read(read)


@given(url=addresses())
def test_endpoint(jail, url):
    """An endpoint as the command line takes it."""
    jail.read(lambda: one_line(lambda: endpoint_of(s3_at(url, False))))
    jail.read(lambda: one_line(lambda: open_store("s3://bucket/x", s3_at(url, False))))


@given(uri=addresses())
def test_tracking(jail, uri):
    def read() -> None:
        for remedy in (tracking.FOR_RUNS, tracking.FOR_REGISTRY):
            one_line(lambda remedy=remedy: tracking.check_address(uri, remedy))
        tracking.absolute_uri(uri)
        assert str(tracking.failure(uri, "x", "y", tracking.FOR_RUNS))

    jail.read(read)


@given(url=addresses())
def test_dashboard(jail, url):
    jail.read(lambda: jobs._is_http(url))


@given(
    key=st.sampled_from(("data.url", "data.source", "data.cache_dir", "checkpoint.url", "runs_dir")), url=addresses()
)
def test_recipe(jail, key, url):
    def read() -> None:
        config = one_line(lambda: configuration.load("digits", changes={key: url}))
        if config is not None:
            absolute = one_line(config.with_absolute_paths)
            for place in (config.data.url, config.checkpoint_url, *([absolute.data.url] if absolute else [])):
                one_line(lambda place=place: open_store(place))
            assert not looks_like_an_address(config.run_dir)

    jail.read(read)


def test_good_addresses_are_taken(jail):
    """Otherwise every case would be refused for one dull reason."""
    assert [url for url in GOOD if address_fault(url)] == [
        "http://host:9000",
        "https://me:hunter2@host/path",
        "http://[::1]:5000",
        "sqlite:///mlflow.db",
        "sqlite:////data/mlflow.db?timeout=3",
        "postgresql+psycopg2://me:hunter2@host/mlflow",
        "gs://bucket/x",
        "models:/digits@champion",
        "models:/digits/3",
    ]
    assert open_store("s3://bucket/prefix").url == "s3://bucket/prefix"
    assert endpoint_of(S3Config(endpoint_url="http://[::1]:5000")) == "http://[::1]:5000"
