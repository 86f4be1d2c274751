"""MADE modulus: a masked MLP from n qubits to n/2 x 4 logits (SCIENCE.md section 1.1; Germain et al.
2015)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from replicate.ansatz.base import Level, State
from replicate.ansatz.phase import scale_weights
from replicate.sector import TOKENS, Sector
from replicate.tree import PrefixTree, bits_of


class Made(nn.Module):
    """`depth` hidden layers of `width` ReLU units, one fixed mask, one ordering.

    Inputs of the token at position i have degree i, hidden units degrees 0..T-2, output token i sees hidden
    units of degree < i. Units are stored sorted by degree, so that what a prefix of t tokens determines is a
    leading slice. `degrees`: "even" (round-robin) or "random" (the lineage's choice, seed 0). `init_scale`
    multiplies the initial weights.
    N_mod = nw + w + (D-1)(w^2+w) + 2nw + 2n counts the dense matrices; `n_unmasked` only what the masks keep.
    """

    def __init__(
        self, sector: Sector, width: int, depth: int, degrees: str = "even", init_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.sector = sector
        n_orbitals, n_qubits = sector.n_orbitals, sector.n_qubits
        highest = max(n_orbitals - 1, 1)
        if degrees == "even":
            hidden = np.sort(np.arange(width) % highest)
        elif degrees == "random":
            hidden = np.sort(np.random.default_rng(0).integers(0, highest, size=width))
        else:
            raise ValueError(f"degrees: {degrees!r} is not one of even, random")
        inputs = np.arange(n_qubits) // 2
        outputs = np.repeat(np.arange(n_orbitals), TOKENS)
        masks = [hidden[:, None] >= inputs[None, :]]
        masks += [hidden[:, None] >= hidden[None, :]] * (depth - 1)
        masks += [outputs[:, None] > hidden[None, :]]
        self.layers = nn.ModuleList(nn.Linear(m.shape[1], m.shape[0]) for m in masks)
        scale_weights(self.layers, init_scale)
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", torch.as_tensor(mask, dtype=torch.float32), persistent=False)
        # Units of degree < t: those that the first t tokens determine.
        self.known = [int(np.searchsorted(hidden, t)) for t in range(n_orbitals)]

    @property
    def n_unmasked(self) -> int:
        """Weights that the masks keep, plus biases."""
        layers = range(len(self.layers))
        kept = sum(int(self.get_buffer(f"mask{i}").sum()) for i in layers)
        return kept + sum(self.get_parameter(f"layers.{i}.bias").numel() for i in layers)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return next(self.parameters()).dtype

    def _layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Masked weight and bias of layer i."""
        return (
            self.get_parameter(f"layers.{i}.weight") * self.get_buffer(f"mask{i}"),
            self.get_parameter(f"layers.{i}.bias"),
        )

    def flat_logits(self, keys: Tensor) -> Tensor:
        """One pass yields the logits of every position: int64 (batch,) -> (batch, T, 4)."""
        x = bits_of(keys, self.sector.n_orbitals, self.dtype)
        for i in range(len(self.layers) - 1):
            x = torch.relu_(functional.linear(x, *self._layer(i)))
        out = functional.linear(x, *self._layer(len(self.layers) - 1))
        return out.view(-1, self.sector.n_orbitals, TOKENS)

    def tree_logits(self, tree: PrefixTree) -> Tensor:
        """One pass at each tip of the tree gives all nodes of its path; every node reads its first tip."""
        grid = self.flat_logits(tree.tips.keys)
        return grid.view(-1, TOKENS).index_select(0, tree.tips.slot)

    def advance(self, level: Level, state: State) -> tuple[Tensor, State]:
        """Units that the newest token determines are computed from the units carried along the parents."""
        t, dtype = level.index, self.dtype
        nodes = level.parent.shape[0]
        old, known = self.known[max(t - 1, 0)], self.known[t]
        below = bits_of(level.prefix, t, dtype) if t else level.prefix.new_zeros((nodes, 0), dtype=dtype)
        carried = []
        for i in range(len(self.layers) - 1):
            weight, bias = self._layer(i)
            fresh = torch.relu_(
                functional.linear(below, weight[old:known, : below.shape[1]], bias[old:known])
            )
            before = state[i].index_select(0, level.parent) if t else fresh.new_zeros((nodes, 0))
            below = torch.cat([before, fresh], dim=1)
            carried.append(below)
        rows = slice(TOKENS * t, TOKENS * (t + 1))
        weight, bias = self._layer(len(self.layers) - 1)
        return functional.linear(below, weight[rows, :known], bias[rows]), tuple(carried)
