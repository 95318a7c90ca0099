"""Advice on data that does not fit a recipe: what one command advises, the next one takes."""

from types import SimpleNamespace

import pytest
from glann.config.sections import DataConfig
from glann.datasets.fit import TRAINABLE, not_trainable, require_fit
from glann.errors import UserError


def advice(held, resolution=64):
    data = DataConfig(url="set", resolution=resolution, channels=3)
    with pytest.raises(UserError) as error:
        require_fit(SimpleNamespace(resolution=held, channels=3, rows=9), data, 1)
    return str(error.value)


@pytest.mark.parametrize("held", [held for held in TRAINABLE if held != 64])
def test_a_resolution_is_advised_if_it_can_be_configured(held):
    assert f"set data.resolution={held}, or pack it again" in advice(held)
    DataConfig(url="set", resolution=held)
    assert not not_trainable(held)


def test_a_resolution_that_no_recipe_can_have_is_never_advised():
    message = advice(96)
    assert "set data.resolution" not in message
    assert "images of 96 px cannot be trained on; 28, 32, 64, 128, 256, 512, 1024 px can: pack it again" in message
    assert "--resolution 64" in message
