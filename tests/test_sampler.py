"""The sampler against exact probabilities (chi-square), the truncation rule, and its two regimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, SECTORS, wave_function
from scipy import stats

from replicate.ansatz import Level, transformer
from replicate.sampler import keep_largest, sample_tree, split_binary, split_tokens, truncate
from replicate.sector import Sector
from replicate.tree import START, build_tree


def exact(kind: str, sector: Sector, seed: int = 0, device: str = "cpu") -> tuple:
    wave = wave_function(sector, kind, seed).to(device)
    keys = torch.as_tensor(sector.enumerate_keys(), device=device)
    with torch.no_grad():
        return wave, keys, wave.log_prob(build_tree(keys, sector)).exp()


def on_sector(keys: torch.Tensor, samples_keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
    out[torch.searchsorted(keys, samples_keys)] = counts
    return out


def chi_square_p(counts: torch.Tensor, prob: torch.Tensor) -> float:
    """p-value of observed counts; cells expected fewer than five times are pooled."""
    total = counts.sum().item()
    expected = (prob * total).cpu().numpy()
    seen = counts.cpu().numpy()
    large = expected >= 5
    cells = np.append(seen[large], seen[~large].sum())
    means = np.append(expected[large], expected[~large].sum())
    keep = means > 0
    return float(stats.chisquare(cells[keep], means[keep] * cells[keep].sum() / means[keep].sum()).pvalue)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SECTORS[:3])
def test_counts_follow_the_distribution(kind: str, shape: tuple[int, int, int], device: str) -> None:
    """Both regimes, 50 000 samples, several seeds together: p > 0.01 for these fixed seeds."""
    sector = Sector(*shape)
    wave, keys, prob = exact(kind, sector, device=device)
    tree_counts, joint_counts = torch.zeros_like(prob), torch.zeros_like(prob)
    for seed in range(5):
        generator = torch.Generator(device).manual_seed(seed)
        samples = sample_tree(wave, 10_000, sector.size, generator)
        assert samples.counts.sum() == 10_000
        tree_counts += on_sector(keys, samples.keys, samples.counts)
        joint = split_binary(10_000, prob, generator)
        assert joint.sum() == 10_000
        joint_counts += joint
    assert chi_square_p(tree_counts, prob) > 0.01
    assert chi_square_p(joint_counts, prob) > 0.01
    wrong = torch.roll(prob, 1)
    assert chi_square_p(tree_counts, wrong) < 1e-6  # the test can fail


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drawn", [1000, 10**12])
def test_counts_have_multinomial_spread(device: str, drawn: int) -> None:
    """Variance of the counts is n p (1 - p) in both regimes, not only their mean."""
    sector = Sector(4, 2, 2)
    wave, keys, prob = exact("made", sector, device=device)
    draws = {"tree": [], "joint": []}
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(400):
        samples = sample_tree(wave, drawn, sector.size, generator)
        draws["tree"].append(on_sector(keys, samples.keys, samples.counts))
        draws["joint"].append(split_binary(drawn, prob, generator))
    for counts in draws.values():
        variance = torch.stack(counts).var(0)
        ratio = (variance / (drawn * prob * (1 - prob)))[prob > 0.01]
        assert 0.85 < ratio.mean().item() < 1.15


@pytest.mark.parametrize("device", DEVICES)
def test_split_tokens_is_multinomial(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    prob = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5]], dtype=torch.float64
    )
    drawn = torch.full((3,), 1e6, dtype=torch.float64, device=device)
    counts = split_tokens(drawn, prob.to(device), generator).cpu()
    assert torch.equal(counts.sum(1), torch.full((3,), 1e6, dtype=torch.float64))
    assert ((counts > 0) == (prob > 0)).all()
    assert stats.chisquare(counts[0].numpy(), 1e6 * prob[0].numpy()).pvalue > 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_huge_counts_are_exact_integers(kind: str, device: str) -> None:
    sector = Sector(7, 5, 5)
    wave, keys, prob = exact(kind, sector, device=device)
    generator = torch.Generator(device).manual_seed(1)
    samples = sample_tree(wave, 10**12, sector.size, generator)
    joint = split_binary(10**12, prob, generator)
    for counts in (on_sector(keys, samples.keys, samples.counts), joint):
        assert int(counts.sum()) == 10**12
        assert torch.equal(counts, counts.round())
        seen = counts > 1e6
        deviation = (counts - prob * 1e12) / (prob * (1 - prob) * 1e12).sqrt()
        assert deviation[seen].abs().max() < 6


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_samples(kind: str) -> None:
    sector = Sector(6, 3, 2)
    wave, _, prob = exact(kind, sector)
    runs = [sample_tree(wave, 10**6, 40, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(runs[0].keys, runs[1].keys)
    assert torch.equal(runs[0].counts, runs[1].counts)
    assert (runs[0].keys.diff() > 0).all()
    joint = [split_binary(10**6, prob, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(joint[0], joint[1])


def truncate_by_hand(
    leaves: dict[tuple[int, ...], float], n_orbitals: int, most: int
) -> dict[tuple[int, ...], float]:
    """The rule of SCIENCE.md section 2 with dictionaries of token tuples."""
    alive = {leaf: count for leaf, count in leaves.items() if count > 0}
    for placed in range(1, n_orbitals + 1):
        totals: dict[tuple[int, ...], float] = {}
        for leaf, count in alive.items():
            totals[leaf[:placed]] = totals.get(leaf[:placed], 0.0) + count
        keep = sorted(totals, key=lambda prefix: (-totals[prefix], prefix))
        kept = set(keep[: most if placed == n_orbitals else 2 * most])
        alive = {leaf: count for leaf, count in alive.items() if leaf[:placed] in kept}
    return alive


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([1, 3, 50]))
def test_truncation_rule(seed: int, most: int, largest: int) -> None:
    """Also with many ties: counts are drawn from few values."""
    sector = Sector(5, 2, 3)
    keys = torch.as_tensor(sector.enumerate_keys())
    counts = torch.as_tensor(
        np.random.default_rng(seed).integers(0, largest + 1, len(keys)), dtype=torch.float64
    )
    shifts = range(8, -1, -2)
    leaves = {tuple((int(k) >> s) & 3 for s in shifts): float(c) for k, c in zip(keys, counts, strict=True)}
    expected = truncate_by_hand(leaves, 5, most)
    got = truncate(keys, counts, 5, most)
    found = {
        tuple((int(k) >> s) & 3 for s in shifts): float(c) for k, c in zip(got.keys, got.counts, strict=True)
    }
    assert found == expected
    assert (got.keys.diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_growing_tree_truncates_as_it_goes(kind: str) -> None:
    """No level of the tree evaluates more than 2 B_max prefixes; B_max determinants come out."""
    sector = Sector(7, 4, 3)
    wave, _, _ = exact(kind, sector)
    samples = sample_tree(wave, 10**9, 12, torch.Generator().manual_seed(0))
    assert len(samples.keys) == 12
    assert max(samples.nodes) <= 24
    assert abs(samples.weights.sum().item() - 1) < 1e-12


def test_one_sample_and_one_determinant() -> None:
    sector = Sector(3, 3, 3)
    wave = wave_function(sector, "transformer")
    samples = sample_tree(wave, 10, 5, torch.Generator().manual_seed(0))
    assert samples.keys.tolist() == [0b111111]
    assert samples.counts.tolist() == [10]
    sector = Sector(4, 2, 2)
    samples = sample_tree(wave_function(sector, "retnet"), 1, 5, torch.Generator().manual_seed(0))
    assert samples.counts.tolist() == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scratch", [transformer.CPU_SCRATCH, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SECTORS)
def test_carried_state_gives_the_flat_logits(
    kind: str, shape: tuple[int, int, int], scratch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key-value cache (few paths at a time, too), recurrence and carried units, level by level over all
    prefixes of the sector."""
    monkeypatch.setattr(transformer, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(transformer, "DEVICE_SCRATCH", scratch)
    sector = Sector(*shape)
    wave = wave_function(sector, kind, seed=2).to(device)
    keys = torch.as_tensor(sector.enumerate_keys(), device=device)
    flat = wave.network.flat_logits(keys)
    state: tuple[torch.Tensor, ...] = ()
    previous, n_before = keys.new_zeros(1), 0
    for placed in range(sector.n_orbitals):
        full = keys >> 2 * (sector.n_orbitals - placed)
        prefix, first = (torch.as_tensor(x, device=device) for x in np.unique(full.cpu(), return_index=True))
        parent = torch.searchsorted(previous, prefix >> 2) if placed else keys.new_zeros(1)
        symbol = prefix & 3 if placed else keys.new_full((1,), START)
        logits, state = wave.network.advance(Level(placed, parent, symbol, prefix, n_before), state)
        torch.testing.assert_close(logits, flat[first, placed], rtol=0, atol=1e-10)
        previous, n_before = prefix, n_before + prefix.shape[0]


def test_keep_largest_prefers_the_first_of_equals() -> None:
    counts = torch.tensor([2.0, 3.0, 2.0, 1.0, 3.0])
    assert keep_largest(counts, 3).tolist() == [0, 1, 4]
    assert keep_largest(counts, 9).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.integers(1, 40))
def test_keep_largest_is_the_head_of_a_stable_sort(counts: list[int], most: int) -> None:
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    kept = keep_largest(torch.tensor(counts, dtype=torch.float64), most)
    assert kept.tolist() == sorted(order[:most])
