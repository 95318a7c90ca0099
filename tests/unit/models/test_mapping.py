"""Protects the mapping T: its published shape, unit codes, and codes that do not depend on batch mates."""

from __future__ import annotations

import numpy as np
import torch
from glann.config.samplers import ImleConfig
from glann.models.mapping import build_mapping

CONFIG = ImleConfig(noise_dim=7, hidden_dim=11)


def test_the_published_layers_without_bias():
    mapping = build_mapping(ImleConfig(), 64)
    shapes = {name: tuple(value.shape) for name, value in mapping.named_parameters()}
    assert shapes["fc1.weight"] == (128, 32)
    assert shapes["fc2.weight"] == (128, 128)
    assert shapes["fc3.weight"] == (64, 128)
    assert not any(name.startswith("fc") and name.endswith("bias") for name in shapes)


def test_codes_equal_a_float64_reference_in_train_mode():
    seed = torch.seed() % 2**32
    print("seed", seed)
    mapping = build_mapping(CONFIG, 5)
    e_BE = torch.randn(9, 7)
    state = {name: value.double().numpy() for name, value in mapping.state_dict().items()}
    h = e_BE.double().numpy()
    for i in (1, 2):
        h = h @ state[f"fc{i}.weight"].T
        h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * state[f"norm{i}.weight"] + state[f"norm{i}.bias"]
        h = np.maximum(h, 0)
    z = h @ state["fc3.weight"].T
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(mapping(e_BE).detach(), z, atol=2e-5)


def test_codes_have_unit_norm_and_padding_does_not_touch_them():
    mapping = build_mapping(CONFIG, 5)
    e_BE = torch.randn(6, 7)
    weight_B = torch.tensor([1.0, 1, 1, 1, 0, 0])
    z_BD = mapping(torch.cat([e_BE[:4], 1e3 * torch.ones(2, 7)]), weight_B)
    torch.testing.assert_close(z_BD[:4], build_with_state_of(mapping)(e_BE[:4]))
    torch.testing.assert_close(z_BD.norm(dim=1), torch.ones(6))


def build_with_state_of(mapping):
    twin = build_mapping(CONFIG, 5)
    twin.load_state_dict(mapping.state_dict())
    return twin


def test_in_eval_mode_a_code_does_not_depend_on_its_batch_mates():
    mapping = build_mapping(CONFIG, 5)
    e_BE = torch.randn(6, 7)
    mapping(e_BE)
    mapping.eval()
    torch.testing.assert_close(mapping(e_BE)[2:3], mapping(e_BE[2:3]))
