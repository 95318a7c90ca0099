"""Open the store at an address."""

from __future__ import annotations

import re

from ..config.sections import S3Config
from ..errors import UserError
from .base import Store
from .local import LocalStore

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(url: str, s3: S3Config | None = None) -> Store:
    """The store of a local folder (which need not exist yet) or of `s3://bucket/prefix`.

    Makes no request. `s3`: how to reach S3; None uses the defaults.
    """
    if not url or "\0" in url:
        raise UserError(f"{url!r} is not a place for files; give a folder or s3://bucket/prefix")
    if url.startswith("s3://"):
        from .s3 import S3Store  # importing boto3 takes half a second, which local runs save

        return S3Store(url, s3 or S3Config())
    if match := _SCHEME.match(url):
        if match[1].lower() != "file":
            raise UserError(f"{match[1]}:// addresses are not supported ({url}); use a folder or s3://bucket/prefix")
        url = url[len("file://") :]
    return LocalStore(url)
