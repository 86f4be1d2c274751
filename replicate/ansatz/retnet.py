"""RetNet modulus: multi-scale retention (SCIENCE.md section 1.3; Sun et al. 2023, arXiv:2307.08621).

Retention of position t: o_t = sum_{s <= t} gamma^{t-s} (q_t . k_s) v_s, with q and k rotated by their
position and k scaled by 1/sqrt(d_head). Three forms that agree: parallel (a decay matrix), recurrent (a
d_head x d_head state per head and token) and chunkwise. On a prefix tree "earlier positions" are ancestors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from replicate.ansatz.base import Level, State
from replicate.ansatz.transformer import BLOCK_WIDTH, block_heads, embed, normal_init
from replicate.sector import TOKENS, Sector
from replicate.tree import START, SYMBOLS, Blocks, PrefixTree, tokens_of

EPS = 1e-6  # of the layer and group norms, as in the reference implementations

Mix = Callable[[Tensor], Tensor]  # (rows, 3d) queries, keys, values -> (rows, d): retention in some layout
FORMS = ("parallel", "recurrent", "chunkwise")


@dataclass(frozen=True)
class Tables:
    """Constants of one shape. `gamma`: (heads,). `rotation`: complex (T, d/2), exp(i t theta) per channel
    pair.
    `decayed`: complex (T, d), gamma^t exp(i t theta) for queries beside gamma^-t exp(i t theta) /
    sqrt(d_head) for keys. `scale`: 1 / sqrt(d_head)."""

    gamma: Tensor
    rotation: Tensor
    decayed: Tensor
    scale: float

    def to(self, device: torch.device, dtype: torch.dtype) -> Tables:
        """The same on another device and in another (real) precision."""
        turns = dtype.to_complex()
        return Tables(
            self.gamma.to(device, dtype),
            self.rotation.to(device, turns),
            self.decayed.to(device, turns),
            self.scale,
        )


def _tables(length: int, heads: int, d_head: int) -> Tables:
    """Decays and rotation angles of arXiv:2307.08621 section 3.1, in float64."""
    low, high = log(1 / 32), log(1 / 512)
    gamma = 1 - torch.linspace(low, high, heads, dtype=torch.float64).exp()
    theta = 10000.0 ** -torch.linspace(0, 1, d_head // 2, dtype=torch.float64)
    t = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    angle = (t * theta).repeat(1, heads)
    decay = gamma.repeat_interleave(d_head // 2) ** t
    rotation = torch.polar(torch.ones_like(angle), angle)
    decayed = torch.cat([rotation * decay, rotation / decay * d_head**-0.5], dim=1)
    return Tables(gamma, rotation, decayed, d_head**-0.5)


def _rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Multiply the channel pairs of (..., d), read as complex numbers, by `phases` (..., d/2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases).flatten(-2)


class RetentionLayer(nn.Module):
    """Pre-LN retention with a swish gate and group norm per head (no affine), then a swish feed-forward."""

    def __init__(self, d: int, heads: int, ff: int) -> None:
        super().__init__()
        self.head_shape = (heads, d // heads)
        self.qkv = nn.Linear(d, 3 * d)
        self.gate = nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, ff)
        self.down = nn.Linear(ff, d)
        self.norm1 = nn.LayerNorm(d, eps=EPS)
        self.norm2 = nn.LayerNorm(d, eps=EPS)

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        """(rows, d) -> (rows, d)."""
        y = self.norm1(x)
        retained = mix(self.qkv(y)).unflatten(-1, self.head_shape)
        normed = functional.layer_norm(retained, self.head_shape[1:], eps=EPS).flatten(-2)
        x = x + self.out(normed * functional.silu(self.gate(y)))
        z: Tensor = self.down(functional.silu(self.up(self.norm2(x))))
        return x + z


class RetNet(nn.Module):
    """`layers` layers of `heads` retention heads at model width `d`, feed-forward width `ff`.

    `chunk`: tokens per chunk of the chunkwise form. N_mod = L(5d^2+2df+10d+f) + 5d + (n/2)d + 4d + 4.
    Raises ValueError where d is not a multiple of 2 * heads (the rotation pairs channels).
    """

    def __init__(
        self,
        sector: Sector,
        d: int,
        heads: int,
        ff: int,
        layers: int,
        init_std: float = 0.02,
        chunk: int = 4,
    ) -> None:
        super().__init__()
        if d % (2 * heads):
            raise ValueError(f"d = {d} is not a multiple of 2 * heads = {2 * heads}")
        self.sector, self.heads, self.d, self.chunk = sector, heads, d, chunk
        self.token = nn.Embedding(SYMBOLS, d)
        self.position = nn.Embedding(sector.n_orbitals, d)
        self.layers = nn.ModuleList(RetentionLayer(d, heads, ff) for _ in range(layers))
        self.head = nn.Linear(d, TOKENS)
        normal_init(self, init_std)
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}

    # -- rotation and decay ---------------------------------------------------------------------------------

    @property
    def tables(self) -> Tables:
        """Rotations and decays on the parameters' device and in their precision, made once."""
        weight = self.head.weight
        key = (weight.device, weight.dtype)
        if key not in self._tables:
            made = _tables(self.sector.n_orbitals, self.heads, self.d // self.heads)
            self._tables[key] = made.to(*key)
        return self._tables[key]

    # -- the tree -------------------------------------------------------------------------------------------

    def tree_logits(self, tree: PrefixTree) -> Tensor:
        """Every node is one position. gamma^(t-s) = gamma^t gamma^-s rides on the rotations of q and k (at
        most 31 levels, so gamma^-s < 3), which leaves a plain ancestor mask."""
        blocks = tree.blocks(BLOCK_WIDTH)
        x = embed(self.token, self.position, blocks)
        tables, shape = self.tables, f"{self.d} {self.heads} {x.dtype}"
        phases = blocks.once(f"phases {shape}", lambda: tables.decayed.index_select(0, blocks.level))
        mask = blocks.once(f"mask {x.dtype}", lambda: blocks.mask.to(x.dtype)).unsqueeze(1)
        mix = partial(self._retain_blocks, blocks=blocks, phases=phases, mask=mask)
        for layer in self.layers:
            x = layer(x, mix)
        logits: Tensor = self.head(x[: tree.n_nodes])
        return logits

    def _retain_blocks(self, qkv: Tensor, blocks: Blocks, phases: Tensor, mask: Tensor) -> Tensor:
        rotated = _rotate(qkv[:, : 2 * self.d], phases)
        query, key, value = block_heads(torch.cat([rotated, qkv[:, 2 * self.d :]], 1), blocks, self.heads)
        return (((query @ key.transpose(-1, -2)) * mask) @ value).transpose(1, 2).reshape(-1, self.d)

    def advance(self, level: Level, state: State) -> tuple[Tensor, State]:
        """One level of the growing tree, recurrent form: state[l] is (nodes, heads, d_head, d_head)."""
        x = self.token(level.symbol) + self.position.weight[level.index]
        states: list[Tensor] = []
        rotation = self.tables.rotation[level.index]

        def retain(qkv: Tensor) -> Tensor:
            before = state[len(states)].index_select(0, level.parent) if level.index else None
            out, after = self._recur(qkv, rotation, before)
            states.append(after)
            return out

        for layer in self.layers:
            x = layer(x, retain)
        return self.head(x), tuple(states)

    def _recur(self, qkv: Tensor, rotation: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token: S = gamma S + k v^T, o = q S. (rows, 3d) -> (rows, d), state."""
        query, key, value = qkv.split(self.d, dim=-1)
        shape = (qkv.shape[0], self.heads, self.d // self.heads)
        query = _rotate(query, rotation).reshape(shape)
        key = (_rotate(key, rotation) * self.tables.scale).reshape(shape)
        after = key.unsqueeze(-1) * value.reshape(shape).unsqueeze(-2)
        if before is not None:
            after = after + self.tables.gamma.view(1, -1, 1, 1) * before
        return (query.unsqueeze(-2) @ after).reshape(-1, self.d), after

    # -- full sequences: the readable twin, in three forms --------------------------------------------------

    def flat_logits(self, keys: Tensor, form: str = "parallel") -> Tensor:
        """Nothing shared: int64 (batch,) -> (batch, T, 4). `form`: parallel, recurrent or chunkwise."""
        tokens = tokens_of(keys, self.sector.n_orbitals)
        symbols = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)
        return self.sequence_logits(self.token(symbols) + self.position.weight, form)

    def sequence_logits(self, x: Tensor, form: str = "parallel") -> Tensor:
        """Layers and head on embedded sequences: (batch, T, d) -> (batch, T, 4)."""
        retain = {
            "parallel": self._retain_parallel,
            "recurrent": self._retain_recurrent,
            "chunkwise": self._retain_chunkwise,
        }[form]
        for layer in self.layers:
            x = layer(x, retain)
        logits: Tensor = self.head(x)
        return logits

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, T, 3d) -> rotated q, rotated and scaled k, v: (batch, heads, T, d_head)."""
        rotation = self.tables.rotation[: qkv.shape[1]]
        query, key, value = qkv.split(self.d, dim=-1)
        query, key = _rotate(query, rotation), _rotate(key, rotation) * self.tables.scale
        split = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return split[0], split[1], split[2]

    def _decay(self, length: int) -> Tensor:
        """gamma^(t-s) for s <= t, else 0: (heads, length, length) (arXiv:2307.08621, eq. 5)."""
        t = torch.arange(length, device=self.tables.gamma.device)
        distance = t[:, None] - t[None, :]
        decay = self.tables.gamma.view(-1, 1, 1) ** distance.clamp(min=0)
        return decay * (distance >= 0)

    def _retain_parallel(self, qkv: Tensor) -> Tensor:
        query, key, value = self._heads(qkv)
        scores = (query @ key.transpose(-1, -2)) * self._decay(qkv.shape[1])
        return (scores @ value).transpose(1, 2).flatten(-2)

    def _retain_recurrent(self, qkv: Tensor) -> Tensor:
        state = None
        out = []
        for t in range(qkv.shape[1]):
            token, state = self._recur(qkv[:, t], self.tables.rotation[t], state)
            out.append(token)
        return torch.stack(out, dim=1)

    def _retain_chunkwise(self, qkv: Tensor) -> Tensor:
        """Parallel inside a chunk, recurrent between chunks (arXiv:2307.08621, eq. 7)."""
        query, key, value = self._heads(qkv)
        gamma = self.tables.gamma.view(-1, 1, 1)
        state = query.new_zeros(query.shape[0], self.heads, query.shape[-1], query.shape[-1])
        out = []
        for start in range(0, qkv.shape[1], self.chunk):
            q, k, v = (x[:, :, start : start + self.chunk] for x in (query, key, value))
            length = q.shape[2]
            t = torch.arange(length, device=qkv.device, dtype=qkv.dtype).view(1, -1, 1)
            inner = ((q @ k.transpose(-1, -2)) * self._decay(length)) @ v
            out.append(inner + (q @ state) * gamma ** (t + 1))
            state = gamma**length * state + (k * gamma ** (length - 1 - t)).transpose(-1, -2) @ v
        return torch.cat(out, dim=2).transpose(1, 2).flatten(-2)
