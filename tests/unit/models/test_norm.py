"""Protects SharedBatchNorm: however a batch is cut over workers, its numbers are those of plain BatchNorm
over all real rows (float64), forwards, backwards and backwards again through the gradient (a gradient penalty), and
every worker ends with the same running statistics.

The file is also the program of the workers that the fixture `trained` starts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from glann.models.norm import SharedBatchNorm, frozen_statistics, pending_statistics
from torch import nn

CHANNELS = 3
SPATIAL = ((), (3, 5))
# Real rows of each worker, and padding rows after them; the second worker has nothing but padding, the
# third nothing at all in its second batch.
REAL = ((5, 0, 4), (3, 2, 0))
PADDING = ((1, 2, 0), (0, 0, 0))


def fresh_batches(seed: int, spatial: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All workers' rows of each batch with the coefficients of a linear loss, padding left out."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for real in REAL:
        shape = (sum(real), CHANNELS, *spatial)
        x = 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        batches.append((x, torch.randn(shape, generator=generator, dtype=torch.float64)))
    return batches


def layer_and_reference(spatial: tuple[int, ...]) -> tuple[SharedBatchNorm, nn.Module]:
    shared = SharedBatchNorm(CHANNELS).double()
    plain = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(CHANNELS).double()
    with torch.no_grad():
        shared.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        shared.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
    plain.load_state_dict(shared.state_dict())
    return shared, plain


def worker(rank: int, folder: Path, seed: int) -> None:
    """One of three workers: its rows of each batch, padding of garbage after them; results into files."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    for spatial in SPATIAL:
        np.savez(folder / f"{rank}-{len(spatial)}.npz", **train(rank, seed, spatial), **penalised(rank, seed, spatial))
    dist.destroy_process_group()


def train(rank: int, seed: int, spatial: tuple[int, ...]) -> dict[str, np.ndarray]:
    layer, _ = layer_and_reference(spatial)
    results = {}
    for step, (x_all, coefficients_all) in enumerate(fresh_batches(seed, spatial)):
        start, real, padding = sum(REAL[step][:rank]), REAL[step][rank], PADDING[step][rank]
        garbage = torch.full((padding, CHANNELS, *spatial), 1e3, dtype=torch.float64)
        x = torch.cat([x_all[start : start + real], garbage]).requires_grad_()
        weight_B = torch.cat([torch.ones(real), torch.zeros(padding)])
        out = layer(x, weight_B)
        (out[:real] * coefficients_all[start : start + real]).sum().backward()
        results |= {f"out{step}": out[:real].detach().numpy(), f"grad{step}": x.grad[:real].numpy()}
        results |= {f"padding_grad{step}": x.grad[real:].numpy()}
    results |= {name: value.numpy() for name, value in layer.state_dict().items()}
    return results | {"weight_grad": layer.weight.grad.numpy(), "bias_grad": layer.bias.grad.numpy()}


def penalised(rank: int, seed: int, spatial: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The gradients of a worker's share of a gradient penalty, with the layer twice in the network."""
    layer, _ = layer_and_reference(spatial)
    results = {}
    for step, (x_all, coefficients_all) in enumerate(fresh_batches(seed, spatial)):
        layer.zero_grad()
        start, real, padding = sum(REAL[step][:rank]), REAL[step][rank], PADDING[step][rank]
        x = torch.cat([x_all[start : start + real], torch.randn(padding, CHANNELS, *spatial, dtype=torch.float64)])
        weight_B = torch.cat([torch.ones(real), torch.zeros(padding)])
        x.requires_grad_()

        def network(x, weight_B=weight_B):
            return layer(layer(x, weight_B).tanh(), weight_B)

        value = penalty(network, x, coefficients_all[start : start + real])
        value.backward()
        results |= {f"penalty{step}": value.detach().numpy(), f"penalty_grad{step}": x.grad[:real].numpy()}
        results |= {f"penalty_padding{step}": x.grad[real:].numpy()}
        results |= {f"penalty_{name}{step}": one.grad.numpy() for name, one in layer.named_parameters()}
    return results


def penalty(network, x, coefficients) -> torch.Tensor:
    """The squared gradient of a loss of the real rows that is not linear in the output."""
    loss = (network(x)[: len(coefficients)].pow(3) * coefficients).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return gradient.square().sum()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[int, Path]:
    """The seed of the batches and the folder of what three real workers made of them."""
    folder = tmp_path_factory.mktemp("workers")
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder), str(seed)]) for rank in range(3)]
    assert [process.wait(timeout=300) for process in workers] == [0, 0, 0]
    return seed, folder


