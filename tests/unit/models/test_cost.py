"""Protects the FLOP, parameter and memory counts against formulas worked out by hand."""

from __future__ import annotations

import pytest
import torch
from glann.config.samplers import ImleConfig
from glann.config.sections import GeneratorConfig, LossConfig
from glann.models.cost import cost, training_bytes
from glann.models.generators import build_generator
from glann.models.losses import build_loss
from glann.models.mapping import build_mapping
from glann.models.perceptual import Vgg16


def test_infogan_counts_are_those_on_paper():
    net = build_generator(GeneratorConfig(kind="infogan"), 28, 1)
    flat = 128 * 7 * 7
    # A transposed convolution multiplies each input value with 4 x 4 x (output channels) weights.
    multiply_adds = 64 * 1024 + 1024 * flat + flat * 64 * 16 + 64 * 14 * 14 * 1 * 16
    found = cost(net, (64,))
    assert found.forward_flops == 2 * multiply_adds
    assert found.backward_flops == 2 * found.forward_flops  # to the input and to the weights
    norms = 2 * (1024 + flat + 64)
    weights = 64 * 1024 + 1024 * flat + 128 * 64 * 16 + 64 * 16 + 1  # no bias where BatchNorm follows
    assert found.parameters == weights + norms
    assert found.flops == found.forward_flops + found.backward_flops


def test_mapping_counts_are_those_on_paper():
    found = cost(build_mapping(ImleConfig(), 64), (32,))
    assert found.forward_flops == 2 * (32 * 128 + 128 * 128 + 128 * 64)
    assert found.parameters == 32 * 128 + 128 * 128 + 128 * 64 + 4 * 128


@pytest.fixture(scope="module")
def vgg16():
    with torch.device("meta"):
        return Vgg16("torch").requires_grad_(False)


def test_vgg16_costs_what_is_published(vgg16):
    """15.35 G multiply-adds for 224 px (13 convolutions); real and generated image forward, one of them back."""
    found = cost(build_loss(LossConfig(levels=1), 256, vgg16), (3, 224, 224), (3, 224, 224))
    assert found.forward_flops / 2 == pytest.approx(2 * 15.35e9, rel=0.005)
    assert found.backward_flops == found.forward_flops // 2
    assert (found.parameters, found.frozen_parameters) == (0, 14_714_688)


def test_1024_px_are_measured_without_memory(vgg16):
    """On `meta` from end to end: a single real activation at this size would be 268 MB."""
    with torch.device("meta"):
        net = build_generator(GeneratorConfig(kind="resnet", latent_dim=256), 1024, 3)
    plain, plain_bytes = cost(net, (256,)), training_bytes(net, 2, (256,))
    net.checkpoint_activations = True
    thrifty, thrifty_bytes = cost(net, (256,)), training_bytes(net, 2, (256,))
    assert thrifty.forward_flops == plain.forward_flops
    assert thrifty.backward_flops > 1.3 * plain.backward_flops
    assert thrifty_bytes < 0.85 * plain_bytes, "most are those of the last block, which are made again"
    config = LossConfig()
    whole = cost(build_loss(config, 1024, vgg16), (3, 1024, 1024), (3, 1024, 1024))
    patches = cost(build_loss(config.model_copy(update={"patch": 256}), 1024, vgg16), (3, 1024, 1024), (3, 1024, 1024))
    assert patches.forward_flops < 0.3 * whole.forward_flops


def test_training_bytes_count_what_is_alive_at_once_in_both_passes():
    """At the ReLU, backward: its output, and the gradients of its output and of its input: 20 + 20 + 20.

    The gradients of the weights, 10 x 20 and 20 x 5, do not grow with the batch.
    """
    net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    assert training_bytes(net, 10_000, (10,)) == pytest.approx(10_000 * 4 * 60, rel=0.01)
    assert all(parameter.grad is None for parameter in net.parameters()), "the module is not changed"


def test_measuring_leaves_the_module_as_it_was():
    net = build_generator(GeneratorConfig(kind="infogan"), 28, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    cost(net, (64,))
    assert net.training
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in net.parameters())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
