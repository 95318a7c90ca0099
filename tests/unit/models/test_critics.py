"""Critics: shapes, what padding and batch mates do to a score, and the combinations that are refused."""

from __future__ import annotations

import pytest
import torch
from glann.config.networks import CriticConfig
from glann.errors import UserError
from glann.models.critics import build_critic

CASES = [
    ({"kind": "infogan", "width": 8}, 28, 1),
    ({"kind": "infogan", "width": 8, "batch_norm": True}, 32, 3),
    ({"kind": "dcgan", "width": 8}, 28, 1),
    ({"kind": "dcgan", "width": 8, "batch_norm": True}, 64, 3),
    ({"kind": "resnet", "width": 8, "max_width": 16}, 64, 3),
    ({"kind": "autoencoder", "width": 8, "code_dim": 5}, 28, 1),
    ({"kind": "infogan", "width": 8, "spectral_norm": True}, 28, 1),
    ({"kind": "infogan", "width": 8, "kernels": 6}, 28, 1),
    ({"kind": "dcgan", "width": 8, "classes": 3}, 28, 1),
]


@pytest.mark.parametrize(("keys", "resolution", "channels"), CASES)
def test_scores_of_several_images_a_row_are_those_of_each(keys, resolution, channels):
    torch.manual_seed(0)
    critic = build_critic(CriticConfig(**keys), resolution, channels)
    img = torch.rand(4, 2, channels, resolution, resolution)
    if critic.training and keys.get("spectral_norm"):
        critic.eval()  # each pass is a power iteration
    both = critic(img, torch.ones(4))
    assert both.score_B.shape == (4, 2)
    assert both.features_BF.shape[:2] == (4, 2)
    for at in range(2):
        one = critic(img[:, at], torch.ones(4))
        torch.testing.assert_close(both.score_B[:, at], one.score_B)
        torch.testing.assert_close(both.features_BF[:, at], one.features_BF)


@pytest.mark.parametrize(("keys", "resolution", "channels"), CASES)
def test_padding_changes_no_score_and_mates_only_with_batch_norm_or_kernels(keys, resolution, channels):
    torch.manual_seed(0)
    critic = build_critic(CriticConfig(**keys), resolution, channels)
    if keys.get("spectral_norm"):
        critic.eval()
    img = torch.rand(5, channels, resolution, resolution)
    weight_B = torch.tensor([1.0, 1, 1, 0, 0])
    padded = critic(img, weight_B).score_B[:3]
    torch.testing.assert_close(padded, critic(img[:3], weight_B[:3]).score_B, atol=1e-5, rtol=1e-4)
    alone = critic(img[:2], weight_B[:2]).score_B
    mixed = bool(keys.get("batch_norm") or keys.get("kernels"))
    assert torch.allclose(alone, padded[:2], atol=1e-6, rtol=1e-5) != mixed


def test_the_score_of_an_autoencoder_is_its_mean_error():
    critic = build_critic(CriticConfig(kind="autoencoder", width=8), 28, 1)
    img = torch.rand(3, 1, 28, 28)
    judged = critic(img)
    again = critic.decoder(judged.features_BF)
    torch.testing.assert_close(judged.score_B, (again - img).abs().mean((1, 2, 3)))
    assert (judged.score_B > 0).all()


def test_spectral_normalisation_bounds_every_layer():
    torch.manual_seed(0)
    critic = build_critic(CriticConfig(kind="infogan", width=8, spectral_norm=True), 28, 1)
    for _ in range(15):
        critic(torch.rand(1, 1, 28, 28))
    norm = torch.linalg.matrix_norm(critic.fc.weight, ord=2)
    assert float(norm) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("kind", "resolution"), [("infogan", 128), ("infogan", 30), ("resnet", 28), ("autoencoder", 128)]
)
def test_impossible_sizes_are_refused(kind, resolution):
    with pytest.raises(UserError, match="sees images"):
        build_critic(CriticConfig(kind=kind), resolution, 1)


@pytest.mark.parametrize(
    ("keys", "resolution", "channels", "wanted"),
    [
        # conv 64, conv 128 and fc 1024 with BatchNorm, fc 1
        (
            {"kind": "infogan", "batch_norm": True},
            28,
            1,
            (64 * 16 + 64) + (64 * 128 * 16 + 2 * 128) + (128 * 49 * 1024 + 2 * 1024) + (1024 + 1),
        ),
        # PyTorch's example (ndf 64), without our biases of the first layer and the last
        ({"kind": "dcgan", "batch_norm": True}, 64, 3, 2_765_568 + 64 + 1),
        # 3x3 to 64, then blocks of 64, 128 and 128 channels: two 3x3 each, and a 1x1 where widths differ
        (
            {"kind": "resnet", "max_width": 128},
            16,
            3,
            (3 * 64 * 9 + 64)
            + 2 * (64 * 64 * 9 + 64)
            + (64 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 64 * 128)
            + 2 * (128 * 128 * 9 + 128)
            + (128 * 16 + 1),
        ),
    ],
    ids=["infogan", "dcgan", "resnet"],
)
def test_critics_have_the_parameters_of_their_papers(keys, resolution, channels, wanted):
    with torch.device("meta"):
        critic = build_critic(CriticConfig(**keys), resolution, channels)
    assert sum(p.numel() for p in critic.parameters()) == wanted


def test_the_head_of_codes_is_beside_the_score():
    torch.manual_seed(0)
    critic = build_critic(CriticConfig(width=8), 28, 1, code=12)
    judged = critic(torch.rand(4, 2, 1, 28, 28))
    assert judged.head_BQ.shape == (4, 2, 12)
    assert build_critic(CriticConfig(width=8), 28, 1)(torch.rand(4, 1, 28, 28)).head_BQ.shape == (4, 0)
