"""Protects exact statistics: those of nn.BatchNorm over all inputs of all workers as one batch, in float64.

The file is also the program of the workers that one test starts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from glann.models.norm import SharedBatchNorm
from glann.models.statistics import set_exact_statistics
from torch import nn

ROWS = (14, 0, 9)  # of three workers; neither divides by a batch of 4


class Net(nn.Module):
    """BatchNorm on rows and on pixels, whose layers are made in another order than they are called in."""

    def __init__(self, norm_1d=SharedBatchNorm, norm_2d=SharedBatchNorm) -> None:
        super().__init__()
        self.norm3, self.norm2, self.norm1 = norm_2d(3), norm_2d(2), norm_1d(8)
        self.first, self.up = nn.Linear(5, 8), nn.ConvTranspose2d(2, 3, 4, 2, 1)

    def forward(self, z_BD):
        h = torch.relu(self.norm1(self.first(z_BD))).view(-1, 2, 2, 2)
        return self.norm3(self.up(torch.tanh(self.norm2(h))))


def built(seed: int, *norms) -> tuple[Net, torch.Tensor]:
    """A network with statistics of its own, and inputs [N, 5]."""
    torch.manual_seed(seed)
    net, z_ND = Net().double(), 1 + 2 * torch.randn(sum(ROWS), 5, dtype=torch.float64)
    for layer in (net.norm1, net.norm2, net.norm3):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.running_mean)
    other = Net(*norms).double()
    other.load_state_dict(net.state_dict())
    return other, z_ND


def reference(seed: int) -> dict[str, torch.Tensor]:
    """One layer after the other in train mode with momentum 1, on all inputs at once."""
    net, z_ND = built(seed, nn.BatchNorm1d, nn.BatchNorm2d)
    for layer in (net.norm1, net.norm2, net.norm3):
        net.eval()
        layer.train()
        layer.momentum = 1.0
        with torch.no_grad():
            net(z_ND)
    return {name: buffer for name, buffer in net.named_buffers() if "tracked" not in name}


def worker(rank: int, folder: Path, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    net, z_ND = built(seed)
    set_exact_statistics(net, z_ND.split(ROWS)[rank], 4)
    np.savez(folder / f"{rank}.npz", **{name: value.numpy() for name, value in net.state_dict().items()})
    dist.destroy_process_group()


@pytest.fixture
def seed() -> int:
    value = int(torch.randint(2**31, ()))
    print("seed", value)
    return value


@pytest.mark.parametrize("batch", [1, 4, 22, 1000])
def test_they_are_the_moments_of_all_inputs_however_these_are_cut(seed, batch):
    net, z_ND = built(seed)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    set_exact_statistics(net.train(), z_ND, batch)
    assert not net.training
    expected = reference(seed)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, before[name]), rtol=1e-12, atol=1e-13)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    set_exact_statistics(net, z_ND, batch)  # nothing is left over from the first time
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_three_workers_come_to_the_numbers_of_one_and_to_equal_bits(seed, tmp_path):
    """One of them has no input at all."""
    commands = [[sys.executable, __file__, str(rank), str(tmp_path), str(seed)] for rank in range(3)]
    workers = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in workers] == [0, 0, 0]
    results = [np.load(tmp_path / f"{rank}.npz") for rank in range(3)]
    for name, value in reference(seed).items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-12, atol=1e-13, err_msg=name)
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], results[0][name])


def test_a_layer_that_is_called_twice_gets_the_moments_of_both_calls():
    layer, z_BD = SharedBatchNorm(3).double(), torch.randn(7, 3, dtype=torch.float64)
    net = nn.Sequential(layer, nn.Linear(3, 3).double(), layer)
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    set_exact_statistics(net, z_BD, 2)
    assert len(inputs) == 2 * 4  # one pass
    torch.testing.assert_close(layer.running_mean, torch.cat(inputs).mean(0))
    torch.testing.assert_close(layer.running_var, torch.cat(inputs).var(0))


def test_a_network_without_batchnorm_is_left_alone():
    net = nn.Linear(5, 2)
    net.forward = lambda z_BD: pytest.fail("it was called")  # at high resolution a pass takes time
    set_exact_statistics(net, torch.randn(3, 5), 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
