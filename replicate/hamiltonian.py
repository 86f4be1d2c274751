"""Connected determinants and matrix elements of a batch: integer masks and small GEMMs in torch.

For a flip pattern of an excitation the strings differ on the flipped qubits only, up to one common
Jordan-Wigner string: h_m(x) = (-1)^popcount(x & outer_m) table_m[local bits of x], with `local` the (at most
four) flipped bits. Patterns of two flipped qubits (single excitations) have one more factor, linear in the
occupations of all the others. Both the local bits and the parity of a whole batch against all patterns are
one GEMM of small integers, exact in float32 (and in TF32), and so is the test whether x ^ flip stays in the
sector: no loop over determinants or strings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicate.patterns import LOCAL, NEGLIGIBLE, sort_patterns
from replicate.pauli import Hamiltonian, from_openfermion, jordan_wigner, popcount, to_openfermion
from replicate.sector import from_key_layout, to_key_layout

__all__ = [
    "Connected",
    "Elements",
    "Hamiltonian",
    "Kernel",
    "from_openfermion",
    "jordan_wigner",
    "matrix_elements_dense",
    "to_openfermion",
]

_CPU_SCRATCH, _DEVICE_SCRATCH = 32 << 20, 1 << 30  # bytes; on a CPU the scratch should stay in the last cache
_PAIRS_BELOW = 6  # pairs per determinant and pattern up to which comparing pairs beats trying all patterns
# determinants from which leaving out pairs by symmetry is worth its operators
_CPU_CLASSES_FROM, _DEVICE_CLASSES_FROM = 500, 20_000


@dataclass(frozen=True)
class Connected:
    """The nonzero matrix elements of a batch: <x|H|x'> with x = batch[row].

    `row`: int64 (P,), nondecreasing. `key`: int64 (P,), x' in key layout, inside the sector, x itself
    included (its diagonal element, whatever its size). `value`: float64 (P,), Hartree, symmetric in x and x'.
    `flops`: of the matrix products that gave them.
    """

    row: Tensor
    key: Tensor
    value: Tensor
    flops: int = 0


@dataclass(frozen=True)
class Elements:
    """Matrix elements between the determinants of one set: row and column int64 (P,), value
    float64 (P,), Hartree.

    Both triangles and the whole diagonal, each element once, in no particular but a fixed order. `flops`: of
    the matrix products that gave them.
    """

    row: Tensor
    column: Tensor
    value: Tensor
    flops: int = 0


@dataclass(frozen=True)
class _Part:
    """Elements of the rows [first, first + n_rows) of a matrix: `row` counts from `first`."""

    first: int
    n_rows: int
    row: Tensor
    column: Tensor
    value: Tensor
    flops: int


class Kernel:
    """Matrix elements of a Hamiltonian between determinants in key layout, on a device.

    Patterns that change the electron number or spin projection are left out: the kernel acts within sectors.
    """

    def __init__(
        self, hamiltonian: Hamiltonian, order: str = "reversed", device: str | torch.device = "cpu"
    ) -> None:
        self.hamiltonian, self.order, self.device = hamiltonian, order, torch.device(device)
        self.n_qubits = hamiltonian.n_qubits
        plan = sort_patterns(hamiltonian)

        layout = partial(to_key_layout, n_orbitals=hamiltonian.n_qubits // 2, order=order)
        # column 0 is the diagonal, then the linear patterns, then the tabulated ones, then the rest
        self._flips = self._tensor(layout(plan.flips))
        self._sorted_flips, self._sorted_columns = torch.sort(self._flips)
        self._most_flips = int(popcount(plan.flips).max())
        self._outer = self._tensor(layout(plan.outer))
        self._n_linear, self._n_general = plan.n_linear, plan.n_general
        self._conserve = self._tensor(plan.conserve).to(torch.float32)
        self._code = self._tensor(plan.code).to(torch.float32)
        self._table = self._tensor(plan.table.ravel())
        self._may_vanish = plan.may_vanish
        self._linear = self._tensor(plan.linear)
        self._linear_constant = self._tensor(plan.linear_constant)
        self._quadratic = self._tensor(plan.quadratic)
        self._diagonal_linear = self._tensor(plan.diagonal_linear)
        self._diagonal_constant = plan.diagonal_constant
        self._diagonal_masks = self._tensor(layout(plan.diagonal_masks))
        self._diagonal_weights = self._tensor(plan.diagonal_weights)
        self._symmetries = self._tensor(layout(plan.symmetries))
        self._general_offsets = self._tensor(plan.general_offsets)
        self._general_masks = self._tensor(layout(plan.general_masks))
        self._general_weights = self._tensor(plan.general_weights)
        # where the key layout keeps qubit q: occupations are read in qubit order, that of the tables
        qubits = np.int64(1) << np.arange(hamiltonian.n_qubits, dtype=np.int64)
        shifts = popcount(layout(qubits) - 1)
        self._shifts = self._tensor(shifts)
        self._local_shifts = self._tensor(np.append(shifts, [63] * (64 - len(shifts)))[plan.local].T)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _spins(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Z eigenvalues, +1 empty and -1 filled: (B, n)."""
        return 1 - 2 * ((keys[:, None] >> self._shifts) & 1).to(dtype)

    def diagonal(self, keys: Tensor) -> Tensor:
        """<x|H|x>: int64 (B,) -> float64 (B,), Hartree."""
        return self._diagonal(keys, self._spins(keys, torch.float64))

    def _diagonal(self, keys: Tensor, spins: Tensor) -> Tensor:
        value = (
            ((spins @ self._quadratic) * spins).sum(1)
            + spins @ self._diagonal_linear
            + self._diagonal_constant
        )
        if len(self._diagonal_masks):
            value = (
                value + _signs(keys[:, None] & self._diagonal_masks, torch.float64) @ self._diagonal_weights
            )
        return value

    def connected(self, keys: Tensor, max_bytes: int | None = None) -> Connected:
        """All x' of the sector with nonzero <x|H|x'>, x included: keys int64 (B,), any order, duplicates
        allowed.

        `max_bytes` bounds the scratch memory beside the result (24 bytes per element).
        """
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows, connected, values = [empty], [empty], [empty.to(torch.float64)]
        for start, row, key, value in self._chunks(keys.to(self.device), max_bytes):
            rows.append(row + start)
            connected.append(key)
            values.append(value)
        return Connected(_join(rows), _join(connected), _join(values), self._connected_flops(len(keys)))

    def count(self, keys: Tensor, max_bytes: int | None = None) -> int:
        """Upper bound of the number of elements that `connected` finds, at a small part of its cost."""
        keys = keys.to(self.device)
        rows = self._chunk_rows(max_bytes)
        return sum(int(self._balanced(part)[0].sum()) for part in keys.split(rows)) if len(keys) else 0

    def _chunk_rows(self, max_bytes: int | None) -> int:
        return max(1, self._scratch(max_bytes) // (24 * len(self._flips)))

    def _scratch(self, max_bytes: int | None) -> int:
        if max_bytes is not None:
            return max_bytes
        return _CPU_SCRATCH if self.device.type == "cpu" else _DEVICE_SCRATCH

    def _chunks(self, keys: Tensor, max_bytes: int | None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        rows = self._chunk_rows(max_bytes)
        for start in range(0, len(keys), rows):
            yield start, *self._connected(keys[start : start + rows])

    def _balanced(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Which patterns keep which determinants in the sector: bool (B, columns); and `_spins`."""
        spins = self._spins(keys, torch.float64)
        # both spins' counts on the flipped qubits are balanced if and only if this weighted sum is zero
        return spins.to(torch.float32) @ self._conserve == 0, spins

    def _connected(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        balanced, spins = self._balanced(keys)
        pair = torch.nonzero(balanced.view(-1))[:, 0]
        rows = torch.arange(len(keys), device=self.device)
        row = torch.repeat_interleave(rows, balanced.sum(1), output_size=len(pair))
        column = pair - row * len(self._flips)
        occupied = (1 - spins.to(torch.float32)) / 2
        code = (occupied @ self._code).view(-1).take(pair).to(torch.int64)
        value = self._values(keys, spins, row, column, code)
        key = keys.take(row) ^ self._flips.take(column)
        if self._may_vanish:
            keep = torch.nonzero((value.abs() > NEGLIGIBLE) | (column == 0))[:, 0]
            row, key, value = row.take(keep), key.take(keep), value.take(keep)
        return row, key, value

    def _values(self, keys: Tensor, spins: Tensor, row: Tensor, column: Tensor, code: Tensor) -> Tensor:
        """<x|H|x ^ flip> for pairs (row of `keys`, column of the tables) that stay in the sector: float64."""
        value = self._table.take(column * (2 * LOCAL) + (code & (2 * LOCAL - 1)))
        # diagonal and linear patterns have a factor that depends on all occupations; others take the last, 1
        factor = torch.ones(len(keys), self._n_linear + 2, dtype=torch.float64, device=self.device)
        factor[:, 0] = self._diagonal(keys, spins)
        factor[:, 1:-1] = torch.addmm(self._linear_constant, spins, self._linear)
        value *= factor.view(-1).take(row * (self._n_linear + 2) + column.clamp(max=self._n_linear + 1))
        if self._n_general:
            self._add_general(keys, row, column, value)
        return value

    # Executed FLOPs: the dense products of the methods above and below, a multiply-add being 2, from their
    # shapes alone. Products of a matrix and a vector (the diagonal's linear part) are left out, as by torch.

    def _connected_flops(self, rows: int) -> int:
        """Balance and local bits against all patterns, then the values."""
        patterns = self._conserve.shape[1] + self._code.shape[1]
        return 2 * rows * self.n_qubits * patterns + self._values_flops(rows)

    def _values_flops(self, rows: int) -> int:
        return 2 * rows * self.n_qubits * (self.n_qubits + self._n_linear)

    def _pairs_flops(self, rows: int, columns: int) -> int:
        """All pairs of `rows` with `columns` determinants, then the values."""
        return 2 * self.n_qubits * rows * columns + self._values_flops(rows)

    def _add_general(self, keys: Tensor, row: Tensor, column: Tensor, value: Tensor) -> None:
        """Values of patterns that fit neither form, string by string, into `value`."""
        first = len(self._flips) - self._n_general
        entry = torch.nonzero(column >= first)[:, 0]
        pattern = column[entry] - first
        count = self._general_offsets[pattern + 1] - self._general_offsets[pattern]
        owner = torch.repeat_interleave(torch.arange(len(entry), device=self.device), count)
        start = torch.cumsum(count, 0) - count
        string = (
            torch.arange(len(owner), device=self.device)
            - start[owner]
            + self._general_offsets[pattern][owner]
        )
        sign = _signs(keys[row[entry]][owner] & self._general_masks[string], torch.float64)
        total = torch.zeros(len(entry), dtype=torch.float64, device=self.device)
        value[entry] = total.index_add_(0, owner, sign * self._general_weights[string])

    def within(
        self, keys_sorted: Tensor, max_bytes: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Elements:
        """The nonzero elements between the given keys: int64 (B,), ascending and distinct.

        The same as `connected` without the connected determinants that are not among the keys, and much
        faster where those are most of them. `share` (r, k): the r-th of k shares of the elements; all shares
        together are the whole, and of about equal cost.
        """
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows, columns, values, flops = [empty], [empty], [empty.to(torch.float64)], 0
        for part in self._inside(keys_sorted.to(self.device), max_bytes, share=share):
            rows.append(part.row + part.first)
            columns.append(part.column)
            values.append(part.value)
            flops += part.flops
        return Elements(_join(rows), _join(columns), _join(values), flops)

    def sector_matrix(
        self, keys_sorted: Tensor, max_bytes: int | None = None, rows: slice | None = None
    ) -> Tensor:
        """<x|H|x'> restricted to the given keys: sparse CSR float64 (B, B) with int32 indices, rows sorted.

        `keys_sorted`: int64 (B,), ascending and distinct: a whole sector or any part of it. `rows`: a range
        [start, stop) of the matrix's rows instead of all B.
        """
        keys_sorted = keys_sorted.to(self.device)
        size = len(keys_sorted)
        if size > 1 and not bool((keys_sorted[1:] > keys_sorted[:-1]).all()):
            raise ValueError("keys_sorted: not ascending and distinct")
        # one allocation that is filled: parts that are joined would be held twice, and fragment the heap
        own = keys_sorted if rows is None else keys_sorted[rows]
        bound = self.count(own, max_bytes)
        columns = torch.empty(bound, dtype=torch.int32, device=self.device)
        values = torch.empty(bound, dtype=torch.float64, device=self.device)
        counts, filled = [torch.zeros(1, dtype=torch.int64, device=self.device)], 0
        for part in self._inside(keys_sorted, max_bytes, rows):
            order = torch.argsort(part.row * size + part.column)
            place = slice(filled, filled + len(order))
            columns[place] = part.column.take(order)
            values[place] = part.value.take(order)
            counts.append(torch.bincount(part.row, minlength=part.n_rows))
            filled += len(order)
        if filled >= 2**31:
            raise MemoryError(f"{filled} matrix elements: too many for one sparse matrix")
        offsets = torch.cumsum(torch.cat(counts), 0).to(torch.int32)
        with (
            warnings.catch_warnings()
        ):  # torch says on first use that CSR is in beta, or that nothing is checked
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            return torch.sparse_csr_tensor(
                offsets, columns[:filled], values[:filled], (len(own), size), check_invariants=False
            )

    def apply(self, keys_sorted: Tensor, vectors: Tensor, max_bytes: int | None = None) -> Tensor:
        """H @ vectors on the given keys, elements made and forgotten: for sectors whose matrix does not fit.

        `vectors`: float64 (B, k). Equal to `sector_matrix(keys_sorted) @ vectors` up to rounding; for
        repeated products of a matrix that fits, that is about 100 times as fast.
        """
        out = torch.zeros_like(vectors)
        for part in self._inside(keys_sorted.to(self.device), max_bytes):
            out.index_add_(0, part.row + part.first, part.value[:, None] * vectors[part.column])
        return out

    def _inside(
        self,
        keys: Tensor,
        max_bytes: int | None,
        rows: slice | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[_Part]:
        """Elements of the matrix's rows in the range `rows` (None: all), or of a `share` as in `within`."""
        size = len(keys)
        if rows is None or (rows.start, rows.stop) == (0, size):
            classes = self._classes(keys)
            if sum(len(members) ** 2 for members in classes) <= _PAIRS_BELOW * len(self._flips) * size:
                yield self._by_distance(keys, max_bytes, classes, share)
                return
        rows = rows or _own_rows(size, share)
        own = keys[rows]
        for start, row, key, value in self._chunks(own, max_bytes):
            column = torch.searchsorted(keys, key).clamp_(max=size - 1)
            found = torch.nonzero(keys.take(column) == key)[:, 0]
            row, column, value = row.take(found), column.take(found), value.take(found)
            n_rows = min(self._chunk_rows(max_bytes), len(own) - start)
            yield _Part(rows.start + start, n_rows, row, column, value, self._connected_flops(n_rows))

    def _classes(self, keys: Tensor) -> list[Tensor]:
        """Places in `keys` of determinants that no symmetry keeps apart: elements between classes vanish."""
        places = torch.arange(len(keys), device=self.device)
        least = _CPU_CLASSES_FROM if self.device.type == "cpu" else _DEVICE_CLASSES_FROM
        if not len(self._symmetries) or len(keys) < least:
            return [places]
        bits = torch.arange(len(self._symmetries), device=self.device)
        odd = 1 - _signs(keys[:, None] & self._symmetries, torch.int64)  # 0 or 2
        code = (odd << bits).sum(1) >> 1
        counts = torch.bincount(code, minlength=1 << len(bits)).tolist()
        return [members for members in torch.sort(code, stable=True).indices.split(counts) if len(members)]

    def _by_distance(
        self, keys: Tensor, max_bytes: int | None, classes: list[Tensor], share: tuple[int, int]
    ) -> _Part:
        """Elements between few keys: pairs of a class that differ on few qubits, found by one GEMM of all
        with all."""
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows, columns, values, flops = [empty], [empty], [empty.to(torch.float64)], 0
        for members in classes:
            size = len(members)
            first, last = _triangle_rows(size, share)
            own = members[first:last]
            rows.append(own)
            columns.append(own)
            values.append(self.diagonal(keys.take(own)))
            flops += 2 * len(own) * self.n_qubits**2
            step = max(1, self._scratch(max_bytes) // (24 * max(size, 1)))
            for start in range(first, last, step):
                stop = min(start + step, last)
                row, column, value = self._pairs(keys.take(members[start:]), stop - start)
                row, column = members.take(row + start), members.take(column + start)
                rows += [row, column]  # both triangles
                columns += [column, row]
                values += [value, value]
                flops += self._pairs_flops(stop - start, size - start)
        return _Part(0, len(keys), _join(rows), _join(columns), _join(values), flops)

    def _pairs(self, keys: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and value of the nonzero elements between each of the first `n_rows` and those behind
        it."""
        size, spins = len(keys), self._spins(keys, torch.float32)
        # the product of two determinants' spins is n - 2 x the number of qubits on which they differ
        overlap = spins[:n_rows] @ spins.T
        close = torch.nonzero((overlap >= self.n_qubits - 2 * self._most_flips).view(-1))[:, 0]
        row = torch.div(close, size, rounding_mode="floor")
        column = close - row * size
        above = torch.nonzero(column > row)[:, 0]
        row, column = row.take(above), column.take(above)
        key = keys.take(row)
        flip = key ^ keys.take(column)
        place = torch.searchsorted(self._sorted_flips, flip).clamp_(max=len(self._flips) - 1)
        known = torch.nonzero(self._sorted_flips.take(place) == flip)[:, 0]
        row, column, key = row.take(known), column.take(known), key.take(known)
        pattern = self._sorted_columns.take(place.take(known))
        code = LOCAL * ((1 - _signs(key & self._outer.take(pattern), torch.int64)) // 2)
        for j, shifts in enumerate(self._local_shifts):
            code += ((key >> shifts.take(pattern)) & 1) << j
        part = keys[:n_rows]
        value = self._values(part, self._spins(part, torch.float64), row, pattern, code)
        keep = torch.nonzero(value.abs() > NEGLIGIBLE)[:, 0]
        return row.take(keep), column.take(keep), value.take(keep)


def _own_rows(size: int, share: tuple[int, int]) -> slice:
    """Share r of k of `size` rows."""
    r, k = share
    return slice(size * r // k, size * (r + 1) // k)


def _triangle_rows(size: int, share: tuple[int, int]) -> tuple[int, int]:
    """The same where a row has all later ones to be compared with: equal area of the triangle."""
    r, k = share
    first, last = (round(size * (1 - math.sqrt(1 - i / k))) for i in (r, r + 1))
    return first, last


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate and let go of the parts, so that only one column at a time is held twice."""
    filled = [part for part in parts if len(part)] or parts[:1]
    parts.clear()
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def _signs(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """(-1)^popcount of non-negative int64 masks by folding: any shape."""
    for shift in (32, 16, 8, 4, 2, 1):
        masks = masks ^ (masks >> shift)
    return 1 - 2 * (masks & 1).to(dtype)


def matrix_elements_dense(
    hamiltonian: Hamiltonian, keys: NDArray[np.int64], order: str = "reversed"
) -> NDArray[np.float64]:
    """<x|H|x'> for all pairs of keys, string by string: the slow twin of `Kernel`. float64 (B, B)."""
    states = from_key_layout(np.asarray(keys), hamiltonian.n_qubits // 2, order)
    matrix = np.zeros((len(states), len(states)))
    for m, flip in enumerate(hamiltonian.flips):
        row, column = np.nonzero(states[:, None] ^ states[None, :] == flip)
        for k in range(hamiltonian.offsets[m], hamiltonian.offsets[m + 1]):
            parity = popcount(states[row] & hamiltonian.z_masks[k]) & 1
            matrix[row, column] += np.where(parity, -1, 1) * hamiltonian.weights[k]
    return matrix
