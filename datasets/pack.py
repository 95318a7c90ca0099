"""Packing of any source of images into webdataset shards with an index.

Threads decode, fit and encode (the codecs release the GIL); one writer appends the results in order to
`name-000000.tar`, so the bytes depend only on the source and the options.  `packing.json` lists the
finished shards; `index.json` is written last, and names the held-out part, which is complete before.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.sections import S3Config
from ..errors import UserError
from ..storage.files import os_fault
from ..storage.open import open_store
from .codec import CROPS, EXTENSIONS, BadImage, encode, fit
from .decoding.depth import WHOLE, UnknownRange
from .decoding.picture import Picture, decode_any
from .index import HELD_OUT, INDEX_FILE, HeldOut, Index, held_out_url
from .labels import column_names
from .left_out import UNREADABLE, LeftOut, Tally, counted, in_words, remarks_in_words
from .parts import IN_TRAINING, Layout, Part, Taker, by_content, require_both, require_share, unless_training
from .sources.base import Item, Source, identity
from .sources.labels import with_labels
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
    holdout: float | None = None  # share of the images that are held out; None: those that the source holds out

    def recipe(self, source: Source, reader: int = READER) -> str:
        """The hash of all that determines the bytes of the training images. 65,535 levels are the default."""
        options = vars(self) | {"levels": None if self.levels == WHOLE else self.levels}
        options = {key: value for key, value in options.items() if value or key not in ("levels", "holdout")}
        return identity(source.identity, [options, reader] if reader > 1 else [options])


@dataclass(frozen=True)
class Work:
    """How images are encoded: threads, what is done with unreadable ones, and whom to inform."""

    threads: int
    skip_corrupt: bool
    progress: Progress


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
    holdout: float | None = None,
    labels: str | None = None,
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
        crop: `center`, `pad`, `none`, or a number of pixels; see `codec.fit`.
        image_format: `jpeg`, `png` or `webp`; empty means png up to 64 px and jpeg above.
        quality: quality of jpeg and webp, 1 to 100.
        shard_size_mb: megabytes after which a shard is closed.
        workers: encoding threads.
        name: prefix of the shard files; empty means the last name of the destination.
        skip_corrupt: leave out images that cannot be read (each is logged) instead of raising.
        levels: the largest value of 16-bit pictures that do not state it, such as 4095; see `decoding.depth`.
        holdout: share of the images that training must not see, chosen by their bytes and packed into the folder
            `held-out` of the destination. None: the test images of a named asset or the held-out part of a packed data
            set; 0: none.
        labels: `folder`, or a file; see `sources.labels.with_labels`. None: those that the source has itself.
        include: patterns of file names that are taken although a rule of `sources.names` leaves them out.
        exclude: patterns of file names that are left out. Patterns are `fnmatch`'s, of the path below the source.
        progress: called from this thread with images done and images in all.
    Raises:
        UserError: invalid options or source, or corrupt images, which are named; in one line.
    """
    options = _options(
        destination, resolution, channels, crop, image_format, quality, shard_size_mb, name, levels, holdout
    )
    if workers < 1:
        raise UserError(f"workers={workers} is not possible: at least one is needed")
    store = open_store(destination, s3)
    images = with_labels(open_source(source, s3, rules(include, exclude)), labels, s3)
    images = _held_out_of(images, source, holdout)
    if store.exists(INDEX_FILE):
        return _same_data_set(Index.load(destination, s3), images, options, labels is not None, destination)
    for doubt in images.doubts:
        log.warning("%s", doubt)
    report = progress or (lambda done, total: None)
    try:
        with tempfile.TemporaryDirectory(prefix="glann-pack-") as folder, ExitStack() as stack:
            training, held_out = _parts(images, options, destination, Path(folder), stack, s3)
            _fill(images, options, training, held_out, Work(workers, skip_corrupt, report))
            if not training.rows:
                raise UserError(f"{source}: none of {counted(images.count, 'image')} can be read")
            return _finish(images, training, held_out)
    except OSError as error:  # of the temporary folder; the store raises its own errors
        raise os_fault(error, error.filename or tempfile.gettempdir()) from error


def _held_out_of(images: Source, source: str, holdout: float | None) -> Source:
    """The source without its own held-out images, if a share was given instead. Raises UserError if it has both."""
    if holdout is None:
        return images
    if holdout and images.held_out:
        raise UserError(
            f"{source} has {counted(images.held_out.count, 'held-out image')} of its own, which are packed without "
            "--holdout; --holdout 0 leaves them out"
        )
    require_share(holdout, images.count)
    return dataclasses.replace(images, held_out=None)


def _parts(
    images: Source, options: Options, destination: str, folder: Path, stack: ExitStack, s3: S3Config | None
) -> tuple[Part, Part | None]:
    """The training part and the held-out part, if there is one, of the data set."""
    recipe, own = options.recipe(images), images.held_out
    layout = Layout(options.name, options.resolution, options.channels, options.image_format, options.shard_bytes)
    store = open_store(destination, s3)
    training = stack.enter_context(closing(Part(store, recipe, images.count, layout, images.labels, folder)))
    if not own and not options.holdout:
        return training, None
    held_out = Part(
        open_store(held_out_url(destination), s3),
        identity(HELD_OUT, [recipe, own.identity if own else ""]),
        own.count if own else images.count,
        dataclasses.replace(layout, name=f"{options.name}-{HELD_OUT}"),
        own.labels if own else images.labels,
        folder,
    )
    return training, stack.enter_context(closing(held_out))