@pytest.mark.parametrize("spatial", SPATIAL)
def test_uneven_workers_equal_plain_batchnorm_over_all_rows(trained, spatial):
    seed, folder = trained
    print("seed", seed)
    results = [np.load(folder / f"{rank}-{len(spatial)}.npz") for rank in range(3)]
    _, plain = layer_and_reference(spatial)
    for step, (x, coefficients) in enumerate(fresh_batches(seed, spatial)):
        x.requires_grad_()
        out = plain(x)
        (out * coefficients).sum().backward()
        np.testing.assert_allclose(joined(results, f"out{step}"), out.detach(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(joined(results, f"grad{step}"), x.grad, rtol=0, atol=1e-12)
        assert not joined(results, f"padding_grad{step}").any()
    for name, value in plain.state_dict().items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-12)
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], results[0][name])  # bit for bit on every worker
    for name in ("weight", "bias"):
        share = sum(result[f"{name}_grad"] for result in results)
        np.testing.assert_allclose(share, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_a_gradient_penalty_over_uneven_workers_is_that_of_plain_batchnorm_over_all_rows(trained, spatial):
    seed, folder = trained
    print("seed", seed)
    results = [np.load(folder / f"{rank}-{len(spatial)}.npz") for rank in range(3)]
    _, plain = layer_and_reference(spatial)
    for step, (x, coefficients) in enumerate(fresh_batches(seed, spatial)):
        plain.zero_grad()
        value = penalty(lambda x: plain(plain(x).tanh()), x.requires_grad_(), coefficients)
        value.backward()
        shares = sum(result[f"penalty{step}"] for result in results)
        np.testing.assert_allclose(shares, value.detach(), rtol=1e-11)
        scale = float(x.grad.abs().max())
        np.testing.assert_allclose(joined(results, f"penalty_grad{step}"), x.grad, rtol=0, atol=1e-11 * scale)
        assert not joined(results, f"penalty_padding{step}").any()
        for name, parameter in plain.named_parameters():
            share = sum(result[f"penalty_{name}{step}"] for result in results)
            np.testing.assert_allclose(share, parameter.grad, rtol=1e-9, atol=1e-11 * scale)


def joined(results: list, name: str) -> np.ndarray:
    return np.concatenate([result[name] for result in results])


def test_gradients_are_those_of_finite_differences_with_padding_in_the_batch():
    layer, _ = layer_and_reference((2,))
    x = torch.randn(5, CHANNELS, 2, dtype=torch.float64, requires_grad=True)
    weight_B = torch.tensor([1.0, 1, 0, 1, 0])

    def normalise(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, weight_B))

    with frozen_statistics(layer):
        assert torch.autograd.gradcheck(normalise, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("weights", [None, (1, 1, 0, 1, 0)])
def test_gradients_may_be_differentiated_again_and_again(order, weights):
    """Against finite differences, through all that a gradient is made of: padding, weight, bias, the incoming one."""
    layer, _ = layer_and_reference((2,))
    weight_B = None if weights is None else torch.tensor(weights)
    spread = torch.arange(5, dtype=torch.float64).view(5, 1, 1)  # a small variance defeats finite differences
    x = (spread + torch.rand(5, CHANNELS, 2, dtype=torch.float64)).requires_grad_()
    coefficients = torch.randn(5, CHANNELS, 2, dtype=torch.float64, requires_grad=True)

    def gradients(x, weight, bias, coefficients):
        out = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, weight_B))
        found = torch.autograd.grad((out.sin() * coefficients).sum(), (x, weight, bias), create_graph=True)
        if order == 2:
            return found
        total = sum((one.sin() * (i + 1)).sum() for i, one in enumerate(found))
        return torch.autograd.grad(total, (x, weight, coefficients), create_graph=True)

    with frozen_statistics(layer):
        assert torch.autograd.gradcheck(gradients, (x, layer.weight, layer.bias, coefficients))


