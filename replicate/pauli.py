"""The Hamiltonian as Pauli strings in bit masks, grouped by flip pattern (SCIENCE.md section 4).
 A Jordan-Wigner string with X or Y on the qubits of `flip` connects x to exactly x ^ flip, and its matrix
element is a sign: (-1)^popcount(x & z), z = the qubits with Y or Z. Strings of one flip pattern therefore add
up to one matrix element h_m(x) = <x|H|x ^ flip_m>. The strings are built from the integrals directly, all
terms of a kind at once in integer arithmetic; OpenFermion is the oracle of the tests and a format for
exchange.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from replicate.sector import MAX_QUBITS

if TYPE_CHECKING:
    from openfermion import QubitOperator

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DEFAULT_THRESHOLD = (
    1e-8  # Hartree, on |w_j|; the Pauli counts and M of SCIENCE.md section 8 are at this value
)
_HERMITICITY = 1e-9  # Hartree: what an input may violate hermiticity or reality by before it is refused


@dataclass(frozen=True)
class Hamiltonian:
    """Real Hamiltonian on qubits, strings grouped by flip pattern; immutable, host memory, qubit layout.

    <x|H|x ^ flips[m]> = sum over k in offsets[m]:offsets[m+1] of weights[k] (-1)^popcount(x & z_masks[k]).

    `flips`: int64 (M,), ascending, flips[0] = 0 is the diagonal (always present). `offsets`: int64 (M+1,).
    `z_masks`: int64 (K,), ascending within a pattern. `weights`: float64 (K,), Hartree; the sign of Y pairs
    is in the weight: Y Y on two flipped qubits contributes -w. `threshold`: see `from_strings`. `n_alpha`,
    `n_beta`: the electrons whose sector is meant.
    """

    n_qubits: int
    n_alpha: int
    n_beta: int
    flips: Ints
    offsets: Ints
    z_masks: Ints
    weights: Floats
    threshold: float = DEFAULT_THRESHOLD
    sha256: str = field(init=False)  # of the content, little endian: independent of machine and file format

    def __post_init__(self) -> None:
        digest = hashlib.sha256(f"{self.n_qubits} {self.n_alpha} {self.n_beta} {self.threshold!r}".encode())
        for name in ("flips", "offsets", "z_masks", "weights"):
            array = np.ascontiguousarray(getattr(self, name), dtype="<f8" if name == "weights" else "<i8")
            array = array.copy()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
            digest.update(array.tobytes())
        object.__setattr__(self, "sha256", digest.hexdigest())

    @property
    def n_pauli_terms(self) -> int:
        """Number of Pauli strings, identity included."""
        return len(self.weights)

    @property
    def n_unique_flips(self) -> int:
        """M: number of distinct flip patterns, identity included."""
        return len(self.flips)

    @property
    def identity_coefficient(self) -> float:
        """Coefficient of the identity string = Tr(H) / 2^n, Hartree."""
        diagonal = slice(0, int(self.offsets[1]))
        return float(self.weights[diagonal][self.z_masks[diagonal] == 0].sum())

    @property
    def string_flips(self) -> Ints:
        """The flip pattern of every string: int64 (K,)."""
        return np.repeat(self.flips, np.diff(self.offsets))


def popcount(masks: Ints) -> Ints:
    """Number of set bits of non-negative int64 masks, any shape."""
    return np.bitwise_count(masks).astype(np.int64)


def _sign(masks: Ints) -> Floats:
    """(-1)^popcount as float64."""
    return np.where(np.bitwise_count(masks) & 1, -1.0, 1.0)


def from_strings(
    flips: Ints,
    z_masks: Ints,
    weights: Floats,
    *,
    n_qubits: int,
    n_alpha: int,
    n_beta: int,
    threshold: float = DEFAULT_THRESHOLD,
) -> Hamiltonian:
    """Add up equal strings, screen, sort and group. Inputs are one-dimensional, one entry per contribution.

    Contributions to a string are added in their order; contributions and partial sums that are at most
    `threshold` (Hartree) in size are dropped on the way, as OpenFermion does. So the counts are those of
    codes built on OpenFermion, the study's lineage among them (H2O at 1e-8: 1654 strings, M = 228; without
    the dropping on the way 1782 and 264). Raises ValueError if strings with an odd number of Y survive: their
    matrix is imaginary, which no electronic Hamiltonian in real orbitals needs and which the kernels do not
    represent.
    """
    large = np.abs(weights) > threshold
    flips, z_masks, weights = flips[large], z_masks[large], weights[large]
    order = np.lexsort((z_masks, flips))  # stable: contributions to one string keep their order
    flips, z_masks, weights = flips[order], z_masks[order], weights[order]
    new = np.ones(len(flips), dtype=bool)
    new[1:] = (flips[1:] != flips[:-1]) | (z_masks[1:] != z_masks[:-1])
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(flips)))
    total = np.zeros(len(starts))
    by_count = np.argsort(-counts, kind="stable")  # strings that still have a k-th contribution come first
    for k in range(int(counts.max(initial=0))):
        alive = by_count[: np.count_nonzero(counts > k)]
        sums = total[alive] + weights[starts[alive] + k]
        total[alive] = np.where(np.abs(sums) > threshold, sums, 0.0)
    weights = total
    flips, z_masks = flips[starts], z_masks[starts]
    keep = weights != 0
    odd = (np.bitwise_count(flips & z_masks) & 1).astype(bool)
    if np.any(odd & keep & (np.abs(weights) > _HERMITICITY)):
        raise ValueError(
            "Pauli strings with an odd number of Y: the matrix is not real, which is not supported"
        )
    keep &= ~odd
    flips, z_masks, weights = flips[keep], z_masks[keep], weights[keep]
    patterns = np.union1d(np.zeros(1, dtype=np.int64), flips)  # the diagonal is there even when it is empty
    offsets = np.append(np.searchsorted(flips, patterns), len(flips))
    return Hamiltonian(n_qubits, n_alpha, n_beta, patterns, offsets, z_masks, weights, threshold)


def jordan_wigner(
    constant: float,
    h1: Floats,
    eri: Floats,
    *,
    n_alpha: int,
    n_beta: int,
    threshold: float = DEFAULT_THRESHOLD,
) -> Hamiltonian:
    """Jordan-Wigner Hamiltonian of real integrals, qubit 2p = alpha and 2p + 1 = beta of orbital p.

    `h1`: float64 (T, T), symmetric. `eri`: float64 (T, T, T, T), chemists' (pq|rs), eight-fold symmetric. H =
    constant + sum_{pq} h_pq a+_p a_q + sum_{p<q, r<s} <pq||rs> a+_p a+_q a_s a_r over spin-orbitals. Every
    term is taken with its conjugate: one contribution to each of 2, 4 or 8 strings, all terms of one kind at
    once. Integrals below `threshold` are zero and contributions are screened (see `from_strings`): term by
    term OpenFermion's result.
    """
    n_orbitals = len(h1)
    if 2 * n_orbitals > MAX_QUBITS:
        raise ValueError(f"{2 * n_orbitals} spin-orbitals: supported are at most {MAX_QUBITS}")
    h1, eri = (h1 + h1.T) / 2, _symmetrised(eri)
    h1, eri = np.where(np.abs(h1) < threshold, 0.0, h1), np.where(np.abs(eri) < threshold, 0.0, eri)
    zero = np.zeros(1, dtype=np.int64)
    parts = [(zero, zero, np.array([constant]))]

    p, q = np.triu_indices(2 * n_orbitals)
    same_spin = (p ^ q) & 1 == 0
    p, q = p[same_spin], q[same_spin]
    parts.append(_strings((p,), (q,), h1[p >> 1, q >> 1]))

    low, high = np.triu_indices(2 * n_orbitals, 1)  # pairs p < q
    left, right = np.triu_indices(len(low))  # pairs of pairs, each unordered pair once
    p, q, r, s = low[left], high[left], low[right], high[right]
    conserving = (p & 1) + (q & 1) == (r & 1) + (s & 1)
    p, q, r, s = p[conserving], q[conserving], r[conserving], s[conserving]
    direct = np.where((p ^ r) & 1, 0.0, eri[p >> 1, r >> 1, q >> 1, s >> 1])
    exchange = np.where((p ^ s) & 1, 0.0, eri[p >> 1, s >> 1, q >> 1, r >> 1])
    parts.append(_strings((p, q), (r, s), direct - exchange))

    flips, z_masks, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return from_strings(
        flips, z_masks, weights, n_qubits=2 * n_orbitals, n_alpha=n_alpha, n_beta=n_beta, threshold=threshold
    )


def _symmetrised(eri: Floats) -> Floats:
    """Average of the eight index permutations, so that what must cancel cancels exactly."""
    eri = (eri + eri.transpose(1, 0, 2, 3)) / 2
    eri = (eri + eri.transpose(0, 1, 3, 2)) / 2
    return (eri + eri.transpose(2, 3, 0, 1)) / 2


def _strings(
    creators: tuple[Ints, ...], annihilators: tuple[Ints, ...], coefficient: Floats
) -> tuple[Ints, Ints, Floats]:
    """Strings of c (a+_p a+_q a_s a_r + h.c.), of c n_p n_q where both pairs are equal;
    likewise for single indices.

    `creators` = (p, q), `annihilators` = (r, s), ascending, one array entry per term. The operator leaves p,
    q filled and what it emptied empty: a product of projectors (1 -+ Z)/2 on the bra, one Z subset per
    string, times the parity of the orbitals below each index. Subsets that are odd on the flipped qubits
    cancel against the conjugate. Returns flip, z mask and weight of every contribution, term by term.
    """
    bit = np.int64(1)
    filled = np.bitwise_or.reduce([bit << i for i in creators])
    emptied = np.bitwise_or.reduce([bit << i for i in annihilators])
    flip = filled ^ emptied
    state, parity, sign = flip.copy(), np.zeros_like(flip), np.zeros_like(flip)
    # rightmost operator first, on the ket x ^ flip: a_r, a_s, then a+_q, a+_p
    for index in (*annihilators, *reversed(creators)):
        below = (bit << index) - 1
        sign += popcount(state & below)
        parity ^= below
        state ^= bit << index
    sign += popcount(parity & filled)  # the occupations of the indices themselves are known
    parity &= ~(filled | emptied)
    weight = coefficient * (1.0 - 2.0 * (sign & 1))

    out: list[tuple[Ints, Ints, Floats, Ints]] = []
    n_flipped = popcount(flip)
    for k in (0, 2, 4):
        term = np.flatnonzero((n_flipped == k) & (coefficient != 0))
        n_shared = len(creators) - k // 2
        if not len(term):
            continue
        columns = _bits(flip[term], k) + _bits((filled & emptied)[term], n_shared)
        scale = weight[term] * (2.0 if k else 1.0) / 2.0 ** len(columns)
        for subset in range(1 << len(columns)):
            if (subset & ((1 << k) - 1)).bit_count() % 2 == 0:
                z = np.zeros_like(term)
                for j, column in enumerate(columns):
                    z |= column * (subset >> j & 1)
                out.append((flip[term], parity[term] ^ z, scale * _sign(z & filled[term]), term))
    if not out:
        return flip[:0], flip[:0], coefficient[:0]
    flips, z_masks, weights, terms = (np.concatenate(column) for column in zip(*out, strict=True))
    order = np.argsort(terms, kind="stable")
    return flips[order], z_masks[order], weights[order]


def _bits(masks: Ints, count: int) -> list[Ints]:
    """The `count` set bits of every mask, lowest first, each as a mask."""
    out = []
    for _ in range(count):
        lowest = masks & -masks
        out.append(lowest)
        masks = masks ^ lowest
    return out


def sector_mean_energy(constant: float, h1: Floats, eri: Floats, n_alpha: int, n_beta: int) -> float:
    """E_inf = Tr(H) over the (n_alpha, n_beta) sector / its dimension, Hartree (SCIENCE.md section 5).

    Only occupation numbers survive the trace: <n_p> = n_sigma / T, <n_p n_r> = n_sigma (n_sigma - 1) / (T (T
    - 1)) for one spin and p != r, and n_alpha n_beta / T^2 for two spins.
    """
    t = len(h1)
    coulomb = np.einsum("pprr->pr", eri)
    exchange = np.einsum("prrp->pr", eri)
    same = float((coulomb - exchange).sum())  # p = r cancels by itself
    pairs = sum(m * (m - 1) for m in (n_alpha, n_beta)) / (t * (t - 1)) if t > 1 else 0.0
    one_body = float(np.trace(h1)) * (n_alpha + n_beta) / t
    return constant + one_body + 0.5 * same * pairs + float(coulomb.sum()) * n_alpha * n_beta / t**2


def to_openfermion(hamiltonian: Hamiltonian) -> QubitOperator:
    """The same Hamiltonian as an OpenFermion QubitOperator (qubit q = bit q)."""
    from openfermion import QubitOperator

    operator = QubitOperator()
    strings = zip(hamiltonian.string_flips, hamiltonian.z_masks, hamiltonian.weights, strict=True)
    for flip, z_mask, weight in strings:
        term = tuple(
            (q, "IXZY"[(int(flip) >> q & 1) + 2 * (int(z_mask) >> q & 1)])
            for q in range(hamiltonian.n_qubits)
            if (int(flip) | int(z_mask)) >> q & 1
        )
        # <x|Y|x^1> = -i (-1)^x: a pair of Y is a factor -1
        operator.terms[term] = float(weight) * (-1.0) ** (int(flip & z_mask).bit_count() // 2)
    return operator


def from_openfermion(
    operator: QubitOperator,
    *,
    n_alpha: int,
    n_beta: int,
    n_qubits: int | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> Hamiltonian:
    """Hamiltonian of a QubitOperator whose matrix is real.

    Raises ValueError for coefficients with an imaginary part and for strings with an odd number of Y.
    `n_qubits` defaults to the highest qubit that occurs, rounded up to whole orbitals.
    """
    terms: dict[tuple[tuple[int, str], ...], Any] = operator.terms
    highest = max((q for term in terms for q, _ in term), default=-1)
    n_qubits = (highest // 2 + 1) * 2 if n_qubits is None else n_qubits
    if highest >= n_qubits or n_qubits > MAX_QUBITS:
        raise ValueError(f"qubit {highest} does not fit {n_qubits} qubits (at most {MAX_QUBITS})")
    flips, z_masks, weights = [], [], []
    for term, coefficient in terms.items():
        value = complex(coefficient)
        n_y = sum(letter == "Y" for _, letter in term)
        if abs(value.imag) > _HERMITICITY or (n_y % 2 and abs(value) > max(threshold, _HERMITICITY)):
            name = " ".join(f"{letter}{q}" for q, letter in term) or "identity"
            raise ValueError(
                f"{name}: coefficient {value} makes the matrix complex; only real ones are supported"
            )
        flips.append(sum(1 << q for q, letter in term if letter in "XY"))
        z_masks.append(sum(1 << q for q, letter in term if letter in "YZ"))
        weights.append(value.real * (-1.0) ** (n_y // 2))
    return from_strings(
        np.array(flips, dtype=np.int64),
        np.array(z_masks, dtype=np.int64),
        np.array(weights, dtype=np.float64),
        n_qubits=n_qubits,
        n_alpha=n_alpha,
        n_beta=n_beta,
        threshold=threshold,
    )
