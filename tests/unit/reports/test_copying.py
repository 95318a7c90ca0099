"""A run whose samples are copies of training images says so, and no other run does."""

from __future__ import annotations

import pytest
import torch
from code_clouds import fitted
from finished_run import texts_of
from glann.config.run import load
from glann.metrics.copying import copying_of_codes
from glann.metrics.evaluate import measured_metrics
from glann.metrics.tally import KeptFeatures
from glann.reports.copying import warning


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"copying_lite0-96:held-out": 0.91, "copying_codes": 1.0}, ["91% of its samples", "lie at training codes"]),
        ({"copying_vgg16:held-out": 0.66}, ["66% of its samples"]),
        ({"copying_codes": 0.93}, ["lie at training codes"]),
        ({"copying_lite0:held-out": 0.65, "copying_codes": 0.9}, []),
        ({"gaussian/copying_lite0:held-out": 0.99, "gaussian/copying_codes": 1.0}, []),
        ({"copying_z_lite0:held-out": 40.0, "copying_codes": None}, []),
        ({}, []),
    ],
)
def test_what_was_measured_is_said_in_words_beyond_the_limits(metrics, said):
    sentence = warning(metrics)
    assert all(words in sentence for words in said)
    assert sentence.startswith("The sampler copies: ") == bool(said)
    assert bool(sentence) == bool(said)


def test_report_card_and_the_end_of_the_command_say_it(tmp_path):
    config = load("digits", ["name=mine", f"runs_dir={tmp_path}", "tracking.enabled=false"])
    for share in (0.91, 0.55):
        for text in texts_of(config, {"fd_lite0-96:held-out": 40.0, "copying_lite0-96:held-out": share}):
            assert ("The sampler copies: 91% of its samples" in text) == (share == 0.91)


@pytest.mark.parametrize(
    ("kind", "keys", "copies"),
    [
        ("ot", {"extension": "none", "epochs": 4}, True),
        ("ot", {"extension": "pair", "epochs": 4, "angle": 0.3}, True),
        ("gaussian", {}, False),
        ("gmm", {"components": 5, "epochs": 10}, False),
    ],
)
def test_optimal_transport_is_flagged_by_its_codes_and_others_are_not(kind, keys, copies):
    """Held-out images are not needed: codes alone show it, so a run with this sampler always measures them."""
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.nn.functional.normalize(torch.randn(500, 12, generator=generator), dim=1)
    sampler = fitted(kind, z_ND, codes_on="sphere", **keys)
    drawn_BD = sampler.codes(torch.randn(400, sampler.network.noise_dim, generator=generator))
    real, drawn = (KeptFeatures().update(x, torch.arange(len(x))) for x in (z_ND, drawn_BD))
    assert bool(warning({"copying_codes": copying_of_codes(real, drawn)})) == copies
    measured = {metric.name for metric in measured_metrics(load("digits", [f"sampler.kind={kind}"]))}
    assert ("copying_codes" in measured) == copies
