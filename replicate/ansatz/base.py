"""The ansatz: log psi(x) = 1/2 log p(x) + i phi(x), p autoregressive and normalised over the sector.

`Modulus` is the contract that MADE, transformer and RetNet fulfil and that an ansatz from outside has to
fulfil; `WaveFunction` turns one modulus and one phase network into log p, phi and samples' conditionals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from replicate.ansatz.phase import PhaseNetwork
from replicate.sector import Sector
from replicate.tree import FeasibleTokens, PrefixTree, path_sum, tokens_of

State = tuple[Tensor, ...]  # what a modulus carries from one level of the tree to the next


@dataclass(frozen=True)
class Level:
    """The nodes of one level while a tree grows (sampling).

    `index`: tokens placed. `parent`: int64 (nodes,), row in the previous level. `symbol`: int64 (nodes,), the
    last token (START at the root). `prefix`: int64 (nodes,), all placed tokens, two bits each. `n_before`:
    nodes of all levels before this one.
    """

    index: int
    parent: Tensor
    symbol: Tensor
    prefix: Tensor
    n_before: int


@runtime_checkable
class Modulus(Protocol):
    """Autoregressive network over tokens: raw logits of the four outcomes, before the sector mask.

    The logits of position t may depend on tokens 0..t-1 only. All three methods give the same numbers to
    rounding; `flat_logits` is the readable twin of the other two and the cost that the study's FLOP estimates
    assume. An implementation is an `nn.Module`.
    """

    def tree_logits(self, tree: PrefixTree) -> Tensor:
        """Logits of every node, each evaluated once: (nodes, 4), differentiable."""
        ...

    def flat_logits(self, keys: Tensor) -> Tensor:
        """Logits of every position of every determinant, nothing shared: int64 (batch,) -> (batch, T, 4)."""
        ...

    def advance(self, level: Level, state: State) -> tuple[Tensor, State]:
        """Logits (nodes, 4) of one level and the state that its children need; `state` is () at the root.

        A state is used once: the next may be made of it in place.
        """
        ...


def log_conditionals(logits: Tensor, closed: Tensor) -> Tensor:
    """log p of each outcome, infeasible ones `closed`: (..., 4) logits and bool -> float64 (..., 4).

    In float64 whatever the network's precision: the sum of p over the sector is then 1 to
    rounding of float64.
    """
    return logits.to(torch.float64).masked_fill(closed, -torch.inf).log_softmax(-1)


class WaveFunction(nn.Module):
    """A modulus and a phase network over one sector.

    `sector` fixes which outcomes are possible. Parameters live in `modulus` and `phase`.
    """

    def __init__(self, sector: Sector, modulus: nn.Module, phase: PhaseNetwork) -> None:
        super().__init__()
        self.sector = sector
        self.modulus = modulus
        self.phase = phase
        self._feasible: dict[str, FeasibleTokens] = {}

    @property
    def network(self) -> Modulus:
        """The modulus as its contract."""
        assert isinstance(self.modulus, Modulus)
        return self.modulus

    @property
    def n_modulus(self) -> int:
        """N_mod: parameters of the modulus network."""
        return sum(p.numel() for p in self.modulus.parameters())

    @property
    def n_phase(self) -> int:
        """N_ph: parameters of the phase network."""
        return sum(p.numel() for p in self.phase.parameters())

    def feasible(self, device: torch.device) -> FeasibleTokens:
        """The sector's feasible tokens on `device`, made once."""
        name = str(device)
        if name not in self._feasible:
            self._feasible[name] = FeasibleTokens(self.sector, device)
        return self._feasible[name]

    def log_prob(self, tree: PrefixTree) -> Tensor:
        """log p of the tree's determinants: float64 (batch,), differentiable."""
        if tree.n_nodes == 0:  # every token is forced: the sector is one determinant
            return torch.zeros(tree.n_leaves, dtype=torch.float64, device=tree.keys.device)
        conditionals = log_conditionals(self.network.tree_logits(tree), tree.closed)
        # Infeasible outcomes are on no path; 0 keeps -inf out of the running sums.
        return path_sum(conditionals.masked_fill(tree.closed, 0.0), tree)

    def flat_log_prob(self, keys: Tensor) -> Tensor:
        """log p by the slow twin: any int64 keys (batch,), in or out of the sector (-inf) -> float64."""
        tokens = tokens_of(keys, self.sector.n_orbitals)
        alpha, beta = tokens & 1, tokens >> 1
        columns = torch.arange(self.sector.n_orbitals, device=keys.device)
        feasible = self.feasible(keys.device).mask
        mask = feasible[columns, alpha.cumsum(1) - alpha, beta.cumsum(1) - beta]
        mask = mask | ~mask.any(-1, keepdim=True)  # past a wrong turn every outcome is as good
        conditionals = log_conditionals(self.network.flat_logits(keys), ~mask)
        log_prob = conditionals.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(1)
        alpha, beta = alpha.sum(1), beta.sum(1)
        inside = (alpha == self.sector.n_alpha) & (beta == self.sector.n_beta)
        return log_prob.masked_fill(~inside, -torch.inf)

    def flat_log_psi(self, keys: Tensor) -> Tensor:
        """log psi by the slow twin: complex128 (batch,); real part -inf outside the sector."""
        return torch.complex(0.5 * self.flat_log_prob(keys), self.phase(keys).to(torch.float64))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters in a fixed order, for checkpoints and optimisers."""
        return iter(sorted(self.named_parameters()))
