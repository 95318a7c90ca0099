"""The loop of generators and critics in one process: every objective moves both, and a resumed run ends bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from glann.cluster.latents import LatentTable
from glann.config.networks import OBJECTIVES, ObjectiveConfig
from glann.config.run import validate
from glann.datasets.loader import BadRows, PlannedBatch, batches
from glann.errors import UserError
from glann.models.objectives.base import Objective
from glann.models.objectives.named import BUILDERS
from glann.trainers.networks import Networks, train_networks
from glann.trainers.rounds import Game, Player
from glann.trainers.stage import StageContext
from stage_runs import run, tensors
from toy_images import ToyImages

ROWS, BATCH = 13, 6  # three steps an epoch
ENERGIES = ("energy", "began")


def config(objective: str = "non-saturating", epochs: int = 2, **keys: Any):
    critic = {"kind": "autoencoder" if objective in ENERGIES else "infogan", "width": 4, "code_dim": 4}
    critic |= keys.pop("critic", {})
    generator = {"kind": "infogan", "latent_dim": 5, "width": 4} | keys.pop("generator", {})
    sampler = keys.pop("sampler", {})
    networks = {"epochs": epochs, "batch_size": BATCH, "objective": {"kind": objective}, "critic": critic}
    tree = {
        "name": "t",
        "method": "gan",
        "data": {"url": "x", "resolution": 28, "channels": 1, "threads": 1},
        "generator": generator,
        "networks": networks | keys,
        "sampler": {"kind": "prior", "shape": "uniform"} | sampler,
        "engine": {"kind": "torch"},
    }
    return validate(tree, "test")


def stage(settings, networks: dict[str, Any] | None = None) -> Networks:
    table = LatentTable.in_process(range(0), 1, 0)
    return Networks(StageContext(settings, ToyImages(ROWS), table, torch.device("cpu")), networks or {})


@pytest.mark.parametrize(
    "objective", ["non-saturating", "least-squares", "kl", "energy", "began", "loss-sensitive", "relativistic"]
)
def test_every_kind_of_objective_moves_both_networks(objective):
    made = stage(config(objective, epochs=1))
    before = tensors(made.state())
    done = run(made)
    assert [step.step for step in done] == [0, 1, 2]
    assert all(step.applied and step.piggyback_K.tolist() == [1.0, 0.0, 2.0] for step in done)
    assert [step.ends_epoch for step in done] == [False, False, True]
    assert {"real_score", "fake_score", "generator_loss"} <= done[-1].facts.keys()
    assert sorted(row for step in done for row in step.rows_B) == list(range(ROWS))
    after = tensors(made.state())
    for network in ("generator", "critic"):
        assert any(
            not torch.equal(before[name], after[name]) for name in before if name.startswith(f"{network} weights")
        )
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert set(OBJECTIVES) >= {objective}


@pytest.mark.parametrize(
    "keys",
    [
        {"ema": 0.5, "generator": {"batch_norm": True}, "critic": {"batch_norm": True}},
        {
            "penalty": {"kind": "around"},
            "critic": {"steps": 2},
            "generator_steps": 2,
            "generator": {"batch_norm": False},
        },
        {"objective": "began", "critic": {"kind": "autoencoder"}},
        {"critic": {"spectral_norm": True}, "gate": 0.6, "objective": "hinge"},
        {"objective": "relativistic", "penalty": {"kind": "r1-r2"}, "feature_matching": 1.0, "pull_away": 0.1},
        {"optimizer": "rmsprop", "betas": [0, 0.99], "history": 0.1, "critic": {"kernels": 3}},
        {"condition": True, "sampler": {"categories": 3}, "penalty": {"kind": "between"}},
        {"critic": {"classes": 3}, "labelled": 6, "feature_matching": 1.0, "adversarial": 0.0},
        {"information": 1.0, "continuous": 1, "sampler": {"categories": 3}},
        {"ema": 0.5, "generator": {"kind": "dcgan", "reference": 5}},
    ],
    ids=[
        "batch-norm",
        "penalty",
        "balance",
        "gate",
        "terms",
        "rmsprop",
        "condition",
        "classes",
        "information",
        "virtual",
    ],
)
@pytest.mark.parametrize("after", [2, 4])
def test_a_resumed_run_ends_bit_for_bit_where_a_straight_one_ends(keys, after):
    objective = keys.get("objective", "non-saturating")
    settings = config(objective, **{key: value for key, value in keys.items() if key != "objective"})
    straight = stage(settings)
    run(straight)
    first = stage(settings)
    done = run(first, count=after)
    position = (done[-1].epoch, done[-1].step + 1) if not done[-1].ends_epoch else (done[-1].epoch + 1, 0)
    lazy = {
        name: {
            group: {key: getattr(t, "whole", lambda t=t: t)().clone() for key, t in held.items()}
            if isinstance(held, dict)
            else held
            for group, held in groups.items()
        }
        for name, groups in first.lazy_state().items()
    }
    second = stage(settings, lazy)
    run(second, *position)
    wanted, found = tensors(straight.state()), tensors(second.state())
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def test_the_gate_keeps_a_critic_that_is_too_good_from_learning():
    made = stage(config(gate=0.5, epochs=1))
    made.critic.accuracy = 0.9
    before = tensors({"critic": made.critic.engine.state()})
    [step] = run(made, count=1)
    assert step.applied
    after = tensors({"critic": made.critic.engine.state()})
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made.critic.accuracy != 0.9  # it is looked at, so that it can learn again


def test_clipping_bounds_the_critic_and_not_the_generator():
    made = stage(config("wasserstein", epochs=1, critic={"clip": 0.005}, generator={"batch_norm": False}))
    run(made)
    assert all(float(p.detach().abs().max()) <= 0.005 for p in made.critic.engine.network.parameters())
    assert any(float(p.detach().abs().max()) > 0.005 for p in made.generator.network.parameters())


@pytest.mark.parametrize(
    ("keys", "fact", "least", "most"),
    [
        ({"condition": True, "sampler": {"categories": 3}}, "real_score", -9, 9),
        ({"critic": {"classes": 3}, "labelled": 6}, "class_accuracy", 0, 1),
        ({"information": 1.0, "sampler": {"categories": 3}}, "information", -9, math.log(3)),
    ],
    ids=["condition", "classes", "information"],
)
def test_labels_and_codes_are_used_and_reported(keys, fact, least, most):
    [*_, last] = run(stage(config(**keys)))
    assert least <= last.facts[fact] <= most


def test_a_conditional_generator_gets_the_labels_of_the_batch():
    made = stage(config(condition=True, sampler={"categories": 3}))
    images = ToyImages(ROWS)
    [batch] = batches(
        images, [PlannedBatch(0, np.arange(4), np.ones(4, np.float32))], threads=1, prefetch=1, max_bad=BadRows(0, 4)
    )
    now = Game.of(made.context.config, images, made.generator).round(0, batch, 1.0)
    for draw in (0, 1):
        assert torch.equal(now.codes(draw)[:, -3:].argmax(1), torch.from_numpy(images.labels()[:4]).long())
    assert not torch.equal(now.codes(0)[:, :2], now.codes(1)[:, :2])


def test_labels_that_do_not_fit_the_configuration_are_refused():
    for keys, words in (
        ({"condition": True, "sampler": {"categories": 2}}, "labels up to 2"),
        ({"critic": {"classes": 3}, "labelled": 30}, "needs 10 images of label 0"),
    ):
        with pytest.raises(UserError, match=words):
            run(stage(config(**keys)), count=1)


def test_critics_side_by_side_each_learn_and_the_generator_follows_their_sum():
    one, two = stage(config(epochs=1)), stage(config(epochs=1))
    images = ToyImages(ROWS)
    players = {"first": one.critic, "second": Player(two.critic.engine)}
    game = Game.of(one.context.config, images, one.generator)
    done = list(train_networks(images, game, players, (0, 0), lambda: torch.zeros(3)))
    assert {"real_score", "real_score_2"} <= done[-1].facts.keys()
    alone = stage(config(epochs=1))
    run(alone)
    assert not torch.equal(one.generator.network.fc2.weight, alone.generator.network.fc2.weight)


def test_a_new_objective_is_an_entry_in_two_tables(monkeypatch):
    def steep(config: ObjectiveConfig) -> Objective:
        return Objective(lambda scores: (scores.fake_B - scores.real_B).exp(), lambda scores: -scores.fake_B)

    monkeypatch.setitem(OBJECTIVES, "steep", ())
    monkeypatch.setitem(BUILDERS, "steep", steep)
    assert all(step.applied for step in run(stage(config("steep", epochs=1))))


def test_a_step_that_is_not_finite_changes_nothing_and_many_end_the_run():
    made = stage(config(epochs=4, max_bad_steps=3))
    with torch.no_grad():
        made.critic.engine.network.last.bias.fill_(float("nan"))
    before = tensors({"generator": made.generator.state()})
    with pytest.raises(UserError, match=r"networks\.critic\.lr"):
        run(made)
    after = tensors({"generator": made.generator.state()})
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"penalty": {"kind": "between"}, "critic": {"batch_norm": True}}, "BatchNorm"),
        ({"objective": {"kind": "began"}, "critic": {"kind": "infogan"}}, "autoencoder"),
        ({"objective": {"kind": "hinge"}, "critic": {"kind": "autoencoder"}}, "loss-sensitive"),
        ({"objective": {"kind": "hinge", "margin": 0.3}}, "not read"),
        ({"objective": {"kind": "hings"}}, "unknown"),
        ({"objective": {"kind": "kl"}, "gate": 0.8}, "sign"),
        ({"critic": {"kind": "resnet"}}, "28"),
        ({"penalty": {"kind": "r1"}, "critic": {"kernels": 5}}, "kernels"),
        ({"optimizer": "rmsprop"}, "momentum"),
        ({"critic": {"classes": 10}}, "belong together"),
        ({"critic": {"classes": 10}, "labelled": 15}, "multiple"),
        ({"critic": {"classes": 2}, "labelled": 4, "objective": {"kind": "hinge"}}, "logit"),
        ({"critic": {"classes": 2}, "labelled": 4, "condition": True}, "leave out one"),
        ({"condition": True}, r"sampler\.categories"),
        ({"information": 1.0}, r"sampler\.categories"),
        ({"information": 1.0, "continuous": 2}, "uniform"),
        ({"continuous": 2}, "not read"),
        ({"information": 1.0, "continuous": 65}, "fit"),
    ],
)
def test_impossible_combinations_are_refused_by_name(keys, words):
    with pytest.raises(UserError, match=words):
        validate(
            {
                "name": "t",
                "method": "gan",
                "data": {"url": "x", "resolution": 28, "channels": 1},
                "generator": {"kind": "infogan"},
                "networks": {"epochs": 1} | keys,
                "sampler": {"kind": "prior"},
            },
            "test",
        )


@pytest.mark.parametrize(
    ("generator", "method", "words"),
    [({"kind": "infogan", "batch_norm": False}, "gan", "BatchNorm"), ({"kind": "infogan"}, "glann", "method=gan")],
)
def test_a_reference_batch_without_use_is_refused(generator, method, words):
    tree = config().model_dump(mode="json") | {"method": method, "generator": generator | {"reference": 5}}
    if method == "glann":
        tree = {key: value for key, value in tree.items() if key not in ("networks", "sampler")}
        tree["glo"] = {"epochs": 1}
    with pytest.raises(UserError, match=words):
        validate(tree, "test")


def test_sections_of_another_method_are_refused_and_not_written():
    settings = config()
    assert not {"glo", "loss"} & settings.model_dump().keys()
    assert validate(settings.model_dump(mode="json"), "again") == settings
    tree = settings.model_dump(mode="json")
    with pytest.raises(UserError, match=r"glo\.\* are keys of another method"):
        validate(tree | {"glo": {"epochs": 1}}, "test")
    with pytest.raises(UserError, match=r"networks\.\* are keys of another method"):
        validate(tree | {"method": "glann", "glo": {"epochs": 1}}, "test")
    with pytest.raises(UserError, match=r"networks\.epochs"):
        validate({key: value for key, value in tree.items() if key != "networks"}, "test")
    with pytest.raises(UserError, match=r"sampler\.kind=prior"):
        validate(tree | {"sampler": {"kind": "gaussian"}}, "test")
