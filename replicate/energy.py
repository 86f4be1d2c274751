"""Local energies, their mean and variance (SCIENCE.md section 4).

E_loc(x) = sum_x' <x|H|x'> psi(x') / psi(x). Three modes give it: `exact` evaluates each distinct determinant
once, `paper` makes B * M forward passes and reuses nothing (what the study's FLOP estimates assume),
`sampled` counts x' only if it is in the sample. Everything here is float64 or complex128, whatever the
networks are: at |E| = 460 Ha a float32 mean has a floor of 3e-5 Ha.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.ansatz.base import WaveFunction
from replicate.hamiltonian import Kernel
from replicate.ranks import ALONE, Group
from replicate.sector import to_key_layout
from replicate.tree import PrefixTree, build_tree


@dataclass(frozen=True)
class EnergyStats:
    """Zero-dimensional float64 tensors: `energy` (Hartree), `variance` of the local energy (Hartree^2)."""

    energy: Tensor
    variance: Tensor


def energy_stats(local: Tensor, weight: Tensor) -> EnergyStats:
    """Weighted mean and variance of local energies, the ingredients of the V-score.

    `local`: complex128 (batch,), Hartree. `weight`: float64 (batch,), sums to 1. The mean's imaginary part is
    noise and dropped. Raises ValueError unless both are one-dimensional: a (batch, 1) weight would broadcast
    to (batch, batch) and inflate the variance batch-fold.
    """
    if local.dim() != 1 or local.shape != weight.shape:
        raise ValueError(f"local {tuple(local.shape)} and weight {tuple(weight.shape)} must both be (batch,)")
    energy = (weight * local.real).sum()
    deviation = local - energy
    variance = (weight * (deviation.real**2 + deviation.imag**2)).sum()
    return EnergyStats(energy, variance)


@dataclass(frozen=True)
class Evaluated:
    """What a batch of amplitudes cost: determinants evaluated, tree nodes and tips that the networks saw."""

    determinants: int = 0
    nodes: int = 0
    tips: int = 0

    @classmethod
    def of(cls, tree: PrefixTree) -> Evaluated:
        """One pass over `tree`, already made: tips are counted only where the network ran on them."""
        return cls(tree.n_leaves, tree.n_nodes, tree.n_tips if tree.knows_tips else 0)

    def __add__(self, other: Evaluated) -> Evaluated:
        return Evaluated(
            self.determinants + other.determinants, self.nodes + other.nodes, self.tips + other.tips
        )


@dataclass(frozen=True)
class LocalEnergies:
    """`values`: complex128 (batch,), Hartree. `log_prob`: float64 (batch,), of the batch itself. Both are
    whole on every rank. `cost`: forward passes that this rank has made for them. `element_flops`: of the
    matrix products that gave it the Hamiltonian's elements."""

    values: Tensor
    log_prob: Tensor
    cost: Evaluated
    element_flops: int


# -- the whole sector at once --------------------------------------------------------------------------


def amplitudes(log_prob: Tensor, phase: Tensor) -> Tensor:
    """psi up to a common positive factor (the largest |psi| is 1): float64 (batch, 2), real and imaginary."""
    size = (0.5 * (log_prob - log_prob.max())).exp()
    phase = phase.to(torch.float64)
    return torch.stack([size * phase.cos(), size * phase.sin()], dim=1)


def local_from_product(psi: Tensor, product: Tensor) -> Tensor:
    """E_loc from psi and H psi, both float64 (batch, 2): complex128 (batch,); 0 where psi vanishes."""
    norm = (psi**2).sum(1)
    norm = norm.where(norm > 0, torch.inf)
    real = (product * psi).sum(1) / norm
    imag = (product[:, 1] * psi[:, 0] - product[:, 0] * psi[:, 1]) / norm
    return torch.complex(real, imag)


# -- a batch of samples: every rank gives all keys, works on its share of them and gets all values -----


@torch.no_grad()
def tree_amplitudes(wave: WaveFunction, keys: Tensor, chunk: int) -> tuple[Tensor, Tensor, Evaluated]:
    """log p and phi of sorted distinct keys, `chunk` of them (contiguous subtrees) at a time: float64."""
    log_prob = torch.empty(keys.shape, dtype=torch.float64, device=keys.device)
    phase = torch.empty_like(log_prob)
    cost = Evaluated()
    for start in range(0, keys.shape[0], chunk):
        part = keys[start : start + chunk]
        tree = build_tree(part, wave.sector, wave.feasible(keys.device))
        log_prob[start : start + chunk] = wave.log_prob(tree)
        phase[start : start + chunk] = wave.phase(part)
        cost += Evaluated.of(tree)
    return log_prob, phase, cost


def _contract(rows: int, row: Tensor, value: Tensor, log_ratio: Tensor, phase: Tensor) -> Tensor:
    """sum of value * exp(log_ratio + i phase) by row: complex128 (rows,)."""
    size = value * log_ratio.exp()
    out = torch.zeros((rows, 2), dtype=torch.float64, device=value.device)
    out[:, 0].index_add_(0, row, size * phase.cos())
    out[:, 1].index_add_(0, row, size * phase.sin())
    return torch.view_as_complex(out)


