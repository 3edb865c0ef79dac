"""The hash of a parameter knows no cut of it, and every change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lmp.train.state_hash import MODULUS, as_signed, fragment_hash

BLOCK = 1 << 15
# Lengths around the blocks in which the hash works, and small ones.
LENGTHS = st.one_of(st.integers(1, 200), st.integers(BLOCK - 2, BLOCK + 2), st.integers(2 * BLOCK, 3 * BLOCK))
SEEDS = st.integers(0, 2**32 - 1)


def bits(seed: int, count: int) -> Tensor:
    """Any patterns of bits as fp32, NaN and infinity among them; a third of them zeros."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 2**32, count, dtype=np.uint32)
    values[generator.random(count) < 1 / 3] = 0
    return torch.from_numpy(values.view(np.float32))


@given(SEEDS, LENGTHS, st.lists(st.floats(0, 1), max_size=6), st.integers(0, 2**40))
def test_the_cut_does_not_matter(seed: int, count: int, cuts: list[float], offset: int) -> None:
    values = bits(seed, count)
    edges = sorted({0, count, *(int(cut * count) for cut in cuts)})
    parts = [fragment_hash(values[a:b], offset + a) for a, b in pairwise(edges)]
    assert sum(parts) % MODULUS == fragment_hash(values, offset)


@given(SEEDS, LENGTHS, st.data())
def test_any_flipped_bit_changes_it(seed: int, count: int, data: st.DataObject) -> None:
    values = bits(seed, count)
    before = fragment_hash(values, 0)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 31))
    values.view(torch.int32).numpy().view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert fragment_hash(values, 0) != before


@given(SEEDS, LENGTHS, st.data())
def test_any_swap_changes_it(seed: int, count: int, data: st.DataObject) -> None:
    values = bits(seed, count)
    before = fragment_hash(values, 0)
    one, other = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    words = values.view(torch.int32)
    assume(words[one] != words[other])
    words[[one, other]] = words[[other, one]]
    assert fragment_hash(values, 0) != before


@given(SEEDS, LENGTHS, st.integers(1, 5), st.integers(0, 2**40))
def test_a_shift_and_missing_zeros_change_it(seed: int, count: int, by: int, offset: int) -> None:
    values = bits(seed, count)
    here = fragment_hash(values, offset)
    assert fragment_hash(values, offset + by) != here
    assert fragment_hash(torch.cat([values, torch.zeros(by)]), offset) != here
    assert fragment_hash(torch.zeros(count), offset) != 0


@given(st.lists(st.integers(0, MODULUS - 1), min_size=1, max_size=5))
def test_signed_hashes_sum_as_tensors_do(hashes: list[int]) -> None:
    total = torch.tensor([as_signed(value) for value in hashes], dtype=torch.int64).sum()
    assert int(total) % MODULUS == sum(hashes) % MODULUS