def test_without_real_rows_the_moments_are_constants_also_when_differentiated_twice():
    layer, _ = layer_and_reference((2,))
    x = torch.randn(5, CHANNELS, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, torch.zeros(5)).square().sum(), x, create_graph=True)
    gradient.sum().backward()
    expected = 2 * (layer.weight**2 / layer.eps).view(1, -1, 1).expand_as(x)
    torch.testing.assert_close(x.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_gradient_has_the_same_bits_whether_or_not_it_may_be_differentiated_again(dtype):
    layer = SharedBatchNorm(CHANNELS)
    x = (2 + torch.randn(9, CHANNELS, 5, dtype=dtype)).requires_grad_()
    weight_B = torch.tensor([1.0] * 7 + [0.0] * 2)
    inputs = (x, layer.weight, layer.bias)
    gradients = [
        torch.autograd.grad(layer(x, weight_B).float().pow(3).sum(), inputs, create_graph=create_graph)
        for create_graph in (False, True)
    ]
    for plain, differentiable in zip(*gradients, strict=True):
        assert torch.equal(plain, differentiable)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_state_dict_and_eval_mode_are_those_of_batchnorm(spatial):
    shared, plain = layer_and_reference(spatial)
    for _ in range(3):
        x = torch.randn(7, CHANNELS, *spatial, dtype=torch.float64)
        torch.testing.assert_close(shared(x), plain(x))
    plain_again = type(plain)(CHANNELS).double()
    plain_again.load_state_dict(shared.state_dict())
    x = torch.randn(2, CHANNELS, *spatial, dtype=torch.float64)
    torch.testing.assert_close(shared.eval()(x), plain_again.eval()(x))
    torch.testing.assert_close(shared(x)[:1], shared(x[:1]))


def test_a_batch_without_real_rows_leaves_the_statistics_alone():
    layer = SharedBatchNorm(CHANNELS)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(4, CHANNELS, requires_grad=True)
    out = layer(x, torch.zeros(4))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    assert layer(torch.empty(0, CHANNELS)).shape == (0, CHANNELS)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_pending_moments_move_the_statistics_only_when_they_are_committed_and_then_as_batchnorm_does():
    shared, plain = layer_and_reference(())
    net = nn.Sequential(shared, nn.Tanh())
    for committed in (False, True, False, True):
        before = {name: value.clone() for name, value in shared.state_dict().items()}
        x = torch.randn(7, CHANNELS, dtype=torch.float64)
        with pending_statistics(net) as pending:
            net(x)
            with frozen_statistics(net):
                net(x)  # a recomputation
        assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
        if committed:
            plain(x)
            pending.commit()
            pending.commit()  # there is nothing left to commit
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[name], value)
    shared(x)  # as always after the block
    assert shared.num_batches_tracked == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_moments_that_would_ruin_the_statistics_are_found(value):
    """1e30 is finite and its square is not: the output is finite, all of it, and so is the gradient."""
    layer, device = SharedBatchNorm(CHANNELS), torch.device("cpu")
    x = torch.randn(7, CHANNELS)
    with pending_statistics(layer) as pending:
        layer(x)
        assert pending.fault(device) == 0
        x[3, 1] = value
        out = layer(x)
        assert torch.isfinite(out).all() == (value == 1e30)
        assert pending.fault(device).isnan()


def test_a_single_row_has_no_spread_and_no_nan():
    layer = SharedBatchNorm(CHANNELS)
    layer(torch.randn(1, CHANNELS))
    assert torch.isfinite(layer.running_var).all()


def test_half_precision_keeps_its_type_and_measures_in_float32():
    layer = SharedBatchNorm(CHANNELS)
    x = (100 + torch.randn(64, CHANNELS, 8, 8)).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    reference = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(out.double(), reference, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * x.double().mean((0, 2, 3)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
