"""Protects a resume with many workers: the networks of a checkpoint are read once, and are the same on all of them."""

from __future__ import annotations

import pytest
import torch
from glann.models.comm import gather
from glann.trainers.run.state import share_networks
from threaded_ranks import on_ranks

CPU = torch.device("cpu")


def networks():
    torch.manual_seed(0)
    weights = {"fc.weight": torch.randn(3, 4), "norm.num_batches_tracked": torch.tensor(7), "scalar": torch.tensor(0.5)}
    moments = {"fc.weight": torch.randn(4, 3).t()}  # not contiguous
    return {
        "generator": {"weights": weights, "exp_avg": moments, "updates": 12.0},
        "mapping": {"weights": {"w": torch.randn(2).bfloat16()}, "matches": {}, "updates": 0.0},
    }


@pytest.mark.parametrize("world", [1, 2, 7, 33])
def test_every_worker_has_the_networks_that_rank_0_read(world):
    found = on_ranks(world, lambda rank: share_networks(networks() if rank == 0 else {}, CPU))
    assert len(found) == world
    for shared in found:
        assert list(shared) == ["generator", "mapping"]
        for network, state in networks().items():
            assert list(shared[network]) != []
            assert shared[network].keys() == state.keys()
            for group, tensors in state.items():
                if group == "updates":
                    assert shared[network][group] == tensors
                    continue
                assert shared[network][group].keys() == tensors.keys()
                for name, tensor in tensors.items():
                    assert shared[network][group][name].dtype == tensor.dtype
                    assert torch.equal(shared[network][group][name], tensor)


def test_a_checkpoint_without_networks_is_shared_too():
    assert on_ranks(3, lambda rank: share_networks({}, CPU)) == [{}, {}, {}]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_tensors_are_gathered_in_the_order_of_the_ranks(shape):
    """All statistics of BatchNorm go through this call: one tensor for all workers, not a list of one each."""
    values = torch.randn(13, *shape, dtype=torch.float64)
    for gathered in on_ranks(13, lambda rank: gather(values[rank])):
        assert torch.equal(gathered, values)
