"""On a GPU a step of stage 1 never makes the host wait, but for the one copy of its results a step later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.trainers.engine import transfer
from glann.trainers.glo import Glo
from glann.trainers.stage import StageContext

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS, BATCH, DIM = 23, 4, 5


def stage_of(url: str, device: str) -> Glo:
    tree = {
        "name": "t",
        "data": {"url": url, "resolution": 32, "channels": 3},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "l1"},
        "glo": {"epochs": 3, "batch_size": BATCH, "ema": 0.5, "code_noise": 0.1},
        "engine": {"kind": "torch"},
    }
    config = validate(tree, "test")
    table = LatentTable.in_process(range(ROWS), DIM, config.seed)
    return Glo(StageContext(config, ImageRows(url), table, torch.device(device)), {})


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=32, channels=3)
    return str(folder / "packed")


def test_a_step_synchronises_once_and_only_through_its_download(packed, monkeypatch):
    """`error` raises at every implicit wait: a blocking copy, `item`, `nonzero`. An event's is none of these."""
    stage, waits, wait = stage_of(packed, "cuda"), [], transfer.Download.wait
    monkeypatch.setattr(transfer.Download, "wait", lambda self: waits.append(self) or wait(self))
    steps = stage.steps(0, 0, lambda: torch.zeros(3))
    while not next(steps).ends_epoch:  # the first epoch warms up: plans and allocations may wait
        pass
    taken = 0
    waits.clear()
    first = next(steps)  # an epoch begins with the numbers of rows of all workers
    taken += 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not first.ends_epoch and taken < 4:
            first = next(steps)
            taken += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken == len(waits) == 4


def test_the_codes_and_losses_are_those_of_a_cpu(packed):
    losses = {}
    for device in ("cpu", "cuda"):
        losses[device] = [step.loss for step in stage_of(packed, device).steps(0, 0, lambda: torch.zeros(3))]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=2e-2)


def test_a_withheld_step_moves_nothing_and_the_next_is_applied(packed):
    engine = stage_of(packed, "cuda").engine
    z_BD, ones = torch.randn(BATCH, DIM, device="cuda"), torch.ones(BATCH, device="cuda")
    assert engine.step(z_BD, ones, lambda fake, part: fake.mean((1, 2, 3)), 1e-2).applied
    before = engine.state()
    assert not engine.step(z_BD, ones, lambda fake, part: fake.mean((1, 2, 3)) * float("nan"), 1e-2).applied
    after = engine.state()
    assert after["updates"] == before["updates"] == 1
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(before[group][name], value) for name, value in after[group].items()), group
    assert engine.step(z_BD, ones, lambda fake, part: fake.mean((1, 2, 3)), 1e-2).applied
