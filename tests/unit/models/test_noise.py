"""Protects the counter-based noise: the published generator, the right distribution, any row from its index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glann.models.noise import Stream, noise, philox4x32
from scipy import stats

# Known-answer vectors of Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter, key, result):
    counters = tuple(torch.tensor([word] * 3) for word in words(counter))
    out = philox4x32(counters, tuple(words(key)))
    assert [[int(x) for x in word] for word in out] == [[word] * 3 for word in words(result)]


def test_any_subset_in_any_order_gives_the_same_rows():
    every = noise(11, 4, torch.arange(40_000), 37)
    index = torch.randint(40_000, (777,))
    assert torch.equal(noise(11, 4, index, 37), every[index])
    assert torch.equal(noise(11, 4, index.numpy()[:1], 37), every[index[:1]])
    assert noise(11, 4, torch.arange(0), 37).shape == (0, 37)


def test_rows_of_several_epochs_are_those_of_each_epoch():
    epoch_B, index_B = torch.randint(2**32, (333,)), torch.randint(2**40, (333,))
    together_BE = noise(7, epoch_B, index_B, 9)
    for e_E, epoch, row in zip(together_BE, epoch_B.tolist(), index_B, strict=True):
        assert torch.equal(e_E, noise(7, epoch, row[None], 9)[0])


def test_a_wider_row_begins_with_the_narrower_one():
    assert torch.equal(noise(0, 0, torch.arange(9), 7), noise(0, 0, torch.arange(9), 30)[:, :7])


def test_box_muller_is_that_of_an_independent_float64_computation():
    index, seed, epoch = [5, 2**40 + 3], 123, 9
    for row, e_E in zip(index, noise(seed, epoch, torch.tensor(index), 6), strict=True):
        expected = []
        for block in range(2):
            counter = tuple(torch.tensor([c]) for c in (row & 0xFFFFFFFF, row >> 32, block, epoch))
            w = [int(x) for x in philox4x32(counter, (seed, int(Stream.CANDIDATES)))]
            for a, b in ((w[0], w[1]), (w[2], w[3])):
                radius, angle = np.sqrt(-2 * np.log((a + 0.5) / 2**32)), 2 * np.pi * b / 2**32
                expected += [radius * np.cos(angle), radius * np.sin(angle)]
        np.testing.assert_allclose(e_E.numpy(), np.array(expected[:6]), rtol=1e-6)


def test_noise_is_standard_normal_and_uncorrelated():
    seed = int(torch.randint(2**31, ()))
    e_BE = noise(seed, 1, torch.arange(20_000), 10).double().numpy()
    assert stats.kstest(e_BE.ravel(), "norm").pvalue > 1e-4, f"seed {seed}"
    for column in e_BE.T:
        assert stats.kstest(column, "norm").pvalue > 1e-5, f"seed {seed}"
    correlation = np.corrcoef(e_BE.T) - np.eye(10)
    neighbours = np.corrcoef(e_BE[:-1].ravel(), e_BE[1:].ravel())[0, 1]
    assert np.abs(correlation).max() < 0.04, f"seed {seed}"
    assert abs(neighbours) < 0.015, f"seed {seed}"
    assert abs(stats.kurtosis(e_BE.ravel())) < 0.1, f"seed {seed}"


def test_seeds_epochs_streams_and_rows_are_independent():
    index = torch.arange(500)
    base = noise(1, 1, index, 8)
    others = [
        noise(2, 1, index, 8),
        noise(1, 2, index, 8),
        noise(1, 1, index, 8, stream=Stream.SAMPLES),
        noise(1, 1, index + 500, 8),
        noise(1, 1, index + 2**32, 8),
    ]
    for other in others:
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.08


def test_numbers_out_of_range_are_refused():
    for seed, epoch, row in ((-1, 0, 0), (2**32, 0, 0), (0, -1, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="must"):
            noise(seed, epoch, torch.tensor([row]), 4)
    with pytest.raises(ValueError, match="must"):
        noise(0, torch.tensor([3, 2**32]), torch.tensor([1, 1]), 4)
