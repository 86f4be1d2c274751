"""Flip patterns sorted by the form of their matrix elements: the tables of `replicate.hamiltonian.Kernel`.
 Three forms cover every pattern that keeps a sector. *Tabulated*: all strings agree outside the flipped
qubits, at most four: a sign times a table of the flipped bits (double excitations). *Linear*: two flipped
qubits, strings with at most one more Z outside: a sign times a linear function of the occupations (single
excitations). *General*: all others, which the Hamiltonians of molecules do not have, string by string.
"""

from __future__ import annotations

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


def sort_patterns(hamiltonian: Hamiltonian) -> Plan:
    """Sort the patterns into the three forms and fill their tables; a few milliseconds of plain loops over
    patterns."""
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
    conserve, code = np.zeros((n, len(columns))), np.zeros((n, len(columns)))
    table, local_qubits = np.zeros((len(columns), 2 * LOCAL)), np.full((len(columns), 4), 63)
    linear_constant, linear_factor = np.zeros(len(linear)), np.zeros((n, len(linear)))
    may_vanish = bool(linear or general)
    for c, (flip, strings, outer) in enumerate(columns):
        flipped = _positions(flip)
        conserve[flipped, c] = np.where(flipped % 2 == 0, 1.0, 64.0)
        z, weights = hamiltonian.z_masks[strings], hamiltonian.weights[strings]
        if c == 0 or c > len(linear) + len(tabulated):
            table[c] = 1.0  # the whole element comes as a factor, or is filled in by `_add_general`
            continue
        local_qubits[c, : len(flipped)] = flipped
        code[flipped, c] = 2.0 ** np.arange(len(flipped))
        code[_positions(outer), c] = LOCAL
        parity = np.repeat([1.0, -1.0], LOCAL)
        if c <= len(linear):
            # of the two flipped qubits exactly one is filled: a Z pair on them is -1, so that it joins the
            # strings
            weights = np.where((z & flip) == 0, weights, -weights)
            extra = (z & ~flip) ^ outer
            linear_constant[c - 1] = weights[extra == 0].sum()
            np.add.at(linear_factor[:, c - 1], _positions_of_single(extra[extra != 0]), weights[extra != 0])
            table[c] = parity
            continue
        local = _deposit(np.arange(LOCAL, dtype=np.int64), flipped)
        values = (1.0 - 2.0 * (popcount(local[:, None] & z) & 1)) @ weights
        table[c] = parity * np.tile(values, 2)
        allowed = popcount(local & alpha) * 2 == popcount(flip & alpha)
        allowed &= popcount(local & ~alpha) * 2 == popcount(flip & ~alpha)
        may_vanish = may_vanish or bool(np.any(np.abs(values[allowed]) <= NEGLIGIBLE))

    diagonal = slice(0, int(hamiltonian.offsets[1]))
    z, weights = hamiltonian.z_masks[diagonal], hamiltonian.weights[diagonal]
    size = popcount(z)
    quadratic, diagonal_linear = np.zeros((n, n)), np.zeros(n)
    diagonal_linear[_positions_of_single(z[size == 1])] = weights[size == 1]
    low = z[size == 2] & -z[size == 2]
    quadratic[_positions_of_single(low), _positions_of_single(z[size == 2] ^ low)] = weights[size == 2]
    masks = [hamiltonian.z_masks[strings] for _, strings, _ in general]
    values_general = [hamiltonian.weights[strings] for _, strings, _ in general]
    return Plan(
        flips=np.array([flip for flip, _, _ in columns], dtype=np.int64),
        n_linear=len(linear),
        n_general=len(general),
        outer=np.array([outer for _, _, outer in columns], dtype=np.int64),
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
    )


def _between(flip: np.int64) -> np.int64:
    """The qubits strictly between the two of a pair: its Jordan-Wigner string."""
    low = flip & -flip
    high = flip ^ low
    return (high - 1) & ~(2 * low - 1)


def _positions(mask: np.int64) -> NDArray[np.int64]:
    """Set bits, ascending."""
    return np.array([q for q in range(63) if int(mask) >> q & 1], dtype=np.int64)


def _positions_of_single(masks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of the only set bit of each mask."""
    return popcount(masks - 1)


def _deposit(values: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spread the low bits of `values` onto `positions`; bits beyond them are ignored."""
    return np.bitwise_or.reduce([(values >> j & 1) << q for j, q in enumerate(positions)])
