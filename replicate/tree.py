"""The prefix tree of a sorted set of determinants: the batch format of everything below.

Sorted keys are the leaves of a prefix tree in depth-first order. A *node* is a distinct prefix after which at
least two tokens are feasible; it is one position of an autoregressive network, evaluated once. Prefixes with
a single feasible continuation have probability 1 and are no nodes (once a token is forced, so are all that
follow, therefore every ancestor of a node is a node). Nodes are numbered in depth-first pre-order, so that
the subtree of node i is the contiguous range [i, i + size[i]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from replicate.sector import Sector, feasible_tokens

START = 4  # input symbol of the root: nothing has been sampled yet
SYMBOLS = 5


def tokens_of(keys: Tensor, n_orbitals: int) -> Tensor:
    """Tokens in sampling order: int64 keys (...,) -> int64 (..., T), values 0..3."""
    shifts = torch.arange(2 * (n_orbitals - 1), -1, -2, device=keys.device)
    return (keys.unsqueeze(-1) >> shifts) & 3


def bits_of(keys: Tensor, n_orbitals: int, dtype: torch.dtype) -> Tensor:
    """Occupations in sampling order, alpha before beta: keys (...,) -> `dtype` (..., n), values 0 and 1."""
    shifts = torch.arange(2 * n_orbitals - 1, -1, -1, device=keys.device)
    shifts = shifts.view(-1, 2).flip(1).reshape(-1)
    return ((keys.unsqueeze(-1) >> shifts) & 1).to(dtype)


class FeasibleTokens:
    """`sector.feasible_tokens` on a device, with the number of outcomes of each prefix.

    `mask`: bool (T + 1, T + 1, T + 1, 4) by (tokens placed, alpha placed, beta placed, token).
    `open`: bool (T + 1, T + 1, T + 1), at least two outcomes. `only`: int64, the first feasible token.
    """

    def __init__(self, sector: Sector, device: torch.device | str) -> None:
        self.mask = torch.as_tensor(feasible_tokens(sector), device=device)
        self.open = self.mask.sum(-1) > 1
        self.only = self.mask.to(torch.int64).argmax(-1)


@dataclass(frozen=True)
class PrefixTree:
    """Nodes and edges of a sorted batch; see the module docstring.

    `keys`: int64 (batch,), ascending and distinct. `level`: int64 (nodes,), number of tokens placed.
    `symbol`: int64 (nodes,), the last token placed, START at the root. `mask`: bool (nodes, 4), feasible
    tokens. `size`: int64 (nodes,), nodes in the subtree. `first_row`: int64 (nodes,), first determinant of
    the subtree. `path`: int64 (batch, T), node at each level of each determinant (undefined past its last
    node).
    `edges`: int64 (batch, T), 4 * node + token along each determinant, 4 * nodes where the token is forced.
    `edge_start`, `edge_count`: int64 (4 * nodes,), the determinants below an edge are the contiguous rows
    [start, start + count).
    """

    sector: Sector
    keys: Tensor
    level: Tensor
    symbol: Tensor
    mask: Tensor
    size: Tensor
    first_row: Tensor
    path: Tensor
    edges: Tensor
    edge_start: Tensor
    edge_count: Tensor

    @property
    def n_nodes(self) -> int:
        """Prefixes that a network has to be evaluated at."""
        return self.level.shape[0]

    @property
    def n_tips(self) -> int:
        """Nodes without nodes below them."""
        return self.tips.keys.shape[0]

    @property
    def n_leaves(self) -> int:
        """Determinants in the batch."""
        return self.keys.shape[0]

    @cached_property
    def closed(self) -> Tensor:
        """Infeasible tokens: bool (nodes, 4)."""
        return ~self.mask

    @cached_property
    def tips(self) -> Tips:
        """Nodes without nodes below them, for ansatze that evaluate a whole path at once."""
        return _tips(self)

    @property
    def knows_tips(self) -> bool:
        """Whether `tips` have been found, that is, whether something ran on them."""
        return "tips" in self.__dict__

    def blocks(self, width: int) -> Blocks:
        """Depth-first blocks of `width` nodes for attention over ancestors (cached per width)."""
        cache: dict[int, Blocks] = self.__dict__.setdefault("_blocks", {})
        if width not in cache:
            cache[width] = _blocks(self, width)
        return cache[width]


def build_tree(keys: Tensor, sector: Sector, feasible: FeasibleTokens | None = None) -> PrefixTree:
    """The prefix tree of `keys`: int64 (batch,), ascending, distinct, all inside `sector`.

    Row i of the (batch, T) work arrays is determinant i, column t the prefix of its first t
    tokens; a prefix is new where a token differs from the row above, so row-major order of the
    new ones is depth-first pre-order.
    """
    if feasible is None:
        feasible = FeasibleTokens(sector, keys.device)
    n_leaves, n_orbitals = keys.shape[0], sector.n_orbitals
    device = keys.device
    columns = torch.arange(n_orbitals, device=device)
    tokens = tokens_of(keys, n_orbitals)
    # Where each prefix stands in the table of feasible tokens, (tokens, alpha, beta placed), flattened.
    width = n_orbitals + 1
    step = (tokens & 1) * width + (tokens >> 1)
    at = columns * width**2 + step.cumsum(1) - step
    is_node = feasible.open.take(at)

    # First token that differs from the row above: the prefixes of more tokens than that are new.
    same = torch.zeros_like(keys)
    if n_leaves > 1:
        differs = (keys[1:] ^ keys[:-1]).unsqueeze(1) >> 2 * (n_orbitals - 1 - columns)
        same[1:] = (differs == 0).sum(1)
    same[:1] = -1
    starts = is_node & (columns > same.unsqueeze(1))

    row, level = starts.nonzero(as_tuple=True)
    n_nodes = row.shape[0]
    # The node of a column is the last one that started in it. Counted down the columns, one below the other,
    # that is a running sum and a look-up, which every device is fast at (a running maximum is not).
    down = starts.t().reshape(-1).cumsum(0)
    in_columns = torch.full((n_nodes + 1,), -1, device=device)
    in_columns[down[level * n_leaves + row]] = torch.arange(n_nodes, device=device)
    path = in_columns[down].view(n_orbitals, n_leaves).t().contiguous()
    edges = (4 * path + tokens).where(is_node, 4 * n_nodes)

    symbol = tokens[row, (level - 1).clamp(min=0)].where(level > 0, START)
    mask = feasible.mask.view(-1, 4)[at[row, level]]

    edge_count = torch.bincount(edges.view(-1), minlength=4 * n_nodes + 1)[: 4 * n_nodes]
    new_edge = is_node & (columns >= same.unsqueeze(1))
    edge_row, edge_column = new_edge.nonzero(as_tuple=True)
    edge_start = torch.zeros_like(edge_count)
    edge_start[edges[edge_row, edge_column]] = edge_row

    below = edge_count.view(n_nodes, 4).sum(1)
    nodes_above = torch.zeros(n_leaves + 1, dtype=torch.int64, device=device)
    nodes_above[1:] = starts.sum(1).cumsum(0)
    size = nodes_above[row + below] - torch.arange(n_nodes, device=device)
    return PrefixTree(sector, keys, level, symbol, mask, size, row, path, edges, edge_start, edge_count)


@dataclass(frozen=True)
class Tips:
    """`keys`: int64 (tips,), first determinant below each tip. `slot`: int64 (nodes,), index into the
    flattened (tips, T) grid of the tip and level that stand for each node; no slot is used twice."""

    keys: Tensor
    slot: Tensor


def _tips(tree: PrefixTree) -> Tips:
    is_tip = tree.size == 1
    before = is_tip.cumsum(0) - is_tip.to(torch.int64)  # the first tip in the subtree of a node
    slot = before * tree.sector.n_orbitals + tree.level
    return Tips(tree.keys[tree.first_row[is_tip]], slot)


@dataclass(frozen=True)
class Blocks:
    """Attention over ancestors as dense blocks.

    In pre-order, an ancestor of a node of a block either lies in the block or on the path to the block's
    first node. Each block of `width` queries therefore has T - 1 + width keys: that path, then the block
    itself.
    `symbol`, `level`: int64 (n_padded,), those of the nodes, then of padding (START, 0). `path`: int64
    (blocks, T - 1), node indices (0 where masked). `mask`: bool (blocks, width, T - 1 + width),
    ancestor-or-self; padding nodes see only themselves.
    """

    width: int
    symbol: Tensor
    level: Tensor
    path: Tensor
    mask: Tensor

    @property
    def n_padded(self) -> int:
        """Nodes rounded up to whole blocks."""
        return self.level.shape[0]

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What an ansatz derives from these blocks and needs again in every layer and step."""
        cache: dict[str, Tensor] = self.__dict__.setdefault("_derived", {})
        if name not in cache:
            cache[name] = make()
        return cache[name]


