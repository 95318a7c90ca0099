"""Numbers do not depend on how work is cut over workers, with BatchNorm in both networks.

One worker against two and three, with uneven parts and padding: engine steps on every ZeRO stage, with and without
recomputed activations, a step that is withheld, one without a real row, and a restart; and both stages through their
real loops. The one-worker engine is compared with torch's BatchNorm in float64 in tests/unit/trainers/engine.

Tolerance: as in test_two_workers_end_where_one_ends.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.cluster.placement import ranges
from glann.config.run import validate
from glann.config.sections import EngineConfig, GeneratorConfig
from glann.datasets.pack import pack
from glann.datasets.reader import ImageRows
from glann.models.generators import build_generator
from glann.samplers.base import Codes, build_sampler
from glann.trainers.engine.build import build_engine
from glann.trainers.engine.optimizer import OptimizerConfig
from glann.trainers.glo import GENERATOR, Glo
from glann.trainers.stage import StageContext, final_weights

ROWS, DIM, STEPS = 11, 5, 7
PARTS = {1: (11,), 2: (8, 3), 3: (5, 0, 6)}  # real rows of each worker
NAN_AT, EMPTY_AT, RESTARTED_AT = 2, 3, 5


def engine_steps(rank, world, seed, engine_keys, restart=False):
    """Losses, whether applied, gradients of the real rows' codes, and the final state."""
    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it for its workers
    config = EngineConfig(**engine_keys)
    torch.manual_seed(seed)
    z, x = torch.randn(STEPS, ROWS, DIM), torch.rand(STEPS, ROWS, 3, 8, 8)

    def built(state=None):
        network = build_generator(GeneratorConfig(kind="infogan", width=4, latent_dim=DIM), 8, 3)
        network.checkpoint_activations = config.activation_checkpointing
        return build_engine(network, OptimizerConfig(1e-3, (0.5, 0.999), 0.9), config, ROWS, torch.device("cpu"), state)

    engine, results = built(), []
    size, real = max(PARTS[world]), PARTS[world][rank]
    own = slice(sum(PARTS[world][:rank]), sum(PARTS[world][: rank + 1]))
    for step in range(STEPS):
        if restart and step == RESTARTED_AT:
            engine = built(engine.state())
        z_BD = torch.cat([z[step, own], torch.full((size - real, DIM), 7.0)])
        target = torch.cat([x[step, own], torch.zeros(size - real, 3, 8, 8)])
        weight_B = (torch.arange(size) < real).float()
        if step == NAN_AT and rank == 0:
            z_BD[1] = float("nan")
        if step == EMPTY_AT:
            weight_B.zero_()
        result = engine.step(
            z_BD,
            weight_B,
            lambda fake, part: (fake - target[part]).square().mean((1, 2, 3)),  # noqa: B023
            1e-3,
            torch.tensor([float(rank)]),
        )
        results.append((result.loss, result.applied, result.grad_BD[:real].numpy(), float(result.piggyback_K)))
    state = engine.state()
    groups = {key: {name: t.numpy() for name, t in state[key].items()} for key in ("weights", "ema")}
    return results, groups, state["updates"]


