"""Protects SharedBatchNorm: however a batch is cut over workers, its numbers are those of plain BatchNorm
over all real rows (float64), forwards and backwards, and every worker ends with the same running statistics.

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
from glann.models.norm import SharedBatchNorm, frozen_statistics
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
        np.savez(folder / f"{rank}-{len(spatial)}.npz", **train(rank, seed, spatial))
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
