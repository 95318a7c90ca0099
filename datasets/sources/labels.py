"""Labels of a source's images, from folder names or a file: idx, StyleGAN's JSON, CelebA's attributes, CSV.

A file is read row by row, and a row belongs to the image that it names: by its path below the source, or by its file
name alone where the row has no folder; the extension plays no part.  Legend: N images, L columns.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ...config.sections import S3Config
from ...errors import UserError, first_line
from ...storage.base import MissingObject, split_url
from ...storage.open import open_store
from ..decoding.picture import SUFFIXES
from ..labels import LABEL, MAX_COLUMNS, UNKNOWN, LabelColumn, Labels, of_column
from ..left_out import MAX_TEXT, counted, printable
from .base import Source, natural

FOLDER = "folder"
MAX_FILE_BYTES = 8 << 30
MAX_VALUES = 1_000_000  # different ones in a column
_IDX_LABELS = 0x801
_AMBIGUOUS = -2

Row = tuple[str, Sequence[str]]  # the name of an image, and a value for each column


def with_labels(source: Source, given: str | None, s3: S3Config | None = None) -> Source:
    """The source with the labels that `given` says; its own ones if that is None.

    Args:
        given: `folder`, for the names of the images' folders, or a file: an address, or a name inside the source.
    Raises:
        UserError: no such file, of no known form, or its rows are not of these images.
    """
    if given is None:
        return source
    if given == FOLDER:
        return dataclasses.replace(source, labels=_of_folders(source))
    data = _read(source, given, s3)
    if _is_idx(data):
        labels = _of_idx(given, data, source)
    else:
        text = _text(given, data)
        names, rows = _json_rows(given, text) if text.lstrip()[:1] in ("{", "[") else _table_rows(given, text)
        labels = _of_rows(given, names, rows, source)
    return dataclasses.replace(source, labels=labels)


def _of_folders(source: Source) -> Labels:
    names = _names(source)
    folders = [name.rpartition("/")[0] for name in names]
    order = sorted(set(folders), key=natural)
    if order == [""]:
        raise UserError(f"{source.name}: the images lie in no folders, so --labels folder has no names for them")
    number = {folder: at for at, folder in enumerate(order)}
    return of_column("folder", np.fromiter((number[f] for f in folders), LABEL, len(folders)), _words(order))


def _read(source: Source, given: str, s3: S3Config | None) -> bytes:
    if source.beside is not None and (data := source.beside(given)) is not None:
        return data
    parent, name = split_url(given)
    store = open_store(parent, s3)
    try:
        if store.size(name) > MAX_FILE_BYTES:
            raise UserError(f"{given} is too large for a file of labels")
        return store.read(name)
    except MissingObject as error:
        raise UserError(
            f"--labels {given}: no such file, nor one in the source; give a file of labels, or `folder`"
        ) from error


def _is_idx(data: bytes) -> bool:
    if data[:2] == b"\x1f\x8b":
        return True
    return data[:4] == _IDX_LABELS.to_bytes(4, "big")


def _of_idx(where: str, data: bytes, source: Source) -> Labels:
    """Labels of an idx1-ubyte file (LeCun's MNIST format), plain or gzipped, in the order of the images."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(8 + source.count + 1)  # one byte more than expected bounds a decompression bomb
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where} is not a complete gzip file ({first_line(error)})") from error
    if data[:4] != _IDX_LABELS.to_bytes(4, "big"):
        raise UserError(f"{where} is no idx file of labels (…-labels-idx1-ubyte)")
    stated = int.from_bytes(data[4:8], "big")
    if stated != source.count or len(data) != 8 + stated:
        raise UserError(f"{where} has {stated} labels for {counted(source.count, 'image')}; give those of these images")
    return of_column("class", np.frombuffer(data, np.uint8, offset=8))


