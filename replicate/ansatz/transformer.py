"""Decoder-only transformer modulus (SCIENCE.md section 1.2; Vaswani et al. 2017, lineage
arXiv:2411.03900)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from replicate.ansatz.base import Level, State
from replicate.sector import TOKENS, Sector
from replicate.tree import START, SYMBOLS, Blocks, PrefixTree, tokens_of

# Nodes per attention block: smaller ones waste fewer operations on masked pairs, larger ones make better use
# of matrix products; 16 was the fastest on a CPU among 8, 16, 32 and 64 (forward and backward).
BLOCK_WIDTH = 16

# Numbers gathered from the key-value cache at a time; on a CPU they should stay in the processor's cache.
CPU_SCRATCH, DEVICE_SCRATCH = 1 << 19, 1 << 26

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "gelu": functional.gelu}
Mix = Callable[[Tensor], Tensor]  # (rows, 3d) queries, keys, values -> (rows, d): attention in some layout


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward with residuals; the attention's layout is the caller's.

    Biases everywhere, layer norm after ("post", the lineage) or before ("pre") each sublayer.
    """

    def __init__(self, d: int, ff: int, norm: str, activation: str) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.activation = ACTIVATIONS[activation]
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, ff)
        self.down = nn.Linear(ff, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        """(rows, d) -> (rows, d)."""
        if self.pre:
            x = x + self.out(mix(self.qkv(self.norm1(x))))
            return x + self.down(self.activation(self.up(self.norm2(x))))
        x = self.norm1(x + self.out(mix(self.qkv(x))))
        normed: Tensor = self.norm2(x + self.down(self.activation(self.up(x))))
        return normed


class Transformer(nn.Module):
    """`layers` layers of `heads` heads at model width `d`, feed-forward width `ff`.

    Weights and embeddings start N(0, init_std), biases 0.
    N_mod = L(4d^2+2df+9d+f) + 5d + (n/2)d + 4d + 4. Raises ValueError for an impossible shape or name.
    """

    def __init__(
        self,
        sector: Sector,
        d: int,
        heads: int,
        ff: int,
        layers: int,
        norm: str = "post",
        activation: str = "relu",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if d % heads:
            raise ValueError(f"d = {d} is not a multiple of heads = {heads}")
        if norm not in ("post", "pre"):
            raise ValueError(f"norm: {norm!r} is not one of post, pre")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.sector, self.heads, self.d, self.depth = sector, heads, d, layers
        self.token = nn.Embedding(SYMBOLS, d)
        self.position = nn.Embedding(sector.n_orbitals, d)
        self.layers = nn.ModuleList(TransformerLayer(d, ff, norm, activation) for _ in range(layers))
        self.head = nn.Linear(d, TOKENS)
        of_head = torch.eye(heads).repeat_interleave(d // heads, dim=1)  # (heads, d): a head's channels
        self.register_buffer("of_head", of_head, persistent=False)
        normal_init(self, init_std)

    def tree_logits(self, tree: PrefixTree) -> Tensor:
        """Every node is one position; attention over its ancestors as dense depth-first blocks."""
        blocks = tree.blocks(BLOCK_WIDTH)
        x = embed(self.token, self.position, blocks)

        def make_bias() -> Tensor:
            return torch.zeros_like(blocks.mask, dtype=x.dtype).masked_fill_(~blocks.mask, -torch.inf)

        bias = blocks.once(f"bias {x.dtype}", make_bias).unsqueeze(1)
        mix = partial(self._attend_blocks, blocks=blocks, bias=bias)
        for layer in self.layers:
            x = layer(x, mix)
        logits: Tensor = self.head(x[: tree.n_nodes])
        return logits

    def _attend_blocks(self, qkv: Tensor, blocks: Blocks, bias: Tensor) -> Tensor:
        # Spelled out: the fused kernel is half as fast on blocks this small (forward and backward, CPU).
        query, key, value = block_heads(qkv, blocks, self.heads)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, self.d)

    def flat_logits(self, keys: Tensor) -> Tensor:
        """Full causal sequences, nothing shared: int64 (batch,) -> (batch, T, 4)."""
        tokens = tokens_of(keys, self.sector.n_orbitals)
        symbols = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)
        x = self.token(symbols) + self.position.weight
        batch, length, d = x.shape
        x = x.reshape(-1, d)

        def attend(qkv: Tensor) -> Tensor:
            parts = qkv.view(batch, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
            return out.transpose(1, 2).reshape(-1, d)

        for layer in self.layers:
            x = layer(x, attend)
        logits: Tensor = self.head(x)
        return logits.view(batch, length, TOKENS)

    def advance(self, level: Level, state: State) -> tuple[Tensor, State]:
        """One level of the growing tree, key-value cache carried.

        `state`: int64 (tokens, nodes), places in the caches of each node's ancestors and its own, then one
        cache per layer, (2, capacity, d): nothing is copied from parents to children.
        """
        x = self.token(level.symbol) + self.position.weight[level.index]
        nodes = x.shape[0]
        before, *caches = state or (
            level.parent.new_empty((0, 1)),
            *[x.new_empty((2, 0, self.d))] * self.depth,
        )
        own = torch.arange(level.n_before, level.n_before + nodes, device=x.device)
        places = torch.cat([before.index_select(1, level.parent), own.unsqueeze(0)])
        chunks = _path_chunks(places, self.heads, self.d)
        levels_left = self.sector.n_orbitals - level.index
        grown: list[Tensor] = []

        def attend(qkv: Tensor) -> Tensor:
            keys_values = qkv[:, self.d :].unflatten(1, (2, -1))
            cache = _append(caches[len(grown)], level.n_before, keys_values, levels_left)
            grown.append(cache)
            return self._attend_paths(qkv[:, : self.d], cache, chunks)

        for layer in self.layers:
            x = layer(x, attend)
        return self.head(x), (places, *grown)

    def _attend_paths(self, queries: Tensor, cache: Tensor, chunks: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Queries (nodes, d), each on the keys and values of its own path: (nodes, d).

        One query per path is no work for a matrix product. Products with the keys are taken elementwise and
        summed per head by a small one; values are summed where they lie: a third of the time of the fused
        kernel on gathered keys and values (CPU).
        """
        width = self.d // self.heads
        keys, values, of_head = cache[0], cache[1].view(-1, width), self.get_buffer("of_head")
        queries = queries * width**-0.5
        out, first = [], 0
        for places, slots in chunks:
            tokens, rows = places.shape
            products = functional.embedding(places, keys).mul_(queries[first : first + rows])
            scores = (of_head @ products.view(-1, self.d).t()).view(self.heads, tokens, rows)
            weights = scores.softmax(1).permute(2, 0, 1).reshape(-1, tokens)
            out.append(functional.embedding_bag(slots, values, per_sample_weights=weights, mode="sum"))
            first += rows
        return torch.cat(out).view(-1, self.d)


def _append(cache: Tensor, used: int, rows: Tensor, levels_left: int) -> Tensor:
    """Keys and values (rows, 2, d) written behind the `used` first of `cache` (2, capacity, d), in place
    where there is room. Where there is not, the next one has room for as many rows in all levels left."""
    need = used + rows.shape[0]
    if need > cache.shape[1]:
        larger = cache.new_empty((2, used + rows.shape[0] * levels_left, cache.shape[2]))
        larger[:, :used] = cache[:, :used]
        cache = larger
    cache[:, used:need] = rows.transpose(0, 1)
    return cache


def _path_chunks(places: Tensor, heads: int, d: int) -> list[tuple[Tensor, Tensor]]:
    """Paths int64 (tokens, nodes) in chunks of nodes whose keys stay in the processor's cache: places in the
    cache, (tokens, rows), and of each head's values, (rows * heads, tokens)."""
    tokens = places.shape[0]
    scratch = CPU_SCRATCH if places.device.type == "cpu" else DEVICE_SCRATCH
    chunks = places.split(max(1, scratch // (tokens * d)), dim=1)
    head = torch.arange(heads, device=places.device).unsqueeze(1)
    slots = [(part.t().contiguous().unsqueeze(1) * heads + head).view(-1, tokens) for part in chunks]
    return list(zip(chunks, slots, strict=True))


def normal_init(module: nn.Module, std: float) -> None:
    """Weights and embeddings N(0, std), biases 0, layer norms untouched (the lineage's initialisation)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


def embed(token: nn.Embedding, position: nn.Embedding, blocks: Blocks) -> Tensor:
    """Token plus position embedding of every node, padded with copies of node 0's: (n_padded, d)."""
    x: Tensor = token(blocks.symbol) + position(blocks.level)
    return x


def block_heads(qkv: Tensor, blocks: Blocks, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (blocks, heads, width, d_head), keys and values (blocks, heads, T - 1 + width, d_head) of
    (n_padded, 3d) projections: the keys of a block are the path to its first node, then its own nodes."""
    d = qkv.shape[1] // 3
    n_blocks = blocks.path.shape[0]
    own = qkv.view(n_blocks, blocks.width, 3 * d)
    above = functional.embedding(blocks.path, qkv[:, d:])
    both = torch.cat([above, own[:, :, d:]], dim=1)
    query = own[:, :, :d].view(n_blocks, blocks.width, heads, d // heads).transpose(1, 2)
    parts = both.view(n_blocks, -1, 2, heads, d // heads).permute(2, 0, 3, 1, 4)
    return query, parts[0], parts[1]
