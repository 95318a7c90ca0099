"""A permutation of 0..n-1 whose every place is computed by itself, in constant memory.

A Feistel network over Z_a x Z_b with modular addition, with a b just above n, and cycle walking (Black & Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002): a worker computes the places of its own rows, or the rows of one
batch; the order of all rows is never stored.

Legend: K indices of a call.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8  # four suffice for large n (Luby & Rackoff 1988); small domains need more
_CHUNK = 1 << 15  # indices at a time, so that the temporaries stay in the cache
_SHIFTS, _FACTORS = (30, 27, 31), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64
_HALF = np.uint64(32)


class IndexCipher:
    """A permutation of 0..n-1, the same on every machine; a function of n and the key only.

    Args:
        n: at most 2**62.
        key: non-negative integers.
    """

    def __init__(self, n: int, *key: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"cannot permute {n} indices")
        self.n = n
        self.a = math.isqrt(n - 1) + 1
        self.b = -(-n // self.a)
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def at(self, place_K: np.ndarray) -> np.ndarray:
        """The indices at places of the permutation, int64."""
        return self._walk(place_K, forward=True)

    def places(self, index_K: np.ndarray) -> np.ndarray:
        """The places of indices in the permutation, int64; the inverse of `at`."""
        return self._walk(index_K, forward=False)

    def _walk(self, from_K: np.ndarray, forward: bool) -> np.ndarray:
        """Apply the network until every number is below n again; a share of about 1 / sqrt(n) needs another round."""
        to_K = np.empty(len(from_K), np.int64)
        for at in range(0, len(from_K), _CHUNK):
            to_k = self._network(np.asarray(from_K[at : at + _CHUNK], np.uint64), forward)
            while len(outside := np.flatnonzero(to_k >= self.n)):
                to_k[outside] = self._network(to_k[outside], forward)
            to_K[at : at + _CHUNK] = to_k
        return to_K

    def _network(self, x_k: np.ndarray, forward: bool) -> np.ndarray:
        """One pass over all rounds: the halves in turn are moved by a random function of the other one."""
        halves = list(np.divmod(x_k, np.uint64(self.b)))
        sizes = (np.uint64(self.a), np.uint64(self.b))
        for number in range(ROUNDS) if forward else reversed(range(ROUNDS)):
            own, size = number % 2, sizes[number % 2]
            shift_k = self._function(halves[1 - own], number, size)
            moved_k = halves[own] + (shift_k if forward else size - shift_k)
            moved_k -= size * (moved_k >= size)
            halves[own] = moved_k
        return halves[0] * np.uint64(self.b) + halves[1]

    def _function(self, x_k: np.ndarray, number: int, size: np.uint64) -> np.ndarray:
        """Random numbers below `size`, which is below 2**32: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
        mixed_k = x_k + self.keys[number]
        for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
            mixed_k = (mixed_k ^ (mixed_k >> np.uint64(shift))) * factor
        mixed_k ^= mixed_k >> np.uint64(_SHIFTS[2])
        return ((mixed_k >> _HALF) * size) >> _HALF
