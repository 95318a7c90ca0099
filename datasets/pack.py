"""Packing of any source of images into webdataset shards with an index.

Threads decode, fit and encode (the codecs release the GIL); one writer appends the results in order to
`name-000000.tar`, so the bytes depend only on the source and the options.  `packing.json` lists the
finished shards; `index.json` is written last.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.sections import S3Config
from ..errors import UserError
from ..storage.base import Store
from ..storage.files import os_fault
from ..storage.open import open_store
from .codec import CROPS, EXTENSIONS, BadImage, encode, fit
from .decoding.depth import WHOLE, UnknownRange
from .decoding.picture import Picture, decode_any
from .index import INDEX_FILE, PACKING_FILE, Index, parse
from .left_out import UNREADABLE, LeftOut, Tally, counted, in_words, remarks_in_words
from .shards import Packing, ShardWriter
from .sources.base import Item, Source, identity
from .sources.names import rules
from .sources.open import open_source

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # images done, images in all
Encoded = tuple[bytes, tuple[str, ...]]  # an image's bytes, and remarks on its source
MAX_NAMED_FAULTS = 20
READER = 2  # changes when pictures are read in another way; 1: without colour profiles and ranges of 16 bits
LOSSLESS_UP_TO = 64  # px; up to this side PNG files are small and JPEG artefacts large


@dataclass(frozen=True)
class Options:
    """The options that determine the bytes of a packed data set, besides its source."""

    name: str
    resolution: int
    channels: int
    crop: str
    image_format: str
    quality: int
    shard_bytes: int
    levels: int | None = None  # the largest value of 16-bit pictures, if it is not all of their range

    def recipe(self, source: Source, reader: int = READER) -> str:
        """The hash of all that determines the bytes. 65,535 levels are what a picture is read with by default."""
        options = {key: value for key, value in vars(self).items() if key != "levels" or value not in (None, WHOLE)}
        return identity(source.identity, [options, reader] if reader > 1 else [options])


def pack(
    source: str,
    destination: str,
    *,
    resolution: int,
    channels: int = 3,
    crop: str = "center",
    image_format: str | None = None,
    quality: int = 95,
    shard_size_mb: float = 256.0,
    workers: int = 2,
    name: str | None = None,
    skip_corrupt: bool = False,
    levels: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    s3: S3Config | None = None,
    progress: Progress | None = None,
) -> Index:
    """Pack the images of `source` into shards at `destination`; the same call resumes after an interruption.

    Args:
        source: named asset, folder, zip, tar, npz, idx or parquet; local or s3://.
        destination: folder or s3:// prefix; empty, or with the same data set, finished or not.
        resolution: side of the packed images in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: `center`, `pad` or `none`; see `codec.fit`.
        image_format: `jpeg`, `png` or `webp`; empty means png up to 64 px and jpeg above.
        quality: quality of jpeg and webp, 1 to 100.
        shard_size_mb: megabytes after which a shard is closed.
        workers: encoding threads.
        name: prefix of the shard files; empty means the last name of the destination.
        skip_corrupt: leave out images that cannot be read (each is logged) instead of raising.
        levels: the largest value of 16-bit pictures that do not state it, such as 4095; see `decoding.depth`.
        include: patterns of file names that are taken although a rule of `sources.names` leaves them out.
        exclude: patterns of file names that are left out. Patterns are `fnmatch`'s, of the path below the source.
        progress: called from this thread with images done and images in all.
    Raises:
        UserError: invalid options or source, or corrupt images, which are named; in one line.
    """
    options = _options(destination, resolution, channels, crop, image_format, quality, shard_size_mb, name, levels)
    if workers < 1:
        raise UserError(f"workers={workers} is not possible: at least one is needed")
    store = open_store(destination, s3)
    images = open_source(source, s3, rules(include, exclude))
    recipe = options.recipe(images)
    if store.exists(INDEX_FILE):
        return _same_data_set(Index.load(destination, s3), {recipe, options.recipe(images, 1)}, destination)
    for doubt in images.doubts:
        log.warning("%s", doubt)
    packing = _begin(store, recipe, destination, images.count)
    report = progress or (lambda done, total: None)
    try:
        with tempfile.TemporaryDirectory(prefix="glann-pack-") as folder:
            writer = ShardWriter(store, packing, Path(folder), options.name, options.image_format, options.shard_bytes)
            with closing(writer):
                _encode_all(images, options, writer, workers, skip_corrupt, report)
                if not writer.rows:
                    raise UserError(f"{source}: none of {counted(images.count, 'image')} can be read")
                header = {key: getattr(options, key) for key in ("name", "resolution", "channels", "image_format")}
                left_out = _left_out(images, images.count - writer.rows)
                return parse(*writer.finish(left_out=left_out, **header), destination)
    except OSError as error:  # of the temporary folder; the store raises its own errors
        raise os_fault(error, error.filename or tempfile.gettempdir()) from error


def summary(index: Index, destination: str) -> str:
    """What was packed and what was left out, in one line."""
    shards = counted(len(index.shards), "shard")
    text = f"{counted(index.rows, 'image')} of {index.resolution} px in {shards}: {destination}"
    if index.header.left_out:
        text += f"; left out: {in_words(index.header.left_out)}"
    return text + (f"; {remarks_in_words(index.header.remarks)}" if index.header.remarks else "")


def _left_out(source: Source, unreadable: int) -> tuple[LeftOut, ...]:
    tally = Tally()
    tally.add_all(source.left_out)
    if unreadable:
        tally.add(UNREADABLE, count=unreadable)
    return tally.groups()


def _options(destination, resolution, channels, crop, image_format, quality, shard_size_mb, name, levels) -> Options:
    image_format = image_format or ("png" if resolution <= LOSSLESS_UP_TO else "jpeg")
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", destination.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-") or "images"
    checks = (
        (1 <= resolution <= 1 << 14, f"resolution={resolution}", "a side of 1 to 16384 pixels"),
        (channels in (1, 3), f"channels={channels}", "1 (grey) or 3 (RGB)"),
        (crop in CROPS, f"crop={crop}", "one of " + ", ".join(CROPS)),
        (image_format in EXTENSIONS, f"format={image_format}", "one of " + ", ".join(EXTENSIONS)),
        (1 <= quality <= 100, f"quality={quality}", "1 to 100"),
        (0 < shard_size_mb <= 1 << 20, f"shard size {shard_size_mb} MB", "more than 0 MB, at most 1 TB"),
        (levels is None or 255 <= levels <= WHOLE, f"levels={levels}", f"255 to {WHOLE}"),
        (re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}", name), f"name={name}", "letters, digits and . _ -"),
    )
    for possible, given, allowed in checks:
        if not possible:
            raise UserError(f"{given} is not possible; use {allowed}")
    return Options(name, resolution, channels, crop, image_format, quality, int(shard_size_mb * 1_000_000), levels)


def _same_data_set(index: Index, recipes: set[str], destination: str) -> Index:
    """The finished data set, if it was made from the same source with the same options, by any version."""
    if index.header.recipe not in recipes:
        raise UserError(
            f"{destination} already holds the data set {index.name} "
            f"({counted(index.rows, 'image')}, {index.resolution} px), "
            "made from another source or with other options; choose another destination or delete it"
        )
    return index


def _begin(store: Store, recipe: str, destination: str, images: int) -> Packing:
    """Read the state of the unfinished pack at the destination, or create a new one."""
    present = store.list()
    if PACKING_FILE not in present:
        if present:
            raise UserError(f"{destination} is not empty (it holds {present[0]}); choose an empty destination")
        packing = Packing(recipe=recipe)
        store.write(PACKING_FILE, packing.model_dump_json().encode(), only_if_absent=True)
        return packing
    try:
        packing = Packing.model_validate_json(store.read(PACKING_FILE))
        if packing.finished and packing.finished[-1].position > images:
            raise ValueError("it is ahead of the source")
    except ValueError as error:
        raise UserError(
            f"{destination}/{PACKING_FILE} cannot be read; delete the destination and pack again"
        ) from error
    if packing.recipe != recipe:
        raise UserError(
            f"{destination} holds an unfinished pack of another source, with other options or of another version; "
            "run that command again, choose another destination or delete it"
        )
    return packing


def _encode_all(
    source: Source, options: Options, writer: ShardWriter, workers: int, skip_corrupt: bool, progress: Progress
) -> None:
    """Encode the images from the writer's position to the end of the source, in order."""
    faults: list[str] = []
    position = writer.position
    with ThreadPoolExecutor(workers, thread_name_prefix="glann-pack") as pool:
        try:
            for item, future in _ahead(pool, source.items(position), options, 4 * workers):
                position += 1
                try:
                    data, remarks = future.result()
                except UnknownRange as error:  # all pictures of its kind would be lost
                    raise UserError(f"{item.name}: {error}") from error
                except BadImage as error:
                    faults.append(f"{item.name}: {error}")
                    log.warning("corrupt image %s", faults[-1])
                    if len(faults) >= MAX_NAMED_FAULTS and not skip_corrupt:
                        break
                else:
                    if skip_corrupt or not faults:  # after a fault the rest is only checked, to name all faults
                        writer.add(data, position, remarks)
                progress(position, source.count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if faults and not skip_corrupt:
        named = "; ".join(faults[:MAX_NAMED_FAULTS])
        more = " (and perhaps more)" if len(faults) >= MAX_NAMED_FAULTS else ""
        raise UserError(
            f"{counted(len(faults), 'corrupt image')}{more}: {named}; "
            "repair or remove them, or pack with --skip-corrupt"
        )


def _ahead(
    pool: ThreadPoolExecutor, items: Iterator[Item], options: Options, depth: int
) -> Iterator[tuple[Item, Future[Encoded]]]:
    """Yield every item with its future encoding, `depth` of them ahead of the consumer."""
    pending = deque((item, pool.submit(_encode_one, item, options)) for item in islice(items, depth))
    while pending:
        yield pending.popleft()
        pending.extend((item, pool.submit(_encode_one, item, options)) for item in islice(items, 1))


def _encode_one(item: Item, options: Options) -> Encoded:
    data = item.read()
    if isinstance(data, np.ndarray):
        picture = Picture(Image.fromarray(data[:, :, 0] if data.ndim == 3 and data.shape[2] == 1 else data))
    else:
        picture = decode_any(data, options.levels)
    img_HWC = fit(picture.image, options.resolution, options.channels, options.crop)
    return encode(img_HWC, options.image_format, options.quality), picture.remarks
