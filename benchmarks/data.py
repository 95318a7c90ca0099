"""Decoded images a second on one core: ours against Pillow and webdataset's loader, from the same shards in one run.

    python benchmarks/data.py [--resolutions 256 1024 --images N]

JPEG of smooth noise, which compresses like photographs; all make batches of uint8. Ours also checks the SHA-256 of
every image; the other two do not.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset
from glann.datasets.loader import BadRows, PlannedBatch, batches
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from harness import Row, least, machine, report
from PIL import Image

BATCH = 8


def rows(resolutions: tuple[int, ...] = (256, 1024), images: int = 0, repeats: int = 3) -> list[Row]:
    """images: of each resolution; 0 is as many as have the pixels of 24 images of 1024 px."""
    torch.set_num_threads(1)
    found = []
    for side in resolutions:
        count = images or 24 * (1024 // side) ** 2
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder) / "pictures", side, count)
            packed = str(Path(folder) / "packed")
            pack(str(Path(folder) / "pictures"), packed, resolution=side, workers=1)
            shards = sorted(str(path) for path in Path(packed).rglob("*.tar"))
            sides = {
                "ours": lambda packed=packed: ours(packed),
                "Pillow": lambda shards=shards: with_pillow(shards),
                "webdataset": lambda shards=shards: with_webdataset(shards),
            }
            taken = least(sides, repeats)
        for other in ("Pillow", "webdataset"):
            work = f"decoding {count} JPEG of {side} px, one core"
            note = f"{count / taken['ours']:.0f} images/s" if other == "Pillow" else ""
            found.append(Row(work, other, taken[other], taken["ours"], "s", note=note))
    return found


def write_images(folder: Path, side: int, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-6, 7, (side, side, 3), np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=92)


def ours(packed: str) -> None:
    images = ImageRows(packed, memory_mb=0)
    order_N = np.arange(len(images))
    plan = [
        PlannedBatch(step, order_N[at : at + BATCH], np.ones(len(order_N[at : at + BATCH]), np.float32))
        for step, at in enumerate(range(0, len(images), BATCH))
    ]
    for _ in batches(images, plan, threads=1, prefetch=1, max_bad=BadRows(0.0, len(images))):
        pass


def with_pillow(shards: list[str]) -> None:
    for shard in shards:
        with tarfile.open(shard) as tar:
            held = []
            for member in tar:
                if member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
                    held.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
                if len(held) == BATCH:
                    torch.stack(held)
                    held.clear()


def with_webdataset(shards: list[str]) -> None:
    data = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg").batched(BATCH)
    for (_,) in webdataset.WebLoader(data, batch_size=None, num_workers=0):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--images", type=int, default=0)
    options = parser.parse_args()
    report(rows(tuple(options.resolutions), options.images), machine())


if __name__ == "__main__":
    main()
