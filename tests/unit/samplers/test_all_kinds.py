"""What every kind of sampler promises: a function of normal noise, row by row, resumed bit for bit at an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from code_clouds import build, steps
from glann.config.samplers import SAMPLERS
from glann.inference.model import SamplingModel, slerp
from glann.models.noise import stream_of
from glann.samplers.base import build_network, sampler_class
from torch import nn

DIM = 6
# The smallest fits; a kind with several ways has an entry for each.
SMALL: dict[str, dict[str, Any]] = {
    "imle": {"epochs": 4, "noise_dim": 5, "hidden_dim": 16, "batch_size": 50},
    "imle stale": {"epochs": 6, "noise_dim": 5, "hidden_dim": 16, "staleness": 4, "noise_on_match": 0.1},
    "imle chamfer": {"epochs": 4, "noise_dim": 5, "hidden_dim": 16, "batch_size": 50, "chamfer": 1.0},
    "imle deep": {
        "epochs": 4,
        "noise_dim": 5,
        "hidden_dim": 16,
        "depth": 4,
        "activation": "silu",
        "normalisation": "none",
        "constraint": "sphere",
    },
    "rs-imle": {"epochs": 4, "noise_dim": 5, "hidden_dim": 16, "batch_size": 50, "epsilon": 0.2, "candidates": 5},
    "adaptive-imle": {"epochs": 5, "noise_dim": 5, "hidden_dim": 16, "batch_size": 50, "change": 0.05, "lr": 0.01},
    "gaussian": {},
    "gmm": {"epochs": 4, "components": 5},
    "ot": {"epochs": 4, "steps": 3},
    "ot simplex": {"epochs": 4, "steps": 3, "extension": "simplex"},
    "ot none": {"epochs": 4, "steps": 3, "extension": "none"},
    "flow": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "steps": 3},
    "flow mean": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "velocity": "mean", "steps": 1},
    "flow minibatch": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "steps": 3, "coupling": "minibatch"},
    "flow semidiscrete": {
        "epochs": 4,
        "hidden_dim": 16,
        "batch_size": 50,
        "steps": 3,
        "coupling": "semidiscrete",
        "heights": {"steps": 9},
    },
    "drift": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "noise_dim": 5},
    "coupling": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "layers": 3},
    "coupling mixture": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "layers": 3, "components": 4},
    "ar": {"epochs": 4, "hidden_dim": 16, "batch_size": 50, "components": 3},
    "prior": {"shape": "sphere"},
}
CASES = pytest.mark.parametrize("case", SMALL)


def small(case: str, **more: Any):
    return build(case.split()[0], DIM, codes_on="sphere", **SMALL[case], **more)


def codes(rows: int = 120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    spread_ND = torch.randn(rows, DIM, generator=generator) @ torch.randn(DIM, DIM, generator=generator)
    return nn.functional.normalize(spread_ND, dim=1)


@pytest.fixture(scope="module")
def ready():
    """Fitted samplers by case, made when first asked for."""
    made: dict[str, Any] = {}

    def get(case: str):
        if case not in made:
            made[case] = small(case)
            steps(made[case], codes())
        return made[case]

    return get


class Decoder(nn.Module):
    """An image of 2 x 3 pixels that holds a code's numbers."""

    resolution, channels, latent_dim = 2, 1, 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, z_BD: torch.Tensor) -> torch.Tensor:
        return (0.5 + 0.5 * self.weight * z_BD).view(-1, 1, 2, 3)


def test_every_kind_is_tested_here():
    assert {case.split()[0] for case in SMALL} == set(SAMPLERS)


@CASES
def test_steps_carry_the_piggyback_and_epochs_end_with_facts(case):
    sampler = small(case)
    done = steps(sampler, codes())
    assert all(step.piggyback_K.tolist() == [1.0, 0.0] and step.applied for step in done)
    ends = [step.epoch for step in done if step.epoch_facts is not None]
    assert ends == list(range(sampler.epochs))
    assert all("loss" in step.epoch_facts for step in done if step.epoch_facts is not None)
    assert done[-1].epoch_facts is not None
    trained = [step for step in done if step.step < step.steps]
    kind = sampler_class(sampler.config.kind)
    assert len(trained) == kind.steps(sampler.config, 120)
    assert kind.flops(sampler.config, DIM, 120) >= 0
    assert steps(sampler, codes(), first_epoch=sampler.epochs) == []


