"""Samplers cover all modes of 8 Gaussians on a ring and of 25 on a grid, with as few draws as possible in between.

A mode is covered if one of 2,500 draws is within 3 standard deviations of it. The shares of such draws: a Gaussian of
the size of the clouds has 0.001 on the ring and 0.06 on the grid, and cannot have more. Kinds that pull or move a
continuous map (IMLE, drift) need more steps than a test may take to leave as little between the modes as others;
docs/quality.md has their shares.
"""

from __future__ import annotations

from typing import Any

import pytest
from code_clouds import cloud, covered, fitted

T: dict[str, Any] = {
    "epochs": 300,
    "noise_dim": 2,
    "depth": 3,
    "activation": "relu",
    "normalisation": "none",
    "candidates": 1,
    "chamfer": 1.0,
    "lr": 3e-3,
    "batch_size": 100,
    "schedule": {"kind": "cosine"},
}
DRIFT: dict[str, Any] = {"hidden_dim": 256, "lr": 3e-3, "batch_size": 250, "noise_dim": 2, "epochs": 250}
FLOW: dict[str, Any] = {"hidden_dim": 256, "lr": 3e-3, "batch_size": 250, "activation": "relu", "steps": 8}
# Rows, keys, and the least share of good draws by shape; shapes whose fit takes long are left out.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, float]]] = {
    "gmm": (1000, {"components": 25, "floor": 1e-6, "epochs": 20}, {"ring": 0.9, "grid": 0.9}),
    "ot": (500, {"extension": "pair", "angle": 0.03, "epochs": 10}, {"ring": 0.9, "grid": 0.9}),
    "ot simplex": (500, {"extension": "simplex", "epochs": 10}, {"ring": 0.9}),
    "ot none": (500, {"extension": "none", "epochs": 10}, {"ring": 0.9}),
    "ar": (2000, {"epochs": 60, "blur": 0.0, "lr": 3e-3}, {"ring": 0.9}),
    "coupling": (
        2000,
        {
            "epochs": 150,
            "blur": 0.0,
            "layers": 2,
            "components": 10,
            "depth": 2,
            "hidden_dim": 64,
            "lr": 3e-3,
        },
        {"ring": 0.9},
    ),
    "imle": (400, T, {"ring": 0.7}),
    "rs-imle": (400, T | {"epsilon": 0.003, "chamfer": 0.5}, {"ring": 0.5}),
    "adaptive-imle": (400, T, {"ring": 0.5}),
    "flow": (1000, FLOW | {"epochs": 450}, {"ring": 0.9}),
    "drift": (1000, DRIFT, {"ring": 0.65}),
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, (*_, shares) in CASES.items() for name in shares])
def test_all_modes_are_covered(case, name):
    rows, keys, shares = CASES[case]
    modes, share = covered(fitted(case.split()[0], cloud(name, rows), **keys), name)
    print(f"{case}: {modes} modes, {share:.3f} of the draws are good")
    assert modes == {"ring": 8, "grid": 25}[name]
    assert share >= shares[name]
