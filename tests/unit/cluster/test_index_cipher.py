"""Protects the order of stage 2's epochs, which no worker holds: it is a permutation, the same on every machine, and
costs a worker what its own rows cost.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from glann.cluster.index_cipher import IndexCipher
from glann.cluster.placement import global_batches, ranges


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 257, 1000, 65_537, 99_991])
def test_every_index_has_one_place(n):
    cipher = IndexCipher(n, 3, 1)
    index_n = cipher.at(np.arange(n))
    assert sorted(index_n) == list(range(n))
    np.testing.assert_array_equal(cipher.places(index_n), np.arange(n))
    some = np.random.default_rng().permutation(n)[:7]
    np.testing.assert_array_equal(cipher.at(some), index_n[some])  # each by itself


@pytest.mark.parametrize("n", [(1 << 40) + 15, (1 << 62) - 57, 1 << 62])
def test_large_numbers_come_back(n):
    place_K = np.random.default_rng().integers(0, n, 1001)
    place_K[:2] = 0, n - 1
    cipher = IndexCipher(n, 9)
    index_K = cipher.at(place_K)
    assert index_K.min() >= 0
    assert index_K.max() < n
    np.testing.assert_array_equal(cipher.places(index_K), place_K)


def test_the_order_is_the_same_on_every_machine():
    assert IndexCipher(11, 2, 0, 0).at(np.arange(11)).tolist() == [4, 7, 2, 9, 6, 3, 5, 10, 1, 8, 0]
    some = IndexCipher(100_000_007, 2, 5, 1).at(np.array([0, 1, 99_999_999]))
    assert some.tolist() == [83405854, 8082079, 51610811]


def test_orders_of_other_epochs_and_seeds_are_others_and_places_are_uniform():
    first, other = (IndexCipher(1000, 2, 7, epoch).at(np.arange(1000)) for epoch in (0, 1))
    assert (first == other).mean() < 0.02
    place_E5 = np.stack([IndexCipher(5, 2, 7, epoch).places(np.arange(5)) for epoch in range(2000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in place_E5.T])
    assert np.abs(counts - 400).max() < 110, counts
    # neighbours do not stay neighbours
    apart = np.abs(np.diff(IndexCipher(10_007, 1).at(np.arange(10_007))))
    assert abs(apart.mean() / (10_007 / 3) - 1) < 0.05


def test_indices_that_cannot_be_permuted_are_refused():
    for n in (0, (1 << 62) + 1):
        with pytest.raises(ValueError, match="cannot permute"):
            IndexCipher(n)


@pytest.mark.parametrize(("rows", "batch", "world"), [(257, 128, 3), (1000, 7, 5), (40_001, 128, 2), (5, 100, 5)])
def test_the_workers_parts_of_the_batches_make_them_up_in_their_order(rows, batch, world):
    batches = global_batches(4, 2, rows, batch)
    parts = [batches.own(own) for own in ranges(rows, world)]
    for step, row_B in enumerate(batches):
        np.testing.assert_array_equal(batches[step], row_B)
        assert batches.size(step) == len(row_B)
        held = [row_n[first_S[step] : first_S[step + 1]] for row_n, first_S in parts]
        for own, found in zip(ranges(rows, world), held, strict=True):
            np.testing.assert_array_equal(found, row_B[(row_B >= own.start) & (row_B < own.stop)])
        assert sum(map(len, held)) == len(row_B)
    assert batches[-1].tolist() == batches[len(batches) - 1].tolist()
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_one_of_1024_workers_orders_its_own_of_100_million_rows():
    """A permutation of all rows takes 14 s and 1.6 GB, on every worker and in every epoch."""
    rows, world = 100_000_007, 1024
    own = ranges(rows, world)[517]
    tracemalloc.start()
    began = time.process_time()
    row_n, first_S = global_batches(1, 3, rows, 1 << 17).own(own)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{seconds:.2f} s, {peak / 1e6:.0f} MB for {len(own):,} rows")
    assert np.array_equal(np.sort(row_n), np.arange(own.start, own.stop))
    assert first_S[-1] == len(own)
    counts = np.diff(first_S)
    assert abs(counts.mean() / (len(own) / len(counts)) - 1) < 1e-9
    assert counts.max() < counts.mean() + 8 * counts.mean() ** 0.5  # spread over the batches as by chance
    assert seconds < 3
    assert peak < 32e6