def shared_amplitudes(
    wave: WaveFunction, keys: Tensor, chunk: int, group: Group
) -> tuple[Tensor, Tensor, Evaluated]:
    """`tree_amplitudes` of each rank's keys; what several ranks ask for is evaluated once, by its owner."""
    if group.size == 1:
        return tree_amplitudes(wave, keys, chunk)
    asked, answer = group.by_range(keys)
    every, where = torch.unique(asked, return_inverse=True)
    log_prob, phase, cost = tree_amplitudes(wave, every, chunk)
    log_prob, phase = answer(torch.stack([log_prob, phase], dim=1)[where]).unbind(1)
    return log_prob, phase, cost


def local_energies_exact(
    wave: WaveFunction, kernel: Kernel, keys: Tensor, chunk: int, group: Group = ALONE
) -> LocalEnergies:
    """Each distinct determinant of samples and connected ones evaluated once. `keys`: sorted, distinct."""
    cuts = group.even(keys.shape[0])
    keys = keys[group.own(cuts)]
    connected = kernel.connected(keys)
    every, where = torch.unique(connected.key, return_inverse=True)
    log_prob, phase, cost = shared_amplitudes(wave, every, chunk, group)
    itself = torch.searchsorted(every, keys.contiguous())
    own = itself[connected.row]
    log_ratio = 0.5 * (log_prob[where] - log_prob[own])
    values = _contract(keys.shape[0], connected.row, connected.value, log_ratio, phase[where] - phase[own])
    log_prob = group.gather(log_prob[itself], cuts)
    return LocalEnergies(group.gather(values, cuts), log_prob, cost, connected.flops)


def local_energies_sampled(
    wave: WaveFunction,
    kernel: Kernel,
    keys: Tensor,
    chunk: int,
    group: Group = ALONE,
    known: tuple[Tensor, Tensor] | None = None,
) -> LocalEnergies:
    """psi(x') counted only if x' is one of the samples (open question 2). `keys`: sorted, distinct.

    `known`: log p and phi of this rank's keys, float64 (own,), where the caller has them. The matrix elements
    are shared out as they are cheapest to find, whatever their row: rows are summed over ranks.
    """
    cuts = group.even(keys.shape[0])
    log_prob, phase, cost = (
        (*known, Evaluated()) if known else tree_amplitudes(wave, keys[group.own(cuts)], chunk)
    )
    log_prob, phase = group.gather(log_prob, cuts), group.gather(phase, cuts)
    inside = kernel.within(keys, share=(group.rank, group.size))
    row, where, value = inside.row, inside.column, inside.value
    log_ratio = 0.5 * (log_prob[where] - log_prob[row])
    values = group.sum(_contract(keys.shape[0], row, value, log_ratio, phase[where] - phase[row]))
    return LocalEnergies(values, log_prob, cost, inside.flops)


@torch.no_grad()
def local_energies_paper(
    wave: WaveFunction, kernel: Kernel, keys: Tensor, chunk: int, group: Group = ALONE
) -> LocalEnergies:
    """B * M forward passes over full sequences, nothing shared, states outside the sector included.

    The baseline of the study's FLOP estimates; `chunk` is the number of passes made at a time.
    """
    masks = to_key_layout(kernel.hamiltonian.flips, wave.sector.n_orbitals, wave.sector.order)
    flips, _ = torch.sort(torch.as_tensor(masks, device=keys.device))
    own = int(torch.searchsorted(flips, 0))
    rows = max(1, chunk // flips.shape[0])
    cuts = group.even(keys.shape[0])
    keys = keys[group.own(cuts)]
    values = torch.empty(keys.shape, dtype=torch.complex128, device=keys.device)
    log_prob = torch.empty(keys.shape, dtype=torch.float64, device=keys.device)
    element_flops = 0
    for start in range(0, keys.shape[0], rows):
        part = keys[start : start + rows]
        log_psi = wave.flat_log_psi((part.unsqueeze(1) ^ flips).view(-1)).view(-1, flips.shape[0])
        connected = kernel.connected(part)
        element_flops += connected.flops
        column = torch.searchsorted(flips, part[connected.row] ^ connected.key)
        ratio = log_psi[connected.row, column] - log_psi[connected.row, own]
        values[start : start + rows] = _contract(
            part.shape[0], connected.row, connected.value, ratio.real, ratio.imag
        )
        log_prob[start : start + rows] = 2 * log_psi[:, own].real
    cost = Evaluated(determinants=keys.shape[0] * flips.shape[0])
    values, log_prob = group.gather(values, cuts), group.gather(log_prob, cuts)
    return LocalEnergies(values, log_prob, cost, element_flops)


LOCAL_ENERGY = {
    "exact": local_energies_exact,
    "sampled": local_energies_sampled,
    "paper": local_energies_paper,
}


def local_energies_dense(matrix: Tensor, log_psi: Tensor) -> Tensor:
    """The slow twin: (H psi) / psi with the dense sector matrix, float64 (size, size), complex128 (size,)."""
    psi = log_psi.exp()
    return (matrix.to(torch.complex128) @ psi) / psi
