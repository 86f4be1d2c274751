"""Connected determinants and matrix elements of a batch, in integer masks and small GEMMs (torch, any device).

For a flip pattern of an excitation the strings differ on the flipped qubits only, up to one common Jordan-Wigner
string: h_m(x) = (-1)^popcount(x & outer_m) table_m[local bits of x], with `local` the (at most four) flipped bits.
Patterns of two flipped qubits (single excitations) have one more factor, linear in the occupations of all the others.
Both the local bits and the parity of a whole batch against all patterns are one GEMM of small integers, exact in
float32 (and in TF32), and so is the test whether x ^ flip stays in the sector: no loop over determinants or strings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicate.pauli import Hamiltonian, from_openfermion, jordan_wigner, popcount, to_openfermion
from replicate.sector import from_key_layout, to_key_layout

__all__ = [
    "Connected",
    "Hamiltonian",
    "Kernel",
    "from_openfermion",
    "jordan_wigner",
    "matrix_elements_dense",
    "to_openfermion",
]

NEGLIGIBLE = 1e-12
"""Hartree: matrix elements at most this large are left out of `Connected` and of sector matrices."""

_LOCAL = 16  # values of the at most four flipped bits; the parity count sits above them in a code
_CPU_SCRATCH, _DEVICE_SCRATCH = 32 << 20, 1 << 30  # bytes; on a CPU the scratch should stay in the last cache


@dataclass(frozen=True)
class Connected:
    """The nonzero matrix elements of a batch: <x|H|x'> with x = batch[row].

    `row`: int64 (P,), nondecreasing. `key`: int64 (P,), x' in key layout, inside the sector, x itself included (its
    diagonal element, whatever its size). `value`: float64 (P,), Hartree, symmetric in x and x'.
    """

    row: Tensor
    key: Tensor
    value: Tensor


class Kernel:
    """Matrix elements of a Hamiltonian between determinants in key layout, on a device.

    Patterns that change the electron number or spin projection are left out: the kernel acts within sectors.
    """

    def __init__(self, hamiltonian: Hamiltonian, order: str = "reversed", device: str | torch.device = "cpu") -> None:
        self.hamiltonian, self.order, self.device = hamiltonian, order, torch.device(device)
        self.n_qubits = n = hamiltonian.n_qubits
        plan = _plan(hamiltonian)

        def key_layout(masks: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(to_key_layout(masks, n // 2, order)).to(self.device)

        # column 0 is the diagonal, then the linear patterns, then the tabulated ones, then the rest
        self._flips = key_layout(plan.flips)
        self._n_linear, self._n_general = plan.n_linear, plan.n_general
        self._conserve = self._columns(plan.conserve, torch.float32)
        self._code = self._columns(plan.code, torch.float32)
        self._table = torch.from_numpy(plan.table.ravel()).to(self.device)
        self._may_vanish = bool(plan.may_vanish)
        self._linear = self._columns(plan.linear, torch.float64)
        self._linear_constant = torch.from_numpy(plan.linear_constant).to(self.device)
        self._quadratic = self._columns(self._columns(plan.quadratic, torch.float64).T.cpu().numpy(), torch.float64)
        self._diagonal_linear = self._columns(plan.diagonal_linear[:, None], torch.float64)
        self._diagonal_constant = plan.diagonal_constant
        self._diagonal_rest = (key_layout(plan.diagonal_rest_masks), self._tensor(plan.diagonal_rest_weights))
        self._general_offsets = self._tensor(plan.general_offsets)
        self._general_masks = key_layout(plan.general_masks)
        self._general_weights = self._tensor(plan.general_weights)
        self._bits = torch.arange(n, dtype=torch.int64, device=self.device)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _columns(self, matrix: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
        """A matrix (qubit, column) with its rows moved to key layout."""
        bits = np.int64(1) << np.arange(self.n_qubits, dtype=np.int64)
        position = np.log2(to_key_layout(bits, self.n_qubits // 2, self.order).astype(np.float64)).round().astype(int)
        moved = np.empty_like(matrix)
        moved[position] = matrix
        return torch.from_numpy(moved).to(device=self.device, dtype=dtype)

    def _spins(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Z eigenvalues, +1 empty and -1 filled: (B, n)."""
        return 1 - 2 * ((keys[:, None] >> self._bits) & 1).to(dtype)

    def diagonal(self, keys: Tensor) -> Tensor:
        """<x|H|x>: int64 (B,) -> float64 (B,), Hartree."""
        return self._diagonal(keys, self._spins(keys, torch.float64))

    def _diagonal(self, keys: Tensor, spins: Tensor) -> Tensor:
        value = ((spins @ self._quadratic) * spins).sum(1) + (spins @ self._diagonal_linear)[:, 0]
        value = value + self._diagonal_constant
        masks, weights = self._diagonal_rest
        if len(masks):
            value = value + _signs(keys[:, None] & masks, torch.float64) @ weights
        return value

    def connected(self, keys: Tensor, max_bytes: int | None = None) -> Connected:
        """All x' of the sector with nonzero <x|H|x'>, x included: keys int64 (B,), any order, duplicates allowed.

        `max_bytes` bounds the scratch memory beside the result (24 bytes per element).
        """
        parts = [
            (row + start, key, value) for start, row, key, value in self._chunks(keys.to(self.device), max_bytes)
        ]
        if not parts:
            empty = torch.zeros(0, dtype=torch.int64, device=self.device)
            return Connected(empty, empty.clone(), empty.to(torch.float64))
        row, key, value = (torch.cat(column) for column in zip(*parts, strict=True))
        return Connected(row, key, value)

    def _chunks(self, keys: Tensor, max_bytes: int | None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        if max_bytes is None:
            max_bytes = _CPU_SCRATCH if self.device.type == "cpu" else _DEVICE_SCRATCH
        rows = max(1, max_bytes // (24 * len(self._flips)))
        for start in range(0, len(keys), rows):
            yield start, *self._connected(keys[start : start + rows])

    def _connected(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spins = self._spins(keys, torch.float64)
        spins32 = spins.to(torch.float32)
        # both spins' counts on the flipped qubits are balanced if and only if this weighted sum is zero
        row, column = torch.nonzero(spins32 @ self._conserve == 0, as_tuple=True)
        occupied = (1 - spins32) / 2
        code = (occupied @ self._code)[row, column].to(torch.int64)
        value = self._table[column * (2 * _LOCAL) + (code & (2 * _LOCAL - 1))]
        # diagonal and linear patterns have a factor that depends on all occupations; the others take the last column, 1
        factor = torch.ones(len(keys), self._n_linear + 2, dtype=torch.float64, device=self.device)
        factor[:, 0] = self._diagonal(keys, spins)
        torch.addmm(self._linear_constant, spins, self._linear, out=factor[:, 1:-1])
        value = value * factor[row, column.clamp(max=self._n_linear + 1)]
        if self._n_general:
            self._add_general(keys, row, column, value)
        key = keys[row] ^ self._flips[column]
        if self._may_vanish:
            keep = (value.abs() > NEGLIGIBLE) | (column == 0)
            row, key, value = row[keep], key[keep], value[keep]
        return row, key, value

    def _add_general(self, keys: Tensor, row: Tensor, column: Tensor, value: Tensor) -> None:
        """Values of patterns that fit neither form, string by string, into `value`."""
        first = len(self._flips) - self._n_general
        entry = torch.nonzero(column >= first)[:, 0]
        pattern = column[entry] - first
        count = self._general_offsets[pattern + 1] - self._general_offsets[pattern]
        owner = torch.repeat_interleave(torch.arange(len(entry), device=self.device), count)
        start = torch.cumsum(count, 0) - count
        string = torch.arange(len(owner), device=self.device) - start[owner] + self._general_offsets[pattern][owner]
        sign = _signs(keys[row[entry]][owner] & self._general_masks[string], torch.float64)
        total = torch.zeros(len(entry), dtype=torch.float64, device=self.device)
        value[entry] = total.index_add_(0, owner, sign * self._general_weights[string])

    def sector_matrix(self, keys_sorted: Tensor, max_bytes: int | None = None) -> Tensor:
        """<x|H|x'> restricted to the given keys: sparse CSR float64 (B, B) with int32 indices, rows sorted.

        `keys_sorted`: int64 (B,), ascending and distinct: a whole sector or any part of it.
        """
        keys_sorted = keys_sorted.to(self.device)
        size = len(keys_sorted)
        if size > 1 and not bool((keys_sorted[1:] > keys_sorted[:-1]).all()):
            raise ValueError("keys_sorted: not ascending and distinct")
        counts, columns, values = [], [], []
        for start, row, key, value in self._chunks(keys_sorted, max_bytes):
            column = torch.searchsorted(keys_sorted, key).clamp_(max=size - 1)
            found = torch.nonzero(keys_sorted[column] == key)[:, 0]
            row, column, value = row[found], column[found], value[found]
            order = torch.argsort(row * size + column)
            counts.append(torch.bincount(row, minlength=min(len(keys_sorted) - start, int(row[-1]) + 1)))
            columns.append(column[order].to(torch.int32))
            values.append(value[order])
        offsets = torch.zeros(size + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(torch.cat(counts), 0, out=offsets[1:])
        if int(offsets[-1]) >= 2**31:
            raise MemoryError(f"{int(offsets[-1])} matrix elements: too many for one sparse matrix")
        with warnings.catch_warnings():  # torch says on first use that CSR support is in beta
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            return torch.sparse_csr_tensor(
                offsets.to(torch.int32), torch.cat(columns), torch.cat(values), (size, size), check_invariants=False
            )


def _signs(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """(-1)^popcount of non-negative int64 masks by folding: any shape."""
    for shift in (32, 16, 8, 4, 2, 1):
        masks = masks ^ (masks >> shift)
    return 1 - 2 * (masks & 1).to(dtype)


@dataclass(frozen=True)
class _Plan:
    """Kernel data in qubit layout; matrices are (qubit, column), columns = diagonal, linear, tabulated, general."""

    flips: NDArray[np.int64]
    n_linear: int
    n_general: int
    conserve: NDArray[np.float64]
    code: NDArray[np.float64]
    table: NDArray[np.float64]  # (columns, 32): [local + 16 parity]
    may_vanish: bool
    linear: NDArray[np.float64]  # (n, n_linear)
    linear_constant: NDArray[np.float64]
    quadratic: NDArray[np.float64]  # (n, n), upper triangle
    diagonal_linear: NDArray[np.float64]  # (n,)
    diagonal_constant: float
    diagonal_rest_masks: NDArray[np.int64]
    diagonal_rest_weights: NDArray[np.float64]
    general_offsets: NDArray[np.int64]
    general_masks: NDArray[np.int64]
    general_weights: NDArray[np.float64]


def _plan(hamiltonian: Hamiltonian) -> _Plan:
    """Sort the patterns into the three forms and fill their tables; a few milliseconds of plain loops over patterns."""
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
    table = np.zeros((len(columns), 2 * _LOCAL))
    linear_constant, linear_factor = np.zeros(len(linear)), np.zeros((n, len(linear)))
    may_vanish = bool(linear or general)
    for c, (flip, strings, outer) in enumerate(columns):
        flipped = _positions(flip)
        conserve[flipped, c] = np.where(flipped % 2 == 0, 1.0, 64.0)
        z, weights = hamiltonian.z_masks[strings], hamiltonian.weights[strings]
        if c == 0 or c > len(linear) + len(tabulated):
            table[c] = 1.0  # the whole element comes as a factor, or is filled in by `_add_general`
            continue
        code[flipped, c] = 2.0 ** np.arange(len(flipped))
        code[_positions(outer), c] = _LOCAL
        parity = np.repeat([1.0, -1.0], _LOCAL)
        if c <= len(linear):
            # of the two flipped qubits exactly one is filled: a Z pair on them is -1, so that it joins the strings
            weights = np.where((z & flip) == 0, weights, -weights)
            extra = (z & ~flip) ^ outer
            linear_constant[c - 1] = weights[extra == 0].sum()
            np.add.at(linear_factor[:, c - 1], _positions_of_single(extra[extra != 0]), weights[extra != 0])
            table[c] = parity
            continue
        local = _deposit(np.arange(_LOCAL, dtype=np.int64), flipped)
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
    return _Plan(
        flips=np.array([flip for flip, _, _ in columns], dtype=np.int64),
        n_linear=len(linear),
        n_general=len(general),
        conserve=conserve,
        code=code,
        table=table,
        may_vanish=may_vanish,
        linear=linear_factor,
        linear_constant=linear_constant,
        quadratic=quadratic,
        diagonal_linear=diagonal_linear,
        diagonal_constant=float(weights[size == 0].sum()),
        diagonal_rest_masks=z[size > 2],
        diagonal_rest_weights=weights[size > 2],
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


def matrix_elements_dense(
    hamiltonian: Hamiltonian, keys: NDArray[np.int64], order: str = "reversed"
) -> NDArray[np.float64]:
    """<x|H|x'> for all pairs of keys, string by string: the slow twin of `Kernel`. float64 (B, B)."""
    states = from_key_layout(np.asarray(keys), hamiltonian.n_qubits // 2, order)
    matrix = np.zeros((len(states), len(states)))
    for flip, z_mask, weight in zip(
        hamiltonian.string_flips, hamiltonian.z_masks, hamiltonian.weights, strict=True
    ):
        connected = states[:, None] ^ states[None, :] == flip
        sign = 1.0 - 2.0 * (popcount(states & z_mask) & 1)
        matrix += np.where(connected, (weight * sign)[:, None], 0.0)
    return matrix
