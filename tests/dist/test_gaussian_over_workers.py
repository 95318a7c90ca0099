"""The Gaussian of codes that lie on three workers is the Gaussian of all of them, the same on every worker."""

from __future__ import annotations

import torch
from glann.cluster.placement import ranges
from glann.samplers.gaussian import gaussian

ROWS = 41


def fit(z_ND, rank, world):
    rows = ranges(ROWS, world)[rank]
    return gaussian(z_ND[rows.start : rows.stop], ROWS, torch.device("cpu"))


def test_three_workers_end_where_one_ends(local_ray, gloo_group):
    z_ND = torch.randn(ROWS, 5)
    alone = gaussian(z_ND)
    with gloo_group(3) as members:
        calls = [member.run.remote(fit, z_ND, rank, 3) for rank, member in enumerate(members)]
        answers = local_ray.get(calls, timeout=120)
    for answer in answers:
        for name, tensor in alone.items():
            assert torch.equal(answer[name], answers[0][name])
            torch.testing.assert_close(answer[name], tensor, atol=1e-6, rtol=1e-5)
