"""Autoregressive unique samples with counts (SCIENCE.md section 2; batch autoregressive sampling of
arXiv:2109.12606 and the study's lineage).

Two ways to one distribution. Token by token: every prefix splits its count by a multinomial over its four
conditionals. All at once, where the probabilities of the whole sector are known anyway: the joint multinomial
by binary splitting. The truncation rule is the same: at each token at most 2 B_max prefixes are kept and
B_max at the end, largest counts first (ties: smaller key first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.ansatz.base import Level, State, WaveFunction, log_conditionals
from replicate.capture import Dial
from replicate.sector import TOKENS
from replicate.tree import START


@dataclass(frozen=True)
class Samples:
    """Unique determinants, ascending. `keys`: int64 (unique,). `counts`: float64 (unique,), whole numbers.
    `nodes`: prefixes evaluated per level to draw them (empty where none were)."""

    keys: Tensor
    counts: Tensor
    nodes: tuple[int, ...] = ()

    @property
    def weights(self) -> Tensor:
        """w(x) = count / sum of kept counts: float64 (unique,)."""
        return self.counts / self.counts.sum()


def split_binary(n_samples: Dial, prob: Tensor, generator: torch.Generator) -> Tensor:
    """Joint multinomial counts by halving contiguous ranges: float64 prob (size,) -> float64 (size,).

    log2(size) vectorised rounds of binomials instead of `size` dependent ones; exact up to 2^53 samples.
    `prob` need not be normalised.
    """
    size = prob.shape[0]
    depth = max(size - 1, 0).bit_length()
    sums = [torch.nn.functional.pad(prob, (0, (1 << depth) - size))]
    for _ in range(depth):
        sums.append(sums[-1].view(-1, 2).sum(1))
    counts = torch.ones_like(sums[-1]) * n_samples
    if not depth:
        return counts
    # The chance of the left half at every node of the tree of sums, all in one go: few operators.
    left_half = _ratio(torch.cat([level[0::2] for level in sums[:-1]]), torch.cat(sums[1:]))
    for chance in reversed(left_half.split([level.shape[0] for level in sums[1:]])):
        left = torch.binomial(counts, chance, generator=generator)
        counts = torch.stack([left, counts - left], dim=1).view(-1)
    return counts[:size]


def split_tokens(counts: Tensor, prob: Tensor, generator: torch.Generator) -> Tensor:
    """Multinomial over four outcomes per row: float64 counts (rows,), prob (rows, 4) -> float64 (rows, 4).

    Halved twice, {0, 1} against {2, 3} and then within, so that every outcome costs two binomials at most.
    """
    pairs = prob.view(-1, 2, 2).sum(2)
    low = torch.binomial(counts, _ratio(pairs[:, 0], pairs.sum(1)), generator=generator)
    halves = torch.stack([low, counts - low], dim=1)
    first = torch.binomial(halves, _ratio(prob[:, 0::2], pairs), generator=generator)
    return torch.stack([first, halves - first], dim=2).view(-1, TOKENS)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in [0, 1]; 0 where the whole is 0 (nothing is there to split)."""
    return (part / whole.where(whole > 0, 1.0)).clamp_(0.0, 1.0)


def keep_largest(counts: Tensor, most: int) -> Tensor:
    """Indices, ascending, of the `most` largest counts; of equal counts the first come first."""
    if counts.shape[0] <= most:
        return torch.arange(counts.shape[0], device=counts.device)
    smallest = torch.kthvalue(counts, counts.shape[0] - most + 1).values
    above, tied = counts > smallest, counts == smallest
    tied &= tied.cumsum(0) <= most - above.sum()
    return torch.nonzero_static(above | tied, size=most).squeeze(1)  # no wait for the number of them


def truncate(keys: Tensor, counts: Tensor, n_orbitals: int, batch_max: int) -> Samples:
    """The truncation rule applied to joint counts: drop zeros, then prefixes token by token.

    `keys`: int64 (size,), ascending. The same rule as `sample_tree` applies while the tree grows.
    """
    kept = counts > 0
    keys, counts = keys[kept], counts[kept]
    if keys.shape[0] <= batch_max:  # then no level has more prefixes either
        return Samples(keys, counts)
    for placed in range(1, n_orbitals):
        prefix, index = torch.unique_consecutive(keys >> 2 * (n_orbitals - placed), return_inverse=True)
        if prefix.shape[0] > 2 * batch_max:
            total = torch.zeros(prefix.shape[0], dtype=counts.dtype, device=counts.device)
            total.index_add_(0, index, counts)
            alive = torch.zeros_like(prefix, dtype=torch.bool)
            alive[keep_largest(total, 2 * batch_max)] = True
            keys, counts = keys[alive[index]], counts[alive[index]]
    final = keep_largest(counts, batch_max)
    return Samples(keys[final], counts[final])


Advance = Callable[[Level, State], tuple[Tensor, State]]  # `Modulus.advance`


def whole_passes(wave: WaveFunction) -> Advance:
    """`advance` without a state: every prefix takes a pass over a whole sequence, as the study counts it."""
    n_orbitals = wave.sector.n_orbitals

    def advance(level: Level, state: State) -> tuple[Tensor, State]:
        keys = level.prefix << 2 * (n_orbitals - level.index)
        return wave.network.flat_logits(keys)[:, level.index], ()

    return advance


@torch.no_grad()
def sample_tree(
    wave: WaveFunction,
    n_samples: Dial,
    batch_max: int,
    generator: torch.Generator,
    advance: Advance | None = None,
) -> Samples:
    """Grow the tree of samples level by level, network states (cache, recurrence, units) carried along.

    `advance`: another way to the logits of a level than the network's own.
    """
    sector, device = wave.sector, generator.device
    advance = advance or wave.network.advance
    feasible = wave.feasible(device)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    counts = torch.full((1,), float(n_samples), dtype=torch.float64, device=device)
    alpha, beta = torch.zeros_like(prefix), torch.zeros_like(prefix)
    parent = torch.zeros_like(prefix)  # row of the parent among the previous level's open nodes
    state: State = ()
    nodes: list[int] = []
    for placed in range(sector.n_orbitals):
        open_ = feasible.open[placed, alpha, beta]
        rows = open_.nonzero().squeeze(1)
        children = torch.zeros((prefix.shape[0], TOKENS), dtype=torch.float64, device=device)
        only = feasible.only[placed, alpha, beta].unsqueeze(1)
        children.scatter_(1, only, counts.unsqueeze(1))
        if rows.shape[0]:
            symbol = prefix[rows] & 3 if placed else torch.full_like(rows, START)
            level = Level(placed, parent[rows], symbol, prefix[rows], sum(nodes))
            logits, state = advance(level, state)
            mask = feasible.mask[placed, alpha[rows], beta[rows]]
            children[rows] = split_tokens(counts[rows], log_conditionals(logits, ~mask).exp(), generator)
        nodes.append(rows.shape[0])

        row, token = children.nonzero(as_tuple=True)
        counts = children[row, token]
        last = placed == sector.n_orbitals - 1
        kept = keep_largest(counts, batch_max if last else 2 * batch_max)
        row, token, counts = row[kept], token[kept], counts[kept]
        parent = (open_.cumsum(0) - 1)[row]
        prefix = (prefix[row] << 2) | token
        alpha, beta = alpha[row] + (token & 1), beta[row] + (token >> 1)
    return Samples(prefix, counts, tuple(nodes))
