"""Every sampler ends on 2 and 3 workers where it ends on one, the same on each of them; cells and matches exactly."""

from __future__ import annotations

import pytest
import torch
from glann.cluster.placement import ranges
from glann.config.samplers import SAMPLERS
from glann.samplers.base import Codes, build_sampler

ROWS, DIM, EPOCHS = 61, 4, 2
TRAINED = {"epochs": EPOCHS, "hidden_dim": 12, "batch_size": 25}
IMLE = {**TRAINED, "noise_dim": 5}
CASES = {
    "imle": IMLE,
    "imle stale": {**IMLE, "staleness": 2, "noise_on_match": 0.1, "normalisation": "layer"},
    "imle chamfer": {**IMLE, "chamfer": 1.0},
    "rs-imle": {**IMLE, "epsilon": 0.3, "candidates": 4, "chamfer": 0.5},
    "adaptive-imle": {**IMLE, "change": 0.01, "lr": 0.01},
    "gaussian": {},
    "gmm": {"epochs": EPOCHS, "components": 3},
    "ot": {"epochs": EPOCHS, "steps": 8},
    "ot simplex": {"epochs": EPOCHS, "steps": 8, "extension": "simplex"},
    "flow": {**TRAINED, "steps": 2},
    "flow minibatch": {**TRAINED, "steps": 2, "coupling": "minibatch"},
    "flow semidiscrete": {
        **TRAINED,
        "steps": 2,
        "coupling": "semidiscrete",
        "velocity": "mean",
        "heights": {"steps": 8},
    },
    "drift": {**TRAINED, "noise_dim": 5},
    "coupling": {**TRAINED, "layers": 2},
    "ar": {**TRAINED, "components": 2},
}


def codes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(ROWS, DIM, generator=generator), dim=1)


def fit(case, rank, world):
    """The state after the fit, flat by name, and the sums of the piggybacks of its steps."""
    kind, rows = case.split()[0], ranges(ROWS, world)[rank]
    torch.manual_seed(1)
    config = SAMPLERS[kind].model_validate({"kind": kind} | CASES[case])
    sampler = build_sampler(config, DIM, "sphere", seed=3, device=torch.device("cpu"))
    own = Codes(codes()[rows.start : rows.stop].clone(), rows, ROWS)
    steps = list(sampler.fit(own, 0, lambda: torch.tensor([1.0, rank])))
    flat = {
        f"{group}/{name}": tensor.numpy().copy()
        for group, tensors in sampler.state().items()
        if isinstance(tensors, dict)
        for name, tensor in tensors.items()
    }
    losses = [step.epoch_facts["loss"] for step in steps if step.epoch_facts is not None]
    return flat, losses, [step.piggyback_K.tolist() for step in steps]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, gloo_group):
    with gloo_group(request.param) as members:
        yield members


@pytest.mark.parametrize("case", CASES)
def test_workers_end_where_one_ends(local_ray, ranks, case):
    world = len(ranks)
    calls = [member.run.remote(fit, case, rank, world) for rank, member in enumerate(ranks)]
    alone, losses, _ = fit(case, 0, 1)
    for state, seen, carried in local_ray.get(calls, timeout=240):
        assert all(numbers == [world, sum(range(world))] for numbers in carried)
        assert seen == pytest.approx(losses, rel=1e-3, abs=1e-5)
        assert state.keys() == alone.keys()
        for name, array in state.items():
            here, there = torch.from_numpy(array), torch.from_numpy(alone[name])
            if case.startswith("ot") and "centre" not in name or name in ("matches/index", "matches/epoch"):
                assert torch.equal(here, there), name  # counts of cells are whole numbers, so heights are exact
            else:
                torch.testing.assert_close(here, there, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: name + text)


def test_every_kind_is_here():
    assert {case.split()[0] for case in CASES} == set(SAMPLERS) - {"prior"}, "which is not fitted"
