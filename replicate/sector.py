"""The (n_alpha, n_beta) sector: its size, its determinants, and which tokens keep it reachable.

A determinant is one integer. In *key layout* the molecular orbital (MO) that is sampled first holds the two
most significant bits, so that sorted keys are the leaves of a prefix tree in depth-first order (see
`replicate.tree`). The token of an orbital is ``occ_alpha + 2 * occ_beta``: 0 empty, 1 alpha, 2 beta, 3 both.

With order ``"reversed"`` (highest MO first, the study's code lineage) the key *is* the Jordan-Wigner bit
string, qubit q = bit q, qubit 2p = alpha and 2p + 1 = beta of MO p (SCIENCE.md section 1). With order
``"energy"`` MO 0 is sampled first; only the bit layout moves, the Jordan-Wigner signs stay in MO order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

ORDERS = ("reversed", "energy")
MAX_QUBITS = 62  # keys are signed 64-bit integers; a second word is not supported
TOKENS = 4


@dataclass(frozen=True)
class Sector:
    """All determinants of `n_orbitals` MOs with `n_alpha` and `n_beta` electrons.

    Raises ValueError for impossible electron counts, unknown orders and more than 62 spin-orbitals.
    """

    n_orbitals: int
    n_alpha: int
    n_beta: int
    order: str = "reversed"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: {self.order!r} is not one of {', '.join(ORDERS)}")
        if not 0 < 2 * self.n_orbitals <= MAX_QUBITS:
            raise ValueError(f"{2 * self.n_orbitals} spin-orbitals: supported are 2 to {MAX_QUBITS}")
        for spin, electrons in (("alpha", self.n_alpha), ("beta", self.n_beta)):
            if not 0 <= electrons <= self.n_orbitals:
                raise ValueError(f"{electrons} {spin} electrons do not fit {self.n_orbitals} orbitals")

    @property
    def n_qubits(self) -> int:
        """Number of spin-orbitals n = qubits."""
        return 2 * self.n_orbitals

    @property
    def size(self) -> int:
        """|S| = C(n/2, n_alpha) C(n/2, n_beta), the study's search space."""
        return comb(self.n_orbitals, self.n_alpha) * comb(self.n_orbitals, self.n_beta)

    def enumerate_keys(self) -> NDArray[np.int64]:
        """Every determinant of the sector in key layout, ascending: int64 (size,)."""
        alpha = _spin_strings(self.n_orbitals, self.n_alpha)
        beta = _spin_strings(self.n_orbitals, self.n_beta) << 1
        return np.sort((alpha[:, None] | beta[None, :]).ravel())

    def hf_key(self) -> int:
        """Key of the aufbau determinant: the lowest n_alpha and n_beta MOs occupied."""
        bits = sum(1 << (2 * p) for p in range(self.n_alpha))
        bits |= sum(1 << (2 * p + 1) for p in range(self.n_beta))
        return int(to_key_layout(np.array([bits], dtype=np.int64), self.n_orbitals, self.order)[0])


def _spin_strings(n_orbitals: int, electrons: int) -> NDArray[np.int64]:
    """Integers with `electrons` of the `n_orbitals` even bits set: int64 (C(n_orbitals, electrons),)."""
    sets: list[Sequence[int]] = list(combinations(range(n_orbitals), electrons))
    if electrons == 0:
        return np.zeros(1, dtype=np.int64)
    return (np.int64(1) << (2 * np.array(sets, dtype=np.int64))).sum(axis=1)


def to_key_layout(bits: NDArray[np.int64], n_orbitals: int, order: str) -> NDArray[np.int64]:
    """Permute bit strings or masks from qubit layout to key layout: int64 in, int64 out, any shape."""
    if order not in ORDERS:
        raise ValueError(f"order: {order!r} is not one of {', '.join(ORDERS)}")
    bits = np.asarray(bits, dtype=np.int64)
    if order == "reversed":
        return bits.copy()
    out = np.zeros_like(bits)
    for p in range(n_orbitals):
        out |= ((bits >> (2 * p)) & 3) << (2 * (n_orbitals - 1 - p))
    return out


def from_key_layout(keys: NDArray[np.int64], n_orbitals: int, order: str) -> NDArray[np.int64]:
    """Inverse of `to_key_layout`; reversing the orbitals is its own inverse."""
    return to_key_layout(keys, n_orbitals, order)


def feasible_tokens(sector: Sector) -> NDArray[np.bool_]:
    """Which tokens keep the sector reachable: bool (T + 1, T + 1, T + 1, 4), indexed by
    (tokens already placed, alpha electrons already placed, beta electrons already placed, token).

    An outcome from which the remaining MOs cannot reach (n_alpha, n_beta) has probability 0 (SCIENCE.md
    section 1). Rows that are not reachable themselves, and rows of complete determinants, are all False.
    """
    t_max = sector.n_orbitals
    placed, alpha, beta, token = np.ogrid[: t_max + 1, : t_max + 1, : t_max + 1, :TOKENS]
    alpha, beta = alpha + (token & 1), beta + (token >> 1)
    left = t_max - placed - 1  # MOs that remain after this token
    need_alpha, need_beta = sector.n_alpha - alpha, sector.n_beta - beta
    return (left >= 0) & (need_alpha >= 0) & (need_alpha <= left) & (need_beta >= 0) & (need_beta <= left)
