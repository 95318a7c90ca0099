"""Parquet files in Hugging Face's format of image data sets: a column of struct {bytes, path}."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ...errors import UserError, first_line
from ...storage.base import Store
from ...storage.seekable import open_file
from ..codec import BadImage
from ..decoding.picture import is_picture
from ..left_out import LeftOut
from .base import Item, Source, identity, natural

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 32  # rows in memory at a time; images may be full-size photographs


class Inspected(NamedTuple):
    """Parquet files by what is in them."""

    columns: dict[str, tuple[str, int]]  # of those with images: the column and the number of rows
    without: dict[str, UserError]  # of the others: why they have none


def open_parquet(store: Store, key: str) -> Source:
    """The images of one parquet file."""
    found = Inspected({key: _inspect(store, key)}, {})
    return parquet_source(store, key.removesuffix(".parquet"), {key: store.size(key)}, found, ())


def inspected(store: Store, keys: Iterable[str]) -> Inspected:
    """Which of these files have a column of images, by their schema and by a look at one image of each column."""
    found = Inspected({}, {})
    looks: dict[str, bool] = {}
    for key in sorted(keys, key=natural):
        try:
            column, rows = _inspect(store, key)
            if column not in looks:
                looks[column] = _shows_images(store, key, column)
            if not looks[column]:
                raise UserError(f"{store.url}/{key}: its column {column} holds no pictures (perhaps only their paths)")
            found.columns[key] = column, rows
        except UserError as error:
            found.without[key] = error
    return found


def _shows_images(store: Store, key: str, column: str) -> bool:
    """Whether the first value of a column is a picture."""
    for item in _rows(store, key, column, 0):
        with contextlib.suppress(BadImage):  # an empty row
            return is_picture(bytes(item.read()))
    return False


def parquet_source(
    store: Store, name: str, sizes: dict[str, int], found: Inspected, left_out: tuple[LeftOut, ...]
) -> Source:
    """The images of these parquet files (key -> bytes), in natural order of the keys, split after split."""
    keys = sorted(sizes, key=natural)
    if len(keys) > 1:
        log.info("%d parquet files: %s ... %s", len(keys), keys[0], keys[-1])

    def items(start: int) -> Iterator[Item]:
        for key in keys:
            column, rows = found.columns[key]
            if start >= rows:
                start -= rows
                continue
            yield from _rows(store, key, column, start)
            start = 0

    contents = [(key, sizes[key], found.columns[key][1]) for key in keys]
    count = sum(found.columns[key][1] for key in keys)
    return Source(name, count, identity("parquet", contents), items, left_out)


def _open(store: Store, key: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_file(store, key))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{store.url}/{key} is not a readable parquet file ({first_line(error)})") from error


def _inspect(store: Store, key: str) -> tuple[str, int]:
    """The column of encoded images, as `column` or `column.bytes`, and the number of rows."""
    import pyarrow.types as types

    try:
        with _open(store, key) as file:
            columns, rows = [(column.name, column.type) for column in file.schema_arrow], file.metadata.num_rows
    except UserError:
        raise
    except Exception as error:  # a damaged schema can raise many errors, such as for names that are not text
        raise UserError(f"{store.url}/{key} is not a readable parquet file ({first_line(error)})") from error
    candidates = []
    for name, kind in columns:
        if types.is_struct(kind):
            position = kind.get_field_index("bytes")
            if position >= 0 and _is_binary(kind.field(position).type):
                candidates.append(f"{name}.bytes")
        elif _is_binary(kind):
            candidates.append(name)
    for wanted in ("image.bytes", "image", "img.bytes", "img", "jpg", "png"):
        if wanted in candidates:
            return wanted, rows
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise UserError(f"{store.url}/{key} must have a column `image` of encoded images (binary columns: {found})")
    return candidates[0], rows


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _rows(store: Store, key: str, column: str, start: int) -> Iterator[Item]:
    """The images of one file from row `start` on; earlier row groups are not read."""
    import pyarrow

    row = 0
    with _open(store, key) as file:
        for group in range(file.metadata.num_row_groups):
            try:
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                for table in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
                    values = table.column(0)
                    values = values.field("bytes") if pyarrow.types.is_struct(values.type) else values
                    for value in values:
                        if row >= start:
                            yield Item(f"{store.url}/{key}: row {row}", partial(_bytes, value))
                        row += 1
            except Exception as error:  # as above
                raise UserError(f"{store.url}/{key} is damaged in row group {group} ({first_line(error)})") from error


def _bytes(value: Any) -> bytes:
    data = value.as_py()
    if not data:
        raise BadImage("the row holds no image bytes (perhaps only a path)")
    return data
