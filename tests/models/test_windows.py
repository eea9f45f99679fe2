"""Windows: every sequence in one of them, and few sizes, each of which is a call of attention."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moebert_kernels.models.windows import DROPOUT, FLASH, choose_windows, cost_us, fill_windows


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(0, 150), max_size=40), size=st.sampled_from([1, 32, 64, 128]))
def test_every_sequence_is_in_one_window_of_its_size(lengths, size):
    groups = fill_windows(lengths, size)
    assert len({group.size for group in groups}) == len(groups)
    for group in groups:
        for window in group.windows:
            assert sum(lengths[n] for n in window) == group.size
            assert len(window) == 1 or group.size <= size
    placed = sorted(n for group in groups for window in group.windows for n in window)
    assert placed == [n for n, length in enumerate(lengths) if length]


def test_windows_are_full_where_sequences_can_be_found_that_fill_them():
    assert {group.size for group in fill_windows([40, 30, 24, 20, 10, 4], 64)} == {64}
    assert [len(group.windows) for group in fill_windows([16] * 32, 64)] == [8]


def test_a_batch_of_sentences_is_a_few_calls():
    """By length alone, 32 sentences of some twenty lengths were twenty calls in every layer."""
    generator = random.Random(0)
    lengths = [generator.randint(5, 50) for _ in range(32)]
    groups = choose_windows(lengths)
    assert len(groups) <= 6 < len(set(lengths)) / 3
    assert sum(len(group.windows) for group in groups if group.size >= 60) >= 10


def test_dropout_asks_for_small_windows():
    """Its weights are written to memory: what windows hold beside a sequence's own costs as much."""
    lengths = [20, 22, 24, 21] * 8
    area = {
        costs: sum(len(windows) * size**2 for size, windows in choose_windows(lengths, costs))
        for costs in (FLASH, DROPOUT)
    }
    assert area[DROPOUT] < 0.5 * area[FLASH]
    for costs in (FLASH, DROPOUT):
        chosen = cost_us(choose_windows(lengths, costs), costs)
        assert chosen <= min(cost_us(fill_windows(lengths, size), costs) for size in costs.sizes[:2])
