"""Addresses of S3: the parts of `s3://bucket/prefix`, and the server's endpoint."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from ..config.address import S3, address_fault
from ..config.sections import S3Config
from ..errors import UserError


def split_s3(url: str) -> tuple[str, str]:
    """The bucket and the prefix, which is empty or ends with a slash, of `s3://bucket/prefix`.

    Raises:
        UserError: no bucket can have that name, or the address holds keys or parameters.
    """
    bucket, _, path = url.removeprefix(S3).partition("/")
    if not bucket or "@" in bucket or "?" in url or "#" in url:
        raise UserError("an S3 address must be s3://bucket or s3://bucket/prefix, without keys or parameters in it")
    if fault := address_fault(url):
        raise UserError(fault)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{url[:200]!r} holds characters that are not UTF-8, which S3 does not take") from error
    return bucket, path.strip("/") + "/" if path.strip("/") else ""


def endpoint_of(s3: S3Config) -> str | None:
    """The configured endpoint, or the environment's; None means AWS, or that of the AWS profile.

    Raises:
        UserError: it is not an http address, or holds a password.
    """
    endpoint = s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        named = bool(parts.username or parts.password)
    except ValueError:  # half a bracket, or a port that is no number
        complete, named = False, "@" in endpoint
    if named:
        raise UserError("the S3 endpoint holds a user name or password; give keys by the AWS_* variables instead")
    if not complete or not endpoint.isprintable() or " " in endpoint:
        raise UserError(
            f"the S3 endpoint {endpoint[:200]!r} (--endpoint-url, s3.endpoint_url or AWS_ENDPOINT_URL) must look like "
            "https://host:port"
        )
    return endpoint
