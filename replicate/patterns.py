"""Flip patterns sorted by the form of their matrix elements: the tables of `replicate.hamiltonian.Kernel`.
 Three forms cover every pattern that keeps a sector. *Tabulated*: all strings agree outside the flipped
qubits, at most four: a sign times a table of the flipped bits (double excitations). *Linear*: two flipped
qubits, strings with at most one more Z outside: a sign times a linear function of the occupations (single
excitations). *General*: all others, which the Hamiltonians of molecules do not have, string by string.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replicate.pauli import Hamiltonian, popcount

LOCAL = 16
"""Values of the at most four flipped bits; the parity count sits above them in a code."""

NEGLIGIBLE = 1e-12
"""Hartree: matrix elements at most this large are left out of `Connected` and of sector matrices."""


@dataclass(frozen=True)
class Plan:
    """Kernel data in qubit layout; matrices are (qubit, column), columns = diagonal, linear, tabulated,
    general."""

    flips: NDArray[np.int64]
    n_linear: int
    n_general: int
    outer: NDArray[np.int64]  # (columns,): the common Z outside the flipped qubits
    local: NDArray[
        np.int64
    ]  # (columns, 4): the flipped qubits, ascending; 63, an empty bit, where there are fewer
    conserve: NDArray[np.float64]
    code: NDArray[np.float64]
    table: NDArray[np.float64]  # (columns, 32): [local + 16 parity]
    may_vanish: bool
    linear: NDArray[np.float64]  # (n, n_linear)
    linear_constant: NDArray[np.float64]
    quadratic: NDArray[np.float64]  # (n, n), upper triangle
    diagonal_linear: NDArray[np.float64]  # (n,)
    diagonal_constant: float
    diagonal_masks: NDArray[np.int64]
    diagonal_weights: NDArray[np.float64]
    general_offsets: NDArray[np.int64]
    general_masks: NDArray[np.int64]
    general_weights: NDArray[np.float64]
    symmetries: NDArray[np.int64]  # masks: the parity of the electrons on one is conserved


def sort_patterns(hamiltonian: Hamiltonian) -> Plan:
    """Sort the patterns into the three forms and fill their tables, once per kernel (0.1 s for Li2O)."""
    n = hamiltonian.n_qubits
    alpha = np.int64(sum(1 << q for q in range(0, n, 2)))
    linear, tabulated, general = [], [], []
    for m in range(1, hamiltonian.n_unique_flips):
        flip = hamiltonian.flips[m]
        size, size_alpha = popcount(flip), popcount(flip & alpha)
        if size_alpha % 2 or size % 2:
            continue  # no determinant stays in its sector
        strings = slice(int(hamiltonian.offsets[m]), int(hamiltonian.offsets[m + 1]))
        outer = hamiltonian.z_masks[strings] & ~flip
        if size == 2 and np.all(popcount(outer ^ _between(flip)) <= 1):
            linear.append((flip, strings, _between(flip)))
        elif size <= 4 and np.all(outer == outer[0]):
            tabulated.append((flip, strings, outer[0]))
        else:
            general.append((flip, strings, np.int64(0)))
    columns = [(np.int64(0), slice(0, 0), np.int64(0)), *linear, *tabulated, *general]
    flips = np.array([flip for flip, _, _ in columns], dtype=np.int64)
    outers = np.array([outer for _, _, outer in columns], dtype=np.int64)
    first_general = 1 + len(linear) + len(tabulated)
    qubits = np.arange(n)
    flipped = flips >> qubits[:, None] & 1  # (qubit, column)
    conserve: NDArray[np.float64] = np.where(qubits % 2 == 0, 1.0, 64.0)[:, None] * flipped
    rank = np.cumsum(flipped, axis=0) - 1  # of a flipped qubit among those of its column
    code = flipped * 2.0 ** np.maximum(rank, 0) + LOCAL * (outers >> qubits[:, None] & 1)
    code[:, first_general:] = 0.0
    local_qubits = np.full((len(columns), 4), 63)
    qubit, column = np.nonzero(flipped[:, :first_general])
    local_qubits[column, rank[qubit, column]] = qubit

    # the diagonal and general patterns come whole from elsewhere: as a factor, or filled in by the kernel
    table = np.ones((len(columns), 2 * LOCAL))
    parity = np.repeat([1.0, -1.0], LOCAL)
    linear_constant, linear_factor = np.zeros(len(linear)), np.zeros((n, len(linear)))
    may_vanish = bool(linear or general)
    for c, (flip, strings, outer) in enumerate(linear):
        z, weights = hamiltonian.z_masks[strings], hamiltonian.weights[strings]
        # of the two flipped qubits exactly one is filled: a Z pair on them is -1, so that it joins the
        # strings
        weights = np.where((z & flip) == 0, weights, -weights)
        extra = (z & ~flip) ^ outer
        linear_constant[c] = weights[extra == 0].sum()
        np.add.at(linear_factor[:, c], _position(extra[extra != 0]), weights[extra != 0])
        table[1 + c] = parity
    for c, (flip, strings, _) in enumerate(tabulated, start=1 + len(linear)):
        local = _deposit(local_qubits[c, : popcount(flip)])
        sign = 1.0 - 2.0 * (np.bitwise_count(local[:, None] & hamiltonian.z_masks[strings]) & 1)
        values = sign @ hamiltonian.weights[strings]
        table[c] = parity * np.tile(values, 2)
        balanced = np.bitwise_count(local & alpha) * 2 == np.bitwise_count(flip & alpha)
        balanced &= np.bitwise_count(local & ~alpha) * 2 == np.bitwise_count(flip & ~alpha)
        may_vanish = may_vanish or bool(np.any(np.abs(values[balanced]) <= NEGLIGIBLE))

    diagonal = slice(0, int(hamiltonian.offsets[1]))
    z, weights = hamiltonian.z_masks[diagonal], hamiltonian.weights[diagonal]
    size = popcount(z)
    quadratic, diagonal_linear = np.zeros((n, n)), np.zeros(n)
    diagonal_linear[_position(z[size == 1])] = weights[size == 1]
    low = z[size == 2] & -z[size == 2]
    quadratic[_position(low), _position(z[size == 2] ^ low)] = weights[size == 2]
    masks = [hamiltonian.z_masks[strings] for _, strings, _ in general]
    values_general = [hamiltonian.weights[strings] for _, strings, _ in general]
    return Plan(
        flips=flips,
        n_linear=len(linear),
        n_general=len(general),
        outer=outers,
        local=local_qubits,
        conserve=conserve,
        code=code,
        table=table,
        may_vanish=may_vanish,
        linear=linear_factor,
        linear_constant=linear_constant,
        quadratic=quadratic,
        diagonal_linear=diagonal_linear,
        diagonal_constant=float(weights[size == 0].sum()),
        diagonal_masks=z[size > 2],
        diagonal_weights=weights[size > 2],
        general_offsets=np.cumsum([0, *(len(mask) for mask in masks)]),
        general_masks=np.concatenate([np.zeros(0, dtype=np.int64), *masks]),
        general_weights=np.concatenate([np.zeros(0), *values_general]),
        symmetries=_symmetries(flips, n),
    )


def _symmetries(flips: NDArray[np.int64], n_qubits: int) -> NDArray[np.int64]:
    """Masks on which every flip flips an even number of qubits, beside those of the spins: at most three.

    Products of Z that commute with the Hamiltonian (the null space of its flips over GF(2), arXiv:1701.08213
    section VI); an abelian point group has up to three.
    """
    pivots, _ = _echelon(flips.tolist())
    free = [qubit for qubit in range(n_qubits) if qubit not in pivots]
    masks = [1 << q | sum(1 << p for p, row in pivots.items() if row >> q & 1) for q in free]
    alpha = sum(1 << q for q in range(0, n_qubits, 2))
    _, independent = _echelon([alpha, alpha << 1, *masks])
    return np.array(independent[2:5], dtype=np.int64)


def _echelon(vectors: Iterable[int]) -> tuple[dict[int, int], list[int]]:
    """Reduced row echelon form over GF(2), rows by their leading bit, and the vectors that are independent
    of those before them."""
    rows: dict[int, int] = {}
    independent = []
    for vector in vectors:
        rest = vector
        for leading, row in rows.items():
            if rest >> leading & 1:
                rest ^= row
        if rest:
            independent.append(vector)
            new = rest.bit_length() - 1
            rows = {leading: row ^ rest if row >> new & 1 else row for leading, row in rows.items()}
            rows[new] = rest
    return rows, independent


def _between(flip: np.int64) -> np.int64:
    """The qubits strictly between the two of a pair: its Jordan-Wigner string."""
    low = flip & -flip
    high = flip ^ low
    return (high - 1) & ~(2 * low - 1)


def _position(masks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of the only set bit of each mask."""
    return popcount(masks - 1)


def _deposit(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The low bits of 0 to LOCAL - 1 spread onto `positions`; bits beyond them are ignored."""
    values = np.arange(LOCAL, dtype=np.int64)
    return np.bitwise_or.reduce([(values >> j & 1) << q for j, q in enumerate(positions)])