def _blocks(tree: PrefixTree, width: int) -> Blocks:
    n_nodes, device = tree.n_nodes, tree.level.device
    n_blocks = -(-n_nodes // width)
    n_padded = n_blocks * width
    first = torch.arange(0, n_padded, width, device=device)
    columns = torch.arange(tree.sector.n_orbitals - 1, device=device)
    on_path = columns < tree.level[first].unsqueeze(1)
    path = tree.path[tree.first_row[first], :-1].where(on_path, 0)

    own = torch.arange(n_padded, device=device).view(n_blocks, width)
    keys = torch.cat([path, own], dim=1)
    size = torch.ones(n_padded, dtype=torch.int64, device=device)
    size[:n_nodes] = tree.size
    end = (keys + size[keys]).unsqueeze(1)
    mask = (keys.unsqueeze(1) <= own.unsqueeze(2)) & (own.unsqueeze(2) < end)
    valid = torch.cat([on_path, torch.ones_like(own, dtype=torch.bool)], dim=1)
    symbol = functional.pad(tree.symbol, (0, n_padded - n_nodes), value=START)
    level = functional.pad(tree.level, (0, n_padded - n_nodes))
    return Blocks(width, symbol, level, path, mask & valid.unsqueeze(1))


def path_sum(values: Tensor, tree: PrefixTree) -> Tensor:
    """Sum of edge values along each determinant: float64 (nodes, 4) -> float64 (batch,), differentiable.

    The gradient of an edge is the sum over the contiguous rows below it, two look-ups in a running sum,
    instead of a scatter-add over (batch, T).
    """
    out: Tensor = _PathSum.apply(values, tree)
    return out


class _PathSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, tree: PrefixTree) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.tree = tree
        flat = torch.cat([values.reshape(-1), values.new_zeros(1)])
        return flat[tree.edges].sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        tree: PrefixTree = ctx.tree
        running = torch.zeros(tree.n_leaves + 1, dtype=torch.float64, device=grad.device)
        torch.cumsum(grad.to(torch.float64), 0, out=running[1:])
        total = running[tree.edge_start + tree.edge_count] - running[tree.edge_start]
        return total.to(grad.dtype).view(tree.n_nodes, 4), None