@CASES
def test_codes_are_on_the_sphere_and_finite_far_from_the_middle_too(case, ready):
    sampler = ready(case)
    e_BE = torch.cat([torch.randn(50, sampler.network.noise_dim), 6 * torch.randn(50, sampler.network.noise_dim)])
    torch.testing.assert_close(sampler.codes(e_BE).norm(dim=1), torch.ones(100), atol=1e-5, rtol=0)


@CASES
def test_a_code_depends_on_its_own_noise_only(case, ready):
    sampler = ready(case)
    e_BE = torch.randn(40, sampler.network.noise_dim)
    whole_BD, order = sampler.codes(e_BE), torch.randperm(40)
    torch.testing.assert_close(sampler.codes(e_BE[order]), whole_BD[order], atol=2e-4, rtol=0)
    for row in (0, 17):
        torch.testing.assert_close(sampler.codes(e_BE[row : row + 1]), whole_BD[row : row + 1], atol=2e-4, rtol=0)
    assert sampler.codes(e_BE[:0]).shape == (0, DIM)


@CASES
def test_seeds_truncation_and_interpolation(case, ready):
    sampler = ready(case)
    kind = sampler.config.kind
    model = SamplingModel(Decoder(), {kind: sampler.network}, kind)
    index_B = torch.arange(12)
    e_BE = model.noise(index_B, seed=4)
    assert torch.equal(e_BE[5:6], model.noise(torch.tensor([5]), seed=4))  # image 5 of a seed, on its own
    assert not torch.equal(e_BE, model.noise(index_B, seed=5))
    assert len({stream_of(kind) for kind in SAMPLERS}) == len(SAMPLERS)
    same = model.sample(6, seed=1, truncation=0.0)
    assert (same == same[:1]).all()
    assert not (model.sample(6, seed=1) == same).all()
    path = model.interpolate([(0, 1), (2, 3)], steps=3, seed=4)
    ends = model.sample(4, seed=4)
    assert abs(path[:, 0].astype(int) - ends[[0, 2]]).max() <= 1  # the last bit of a noise may round otherwise
    assert abs(path[:, -1].astype(int) - ends[[1, 3]]).max() <= 1
    middle_1E = slerp(e_BE[:1], e_BE[1:2], torch.tensor([[0.5]]))
    mean_norm = (e_BE[:1].norm() + e_BE[1:2].norm()) / 2
    torch.testing.assert_close(middle_1E.norm(), mean_norm, rtol=1e-4, atol=0)


@CASES
def test_its_state_makes_the_same_function(case, ready):
    """Also on a network without memory, as a packaged model is opened."""
    sampler = ready(case)
    state = sampler.state()["weights"]
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in state.values())
    with torch.device("meta"):
        network = build_network(sampler.config, DIM, "sphere")
    network.load_state_dict(state, assign=True)
    e_BE = torch.randn(9, network.noise_dim)
    assert torch.equal(network.eval()(e_BE), sampler.codes(e_BE))


@CASES
def test_resuming_at_an_epoch_is_bit_for_bit_the_same(case):
    straight, first = small(case), small(case)
    steps(straight, codes())
    if straight.epochs > 1:
        steps(first, codes(), until=2)
        second = small(case, state=first.state())
        steps(second, codes(), first_epoch=2)
    else:
        steps(first, codes())
        second = small(case, state=first.state())
    once, again = straight.state(), second.state()
    assert once.keys() == again.keys()
    for group, tensors in once.items():
        if isinstance(tensors, dict):
            assert tensors.keys() == again[group].keys()
            assert all(torch.equal(tensor, again[group][name]) for name, tensor in tensors.items()), group
        else:
            assert tensors == again[group]


@CASES
def test_another_seed_is_another_fit_and_the_same_seed_the_same(case):
    weights = []
    for seed in (3, 3, 4):
        sampler = build(case.split()[0], DIM, codes_on="sphere", seed=seed, **SMALL[case])
        steps(sampler, codes())
        weights.append(sampler.state()["weights"])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    if case not in ("gaussian", "prior"):  # a closed form, and nothing to fit
        assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
