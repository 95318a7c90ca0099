"""Open the source at an address: a named asset, a folder, an archive or a file of arrays."""

from __future__ import annotations

import dataclasses
import re
from typing import NoReturn

from ...config.paths import expand
from ...config.sections import S3Config
from ...errors import EnvironmentFault, UserError
from ...storage.base import Store, split_url
from ...storage.open import open_store
from .arrays import array_source, npz_source, read_idx
from .base import Source
from .names import Rules


def open_source(source: str, s3: S3Config | None = None, rules: Rules | None = None) -> Source:
    """Open the images at `source`: a named asset, or a local path or s3:// URL of a folder or file.

    Images of folders and archives are in the natural order of their names (2.jpg before 10.jpg).

    Args:
        rules: which names are pictures, in folders and archives.
    Raises:
        UserError: no images there, or an unknown format.
    """
    from ..assets import catalogue as assets  # only named sources need the catalogue
    from .folder import open_folder

    rules = rules or Rules()
    if source in assets.ASSETS:
        return _asset_source(source, rules)
    suffix = _suffix(source)
    if suffix or _is_file(source):
        parent, file_name = split_url(source)
        store = open_store(parent, s3)
        if not store.exists(file_name):
            _refuse_missing(source)
        return _open_file(store, file_name, suffix, rules)
    found = open_folder(open_store(source, s3), source.rstrip("/").rsplit("/", 1)[-1], rules, s3)
    return found or _refuse_missing(source)


def _asset_source(name: str, rules: Rules) -> Source:
    """The images of a named asset; held out are its test images, or those of the asset that it names."""
    from ..assets import catalogue as assets

    asset = assets.ASSETS[name]
    if asset.kind != "images":
        raise UserError(f"{name} is a set of weights, not of images")
    source = dataclasses.replace(open_source(str(assets.fetch(name)), rules=rules), name=name, asset=name)
    if asset.held_out is None:
        return source
    try:
        held_out = _asset_source(asset.held_out, rules)
    except EnvironmentFault as error:  # the training images suffice to train, and the warning is shown
        doubt = f"no held-out images, so copying will not be measured: {error}; delete the destination to pack it again"
        return dataclasses.replace(source, doubts=(*source.doubts, doubt))
    return dataclasses.replace(source, held_out=held_out)


def _is_file(source: str) -> bool:
    return "://" not in source and expand(source).is_file()


def _suffix(source: str) -> str:
    """The suffix of a file by its name, or "" for a folder."""
    if "://" not in source and expand(source).is_dir():
        return ""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower()
    for suffix in (".zip", ".npz", ".tar", ".parquet"):
        if name.endswith(suffix):
            return suffix
    return ".idx" if re.search(r"[.-]ubyte(\.gz)?$", name) else ""


def _refuse_missing(source: str) -> NoReturn:
    import difflib

    from ..assets import catalogue as assets

    names = [name for name, asset in assets.ASSETS.items() if asset.kind == "images"]
    close = difflib.get_close_matches(source, names, 1)
    hint = f"did you mean {close[0]}?" if close else "named data sets: " + ", ".join(sorted(names))
    raise UserError(f"there are no images at {source} ({hint})")


def _open_file(store: Store, file_name: str, suffix: str, rules: Rules) -> Source:
    from .archives import open_tar, open_zip
    from .parquet import open_parquet

    if suffix == ".zip":
        return open_zip(store, file_name, rules)
    if suffix == ".tar":
        return open_tar(store, file_name, rules)
    if suffix == ".parquet":
        return open_parquet(store, file_name)
    if suffix == ".npz":
        return npz_source(store, file_name)
    if suffix == ".idx":
        return array_source(file_name, read_idx(store, file_name))
    raise UserError(f"{store.url}/{file_name} is no folder, zip, tar, npz, idx (…-ubyte) or parquet file")
