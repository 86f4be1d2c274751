"""The sector against brute force over all bit strings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.sector import Sector, feasible_tokens, from_key_layout, to_key_layout


def brute_force(sector: Sector) -> np.ndarray:
    keys = np.arange(1 << sector.n_qubits)
    bits = (keys[:, None] >> np.arange(sector.n_qubits)) & 1
    return keys[(bits[:, 0::2].sum(axis=1) == sector.n_alpha) & (bits[:, 1::2].sum(axis=1) == sector.n_beta)]


@pytest.mark.parametrize("order", ["reversed", "energy"])
@pytest.mark.parametrize(("t", "a", "b"), [(4, 2, 2), (4, 3, 1), (5, 0, 2), (3, 3, 3), (1, 1, 0), (6, 4, 2)])
def test_enumeration_equals_brute_force(t: int, a: int, b: int, order: str) -> None:
    sector = Sector(t, a, b, order)
    keys = sector.enumerate_keys()
    np.testing.assert_array_equal(keys, brute_force(sector))
    assert sector.size == len(keys)
    assert sector.hf_key() in keys


def test_reference_sizes() -> None:
    assert Sector(7, 5, 5).size == 441
    assert Sector(10, 9, 7).size == 1200
    assert Sector(15, 7, 7).size == 41_409_225


def test_hf_key_occupies_lowest_orbitals() -> None:
    assert Sector(4, 2, 1).hf_key() == 0b00000111
    assert Sector(4, 2, 1, "energy").hf_key() == 0b11010000


@given(st.integers(1, 31), st.data())
def test_layout_round_trip(n_orbitals: int, data: st.DataObject) -> None:
    bits = np.array(data.draw(st.lists(st.integers(0, (1 << (2 * n_orbitals)) - 1), max_size=5)), np.int64)
    for order in ("reversed", "energy"):
        np.testing.assert_array_equal(
            from_key_layout(to_key_layout(bits, n_orbitals, order), n_orbitals, order), bits
        )


@pytest.mark.parametrize(("t", "a", "b"), [(4, 2, 2), (5, 4, 1), (3, 0, 3)])
def test_feasible_tokens_are_exactly_the_prefixes_of_the_sector(t: int, a: int, b: int) -> None:
    sector = Sector(t, a, b)
    table = feasible_tokens(sector)
    keys = sector.enumerate_keys()
    for placed in range(t):
        prefixes = np.unique(keys >> (2 * (t - placed)))
        children = set(np.unique(keys >> (2 * (t - placed - 1))).tolist())
        for prefix in prefixes.tolist():
            bits = [(prefix >> i) & 1 for i in range(2 * placed)]
            row = table[placed, sum(bits[0::2]), sum(bits[1::2])]
            for token in range(4):
                assert row[token] == ((prefix << 2 | token) in children)


@pytest.mark.parametrize("bad", [(32, 1, 1), (0, 0, 0), (4, 5, 0), (4, 0, -1)])
def test_impossible_sectors_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"spin-orbitals|electrons"):
        Sector(*bad)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        Sector(4, 2, 2, "sideways")
