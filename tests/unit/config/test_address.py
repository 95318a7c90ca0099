"""Addresses: what looks like one and is none is refused everywhere, with the address that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from glann.config.address import address_fault, folder_fault
from glann.config.run import absolute, load
from glann.errors import UserError
from glann.tuning.load import load_study

MISSPELT = [
    ("s3:/faces/packed", "s3://faces/packed"),
    ("S3://faces/packed", "s3://faces/packed"),
    ("s3:faces/packed", "s3://faces/packed"),
    ("s3//faces/packed", "s3://faces/packed"),
    ("s3:///faces/packed", "s3://faces/packed"),
    ("s3a://faces/packed", "s3://faces/packed"),
    (" s3://faces/packed", "s3://faces/packed"),
    ('"s3://faces/packed"', "s3://faces/packed"),
    ("file:/data/faces", "file:///data/faces"),
    ("file://data/faces", "file:///data/faces"),
    ("FILE:///data/faces", "file:///data/faces"),
]
OTHERS = [
    "gs://faces/x",
    "http://host/x",
    "https:/host/x",
    "hdfs://x/y",
    "gs:faces",
    "foo:/bar",
    "a/b://c",
    "s3://",
    "",
]
LOCAL = ["data/faces", "~/faces", "./s3:/faces", "/mnt/s3/faces", "data:v2/faces", "s3", "s3/faces", "C:/faces", "a b"]
PLACES = ["data.url", "data.source", "data.cache_dir", "checkpoint.url", "runs_dir"]


@pytest.mark.parametrize(("given", "meant"), MISSPELT)
def test_a_misspelt_address_names_the_one_that_was_meant(given: str, meant: str):
    assert f"did you mean {meant}?" in address_fault(given)


@pytest.mark.parametrize("given", OTHERS)
def test_other_storage_is_refused_with_what_to_use(given: str):
    assert "s3://bucket/prefix" in address_fault(given)


@pytest.mark.parametrize("given", LOCAL)
def test_paths_stay_paths(given: str):
    assert address_fault(given) == folder_fault(given) == ""


@pytest.mark.parametrize("given", ["s3://faces", "s3://faces/a b/c", "file:///data/faces"])
def test_complete_addresses_are_taken_but_not_in_place_of_a_local_folder(given: str):
    assert address_fault(given) == ""
    assert "local folder" in folder_fault(given)


@pytest.mark.parametrize("given", ["s3://[my-bucket]/faces", "s3://<bucket>/x", "s3://-x/y", "s3://a\u00e9/y"])
def test_a_name_that_no_bucket_can_have_is_refused_with_the_address(given: str):
    assert given in address_fault(given)
    assert "no bucket can be called" in address_fault(given)


def test_a_saved_address_without_its_password_can_be_read():
    assert load("digits", ["data.url=s3://***@faces/x"]).data.url == "s3://***@faces/x"


def test_no_message_repeats_a_password_or_a_signature():
    for given in ("s3:/key:secret@faces/x", "https://faces.example/x?X-Signature=secret", "gs:/a:secret@b/c"):
        assert "secret" not in str(UserError(address_fault(given)))
        assert "secret" not in str(UserError(folder_fault(given)))


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize("given", ["s3:/faces/x", "S3://faces/x", "gs://faces/x", "http://host/x", "s3://[faces]/x"])
def test_every_key_that_takes_a_place_refuses_it_by_name(key: str, given: str):
    with pytest.raises(UserError, match=key):
        load("digits", [f"{key}={given}"])


@pytest.mark.parametrize("key", ["data.cache_dir", "runs_dir"])
def test_folders_of_this_machine_cannot_be_on_s3(key: str):
    with pytest.raises(UserError, match="must be a local folder"):
        load("digits", [f"{key}=s3://faces/x"])


def test_a_study_is_not_kept_in_a_folder_named_like_an_address(tmp_path: Path):
    study = tmp_path / "study.yaml"
    study.write_text(
        "{name: x, recipe: digits, studies_dir: 's3:/faces/x', metric: l1, space: {glo.epochs: {choices: [1, 2]}}}"
    )
    with pytest.raises(UserError, match="studies_dir"):
        load_study(study)


def test_a_home_folder_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="there is no user no-such-user-here"):
        absolute("~no-such-user-here/x")
