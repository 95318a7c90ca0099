"""Stage 1 on one worker through its real parts: what it does with the last rows of an epoch, with batches that cannot
be read, and with the statistics of the averaged generator at its end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.run import validate
from glann.datasets.pack import pack
from glann.datasets.reader import CorruptImage, ImageRows
from glann.errors import UserError
from glann.models.generators import build_generator
from glann.models.noise import Stream, noise
from glann.trainers.glo import GENERATOR, Glo, disturbed
from glann.trainers.stage import StageContext, final_weights
from torch import nn

ROWS, BATCH, DIM = 9, 4, 5  # two whole batches, and one row more


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng().integers(0, 256, (ROWS, 28, 28), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=28, channels=1)
    return str(folder / "packed")


def stage_of(packed: str, networks=None, latents: LatentTable | None = None, **sections) -> Glo:
    tree = {
        "name": "t",
        "data": {"url": packed, "resolution": 28, "channels": 1, "max_bad_fraction": 1.0},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "l1"},
        "glo": {"epochs": 3, "batch_size": BATCH} | sections,
        "engine": {"kind": "torch"},
    }
    config = validate(tree, "test")
    table = latents or LatentTable.in_process(range(ROWS), DIM, config.seed)
    return Glo(StageContext(config, ImageRows(packed), table, torch.device("cpu")), networks or {})


def take(stage: Glo, epoch: int = 0, step: int = 0):
    return stage.steps(epoch, step, lambda: torch.zeros(0))


def unreadable(monkeypatch, rows: set[int]) -> None:
    whole = ImageRows.decode

    def decode(self, row):
        if row in rows:
            raise CorruptImage(row, "a shard", "damaged")
        return whole(self, row)

    monkeypatch.setattr(ImageRows, "decode", decode)


def test_noise_on_codes_belongs_to_their_rows_and_their_gradient_is_that_of_the_projection(packed):
    """Against the Jacobian of z -> u / |u|, u = z + noise, in float64: (I - uu'/|u|^2) / |u|, which is symmetric."""
    config = stage_of(packed, code_noise=0.7).context.config
    z_ND = torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1)
    moved_ND, gradient_of = disturbed(z_ND, config, 2, np.arange(ROWS))
    e_ND = 0.7 / DIM**0.5 * noise(config.seed, 2, torch.arange(ROWS), DIM, stream=Stream.CODES).double()
    u_ND = z_ND.double() + e_ND
    norm_N1 = u_ND.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved_ND.double(), u_ND / norm_N1, rtol=1e-5, atol=1e-6)
    grad_ND = torch.randn(ROWS, DIM)
    along_N1 = (grad_ND.double() * u_ND / norm_N1).sum(1, keepdim=True)
    expected_ND = (grad_ND.double() - along_N1 * u_ND / norm_N1) / norm_N1
    torch.testing.assert_close(gradient_of(grad_ND).double(), expected_ND, rtol=1e-4, atol=1e-5)

    some_B = np.random.default_rng().permutation(ROWS)[:4]
    assert torch.equal(disturbed(z_ND[some_B], config, 2, some_B)[0], moved_ND[some_B])
    assert not torch.equal(disturbed(z_ND, config, 3, np.arange(ROWS))[0], moved_ND)


def test_noise_on_codes_is_what_the_generator_sees_and_what_moves_them(packed):
    still, moved = stage_of(packed), stage_of(packed, code_noise=0.5)
    losses = [next(take(stage)).loss for stage in (still, moved)]
    assert losses[0] != losses[1]
    for stage in (still, moved):
        for _ in take(stage, 0, 1):
            pass
    assert not torch.equal(still.context.latents.codes(), moved.context.latents.codes())


def test_every_code_moves_in_every_epoch_and_no_batch_is_a_short_rest(packed):
    """The last of 2 x 4 + 1 rows would be alone under BatchNorm, whose output for one row is the same for any code."""
    stage = stage_of(packed)
    table, seen = stage.context.latents, []
    before = table.codes()
    for step in take(stage):
        seen.append(len(step.rows_B))
        if step.ends_epoch:
            assert (table.codes() != before).any(1).all()
            before = table.codes()
    assert seen == [3] * 3 * 3


