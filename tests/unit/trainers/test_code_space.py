"""Protects what a training says of its codes: the same sample and numbers for any number of workers, a bounded cost,
corrupt images left out, and one warning with a remedy for a run whose codes do not move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import validate
from glann.config.sections import GloConfig
from glann.datasets.pack import pack
from glann.datasets.reader import CorruptImage, ImageRows
from glann.trainers import code_space
from glann.trainers.code_space import CodeSpace, still
from glann.trainers.glo import Glo
from glann.trainers.stage import StageContext

ROWS, DIM = 40, 5


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=28, channels=1)
    return str(folder / "packed")


def settings(packed: str, **glo):
    tree = {
        "name": "t",
        "data": {"url": packed, "resolution": 28, "channels": 1, "max_bad_fraction": 1.0},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "l1"},
        "glo": {"epochs": 5, "batch_size": 16} | glo,
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


def space(packed: str, rows: range, table: LatentTable | None = None) -> CodeSpace:
    config = settings(packed)
    table = table or LatentTable.in_process(rows, DIM, config.seed)
    return CodeSpace(config, ImageRows(packed), table, torch.device("cpu"))


def moved(rows: range) -> LatentTable:
    table = LatentTable.in_process(rows, DIM, 0)
    gradient = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    table.apply(0, 0, np.array(rows), gradient[rows.start : rows.stop], 0.2)
    return table


@pytest.mark.parametrize("world", [2, 3])
def test_workers_take_the_sample_of_one_worker_and_come_to_its_numbers(packed, world, monkeypatch):
    """With fewer places than rows, so that some rows are left out."""
    monkeypatch.setattr(code_space, "SAMPLE", 31)
    expected = space(packed, range(ROWS), moved(range(ROWS))).facts()
    parts = [space(packed, rows, moved(rows)) for rows in ranges(ROWS, world)]
    assert sorted(np.concatenate([part.own_k for part in parts]).tolist()) == list(range(31))
    sums: list[list[torch.Tensor]] = []
    for part in parts:  # what each worker would add, in the order of its calls
        calls: list[torch.Tensor] = []
        monkeypatch.setattr(code_space, "all_sum", lambda tensor, calls=calls: calls.append(tensor.clone()) or tensor)
        part.facts()
        sums.append(calls)
    answers = iter([torch.stack(calls).sum(0) for calls in zip(*sums, strict=True)])
    monkeypatch.setattr(code_space, "all_sum", lambda tensor: next(answers))
    assert space(packed, parts[0].latents.rows, parts[0].latents).facts() == expected


def test_the_sample_does_not_grow_with_the_data_set(packed):
    class Many(ImageRows):
        def __len__(self) -> int:
            return 100_000_000

    config, table = settings(packed), LatentTable.in_process(range(99_990_000, 99_999_999), DIM, 0)
    large = CodeSpace(config, Many(packed), table, torch.device("cpu"))
    assert len(large.rows_K) == code_space.SAMPLE
    assert (np.diff(large.rows_K) > 40_000).all()
    assert len(large.own_k) <= 1


def test_codes_that_have_not_moved_are_at_an_angle_of_zero_and_each_step_of_the_optimiser_shows(packed):
    assert space(packed, range(ROWS)).facts()["code_angle"] == pytest.approx(0, abs=1e-4)
    assert 15 < space(packed, range(ROWS), moved(range(ROWS))).facts()["code_angle"] < 35  # 0.2 sqrt(5) = 24 degrees


def test_images_that_cannot_be_read_are_left_out_of_the_agreement(packed, monkeypatch):
    whole = ImageRows.decode

    def decode(self, row):
        if row % 2:
            raise CorruptImage(row, "a shard", "damaged")
        return whole(self, row)

    assert space(packed, range(ROWS)).facts()["code_agreement_by_chance"] == 4 / 39
    monkeypatch.setattr(ImageRows, "decode", decode)
    assert space(packed, range(ROWS)).facts()["code_agreement_by_chance"] == 2 / 19
    monkeypatch.setattr(ImageRows, "decode", lambda self, row: decode(self, 1))
    assert "code_agreement" not in space(packed, range(ROWS)).facts()


@pytest.mark.parametrize(("rate", "warned"), [(0.0001, True), (0.3, False)])
def test_a_training_whose_codes_do_not_move_says_so_once_and_names_the_remedy(packed, rate, warned):
    config = settings(packed, latent_lr=rate)
    table = LatentTable.in_process(range(ROWS), DIM, config.seed)
    stage = Glo(StageContext(config, ImageRows(packed), table, torch.device("cpu")), {})
    taken = list(stage.steps(0, 0, lambda: torch.zeros(0)))
    texts = [(step.epoch, step.warning) for step in taken if step.warning]
    assert all("code_angle" in step.facts for step in taken if step.ends_epoch)
    assert len(texts) == warned
    if warned:
        epoch, text = texts[0]
        assert epoch == 0
        assert "hardly moved: 0 degrees" in text
        assert "set glo.latent_lr=auto (0.014)" in text
        assert "\n" not in text


def test_the_warning_comes_after_a_fifth_of_the_epochs_and_its_remedy_is_never_a_lower_rate():
    glo = GloConfig(epochs=25, latent_lr=0.01)
    assert [epoch for epoch in range(1, 26) if still(glo, 5_000, epoch, 2.0)] == [5]
    assert still(glo, 5_000, 5, 40.0) == ""
    assert still(GloConfig(epochs=4, latent_lr=0.01), 5_000, 1, 2.0) == ""
    assert "set glo.latent_lr=auto (0.043)" in still(glo, 5_000, 5, 2.0)
    for other in (
        GloConfig(epochs=25, latent_lr=0.05),
        GloConfig(epochs=25, latent_lr="auto"),
        GloConfig(epochs=25, latent_lr=0.01, latent_optimizer="adagrad"),
        GloConfig(epochs=25, latent_lr=0.01, latent_optimizer="published"),
    ):
        assert "raise glo.latent_lr or" in still(other, 5_000, 5, 2.0)