def _text(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is no file of labels: it is neither idx nor UTF-8 text (JSON of StyleGAN, CelebA's list, or CSV)"
        ) from error


def _json_rows(where: str, text: str) -> tuple[list[str], Iterator[Row]]:
    """Rows of StyleGAN's dataset.json, {"labels": [["00000/img00000000.png", 6], ...]}, of one number or several."""
    try:
        pairs = json.loads(text)["labels"]
        rows = [(str(name), [str(_integer(part)) for part in _as_list(label)]) for name, label in pairs]
        width = len(rows[0][1])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise UserError(
            f'{where} is no file of labels: StyleGAN\'s has "labels": [[file, integer or list of integers], ...]'
        ) from error
    return (["class"] if width == 1 else [str(at) for at in range(width)]), iter(rows)


def _as_list(label: object) -> list:
    return label if isinstance(label, list) else [label]


def _integer(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or int(number) != number:
        raise ValueError(f"{number!r} is no integer")
    return int(number)


def _table_rows(where: str, text: str) -> tuple[list[str], Iterator[Row]]:
    """Rows of CelebA's list_attr_celeba.txt (a count, the names, then a file and its values), or of a CSV."""
    lines = io.StringIO(text, newline="")
    first = lines.readline().strip()
    if first.isdecimal():
        names = lines.readline().split()
        split: Iterable[list[str]] = (line.split() for line in lines)
    else:
        names = next(csv.reader([first]), [])[1:]
        split = csv.reader(lines)
    if not names:
        raise UserError(f"{where} is no file of labels: its first line must name a file column and one for each label")
    return names, ((parts[0], parts[1:]) for parts in split if parts)


def _of_rows(where: str, names: list[str], rows: Iterator[Row], source: Source) -> Labels:
    """Labels by name: columns hold numbers of their different texts first, then what these say."""
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{where} has {len(names)} columns; at most {MAX_COLUMNS} labels are kept")
    place, number, matched = _places(where, source), 0, 0
    seen: list[dict[str, int]] = [{"": UNKNOWN} for _ in names]
    value_NL = np.full((source.count, len(names)), UNKNOWN, LABEL)
    try:
        for number, (name, texts) in enumerate(rows, 1):
            if len(texts) != len(names):
                raise UserError(f"{where}: row {number} {name[:100]!r} has {len(texts)} labels, not {len(names)}")
            if (at := place(name)) is not None:
                value_NL[at] = [
                    known.setdefault(text.strip(), len(known) - 1) for known, text in zip(seen, texts, strict=True)
                ]
                matched += 1
                if max(map(len, seen)) > MAX_VALUES:
                    raise UserError(f"{where}: a column has more than {MAX_VALUES:,} different values; it is no label")
    except csv.Error as error:
        raise UserError(f"{where}: row {number + 1} cannot be read ({error})") from error
    if not matched:
        raise UserError(f"{where} names none of the images; its rows must begin with their file names")
    signs = {text for known in seen for text in known if text} == {"-1", "1"}
    columns = [
        _column(where, name, known, signs, value_NL[:, at])
        for at, (name, known) in enumerate(zip(names, seen, strict=True))
    ]
    return Labels(tuple(columns), value_NL)


def _column(where: str, name: str, known: dict[str, int], signs: bool, value_N: np.ndarray) -> LabelColumn:
    """Give a column, in place, the integers that its texts are, or else the numbers of the sorted texts.

    signs: all labels are 1 and -1, as CelebA writes yes and no; no becomes 0.
    """
    texts = sorted((text for text in known if text), key=natural)
    words: Sequence[str] = ()
    try:
        integers = [int(text) for text in texts]
    except ValueError:
        integers, words = list(range(len(texts))), _words(texts)
    if signs:
        integers = [max(0, integer) for integer in integers]
    if integers and not (min(integers) >= UNKNOWN and max(integers) < 1 << 31):
        raise UserError(f"{where}: the labels of {name[:100]!r} must be from -1 (unknown) to {(1 << 31) - 1}")
    meaning = np.full(len(known), UNKNOWN, LABEL)  # the last one is that of UNKNOWN
    for text, integer in zip(texts, integers, strict=True):
        meaning[known[text]] = integer
    value_N[:] = meaning[value_N]
    return LabelColumn(name=printable(name.strip())[:MAX_TEXT] or "label", values=tuple(words))


def _words(texts: Iterable[str]) -> list[str]:
    return [printable(text)[:MAX_TEXT] or "." for text in texts]


def _names(source: Source) -> Sequence[str]:
    if source.names is None:
        raise UserError(f"{source.name}: its images have no file names, by which --labels could find them")
    return source.names()


def _places(where: str, source: Source) -> Callable[[str], int | None]:
    """A function from the name in a row to the position of the image; None if the source does not have it."""
    by_path: dict[bool, dict[str, int]] = {}  # tables of paths and of file names, each made if a row has such a name

    def place(name: str) -> int | None:
        key = _stem(name.strip().replace("\\", "/").removeprefix("./"))
        is_path = "/" in key
        if is_path not in by_path:
            by_path[is_path] = _table(_names(source), is_path)
        at = by_path[is_path].get(key)
        if at == _AMBIGUOUS:
            raise UserError(f"{where}: {name[:100]!r} may be several images; give their paths below the source")
        return at

    _names(source)  # refuse a source without names even if there are no rows
    return place


def _table(names: Sequence[str], is_path: bool) -> dict[str, int]:
    table: dict[str, int] = {}
    for at, name in enumerate(names):
        key = _stem(name if is_path else name.rpartition("/")[2])
        table[key] = _AMBIGUOUS if key in table else at
    return table


def _stem(name: str) -> str:
    """A name without the extension of a picture."""
    stem, dot, last = name.rpartition(".")
    return stem if dot and f".{last.lower()}" in SUFFIXES else name
