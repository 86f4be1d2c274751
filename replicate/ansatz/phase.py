"""The phase network phi(x) (SCIENCE.md section 1.4; lineage arXiv:2208.05637, arXiv:2411.03900)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from replicate.sector import TOKENS, Sector
from replicate.tree import bits_of


class PhaseNetwork(nn.Module):
    """MLP on the n - 2 qubits of all MOs but the first sampled one; that MO's token selects the output.

    `depth` D gives D + 1 hidden layers of `width` units, ReLU. `init_scale` multiplies the initial weights.
    N_ph = (n-2)w + w + D(w^2 + w) + 4w + 4.
    """

    def __init__(self, sector: Sector, width: int, depth: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.sector = sector
        sizes = [sector.n_qubits - 2, *[width] * (depth + 1), TOKENS]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        scale_weights(self.layers, init_scale)

    def inputs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Qubits (batch, n - 2) in the network's dtype and first tokens int64 (batch, 1) of int64 keys."""
        bits = bits_of(keys, self.sector.n_orbitals, next(self.parameters()).dtype)
        return bits[:, 2:], (keys >> (self.sector.n_qubits - 2)).unsqueeze(1)

    def evaluate(self, bits: Tensor, first_token: Tensor) -> Tensor:
        """phi from `inputs`: (batch,), differentiable."""
        x = bits
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        out: Tensor = self.layers[-1](x)
        return out.gather(1, first_token).squeeze(1)

    def forward(self, keys: Tensor) -> Tensor:
        """phi of int64 keys (batch,): (batch,) in the network's dtype, radians."""
        return self.evaluate(*self.inputs(keys))


def scale_weights(layers: nn.ModuleList, scale: float) -> None:
    """Multiply the weights of linear `layers` by `scale`; biases stay."""
    if scale != 1.0:
        with torch.no_grad():
            for layer in layers:
                assert isinstance(layer, nn.Linear)
                layer.weight *= scale
