"""Protects the search among distinct candidates: no row is left out that does not equal an earlier one."""

from __future__ import annotations

import pytest
import torch
from glann.cluster import distinct
from glann.cluster.distinct import distinct_rows
from glann.cluster.neighbours import nearest


@pytest.fixture(autouse=True)
def _seed():
    print("seed", torch.seed())


def first_of_equals(x_MD: torch.Tensor) -> list[int]:
    """By a dictionary of rows, whose keys compare as the numbers do (-0 equals 0)."""
    first: dict[tuple[float, ...], int] = {}
    for at, row in enumerate(x_MD.tolist()):
        first.setdefault(tuple(row), at)
    return sorted(first.values())


@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("m", [0, 1, 23, 9001])
def test_the_first_of_equal_rows_is_kept(m, d):
    for kinds in (1, 20, 10**9):
        few = torch.randn(min(kinds, m), d)
        x_MD = few[torch.randint(len(few), (m,))] if m else few
        assert distinct_rows(x_MD).tolist() == first_of_equals(x_MD)


def test_small_integers_and_both_zeros_are_numbers_like_others():
    x_MD = torch.randint(-1, 2, (4001, 5)).float() * torch.tensor([1.0, -1.0])[torch.randint(2, (4001, 1))]
    assert distinct_rows(x_MD).tolist() == first_of_equals(x_MD)


def test_rows_that_differ_in_the_last_bit_are_two():
    one = torch.randn(1, 64)
    other = one.clone()
    other[0, 63] = torch.nextafter(other[0, 63], torch.tensor(torch.inf))
    assert distinct_rows(torch.cat([one, other, one])).tolist() == [0, 1]


def test_unequal_rows_of_one_hash_are_kept(monkeypatch):
    monkeypatch.setattr(distinct, "_hash", lambda x_MD, weight_D: torch.zeros(len(x_MD), dtype=torch.int64))
    x_MD = torch.randn(7, 3)[torch.randint(7, (501,))]
    kept = distinct_rows(x_MD)
    assert set(first_of_equals(x_MD)) <= set(kept.tolist())
    z_ND = torch.randn(43, 3)
    index_N, _ = nearest(z_ND, x_MD)
    square_NM = (z_ND.double()[:, None] - x_MD.double()[None]).square().sum(2)
    assert torch.equal(index_N, square_NM.argmin(1))
