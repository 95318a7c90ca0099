"""The plain engine: per-image gradients of the codes, padding, accumulation, the guard, resuming, what rides along;
with BatchNorm, too.

The reference is autograd in float64, written out here without the engine, with torch's own BatchNorm.
"""

import numpy as np
import pytest
import torch
from glann.config.sections import EngineConfig, GeneratorConfig
from glann.models.generators import build_generator
from glann.models.norm import SharedBatchNorm
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from torch import nn


class Net(nn.Module):
    """A generator small enough to follow by hand, without BatchNorm, so that rows are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 17), nn.Linear(17, 12)

    def forward(self, z_BD, weight_B=None):
        return self.second(torch.tanh(self.first(z_BD))).view(-1, 3, 2, 2)


class NormNet(Net):
    """With BatchNorm on rows and on pixels; the reference takes torch's, which knows no padding."""

    def __init__(self, norm_1d=SharedBatchNorm, norm_2d=SharedBatchNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_1d(17), norm_2d(3)

    def forward(self, z_BD, weight_B=None):
        weights = () if weight_B is None else (weight_B,)
        h_BH = torch.tanh(self.norm1(self.first(z_BD), *weights))
        return self.norm2(self.second(h_BH).view(-1, 3, 2, 2), *weights)


def engine_of(network, state=None, **engine):
    config = EngineConfig(kind="torch", **engine)
    return build_engine(network, OptimizerConfig(1e-3, (0.5, 0.999), 0.9), config, 12, torch.device("cpu"), state)


def l1_of(target):
    return lambda fake, part: (fake - target[part]).abs().mean((1, 2, 3))


@pytest.fixture
def seed():
    value = int(torch.randint(2**31, ()))
    print("seed", value)
    torch.manual_seed(value)
    return value


def test_codes_get_the_gradient_of_their_own_loss(seed):
    net, z_BD, x = Net(), torch.randn(12, 5), torch.rand(12, 3, 2, 2)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    reference = Net().double()
    reference.load_state_dict(net.state_dict())
    for row in range(12):
        z = z_BD[row : row + 1].double().requires_grad_()
        (reference(z) - x[row].double()).abs().mean().backward()
        expected[row] = z.grad[0]
    for accumulation in (1, 3, 4):
        engine = engine_of(Net(), accumulation=accumulation)
        engine.network.load_state_dict(net.state_dict())
        result = engine.step(z_BD, torch.ones(12), l1_of(x), 1e-3)
        torch.testing.assert_close(result.grad_BD.double(), expected, atol=1e-7, rtol=1e-5)


def test_padding_changes_nothing(seed):
    net, z_BD, x = Net(), torch.randn(12, 5), torch.rand(12, 3, 2, 2)
    weight_B = torch.ones(12)
    weight_B[7:] = 0
    states = []
    for garbage in (0.0, float("nan")):
        z_BD[7:] = garbage
        engine = engine_of(Net())
        engine.network.load_state_dict(net.state_dict())
        result = engine.step(z_BD, weight_B, l1_of(x), 1e-2)
        states.append((result.loss, engine.weights(averaged=False)))
        if garbage == 0.0:
            assert result.applied
            assert torch.equal(result.grad_BD[7:], torch.zeros(5, 5))
            real = (net(z_BD[:7]) - x[:7]).abs().mean((1, 2, 3)).mean()
            assert result.loss == pytest.approx(real.item(), rel=1e-5)
        else:  # a NaN in padding reaches the weights' gradient as 0 x NaN; the guard must see it
            assert not result.applied


def test_a_step_that_is_not_finite_moves_nothing(seed):
    engine = engine_of(Net())
    x, ones = torch.rand(12, 3, 2, 2), torch.ones(12)
    engine.step(torch.randn(12, 5), ones, l1_of(x), 1e-2)
    before = engine.state()
    for bad in (float("nan"), float("inf")):
        x_bad = x.clone()
        x_bad[3] = bad
        assert not engine.step(torch.randn(12, 5), ones, l1_of(x_bad), 1e-2).applied
    after = engine.state()
    assert after["updates"] == before["updates"] == 1
    for key in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
    assert engine.step(torch.randn(12, 5), ones, l1_of(x), 1e-2).applied


def test_going_on_from_a_state_is_bit_for_bit_the_same(seed):
    z, x, ones = torch.randn(6, 12, 5), torch.rand(6, 12, 3, 2, 2), torch.ones(12)
    straight = engine_of(Net())
    first = engine_of(Net())
    first.network.load_state_dict(straight.network.state_dict())
    for shard, start in zip(first.ema.shards, straight.ema.shards, strict=True):
        shard.copy_(start)
    for step in range(3):
        straight.step(z[step], ones, l1_of(x[step]), 1e-2)
        first.step(z[step], ones, l1_of(x[step]), 1e-2)
    second = engine_of(Net(), first.state())
    for step in range(3, 6):
        straight.step(z[step], ones, l1_of(x[step]), 1e-2)
        second.step(z[step], ones, l1_of(x[step]), 1e-2)
    a, b = straight.state(), second.state()
    assert a["updates"] == b["updates"] == 6
    for key in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_the_moving_average_is_what_is_sampled(seed):
    engine = engine_of(Net())
    start = engine.weights(averaged=False)
    engine.step(torch.randn(12, 5), torch.ones(12), l1_of(torch.rand(12, 3, 2, 2)), 1e-2)
    now, averaged = engine.weights(averaged=False), engine.weights()
    for name in start:
        torch.testing.assert_close(averaged[name], 0.9 * start[name] + 0.1 * now[name])
    assert torch.equal(engine.weights(averaged=False)["first.weight"], now["first.weight"])


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(seed):
    seen = []
    net = Net()
    net.second.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    engine = engine_of(net, precision="bf16")
    result = engine.step(torch.randn(12, 5), torch.ones(12), l1_of(torch.rand(12, 3, 2, 2)), 1e-2)
    assert seen == [torch.bfloat16]
    assert result.grad_BD.dtype == torch.float32
    assert {tensor.dtype for tensor in engine.weights().values()} == {torch.float32}


def test_numbers_that_ride_along_come_back_as_they_are_and_change_nothing(seed):
    net, z_BD, x, ones = Net(), torch.randn(12, 5), torch.rand(12, 3, 2, 2), torch.ones(12)
    states = []
    for piggyback_K in (None, torch.empty(0), torch.tensor([2.0**-13, 8192.0, float("nan")])):
        engine = engine_of(Net())
        engine.network.load_state_dict(net.state_dict())
        result = engine.step(z_BD, ones, l1_of(x), 1e-2, piggyback_K)
        assert result.applied  # a NaN of the caller's is none of the training
        given_K = torch.empty(0) if piggyback_K is None else piggyback_K
        torch.testing.assert_close(result.piggyback_K, given_K, rtol=0, atol=0, equal_nan=True)
        states.append((result.loss, engine.weights(averaged=False)))
    for loss, weights in states[1:]:
        assert loss == states[0][0]
        assert all(torch.equal(weights[name], states[0][1][name]) for name in weights)


def test_engines_side_by_side_train_as_each_does_alone(seed):
    nets, z, x, ones = (Net(), Net()), torch.randn(2, 4, 12, 5), torch.rand(2, 4, 12, 3, 2, 2), torch.ones(12)

    def engine_from(net):
        engine = engine_of(Net())
        engine.network.load_state_dict(net.state_dict())
        return engine

    alone, together = ([engine_from(net) for net in nets] for _ in range(2))
    for at, engine in enumerate(alone):
        for step in range(4):
            engine.step(z[at, step], ones, l1_of(x[at, step]), 1e-2 / (1 + at))
    for step in range(4):
        for at, engine in enumerate(together):
            engine.step(z[at, step], ones, l1_of(x[at, step]), 1e-2 / (1 + at))
    for one, other in zip(alone, together, strict=True):
        a, b = one.state(), other.state()
        for key in ("weights", "exp_avg", "exp_avg_sq"):
            assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_the_plain_engine_refuses_a_group_whose_gradients_it_would_not_average(monkeypatch):
    monkeypatch.setattr("glann.trainers.engine.build.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"trains on one worker, not 2; use engine\.kind=deepspeed"):
        engine_of(Net())


def test_with_batchnorm_losses_gradients_and_statistics_are_those_of_the_real_rows_as_one_batch(seed):
    net, reference = NormNet(), NormNet(nn.BatchNorm1d, nn.BatchNorm2d).double()
    reference.load_state_dict(net.state_dict())
    engine = engine_of(net)
    z, x = torch.randn(3, 12, 5), torch.rand(3, 12, 3, 2, 2)
    for step, real in enumerate((12, 7, 11)):
        weight_B = (torch.arange(12) < real).float()
        z[step, real:] = 50.0
        result = engine.step(z[step], weight_B, l1_of(x[step]), 0.0)
        z_BD = z[step, :real].double().requires_grad_()
        loss_B = (reference(z_BD) - x[step, :real].double()).abs().mean((1, 2, 3))
        loss_B.sum().backward()
        assert result.loss == pytest.approx(loss_B.mean().item(), rel=1e-5)
        np.testing.assert_allclose(result.grad_BD[:real], z_BD.grad, atol=2e-6, rtol=1e-4)
    buffers = dict(engine.network.named_buffers())
    for name, value in reference.named_buffers():
        torch.testing.assert_close(buffers[name].double(), value.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_that_is_not_applied_moves_no_statistics_and_the_next_step_counts_once(seed, recomputed):
    generator = GeneratorConfig(kind="infogan", latent_dim=5, width=4)

    def built():
        network = build_generator(generator, 8, 3)
        network.checkpoint_activations = recomputed
        return network

    engine, undisturbed = engine_of(built()), engine_of(built())
    undisturbed.network.load_state_dict(engine.network.state_dict())
    z, x, ones = torch.randn(2, 12, 5), torch.rand(12, 3, 8, 8), torch.ones(12)
    one_bad = z[1].clone()
    one_bad[3] = float("nan")  # reaches all rows, through the moments
    huge = z[1].clone()
    huge[5] = 3e37  # its square overflows, but loss and gradients are finite
    bad_target = x.clone()
    bad_target[2] = float("inf")
    engine.step(z[0], ones, l1_of(x), 1e-2)
    undisturbed.step(z[0], ones, l1_of(x), 1e-2)
    before = engine.state()
    for codes, target in ((one_bad, x), (huge, x), (z[1], bad_target)):
        assert not engine.step(codes, ones, l1_of(target), 1e-2).applied
        for name, value in engine.state()["weights"].items():
            assert torch.equal(value, before["weights"][name]), name
    assert engine.step(z[1], ones, l1_of(x), 1e-2).applied
    undisturbed.step(z[1], ones, l1_of(x), 1e-2)
    assert engine.network.norm3.num_batches_tracked == 2
    for (name, value), other in zip(engine.network.named_buffers(), undisturbed.network.buffers(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("network", [Net, NormNet])
def test_a_batch_without_a_real_row_is_no_step(seed, network):
    """Momentum alone would move the weights; and a loss of 0 would count in the mean of the epoch."""
    engine = engine_of(network())
    z, x = torch.randn(12, 5), torch.rand(12, 3, 2, 2)
    engine.step(z, torch.ones(12), l1_of(x), 1e-2)
    before, carried = engine.state(), torch.tensor([2.0, 5.0])
    result = engine.step(z, torch.zeros(12), l1_of(x), 1e-2, carried)
    assert (result.loss, result.applied) == (None, False)
    assert result.piggyback_K.tolist() == [2.0, 5.0]
    assert torch.equal(result.grad_BD, torch.zeros(12, 5))
    assert engine.step(z, torch.zeros(12), l1_of(x), 1e-2).piggyback_K.shape == (0,)
    after = engine.state()
    assert after["updates"] == before["updates"] == 1
    for key in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])


def test_accumulation_with_batchnorm_is_refused(seed):
    """The statistics of a micro-batch are not those of the batch: the gradients of codes would be others."""
    with pytest.raises(ValueError, match=r"engine\.accumulation=2 would change what a network with BatchNorm learns"):
        engine_of(NormNet(), accumulation=2)
    assert engine_of(NormNet()).accumulation == 1


@pytest.mark.parametrize("wanted", ["rmsprop", "history"])
def test_variants_of_the_optimiser_are_those_written_out(seed, wanted):
    """RMSProp as torch has it; historical averaging by a loop over |w - mean w|^2 of all weights so far."""
    weight, steps = 0.3, 5
    config = {"rmsprop": {"kind": "rmsprop"}, "history": {"history": weight}}[wanted]
    optimizer = OptimizerConfig(1e-2, (0.0, 0.9), **config)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    engine = build_engine(net, optimizer, EngineConfig(kind="torch"), 12, torch.device("cpu"))
    kind = torch.optim.RMSprop if wanted == "rmsprop" else torch.optim.Adam
    settings = {"alpha": 0.9} if wanted == "rmsprop" else {"betas": (0.0, 0.9)}
    reference = kind(twin.parameters(), lr=1e-2, **settings)
    seen = [[] for _ in twin.parameters()]
    for _ in range(steps):
        z_BD, x = torch.randn(12, 5), torch.rand(12, 3, 2, 2)
        engine.step(z_BD, torch.ones(12), l1_of(x), 1e-2)
        loss = (twin(z_BD) - x).abs().mean((1, 2, 3)).mean()
        for parameter, before in zip(twin.parameters(), seen, strict=True):
            before.append(parameter.detach().clone())
            if wanted == "history":
                loss = loss + weight * (parameter - torch.stack(before).mean(0)).square().sum()
        reference.zero_grad()
        loss.backward()
        reference.step()
    assert engine.state()["updates"] == steps
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
