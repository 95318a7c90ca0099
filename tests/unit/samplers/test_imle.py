"""Stage 2: every mode is covered, and the path of T does not depend on how rows are placed."""

import math

import pytest
import torch
from glann.config.run import validate
from glann.errors import UserError
from glann.samplers.base import Codes
from glann.samplers.imle import Imle, candidates


def config(**imle):
    tree = {
        "name": "t",
        "seed": imle.pop("seed", 0),
        "data": {"url": "x", "resolution": 32},
        "generator": {"kind": "infogan", "latent_dim": 3},
        "glo": {"epochs": 1},
        "imle": {"noise_dim": 4, "batch_size": 50} | imle,
    }
    return validate(tree, "test")


def sampler(settings, state=None) -> Imle:
    return Imle(settings.sampler, 3, "sphere", seed=settings.seed, device=torch.device("cpu"), state=state)


def fitted(trainer: Imle, z_ND: torch.Tensor, first_epoch: int = 0):
    """The facts of every epoch, as they come."""
    codes = Codes(z_ND, range(len(z_ND)), len(z_ND))
    for step in trainer.fit(codes, first_epoch, lambda: torch.zeros(0)):
        if step.epoch_facts is not None:
            yield step.epoch_facts


def eight_clusters(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes around the corners of a cube on the unit sphere, and the corners."""
    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / math.sqrt(3)
    z_ND = corners[torch.arange(rows) % 8] + 0.03 * torch.randn(rows, 3)
    return torch.nn.functional.normalize(z_ND, dim=1), corners


def coverage(mapping: torch.nn.Module, corners_8D: torch.Tensor) -> tuple[float, float]:
    """Share of the worst cluster's fresh codes with one of 1,000 draws within 0.05, and of draws near any cluster.

    Spread evenly over the sphere, a draw in twelve would lie within 0.2 of one of the eight.
    """
    fresh_ND, _ = eight_clusters(1600)
    mapping.eval()
    with torch.no_grad():
        drawn_KD = mapping(torch.randn(1000, 4))
    reached_N = torch.cdist(fresh_ND, drawn_KD).amin(1) < 0.05
    near_K = torch.cdist(drawn_KD, corners_8D).amin(1) < 0.2
    return float(reached_N.float().view(-1, 8).mean(0).min()), float(near_K.float().mean())


def test_every_mode_of_a_mixture_of_eight_clusters_is_covered():
    seed = int(torch.randint(2**31, ()))
    print("seed", seed)
    torch.manual_seed(seed)
    z_ND, corners_8D = eight_clusters(403)
    settings = config(epochs=200, lr=5e-3, candidates=1, seed=seed, schedule={"kind": "cosine", "floor": 0.02})
    trainer = sampler(settings)
    untrained, _ = coverage(trainer.network, corners_8D)
    epochs = list(fitted(trainer, z_ND))
    reached, near = coverage(trainer.network, corners_8D)
    print(f"worst cluster: {untrained:.3f} reached before, {reached:.3f} after; near a cluster {near:.3f}")
    print(f"loss {epochs[-1]['loss']:.5f}")
    assert untrained < 0.3
    assert reached > 0.8
    assert near > 0.2
    assert epochs[-1]["loss"] < 0.01  # squared; codes of a cluster are 0.04 from its middle


def test_what_is_trained_is_what_is_sampled():
    """With fixed statistics T(e) is the same number in a search, in an update and in a sample."""
    torch.manual_seed(0)
    settings = config(epochs=2)
    z_ND, _ = eight_clusters(60)
    trainer = sampler(settings)
    mean, variance = trainer.network.norm2.running_mean.clone(), trainer.network.norm2.running_var.clone()
    h_BH = trainer.network.norm1(trainer.network.fc1(torch.randn(4000, 4)))
    torch.testing.assert_close(h_BH.mean(0), torch.zeros(128), atol=0.1, rtol=0)
    torch.testing.assert_close(h_BH.std(0), torch.ones(128), atol=0.1, rtol=0)
    for _ in fitted(trainer, z_ND):
        assert not trainer.network.training
    assert torch.equal(mean, trainer.network.norm2.running_mean)
    assert torch.equal(variance, trainer.network.norm2.running_var)
    published = sampler(config(statistics="batch", epochs=1))
    list(fitted(published, z_ND))
    assert not torch.equal(torch.zeros(128), published.network.norm2.running_mean)


def test_a_match_is_the_nearest_mapped_noise():
    torch.manual_seed(0)
    settings = config(candidates=1.7)
    z_ND, _ = eight_clusters(41)
    trainer = sampler(settings)
    matches = trainer.match(5, z_ND, 41)
    from glann.models.noise import noise

    with torch.no_grad():
        mapped_MD = trainer.network.eval()(noise(settings.seed, 5, torch.arange(candidates(settings.sampler, 41)), 4))
    brute_NM = (z_ND.double()[:, None] - mapped_MD.double()[None]).square().sum(2)
    assert torch.equal(matches.index_n, brute_NM.argmin(1))
    torch.testing.assert_close(matches.distance_n.double(), brute_NM.min(1).values)


def test_a_mapping_whose_units_have_died_is_matched_too():
    """All its candidates are equal; the inverted file must not leave a code without one."""
    torch.manual_seed(0)
    settings = config(search={"kind": "ivf", "probes": 16}, epochs=1)
    z_ND, _ = eight_clusters(403)
    trainer = sampler(settings)
    torch.nn.init.constant_(trainer.network.norm1.bias, -100.0)
    matches = trainer.match(0, z_ND, 403)
    assert ((matches.index_n >= 0) & (matches.index_n < candidates(settings.sampler, 403))).all()
    assert matches.recall == 1
    (facts,) = fitted(trainer, z_ND)
    assert math.isfinite(facts["distance"])


def test_a_code_without_a_match_is_never_trained_on(monkeypatch):
    def leave_one(z_nD, *arguments):
        index_n = torch.zeros(len(z_nD), dtype=torch.int64)
        index_n[3] = torch.iinfo(torch.int64).max
        return index_n, torch.where(torch.arange(len(z_nD)) == 3, math.inf, 0.5).double(), 1.0

    monkeypatch.setattr("glann.samplers.imle.ivf_nearest", leave_one)
    trainer = sampler(config(search={"kind": "ivf"}))
    with pytest.raises(RuntimeError, match="ivf search left 1 of 41 codes without a candidate"):
        next(fitted(trainer, eight_clusters(41)[0]))


def test_the_steps_of_an_epoch_are_bounded_by_larger_batches():
    """Each row is visited once; what has fewer batches than the bound is trained as without it."""
    torch.manual_seed(0)
    z_ND, _ = eight_clusters(101)

    def trained(**keys):
        torch.manual_seed(1)
        trainer, sizes = sampler(config(epochs=2, batch_size=10, **keys)), []
        update = trainer.update
        trainer.update = lambda e_BE, z_BD, rows, *rest: sizes.append(rows) or update(e_BE, z_BD, rows, *rest)
        list(fitted(trainer, z_ND))
        assert sum(sizes) == 2 * 101
        assert trainer.steps(trainer.config, 101) == len(sizes)
        return sizes, trainer.network.state_dict()

    (plain, before), (unbounded, same), (bounded, other) = (
        trained(),
        trained(max_steps_per_epoch=11),
        trained(max_steps_per_epoch=4),
    )
    assert plain == unbounded
    assert len(plain) == 2 * 11
    assert all(torch.equal(before[name], same[name]) for name in before)
    assert bounded == 2 * [26, 25, 25, 25]
    assert not torch.equal(before["fc1.weight"], other["fc1.weight"])
    sizes = [config(max_steps_per_epoch=4000).sampler.batch_of(rows) for rows in (1, 200_000, 200_001, 10**8)]
    assert sizes == [50, 50, 51, 25_000]


@pytest.mark.parametrize("batch", [1, 2, 3, 40])
def test_a_mapping_trains_in_small_batches_or_says_why_it_cannot(batch):
    """A lone row is zero after normalising by itself: T(e) = 0 for every e, at a squared distance of exactly 1."""
    torch.manual_seed(0)
    z_ND, _ = eight_clusters(41)
    fixed = sampler(config(batch_size=batch, statistics="noise", epochs=3))
    losses = [facts["loss"] for facts in fitted(fixed, z_ND)]
    assert losses[-1] < losses[0]
    published = sampler(config(batch_size=batch, statistics="batch", epochs=3))
    lone_BD = published.network.train()(torch.randn(1, 4))
    assert not lone_BD.any()
    if batch < 3:
        with pytest.raises(UserError, match=rf"batch_size={batch} .* use at least 3, or set sampler.statistics=noise"):
            next(fitted(published, z_ND))
    else:
        losses = [facts["loss"] for facts in fitted(published, z_ND)]
        assert min(losses[1:]) < losses[0] != 1


def test_resuming_at_an_epoch_is_bit_for_bit_the_same():
    torch.manual_seed(0)
    settings = config(epochs=6)
    z_ND, _ = eight_clusters(123)
    torch.manual_seed(1)
    straight = sampler(settings)
    torch.manual_seed(1)
    first = sampler(settings)
    list(fitted(straight, z_ND))
    run = fitted(first, z_ND)
    for _ in range(3):
        next(run)
    state = first.state()
    second = sampler(settings, state)
    list(fitted(second, z_ND, 3))
    a, b = straight.state(), second.state()
    assert a["updates"] == b["updates"]
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


@pytest.mark.parametrize("bad", [float("nan"), 1e25])
def test_a_target_that_is_not_finite_moves_nothing(bad):
    """Nor one whose gradient is finite but not its square, of which Adam keeps an average."""
    torch.manual_seed(0)
    trainer = sampler(config())
    trainer.network.train()
    before = trainer.state()
    z_BD = torch.full((5, 3), float("nan")) if math.isnan(bad) else torch.randn(5, 3).mul(bad)
    _, applied, carried_K = trainer.update(torch.randn(5, 4), z_BD, 5, 1e-3, torch.tensor([2.0, 0.0]))
    assert not applied
    assert carried_K.tolist() == [2.0, 0.0]
    after = trainer.state()
    assert after["updates"] == 0
    for name in dict(trainer.network.named_parameters()):
        assert torch.equal(before["weights"][name], after["weights"][name])
        assert not after["exp_avg_sq"][name].any()
    assert trainer.update(torch.randn(5, 4), torch.randn(5, 3), 5, 1e-3, torch.zeros(0))[1]


def test_a_step_that_is_not_finite_moves_nothing():
    """Neither the weights nor the statistics, with a target, a noise or an activation that is not finite."""
    torch.manual_seed(0)
    trainer = sampler(config(statistics="batch"))
    trainer.network.train()
    e_BE, z_BD, piggyback_K = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([2.0, 0.0])
    trainer.update(e_BE, z_BD, 5, 1e-3, piggyback_K)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    nan_BE, huge_BE = e_BE.clone(), e_BE.clone()
    nan_BE[1, 2], huge_BE[1, 2] = float("nan"), 3e38  # the square of its activation overflows, nothing else does
    for noise_BE, target_BD in ((e_BE, torch.full((5, 3), float("nan"))), (nan_BE, z_BD), (huge_BE, z_BD)):
        _, applied, carried_K = trainer.update(noise_BE, target_BD, 5, 1e-3, piggyback_K)
        assert not applied
        assert carried_K.tolist() == [2.0, 0.0]
        for name, tensor in trainer.network.state_dict().items():
            assert torch.equal(before[name], tensor), name
    assert trainer.update(e_BE, z_BD, 5, 1e-3, piggyback_K)[1]
    assert trainer.network.norm1.num_batches_tracked == 2