def _fill(images: Source, options: Options, training: Part, held_out: Part | None, work: Work) -> None:
    """Encode all images of the source into the parts, from where an earlier run stopped."""
    if held_out is None:
        _encode_all(images, options, training.add, training.position, work)
    elif images.held_out is None:
        take, start = by_content(training, held_out, options.holdout or 0), min(training.position, held_out.position)
        _encode_all(images, options, take, start, work)
        require_both(training, held_out)
    else:
        _encode_all(images, options, training.add, training.position, work)
        take = unless_training(training, held_out)
        _encode_all(images.held_out, options, take, held_out.position, work)
        require_both(training, held_out)


def _finish(images: Source, training: Part, held_out: Part | None) -> Index:
    """Complete the held-out part, then the data set, whose index names it."""
    missing, named = images.count - training.rows, None
    if held_out is not None:
        if own := images.held_out:
            missed = own.count - held_out.rows - held_out.remarks[IN_TRAINING]
            index = held_out.finish(left_out=_left_out(own, missed), asset=own.asset)
        else:
            index = held_out.finish(asset=images.asset)
            missing -= index.rows
        named = HeldOut(rows=index.rows, fingerprint=index.fingerprint)
    return training.finish(left_out=_left_out(images, missing), held_out=named, asset=images.asset)


def summary(index: Index, destination: str) -> str:
    """What was packed and what was left out, in one line."""
    shards = counted(len(index.shards), "shard")
    text = f"{counted(index.rows, 'image')} of {index.resolution} px in {shards}: {destination}"
    if index.held_out:
        text += f"; {counted(index.held_out.rows, 'image')} held out"
    if index.labels:
        text += f"; labels: {column_names(index.labels.columns)}"
    if index.header.left_out:
        text += f"; left out: {in_words(index.header.left_out)}"
    return text + (f"; {remarks_in_words(index.header.remarks)}" if index.header.remarks else "")


def _left_out(source: Source, unreadable: int) -> tuple[LeftOut, ...]:
    tally = Tally()
    tally.add_all(source.left_out)
    if unreadable:
        tally.add(UNREADABLE, count=unreadable)
    return tally.groups()


def _options(
    destination, resolution, channels, crop, image_format, quality, shard_size_mb, name, levels, holdout
) -> Options:
    image_format = image_format or ("png" if resolution <= LOSSLESS_UP_TO else "jpeg")
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", destination.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-") or "images"
    checks = (
        (1 <= resolution <= 1 << 14, f"resolution={resolution}", "a side of 1 to 16384 pixels"),
        (channels in (1, 3), f"channels={channels}", "1 (grey) or 3 (RGB)"),
        (
            crop in CROPS or re.fullmatch("[1-9][0-9]{0,4}", crop),
            f"crop={crop}",
            "center, pad, none or a number of pixels",
        ),
        (image_format in EXTENSIONS, f"format={image_format}", "one of " + ", ".join(EXTENSIONS)),
        (1 <= quality <= 100, f"quality={quality}", "1 to 100"),
        (0 < shard_size_mb <= 1 << 20, f"shard size {shard_size_mb} MB", "more than 0 MB, at most 1 TB"),
        (levels is None or 255 <= levels <= WHOLE, f"levels={levels}", f"255 to {WHOLE}"),
        (re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}", name), f"name={name}", "letters, digits and . _ -"),
    )
    for possible, given, allowed in checks:
        if not possible:
            raise UserError(f"{given} is not possible; use {allowed}")
    shard_bytes = int(shard_size_mb * 1_000_000)
    return Options(name, resolution, channels, crop, image_format, quality, shard_bytes, levels, holdout)


def _same_data_set(index: Index, images: Source, options: Options, labelled: bool, destination: str) -> Index:
    """The finished data set, if it was made from the same source with the same options, by any version.

    Args:
        labelled: whether labels were asked for. One of an earlier version has neither labels nor held-out images.
    """
    same = index.header.recipe in (options.recipe(images), options.recipe(images, 1))
    if index.labels or labelled:
        same = same and (index.labels and index.labels.source) == (images.labels and images.labels.identity)
    if options.holdout == 0:
        same = same and index.held_out is None
    if not same:
        raise UserError(
            f"{destination} already holds the data set {index.name} "
            f"({counted(index.rows, 'image')}, {index.resolution} px), "
            "made from another source or with other options; choose another destination or delete it"
        )
    return index


def _encode_all(source: Source, options: Options, take: Taker, start: int, work: Work) -> None:
    """Encode the images from a position to the end of the source, in order."""
    faults: list[str] = []
    position = min(start, source.count)
    with ThreadPoolExecutor(work.threads, thread_name_prefix="glann-pack") as pool:
        try:
            for item, future in _ahead(pool, source.items(position), options, 4 * work.threads):
                position += 1
                try:
                    data, remarks = future.result()
                except UnknownRange as error:  # all pictures of its kind would be lost
                    raise UserError(f"{item.name}: {error}") from error
                except BadImage as error:
                    faults.append(f"{item.name}: {error}")
                    log.warning("corrupt image %s", faults[-1])
                    if len(faults) >= MAX_NAMED_FAULTS and not work.skip_corrupt:
                        break
                else:
                    if work.skip_corrupt or not faults:  # after a fault the rest is only checked, to name all faults
                        take(data, position, remarks)
                work.progress(position, source.count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if faults and not work.skip_corrupt:
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