@pytest.fixture(scope="module")
def seed():
    value = int(torch.randint(2**31, ()))
    print("seed", value)
    return value


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_zero_stage_with_batchnorm_ends_where_plain_pytorch_ends(local_ray, gloo_group, world, seed):
    expected, groups, updates = engine_steps(0, 1, seed, {"kind": "torch"})
    assert updates == STEPS - 2
    with gloo_group(world) as members:
        for zero in (0, 1, 2, 3):
            for recomputed, restart in ((False, True), (True, False)):
                keys = {"zero": zero, "activation_checkpointing": recomputed}
                calls = [m.run.remote(engine_steps, rank, world, seed, keys, restart) for rank, m in enumerate(members)]
                answers = local_ray.get(calls, timeout=300)
                print(f"world {world} zero {zero} recomputed {recomputed} restart {restart}")
                for step, (loss, applied, grad_BD, _) in enumerate(expected):
                    for answer in answers:
                        assert answer[0][step][1] == applied == (step not in (NAN_AT, EMPTY_AT))
                        assert answer[0][step][3] == sum(range(world))
                        if applied:
                            assert answer[0][step][0] == pytest.approx(loss, rel=1e-4)
                    assert all((answer[0][step][0] is None) == (step == EMPTY_AT) for answer in answers)
                    if applied:
                        together_BD = np.concatenate([answer[0][step][2] for answer in answers])
                        np.testing.assert_allclose(together_BD, grad_BD, atol=2e-3 * np.abs(grad_BD).max())
                for answer in answers:
                    assert answer[2] == updates
                    for key, tensors in groups.items():
                        for name, tensor in tensors.items():
                            np.testing.assert_allclose(answer[1][key][name], tensor, atol=1e-4, err_msg=f"{key} {name}")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    np.savez(folder / "noise.npz", images=np.random.default_rng().integers(0, 256, (ROWS, 28, 28), np.uint8))
    pack(str(folder / "noise.npz"), str(folder / "packed"), resolution=28, channels=1)
    return str(folder / "packed")


def both_stages(rank, world, packed):
    """Codes, the generator's final weights with their statistics, and the mapping, of a run with one batch an epoch.

    With smaller batches, other rows meet in a batch where the number of workers is another.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    tree = {
        "name": "t",
        "data": {"url": packed, "resolution": 28, "channels": 1},
        "generator": {"kind": "infogan", "latent_dim": DIM, "width": 4},
        "loss": {"kind": "l1"},
        "glo": {"epochs": 4, "batch_size": 16, "ema": 0.5, "latent_lr": 0.001, "generator_lr": 0.0001},
        "imle": {"epochs": 3, "noise_dim": 4, "batch_size": 4, "statistics": "batch", "lr": 0.0001},
        "engine": {"zero": 1},
        "cluster": {"workers": world},
    }
    config, device = validate(tree, "test"), torch.device("cpu")
    table = LatentTable.in_process(ranges(ROWS, world)[rank], DIM, config.seed)
    stage = Glo(StageContext(config, ImageRows(packed), table, device), {})
    losses = [step.loss for step in stage.steps(0, 0, lambda: torch.zeros(0))]
    weights = {name: tensor.numpy() for name, tensor in final_weights(stage.state()[GENERATOR]).items()}
    torch.manual_seed(1)
    sampler = build_sampler(config.sampler, DIM, "sphere", seed=config.seed, device=device)
    list(sampler.fit(Codes(table.codes(), table.rows, ROWS), 0, lambda: torch.ones(2)))
    mapping = {name: tensor.numpy() for name, tensor in sampler.state()["weights"].items()}
    return table.codes().numpy(), weights, mapping, losses


@pytest.mark.parametrize("world", [2, 3])
def test_both_stages_end_where_one_worker_ends(local_ray, gloo_group, packed, world):
    with gloo_group(1) as members:
        z_ND, weights, mapping, losses = local_ray.get(members[0].run.remote(both_stages, 0, 1, packed), timeout=300)
    with gloo_group(world) as members:
        calls = [member.run.remote(both_stages, rank, world, packed) for rank, member in enumerate(members)]
        answers = local_ray.get(calls, timeout=300)
    np.testing.assert_allclose(np.concatenate([answer[0] for answer in answers]), z_ND, atol=1e-5)
    for answer in answers:
        np.testing.assert_allclose(answer[3], losses, rtol=1e-4)
        for held, expected in ((answer[1], weights), (answer[2], mapping)):
            for name, tensor in expected.items():
                np.testing.assert_allclose(held[name], tensor, atol=1e-4, rtol=1e-4, err_msg=name)
