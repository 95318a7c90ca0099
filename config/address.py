"""Spelling of places: a local path, `s3://bucket/prefix`, or `file:///path`.

A mistyped address is a valid name of a local folder: `s3:/bucket/x`, as pathlib writes it, would be made
in the working folder. So everything that looks like an address and is none is refused. A folder that
really has such a name is written `./s3:/x`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

S3, FILE = "s3://", "file://"
MAX_SHOWN = 200
_SCHEME = re.compile(r"[\s'\"<]*([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)
_NO_COLON = re.compile(r"(s3|gs|https?|file)(//)(.*)", re.DOTALL | re.IGNORECASE)
_S3_NAMES = ("s3", "s3a", "s3n")
# Schemes of storage that are also recognised without a slash (`gs:bucket`, as rclone writes it).
_SCHEMES = (*_S3_NAMES, "file", "gs", "gcs", "http", "https", "ftp", "sftp", "hdfs", "az", "abfs", "abfss", "wasb")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PASSWORD = re.compile(r"([:/])[^/@:]*:[^@]*@")  # user:password@, also where the address is incomplete
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_USE = "use a folder or s3://bucket/prefix"


def address_fault(address: str) -> str:
    """The reason why `address` is neither a local path nor a complete address, with the remedy; "" if it is one."""
    if "\0" in address:
        return "no text may hold a NUL character"
    if _unusable(address):
        return f"{shown(address)!r} is not a place for files; give a folder or s3://bucket/prefix"
    found = _SCHEME.fullmatch(address) or _NO_COLON.fullmatch(address)
    if found is None:
        return f"{shown(address)} is neither a path nor an address; {_USE}" if "://" in address else ""
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    written = address.startswith(f"{scheme}://")
    if scheme in _S3_NAMES:
        if written and scheme == "s3" and slashes == "//" and rest:
            return _bucket_fault(address, rest.partition("/")[0])
        return _unlike(address, S3 + (rest.strip(" '\">") or "bucket/prefix"))
    if scheme == "file":
        if written and len(slashes) >= 3:
            return ""
        return _unlike(address, f"{FILE}/{rest.strip(' >')}")
    if len(slashes) >= 2:
        return f"{scheme}:// addresses are not supported ({shown(address)}); {_USE}"
    if slashes or scheme in _SCHEMES:
        return f"{shown(address)} looks like an address, which is not supported; {_USE}, or ./{scheme}:... for a folder"
    return ""


def folder_fault(path: str) -> str:
    """The reason why `path` is not a local path, for places that cannot be on S3; "" if it is one."""
    fault = address_fault(path)
    if _unusable(path) or (not fault and not path.startswith((S3, FILE))):
        return fault
    meant = path.removeprefix(FILE) if path.startswith(FILE) and not fault else "a path"
    return f"{shown(path)} is an address, and this must be a local folder or file; give {meant}"


def local_path(address: str) -> Path:
    """The path of a local address: a path as it is, or that of `file:///path`."""
    return Path(unquote(address[len(FILE) :]) if address.startswith(FILE) else address)


def shown(address: str) -> str:
    """An address for a message: without parameters, which may be a signature, and shortened."""
    encodable = address.encode(errors="backslashreplace").decode()  # a path may hold bytes that are not UTF-8
    return _PASSWORD.sub(r"\1***@", encodable.partition("?")[0])[:MAX_SHOWN]


def _unusable(address: str) -> bool:
    return not address.strip() or _CONTROL.search(address) is not None


def _bucket_fault(address: str, bucket: str) -> str:
    if _BUCKET.fullmatch(bucket) or set(bucket) & set("@?#"):
        return ""  # keys and parameters are the store's to refuse: a saved configuration has ***@ for a password
    return f"{shown(address)}: no bucket can be called {shown(bucket)!r}; write s3://bucket or s3://bucket/prefix"


def _unlike(address: str, meant: str) -> str:
    return f"{shown(address)} is not a complete address; did you mean {shown(meant)}?"


def _checked_address(address: str) -> str:
    if fault := address_fault(address):
        raise ValueError(fault)
    return address


def _checked_folder(path: str) -> str:
    if fault := folder_fault(path):
        raise ValueError(fault)
    return path


Address = Annotated[str, AfterValidator(_checked_address)]
LocalPath = Annotated[str, AfterValidator(_checked_folder)]
