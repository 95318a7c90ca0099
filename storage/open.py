"""Open the store at an address."""

from __future__ import annotations

from pathlib import Path

from ..config.address import S3, address_fault, folder_fault, local_path
from ..config.paths import expand
from ..config.sections import S3Config
from ..errors import UserError
from .base import Store
from .local import LocalStore


def open_store(url: str, s3: S3Config | None = None) -> Store:
    """The store of a local folder (which need not exist yet) or of `s3://bucket/prefix`.

    Makes no request and no folder. `s3`: how to reach S3; None uses the defaults.

    Raises:
        UserError: the address is misspelt, or of another kind of storage.
    """
    folder = local_folder(url)
    if folder is not None:
        return LocalStore(folder)
    from .s3 import S3Store  # importing boto3 takes half a second, which local runs save

    return S3Store(url, s3 or S3Config())


def local_folder(url: str) -> Path | None:
    """The path of a local address, with `~` expanded; None for an address of S3.

    Raises:
        UserError: the address is misspelt, or of another kind of storage.
    """
    if fault := address_fault(url):
        raise UserError(fault)
    if url.startswith(S3):
        return None
    return expand(local_path(url))


def require_local(path: Path | str, what: str) -> None:
    """Raise UserError if `path` is an address of S3 or another store; `what` names the option or variable."""
    if fault := folder_fault(str(path)):
        raise UserError(f"{what}: {fault}")
