"""The prefix tree against plain sets of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.sector import Sector
from replicate.tree import START, PrefixTree, bits_of, build_tree, path_sum, tokens_of


def random_batch(sector: Sector, seed: int, share: float) -> torch.Tensor:
    keys = sector.enumerate_keys()
    chosen = np.random.default_rng(seed).random(len(keys)) < share
    chosen[seed % len(keys)] = True
    return torch.as_tensor(keys[chosen])


def reference_nodes(sector: Sector, keys: torch.Tensor) -> list[tuple[int, ...]]:
    """Prefixes (as token tuples) that some determinant of the sector leaves in two ways, depth first."""
    everything = [
        tuple(row) for row in tokens_of(torch.as_tensor(sector.enumerate_keys()), sector.n_orbitals)
    ]
    everything = [tuple(int(t) for t in row) for row in everything]
    batch = [tuple(int(t) for t in row) for row in tokens_of(keys, sector.n_orbitals)]
    nodes = set()
    for t in range(sector.n_orbitals):
        ways: dict[tuple[int, ...], set[int]] = {}
        for row in everything:
            ways.setdefault(row[:t], set()).add(row[t])
        nodes |= {row[:t] for row in batch if len(ways[row[:t]]) > 1}
    return sorted(nodes)  # tuple order is depth-first pre-order


def prefix_of(tree: PrefixTree, node: int) -> tuple[int, ...]:
    tokens = tokens_of(tree.keys, tree.sector.n_orbitals)[tree.first_row[node]]
    return tuple(tokens[: int(tree.level[node])].tolist())


@pytest.mark.parametrize(
    ("sector", "nodes"), [(Sector(7, 5, 5), 280), (Sector(10, 7, 7), 9401), (Sector(3, 3, 3), 0)]
)
def test_unforced_prefixes_of_whole_sectors(sector: Sector, nodes: int) -> None:
    """H2O and N2 as counted in DESIGN.md section 2; a sector of one determinant has nothing to evaluate."""
    assert build_tree(torch.as_tensor(sector.enumerate_keys()), sector).n_nodes == nodes


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(5, 2, 3), (4, 1, 1), (4, 4, 2), (6, 5, 3), (3, 0, 1)]),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_tree_equals_sets_of_prefixes(shape: tuple[int, int, int], seed: int, share: float) -> None:
    sector = Sector(*shape)
    keys = random_batch(sector, seed, share)
    tree = build_tree(keys, sector)
    expected = reference_nodes(sector, keys)
    assert [prefix_of(tree, i) for i in range(tree.n_nodes)] == expected

    batch = [tuple(row.tolist()) for row in tokens_of(keys, sector.n_orbitals)]
    for i, prefix in enumerate(expected):
        assert int(tree.symbol[i]) == (prefix[-1] if prefix else START)
        assert int(tree.size[i]) == sum(other[: len(prefix)] == prefix for other in expected)
        for token in range(4):
            rows = [r for r, row in enumerate(batch) if row[: len(prefix) + 1] == (*prefix, token)]
            start, count = int(tree.edge_start[4 * i + token]), int(tree.edge_count[4 * i + token])
            assert count == len(rows)
            if rows:
                assert rows == list(range(start, start + count))
    for r, row in enumerate(batch):
        for t in range(sector.n_orbitals):
            edge = int(tree.edges[r, t])
            if row[:t] in expected:
                assert edge == 4 * expected.index(row[:t]) + row[t]
            else:
                assert edge == 4 * tree.n_nodes


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(5, 2, 3), (4, 1, 1), (6, 5, 3)]),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([1, 3, 4, 16]),
)
def test_blocks_hold_exactly_the_ancestors(
    shape: tuple[int, int, int], seed: int, share: float, width: int
) -> None:
    sector = Sector(*shape)
    tree = build_tree(random_batch(sector, seed, share), sector)
    blocks = tree.blocks(width)
    assert blocks.n_padded % width == 0
    assert tree.n_nodes <= blocks.n_padded < tree.n_nodes + width
    seen: dict[int, list[int]] = {}
    for b in range(blocks.path.shape[0]):
        own = list(range(b * width, (b + 1) * width))
        keys = [*blocks.path[b].tolist(), *own]
        for q in range(width):
            seen[own[q]] = sorted(k for k, on in zip(keys, blocks.mask[b, q].tolist(), strict=True) if on)
    for i in range(tree.n_nodes):
        prefix = prefix_of(tree, i)
        ancestors = [j for j in range(i + 1) if prefix[: int(tree.level[j])] == prefix_of(tree, j)]
        assert seen[i] == ancestors
    assert all(seen[i] == [i] for i in range(tree.n_nodes, blocks.n_padded))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(5, 2, 3), (4, 4, 2), (6, 5, 3)]), st.integers(0, 10_000), st.sampled_from([0.1, 1.0])
)
def test_tips_stand_for_every_node(shape: tuple[int, int, int], seed: int, share: float) -> None:
    sector = Sector(*shape)
    tree = build_tree(random_batch(sector, seed, share), sector)
    tips, slots = tree.tips, tree.tips.slot.tolist()
    assert len(set(slots)) == len(slots)
    for i, slot in enumerate(slots):
        tip, level = divmod(slot, sector.n_orbitals)
        assert level == int(tree.level[i])
        tokens = tokens_of(tips.keys[tip], sector.n_orbitals)[:level]
        assert tuple(tokens.tolist()) == prefix_of(tree, i)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_path_sum_and_its_gradient(share: float) -> None:
    sector = Sector(6, 4, 3)
    tree = build_tree(random_batch(sector, 3, share), sector)
    values = torch.randn(tree.n_nodes, 4, dtype=torch.float64, requires_grad=True)
    flat = torch.cat([values.view(-1), values.new_zeros(1)])
    expected = flat[tree.edges].sum(1)
    weight = torch.randn(tree.n_leaves, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, values, weight)
    got = path_sum(values, tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(got, values, weight)[0], wanted, rtol=0, atol=1e-12)


def test_bits_follow_tokens() -> None:
    keys = torch.tensor([0b01_10_11_00])
    assert tokens_of(keys, 4).tolist() == [[1, 2, 3, 0]]
    assert bits_of(keys, 4, torch.float32).tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
