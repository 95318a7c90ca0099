"""Protects what utilisation is measured by: the operations of the model, and not those of a second forward pass."""

from types import SimpleNamespace

import pytest
from glann.config.run import load
from glann.trainers.glo import Glo
from glann.trainers.plan.costs import training_costs


@pytest.mark.parametrize("recipe", ["celebahq-256", "paper-mnist"])
def test_utilisation_does_not_count_recomputed_activations(recipe):
    def of(recomputed):
        config = load(recipe, [f"engine.activation_checkpointing={str(recomputed).lower()}"])
        stage = SimpleNamespace(context=SimpleNamespace(config=config))
        return Glo.image_flops(stage), sum(cost.flops for cost in training_costs(config))

    (plain, work), (thrifty, more_work) = of(False), of(True)
    assert plain == thrifty == work
    assert more_work > work  # what a plan counts, as it takes time
