"""FCIDUMP integral files (Knowles and Handy 1989) as arrays; `replicate.spec.files` checks the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replicate.sector import MAX_QUBITS
from replicate.spec import UserError
from replicate.spec.files import fcidump_header, fcidump_integrals, read_text


@dataclass(frozen=True)
class Fcidump:
    """Integrals over orthonormal orbitals, Hartree: h1 (T, T), eri (T, T, T, T) in chemists' order.

    ms2 = n_alpha - n_beta.
    """

    constant: float
    h1: NDArray[np.float64]
    eri: NDArray[np.float64]
    n_electrons: int
    ms2: int


def read_fcidump(path: Path | str) -> Fcidump:
    """Parse a restricted, real FCIDUMP file; what it does not list is zero.

    MS2 is taken by size: the majority spin is alpha. Raises UserError with file, line and what is wrong: a
    header that is missing or impossible, more than 62 spin-orbitals, complex or unreadable numbers, indices
    out of range, integrals given twice with different values, no one-electron integrals.
    """
    text = read_text(Path(path), f"{path}")
    header = fcidump_header(text, f"{path}")
    t, electrons, ms2 = header["NORB"], header["NELEC"], abs(header["MS2"])
    if 2 * t > MAX_QUBITS:
        raise UserError(f"{path}: NORB: {2 * t} spin-orbitals; supported are 2 to {MAX_QUBITS}")
    if (electrons + ms2) % 2 or ms2 > electrons or (electrons + ms2) // 2 > t:
        raise UserError(f"{path}: MS2: {header['MS2']} is impossible with NELEC = {electrons} in NORB = {t}")
    constant, h1, eri = 0.0, np.zeros((t, t)), np.zeros((t, t, t, t))
    for value, *indices in fcidump_integrals(text, f"{path}", t):
        p, q, r, s = (index - 1 for index in indices)
        if s >= 0:
            for a, b, c, d in ((p, q, r, s), (r, s, p, q)):
                eri[a, b, c, d] = eri[b, a, c, d] = eri[a, b, d, c] = eri[b, a, d, c] = value
        elif q >= 0:
            h1[p, q] = h1[q, p] = value
        elif p < 0:
            constant = value  # indices p 0 0 0 are orbital energies, which are not needed
    return Fcidump(constant, h1, eri, electrons, ms2)
