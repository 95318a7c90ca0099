"""Previews are of the same rows and the same noise, however many workers draw them, and are put together whole."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from glann.cluster.placement import ranges
from glann.config.run import Config
from glann.datasets.reader import CorruptImage
from glann.models.generators import build_generator
from glann.models.mapping import build_mapping
from glann.samplers.gaussian import gaussian
from glann.trainers import previews
from glann.trainers.previews import Previews, shown_rows
from glann.trainers.run.assembly import Assembly, sheets_of
from glann.trainers.run.events import Preview
from PIL import Image, ImageChops

ROWS, DIM = 103, 5


def make_config(resolution: int = 28, shown: int = 10) -> Config:
    kind = "infogan" if resolution < 128 else "resnet"
    return Config.model_validate(
        {
            "name": "previewed",
            "data": {"url": "data", "resolution": resolution, "channels": 1},
            "generator": {"kind": kind, "latent_dim": DIM, "width": 4, "max_width": 8},
            "sampler": {"kind": "imle", "noise_dim": 3, "hidden_dim": 8},
            "preview": {"images": shown},
            "glo": {"epochs": 1},
        }
    )


class Rows:
    """Images of one brightness each, its row; some are corrupt."""

    def __init__(self, resolution: int, corrupt=()) -> None:
        self.resolution, self.corrupt = resolution, corrupt

    def __len__(self) -> int:
        return ROWS

    def decode(self, row):
        if row in self.corrupt:
            raise CorruptImage(row, "shard", "torn")
        return np.full((1, self.resolution, self.resolution), row, np.uint8)


def drawn_by(world: int, config: Config, monkeypatch, corrupt=()):
    """The parts of all workers, of both stages."""
    torch.manual_seed(1)
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    generator = build_generator(config.generator, config.data.resolution, 1)
    with torch.no_grad():  # fresh networks paint nearly uniform grey
        [p for p in generator.parameters() if p.ndim == 4][-1].mul_(2000)
    weights = generator.state_dict()
    mapping = build_mapping(config.sampler, DIM).state_dict()
    whole = gaussian(z_ND)
    monkeypatch.setattr(previews, "gaussian", lambda codes_nD, total, device: whole)  # tests/dist has the collective
    monkeypatch.setattr(previews, "world_size", lambda: world)
    parts = []
    for rank, rows in enumerate(ranges(ROWS, world)):
        monkeypatch.setattr(previews, "rank", lambda rank=rank: rank)
        drawing = Previews(config, Rows(config.data.resolution, corrupt), rows, torch.device("cpu"))
        latents = SimpleNamespace(codes=lambda rows=rows: z_ND[rows.start : rows.stop])
        parts.append((drawing.reconstructed(weights, latents), drawing.sampled(weights, mapping)))
    return parts


def brightness(sheet) -> list[int]:
    return [int(tile.shown_HWC[0, 0, 0]) for label, tiles in sheet.rows if label == "x" for tile in tiles]


def test_any_number_of_workers_draws_the_same_images(monkeypatch):
    config, pictures = make_config(), {}
    for world in (1, 2, 3):
        parts = drawn_by(world, config, monkeypatch)
        assert all(part[kind] for part, _ in parts for kind in part), "every worker draws some of each kind"
        glo, sampler = (sheets_of([part[stage] for part in parts]) for stage in (0, 1))
        assert brightness(glo["reconstructions"]) == shown_rows(ROWS, 5) == [0, 20, 41, 61, 82]
        assert {*glo} == {"reconstructions", "samples"}
        assert {*sampler} == {"samples"}
        pictures[world] = [sheet.picture() for sheet in (*glo.values(), *sampler.values())]
    for one, *others in zip(*pictures.values(), strict=True):
        assert len(set(one.convert("L").getdata())) > 5, "it shows something"
        for other in others:
            assert other.size == one.size
            levels = np.asarray(ImageChops.difference(one, other))
            assert levels.max() <= 1, "but for the rounding of another batch"


def test_a_corrupt_row_is_left_out_and_few_rows_are_all_shown(monkeypatch):
    parts = drawn_by(2, make_config(), monkeypatch, corrupt={41})
    assert brightness(sheets_of([part[0] for part in parts])["reconstructions"]) == [0, 20, 61, 82]
    assert shown_rows(3, 32) == [0, 1, 2]
    assert sheets_of([{"reconstructions": {}}]) == {}


def test_large_images_leave_a_worker_reduced_and_compressed(monkeypatch, tmp_path):
    """At 1024 px the pixels of a preview are 100 MB; what the driver on a small head node gets is a fraction."""
    config = make_config(resolution=512, shown=4)
    parts = [part[0] for part in drawn_by(2, config, monkeypatch)]
    for tile in itertools.chain.from_iterable(
        tiles for part in parts for kind in part.values() for tiles in kind.values()
    ):
        assert tile.shown_HWC.shape == (256, 256, 1)
        assert 0 < len(tile.whole) < 512 * 512 / 4
    sheet = sheets_of(parts)["reconstructions"]
    sheet.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x" / "01-00.webp") as whole:
        assert whole.size == (512, 512)


def test_pictures_are_drawn_once_all_parts_are_there_and_parts_of_ended_workers_are_forgotten(monkeypatch):
    first, second = (part for _, part in drawn_by(2, make_config(), monkeypatch))
    assembly = Assembly()
    assert assembly.add(Preview("imle", 5, 9, 1, 2, second)) == {}
    assert assembly.add(Preview("imle", 6, 10, 0, 2, first)) == {}
    assert {*assembly.add(Preview("imle", 5, 9, 0, 2, first))} == {"samples"}
    assembly.clear()
    assert assembly.add(Preview("imle", 6, 10, 1, 2, second)) == {}
    assert {*assembly.add(Preview("imle", 6, 10, 0, 2, first))} == {"samples"}


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 5), (30_000, 32)])
def test_shown_rows_are_spread_over_all(rows, count):
    shown = shown_rows(rows, count)
    assert len(shown) == count
    assert shown == sorted(set(shown))
    assert rows - shown[-1] <= rows / count + 1
