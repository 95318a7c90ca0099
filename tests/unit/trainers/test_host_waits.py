"""A step of stage 1 makes the host wait for the device once, and later than the next step is queued.

On a CPU nothing is waited for, so what would wait on a GPU is counted: operations that bring a number of a tensor to
the host. The optimiser is the fused one, as on a GPU, which is told on the device that an update is withheld.
"""

from __future__ import annotations

from contextlib import nullcontext
from traceback import extract_stack

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.models.patches import crop
from glann.trainers import glo
from glann.trainers.engine import step as engine_step
from glann.trainers.engine import transfer
from glann.trainers.engine.optimizer import GuardedAdam, OptimizerConfig
from glann.trainers.glo import Glo, train_glo
from glann.trainers.stage import StageContext
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, BATCH, DIM = 23, 4, 5
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class HostReads(TorchDispatchMode):
    """Counts the operations after which the host knows a number that the device has computed."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in READS or by_mask:
            places = [f"{frame.filename}:{frame.lineno}" for frame in extract_stack()[-6:-1]]
            self.found.append(f"{func} at {' < '.join(reversed(places))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=28, channels=1)
    return str(folder / "packed")


@pytest.fixture
def fused(monkeypatch):
    adam = engine_step.GuardedAdam
    monkeypatch.setattr(engine_step, "GuardedAdam", lambda *args, **options: adam(*args, **options | {"fused": True}))


def stage_of(packed: str, **sections) -> Glo:
    tree = {
        "name": "t",
        "data": {"url": packed, "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "l1"},
        "glo": {"epochs": 2, "batch_size": BATCH, "ema": 0.5, "code_noise": 0.1} | sections,
        "engine": {"kind": "torch"},
    }
    config = validate(tree, "test")
    table = LatentTable.in_process(range(ROWS), DIM, config.seed)
    return Glo(StageContext(config, ImageRows(packed), table, torch.device("cpu")), {})


def train(stage: Glo, in_flight: int, piggyback=lambda: torch.zeros(3)):
    context = stage.context
    return train_glo(
        context.config, context.images, context.latents, stage.engine, stage.loss, (0, 0), piggyback, in_flight
    )


def assert_same(stage: Glo, other: Glo) -> None:
    assert torch.equal(stage.context.latents.codes(), other.context.latents.codes())
    ours, theirs = stage.engine.state(), other.engine.state()
    assert ours["updates"] == theirs["updates"]
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(ours[group][name], value) for name, value in theirs[group].items()), group


def test_nothing_reads_a_number_while_a_step_is_queued(packed, fused, monkeypatch):
    """Of the whole step: forward, loss, backward, the guard, the update, statistics and the moving average."""
    stage, reads = stage_of(packed), []
    queue = stage.engine.launch

    def counted(*args):
        with HostReads() as mode:
            step = queue(*args)
            step.fetch()
        reads.extend(mode.found)
        return step

    with HostReads() as mode:  # the stub counts what it should
        if torch.ones(3)[torch.tensor([True, False, True])].sum() > 0:
            torch.ones(2).nonzero()
    assert len(mode.found) == 3
    monkeypatch.setattr(stage.engine, "launch", counted)
    assert len(list(train(stage, 1))) == 12
    assert reads == []


def test_the_result_of_a_step_is_waited_for_once_after_the_next_was_queued(packed, fused, monkeypatch):
    events, wait, queue = [], transfer.Download.wait, glo.launch
    monkeypatch.setattr(transfer.Download, "wait", lambda self: events.append("wait") or wait(self))
    monkeypatch.setattr(glo, "launch", lambda *args: events.append("queue") or queue(*args))
    steps = list(train(stage_of(packed), 1))
    assert len(steps) == 12
    one = ["queue", *["queue", "wait"] * 5, "wait"]
    assert events == one * 2


def test_steps_in_flight_do_not_change_a_bit(packed, monkeypatch):
    """Also where steps are withheld: the codes of their rows stay, and they are counted as visited."""
    stages = [stage_of(packed, max_bad_steps=3) for _ in range(3)]
    for stage in stages[1:]:
        stage.engine.network.load_state_dict(stages[0].engine.network.state_dict())
        for ours, theirs in zip(stage.engine.ema.shards, stages[0].engine.ema.shards, strict=True):
            ours.copy_(theirs)
    losses = []
    for depth, stage in enumerate(stages):
        calls, whole = iter(range(100)), stage.loss

        def loss(fake, real, seed_B, calls=calls, whole=whole):
            return whole(fake, real, seed_B) * (float("nan") if next(calls) in (2, 3, 8) else 1.0)

        stage.loss = loss
        taken = list(train(stage, depth))
        assert [(step.epoch, step.step) for step in taken] == [(epoch, step) for epoch in (0, 1) for step in range(6)]
        losses.append([step.loss for step in taken if step.applied])
        assert [step.applied for step in taken].count(False) == 3
    assert losses[0] == losses[1] == losses[2]
    assert_same(stages[1], stages[0])
    assert_same(stages[2], stages[0])
    assert (stages[1].context.latents.visits() == 2).all()


def test_a_step_with_a_signal_has_none_behind_it(packed):
    """Its state can be saved; and no signal is lost or seen twice."""
    stage, alone, sent = stage_of(packed), stage_of(packed), iter(range(100))
    alone.engine.network.load_state_dict(stage.engine.network.state_dict())
    for ours, theirs in zip(alone.engine.ema.shards, stage.engine.ema.shards, strict=True):
        ours.copy_(theirs)
    signals = 0
    reference = train(alone, 0)
    for step in train(stage, 1, lambda: torch.tensor([0.0, float(next(sent) in (1, 8)), 0.0])):
        next(reference)
        signals += int(step.piggyback_K[1])
        if step.piggyback_K.any() or step.ends_epoch:
            assert_same(stage, alone)
    assert signals == 2


@pytest.mark.parametrize("fault", ["loss", "no rows"])
def test_the_fused_optimiser_is_told_on_the_device_that_nothing_moves(packed, fused, fault):
    engine = stage_of(packed).engine
    z_BD, ones = torch.randn(BATCH, DIM), torch.ones(BATCH)
    step = engine.launch(z_BD, ones, lambda fake, part: fake.mean((1, 2, 3)), 1e-2).fetch()()
    assert step.applied
    before = engine.state()
    bad = float("nan") if fault == "loss" else 1.0
    weight_B = ones if fault == "loss" else torch.zeros(BATCH)
    result = engine.launch(z_BD, weight_B, lambda fake, part: fake.mean((1, 2, 3)) * bad, 1e-2).fetch()()
    assert not result.applied
    after = engine.state()
    assert after["updates"] == before["updates"] == 1
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(before[group][name], value) for name, value in after[group].items()), group


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_critic_that_is_held_back_keeps_weights_beyond_its_bound(kind):
    """`networks.critic.clip` bounds what an update has moved; a step that is held, or not finite, changes nothing."""
    torch.manual_seed(0)
    network = torch.nn.Linear(DIM, 1)
    settings = OptimizerConfig(1e-2, (0.9, 0.999), clip=0.05)
    optimizer = GuardedAdam(network.parameters(), settings, fused=kind == "fused")
    optimizer.prime(list(network.parameters()), 0.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert max(float(value.abs().max()) for value in before.values()) > optimizer.clip
    for withheld in (1.0, 0.0):
        optimizer.withheld = torch.tensor(withheld)
        network(torch.randn(BATCH, DIM)).sum().backward()
        optimizer.step()
        largest = max(float(value.abs().max()) for value in network.state_dict().values())
        unchanged = all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        assert unchanged == bool(withheld)
        assert (largest > 0.0500001) == bool(withheld)
    assert {float(slot["step"]) for slot in optimizer.state.values()} == {1.0}


def test_a_held_step_reports_its_loss_and_moves_nothing(packed, fused):
    engine = stage_of(packed).engine
    before, z_BD, ones = engine.state(), torch.randn(BATCH, DIM), torch.ones(BATCH)
    result = engine.step(z_BD, ones, lambda fake, part: fake.mean((1, 2, 3)), 1e-2, torch.ones(2), hold=True)
    assert not result.applied
    assert np.isfinite(result.loss)
    assert result.piggyback_K.tolist() == [1.0, 1.0]
    after = engine.state()
    assert after["updates"] == before["updates"] == 0
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(before[group][name], value) for name, value in after[group].items()), group


def test_the_gradient_of_patches_is_not_sorted():
    """A gradient by `index_put` with accumulation sorts all its indices on a GPU."""
    called = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    img_BCHW = torch.rand(3, 2, 11, 13, requires_grad=True)
    with Names():
        patch_BCPP = crop(img_BCHW, 5, torch.tensor([1, 2, 3]))
        patch_BCPP.square().sum().backward()
    assert not [name for name in called if "index" in name]
    inside_BCHW = img_BCHW.grad != 0
    assert (inside_BCHW.sum((2, 3)) == 25).all()
    torch.testing.assert_close(img_BCHW.grad[inside_BCHW], 2 * img_BCHW.detach()[inside_BCHW], rtol=0, atol=0)


def test_downloads_and_uploads_on_a_cpu_are_the_tensors_themselves():
    one, other = torch.rand(3), torch.rand(2, 2)
    with nullcontext(transfer.Download(one, other)) as download:
        assert download.wait() == (one, other)
    assert transfer.Upload(torch.device("cpu"))(one) is one