def test_an_epoch_resumed_in_its_middle_ends_with_the_same_bits(packed):
    straight, first = stage_of(packed, ema=0.5), stage_of(packed, ema=0.5)
    list(take(straight))
    for step in take(first):
        if (step.epoch, step.step) == (1, 0):
            break
    table = LatentTable.in_process(range(ROWS), DIM, 1)
    table.restore(first.context.latents.snapshot(), (1, 0))
    second = stage_of(packed, {GENERATOR: first.engine.state()}, table, ema=0.5)
    list(take(second, 1, 1))
    assert torch.equal(table.codes(), straight.context.latents.codes())
    ended, expected = second.state()[GENERATOR], straight.state()[GENERATOR]
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(ended[group][name], value) for name, value in expected[group].items())


def test_a_batch_that_cannot_be_read_is_no_step_and_not_in_the_mean_of_the_loss(packed, monkeypatch):
    stage = stage_of(packed, epochs=1)
    planned = [step.rows_B for step in take(stage_of(packed, epochs=1))]
    unreadable(monkeypatch, set(planned[1]))
    states, steps = [], []
    for step in take(stage):
        steps.append(step)
        states.append(stage.engine.state())
    assert [step.loss is None for step in steps] == [False, True, False]
    assert all(step.applied for step in steps)  # nothing was withheld because it was not finite
    assert [state["updates"] for state in states] == [1, 1, 2]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(value, states[0][group][name]) for name, value in states[1][group].items())
    assert (stage.context.latents.visits() == 1).all()


def test_a_batch_that_cannot_be_read_neither_counts_as_a_bad_step_nor_ends_a_row_of_them(packed, monkeypatch):
    unread = stage_of(packed, max_bad_steps=1)
    planned = [step.rows_B for step in take(stage_of(packed, epochs=1))]
    unreadable(monkeypatch, set(planned[1]))
    list(take(unread))
    diverged = stage_of(packed, max_bad_steps=2)
    diverged.loss = lambda fake, real, seed_B: fake.mean((1, 2, 3)) * float("nan")
    taken = []
    with pytest.raises(UserError, match="not finite for 2 steps in a row"):
        taken.extend((step.step, step.applied) for step in take(diverged))
    assert taken == [(0, False), (1, True), (2, False)]


def test_the_averaged_generator_ends_with_the_statistics_of_all_codes_and_comes_to_them_again_after_a_kill(packed):
    stage = stage_of(packed, ema=0.5)
    list(take(stage))
    raw, state = stage.engine.state(), stage.state()[GENERATOR]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(value, raw[group][name]) for name, value in state[group].items())
    network = build_generator(stage.context.config.generator, 28, 1).double()
    network.load_state_dict(final_weights(state))
    z_ND, inputs = stage.context.latents.codes().double(), {}
    for name in ("norm1", "norm2", "norm3"):
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    with torch.no_grad():
        network.eval()(z_ND)
    for name, x in inputs.items():
        plain = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1], momentum=1.0).double()
        plain(x)
        for kind in ("running_mean", "running_var"):
            value = final_weights(state)[f"{name}.{kind}"].double()
            torch.testing.assert_close(value, plain.get_buffer(kind), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(value, raw["weights"][f"{name}.{kind}"].double(), rtol=1e-3)
    again = stage_of(packed, {GENERATOR: raw}, stage.context.latents, ema=0.5)
    assert list(take(again, 3)) == []
    assert all(torch.equal(value, state["ema"][name]) for name, value in again.state()[GENERATOR]["ema"].items())


def test_a_generator_without_an_average_keeps_its_running_statistics(packed):
    stage = stage_of(packed)
    list(take(stage))
    state = stage.state()[GENERATOR]
    assert "ema" not in state
    assert all(torch.equal(value, state["weights"][name]) for name, value in stage.engine.network.state_dict().items())
